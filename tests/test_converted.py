"""What layers hold once their weights are integers, and quantizers of the user's in their place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels import convert


class ReadsWeights(nn.Module):
    """As transformers' and timm's: one layer's weight says the dtype, another's is used by F.linear."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return F.linear(self.first(x.to(self.first.weight.dtype)), self.second.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_converted_layers_give_their_weights_values(dtype, tmp_path):
    model, x = ReadsWeights().to(dtype), torch.randn(4, 3)
    with pytest.warns(UserWarning, match="reached second: a module that reads their weights itself"):
        qk.calibrate(qk.quantize_(model, act_bits=None), [x.to(dtype)])
    model.eval()
    wanted = F.linear(model.first(x.to(dtype)), model.second.quantized_weight())
    values, keys = model.first.quantized_weight().detach(), set(model.state_dict())
    qk.convert_(model)
    weight = model.first.weight
    assert (weight.dtype, weight.requires_grad) == (dtype, False) and torch.equal(weight, values)
    for twin in (model, copy.deepcopy(model), torch.compile(model, backend="eager", fullgraph=True)):
        assert torch.equal(twin(x), wanted)
    assert not {"first.weight", "second.weight"} & set(model.state_dict()) and keys - set(model.state_dict())
    assert "first.weight" not in dict(model.named_parameters())
    with pytest.raises(AttributeError, match="'QuantLinear' object has no attribute 'wait'"):
        _ = model.first.wait
    with torch.no_grad():
        program = qk.export.export_torch(model, x, tmp_path / "model.pt2")
    assert torch.equal(program.module()(x), wanted)


def test_a_converted_layer_keeps_its_integers():
    """transformers ties weights again now and then; a dense tensor would stand in front of the integers."""
    head, table = nn.Linear(4, 6, bias=False), nn.Embedding(6, 4)
    head.weight = table.weight
    model = qk.convert_(qk.quantize_(nn.ModuleList([table, head]), act_bits=None))
    before = model[1].weight
    model[1].weight = model[0].weight
    assert "weight" not in vars(model[1]) and torch.equal(model[1].weight, before)
    for other in (nn.Parameter(before + 1), before[:2], None):
        with pytest.raises(
            ValueError, match="weight of a converted layer is of integers: set it before qk.convert_"
        ):
            model[1].weight = other
    assert model.double()[1].weight.dtype == torch.float64


class Own(nn.Module):
    """A quantizer of the user's, with names of ours."""

    def __init__(self):
        super().__init__()
        self.frozen = True
        self.register_buffer("packed", torch.ones(1))
        self.alpha = nn.Parameter(torch.zeros(3, 4, 5))

    def forward(self, x):
        return x.round()


def test_quantizers_of_the_users_serve_in_our_layers():
    layer, x = qk.nn.QuantLinear(4, 3, weight_quantizer=Own(), input_quantizer=Own()), torch.randn(2, 4)
    assert torch.equal(layer(x), F.linear(x.round(), layer.weight.round(), layer.bias))
    layer.load_state_dict(layer.state_dict())
    model = qk.quantize_(nn.Sequential(nn.Linear(4, 4)), act_bits=None).append(layer)
    assert not convert.candidates.left_in_float(model)
    with pytest.raises(ValueError, match="1 has a Own, whose integers are not known"):
        qk.export.integer_state_dict(model)
