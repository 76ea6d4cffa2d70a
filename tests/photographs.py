"""Images that look like photographs to the corruptions."""

import numpy as np


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
