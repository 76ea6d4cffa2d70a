"""The bars that the kernels have to meet, judged on rows of results."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from . import results

LARGE = 1 << 20  # elements


@dataclass(frozen=True)
class Bar:
    """``measure(row, rows)`` of every native row that ``of`` picks, at most (or at least) ``limit``."""

    what: str
    of: Callable
    measure: Callable
    limit: float
    least: bool = False

    def holds(self, value):
        return value >= self.limit if self.least else value <= self.limit


def elements(row):
    return math.prod(int(size) for size in row["case"].split()[0].split("x"))


def _plain(dtype, large):
    def of(row):
        words = row["case"].split()
        plain = row["op"] == "fake_quantize" and len(words) == 3 and row["dtype"] == dtype
        return plain and large in (None, elements(row) >= LARGE)

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


def _saved_over_float(row, rows):
    floats = [r["saved_bytes"] for r in rows if _beside(r, row, "float") and r["saved_bytes"]]
    return row["saved_bytes"] / floats[0] if floats and row["saved_bytes"] else None


def _train(row):
    return row["op"] == "train_step"


_F32, _BF16 = _plain("float32", True), _plain("bfloat16", True)
BARS = (
    Bar("fwd+bwd over a copy of the same bytes, large, float32", _F32, _against("copy", False), 1.25),
    Bar("fwd+bwd over a copy of the same bytes, large, bfloat16", _BF16, _against("copy", False), 1.25),
    Bar("fwd+bwd over torch.compile, float32", _plain("float32", None), _against("compile", False), 1.05),
    Bar("faster than torch.compile, small, float32", _plain("float32", False), _against("compile", True), 2.5, True),
    Bar("faster than PyTorch's learnable op, large, float32", _F32, _against("torch", True), 5.0, True),
    Bar("faster than eager, large, float32", _F32, _against("eager", True), 6.0, True),
    Bar("faster than torch.compile, large, bfloat16", _BF16, _against("compile", True), 1.6, True),
    Bar("faster than eager, large, bfloat16", _BF16, _against("eager", True), 10.0, True),
    # The scales are saved beside x: four bytes per channel.
    Bar("saved for backward over x", lambda row: row["op"] == "fake_quantize", _saved_over_input, 1.01),
    Bar("training step over the float step", _train, _against("float", False), 1.20),
    Bar("saved bytes of a training step over float", _train, _saved_over_float, 1.6),
)  # fmt: skip


def judge(rows):
    """[(bar, worst value, its row, number of rows)]; value and row None where no row of ``rows`` shows the bar."""
    verdicts = []
    for bar in BARS:
        native = [row for row in rows if row["backend"] == "native" and bar.of(row)]
        values = [(bar.measure(row, rows), row) for row in native if row["median_ms"]]
        values = [(value, row) for value, row in values if value is not None]
        pick = min if bar.least else max
        worst = pick(values, key=lambda pair: pair[0]) if values else (None, None)
        verdicts.append((bar, *worst, len(values)))
    return verdicts


def table(rows, as_markdown=False):
    """The bars as text, with the worst row of each."""
    lines = [("what", "bar", "measured", "", "worst of", "rows")]
    for bar, value, row, count in judge(rows):
        limit = f"{'at least' if bar.least else 'at most'} {bar.limit:g}x"
        verdict = "not measured" if value is None else "pass" if bar.holds(value) else "FAIL"
        where = "-" if row is None else f"{row['case']} {row['dtype']} {row['threads']}t"
        lines.append((bar.what, limit, results.number(value, suffix="x"), verdict, where, str(count)))
    return "\n".join(results.markdown(lines) if as_markdown else results.align(lines))


def met(rows):
    """Whether every bar that the rows show holds."""
    return all(value is None or bar.holds(value) for bar, value, _, _ in judge(rows))
