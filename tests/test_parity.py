"""Every backend gives what the reference gives, over the one table of cases."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layers import same_bits
from torch.utils._pytree import tree_leaves

from qkernels import reference, testing

RUNS = [
    pytest.param(case, backend, device, id=case.id(backend if device == "cpu" else f"{backend}-{device}"))
    for case in testing.cases()
    for device in testing.devices()
    for backend in testing.backends(case.op, device)
    if (backend, device) != ("reference", "cpu")
]


def tensors(args):
    return [a for a in tree_leaves(args) if isinstance(a, torch.Tensor)]


@pytest.mark.parametrize("case, backend, device", RUNS)
def test_parity(case, backend, device, poisoned):
    args = case.args(device)
    kept = [t.clone() for t in tensors(args)]
    run = testing.backends(case.op, device)[backend]
    got = run(*args)
    testing.compare(case, args, got, testing.wanted(case))
    assert same_bits(kept, tensors(args)), "an input was written"
    assert same_bits(run(*args), got), "a second call gave other bits"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.3, 2.0**-126, 1e-30, 3e38, float("inf")])
def test_every_half_number(dtype, scale):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    grad, s = x.roll(12345), torch.tensor([scale])
    for quant_min, quant_max in ((-8, 7), (0, 255)):
        forward = (x, s, None, None, -1, quant_min, quant_max, 0, 0.0, 0.0, None, 0, None, None)
        backward = (grad, *forward[:7], 1.0, False, 0.0, 0, 0.0, 0.0, None, 0)
        for name, args in (("fake_quantize", forward), ("fake_quantize_backward", backward)):
            got, want = getattr(torch.ops.qkernels, name)(*args), getattr(reference, name)(*args)
            got, want = (t if isinstance(t, torch.Tensor) else t[0] for t in (got, want))
            same = torch.equal(got.isnan(), want.isnan()) and torch.equal(
                got[~got.isnan()], want[~got.isnan()]
            )
            assert same and torch.equal(got.signbit()[~got.isnan()], want.signbit()[~got.isnan()]), (
                name,
                quant_min,
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [48, 512])
def test_next_to_a_tie_or_an_end(dtype, bits, width):
    """Values next to a tie or an end, each alone in a row of its own, where its term of the sum cannot hide."""
    random = torch.Generator().manual_seed(bits)
    quant_min, quant_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for scale in [0.25, 2.5 / 7, *(10 ** (torch.rand(6, generator=random) * 6 - 3)).tolist()]:
        s = torch.tensor([scale])
        at = (torch.arange(2 * quant_min - 3, 2 * quant_max + 4) / 2 * s).view(torch.int32)
        near = (at[:, None] + torch.arange(-9, 10, dtype=torch.int32)).view(torch.float32).reshape(-1)
        near = near[near.isfinite()]
        x = (0.2 * s).expand(len(near), width).clone()
        x[torch.arange(len(near)), torch.randint(0, width, near.shape, generator=random)] = near
        x = x.to(dtype)
        grad = torch.randn(x.shape, generator=random).to(dtype)
        forward = (x, s, None, None, -1, quant_min, quant_max, 0, 0.0, 0.0, None, 0, None, None)
        backward = (grad, *forward[:7], 1.0, False, 0.0, 0, 0.0, 0.0, None, 0)
        assert torch.equal(torch.ops.qkernels.fake_quantize(*forward), reference.fake_quantize(*forward))
        got, want = (
            torch.ops.qkernels.fake_quantize_backward(*backward),
            reference.fake_quantize_backward(*backward),
        )
        assert torch.equal(got[0], want[0])
        # A wrong level changes a term by the gradient; a row holds one doubtful term.
        rows = torch.ones(len(near)) * s
        by_row = (grad, x, rows, None, None, 0, *backward[6:])
        got, want = (
            f(*by_row)[1]
            for f in (torch.ops.qkernels.fake_quantize_backward, reference.fake_quantize_backward)
        )
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize("shape", [(1, 4_300_001), (3, 1_433_335), (42_000, 105), (67_200, 64)], ids=str)
def test_outputs_larger_than_the_caches(dtype, shape, offset):
    """They may be written past the caches; rows of an odd length begin anywhere in a line."""
    random = torch.Generator().manual_seed(shape[0])
    x, grad = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    s = 0.1 + torch.rand(len(x), generator=random)
    o = torch.rand(len(x), generator=random) - 0.5 if offset else None
    forward = (x, s, o, None, 0, -8, 7, 0, 0.0, 0.0, None, 0, None, None)
    backward = (grad, *forward[:7], 1.0, False, 0.0, 0, 0.0, 0.0, None, 0)
    assert torch.equal(torch.ops.qkernels.fake_quantize(*forward), reference.fake_quantize(*forward))
    got, want = (
        f(*backward) for f in (torch.ops.qkernels.fake_quantize_backward, reference.fake_quantize_backward)
    )
    assert torch.equal(got[0], want[0])
    for sums, expected in zip(got[1:], want[1:], strict=True):
        assert torch.allclose(sums, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, -1])
def test_any_nan_stays_one(dtype, bits):
    """Rounding bfloat16 as an integer would carry the bits of some into infinity or zero."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    x, one = torch.ones(3, 70).to(dtype), torch.ones(1)
    for scale, offset in ((nan, None), (nan, one), (one, nan)):
        y = torch.ops.qkernels.fake_quantize(
            x, scale, offset, None, -1, -8, 7, 0, 0.0, 0.0, None, 0, None, None
        )
        assert y.isnan().all()


@pytest.mark.parametrize("off", ["QKERNELS_AVX512", "QKERNELS_BFLOAT16"])
def test_without_the_processor_s_instructions(off):
    names = "native and fake_quantize or every_half_number or next_to_a_tie or any_nan"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", names]
    done = subprocess.run(command, env={**os.environ, off: "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@st.composite
def drawn_cases(draw):
    op = testing.OPS[draw(st.sampled_from(sorted(testing.OPS)))]
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)))
    granularity = draw(st.sampled_from(op.granularities))
    if granularity == "group":
        shape = (*shape[:-1], testing.GROUP * shape[-1])
    dtype, memory, option = (draw(st.sampled_from(t)) for t in (op.dtypes, op.memories, op.options))
    return testing.Case(op.name, shape, dtype, granularity, memory, option)


@given(drawn_cases())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_parity_of_drawn_cases(case):
    assume(testing.OPS[case.op].legal(case))
    args = case.args()
    backends = testing.backends(case.op)
    want = backends["reference"](*args)
    for run in backends.values():
        testing.compare(case, args, run(*args), want)


LARGE = [(1 << 18,), (3, 100_003), (700, 331), (40_000, 6)]


@pytest.mark.parametrize("op", testing.OPS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_threads_change_no_bit(op, shape):
    row, backends = testing.OPS[op], testing.backends(op)
    run = backends.get("native", backends["reference"])
    for granularity in ("tensor", "axis0", "axis1", "token"):
        case = testing.Case(op, shape, row.dtypes[0], granularity, "contiguous", row.options[-1])
        if (
            granularity not in row.granularities
            or granularity != "tensor"
            and len(shape) == 1
            or not row.legal(case)
        ):
            continue
        args = case.args()
        one = run(*args)
        torch.set_num_threads(2)
        two = run(*args)
        torch.set_num_threads(1)
        assert same_bits(one, two), granularity


def test_the_table_covers_what_it_says():
    seen = list(testing.cases())
    assert len(seen) == len(set(seen))
    for op in testing.OPS.values():
        mine = [case for case in seen if case.op == op.name]
        for field in ("dtype", "granularity", "memory", "option"):
            plural = {"memory": "memories", "granularity": "granularities"}.get(field, f"{field}s")
            assert {getattr(case, field) for case in mine} >= set(getattr(op, plural))
    x = testing.Case("fake_quantize", testing.SHAPE, torch.float32, "tensor", "contiguous", "special").args()[
        0
    ]
    v = x / 0.25
    assert ((v - v.floor()) == 0.5).sum() > 100 and (v == 7).sum() > 50 and (v == -8).sum() > 50
    assert x.isnan().any() and x.isposinf().any() and x.isneginf().any() and ((x == 0) & x.signbit()).any()
    assert {case.args()[0].data_ptr() % 16 for case in seen[:12] if case.memory == "misaligned"} == {4}


def test_compare_sees_a_difference():
    case = testing.Case("fake_quantize_backward", (4, 6), torch.float32, "axis0")
    args = case.args()
    dx, dscale, doffset = want = testing.backends(case.op)["reference"](*args)
    for wrong in ((-dx, dscale, doffset), (dx, dscale * 1.001, doffset), (dx.double(), dscale, doffset),
                  (dx.t().contiguous().t(), dscale, doffset), (dx, dscale * float("nan"), doffset),
                  (torch.where(dx == 0, -0.0, dx), dscale, doffset)):  # fmt: skip
        with pytest.raises(AssertionError):
            testing.compare(case, args, wrong, want)
    testing.compare(case, args, want, want)
