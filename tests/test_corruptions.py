"""The 15 corruptions: their contract on every case, the published constants, the readers."""

import pickle

import numpy as np
import pytest
import torch
from photographs import photographs

from qkernels import corruptions
from qkernels.corruptions import CORRUPTIONS, GROUPS, RANDOM, SEVERITIES, corrupt, parameters
from qkernels.corruptions import apply as applied

Image = pytest.importorskip("PIL.Image", reason="jpeg_compression needs Pillow")

# Where the published constants themselves do not grow: the mean distortion may fall from one severity to the
# next.
NOT_MONOTONE = {
    32: {"glass_blur", "motion_blur", "frost", "elastic_transform", "pixelate"},
    80: {"glass_blur", "frost", "fog", "elastic_transform"},
}


@pytest.fixture(scope="module")
def batches():
    # 80 pixels already take the ImageNet constants.
    return {32: photographs(8, 32), 80: photographs(3, 80)}


def distortion(name, severity, x):
    x = x.astype(np.float32) / 255
    return float(np.sqrt(np.square(corrupt(x, name, severity) - x).mean()))


def test_there_are_fifteen_in_four_groups():
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 15
    assert {group: len(names) for group, names in GROUPS.items()} == {
        "noise": 3,
        "blur": 4,
        "weather": 4,
        "digital": 4,
    }
    assert set(applied.APPLY) == set(CORRUPTIONS) >= RANDOM


@pytest.mark.parametrize("side", [32, 80])
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_contract(batches, side, name, severity):
    x = batches[side]
    before = x.copy()
    out = corrupt(x, name, severity)
    assert type(out) is np.ndarray and out.dtype == np.uint8 and out.shape == x.shape
    assert np.array_equal(x, before)
    assert all((a != b).any() for a, b in zip(out, x, strict=True))
    assert np.array_equal(out, corrupt(x, name, severity))

    tensor = torch.from_numpy(x)
    assert torch.equal(corrupt(tensor, name, severity), torch.from_numpy(out))

    real = tensor.double().div(255).float()
    result = corrupt(real, name, severity)
    assert result.dtype == torch.float32 and result.shape == real.shape
    assert result.min() >= 0 and result.max() <= 1
    assert (result * 255 - torch.from_numpy(out).float()).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_result_does_not_depend_on_the_batch(batches, name, monkeypatch):
    for side, severity in ((32, 5), (80, 3)):
        x = batches[side].astype(np.float32) / 255
        whole = corrupt(x, name, severity, seed=3, start=10)
        parts = [corrupt(x[i : i + 2], name, severity, seed=3, start=10 + i) for i in range(0, len(x), 2)]
        assert np.array_equal(whole, np.concatenate(parts))
        monkeypatch.setattr(applied, "CHUNK", 3 * x[0].size)
        assert np.array_equal(whole, corrupt(x, name, severity, seed=3, start=10))
        monkeypatch.undo()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_and_the_index_matter_to_random_ones_only(batches, name):
    x = np.repeat(batches[32][:1], 2, axis=0)
    a, b = corrupt(x, name, 4, seed=1), corrupt(x, name, 4, seed=2)
    assert np.array_equal(a, b) == (name not in RANDOM)
    assert np.array_equal(a[0], a[1]) == (name not in RANDOM)


def test_corruptions_images_and_seeds_draw_different_numbers():
    streams = [(seed, name, start) for seed in (0, 1) for name in sorted(RANDOM) for start in (0, 1)]
    first = [applied._generators(*stream, 1)[0].random() for stream in streams]
    assert len(set(first)) == len(streams)


@pytest.mark.parametrize("side", [32, 80])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_distortion_grows_with_severity(batches, side, name):
    values = [distortion(name, severity, batches[side]) for severity in SEVERITIES]
    assert min(values) > 0.004
    if name not in NOT_MONOTONE[side]:
        assert all(np.diff(values) > 0), values
    elif name != "elastic_transform":
        assert values[4] > values[0], values


def test_elastic_transform_is_published_with_falling_displacements(batches):
    assert [parameters("elastic_transform", s, 32, 32)[2] for s in SEVERITIES] == pytest.approx(
        [2.56, 2.24, 1.92, 1.6, 0.96]
    )
    assert distortion("elastic_transform", 1, batches[32]) > distortion("elastic_transform", 5, batches[32])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_grey_rectangular_and_half_precision_images(name):
    x = torch.from_numpy(photographs(2, 40, channels=1)[:, :, :24]).half() / 255
    out = corrupt(x, name, 3)
    assert out.dtype == torch.float16 and out.shape == (2, 1, 24, 40) and not torch.equal(out, x)
    assert corrupt(x[:0], name, 3).shape == (0, 1, 24, 40)
    assert corrupt(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), name, 3).shape == (1, 3, 8, 8)


def test_strided_bfloat16_and_double_inputs(batches):
    x = torch.from_numpy(batches[32])
    nhwc = x.to(memory_format=torch.channels_last)
    assert torch.equal(corrupt(nhwc, "motion_blur", 2), corrupt(x, "motion_blur", 2))
    assert torch.equal(corrupt(x[::2], "contrast", 2), corrupt(x, "contrast", 2)[::2])
    for dtype in (torch.bfloat16, torch.float64):
        assert corrupt((x / 255).to(dtype), "fog", 2).dtype == dtype


# ---- the published constants


# fmt: off
PUBLISHED = {  # of make_cifar_c.py, of make_imagenet_c.py
    "gaussian_noise": ([0.04, 0.06, 0.08, 0.09, 0.10], [0.08, 0.12, 0.18, 0.26, 0.38]),
    "shot_noise": ([500, 250, 100, 75, 50], [60, 25, 12, 5, 3]),
    "impulse_noise": ([0.01, 0.02, 0.03, 0.05, 0.07], [0.03, 0.06, 0.09, 0.17, 0.27]),
    "defocus_blur": ([(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
                     [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)]),
    "glass_blur": ([(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
                   [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)]),
    "motion_blur": ([(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
                    [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)]),
    "zoom_blur": ([(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
                  [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)]),
    "snow": ([(0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
              (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)],
             [(0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
              (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)]),
    "frost": ([(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
              [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)]),
    "fog": ([(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
            [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)]),
    "brightness": ([0.05, 0.1, 0.15, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]),
    "contrast": ([0.75, 0.5, 0.4, 0.3, 0.15], [0.4, 0.3, 0.2, 0.1, 0.05]),
    "elastic_transform": ([(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
                          [(2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)]),
    "pixelate": ([0.95, 0.9, 0.85, 0.75, 0.65], [0.6, 0.5, 0.4, 0.3, 0.25]),
    "jpeg_compression": ([80, 65, 58, 50, 40], [25, 18, 15, 10, 7]),
}
# fmt: on


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_published_constants(name):
    for side, unit, published in zip((32, 224), (32, 244), PUBLISHED[name]):
        unit = unit if name == "elastic_transform" else 1
        expected = [tuple(unit * v for v in (row if type(row) is tuple else (row,))) for row in published]
        assert [parameters(name, severity, side, side) for severity in SEVERITIES] == expected


def test_the_shorter_side_chooses_the_constants():
    assert parameters("contrast", 1, 64, 500) == parameters("contrast", 1, 32, 32)
    assert parameters("contrast", 1, 65, 65) == parameters("contrast", 1, 224, 224)


# ---- bad input


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"name": "gaussian"},
            ValueError,
            "name='gaussian' is not a corruption; accepted: gaussian_noise, shot_noise",
        ),
        ({"name": 3}, ValueError, "name=3"),
        ({"severity": 0}, ValueError, "severity=0 is not accepted; accepted: the integers 1, 2, 3, 4, 5"),
        ({"severity": 6}, ValueError, "severity=6"),
        ({"severity": 2.0}, ValueError, "severity=2.0"),
        ({"severity": True}, ValueError, "severity=True"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": 0.5}, TypeError, "seed=0.5 is a float; accepted: an integer"),
        ({"start": -2}, ValueError, "start=-2"),
        ({"images": [1]}, TypeError, r"images is a list; accepted: torch.Tensor, numpy.ndarray"),
        ({"images": torch.zeros(3, 32, 32)}, ValueError, r"shape \(3, 32, 32\); accepted: \(N, C, H, W\)"),
        ({"images": torch.zeros(1, 4, 32, 32)}, ValueError, r"shape \(1, 4, 32, 32\)"),
        ({"images": torch.zeros(1, 32, 32, 3)}, ValueError, "with C 1 or 3"),
        ({"images": np.zeros((1, 3, 7, 32))}, ValueError, "at least 8"),
        (
            {"images": torch.zeros(1, 3, 32, 32, dtype=torch.int64)},
            TypeError,
            "dtype torch.int64; accepted: uint8",
        ),
        ({"images": np.zeros((1, 3, 32, 32), np.int32)}, TypeError, "dtype int32"),
        (
            {"images": torch.full((1, 3, 32, 32), 255.0)},
            ValueError,
            "values from 255 to 255; accepted: 0 to 1",
        ),
        ({"images": torch.full((1, 3, 32, 32), float("nan"))}, ValueError, "values from nan to nan"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"images": torch.zeros(1, 3, 32, 32), "name": "fog", "severity": 1} | change
    with pytest.raises(error, match=message):
        corrupt(**arguments)


# ---- readers


def write_cifar_c(directory, count=3):
    images = np.random.default_rng(0).integers(0, 256, (5 * count, 32, 32, 3), dtype=np.uint8)
    np.save(directory / "fog.npy", images)
    np.save(directory / "labels.npy", np.tile(np.arange(count, dtype=np.uint8), 5))
    return images


def test_load_cifar_c(tmp_path):
    stored = write_cifar_c(tmp_path)
    for severity in SEVERITIES:
        images, labels = corruptions.load_cifar_c(tmp_path, "fog", severity)
        assert images.dtype == torch.uint8 and images.shape == (3, 3, 32, 32) and images.is_contiguous()
        expected = stored[3 * severity - 3 : 3 * severity].transpose(0, 3, 1, 2)
        assert np.array_equal(images.numpy(), expected)
        assert labels.dtype == torch.int64 and labels.tolist() == [0, 1, 2]


def test_load_cifar_c_says_what_is_wrong(tmp_path):
    load = corruptions.load_cifar_c
    with pytest.raises(FileNotFoundError, match="directory .*none does not exist"):
        load(tmp_path / "none", "fog", 1)
    with pytest.raises(FileNotFoundError, match=r"fog.npy does not exist; .* holds no .npy file"):
        load(tmp_path, "fog", 1)
    write_cifar_c(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"snow.npy does not exist; .* holds fog.npy, labels.npy"):
        load(tmp_path, "snow", 1)
    with pytest.raises(ValueError, match="name='rain'"):
        load(tmp_path, "rain", 1)
    with pytest.raises(ValueError, match="severity=9"):
        load(tmp_path, "fog", 9)
    np.save(tmp_path / "labels.npy", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"labels.npy .* holds uint8 \(3,\); accepted: integers \(15,\)"):
        load(tmp_path, "fog", 1)
    np.save(tmp_path / "snow.npy", np.zeros((5, 3, 32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"accepted: uint8 \(5 N, 32, 32, 3\)"):
        load(tmp_path, "snow", 1)
    np.save(tmp_path / "frost.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "contrast.npy").write_bytes(pickle.dumps(np.zeros(5)))
    np.savez(tmp_path / "pixelate.npz", np.zeros(5))
    (tmp_path / "pixelate.npz").rename(tmp_path / "pixelate.npy")
    for name in ("frost", "contrast", "pixelate"):
        with pytest.raises(ValueError, match=rf"{name}.npy is not a complete .npy array"):
            load(tmp_path, name, 1)
    (tmp_path / "fog.npy").write_bytes((tmp_path / "fog.npy").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"fog.npy is not a complete .npy array"):
        load(tmp_path, "fog", 1)


def test_imagenet_c(tmp_path):
    for label, name in enumerate(("n01", "n02")):
        folder = tmp_path / "fog" / "3" / name
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 12), (200 * label, 0, 0)).save(folder / f"{i}.JPEG")
    (tmp_path / "fog" / "3" / "n01" / "notes.txt").write_text("not an image")
    (tmp_path / "fog" / "3" / ".ipynb_checkpoints").mkdir()
    data = corruptions.ImageNetC(tmp_path, "fog", 3)
    assert len(data) == 4 and data.classes == ["n01", "n02"]
    assert [(path.name, label) for path, label in data.samples] == [
        ("0.JPEG", 0),
        ("1.JPEG", 0),
        ("0.JPEG", 1),
        ("1.JPEG", 1),
    ]
    images, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert images.shape == (4, 3, 12, 16) and images.dtype == torch.uint8 and labels.tolist() == [0, 0, 1, 1]
    assert images[2, 0].float().mean() > 190 and images[0].max() < 10
    sized = corruptions.ImageNetC(tmp_path, "fog", 3, transform=lambda image: image.size)
    assert sized[0] == ((16, 12), 0)
    (tmp_path / "fog" / "3" / "n00").mkdir()
    with pytest.raises(
        FileNotFoundError, match="has class folders without images: n00; accepted suffixes: .jpeg"
    ):
        corruptions.ImageNetC(tmp_path, "fog", 3)
    (tmp_path / "fog" / "3" / "n01" / "0.JPEG").write_bytes(b"\xff\xd8 truncated")
    with pytest.raises(ValueError, match=r"0.JPEG is not a complete image file"):
        data[0]


def test_imagenet_c_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist either"):
        corruptions.ImageNetC(tmp_path / "none", "fog", 1)
    (tmp_path / "weather").mkdir()
    with pytest.raises(FileNotFoundError, match="holds weather; expected some of gaussian_noise"):
        corruptions.ImageNetC(tmp_path, "fog", 1)
    (tmp_path / "fog" / "1").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds 1; expected 1, 2, 3, 4, 5"):
        corruptions.ImageNetC(tmp_path, "fog", 2)
    with pytest.raises(FileNotFoundError, match=r"holds no <class>/<image> file"):
        corruptions.ImageNetC(tmp_path, "fog", 1)


def test_without_pillow_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install qkernels\[train\]"):
        corrupt(torch.zeros(1, 3, 32, 32), "jpeg_compression", 1)
    assert corrupt(torch.zeros(1, 3, 32, 32), "snow", 1).shape == (1, 3, 32, 32)


def test_contact_sheet(tmp_path):
    for side, channels in ((32, 1), (80, 3)):
        path = corruptions.contact_sheet(photographs(1, side, channels)[0], tmp_path / f"{side}.png")
        with Image.open(path) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        assert pixels.shape[0] > 8 * 96 and pixels.shape[1] > 10 * 96
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
