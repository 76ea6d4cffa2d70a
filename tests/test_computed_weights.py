"""Layers whose weight torch computes from other parameters: pruning, weight_norm, spectral_norm, parametrizations."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from layers import same_bits
from torch import nn
from torch.nn.utils import parametrizations, prune

import qkernels as qk
from qkernels.export import export_torch


def old(make):
    def made(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            make(layer)

    return made


COMPUTED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "pruned twice": lambda layer: [prune.random_unstructured(layer, "weight", 0.2) for _ in range(2)],
    "weight_norm": old(nn.utils.weight_norm),
    "spectral_norm": old(nn.utils.spectral_norm),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
}


def network(form):
    """A quantized network whose layers got this form after it was quantized."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    qk.quantize_(model, weight_bits=3, act_bits=4, first_last_bits=None)
    for layer in (model[0], model[3]):
        COMPUTED[form](layer)
    return model


def images(seed=0):
    return torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def moved(model):
    """After a step of an optimizer, and no forward behind it."""
    optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.5))
    F.cross_entropy(model.train()(images()), torch.arange(6) % 3).backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("form", COMPUTED)
def test_converted_and_exported_outputs_are_those_of_the_trained_weights(form, tmp_path):
    model = moved(qk.calibrate(network(form), [images()]))
    evaluated = qk.calibrate(network(form), [images()])
    evaluated.load_state_dict(model.state_dict())
    with torch.no_grad():
        y = evaluated.eval()(images())
    trained = {name: t.clone() for name, t in model.state_dict().items()}
    assert torch.equal(export_torch(model, images(), tmp_path / "m.pt2").module()(images()), y)
    assert all(torch.equal(t, trained[name]) for name, t in model.state_dict().items()), (
        "the model stays as it was"
    )
    assert same_bits(qk.convert_(model)(images()), y)
    assert not any("weight" in name.split(".")[-1] for name, _ in model.named_parameters())
    assert type(model[3]) is qk.nn.QuantLinear


# The weight of spectral_norm does not follow the size of its parameter.
@pytest.mark.parametrize("form", [form for form in COMPUTED if "spectral" not in form])
def test_step_sizes_start_from_the_loaded_weights(form):
    model = qk.calibrate(network(form), [images()]).eval()
    model(images())
    name = next(n for n, _ in model[3].named_parameters() if "weight" in n and "scale" not in n)
    with torch.no_grad():
        before = model[3].weight_quantizer.scale.clone()
        model[3].get_parameter(name).mul_(20.0)
    qk.calibrate(model, [images()])
    torch.testing.assert_close(model[3].weight_quantizer.scale, 20 * before)


@pytest.mark.parametrize("form", COMPUTED)
def test_measures_and_saq_need_parameters(form):
    model = qk.calibrate(network(form), [images()])
    data = [(images(), torch.arange(6) % 3)]
    with pytest.raises(
        ValueError, match=r"a measure needs weights that are parameters; that of 0 is computed"
    ):
        qk.sharpness.linf_sharpness(model, data, F.cross_entropy)
    base = torch.optim.SGD(qk.param_groups(model, lr=0.1))
    for case in (1, 3):
        with pytest.raises(
            ValueError, match=rf"SAQ's case {case} needs weights that are parameters; that of 0 is"
        ):
            qk.optim.SAQ(model, base, case=case)
    assert isinstance(qk.optim.SAQ(model, base, case=2), qk.optim.SAQ)
