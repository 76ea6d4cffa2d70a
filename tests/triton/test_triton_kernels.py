"""What the table of cases does not reach: every walk and seam of a reduction, random words, wide bounds, tails."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from qkernels import layout, noise, random, reference
from qkernels import triton as launchers
from qkernels.triton import math, walk

STREAMS = (0, 1, 7, (1 << 32) - 1, (5 << 33) + 2, -3)


@triton.jit
def words_kernel(seed_ptr, out_ptr, first: tl.int64, stream: tl.int64, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    words = math.philox(tl.load(seed_ptr), stream, (first + i).to(tl.int64))
    for k in tl.static_range(4):
        tl.store(out_ptr + 4 * i + k, words[k].to(tl.int64))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("seed", (0, 1234567890123456789, -7046029254386353131))
def test_words(seed, stream, device):
    seed = torch.tensor([seed], device=device)
    for first in (0, (1 << 32) - 3, (1 << 40) + 5):
        out = torch.empty(64, dtype=torch.int64, device=device)
        words_kernel[(1,)](seed, out, first, stream, BLOCK=16)
        assert torch.equal(out, random.words(seed, stream, 64, 4 * first))


@pytest.mark.parametrize("kind, stream", list(zip(range(1, 7), STREAMS)))
@pytest.mark.parametrize("shape", ((2, 4, 8), (3, 5, 7)), ids=str)
def test_noise_at_every_stream(kind, stream, shape, device):
    x, scale = torch.randn(shape, device=device), torch.rand(shape[1], device=device) + 0.1
    for seed in (-1, 42):
        for axis, s in ((layout.FLAT, scale[:1]), (1, scale)):
            args = (
                x,
                s,
                None,
                None,
                axis,
                -8,
                7,
                kind,
                1.0,
                5.0,
                torch.tensor([seed], device=device),
                stream,
                None,
                None,
            )
            assert torch.equal(launchers.fake_quantize(*args), reference.fake_quantize(*args))


@pytest.mark.parametrize("step", [0.0, 1e-40, -1e-40, float("inf"), float("nan")])
def test_steps_that_are_too_small_or_broken(step, device):
    x, scale = 1e-37 * torch.randn(3, 5, device=device), torch.tensor([step], device=device)
    args = (x, scale, None, None, layout.FLAT, -8, 7, noise.PLAIN, 0.0, 0.0, None, 0, None, None)
    mine, expected = (module.fake_quantize(*args) for module in (launchers, reference))
    torch.testing.assert_close(mine, expected, rtol=0.0, atol=0.0, equal_nan=True)


def test_the_coin_is_thrown_per_seed(device):
    x, scale = torch.randn(64, device=device), torch.ones(1, device=device)
    for kind in (noise.AFTER, noise.BEFORE):
        changed = set()
        for seed in range(8):
            args = (
                x,
                scale,
                None,
                None,
                -1,
                -8,
                7,
                kind,
                0.5,
                0.0,
                torch.tensor([seed], device=device),
                3,
                None,
                None,
            )
            got = launchers.fake_quantize(*args)
            assert torch.equal(got, reference.fake_quantize(*args))
            changed.add(torch.equal(got, x.round()))
        assert changed == {False, True}


# rows x inner of each walk: one long run, long runs, short ones even and odd, columns wide and narrow, their seams
LAYOUTS = {
    "tensor": ((9001,), layout.FLAT, 1), "runs": ((3, 5000), 0, 3), "repeated runs": ((2, 3, 2100), 1, 3),
    "short": ((50, 6, 49), 1, 6), "short quads": ((60, 5, 16), 1, 5), "pairs": ((700, 5, 2), 1, 5),
    "columns": ((33, 300), 1, 300), "few columns": ((3000, 3), 1, 3), "groups": ((90, 32), layout.FLAT, 90),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_of_every_walk(name, device, monkeypatch):
    """Several blocks per program, several programs per row: the sums are those of float64, twice the same bits."""
    monkeypatch.setattr(walk, "PROGRAMS", 2)
    shape, axis, rows = LAYOUTS[name]
    x, g = torch.randn(shape, device=device) * 3, torch.randn(shape, device=device)
    scale = torch.linspace(-0.5, 0.7, rows, device=device)
    offset = torch.linspace(-0.1, 0.2, rows, device=device)
    for kind in (noise.PLAIN, noise.PSEUDO):
        seed = torch.tensor([9], device=device)
        args = (g, x, scale, offset, None, axis, -4, 3, 0.3, False, 0.1, kind, 0.0, 0.0, seed, 5)
        got, again, want = launchers.fake_quantize_backward(*args), launchers.fake_quantize_backward(*args), \
            reference.fake_quantize_backward(*args)  # fmt: skip
        assert torch.equal(got[0], want[0])
        bound = 4 * 2.0**-24 * (x.numel() / rows) ** 0.5 * 5 * float(g.abs().max()) * 0.3
        for a, b, c in zip(got[1:], again[1:], want[1:]):
            assert torch.equal(a, b)
            assert ((a - c).abs() <= bound + 2.0**-23 * c.abs()).all()
            assert c.abs().max() > 100 * bound


@pytest.mark.parametrize("shape, axis, rows", LAYOUTS.values(), ids=LAYOUTS)
def test_a_plan_covers_the_data_and_fits_its_block(shape, axis, rows):
    for kind in (noise.PLAIN, noise.PSEUDO):
        x = torch.empty(shape)
        w = walk.plan(x, rows, axis, kind)
        assert w.height * w.width == x.numel() and w.R * w.W <= walk.BLOCK
        assert (w.down - 1) * w.R < w.height <= w.down * w.R and (
            w.across - 1
        ) * w.W < w.width <= w.across * w.W
        assert w.quads == (w.height == 1 or w.width % 4 == 0) or w.W < 4
        assert 1 <= w.steps() <= walk.STEPS


@triton.jit
def rows_kernel(out_ptr, block, height, R: tl.constexpr):
    r = walk.block_rows(block, height, R)
    tl.store(out_ptr + tl.arange(0, R)[:, None], tl.where(walk.above(r, height), r, -1).to(tl.int64))


@pytest.mark.parametrize("height", ((1 << 31) - 1, (1 << 31) - 13, (1 << 31) + 5))
def test_rows_at_the_end_of_32_bits(height, device):
    for block in ((height - 1) // 16, (height - 1) // 16 + 1):
        out, rows = torch.empty(16, dtype=torch.int64, device=device), torch.arange(16) + 16 * block
        rows_kernel[(1,)](out, block, height, R=16)
        assert torch.equal(out.cpu(), torch.where(rows < height, rows, -1))


@pytest.mark.parametrize("zero_point", (None, -(1 << 22), (1 << 23) + 5))
def test_rounding_where_the_magic_number_ends(zero_point, device):
    """Ties beyond 2**22 and levels beyond 2**23, reached through wide bounds or through a far zero point."""
    near = [
        s * (2.0**p + d)
        for s, p, d in itertools.product((-1, 1), (21, 22, 23, 24), (-1.5, -0.5, 0.0, 0.5, 1.5, 3.0))
    ]
    x = torch.tensor([*near, 0.5, 1.5, -0.5, float("nan"), float("inf"), -float("inf"), 3e38], device=device)
    scale, zero = torch.ones(1, device=device), None
    low, high = -(1 << 25), 1 << 25
    if zero_point is not None:
        zero, low, high = torch.tensor([zero_point], dtype=torch.int32, device=device), -100, 100
    args = (x, scale, None, zero, -1, low, high, 0, 0.0, 0.0, None, 0, None, None)
    got, want = launchers.fake_quantize(*args), reference.fake_quantize(*args)
    assert torch.equal(got.nan_to_num(nan=0.25), want.nan_to_num(nan=0.25)) and got.isnan().sum() == 1


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_pack_and_unpack_at_tails(bits, device):
    for numel, signed in itertools.product((1, 3, 4, 4097), (True, False)):
        low = -(1 << bits - 1) if signed else 0
        q = torch.randint(
            low, low + (1 << bits), (numel,), dtype=torch.int8 if signed else torch.uint8, device=device
        )
        p = launchers.pack(q, bits)
        assert torch.equal(p, reference.pack(q, bits))
        assert torch.equal(launchers.unpack(p, bits, numel, signed), q)
    assert launchers.pack(q[:0], bits).numel() == launchers.unpack(p[:0], bits, 0, True).numel() == 0


def test_every_kernel_is_listed_for_compilation():
    import qkernels.triton.integer
    import qkernels.triton.moments
    import qkernels.triton.perturb
    import qkernels.triton.quantizer

    modules = (getattr(qkernels.triton, name) for name in ("integer", "moments", "perturb", "quantizer"))
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    specs = launchers.aot_specs()
    assert {fn.__name__ for _, fn, *_ in specs} == kernels
    assert len({name for name, *_ in specs}) == len(specs)
    for _, fn, signature, constants, aligned, _ in specs:
        assert list(signature) == list(fn.arg_names)
        assert {a for a, kind in signature.items() if kind == "constexpr"} == set(constants)
        assert set(aligned) <= set(signature)
        # Triton takes a number that is not annotated as 32 bits wide: only those of elements may be.
        scalars = {a: kind for a, kind in signature.items() if kind in ("fp32", "fp64", "i64")}
        wide = {tl.float64: "fp64", tl.int64: "i64"}
        annotated = {a: wide[t] for a, t in fn.fn.__annotations__.items() if t in wide}
        assert annotated == {a: kind for a, kind in scalars.items() if kind != "fp32"}, fn.__name__
        assert set(scalars) - set(annotated) <= {"a", "b", "ewgs"}, fn.__name__


COMPILE = """
import sys, torch
sys.path.insert(0, "scripts")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qkernels.triton import aot_specs
for name, fn, signature, constants, aligned, warps in aot_specs():
    if name in ("fake_quantize 0 bf16 run", "fake_quantize_backward 4 fp32 columns", "sum_rows 1x1024"):
        at = fn.arg_names.index
        source = ASTSource(fn=fn, signature=signature, constexprs={(at(k),): v for k, v in constants.items()},
                           attrs={(at(k),): [["tt.divisibility", 16]] for k in aligned})
        options = {"num_warps": warps, "enable_fp_fusion": False}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        print(name, "fma" in ptx, "div.full" in ptx, "atom" in ptx, "global.v4" in ptx, sep=",")
"""


def test_compiled_code():
    """No contraction, no approximate division, no atomics, 16-byte accesses: of one kernel of each sort, for sm_90."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = dict(line.split(",", 1) for line in done.stdout.splitlines())
    assert len(seen) == 3
    for name, facts in seen.items():
        vector = "False" if name.startswith("sum_rows") else "True"
        assert facts == f"False,False,False,{vector}", name
