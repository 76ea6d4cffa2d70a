"""The quantizer's ops. ``axis`` says how the rows of ``scale`` lie (layout.py); noise kinds are those of noise.py."""

import torch

from .. import layout, noise, random
from .precision import compute_type


def _compute(x):
    return x.to(compute_type(x))


def safe_scale(scale):
    """|scale| floored at 2**-126; NaN where it is not finite, so that a broken scale never gives plausible numbers."""
    floored = scale.abs().clamp(min=2.0**-126)
    return torch.where(scale.isfinite(), floored, torch.nan)


def _sign(scale):
    return torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)


def _variate(x, kind, a, seed, stream):
    """The random number of each element of the dense tensor x, in x's memory order."""
    count = x.numel()
    if kind in (noise.TEMPERING, noise.PSEUDO_NORMAL):
        n = random.normal(seed, stream, count)
        n = 0.5 * n if kind == noise.PSEUDO_NORMAL else n
    else:
        n = random.uniform(seed, stream, count)
        n = n if kind == noise.STOCHASTIC else n - 0.5
    if kind == noise.BEFORE:
        n = torch.where(random.switched_on(seed, stream, a), n, 0.0)
    return layout.from_memory(n, x).to(compute_type(x))


class _Element:
    """v, the level q it takes and the grid, shaped row by row; forward and backward both start here."""

    def __init__(self, x, scale, offset, zero_point, axis, quant_min, quant_max, kind, a, seed, stream):
        rows = scale.numel()
        x = layout.ordered(x, rows, axis)
        like = self.x = layout.rowwise(x, rows, axis)
        self.scale = layout.per_element(like, safe_scale(scale), axis)
        self.offset = 0.0 if offset is None else layout.per_element(like, offset, axis)
        zero = 0 if zero_point is None else layout.per_element(like, zero_point.long(), axis)
        self.lo, self.hi = (
            torch.as_tensor(b - zero, device=x.device).to(scale.dtype) for b in (quant_min, quant_max)
        )
        self.n = None
        if noise.draws(kind):
            self.n = layout.rowwise(_variate(x, kind, a, seed, stream), rows, axis)
        v = (_compute(like) - self.offset) / self.scale
        self.v = v + self.n if kind == noise.BEFORE else v
        if kind in (noise.PSEUDO, noise.PSEUDO_NORMAL):
            self.q = self.clip(self.v) + self.n
        elif kind == noise.STOCHASTIC:
            self.q = self.clip((self.v + self.n).floor())
        else:
            self.q = self.clip(self.v.round())

    def clip(self, v):
        return torch.where(v < self.lo, self.lo, torch.where(v > self.hi, self.hi, v))


def fake_quantize(x, scale, offset, zero_point, axis, quant_min, quant_max, kind, a, b, seed, stream, shift,
                  shift_scale):  # fmt: skip
    """y = q * scale + offset,  q = clip(rint(v), lo, hi),  v = (x - offset) / scale;  lo, hi = bounds - zero_point.

    Noise (its kinds: noise.py) is added where its kind says. ``shift``: y + shift_scale * shift.
    """
    y = values(
        x, scale, offset, zero_point, axis, quant_min, quant_max, kind, a, b, seed, stream, shift, shift_scale
    )
    return layout.aligned(y.to(x.dtype).reshape(x.shape), layout.ordered(x, scale.numel(), axis))


def values(
    x, scale, offset, zero_point, axis, quant_min, quant_max, kind, a, b, seed, stream, shift, shift_scale
):
    """y before its dtype and layout are x's: in the type of the arithmetic, shaped by row."""
    rows = scale.numel()
    e = _Element(x, scale, offset, zero_point, axis, quant_min, quant_max, kind, a, seed, stream)
    y = e.q * e.scale + e.offset
    if kind == noise.TEMPERING:
        d = (y - _compute(e.x)).abs().float()
        near = b32(b, d) * d < 87.0
        decay = random.exp_negative(torch.where(near, -(b32(b, d) * d), 0.0))
        y = y + (b32(a, d) * decay * random.sqrt(torch.where(near, d, 0.0))).to(y.dtype) * e.n
    elif kind == noise.AFTER:
        y = torch.where(random.switched_on(seed, stream, a), y + e.scale * e.n, y)
    elif kind == noise.SHIFT:
        ordered = layout.aligned(shift, layout.ordered(x, rows, axis))
        y = y + shift_scale.to(y.dtype) * _compute(layout.rowwise(ordered, rows, axis))
    return y


def b32(value, like):
    """A Python number as float32, as the kernels hold it."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def slopes(x, scale, offset, zero_point, axis, quant_min, quant_max, clip_only, kind, a, seed, stream):
    """(outside, dscale term, error) of each element, before the upstream gradient; shaped by row."""
    e = _Element(x, scale, offset, zero_point, axis, quant_min, quant_max, kind, a, seed, stream)
    outside = (e.v < e.lo) | (e.v > e.hi)
    error = e.n if kind in (noise.PSEUDO, noise.PSEUDO_NORMAL) else e.q - e.v
    inside_term = torch.zeros_like(error) if clip_only else error
    return outside, torch.where(outside, e.q, inside_term), error


def fake_quantize_backward(grad, x, scale, offset, zero_point, axis, quant_min, quant_max, grad_scale, clip_only, ewgs,
                           kind, a, b, seed, stream):  # fmt: skip
    """Straight-through estimator on the unrounded v, bounds inclusive; inside = not (v < lo) and not (v > hi):

        dx      = g if inside else 0                        (EWGS: g * (1 + ewgs * sign(g) * (v - q)))
        dscale  = grad_scale * sign(scale) * sum_row g * (rint(v) - v if inside else (lo if v < lo else hi))
        doffset = grad_scale * sum_row g * (0 if inside else 1)

    ``clip_only`` drops the inside term of dscale (PACT). Noise added to the output leaves all of it unchanged.
    """
    rows = scale.numel()
    kind = noise.backward_kind(kind)
    like = layout.ordered(x, rows, axis)
    outside, term, error = slopes(x, scale, offset, zero_point, axis, quant_min, quant_max, clip_only, kind, a, seed,
                                  stream)  # fmt: skip
    g = _compute(layout.rowwise(layout.aligned(grad, like), rows, axis))
    passed = g if ewgs == 0 else g - torch.tensor(ewgs, dtype=g.dtype, device=g.device) * g.abs() * error
    dx = layout.aligned(torch.where(outside, 0.0, passed).to(x.dtype).reshape(x.shape), like)
    dscale = layout.sum_rows(g * term, rows, axis) * grad_scale * _sign(scale).double()
    if offset is None:
        return dx, dscale.to(scale.dtype), scale.new_empty(0)
    doffset = layout.sum_rows(torch.where(outside, g, 0.0), rows, axis) * grad_scale
    return dx, dscale.to(scale.dtype), doffset.to(scale.dtype)


def quantize(x, scale, offset, zero_point, axis, quant_min, quant_max):
    """Stored level clip(rint((x - offset) / scale), lo, hi) + zero_point, int8, or uint8 where quant_max > 127."""
    e = _Element(x, scale, offset, zero_point, axis, quant_min, quant_max, noise.PLAIN, 0.0, None, 0)
    q = torch.where(e.q.isnan(), e.clip(torch.zeros_like(e.q)), e.q)
    if zero_point is not None:
        q = q + layout.per_element(e.x, zero_point, axis)
    q = q.to(integer_type(quant_max)).reshape(x.shape)
    return layout.aligned(q, layout.ordered(x, scale.numel(), axis))


def integer_type(quant_max):
    return torch.uint8 if quant_max > 127 else torch.int8


def dequantize(q, scale, offset, zero_point, axis, dtype):
    """(q - zero_point) * scale + offset, in ``dtype``."""
    rows = scale.numel()
    like = layout.ordered(q, rows, axis)
    stored = layout.rowwise(like, rows, axis)
    level = stored.to(scale.dtype)
    if zero_point is not None:
        level = (stored.int() - layout.per_element(stored, zero_point, axis)).to(scale.dtype)
    y = level * layout.per_element(stored, safe_scale(scale), axis)
    y = y + (0.0 if offset is None else layout.per_element(stored, offset, axis))
    return layout.aligned(y.to(dtype).reshape(q.shape), like)


def pack(q, bits):
    """uint8 bytes of 8 // bits fields each, the first element in the lowest bits; the tail is filled with zeros."""
    per_byte = 8 // bits
    fields = (q.flatten().to(torch.int32) & ((1 << bits) - 1)).to(torch.uint8)
    fields = torch.nn.functional.pad(fields, (0, -q.numel() % per_byte)).reshape(-1, per_byte).int()
    shifts = torch.arange(per_byte, device=q.device, dtype=torch.int32) * bits
    return (fields << shifts).sum(dim=1).to(torch.uint8)


def unpack(p, bits, numel, signed):
    """The first ``numel`` fields of ``pack``'s bytes, sign-extended to int8, or uint8."""
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, device=p.device, dtype=torch.int32) * bits
    fields = ((p.int().reshape(-1, 1) >> shifts) & ((1 << bits) - 1)).flatten()[:numel]
    if signed:
        fields = torch.where(fields >= 1 << (bits - 1), fields - (1 << bits), fields)
    return fields.to(torch.int8 if signed else torch.uint8)
