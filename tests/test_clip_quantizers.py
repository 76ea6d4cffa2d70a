"""SAQ, PACT and DoReFa: quantizers that clip, against plain float64 formulas."""

import pytest
import torch
from layers import activation, conv, rows_of, straight_round
from torch import nn

import qkernels as qk


def clip_formula(weight, clip, bits):
    """SAQ eq. 1: clip to [-a, a], map to [0, 1], round to 2^b levels, map back."""
    top = 2**bits - 1
    unit = (weight / clip).clamp(-1, 1) / 2 + 0.5
    return clip * (2 * straight_round(unit * top) / top - 1)


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("weight_norm", ["detach", "full", "none"])
def test_saq_weights_and_gradients(weight_norm, bits, axis):
    layer = conv("saq", bits, axis, weight_norm=weight_norm).train()
    quantizer = layer.weight_quantizer
    if weight_norm == "none":
        start = 0.8 * rows_of(layer.weight, axis).abs().amax(1)
        torch.testing.assert_close(quantizer.clip.double(), start, rtol=1e-6, atol=0)
    else:
        assert torch.equal(quantizer.clip, torch.ones_like(quantizer.clip))
    with torch.no_grad():
        quantizer.clip.mul_(0.9)
    layer.double()
    upstream = torch.randn_like(layer.weight)
    y = layer.quantized_weight()
    y.backward(upstream)

    weight = layer.weight.detach().clone().requires_grad_()
    clip = quantizer.clip.detach().clone().requires_grad_()
    mean, deviation = weight.mean(), weight.std(correction=1)
    if weight_norm == "detach":
        mean, deviation = mean.detach(), deviation.detach()
    normal = weight if weight_norm == "none" else (weight - mean) / deviation
    expected = clip_formula(normal, clip.view(-1, 1, 1, 1) if axis == 0 else clip, bits)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(quantizer.clip.grad, clip.grad, rtol=1e-9, atol=1e-9)


def test_saq_grid_has_all_levels_between_the_clips_and_no_zero():
    layer = conv("saq", 2, None, weight_norm="none")
    with torch.no_grad():
        layer.weight_quantizer.clip.fill_(1.5)
        layer.weight.view(-1)[:5].copy_(torch.tensor([-9.0, -0.6, 0.0, 0.6, 9.0]))
    levels = layer.eval().quantized_weight().unique()
    torch.testing.assert_close(levels, torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64))


def test_saq_standardises_convolutions_alone():
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 4))
    qk.quantize_(net, method="saq")
    assert net[0].weight_quantizer.weight_norm == "detach" and net[2].weight_quantizer.weight_norm == "none"


@pytest.mark.parametrize("method, initial", [("saq", 1.0), ("pact", 6.0)])
def test_clip_activations(method, initial):
    quantizer = activation(method, 3, torch.rand(4, 8)).double().train()
    assert quantizer.clip.item() == initial and quantizer.bounds() == (0, 7)
    x = (torch.rand(200, dtype=torch.float64) * 1.6 - 0.2) * initial
    x.requires_grad_()
    upstream = torch.randn_like(x)
    quantizer(x).backward(upstream)
    plain, clip = x.detach().clone().requires_grad_(), quantizer.clip.detach().clone().requires_grad_()
    y = clip * straight_round((plain / clip).clamp(0, 1) * 7) / 7
    y.backward(upstream)
    torch.testing.assert_close(quantizer(x), y)
    torch.testing.assert_close(x.grad, plain.grad)
    above = upstream[x > initial].sum().reshape(1)
    expected = above if method == "pact" else clip.grad
    torch.testing.assert_close(quantizer.clip.grad, expected)
    assert above.item() != pytest.approx(clip.grad.item(), rel=1e-3)


@pytest.mark.parametrize("low", [-1.0, 0.0, 2.0])
def test_saq_activations_with_an_offset(low):
    """clip and offset start where LSQ+ starts its range, and learn by the chain rule of [offset, offset + clip]."""
    x = torch.rand(6, 50, dtype=torch.float64) * 3 + low
    quantizer, other = activation("saq", 3, x, act_offset=True).double(), activation("lsq+", 3, x).double()
    assert quantizer.signed is False and quantizer.offset.item() == other.offset.item()
    torch.testing.assert_close(quantizer.clip, other.scale * 7)
    with torch.no_grad():
        quantizer.clip.mul_(0.7)
        quantizer.offset.add_(0.3)
    upstream = torch.randn_like(x)
    plain = x.clone().requires_grad_()
    y = quantizer(x.requires_grad_())
    y.backward(upstream)
    clip, offset = (p.detach().clone().requires_grad_() for p in (quantizer.clip, quantizer.offset))
    unit = (plain - offset) / clip
    assert (unit < 0).any() and (unit > 1).any()
    expected = clip * straight_round(unit.clamp(0, 1) * 7) / 7 + offset
    expected.backward(upstream)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, plain.grad)
    torch.testing.assert_close(quantizer.clip.grad, clip.grad)
    torch.testing.assert_close(quantizer.offset.grad, offset.grad)


def test_dorefa_weights_follow_equation_9():
    layer = conv("dorefa", 3, 0).train()
    upstream = torch.randn_like(layer.weight)
    y = layer.quantized_weight()
    y.backward(upstream)
    weight = layer.weight.detach().clone().requires_grad_()
    unit = weight.tanh() / (2 * weight.detach().tanh().abs().max()) + 0.5
    expected = 2 * straight_round(unit * 7) / 7 - 1
    expected.backward(upstream)
    # Scale 2/7 is a float32 number in the grid.
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-6, atol=1e-6)
    assert not list(layer.weight_quantizer.parameters())


def test_dorefa_activations_clip_to_one():
    x = torch.tensor([-0.5, 0.1, 0.5, 0.9, 3.0])
    y = activation("dorefa", 2, x.abs())(x)
    torch.testing.assert_close(y, (x.clamp(0, 1) * 3).round() / 3)


@pytest.mark.parametrize("method", ["saq", "pact"])
def test_signed_clips_start_inside_the_data(method):
    x = torch.randn(3, 40)
    quantizer = activation(method, 4, x)
    assert quantizer.clip.item() == pytest.approx(0.8 * x.abs().max().item(), rel=1e-6)
    assert quantizer.grid()["scale"].item() == pytest.approx(quantizer.clip.item() / 7)


def test_a_weight_of_one_number_is_not_normalised():
    layer = qk.quantize_(nn.Sequential(nn.Conv2d(1, 1, 1)), method="saq", act_bits=None)
    y = layer(torch.ones(1, 1, 1, 1))
    assert y.isfinite().all() and y != layer[0].bias
