"""The images a measure is taken on: the same ones, in the same batches, at every pass."""

import torch

_IN_MEMORY = 2 << 30  # bytes


class Data:
    """Batches (x, target) of a loader on a device; those that fit in 2 GiB are kept, so that every pass sees the same.

    Args:
        loader: re-iterable of (x, target, ...), tensors with the images along dimension 0. batches: use only
        so many.
        seed: rearrange kept images (a sample of the first n is then a random one) in batches of at most a
        sixteenth.
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
        self.shuffled = seed is not None and same_shape
        if self.shuffled:
            self._rearrange(seed)

    def _rearrange(self, seed):
        x, target = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed)).to(x.device)
        size = min(len(self.targets[0]), max(32, -(-self.size // 16)))
        self.kept = list(zip(x[order].split(size), target[order].split(size), strict=True))
        self.targets = [t for _, t in self.kept]

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

    def __len__(self):
        return len(self.targets)
