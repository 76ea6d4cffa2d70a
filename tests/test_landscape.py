"""The loss landscape, generalization under corruption, and `qkernels measure` on a real run."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import nn
from torch.func import functional_call

import qkernels as qk
from qkernels import sharpness
from qkernels.cli import main
from qkernels.corruptions import corrupt
from qkernels.models import build_model
from qkernels.random import normal
from qkernels.training import load_run, make_config, train
from qkernels.training.data import build_data


@pytest.fixture(scope="module")
def net():
    """(model, loader): a small quantized net with some batch-norm statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x, target = torch.randn(48, 1, 4, 4), torch.arange(48) % 3
    loader = list(zip(x.split(20), target.split(20), strict=True))
    model = qk.calibrate(qk.quantize_(model, qk.QConfig(weight_bits=4, act_bits=4)), loader, 2)
    model.train()(x)
    return model, loader


@pytest.mark.parametrize("weights", ["latent", "quantized"])
def test_every_point_is_the_loss_at_that_point(net, weights):
    model, loader = net
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = sharpness.landscape(model, loader, F.cross_entropy, 5, 0.5, weights=weights, seed=7, copies=4)
    assert found.at == [-0.5, -0.25, 0.0, 0.25, 0.5]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    x, target = (torch.cat(t) for t in zip(*loader, strict=True))
    model.eval()
    logits = model(x)
    assert found.loss[2][2] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert found.accuracy[2][2] == pytest.approx((logits.argmax(1) == target).double().mean().item())
    if weights == "quantized":
        return
    state = {}
    for t, (name, w) in enumerate(
        (n, p) for n, p in model.named_parameters() if n in ("0.weight", "0.bias", "4.weight", "4.bias")
    ):
        state[name] = w.detach().clone()
        for k, at in enumerate((0.25, -0.5)):
            d = normal(torch.tensor([7]), (k << 32) + t, w.numel()).view(w.shape)
            if w.dim() > 1:
                flat = d.flatten(1) * (w.detach().flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1))[:, None]
                state[name] += at * flat.view(w.shape)
    expected = F.cross_entropy(functional_call(model, state, (x,)), target).item()
    assert found.loss[3][0] == pytest.approx(expected, rel=1e-4)


def test_latent_weights_give_terraces_and_quantized_ones_do_not(net):
    model, loader = net
    loss = {
        weights: sharpness.landscape(model, loader, size=21, span=1e-3, dimensions=1, weights=weights).loss
        for weights in ("latent", "quantized")
    }
    assert len(set(loss["latent"])) < len(set(loss["quantized"]))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_landscape_is_plotted_written_and_continued(net, tmp_path, monkeypatch, dimensions):
    model, loader = net
    settings = {"size": 5, "dimensions": dimensions, "copies": 2}
    whole = sharpness.landscape(model, loader, **settings)
    path = tmp_path / "landscape.json"
    monkeypatch.setattr("qkernels.sharpness.surface._WRITE_EVERY", 0.0)

    def stop(what, done, of):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharpness.landscape(model, loader, out=path, progress=stop, **settings)
    kept = json.loads(path.read_text())
    assert len(kept["points"]) == 2
    kept["settings"]["unperturbed"][0] *= 1 + 1e-6  # rounded otherwise, on another machine
    path.write_text(json.dumps(kept))
    seen = []
    found = sharpness.landscape(model, loader, out=path, progress=lambda w, d, n: seen.append(d), **settings)
    assert seen[0] == 4
    assert found == whole == sharpness.Landscape.from_json(path)
    seen.clear()
    assert (
        sharpness.landscape(model, loader, out=path, progress=lambda *a: seen.append(a), **settings) == whole
    )
    assert seen == []
    picture = found.plot(tmp_path / "landscape.png")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 5000


def test_other_images_or_another_criterion_are_measured_anew(net, tmp_path):
    model, loader = net
    others = [(x.flip(0) + 0.1, target) for x, target in loader]
    call = {"size": 3, "out": tmp_path / "landscape.json"}
    first = sharpness.landscape(model, loader, **call)
    tenfold = sharpness.landscape(model, loader, lambda y, t: 10 * F.cross_entropy(y, t), **call)
    assert tenfold.loss[0][0] == pytest.approx(10 * first.loss[0][0])
    other = sharpness.landscape(model, others, **call)
    assert other == sharpness.landscape(model, others, size=3) != first


def test_given_directions_are_taken_as_they_are(tmp_path):
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    data = [(torch.randn(16, 4), torch.randint(0, 3, (16,)))]
    towards = {name: b.state_dict()[name] - w for name, w in a.state_dict().items()}
    found = sharpness.landscape(a, data, size=3, dimensions=1, directions=towards, out=tmp_path / "l.json")
    for model, loss in zip((b, a), found.loss[::-1][:2], strict=True):
        assert loss == pytest.approx(F.cross_entropy(model(data[0][0]), data[0][1]).item(), rel=1e-5)
    other = {name: -t for name, t in towards.items()}
    again = sharpness.landscape(a, data, size=3, dimensions=1, directions=[other], out=tmp_path / "l.json")
    assert again.loss == pytest.approx(found.loss[::-1], rel=1e-5)
    for wrong, message in (
        ([towards, other], "must be 1 dict"),
        ({"0.weight": towards["0.weight"]}, "0.bias is not as it should be"),
        ({**towards, "2.bias": torch.zeros(2)}, "2.bias is not as it should be"),
    ):
        with pytest.raises(ValueError, match=message):
            sharpness.landscape(a, data, size=3, dimensions=1, directions=wrong)


def test_the_picture_has_the_first_direction_across(net, tmp_path, monkeypatch):
    drawn, contour = [], Axes.contour
    monkeypatch.setattr(
        Axes, "contour", lambda *args, **how: (drawn.extend(args[1:]), contour(*args, **how))[1]
    )
    found = sharpness.landscape(*net, size=3)
    found.plot(tmp_path / "landscape.png")
    first, second, loss = (torch.from_numpy(t).tolist() for t in drawn)
    assert first == [[at] * 3 for at in found.at] and second == [found.at] * 3
    assert loss == [[min(v, max(map(max, loss))) for v in row] for row in found.loss]


def test_one_point_is_no_picture(net, tmp_path):
    with pytest.raises(ValueError, match="a picture needs a landscape of size >= 2, got size 1"):
        sharpness.landscape(*net, size=1).plot(tmp_path / "landscape.png")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be an int >= 1, got 0"),
        ({"dimensions": 3}, "dimensions must be 1 or 2, got 3"),
        ({"span": 0.0}, "span must be a positive number, got 0.0"),
        ({"weights": "float"}, "weights must be one of"),
    ],
)
def test_bad_arguments(net, settings, message):
    with pytest.raises(ValueError, match=message):
        sharpness.landscape(*net, **settings)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "lsq"
    config = make_config(
        recipe="lsq", model="nin_d1_w1", data="digits", epochs=1, float_epochs=1, batch_size=128
    )
    train(config, out, quiet=True)
    return out


def test_generalization_under_corruption(run_dir):
    model, data, _ = load_run(run_dir)
    found = sharpness.generalization(model, data, ("contrast", "gaussian_noise"), (1, 5))
    result = json.loads((run_dir / "result.json").read_text())
    assert found["test_acc"] == pytest.approx(result["test_acc"])
    assert found["gap"] == pytest.approx(result["test_loss"] - result["train_loss"], rel=1e-3)
    cells = [found["corrupted"][n][s] for n in ("contrast", "gaussian_noise") for s in ("1", "5")]
    assert found["mean"]["all"]["loss"] == pytest.approx(sum(c["loss"] for c in cells) / 4)
    assert found["mean"]["5"]["gap"] == pytest.approx(found["mean"]["5"]["loss"] - found["train_loss"])
    assert len({c["loss"] for c in cells} | {found["test_loss"]}) == 5
    again = sharpness.generalization(model, data, ("contrast", "gaussian_noise"), (1, 5))
    assert again == found
    with pytest.raises(ValueError, match="corruptions must be 'all' or among .*; got 'rain'"):
        sharpness.generalization(model, data, ("rain",))
    with pytest.raises(ValueError, match="severities must be among"):
        sharpness.generalization(model, data, ("fog",), (6,))


@pytest.mark.parametrize("spec, peak", [("digits", 16.0), ("fake:3x8x8:4", 255.0)])
def test_corruptions_are_of_the_pixels_by_their_index(spec, peak):
    data = build_data(spec, 50)
    test, model = data.test, build_model("nin_d1_w1", data.num_classes, data.in_channels, 8).eval()
    found = sharpness.generalization(model, data, ("gaussian_noise",), (3,), seed=7)
    x = peak * corrupt(test.images.float() / peak, "gaussian_noise", 3, seed=7)
    with torch.no_grad():
        loss = F.cross_entropy(model((x - test.mean) / test.std), test.targets).item()
    assert found["corrupted"]["gaussian_noise"]["3"]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "shape, target", [((6, 4, 5, 5), (6, 5, 5)), ((6, 7, 4), (6, 7)), ((6, 4), (6,)), ((6, 3), None)]
)
def test_accuracy_of_outputs_of_any_shape(shape, target):
    """Classes lie in axis 1, or in the last; a regression has none."""
    out = torch.randn(shape)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Linear(1, 1)
            self.scale.weight.data.fill_(1.0)

        def forward(self, x):
            return out * self.scale.weight.reshape(())

    axis = 1 if target is None or len(target) != 2 else 2
    y = torch.randn(shape) if target is None else torch.randint(0, 4, target)
    loss = F.mse_loss if target is None else lambda o, t: F.cross_entropy(o.movedim(axis, 1), t)
    found = sharpness.landscape(Net(), [(torch.zeros(6, 1), y)], loss, size=1, dimensions=1)
    want = None if target is None else (out.argmax(axis) == y).float().mean().item()
    assert found.accuracy[0] == (want if want is None else pytest.approx(want))


def test_layer_table(run_dir):
    model, _, _ = load_run(run_dir)
    rows = sharpness.layer_table(model)
    name, layer = qk.convert.layers(model)[1]
    row = next(r for r in rows if r["name"] == name)
    assert row["weight_bits"] == 4
    assert row["weight_step"] == pytest.approx(layer.weight_quantizer.scale.abs().mean().item())
    error = (layer.quantized_weight() - layer.weight).abs().mean().item()
    assert row["mean_error"] == pytest.approx(error)
    assert 0 < row["mean_error"] < row["weight_step"]


def test_the_error_is_that_of_the_standardised_weight():
    (layer,) = qk.quantize_(nn.Sequential(nn.Conv2d(3, 8, 3)), method="saq", act_bits=None)
    (row,) = sharpness.layer_table(layer)
    w = (layer.weight - layer.weight.mean()) / layer.weight.std()
    assert row["mean_error"] == pytest.approx((layer.quantized_weight() - w).abs().mean().item(), rel=1e-4)


def test_layer_table_of_a_float_network():
    """The norms of QGen's table 2 are compared with those of the float network."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2))
    rows = sharpness.layer_table(model)
    assert [row["name"] for row in rows] == ["0", "3"]
    for row, layer in zip(rows, (model[0], model[3]), strict=True):
        assert row["weight_norm"] == layer.weight.norm().item()
        assert row["weight_step"] is row["mean_error"] is row["input_bits"] is None
    partly = sharpness.layer_table(qk.quantize_(model, exclude=["3"]))
    assert [row["weight_bits"] for row in partly] == [8, None] and partly[1] == rows[1]


def test_measure_command(run_dir, capsys, monkeypatch):
    arguments = [
        "measure",
        str(run_dir),
        "--quick",
        "--batches",
        "1",
        "--weights",
        "both",
        "--noise",
        "variance",
        "--landscape",
        "--quiet",
    ]
    (run_dir / "measures.json").unlink(missing_ok=True)
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "sharpness_mag_orig" in text
    assert "Hessian of quantized weights" in text
    found = json.loads((run_dir / "measures.json").read_text())
    for kind in ("latent", "quantized"):
        assert set(found[f"linf_{kind}"]) == {"0.001", "0.0005"}
        assert found[f"bounds_{kind}"]["network"]["m"] == 1437
        assert found[f"bounds_{kind}"]["settings"]["noise"] == "variance"
        assert len(found[f"hessian_{kind}"]["trace_samples"]) == 8
        assert (run_dir / f"landscape_{kind}.png").stat().st_size > 5000
    assert {r["name"] for r in found["layers"]} == {n for n, _ in qk.convert.layers(load_run(run_dir)[0])}

    def never(*_, **__):
        raise AssertionError("measured again")

    for name in ("measure", "linf_sharpness", "hessian", "layer_table"):
        monkeypatch.setattr(f"qkernels.sharpness.measure_command.{name}", never)
    assert main(arguments) == 0
    assert capsys.readouterr().out == text


def test_a_landscape_is_named_after_its_weights(run_dir, monkeypatch):
    monkeypatch.setattr("qkernels.sharpness.measure_command.Run.kind", lambda *_: None)
    (run_dir / "measures.json").unlink(missing_ok=True)
    for kind in ("latent", "quantized"):
        (run_dir / f"landscape_{kind}.png").unlink(missing_ok=True)
        shared = ["--quick", "--batches", "1", "--landscape", "--quiet"]
        assert main(["measure", str(run_dir), "--weights", kind, *shared]) == 0
    assert all((run_dir / f"landscape_{kind}.png").exists() for kind in ("latent", "quantized"))


def test_measure_command_refuses(tmp_path, run_dir, capsys):
    assert main(["measure", str(tmp_path / "nothing")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["measure", str(run_dir), "--batches", "0"]) == 2
    assert "--batches: 0 is not a positive number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (["--quick", "--batches", "1", "--batch-size", "16"], "batch_size 128 instead of 16"),
        (["--quick", "--batches", "2"], "batches 1 instead of 2"),
        (["--quick", "--batches", "1", "--seed", "1"], "seed 0 instead of 1"),
        (["--quick", "--batches", "1", "--noise", "variance"], "noise std instead of variance"),
        (["--batches", "1"], "quick True instead of False"),
    ],
)
def test_measures_with_other_settings_are_kept(run_dir, capsys, monkeypatch, other, differs):
    path, partial = run_dir / "measures.json", run_dir / "bounds_latent.partial.json"
    path.unlink(missing_ok=True)
    monkeypatch.setattr("qkernels.sharpness.measure_command.Run.kind", lambda *_: None)
    command = ["measure", str(run_dir), "--quiet"]
    assert main([*command, "--quick", "--batches", "1"]) == 0
    before = path.read_text()
    assert main([*command, *other]) == 2
    assert f"measures.json holds measures with {differs}; --restart replaces them" in capsys.readouterr().err
    assert path.read_text() == before
    pictures = [run_dir / f"landscape_latent.{suffix}" for suffix in ("json", "png")]
    for old in (partial, *pictures):
        old.write_text("{}")
    assert main([*command, *other, "--restart"]) == 0
    assert json.loads(path.read_text())["settings"] != json.loads(before)["settings"]
    assert not any(old.exists() for old in (partial, *pictures))


def test_measure_command_is_interrupted_and_continued(run_dir, interrupted_codes):
    path = run_dir / "measures.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "qkernels", "measure", str(run_dir), "--threads", "1", "--corruptions"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode in interrupted_codes, error
    assert "interrupted" in error
    found = json.loads(path.read_text())["generalization"]
    assert 0 < len(found["corrupted"]) <= 15
