"""Filters on float32 arrays (N, C, H, W): each image on its own, whatever the rest of the batch."""

from functools import lru_cache

import numpy as np


def fold(index, size, border):
    """Indices past the edge brought back inside: `edge` aaa|abcd, `mirror` dcb|abcd, `reflect` cba|abcd."""
    if border == "edge":
        return np.clip(index, 0, size - 1)
    if border == "mirror":
        index = index % (2 * size - 2)
        return np.minimum(index, 2 * size - 2 - index)
    index = index % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)


def separable(x, rows, columns):
    """rows @ x @ columns.T for every image plane."""
    # NumPy multiplies a stack plane by plane, so that the order of summation does not vary with the batch.
    return np.matmul(np.matmul(rows, x), columns.T)


@lru_cache(maxsize=64)
def gaussian_matrix(size, sigma, truncate=4.0, border="edge"):
    """The size x size matrix of a Gaussian filter cut at `truncate` standard deviations."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return np.eye(size, dtype=np.float32)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    matrix = np.zeros((size, size))
    at = np.arange(size)[:, None]
    np.add.at(matrix, (at, fold(at + offsets, size, border)), weights / weights.sum())
    return matrix.astype(np.float32)


def gaussian_blur(x, sigma, truncate=4.0, border="edge"):
    height, width = x.shape[-2:]
    return separable(
        x, gaussian_matrix(height, sigma, truncate, border), gaussian_matrix(width, sigma, truncate, border)
    )


@lru_cache(maxsize=256)
def zoom_matrix(size, factor):
    """Linear interpolation of the centre 1/factor of `size` samples to `size` samples."""
    inside = int(np.ceil(size / factor))
    zoomed = round(inside * factor)
    at = np.arange(size) + (zoomed - size) // 2
    source = (size - inside) // 2 + at * ((inside - 1) / (zoomed - 1))
    low = np.minimum(np.floor(source).astype(int), size - 2)
    matrix = np.zeros((size, size))
    matrix[np.arange(size), low] = 1 - (source - low)
    matrix[np.arange(size), low + 1] = source - low
    return matrix.astype(np.float32)


def zoom(x, factor):
    return separable(x, zoom_matrix(x.shape[-2], factor), zoom_matrix(x.shape[-1], factor))


@lru_cache(maxsize=64)
def box_matrix(size, out):
    """Box resampling of `size` samples to `out`: means of the samples centred in each output's interval."""
    scale = size / out
    half = max(scale, 1.0) / 2
    distance = np.arange(size) + 0.5 - (np.arange(out)[:, None] + 0.5) * scale
    inside = (distance > -half) & (distance <= half)
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


def correlate(x, kernel):
    """Correlation with a small 2-D kernel of odd sides, mirrored at the border."""
    height, width = x.shape[-2:]
    top, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)), mode="reflect")
    out = np.zeros_like(x)
    for i, j in zip(*np.nonzero(kernel), strict=True):
        out += np.float32(kernel[i, j]) * padded[:, :, i : i + height, j : j + width]
    return out


@lru_cache(maxsize=16)
def disk(radius, alias):
    """A disk on the integer grid, of sum 1, smoothed by a Gaussian of standard deviation `alias`."""
    reach = 1 if radius <= 8 else 2
    side = int(radius) + reach
    at = np.arange(-side, side + 1)
    inside = (at[:, None] ** 2 + at**2 <= radius**2).astype(np.float64)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / alias) ** 2)
    weights /= weights.sum()
    smooth = np.zeros((len(at), len(at)))
    for offset, weight in zip(range(-reach, reach + 1), weights, strict=True):
        smooth += weight * np.eye(len(at), k=offset)
    return smooth @ (inside / inside.sum()) @ smooth.T


def gather(x, index):
    """out[n, c, p] = x[n, c, index[n, p]] over flattened pixels; index (N, H, W)."""
    flat = x.reshape(*x.shape[:2], -1)
    return np.take_along_axis(flat, index.reshape(len(index), 1, -1), axis=2).reshape(x.shape)


def motion_blur(x, radius, sigma, angles):
    """A one-sided Gaussian of 2 radius + 1 taps along lines at `angles` degrees (N,), clamped at borders."""
    height, width = x.shape[-2:]
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    radians = np.deg2rad(angles)[:, None]
    down = np.ceil(taps * np.sin(radians) - 0.5).astype(int)
    right = np.ceil(taps * np.cos(radians) - 0.5).astype(int)
    out = np.zeros_like(x)
    for tap, weight in enumerate(weights):
        rows = fold(np.arange(height) + down[:, tap, None], height, "edge")
        columns = fold(np.arange(width) + right[:, tap, None], width, "edge")
        out += weight * gather(x, rows[:, :, None] * width + columns[:, None, :])
    return out


def sample(x, rows, columns, border):
    """Bilinear interpolation of x at float coordinates rows, columns of shape (N, H, W)."""
    height, width = x.shape[-2:]
    top, left = np.floor(rows), np.floor(columns)
    down = (rows - top).astype(np.float32)[:, None]
    right = (columns - left).astype(np.float32)[:, None]
    top, left = top.astype(int), left.astype(int)
    upper, lower = (fold(top + k, height, border) * width for k in (0, 1))
    first, second = (fold(left + k, width, border) for k in (0, 1))
    above = gather(x, upper + first) * (1 - right) + gather(x, upper + second) * right
    below = gather(x, lower + first) * (1 - right) + gather(x, lower + second) * right
    return above * (1 - down) + below * down
