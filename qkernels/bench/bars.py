"""The bars that the kernels have to meet, judged on rows of results."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from . import results
from .rows import PASSES

LARGE = 1 << 20  # elements


@dataclass(frozen=True)
class Bar:
    """``measure(row, rows)`` of every row of ``backend`` that ``of`` picks, at most (or at least) ``limit``."""

    issue: str  # "a" the quantizer and training, "b" noise and distillation, "c" sharpness
    what: str
    of: Callable
    measure: Callable
    limit: float
    least: bool = False
    backend: str = "native"

    def holds(self, value):
        return value >= self.limit if self.least else value <= self.limit


def elements(row):
    return math.prod(int(size) for size in row["case"].split()[0].split("x"))


def _plain_quantizer(row):
    return row["op"] == "fake_quantize" and len(row["case"].split()) == 3


def _plain(dtype, large):
    def of(row):
        return _plain_quantizer(row) and row["dtype"] == dtype and large in (None, elements(row) >= LARGE)

    return of


def _against(backend, faster):
    """Times faster than a backend of the same group, or its own time over that backend's."""

    def measure(row, rows):
        value = next((results.ratio(row, r) for r in rows if _beside(r, row, backend)), None)
        return value if faster or value is None else 1 / value

    return measure


def _beside(other, row, backend):
    return other["backend"] == backend and results.group(other) == results.group(row)


def _saved_over_input(row, rows):
    """Saved bytes over those of x: the bytes that move are those of x five times."""
    return None if row["saved_bytes"] is None else row["saved_bytes"] / (row["bytes"] / 5)


def _op(name, case="", threads=None):
    return lambda row: row["op"] == name and case in row["case"] and threads in (None, row["threads"])


def _either(*ofs):
    return lambda row: any(of(row) for of in ofs)


def _against_best(*backends):
    """Times faster than the fastest of several backends of the same group."""

    def measure(row, rows):
        found = [_against(backend, True)(row, rows) for backend in backends]
        return min((value for value in found if value is not None), default=None)

    return measure


def _saved_over(baseline):
    def measure(row, rows):
        saved = [r["saved_bytes"] for r in rows if _beside(r, row, baseline) and r["saved_bytes"]]
        return row["saved_bytes"] / saved[0] if saved and row["saved_bytes"] else None

    return measure


def _peak_over(copies, moved):
    """The peak over ``copies`` parameter lists, of which as many as ``moved`` have to move."""
    return lambda row, rows: (
        None if row["peak_bytes"] is None else row["peak_bytes"] / (row["bytes"] * copies / moved)
    )


_F32, _BF16 = _plain("float32", True), _plain("bfloat16", True)
_TRAIN, _TEMPERING = _op("train_step"), _op("fake_quantize", "512x512x3x3 tensor tempering", 1)
_CSD = _op("standardized_distance")
_SAM = _either(_op("sam_perturb", "resnet18"), _op("sam_perturb", "resnet50"))
_COPIES = "perturb_copies"
BARS = (
    Bar("a", "fwd+bwd over a copy of the same bytes, large, float32", _F32, _against("copy", False), 1.25),
    Bar("a", "fwd+bwd over a copy of the same bytes, large, bfloat16", _BF16, _against("copy", False), 1.25),
    Bar("a", "the passes alone, outputs reused, over a copy, float32", _F32, _against("copy", False), 1.25,
        backend=PASSES),
    Bar("a", "the passes alone, outputs reused, over a copy, bfloat16", _BF16, _against("copy", False), 1.25,
        backend=PASSES),
    Bar("a", "fwd+bwd over torch.compile, float32", _plain("float32", None), _against("compile", False), 1.05),
    Bar("a", "faster than torch.compile, small, float32", _plain("float32", False), _against("compile", True), 2.5,
        True),
    Bar("a", "faster than PyTorch's learnable op, large, float32", _F32, _against("torch", True), 5.0, True),
    Bar("a", "faster than eager, large, float32", _F32, _against("eager", True), 6.0, True),
    Bar("a", "faster than torch.compile, large, bfloat16", _BF16, _against("compile", True), 1.6, True),
    Bar("a", "faster than eager, large, bfloat16", _BF16, _against("eager", True), 10.0, True),
    # The scales are saved beside x: four bytes per channel.
    Bar("a", "saved for backward over x", _plain_quantizer, _saved_over_input, 1.01),
    Bar("a", "training step over the float step", _TRAIN, _against("float", False), 1.20),
    Bar("a", "saved bytes of a training step over float", _TRAIN, _saved_over("float"), 1.6),
    Bar("b", "tempering over no noise, 1 thread", _TEMPERING, _against("plain", False), 3.0),
    Bar("b", "tempering faster than eager, 1 thread", _TEMPERING, _against("eager", True), 5.0, True),
    Bar("b", "tempering faster than torch.compile, 1 thread", _TEMPERING, _against("compile", True), 1.9, True),
    # The seed, eight bytes, is saved too.
    Bar("b", "saved bytes with tempering over no noise", _TEMPERING, _saved_over("plain"), 1.0001),
    Bar("b", "standardised distance faster than eager", _CSD, _against("eager", True), 7.0, True),
    Bar("b", "standardised distance faster than torch.compile", _CSD, _against("compile", True), 1.9, True),
    Bar("c", "SAM perturbation faster than loop, foreach and compile, large", _SAM,
        _against_best("eager", "foreach", "compile"), 1.25, True),
    Bar("c", "SAM perturbation faster than pytorch_optimizer, large", _SAM, _against("pytorch_optimizer", True), 1.8,
        True),
    Bar("c", "SAM perturbation faster than the loop, resnet20", _op("sam_perturb", "resnet20"), _against("eager", True),
        3.0, True),
    Bar("c", "extra memory of a SAM perturbation over a copy", _op("sam_perturb"), _peak_over(1, 4), 1.01),
    Bar("c", "ten copies faster than foreach, 1 thread", _op(_COPIES, threads=1), _against("foreach", True), 3.0, True),
    Bar("c", "ten copies faster than foreach, 2 threads", _op(_COPIES, threads=2), _against("foreach", True), 5.0,
        True),
    Bar("c", "peak memory of ten copies over ten copies", _op(_COPIES), _peak_over(10, 11), 1.01),
    Bar("c", "SAQ step, tau 4, over a plain step", _op("saq_step", "tau 4"), _against("plain", False), 1.30),
    Bar("c", "SAQ step, tau 1, over a plain step", _op("saq_step", "tau 1"), _against("plain", False), 2.1),
)  # fmt: skip


def judge(rows, issue=""):
    """[(bar, worst value, its row, number of rows)]; value and row None where no row of ``rows`` shows the bar."""
    verdicts = []
    for bar in BARS:
        if issue not in ("", bar.issue):
            continue
        judged = [row for row in rows if row["backend"] == bar.backend and bar.of(row)]
        values = [(bar.measure(row, rows), row) for row in judged if row["median_ms"]]
        values = [(value, row) for value, row in values if value is not None]
        pick = min if bar.least else max
        worst = pick(values, key=lambda pair: pair[0]) if values else (None, None)
        verdicts.append((bar, *worst, len(values)))
    return verdicts


def table(rows, as_markdown=False, issue=""):
    """The bars as text, with the worst row of each; of one issue where ``issue`` names one."""
    issue = issue if issue in {bar.issue for bar in BARS} else ""
    lines = [("", "what", "bar", "measured", "", "worst of", "rows")]
    for bar, value, row, count in judge(rows, issue):
        limit = f"{'at least' if bar.least else 'at most'} {bar.limit:g}x"
        verdict = "not measured" if value is None else "pass" if bar.holds(value) else "FAIL"
        where = "-" if row is None else f"{row['case']} {row['dtype']} {row['threads']}t"
        measured = results.number(value, suffix="x")
        lines.append((bar.issue.upper(), bar.what, limit, measured, verdict, where, str(count)))
    return results.text(lines, as_markdown)


def met(rows):
    """Whether every bar that the rows show holds."""
    return all(value is None or bar.holds(value) for bar, value, _, _ in judge(rows))
