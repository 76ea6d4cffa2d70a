"""The multi-tensor ops' meaning: norms, dot products and perturbed copies of a list of tensors."""

import torch

from .. import layout, random
from .precision import compute_type

# What a move does to an element; the twin of enum Move in csrc/math/perturb.h.
ALONG, ADAPTIVE, NORMAL, MAGNITUDE, UNIFORM, ASCEND, ASCEND_SIGN = range(7)
DRAWN = (NORMAL, MAGNITUDE, UNIFORM)


def multi_norm(tensors, weights, eta):
    """Global L2 norm, float64 (1,), and that of each tensor, float64 (len(tensors),).

    With ``weights``: the norm of (|w| + eta) * t, both in float64 (ASAM's). Without: weights is empty.
    """
    squares = []
    for i, t in enumerate(tensors):
        values = t.double() * (weights[i].double().abs() + eta) if weights else t.double()
        squares.append(values.square().sum())
    squares = torch.stack(squares)
    return squares.sum().sqrt().reshape(1), squares.sqrt()


def multi_dot(a, b):
    """a.b, a.a and b.b over two lists, float64 (3,)."""
    pairs = [(s.double(), t.double()) for s, t in zip(a, b, strict=True)]
    sums = [torch.stack([(s * t).sum(), s.square().sum(), t.square().sum()]) for s, t in pairs]
    return torch.stack(sums).sum(0)


def multi_perturb(out, params, directions, points, move, coefficients, seed, first_copy):
    """Write copy k of params[t], perturbed, to out[k * len(params) + t].

    With a, b, c = coefficients[k] (float64 (copies, 1 to 3); one not finite or not given stands for 0), T = |w| + b:
        ALONG        w + a d + b p
        ADAPTIVE     w + a T^2 d
        NORMAL       w + a n                       n ~ N(0, 1)
        MAGNITUDE    w + n sqrt((a w)^2 + b^2)
        UNIFORM      w + a u                       u uniform on [-1, 1)
        ASCEND       w + clip(p - w + a d, -r, r)  r = b |w| + c
        ASCEND_SIGN  the same with sign(d)
    d, p: directions and points (both may be empty: points default to the parameters, and to 0 in ALONG). Where the
    factor of a variate is 0, w stays as it is. Variates: seed, stream (first_copy + k) * 2**32 + t, dense memory order.
    """
    table = torch.where(coefficients.isfinite(), coefficients, 0.0)
    table = torch.nn.functional.pad(table, (0, 3 - table.shape[1]))
    for k in range(table.shape[0]):
        for t, w in enumerate(params):
            w = layout.dense(w)
            d = directions[t] if directions else None
            p = points[t] if points else None
            stream = ((first_copy + k) << 32) + t
            y = _perturbed(w, d, p, move, table[k], seed, stream)
            out[k * len(params) + t].copy_(y)


def multi_climb(out, params, directions, norm, rho, eta, norm_of=multi_norm, perturb=multi_perturb):
    """Write w + rho d / ||d||, or w + rho T^2 d / ||T d|| with T = |w| + eta where eta is given, to out[t].

    norm: float64 (1,), of a whole of which the list is a part; None for the list's own. RuntimeError, and nothing is
    written, where out differs from params in number, dtype, shape or dense memory order.
    """
    if not (len(out) == len(params) and all(map(_alike, out, params))):
        raise RuntimeError("qkernels: out differs from params in number, dtype, shape or memory order")
    if norm is None:
        norm = norm_of(directions, params, eta)[0] if eta is not None else norm_of(directions, [], 0.0)[0]
    table = (torch.full_like(norm, rho) / norm).reshape(1, 1)
    if eta is not None:
        table = torch.nn.functional.pad(table, (0, 1), value=eta)
    perturb(out, params, directions, [], ALONG if eta is None else ADAPTIVE, table, None, 0)


def _alike(t, w):
    if t.dtype != w.dtype or t.shape != w.shape:
        return False
    return t.is_contiguous() and w.is_contiguous() or t.stride() == layout.dense(w).stride()


def _perturbed(w, d, p, move, numbers, seed, stream):
    compute = compute_type(w)
    a, b, c = numbers.to(compute)
    x = w.to(compute)
    d = None if d is None else d.to(compute)
    p = None if p is None else p.to(compute)
    if move in DRAWN:
        d = _variates(w, move, seed, stream).to(compute)
    if move in (ASCEND, ASCEND_SIGN):
        p = x if p is None else p
        if move == ASCEND_SIGN:
            d = torch.where(d.isnan(), d, d.sign())
        u = _moved(p - x, a, d)
        r = b * x.abs() + c
        return x + torch.where(u < -r, -r, torch.where(u > r, r, u))
    if move == ADAPTIVE:
        reach = x.abs() + b
        spread = a * (reach * reach)
    elif move == MAGNITUDE:
        scaled = a * x
        total = scaled * scaled + b * b
        spread = random.sqrt(total) if compute == torch.float32 else total.sqrt()
    else:
        spread = a
    y = _moved(x, spread, d)
    return y if move != ALONG or p is None else _moved(y, b, p)


def _moved(w, spread, variate):
    return torch.where(spread == 0, w, w + spread * variate)


def _variates(w, move, seed, stream):
    if move == UNIFORM:
        words = random.words(seed, stream, w.numel()) >> 8
        flat = (words - (1 << 23)).float() * 2.0**-23
    else:
        flat = random.normal(seed, stream, w.numel())
    return layout.from_memory(flat, w)
