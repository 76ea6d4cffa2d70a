"""`qkernels sweep`: a grid of training runs, resumable, by several processes and machines that share a folder."""

import importlib.resources
import itertools
import json
import multiprocessing
import os
import re
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .annotations import StrPath
from .files import write_json, write_text
from .tabulate import markdown, spread
from .training.cells import Cell, check_cells, check_device_and_data, done, results, work
from .training.log import read_json, say
from .training.recipe import SETTINGS, names_in, overlap, parse_assignment, read_toml
from .training.run import RUN, check_machine

_KEYS = ("by", "settings", "grid")
_GRIDS = importlib.resources.files("qkernels.training") / "grids"
_COLUMNS = {
    "train_acc": ("Train acc %", 100.0, 2),
    "test_acc": ("Test acc %", 100.0, 2),
    "train_loss": ("Train loss", 1.0, 4),
    "test_loss": ("Test loss", 1.0, 4),
    "gap": ("Generalization", 1.0, 4),
}


def add_arguments(parser):
    """Declares the arguments of `qkernels sweep`."""
    flag = parser.add_argument
    flag("grid", metavar="FILE.toml", help=f"the grid, or one of the package: {', '.join(names_in(_GRIDS))}")
    flag("--out", required=True, metavar="DIR", help="a run folder per cell, table.md, table.json")
    flag("--workers", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    flag("--engine", choices=("local", "ray"), default="local", help="ray: the workers are Ray tasks")
    flag("--data", metavar="SPEC", help="instead of the grid's")
    flag("--epochs", type=int, metavar="N", help="instead of the recipe's")
    flag("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every cell")
    flag("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    flag("--threads", type=int, metavar="N", help="CPU threads of a worker (default: the cores divided)")
    flag("--retry", action="store_true", help="train the cells that failed again, from the start")
    flag("--list", action="store_true", help="name the cells and exit")
    flag("--quiet", action="store_true", help="print the table only")


def main(args):
    """Runs `qkernels sweep`; returns the exit code, 1 where cells failed or are left."""
    fixed = {key: getattr(args, key) for key in ("data", "epochs") if getattr(args, key) is not None}
    fixed.update(parse_assignment(text) for text in args.set)
    grid = load_grid(args.grid, fixed)
    cells = [cell for cell, _ in grid["cells"]]
    if args.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    threads = args.threads
    if threads is None:
        threads = max(1, (os.cpu_count() or 1) // max(1, args.workers))
    machine = {"device": args.device, "threads": threads}
    stopped, errors = run_cells(cells, args.out, args.workers, args.engine, args.retry, args.quiet, **machine)
    print(write_table(grid, args.out))
    return exit_code(cells, args.out, stopped, errors)


def exit_code(cells: Sequence[Cell], out: StrPath, stopped: int, errors: dict[str, str]) -> int:
    """That of a command which ran the cells; what is missing is told, with the errors."""
    finished, failed = results(cells, out)
    errors = {name: error for name, error in errors.items() if name not in {**finished, **failed}}
    for name, error in {**failed, **errors}.items():
        say(f"{name}: {error}")
    if stopped:
        say(f"qkernels: stopped; continue with the same command (--out {out})")
        return 128 + stopped
    left = len(cells) - len(finished) - len(failed)
    if failed:
        say(f"{len(failed)} cells failed; --retry trains them again, from the start")
    if left:
        say(f"{left} cells are left; the same command{' with --retry' if failed else ''} goes on with them")
    return int(bool(failed or left))


def load_grid(path: StrPath, fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The cells of a grid file, in its order.

    The file has `[settings]`, which all cells share, and `[grid]`, a list of values for each axis; cells are their
    product. Keys are the arguments and settings of `qkernels train` ("sharpness.rho" reaches into a table). A value
    that is a table sets all that is in it. Other axes may stand in braces in text: model = "nin_d{depth}_w{width}".
    `by` names the axes of which the final table has a row per value; over the others it averages.

    Args:
        path: a .toml file, or the name of a grid of the package. fixed: settings over those of the file, of no axis.

    Returns: {"by": names, "cells": [(Cell, {axis: value})]}.
    Raises: ValueError naming the key.
    """
    file = Path(path) if str(path).endswith(".toml") else _GRIDS / f"{path}.toml"
    if not file.is_file():
        raise ValueError(
            f"grid: {path} is neither a .toml file nor a grid of the package ({', '.join(names_in(_GRIDS))})"
        )
    given = read_toml(file, "grid")
    if unknown := sorted(given.keys() - set(_KEYS)):
        raise ValueError(f"grid: unknown key {unknown[0]!r} in {file}; known are {', '.join(_KEYS)}")
    settings, axes = {**given.get("settings", {}), **(fixed or {})}, given.get("grid", {})
    _check_axes(settings, axes)
    for key in fixed or ():
        for axis, values in axes.items():
            if any(overlap(key, name) for name in (axis, *_inside(axis, values))):
                raise ValueError(f"{key}: the axis {axis} of the grid sets it, so it cannot be fixed")
    by = given.get("by", [])
    if wrong := [axis for axis in by if axis not in axes]:
        raise ValueError(f"by: {wrong[0]!r} is no axis of the grid; axes are {', '.join(axes)}")
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    cells = [(_cell(settings, point), point) for point in points]
    names = [cell.name for cell, _ in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"grid: two cells are both named {twice[0]}")
    return {"by": list(by), "cells": cells}


def _check_axes(settings, axes):
    text = " ".join(v for v in settings.values() if isinstance(v, str))
    for axis, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid.{axis}: {values!r} is not a list of values")
        tables = all(isinstance(value, dict) for value in values) and axis not in SETTINGS
        if not (tables or _known(axis) or f"{{{axis}}}" in text):
            raise ValueError(f"grid.{axis}: no setting of that name, nor is {{{axis}}} in a setting's text")
    for key in (*settings, *(key for axis, values in axes.items() for key in _inside(axis, values))):
        if not _known(key):
            raise ValueError(f"settings.{key}: no setting of that name")


def _inside(axis, values):
    """The settings in an axis's tables; where the axis is itself a setting, a table is its value."""
    return [] if axis in SETTINGS else [key for value in values if isinstance(value, dict) for key in value]


def _known(key):
    return key.partition(".")[0] in {**SETTINGS, **RUN}


def _cell(settings, point):
    """The cell at a point of the grid: its name says the point, its arguments are settings."""
    arguments, words = dict(settings), []
    for axis, value in point.items():
        words.append(f"{axis}-{'-'.join(map(str, value.values())) if isinstance(value, dict) else value}")
        if isinstance(value, dict) and axis not in SETTINGS:
            arguments.update(value)
        elif _known(axis):
            arguments[axis] = value
    try:
        filled = {k: v.format(**point) if isinstance(v, str) else v for k, v in arguments.items()}
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"settings: {{{error}}} in a setting's text is no axis of the grid") from None
    return Cell(re.sub(r"[^\w.=+-]+", "-", "_".join(words)) or "cell", filled)


def run_cells(
    cells: Sequence[Cell],
    out: StrPath,
    workers: int = 1,
    engine: str = "local",
    retry: bool = False,
    quiet: bool = False,
    **machine: Any,
) -> tuple[int, dict[str, str]]:
    """Trains what is left of `cells` with `workers` processes.

    Returns (the signal that stopped it, else 0; {name: error} of the cells left because of an error that is not their
    settings').

    Workers are processes: four or eight small quantized nets side by side in one process (vmap over stacked
    weights) take 2 to 4 times as long on a CPU as one after the other.

    machine: device and threads, as of `train`. retry: also train the cells again that failed.
    Raises, before anything is written: ValueError (bad settings, device or threads), FileNotFoundError (no data),
    ImportError (a missing extra, such as Ray for engine "ray").
    """
    if workers < 1:
        raise ValueError(f"workers: {workers} is not a positive number")
    check_machine(machine.get("threads"))
    check_cells(cells, out)
    out = Path(out).resolve()
    failed = results(cells, out)[1] if retry else {}
    left = [cell for cell in cells if cell.name in failed or not done(out / cell.name)]
    if left and engine == "local":  # Ray's nodes may have what this one lacks
        check_device_and_data(left, machine.get("device", "auto"))
    out.mkdir(parents=True, exist_ok=True)
    for name in failed:
        (out / name / "failure.json").unlink(missing_ok=True)
    if engine == "ray":
        return _run_on_ray(cells, out, workers, quiet, machine)
    if workers == 1:
        return work(cells, out, quiet, **machine)
    return _run_processes(cells, out, workers, quiet, machine)


def _run_processes(cells, out, workers, quiet, machine):
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.json" for i in range(workers)]
        stopped = _join_processes(files, (cells, out, quiet, os.getpid(), machine), quiet)
        errors = {}
        for file in files:
            errors |= read_json(file) if file.exists() else {}
    return stopped, errors


def _join_processes(files, common, quiet):
    context, stopped = multiprocessing.get_context("spawn"), 0
    processes = [context.Process(target=_worker, args=(file, *common)) for file in files]
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            try:
                for process in processes:
                    process.join()
            except KeyboardInterrupt:
                stopped = signal.SIGINT
                for process in processes:
                    process.terminate()  # which each answers with a checkpoint
    finally:
        signal.signal(signal.SIGTERM, former)
    lost = [p.exitcode for p in processes if p.exitcode]
    if lost and not stopped:
        say(
            f"{len(lost)} of {len(files)} workers ended early (exit codes {', '.join(map(str, lost))})", quiet
        )
    return stopped


def _worker(file, cells, out, quiet, parent, machine):
    os.setsid()  # Ctrl-C is for the parent, which passes it on once
    stopped, errors = work(cells, out, quiet, parent, **machine)
    write_json(file, errors)
    raise SystemExit(stopped)


def _run_on_ray(cells, out, workers, quiet, machine):
    """The same workers as Ray tasks; `out` is on a file system that all nodes share."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "--engine ray needs Ray: pip install ray (one machine needs none: --workers N)"
        ) from error
    ray.init(ignore_reinit_error=True)
    # A task sees the GPUs it asks for, no others.
    gpus = int(machine.get("device") != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
    task = ray.remote(num_cpus=machine.get("threads") or 1, num_gpus=gpus, max_retries=-1)(work)
    ended = ray.get([task.remote(cells, out, quiet, **machine) for _ in range(workers)])
    return max(stopped for stopped, _ in ended), {k: v for _, errors in ended for k, v in errors.items()}


def write_table(grid: dict[str, Any], out: StrPath) -> str:
    """Means over the finished cells by the grid's `by` axes: OUT/table.md and table.json; returns the former's text.

    The columns of QGen's table 1. Nothing in it depends on time or order, so a sweep that was interrupted ends with
    the same table.
    """
    out = Path(out)
    cells = [cell for cell, _ in grid["cells"]]
    finished, failed = results(cells, out)
    groups: dict[str, list[Any]] = {}
    for cell, point in grid["cells"]:
        group = groups.setdefault(json.dumps([point[axis] for axis in grid["by"]]), [0, []])
        group[0] += 1
        if cell.name in finished:
            result = finished[cell.name]
            group[1].append({**result, "gap": result["test_loss"] - result["train_loss"]})
    rows = []
    for key, (size, members) in groups.items():
        row = dict(zip(grid["by"], json.loads(key))) | {"finished": len(members), "cells": size}
        for name in _COLUMNS if members else ():
            row[name], row[f"{name}_std"] = spread([member[name] for member in members])
        rows.append(row)
    text = _markdown(grid["by"], rows)
    if out.is_dir():
        write_json(out / "table.json", {"rows": rows, "failed": failed})
        write_text(out / "table.md", text + "\n")
    return text


def _markdown(by, rows):
    lines = []
    for row in rows:
        count = (
            str(row["cells"]) if row["finished"] == row["cells"] else f"{row['finished']} of {row['cells']}"
        )
        cells = [_word(row[axis]) for axis in by] + [count]
        for name, (_, factor, digits) in _COLUMNS.items():
            cells.append(f"{factor * row[name]:.{digits}f}" if name in row else "-")
        lines.append(cells)
    headers = [*by, "Models", *(name for name, _, _ in _COLUMNS.values())]
    return "\n".join(markdown(headers, lines))


def _word(value):
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
