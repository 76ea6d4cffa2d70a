"""The loss landscape around the weights along filter-normalised random directions."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..annotations import Criterion, Progress, StrPath
from ..files import read_object
from ..perturbation import filter_normalized, perturb
from .data import Data
from .pictures import Drawn, numbers
from .saved import digest, finite, write_json
from .subject import Copies, Subject, check_at_least, check_criterion, check_positive

_WRITE_EVERY = 2.0  # seconds


@dataclass
class Landscape(Drawn):
    """Loss and accuracy on a grid with coordinates at; 2-D: loss[i][j] at (at[i], at[j]); None: not finite, no labels.

    Drawn as contours and surface of the loss (2-D; losses above ten times the range's lower half are cut), or as
    loss and accuracy (1-D).
    """

    dimensions: int
    at: list[float]
    loss: list[Any]
    accuracy: list[Any]
    settings: dict[str, Any]

    @property
    def _width(self):
        return 11 if self.dimensions == 2 else 6

    @property
    def _title(self):
        return f"loss around the {self.settings['weights']} weights"

    def _draw(self, figure):
        if len(self.at) < 2:
            raise ValueError("a picture needs a landscape of size >= 2, got size 1")
        (_plot_surface if self.dimensions == 2 else _plot_line)(self, figure)


def landscape(model: nn.Module, loader: Iterable[Any], criterion: Criterion = F.cross_entropy, size: int = 25,
              span: float = 1.0, *, dimensions: int = 2, weights: str = "latent", parameters: str = "weights",
              batches: int | None = None, seed: int = 0,
              directions: dict[str, torch.Tensor] | Iterable[Mapping[str, torch.Tensor]] | None = None,
              copies: int = 8, how: str = "auto", out: StrPath | None = None,
              progress: Progress | None = None) -> Landscape:  # fmt: skip
    """The loss at w + a d0 (+ b d1), a and b on ``size`` points of [-span, span], d random and filter-normalised.

    d_f <- d_f ||w_f|| / ||d_f|| for every filter f; biases stay. BatchNorm's statistics, step sizes and clip
    levels are fixed. ``weights="latent"`` moves the weights before their quantizers, which gives terraces;
    "quantized" moves the quantized weights themselves. The model is left as it is.

    Args:
        criterion: criterion(logits, target) -> mean loss of a batch. dimensions: 1 or 2.
        size: points per side; an odd one has the weights themselves in the middle. span: > 0.
        directions: in place of random ones, and taken as they are: a dict of tensors by the weights' names, or a list
            of as many as there are dimensions. Towards other weights: {name: other[name] - w for name, w in ...}.
        copies: grid points per pass over the loader. out: JSON file, written as the points come; continued
            if it is of the same call on the same weights, images and criterion. progress: called with
            ("landscape", points done, points).

    Returns: Landscape. Raises: ValueError naming the argument.
    Source: Li et al. 2018, sections 3 and 4.
    """
    check_at_least(size=size, copies=copies)
    check_criterion(criterion)
    if dimensions not in (1, 2):
        raise ValueError(f"dimensions must be 1 or 2, got {dimensions!r}")
    check_positive(span=span)
    subject = Subject(model, weights, parameters)
    data = Data(loader, subject.device, batches)
    settings = {
        "size": size, "span": span, "dimensions": dimensions, "weights": weights, "parameters": parameters,
        "seed": seed, "images": data.size, "values": digest(subject.values),
    }  # fmt: skip
    # What the weights themselves give tells other images and another criterion apart.
    (unperturbed,) = _evaluate(Copies(subject, [subject.values], how), data, criterion)
    settings |= {"unperturbed": finite(unperturbed)}
    if directions is None:
        zeros = [torch.zeros_like(w) for w in subject.values]
        drawn = perturb(zeros, "normal", std=1.0, num=dimensions, seed=seed)
        along = [filter_normalized(d, subject.values) for d in drawn]
    else:
        along = _given(directions, dimensions, subject)
        settings["directions"] = [digest(d) for d in along]
    at = [span * (2 * i / (size - 1) - 1) if size > 1 else 0.0 for i in range(size)]
    grid = [[a] for a in at] if dimensions == 1 else [[a, b] for a in at for b in at]
    found = _continued(out, settings)
    written = time.monotonic()
    while len(found) < len(grid):
        points = grid[len(found) : len(found) + copies]
        places = points if dimensions == 2 else [point[0] for point in points]
        moved = perturb(
            subject.values, "direction", at=places, num=len(points),
            directions=along if dimensions == 2 else along[0],
        )  # fmt: skip
        found += _evaluate(Copies(subject, moved, how), data, criterion)
        if progress is not None:
            progress("landscape", len(found), len(grid))
        if out is not None and time.monotonic() - written > _WRITE_EVERY:
            write_json(out, {"settings": settings, "points": found})
            written = time.monotonic()
    columns = [[finite(point[c]) for point in found] for c in (0, 1)]
    if dimensions == 2:
        columns = [[column[i : i + size] for i in range(0, len(column), size)] for column in columns]
    loss, accuracy = columns
    result = Landscape(dimensions, at, loss, accuracy, settings)
    if out is not None:
        result.to_json(out)
    return result


def _evaluate(copies, data, criterion):
    """[(mean loss, accuracy)] of the copies."""
    loss, correct = 0.0, 0.0
    for x, target in data:
        logits = copies.logits(x)
        share = len(target) / data.size
        loss = loss + torch.stack([criterion(y, target) for y in logits]).double() * share
        correct = correct + _accuracy(logits, target) * share
    return [list(point) for point in zip(loss.tolist(), correct.tolist(), strict=True)]


def _given(directions, dimensions, subject):
    """The user's directions as lists in the subject's order."""
    given = [directions] if isinstance(directions, dict) else list(directions)
    if len(given) != dimensions:
        raise ValueError(f"directions must be {dimensions} dict(s), one per dimension, got {len(given)}")
    lists = []
    for direction in given:
        wrong = [
            name
            for name, w in zip(subject.names, subject.values, strict=True)
            if not isinstance(direction.get(name), torch.Tensor) or direction[name].shape != w.shape
        ]
        if wrong:
            raise ValueError(
                f"directions must hold tensors of the weights' shapes; {wrong[0]} is not as it should be"
            )
        lists.append([direction[name].to(w) for name, w in zip(subject.names, subject.values, strict=True)])
    return lists


def _accuracy(logits, target):
    """Of each copy; NaN where the target is no class. Classes lie in axis 1, as for cross-entropy, or in the last."""
    if not target.is_floating_point():
        for axis in (2, logits.dim() - 1):
            shape = logits.shape[1:axis] + logits.shape[axis + 1 :] if logits.dim() > axis else None
            if shape == target.shape:
                return (logits.argmax(axis) == target).double().flatten(1).mean(1)
    return logits.new_full((len(logits),), math.nan, dtype=torch.float64)


def _continued(out, settings):
    """The points an earlier call with these settings left in ``out``."""
    if out is None or not Path(out).exists():
        return []
    old = read_object(out)
    if old is None or not _same(old.get("settings"), settings):
        return []
    if "points" in old:
        return old["points"]
    pair = [old["loss"], old["accuracy"]]
    if old["dimensions"] == 2:
        pair = [[value for row in column for value in row] for column in pair]
    return [list(point) for point in zip(*pair, strict=True)]


def _same(old, settings):
    """Whether two calls are the same; what the weights give may differ by rounding, on another machine say."""
    if not isinstance(old, dict) or old.keys() != settings.keys():
        return False
    return all(
        all(map(_close, old[key], value)) if key == "unperturbed" else old[key] == value
        for key, value in settings.items()
    )


def _close(a, b):
    return a == b or (None not in (a, b) and math.isclose(a, b, rel_tol=1e-4))


def _plot_line(found, figure):
    axes = figure.subplots()
    axes.plot(found.at, numbers(found.loss), color="tab:blue")
    axes.set(xlabel="distance along the direction", ylabel="loss")
    if None in found.accuracy:
        return
    right = axes.twinx()
    right.plot(found.at, found.accuracy, color="tab:red", linestyle="--")
    right.set_ylabel("accuracy (dashed)", color="tab:red")


def _plot_surface(found, figure):
    import numpy as np

    loss = np.array([numbers(row) for row in found.loss])
    middle = np.nanmedian(loss)
    low = np.nanmin(loss)
    loss = np.minimum(np.where(np.isnan(loss), math.inf, loss), low + 10 * max(middle - low, 1e-12))
    first, second = np.meshgrid(found.at, found.at, indexing="ij")
    axes = figure.add_subplot(1, 2, 1)
    lines = axes.contour(first, second, loss, levels=20, cmap="viridis")
    axes.clabel(lines, fontsize=7)
    axes.plot(0, 0, "r+", markersize=10)
    axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
    surface = figure.add_subplot(1, 2, 2, projection="3d")
    surface.plot_surface(first, second, loss, cmap="viridis", linewidth=0)
    surface.set(xlabel="first", ylabel="second", zlabel="loss")
