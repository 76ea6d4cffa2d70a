"""`corrupt`: the 15 corruptions on batches of images."""

import io
from typing import TypeVar

import numpy as np
import torch

from ..annotations import File, Integer
from . import filters, textures
from .published import CIFAR_MAX_SIDE, CORRUPTIONS, GROUPS, SEVERITIES, check_name, check_severity, parameters
from .readers import pillow

# Corruptions that draw random numbers; the others ignore the seed.
RANDOM = frozenset(
    (*GROUPS["noise"], "glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform")
)
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)[:, None, None]
MIN_SIDE = 8
# Values worked on at a time: bounds the memory and keeps the temporaries in cache.
CHUNK = 1 << 20
Images = TypeVar("Images", torch.Tensor, np.ndarray)


def corrupt(images: Images, name: str, severity: Integer, seed: Integer = 0, start: Integer = 0) -> Images:
    """Images under one of the 15 common corruptions of Hendrycks & Dietterich, "Benchmarking Neural Network
    Robustness to Common Corruptions and Perturbations" (ICLR 2019), at a severity from 1 to 5.

    `images`: uint8, or floating point in [0, 1], of shape (N, C, H, W) with C 1 or 3 and sides of 8 pixels or
    more; a tensor on any device or a NumPy array. The result has the same type, dtype, shape and device; the
    input is unchanged. Image i draws its random numbers from (seed, name, start + i) alone: with `start` the
    position of the first image in the data set, the result does not depend on how the set is cut into
    batches. The severities of an image share their draws. Constants: `parameters` (CIFAR-C for shorter sides
    up to 64 pixels, ImageNet-C above).

    Definitions follow the generator published with the paper, with these differences. `frost` overlays
    procedural ice in place of the paper's photographs. Pixels stay real numbers until the end, and uint8
    results are rounded to nearest where the published files truncate at each stage. Random numbers are other
    ones. So results resemble the published sets but are not them: quote numbers on those from `load_cifar_c`
    and `ImageNetC`.

    TypeError for a wrong type or dtype; ValueError for an unknown name or severity, a wrong shape, values
    outside [0, 1] or NaN, a negative seed or start. `jpeg_compression` needs Pillow, and works at 8 bits
    whatever the dtype.
    """
    check_name(name)
    severity = check_severity(severity)
    for argument, value in (("seed", seed), ("start", start)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{argument}={value!r} is a {type(value).__name__}; accepted: an integer")
        if not 0 <= value < 2**63:
            raise ValueError(f"{argument}={value} is out of range; accepted: 0 <= {argument} < 2**63")
    _check_images(images)
    constants = parameters(name, severity, *images.shape[-2:])
    out = torch.empty_like(images) if isinstance(images, torch.Tensor) else np.empty_like(images)
    size = max(1, CHUNK // max(1, int(np.prod(images.shape[1:]))))
    for first in range(0, len(images), size):
        part = slice(first, first + size)
        x = _to_float(images[part])
        generators = _generators(seed, name, start + first, len(x)) if name in RANDOM else ()
        _store(np.clip(APPLY[name](x, generators, *constants), 0, 1), out, part)
    return out


def _check_images(images):
    tensor = isinstance(images, torch.Tensor)
    if not tensor and not isinstance(images, np.ndarray):
        raise TypeError(f"images is a {type(images).__name__}; accepted: torch.Tensor, numpy.ndarray")
    floating = images.is_floating_point() if tensor else images.dtype.kind == "f"
    if not floating and images.dtype not in (torch.uint8, np.uint8):
        raise TypeError(f"images has dtype {images.dtype}; accepted: uint8, or floating point in [0, 1]")
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] not in (1, 3) or min(shape[2:]) < MIN_SIDE:
        raise ValueError(
            f"images has shape {shape}; accepted: (N, C, H, W) with C 1 or 3, and H and W at least {MIN_SIDE}"
        )
    if floating and len(images):
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images has values from {low:g} to {high:g}; accepted: 0 to 1, or dtype uint8 (0 to 255)"
            )


def _to_float(images):
    """float32 in [0, 1], contiguous."""
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        images = (images if images.dtype == torch.uint8 else images.float()).numpy()
    x = np.ascontiguousarray(images, dtype=np.float32)
    return x / np.float32(255) if images.dtype == np.uint8 else x


def _store(x, out, part):
    values = np.rint(x * 255).astype(np.uint8) if out.dtype in (torch.uint8, np.uint8) else x
    out[part] = torch.from_numpy(values).to(out) if isinstance(out, torch.Tensor) else values


def _generators(seed, name, start, count):
    """One counter-based generator per image: the key is (seed, index), the counter starts at the name."""
    counter = [0, 0, 0, CORRUPTIONS.index(name)]
    return [
        np.random.Generator(np.random.Philox(key=[int(seed), int(start) + i], counter=counter))
        for i in range(count)
    ]


def _draw(generators, function):
    return np.stack([function(generator) for generator in generators])


def _normal(generators, shape):
    return _draw(generators, lambda g: g.standard_normal(shape, dtype=np.float32))


def gaussian_noise(x, generators, sigma):
    return x + np.float32(sigma) * _normal(generators, x.shape[1:])


def shot_noise(x, generators, photons):
    return np.stack([g.poisson(image * photons) for g, image in zip(generators, x, strict=True)]) / photons


def impulse_noise(x, generators, share):
    u = _draw(generators, lambda g: g.random(x.shape[1:]))
    return np.where(u < share / 2, 0, np.where(u >= 1 - share / 2, 1, x))


def defocus_blur(x, _, radius, alias):
    return filters.correlate(x, filters.disk(radius, alias))


def glass_blur(x, generators, sigma, reach, passes):
    """Blur; each pixel takes the value of a random near one; blur.

    The published generator swaps two views of one array, which copies the second pixel over the first: the
    released images, and these, are gathers and not permutations.
    """
    height, width = x.shape[-2:]
    own = np.arange(height * width).reshape(height, width)
    # Pixels are visited from the last to the first; the outermost ones stay.
    window = own[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1]
    visited = np.zeros(own.size, dtype=bool)
    visited[window] = True
    moves = _draw(generators, lambda g: g.integers(-reach, reach, (passes, 2, *window.shape)))
    out = filters.gaussian_blur(x, sigma)
    for step in range(passes):
        source = np.tile(own, (len(x), 1, 1))
        source[:, window // width, window % width] = window + moves[:, step, 0] * width + moves[:, step, 1]
        source = source.reshape(len(x), -1)
        # A source visited before hands on what it took itself: follow such links, doubling their length, to
        # the end.
        link = np.where(visited[source] & (source > own.ravel()), source, own.ravel())
        while True:
            longer = np.take_along_axis(link, link, axis=1)
            if np.array_equal(longer, link):
                break
            link = longer
        out = filters.gather(out, np.take_along_axis(source, link, axis=1))
    return filters.gaussian_blur(out, sigma)


def motion_blur(x, generators, radius, sigma):
    return filters.motion_blur(x, radius, sigma, _draw(generators, lambda g: g.uniform(-45, 45)))


def zoom_blur(x, _, stop, step):
    factors = np.arange(1, stop, step)
    return (x + sum(filters.zoom(x, float(factor)) for factor in factors)) / np.float32(len(factors) + 1)


def snow(x, generators, mean, sigma, factor, threshold, radius, blur, keep):
    layer = filters.zoom(mean + np.float32(sigma) * _normal(generators, (1, *x.shape[-2:])), factor)
    layer = np.clip(np.where(layer < threshold, 0, layer), 0, 1)
    layer = filters.motion_blur(layer, radius, blur, _draw(generators, lambda g: g.uniform(-135, -45)))
    grey = (x * GREY).sum(1, keepdims=True) if x.shape[1] == 3 else x
    pale = keep * x + (1 - keep) * np.maximum(x, 1.5 * grey + 0.5)
    return pale + layer + layer[:, :, ::-1, ::-1]


def frost(x, generators, keep, amount):
    height, width = x.shape[-2:]
    ice = textures.frost(generators, height, width, small=min(height, width) <= CIFAR_MAX_SIDE)
    return keep * x + amount * (ice if x.shape[1] == 3 else (ice * GREY).sum(1, keepdims=True))


def fog(x, generators, amount, decay):
    height, width = x.shape[-2:]
    side = 1 << (max(height, width) - 1).bit_length()
    mist = textures.fractal(generators, side, decay)[:, None, :height, :width]
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + np.float32(amount) * mist) * (brightest / (brightest + np.float32(amount)))


def brightness(x, _, amount):
    """HSV value plus `amount`: at fixed hue and saturation the channels scale with their maximum."""
    value = x.max(axis=1, keepdims=True)
    raised = np.minimum(value + np.float32(amount), 1)
    return np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)


def contrast(x, _, keep):
    mean = x.reshape(*x.shape[:2], -1).mean(axis=2, dtype=np.float64).astype(np.float32)[:, :, None, None]
    return (x - mean) * np.float32(keep) + mean


def elastic_transform(x, generators, amplitude, sigma, shift):
    """A random affine map, then random displacements of `amplitude` pixels smoothed over `sigma` pixels."""
    height, width = x.shape[-2:]
    centre, side = np.array([width // 2, height // 2]), min(height, width) // 3
    corners = centre + side * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + _draw(generators, lambda g: g.uniform(-shift, shift, (3, 2)))
    # Row by row [x, y, 1] @ inverse = where the pixel comes from.
    ones = np.ones((len(x), 3, 1))
    inverse = np.linalg.solve(np.concatenate([moved, ones], axis=2), np.broadcast_to(corners, moved.shape))
    row, column = np.mgrid[:height, :width]
    a, b, c = (inverse[:, k, :, None, None] for k in range(3))
    columns, rows = (a * column + b * row + c).swapaxes(0, 1)
    out = filters.sample(x, rows, columns, "mirror")
    if amplitude == 0:
        return out
    field = _draw(generators, lambda g: g.uniform(-1, 1, (2, height, width)).astype(np.float32))
    field = amplitude * filters.gaussian_blur(field, sigma, truncate=3.0, border="reflect")
    return filters.sample(out, row + field[:, 0], column + field[:, 1], "reflect")


def pixelate(x, _, keep):
    down = [filters.box_matrix(side, int(side * keep)) for side in x.shape[-2:]]
    up = [filters.box_matrix(int(side * keep), side) for side in x.shape[-2:]]
    return filters.separable(filters.separable(x, *down), *up)


def jpeg_compression(x, _, quality):
    Image = pillow()
    out = np.empty_like(x)
    for i, image in enumerate(x):
        file = io.BytesIO()
        _picture(image).save(file, "JPEG", quality=quality)
        decoded = np.asarray(Image.open(file), dtype=np.float32) / 255
        out[i] = decoded if decoded.ndim == 2 else decoded.transpose(2, 0, 1)
    return out


def _picture(image):
    """A float image (C, H, W) as a Pillow image of 8 bits."""
    pixels = np.rint(image * 255).astype(np.uint8)
    return pillow().fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


APPLY = {
    function.__name__: function
    for function in (
        *(gaussian_noise, shot_noise, impulse_noise),
        *(defocus_blur, glass_blur, motion_blur, zoom_blur),
        *(snow, frost, fog, brightness),
        *(contrast, elastic_transform, pixelate, jpeg_compression),
    )
}


def contact_sheet(image: Images, path: File, seed: Integer = 0, caption: str = "") -> File:
    """Writes a picture of one image under all corruptions (rows) and severities (columns) to `path`.

    `image` is (C, H, W), otherwise as in `corrupt`; `caption` stands beside the clean image. Thumbnails have
    96 pixels. Returns the path. Needs Pillow.
    """
    Image = pillow()
    from PIL import ImageDraw, ImageFont

    batch = image[None]
    _check_images(batch)
    side, label, head, rows = 96, 142, 26, 8
    panel = label + (side + 2) * len(SEVERITIES) + 10
    sheet = Image.new("RGB", (2 * panel, head + rows * (side + 2)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    shrink = Image.Resampling.BOX if max(batch.shape[2:]) > side else Image.Resampling.NEAREST
    pen.text((label + side + 14, head + side // 2), caption, "black", font, anchor="lm")
    for slot, name in enumerate(("clean", *CORRUPTIONS)):
        left, top = slot // rows * panel + label, head + slot % rows * (side + 2)
        pen.text((left - 8, top + side // 2), name.replace("_", " "), "black", font, anchor="rm")
        versions = [batch] if name == "clean" else [corrupt(batch, name, s, seed) for s in SEVERITIES]
        for severity, version in enumerate(versions, start=1):
            at = left + (severity - 1) * (side + 2)
            sheet.paste(
                _picture(_to_float(version)[0]).resize((side, side), shrink).convert("RGB"), (at, top)
            )
            pen.text((at + side // 2, head // 2), str(severity), "black", font, anchor="mm")
    sheet.save(path, optimize=True)
    return path
