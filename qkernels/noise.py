"""Noise inside the quantizer: what a user passes as ``noise=``. The kernels know it by (kind, a, b).

A layer's noise follows from torch's generator (seeds.py): processes with the same torch.manual_seed draw the same.
"""

import math
from dataclasses import dataclass
from typing import get_args

# The twin of enum Noise in csrc/math/quantize.h.
PLAIN, TEMPERING, AFTER, BEFORE, PSEUDO, PSEUDO_NORMAL, STOCHASTIC, SHIFT = range(8)


def draws(kind: int) -> bool:
    """Whether the kind needs random numbers."""
    return kind not in (PLAIN, SHIFT)


def backward_kind(kind: int) -> int:
    """The kind as gradients see it: what is added to the output leaves them alone."""
    return PLAIN if kind in (TEMPERING, AFTER, SHIFT) else kind


@dataclass(frozen=True)
class Tempering:
    """Error-aware Gaussian noise: y + c * exp(-k * d) * sqrt(d) * n with d = |y - x|, n ~ N(0, 1).

    The noise is outside the gradient. d is in the units of x. c = 0 is LSQ. ValueError where c < 0 or k < 0.
    Source: Noise Tempering, eq. 7 (c 0.2 to 0.4, k = 50).
    """

    c: float = 0.2
    k: float = 50.0

    def __post_init__(self):
        _check("c", self.c, _number(self.c) and 0 <= self.c < math.inf, "a number >= 0")
        _check("k", self.k, _number(self.k) and 0 <= self.k < math.inf, "a number >= 0")

    def code(self) -> tuple[int, float, float]:
        return TEMPERING, float(self.c), float(self.k)


@dataclass(frozen=True)
class FeaturePerturbation:
    """Stochastic feature perturbation: with probability p per layer and step, scale * u, u ~ U[-1/2, 1/2), is added.

    ``where="after"`` adds it to the quantized value (the input of the convolution); ``"before"`` to the position
    before the rounding. The noise is outside the gradient. Source: FPQ, eqs. 9 and 14 (p = 0.1).
    """

    p: float = 0.1
    where: str = "after"

    def __post_init__(self):
        _check("p", self.p, _number(self.p) and 0 <= self.p <= 1, "a probability in [0, 1]")
        _check("where", self.where, self.where in ("after", "before"), "'after' or 'before'")

    def code(self) -> tuple[int, float, float]:
        return AFTER if self.where == "after" else BEFORE, float(self.p), 0.0


@dataclass(frozen=True)
class Pseudo:
    """Pseudo quantization noise: (clip(v) + u) * scale in place of rounding, u ~ U[-1/2, 1/2) or N(0, 1/4).

    The scale's gradient is u inside the clip. Source: DiffQ (Defossez et al. 2021), section 3.
    """

    kind: str = "uniform"

    def __post_init__(self):
        _check("kind", self.kind, self.kind in ("uniform", "normal"), "'uniform' or 'normal'")

    def code(self) -> tuple[int, float, float]:
        return PSEUDO if self.kind == "uniform" else PSEUDO_NORMAL, 0.0, 0.0


@dataclass(frozen=True)
class StochasticRounding:
    """floor(v + u), u ~ U[0, 1), in place of rint(v); gradients as LSQ's with the drawn level."""

    def code(self) -> tuple[int, float, float]:
        return STOCHASTIC, 0.0, 0.0


Noise = Tempering | FeaturePerturbation | Pseudo | StochasticRounding
KINDS = get_args(Noise)  # compilers do not look into a union


def _number(value) -> bool:
    return isinstance(value, (int, float))


def _check(name: str, value, accepted: bool, what: str) -> None:
    if not accepted:
        raise ValueError(f"{name} must be {what}, got {value!r}")
