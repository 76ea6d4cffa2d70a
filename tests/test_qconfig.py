"""QConfig: which layers get which bits, scales and quantizers, and what is refused."""

import copy

import pytest
import torch
from layers import EVEN, METHODS, Net, batch, calibrated, same_bits
from torch import nn

import qkernels as qk
from qkernels import convert


def widths(model):
    return [(layer.weight_quantizer.bits, layer.input_quantizer.bits) for _, layer in convert.layers(model)]


def test_defaults_are_8_bit_at_the_ends():
    assert widths(qk.quantize_(Net())) == [(8, 8), (4, 4), (4, 4), (4, 4), (4, 4), (8, 8)]


@pytest.mark.parametrize("ends, expected", [(None, 3), (6, 6), (2, 2)])
def test_first_last_bits(ends, expected):
    found = widths(qk.quantize_(Net(), weight_bits=3, act_bits=3, first_last_bits=ends))
    assert found == [(expected,) * 2, *[(3, 3)] * 4, (expected,) * 2]


def test_overrides_are_settings_of_single_layers():
    overrides = {
        "body": {"act_bits": 6, "method": "pact"},
        "body.2": {"weight_bits": 2, "weight_axis": None},
        "head": {"weight_bits": 5},
        "mix": {"act_bits": None},
    }
    model = qk.quantize_(Net(), weight_bits=4, act_bits=3, overrides=overrides)
    found = {
        name: (layer.weight_quantizer.bits, layer.input_quantizer and layer.input_quantizer.bits)
        for name, layer in convert.layers(model)
    }
    assert found == {
        "stem": (8, 8), "body.0": (4, 6), "body.2": (2, 3), "up": (4, 3), "mix": (4, None), "head": (5, 8)
    }  # fmt: skip
    assert type(model.body[0].input_quantizer) is qk.quantizers.PACT
    assert type(model.body[2].input_quantizer) is qk.quantizers.LSQ
    assert model.body[0].weight_quantizer.rows == 4 and model.body[2].weight_quantizer.rows == 1
    y = qk.calibrate(model, [batch()]).eval()(batch())
    assert same_bits(qk.convert_(model)(batch()), y)


def test_ends_are_counted_without_the_excluded():
    model = qk.quantize_(Net(), exclude=("stem", "body.0", "head"))
    assert (
        type(model.stem) is nn.Conv2d and type(model.body[0]) is nn.Conv2d and type(model.head) is nn.Linear
    )
    assert widths(model) == [(8, 8), (4, 4), (8, 8)]
    model = qk.quantize_(Net(), exclude=["body"])
    assert [name for name, _ in convert.layers(model)] == ["stem", "up", "mix", "head"]


@pytest.mark.parametrize("weights, acts", [(4, None), (None, 4)])
def test_none_leaves_weights_or_activations_alone(weights, acts):
    model = qk.quantize_(Net(), weight_bits=weights, act_bits=acts)
    for _, layer in convert.layers(model):
        assert (layer.weight_quantizer is None) == (weights is None)
        assert (layer.input_quantizer is None) == (acts is None)
    if acts is None:
        assert torch.equal(model.stem.quantized_input(batch()), batch())
    else:
        assert model.stem.quantized_weight() is model.stem.weight


def test_scales_per_output_channel_or_tensor():
    rows = [layer.weight_quantizer.scale.numel() for _, layer in convert.layers(qk.quantize_(Net()))]
    assert rows == [4, 4, 4, 3, 3, 5], "a grouped ConvTranspose2d has its channels of one group along axis 1"
    rows = {layer.weight_quantizer.scale.numel() for _, layer in convert.layers(calibrated(weight_axis=None))}
    assert rows == {1}
    embedding = qk.quantize_(nn.Embedding(7, 4, padding_idx=0))
    assert embedding.weight_quantizer.scale.shape == (7,) and embedding(torch.tensor([0])).abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_a_row_are_quantized_as_tensors_of_their_own(method):
    settings = {"method": method, "weight_bits": 3, "act_bits": None, "weight_norm": "none", **EVEN}
    layer = nn.Linear(12, 5)
    # pact and dorefa normalise by the largest weight of a layer, which each group so has.
    with torch.no_grad():
        layer.weight[:, ::4] = layer.weight.abs().max()
    groups = layer.weight.detach().reshape(-1, 4)
    layer = qk.quantize_(layer, weight_group_size=4, **settings).eval()
    assert layer.weight_quantizer.rows == 15 and "group_size=4, rows=15" in repr(layer)
    x, upstream = torch.randn(2, 12), torch.randn(2, 5)
    layer(x).backward(upstream)
    for number, group in enumerate(groups):
        single = nn.Linear(4, 1)
        single.weight.data = group[None].clone()
        single = qk.quantize_(single, weight_axis=None, **settings).eval()
        got = layer.quantized_weight().reshape(-1, 4)[number]
        assert torch.equal(got, single.quantized_weight()[0]), number
        row, part = divmod(number, 3)
        single(x[:, 4 * part : 4 * part + 4]).backward(upstream[:, row : row + 1])
        for name, learned in single.weight_quantizer.named_parameters():
            grad = getattr(layer.weight_quantizer, name).grad[number]
            torch.testing.assert_close(grad, learned.grad[0], rtol=1e-4, atol=1e-6)


def test_group_sizes_of_layers():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 6))
    sizes = {"weight_group_size": 4, "overrides": {"3": {"weight_group_size": 2}}}
    model = qk.quantize_(copy.deepcopy(net), **sizes)
    assert [layer.weight_quantizer.rows for _, layer in convert.layers(model)] == [4, 32, 24]
    embedding = qk.quantize_(nn.Embedding(7, 4), weight_group_size=2)
    assert embedding.weight_quantizer.scale.shape == (14,)
    with pytest.raises(ValueError, match=r"3: weight_group_size must divide .* \(6, 8\); got 16"):
        qk.quantize_(net, weight_group_size=16)
    assert not convert.layers(net), "a refused model stays as it was"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "lsqq"}, r"method must be one of lsq, lsq\+, asymmetric, saq, .*ewgs; got 'lsqq'"),
        ({"weight_bits": 1}, "weight_bits must be an int from 2 to 8 or None, got 1"),
        ({"weight_bits": 9}, "weight_bits must be an int from 2 to 8 or None, got 9"),
        ({"act_bits": 4.0}, "act_bits must be an int from 2 to 8 or None, got 4.0"),
        ({"first_last_bits": "8"}, "first_last_bits must be an int from 2 to 8 or None, got '8'"),
        ({"weight_bits": None, "act_bits": None}, "weight_bits and act_bits are both None"),
        ({"weight_axis": 1}, r"weight_axis must be 0 \(per output channel\) or None \(per tensor\), got 1"),
        ({"weight_group_size": 0}, "weight_group_size must be an int >= 1 or None, got 0"),
        ({"weight_group_size": True}, "weight_group_size must be an int >= 1 or None, got True"),
        ({"grad_scale_count": "n"}, "grad_scale_count must be one of features, numel; got 'n'"),
        ({"weight_norm": True}, "weight_norm must be one of detach, full, none; got True"),
        ({"act_offset": 1.5}, "act_offset must be False, or True for method 'saq'; got 1.5 for 'lsq'"),
        ({"act_offset": True}, "act_offset must be False, or True for method 'saq'; got True for 'lsq'"),
        ({"act_signed": True, "method": "lsq+"}, "act_signed must not be True for method 'lsq"),
        (
            {"act_signed": True, "method": "saq", "act_offset": True},
            "must not be True for method 'saq', whose grid",
        ),
        ({"act_signed": "auto"}, "act_signed must be True, False or None, got 'auto'"),
        ({"exclude": "head"}, "exclude must be a sequence of module names, got 'head'"),
        ({"weight_noise": "tempering"}, "weight_noise must be one of qk.noise .*got 'tempering'"),
        ({"act_noise": 0.1}, "act_noise must be one of qk.noise .*got 0.1"),
        ({"ewgs_delta": -0.1}, "ewgs_delta must be a number of at least 0, got -0.1"),
        ({"overrides": ["head"]}, "overrides must be a dict, name of a module -> settings, got .'head'."),
        ({"overrides": {"head": 8}}, r"overrides\['head'\] must be a dict of act_bits, .*; got 8"),
        (
            {"overrides": {"head": {"bits": 8}}},
            r"overrides\['head'\] must be a dict of act_bits, .*'bits': 8",
        ),
        ({"overrides": {"up": {"weight_bits": 9}}}, r"overrides\['up'\]: weight_bits must be an int .*got 9"),
        ({"ewgs_delta": "big"}, "ewgs_delta must be a number of at least 0, got 'big'"),
    ],
    ids=str,
)
def test_qconfig_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        qk.QConfig(**settings)
    model = Net()
    with pytest.raises(ValueError, match=message):
        qk.quantize_(model, **settings)
    assert not convert.layers(model)
