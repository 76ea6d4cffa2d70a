"""Integer levels in place of fake ones, and their packing: schema, fake and public function together."""

from collections.abc import Sequence

import numpy as np
import torch

from .. import backend, layout
from ..annotations import Integer
from ..reference import quantizer as reference
from .arguments import DTYPES, STORED, bounds, prepare, whole_zero_point
from .quantizer import GRID


def _fake_quantized(x, scale, offset, zero_point, axis, quant_min, quant_max):
    like = layout.ordered(x, scale.numel(), axis)
    return torch.empty_like(like, dtype=reference.integer_type(quant_max))


def _fake_dequantized(q, scale, offset, zero_point, axis, dtype):
    return torch.empty_like(layout.ordered(q, scale.numel(), axis), dtype=dtype)


def _fake_pack(q, bits):
    return q.new_empty((q.numel() * bits + 7) // 8, dtype=torch.uint8)


def _fake_unpack(p, bits, numel, signed):
    return p.new_empty(numel, dtype=torch.int8 if signed else torch.uint8)


backend.define("quantize", f"(Tensor x, {GRID}) -> Tensor", _fake_quantized)
backend.define(
    "dequantize",
    "(Tensor q, Tensor scale, Tensor? offset, Tensor? zero_point, int axis, ScalarType dtype) -> Tensor",
    _fake_dequantized,
)
backend.define("pack", "(Tensor q, int bits) -> Tensor", _fake_pack)
backend.define("unpack", "(Tensor p, int bits, int numel, bool signed) -> Tensor", _fake_unpack)


def quantize(x: torch.Tensor, scale: torch.Tensor, *, bits: Integer | None = None, signed: bool = True,
             quant_min: int | None = None, quant_max: int | None = None, axis: int | None = None,
             group_size: int | None = None, offset: torch.Tensor | None = None,
             zero_point: int | torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """The integer levels of x: clip(rint((x - offset) / scale) + zero_point, quant_min, quant_max).

    Returns int8 (uint8 where quant_max > 127) of x's shape and strides; NaN takes the level nearest to zero. No
    gradient. Arguments and errors as ``fake_quantize``; ValueError, too, for bounds outside [-128, 127] and [0, 255]
    and for a zero_point beyond +-(2**24 - 2**8), where float32 rounds the bounds.
    """
    quant_min, quant_max = bounds(bits, signed, quant_min, quant_max)
    if not (-128 <= quant_min and quant_max <= 127 or 0 <= quant_min and quant_max <= 255):
        raise ValueError(
            f"quantize stores 8 bits: bounds must fit int8 or uint8, got [{quant_min}, {quant_max}]"
        )
    scale, offset, zero_point, axis = _prepare(x, scale, offset, zero_point, axis, group_size)
    with torch.no_grad():
        return backend.op("quantize")(x, scale, offset, zero_point, axis, quant_min, quant_max)


def dequantize(q: torch.Tensor, scale: torch.Tensor, *, axis: int | None = None, group_size: int | None = None,
               offset: torch.Tensor | None = None, zero_point: int | torch.Tensor | None = None,
               dtype: torch.dtype = torch.float32) -> torch.Tensor:  # fmt: skip
    """(q - zero_point) * scale + offset in ``dtype``: equal to fake_quantize of what q was quantized from.

    q: int8 or uint8. Errors as ``quantize``. The gradient stops here.
    """
    _check_integer("q", q, (torch.int8, torch.uint8))
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    like = torch.empty((), dtype=dtype, device=q.device).expand(q.shape)
    scale, offset, zero_point, axis = _prepare(like, scale, offset, zero_point, axis, group_size)
    with torch.no_grad():
        return backend.op("dequantize")(q, scale, offset, zero_point, axis, dtype)


def _prepare(x, scale, offset, zero_point, axis, group_size):
    """`prepare` where levels are stored: a zero point is a tensor, within STORED."""
    if isinstance(zero_point, int):
        whole = whole_zero_point(zero_point, *STORED)
        zero_point = torch.full((1,), whole, dtype=torch.int32, device=x.device)
    return prepare(x, scale, offset, zero_point, axis, group_size, STORED)


def pack(q: torch.Tensor, bits: Integer) -> torch.Tensor:
    """Integer levels as a flat uint8 tensor of ceil(numel * bits / 8) bytes, the first level in the lowest bits.

    q: int8 or uint8, every level within ``bits`` (not checked); bits: 2, 4 or 8. Contiguous order.
    """
    bits = _check_pack("q", q, bits, (torch.int8, torch.uint8))
    return backend.op("pack")(q, bits)


def unpack(p: torch.Tensor, bits: Integer, shape: Sequence[int], signed: bool = True) -> torch.Tensor:
    """The levels ``pack`` stored, in ``shape``: int8, sign-extended, or uint8 where signed is False.

    ValueError where p does not hold exactly that many levels.
    """
    bits = _check_pack("p", p, bits, (torch.uint8,))
    if isinstance(shape, int):
        raise TypeError(f"shape must be a tuple of ints, got {shape!r}")
    numel = torch.Size(shape).numel()
    if p.numel() != (numel * bits + 7) // 8:
        raise ValueError(
            f"p must hold {(numel * bits + 7) // 8} bytes for shape {tuple(shape)}, got {p.numel()}"
        )
    return backend.op("unpack")(p, bits, numel, signed).reshape(shape)


def _check_pack(name, t, bits, dtypes):
    """bits, as an int."""
    if not isinstance(bits, (int, np.integer)) or bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits!r}")
    _check_integer(name, t, dtypes)
    return int(bits)


def _check_integer(name, t, dtypes):
    got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
    if got not in dtypes:
        raise TypeError(f"{name} must be a {' or '.join(map(str, dtypes))} tensor, got {got}")
