"""convert_: integer weights whose outputs are the same bits."""

import copy
import itertools

import pytest
import torch
from layers import EVEN, METHODS, Net, batch, calibrated, same_bits
from torch import nn

import qkernels as qk
from qkernels import convert
from qkernels.nn import IntegerWeight

GRIDS = list(itertools.product(METHODS, (2, 3, 4, 8), (0, None)))


@pytest.mark.parametrize("method, bits, axis", GRIDS)
def test_converted_outputs_are_the_same_bits(method, bits, axis):
    model = calibrated(method=method, weight_bits=bits, act_bits=bits, weight_axis=axis, **EVEN)
    with torch.no_grad():
        # Weights that round to zero from either side, and zeros of either sign.
        model.stem.weight.view(-1)[:4] = torch.tensor([1e-6, -1e-6, 0.0, -0.0])
    model.eval()
    y = model(batch())
    weights = {name: layer.quantized_weight() for name, layer in convert.layers(model)}
    assert qk.convert_(model) is model
    assert same_bits(model(batch()), y)
    for name, layer in convert.layers(model):
        assert same_bits(layer.quantized_weight(), weights[name])
        levels = layer.weight_quantizer.integers()
        assert levels.dtype in (torch.int8, torch.uint8) and levels.unique().numel() <= 2**bits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_converted_groups_are_the_same_bits(method, bits):
    layers = nn.Sequential(nn.Flatten(), nn.Linear(50, 16), nn.ReLU(), nn.Linear(16, 3))
    sizes = {"weight_group_size": 10, "overrides": {"3": {"weight_group_size": 4}}}
    model = calibrated(model=layers, method=method, weight_bits=bits, act_bits=bits, **sizes, **EVEN).eval()
    y = model(batch())
    assert same_bits(qk.convert_(model)(batch()), y)
    assert model[1].weight_quantizer.scale.shape == (80,) and model[3].weight_quantizer.scale.shape == (12,)


@pytest.mark.parametrize("before", [True, False])
def test_converted_weights_keep_their_order_of_memory(before):
    """It is what a convolution chooses its algorithm, and so its rounding, by."""
    model = calibrated(weight_bits=4).to(memory_format=torch.channels_last).eval()
    y = model(batch())
    strides = [layer.quantized_weight().stride() for _, layer in convert.layers(model)]
    assert strides[0] != model.stem.weight.contiguous().stride()
    if not before:
        model.to(memory_format=torch.contiguous_format)
    qk.convert_(model).to(memory_format=torch.channels_last)
    assert [layer.quantized_weight().stride() for _, layer in convert.layers(model)] == strides
    assert same_bits(model(batch()), y)


@pytest.mark.parametrize(
    "settings", [{"method": "saq", "act_offset": True}, *({"method": name} for name in METHODS)], ids=str
)
def test_converted_bfloat16_models(settings):
    model = calibrated(model=Net().bfloat16(), **settings).eval()
    y = model(batch(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert same_bits(qk.convert_(model)(batch(dtype=torch.bfloat16)), y)


def stored(model):
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def test_converted_state_is_packed_and_loads(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        qk.quantize_(model, weight_bits=4, weight_axis=None, **EVEN)
        return qk.calibrate(model, [torch.randn(4, 64)])

    model, x = build(0), torch.randn(3, 64)
    whole = stored(model)
    y = qk.convert_(model)(x)
    assert stored(model) < whole / 7.5 and not any(name.endswith(".weight") for name in model.state_dict())
    assert model[0].weight_quantizer.packed.numel() == 64 * 64 // 2
    torch.save(model.state_dict(), tmp_path / "packed.pt")
    other = qk.convert_(build(1))
    assert not torch.equal(other(x), y)
    other.load_state_dict(torch.load(tmp_path / "packed.pt", weights_only=True))
    assert torch.equal(other(x), y) and torch.equal(copy.deepcopy(other)(x), y)


def test_a_converted_model_follows_the_dtype_it_is_moved_to():
    model = qk.convert_(calibrated(weight_bits=4))
    y = model(batch())
    z = model.bfloat16()(batch(dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z.float(), y, rtol=0.3, atol=0.3)


def test_after_convert():
    model = qk.convert_(calibrated(method="noise_tempering"))
    assert not model.training
    with pytest.raises(ValueError, match="already converted"):
        qk.convert_(model)
    with pytest.raises(ValueError, match="model is already quantized"):
        qk.quantize_(model)
    weights = [layer.quantized_weight() for _, layer in convert.layers(model)]
    # A step of an optimizer moves what is left (biases, activation steps) and no weight.
    optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.1))
    model.train()(batch()).square().sum().backward()
    optimizer.step()
    for (_, layer), weight in zip(convert.layers(model), weights, strict=True):
        assert torch.equal(layer.quantized_weight(), weight)
    assert isinstance(model.stem.weight_quantizer, IntegerWeight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_grid_stays_in_float32(method, dtype):
    """In fewer bits a step would move by its rounding, and small updates would round away."""
    model = calibrated(method=method).eval()
    before = {name: t.clone() for name, t in model.state_dict().items() if "_quantizer." in name}
    model.to(dtype)
    after = model.state_dict()
    assert model.stem.weight.dtype == dtype and all(torch.equal(after[name], t) for name, t in before.items())
    assert all(after[name].dtype == t.dtype for name, t in before.items())
    y = model(batch(dtype=dtype))
    assert y.dtype == dtype and same_bits(qk.convert_(model)(batch(dtype=dtype)), y)
    scale = model.stem.weight_quantizer.scale.clone()
    assert model.float().to(dtype).stem.weight_quantizer.scale.dtype == torch.float32
    assert torch.equal(model.stem.weight_quantizer.scale, scale)
    assert all(p.dtype == torch.float64 for p in calibrated(method=method).double().parameters())
