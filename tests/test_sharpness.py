"""The eight measures and the L-infinity sharpness: formulas, a plain implementation, an untouched model."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qkernels as qk
from qkernels import random, sharpness
from qkernels.sharpness import formulas
from qkernels.sharpness.data import Data
from qkernels.sharpness.measures import _project_l2
from qkernels.sharpness.subject import Subject


def small_net(act_bits=4):
    return qk.quantize_(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(), nn.Flatten(), nn.Linear(72, 4),
        ),
        qk.QConfig(weight_bits=4, act_bits=act_bits),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """(model, loader, initial state): a quantized network that tells four noisy patterns apart."""
    torch.manual_seed(0)
    target = torch.arange(256) % 4
    x = torch.randn(4, 1, 8, 8)[target] + 0.8 * torch.randn(256, 1, 8, 8)
    loader = list(zip(x.split(64), target.split(64), strict=True))
    model = small_net()
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    qk.calibrate(model, loader, 2)
    optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.02), momentum=0.9)
    for _ in range(8):
        for batch, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()
    return model.eval(), loader, initial


def snapshot(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, [p.data_ptr() for p in model.parameters()], [m.training for m in model.modules()]


def assert_untouched(model, before):
    state, places, modes = before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == places
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_formulas_equal_the_equations_in_float64():
    generator = np.random.default_rng(0)
    w, w0 = generator.normal(size=(2, 500))
    m, eps = 50000, 1e-3
    s, s_, a, a_ = 0.03, 0.2, 0.004, 0.05
    d, n = w - w0, 500

    def mag(size, widening, r):
        return 0.25 * np.sum(
            np.log((eps**2 + (size**2 + widening) * (r @ r) / n) / (eps**2 + size**2 * d**2))
        )

    wide = 4 * math.log(2 * n / s_)
    expected = {
        "pac_bayes_init": d @ d / (4 * s**2) + math.log(m / s) + 10,
        "pac_bayes_orig": w @ w / (4 * s**2) + math.log(m / s) + 10,
        "pac_bayes_mag_init": mag(s_, 1, d) + math.log(m / s_) + 10,
        "pac_bayes_mag_orig": mag(s_, 1, w) + math.log(m / s_) + 10,
        "sharpness_init": d @ d * math.log(2 * n) / (4 * a**2) + math.log(m / s) + 10,
        "sharpness_orig": w @ w * math.log(2 * n) / (4 * a**2) + math.log(m / s) + 10,
        "sharpness_mag_init": mag(a_, wide, d) + math.log(m / s_) + 10,
        "sharpness_mag_orig": mag(a_, wide, w) + math.log(m / s_) + 10,
    }
    sizes = {"sigma": s, "sigma_mag": s_, "alpha": a, "alpha_mag": a_}
    parts = [torch.from_numpy(t).split([100, 400]) for t in (w, w0)]
    assert formulas.bounds(*parts, m, sizes) == pytest.approx(expected, rel=1e-12)
    assert list(expected) == list(formulas.NAMES)
    fixed = formulas.bounds(*parts, m, sizes, delta=0.05)
    assert fixed["pac_bayes_init"] == pytest.approx(d @ d / (4 * s**2) + math.log(m / 0.05) + 10, rel=1e-12)
    assert formulas.measure(9.0, 4) == 1.5
    assert formulas.measure(-1.0, 4) is None


def plain_search(model, loader, magnitude, noise, samples, eps=1e-3, seed=0):
    """The published search, one deep copy and one whole pass per sample, with the project's random numbers."""

    def accuracy(network):
        with torch.no_grad():
            correct = [network(x).argmax(1) == target for x, target in loader]
        return torch.cat(correct).double().mean().item()

    whole, low, high, path = accuracy(model), 0.0, 2.0, []
    for _ in range(15):
        size = (low + high) / 2
        found = []
        for k in range(samples):
            network = copy.deepcopy(model)
            layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
            for t, w in enumerate(p for m in layers for p in (m.weight, m.bias) if p is not None):
                n = random.normal(torch.tensor([seed]), (k << 32) + t, w.numel()).view(w.shape)
                if noise == "variance":
                    deviation = size**2 * w**2 + eps**2 if magnitude else size**2
                else:
                    deviation = torch.sqrt((size * w) ** 2 + eps**2) if magnitude else size
                w.data = w.data + deviation * n
            found.append(accuracy(network))
        displacement = abs(whole - sum(found) / samples)
        path.append((size, displacement))
        if abs(displacement - 0.1) < 0.01:
            break
        low, high = (low, size) if displacement > 0.1 else (size, high)
    return path


@pytest.mark.parametrize("noise", ["std", "variance"])
def test_search_takes_the_path_of_the_plain_implementation(trained, noise):
    model, loader, initial = trained
    report = sharpness.measure(model, loader, initial, noise=noise, samples=4, ascent_steps=0)
    for name in ("sigma", "sigma_mag"):
        expected = plain_search(model, loader, name == "sigma_mag", noise, 4)
        path = report.searches[name]["path"]
        assert [p["size"] for p in path] == [size for size, _ in expected]
        for p, (_, displacement) in zip(path, expected, strict=True):
            if p["decided"] == "complete":
                assert abs(p["displacement"]) == pytest.approx(displacement, abs=1e-9)
            assert p["verdict"] == (
                "within" if abs(displacement - 0.1) < 0.01 else "above" if displacement > 0.1 else "below"
            )
        assert report.searches[name]["stderr"] > 0
        near = min(path[:-1], key=lambda p: abs(p["size"] - path[-1]["size"]))
        slope = (near["displacement"] - path[-1]["displacement"]) / (near["size"] - path[-1]["size"])
        assert report.searches[name]["size_stderr"] == pytest.approx(path[-1]["stderr"] / abs(slope))
    passes = sum(len(s["path"]) for s in report.searches.values()) * 4
    assert report.cost["forward_passes"] < passes
    assert report.cost["backward_passes"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "quantized", "ball": "l2"},
        {"target": "loss", "over": "mean"},
        {"parameters": "all", "confidence": None, "how": "vmap"},
    ],
)
def test_measure_is_repeatable_and_leaves_the_model(trained, settings):
    model, loader, initial = trained
    before = snapshot(model)
    small = {"samples": 3, "iterations": 5, "ascent_steps": 3, "batches": 2, "seed": 3}
    report = sharpness.measure(model, loader, initial, **small, **settings)
    assert_untouched(model, before)
    again = sharpness.measure(model, loader, initial, **small, **settings)
    assert report.searches == again.searches
    assert report.measures == again.measures
    assert report.network["images"] == 128
    assert report.cost["backward_passes"] > 0
    assert all(value > 0 for value in report.measures.values())
    subject = Subject(model, report.settings["weights"], report.settings["parameters"])
    assert report.network["omega"] == sum(w.numel() for w in subject.values)


def test_norms_count_layers_or_everything_and_the_init_goes_through_the_quantizers(trained):
    model, loader, initial = trained
    small = {"samples": 1, "iterations": 1, "ascent_steps": 0}
    latent = sharpness.measure(model, loader, initial, **small).network
    square = sum(
        p.square().sum().item() for n, p in model.named_parameters() if n[0] in "036" and "quantizer" not in n
    )
    assert latent["norm"] == pytest.approx(square**0.5, rel=1e-6)
    everything = sharpness.measure(model, loader, initial, parameters="all", **small).network
    assert everything["omega"] == latent["omega"] + 16
    start = small_net()
    start.load_state_dict(initial)
    pairs = [(model[i], start[i]) for i in (0, 3, 6)]
    moved = sum(
        (a.quantized_weight() - b.quantized_weight()).square().sum() + (a.bias - b.bias).square().sum()
        for a, b in pairs
    )
    quantized = sharpness.measure(model, loader, initial, weights="quantized", **small).network
    assert quantized["distance"] == pytest.approx(moved.item() ** 0.5, rel=1e-5)


def test_an_early_end_does_not_change_the_path(trained):
    model, loader, initial = trained
    small = {"samples": 4, "ascent_steps": 2}
    certain = sharpness.measure(model, loader, initial, confidence=None, **small)
    likely = sharpness.measure(model, loader, initial, **small)
    for name in certain.searches:
        ways = [[(p["size"], p["verdict"]) for p in r.searches[name]["path"]] for r in (certain, likely)]
        assert ways[0] == ways[1]
    assert likely.cost["forward_passes"] < certain.cost["forward_passes"]


class Stops:
    """A loader that is interrupted at its second pass."""

    def __init__(self, loader):
        self.loader, self.passes = loader, 0

    def __iter__(self):
        self.passes += 1
        yield self.loader[0]
        if self.passes > 1:
            raise KeyboardInterrupt
        yield self.loader[1]


def test_interrupted_measures_leave_the_model(trained, monkeypatch):
    model, loader, initial = trained
    monkeypatch.setattr("qkernels.sharpness.data._IN_MEMORY", 0)
    model.train()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        sharpness.measure(model, Stops(loader), initial)
    with pytest.raises(KeyboardInterrupt):
        sharpness.linf_sharpness(model, Stops(loader), F.cross_entropy)
    assert_untouched(model, before)
    model.eval()


def test_a_loader_too_big_to_keep_must_repeat_itself(trained, monkeypatch):
    model, loader, initial = trained
    small = {"samples": 2, "iterations": 3, "ascent_steps": 0, "confidence": None}
    kept = sharpness.measure(model, loader, initial, **small)
    monkeypatch.setattr("qkernels.sharpness.data._IN_MEMORY", 0)
    streamed = sharpness.measure(model, loader, initial, **small)
    assert [s["size"] for s in kept.searches.values()] == [s["size"] for s in streamed.searches.values()]

    class Shuffled:
        def __iter__(self):
            order = torch.randperm(64)
            yield loader[0][0][order], loader[0][1][order]

    with pytest.raises(RuntimeError, match="loader gives other batches at each pass"):
        list(Data(Shuffled(), "cpu"))


def test_converted_networks_have_quantized_weights_only(trained):
    model, loader, initial = trained
    integer = qk.convert_(copy.deepcopy(model))
    small = {"samples": 2, "iterations": 2, "ascent_steps": 1, "weights": "quantized"}
    report = sharpness.measure(integer, loader, initial, **small)
    assert report.searches == sharpness.measure(model, loader, initial, **small).searches
    with pytest.raises(ValueError, match="weights='latent': layer 0 is converted to integers"):
        sharpness.measure(integer, loader, initial)


def test_report_is_written_read_shown_and_continued(trained, tmp_path, monkeypatch):
    model, loader, initial = trained
    path, small = tmp_path / "report.json", {"samples": 2, "iterations": 3, "ascent_steps": 1}
    expected = sharpness.measure(model, loader, initial, **small)
    seen = []

    def stop(search, step, steps):
        seen.append(search)
        if search == "alpha":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharpness.measure(model, loader, initial, out=path, progress=stop, **small)
    assert set(seen) == {"sigma", "sigma_mag", "alpha"}
    seen.clear()
    report = sharpness.measure(
        model, loader, initial, out=path, progress=lambda *a: seen.append(a[0]), **small
    )
    assert set(seen) == {"alpha", "alpha_mag"}
    assert report.searches == expected.searches
    read = sharpness.Report.from_json(path)
    assert read == report
    assert "sharpness_mag_orig" in str(read) and report.to_json() == path.read_text()
    for damaged in ("[]", path.read_text()[:50]):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="path must be the Report of a to_json"):
            sharpness.Report.from_json(path)


def test_another_network_is_measured_anew(trained, tmp_path):
    model, loader, initial = trained
    settings = {"samples": 2, "iterations": 3, "ascent_steps": 1}
    sharpness.measure(model, loader, initial, out=tmp_path / "report.json", **settings)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[6].weight.mul_(3)
    found = sharpness.measure(other, loader, initial, out=tmp_path / "report.json", **settings)
    assert found.searches == sharpness.measure(other, loader, initial, **settings).searches


def test_other_outputs_than_logits_are_named():
    model = nn.Conv2d(1, 3, 1)
    with pytest.raises(
        ValueError, match=r"logits \(N, classes\), and integer labels \(N,\); got \(4, 3, 2, 2\) and"
    ):
        sharpness.measure(model, [(torch.randn(4, 1, 2, 2), torch.zeros(4, 2, 2).long())], model, samples=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int"}, "weights must be one of 'latent', 'quantized', got 'int'"),
        ({"noise": "sigma"}, "noise must be one of 'std', 'variance'"),
        ({"samples": 0}, "samples must be an int >= 1, got 0"),
        ({"tolerance": -1.0}, "tolerance must be a positive number, got -1.0"),
        ({"batches": 0}, "batches must be None or an int >= 1, got 0"),
        ({"how": "fast"}, "how must be one of"),
        ({"initial": None}, "initial must be the state dict at initialisation"),
        (
            {"initial": {"0.weight": torch.zeros(2)}},
            r"initial must hold 0.weight of shape \(8, 1, 3, 3\), got \(2,\)",
        ),
        ({"loader": []}, "loader gave no batch"),
    ],
)
def test_bad_arguments(trained, settings, message):
    model, loader, initial = trained
    with pytest.raises(ValueError, match=message):
        sharpness.measure(model, **{"loader": loader, "initial": initial, **settings})


def test_linf_of_a_linear_loss_is_known():
    model = nn.Linear(3, 1, bias=False)
    x = torch.tensor([[1.0, -2.0, 3.0]])
    criterion = lambda y, target: y.mean()  # noqa: E731
    found = sharpness.linf_sharpness(model, [(x, torch.zeros(1))], criterion, rho=0.01, steps=4)
    assert found.difference == pytest.approx(0.01 * 6, rel=1e-4)
    assert found.keskar == pytest.approx(100 * found.difference / (1 + found.loss))
    relative = sharpness.linf_sharpness(
        model, [(x, torch.zeros(1))], criterion, rho=0.01, steps=4, ball="magnitude"
    )
    reach = (0.01 * (model.weight.abs() + 1) * x.abs()).sum().item()
    assert relative.difference == pytest.approx(reach, rel=1e-4)


@pytest.mark.parametrize("weights", ["latent", "quantized"])
def test_linf_grows_with_the_box_and_stays_in_it(trained, weights, monkeypatch):
    model, loader, _ = trained
    before, farthest = snapshot(model), [0.0]
    real = Subject.gradient

    def watched(self, values, *rest):
        moves = [(p - w).abs().max().item() for p, w in zip(values, self.values, strict=True)]
        farthest[0] = max(farthest[0], *moves)
        return real(self, values, *rest)

    monkeypatch.setattr(Subject, "gradient", watched)
    small = sharpness.linf_sharpness(model, loader, F.cross_entropy, rho=5e-4, steps=5, weights=weights)
    assert 0 < farthest[0] <= 5e-4 * (1 + 1e-3)
    large = sharpness.linf_sharpness(model, loader, rho=1e-2, steps=5, restarts=2, weights=weights)
    assert 0 <= small.difference < large.difference
    assert large.loss == pytest.approx(
        sum(F.cross_entropy(model(x), t).item() for x, t in loader) / 4, rel=1e-4
    )
    assert large.worst == max(max(path) for path in large.losses)
    assert [len(path) for path in large.losses] == [6, 6]
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="rho must be a positive number, got 0"):
        sharpness.linf_sharpness(model, loader, rho=0)


def test_linf_is_of_the_mean_over_images(trained):
    model, loader, _ = trained
    x, target = (torch.cat(parts)[:50] for parts in zip(*loader))
    uneven = list(zip(x.split(40), target.split(40)))
    found, whole = (sharpness.linf_sharpness(model, d, rho=1e-2, steps=2) for d in (uneven, [(x, target)]))
    assert found.loss == pytest.approx(F.cross_entropy(model(x), target).item(), rel=1e-5)
    assert found.losses[0] == pytest.approx(whole.losses[0], rel=1e-4)


def test_the_relative_l2_ball_is_kept():
    w, p = torch.tensor([2.0, 0.5, 0.0]), torch.tensor([4.0, 1.0, 1.0])
    (found,) = _project_l2([p], [w], 0.1, magnitude=True)
    assert found[2] == 0 and (found / w - 1)[:2].norm().item() == pytest.approx(0.1)


def test_a_network_that_diverged_is_refused(trained):
    model, loader, initial = trained
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[6].bias.fill_(math.nan)
    with pytest.raises(ValueError, match="model has a loss of inf on these images"):
        sharpness.measure(broken, loader, initial)
