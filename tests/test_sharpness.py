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
from qkernels.sharpness import formulas, search
from qkernels.sharpness.data import Data
from qkernels.sharpness.subject import Copies, Subject


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


def test_weights_before_and_after_the_quantizers(trained):
    model, loader, _ = trained
    x = loader[0][0]
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
def test_copies_see_images_of_their_own(trained, how):
    model, loader, _ = trained
    subject, x = Subject(model), loader[0][0]
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
    viewing = Viewing().requires_grad_(False)
    subject = Subject(viewing)
    for _ in range(2):
        logits = subject.logits(subject.effective(subject.values), x[:, :1])
        torch.testing.assert_close(logits, viewing(x[:, :1]))
    assert not subject.channels_last
    with pytest.raises(RuntimeError, match="size"):
        subject.logits(subject.effective(subject.values), x[..., :4])


@pytest.mark.parametrize("size, num", [(100, 4), (23, 4), (3, 4), (1000, 10), (7, 1)])
def test_shares_give_every_image_to_every_copy_once(size, num):
    x, target = torch.arange(size).float().view(size, 1), torch.arange(size)
    data = Data(list(zip(x.split(50), target.split(50), strict=True)), "cpu", seed=0)
    times, first = torch.zeros(num, size, dtype=torch.int64), []
    for index, images, labels in data.shares(num, lambda: 2 * times.sum().item() // num):
        assert torch.equal(images[..., 0], data.whole[0][index, 0]) and torch.equal(
            labels, data.whole[1][index]
        )
        times.scatter_add_(1, index, torch.ones_like(index))
        first.append(times.clone())
    assert (times == 1).all()
    covered = size // num * num
    assert size < num or any((t.sum(0)[:covered] == 1).all() for t in first), "the first turn is not a pass"


def test_converted_networks_have_quantized_weights_only(trained):
    model, loader, initial = trained
    integer = qk.convert_(copy.deepcopy(model))
    small = {"samples": 2, "iterations": 2, "ascent_steps": 1, "weights": "quantized"}
    report = sharpness.measure(integer, loader, initial, **small)
    assert report.searches == sharpness.measure(model, loader, initial, **small).searches
    with pytest.raises(ValueError, match="weights='latent': layer 0 is converted to integers"):
        sharpness.measure(integer, loader, initial)


def test_shared_weights_move_together():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    subject = Subject(model)
    assert subject.names == ["0.weight", "0.bias", "1.bias"]
    values = [w + 1 for w in subject.values]
    x = torch.randn(2, 4)
    expected = F.linear(F.linear(x, values[0], values[1]), values[0], values[2])
    torch.testing.assert_close(subject.logits(subject.effective(values), x), expected)


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
    assert "sharpness_mag_orig" in str(read)
    for damaged in ("[]", path.read_text()[:50]):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="path must be the Report of a to_json"):
            sharpness.Report.from_json(path)


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


def test_a_network_that_diverged_is_refused(trained):
    model, loader, initial = trained
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[6].bias.fill_(math.nan)
    with pytest.raises(ValueError, match="model has a loss of inf on these images"):
        sharpness.measure(broken, loader, initial)


class Table:
    """Copies whose predictions are given: right[k, i] for copy k and image i, the image's number being its pixel."""

    def __init__(self, right):
        self.right, self.num = right, len(right)

    def logits(self, x, own=False):
        index = x.flatten(-1).long().view(self.num if own else 1, -1).expand(self.num, -1)
        right = self.right.gather(1, index).float()
        return torch.stack([right, 1 - right], 2)


@pytest.mark.parametrize("worst", [False, True])
@pytest.mark.parametrize("confidence", [None, 4.0])
def test_a_step_that_ends_early_has_the_verdict_of_the_whole(worst, confidence):
    generator = torch.Generator().manual_seed(1)
    n, ended = 1000, 0
    x, target = torch.arange(n).float().view(n, 1), torch.zeros(n, dtype=torch.long)
    data = Data([(x[i : i + 100], target[i : i + 100]) for i in range(0, n, 100)], "cpu", seed=0)
    base = torch.rand(1, n, generator=generator) < 0.9
    scores = search.Scores.unperturbed(data, Table(base))["accuracy"]
    assert scores.mean == pytest.approx(base.double().mean().item())
    for _ in range(150):
        hard = torch.rand(n, generator=generator) * torch.rand(1, generator=generator)
        right = base & (torch.rand(5, n, generator=generator) > hard * 0.5)
        drops = base.double().mean() - right.double().mean(1)
        displacement = (drops.max() if worst else drops.mean()).item()
        rule = search.Rule(0.1, 0.01, worst, confidence)
        step = rule.evaluate(Table(right), scores, search.Counter())
        ended += step.decided != "complete"
        expected = "within" if abs(displacement - 0.1) < 0.01 else "above" if displacement > 0.1 else "below"
        assert step.verdict == expected
        assert (step.images == n) == (step.decided == "complete")
    assert ended > 60


def test_regression_gives_the_mean_of_images_not_seen():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    y = 0.3 + z @ torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    found = {}
    for name, known in (("none", z[:, :0]), ("constant", torch.ones_like(z)), ("all", z)):
        regression = search.Regression(known)
        regression.add(y[:30].T, torch.arange(30))
        regression.add(y[30:50].T, torch.arange(30, 50))
        found[name] = regression.mean()
    mean, variance = found["none"]
    assert mean.item() == pytest.approx(y[:50].mean().item())
    errors = (y[:50] - y[:50].mean()).square().sum().item()
    assert variance.item() == pytest.approx((errors + 2) / 49 * (1 - 50 / 200) / 50)
    assert found["constant"][0].item() == pytest.approx(mean.item())
    assert found["all"][0].item() == pytest.approx(y.mean().item(), abs=0.02)
    assert found["all"][1].item() < 0.2 * variance.item()


def test_shares_decide_with_fewer_passes_where_images_differ():
    """Displacements that mostly depend on the image: one pass over the shares says what many over a few images do."""
    generator, n, num = torch.Generator().manual_seed(5), 600, 10
    x, target = torch.arange(n).float().view(n, 1), torch.zeros(n, dtype=torch.long)
    data = Data(list(zip(x.split(100), target.split(100), strict=True)), "cpu", seed=0)
    scores = search.Scores("accuracy", data, torch.ones(n).double(), torch.zeros(n, 0).double())
    seen = complete = 0
    for _ in range(60):
        level = 0.05 + 0.12 * torch.rand(1, generator=generator)
        hard = torch.rand(1, n, generator=generator) < level
        right = torch.rand(num, n, generator=generator) >= hard * 0.9 + 0.01
        displacement = 1 - right.double().mean().item()
        step = search.Rule(0.1, 0.0100123).evaluate(Table(right), scores, search.Counter())
        assert step.verdict == search.Rule(0.1, 0.0100123).point(displacement)
        seen, complete = seen + step.images, complete + n
    assert seen < 0.4 * complete


def test_what_is_known_of_the_images_ends_steps_earlier():
    """Displacements that depend on what is known of an image, and the verdicts of the whole."""
    generator, n, seen = torch.Generator().manual_seed(2), 1000, {True: 0, False: 0}
    rank = torch.rand(n, generator=generator)
    x, target = torch.arange(n).float().view(n, 1), torch.zeros(n, dtype=torch.long)
    data = Data(list(zip(x.split(50), target.split(50), strict=True)), "cpu", seed=0)
    order = torch.cat([x for x, _ in data.kept]).flatten().long()
    for i in range(40):
        hard = (rank < i / 400).double()
        right = torch.rand(10, n, generator=generator) >= 0.9 * hard
        drop = 1 - right.double().mean().item()
        for informed in seen:
            known = hard[order, None] if informed else hard[:, None][:, :0]
            scores = search.Scores("accuracy", data, torch.ones(n, dtype=torch.float64), known)
            step = search.Rule(0.05, 0.00512345).evaluate(Table(right), scores, search.Counter())
            assert step.verdict == search.Rule(0.05, 0.00512345).point(drop)
            seen[informed] += step.images
    assert seen[True] < 0.9 * seen[False]


def test_a_complete_step_shortens_the_next_one_of_its_search():
    generator, n = torch.Generator().manual_seed(3), 1000
    x, target = torch.arange(n).float().view(n, 1), torch.zeros(n, dtype=torch.long)
    data = Data(list(zip(x.split(50), target.split(50), strict=True)), "cpu", seed=0)
    scores = search.Scores("accuracy", data, torch.ones(n).double(), torch.zeros(n, 0).double())
    right = torch.rand(1, n, generator=generator).expand(10, n) >= 0.1
    rule = search.Rule(1 - right.double().mean().item(), 1e-9)  # within: only a complete step can tell
    assert rule.evaluate(Table(right), scores, search.Counter()).decided == "complete"
    more = right & (torch.rand(1, n, generator=generator) >= 0.03)
    steps = [
        r.evaluate(Table(more), scores, search.Counter()) for r in (rule, search.Rule(rule.target, 1e-9))
    ]
    assert [s.verdict for s in steps] == ["above", "above"]
    assert steps[0].images < 0.8 * steps[1].images
