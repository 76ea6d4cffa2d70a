"""Rows of results: as JSON and CSV on disk, as a table on screen or in Markdown."""

import csv
import json
from pathlib import Path

import numpy as np

from ..files import write_text
from ..tabulate import columns
from .rows import BASELINES, OURS, RIVALS

FIELDS = ("op", "case", "backend", "dtype", "threads", "median_ms", "p20_ms", "p80_ms", "bytes", "gb_per_s",
          "copy_fraction", "saved_bytes", "peak_bytes", "parity")  # fmt: skip
RUN = ("machine", "torch", "commit", "date", "qkernels", "python", "device", "allocator", "clock")


def key(row):
    return tuple(row[name] for name in ("op", "case", "backend", "dtype", "threads"))


def group(row):
    """Rows of one group were timed together."""
    return tuple(row[name] for name in ("op", "case", "dtype", "threads"))


def label(row):
    return f"{_name(row)} {row['backend']}"


def _name(row):
    return f"{row['op']} {row['case']} {row['dtype']} {row['threads']}t"


def read(path):
    """{"run": facts, "rows": [...]} of a file of `write`; ValueError where the file is anything else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        rows = json.loads(path.read_text())
        if not isinstance(rows, list):
            raise ValueError("not a list of rows")
        for row in rows:
            missing = [name for name in FIELDS if name not in row]
            if missing:
                raise ValueError(f"a row lacks {missing[0]}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a result of qkernels bench ({error})") from None
    return {"run": {name: rows[0][name] for name in RUN if rows and name in rows[0]}, "rows": rows}


def write(path, result):
    """A list of rows, each with the run-wide facts; one kept from an earlier run has its own, such as the date."""
    rows = ",\n".join(json.dumps({**row, **result["run"], **row}, allow_nan=False) for row in result["rows"])
    write_text(path, f"[\n{rows}\n]\n")


def check_csv(path):
    """ValueError where the CSV file that rows shall be appended to has other columns."""
    path = Path(path)
    if path.exists() and path.stat().st_size:
        with open(path, newline="") as file:
            header = next(csv.reader(file))
        if header != [*FIELDS, *RUN]:
            raise ValueError(f"--csv: {path} has other columns than {', '.join([*FIELDS, *RUN])}")


def append_csv(path, run, rows):
    """Appends rows with the run-wide facts; the header comes first in a new file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *RUN], extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: _short(value) for name, value in {**row, **run}.items()})


def _short(value):
    return f"{value:.6g}" if isinstance(value, float) else value


def ratio(row, other):
    """other's time / row's: paired by round where both have samples, else of the medians; None without a time."""
    if not row["median_ms"] or not other["median_ms"]:
        return None
    a, b = row.get("samples_ms") or [], other.get("samples_ms") or []
    if a and len(a) == len(b):
        return float(np.median(np.divide(b, a)))
    return other["median_ms"] / row["median_ms"]


def best_rival(row, rows):
    """How many times faster than the fastest rival of its group; None for a row that is not ours, or alone."""
    if row["backend"] not in OURS:
        return None
    found = [r for r in rows if group(r) == group(row) and r["backend"] in RIVALS and r["median_ms"]]
    return ratio(row, min(found, key=lambda r: r["median_ms"])) if found else None


def number(value, digits=3, suffix=""):
    return "-" if value is None else f"{value:#.{digits}g}".rstrip(".") + suffix


def ms(row):
    return number(row["median_ms"], 4)


def _bytes(value):
    if value is None:
        return "-"
    return f"{value / 1e6:.2f} MB" if value >= 1e5 else f"{value} B"


HEADER = ("row", "backend", "ms", "p20 .. p80", "GB/s", "of copy", "saved", "peak", "vs rival", "vs base",
          "match")  # fmt: skip


def cells(rows):
    """HEADER and a line per row; a group's name stands on its first row only."""
    lines, last = [HEADER], None
    for row in rows:
        name = _name(row)
        bases = [r for r in rows if r["backend"] in BASELINES and group(r) == group(row)]
        spread = f"{number(row['p20_ms'])} .. {number(row['p80_ms'])}" if row["median_ms"] else "-"
        lines.append((
            "" if name == last else name, row["backend"], ms(row), spread, number(row["gb_per_s"]),
            "-" if row["copy_fraction"] is None else f"{row['copy_fraction']:.0%}",
            _bytes(row["saved_bytes"]), _bytes(row["peak_bytes"]), number(best_rival(row, rows), suffix="x"),
            number(ratio(bases[0], row) if bases else None, suffix="x"), row["parity"] or "-",
        ))  # fmt: skip
        last = name
    return lines


def text(lines, as_markdown=False):
    """Lines of cells as text in columns, or as a Markdown table."""
    if not as_markdown:
        return "\n".join(columns(lines))
    first, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([first, "|" + " --- |" * len(lines[0]), *rest])


def table(rows, as_markdown=False):
    """The rows as text; columns without any value are left out."""
    lines = cells(rows)
    used = [i for i in range(len(HEADER)) if i < 3 or any(line[i] != "-" for line in lines[1:])]
    return text([tuple(line[i] for i in used) for line in lines], as_markdown)
