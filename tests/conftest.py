"""What all tests share: one thread unless a test asks for more, fixed seeds, a count of what cannot run."""

import builtins
import ctypes
import signal
import sys

import pytest
import torch
from tiny import Tiny

from qkernels import testing
from qkernels.bench import lists, measure
from qkernels.training import build

# A suite started in the background of a script inherits "ignore Ctrl-C", and so would the programs it interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_ROWS = {
    "activation": {(2, 4, 5, 5): ("tensor",)},
    "weight": {(8, 4, 3, 3): ("axis0",)},
    "linear": {(4, 16): ("token",)},
    "noise": {(2, 4, 5, 5): ("tensor",)},
    "distance": {(2, 4, 5, 5): ("axis1",)},
}


@pytest.fixture(autouse=True)
def quiet_machine():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


# Of mallopt, glibc's malloc.h: freed memory holds this byte, new memory its complement (memory used again, either).
_M_PERTURB, _BYTE = -6, 0x01
_FILLED = (0x01010101, 0xFEFEFEFE - 2**32)


@pytest.fixture
def poisoned():
    """New tensors hold NaN, or numbers that nothing computes, until something writes them.

    torch fills what its own calls allocate; with glibc all memory is filled, and so what the native libraries allocate.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_PERTURB, _BYTE)
        found = torch.empty(15).view(torch.int32).tolist()
        assert set(found) <= set(_FILLED), found
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    if mallopt is not None:
        mallopt(_M_PERTURB, 0)


@pytest.fixture
def tiny(monkeypatch):
    """`--model tiny`."""
    monkeypatch.setattr(
        build, "build_model", lambda name, classes, *_: Tiny(classes) if name == "tiny" else None
    )


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    # As `qkernels.training.distributed.start` does: the group's threads would outlive it else.
    from torch.distributed import nn  # noqa: F401

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/g", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def missing(monkeypatch):
    """Function that makes the import of a package fail."""
    real = builtins.__import__

    def hide(package):
        def fail(name, *args, **kwargs):
            if name.split(".")[0] == package:
                raise ImportError(f"No module named {package!r}")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fail)

    return hide


@pytest.fixture
def tiny_rows(monkeypatch):
    """Every suite times tiny tensors, with samples of a millisecond."""
    for name, shapes in _ROWS.items():
        monkeypatch.setitem(testing.TIMED, name, shapes)
    monkeypatch.setattr(testing.table, "LISTS", {"resnet20": (10, 8)})
    monkeypatch.setattr(testing, "LISTS", testing.table.LISTS)
    monkeypatch.setattr(lists, "COPIED", "resnet20")
    monkeypatch.setattr(measure.collect, "__defaults__", (1e-3,))
    monkeypatch.setattr(measure, "POOL_BYTES", 1 << 20)


@pytest.fixture
def interrupted_codes():
    """What a program that Ctrl-C stopped may return: a shell shows 130 for both.

    CPython ends with the signal itself once an interrupt has passed through an exec of text, which imports do.
    """
    return (130, -signal.SIGINT)


def pytest_terminal_summary(terminalreporter):
    if not torch.cuda.is_available():
        absent = sum(1 for _ in testing.cases())
        terminalreporter.write_line(f"no CUDA device: {absent} parity cases of each CUDA backend are absent")
