"""What all tests share: one thread unless a test asks for more, fixed seeds, a count of what cannot run."""

import ctypes
import signal
import sys

import pytest
import torch

from qkernels import testing

# A suite started in the background of a script inherits "ignore Ctrl-C", and so would the programs it interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def quiet_machine():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


_M_PERTURB, _ALL_ONES = (
    -6,
    0x100,
)  # of mallopt, glibc's malloc.h; new memory holds the complement of the last byte


@pytest.fixture
def poisoned():
    """New tensors hold NaN (integers: no likely value) until something writes them, the native libraries' too.

    torch fills what its own calls allocate; with glibc all memory is filled, and so what C++ allocates.
    """
    mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_PERTURB, _ALL_ONES)
        assert torch.empty(15).isnan().all()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    if mallopt is not None:
        mallopt(_M_PERTURB, 0)


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
