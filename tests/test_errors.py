"""Bad input gives one exception that names the argument, its value and what is accepted."""

import numpy as np
import pytest
import torch

import qkernels as qk

X, S, SEED = torch.randn(4, 6), torch.tensor([0.25]), torch.tensor([1])
Q = torch.zeros(4, 6, dtype=torch.int8)
GRID = [
    # arguments, keywords, exception, words of the message
    ((X.int(), S), {"bits": 4}, TypeError, ["x ", "int32", "float32", "bfloat16"]),
    ((X.bool(), S), {"bits": 4}, TypeError, ["x ", "bool", "float32"]),
    ((X.cfloat(), S), {"bits": 4}, TypeError, ["x ", "complex64", "float32"]),
    (([1.0], S), {"bits": 4}, TypeError, ["x ", "list", "tensor"]),
    ((X, 0.25), {"bits": 4}, TypeError, ["scale", "float", "tensor"]),
    ((X, torch.tensor([1])), {"bits": 4}, TypeError, ["scale", "int64", "floating-point"]),
    ((X, torch.empty(0)), {"bits": 4}, ValueError, ["scale", "(0,)", "at least one row"]),
    ((X, torch.ones(1, 1)), {"bits": 4}, ValueError, ["scale", "(1, 1)", "(rows,)"]),
    ((X, torch.ones(4)), {"bits": 4}, ValueError, ["scale", "4", "axis"]),
    ((X, torch.ones(3)), {"bits": 4, "axis": 0}, ValueError, ["scale", "4", "3"]),
    ((X, torch.ones(1)), {"bits": 4, "axis": 1}, ValueError, ["scale", "6", "1"]),
    ((X, torch.ones(4)), {"bits": 4, "axis": 2}, ValueError, ["axis", "2", "[-2, 2)"]),
    ((X, torch.ones(4)), {"bits": 4, "axis": -3}, ValueError, ["axis", "-3", "[-2, 2)"]),
    ((X, torch.ones(4)), {"bits": 4, "axis": 0, "group_size": 6}, ValueError, ["axis", "group_size", "not both"]),
    ((X, torch.ones(6)), {"bits": 4, "group_size": 4}, ValueError, ["group_size", "4", "6"]),
    ((X, torch.ones(6)), {"bits": 4, "group_size": 0}, ValueError, ["group_size", "0", "6"]),
    ((X, torch.ones(6)), {"bits": 4, "group_size": -2}, ValueError, ["group_size", "-2", "6"]),
    ((X, torch.ones(5)), {"bits": 4, "group_size": 3}, ValueError, ["scale", "8", "5"]),
    ((X, S), {}, ValueError, ["bits", "quant_min", "quant_max"]),
    ((X, S), {"quant_min": 0}, ValueError, ["quant_min=0", "quant_max=None"]),
    ((X, S), {"bits": 4, "quant_max": 7}, ValueError, ["bits=4", "quant_max=7", "not both"]),
    ((X, S), {"quant_min": 3, "quant_max": 1}, ValueError, ["quant_min", "quant_max", "3", "1"]),
    ((X, S), {"quant_min": -1.5, "quant_max": 1}, TypeError, ["quant_min", "-1.5", "int"]),
    ((X, S), {"bits": 1}, ValueError, ["bits", "2", "16", "1"]),
    ((X, S), {"bits": 0, "signed": False}, ValueError, ["bits", "1", "16", "0"]),
    ((X, S), {"bits": 40}, ValueError, ["bits", "16", "40"]),
    ((X, S), {"bits": 4.0}, ValueError, ["bits", "int", "4.0"]),
    ((X, S), {"bits": True, "signed": False}, ValueError, ["bits", "int", "True"]),
    ((X, S), {"bits": 4, "offset": torch.zeros(3)}, ValueError, ["offset", "(3,)", "(1,)"]),
    ((X, S), {"bits": 4, "offset": torch.zeros(1, 1)}, ValueError, ["offset", "(1, 1)", "(1,)"]),
    ((X, S), {"bits": 4, "zero_point": torch.zeros(3, dtype=torch.int32)}, ValueError, ["zero_point", "(3,)", "(1,)"]),
    ((X, S), {"bits": 4, "zero_point": torch.tensor([0.5])}, TypeError, ["zero_point", "float32", "integer"]),
    ((X, S.to("meta")), {"bits": 4}, ValueError, ["scale", "meta", "cpu"]),
    ((X, S), {"bits": 4, "offset": torch.zeros(1, device="meta")}, ValueError, ["offset", "meta", "cpu"]),
    ((X, S), {"bits": 4, "zero_point": SEED.to("meta")}, ValueError, ["zero_point", "meta", "cpu"]),
    ((X, S), {"bits": 4, "zero_point": torch.tensor([2**32 + 3])}, ValueError, ["zero_point", "int32", "4294967299"]),
    ((X, S), {"bits": 4, "zero_point": torch.tensor([1j])}, TypeError, ["zero_point", "complex64", "integer"]),
    ((X, S), {"bits": 4, "zero_point": torch.tensor([True])}, TypeError, ["zero_point", "bool", "integer"]),
    ((X, S), {"bits": 4, "zero_point": 2**66}, ValueError, ["zero_point", "int32", str(2**66)]),
    ((X, S), {"quant_min": -(2**40), "quant_max": 7}, ValueError, ["quant_min", "int32", str(-(2**40))]),
    ((X, S), {"bits": 4, "zero_point": 1.5}, TypeError, ["zero_point", "1.5", "int"]),
    ((X, S), {"bits": 4, "offset": 0.5}, TypeError, ["offset", "0.5", "tensor"]),
    ((X, S), {"bits": 4, "offset": torch.tensor([1])}, TypeError, ["offset", "int64", "floating"]),
    ((X, torch.ones(2)), {"bits": 4, "axis": 0.0}, TypeError, ["axis", "0.0", "int"]),
    ((X, torch.ones(8)), {"bits": 4, "group_size": 3.0}, TypeError, ["group_size", "3.0", "int"]),
]  # fmt: skip
NOISE = [
    ({"noise": "tempering", "seed": SEED}, TypeError, ["noise", "tempering", "qk.noise"]),
    ({"noise": qk.noise.Tempering()}, ValueError, ["seed", "None", "int64"]),
    ({"noise": qk.noise.Tempering(), "seed": 3}, ValueError, ["seed", "3", "int64"]),
    ({"noise": qk.noise.Tempering(), "seed": SEED.int()}, ValueError, ["seed", "int32", "int64"]),
    ({"noise": qk.noise.Tempering(), "seed": torch.tensor([1, 2])}, ValueError, ["seed", "(1,)"]),
    ({"noise": qk.noise.Tempering(), "seed": SEED, "stream": 2.7}, ValueError, ["stream", "int", "2.7"]),
    ({"noise": qk.noise.Tempering(), "seed": SEED, "stream": 2**64}, ValueError, ["stream", "int64", str(2**64)]),
    ({"noise": qk.noise.Tempering(), "seed": SEED.to("meta")}, ValueError, ["seed", "meta", "cpu"]),
    ({"shift": torch.zeros(4), "shift_scale": torch.ones(1)}, ValueError, ["shift", "(4,)", "x's shape"]),
    ({"shift": torch.zeros(4, 6).half(), "shift_scale": torch.ones(1)}, ValueError, ["shift", "float16", "dtype"]),
    ({"shift": torch.zeros(4, 6)}, ValueError, ["shift_scale", "None", "float32"]),
    ({"shift": 1.0, "shift_scale": torch.ones(1)}, TypeError, ["shift", "1.0", "tensor"]),
    ({"shift": torch.zeros(4, 6), "shift_scale": 1.0}, ValueError, ["shift_scale", "1.0", "float32"]),
    ({"shift": torch.zeros(4, 6), "shift_scale": torch.ones(1, device="meta")}, ValueError, ["shift_scale", "meta"]),
    ({"shift": torch.zeros(4, 6, requires_grad=True), "shift_scale": torch.ones(1)}, ValueError, ["shift is a const"]),
    ({"shift": torch.zeros(4, 6), "shift_scale": torch.ones(1, requires_grad=True)}, ValueError,
     ["shift_scale is a constant", "detach"]),
    ({"shift": torch.zeros(4, 6), "shift_scale": torch.ones(2)}, ValueError, ["shift_scale", "(1,)"]),
    ({"shift": torch.zeros(4, 6), "shift_scale": torch.ones(1), "noise": qk.noise.Pseudo(), "seed": SEED}, ValueError,
     ["shift", "noise"]),
]  # fmt: skip


def assert_refused(call, exception, words):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        call()
    message = str(caught.value)
    assert caught.type is exception, f"{caught.type.__name__}: {message}"
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("function", [qk.fake_quantize, qk.quantize], ids=lambda f: f.__name__)
@pytest.mark.parametrize("arguments, keywords, exception, words", GRID,
                         ids=[f"{i}-{e.__name__}-{w[0].strip()}" for i, (_, _, e, w) in enumerate(GRID)])  # fmt: skip
def test_the_grid(function, arguments, keywords, exception, words):
    assert_refused(lambda: function(*arguments, **keywords), exception, words)


@pytest.mark.parametrize(
    "keywords, exception, words", NOISE, ids=[f"{i}-{w[0]}" for i, (_, _, w) in enumerate(NOISE)]
)
def test_noise_and_shift(keywords, exception, words):
    assert_refused(lambda: qk.fake_quantize(X, S, bits=4, **keywords), exception, words)


class Dropped(torch.autograd.Function):
    @staticmethod
    def forward(y):
        return y.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return None


def test_a_shift_has_no_derivative():
    """Refused in every mode of differentiation, and only where it is asked for."""
    shift, size = torch.ones(4, 6), torch.ones(1)

    def loss(x, shift, size):
        return qk.fake_quantize(x, S, bits=4, shift=shift, shift_scale=size).sum()

    at = (X, shift, size)
    for argnum, name in ((1, "shift "), (2, "shift_scale ")):
        words = [name, "constant", "detach"]
        assert_refused(lambda n=argnum: torch.func.grad(loss, n)(*at), ValueError, words)
        tangents = [torch.zeros_like(t) for t in at]
        tangents[argnum] += 1
        moved = [lambda v, n=argnum: loss(*at[:n], v, *at[n + 1 :]), (at[argnum],), (tangents[argnum],)]
        assert_refused(lambda moved=moved: torch.func.jvp(*moved), ValueError, words)
    with torch.no_grad():
        loss(X, shift.clone().requires_grad_(), size)
    assert not torch.func.grad(lambda x: Dropped.apply(qk.fake_quantize(x, S, bits=4)).sum())(X).any(), (
        "a gradient that is None"
    )
    inside = torch.func.grad(loss)(*at)
    assert torch.equal(
        torch.func.jvp(lambda x: loss(x, shift, size), (X,), (inside,))[1], inside.square().sum()
    )
    batched = torch.ones(2, 1)
    assert_refused(
        lambda: torch.vmap(loss, (None, None, 0))(X, shift, batched),
        RuntimeError,
        ["one shift_scale", "batched"],
    )


def test_unknown_arguments():
    for function in (qk.fake_quantize, qk.quantize):
        assert_refused(lambda: function(X, S, bits=4, rounding="up"), TypeError, ["rounding"])  # noqa: B023


@pytest.mark.parametrize("bounds", [(-129, 0), (-1, 128), (0, 256), (-8, 300)])
def test_levels_that_do_not_fit_a_byte(bounds):
    words = ["int8", "uint8", str(bounds[0]), str(bounds[1])]
    assert_refused(lambda: qk.quantize(X, S, quant_min=bounds[0], quant_max=bounds[1]), ValueError, words)
    assert qk.fake_quantize(X, S, quant_min=bounds[0], quant_max=bounds[1]).shape == X.shape


@pytest.mark.parametrize("call, exception, words", [
    (lambda: qk.dequantize(X, S), TypeError, ["q ", "float32", "int8"]),
    (lambda: qk.dequantize(Q.int(), S), TypeError, ["q ", "int32", "uint8"]),
    (lambda: qk.dequantize(Q, S, dtype=torch.int32), TypeError, ["dtype", "int32", "float32"]),
    (lambda: qk.dequantize(Q, torch.ones(3), axis=0), ValueError, ["scale", "4", "3"]),
    (lambda: qk.dequantize(Q, torch.ones(2)), ValueError, ["scale", "2", "axis"]),
    (lambda: qk.pack(Q, bits=3), ValueError, ["bits", "2, 4 or 8", "3"]),
    (lambda: qk.pack(Q, bits=4.0), ValueError, ["bits", "2, 4 or 8", "4.0"]),
    (lambda: qk.unpack(Q.byte().flatten(), bits=4.0, shape=(48,)), ValueError, ["bits", "2, 4 or 8", "4.0"]),
    (lambda: qk.unpack(Q.byte().flatten(), bits=4, shape=48), TypeError, ["shape", "tuple of ints", "48"]),
    (lambda: qk.pack(Q, bits=0), ValueError, ["bits", "2, 4 or 8", "0"]),
    (lambda: qk.pack(X, bits=4), TypeError, ["q ", "float32", "int8"]),
    (lambda: qk.pack([1], bits=4), TypeError, ["q ", "list", "int8"]),
    (lambda: qk.dequantize([1], S), TypeError, ["q ", "list", "int8"]),
    (lambda: qk.dequantize(Q, S, zero_point=2**40), ValueError, ["zero_point", "int32", str(2**40)]),
    (lambda: qk.dequantize(Q, S, zero_point=torch.tensor([-(2**24)], dtype=torch.int32)), ValueError,
     ["zero_point", "16776960", "-16777216"]),
    (lambda: qk.quantize(X, S, bits=4, zero_point=100_000_001), ValueError, ["zero_point", "16776960", "100000001"]),
    (lambda: qk.quantize(X, S, bits=4, zero_point=torch.tensor([16_776_961])), ValueError, ["zero_point", "16776961"]),
    (lambda: qk.unpack(Q, bits=4, shape=(48,)), TypeError, ["p ", "int8", "uint8"]),
    (lambda: qk.unpack(Q.byte().flatten(), bits=4, shape=(40,)), ValueError, ["p ", "20", "24", "(40,)"]),
    (lambda: qk.unpack(Q.byte().flatten(), bits=4, shape=(50,)), ValueError, ["p ", "25", "24", "(50,)"]),
    (lambda: qk.unpack(Q.byte().flatten(), bits=5, shape=(48,)), ValueError, ["bits", "2, 4 or 8", "5"]),
], ids=lambda v: v[0].strip() if isinstance(v, list) else None)  # fmt: skip
def test_integers(call, exception, words):
    assert_refused(call, exception, words)


@pytest.mark.parametrize("make, words", [
    (lambda: qk.noise.Tempering(c=-1.0), ["c ", ">= 0", "-1.0"]),
    (lambda: qk.noise.Tempering(k=-0.1), ["k ", ">= 0", "-0.1"]),
    (lambda: qk.noise.Tempering(c=float("nan")), ["c ", ">= 0", "nan"]),
    (lambda: qk.noise.Tempering(c=float("inf")), ["c ", ">= 0", "inf"]),
    (lambda: qk.noise.Tempering(k="a"), ["k ", ">= 0", "'a'"]),
    (lambda: qk.noise.FeaturePerturbation(p="a"), ["p ", "[0, 1]", "'a'"]),
    (lambda: qk.noise.FeaturePerturbation(p=1.5), ["p ", "[0, 1]", "1.5"]),
    (lambda: qk.noise.FeaturePerturbation(where="between"), ["where", "'after' or 'before'", "between"]),
    (lambda: qk.noise.Pseudo("laplace"), ["kind", "'uniform' or 'normal'", "laplace"]),
], ids=lambda v: v[0].strip() if isinstance(v, list) else None)  # fmt: skip
def test_noise_settings(make, words):
    assert_refused(make, ValueError, words)


def test_raw_ops_keep_memory_safe():
    """Called without the public functions' checks, the native ops raise instead of reading beyond a tensor."""
    op, back = torch.ops.qkernels.fake_quantize, torch.ops.qkernels.fake_quantize_backward
    rest = (0, 0.0, 0.0, None, 0, None, None)
    for scale, axis in ((torch.ones(7), -1), (torch.ones(5), 0), (torch.ones(4), 3), (torch.empty(0), -1)):
        with pytest.raises(RuntimeError):
            op(X, scale, None, None, axis, -8, 7, *rest)
    with pytest.raises(RuntimeError):
        op(X, S, torch.zeros(3), None, -1, -8, 7, *rest)
    with pytest.raises(RuntimeError):
        op(X, S, None, None, -1, -8, 7, 1, 0.2, 50.0, None, 0, None, None)
    with pytest.raises(RuntimeError):
        op(X, S, None, None, -1, -8, 7, 99, 0.2, 50.0, SEED, 0, None, None)
    with pytest.raises(RuntimeError):
        back(X[:2], X, S, None, None, -1, -8, 7, 1.0, False, 0.0, 0, 0.0, 0.0, None, 0)
    with pytest.raises(RuntimeError):
        torch.ops.qkernels.unpack(torch.zeros(2, dtype=torch.uint8), 4, 100, True)
    if "cpu" in qk.backend.why_not:
        return
    for bits in (0, 1, 3, 16):
        with pytest.raises(RuntimeError, match="bits must be 2, 4 or 8"):
            torch.ops.qkernels.pack(Q, bits)
        with pytest.raises(RuntimeError, match="bits must be 2, 4 or 8"):
            torch.ops.qkernels.unpack(Q.byte().flatten(), bits, 3, True)
    with pytest.raises(RuntimeError, match="-1 levels"):
        torch.ops.qkernels.unpack(Q.byte().flatten(), 4, -1, True)
    for call in (
        lambda: torch.ops.qkernels.pack(X, 4),
        lambda: torch.ops.qkernels.unpack(X.flatten(), 4, 3, True),
        lambda: torch.ops.qkernels.dequantize(X, S, None, None, -1, torch.float32),
    ):
        with pytest.raises(RuntimeError, match="int8 or uint8"):
            call()


def test_a_refused_call_leaves_its_input_alone():
    x = X.clone()
    with pytest.raises(ValueError):
        qk.fake_quantize(x, torch.ones(3), bits=4, axis=0)
    assert torch.equal(x, X)


def test_a_zero_point_nobody_may_look_at_saturates():
    far = torch.tensor([[2**32 + 3], [-(2**40)]])
    y = torch.vmap(lambda z: qk.fake_quantize(X, S, bits=4, zero_point=z))(far)
    assert (y[0] < -1e8).all() and (y[1] > 1e8).all(), "and does not wrap to 3"


@pytest.mark.parametrize("granularity", [{"axis": 0}, {"group_size": 6}])
def test_no_rows_of_an_empty_tensor(granularity):
    x, scale, offset = torch.empty(0, 6), torch.empty(0).requires_grad_(), torch.empty(0).requires_grad_()
    rest = {"bits": 4, **granularity}
    y = qk.fake_quantize(x, scale, offset=offset, zero_point=torch.empty(0, dtype=torch.int64), **rest)
    y.sum().backward()
    assert y.shape == (0, 6) and scale.grad.shape == offset.grad.shape == (0,)
    q = qk.quantize(x, scale, **rest)
    assert q.shape == (0, 6) and qk.dequantize(q, scale, **granularity).shape == (0, 6)


def test_numpy_integers_are_bits():
    assert torch.equal(qk.fake_quantize(X, S, bits=np.int64(3)), qk.fake_quantize(X, S, bits=3))
    assert torch.equal(qk.pack(Q, np.int64(4)), qk.pack(Q, 4))
    assert type(qk.QConfig(weight_bits=np.int32(3)).weight_bits) is int
    assert_refused(lambda: qk.fake_quantize(X, S, bits=np.int64(40)), ValueError, ["bits", "16", "40"])
