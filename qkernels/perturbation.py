"""Perturbed copies of a parameter list, and a model with perturbed parameters for the length of a block."""

import contextlib
import itertools
import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from . import layout, ops, quantizers
from .nn import IntegerWeight
from .reference.perturb import ADAPTIVE, ALONG, ASCEND, ASCEND_SIGN, DRAWN, MAGNITUDE, NORMAL, UNIFORM
from .wrapped import check_whole

_ASCENT = ("alpha", "grads", "points", "step", "ball", "eta")
# What each kind takes: its size, then what it may be given beside it.
_TAKES = {
    "gradient": ("rho", "grads"), "adaptive": ("rho", "grads", "eta"), "normal": ("std",), "magnitude": ("std", "eps"),
    "uniform": ("alpha",), "sign": _ASCENT, "ascent": _ASCENT, "direction": ("at", "directions"),
}  # fmt: skip
_BALLS = ("constant", "magnitude")
_Sizes = float | Sequence[float]
_BLOCKS = itertools.count()


def perturb(params: Sequence[torch.Tensor], kind: str = "normal", *, std: _Sizes | None = None,
            rho: _Sizes | None = None, alpha: _Sizes | None = None,
            at: _Sizes | Sequence[Sequence[float]] | None = None, num: int = 1, seed: int | torch.Tensor = 0,
            grads: Sequence[torch.Tensor] | None = None,
            directions: Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]] | None = None,
            points: Sequence[torch.Tensor] | None = None, step: float | None = None, ball: str | None = None,
            eps: float | None = None, eta: float | None = None, first: int = 0,
            out: Sequence[Sequence[torch.Tensor]] | None = None) -> list[list[torch.Tensor]]:  # fmt: skip
    """Perturbed copies of all parameters in one call; the parameters themselves are not touched.

    kind         copy of w                                                               size
    "gradient"   w + rho g / ||g||, ||g|| over the whole list (SAM)                      rho
    "adaptive"   w + rho T^2 g / ||T g||, T = |w| + eta, eta 0.01 (ASAM)                 rho
    "normal"     w + std n, n ~ N(0, 1)                                                  std
    "magnitude"  w + n sqrt(std^2 w^2 + eps^2), eps 0.001 (PAC-Bayes, magnitude-aware)   std
    "uniform"    w + alpha u, u uniform on [-1, 1)                                       alpha
    "sign"       w + clip(p - w + step sign(g), -r, r), step alpha (worst case)          alpha
    "ascent"     w + clip(p - w + step g, -r, r)                                         alpha
    "direction"  w + at d, or w + at[0] d0 + at[1] d1 (loss landscape)                   at

    Args:
        params: list of floating-point tensors of any shapes and dtypes on one device.
        std, rho, alpha, at: the size the kind needs, >= 0 except ``at``: a number, or ``num`` of them, one per copy.
        num: copies. seed: int, or int64 tensor (1,). first: number of the first copy; copy k of a seed is the same
            noise whatever ``num``, ``first``, device and number of threads (stream k * 2**32 + position in the list).
        grads: gradients; default each parameter's ``.grad``. points: where the ascent stands (p), default w.
        ball: r = alpha ("constant", the default) or alpha (|w| + eta), eta 1 ("magnitude").
        directions: a list like params, or a pair of such lists.
        out: a former result of the same shape, to be overwritten.

    Returns: copies, copies[k][i] the k-th copy of params[i], in its dtype and memory order.
    Raises: ValueError naming the argument: unknown kind, one the kind does not take, num < 1, empty list, negative
        size, missing gradients, ...
    """
    ops.check_list("params", params)
    for name, value, least in (("num", num, 1), ("first", first, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    given = {"std": std, "rho": rho, "alpha": alpha, "at": at, "grads": grads, "directions": directions,
             "points": points, "step": step, "ball": ball, "eps": eps, "eta": eta}  # fmt: skip
    _check_given(kind, {name: value for name, value in given.items() if value is not None})
    sizes = _sizes(_TAKES[kind][0], given[_TAKES[kind][0]], num)
    if "grads" in _TAKES[kind]:
        directions = _gradients(params, grads)
    elif kind == "direction":
        directions, points = _directions(directions, params, sizes)
    params = [w.detach() for w in params]
    if points is not None:
        ops.check_list("points", points, params)
    move, table = _moves(kind, params, directions, sizes, step, ball, eps, eta)
    flat = _outputs(out, params, num)
    noise = _seed(seed, params[0]) if move in DRAWN else None
    ops.multi_perturb(flat, params, move, table, directions, points, noise, first)
    return [flat[k * len(params) : (k + 1) * len(params)] for k in range(num)]


@contextlib.contextmanager
def perturbed(
    model: nn.Module, kind: str = "normal", *, params: Iterable[torch.Tensor] | None = None, **settings: Any
) -> Iterator[list[torch.Tensor]]:
    """Inside the block the model's parameters are a perturbed copy; leaving it, also by an exception, restores them.

    The parameters' storage is exchanged for the copy's and back, so nothing is rounded and nothing moves. What the
    block writes into parameters is lost; gradients, buffers and everything else stay. The backward of what was computed
    inside belongs inside: behind the block it is a RuntimeError, for the parameters it would use are others.

    Args:
        model: nn.Module. params: the parameters to perturb; default all that learn, except quantizers' own (step
            sizes, clip levels), and for kinds that need a gradient only those that have one.
        kind, settings: as ``perturb``, one copy.

    Yields: the perturbed tensors, in the order of ``params``. Raises: as ``perturb``; ValueError for a converted model
    without ``params``.
    """
    if "num" in settings:
        raise ValueError(f"perturbed puts one copy into the model, got num={settings['num']!r}")
    check_whole(model, "perturbed")
    if params is None and any(isinstance(m, IntegerWeight) for m in model.modules()):
        raise ValueError(
            "model has integer weights (convert_), which are no parameters: give params, or the model before"
        )
    if params is None:
        params = weights(model)
        if "grads" in _TAKES.get(kind, ()) and settings.get("grads") is None:
            params = [w for w in params if w.grad is not None]
            if not params:
                raise ValueError(
                    f"kind {kind!r} needs gradients: no parameter of the model has one; run backward first"
                )
    params = list(params)
    copy = perturb(params, kind, **settings)[0]
    with swapped(params, copy):
        yield copy


@contextlib.contextmanager
def swapped(params, tensors):
    """Inside the block ``params[i].data`` is ``tensors[i]``. Nothing is copied, so the way back is exact.

    Autograd tells a stale graph by the version counters of its parameters. Inside the block these get numbers that no
    other block uses and no steps reach, so that the backward of a graph made inside fails behind the block; on the way
    out the old ones return, so that graphs made before stay good. The counters are uint32.
    """
    originals, params = [w.data for w in params], tuple(params)
    inside = (1 << 31) + (next(_BLOCKS) % (1 << 20) << 10)
    with torch.autograd._unsafe_preserve_version_counter(params):
        try:
            for w, t in zip(params, tensors, strict=True):
                w.data = t
            torch._C._autograd._unsafe_set_version_counter(params, (inside,) * len(params))
            yield
        finally:
            for w, t in zip(params, originals):
                w.data = t


def weights(model):
    """The parameters of a model that learn, without those of its quantizers."""
    own = quantizers.numbers_of(model)
    return [p for p in model.parameters() if p.requires_grad and id(p) not in own]


def filter_normalized(directions, params):
    """Directions with the norm of the parameter's filter, filter by filter; zero for biases and norm layers.

    d_f <- d_f ||w_f|| / ||d_f||, f an index of the first dimension; tensors of fewer than two dimensions get zeros.
    Source: Li et al. 2018, section 4.
    """
    normalized = []
    for d, w in zip(directions, params, strict=True):
        if w.dim() < 2:
            normalized.append(torch.zeros_like(d))
            continue
        rest = tuple(range(1, w.dim()))
        norms = [torch.linalg.vector_norm(t.detach(), dim=rest, keepdim=True) for t in (w, d)]
        normalized.append(d * (norms[0] / norms[1].clamp_min(1e-30)))
    return normalized


def _check_given(kind, given):
    """ValueError for a kind that is none, that lacks its size, or that takes other arguments than those given."""
    if kind not in _TAKES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _TAKES))}, got {kind!r}")
    size, takes = _TAKES[kind][0], ", ".join(_TAKES[kind])
    for name in given:
        if name not in _TAKES[kind]:
            raise ValueError(f"kind {kind!r} takes {takes}, not {name}")
    if size not in given:
        raise ValueError(f"kind {kind!r} needs {size}, a number or one per copy")
    for name in ("step", "eps", "eta"):
        if name in given and not _is_finite(given[name]):
            raise ValueError(f"{name} must be a finite number, got {given[name]!r}")
    if given.get("ball", "constant") not in _BALLS:
        raise ValueError(f"ball must be 'constant' or 'magnitude', got {given['ball']!r}")
    if kind == "ascent" and "step" not in given:
        raise ValueError("kind 'ascent' needs step, the factor of the gradient")


def _sizes(name, value, num):
    """The sizes of the copies: num numbers (pairs of them for two directions)."""
    pair = (
        name == "at"
        and isinstance(value, (list, tuple))
        and num == 1
        and not isinstance(value[0], (list, tuple))
    )
    values = list(value) if isinstance(value, (list, tuple)) and not pair else [value] * num
    if len(values) != num:
        raise ValueError(f"{name} must be a number or num={num} of them, got {len(values)}")
    for v in values:
        for x in v if isinstance(v, (list, tuple)) else [v]:
            if not _is_finite(x) or (name != "at" and x < 0):
                raise ValueError(f"{name} must be a finite number{' >= 0' * (name != 'at')}, got {x!r}")
    return values


def _is_finite(x):
    return isinstance(x, numbers.Real) and math.isfinite(x)


def _gradients(params, grads):
    if grads is None:
        missing = [i for i, w in enumerate(params) if w.grad is None]
        if missing:
            raise ValueError(f"params[{missing[0]}] has no gradient: run backward first, or give grads")
        grads = [w.grad for w in params]
    ops.check_list("grads", grads, params)
    return grads


def _directions(directions, params, sizes):
    """One list, or two: the second one goes where points go."""
    if directions is None:
        raise ValueError("kind 'direction' needs directions, a list like params or a pair of such lists")
    both = len(directions) == 2 and all(isinstance(d, (list, tuple)) for d in directions)
    lists = list(directions) if both else [directions]
    for d in lists:
        ops.check_list("directions", d, params)
    for size in sizes:
        if (len(size) if isinstance(size, (list, tuple)) else 1) != len(lists):
            raise ValueError(f"at must give {len(lists)} number(s) per copy, one per direction, got {size!r}")
    return lists[0], lists[1] if both else None


def _moves(kind, params, directions, sizes, step, ball, eps, eta):
    """The op's move and its table of coefficients, a row per copy, on the parameters' device."""
    if kind in ("gradient", "adaptive"):
        eta = 0.01 if eta is None else eta
        norm = ops.multi_norm(directions, params if kind == "adaptive" else None, eta)[0]
        table = _table([[size] for size in sizes], norm) / norm
        if kind == "gradient":
            return ALONG, table
        return ADAPTIVE, torch.cat([table, torch.full_like(table, eta)], 1)
    if kind in ("sign", "ascent"):
        eta = 1.0 if eta is None else eta
        radius = [(0.0, size) if ball != "magnitude" else (size, size * eta) for size in sizes]
        rows = [[size if step is None else step, *r] for size, r in zip(sizes, radius)]
        return (ASCEND_SIGN if kind == "sign" else ASCEND), _table(rows, params[0])
    if kind == "direction":
        return ALONG, _table(
            [size if isinstance(size, (list, tuple)) else [size] for size in sizes], params[0]
        )
    move = {"normal": NORMAL, "magnitude": MAGNITUDE, "uniform": UNIFORM}[kind]
    eps = 1e-3 if eps is None else eps
    return move, _table([[size, eps] if move == MAGNITUDE else [size] for size in sizes], params[0])


def _table(rows, like):
    return torch.tensor(rows, dtype=torch.float64, device=like.device)


def _outputs(out, params, num):
    if out is None:
        return ops.empty_copies(params, num)
    if len(out) != num:
        raise ValueError(f"out must hold num={num} copies, got {len(out)}")
    for copy in out:
        ops.check_list("out", copy, params)
        for i, (t, w) in enumerate(zip(copy, params)):
            if t.stride() != layout.dense(w).stride():
                raise ValueError(f"out[..][{i}] must have the strides of its parameter, got {t.stride()}")
    return [t for copy in out for t in copy]


def _seed(seed, like):
    if isinstance(seed, torch.Tensor) and seed.dtype == torch.int64 and seed.numel() == 1:
        return seed.reshape(1).to(like.device)
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an int within int64, or an int64 tensor of shape (1,), got {seed!r}")
    return torch.tensor([seed], dtype=torch.int64, device=like.device)
