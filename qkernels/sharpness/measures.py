"""The eight measures: four searches for the largest perturbation a network stands, and formulas over them."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..annotations import Progress, StrPath
from ..files import read_object
from ..perturbation import perturb
from . import formulas
from .data import Data
from .saved import Saved, write_json
from .search import Counter, Rule, Scores, bisect
from .subject import PARAMETERS, Copies, Subject, check_at_least, check_choice, check_positive, initial_values

SEARCHES = ("sigma", "sigma_mag", "alpha", "alpha_mag")
# The first of each is the default.
CHOICES = {
    "noise": ("std", "variance"),
    "over": ("worst", "mean"),
    "ball": ("linf", "l2"),
    "target": ("accuracy", "loss"),
    "parameters": PARAMETERS,
}


@dataclass
class Report(Saved):
    """What ``measure`` found.

    measures: sqrt(mu / m) by name (formulas.NAMES), None where mu < 0; mu: the bounds. searches: by name
    (sigma, sigma_mag, alpha, alpha_mag) the size found, whether within tolerance, the displacement there
    with its standard error over copies, the size's standard error (from the displacement's and the slope of
    the path; None where unknown) and the whole path.
    network: omega, m, norms and unperturbed accuracy and loss. cost: passes over the images. settings: every
    argument.
    """

    measures: dict[str, float | None]
    mu: dict[str, float]
    searches: dict[str, dict[str, Any]]
    network: dict[str, Any]
    cost: dict[str, float]
    settings: dict[str, Any]
    seconds: float

    def __str__(self):
        lines = ["measure                  sqrt(mu/m)           mu"]
        for name, value in self.measures.items():
            lines.append(
                f"{name:<22} {'-' if value is None else format(value, '12.4f')} {self.mu[name]:12.4g}"
            )
        lines.append("search             size  displacement  standard error  found")
        for name, s in self.searches.items():
            moved, error = ("-" if s[k] is None else f"{s[k]:.4f}" for k in ("displacement", "stderr"))
            found = "yes" if s["found"] else "no"
            lines.append(f"{name:<10} {s['size']:12.6f} {moved:>13} {error:>15}  {found}")
        lines.append(
            f"{self.settings['weights']} weights, {self.network['omega']} parameters, accuracy "
            f"{self.network['accuracy']:.4f}, {self.cost['forward_passes']:.1f} forward and "
            f"{self.cost['backward_passes']:.1f} backward passes in {self.seconds:.1f} s "
            f"({self.settings['how']})"
        )
        return "\n".join(lines)


def measure(model: nn.Module, loader: Iterable[Any], initial: Mapping[str, torch.Tensor] | nn.Module, *,
            weights: str = "latent", noise: str = "std", target: str = "accuracy", ball: str = "linf",
            over: str = "worst", parameters: str = "weights", seed: int = 0, iterations: int = 15, samples: int = 10,
            target_deviation: float = 0.1, tolerance: float = 0.01, upper: float = 2.0, ascent_steps: int = 20,
            ascent_lr: float = 1e-4, eps: float = 1e-3, delta: float | None = None, m: float | None = None,
            batches: int | None = None, confidence: float | None = 4.0, how: str = "auto",
            out: StrPath | None = None, progress: Progress | None = None) -> Report:  # fmt: skip
    """The eight measures of QGen: PAC-Bayes and sharpness, from init and origin, plain and magnitude-aware.

    sigma: standard deviation of normal noise on the weights (sigma |w|, with eps, magnitude-aware) at which
    the mean over ``samples`` draws of the training accuracy falls by ``target_deviation``; alpha: the same
    for perturbations |u_i| <= alpha (alpha |w_i|) after ``ascent_steps`` of projected SGD ascent from a
    random start. Bisection on [0, upper], done within ``tolerance`` or after ``iterations``. Measures:
    ``formulas.bounds``, as sqrt(mu / m).

    The model is left as it is, bit for bit. BatchNorm uses its statistics and is not folded into
    convolutions (public code folds it). All steps of a search use the same draws (seed, copy), so the path
    is that of one function.

    Args:
        loader: training images and labels, re-iterable. batches: use only the first so many. m: images the
            network was trained on, default those used.
        initial: state dict (or module) the training started from.
        weights: "latent" perturbs the weights before their quantizers, "quantized" after them.
        noise: "std", or "variance": what the public PAC-Bayes code draws, sigma^2 (or sigma^2 w^2 + eps^2)
            as std.
        target: what falls, "accuracy", or "loss" (mean cross-entropy rises). ball: "linf", or "l2" (norm of
            all u, or u / w).
        over: alpha by the "worst" of the samples (the equations' maximum) or their "mean" (QGen, appendix
            B.2).
        parameters: "weights" perturbs (and counts) weights and biases of layers, "all" every parameter but
            the quantizers'.
        delta: in the bounds, default sigma. confidence: standard errors that end a step early, None for
            certainty only.
        how: copies evaluated by "loop", "vmap" or "auto" (``subject.Copies``). out: JSON file, written after
            each search; continued if it is of the same call. progress: called with (search, step, steps).

    Returns: Report. Raises: ValueError / TypeError naming the argument.
    Source: QGen, eqs. 15 to 22 and appendix B.2; Jiang et al. 2020; Dziugaite et al. 2020.
    """
    settings = {
        k: v for k, v in locals().items() if k not in ("model", "loader", "initial", "out", "progress")
    }
    _check(settings)
    began = time.perf_counter()
    subject = Subject(model, weights, parameters)
    w0 = initial_values(model, initial, subject)
    data = Data(loader, subject.device, batches, seed)
    counter = Counter()
    unperturbed = Copies(subject, [subject.values], how)
    settings["how"] = unperturbed.how
    scores = Scores.unperturbed(data, unperturbed)
    counter.forward(data.size)
    if not math.isfinite(scores["loss"].mean):
        raise ValueError(
            f"model has a loss of {scores['loss'].mean} on these images: nothing can be measured"
        )
    settings["m"] = data.size if m is None else m
    network = {
        "omega": subject.count,
        "m": settings["m"],
        "images": data.size,
        "accuracy": scores["accuracy"].mean,
        "loss": scores["loss"].mean,
        "norm": _norm(subject.values),
        "distance": _norm([a - b for a, b in zip(subject.values, w0, strict=True)]),
    }
    partial = _resume(out, settings, network)
    for name in SEARCHES:
        if name not in partial["searches"]:
            rule = Rule(target_deviation, tolerance, name.startswith("alpha") and over == "worst", confidence)

            def evaluate(size, name=name, rule=rule):
                copies = _copies(name, size, subject, data, settings, counter)
                return rule.evaluate(Copies(subject, copies, how), scores[target], counter)

            told = None if progress is None else lambda i, n, name=name: progress(name, i, n)
            found = bisect(evaluate, iterations, upper, told)
            found["size_stderr"] = _size_stderr(found)
            partial["searches"][name] = found
            partial["cost"] = _sum(partial["before"], counter.passes(data.size))
            if out is not None:
                write_json(out, {**partial, "partial": True})
    sizes = {name: partial["searches"][name]["size"] for name in SEARCHES}
    mu = formulas.bounds(subject.values, w0, settings["m"], sizes, eps, delta)
    values = {name: formulas.measure(value, settings["m"]) for name, value in mu.items()}
    cost = _sum(partial["before"], counter.passes(data.size))
    seconds = time.perf_counter() - began
    report = Report(values, mu, partial["searches"], network, cost, settings, seconds)
    if out is not None:
        report.to_json(out)
    return report


def _copies(name, size, subject, data, settings, counter):
    """The perturbed values of one step of a search."""
    magnitude, num, seed = name.endswith("_mag"), settings["samples"], settings["seed"]
    if name.startswith("sigma"):
        return noisy_copies(subject.values, size, magnitude, num, seed, settings["noise"], settings["eps"])
    copies = _starts(subject.values, size, magnitude, settings["ball"], num, seed)
    return [_ascend(values, size, magnitude, subject, data, settings, counter) for values in copies]


def noisy_copies(params, sigma, magnitude, num, seed, noise="std", eps=1e-3):
    """num copies w + s n: s = sigma, or sqrt(sigma^2 w^2 + eps^2); of noise "variance" the square of that."""
    if not magnitude:
        return perturb(params, "normal", std=sigma if noise == "std" else sigma**2, num=num, seed=seed)
    if noise == "std":
        return perturb(params, "magnitude", std=sigma, eps=eps, num=num, seed=seed)
    copies = perturb([torch.zeros_like(w) for w in params], "normal", std=1.0, num=num, seed=seed)
    spreads = [w.square().mul_(sigma**2).add_(eps**2) for w in params]
    for copy in copies:
        for n, w, spread in zip(copy, params, spreads, strict=True):
            n.mul_(spread).add_(w)
    return copies


def _starts(params, alpha, magnitude, ball, num, seed):
    """Random points of the ball: uniform in the box, on the sphere for l2."""
    kind, unit = ("uniform", "alpha") if ball == "linf" else ("normal", "std")
    moves = perturb([torch.zeros_like(w) for w in params], kind, num=num, seed=seed, **{unit: 1.0})
    for move in moves:
        length = alpha if ball == "linf" else alpha / _norm(move)
        for u, w in zip(move, params, strict=True):
            u.mul_(w.abs().mul_(length) if magnitude else length).add_(w)
    return moves


def _ascend(values, alpha, magnitude, subject, data, settings, counter):
    """Projected gradient ascent on the mean cross-entropy, one batch per step, in a cycle."""
    step, taken = settings["ascent_lr"], 0
    while taken < settings["ascent_steps"]:
        for x, target in data:
            if taken == settings["ascent_steps"]:
                break
            _, gradients = subject.gradient(values, x, target, F.cross_entropy)
            gradients = [g.nan_to_num() for g in gradients]
            counter.backward(len(target))
            if settings["ball"] == "linf":
                shape = {"ball": "magnitude", "eta": 0.0} if magnitude else {}
                values = perturb(
                    subject.values, "ascent", alpha=alpha, step=step, grads=gradients, points=values, **shape
                )[0]
            else:
                values = [p + step * g for p, g in zip(values, gradients, strict=True)]
                values = _project_l2(values, subject.values, alpha, magnitude)
            taken += 1
    return values


def _project_l2(values, center, alpha, magnitude):
    """The nearest point on the segment to the center with ||u||, or ||u / w||, at most alpha."""
    moves = [p - w for p, w in zip(values, center, strict=True)]
    if magnitude:
        moves = [torch.where(w == 0, torch.zeros_like(u), u) for u, w in zip(moves, center, strict=True)]
    length = _norm(
        [u / torch.where(w == 0, 1.0, w.abs()) for u, w in zip(moves, center)] if magnitude else moves
    )
    factor = min(1.0, alpha / length) if length > 0 else 1.0
    return [w + factor * u for w, u in zip(center, moves, strict=True)]


def _norm(tensors):
    return ops.multi_norm(tensors)[0].item()


def _size_stderr(found):
    """Standard error of a size: that of the displacement over the slope to the nearest other size of the path."""
    *others, last = found["path"]
    if last["stderr"] is None or not others:
        return None
    near = min(others, key=lambda p: abs(p["size"] - last["size"]))
    rise = abs(near["displacement"] - last["displacement"])
    return (
        last["stderr"] * abs(near["size"] - last["size"]) / rise if rise > 0 and math.isfinite(rise) else None
    )


def _check(settings):
    for name, accepted in CHOICES.items():
        check_choice(name, settings[name], accepted)
    check_at_least(iterations=settings["iterations"], samples=settings["samples"])
    if not isinstance(settings["ascent_steps"], int) or settings["ascent_steps"] < 0:
        raise ValueError(f"ascent_steps must be an int >= 0, got {settings['ascent_steps']!r}")
    if not isinstance(settings["seed"], int):
        raise ValueError(f"seed must be an int, got {settings['seed']!r}")
    needed = ("target_deviation", "tolerance", "upper", "ascent_lr", "eps")
    given = [name for name in ("delta", "m", "confidence") if settings[name] is not None]
    check_positive(**{name: settings[name] for name in (*needed, *given)})


def _resume(out, settings, network):
    """What an earlier call with the same arguments on the same network left in ``out``."""
    fresh = {"settings": settings, "network": network, "searches": {}, "before": {}}
    if out is None or not Path(out).exists():
        return fresh
    old = read_object(out) or {}
    same = old.get("settings") == settings and old.get("network") == network
    return {**fresh, "searches": old["searches"], "before": old["cost"]} if same else fresh


def _sum(a, b):
    return {key: a.get(key, 0.0) + value for key, value in b.items()}
