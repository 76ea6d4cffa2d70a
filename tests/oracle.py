"""The definitions once more, in NumPy and as differently as they allow: what tests compare the reference with."""

import numpy as np
import torch

from qkernels import noise, testing


def philox(seed, stream, counter):
    """uint64 array (4, counters) of 32-bit words: Philox4x32-10 as Salmon et al. define a round."""
    low = np.uint64(0xFFFFFFFF)
    counter = np.asarray(counter, dtype=np.uint64)
    stream, seed = np.uint64(stream % 2**64), seed % 2**64
    c = [
        counter & low,
        counter >> np.uint64(32),
        np.full_like(counter, stream & low),
        np.full_like(counter, stream >> np.uint64(32)),
    ]
    for r in range(10):
        key = [
            np.uint64((half + r * weyl) % 2**32)
            for half, weyl in ((seed % 2**32, 0x9E3779B9), (seed >> 32, 0xBB67AE85))
        ]
        product = [c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)]
        c = [(product[1] >> np.uint64(32)) ^ c[1] ^ key[0], product[1] & low,
             (product[0] >> np.uint64(32)) ^ c[3] ^ key[1], product[0] & low]  # fmt: skip
    return np.stack(c)


def words(seed, stream, count, first=0):
    index = np.arange(first, first + count)
    return philox(seed, stream, index // 4)[index % 4, np.arange(count)]


def uniform(seed, stream, count, first=0):
    return ((words(seed, stream, count, first) >> np.uint64(8)) * 2.0**-24).astype(np.float32)


def normal(seed, stream, count, first=0):
    """Box-Muller in float64 on the same words."""
    index = np.arange(first, first + count)
    w = philox(seed, stream, index // 4) >> np.uint64(8)
    radius, angle = np.where(index % 4 < 2, w[0], w[2]), np.where(index % 4 < 2, w[1], w[3])
    r, t = np.sqrt(-2 * np.log((radius + 1) * 2.0**-24)), 2 * np.pi * angle * 2.0**-24
    return r * np.where(index % 2 == 0, np.cos(t), np.sin(t))


def array(t):
    return None if t is None else (t if t.dtype == torch.float64 else t.float()).numpy()


class Quantizer:
    """The definition (`qkernels.reference`) for one case's arguments, element by element in logical order."""

    def __init__(self, case, x, scale, offset, zero_point, axis, quant_min, quant_max):
        self.row = testing.row_index(case.shape, scale.numel(), axis).numpy()
        self.scale_sign = np.where(array(scale) < 0, -1.0, 1.0)
        self.x, s = array(x), array(scale)
        kind = s.dtype.type
        s = np.abs(s)
        s = np.where(np.isfinite(s), np.where(s < kind(2.0**-126), kind(2.0**-126), s), kind(np.nan))
        self.scale = s[self.row]
        self.offset = kind(0) if offset is None else array(offset)[self.row]
        zero = 0 if zero_point is None else zero_point.numpy().astype(np.int64)[self.row]
        self.zero = zero
        self.lo, self.hi = kind(1) * (quant_min - zero), kind(1) * (quant_max - zero)
        self.lo, self.hi = np.asarray(self.lo, dtype=kind), np.asarray(self.hi, dtype=kind)
        with np.errstate(all="ignore"):
            self.v = (self.x - self.offset) / self.scale

    def clip(self, v):
        return np.where(np.isnan(v), v, np.clip(v, self.lo, self.hi))

    def level(self, kind=noise.PLAIN, u=None):
        """q, given the uniform or normal variate of each element."""
        if kind == noise.BEFORE:
            return self.clip(np.rint(self.v + u))
        if kind in (noise.PSEUDO, noise.PSEUDO_NORMAL):
            return self.clip(self.v) + u
        if kind == noise.STOCHASTIC:
            return self.clip(np.floor(self.v + u))
        return self.clip(np.rint(self.v))

    def value(self, q):
        with np.errstate(all="ignore"):
            return q * self.scale + self.offset

    def gradient(self, g, kind=noise.PLAIN, u=None, clip_only=False, ewgs=0.0):
        """dx and the float64 terms of dscale and doffset of every element."""
        q, v = self.level(kind, u), self.v + u if kind == noise.BEFORE else self.v
        with np.errstate(all="ignore"):
            outside = (v < self.lo) | (v > self.hi)
            error = u if kind in (noise.PSEUDO, noise.PSEUDO_NORMAL) else q - v
            inside_term = np.zeros_like(v) if clip_only else error
            dx = np.where(outside, 0.0, g if ewgs == 0 else g - g.dtype.type(ewgs) * np.abs(g) * error)
            term = (g * np.where(outside, q, inside_term)).astype(np.float64)
        return dx, term, np.where(outside, g, 0).astype(np.float64)

    def sum_rows(self, terms):
        rows = self.scale_sign.size
        return np.array([terms[self.row == r].sum() for r in range(rows)])
