"""Integer levels in Triton: quantize, dequantize, pack, unpack."""

import torch
import triton
import triton.language as tl

from .. import layout, reference
from . import math, walk
from .quantizer import is_wide

BYTES = 1024  # bytes of packed levels that a program handles


@triton.jit(do_not_specialize=["quant_min", "quant_max", "height", "rows", "across"])
def quantize_kernel(
    x_ptr, q_ptr, scale_ptr, offset_ptr, zero_point_ptr, quant_min: tl.int64, quant_max: tl.int64, height, width,
    stride, rows, across, WIDE: tl.constexpr, BY_COLUMN: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    r, c = walk.block_rows(pid // across, height, R), walk.block_columns(pid % across, W)
    at, there = r.to(tl.int64) * stride + c, walk.above(r, height) & (c < width)
    row, row_there = walk.scale_rows(r, c, height, width, rows, BY_COLUMN)
    scale, offset, lo, hi = walk.grid_of(
        row, row_there, scale_ptr, offset_ptr, zero_point_ptr, quant_min, quant_max
    )
    x = math.widen(tl.load(x_ptr + at, there, other=0.0))
    q = math.level(math.position(x, scale, offset, 0.0, math.PLAIN), lo, hi, 0.0, math.PLAIN, WIDE)
    stored = tl.where(q == q, q, math.clip(tl.zeros_like(q), lo, hi)).to(tl.int32)
    if zero_point_ptr is not None:
        stored += tl.load(zero_point_ptr + row, row_there, other=0)
    tl.store(q_ptr + at, stored.to(q_ptr.dtype.element_ty), there)


@triton.jit(do_not_specialize=["height", "rows", "across"])
def dequantize_kernel(
    q_ptr, y_ptr, scale_ptr, offset_ptr, zero_point_ptr, height, width, stride, rows, across,
    BY_COLUMN: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    r, c = walk.block_rows(pid // across, height, R), walk.block_columns(pid % across, W)
    at, there = r.to(tl.int64) * stride + c, walk.above(r, height) & (c < width)
    row, row_there = walk.scale_rows(r, c, height, width, rows, BY_COLUMN)
    scale = math.safe_scale(tl.load(scale_ptr + row, row_there, other=1.0))
    offset = 0.0
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + row, row_there, other=0.0)
    stored = tl.load(q_ptr + at, there, other=0).to(tl.int32)
    if zero_point_ptr is not None:
        stored -= tl.load(zero_point_ptr + row, row_there, other=0)
    y = math.value(stored.to(tl.float32), scale, offset)
    tl.store(y_ptr + at, math.narrow(y, y_ptr.dtype.element_ty), there)


@triton.jit
def pack_kernel(q_ptr, p_ptr, numel, size, BITS: tl.constexpr, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, 8 // BITS)
    at = byte[:, None] * (8 // BITS) + k[None, :]
    fields = tl.load(q_ptr + at, at < numel, other=0).to(tl.int32) & ((1 << BITS) - 1)
    tl.store(p_ptr + byte, tl.sum(fields << (k * BITS)[None, :], axis=1).to(tl.uint8), byte < size)


@triton.jit
def unpack_kernel(p_ptr, q_ptr, numel, size, SIGNED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, 8 // BITS)
    at = byte[:, None] * (8 // BITS) + k[None, :]
    packed = tl.load(p_ptr + byte, byte < size, other=0).to(tl.int32)
    q = (packed[:, None] >> (k * BITS)[None, :]) & ((1 << BITS) - 1)
    if SIGNED:
        q = tl.where(q >= 1 << (BITS - 1), q - (1 << BITS), q)
    tl.store(q_ptr + at, q.to(q_ptr.dtype.element_ty), at < numel)


def quantize(x, scale, offset, zero_point, axis, quant_min, quant_max):
    """Arguments and result of reference.quantize."""
    if x.dtype == torch.float64:
        return reference.quantize(x, scale, offset, zero_point, axis, quant_min, quant_max)
    x = layout.ordered(x, scale.numel(), axis)
    q = torch.empty_like(x, dtype=reference.quantizer.integer_type(quant_max))
    if x.numel() == 0:
        return q
    w = walk.plan(x, scale.numel(), axis)
    walk.launch(
        quantize_kernel, w.down * w.across, x, x, q, *map(walk.row_values, (scale, offset, zero_point)), quant_min,
        quant_max, w.height, w.width, w.stride, w.rows, w.across, WIDE=is_wide(zero_point, quant_min, quant_max),
        BY_COLUMN=w.by_column, R=w.R, W=w.W,
    )  # fmt: skip
    return q


def dequantize(q, scale, offset, zero_point, axis, dtype):
    """Arguments and result of reference.dequantize."""
    if dtype == torch.float64:
        return reference.dequantize(q, scale, offset, zero_point, axis, dtype)
    q = layout.ordered(q, scale.numel(), axis)
    y = torch.empty_like(q, dtype=dtype)
    if q.numel() == 0:
        return y
    w = walk.plan(q, scale.numel(), axis)
    walk.launch(
        dequantize_kernel, w.down * w.across, q, q, y, *map(walk.row_values, (scale, offset, zero_point)), w.height,
        w.width, w.stride, w.rows, w.across, BY_COLUMN=w.by_column, R=w.R, W=w.W,
    )  # fmt: skip
    return y


def pack(q, bits):
    """Arguments and result of reference.pack."""
    q = q.contiguous()
    p = q.new_empty((q.numel() * bits + 7) // 8, dtype=torch.uint8)
    if p.numel():
        walk.launch(
            pack_kernel, triton.cdiv(p.numel(), BYTES), q, q, p, q.numel(), p.numel(), BITS=bits, BLOCK=BYTES
        )
    return p


def unpack(p, bits, numel, signed):
    """Arguments and result of reference.unpack."""
    p = p.contiguous()
    q = p.new_empty(numel, dtype=torch.int8 if signed else torch.uint8)
    if numel:
        walk.launch(unpack_kernel, triton.cdiv(p.numel(), BYTES), p, p, q, numel, p.numel(), SIGNED=signed, BITS=bits,
                    BLOCK=BYTES)  # fmt: skip
    return q
