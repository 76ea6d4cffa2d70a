"""Calibration: what it sets, what it leaves alone, and that processes agree."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qkernels as qk
from qkernels import convert

BATCHES, WORLD = 3, 2


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def quantized(method="lsq", **settings):
    return qk.quantize_(network(), qk.QConfig(method=method, **settings))


def inputs(count=BATCHES, seed=2):
    torch.manual_seed(seed)
    return [torch.randn(4, 2, 6, 6) for _ in range(count)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    """Names of the state that differs from `before`, bit for bit."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def steps(model):
    return {
        name: value.tolist()
        for name, value in model.state_dict().items()
        if "quantizer" in name and not name.endswith("state")
    }


def test_first_layer_sees_the_union_of_the_batches():
    model, batches = quantized(), inputs()
    qk.calibrate(model, batches)
    expected = 2 * torch.cat(batches).double().abs().mean() / 127**0.5
    assert model[0].input_quantizer.scale.item() == pytest.approx(expected.item(), rel=1e-6)
    together = torch.cat(batches)
    expected = (together.max() - together.min()) / 255
    for order in (batches, batches[::-1]):  # the extremes come first, and last
        asymmetric = qk.calibrate(quantized("asymmetric"), order)
        assert asymmetric[0].input_quantizer.scale.item() == pytest.approx(expected.item(), rel=1e-6)


def test_later_layers_see_float_activations_of_normalised_batches():
    model, batches = quantized(), inputs(1)
    qk.calibrate(model, batches)
    with torch.no_grad():
        x = nn.functional.conv2d(batches[0], model[0].quantized_weight(), model[0].bias, padding=1)
        x = nn.functional.batch_norm(x, None, None, training=True).relu()
    expected = 2 * x.mean() / 15**0.5
    assert model[4].input_quantizer.scale.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_everything_else_as_it_was(training):
    model = quantized().train(training)
    model[1].eval()
    if training:
        model(inputs(1)[0])
    before, modes = state(model), [m.training for m in model.modules()]
    tracked = model[1].running_mean, model[1].momentum, model[5].momentum
    assert qk.calibrate(model, inputs()) is model
    assert all("input_quantizer" in name for name in changed(before, model))
    assert [m.training for m in model.modules()] == modes
    assert (model[1].momentum, model[5].momentum) == (0.1, None) and model[1].running_mean is tracked[0]
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_no_graph_and_no_noise_while_it_runs():
    model = quantized("noise_tempering", act_noise=qk.noise.FeaturePerturbation(p=1.0)).train()
    seen = []
    model[7].register_forward_hook(lambda module, args, y: seen.append((y.requires_grad, module.training)))
    batches = inputs()
    generator = torch.get_rng_state()
    qk.calibrate(model, batches)
    assert torch.equal(torch.get_rng_state(), generator)
    first = steps(model)
    assert steps(qk.calibrate(model, inputs())) == first and set(seen) == {(False, False)}


def test_calibrating_again_starts_over():
    model = quantized()
    qk.calibrate(model, [1000 * x for x in inputs()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3 if "quantizer" in name else 0.5)
    qk.calibrate(model, inputs())
    fresh = quantized()
    with torch.no_grad():
        for mine, other in zip(fresh.parameters(), model.parameters(), strict=True):
            mine.copy_(other)
    assert steps(qk.calibrate(fresh, inputs())) == steps(model)
    expected = 2 * model[4].weight.abs().mean((1, 2, 3)) / 7**0.5
    torch.testing.assert_close(model[4].weight_quantizer.scale, expected)


def test_the_sign_is_decided_anew():
    model = qk.quantize_(nn.Linear(3, 2), act_bits=4, first_last_bits=None)
    assert qk.calibrate(model, [torch.randn(4, 3)]).input_quantizer.bounds() == (-8, 7)
    assert qk.calibrate(model, [torch.rand(4, 3)]).input_quantizer.bounds() == (0, 15)


@pytest.mark.parametrize("wrap", ["tensor", "tuple", "list", "dataset"])
def test_kinds_of_batches(wrap):
    batches = inputs()
    loader = {
        "tensor": batches,
        "tuple": [(x, torch.zeros(4)) for x in batches],
        "list": [[x, "label", None] for x in batches],
        "dataset": DataLoader(TensorDataset(torch.cat(batches), torch.zeros(12)), batch_size=4),
    }[wrap]
    assert steps(qk.calibrate(quantized(), loader)) == steps(qk.calibrate(quantized(), batches))


def test_takes_exactly_so_many_batches_of_a_generator():
    taken = []

    def endless():
        for x in inputs(10):
            taken.append(x)
            yield x

    model = qk.calibrate(quantized(), endless(), batches=2)
    assert len(taken) == 2
    assert steps(model) == steps(qk.calibrate(quantized(), inputs(10)[:2], batches=8))


@pytest.mark.parametrize("method", ["lsq", "lsq+", "asymmetric", "saq", "pact", "dorefa", "ewgs"])
def test_one_batch_equals_the_first_training_batch(method):
    x = inputs(1)[0]
    a, b = (qk.quantize_(nn.Conv2d(2, 3, 3), method=method, weight_axis=None) for _ in "ab")
    b.load_state_dict(a.state_dict())
    qk.calibrate(a, [x])
    b.train()(x)
    assert steps(a) == steps(b)


def test_frozen_norm_layers_normalise_by_their_statistics():
    """In evaluation mode in a model that trains: what trains next sees activations of the running statistics."""
    found = {}
    for frozen in (False, True):
        model = quantized().train()
        with torch.no_grad():
            model[1].running_mean.add_(3.0)
        model[1].train(not frozen)
        qk.calibrate(model, inputs())
        assert model[1].training is not frozen
        found[frozen] = steps(model[4])
    model = quantized().eval()
    with torch.no_grad():
        model[1].running_mean.add_(3.0)
    qk.calibrate(model, inputs())
    assert steps(model[4]) == found[False] != found[True]


def test_an_exception_restores_modes_and_ends_observation():
    model = quantized().train()
    model[1].eval()
    qk.calibrate(model, inputs())
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(RuntimeError):
        qk.calibrate(model, [*inputs(), torch.randn(4, 5, 6, 6)])
    assert [m.training for m in model.modules()] == modes
    assert (model[1].momentum, model[5].momentum) == (0.1, None)
    assert not changed(before, model)
    assert model[0].input_quantizer.statistics is None
    model.eval()(inputs(1)[0])


def test_errors():
    with pytest.raises(ValueError, match="model has no quantizer: call qk.quantize_ first"):
        qk.calibrate(network(), inputs())
    with pytest.raises(ValueError, match="loader gave no batch"):
        qk.calibrate(quantized(), [])
    for value in (float("nan"), float("inf")):
        model = quantized("asymmetric")
        before = state(model)
        with pytest.raises(ValueError, match="loader: its batches give NaN or infinite inputs to 0, 4, 7"):
            qk.calibrate(model, [*inputs(1), torch.full((4, 2, 6, 6), value)])
        assert not changed(before, model)
    with pytest.raises(RuntimeError, match="loader: its batches reached no quantized layer: 0, 4, 7"):
        qk.calibrate(quantized(), [torch.randn(0, 2, 6, 6)])
    samples = torch.randn(9, 2, 6, 6)
    for loader in (samples, torch.utils.data.TensorDataset(samples)):
        with pytest.raises(
            TypeError, match=f"loader must give batches.* a {type(loader).__name__} gives single"
        ):
            qk.calibrate(quantized(), loader)
    one = qk.calibrate(quantized(), list(samples), forward=lambda model, x: model(x[None]))
    data = TensorDataset(samples)
    assert not changed(
        state(one), qk.calibrate(quantized(), data, forward=lambda model, x: model(x[0][None]))
    )
    resized = quantized()
    resized[7].weight = nn.Parameter(torch.randn(7, *resized[7].weight.shape[1:]))
    with pytest.raises(
        ValueError, match="layer '7' has .* step sizes, its weight needs 7: change a layer's size bef"
    ):
        qk.calibrate(resized, inputs())
    with pytest.raises(ValueError, match="batches must be an int >= 1, got 0"):
        qk.calibrate(quantized(), inputs(), batches=0)
    with pytest.raises(TypeError, match="loader must give tensors or .*got dict"):
        qk.calibrate(quantized(), [{"x": inputs()[0]}])
    with pytest.raises(
        RuntimeError,
        match=r"activation quantizer \(LSQ\) of layer '0' has no step size yet: call qk.calibrate",
    ):
        quantized().eval()(inputs(1)[0])


def test_a_layer_that_never_runs_stays_uncalibrated():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    with pytest.warns(
        UserWarning, match="no batch of loader reached unused: their input step sizes"
    ) as caught:
        model = qk.calibrate(qk.quantize_(Partial()), [torch.randn(4, 3)])
    assert caught[0].filename == __file__
    assert model.used.input_quantizer.started and not model.unused.input_quantizer.started
    with pytest.raises(RuntimeError, match="no step size yet"):
        model.eval().unused(torch.randn(4, 3))


def test_weights_of_layers_that_never_run_are_named():
    model = qk.quantize_(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), act_bits=None)
    with pytest.warns(
        UserWarning, match="no batch of loader reached 1: a module that reads .* unquantized"
    ) as caught:
        qk.calibrate(model, [torch.randn(4, 3)], forward=lambda model, x: model[0](x))
    assert caught[0].filename == __file__ and len(caught) == 1
    assert not any(hook.__name__ == "<lambda>" for m in model for hook in m._forward_pre_hooks.values())


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_without_elements_waits_for_some(training):
    """An expert that gets no token; nothing is quantized, for there is nothing."""
    model = quantized().train(training)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    assert model(torch.randn(0, 2, 6, 6)).shape[0] == 0
    assert not any(s.started for s in convert.quantizers(model) if s.role == "activation")


def test_integer_inputs_and_unbatched_embeddings():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    qk.quantize_(model)
    qk.calibrate(model, [torch.randint(0, 7, (5,))])
    assert model[1].input_quantizer.started and model[0].input_quantizer is None


def test_models_of_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, ids, scale):
            return self.mix(self.table(ids) * scale)

    model = qk.quantize_(Two())
    batch = {"ids": torch.tensor([1, 2]), "scale": torch.tensor(3.0)}
    with pytest.raises(TypeError, match="loader must give tensors .*, got dict; give forward"):
        qk.calibrate(model, [batch])
    assert qk.calibrate(model, [batch], forward=lambda model, batch: model(**batch)) is model
    assert model.mix.input_quantizer.started


def test_buffers_that_are_copied_in_place_start_a_quantizer():
    """As an average of a model's weights does with its buffers."""
    model = qk.quantize_(nn.Sequential(nn.Linear(4, 3)), act_signed=None)
    average = torch.optim.swa_utils.AveragedModel(model)
    qk.calibrate(model, [torch.rand(8, 4)])
    average.update_parameters(model)
    x = torch.rand(2, 4)
    assert torch.equal(average.eval()(x), model.eval()(x)) and not average.module[0].input_quantizer.signed


METHODS = ["lsq", "lsq+", "asymmetric"]


class Branches(nn.Module):
    """Which of two layers runs depends on the data; the third always does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.layers[2](self.layers[int(x.mean() > 0)](x))


def rank_main(rank, port, out):
    """One of two processes: its halves of the batches, through calibrate and through the first training batch."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    result = {}
    for method in METHODS:
        mine = inputs(2, seed=10 + rank)
        result[method, "calibrate"] = steps(qk.calibrate(quantized(method), mine))
        model = quantized(method).train()
        model(mine[0] * (1 + rank))
        result[method, "train"] = steps(model)
        torch.manual_seed(0)
        model = qk.calibrate(qk.quantize_(Branches(), method=method), [torch.rand(8, 4) * (1 - 2 * rank)])
        result[method, "branches"] = steps(model)
    with open(f"{out}/{rank}.json", "w") as file:
        json.dump({" ".join(key): value for key, value in result.items()}, file)
    torch.distributed.destroy_process_group()


def test_two_processes_agree(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = os.path.dirname(os.path.dirname(qk.__file__))
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(port), str(tmp_path)], env=environment)
        for rank in range(WORLD)
    ]
    try:
        assert [process.wait(timeout=60) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD))
    assert first == second
    batches = inputs(2, seed=10) + inputs(2, seed=11)
    for method in METHODS:
        alone = qk.calibrate(quantized(method), batches)[0].input_quantizer.scale.item()
        assert first[f"{method} calibrate"]["0.input_quantizer.scale"][0] == pytest.approx(alone, rel=1e-5)
        model = quantized(method).train()
        model[0].input_quantizer(torch.cat([batches[0], 2 * batches[2]]))
        alone = model[0].input_quantizer.scale.item()
        assert first[f"{method} train"]["0.input_quantizer.scale"][0] == pytest.approx(alone, rel=1e-5)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
