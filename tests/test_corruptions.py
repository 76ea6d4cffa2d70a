"""The 15 corruptions: their contract on every case, their arithmetic against oracles, the readers."""

import colorsys
import pickle

import numpy as np
import pytest
import torch

from qkernels import corruptions
from qkernels.corruptions import (
    CORRUPTIONS,
    GROUPS,
    RANDOM,
    SEVERITIES,
    corrupt,
    filters,
    parameters,
    textures,
)
from qkernels.corruptions import apply as applied

ndimage = pytest.importorskip("scipy.ndimage", reason="the oracles of the filters are SciPy's")
Image = pytest.importorskip("PIL.Image", reason="jpeg_compression needs Pillow")

# Where the published constants themselves do not grow: the mean distortion may fall from one severity to the
# next.
NOT_MONOTONE = {
    32: {"glass_blur", "motion_blur", "frost", "elastic_transform", "pixelate"},
    80: {"glass_blur", "frost", "fog", "elastic_transform"},
}


def photographs(count, side, channels=3):
    """Uint8 images with smooth colours, hard edges and a little texture."""
    rng = np.random.default_rng(side)
    y, x = np.mgrid[:side, :side] / side
    out = np.empty((count, channels, side, side))
    for image in out:
        for plane in image:
            a, b, phase = rng.uniform(-4, 4, 3)
            plane[:] = 0.5 + 0.3 * np.sin(a * x + b * y + phase)
        for _ in range(4):
            (top, left), radius = rng.uniform(0.15, 0.85, 2), rng.uniform(0.05, 0.25)
            inside = (y - top) ** 2 + (x - left) ** 2 < radius**2
            image[:, inside] = rng.uniform(0.05, 0.95, (channels, 1))
        image += rng.normal(0, 0.02, image.shape)
    return np.rint(np.clip(out, 0, 1) * 255).astype(np.uint8)


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


@pytest.mark.parametrize(
    "name, cifar, imagenet",
    [
        ("gaussian_noise", [0.04, 0.06, 0.08, 0.09, 0.10], [0.08, 0.12, 0.18, 0.26, 0.38]),
        ("shot_noise", [500, 250, 100, 75, 50], [60, 25, 12, 5, 3]),
        ("impulse_noise", [0.01, 0.02, 0.03, 0.05, 0.07], [0.03, 0.06, 0.09, 0.17, 0.27]),
        ("brightness", [0.05, 0.1, 0.15, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("contrast", [0.75, 0.5, 0.4, 0.3, 0.15], [0.4, 0.3, 0.2, 0.1, 0.05]),
        ("pixelate", [0.95, 0.9, 0.85, 0.75, 0.65], [0.6, 0.5, 0.4, 0.3, 0.25]),
        ("jpeg_compression", [80, 65, 58, 50, 40], [25, 18, 15, 10, 7]),
    ],
)
def test_published_scalars(name, cifar, imagenet):
    assert [parameters(name, s, 32, 32) for s in SEVERITIES] == [(c,) for c in cifar]
    assert [parameters(name, s, 224, 224) for s in SEVERITIES] == [(c,) for c in imagenet]


def test_published_tuples():
    assert parameters("glass_blur", 4, 32, 32) == (0.25, 1, 2)
    assert parameters("glass_blur", 5, 224, 224) == (1.5, 4, 2)
    assert parameters("motion_blur", 5, 32, 32) == (9, 2.5)
    assert parameters("motion_blur", 5, 224, 224) == (20, 15)
    assert parameters("snow", 3, 32, 32) == (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9)
    assert parameters("snow", 5, 224, 224) == (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)
    assert parameters("frost", 5, 32, 32) == (0.75, 0.45)
    assert parameters("fog", 3, 224, 224) == (2.5, 1.7)
    assert parameters("defocus_blur", 5, 224, 224) == (10, 0.5)
    assert parameters("elastic_transform", 1, 224, 224) == pytest.approx((488, 170.8, 24.4))


def test_the_shorter_side_chooses_the_constants():
    assert parameters("contrast", 1, 64, 500) == parameters("contrast", 1, 32, 32)
    assert parameters("contrast", 1, 65, 65) == parameters("contrast", 1, 224, 224)


# ---- arithmetic against oracles


def test_noise_has_the_published_size():
    grey = np.full((40, 3, 32, 32), 0.5, np.float32)
    for severity in SEVERITIES:
        sigma, photons, share = (parameters(name, severity, 32, 32)[0] for name in GROUPS["noise"])
        assert np.std(corrupt(grey, "gaussian_noise", severity)) == pytest.approx(sigma, rel=0.02)
        shot = corrupt(grey, "shot_noise", severity)
        assert shot.mean() == pytest.approx(0.5, abs=2e-3) and shot.var() == pytest.approx(
            0.5 / photons, rel=0.03
        )
        assert np.allclose(shot * photons, np.rint(shot * photons), atol=1e-3)
        impulse = corrupt(grey, "impulse_noise", severity)
        assert np.mean(impulse == 1) == pytest.approx(share / 2, rel=0.1)
        assert np.mean(impulse == 0) == pytest.approx(share / 2, rel=0.1)
        assert set(np.unique(impulse)) == {0, 0.5, 1}


@pytest.mark.parametrize(
    "sigma, truncate, border, name", [(1.5, 4, "edge", "nearest"), (30, 3, "reflect", "reflect")]
)
def test_gaussian_blur_is_scipys(sigma, truncate, border, name):
    x = np.random.default_rng(0).random((2, 3, 20, 33), dtype=np.float32)
    expected = ndimage.gaussian_filter(x, (0, 0, sigma, sigma), mode=name, truncate=truncate)
    assert np.allclose(filters.gaussian_blur(x, sigma, truncate, border), expected, atol=2e-6)


@pytest.mark.parametrize("side", [32, 224])
def test_zoom_is_scipys_zoom_of_the_centre(side):
    x = np.random.default_rng(1).random((1, 1, side, side), dtype=np.float32)
    for factor in (1.0, 1.01, 1.13, 1.25, 1.75, 2.25, 2.5, 3.0, 4.5):
        inside = int(np.ceil(side / factor))
        top = (side - inside) // 2
        zoomed = ndimage.zoom(x[0, 0, top : top + inside, top : top + inside], factor, order=1)
        trim = (len(zoomed) - side) // 2
        expected = zoomed[trim : trim + side, trim : trim + side]
        assert np.allclose(filters.zoom(x, factor)[0, 0], expected, atol=2e-5), factor


def test_zoom_blur_averages_as_many_factors_as_published():
    stops = [parameters("zoom_blur", s, 32, 32) for s in SEVERITIES] + [
        parameters("zoom_blur", s, 224, 224) for s in SEVERITIES
    ]
    # The end of the range is included or not by the rounding of (stop - 1) / step, as in the published
    # generator.
    assert [len(np.arange(1, stop, step)) for stop, step in stops] == [7, 12, 16, 21, 26, 12, 16, 11, 13, 11]


@pytest.mark.parametrize(
    "side, keep", [(32, c) for c in (0.95, 0.9, 0.85, 0.75, 0.65)] + [(224, 0.3), (224, 0.6)]
)
def test_pixelate_is_pillows_box_filter(side, keep):
    x = photographs(1, side)
    out = np.rint(applied.pixelate(x / np.float32(255), (), keep)[0] * 255).transpose(1, 2, 0)
    small = Image.fromarray(x[0].transpose(1, 2, 0)).resize((int(side * keep),) * 2, Image.Resampling.BOX)
    expected = np.asarray(small.resize((side, side), Image.Resampling.BOX), dtype=float)
    # Pillow rounds to 8 bits after each of its four passes.
    assert np.abs(out - expected).max() <= 1


def test_defocus_is_a_convolution_with_a_smoothed_disk():
    x = np.random.default_rng(2).random((1, 2, 40, 50), dtype=np.float32)
    for radius, alias in ((0.3, 0.4), (1, 0.2), (1.5, 0.1), (6, 0.5), (10, 0.5)):
        kernel = filters.disk(radius, alias)
        assert kernel.sum() == pytest.approx(1)
        assert np.array_equal(kernel, kernel.T) or np.allclose(kernel, kernel.T)
        expected = ndimage.correlate(x, kernel[None, None].astype(np.float32), mode="mirror")
        assert np.allclose(filters.correlate(x, kernel), expected, atol=3e-6)
    assert np.allclose(filters.disk(1.5, 0.1)[1:4, 1:4], np.full((3, 3), 1 / 9))
    plus = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]) / 5
    assert np.allclose(filters.disk(1, 0.01)[1:4, 1:4], plus)


def test_glass_blur_is_the_sequential_walk(monkeypatch):
    x = np.random.default_rng(3).random((2, 1, 20, 24), dtype=np.float32)
    monkeypatch.setattr(filters, "gaussian_blur", lambda x, sigma: x)
    for reach, passes in ((1, 1), (1, 2), (2, 3), (4, 2)):
        generators = applied._generators(7, "glass_blur", 0, 2)
        out = applied.glass_blur(x, generators, 1.0, reach, passes)
        shape = (passes, 2, 20 - 2 * reach, 24 - 2 * reach)
        for image, actual, generator in zip(x, out, applied._generators(7, "glass_blur", 0, 2), strict=True):
            moves = generator.integers(-reach, reach, shape)
            expected = image[0].copy()
            for step in moves:
                for h in range(20 - reach, reach, -1):
                    for w in range(24 - reach, reach, -1):
                        dy, dx = step[:, h - reach - 1, w - reach - 1]
                        expected[h, w] = expected[h + dy, w + dx]
            assert np.array_equal(actual[0], expected)


def test_motion_blur_runs_along_the_angle():
    x = np.zeros((3, 1, 41, 41), np.float32)
    x[:, 0, 20, 20] = 1
    out = filters.motion_blur(x, 6, 2.0, np.array([0.0, 90.0, 45.0]))
    weights = np.exp(-0.5 * (np.arange(13) / 2.0) ** 2)
    weights /= weights.sum()
    assert np.allclose(out[0, 0, 20, 8:21][::-1], weights, atol=1e-6)
    assert np.allclose(out[1, 0, 8:21, 20][::-1], weights, atol=1e-6)
    rows, columns = np.nonzero(out[2, 0])
    assert np.array_equal(rows, columns) and rows.max() == 20
    assert np.allclose(out.sum(axis=(1, 2, 3)), 1, atol=1e-6)
    flat = np.full((1, 3, 12, 12), 0.3, np.float32)
    assert np.allclose(filters.motion_blur(flat, 20, 15, np.array([33.0])), flat, atol=1e-6)


def test_brightness_raises_the_hsv_value():
    x = np.random.default_rng(4).random((1, 3, 9, 9), dtype=np.float32)
    x[:, :, 0, 0] = 0
    out = corrupt(x, "brightness", 4)
    for i in range(9):
        for j in range(9):
            h, s, v = colorsys.rgb_to_hsv(*x[0, :, i, j])
            assert np.allclose(out[0, :, i, j], colorsys.hsv_to_rgb(h, s, min(v + 0.2, 1)), atol=1e-6)


def test_contrast_shrinks_towards_the_mean_of_each_channel(batches):
    x = batches[32].astype(np.float32) / 255
    mean = x.mean(axis=(2, 3), keepdims=True)
    assert np.allclose(corrupt(x, "contrast", 5), (x - mean) * 0.15 + mean, atol=1e-6)


def test_jpeg_is_pillows(batches):
    x = batches[32]
    for image, actual in zip(x, corrupt(x, "jpeg_compression", 3), strict=True):
        buffer = applied.io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "JPEG", quality=58)
        assert np.array_equal(np.asarray(Image.open(buffer)).transpose(2, 0, 1), actual)


def test_sampling_is_scipys_map_coordinates():
    rng = np.random.default_rng(5)
    x = rng.random((2, 3, 15, 18), dtype=np.float32)
    rows, columns = rng.uniform(-9, 24, (2, 2, 15, 18))
    for border in ("mirror", "reflect"):
        out = filters.sample(x, rows, columns, border)
        for n in range(2):
            for c in range(3):
                expected = ndimage.map_coordinates(x[n, c], (rows[n], columns[n]), order=1, mode=border)
                assert np.allclose(out[n, c], expected, atol=1e-5)


def test_elastic_affine_moves_the_three_points_as_drawn():
    height, width, shift = 36, 50, 3.0
    points = np.array([25, 18]) + 12 * np.array([[1, 1], [1, -1], [-1, -1]])
    y, x = np.mgrid[:height, :width].astype(np.float32)
    ramps = np.stack([x, y])[:, None]
    generators = [applied._generators(0, "elastic_transform", 0, 1)[0] for _ in range(2)]
    moved = points + applied._generators(0, "elastic_transform", 0, 1)[0].uniform(-shift, shift, (3, 2))
    out = applied.elastic_transform(ramps, generators, 0, 0, shift)
    for source, target in zip(points, moved, strict=True):
        at = (np.array([target[1]]), np.array([target[0]]))
        found = [ndimage.map_coordinates(plane[0], at, order=1)[0] for plane in out]
        assert np.allclose(found, source, atol=1e-3)
    identity = applied.elastic_transform(ramps, generators, 0, 0, 0.0)
    assert np.allclose(identity, ramps, atol=1e-4)


def test_elastic_displacements_are_smoothed_and_scaled():
    x = np.tile(np.arange(32, dtype=np.float32) / 32, (1, 1, 32, 1))
    draws = applied._generators(0, "elastic_transform", 0, 1)[0]
    draws.uniform(0, 0, (3, 2))
    noise = draws.uniform(-1, 1, (2, 32, 32))[1]
    moved = ndimage.gaussian_filter(noise, 1.5, mode="reflect", truncate=3) * 4
    out = applied.elastic_transform(x, applied._generators(0, "elastic_transform", 0, 1), 4, 1.5, 0.0)
    inside = (slice(None), slice(6, 26))
    assert np.allclose(out[0, 0][inside] * 32, (np.arange(32) + moved)[inside], atol=1e-4)


def test_fractal_is_diamond_square():
    side, decay = 16, 2.0
    out = textures.fractal(applied._generators(1, "fog", 0, 3), side, decay)
    assert out.shape == (3, side, side)
    assert np.allclose(out.min(axis=(1, 2)), 0) and np.allclose(out.max(axis=(1, 2)), 1)
    generator = applied._generators(1, "fog", 2, 1)[0]
    heights = np.zeros((side, side))
    step, amplitude = side, 100.0
    while step >= 2:
        half, size = step // 2, side // step
        wobble = amplitude**2 * generator.uniform(-1, 1, (3, size, size))
        for kind, (oy, ox) in enumerate([(half, half), (0, half), (half, 0)]):
            reach = [(-1, -1), (-1, 1), (1, -1), (1, 1)] if kind == 0 else [(-1, 0), (1, 0), (0, -1), (0, 1)]
            for i in range(size):
                for j in range(size):
                    y, x = i * step + oy, j * step + ox
                    around = [heights[(y + half * a) % side, (x + half * b) % side] for a, b in reach]
                    heights[y, x] = np.mean(around) + wobble[kind, i, j]
        step, amplitude = half, amplitude / decay
    heights -= heights.min()
    assert np.allclose(out[2], heights / heights.max(), atol=1e-5)


def test_fog_keeps_the_brightest_value():
    x = np.full((2, 3, 32, 32), 0.6, np.float32)
    out = corrupt(x, "fog", 5)
    assert out.max() <= 0.6 + 1e-6 and out.min() >= 0.6 * 0.6 / 2.1 - 1e-6
    assert np.allclose(out.max(axis=(1, 2, 3)), 0.6, atol=1e-5)


def test_snow_whitens_and_frost_overlays_ice():
    black = np.zeros((4, 3, 32, 32), np.float32)
    snow = corrupt(black, "snow", 1)
    assert np.allclose(snow.min(axis=(1, 2, 3)), 0.05 * 0.5, atol=1e-6)
    assert np.allclose(snow, snow[:, :, ::-1, ::-1], atol=1e-6)
    frost = corrupt(black, "frost", 5)
    ice = textures.frost(applied._generators(0, "frost", 0, 4), 32, 32, small=True)
    assert np.allclose(frost, 0.45 * ice, atol=1e-6)
    assert np.allclose(corrupt(black + 0.4, "frost", 5), 0.45 * ice + 0.75 * 0.4, atol=1e-6)


def test_ice_is_bluish_varied_and_fits_any_size():
    ice = textures.frost(applied._generators(0, "frost", 0, 30), 224, 224, small=False)
    assert ice.min() >= 0 and ice.max() <= 1 and 0.3 < ice.mean() < 0.6 and ice.std() > 0.15
    red, _, blue = ice.mean(axis=(0, 2, 3))
    assert blue > red
    assert textures.frost(applied._generators(0, "frost", 0, 1), 300, 1200, small=False).shape == (
        1,
        3,
        300,
        1200,
    )


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
