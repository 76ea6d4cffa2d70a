"""The largest perturbation a network stands: bisection, each step ended as soon as its outcome is decided."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

MIN_SEEN = 32  # images before a standard error is trusted


@dataclass
class Step:
    """One step of a bisection: the displacement measured at a size.

    stderr: over the copies, None for the worst of them. images: images seen by each copy. decided:
    "complete", "bounds" (no outcome of the rest could change it) or "confidence". verdict: "above", "within"
    or "below" the target.
    """

    size: float
    displacement: float
    stderr: float | None
    images: int
    decided: str
    verdict: str


class Scores:
    """Per-image accuracy (0 or 1) or cross-entropy of the unperturbed network, and of copies of it.

    The displacement of an image and copy is the loss of accuracy (gain of cross-entropy). base: float64
    (images,). known: what is known of every image beforehand and says how easily it is displaced, float64
    (images, k).
    """

    def __init__(self, target, data, base, known):
        self.target, self.data, self.base, self.mean = target, data, base, base.mean().item()
        self.known = known

    @classmethod
    def unperturbed(cls, data, copies):
        """{"accuracy": Scores, "loss": Scores} of one copy, from one pass."""
        parts = {"accuracy": [], "loss": []}
        for x, target in data.samples():
            logits = copies.logits(x)
            for name, found in parts.items():
                found.append(_scores(name, logits, target)[0])
        right, loss = (torch.cat(found) for found in parts.values())
        known = torch.stack([right, (-loss).exp(), loss.clamp_min(1e-7).log()], 1)
        return {name: cls(name, data, base, known) for name, base in (("accuracy", right), ("loss", loss))}

    def of(self, logits, target):
        return _scores(self.target, logits, target)

    def displacement(self, scores, start):
        base = self.base[start : start + scores.shape[1]]
        return base - scores if self.target == "accuracy" else scores - base

    def rest(self, seen):
        """Bounds on the sum of one copy's displacements over the images not yet seen."""
        base = self.base[seen:]
        total = base.sum().item()
        return (total - len(base), total) if self.target == "accuracy" else (-total, math.inf)


def _scores(name, logits, target):
    """(copies, images), float64; a cross-entropy that is not a number counts as infinite."""
    if name == "accuracy":
        return (logits.argmax(2) == target).double()
    flat = F.cross_entropy(logits.flatten(0, 1).float(), target.repeat(len(logits)), reduction="none")
    return flat.view(logits.shape[:2]).double().nan_to_num(nan=math.inf, posinf=math.inf)


class Regression:
    """The mean over all images, from those seen: least squares on what is known of every image.

    y = b0 + b . z, z standardised columns, with a ridge of one image. known: float64 (images, k). The
    images come in random order.
    """

    def __init__(self, known):
        z = known - known.mean(0)
        z = z / z.square().mean(0).sqrt().clamp_min(1e-12)
        self.z = torch.cat([z.new_ones(len(z), 1), z], 1)
        self.total, self.seen = self.z.sum(0), 0
        self.gram = torch.eye(self.z.shape[1], dtype=z.dtype, device=z.device)
        self.gram[0, 0] = 0.0
        self.cross = self.squares = 0.0

    def add(self, y):
        """The next images' values, (rows, images)."""
        z = self.z[self.seen : self.seen + y.shape[1]]
        self.gram += z.T @ z
        self.cross, self.squares = self.cross + z.T @ y.T, self.squares + y.square().sum(1)
        self.seen += y.shape[1]

    def mean(self):
        """(mean over all images, its variance), per row."""
        rest = len(self.z) - self.seen
        inverse = torch.linalg.inv(self.gram)
        slope, ahead = inverse @ self.cross, (self.total - self.gram[0]) / rest
        # Two images' worth of unseen variance keep a run of equal images from looking certain.
        errors = (self.squares - (slope * self.cross).sum(0) + 2) / (self.seen - len(slope))
        spread = (rest / len(self.z)) ** 2 * (1 / rest + ahead @ inverse @ ahead)
        return (self.cross[0] + rest * (ahead @ slope)) / len(self.z), errors * spread


class Rule:
    """When the displacement at a size is above, within or below target +- tolerance.

    worst: the displacement of the worst copy instead of the mean over copies. confidence: standard errors
    (``Regression``) that decide a step early; None decides only what is certain. A rule serves one search: the
    last complete step's displacements say most about those at the next size, which has the same draws.
    """

    def __init__(self, target, tolerance, worst=False, confidence=4.0):
        self.target, self.tolerance, self.worst, self.confidence = target, tolerance, worst, confidence
        self.low, self.high = target - tolerance, target + tolerance
        self.complete = None  # (images, 1)

    def interval(self, low, high):
        """What every displacement in the interval is, or None; they are absolute, as in the published code."""
        least, most = max(low, -high, 0.0), max(abs(low), abs(high))
        return "above" if least > self.high else "below" if most < self.low else None

    def point(self, displacement):
        distance = abs(displacement) - self.target
        return "within" if abs(distance) < self.tolerance else "above" if distance > 0 else "below"

    def evaluate(self, copies, scores, counter):
        """The Step (without its size) of these copies."""
        data, seen = scores.data, 0
        regression = Regression(
            scores.known if self.complete is None else torch.cat([scores.known, self.complete], 1)
        )
        columns, sums, each = None, 0.0, []
        for x, target in data.samples():
            d = scores.displacement(scores.of(copies.logits(x), target), seen)
            columns = d.sum(1) if columns is None else columns + d.sum(1)
            each.append(d.mean(0))
            grouped = d if self.worst else each[-1][None]
            sums = sums + grouped.sum(1)
            regression.add(grouped)
            seen += d.shape[1]
            counter.forward(d.numel())
            if seen == data.size:
                break
            decided = self._early(sums, regression, data, scores)
            if decided is not None:
                return self._step(columns, seen, *decided)
        complete = torch.cat(each)[:, None]
        if complete.isfinite().all():
            self.complete = complete
        mean = (sums.max() / seen).item()
        return self._step(columns, seen, "complete", self.point(mean))

    def _early(self, sums, regression, data, scores):
        rest = scores.rest(regression.seen)
        low = ((sums + rest[0]) / data.size).max().item()
        high = ((sums + rest[1]) / data.size).max().item()
        verdict = self.interval(low, high)
        if verdict is not None:
            return "bounds", verdict
        if self.confidence is None or not data.shuffled or regression.seen < MIN_SEEN:
            return None
        mean, variance = regression.mean()
        reach = self.confidence * variance.sqrt()
        low, high = max(low, (mean - reach).max().item()), min(high, (mean + reach).max().item())
        verdict = self.interval(low, high) if low <= high else None
        return None if verdict is None else ("confidence", verdict)

    def _step(self, columns, seen, decided, verdict):
        each = columns / seen
        shown = each.max() if self.worst else each.mean()
        stderr = None if self.worst or len(each) < 2 else (each.std() / len(each) ** 0.5).item()
        return Step(0.0, shown.item(), stderr, seen, decided, verdict)


def bisect(evaluate, iterations, upper, progress=None):
    """Bisection on [0, upper] to the first Step of ``evaluate(size)`` that is "within", or for ``iterations``.

    Returns: {"size": the last size tried, "found": whether it is within tolerance, "path": [...]}.
    """
    low, high, path = 0.0, upper, []
    for i in range(iterations):
        size = (low + high) / 2
        step = evaluate(size)
        step.size = size
        path.append(asdict(step))
        if progress is not None:
            progress(i + 1, iterations)
        if step.verdict == "within":
            break
        low, high = (low, size) if step.verdict == "above" else (size, high)
    last = path[-1]
    return {
        "size": last["size"],
        "found": last["verdict"] == "within",
        "displacement": last["displacement"],
        "stderr": last["stderr"],
        "path": path,
    }


class Counter:
    """Images sent forward and backward."""

    def __init__(self):
        self.forwards = self.backwards = 0

    def forward(self, images):
        self.forwards += images

    def backward(self, images):
        self.forwards += images
        self.backwards += images

    def passes(self, size):
        return {"forward_passes": self.forwards / size, "backward_passes": self.backwards / size}
