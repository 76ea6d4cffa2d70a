"""Which scale does element i use: C++ and Python against brute force; the shared headers by NumPy."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qkernels import _elements, layout, noise, reference, testing

F32, F64 = _elements.float32, _elements.float64
SHAPES = [(6,), (2, 3), (4, 5, 6), (3, 1, 4), (2, 3, 4, 5), (1, 7, 1, 2)]
MEMORIES = ("contiguous", "channels_last", "transposed")


def memory_positions(x):
    """The position in dense memory of every element, in logical order."""
    index = np.indices(x.shape).reshape(x.dim(), -1)
    return np.array(x.stride()) @ index if x.dim() else np.zeros(1, dtype=np.int64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_map_is_one_pair_per_tensor(shape, memory):
    if len(shape) < 2 and memory != "contiguous":
        return
    x = testing.arrange(torch.zeros(shape), memory)
    cases = [(shape[axis], axis) for axis in range(len(shape))] + [(1, layout.FLAT)]
    numel = math.prod(shape)
    cases += [(rows, layout.FLAT) for rows in range(2, numel + 1) if numel % rows == 0]
    for rows, axis in cases:
        t = layout.ordered(x, rows, axis)
        want = testing.row_index(shape, rows, axis).reshape(-1).numpy()
        rows_, inner = layout.rows_inner(t, rows, axis)
        assert rows_ == rows
        np.testing.assert_array_equal(memory_positions(t) // inner % rows, want)
        values = torch.arange(rows, dtype=torch.float32)
        spread = layout.per_element(t, values, axis).expand(layout.rowwise(t, rows, axis).shape)
        np.testing.assert_array_equal(spread.reshape(-1).numpy(), want)
        ones = layout.rowwise(torch.ones(shape), rows, axis)
        assert layout.sum_rows(ones, rows, axis).tolist() == np.bincount(want, minlength=rows).tolist()


def test_dense_keeps_every_dense_layout_and_copies_the_rest():
    x = torch.randn(3, 4, 5, 6)
    for memory in MEMORIES:
        t = testing.arrange(x, memory)
        assert (
            layout.dense(t) is t
            and torch.equal(layout.aligned(x, t), x)
            and layout.aligned(x, t).stride() == t.stride()
        )
    for memory in ("strided", "expanded"):
        t = testing.arrange(x, memory)
        assert layout.dense(t).is_contiguous() and torch.equal(layout.dense(t), t)
    for odd in (
        x[:, 1:3],
        x[::2],
        torch.randn(1, 4).expand(1, 4),
        torch.empty(0, 3).t(),
        torch.as_strided(x, (2, 2), (1, 1)),
    ):
        d = layout.dense(odd)
        assert torch.equal(d, odd)
        assert sorted(memory_positions(d)) == list(range(d.numel()))


def test_from_memory_is_the_inverse_of_the_walk():
    x = torch.randn(2, 3, 4).transpose(0, 2).contiguous().transpose(0, 2)
    flat = torch.arange(24.0)
    seen = layout.from_memory(flat, x)
    np.testing.assert_array_equal(seen.reshape(-1).numpy(), memory_positions(x))


# The headers themselves


@pytest.mark.parametrize("module, kind", [(F32, np.float32), (F64, np.float64)], ids=["float32", "float64"])
def test_elements_are_the_reference(module, kind):
    dtype = torch.float32 if kind is np.float32 else torch.float64
    for option in ("special", "odd_scale", "offset", "zero_point", "ewgs", "clip_only"):
        case = testing.Case("fake_quantize_backward", testing.SHAPE, dtype, "axis1", "contiguous", option)
        grad, x, scale, offset, zero_point, axis, lo, hi, _, clip_only, ewgs, *_ = case.args()
        row = testing.row_index(case.shape, scale.numel(), axis)
        s = scale[row].numpy()
        o = kind(0) if offset is None else offset[row].numpy()
        z = 0 if zero_point is None else zero_point[row].numpy()
        y = module.fake_quantize(x.numpy(), s, lo, hi, o, z)
        want = reference.fake_quantize(
            x, scale, offset, zero_point, axis, lo, hi, 0, 0.0, 0.0, None, 0, None, None
        )
        assert y.dtype == kind
        np.testing.assert_array_equal(y, want.numpy())
        q = reference.quantize(x, scale, offset, zero_point, axis, lo, hi)
        np.testing.assert_array_equal(module.quantize(x.numpy(), s, lo, hi, o, z), q.numpy())
        dx, dscale, doffset = module.fake_quantize_backward(
            grad.numpy(), x.numpy(), s, lo, hi, o, z, 0, kind(0), clip_only, ewgs
        )
        w_dx, w_dscale, w_doffset = reference.fake_quantize_backward(*case.args())
        np.testing.assert_array_equal(dx, w_dx.numpy())
        sums = dscale.astype(np.float64).sum(axis=(0, 2, 3)), doffset.astype(np.float64).sum(axis=(0, 2, 3))
        np.testing.assert_allclose(sums[0], w_dscale.numpy(), rtol=1e-6, atol=1e-4)
        if offset is not None:
            np.testing.assert_allclose(sums[1], w_doffset.numpy(), rtol=1e-6, atol=1e-4)


def test_elements_by_hand():
    x = np.array([0.125, 0.375, -0.125, 2.0, -3.0, np.nan, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(
        F32.fake_quantize(x, 0.25, -8, 7), np.array([0, 0.5, 0, 1.75, -2, np.nan, 1.75, -2], np.float32)
    )
    np.testing.assert_array_equal(F32.quantize(x, 0.25, -8, 7), [0, 2, 0, 7, -8, 0, 7, -8])
    np.testing.assert_array_equal(F32.quantize(x, 0.25, 0, 15, 0.0, 3), [3, 5, 3, 11, 0, 3, 15, 0])
    dx, dscale, doffset = F32.fake_quantize_backward(2.0, x[:5], -0.25, -8, 7)
    assert dx.tolist() == [2, 2, 2, 0, 0] and doffset.tolist() == [0, 0, 0, 2, 2]
    assert dscale.tolist() == [1.0, -1.0, -1.0, -14.0, 16.0]
    for bad in (np.nan, np.inf, -np.inf):
        assert np.isnan(F32.fake_quantize(x, bad, -8, 7)).all()
    assert F32.fake_quantize(1.0, 0.0, -8, 7) == 7 * 2.0**-126
    edges = np.array(
        [
            1.75,
            np.nextafter(np.float32(1.75), np.float32(2)),
            -2,
            np.nextafter(np.float32(-2), np.float32(-3)),
        ],
        np.float32,
    )
    assert F32.fake_quantize_backward(1.0, edges, 0.25, -8, 7)[0].tolist() == [1, 0, 1, 0]


def test_noise_kinds_of_one_element():
    x, s, u = np.float32(0.8), 0.5, np.float32(0.4)
    lo, hi = -4, 3
    assert F32.fake_quantize(x, s, lo, hi, noise=noise.AFTER, n=u) == np.float32(1.0) + np.float32(0.5) * u
    assert F32.fake_quantize(x, s, lo, hi, noise=noise.BEFORE, n=-u) == 0.5
    assert F32.fake_quantize(x, s, lo, hi, noise=noise.STOCHASTIC, n=u) == 1.0
    assert F32.fake_quantize(x, s, lo, hi, noise=noise.STOCHASTIC, n=np.float32(0.39)) == 0.5
    assert F32.fake_quantize(x, s, lo, hi, noise=noise.PSEUDO, n=u) == (x / np.float32(0.5) + u) * np.float32(
        0.5
    )
    assert F32.fake_quantize(9.0, s, lo, hi, noise=noise.PSEUDO, n=u) == (np.float32(3) + u) * np.float32(0.5)
    assert (
        F32.fake_quantize(x, s, lo, hi, noise=noise.SHIFT, n=u, a=2.0) == np.float32(1.0) + np.float32(2) * u
    )
    d = 1.0 - np.float64(x)
    want = 1 + 0.3 * math.exp(-5 * d) * math.sqrt(d) * float(u)
    assert F32.fake_quantize(x, s, lo, hi, noise=noise.TEMPERING, n=u, a=0.3, b=5.0) == pytest.approx(
        want, rel=1e-6
    )
    with pytest.raises(ValueError, match="noise .* 0 to 7, got 9"):
        F32.fake_quantize(x, s, lo, hi, noise=9)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_packed_weights_are_read_without_torch(bits, signed):
    low = -(1 << bits - 1) if signed else 0
    q = (
        np.random.default_rng(0)
        .integers(low, low + (1 << bits), 1003)
        .astype(np.int8 if signed else np.uint8)
    )
    p = _elements.pack(q, bits)
    np.testing.assert_array_equal(p, torch.ops.qkernels.pack(torch.from_numpy(q), bits).numpy())
    levels = _elements.unpack(p, bits, q.size, signed)
    np.testing.assert_array_equal(levels, q)
    assert levels.dtype == q.dtype
    scale = np.float32(0.3)
    np.testing.assert_array_equal(F32.dequantize(levels.astype(np.int32), scale, 0.1, 1),
                                  (q.astype(np.float32) - 1) * scale + np.float32(0.1))  # fmt: skip


def test_packing_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8, got 3"):
        _elements.pack(np.zeros(3, np.int8), 3)
    with pytest.raises(TypeError, match="int8 or uint8"):
        _elements.pack(np.zeros(3, np.int32), 4)
    with pytest.raises(ValueError, match="p must hold 3 bytes for 5 levels, got 2"):
        _elements.unpack(np.zeros(2, np.uint8), 4, 5)


def test_the_module_itself_needs_no_torch():
    import subprocess
    import sys

    script = ("import importlib.util as u, sys, numpy as np; s = u.spec_from_file_location('_elements', sys.argv[1]); "
              "m = u.module_from_spec(s); s.loader.exec_module(m); assert 'torch' not in sys.modules; "
              "print(m.unpack(np.array([0xE1], np.uint8), 4, 2).tolist())")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, _elements.__file__], capture_output=True, text=True)
    assert done.stdout == "[1, -2]\n", done.stderr
    assert Path(_elements.__file__).name.startswith("_elements")


def scales(largest):
    """Drawn ones, powers of two, and those whose last bits come as close to trouble as they may."""
    random = np.random.default_rng(largest)
    drawn = (2.0 ** random.uniform(-100, 100, 300)).astype(np.float32)
    powers = np.float32(2.0) ** np.arange(-100, 101, 8, dtype=np.float32)
    modulus = 1 << 24 - largest.bit_length()
    rests = np.array([0, 9, 10, 11, modulus - 9, modulus - 10])
    hard = random.integers(1 << 23, 1 << 24, (50, 1)) // modulus * modulus + rests
    return np.concatenate(
        [drawn, powers, (hard.ravel() * 2.0**-24).astype(np.float32), [np.float32(2.5 / 7)]]
    )


@pytest.mark.parametrize(
    "lo, hi", [(-8, 7), (-2, 1), (0, 15), (0, 255), (-128, 127), (3, 18), (-9, -1), (-5, 0)]
)
def test_multiplications_in_place_of_the_division(lo, hi):
    """They give the nearest level of the rounded quotient, and the ends of the grid are those of the division."""
    ties = np.arange(lo, hi) + 0.5
    served = 0
    for scale in scales(max(-lo, hi)):
        inverse, first, last, serves = (np.float32(v) for v in _elements.reciprocal(scale, lo, hi))
        if not serves:
            continue
        served += 1
        for end, outward, limit, beyond in ((first, -np.inf, lo, np.less), (last, np.inf, hi, np.greater)):
            outer = np.nextafter(end, np.float32(outward))
            assert not beyond(end / scale, limit) and beyond(outer / scale, limit), (scale, lo, hi)
        # Around the ties and around the middles between a tie and its neighbours, in float64; and in between.
        half = np.spacing(np.abs(ties).astype(np.float32)).astype(np.float64) / 2
        middle = np.concatenate([ties, ties + half, ties - half, ties - half / 2]) * np.float64(scale)
        near = middle.astype(np.float32).view(np.int32)[:, None] + np.arange(-20, 21, dtype=np.int32)
        x = np.concatenate(
            [near.view(np.float32).ravel(), scale * np.linspace(lo, hi, 997, dtype=np.float32)]
        )
        x = np.concatenate([x, [first, last]])
        x = x[(first <= x) & (x <= last)]
        got, want = np.rint(_elements.quotient(x, scale, inverse)), np.rint(x / scale)
        assert (got == want).all() and got.min() >= lo and got.max() <= hi, (scale, lo, hi)
    assert served > 500


def test_the_division_stays_where_multiplications_are_not_proven():
    for scale in (math.nan, math.inf, 2.0**101, 2.0**-101):
        assert not _elements.reciprocal(scale, -8, 7)[3]
    assert not _elements.reciprocal(0.7, 0, 2**16)[3]
    for rest, serves in ((0, True), (1, False), (8, False), (9, True), (-9, True), (-8, False), (-1, False)):
        scale = ((1 << 23) + (5 << 20) + rest) * 2.0**-23
        assert _elements.reciprocal(scale, -8, 7)[3] == serves, rest
