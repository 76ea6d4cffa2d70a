"""Statistics of the data a quantizer starts from, gathered over batches and agreed between processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_SAMPLES = 8192  # kept per batch for the least-squares range


def run_first(model: nn.Module, batch: Any) -> Any:
    """The model on the tensor that a batch is, or begins with. TypeError where there is none."""
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"loader must give tensors or (tensor, ...) tuples, got {type(x).__name__}; give forward(model, batch) for "
            "other batches"
        )
    return model(x.to(next(model.parameters()).device))


def share_reached(statistics, device):
    """Where any process has seen data, those that have not get empty statistics: then all agree on the same ones."""
    if not several():
        return
    reached = torch.tensor([s.sums is not None for s in statistics], dtype=torch.uint8, device=device)
    dist.all_reduce(reached, op=dist.ReduceOp.MAX)
    for mine, anywhere in zip(statistics, reached.tolist(), strict=True):
        if anywhere and mine.sums is None:
            mine.clear(device)


def several():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Statistics:
    """Count, sums and extremes per row (``axis`` or ``group_size``), or of the whole tensor, in float64; and a strided
    sample of it."""

    def __init__(self, axis=None, group_size=None):
        self.axis, self.group_size, self.sums, self.samples = axis, group_size, None, []

    @torch.no_grad()
    def update(self, x):
        x = x.detach()
        if x.numel() == 0:
            return
        along = x.reshape(-1, self.group_size or x.numel())
        rows = (along if self.axis is None else x.movedim(self.axis, 0).flatten(1)).double()
        count = torch.full((rows.shape[0],), float(rows.shape[1]), dtype=torch.float64, device=x.device)
        sums = torch.stack([count, rows.sum(1), rows.square().sum(1), rows.abs().sum(1)])
        low, high = rows.amin(1), rows.amax(1)
        if self.sums is None:
            self.sums, self.minimum, self.maximum = sums, low, high
        else:
            self.sums += sums
            self.minimum, self.maximum = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
        flat = x.flatten()
        # An odd stride: images and channels are powers of two, and the sample must not follow one column of them.
        self.samples.append(flat[:: -(-flat.numel() // _SAMPLES) | 1].double())

    def fill(self, size):
        """Rows of zeros alone count as values of the other rows' mean size, else of ``size``, of both signs.

        A weight that begins at zero is to learn; a step of the size of its other rows lets it.
        """
        zero = self.peak == 0
        if not zero.any():
            return
        others = self.mean_abs[~zero & self.mean_abs.isfinite()]
        size = others.mean() if others.numel() else torch.full_like(self.peak[0], size)
        values = torch.stack([torch.zeros_like(self.sums[0]), self.sums[0] * size**2, self.sums[0] * size])
        self.sums[1:] = torch.where(zero, values, self.sums[1:])
        self.minimum, self.maximum = self.minimum.where(~zero, -size), self.maximum.where(~zero, size)

    def clear(self, device):
        """No data, per tensor."""
        self.sums = torch.zeros(4, 1, dtype=torch.float64, device=device)
        self.minimum, self.maximum = self.sums[0] + torch.inf, self.sums[0] - torch.inf
        self.samples = [self.sums[0, :0]]

    def agreed(self):
        """self, after the processes of the default group have joined what they saw."""
        if self.sums is None:
            raise RuntimeError("no data was seen: the loader gave no batch, or this layer never ran")
        if several():
            dist.all_reduce(self.sums)
            if not self.sums[0].any():
                raise RuntimeError("no data was seen by any process: their first batches are empty here")
            dist.all_reduce(self.minimum, op=dist.ReduceOp.MIN)
            dist.all_reduce(self.maximum, op=dist.ReduceOp.MAX)
            mine = torch.cat(self.samples)
            sizes = [None] * dist.get_world_size()
            dist.all_gather_object(sizes, mine.numel())
            parts = [mine.new_zeros(max(sizes)) for _ in sizes]
            dist.all_gather(parts, torch.nn.functional.pad(mine, (0, max(sizes) - mine.numel())))
            self.samples = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        return self

    @property
    def mean(self):
        return self.sums[1] / self.sums[0]

    @property
    def mean_abs(self):
        return self.sums[3] / self.sums[0]

    @property
    def deviation(self):
        return (self.sums[2] / self.sums[0] - self.mean.square()).clamp(min=0).sqrt()

    @property
    def peak(self):
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    def least_squares_range(self, levels, steps=24, refinements=20):
        """(scale, offset), each (1,), of the range inside [min, max] with the least squared error on the sample.

        The best of a grid of ranges, then alternately the levels of a range and the least-squares line through them.
        Constant data gives scale 0.
        """
        x = torch.cat(self.samples)
        low, high = x.min(), x.max()
        cuts = torch.linspace(0, 1, steps, dtype=torch.float64, device=x.device)
        best = (torch.inf, (high - low) / levels, low)
        if low == high:
            return best[1].reshape(1), low.reshape(1)
        for cut in cuts[:-1]:
            lo = low + (high - low) * cut
            scale = ((high - lo) * cuts[1:] / levels).unsqueeze(1)
            errors = (_levels(x, scale, lo, levels) * scale + lo - x).square().mean(1)
            error, at = errors.min(0)
            if error < best[0]:
                best = (error, scale[at, 0], lo)
        _, scale, lo = best
        for _ in range(refinements):
            q = _levels(x, scale, lo, levels)
            centred = q - q.mean()
            scale = (centred * x).sum() / centred.square().sum().clamp(min=torch.finfo(x.dtype).tiny)
            lo = x.mean() - scale * q.mean()
        return scale.reshape(1), lo.reshape(1)


def _levels(x, scale, lo, levels):
    return ((x - lo) / scale).round().clamp(0, levels)
