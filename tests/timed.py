"""Rows of benchmark results, files of them, and the command line."""

import pytest

from qkernels import backend, cli
from qkernels.bench import results

QUICK = ("--threads", "1", "--repeats", "2")
needs_native = pytest.mark.skipif("cpu" in backend.why_not, reason="the CPU library is not built")
FIELDS = [
    *("op", "case", "backend", "dtype", "threads", "median_ms", "p20_ms", "p80_ms", "bytes", "gb_per_s"),
    *("copy_fraction", "saved_bytes", "peak_bytes", "parity"),
]


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command in this process."""
    try:
        code = cli.main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def row(**changes):
    made = dict.fromkeys(FIELDS)
    made |= {
        "op": "fake_quantize",
        "case": "64x64x28x28 tensor fwd+bwd",
        "backend": "native",
        "dtype": "float32",
    }
    made |= {
        "threads": 1,
        "median_ms": 1.0,
        "p20_ms": 0.95,
        "p80_ms": 1.05,
        "parity": "equal",
        "bytes": 64225280,
    }
    return made | changes


def write(path, *found, **run_facts):
    results.write(
        path, {"run": {"machine": "m", "torch": "t", "allocator": "kept"} | run_facts, "rows": list(found)}
    )
    return path


def table_of_bars(**native):
    beside = [row(backend=name, median_ms=ms) for name, ms in
              (("copy", 1.0), ("compile", 1.3), ("torch", 7.0), ("eager", 9.0))]  # fmt: skip
    step = {"op": "train_step", "case": "resnet20 128x3x32x32 W4A4", "bytes": None}
    trained = [row(**step, median_ms=1.15, saved_bytes=15), row(**step, backend="float", saved_bytes=10)]
    return [row(**{"median_ms": 1.2, "saved_bytes": 64225280 // 5 + 4} | native), *beside, *trained]
