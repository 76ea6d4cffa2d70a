"""Lists of gradients that may be spread over processes: their local parts, their global norms, their means."""

import torch

from .. import ops


def local(t):
    """This process's part of a sharded tensor (DTensor), else the tensor itself."""
    return t.to_local() if hasattr(t, "to_local") else t


def groups(t):
    """The process groups over which a tensor's parts are spread; empty for a whole tensor."""
    if not hasattr(t, "to_local"):
        return []
    return [t.device_mesh.get_group(i) for i, place in enumerate(t.placements) if place.is_shard()]


def norm(tensors, weights=None, eta=0.0):
    """The global L2 norm (of (|w| + eta) t), float64 (1,), over all processes that hold parts of the tensors."""
    if not any(map(groups, tensors)):
        return ops.multi_norm(list(map(local, tensors)), weights and list(map(local, weights)), eta)[0]

    def squares(members):
        chosen = None if weights is None else [local(weights[i]) for i in members]
        return ops.multi_norm([local(tensors[i]) for i in members], chosen, eta)[0].square()

    return _over_processes(tensors, squares).sqrt()


def dot(a, b):
    """a.b, a.a and b.b, float64 (3,), over all processes that hold parts of the tensors."""
    if not any(map(groups, a)):
        return ops.multi_dot(list(map(local, a)), list(map(local, b)))
    return _over_processes(a, lambda i: ops.multi_dot([local(a[j]) for j in i], [local(b[j]) for j in i]))


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
    t, d = list(map(local, targets)), list(map(local, directions))
    if again:
        coefficient = torch.nn.functional.pad(coefficient, (0, 1), value=1.0)
    ops.multi_perturb(t, t, ops.ALONG, coefficient, d, t if again else None)
