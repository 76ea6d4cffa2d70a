"""What is perturbed, and the network at other values of it."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels import sharpness
from qkernels.models import build_model
from qkernels.sharpness.subject import Copies, Subject


@pytest.fixture
def net():
    """(a quantized network, images)."""
    x = torch.randn(64, 1, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 4),
    )  # fmt: skip
    model = qk.quantize_(model, qk.QConfig(weight_bits=4, act_bits=4))
    return qk.calibrate(model, [(x, None)], 1).eval(), x


def test_weights_before_and_after_the_quantizers(net):
    model, x = net
    expected = model(x).detach()
    for weights in ("latent", "quantized"):
        subject = Subject(model, weights)
        for how in ("loop", "vmap"):
            logits = Copies(subject, [subject.values] * 2, how).logits(x)
            torch.testing.assert_close(logits[1], expected, rtol=1e-5, atol=1e-6)
    latent, quantized = Subject(model), Subject(model, "quantized")
    assert torch.equal(latent.values[0], model[0].weight)
    assert torch.equal(quantized.values[0], model[0].quantized_weight())
    moved = [[w + 0.3 * torch.randn_like(w) for w in s.values] for s in (latent, quantized)]
    levels = latent.effective(moved[0])["0.weight"] / model[0].weight_quantizer.scale.view(-1, 1, 1, 1)
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert torch.equal(quantized.effective(moved[1])["0.weight"], moved[1][0])


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_copies_see_images_of_their_own(net, how):
    model, x = net
    subject = Subject(model)
    copies = Copies(subject, qk.perturb(subject.values, "normal", std=0.1, num=3, seed=0), how)
    own = torch.stack([x[:4], x[4:8], x[2:6]])
    expected = copies.logits(x)
    got = copies.logits(own, own=True)
    for k, first in enumerate((0, 4, 2)):
        torch.testing.assert_close(got[k], expected[k, first : first + 4], rtol=1e-5, atol=1e-6)


class Viewing(nn.Module):
    """A network that refuses channels last."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 3, 3), nn.Linear(108, 2)

    def forward(self, x):
        return self.linear(self.conv(x).view(len(x), -1))


def test_images_go_to_convolutions_with_their_channels_last_where_the_network_takes_it():
    x, seen = torch.randn(4, 3, 8, 8), []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    model[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0].stride()))
    subject = Subject(model)
    torch.testing.assert_close(subject.logits(subject.effective(subject.values), x), model(x))
    assert seen == [(192, 1, 24, 3), (192, 64, 8, 1)]
    # One channel is in either order; the output's order shows which one the convolution took.
    gray, x1 = Subject(nn.Conv2d(1, 4, 3)), torch.randn(4, 1, 8, 8)
    assert gray.logits(gray.effective(gray.values), x1).is_contiguous(memory_format=torch.channels_last)
    viewing = Viewing().requires_grad_(False)
    subject = Subject(viewing)
    for _ in range(2):
        logits = subject.logits(subject.effective(subject.values), x[:, :1])
        torch.testing.assert_close(logits, viewing(x[:, :1]))
    assert not subject.channels_last
    with pytest.raises(RuntimeError, match="size"):
        subject.logits(subject.effective(subject.values), x[..., :4])


def test_a_network_is_measured_as_it_is_inside_disabled():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    data = [(torch.randn(12, 1, 4, 4), torch.arange(12) % 3)]
    want = F.cross_entropy(net(data[0][0]), data[0][1])
    qk.calibrate(qk.quantize_(net, weight_bits=2, act_bits=2, first_last_bits=None), [data[0][0]])
    quantized = F.cross_entropy(net.eval()(data[0][0]), data[0][1])
    for weights in ("latent", "quantized"):
        with qk.disabled(net):
            inside = sharpness.linf_sharpness(net, data, F.cross_entropy, weights=weights).loss
        assert inside == pytest.approx(want.item(), rel=1e-5) != pytest.approx(quantized.item(), rel=1e-3)


def test_shared_weights_move_together():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    subject = Subject(model)
    assert subject.names == ["0.weight", "0.bias", "1.bias"]
    values = [w + 1 for w in subject.values]
    x = torch.randn(2, 4)
    expected = F.linear(F.linear(x, values[0], values[1]), values[0], values[2])
    torch.testing.assert_close(subject.logits(subject.effective(values), x), expected)


def test_layers_that_are_left_out_are_named():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict({"a": normed, "b": nn.LSTM(4, 4), "c": nn.Linear(4, 2), "d": nn.LayerNorm([2, 2])})
    said = r"leaves the weights of a \(ParametrizedLinear\), b \(LSTM\) as they are: parameters='all' perturbs them"
    with pytest.warns(UserWarning, match=said):
        assert Subject(model).names == ["a.bias", "c.weight", "c.bias"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Subject(model, parameters="all").names) == len(list(model.parameters()))
        Subject(build_model("vit_tiny", 10, 3, 32))
        Subject(qk.quantize_(build_model("resnet20", 10, 3, 32)), "quantized")


class Named(nn.Sequential):
    """Returns its logits as other libraries do."""

    def __init__(self, wrap):
        super().__init__(nn.Linear(4, 3))
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


@pytest.mark.parametrize("wrap", [lambda y: {"logits": y}, lambda y: SimpleNamespace(logits=y)])
@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_logits_may_come_in_a_mapping_or_an_object(wrap, how):
    named, plain = Named(wrap), nn.Sequential(nn.Linear(4, 3))
    plain.load_state_dict(named.state_dict())
    loader = [(torch.randn(8, 4), torch.arange(8) % 3)]
    small = {"samples": 2, "iterations": 2, "ascent_steps": 1, "how": how}
    found, expected = ([
        sharpness.measure(model, loader, model.state_dict(), **small).searches,
        sharpness.landscape(model, loader, size=2, how=how),
        sharpness.linf_sharpness(model, loader, steps=2),
        sharpness.hessian(model, loader, top=1, trace_samples=2).to_dict(),
        sharpness.cosine_of_gradients(model, loader, case=None),
        sharpness.output_variance({"it": model}, loader, samples=2).variance["it"]["output"],
    ] for model in (named, plain))  # fmt: skip
    assert found == expected


def test_other_outputs_and_batches_are_refused():
    loader = [(torch.randn(8, 4), torch.arange(8) % 3)]
    with pytest.raises(TypeError, match="model must return a tensor of logits, .* got tuple: wrap it"):
        sharpness.landscape(Named(lambda y: (y, y)), loader)
    with pytest.raises(
        TypeError, match=r"loader must give \(x, target\) tensors, got dict, Tensor: wrap a model"
    ):
        sharpness.landscape(nn.Linear(4, 3), [({"ids": loader[0][0]}, loader[0][1])])
