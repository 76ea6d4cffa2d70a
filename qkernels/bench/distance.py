"""The standardised distance, forward and backward through autograd, as distillation calls it."""

import functools

import torch
import torch.nn.functional as F

from .. import backend, ops, reference, testing
from . import measure
from .rows import OURS, Refused, Row, check_serves, dtype_name, equal, ours

EPS = 1e-5
RIVAL_SPREAD = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of a rival's loss and gradient, relative


def definition(student, teacher):
    """The formula as it is written."""

    def standardized(x):
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + EPS)

    total = (standardized(teacher) - standardized(student)).square().sum(dtype=torch.float32)
    return total / (student.numel() // student.shape[1])


def batch_norm(student, teacher):
    """With PyTorch's own kernel for the standardised tensors."""
    s, t = (F.batch_norm(x, None, None, training=True, eps=EPS) for x in (student, teacher))
    return F.mse_loss(s, t, reduction="sum").float() / (student.numel() // student.shape[1])


def suite(device, dtypes=(torch.float32, torch.bfloat16)):
    """A row for each shape and dtype of the table."""
    for case in testing.timed("distance", "standardized_distance", dtypes):
        forward, backward = (testing.OPS[f"standardized_distance{end}"] for end in ("", "_backward"))
        x = torch.empty(case.shape, dtype=case.dtype, device="meta")
        shape = "x".join(map(str, case.shape))
        yield Row(
            op="standardized_distance", case=f"{shape} fwd+bwd", dtype=dtype_name(case.dtype),
            nbytes=forward.traffic((x,)) + backward.traffic((None, x)),
            make=functools.partial(_inputs, case, device), variants=_variants,
            check=functools.partial(_check, case, device), sets=measure.pool_size(2 * x.numel() * x.element_size()),
        )  # fmt: skip


def _inputs(case, device):
    student = torch.randn(case.shape, device=device).to(case.dtype)
    teacher = student + torch.randn(case.shape, device=device).to(case.dtype)
    return student.requires_grad_(), teacher


def _step(f):
    def step(inputs):
        loss = f(*inputs)
        return loss.detach(), *torch.autograd.grad(loss, inputs[0])

    return step


def _variants(backends):
    """The definition is "eager", PyTorch's own op "torch"; "compile" has both."""
    found = [ours(name, _step(ops.standardized_distance)) for name in backends if name in OURS]
    for name, f in (("eager", definition), ("torch", batch_norm)):
        if name in backends:
            found.append(measure.Variant(name, _step(f), f.__name__))
        if "compile" in backends:
            found.append(measure.Variant("compile", _step(torch.compile(f, dynamic=False)), f.__name__))
    return found


def _check(case, device, variant):
    """Ours: both ops on the table's inputs. A rival: loss and gradient of the definition in float64."""
    if variant.backend in OURS:
        names = "standardized_distance", "standardized_distance_backward"
        check_serves(variant, names, device)
        for name in names:
            both = testing.Case(name, case.shape, case.dtype, case.granularity)
            args = both.args(device)
            with variant.active():
                got = backend.op(name)(*args)
            equal(both, args, got, getattr(reference, name)(*args))
        return "equal"
    inputs = _inputs(case, device)
    got = variant.step(inputs)
    want = _step(definition)(tuple(x.detach().double().requires_grad_() for x in inputs))
    off = max(float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want))
    if not off <= RIVAL_SPREAD[case.dtype]:
        raise Refused(f"loss or gradient {off:.1e} off, at most {RIVAL_SPREAD[case.dtype]:g} may")
    return f"{off:.1e} off"
