"""Lists of gradients that may be spread over processes: their local parts, their global norms, their means."""

import torch

from .. import backend, ops
from ..wrapped import groups, local, whole

__all__ = ["combine_", "dot", "groups", "locals_of", "mean_", "norm", "ratio", "whole"]


def locals_of(tensors):
    """This process's parts of them."""
    return list(map(local, tensors))


def norm(tensors, weights=None, eta=0.0):
    """The global L2 norm (of (|w| + eta) t), float64 (1,), over all processes that hold parts of the tensors."""
    parts, own = locals_of(tensors), locals_of(weights or ())
    op = backend.op("multi_norm")
    if all(p is t for p, t in zip(parts, tensors)):
        return op(parts, own, eta)[0]
    return _over_processes(
        tensors, lambda at: op([parts[i] for i in at], [own[i] for i in at if own], eta)[0].square()
    ).sqrt()


def dot(a, b):
    """a.b, a.a and b.b, float64 (3,), over all processes that hold parts of the tensors."""
    parts = locals_of(a), locals_of(b)
    op = backend.op("multi_dot")
    if all(p is t for p, t in zip(parts[0], a)):
        return op(*parts)
    return _over_processes(a, lambda at: op([parts[0][i] for i in at], [parts[1][i] for i in at]))


def _over_processes(tensors, sums):
    """``sums`` of the whole tensors plus the reduced ones of the sharded."""
    sharded = [i for i, t in enumerate(tensors) if groups(t)]
    whole = [i for i, t in enumerate(tensors) if not groups(t)]
    total = sums(sharded)
    for group in groups(tensors[sharded[0]]):
        torch.distributed.all_reduce(total, group=group)
    return total + sums(whole) if whole else total


def mean_(tensors, group):
    """Each tensor's mean over the processes of ``group``, in place: one reduction per dtype."""
    for dtype in {t.dtype for t in tensors}:
        members = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in members])
        torch.distributed.all_reduce(flat, group=group)
        flat /= torch.distributed.get_world_size(group)
        for t, part in zip(members, flat.split([t.numel() for t in members])):
            t.copy_(part.view(t.shape))


def ratio(numerator, denominator):
    """numerator / denominator as a (1, 1) table of coefficients."""
    return (numerator / denominator).reshape(1, 1)


def combine_(targets, directions, coefficient, again=False):
    """t <- t + coefficient d, and t once more with ``again``; one pass. A coefficient that is not finite is 0."""
    t, d = locals_of(targets), locals_of(directions)
    if again:
        coefficient = torch.nn.functional.pad(coefficient, (0, 1), value=1.0)
    ops.multi_perturb(t, t, ops.ALONG, coefficient, d, t if again else None)
