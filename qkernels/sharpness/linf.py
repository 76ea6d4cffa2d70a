"""The worst loss in a small box around the weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..annotations import Criterion
from ..perturbation import perturb
from .data import Data
from .saved import Saved
from .subject import Subject, check_at_least, check_choice, check_criterion, check_positive


@dataclass
class LinfSharpness(Saved):
    """loss: at the weights; worst: the largest found; difference of the two; keskar: 100 difference / (1 + loss).

    restart, step: where it was found (0, 0: the weights themselves). losses: per restart, the loss after
    each step.
    """

    loss: float
    worst: float
    difference: float
    keskar: float
    restart: int
    step: int
    losses: list[list[float]]
    settings: dict[str, Any]


def linf_sharpness(model: nn.Module, loader: Iterable[Any], criterion: Criterion = F.cross_entropy,
                   rho: float = 1e-3, *, steps: int = 20, restarts: int = 1, step_size: float | None = None,
                   ball: str = "constant", weights: str = "latent", parameters: str = "weights",
                   batches: int | None = None, seed: int = 0) -> LinfSharpness:  # fmt: skip
    """max over ||e||_inf <= rho of L(w + e) - L(w), by projected sign ascent on the loss of the whole loader.

    e <- clip(e + step_size sign(grad L(w + e)), -r, r), r = rho or rho (|w| + 1). A lower bound of the
    maximum; never below 0. The model is left as it is, in evaluation mode throughout.

    Args:
        criterion: criterion(logits, target) -> mean loss of a batch.
        rho: radius > 0. steps: of ascent, each one pass. step_size: default max(2.5 / steps, 0.1) rho.
        restarts: the first starts at the weights, the others at uniform points of the box.
        ball: "constant", or "magnitude" (Keskar's rho (|w| + 1)). weights, parameters: as in ``measure``.

    Returns: LinfSharpness. Raises: ValueError naming the argument.
    Source: Noise Tempering, section 5.1 (rho 1e-3 and 5e-4); Keskar et al. 2017, metric 2.1.
    """
    check_at_least(steps=steps, restarts=restarts)
    check_choice("ball", ball, ("constant", "magnitude"))
    check_positive(rho=rho, **({} if step_size is None else {"step_size": step_size}))
    check_criterion(criterion)
    step_size = max(2.5 / steps, 0.1) * rho if step_size is None else step_size
    subject = Subject(model, weights, parameters)
    data = Data(loader, subject.device, batches)
    points = [None, *_box(subject.values, rho, ball, restarts - 1, seed)]
    losses, best = [], (-math.inf, 0, 0)
    box: dict[str, Any] = {"alpha": rho, "step": step_size, "ball": ball}
    for restart, values in enumerate(points):
        values, path = subject.values if values is None else values, []
        for step in range(steps + 1):
            loss, gradients = full_gradient(subject, data, values, criterion, needed=step < steps)
            path.append(loss)
            if loss > best[0]:
                best = (loss, restart, step)
            if step < steps:
                values = perturb(subject.values, "sign", grads=gradients, points=values, **box)[0]
        losses.append(path)
    loss, (worst, restart, step) = losses[0][0], best
    settings = {
        "rho": rho, "steps": steps, "restarts": restarts, "step_size": step_size, "ball": ball, "weights":
        weights, "parameters": parameters, "images": data.size, "seed": seed,
    }  # fmt: skip
    return LinfSharpness(
        loss, worst, worst - loss, 100 * (worst - loss) / (1 + loss), restart, step, losses, settings
    )


def _box(params, rho, ball, num, seed):
    """num uniform points of the box around the parameters."""
    if num == 0:
        return []
    moves = perturb([torch.zeros_like(w) for w in params], "uniform", alpha=1.0, num=num, seed=seed)
    for move in moves:
        for u, w in zip(move, params, strict=True):
            u.mul_(rho * (w.abs() + 1) if ball == "magnitude" else rho).add_(w)
    return moves


def full_gradient(subject, data, values, criterion, needed=True):
    """(mean loss over the images, its gradients, None if not needed); accumulated over batches."""
    total, sums = 0.0, None
    for x, target in data:
        share = len(target) / data.size
        if needed:
            loss, gradients = subject.gradient(values, x, target, criterion)
            parts = [g * share for g in gradients]
            sums = parts if sums is None else torch._foreach_add(sums, parts)
        else:
            with torch.no_grad():
                loss = criterion(subject.logits(subject.effective(values), x), target)
        total += loss.double().item() * share
    return total, sums
