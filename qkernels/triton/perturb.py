"""The multi-tensor ops in Triton: a program takes one block of one tensor, found in a table of addresses.

A launch serves the tensors of one dtype. What depends on their sizes alone is kept from call to call; the addresses are
a tensor of int64, copied from pageable memory at each call: a CUDA graph cannot capture that (the native kernels take
their tables by value).
"""

import functools

import torch
import triton
import triton.language as tl

from .. import layout
from ..reference import perturb as reference
from . import math, walk

BLOCK = 2048  # elements of a block
SUMS = 1024  # partial sums that one step of the finishing kernel reads

ALONG, ADAPTIVE = tl.constexpr(reference.ALONG), tl.constexpr(reference.ADAPTIVE)
NORMAL, MAGNITUDE, UNIFORM = (tl.constexpr(m) for m in reference.DRAWN)
ASCEND, ASCEND_SIGN = tl.constexpr(reference.ASCEND), tl.constexpr(reference.ASCEND_SIGN)
FIELDS = tl.constexpr(3)  # of a block in the table: tensor, first element, elements of the tensor


@triton.jit
def _address(addresses_ptr, at, like_ptr):
    return tl.load(addresses_ptr + at).to(like_ptr.dtype)


@triton.jit
def products_kernel(a_ptr, b_ptr, partial_ptr, addresses_ptr, blocks_ptr, tensors, stride, eta: tl.float64,
                    DOT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums of a block in float64: a.b, a.a and b.b, or of a^2, or of ((|b| + eta) a)^2."""
    pid = tl.program_id(0)
    t = tl.load(blocks_ptr + pid * FIELDS)
    i = tl.load(blocks_ptr + pid * FIELDS + 1) + tl.arange(0, BLOCK)
    there = i < tl.load(blocks_ptr + pid * FIELDS + 2)
    a = math.widen(tl.load(_address(addresses_ptr, t, a_ptr) + i, there, other=0.0)).to(tl.float64)
    if DOT or WEIGHTED:
        b = math.widen(tl.load(_address(addresses_ptr, tensors + t, b_ptr) + i, there, other=0.0)).to(
            tl.float64
        )
    if DOT:
        tl.store(partial_ptr + pid, tl.sum(a * b))
        tl.store(partial_ptr + stride + pid, tl.sum(a * a))
        tl.store(partial_ptr + 2 * stride + pid, tl.sum(b * b))
    else:
        if WEIGHTED:
            a = a * (tl.abs(b) + eta)
        tl.store(partial_ptr + pid, tl.sum(a * a))


@triton.jit
def finish_kernel(partial_ptr, ends_ptr, sums_ptr, W: tl.constexpr):
    """Program p sums partial[ends[p]] to partial[ends[p + 1] - 1], W at a time, in order."""
    pid = tl.program_id(0)
    first, last = tl.load(ends_ptr + pid), tl.load(ends_ptr + pid + 1)
    total = tl.zeros((W,), tl.float64)
    for begin in range(first, last, W):
        i = begin + tl.arange(0, W)
        total += tl.load(partial_ptr + i, i < last, other=0.0)
    tl.store(sums_ptr + pid, tl.sum(total))


@triton.jit
def _number(coefficients_ptr, k, j, width):
    value = tl.load(coefficients_ptr + k * width + j, j < width, other=0.0)
    return tl.where(value - value == 0.0, value, 0.0).to(tl.float32)


@triton.jit
def _moved(w, spread, variate):
    return tl.where(spread == 0.0, w, w + spread * variate)


@triton.jit
def _variates(seed, stream, first, MOVE: tl.constexpr, BLOCK: tl.constexpr):
    w0, w1, w2, w3 = math.philox(seed, stream, (first >> 2) + tl.arange(0, BLOCK // 4))
    if MOVE == UNIFORM:
        n0, n1, n2, n3 = _symmetric(w0), _symmetric(w1), _symmetric(w2), _symmetric(w3)
    else:
        n0, n1 = math.normal_pair(w0, w1)
        n2, n3 = math.normal_pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _symmetric(word):
    return ((word >> 8).to(tl.int32) - 8388608).to(tl.float32) * 1.1920928955078125e-07


@triton.jit
def perturb_kernel(like_ptr, addresses_ptr, blocks_ptr, index_ptr, coefficients_ptr, seed_ptr, tensors, copies, width,
                   first_copy, MOVE: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """All copies of one block. Addresses: parameters, directions, points, then the copies, ``tensors`` of each."""
    pid = tl.program_id(0)
    t = tl.load(blocks_ptr + pid * FIELDS)
    first = tl.load(blocks_ptr + pid * FIELDS + 1)
    i = first + tl.arange(0, BLOCK)
    there = i < tl.load(blocks_ptr + pid * FIELDS + 2)
    DRAWN: tl.constexpr = MOVE == NORMAL or MOVE == MAGNITUDE or MOVE == UNIFORM  # noqa: SIM109
    w = math.widen(tl.load(_address(addresses_ptr, t, like_ptr) + i, there, other=0.0))
    d, p = w, w
    if not DRAWN:
        d = math.widen(tl.load(_address(addresses_ptr, tensors + t, like_ptr) + i, there, other=0.0))
        if POINTS:
            p = math.widen(tl.load(_address(addresses_ptr, 2 * tensors + t, like_ptr) + i, there, other=0.0))
    size = tl.abs(w)
    for k in range(copies):
        a = _number(coefficients_ptr, k, 0, width)
        b, c = _number(coefficients_ptr, k, 1, width), _number(coefficients_ptr, k, 2, width)
        if MOVE == ASCEND or MOVE == ASCEND_SIGN:  # noqa: SIM109 (Triton knows no `in`)
            along = d
            if MOVE == ASCEND_SIGN:
                along = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
            r = b * size + c
            y = w + math.clip(_moved(p - w, a, along), -r, r)
        else:
            spread = a
            if MOVE == ADAPTIVE:
                reach = size + b
                spread = a * (reach * reach)
            elif MOVE == MAGNITUDE:
                scaled = a * w
                spread = tl.sqrt_rn(scaled * scaled + b * b)
            if DRAWN:
                stream = ((first_copy + k).to(tl.int64) << 32) + tl.load(index_ptr + t)
                d = _variates(tl.load(seed_ptr), stream, first, MOVE, BLOCK)
            y = _moved(w, spread, d)
            if MOVE == ALONG and POINTS:
                y = _moved(y, b, p)
        out = _address(addresses_ptr, (3 + k) * tensors + t, like_ptr)
        tl.store(out + i, math.narrow(y, like_ptr.dtype.element_ty), there)


def _table(rows, like):
    """A list of int64 on the device of ``like``."""
    return torch.tensor(rows, dtype=torch.int64).to(like.device, non_blocking=True)


def _blocks(tensors):
    """(table, ends): for each block its tensor, first element, elements of the tensor; where a tensor's blocks end."""
    return _cut(tuple(t.numel() for t in tensors), tensors[0].device)


@functools.lru_cache(maxsize=32)
def _cut(sizes, device):
    blocks = [(t, i, size) for t, size in enumerate(sizes) for i in range(0, size, BLOCK)]
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + triton.cdiv(size, BLOCK))
    # Not `non_blocking`: another stream may be the next to read them.
    return tuple(torch.tensor(rows, dtype=torch.int64).to(device) for rows in (blocks, ends))


def _by_dtype(tensors):
    """Positions of the non-empty tensors, dtype by dtype."""
    members = {}
    for i, t in enumerate(tensors):
        if t.numel():
            members.setdefault(t.dtype, []).append(i)
    return members.values()


def _beside(others, tensors):
    return [layout.aligned(layout.dense(o), t) for o, t in zip(others, tensors)]


def _addresses(lists):
    return [t.data_ptr() for members in lists for t in members]


def multi_norm(tensors, weights, eta):
    """Arguments and result of reference.multi_norm."""
    if any(t.dtype == torch.float64 for t in tensors):
        return reference.multi_norm(tensors, weights, eta)
    tensors = [layout.dense(t) for t in tensors]
    weights = _beside(weights, tensors)
    squares = tensors[0].new_zeros(len(tensors), dtype=torch.float64)
    for at in _by_dtype(tensors):
        a = [tensors[i] for i in at]
        b = [weights[i] for i in at] if weights else a
        blocks, ends = _blocks(a)
        partial, like = squares.new_empty(len(blocks)), a[0]
        walk.launch(products_kernel, len(blocks), like, like, like, partial, _table(_addresses((a, b)), like),
                    blocks, len(a), len(blocks), float(eta), DOT=False, WEIGHTED=bool(weights), BLOCK=BLOCK,
                    num_warps=8)  # fmt: skip
        sums = squares.new_empty(len(a))
        walk.launch(finish_kernel, len(a), like, partial, ends, sums, W=SUMS)
        squares[_table(at, like)] = sums
    return squares.sum().sqrt().reshape(1), squares.sqrt()


def multi_dot(a, b):
    """Arguments and result of reference.multi_dot."""
    if any(t.dtype == torch.float64 for t in a):
        return reference.multi_dot(a, b)
    a = [layout.dense(t) for t in a]
    b = _beside(b, a)
    total = a[0].new_zeros(3, dtype=torch.float64)
    for at in _by_dtype(a):
        x, y = [a[i] for i in at], [b[i] for i in at]
        (blocks, _), like = _blocks(x), x[0]
        partial, sums = total.new_empty(3 * len(blocks)), total.new_empty(3)
        walk.launch(products_kernel, len(blocks), like, like, like, partial, _table(_addresses((x, y)), like),
                    blocks, len(x), len(blocks), 0.0, DOT=True, WEIGHTED=False, BLOCK=BLOCK,
                    num_warps=8)  # fmt: skip
        ends = [k * len(blocks) for k in range(4)]
        walk.launch(finish_kernel, 3, like, partial, _table(ends, like), sums, W=SUMS)
        total += sums
    return total


def multi_perturb(out, params, directions, points, move, coefficients, seed, first_copy):
    """Arguments and effect of reference.multi_perturb."""
    if any(t.dtype == torch.float64 for t in params):
        return reference.multi_perturb(out, params, directions, points, move, coefficients, seed, first_copy)
    params = [layout.dense(t) for t in params]
    directions, points = _beside(directions, params), _beside(points, params)
    coefficients = coefficients.contiguous()
    copies, width = coefficients.shape
    for at in _by_dtype(params):
        w = [params[i] for i in at]
        d, p = [directions[i] for i in at] if directions else w, [points[i] for i in at] if points else w
        targets = [[out[k * len(params) + i] for i in at] for k in range(copies)]
        (blocks, _), like = _blocks(w), w[0]
        walk.launch(perturb_kernel, len(blocks), like, like, _table(_addresses((w, d, p, *targets)), like),
                    blocks, _table(at, like), coefficients, seed, len(w), copies, width, first_copy,
                    MOVE=move, POINTS=bool(points), BLOCK=BLOCK)  # fmt: skip
    return None


def multi_climb(*args):
    """Arguments and effect of reference.multi_climb."""
    reference.multi_climb(*args, norm_of=multi_norm, perturb=multi_perturb)
