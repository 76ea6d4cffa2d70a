"""The images a measure is taken on: the same ones, in the same batches, at every pass."""

import math

import torch

_IN_MEMORY = 2 << 30  # bytes
_FIRST = 32  # images of the first of the growing batches
_FIRST_SHARE = 16  # at least so many of each copy's
# Numbers of a batch on the CPU, and of the first one: with fewer, calls of layers cost more than their arithmetic; with
# more, activations leave the caches (resnet20, 8x8 and 32x32 images: up to 1.5x a pass). Memory is for the loader's
# batches: at most two of them are put together.
_NUMBERS, _FIRST_NUMBERS = 1 << 17, 1 << 12


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
        self.shuffled = seed is not None and same_shape
        if self.shuffled:
            x, target = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed)).to(x.device)
            self.whole, most = (x[order], target[order]), len(self.targets[0])
            self.kept = list(zip(*(t.split(most) for t in self.whole), strict=True))
            numbers = max(self.whole[0][0].numel(), 1)
            fit = max(_NUMBERS // numbers, _FIRST_SHARE)
            self.most = most if self.whole[0].is_cuda else min(fit, 2 * most)
            self.first = max(_FIRST_NUMBERS // numbers, _FIRST_SHARE)

    def _read(self):
        for i, batch in enumerate(self.loader):
            if i == self.limit:
                return
            pair = batch[:2] if isinstance(batch, (tuple, list)) else (batch,)
            if len(pair) < 2 or not all(isinstance(t, torch.Tensor) for t in pair):
                given = ", ".join(type(t).__name__ for t in pair)
                raise TypeError(
                    f"loader must give (x, target) tensors, got {given}: wrap a model with other inputs in a "
                    "module that takes one tensor"
                )
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
        """(index, x, target) of batches for means that may be decided early: of rearranged images, small ones first."""
        sizes = self._growing() if self.shuffled else None
        start = 0
        for x, target in zip(*(t.split(sizes) for t in self.whole)) if sizes else self:
            yield torch.arange(start, start + len(target), device=self.device), x, target
            start += len(target)

    def shares(self, num, wanted=lambda: 0):
        """(index, x, target), each (num, images), until every image has come once in every row.

        First each row has a share of the rearranged images of its own, then the shares move on by one row, and so
        on. ``wanted()``: images of each row after the next part; it ends with a share, but for the first.
        """
        x, target = self.whole
        width, done = self.size // num, 0
        index = torch.arange(self.size, device=self.device)
        shares, rest = index[: num * width].view(num, width), index[num * width :]
        order = torch.cat([*(shares.roll(-turn, 0) for turn in range(num)), rest.expand(num, -1)], 1)
        while done < self.size:
            goal = math.ceil(max(wanted(), done + 1) / max(width, 1)) * width
            if done == 0 and width:
                goal = min(self.first, width)
            elif not done < goal < num * width:
                goal = self.size
            for part in order[:, done:goal].tensor_split(math.ceil((goal - done) / self.most), 1):
                yield part, x[part], target[part]
            done = goal

    def _growing(self):
        """Sizes of parts, half as large as all before but at most a tenth of the whole: each may be the last."""
        sizes = []
        while sum(sizes) < self.size:
            most = min(self.most, max(self.size // 10, _FIRST), self.size - sum(sizes))
            sizes.append(min(max(sum(sizes) // 2, _FIRST), most))
        return sizes
