"""Many runs in one folder: each is trained once, whichever of several processes and machines gets to it first.

A cell is claimed by creating OUT/claims/NAME.<n>, atomically; the highest n counts. A process that finds the owner of n
dead creates n + 1, which only one of several can. So nothing is locked, and a kill at any moment loses nothing: the
next owner resumes from the checkpoint.
"""

import contextlib
import json
import operator
import os
import re
import shutil
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from ..files import write_json
from . import distributed
from .checkpoint import DamagedCheckpoint, previous_of
from .config import make_config, read_config, resolved
from .data import build_data
from .log import read_json, say
from .run import Diverged, Interrupted, train

LEASE = 600.0  # seconds without a sign of life after which the claim of another machine is void
BEAT = 1.0


@dataclass(frozen=True)
class Cell:
    """One run: its folder's name, and the arguments of `make_config`."""

    name: str
    arguments: dict


def check_cells(cells, out):
    """Raises ValueError where a cell's settings are bad, or its folder holds a run with others."""
    for cell in cells:
        config, folder = make_config(**cell.arguments), Path(out) / cell.name
        if not (folder / "config.json").exists():
            continue
        old = read_config(folder)
        for key in config.keys() - {"versions", "summary"}:
            same = _same_start if key == "init" else operator.eq
            if not same(old.get(key), config[key]):
                raise ValueError(
                    f"{key} = {config[key]!r} differs from {old.get(key)!r} of the run in {folder}; choose another "
                    "--out, or remove that folder"
                )


def _same_start(old, new):
    """Whether two paths are of the same float weights, which may have moved, or be mounted elsewhere."""
    moved = old and new and Path(old).name == Path(new).name and not Path(old).exists()
    return resolved(old) == new or moved


def check_device_and_data(cells, device="auto"):
    """Raises ValueError, FileNotFoundError or ImportError where this machine lacks what the cells need."""
    distributed.find_device(device)
    needed = {}
    for cell in cells:
        config = make_config(**cell.arguments)
        needed[config["data"], config["image_size"]] = None
    for data, image_size in needed:
        build_data(data, 1, image_size=image_size, workers=0)


def work(cells, out, quiet=False, parent=None, **machine):
    """Trains cells until all are done; those that another process has claimed it waits for. Each worker calls this.

    A cell that diverged is done. Any other error may be this machine's alone: the cell stays as it is, and this worker
    leaves it to others.

    machine: arguments of `train` (device, threads, workers). parent: a process id; this one ends when that has ended.
    Returns (the signal that interrupted it, else 0; {name: error} of the cells it left).
    """
    out = Path(out)
    (out / "claims").mkdir(parents=True, exist_ok=True)
    pause, told, errors = 0.2, False, {}
    while left := [cell for cell in cells if cell.name not in errors and not done(out / cell.name)]:
        for cell in left:
            with claim(out / "claims", cell.name, parent) as mine:
                if mine and not done(out / cell.name):
                    try:
                        _run(cell, cells, out, quiet, machine)
                    except Interrupted as stop:
                        return stop.signal, errors
                    except Exception as error:
                        errors[cell.name] = _text(error)
                        say(f"{cell.name}: {errors[cell.name]}", quiet)
                    pause = 0.2
        if all(cell.name in errors or done(out / cell.name) for cell in left):
            continue
        if pause > 5 and not told:
            say(f"waiting for cells that others train in {out} (interrupt at will)", quiet)
            told = True
        if parent is not None and os.getppid() != parent:
            return 0, errors
        time.sleep(pause)
        pause = min(1.5 * pause, 30.0)
    return 0, errors


def _run(cell, cells, out, quiet, machine):
    """Trains one cell and says so; that it diverged is kept in its folder, and the sweep goes on."""
    folder, began = out / cell.name, time.monotonic()
    try:
        result = _train(cell, folder, machine)
    except Diverged as error:
        _forget_unfinished(folder)
        write_json(folder / "failure.json", {"error": _text(error)})
        say(f"{cell.name}: failed: {error}", quiet)
        return
    finished = sum(done(out / c.name) for c in cells)
    text = f"test accuracy {result['test_acc']:.2%}, {time.monotonic() - began:.0f} s"
    say(f"[{finished}/{len(cells)}] {cell.name}: {text}", quiet)


def _train(cell, folder, machine):
    while (folder / "config.json").exists():
        # The float weights may have moved since.
        config = {**read_config(folder), "init": make_config(**cell.arguments)["init"]}
        try:
            return train(config, folder, resume=True, quiet=True, **machine)
        except DamagedCheckpoint as error:
            if error.path.parent not in (folder, folder / "float"):
                raise
            _do_without(error.path)
    return train(make_config(**cell.arguments), folder, quiet=True, **machine)


def _checkpoints(folder):
    """From which a run and its float start continue."""
    latest = (folder / "checkpoint", folder / "float" / "checkpoint")
    return [path for last in latest for path in (last, previous_of(last))]


def _forget_unfinished(folder):
    """What has diverged would diverge again if it were continued."""
    for path in _checkpoints(folder):
        if path.exists() and not (path.parent / "result.json").exists():
            _put_aside(path)


def _do_without(damaged):
    """So that its run, complete or not, goes on from the checkpoint before it, or from the start."""
    run = damaged.parent
    _put_aside(damaged)
    if damaged.name.startswith("selected"):  # the later checkpoints rely on it
        for path in (run / "checkpoint", previous_of(run / "checkpoint")):
            if path.exists():
                _put_aside(path)
    (run / "result.json").unlink(missing_ok=True)


def _put_aside(path):
    aside = path.with_name(path.name + ".aside")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)


def _text(error):
    return f"{type(error).__name__}: {error}"


def done(folder):
    """Whether a cell has a result, or has failed."""
    return (folder / "result.json").exists() or (folder / "failure.json").exists()


def results(cells, out):
    """({name: result} of the finished cells, {name: error} of those that failed)."""
    found, failed = {}, {}
    for cell in cells:
        for file, into in (("result.json", found), ("failure.json", failed)):
            with contextlib.suppress(FileNotFoundError):
                into[cell.name] = read_json(Path(out) / cell.name / file)
    return found, {name: value["error"] for name, value in failed.items()}


@contextlib.contextmanager
def claim(folder, name, parent=None):
    """True within the context if this process got the claim; then a thread shows signs of life until its end.

    A process that was suspended for so long that another has taken its claim ends at once: both would write the run.
    """
    mine = _take(Path(folder), name)
    if mine is None:
        yield False
        return
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(mine, stop, parent), daemon=True)
    thread.start()
    try:
        yield True
    finally:
        stop.set()
        thread.join()
        mine.unlink(missing_ok=True)


def _take(folder, name):
    """The path of the claim, or None where a living process has it."""
    partial = folder / f".{uuid.uuid4().hex}"
    partial.write_text(json.dumps(_self()))
    now = partial.stat().st_mtime
    try:
        numbers = _claims(folder, name)
        if any(_alive(path, now) for path in numbers.values()):
            return None
        mine = folder / f"{name}.{max(numbers, default=-1) + 1}"
        try:
            os.link(partial, mine)  # with its content, or not at all
        except FileExistsError:
            return None
        others = [path for path in _claims(folder, name).values() if path != mine]
        if any(_alive(path, now) for path in others):
            mine.unlink()  # claims came and went since they were listed
            return None
        for path in others:
            path.unlink(missing_ok=True)
        return mine
    finally:
        partial.unlink()


def _claims(folder, name):
    """Number -> path."""
    found = (re.fullmatch(re.escape(name) + r"\.(\d+)", path.name) for path in folder.iterdir())
    return {int(match[1]): folder / match[0] for match in found if match}


def _alive(path, now):
    """Whether the owner of a claim lives; `now` is by the clock of the file system, whose machines may differ."""
    try:
        owner, age = json.loads(path.read_text()), now - path.stat().st_mtime
    except (FileNotFoundError, ValueError):
        return False
    if owner["machine"] == _machine():
        return owner["started"] == _started(owner["pid"])
    return age < LEASE


def _self():
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _machine():
    """What makes process ids comparable: the host since its last start, and the space of process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid):
    """When a process started, which tells it from a later one of the same id; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def _gone(path):
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    except OSError:  # a file system that does not answer has not said so
        pass
    return False


def _beat(path, stop, parent):
    last = time.monotonic()
    while not stop.wait(BEAT):
        if parent is not None and os.getppid() != parent:
            os._exit(1)
        if _gone(path):
            say(f"qkernels: another process has taken over {path.stem}; this one ends")
            os._exit(1)
        if time.monotonic() - last > LEASE / 10:
            with contextlib.suppress(OSError):
                os.utime(path)
            last = time.monotonic()
