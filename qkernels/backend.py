"""What runs where. The dispatcher is the only chooser; this file loads the libraries and says what it found.

QKERNELS_BACKEND=reference|triton|native (read once, here) or ``use_backend`` forces one implementation.
"""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from . import eager, reference

BACKENDS = ("native", "triton", "reference")
LIBRARIES = {"cpu": "_C_cpu.so", "cuda": "_C_cuda.so"}
SCHEMAS: dict[str, str] = {}
why_not: dict[str, str] = {}  # device -> why its native library does not serve

library = torch.library.Library("qkernels", "DEF")
_dispatched: dict[str, object] = {}
_forced: str | None = None
_told = False  # that the reference serves


def define(name: str, schema: str, fake) -> None:
    """Declare an op: its schema, its fake, and the reference as the implementation on any device."""
    SCHEMAS[name] = schema
    library.define(f"{name}{schema}")
    library.impl(name, _fallback(name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"qkernels::{name}", fake, lib=library)
    _dispatched[name] = getattr(torch.ops.qkernels, name).default


def _fallback(name: str):
    """The reference, where no kernels serve a device; the first call says so, for it is some ten times slower."""
    served = getattr(reference, name)

    def fallback(*args):
        global _told
        if not _told:
            _told = True
            first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            why = why_not.get(first.device.type, f"there are no kernels for {first.device.type}")
            warnings.warn(
                f"qkernels runs as plain PyTorch here, slowly: {why}; see `qkernels doctor`", stacklevel=2
            )
        return served(*args)

    return fallback


def load() -> None:
    """Load the native libraries that are there; give CUDA to Triton where no native library serves it."""
    folder = Path(__file__).parent
    for device, file in LIBRARIES.items():
        if device == "cuda" and torch.version.cuda is None:
            why_not[device] = "this torch is a CPU build"
        elif not (folder / file).exists():
            why_not[device] = f"{file} was not built (no compiler at install time, or it was switched off)"
        else:
            try:
                torch.ops.load_library(str(folder / file))
            except OSError as error:
                why_not[device] = f"{file} does not load: {error}"
    if "cuda" in why_not and has_triton():
        for name in SCHEMAS:
            if not _registered(name, "cuda"):  # an op composed of others leaves the choice to them
                library.impl(name, _lazy_triton(name), "CUDA")
    if "cpu" not in why_not:
        eager.load()


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _registered(name: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{name}", device.upper())


def _lazy_triton(name: str):
    """The op's launcher in qkernels.triton, which has one for each; imported at the first call, which compiles."""

    def launcher(*args):
        from . import triton

        return getattr(triton, name)(*args)

    return launcher


def op(name: str):
    """The callable that serves an op: the dispatcher's, or the forced backend's."""
    if _forced is None or _forced == "native":
        return _dispatched[name]
    return getattr(reference, name) if _forced == "reference" else _lazy_triton(name)


def apply_function(function: Any, counterpart: str | None = None) -> Callable[..., Any]:
    """``function.apply``, without its inspection of the signature (most of a small call) where nothing needs it.

    ``counterpart`` is its name in the eager library. Where no gradient is wanted it is ``function.forward``.
    Transforms and dual numbers get ``function.forward_mode``: torch.compile takes no Function that has a jvp.
    Transforms inside torch.compile get ``function.inside_compile``: there torch looks past a Function's backward and
    would differentiate through the rounding itself, to zero.
    """
    if torch.compiler.is_compiling():
        transformed = torch._C._are_functorch_transforms_active()
        return function.inside_compile if transformed else function.apply
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return getattr(function, "forward_mode", function).apply
    if counterpart and eager.library is not None and _forced in (None, "native"):
        return getattr(eager.library, counterpart)
    if not torch.is_grad_enabled():
        return function.forward
    return super(torch.autograd.Function, function).apply


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend: "native", "triton" or "reference".

    "native" is the dispatcher's choice, as outside of the block: on a device whose native library is not there, Triton
    or the reference answers (``serves`` and ``qkernels doctor`` tell).
    ValueError for another name; RuntimeError where there is no native library at all, or no Triton.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "native" and set(why_not) == set(LIBRARIES):
        raise RuntimeError(f"backend 'native' is not available: {why_not['cpu']}")
    if name == "triton" and not has_triton():
        raise RuntimeError("backend 'triton' is not available: install qkernels[triton]")
    previous = _forced
    try:
        _force(name)
        yield
    finally:
        _force(previous)


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    # Graphs made outside of the block are gone through by the block's backend as well.
    if eager.library is not None:
        eager.library.set_python_always(name not in (None, "native"))


def forced() -> str | None:
    """The backend that use_backend or QKERNELS_BACKEND asks for, if any."""
    return _forced


def serves(name: str, device: str) -> str:
    """Which backend answers an op on a device now."""
    if _forced is not None and _forced != "native":
        return _forced
    if _registered(name, device):
        return "triton" if device == "cuda" and "cuda" in why_not else "native"
    return "reference"


def _force_from_environment() -> None:
    name = os.environ.get("QKERNELS_BACKEND", "")
    if name and name != "auto":
        with use_backend(name):
            pass
        _force(name)
