"""How a time, a memory use and a copy of the same bytes are measured."""

import contextlib
import ctypes
import gc
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

POOL_BYTES = 512 << 20  # inputs rotate through this much memory, past the last cache
SMALL_BYTES = 1 << 20  # inputs below this stay in the caches, as a small weight does between two steps
SAMPLE_SECONDS = 0.02
WAITED = 0.03  # a sample whose threads waited for a processor longer than this share is taken again
interrupted = threading.Event()
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of mallopt, glibc's malloc.h


@dataclass
class Variant:
    """One implementation of a row: ``step(inputs)`` does the whole work and returns the tensors parity looks at."""

    backend: str
    step: Callable
    form: str = ""  # which of several forms that share a backend
    active: Callable = contextlib.nullcontext
    parity: str = ""
    samples: list = field(default_factory=list)  # ms, one per round
    disturbed: int = 0
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    held: Callable = lambda: 0  # bytes that it keeps from call to call; they count as its peak


@contextlib.contextmanager
def interruptible():
    """Ctrl-C raises KeyboardInterrupt inside the block, and `check_interrupt` raises it again if that one was lost.

    An import, a destructor or a callback from C++ that is running when the signal comes may swallow the exception.
    """
    usual = signal.default_int_handler
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is usual
    if ours:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        interrupted.clear()
        if ours:
            signal.signal(signal.SIGINT, usual)


def _interrupt(number, frame):
    interrupted.set()
    raise KeyboardInterrupt


def check_interrupt():
    if interrupted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def kept_memory():
    """Freed memory stays in the process, as a training loop's allocator keeps it; yields "kept" or "default".

    A fresh large output costs more in page faults than a kernel costs to fill it, whichever kernel that is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else None
    except AttributeError:  # a C library without mallopt
        mallopt = None
    if mallopt is None or not all(
        mallopt(name, value)
        for name, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    ):
        yield "default"
        return
    try:
        yield "kept"
    finally:
        for name, value in ((_M_MMAP_MAX, 65536), (_M_TRIM_THRESHOLD, 128 << 10), (_M_TOP_PAD, 128 << 10)):
            mallopt(name, value)


@contextlib.contextmanager
def threads(count):
    """PyTorch runs on ``count`` threads, and so does the code its compiler generates inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        from torch._inductor import config

        with config.patch({"cpp.threads": count}):
            yield
    finally:
        torch.set_num_threads(before)


def pool_size(set_bytes):
    """How many sets of inputs rotate."""
    return 8 if set_bytes < SMALL_BYTES else min(max(POOL_BYTES // set_bytes, 2), 64)


def copy_variant(nbytes, device):
    """(variant, pool): a copy that moves ``nbytes``, half read and half written, over rotating sources."""
    count = max(nbytes // 8, 1)
    sources = [torch.ones(count, device=device) for _ in range(pool_size(nbytes // 2))]
    out = torch.zeros(count, device=device)
    return Variant("copy", out.copy_), sources


def touch(nbytes):
    """Leaves ``nbytes`` of free memory behind whose pages are there, where freed memory is kept.

    malloc looks for a little more than an aligned block, so a freed block alone does not serve its like again.
    """
    torch.ones(nbytes, dtype=torch.uint8)


def collect(work, repeats, device):
    """Fills the samples of each variant in ``work``, [(variant, pool of inputs), ...].

    Every round visits all variants once in a new order, so that drift of the machine meets them alike; variants
    that share a pool share its rotation. A sample is the mean of about SAMPLE_SECONDS worth of calls.
    """
    turns = {id(pool): itertools.cycle(pool) for _, pool in work}
    jobs = [(variant, turns[id(pool)]) for variant, pool in work]
    clock = _cuda_time if device == "cuda" else _host_time
    calls = {id(v): _calls(clock, v, turn) for v, turn in jobs}
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            order.shuffle(jobs)
            for variant, turn in jobs:
                check_interrupt()
                for attempt in range(3):
                    waiting, begin = _waited(), time.perf_counter()
                    ms = clock(variant, turn, calls[id(variant)])
                    calm = _waited() - waiting <= WAITED * (time.perf_counter() - begin)
                    if calm or attempt == 2:
                        break
                variant.samples.append(ms)
                variant.disturbed += not calm
    finally:
        if collecting:
            gc.enable()


def _calls(clock, variant, turn):
    """Warms the variant up, if a call is not long; how many calls fill a sample."""
    ms = clock(variant, turn, 1)
    if ms < 5e3 * SAMPLE_SECONDS:
        clock(variant, turn, 3)
        ms = clock(variant, turn, 2)
    return int(min(max(SAMPLE_SECONDS * 1e3 / max(ms, 1e-6), 1), 2000))


def _host_time(variant, turn, calls):
    step = variant.step
    with variant.active():
        begin = time.perf_counter()
        for _ in range(calls):
            step(next(turn))
        return (time.perf_counter() - begin) * 1e3 / calls


def _cuda_time(variant, turn, calls):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step = variant.step
    with variant.active():
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            step(next(turn))
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / calls


def _waited():
    """Seconds this process's threads have waited for a processor; 0 where the system does not tell."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):  # a thread may end meanwhile
            total += int(file.read_text().split()[1])
    return total * 1e-9


def percentiles(samples):
    """(median, 20th, 80th percentile), by linear interpolation."""
    return tuple(float(v) for v in np.percentile(samples, (50, 20, 80)))


def memory(variant, inputs, device):
    """Fills saved_bytes (distinct storages kept for backward), peak_bytes (above the inputs) and, on CUDA, launches."""
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with variant.active():
        variant.step(inputs)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            variant.step(inputs)
        variant.saved_bytes = sum(saved.values())
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            variant.step(inputs)
            torch.cuda.synchronize()
            variant.peak_bytes = torch.cuda.max_memory_allocated() - before
            variant.launches = sum(
                e.device_type() == torch.autograd.DeviceType.CUDA for e in _events(variant, inputs)
            )
        else:
            variant.peak_bytes = _peak(_events(variant, inputs))
        variant.peak_bytes += variant.held()


def _events(variant, inputs):
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each use prints two lines on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        variant.step(inputs)
    return profile.profiler.kineto_results.events()


def _peak(events):
    """The most that was allocated at once, from the record of each allocation and release."""
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))
