"""`qkernels report`: one self-contained HTML page of tables and plots over training runs."""

from collections.abc import Iterable
from pathlib import Path

from ..annotations import StrPath
from ..files import write_text
from .page import page
from .runs import find_runs, group_runs


def add_arguments(parser):
    """Declares the arguments of `qkernels report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run folders, or folders of run folders")
    parser.add_argument(
        "--out", default="report.html", metavar="FILE", help="the page (default: report.html)"
    )
    parser.add_argument("--title", default="Training runs", help="its heading (default: Training runs)")


def main(args):
    """Runs `qkernels report`; returns the exit code."""
    print(f"report: {write_report(args.runs, args.out, args.title)}")
    return 0


def write_report(run_dirs: StrPath | Iterable[StrPath], path: StrPath, title: str = "Training runs") -> Path:
    """Writes one HTML page over runs to `path` and returns it; styles, plots and pictures are inside the file.

    Runs that differ in the seed alone are one row, with mean and sample standard deviation. Shown are accuracy, loss,
    generalization gap, step time, training curves, and where `measures.json` (of `qkernels measure`) is there: flatness
    measures, Hessian, weight norms, step sizes, quantization error, gaps under corruption, the figures of `--figures`,
    the loss landscape.

    Args:
        run_dirs: a folder or several: run folders, or folders with run folders in them; a run may be unfinished.
        path: the HTML file; its folder is created.

    Raises:
        ValueError: no run in `run_dirs`. FileNotFoundError: one of them does not exist.
    Source: QGen, tables 1 to 6 and figures 1 and 2; NT, tables 3 and 6; FPQ, figures 1 and 2; SAQ, figure 4.
    """
    runs = find_runs(run_dirs)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page(group_runs(runs), title))
    return path
