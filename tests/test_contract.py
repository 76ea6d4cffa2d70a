"""What the quantizer's ops promise, by hand-computed cases and against an evaluation in NumPy."""

import math

import numpy as np
import oracle
import pytest
import torch

import qkernels as qk
from qkernels import noise, reference, testing

NAN, INF = math.nan, math.inf
BACKENDS = tuple(testing.backends("fake_quantize"))
SMALL = (2, 3, 4, 8)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with qk.use_backend(request.param):
        yield request.param


def bits(t):
    return t.contiguous().view(
        {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[t.element_size()]
    )


def assert_bits(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    nan = got.isnan() & want.isnan()
    assert torch.equal(bits(got)[~nan], bits(want)[~nan]), (got, want)


# By hand


def test_levels_by_hand(backend):
    x = torch.tensor(
        [0.0, 0.124, 0.125, 0.126, 0.375, -0.375, -0.125, 1.75, 1.875, 2.0, -2.0, -2.125, -2.5, 9.0]
    )
    want = [0.0, 0.0, 0.0, 0.25, 0.5, -0.5, 0.0, 1.75, 1.75, 1.75, -2.0, -2.0, -2.0, 1.75]
    assert qk.fake_quantize(x, torch.tensor([0.25]), bits=4).tolist() == want
    levels = [0, 0, 0, 1, 2, -2, 0, 7, 7, 7, -8, -8, -8, 7]
    q = qk.quantize(x, torch.tensor([0.25]), bits=4)
    assert q.tolist() == levels and q.dtype == torch.int8


def test_unsigned_and_zero_point_by_hand(backend):
    x = torch.tensor([-1.0, -0.25, 0.0, 0.75, 100.0])
    s = torch.tensor([0.5])
    assert qk.fake_quantize(x, s, bits=2, signed=False).tolist() == [0.0, 0.0, 0.0, 1.0, 1.5]
    # Levels 0..3 counted from 1: the grid is -0.5, 0, 0.5, 1.
    assert qk.fake_quantize(x, s, bits=2, signed=False, zero_point=1).tolist() == [-0.5, 0.0, 0.0, 1.0, 1.0]
    assert qk.quantize(x, s, bits=2, signed=False, zero_point=1).tolist() == [0, 1, 1, 3, 3]
    # The tie -0.25 / 0.5 = -0.5 rounds to even before the zero point, whatever its parity.
    assert qk.quantize(
        torch.tensor([-0.25, 0.25, 0.75]), s, quant_min=-9, quant_max=9, zero_point=1
    ).tolist() == [1, 1, 3]
    assert qk.fake_quantize(x, s, bits=8, signed=False, zero_point=200).tolist() == [
        -1.0,
        0.0,
        0.0,
        1.0,
        27.5,
    ]


def test_offset_by_hand(backend):
    x = torch.tensor([-2.0, -1.0, -0.75, 0.0, 1.5, 3.0])
    y = qk.fake_quantize(x, torch.tensor([0.5]), quant_min=0, quant_max=5, offset=torch.tensor([-1.0]))
    assert y.tolist() == [-1.0, -1.0, -1.0, 0.0, 1.5, 1.5]


def test_rows_by_hand(backend):
    x = torch.full((2, 4), 0.7)
    two = torch.tensor([0.5, 1.0])
    assert qk.fake_quantize(x, two, bits=4, axis=0).tolist() == [[0.5] * 4, [1.0] * 4]
    four = torch.tensor([0.5, 1.0, 0.25, 2.0])
    assert qk.fake_quantize(x, four, bits=4, axis=-1).tolist() == [[0.5, 1.0, 0.75, 0.0]] * 2
    assert qk.fake_quantize(x, four, bits=4, group_size=2).tolist() == [
        [0.5, 0.5, 1.0, 1.0],
        [0.75, 0.75, 0.0, 0.0],
    ]
    assert qk.fake_quantize(x, two, bits=4, group_size=4).tolist() == [[0.5] * 4, [1.0] * 4]


def test_gradient_by_hand(backend):
    x = torch.tensor([0.3, 0.6, 1.75, 1.76, 9.0, -2.0, -2.01], requires_grad=True)
    scale = torch.tensor([0.25], requires_grad=True)
    g = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    qk.fake_quantize(x, scale, bits=4).backward(g)
    # Both bounds are inside; beyond them the level itself is the slope of the scale.
    assert x.grad.tolist() == [1.0, 2.0, 4.0, 0.0, 0.0, 32.0, 0.0]
    want = (1 - 1.2) + 2 * (2 - 2.4) + 0 + 8 * 7 + 16 * 7 + 0 - 64 * 8
    assert scale.grad.item() == pytest.approx(want, rel=1e-6)


def test_offset_and_grad_scale_by_hand(backend):
    x = torch.tensor([0.0, 5.0, -5.0], requires_grad=True)
    scale, offset = torch.tensor([1.0], requires_grad=True), torch.tensor([0.25], requires_grad=True)
    g = torch.tensor([1.0, 10.0, 100.0])
    qk.fake_quantize(x, scale, quant_min=-2, quant_max=2, offset=offset, grad_scale=0.5).backward(g)
    assert x.grad.tolist() == [1.0, 0.0, 0.0] and offset.grad.item() == 55.0
    assert scale.grad.item() == 0.5 * (0.25 + 20 - 200)


def test_clip_only_and_ewgs_by_hand(backend):
    x, g = torch.tensor([0.3, -0.3, 9.0], requires_grad=True), torch.tensor([2.0, -4.0, 1.0])
    scale = torch.tensor([1.0], requires_grad=True)
    qk.fake_quantize(x, scale, bits=4, clip_only=True, ewgs=0.5).backward(g)
    assert scale.grad.item() == 7.0
    # g (1 + delta sign(g) (v - q))
    assert x.grad.tolist() == pytest.approx([2 * (1 + 0.5 * 0.3), -4 * (1 + 0.5 * 0.3), 0.0])


def test_shift_by_hand(backend):
    x = torch.tensor([0.3, 9.0, -0.6], requires_grad=True)
    shift = torch.tensor([1.0, -2.0, 4.0])
    y = qk.fake_quantize(x, torch.tensor([1.0]), bits=3, shift=shift, shift_scale=torch.tensor([0.5]))
    assert y.tolist() == [0.5, 2.0, 1.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("width, signed, levels, packed", [
    (4, True, [1, -2, 7, -8, 3], [0xE1, 0x87, 0x03]), (2, True, [1, -2, -1, 0, 1], [0b00111001, 0b01]),
    (2, False, [3, 0, 2, 1], [0b01100011]), (4, False, [15, 1], [0x1F]), (8, True, [-1, 5], [255, 5]),
    (8, False, [255], [255]), (4, True, [], [])])  # fmt: skip
def test_packing_by_hand(backend, width, signed, levels, packed):
    q = torch.tensor(levels, dtype=torch.int8 if signed else torch.uint8)
    p = qk.pack(q, bits=width)
    assert p.dtype == torch.uint8 and p.tolist() == packed
    assert torch.equal(qk.unpack(p, bits=width, shape=q.shape, signed=signed), q)


# Against NumPy


def _evaluated(op):
    return [c for c in testing.cases() if c.op == op and "noise" not in testing.OPTIONS[c.option] and
            (c.shape == testing.SHAPE and c.memory != "expanded" or len(c.shape) < 3)]  # fmt: skip


def _numpy(case, at):
    args = case.args()
    return args, oracle.Quantizer(case, *args[at : at + 7])


@pytest.mark.parametrize("case", _evaluated("fake_quantize"), ids=lambda c: c.id("reference"))
def test_reference_is_the_definition(case):
    args, quantizer = _numpy(case, 0)
    want = torch.from_numpy(np.asarray(quantizer.value(quantizer.level()))).to(case.dtype)
    assert_bits(reference.fake_quantize(*args), want.reshape(case.shape))


@pytest.mark.parametrize("case", [c for c in _evaluated("fake_quantize_backward") if c.shape == testing.SHAPE],
                         ids=lambda c: c.id("reference"))  # fmt: skip
def test_reference_gradient_is_the_definition(case):
    args, quantizer = _numpy(case, 1)
    grad_scale, clip_only, ewgs = args[8:11]
    dx, dscale, doffset = quantizer.gradient(oracle.array(args[0]), clip_only=clip_only, ewgs=ewgs)
    got = reference.fake_quantize_backward(*args)
    assert_bits(got[0] + 0.0, torch.from_numpy(dx + 0.0).to(case.dtype))
    sign = quantizer.scale_sign * grad_scale
    for number, want in (
        (1, quantizer.sum_rows(dscale) * sign),
        (2, quantizer.sum_rows(doffset) * grad_scale),
    ):
        if number == 1 or args[3] is not None:
            np.testing.assert_allclose(got[number].double().numpy(), want, rtol=2.0**-23, atol=1e-5)
    assert args[3] is not None or got[2].numel() == 0


@pytest.mark.parametrize("case", _evaluated("quantize"), ids=lambda c: c.id("reference"))
def test_quantize_is_the_definition(case):
    args, quantizer = _numpy(case, 0)
    q = quantizer.level()
    nearest_to_zero = np.clip(np.zeros_like(q), quantizer.lo, quantizer.hi)
    want = np.where(np.isnan(q), nearest_to_zero, q) + quantizer.zero
    got = reference.quantize(*args)
    assert got.dtype == (torch.uint8 if args[-1] > 127 else torch.int8)
    np.testing.assert_array_equal(got.numpy(), want.reshape(case.shape))


# Properties


SETTINGS = [{"bits": 4}, {"bits": 8}, {"bits": 2}, {"bits": 8, "signed": False}, {"bits": 1, "signed": False},
            {"bits": 4, "zero_point": 3}, {"bits": 8, "signed": False, "zero_point": 131},
            {"bits": 8, "zero_point": 16_776_960}, {"bits": 8, "signed": False, "zero_point": -16_776_960}]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", testing.FLOATS, ids=str)
@pytest.mark.parametrize("offset", [None, 0.3])
def test_dequantize_of_quantize_is_fake_quantize(backend, settings, dtype, offset):
    case = testing.Case("quantize", SMALL, dtype, "axis1", "channels_last", "plain")
    x, scale = case.args()[:2]
    x = torch.where(x.isnan(), 0.0, x)
    if offset is not None:
        offset = torch.full_like(scale, offset)
    zero_point = settings.get("zero_point")
    q = qk.quantize(x, scale, axis=1, offset=offset, **settings)
    y = qk.dequantize(q, scale, axis=1, offset=offset, zero_point=zero_point, dtype=dtype)
    assert y.stride() == x.stride() == q.stride()
    assert_bits(y, qk.fake_quantize(x, scale, axis=1, offset=offset, **settings))


def test_far_zero_points_move_the_bounds(backend):
    """Per row, up to the ends of int32, where float32 rounds them."""
    far = [100_000_001, -100_000_003, 2**31 - 1, -(2**31)]
    x, scale = torch.tensor([-5e9, 5e9]).repeat(len(far), 1), torch.ones(len(far))
    y = qk.fake_quantize(x, scale, bits=4, axis=0, zero_point=torch.tensor(far))
    assert_bits(y, torch.tensor([[-8 - z, 7 - z] for z in far]).float())
    for row, z in zip(y, far):
        assert_bits(row, qk.fake_quantize(x[0], scale[:1], bits=4, zero_point=z))


def test_minus_zero(backend):
    x = torch.tensor([-0.0, -0.1, 0.0])
    y = qk.fake_quantize(x, torch.tensor([1.0]), bits=4)
    assert not y.signbit().any()
    assert_bits(y, qk.dequantize(qk.quantize(x, torch.tensor([1.0]), bits=4), torch.tensor([1.0])))


def test_zero_point_as_int_and_as_tensor(backend):
    x, scale = testing.Case("quantize", SMALL, torch.float32, "axis0").args()[:2]
    x.requires_grad_()
    ways = [
        3,
        torch.tensor([3]),
        torch.tensor(3),
        torch.full((2,), 3, dtype=torch.int32),
        torch.full((2,), 3, dtype=torch.int8),
    ]
    results = []
    for way in ways:
        y = qk.fake_quantize(x, scale, bits=4, axis=0, zero_point=way)
        (dx,) = torch.autograd.grad(y.sum(), x)
        results.append((y.detach(), dx, qk.quantize(x, scale, bits=4, axis=0, zero_point=way)))
    for result in results[1:]:
        for got, want in zip(result, results[0]):
            assert torch.equal(got, want)


def test_nan_reaches_output_and_scale_gradient(backend):
    x = torch.tensor([[0.3, NAN, 1.0], [0.3, 0.2, 1.0]], requires_grad=True)
    scale, offset = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    y = qk.fake_quantize(x, scale, bits=4, axis=0, offset=offset)
    assert y.isnan().tolist() == [[False, True, False], [False] * 3]
    y.sum().backward()
    assert scale.grad.isnan().tolist() == [True, False]
    assert x.grad.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", testing.FLOATS, ids=str)
def test_a_broken_scale_breaks_its_row_alone(backend, bad, dtype):
    x = torch.tensor([[0.3, -INF, 1.0], [0.3, 0.2, 1.0]], dtype=dtype, requires_grad=True)
    scale = torch.tensor([bad, 1.0], requires_grad=True)
    y = qk.fake_quantize(x, scale, bits=4, axis=0)
    assert y[0].isnan().all() and y[1].tolist() == [0.0, 0.0, 1.0]
    y.sum().backward()
    assert scale.grad.isnan().tolist() == [True, False]
    q = qk.quantize(x.detach(), scale.detach(), bits=4, axis=0)
    assert qk.dequantize(q, scale.detach(), axis=0)[0].isnan().all()


def test_the_sign_of_the_scale(backend):
    x = torch.randn(50, requires_grad=True)
    minus, plus = (torch.tensor([s], requires_grad=True) for s in (-0.2, 0.2))
    a, b = qk.fake_quantize(x, minus, bits=4), qk.fake_quantize(x, plus, bits=4)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert plus.grad.item() == -minus.grad.item() != 0


@pytest.mark.parametrize("tiny", [0.0, 1e-45, -1e-40, 2.0**-127])
def test_a_tiny_scale_is_floored(backend, tiny):
    x = torch.tensor([1e-38, 1.0, -1.0, 0.0])
    want = qk.fake_quantize(x, torch.tensor([2.0**-126]), bits=4)
    assert want[1].item() == 7 * 2.0**-126
    assert torch.equal(qk.fake_quantize(x, torch.tensor([tiny]), bits=4), want)


def test_infinities_clip(backend):
    x = torch.tensor([INF, -INF], requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    y = qk.fake_quantize(x, scale, bits=4)
    y.backward(torch.tensor([1.0, 10.0]))
    assert y.tolist() == [7.0, -8.0] and x.grad.tolist() == [0.0, 0.0] and scale.grad.item() == 7 - 80
    assert qk.quantize(x, scale, bits=4).tolist() == [7, -8]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)])
def test_empty(backend, shape):
    x, scale = torch.empty(shape, requires_grad=True), torch.ones(1, requires_grad=True)
    y = qk.fake_quantize(x, scale, bits=4)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and scale.grad.tolist() == [0.0]
    q = qk.quantize(x, scale, bits=4)
    assert q.shape == qk.dequantize(q, scale).shape == shape
    assert qk.unpack(qk.pack(q, bits=4), bits=4, shape=shape).shape == shape


def test_scale_forms(backend):
    x, scale = torch.randn(4, 6), torch.tensor([0.25])
    want = qk.fake_quantize(x, scale, bits=4)
    for other in (torch.tensor(0.25), scale.bfloat16(), scale.double()):
        assert torch.equal(qk.fake_quantize(x, other, bits=4), want)
    rows = torch.tensor([0.25, 9.0] * 4)[::2].requires_grad_()
    assert torch.equal(qk.fake_quantize(x, rows, bits=4, axis=0), want)


def test_a_bfloat16_scale_has_a_bfloat16_gradient(backend):
    scale = torch.tensor([0.25], dtype=torch.bfloat16, requires_grad=True)
    qk.fake_quantize(torch.randn(9), scale, bits=4).sum().backward()
    assert scale.grad.dtype == torch.bfloat16 and scale.grad.isfinite().all()


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("granularity", testing.GRANULARITIES)
def test_strides_of_a_dense_layout_are_kept(backend, memory, granularity):
    rows, axis = testing.Case("fake_quantize", SMALL, torch.float32, granularity).rows_axis()
    x = testing.arrange(torch.randn(SMALL), memory)
    where = {"tensor": {}, "token": {"group_size": 8}, "group": {"group_size": 8}}.get(
        granularity, {"axis": axis}
    )
    rows = math.prod(SMALL) // 8 if "group_size" in where else rows
    y = qk.fake_quantize(x, torch.full((rows,), 0.25), bits=4, **where)
    # Groups and tokens run along the logical order, so their result may come back contiguous.
    assert y.stride() == x.stride()
    assert torch.equal(y, qk.fake_quantize(x.contiguous(), torch.full((rows,), 0.25), bits=4, **where))


def test_saved_for_backward_is_x_alone(backend):
    x = torch.randn(64, 32).to(memory_format=torch.contiguous_format).requires_grad_()
    scale, offset = torch.full((64,), 0.25, requires_grad=True), torch.zeros(64, requires_grad=True)
    seed, shift = torch.tensor([7]), torch.randn(64, 32)
    noises = [
        {"noise": n, "seed": seed}
        for n in (qk.noise.Tempering(), qk.noise.StochasticRounding(), qk.noise.Pseudo())
    ]
    for extra in ({}, *noises, {"ewgs": 0.1}, {"shift": shift, "shift_scale": torch.ones(1)}):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            qk.fake_quantize(x, scale, bits=4, axis=0, offset=offset, **extra)
        saved = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        small = sum(t.untyped_storage().nbytes() for t in (scale, offset, seed))
        assert x.data_ptr() in saved and shift.data_ptr() not in saved
        assert x.nbytes <= sum(saved.values()) <= x.nbytes + small, (extra, saved)


@pytest.mark.parametrize("dtype", testing.INTEGERS, ids=str)
@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 8, 1001])
def test_pack_and_unpack_round_trip(backend, dtype, width, count):
    low = -(1 << width - 1) if dtype == torch.int8 else 0
    q = torch.randint(low, low + (1 << width), (count,), dtype=dtype)
    p = qk.pack(q, bits=width)
    assert p.shape == ((count * width + 7) // 8,)
    assert torch.equal(qk.unpack(p, bits=width, shape=(count,), signed=dtype == torch.int8), q)


def test_pack_reads_in_logical_order(backend):
    q = torch.randint(-8, 8, (3, 4, 5, 2), dtype=torch.int8)
    for memory in testing.MEMORIES[:3]:
        p = qk.pack(testing.arrange(q, memory), bits=4)
        assert torch.equal(qk.unpack(p, bits=4, shape=q.shape), q)


def test_use_backend_chooses_and_restores():
    before = qk.backend.op("fake_quantize")
    with qk.use_backend("reference"):
        assert (
            qk.backend.op("fake_quantize") is reference.fake_quantize
            and qk.backend.serves("pack", "cpu") == "reference"
        )
        with qk.use_backend("native"):
            assert qk.backend.op("fake_quantize") is torch.ops.qkernels.fake_quantize.default
    assert qk.backend.op("fake_quantize") is before
    with pytest.raises(ValueError, match="native, triton, reference"), qk.use_backend("cudnn"):
        pass


def test_noise_off_is_the_plain_quantizer(backend):
    x, seed = testing.Case("fake_quantize", SMALL, torch.float32, "tensor").args()[0], torch.tensor([1])
    want = qk.fake_quantize(x, torch.tensor([0.25]), bits=4)
    for off in (
        qk.noise.Tempering(c=0.0),
        qk.noise.FeaturePerturbation(p=0.0),
        qk.noise.FeaturePerturbation(0.0, "before"),
    ):
        assert torch.equal(qk.fake_quantize(x, torch.tensor([0.25]), bits=4, noise=off, seed=seed), want)
    assert noise.Tempering().code() == (noise.TEMPERING, 0.2, 50.0)
