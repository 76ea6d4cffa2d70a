"""Numbers that are written as JSON and drawn; those of ``figures`` stand here."""

import math
from dataclasses import dataclass
from typing import Any

from ..annotations import File
from .saved import Saved


class Drawn(Saved):
    """A result that is written as JSON and drawn."""

    _width: float = 6.5
    _title: str

    def _draw(self, figure):
        raise NotImplementedError

    def plot(self, path: File, title: str | None = None) -> File:
        """A picture. Returns the path. Raises: ImportError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install qkernels[measure]") from error
        figure = Figure(figsize=(self._width, 4.5), layout="constrained")
        self._draw(figure)
        figure.suptitle(title or self._title)
        figure.savefig(path, dpi=120)
        return path


@dataclass
class OutputVariance(Drawn):
    """variance, relative: {model: {layer or "output": [a number per level]}}; levels: deviations of the input noise.

    relative: the variance over ``spread``, the variance of the same outputs without noise over images and
    elements; models whose outputs differ in size are compared by it.
    """

    levels: list[float]
    variance: dict[str, dict[str, list[float]]]
    relative: dict[str, dict[str, list[float]]]
    spread: dict[str, dict[str, float]]
    settings: dict[str, Any]

    _width, _title = 11, "variance of outputs under noise on the input"

    def _draw(self, figure):
        left, right = figure.subplots(1, 2)
        for name in self.variance:
            left.loglog(self.levels, self.variance[name]["output"], marker="o", label=name)
            layers = self.relative[name]
            right.semilogy(range(len(layers)), [v[-1] for v in layers.values()], marker=".", label=name)
        left.set(xlabel="deviation of the noise", ylabel="variance of the network's output")
        right.set(ylabel=f"variance / variance over images, noise {self.levels[-1]:g}")
        names = list(next(iter(self.relative.values())))
        right.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        left.legend()


@dataclass
class GradientNorms(Drawn):
    """norms: {"none", "weights", "features": ||grad_w L|| per batch, the mean of the draws}; mean: over the batches.

    deviation: over all draws of all batches (None for a single one).
    """

    norms: dict[str, list[float | None]]
    mean: dict[str, float | None]
    deviation: dict[str, float | None]
    settings: dict[str, Any]

    _title = "gradient norm under noise of one quantization step"

    def _draw(self, figure):
        axes = figure.subplots()
        for name, values in self.norms.items():
            what = "no noise" if name == "none" else f"noise on {name}"
            (mean,) = numbers([self.mean[name]])
            axes.plot(numbers(values), marker=".", label=f"{what} (mean {mean:.3g})")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="batch", ylabel="norm of the gradient of the weights")
        finite = [v for v in sum(map(numbers, self.norms.values()), []) if math.isfinite(v)]
        axes.set_ylim(0, 1.1 * max(finite, default=1.0) or 1.0)
        axes.legend()


@dataclass
class GradientCosine(Drawn):
    """cosine: g_s . g / (||g_s|| ||g||) per batch, None where one is 0; ratio: ||g_s|| / ||g||.

    mean, deviation: of the cosine.
    """

    cosine: list[float | None]
    ratio: list[float | None]
    mean: float | None
    deviation: float | None
    settings: dict[str, Any]

    _title = "cosine of perturbed and vanilla gradient"

    def _draw(self, figure):
        axes = figure.subplots()
        values = numbers(self.cosine)
        axes.plot(values, marker=".")
        if self.mean is not None:
            axes.axhline(self.mean, linestyle="--", label=f"mean {self.mean:.3f}")
            axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="batch", ylabel="cosine of g_s and g")
        axes.set_ylim(min([0.0, *(v - 0.05 for v in values)]), 1.02)


@dataclass
class TraceAlong(Drawn):
    """Per run: {"epochs": [...], "trace": [...], "stderr": [...]}; the Hessian's trace with its standard error."""

    runs: dict[str, dict[str, list[Any]]]
    settings: dict[str, Any]

    _title = "trace of the Hessian along training"

    def _draw(self, figure):
        axes = figure.subplots()
        for name, run in self.runs.items():
            bars = [e or 0.0 for e in run["stderr"]]
            axes.errorbar(run["epochs"], numbers(run["trace"]), bars, marker="o", capsize=3, label=name)
        values = sum((numbers(run["trace"]) for run in self.runs.values()), [])
        if 0 < 10 * min(values) < max(values):
            axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="epoch", ylabel="trace of the Hessian")
        if len(self.runs) > 1:
            axes.legend()


def numbers(values):
    """JSON has no NaN: what it left out."""
    return [math.nan if v is None else v for v in values]
