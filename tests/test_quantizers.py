"""What LSQ, LSQ+, FPQ and EWGS compute: starts, grids, gradients, noise; against plain float64 formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from layers import METHODS, activation, conv, per_channel, rows_of, straight_round
from torch import nn

import qkernels as qk
from qkernels import quantizers as q
from qkernels.observe import Statistics


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["lsq", "noise_tempering", "diffq", "ewgs"])
def test_lsq_weights_start_at_twice_the_mean_magnitude(method, bits, axis):
    layer = conv(method, bits, axis)
    expected = 2 * rows_of(layer.weight, axis).abs().mean(1) / math.sqrt(2 ** (bits - 1) - 1)
    torch.testing.assert_close(layer.weight_quantizer.scale.double(), expected, rtol=1e-6, atol=0)
    assert layer.weight_quantizer.bounds() == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("signed, top", [(False, 15), (True, 7)])
def test_lsq_activations_start_from_the_first_batch(signed, top):
    x = torch.randn(6, 3, 4, 4) if signed else torch.rand(6, 3, 4, 4)
    quantizer = qk.QConfig().activation_quantizer().train()
    quantizer(x)
    assert quantizer.scale.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(top), rel=1e-6)
    assert quantizer.bounds() == ((-8, 7) if signed else (0, 15))
    before = quantizer.scale.clone()
    quantizer(10 * x)
    assert torch.equal(quantizer.scale, before), "only the first batch sets the step size"


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_plus_weights_start_at_three_sigma(bits, axis):
    layer = conv("lsq+", bits, axis)
    rows = rows_of(layer.weight.detach(), axis)
    mean, sigma = rows.mean(1), rows.std(1, correction=0)
    expected = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / 2 ** (bits - 1)
    torch.testing.assert_close(layer.weight_quantizer.scale.double(), expected, rtol=1e-6, atol=0)
    assert "offset" not in layer.weight_quantizer.grid()


def squared_error(x, scale, offset, top):
    return (((x - offset) / scale).round().clamp(0, top) * scale + offset - x).square().mean(-1)


def best_error(x, top, steps=100):
    """The least squared error of any range whose ends lie on a fine grid between the extremes."""
    ends = torch.linspace(x.min(), x.max(), steps, dtype=torch.float64)
    errors = [
        squared_error(x, ((ends[i + 1 :] - low) / top).unsqueeze(1), low, top).min()
        for i, low in enumerate(ends[:-1])
    ]
    return torch.stack(errors).min().item()


SHAPES = {
    "relu": lambda r: r.relu(),
    "normal": lambda r: r,
    "gelu": lambda r: F.gelu(2 * r),
    "silu": lambda r: F.silu(3 * r),
    "away from zero": lambda r: r + 5,
    "one far element": lambda r: torch.cat([0.3 * r + 5, r.new_zeros(1)]),
    "long tail": lambda r: (1.2 * r).exp(),
    "long tail below": lambda r: -(1.2 * r).exp(),
    "negative": lambda r: -r.abs() - 9,
}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_lsq_plus_activations_start_near_the_least_squared_error(shape, bits):
    x = SHAPES[shape](torch.randn(1000, dtype=torch.float64))
    quantizer = activation("lsq+", bits, x)
    top = 2**bits - 1
    error = squared_error(x, quantizer.scale.double(), quantizer.offset.double(), top).item()
    assert error <= 1.08 * best_error(x, top)


def test_least_squares_sample_covers_the_whole_batch():
    x = torch.zeros(16383, dtype=torch.float64)
    x[8192:] = torch.rand(8191, dtype=torch.float64)
    assert activation("lsq+", 4, x).scale.item() > 0.05
    # The rows of an image are a power of two long: a sample that follows them sees one column.
    image = torch.rand(64, 8, 32, 32, dtype=torch.float64)
    image[..., ::8] = 0
    assert 0.05 < activation("lsq+", 4, image).scale.item() < 0.1


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
@pytest.mark.parametrize("method", METHODS)
def test_constant_data_gives_a_usable_step(method, value):
    x = torch.full((2, 8), value)
    quantizer = activation(method, 4, x)
    assert all((p.abs() >= 1e-3).all() for n, p in quantizer.named_parameters() if n != "offset")
    x = torch.full((2, 8), value + 0.5, requires_grad=True)
    y = quantizer.train()(x)
    assert y.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
def test_zero_weights_stay_finite(kind, method):
    layer = kind(2, 3, 2) if kind is nn.Conv2d else kind(8, 3)
    nn.init.zeros_(layer.weight)
    layer = qk.quantize_(layer, method=method, act_bits=None)
    weight = layer.train().quantized_weight()
    weight.sum().backward()
    assert weight.isfinite().all() and layer.weight.grad.isfinite().all()


def test_rows_of_zeros_start_as_the_others_do():
    """A step of 1 would keep what begins at zero there: zero convolutions, LoRA's B, heads."""
    layer = nn.Linear(16, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    for method, value in (("lsq", 2 / 7**0.5), ("lsq+", 3 / 8), ("asymmetric", 2 / 15)):
        scale = qk.quantize_(layer, method=method, first_last_bits=None).weight_quantizer.scale
        mean = layer.weight[::2].abs().mean().item()
        assert scale[1].item() == pytest.approx(value * mean, rel=1e-6)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    scale = qk.quantize_(layer, first_last_bits=None).weight_quantizer.scale
    assert scale[0].isnan() and scale[1].item() == pytest.approx(
        2 / 7**0.5 * layer.weight[2].abs().mean().item()
    )
    nn.init.zeros_(layer.weight)
    scale = qk.quantize_(layer, first_last_bits=None, weight_axis=None).weight_quantizer.scale
    assert scale.item() == pytest.approx(2 / 7**0.5 / 4, rel=1e-6), "that of values of size 1 / sqrt(16)"


def test_constant_weights_stay_finite():
    """Their deviation is zero up to rounding, of either sign."""
    layer = nn.Linear(1000, 2)
    nn.init.constant_(layer.weight, 0.7)
    layer = qk.quantize_(layer, method="lsq+", weight_bits=4, act_bits=None)
    torch.testing.assert_close(layer.train().quantized_weight(), layer.weight, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("method", ["lsq", "lsq+", "asymmetric"])
def test_nan_in_the_data_is_never_hidden(method):
    x = torch.rand(2, 8)
    x[0, 0] = torch.nan
    assert activation(method, 4, x)(torch.rand(2, 8)).isnan().all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, None])
def test_asymmetric_weights_follow_equations_4_and_5(bits, axis):
    layer = conv("asymmetric", bits, axis)
    rows, top = rows_of(layer.weight.detach(), axis), 2**bits - 1
    low, high = rows.amin(1), rows.amax(1)
    scale = (high - low) / top
    quantizer = layer.weight_quantizer
    torch.testing.assert_close(quantizer.scale.double(), scale, rtol=1e-6, atol=0)
    assert torch.equal(quantizer.zero_point.double(), (top - high / scale).round())
    assert "zero_point" not in dict(quantizer.named_parameters())
    s, z = per_channel(quantizer.scale, axis), per_channel(quantizer.zero_point, axis)
    expected = ((layer.weight / s).round() + z).clamp(0, top).sub(z) * s
    torch.testing.assert_close(layer.eval().quantized_weight(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_zero_point_of_a_range_around_zero(bits):
    """Equation 5 is a tie there, which the rounding of the scale does not decide."""
    points = {
        activation("asymmetric", bits, torch.tensor([[-peak, peak]])).zero_point.item()
        for peak in torch.rand(50)
    }
    assert points == {round((2**bits - 1) / 2)}


def test_asymmetric_zero_data_leave_room_above():
    quantizer = activation("asymmetric", 4, torch.zeros(4, 8))
    x = torch.tensor([[-2.0, 0.0, 1.0, 3.0]])
    assert quantizer.zero_point.item() == 0 and torch.equal(quantizer(x), x.clamp(min=0))


def test_asymmetric_range_holds_zero():
    for x in (torch.rand(4, 8) + 3, -torch.rand(4, 8) - 3):
        quantizer = activation("asymmetric", 8, x)
        assert quantizer.zero_point.item() == (0 if x[0, 0] > 0 else 255)
        assert quantizer.scale.item() == pytest.approx(x.abs().max().item() / 255, rel=1e-6)
        assert quantizer(torch.zeros(1, 8)).abs().max() == 0


@pytest.mark.parametrize("count, elements", [("features", 27), ("numel", 135)])
@pytest.mark.parametrize("method", ["lsq", "lsq+", "asymmetric"])
def test_learned_weight_steps_have_lsqs_gradient_and_scale(method, count, elements):
    layer = conv(method, 3, 0, grad_scale_count=count).double().train()
    upstream = torch.randn_like(layer.weight)
    layer.quantized_weight().backward(upstream)
    scale = layer.weight_quantizer.scale.detach().clone().requires_grad_()
    low, top = (0, 7) if method == "asymmetric" else (-4, 3)
    z = layer.weight_quantizer.zero_point.view(-1, 1, 1, 1) if method == "asymmetric" else 0
    s = scale.view(-1, 1, 1, 1)
    plain = straight_round((layer.weight.detach() / s).clamp(low - z, top - z)) * s
    plain.backward(upstream)
    expected = scale.grad / math.sqrt(elements * top)
    torch.testing.assert_close(layer.weight_quantizer.scale.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count, elements", [("features", 48), ("numel", 288)])
def test_activation_gradient_scale_leaves_out_the_batch(count, elements):
    x = torch.rand(6, 3, 4, 4, dtype=torch.float64)
    quantizer = activation("lsq", 4, x, grad_scale_count=count).double()
    upstream = torch.randn_like(x)
    quantizer(x).backward(upstream)
    scale = quantizer.scale.detach().clone().requires_grad_()
    (straight_round((x / scale).clamp(0, 15)) * scale).backward(upstream)
    torch.testing.assert_close(quantizer.scale.grad, scale.grad / math.sqrt(elements * 15))


def test_lsq_plus_offset_learns_from_clipped_elements():
    x = torch.randn(4, 50, dtype=torch.float64)
    quantizer = activation("lsq+", 3, x).double()
    upstream = torch.randn_like(x)
    quantizer(x).backward(upstream)
    scale, offset = (p.detach().clone().requires_grad_() for p in (quantizer.scale, quantizer.offset))
    v = (x - offset) / scale
    (straight_round(v.clamp(0, 7)) * scale + offset).backward(upstream)
    factor = 1 / math.sqrt(50 * 7)
    assert ((v < 0) | (v > 7)).any()
    torch.testing.assert_close(quantizer.offset.grad, offset.grad * factor)
    torch.testing.assert_close(quantizer.scale.grad, scale.grad * factor)


def test_ewgs_bends_the_gradient_by_the_rounding_error():
    layer = conv("ewgs", 3, None, ewgs_delta=0.2).double().train()
    upstream = torch.randn_like(layer.weight)
    layer.quantized_weight().backward(upstream)
    v = (layer.weight / layer.weight_quantizer.scale).detach()
    inside = (v >= -4) & (v <= 3)
    expected = torch.where(inside, upstream * (1 + 0.2 * upstream.sign() * (v - v.round())), 0)
    torch.testing.assert_close(layer.weight.grad, expected)
    x = torch.rand(3, 4)
    assert activation("ewgs", 4, x, ewgs_delta=0.2).ewgs == 0.2


@pytest.mark.parametrize("method", ["noise_tempering", "diffq"])
def test_noisy_methods_are_lsq_in_evaluation_and_bounded_noise_in_training(method):
    noisy, plain = conv(method, 3, None), conv("lsq", 3, None)
    plain.load_state_dict(noisy.state_dict())
    grid = plain.eval().quantized_weight()
    assert torch.equal(noisy.eval().quantized_weight(), grid)
    noisy.train()
    drawn = noisy.quantized_weight().detach()
    assert not torch.equal(drawn, grid)
    scale = noisy.weight_quantizer.scale.double()
    v = (noisy.weight.detach() / scale.detach()).clamp(-4, 3)
    if method == "diffq":
        noise = drawn / scale.detach() - v
        assert (
            (noise >= -0.5).all() and (noise < 0.5).all() and noise.std() == pytest.approx(12**-0.5, rel=0.2)
        )
    else:
        d = (grid - noisy.weight).abs()
        normal = (drawn - grid) / (0.2 * (-50 * d).exp() * d.sqrt())
        kept = normal[(d > 1e-6) & (d < 0.2)]
        assert kept.mean().abs() < 0.4 and 0.7 < kept.std() < 1.3


@pytest.mark.parametrize("method", METHODS)
def test_no_noise_in_training_but_where_the_method_has_it(method):
    net = conv(method, 4, 0, act_bits=4)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    qk.calibrate(net, [x])
    net.train()
    same = torch.equal(net(x), net(x))
    assert same == (method not in ("noise_tempering", "diffq"))


@pytest.mark.parametrize("forced, expected", [(None, (0, 15)), (True, (-8, 7)), (False, (0, 15))])
def test_sign_of_positive_activations(forced, expected):
    assert activation("lsq", 4, torch.rand(3, 4), signed=forced).bounds() == expected


@pytest.mark.parametrize("forced, expected", [(None, (-8, 7)), (True, (-8, 7)), (False, (0, 15))])
def test_sign_of_activations_with_negative_values(forced, expected):
    assert activation("lsq", 4, torch.randn(3, 4), signed=forced).bounds() == expected


def test_bad_arguments_of_a_quantizer():
    with pytest.raises(ValueError, match="grad_scale_count must be 'features' or 'numel', got 'all'"):
        q.LSQ(4, "weight", count="all")
    with pytest.raises(ValueError, match="weight_norm must be 'detach', 'full' or 'none', got 'half'"):
        q.ClipWeight(4, "weight", weight_norm="half")
    with pytest.raises(RuntimeError, match="no data was seen"):
        Statistics().agreed()


def test_a_range_of_nan_has_no_zero_point():
    quantizer = qk.quantizers.Asymmetric(4, "activation").train()
    assert quantizer(torch.full((3,), torch.nan)).isnan().all() and quantizer.zero_point.item() == 0
