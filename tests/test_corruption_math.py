"""The arithmetic of the corruptions against oracles: SciPy, Pillow, and loops written as the papers say."""

import colorsys

import numpy as np
import pytest
from photographs import photographs

from qkernels.corruptions import GROUPS, SEVERITIES, corrupt, filters, parameters, textures
from qkernels.corruptions import apply as applied

ndimage = pytest.importorskip("scipy.ndimage", reason="the oracles of the filters are SciPy's")
Image = pytest.importorskip("PIL.Image", reason="jpeg_compression needs Pillow")


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


def test_a_large_disk_is_smoothed_over_five_pixels():
    at, weights = np.arange(-10, 11), np.exp(-0.5 * (np.arange(-2, 3) / 0.5) ** 2)
    disk = np.pad((at[:, None] ** 2 + at**2 <= 100).astype(float), 2)
    expected = ndimage.correlate(disk / disk.sum(), np.outer(weights, weights) / weights.sum() ** 2)
    np.testing.assert_allclose(filters.disk(10, 0.5)[2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-12)


def test_glass_blur_blurs_before_and_after_the_walk():
    class Still:
        def integers(self, low, high, shape):
            return np.zeros(shape, int)

    x = np.random.default_rng(0).random((1, 1, 16, 16), np.float32)
    twice = filters.gaussian_blur(filters.gaussian_blur(x, 0.7), 0.7)
    np.testing.assert_allclose(applied.glass_blur(x, [Still()], 0.7, 1, 2), twice, rtol=1e-5)


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


@pytest.mark.parametrize("name, low, high", [("motion_blur", -45, 45), ("snow", -135, -45)])
def test_angles_come_from_the_published_range(monkeypatch, name, low, high):
    angles, blur = [], filters.motion_blur
    monkeypatch.setattr(filters, "motion_blur", lambda *args: (angles.extend(args[3]), blur(*args))[1])
    corrupt(np.full((400, 1, 8, 8), 0.5, np.float32), name, 3)
    assert low <= min(angles) < low + 5 and high - 5 < max(angles) <= high


def test_brightness_raises_the_hsv_value():
    x = np.random.default_rng(4).random((1, 3, 9, 9), dtype=np.float32)
    x[:, :, 0, 0] = 0
    out = corrupt(x, "brightness", 4)
    for i in range(9):
        for j in range(9):
            h, s, v = colorsys.rgb_to_hsv(*x[0, :, i, j])
            assert np.allclose(out[0, :, i, j], colorsys.hsv_to_rgb(h, s, min(v + 0.2, 1)), atol=1e-6)


def test_contrast_shrinks_towards_the_mean_of_each_channel():
    x = photographs(8, 32).astype(np.float32) / 255
    mean = x.mean(axis=(2, 3), keepdims=True)
    assert np.allclose(corrupt(x, "contrast", 5), (x - mean) * 0.15 + mean, atol=1e-6)


def test_jpeg_is_pillows():
    x = photographs(8, 32)
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
