"""How programs walk the data: the dense memory is a matrix, cut into fixed blocks whatever the device.

runs     a matrix row is a run of ``inner`` elements that share one row of scale: run r uses row r % rows
columns  rows change with every element (inner == 1, as in channels_last): matrix column c uses row c
"""

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import layout, noise
from . import math

BLOCK = 2048  # elements of a block, a power of two
COLUMNS = 256  # widest block where columns have scales of their own
PROGRAMS = 2048  # enough programs to fill a device; below, a program takes one block
# Multiplies and adds are rounded one by one, and no function flushes subnormal numbers (floor would).
EXACT = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
STEPS = 16  # most blocks that one program sums


@dataclass(frozen=True)
class Walk:
    """A matrix of height x width elements in blocks of R x W; a row begins ``stride`` elements after the last."""

    height: int
    width: int
    stride: int
    rows: int
    by_column: bool
    R: int
    W: int

    @property
    def down(self) -> int:
        return triton.cdiv(self.height, self.R)

    @property
    def across(self) -> int:
        return triton.cdiv(self.width, self.W)

    @property
    def quads(self) -> bool:
        """Whether four neighbours of a block share a Philox counter."""
        return self.stride % 4 == 0 and self.W >= 4

    def steps(self) -> int:
        """Blocks that one program of a reduction takes along the direction that it sums."""
        most = self.down if self.by_column else self.across
        return max(1, min(STEPS, most, self.down * self.across // PROGRAMS))

    def reduction(self) -> tuple[int, int, int, int]:
        """(steps, down, across, count): down * across programs of ``steps`` blocks leave ``count`` sums of each row."""
        steps = self.steps()
        if self.by_column:
            down = triton.cdiv(self.down, steps)
            return steps, down, self.across, down
        across = triton.cdiv(self.across, steps)
        return steps, self.down, across, self.height // self.rows * across


def plan(x: torch.Tensor, rows: int, axis: int, kind: int = noise.PLAIN) -> Walk:
    """The walk over a dense, non-empty x. A Philox counter per element takes registers: half a block."""
    rows, inner = layout.rows_inner(x, rows, axis)
    by_column = rows > 1 and inner == 1
    width = rows if by_column else inner
    height = x.numel() // width
    # A stride of 0 tells the compiler that a single row begins where the tensor does: aligned.
    stride = 0 if height == 1 else width
    block = BLOCK // 2 if noise.draws(kind) and stride % 4 else BLOCK
    W = _block_width(width, COLUMNS if by_column else block)
    R = min(block // W, triton.next_power_of_2(height))
    return Walk(height, width, stride, rows, by_column, R, W)


def _block_width(width: int, widest: int) -> int:
    """The widest power of two that covers ``width`` with at most a quarter in vain."""
    W = min(widest, triton.next_power_of_2(width))
    while W > 32 and 4 * triton.cdiv(width, W) * W > 5 * width:
        W //= 2
    return W


def launch(kernel, programs: int, like: torch.Tensor, *args, num_warps: int = 4, **constants) -> None:
    """Run a kernel on the device of ``like``."""
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*args, **constants, num_warps=num_warps, **EXACT)


def row_values(t: torch.Tensor | None) -> torch.Tensor | None:
    """One value per row as a kernel reads them."""
    return None if t is None else t.contiguous()


@triton.jit
def block_rows(block, height, R: tl.constexpr):
    """Matrix rows of a block, in the integer type that the height needs; those past its end may wrap around."""
    return (block.to(height.dtype) * R + tl.arange(0, R))[:, None]


@triton.jit
def block_columns(block, W: tl.constexpr):
    return (block.to(tl.int64) * W + tl.arange(0, W))[None, :]


@triton.jit
def above(r, height):
    """Whether rows are above ``height``; unsigned, those that have wrapped around are far below it."""
    if r.dtype == tl.int64:
        return r.to(tl.uint64, bitcast=True) < height
    else:
        return r.to(tl.uint32, bitcast=True) < height


@triton.jit
def scale_rows(r, c, height, width, rows, BY_COLUMN: tl.constexpr):
    """(row of scale, whether it is there) for matrix rows r and columns c."""
    if BY_COLUMN:
        return c, c < width
    else:
        return r % rows, above(r, height)


@triton.jit
def grid_of(row, there, scale_ptr, offset_ptr, zero_point_ptr, quant_min, quant_max):
    """(scale, offset, lo, hi) of the given rows."""
    scale = math.safe_scale(tl.load(scale_ptr + row, there, other=1.0))
    offset = 0.0
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + row, there, other=0.0)
    lo, hi = quant_min.to(tl.float32), quant_max.to(tl.float32)
    if zero_point_ptr is not None:
        zero = tl.load(zero_point_ptr + row, there, other=0).to(tl.int64)
        lo, hi = (quant_min - zero).to(tl.float32), (quant_max - zero).to(tl.float32)
    return scale, offset, lo, hi


@triton.jit
def _variates(seed, stream, r, c, block, stride, KIND: tl.constexpr, QUADS: tl.constexpr, W: tl.constexpr):
    NORMAL: tl.constexpr = KIND == math.TEMPERING or KIND == math.PSEUDO_NORMAL
    if QUADS:
        quad = block.to(tl.int64) * (W // 4) + tl.arange(0, W // 4)
        w0, w1, w2, w3 = math.philox(seed, stream, r.to(tl.int64) * (stride // 4) + quad[None, :])
        if NORMAL:
            n0, n1 = math.normal_pair(w0, w1)
            n2, n3 = math.normal_pair(w2, w3)
        else:
            n0, n1, n2, n3 = math.uniform(w0), math.uniform(w1), math.uniform(w2), math.uniform(w3)
        return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    index = r.to(tl.int64) * stride + c
    w0, w1, w2, w3 = math.philox(seed, stream, index >> 2)
    late, odd = (index & 2) != 0, (index & 1) != 0
    if NORMAL:
        even_n, odd_n = math.normal_pair(tl.where(late, w2, w0), tl.where(late, w3, w1))
        return tl.where(odd, odd_n, even_n)
    return math.uniform(tl.where(late, tl.where(odd, w3, w2), tl.where(odd, w1, w0)))


@triton.jit
def draw(seed_ptr, stream, a, r, c, block, stride, KIND: tl.constexpr, QUADS: tl.constexpr, R: tl.constexpr,
         W: tl.constexpr):  # fmt: skip
    """The variate of each element of the block at matrix rows r and columns c (``block`` is the block's column)."""
    seed = tl.load(seed_ptr)
    if KIND == math.AFTER or KIND == math.BEFORE:
        n = tl.zeros((R, W), tl.float32)
        if math.switched_on(seed, stream, a):
            n = _variates(seed, stream, r, c, block, stride, KIND, QUADS, W) - 0.5
    else:
        n = _variates(seed, stream, r, c, block, stride, KIND, QUADS, W)
        if KIND == math.PSEUDO_NORMAL:
            n = 0.5 * n
        elif KIND == math.PSEUDO:
            n = n - 0.5
    return n
