"""The Hessian of the loss with respect to the weights, through the quantizers: eigenvalues, trace, density."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..annotations import Criterion, Progress
from ..perturbation import perturb
from .data import Data
from .saved import Saved
from .subject import Subject, check_at_least, check_criterion

_TOGETHER = 8  # vectors that share one graph of the gradient
_ROOM = 20  # vectors of Lanczos' basis
_UNSAVED = ("eigenvectors", "names")


@dataclass
class Hessian(Saved):
    """eigenvalues: largest in magnitude first. residuals: ||H v - lambda v||, and whether each has converged.
    iterations: products with the Hessian that they took together.

    trace: mean of v.Hv over random signs v; trace_stderr: its standard error; trace_samples: the values; traces: each
    tensor's part of the trace, by name (which layers bits matter to: HAWQ).
    density: Density or None. eigenvectors: lists of tensors like ``names``. products: Hessian-vector
    products over all images.
    """

    eigenvalues: list[float]
    residuals: list[float]
    iterations: int
    converged: list[bool]
    trace: float | None
    trace_stderr: float | None
    trace_samples: list[float]
    traces: dict[str, float]
    products: int
    density: "Density | None" = None
    eigenvectors: list[list[torch.Tensor]] | None = field(default=None, repr=False)
    names: list[str] | None = field(default=None, repr=False)

    def __post_init__(self):
        if isinstance(self.density, dict):
            self.density = Density(**self.density)

    def to_dict(self) -> dict[str, Any]:
        """All but the eigenvectors, and the names of their tensors."""
        values = {k: v for k, v in vars(self).items() if k not in _UNSAVED}
        return {**values, "density": None if self.density is None else vars(self.density)}

    @classmethod
    def _fields(cls):
        return super()._fields() - set(_UNSAVED)


@dataclass
class Density(Saved):
    """Spectral density by stochastic Lanczos quadrature: nodes and weights (summing to 1), averaged over ``probes``."""

    nodes: list[float]
    weights: list[float]
    probes: int

    def curve(self, points: int = 200, sigma: float | None = None) -> tuple[list[float], list[float]]:
        """(eigenvalues, density): the nodes blurred by Gaussians of deviation sigma, default 1 % of the range."""
        nodes, weights = (torch.tensor(t, dtype=torch.float64) for t in (self.nodes, self.weights))
        sigma = sigma or 0.01 * max((nodes.max() - nodes.min()).item(), 1e-12)
        grid = torch.linspace(nodes.min() - 4 * sigma, nodes.max() + 4 * sigma, points, dtype=torch.float64)
        kernel = torch.exp(-0.5 * ((grid[:, None] - nodes) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        return grid.tolist(), (kernel @ weights).tolist()


class _Products:
    """Hessian-vector products of the mean loss; the graph of a batch lives until its products are done."""

    def __init__(self, model, loader, criterion, weights, parameters, batches):
        check_criterion(criterion)
        self.subject = Subject(model, weights, parameters)
        self.data = Data(loader, self.subject.device, batches)
        self.criterion, self.count = criterion, 0

    def __call__(self, vectors):
        """[H v for v in vectors]; a vector is a list of tensors."""
        results = [[torch.zeros_like(t) for t in v] for v in vectors]
        leaves = self.subject.leaves()
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for x, target in self.data:
                loss = self.criterion(self.subject.logits(self.subject.effective(leaves), x), target)
                loss = loss * (len(target) / self.data.size)
                gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
                pairs = [(g, i) for i, g in enumerate(gradients) if g.requires_grad]
                for k, v in enumerate(vectors if pairs else []):
                    products = torch.autograd.grad(
                        [g for g, _ in pairs], leaves, [v[i] for _, i in pairs],
                        retain_graph=k + 1 < len(vectors), materialize_grads=True,
                    )  # fmt: skip
                    torch._foreach_add_(results[k], products)
        self.count += len(vectors)
        return results

    def random(self, kind, num, seed, first=0):
        """num vectors of standard normals ("normal") or signs ("sign"), a pure function of the seed."""
        zeros = [torch.zeros_like(w) for w in self.subject.values]
        if kind == "normal":
            return perturb(zeros, "normal", std=1.0, num=num, seed=seed, first=first)
        drawn = perturb(zeros, "uniform", alpha=1.0, num=num, seed=seed, first=first)
        return [[torch.where(t < 0, -1.0, 1.0).to(t) for t in v] for v in drawn]


def hessian(model: nn.Module, loader: Iterable[Any], criterion: Criterion = F.cross_entropy, top: int = 3,
            trace_samples: int = 32, *, weights: str = "latent", parameters: str = "weights", density_probes: int = 0,
            density_steps: int = 40, tolerance: float = 1e-3, iterations: int = 200, batches: int | None = None,
            seed: int = 0, progress: Progress | None = None) -> Hessian:  # fmt: skip
    """Top eigenvalues and trace of the Hessian of the mean loss over the whole loader, through the quantizers.

    Eigenvalues by Lanczos, until ||H v - lambda v|| <= tolerance |lambda| (then an eigenvalue is that near; the error
    is usually of the order of tolerance^2): a fraction of the products that power iteration takes. Trace by
    Hutchinson's estimator. ``weights="latent"`` differentiates twice through the weight quantizers, whose
    straight-through surrogate is piecewise linear: the Hessian of the loss as training sees it; "quantized"
    takes the quantized weights as the variables. Activation quantizers act in both.

    The model is left as it is: evaluation mode on a copy of its structure, no gradient is stored, no graph
    kept.

    Args:
        criterion: criterion(logits, target) -> mean loss of a batch, twice differentiable.
        top, trace_samples: how many; 0 leaves them out. iterations: products per eigenvalue, at most.
        density_probes: random vectors for the spectral density (``density_steps`` Lanczos steps each); 0 leaves it out.
        progress: called with (what, done, of).

    Returns: Hessian. Raises: ValueError naming the argument.
    Source: Yao et al. 2020 (PyHessian); Hutchinson 1990; Ghorbani et al. 2019 for the density.
    """
    for name, value in (("top", top), ("trace_samples", trace_samples), ("density_probes", density_probes)):
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be an int >= 0, got {value!r}")
    check_at_least(iterations=iterations, density_steps=density_steps)
    product = _Products(model, loader, criterion, weights, parameters, batches)
    if top > product.subject.count:
        raise ValueError(f"top must be at most {product.subject.count}, the number of parameters, got {top}")
    tell = progress or (lambda *_: None)
    found: list[tuple[float, float]] = []
    vectors: list[list[torch.Tensor]] = []
    for i in range(top):  # one after the other, for an eigenvalue may come several times
        start = product.random("normal", 1, seed, first=i)[0]
        value, residual, vector = _largest(product, start, vectors, tolerance, iterations)
        found.append((value, residual))
        vectors.append(vector)
        tell("eigenvalues", i + 1, top)
    order = sorted(range(top), key=lambda i: -abs(found[i][0]))
    values, residuals = ([found[i][column] for i in order] for column in (0, 1))
    # What is zero beside the largest need not be known to its own scale.
    least = 1e-3 * max(map(abs, values), default=0.0)
    converged = [r <= tolerance * max(abs(value), least) for value, r in zip(values, residuals, strict=True)]
    vectors, taken = [vectors[i] for i in order], product.count
    parts: list[list[float]] = []  # of the samples: one number for each tensor
    while len(parts) < trace_samples:
        num = min(_TOGETHER, trace_samples - len(parts))
        signs = product.random("sign", num, seed + 1, first=len(parts))
        for v, hv in zip(signs, product(signs), strict=True):
            parts.append(_dots(v, hv).tolist())
        tell("trace", len(parts), trace_samples)
    samples = [sum(part) for part in parts]
    mean, stderr = _mean(samples)
    means = [sum(column) / len(parts) for column in zip(*parts)]
    density = None
    if density_probes:
        density = _density(product, density_probes, density_steps, seed + 2, tell)
    names = product.subject.names
    return Hessian(
        eigenvalues=values, residuals=residuals, iterations=taken, converged=converged, trace=mean,
        trace_stderr=stderr, trace_samples=samples, traces=dict(zip(names, means)), products=product.count,
        density=density, eigenvectors=vectors, names=names,
    )  # fmt: skip


def spectral_density(model: nn.Module, loader: Iterable[Any], criterion: Criterion = F.cross_entropy,
                     probes: int = 4, steps: int = 40, *, weights: str = "latent", parameters: str = "weights",
                     batches: int | None = None, seed: int = 0,
                     progress: Progress | None = None) -> Density:  # fmt: skip
    """The density of the Hessian's eigenvalues by stochastic Lanczos quadrature, through the quantizers.

    Each probe: ``steps`` of Lanczos with full reorthogonalisation from a random vector; the tridiagonal
    matrix's eigenvalues are nodes, the squared first components of its eigenvectors their weights. Arguments
    as in ``hessian``.

    Returns: Density. Raises: ValueError naming the argument. Source: Ghorbani et al. 2019, section 2.
    """
    check_at_least(probes=probes, steps=steps)
    product = _Products(model, loader, criterion, weights, parameters, batches)
    return _density(product, probes, steps, seed, progress or (lambda *_: None))


def _largest(product, start, deflated, tolerance, limit):
    """(value, residual, unit vector) of the eigenvalue largest in magnitude, off the deflated vectors.

    Lanczos with full reorthogonalisation; where the basis is full, the best of it stays (thick restart). The residual
    is that of a product with the vector itself, for a Hessian that is not quite symmetric (EWGS) too.
    """
    v, _ = _split(start, deflated)
    basis, matrix = [_unit(v)], torch.zeros(0, 0, dtype=torch.float64)
    size, taken = product.subject.count - len(deflated), 1
    while True:
        w, taken = product([basis[-1]])[0], taken + 1
        along = torch.zeros(len(basis), dtype=torch.float64)
        for _ in range(2):
            w, _ = _split(w, deflated)
            w, part = _split(w, basis)
            along += part
        if not along.isfinite().all():
            return math.nan, math.nan, basis[0]
        matrix = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
        matrix[-1, :] = matrix[:, -1] = along
        values, vectors = torch.linalg.eigh(matrix)
        order = values.abs().argsort(descending=True)
        values, vectors = values[order], vectors[:, order]
        length = math.sqrt(_dot(w, w))
        best = values[0].abs().item()
        if length * abs(vectors[-1, 0].item()) <= tolerance * best or taken >= limit or len(basis) == size:
            v = _combined(basis, vectors[:, 0])
            hv, _ = _split(product([v])[0], deflated)
            off, (value,) = _split(hv, [v])
            return value.item(), math.sqrt(_dot(off, off)), v
        if len(basis) == _ROOM:
            kept = (_ROOM + 1) // 2
            basis, matrix = [_combined(basis, vectors[:, i]) for i in range(kept)], torch.diag(values[:kept])
        basis.append(_unit(w))


def _combined(basis, factors):
    total = [torch.zeros_like(t) for t in basis[0]]
    for b, factor in zip(basis, factors.tolist(), strict=True):
        torch._foreach_add_(total, torch._foreach_mul(b, factor))
    return _unit(total)


def _density(product, probes, steps, seed, tell):
    nodes, weights = [], []
    for probe in range(probes):
        basis, diagonal, off = [_unit(product.random("normal", 1, seed, first=probe)[0])], [], []
        while True:
            w = product([basis[-1]])[0]
            diagonal.append(_dot(w, basis[-1]))
            w = _split(_split(w, basis)[0], basis)[0]
            length = math.sqrt(_dot(w, w))
            if len(diagonal) == min(steps, product.subject.count) or length <= 1e-6 * max(map(abs, diagonal)):
                break
            off.append(length)
            basis.append([t / length for t in w])
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if off:
            matrix += torch.diag(torch.tensor(off, dtype=torch.float64), 1)
            matrix += torch.diag(torch.tensor(off, dtype=torch.float64), -1)
        values, vectors = torch.linalg.eigh(matrix)
        nodes += values.tolist()
        weights += (vectors[0].square() / probes).tolist()
        tell("density", probe + 1, probes)
    return Density(nodes, weights, probes)


def _dots(a, b):
    """The product of each pair of tensors."""
    return torch.stack([(s.double() * t.double()).sum() for s, t in zip(a, b, strict=True)])


def _dot(a, b):
    return _dots(a, b).sum().item()


def _unit(v):
    length = math.sqrt(_dot(v, v))
    return [t / length for t in v] if length > 0 else v


def _split(v, basis):
    """(v without its parts along the basis, the parts' lengths)."""
    along = torch.zeros(len(basis), dtype=torch.float64)
    for i, b in enumerate(basis):
        along[i] = length = _dot(v, b)
        v = torch._foreach_sub(v, torch._foreach_mul(b, length))
    return list(v), along


def _mean(samples):
    """(mean, standard error); None where there are too few."""
    if not samples:
        return None, None
    values = torch.tensor(samples, dtype=torch.float64)
    return values.mean().item(), (values.std() / len(samples) ** 0.5).item() if len(samples) > 1 else None
