"""What `qkernels measure` measures on: random images, published corruptions, the settings of its searches."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from loading import batches, same, write_folder
from tiny import SHORT

from qkernels import sharpness
from qkernels.cli import main
from qkernels.corruptions import CORRUPTIONS
from qkernels.models import build_model
from qkernels.training.data import build_data


def test_a_sample_is_random_images_in_the_loaders_order(tmp_path):
    root = write_folder(tmp_path, per_class=4)
    for data in (build_data("digits", 16), build_data(f"folder:{root}", 2, image_size=8, workers=0)):
        whole, loader = batches(data.train_eval), data.train_eval.sample(2, seed=1)
        assert len(loader) == 2 and same(batches(loader), batches(loader))
        everything = [tuple(x.flatten().tolist()) for x in torch.cat([x for x, _ in whole])]
        places = [
            everything.index(tuple(x.flatten().tolist())) for x in torch.cat([x for x, _ in batches(loader)])
        ]
        assert places == sorted(set(places)) and len(places) == 2 * data.train_eval.batch_size
        assert places != list(range(len(places)))  # the first of a folder are those of its first classes
        assert not same(batches(loader), batches(data.train_eval.sample(2, seed=2)))
        assert data.train_eval.sample(10**6) is data.train_eval and same(whole, batches(data.train_eval))


@pytest.fixture
def published(tmp_path):
    """(folder of a set like CIFAR-10-C, its test data, a model)."""
    random = np.random.default_rng(0)
    for name in CORRUPTIONS[:2]:
        np.save(tmp_path / f"{name}.npy", random.integers(0, 256, (5 * 6, 32, 32, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.tile(np.arange(6, dtype=np.uint8), 5))
    data = dataclasses.replace(build_data("fake:3x32x32:10", 4), name="cifar10")
    torch.manual_seed(0)
    return tmp_path, data, build_model("nin_d1_w1", 10, 3).eval()


def test_published_corruptions_are_read_and_normalised(published):
    folder, data, model = published
    found = sharpness.generalization(model, data, CORRUPTIONS[:2], (1, 4), published=folder)
    assert json.loads(json.dumps(found)) == found, "JSON-ready"
    for name in CORRUPTIONS[:2]:
        for severity in (1, 4):
            images = np.load(folder / f"{name}.npy")[6 * severity - 6 : 6 * severity].transpose(0, 3, 1, 2)
            x = (torch.from_numpy(images.copy()).float() - data.test.mean) / data.test.std
            wanted = torch.nn.functional.cross_entropy(model(x), torch.arange(6)).item()
            assert found["corrupted"][name][str(severity)]["loss"] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="corruptions were measured with .* before, not None"):
        sharpness.generalization(model, data, CORRUPTIONS[:2], (1, 4), done=found)


def test_published_corruptions_of_other_data_are_refused(published, tmp_path):
    folder, data, model = published
    with pytest.raises(ValueError, match="corrupted sets of CIFAR and ImageNet, not of digits"):
        sharpness.generalization(
            model, dataclasses.replace(data, name="digits"), CORRUPTIONS[:1], (1,), published=folder
        )
    for kind in ("ant", "bee"):
        (tmp_path / CORRUPTIONS[0] / "1" / kind).mkdir(parents=True)
        pytest.importorskip("PIL.Image").new("RGB", (32, 32)).save(
            tmp_path / CORRUPTIONS[0] / "1" / kind / "a.png"
        )
    imagenet = dataclasses.replace(data, name="folder")
    with pytest.raises(ValueError, match="has 2 classes, the run's data 10"):
        sharpness.generalization(model, imagenet, CORRUPTIONS[:1], (1,), published=folder)
    two = dataclasses.replace(imagenet, num_classes=2)
    found = sharpness.generalization(model, two, CORRUPTIONS[:1], (1,), published=folder)
    assert np.isfinite(found["corrupted"][CORRUPTIONS[0]]["1"]["loss"])


def test_the_searches_settings_reach_them_and_are_remembered(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert main(["train", "--recipe", "float", "--out", str(run), "--epochs", "1", *SHORT]) == 0
    given = []

    class Asked(Exception):
        pass

    def asked(*args, **settings):
        given.append(settings)
        raise Asked

    monkeypatch.setattr("qkernels.sharpness.measure_command.measure", asked)
    flags = ["--over", "mean", "--ball", "l2", "--target", "loss", "--parameters", "all"]
    assert main(["measure", str(run), "--quick", "--quiet", *flags]) == 1
    wanted = {"over": "mean", "ball": "l2", "target": "loss", "parameters": "all"}
    assert {key: given[0][key] for key in wanted} == wanted
    settings = json.loads((run / "measures.json").read_text())["settings"]
    assert {key: settings[key] for key in wanted} == wanted
    assert main(["measure", str(run), "--quick", "--quiet"]) == 2
    assert "over mean instead of worst, ball l2 instead of linf" in capsys.readouterr().err


def test_the_trace_follows_the_epochs_that_were_kept(tmp_path, monkeypatch):
    run = tmp_path / "run"
    command = ["train", "--recipe", "float", "--out", str(run), "--epochs", "5", "--keep-every", "2", *SHORT]
    assert main(command) == 0
    assert [path.name for path in sorted((run / "epochs").iterdir())] == [
        "00002.safetensors",
        "00004.safetensors",
    ]
    monkeypatch.setattr("qkernels.sharpness.measure_command.Run.kind", lambda *_: None)
    assert main(["measure", str(run), "--figures", "--quick", "--batches", "1", "--quiet"]) == 0
    figures = json.loads((run / "measures.json").read_text())["figures"]
    assert [found["epochs"] for found in figures["hessian_trace"]["runs"].values()] == [[0, 2, 4, 5]]


def test_every_result_is_written_and_read_back(tmp_path):
    torch.manual_seed(0)
    model, loader = torch.nn.Linear(6, 3), [(torch.randn(8, 6), torch.randint(3, (8,)))]
    found = sharpness.hessian(model, loader, top=1, trace_samples=2, density_probes=1, density_steps=3)
    box = sharpness.linf_sharpness(model, loader, steps=2)
    for result in (found, found.density, box):
        again = type(result).from_json(result.to_json(tmp_path / "result.json"))
        assert again.to_dict() == result.to_dict() and type(again) is type(result)
    assert type(sharpness.Hessian.from_json(found.to_json(tmp_path / "h.json")).density) is type(
        found.density
    )
