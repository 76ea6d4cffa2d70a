"""Which implementations of an op there are, and when two results count as equal."""

import contextlib
import importlib
import math
import os
from collections.abc import Callable

import torch

from .. import backend, reference
from .table import OPS, Case


def devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def backends(op: str, device="cpu") -> dict[str, Callable]:
    """The implementations of an op that can be called directly on a device, by name."""
    device, found = torch.device(device).type, {"reference": getattr(reference, op)}
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        with contextlib.suppress(ImportError):
            found["triton"] = getattr(importlib.import_module("qkernels.triton"), op)
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{op}", device.upper())
    if registered and not (device == "cuda" and "triton" in found and "cuda" in backend.why_not):
        found["native"] = getattr(torch.ops.qkernels, op).default
    return {name: _returning(run) for name, run in found.items()} if OPS[op].writes else found


def wanted(case: Case):
    """What the reference makes of the case on the CPU, which is what every device has to give."""
    return backends(case.op)["reference"](*case.args())


def _returning(run):
    """``run`` on a new list of outputs like its first argument, which it returns."""

    def call(out, *args):
        out = [torch.full_like(t, math.nan) for t in out]
        run(out, *args)
        return tuple(out)

    return call


def sum_bound(dtype: torch.dtype, terms: int, magnitude, want: torch.Tensor) -> torch.Tensor:
    """How far a sum of ``terms`` rounded terms of at most ``magnitude`` may lie from the float64 one."""
    return torch.finfo(dtype).eps * (4 * math.sqrt(terms) * magnitude + want.double().abs())


def compare(case: Case, args: tuple, got, want) -> None:
    """AssertionError unless every output has want's dtype, shape, strides and values (sums: within their bound).

    ``want`` may be on another device than ``got`` and ``args``.
    """
    op = OPS[case.op]
    got, want = ((t,) if isinstance(t, torch.Tensor) else tuple(t) for t in (got, want))
    every = op.exact * len(want) if len(op.exact) == 1 else op.exact
    assert len(got) == len(want) == len(every)
    for number, (g, w, exact) in enumerate(zip(got, want, every)):
        where, w = f"output {number} of {case.id('')}", w.to(g.device)
        assert (g.dtype, g.shape) == (w.dtype, w.shape), (
            f"{where}: {g.dtype} {g.shape}, not {w.dtype} {w.shape}"
        )
        assert g.numel() == 0 or g.stride() == w.stride(), f"{where}: strides {g.stride()}, not {w.stride()}"
        wrong = g.isnan() != w.isnan()
        if exact:
            wrong |= ((g != w) | (g.signbit() != w.signbit())) & ~w.isnan()
        elif g.numel():
            bound = sum_bound(op.rounding(args) or g.dtype, op.terms(args, g), op.magnitude(args, g), w)
            wrong |= ((g.double() - w.double()).abs() > bound) & ~w.isnan()
        if wrong.any():
            first = tuple(int(i) for i in wrong.nonzero()[0])
            raise AssertionError(f"{where}: {int(wrong.sum())} of {g.numel()} differ, first at {first}: "
                                 f"got {g[first].item()!r}, want {w[first].item()!r}")  # fmt: skip
