"""The images a measure is taken on: the same ones, in the same batches, at every pass."""

import torch

_IN_MEMORY = 2 << 30  # bytes
_FIRST = 32  # images of the first of the growing batches


class Data:
    """Batches (x, target) of a loader on a device; those that fit in 2 GiB are kept, so that every pass sees the same.

    Args:
        loader: re-iterable of (x, target, ...), tensors with the images along dimension 0. batches: use only
        so many.
        seed: rearrange kept images, so that the first n are a random sample.
    Raises: ValueError (no batch, ``batches`` < 1), TypeError (not a pair of tensors), RuntimeError when a
    loader too big to be kept gives other targets at a later pass, as with shuffling.
    """

    def __init__(self, loader, device, batches=None, seed=None):
        if batches is not None and (not isinstance(batches, int) or batches < 1):
            raise ValueError(f"batches must be None or an int >= 1, got {batches!r}")
        self.loader, self.device, self.limit = loader, device, batches
        self.kept, self.targets, held = [], [], 0
        for x, target in self._read():
            self.targets.append(target)
            held += x.numel() * x.element_size()
            if self.kept is not None:
                self.kept.append((x, target))
            if held > _IN_MEMORY:
                self.kept = None
        if not self.targets:
            raise ValueError("loader gave no batch")
        self.size = sum(len(target) for target in self.targets)
        same_shape = self.kept is not None and len({x.shape[1:] for x, _ in self.kept}) == 1
        self.shuffled, self.growing = seed is not None and same_shape, None
        if self.shuffled:
            self._rearrange(seed)

    def _rearrange(self, seed):
        x, target = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed)).to(x.device)
        x, target, most = x[order], target[order], len(self.targets[0])
        self.kept = list(zip(x.split(most), target.split(most), strict=True))
        sizes = []
        while sum(sizes) < self.size:
            sizes.append(min(max(sum(sizes), _FIRST), most, self.size - sum(sizes)))
        self.growing = list(zip(x.split(sizes), target.split(sizes), strict=True))

    def _read(self):
        for i, batch in enumerate(self.loader):
            if i == self.limit:
                return
            pair = batch[:2] if isinstance(batch, (tuple, list)) else (batch,)
            if len(pair) < 2 or not all(isinstance(t, torch.Tensor) for t in pair):
                raise TypeError(f"loader must give (x, target) tensors, got {type(batch).__name__}")
            yield tuple(t.to(self.device) for t in pair)

    def __iter__(self):
        if self.kept is not None:
            yield from self.kept
            return
        for batch, expected in zip(self._read(), self.targets, strict=True):
            if not torch.equal(batch[1], expected):
                raise RuntimeError("loader gives other batches at each pass: give one without shuffling")
            yield batch

    def samples(self):
        """The batches for a mean that may be decided early: of rearranged images, small ones first."""
        return self if self.growing is None else self.growing
