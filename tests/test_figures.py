"""Output variance, gradient norms, cosine of gradients and the Hessian's trace along training, evaluated directly."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels import sharpness
from qkernels.cli import main
from qkernels.models import build_model
from qkernels.random import normal, uniform
from qkernels.sharpness import pictures
from qkernels.sharpness.measure_command import _ascent
from qkernels.training import build, load_run, make_config, train
from qkernels.training.checkpoint import load_model


def batches(*sizes):
    x, target = torch.randn(sum(sizes), 1, 4, 4), torch.arange(sum(sizes)) % 3
    return list(zip(x.split(list(sizes)), target.split(list(sizes)), strict=True))


@pytest.fixture
def net():
    """(quantized model in training mode, loader of two batches of different size)."""
    loader = batches(20, 12)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    config = qk.QConfig(weight_bits=4, act_bits=4, first_last_bits=None)
    model = qk.calibrate(qk.quantize_(model, config), loader, 2).train()
    model(loader[0][0])
    return model, loader


@pytest.fixture
def layer():
    """(one quantized linear layer on flat images, loader)."""
    loader = batches(10, 6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    config = qk.QConfig(weight_bits=3, act_bits=3, first_last_bits=None)
    return qk.calibrate(qk.quantize_(model, config), loader, 2), loader


def untouched(call, model):
    """What call() returns; the model, its gradients and the random state must be as before."""
    state, mode = copy.deepcopy(model.state_dict()), model.training
    random = torch.get_rng_state()
    result = call()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.training == mode
    assert all(p.grad is None for p in model.parameters())
    assert not any(q.training != mode or q.noise for q in qk.convert.quantizers(model))
    assert torch.equal(torch.get_rng_state(), random)
    return result


def total_norm(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def test_output_variance_is_the_variance_over_noisy_inputs(net):
    model, loader = net
    run = lambda: sharpness.output_variance(model, loader, (0.1, 0.5), samples=5, seed=3)  # noqa: E731
    found = untouched(run, model)
    assert found == run()
    x = torch.cat([x for x, _ in loader])
    noise = [normal(torch.tensor([3]), k, x.numel()).view(x.shape) for k in range(5)]
    model.eval()
    parts = {"0": model[:1], "4": model, "output": model}
    with torch.no_grad():
        for name, part in parts.items():
            clean = part(x).double()
            assert found.spread["quantized"][name] == pytest.approx(clean.var(correction=0).item(), rel=1e-5)
            for i, level in enumerate((0.1, 0.5)):
                noisy = torch.stack([part(x + level * n) for n in noise]).double()
                expected = noisy.var(0).mean().item()
                assert found.variance["quantized"][name][i] == pytest.approx(expected, rel=1e-4)
                relative = expected / clean.var(correction=0).item()
                assert found.relative["quantized"][name][i] == pytest.approx(relative, rel=1e-4)
    assert list(found.variance["quantized"]) == list(parts)


def test_output_variance_of_a_linear_map_is_known():
    loader, model = batches(16), nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    found = sharpness.output_variance(model, loader, (0.1, 0.2), samples=400)
    expected = 0.01 * model[1].weight.square().sum(1).mean().item()
    assert found.variance["float"]["output"] == pytest.approx([expected, 4 * expected], rel=0.05)
    again = sharpness.output_variance({"a": model, "b": model}, loader, (0.1, 0.2), samples=400)
    assert again.variance["a"] == again.variance["b"] == found.variance["float"]


@pytest.mark.parametrize("method", ["lsq", "saq"])
def test_output_variance_without_quantizers_is_that_of_the_latent_weights(method):
    loader, plain = batches(16), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    config = qk.QConfig(method=method, weight_bits=2, act_bits=2, first_last_bits=None)
    model = qk.calibrate(qk.quantize_(copy.deepcopy(plain), config), loader, 1)
    with torch.no_grad():
        for i in (0, 2):
            plain[i].weight.copy_(model[i].weight_quantizer.prepare(model[i].weight))
    expected = sharpness.output_variance(plain, loader, samples=3).variance["float"]
    found = sharpness.output_variance(model, loader, samples=3).variance
    assert found["without quantizers"] == expected
    assert found["quantized"] != expected
    integer = sharpness.output_variance(qk.convert_(copy.deepcopy(model)), loader, samples=3).variance
    assert list(integer) == ["quantized"]
    assert integer["quantized"]["output"] == pytest.approx(found["quantized"]["output"], rel=1e-5)


def test_gradient_norms_are_those_with_noise_of_one_step(layer):
    model, loader = layer
    found = untouched(lambda: sharpness.gradient_norms(model, loader, samples=2, seed=5), model)
    linear = model[1]
    weight, inputs = linear.weight_quantizer, linear.input_quantizer
    generator = torch.Generator().manual_seed(5)

    def noise(quantizer, shape, seed):
        u = uniform(seed, quantizer.stream, math.prod(shape)).view(shape) - 0.5
        return u * quantizer.scale.detach().view(-1, *[1] * (len(shape) - 1))

    norms = {"none": [], "weights": [], "features": []}
    for x, target in loader:
        for name, values in norms.items():
            drawn = []
            for _ in range(1 if name == "none" else 2):
                seed = torch.randint(2**62, (1,), generator=generator)
                w, features = weight(linear.weight), inputs(x.flatten(1))
                w = w + noise(weight, w.shape, seed) if name == "weights" else w
                features = features + noise(inputs, features.shape, seed) if name == "features" else features
                loss = F.cross_entropy(F.linear(features, w, linear.bias), target)
                drawn.append(total_norm(torch.autograd.grad(loss, [linear.weight, linear.bias])))
            values.append(sum(drawn) / len(drawn))
    for name, values in norms.items():
        assert found.norms[name] == pytest.approx(values, rel=1e-4)
        assert found.mean[name] == pytest.approx(sum(values) / 2, rel=1e-4)
    assert len({found.mean[name] for name in norms}) == 3


def test_gradient_norms_of_other_networks(net):
    model, loader = net
    train_mode = untouched(lambda: sharpness.gradient_norms(model, loader, samples=1), model)
    eval_mode = untouched(lambda: sharpness.gradient_norms(model, loader, samples=1, training=False), model)
    assert train_mode.norms != eval_mode.norms
    assert train_mode == sharpness.gradient_norms(model, loader, samples=1)
    only = qk.quantize_(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), weight_bits=4, act_bits=None)
    assert set(sharpness.gradient_norms(only.train(), loader).norms) == {"none", "weights"}


@pytest.mark.parametrize("case", [1, 2, 3])
def test_cosine_is_that_of_the_two_gradients(layer, case):
    model, loader = layer
    found = untouched(lambda: sharpness.cosine_of_gradients(model, loader, rho=0.5, case=case), model)
    linear = model[1]
    latent = [linear.weight, linear.bias]
    learned = [*latent, linear.weight_quantizer.scale, linear.input_quantizer.scale]

    def gradients(batch, of=None, before=0.0, after=0.0, bias=0.0):
        w = linear.weight_quantizer(linear.weight + before)
        y = F.linear(linear.input_quantizer(batch[0].flatten(1)), w + after, linear.bias + bias)
        return torch.autograd.grad(F.cross_entropy(y, batch[1]), learned if of is None else of(w))

    for i, batch in enumerate(loader):
        g = gradients(batch)
        move = gradients(batch, lambda w: [w, linear.bias] if case == 3 else latent)
        move = [0.5 * m / total_norm(move) for m in move]
        g_s = gradients(batch, bias=move[1], **{"before" if case == 2 else "after": move[0]})
        dot = sum((a * b).sum().item() for a, b in zip(g, g_s, strict=True))
        assert found.cosine[i] == pytest.approx(dot / total_norm(g) / total_norm(g_s), rel=1e-4)
        assert found.ratio[i] == pytest.approx(total_norm(g_s) / total_norm(g), rel=1e-4)
        assert found.cosine[i] < 0.999
    assert found.mean == pytest.approx(sum(found.cosine) / 2)


def test_the_cosine_of_a_noisy_network_repeats_and_draws_nothing_else():
    loader = batches(20, 12)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    model = qk.calibrate(qk.quantize_(model, method="noise_tempering"), loader, 2)
    before = torch.get_rng_state()
    found = [sharpness.cosine_of_gradients(model, loader, seed=seed).cosine for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before) and found[0] == found[1] != found[2]


def test_cosine_of_a_float_model_and_of_a_small_radius(net):
    model, loader = net
    floats = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    found = sharpness.cosine_of_gradients(floats, loader, rho=0.5, case=None)
    for i, (x, target) in enumerate(loader):
        params = list(floats.parameters())
        g = torch.autograd.grad(F.cross_entropy(floats(x), target), params)
        moved = {k: p + 0.5 * d / total_norm(g) for (k, p), d in zip(floats.named_parameters(), g)}
        loss = F.cross_entropy(torch.func.functional_call(floats, moved, (x,)), target)
        g_s = torch.autograd.grad(loss, params)
        dot = sum((a * b).sum().item() for a, b in zip(g, g_s, strict=True))
        assert found.cosine[i] == pytest.approx(dot / total_norm(g) / total_norm(g_s), rel=1e-4)
    near = untouched(lambda: sharpness.cosine_of_gradients(model, loader, rho=1e-6), model)
    assert near.cosine == pytest.approx([1.0, 1.0], abs=1e-4)
    far = sharpness.cosine_of_gradients(model, loader, rho=1.0)
    assert far.mean < near.mean
    flat = sharpness.cosine_of_gradients(model, loader, lambda y, target: (y * 0).sum())
    assert flat.cosine == [None, None]
    assert flat.mean is None


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "fpq"
    small = {"model": "nin_d1_w1", "data": "digits", "batch_size": 256, "float_epochs": 1}
    train(make_config(recipe="fpq", epochs=2, **small), out, quiet=True)
    return out


def test_training_epochs_are_those_of_train_and_the_trace_is_measured_at_each(run_dir):
    _, data, config = load_run(run_dir)
    seen = []

    def epochs():
        for epoch, model in sharpness.training_epochs({**config, "init": str(run_dir / "float")}):
            seen.append((epoch, copy.deepcopy(model)))
            torch.rand(epoch + 1)  # what measures draw must not change the run
            yield epoch, model

    found = sharpness.hessian_trace_along({"fpq": epochs()}, data.train_eval, trace_samples=3, batches=1)
    assert found.runs["fpq"]["epochs"] == [0, 1, 2]
    for name, state in (("initial.safetensors", seen[0]), ("checkpoint", seen[2])):
        expected = load_model(run_dir / name)
        assert all(torch.equal(v, expected[k]) for k, v in state[1].state_dict().items())
    for i, (_, model) in enumerate(seen):
        one = sharpness.hessian(model, data.train_eval, top=0, trace_samples=3, batches=1)
        assert found.runs["fpq"]["trace"][i] == pytest.approx(one.trace, rel=1e-6)
        assert found.runs["fpq"]["stderr"][i] == pytest.approx(one.trace_stderr, rel=1e-6)
    single = sharpness.hessian_trace_along(seen[1:2], data.train_eval, trace_samples=1, batches=1)
    assert single.runs["run"]["epochs"] == [1]
    assert single.runs["run"]["stderr"] == [None]


def test_results_are_written_read_and_drawn(net, tmp_path):
    model, loader = net
    results = [
        sharpness.output_variance(model, loader, samples=2),
        sharpness.gradient_norms(model, loader, samples=1),
        sharpness.cosine_of_gradients(model, loader),
        sharpness.cosine_of_gradients(model, loader, lambda y, target: (y * 0).sum()),
        sharpness.hessian_trace_along({"a": [(0, model), (3, model)]}, loader, trace_samples=2),
    ]
    for i, found in enumerate(results):
        path = found.to_json(tmp_path / f"{i}.json")
        assert type(found).from_json(path) == found
        picture = found.plot(tmp_path / f"{i}.png", title="a title")
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.stat().st_size > 5000
    values = {"none": [None, 1.0]}
    pictures.GradientNorms(values, {"none": None}, {"none": None}, {}).plot(tmp_path / "nan.png")
    values = {"run": {"epochs": [0, 1], "trace": [None, 2.0], "stderr": [None, 1.0]}}
    pictures.TraceAlong(values, {}).plot(tmp_path / "nan.png")
    with pytest.raises(ValueError, match="path must be the GradientNorms of a to_json"):
        pictures.GradientNorms.from_json(tmp_path / "0.json")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: sharpness.output_variance(m, d, ()), r"levels must be positive numbers, got \[\]"),
        (lambda m, d: sharpness.output_variance(m, d, [0.0]), r"levels must be positive numbers, got \[0.0\]"),
        (lambda m, d: sharpness.output_variance(m, d, samples=1), "samples must be an int >= 2, got 1"),
        (lambda m, d: sharpness.output_variance({}, d), "dict of modules, got an empty dict"),
        (lambda m, d: sharpness.gradient_norms(m, d, samples=0), "samples must be an int >= 1, got 0"),
        (lambda m, d: sharpness.gradient_norms(nn.Linear(4, 3), d), "model has no quantizers"),
        (lambda m, d: sharpness.gradient_norms(nn.ReLU(), d), "model has no weights that learn"),
        (lambda m, d: sharpness.cosine_of_gradients(m, d, rho=0.0), "rho must be a positive number, got 0.0"),
        (lambda m, d: sharpness.cosine_of_gradients(m, d, case=4), "case must be 1, 2 or 3, got 4"),
        (lambda m, d: sharpness.cosine_of_gradients(nn.Linear(4, 3), d), "case 3 needs a model with quantized"),
        (lambda m, d: sharpness.hessian_trace_along([], d), r"epochs gave no \(epoch, model\) for 'run'"),
        (lambda m, d: sharpness.hessian_trace_along([], d, trace_samples=0), "trace_samples must be an int >= 1"),
        (lambda m, d: next(sharpness.training_epochs(make_config(recipe="lsq"))), "config: init must be"),
        (lambda m, d: sharpness.gradient_norms(m, []), "loader gave no batch"),
    ],
)  # fmt: skip
def test_bad_arguments(net, call, message):
    with pytest.raises(ValueError, match=message):
        call(*net)


@pytest.mark.parametrize(
    ("recipe", "bits", "rho", "case"),
    [("saq", 2, 0.3, 3), ("saq", 4, 0.65, 3), ("sam", 4, 0.05, None), ("lsq", 4, 0.3, 3), ("float", 32, 0.05, None)],
)  # fmt: skip
def test_measure_command_takes_the_radius_of_the_run(recipe, bits, rho, case):
    config = make_config(recipe=recipe, model="nin_d1_w1", data="digits", weight_bits=bits)
    model = build.quantize(build_model("nin_d1_w1", 10, 1, 8), config)
    assert _ascent(model, config) == {"rho": rho, "case": case}


def test_measure_command_draws_the_figures(run_dir, capsys, monkeypatch):
    names = ("output_variance", "gradient_norms", "gradient_cosine", "hessian_trace")
    shared = ["--quick", "--batches", "1", "--batch-size", "24", "--threads", "1", "--quiet", "--figures"]
    assert main(["measure", str(run_dir), *shared]) == 0
    found = json.loads((run_dir / "measures.json").read_text())["figures"]
    assert tuple(found) == names
    assert set(found["output_variance"]["variance"]) == {"quantized", "float"}
    assert found["gradient_cosine"]["settings"]["case"] == 3
    assert found["hessian_trace"]["runs"]["run"]["epochs"] == [0, 2]
    for name in names:
        (run_dir / f"{name}.png").rename(run_dir / f"{name}.old.png")

    def never(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr("qkernels.sharpness.measure_command.output_variance", never)
    assert main(["measure", str(run_dir), *shared]) == 0
    assert all((run_dir / f"{name}.png").stat().st_size > 5000 for name in names)
    monkeypatch.undo()
    assert main(["measure", str(run_dir / "float"), *shared]) == 0
    found = json.loads((run_dir / "float" / "measures.json").read_text())["figures"]
    assert tuple(found) == ("output_variance", "gradient_cosine", "hessian_trace")
    assert set(found["output_variance"]["variance"]) == {"float"}
    assert found["gradient_cosine"]["settings"]["case"] is None
    capsys.readouterr()
