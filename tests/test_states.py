"""What copies, checkpoints and averages of a quantized model hold, and what loading them starts."""

import copy

import pytest
import torch
from layers import METHODS, Net, batch, calibrated

import qkernels as qk
from qkernels import convert
from qkernels.quantizers import _code


def test_float_checkpoint_loads_with_only_the_quantizers_missing():
    torch.manual_seed(5)
    source = Net()
    model = qk.quantize_(Net())
    report = model.load_state_dict(source.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys and all("_quantizer." in name for name in report.missing_keys)
    assert torch.equal(model.mix.weight, source.mix.weight)


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_checkpoints_give_the_same_outputs(method, tmp_path):
    model = calibrated(method=method).eval()
    y = model(batch())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch()), y)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model(batch()), y), "a copy shares nothing"
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = qk.quantize_(Net(), method=method)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(fresh.eval()(batch()), y), (
        "step sizes, signs and that they are set travel with the state"
    )


def test_states_of_before_and_after_convert_do_not_mix():
    """Each holds scales under the same names; without strict they would come without their weights."""
    trained, converted = calibrated(), qk.convert_(calibrated())
    states = {"before": trained.state_dict(), "after": converted.state_dict()}
    for model, other in ((trained, "after"), (converted, "before")):
        for strict in (True, False):
            with pytest.raises(
                RuntimeError, match=f"head.weight: the state dict is that of a model {other} qk.conv"
            ):
                model.load_state_dict(states[other], strict=strict)
    fresh = qk.convert_(qk.quantize_(Net()))
    fresh.load_state_dict(states["after"])
    assert torch.equal(fresh(batch()), converted(batch()))


def test_a_model_that_was_built_without_memory_starts_with_its_weights():
    """As transformers' from_pretrained builds it; what to_empty leaves may look like any state."""
    source = Net()
    with torch.device("meta"):
        model = qk.quantize_(Net())
    model.to_empty(device="cpu")
    wanted = qk.quantize_(copy.deepcopy(source))
    with torch.no_grad():
        for m in convert.quantizers(model):
            m.scale.fill_(torch.nan)
            m.state.fill_(_code(m.bits, m.role == "weight"))
            assert not m.started
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in source.state_dict().items():
            own[name].copy_(value)
    for net in (model, wanted):
        net.train()(batch())
    for m, w in zip(convert.quantizers(model), convert.quantizers(wanted), strict=True):
        assert m.started and torch.equal(m.scale, w.scale)


def test_steps_of_a_diverged_checkpoint_are_not_hidden():
    trained = calibrated()
    with torch.no_grad():
        trained.head.weight_quantizer.scale.fill_(torch.nan)
    model = qk.quantize_(Net())
    model.load_state_dict(trained.state_dict())
    assert model.eval()(batch()).isnan().all()


def test_weights_loaded_after_quantize_start_their_steps():
    torch.manual_seed(5)
    source = Net()
    with torch.no_grad():
        for p in source.parameters():
            p.mul_(0.1)
    model, other = qk.quantize_(Net()), qk.quantize_(copy.deepcopy(source))
    model.load_state_dict(source.state_dict(), strict=False)
    for (_, layer), (_, wanted) in zip(convert.layers(model), convert.layers(other), strict=True):
        assert torch.equal(layer.weight_quantizer.scale, wanted.weight_quantizer.scale)
    trained = calibrated(method="asymmetric").eval()
    with torch.no_grad():
        trained.stem.weight_quantizer.scale.mul_(1.5)
    for state in (trained.state_dict(), dict(trained.named_parameters())):
        other = calibrated(method="asymmetric").eval()
        other.load_state_dict(state, strict=False)
        assert torch.equal(other(batch()), trained(batch()))
    other = calibrated()
    before = other.stem.weight_quantizer.scale.clone()
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"stem.weight": torch.zeros(1)}, strict=False)
    assert torch.equal(other.stem.weight_quantizer.scale, before)


def test_averages_that_copy_integers_start_with_their_model():
    """The state is an integer: they pass no number in between."""
    model = qk.quantize_(Net(), act_signed=None)
    average = copy.deepcopy(model).eval()
    model.train()(batch())
    for step in range(60):
        for mine, other in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mine.lerp_(other, 0.2) if mine.is_floating_point() else mine.copy_(other)
        if step in (0, 59):
            average(batch())
            signs = [
                [layer.input_quantizer.signed for _, layer in convert.layers(m)] for m in (average, model)
            ]
            assert signs[0] == signs[1]


@pytest.mark.parametrize("method", ["lsq", "asymmetric"])
def test_a_checkpoint_of_other_bits_starts_anew(method):
    saved = calibrated(method=method, weight_bits=8, act_bits=8).state_dict()
    model = qk.quantize_(Net(), method=method, weight_bits=4, act_bits=4)
    with pytest.warns(
        UserWarning,
        match="8 bit were loaded where 4 bit are asked for, for the .* of layer 'body.0': they start anew",
    ):
        model.load_state_dict(saved)
    with pytest.raises(
        RuntimeError, match="activation quantizer .(LSQ|Asymmetric). of layer 'body.0' has no step size yet"
    ):
        model.eval()(batch())
    model.train()(batch())
    wanted = calibrated(method=method, weight_bits=4, act_bits=4)
    for name in ("stem", "body.0", "head"):
        layer, like = model.get_submodule(name), wanted.get_submodule(name)
        assert torch.equal(layer.weight_quantizer.scale, like.weight_quantizer.scale), name
    signed = model.stem.weight_quantizer.signed
    old = {**saved, "stem.weight_quantizer.state": torch.tensor([2 if signed else 1], dtype=torch.uint8)}
    same = qk.quantize_(Net(), method=method, weight_bits=8, act_bits=8)
    same.load_state_dict(old)
    assert same.stem.weight_quantizer.started, "a checkpoint that does not say its bits"


@pytest.mark.parametrize("source, target", [("lsq", "asymmetric"), ("asymmetric", "lsq"), ("lsq", "dorefa")])
def test_a_checkpoint_of_another_grid_starts_anew(source, target):
    saved = calibrated(method=source).state_dict()
    model, wanted = qk.quantize_(Net(), method=target), qk.quantize_(Net(), method=target)
    with pytest.warns(
        UserWarning,
        match="grid were loaded for the weight quantizer .* of layer 'stem', whose .*: they start anew",
    ):
        model.load_state_dict(saved, strict=False)
    wanted.load_state_dict({k: v for k, v in saved.items() if "quantizer" not in k}, strict=False)
    for (_, mine), (_, other) in zip(convert.layers(model), convert.layers(wanted), strict=True):
        assert mine.weight_quantizer.bounds() == other.weight_quantizer.bounds()
        assert torch.equal(mine.quantized_weight(), other.quantized_weight())


def test_averages_of_buffers_leave_the_grid():
    """An average of equal numbers is off by a rounding, and integers are cut off."""
    model = calibrated(method="asymmetric").eval()
    average = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda average, value, _: 0.9995 * average + (1 - 0.9995) * value, use_buffers=True
    )
    for _ in range(20):
        average.update_parameters(model)
    for (_, layer), (_, own) in zip(convert.layers(average.module), convert.layers(model), strict=True):
        for role in ("weight_quantizer", "input_quantizer"):
            averaged, quantizer = getattr(layer, role), getattr(own, role)
            assert torch.equal(averaged.grid()["zero_point"], quantizer.grid()["zero_point"])
            averaged._adopt()
            assert averaged.started and averaged.signed == quantizer.signed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_grid_stays_in_float32(dtype):
    model = calibrated()
    before = [q.scale.detach().clone() for q in convert.quantizers(model)]
    after = [q.scale for q in convert.quantizers(model.to(dtype))]
    assert model.stem.weight.dtype == dtype and all(map(torch.equal, after, before))
