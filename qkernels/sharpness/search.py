"""The largest perturbation a network stands: bisection, each step ended as soon as its outcome is decided."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

MIN_SEEN = 32  # images before a standard error is trusted
# Of the images that should decide, the share taken before the next look: 0.7 to 0.9 are as good, 0.5 and 1.05 are not.
_HASTE = 0.8


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
        for _, x, target in data.samples():
            logits = copies.logits(x)
            if logits.dim() != 3 or target.dim() != 1 or target.is_floating_point():
                raise ValueError(
                    "measure takes networks that return logits (N, classes), and integer labels (N,); got "
                    f"{tuple(logits.shape[1:])} and {target.dtype} {tuple(target.shape)}"
                )
            for name, found in parts.items():
                found.append(_scores(name, logits, target)[0])
        right, loss = (torch.cat(found) for found in parts.values())
        known = torch.stack([right, (-loss).exp(), loss.clamp_min(1e-7).log()], 1)
        return {name: cls(name, data, base, known) for name, base in (("accuracy", right), ("loss", loss))}

    def of(self, logits, target):
        return _scores(self.target, logits, target)

    def displacement(self, scores, index):
        """Of these images, (images,) for all copies or (copies, images)."""
        return self.base[index] - scores if self.target == "accuracy" else scores - self.base[index]

    def limits(self):
        """What a displacement of each image can be."""
        lowest = self.base - 1.0 if self.target == "accuracy" else -self.base
        highest = self.base if self.target == "accuracy" else torch.full_like(self.base, math.inf)
        return lowest, highest


def _scores(name, logits, target):
    """(copies, images), float64; a cross-entropy that is not a number counts as infinite."""
    if name == "accuracy":
        return (logits.argmax(2) == target).double()
    target = target.expand(logits.shape[:2]).flatten()
    flat = F.cross_entropy(logits.flatten(0, 1).float(), target, reduction="none")
    return flat.view(logits.shape[:2]).double().nan_to_num(nan=math.inf, posinf=math.inf)


class Regression:
    """The mean over all images (and copies), from those seen: least squares on what is known of every image.

    y = b0 + b . z, z standardised columns, with a ridge of one image. known: float64 (images, k). times: how
    often each image is to be seen. The images come in random order.
    """

    def __init__(self, known, times=1):
        z = known - known.mean(0)
        z = z / z.square().mean(0).sqrt().clamp_min(1e-12)
        self.z = torch.cat([z.new_ones(len(z), 1), z], 1)
        self.total, self.size, self.seen = self.z.sum(0) * times, len(z) * times, 0
        self.gram = torch.eye(self.z.shape[1], dtype=z.dtype, device=z.device)
        self.gram[0, 0] = 0.0
        self.cross = self.squares = 0.0

    def add(self, y, index):
        """Values of images, (rows, len(index))."""
        z = self.z[index]
        self.gram += z.T @ z
        self.cross, self.squares = self.cross + z.T @ y.T, self.squares + y.square().sum(1)
        self.seen += y.shape[1]

    def mean(self):
        """(mean, its variance), per row."""
        rest = self.size - self.seen
        inverse = torch.linalg.inv(self.gram)
        slope, ahead = inverse @ self.cross, (self.total - self.gram[0]) / rest
        # Two images' worth of unseen variance keep a run of equal images from looking certain.
        errors = (self.squares - (slope * self.cross).sum(0) + 2) / (self.seen - len(slope))
        spread = (rest / self.size) ** 2 * (1 / rest + ahead @ inverse @ ahead)
        return (self.cross[0] + rest * (ahead @ slope)) / self.size, errors * spread


class Rule:
    """When the displacement at a size is above, within or below target +- tolerance.

    worst: the displacement of the worst copy instead of the mean over copies. confidence: standard errors
    (``Regression``) that decide a step early; None decides only what is certain. A rule serves one search: the
    last complete step's displacements say most about those at the next size, which has the same draws.

    For the mean over copies each copy first sees a share of the images of its own, then the next copy's share, and
    so on. Most of what displacements vary by is the image: once each has been seen by one copy, the rest is small.
    From the second share on, the next look comes after most of the images that should decide.
    """

    def __init__(self, target, tolerance, worst=False, confidence=4.0):
        self.target, self.tolerance, self.worst, self.confidence = target, tolerance, worst, confidence
        self.low, self.high = target - tolerance, target + tolerance
        self.complete = None  # (images, 1)

    def interval(self, low, high):
        """What every displacement in the interval is, or None; they are absolute, as in the published code."""
        least, most = max(low, -high, 0.0), max(abs(low), abs(high))
        if least > self.low and most < self.high:
            return "within"
        return "above" if least > self.high else "below" if most < self.low else None

    def point(self, displacement):
        distance = abs(displacement) - self.target
        return "within" if abs(distance) < self.tolerance else "above" if distance > 0 else "below"

    def evaluate(self, copies, scores, counter):
        """The Step (without its size) of these copies."""
        data, num = scores.data, copies.num
        known = scores.known if self.complete is None else torch.cat([scores.known, self.complete], 1)
        shared = data.shuffled and self.confidence is not None and not self.worst
        regression = Regression(known, num if shared else 1)
        found = scores.base.new_full((num, data.size), math.nan)
        self.wanted = 0
        for index, x, target in data.shares(num, lambda: self.wanted) if shared else data.samples():
            d = scores.displacement(scores.of(copies.logits(x, own=shared), target), index)
            found.scatter_(1, index.expand(num, -1), d)
            if shared:
                regression.add(d.reshape(1, -1), index.flatten())
            else:
                regression.add(d if self.worst else d.mean(0)[None], index)
            counter.forward(d.numel())
            decided = self._early(found, regression, scores)
            if decided is not None:
                return self._step(found, *decided)
        complete = found.mean(0)[:, None]
        if complete.isfinite().all():
            self.complete = complete
        return self._step(found, "complete", self.point(self._over(found.mean(1))))

    def _over(self, each):
        return (each.max() if self.worst else each.mean()).item()

    def _early(self, found, regression, scores):
        if regression.seen == regression.size:
            return None
        least, most = (torch.where(found.isnan(), limit, found).mean(1) for limit in scores.limits())
        low, high = self._over(least), self._over(most)
        verdict = self.interval(low, high)
        if verdict is not None:
            return "bounds", verdict
        if self.confidence is None or not scores.data.shuffled or regression.seen < MIN_SEEN:
            return None
        mean, variance = regression.mean()
        balanced = (math.nan, math.inf) if self.worst else _balanced(found)
        if balanced[1] < variance.max():
            mean, variance = balanced
        reach = self.confidence * variance.sqrt()
        low, high = max(low, (mean - reach).max().item()), min(high, (mean + reach).max().item())
        verdict = self.interval(low, high) if low <= high else None
        if verdict is not None:
            return "confidence", verdict
        if balanced[1] < math.inf:  # before, the variance of images hides that of copies
            self.wanted = self._wanted(mean.item(), variance.item(), regression)
        return None

    def _wanted(self, mean, variance, regression):
        """Images of each copy that are likely to decide: somewhat fewer, for what is known of the mean is little."""
        per_value = variance / (1 / regression.seen - 1 / regression.size)
        gap = min(abs(abs(mean) - edge) for edge in (self.low, self.high))
        share = per_value / max(per_value + regression.size * (gap / self.confidence) ** 2, 1e-300)
        return int(_HASTE * share * len(regression.z))

    def _step(self, found, decided, verdict):
        each = found.nanmean(1)
        stderr = None if self.worst or len(each) < 2 else (each.std() / len(each) ** 0.5).item()
        seen = (~found.isnan()).sum().item() // len(found)
        return Step(0.0, self._over(each), stderr, seen, decided, verdict)


def _balanced(found):
    """(mean, its variance) where all but a few images have been seen by equally many copies, two or more.

    What images differ by is then known, and the variance is that of the copies within an image.
    """
    num, size = found.shape
    times = (~found.isnan()).sum(0)
    seen = times == times.max()
    covered, often = seen.sum().item(), times.max().item()
    if often < 2 or times.sum() != covered * often or covered <= size - num:
        return math.nan, math.inf
    within = found[:, seen]
    mean = within.nanmean(0)
    if not mean.isfinite().all():
        return math.nan, math.inf
    errors = ((within - mean).square().nansum() + 2) / (covered * (often - 1))
    rest = (mean.var() + errors) * (size - covered) / size**2
    return mean.mean()[None], (errors / (covered * often) * (1 - often / num) + rest)[None]


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
