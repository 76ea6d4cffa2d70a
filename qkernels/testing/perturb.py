"""Inputs of the multi-tensor ops: lists of mixed shapes, dtypes and memory orders."""

import math

import torch

from .. import layout
from ..reference.perturb import ADAPTIVE, MAGNITUDE
from .quantizer import SEED, arrange

ETA, FIRST_COPY = 0.01, 2
# Three copies; a number that is not finite stands for 0.
COEFFICIENTS = ((0.3, 0.1, 0.05), (math.nan, 0.2, 0.1), (0.0, 0.3, 0.2))
BESIDE = ((), (0, 3), (2500,))  # shapes beside the case's own


def legal(case):
    """PyTorch's float64 root, which the reference takes, is not correctly rounded."""
    return not (case.settings.get("move") == MAGNITUDE and case.dtype == torch.float64)


def _tensors(case, device, memory="contiguous", special=False, again=0):
    """A tensor as the case says, others of its dtype, and one of each other dtype (float64 beside float64 only)."""
    random = case.generator()
    random.manual_seed(random.initial_seed() + again)
    first = torch.randn(case.shape, generator=random, dtype=torch.float64)
    if special and first.numel() > 8:
        first.view(-1)[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    made = [arrange(first.to(device, case.dtype), memory)]
    made += [torch.randn(shape, generator=random).to(device, case.dtype) for shape in BESIDE]
    others = {torch.float32, torch.bfloat16, torch.float16} - {case.dtype}
    made += [torch.randn(7, 5, generator=random).t().to(device, t) for t in sorted(others, key=str)]
    return made


def norm(case, device):
    weights = _tensors(case, device, again=1) if case.settings.get("weighted") else []
    return _tensors(case, device, case.memory, case.settings.get("special", False)), weights, ETA


def dot(case, device):
    a = _tensors(case, device, case.memory, case.settings.get("special", False))
    return a, _tensors(case, device, case.memory if case.option == "plain" else "contiguous", again=1)


def copies(case, device):
    """out is a pattern of dtypes, shapes and strides: `testing.backends` writes into tensors like it."""
    params = _tensors(case, device, case.memory)
    directions = _tensors(
        case, device, case.memory if case.option == "along" else "contiguous", True, again=1
    )
    points = _tensors(case, device, again=2) if case.settings.get("points") else []
    out = [torch.empty_like(layout.dense(w)) for _ in COEFFICIENTS for w in params]
    table = torch.tensor(COEFFICIENTS, dtype=torch.float64, device=device)
    seed = torch.tensor([SEED], device=device)
    return out, params, directions, points, case.settings["move"], table, seed, FIRST_COPY


def climb(case, device):
    """As ``copies``; the norm is given, since a backend's own is a sum."""
    params = _tensors(case, device, case.memory)
    directions = _tensors(case, device, special=True, again=1)
    out = [torch.empty_like(layout.dense(w)) for w in params]
    norm = torch.tensor([3.7], dtype=torch.float64, device=device)
    return out, params, directions, norm, 0.3, ETA if case.settings["move"] == ADAPTIVE else None


def magnitude(args, output):
    """The largest of the sums themselves: every addition is rounded in the sums' own dtype."""
    return float(output.nan_to_num(0.0, 0.0, 0.0).abs().max())


def terms(args, output):
    return sum(t.numel() for t in args[0])
