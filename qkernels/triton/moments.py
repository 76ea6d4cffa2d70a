"""The standardised distance and its gradient in Triton: one pass over student and teacher each."""

import torch
import triton
import triton.language as tl

from .. import layout, reference
from . import math, walk

_UNSPECIALIZED = ["height", "rows", "across", "steps", "count", "inner", "grad_stride"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def moments_kernel(s_ptr, t_ptr, partial_ptr, height, width, stride, rows, inner, across, steps, count,
                   BY_COLUMN: tl.constexpr, R: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """The five sums of a program at [moment, row, 0 <= i < count]; products in float32, sums in float64."""
    AXIS: tl.constexpr = 0 if BY_COLUMN else 1
    pid = tl.program_id(0)
    down, right = pid // across, pid % across
    r, c = walk.block_rows(down, height, R), walk.block_columns(right, W)
    row, row_there = walk.scale_rows(r, c, height, width, rows, BY_COLUMN)
    first = row.to(tl.int64) * inner
    shift_s = tl.load(s_ptr + first, row_there, other=0.0).to(tl.float32)
    shift_t = tl.load(t_ptr + first, row_there, other=0.0).to(tl.float32)
    sum_s = tl.zeros(row.shape, tl.float64)
    sum_t, sum_ss, sum_tt, sum_st = sum_s, sum_s, sum_s, sum_s
    for step in range(steps):
        if BY_COLUMN:
            r = walk.block_rows(down * steps + step, height, R)
        else:
            c = walk.block_columns(right * steps + step, W)
        at, there = r.to(tl.int64) * stride + c, walk.above(r, height) & (c < width)
        u = tl.where(there, tl.load(s_ptr + at, there, other=0.0).to(tl.float32) - shift_s, 0.0)
        v = tl.where(there, tl.load(t_ptr + at, there, other=0.0).to(tl.float32) - shift_t, 0.0)
        sum_s += tl.sum(u.to(tl.float64), axis=AXIS, keep_dims=True)
        sum_t += tl.sum(v.to(tl.float64), axis=AXIS, keep_dims=True)
        sum_ss += tl.sum((u * u).to(tl.float64), axis=AXIS, keep_dims=True)
        sum_tt += tl.sum((v * v).to(tl.float64), axis=AXIS, keep_dims=True)
        sum_st += tl.sum((u * v).to(tl.float64), axis=AXIS, keep_dims=True)
    if BY_COLUMN:
        to = row.to(tl.int64) * count + down
    else:
        to = row.to(tl.int64) * count + r // rows * across + right
    every = rows.to(tl.int64) * count
    tl.store(partial_ptr + to, sum_s, row_there)
    tl.store(partial_ptr + every + to, sum_t, row_there)
    tl.store(partial_ptr + 2 * every + to, sum_ss, row_there)
    tl.store(partial_ptr + 3 * every + to, sum_tt, row_there)
    tl.store(partial_ptr + 4 * every + to, sum_st, row_there)


@triton.jit
def _total(partial_ptr, row, rows, count, R: tl.constexpr, W: tl.constexpr):
    lane = tl.arange(0, W)[None, :]
    total = tl.zeros((R, W), tl.float64)
    for first in range(0, count, W):
        there = (row < rows)[:, None] & (first + lane < count)
        total += tl.load(partial_ptr + row[:, None] * count + first + lane, there, other=0.0)
    return tl.sum(total, axis=1)


@triton.jit
def _not_negative(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit(do_not_specialize=["rows", "count", "inner"])
def finish_kernel(s_ptr, t_ptr, partial_ptr, distance_ptr, moments_ptr, rows, inner, count, n: tl.float64,
                  times: tl.float64, eps: tl.float64, R: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """A channel's moments and ``times`` its mean squared distance."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    every, there = rows.to(tl.int64) * count, row < rows
    u = _total(partial_ptr, row, rows, count, R, W) / n
    v = _total(partial_ptr + every, row, rows, count, R, W) / n
    var_s = _not_negative(_total(partial_ptr + 2 * every, row, rows, count, R, W) / n - u * u)
    var_t = _not_negative(_total(partial_ptr + 3 * every, row, rows, count, R, W) / n - v * v)
    cov = _total(partial_ptr + 4 * every, row, rows, count, R, W) / n - u * v
    mean_s = tl.load(s_ptr + row * inner, there, other=0.0).to(tl.float64) + u
    mean_t = tl.load(t_ptr + row * inner, there, other=0.0).to(tl.float64) + v
    r_s, r_t = 1.0 / tl.sqrt(var_s + eps), 1.0 / tl.sqrt(var_t + eps)
    each = _not_negative(var_s * r_s * r_s + var_t * r_t * r_t - 2.0 * (cov * r_s * r_t))
    tl.store(distance_ptr + row, (each * times).to(tl.float32), there)
    tl.store(moments_ptr + row, mean_s, there)
    tl.store(moments_ptr + rows + row, mean_t, there)
    tl.store(moments_ptr + 2 * rows + row, var_s, there)
    tl.store(moments_ptr + 3 * rows + row, var_t, there)
    tl.store(moments_ptr + 4 * rows + row, cov, there)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def standardized_distance_backward_kernel(
    grad_ptr, s_ptr, t_ptr, moments_ptr, ds_ptr, grad_stride, height, width, stride, rows, across, each: tl.float64,
    eps: tl.float64, BY_COLUMN: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    r, c = walk.block_rows(pid // across, height, R), walk.block_columns(pid % across, W)
    row, row_there = walk.scale_rows(r, c, height, width, rows, BY_COLUMN)
    mean_s = tl.load(moments_ptr + row, row_there, other=0.0)
    mean_t = tl.load(moments_ptr + rows + row, row_there, other=0.0)
    r_s = 1.0 / tl.sqrt(tl.load(moments_ptr + 2 * rows + row, row_there, other=0.0) + eps)
    r_t = 1.0 / tl.sqrt(tl.load(moments_ptr + 3 * rows + row, row_there, other=0.0) + eps)
    cov = tl.load(moments_ptr + 4 * rows + row, row_there, other=0.0)
    factor = tl.load(grad_ptr + row * grad_stride, row_there, other=0.0).to(tl.float64) * each
    p = 2.0 * factor * (r_s * r_s) * (eps * (r_s * r_s) + cov * r_s * r_t)
    q = -2.0 * factor * r_s * r_t
    near_s, near_t = mean_s.to(tl.float32), mean_t.to(tl.float32)
    rest = (p * (near_s.to(tl.float64) - mean_s) + q * (near_t.to(tl.float64) - mean_t)).to(tl.float32)
    at, there = r.to(tl.int64) * stride + c, walk.above(r, height) & (c < width)
    s = tl.load(s_ptr + at, there, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + at, there, other=0.0).to(tl.float32)
    ds = p.to(tl.float32) * (s - near_s) + (q.to(tl.float32) * (t - near_t) + rest)
    tl.store(ds_ptr + at, math.narrow(ds, ds_ptr.dtype.element_ty), there)


def standardized_distance(student, teacher, axis, eps, mean):
    """Arguments and results of reference.standardized_distance; float64 takes the reference."""
    if student.dtype == torch.float64:
        return reference.standardized_distance(student, teacher, axis, eps, mean)
    s = layout.dense(student)
    t, rows = layout.aligned(teacher, s), student.shape[axis]
    inner, n = layout.rows_inner(s, rows, axis)[1], s.numel() // rows
    w = walk.plan(s, rows, axis)
    steps, down, across, count = w.reduction()
    partial = s.new_empty(5 * rows * count, dtype=torch.float64)
    distance, moments = s.new_empty(rows, dtype=torch.float32), s.new_empty((5, rows), dtype=torch.float64)
    walk.launch(moments_kernel, down * across, s, s, t, partial, w.height, w.width, w.stride, rows, inner, across,
                steps, count, BY_COLUMN=w.by_column, R=w.R, W=w.W, num_warps=8 if w.by_column else 4)  # fmt: skip
    W = min(256, triton.next_power_of_2(count))
    R = min(256 // W, triton.next_power_of_2(rows))
    walk.launch(finish_kernel, triton.cdiv(rows, R), s, s, t, partial, distance, moments, rows, inner, count, float(n),
                1.0 if mean else float(n), eps, R=R, W=W)  # fmt: skip
    return distance, moments


def standardized_distance_backward(grad, student, teacher, moments, axis, eps, mean):
    """Arguments and result of reference.standardized_distance_backward."""
    if student.dtype == torch.float64:
        return reference.standardized_distance_backward(grad, student, teacher, moments, axis, eps, mean)
    s = layout.dense(student)
    t, rows = layout.aligned(teacher, s), student.shape[axis]
    ds = torch.empty_like(s)
    w = walk.plan(s, rows, axis)
    each = 1.0 / (s.numel() // rows) if mean else 1.0
    walk.launch(standardized_distance_backward_kernel, w.down * w.across, s, grad, s, t, moments.contiguous(), ds,
                grad.stride(0), w.height, w.width, w.stride, rows, w.across, each, eps, BY_COLUMN=w.by_column, R=w.R,
                W=w.W)  # fmt: skip
    return ds
