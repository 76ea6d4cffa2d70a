"""The rows of `qkernels bench` under pytest-benchmark: `pytest benchmarks --benchmark-json out.json`.

QKERNELS_BENCH_SUITE chooses the suite (default: smoke), QKERNELS_BENCH_BACKENDS the backends.
"""

import itertools
import os

import pytest
import torch

from qkernels.bench import command, measure, rows, suites

pytest.importorskip("pytest_benchmark", reason="pip install qkernels[bench]")

SUITE = os.environ.get("QKERNELS_BENCH_SUITE", "smoke")
BACKENDS = os.environ.get("QKERNELS_BENCH_BACKENDS", "eager,fn,compile,torch,native").split(",")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", autouse=True)
def calm():
    """Freed memory is kept, and each row starts with nothing compiled."""
    with measure.kept_memory(), measure.threads(torch.get_num_threads()):
        yield


@pytest.fixture(scope="module", params=suites.suite(SUITE, DEVICE), ids=str)
def row(request):
    torch._dynamo.reset()
    return request.param


@pytest.mark.parametrize("name", command.chosen_backends(",".join(BACKENDS)))
def test_step(benchmark, row, name):
    found = [variant for variant in row.variants([name]) if variant.backend == name]
    if not found:
        pytest.skip(f"{row} has no form for {name}")
    variant = found[0]
    try:
        variant.parity = row.check(variant)
    except rows.Refused as why:
        if name in rows.OURS:
            raise
        pytest.skip(f"{name} is not timed: {why}")
    pool = itertools.cycle([row.make() for _ in range(row.sets)])
    benchmark.group = str(row)
    benchmark.extra_info.update(bytes=row.nbytes, parity=variant.parity, form=variant.form)

    def step():
        variant.step(next(pool))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with variant.active():
        benchmark(step)
