"""The run-wide facts that stand beside every row."""

import contextlib
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import qkernels


def run_facts(device, allocator):
    """dict of strings: machine, torch, commit, date, qkernels, python, device, allocator, clock."""
    return {
        "machine": machine(device),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "qkernels": qkernels.__version__,
        "python": platform.python_version(),
        "device": device,
        "allocator": allocator,
        "clock": clock(device),
    }


def machine(device):
    """The name of the GPU, or of the processor with its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = _cpu_field("model name") or platform.processor() or platform.machine()
    return f"{name}, {cores()} cores"


def cores():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def commit():
    """The short hash of the checkout that holds this package, with "+" where it has changes; else ""."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return _output("git", "-C", str(root), "rev-parse", "--short", "HEAD") + ("+" if changed else "")


def clock(device):
    """MHz, governor and load of the processor, or the clocks of the GPU, as the system tells them."""
    if device == "cuda":
        fields = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
        return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
    facts = [f"{float(_cpu_field('cpu MHz') or 0):.0f} MHz"]
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    with contextlib.suppress(OSError):
        facts.append(governor.read_text().strip())
    with contextlib.suppress(OSError):
        facts.append(f"load {os.getloadavg()[0]:.1f}")
    return ", ".join(facts)


def _cpu_field(name):
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return ""


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
