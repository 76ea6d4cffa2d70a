"""fake_quantize and its gradient in Triton: one pass over the data each."""

import torch
import triton
import triton.language as tl

from .. import layout, noise, reference
from . import math, walk

_UNSPECIALIZED = ["quant_min", "quant_max", "stream", "height", "rows", "across", "steps", "count"]
_EXACT = 1 << 22  # bounds up to here allow the short rounding of math.round_even


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def fake_quantize_kernel(
    x_ptr, y_ptr, scale_ptr, offset_ptr, zero_point_ptr, seed_ptr, shift_ptr, shift_scale_ptr,
    quant_min: tl.int64, quant_max: tl.int64, a, b, stream: tl.int64, height, width, stride, rows, across,
    KIND: tl.constexpr, WIDE: tl.constexpr, BY_COLUMN: tl.constexpr, QUADS: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    r, c = walk.block_rows(pid // across, height, R), walk.block_columns(pid % across, W)
    at, there = r.to(tl.int64) * stride + c, walk.above(r, height) & (c < width)
    row, row_there = walk.scale_rows(r, c, height, width, rows, BY_COLUMN)
    scale, offset, lo, hi = walk.grid_of(
        row, row_there, scale_ptr, offset_ptr, zero_point_ptr, quant_min, quant_max
    )
    x = math.widen(tl.load(x_ptr + at, there, other=0.0))
    n = 0.0
    if KIND == math.SHIFT:
        a = tl.load(shift_scale_ptr)
        n = math.widen(tl.load(shift_ptr + at, there, other=0.0))
    elif KIND != math.PLAIN:
        n = walk.draw(seed_ptr, stream, a, r, c, pid % across, stride, KIND, QUADS, R, W)
    y = math.fake_quantize(x, scale, offset, lo, hi, n, a, b, KIND, WIDE)
    tl.store(y_ptr + at, math.narrow(y, y_ptr.dtype.element_ty), there)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def fake_quantize_backward_kernel(
    grad_ptr, x_ptr, dx_ptr, dscale_ptr, doffset_ptr, scale_ptr, offset_ptr, zero_point_ptr, seed_ptr,
    quant_min: tl.int64, quant_max: tl.int64, ewgs, a, stream: tl.int64, height, width, stride, rows, across, steps,
    count, CLIP_ONLY: tl.constexpr, EWGS: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
    BY_COLUMN: tl.constexpr, QUADS: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """``across`` counts programs of ``steps`` blocks each; a program leaves its sums at [row, 0 <= i < count]."""
    pid = tl.program_id(0)
    down, right = pid // across, pid % across
    block_c = right
    r, c = walk.block_rows(down, height, R), walk.block_columns(right, W)
    row, row_there = walk.scale_rows(r, c, height, width, rows, BY_COLUMN)
    scale, offset, lo, hi = walk.grid_of(
        row, row_there, scale_ptr, offset_ptr, zero_point_ptr, quant_min, quant_max
    )
    dscale, doffset = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for step in range(steps):
        if BY_COLUMN:
            r = walk.block_rows(down * steps + step, height, R)
        else:
            block_c = right * steps + step
            c = walk.block_columns(block_c, W)
        at, there = r.to(tl.int64) * stride + c, walk.above(r, height) & (c < width)
        x = math.widen(tl.load(x_ptr + at, there, other=0.0))
        g = math.widen(tl.load(grad_ptr + at, there, other=0.0))
        n = 0.0
        if KIND != math.PLAIN:
            n = walk.draw(seed_ptr, stream, a, r, c, block_c, stride, KIND, QUADS, R, W)
        dx, ds, do = math.fake_quantize_backward(
            g, x, scale, offset, lo, hi, n, ewgs, CLIP_ONLY, EWGS, KIND, WIDE
        )
        tl.store(dx_ptr + at, math.narrow(dx, dx_ptr.dtype.element_ty), there)
        dscale += ds
        doffset += do
    if BY_COLUMN:
        at = row * count + down
        dscale, doffset = tl.sum(dscale, axis=0)[None, :], tl.sum(doffset, axis=0)[None, :]
    else:
        at = row.to(tl.int64) * count + r // rows * across + right
        dscale, doffset = tl.sum(dscale, axis=1)[:, None], tl.sum(doffset, axis=1)[:, None]
    tl.store(dscale_ptr + at, dscale, row_there)
    if offset_ptr is not None:
        tl.store(doffset_ptr + at, doffset, row_there)


@triton.jit(do_not_specialize=["rows", "count"])
def sum_rows_kernel(
    partial_ptr, sign_ptr, out_ptr, factor: tl.float64, rows, count, R: tl.constexpr, W: tl.constexpr
):
    """out = factor * (sign of sign_ptr) * sum over ``partial`` (rows, count), in float64."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    lane = tl.arange(0, W)[None, :]
    total = tl.zeros((R, W), tl.float64)
    for first in range(0, count, W):
        there = (row < rows)[:, None] & (first + lane < count)
        total += tl.load(partial_ptr + row[:, None] * count + first + lane, there, other=0.0).to(tl.float64)
    out = tl.sum(total, axis=1) * factor
    if sign_ptr is not None:
        out = tl.where(tl.load(sign_ptr + row, row < rows, other=1.0) < 0.0, -out, out)
    tl.store(out_ptr + row, out.to(tl.float32), row < rows)


def is_wide(zero_point, quant_min: int, quant_max: int) -> bool:
    """Whether the bounds may lie where math.round_even needs its long form."""
    return zero_point is not None or max(abs(quant_min), abs(quant_max)) > _EXACT


def fake_quantize(x, scale, offset, zero_point, axis, quant_min, quant_max, kind, a, b, seed, stream, shift,
                  shift_scale):  # fmt: skip
    """Arguments and result of reference.fake_quantize. float64, which the kernels do not know, takes the reference."""
    if x.dtype == torch.float64:
        return reference.fake_quantize(x, scale, offset, zero_point, axis, quant_min, quant_max, kind, a, b, seed,
                                       stream, shift, shift_scale)  # fmt: skip
    x = layout.ordered(x, scale.numel(), axis)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    w = walk.plan(x, scale.numel(), axis, kind)
    shift = None if shift is None else layout.aligned(shift, x)
    walk.launch(
        fake_quantize_kernel, w.down * w.across, x, x, y, *map(walk.row_values, (scale, offset, zero_point, seed)),
        shift, shift_scale, quant_min, quant_max, a, b, stream, w.height, w.width, w.stride, w.rows, w.across,
        KIND=kind, WIDE=is_wide(zero_point, quant_min, quant_max), BY_COLUMN=w.by_column, QUADS=w.quads, R=w.R, W=w.W,
        num_warps=8 if noise.draws(kind) else 4,
    )  # fmt: skip
    return y


def fake_quantize_backward(grad, x, scale, offset, zero_point, axis, quant_min, quant_max, grad_scale, clip_only, ewgs,
                           kind, a, b, seed, stream):  # fmt: skip
    """Arguments and results of reference.fake_quantize_backward; the sums have the same bits on every device."""
    if x.dtype == torch.float64:
        return reference.fake_quantize_backward(grad, x, scale, offset, zero_point, axis, quant_min, quant_max,
                                                grad_scale, clip_only, ewgs, kind, a, b, seed, stream)  # fmt: skip
    rows = scale.numel()
    x = layout.ordered(x, rows, axis)
    grad, dx = layout.aligned(grad, x), torch.empty_like(x)
    if x.numel() == 0:
        return dx, scale.new_zeros(rows), scale.new_zeros(0 if offset is None else rows)
    kind = noise.backward_kind(kind)
    w = walk.plan(x, rows, axis, kind)
    steps, down, across, count = w.reduction()
    partial = [scale.new_empty(rows * count) if wanted else None for wanted in (True, offset is not None)]
    scale, offset, zero_point, seed = map(walk.row_values, (scale, offset, zero_point, seed))
    walk.launch(
        fake_quantize_backward_kernel, down * across, x, grad, x, dx, *partial, scale, offset, zero_point, seed,
        quant_min, quant_max, ewgs, a, stream, w.height, w.width, w.stride, rows, across, steps, count,
        CLIP_ONLY=clip_only, EWGS=ewgs != 0, KIND=kind, WIDE=is_wide(zero_point, quant_min, quant_max),
        BY_COLUMN=w.by_column, QUADS=w.quads, R=w.R, W=w.W,
        num_warps=8,
    )  # fmt: skip
    dscale = sum_rows(partial[0], scale, grad_scale, rows, count)
    return (
        dx,
        dscale,
        scale.new_empty(0) if offset is None else sum_rows(partial[1], None, grad_scale, rows, count),
    )


def sum_rows(partial, sign, factor: float, rows: int, count: int) -> torch.Tensor:
    """(rows,) sums of the float32 partial sums (rows, count), in float64 and a fixed order; times factor and sign."""
    out = partial.new_empty(rows)
    W = min(1024, triton.next_power_of_2(count))
    R = min(1024 // W, triton.next_power_of_2(rows))
    walk.launch(sum_rows_kernel, triton.cdiv(rows, R), out, partial, sign, out, factor, rows, count, R=R, W=W)
    return out
