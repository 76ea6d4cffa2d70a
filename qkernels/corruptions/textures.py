"""Random textures: the fog's fractal and the frost's ice."""

from functools import lru_cache

import numpy as np

from .filters import fold, gaussian_blur

PLATES = 5
PLATE_SIDE = 510
PLATE_SEED = 0x1CE


def fractal(generators, side, decay):
    """Diamond-square height maps on a torus, (N, side, side) in [0, 1]; `side` a power of two.

    Each new point is the mean of its four neighbours plus a uniform value of amplitude a^2, a = 100 /
    decay^octave.
    """
    heights = np.zeros((len(generators), side, side))
    step, amplitude = side, 100.0
    while step >= 2:
        half = step // 2
        size = side // step
        wobble = amplitude**2 * np.stack([g.uniform(-1, 1, (3, size, size)) for g in generators])
        corners = heights[:, ::step, ::step]
        rows = corners + np.roll(corners, -1, axis=1)
        centres = (rows + np.roll(rows, -1, axis=2)) / 4 + wobble[:, 0]
        heights[:, half::step, half::step] = centres
        across = corners + np.roll(corners, -1, axis=2) + centres + np.roll(centres, 1, axis=1)
        heights[:, ::step, half::step] = across / 4 + wobble[:, 1]
        along = corners + np.roll(corners, -1, axis=1) + centres + np.roll(centres, 1, axis=2)
        heights[:, half::step, ::step] = along / 4 + wobble[:, 2]
        step, amplitude = half, amplitude / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return (heights / heights.max(axis=(1, 2), keepdims=True)).astype(np.float32)


def _branches(generator, stems, spacing, shrink):
    """Side branches of stems (rows of y, x, angle, length) as on a feather: shorter towards the tip."""
    out = []
    for y, x, angle, length in stems:
        along = np.arange(spacing, length, spacing) + generator.uniform(-0.3, 0.3) * spacing
        for side in (-1, 1):
            turn = angle + side * np.deg2rad(generator.normal(52, 5, len(along)))
            reach = shrink * (length - along) * generator.uniform(0.6, 1.0, len(along))
            out.append(np.stack([y + along * np.sin(angle), x + along * np.cos(angle), turn, reach], axis=1))
    return np.concatenate(out)


def _draw(segments, side, strength):
    """Segments accumulated on a side x side torus, one sample per pixel of length."""
    counts = np.maximum(segments[:, 3].astype(int), 1)
    owner = np.repeat(np.arange(len(segments)), counts)
    along = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    y, x, angle, length = segments[owner].T
    fade = strength * (1 - along / (length + 1))
    rows = np.rint(y + along * np.sin(angle)).astype(int) % side
    columns = np.rint(x + along * np.cos(angle)).astype(int) % side
    return np.bincount(rows * side + columns, weights=fade, minlength=side * side).reshape(side, side)


@lru_cache(maxsize=1)
def _plates():
    """Feathered ice crystals over a haze, (PLATES, 3, PLATE_SIDE, PLATE_SIDE) in [0, 1]."""
    plates = []
    for number in range(PLATES):
        generator = np.random.Generator(np.random.Philox(key=[PLATE_SEED, number]))
        count = 34
        stems = np.stack(
            [
                *generator.uniform(0, PLATE_SIDE, (2, count)),
                # Crystals of one plate grow in few directions.
                generator.choice(generator.uniform(0, 2 * np.pi, 3), count)
                + generator.normal(0, 0.25, count),
                generator.uniform(80, 260, count),
            ],
            axis=1,
        )
        barbs = _branches(generator, stems, 9, 0.45)
        fine = _branches(generator, barbs[barbs[:, 3] > 10], 5, 0.4)
        ice = _draw(stems, PLATE_SIDE, 1.6) + _draw(barbs, PLATE_SIDE, 1.0) + _draw(fine, PLATE_SIDE, 0.6)
        ice = ice.astype(np.float32)
        haze = fractal([generator], 512, 1.8)[0, :PLATE_SIDE, :PLATE_SIDE]
        glow = 1.1 * gaussian_blur(ice, 0.7) + 1.2 * gaussian_blur(ice, 4) + 0.9 * gaussian_blur(ice, 18)
        level = 1 - np.exp(-(0.05 + 0.45 * haze**2 + glow * (0.35 + haze)))
        # Thin ice is blue, thick ice white.
        plates.append(np.stack([level**power for power in (1.45, 1.12, 0.9)]))
    return np.stack(plates).astype(np.float32)


@lru_cache(maxsize=1)
def _small_plates():
    side = PLATE_SIDE // 5
    return _plates().reshape(PLATES, 3, side, 5, side, 5).mean(axis=(3, 5))


def frost(generators, height, width, small):
    """Random crops of procedural ice, (N, 3, height, width); `small` reduces it five times."""
    plates = _small_plates() if small else _plates()
    side = plates.shape[-1]
    crops = []
    for generator in generators:
        plate = plates[generator.integers(PLATES)]
        top, left = generator.integers(side, size=2)
        rows = fold(top + np.arange(height), side, "reflect")
        columns = fold(left + np.arange(width), side, "reflect")
        crops.append(plate[:, rows[:, None], columns])
    return np.stack(crops)
