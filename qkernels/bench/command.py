"""`qkernels bench`: times the rows of a suite, each variant only after its parity, and writes as it goes."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import torch

from .. import backend
from . import bars, machine, measure, results, rows, suites

BACKENDS = (*rows.RIVALS, *rows.OURS)
DEFAULT = ",".join((*rows.RIVALS, "native", "triton"))
REPEATS = {"smoke": 5, "train": 7, "bars": 9}  # rounds; 20 for the others

ONLY = "rows whose name contains TEXT; of --suite bars, a, b or c: the bars of the quantizer, of noise, of sharpness"


def add_arguments(parser):
    parser.add_argument(
        "--suite", choices=tuple(suites.SUITES), default="smoke", help="what to time (smoke: under a minute)"
    )
    parser.add_argument("--backends", default=DEFAULT, help=f"of {', '.join(BACKENDS)} (default: {DEFAULT})")
    parser.add_argument("--json", metavar="FILE", help="the result, rewritten after every row")
    parser.add_argument("--csv", metavar="FILE", help="append the rows to FILE, whose folder is made")
    parser.add_argument("--threads", help="numbers of threads, such as 1,2 (default: 1 and all; train: all)")
    parser.add_argument("--only", metavar="TEXT", default="", help=ONLY)
    parser.add_argument(
        "--repeats", type=int, help="rounds of measuring (default: 20; smoke 5, train 7, bars 9)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of --backends that --json already holds"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--show", metavar="FILE", help="print an earlier result and its bars; time nothing")


def main(args):
    """0 done; 1 where one of ours was refused or a bar is missed; ValueError (exit 2) for bad arguments."""
    if args.show:
        result = results.read(args.show)
        show(result["rows"], "bars", args.markdown)
        return 0
    settings = Settings(args)
    with measure.interruptible(), measure.kept_memory() as allocator:
        run = machine.run_facts(settings.device, allocator)
        result = {"run": run, "rows": kept_rows(args, run)}
        say(f"{run['machine']}, torch {run['torch']}; {about(allocator)}")
        interrupted = False
        try:
            for group in groups(settings, result["rows"]):
                again = {results.group(row) for row in group}
                result["rows"] = [row for row in result["rows"] if results.group(row) not in again] + group
                if args.json:
                    results.write(args.json, result)
                if args.csv:
                    results.append_csv(args.csv, run, group)
        except KeyboardInterrupt:
            interrupted = True
    if not result["rows"] and interrupted:
        say("qkernels: stopped before the first row")
        return 130
    if not result["rows"] and args.only:
        raise ValueError(f"--only: no row of --suite {args.suite} contains {args.only!r}")
    if not result["rows"]:
        say(f"--suite {args.suite}: this installation has no such rows")
        return 0
    show(result["rows"], args.suite, args.markdown, args.only)
    if interrupted:
        again = f"; continue with --resume --json {args.json}" if args.json else ""
        say(f"qkernels: stopped; {len(result['rows'])} rows are kept{again}")
        return 130
    refused = [row for row in result["rows"] if row["backend"] in rows.OURS and not row["median_ms"]]
    for row in refused:
        say(f"refused: {results.label(row)}: {row['parity']}")
    return int(bool(refused) or args.suite == "bars" and not bars.met(result["rows"]))


class Settings:
    """The checked arguments."""

    def __init__(self, args):
        self.suite, self.only = args.suite, args.only
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: cuda was asked for, but this torch sees no GPU")
        self.backends = [name for name in chosen_backends(args.backends) if self.available(name)]
        if not any(name in rows.OURS or name in rows.RIVALS for name in self.backends):
            raise ValueError(f"--backends: none of {args.backends} is there on {self.device}")
        self.repeats = REPEATS.get(args.suite, 20) if args.repeats is None else args.repeats
        if self.repeats < 1:
            raise ValueError(f"--repeats: {self.repeats} is not at least 1")
        self.threads = self.chosen_threads(args.threads)
        if args.resume and not args.json:
            raise ValueError("--resume: --json names the result to go on with, and is missing")
        if args.json and not Path(args.json).resolve().parent.is_dir():
            raise FileNotFoundError(f"--json: the folder of {args.json} does not exist")
        if args.csv:
            results.check_csv(args.csv)

    def available(self, name):
        """Whether a backend can run here; one line where not."""
        why = None
        if name == "triton" and self.device == "cpu":
            why = "triton runs on a GPU"
        elif name == "pytorch_optimizer" and self.suite in ("sharpness", "bars"):
            why = None if importlib.util.find_spec(name) else "it is not installed"
        elif name in rows.OURS:
            try:
                with backend.use_backend(name):
                    pass
            except RuntimeError as error:
                why = str(error)
        if why:
            say(f"{name}: left out: {why}")
        return why is None

    def chosen_threads(self, text):
        if text is None:
            cores = machine.cores()
            return [1] if self.device == "cuda" else [cores] if self.suite == "train" else sorted({1, cores})
        try:
            counts = [int(word) for word in text.split(",")]
        except ValueError:
            counts = [0]
        if min(counts) < 1:
            raise ValueError(f"--threads: {text!r} is not a list of numbers such as 1,2")
        return counts

    def rows(self):
        """The rows to be timed, built one at a time."""
        return suites.suite(self.suite, self.device, self.only)


def chosen_backends(text):
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ValueError(f"--backends: {(unknown or [text])[0]!r} is not one of {', '.join(BACKENDS)}")
    return list(dict.fromkeys(names))


def kept_rows(args, run):
    """The rows of an earlier result to go on with: of the same machine, torch and commit."""
    if not args.resume or not Path(args.json).exists():
        return []
    before = results.read(args.json)
    for fact in ("machine", "torch", "commit", "allocator"):
        if before["run"].get(fact) != run[fact]:
            raise ValueError(f"--resume: {args.json} is of {fact} {before['run'].get(fact)}, not {run[fact]}")
    return before["rows"]


def groups(settings, kept):
    """The finished rows, one list per row of the suite and number of threads.

    A group that lacks a backend is timed again with those it has: only what was timed together is compared.
    """
    done = {}
    for row in kept:
        done.setdefault(results.group(row), set()).add(row["backend"])
    for row in settings.rows():
        for count in row.threads(settings.threads):
            has = done.get((row.op, row.case, row.dtype, count))
            if has is not None and not _missing(row, settings.backends, has):
                continue
            say(f"{row.name} {count} thread{'s' if count > 1 else ''}")
            backends = [name for name in BACKENDS if name in settings.backends or name in (has or ())]
            with measure.threads(count):
                yield time_row(row, count, settings, backends)


def _missing(row, backends, has):
    """Whether the row has a variant of these backends that was not timed."""
    wanted = [name for name in backends if name not in has]
    return wanted and any(variant.backend in wanted for variant in row.variants(wanted))


def time_row(row, count, settings, backends):
    """Parity, memory, then the clock; one result per backend."""
    torch._dynamo.reset()
    found, refused = [], []
    for variant in row.variants(backends):
        measure.check_interrupt()
        try:
            variant.parity = row.check(variant)
            measure.memory(variant, row.make(), settings.device)
            found.append(variant)
        except rows.Refused as error:
            refused.append((variant, f"REFUSED: {error}"))
        except Exception as error:  # a variant that cannot run must not take the others with it
            measure.check_interrupt()
            refused.append(
                (variant, f"REFUSED: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            )
    pool = [row.make() for _ in range(row.sets)]
    work = [(variant, pool) for variant in found]
    if row.nbytes:
        work.append(measure.copy_variant(row.nbytes, settings.device))
    if settings.device == "cpu":
        measure.touch(4 * max((variant.peak_bytes for variant in found), default=0))
    measure.collect(work, settings.repeats, settings.device)
    timed = fastest([variant for variant, _ in work])
    finished = [line(row, count, variant, timed) for variant in timed.values()]
    for variant, why in refused:
        if variant.backend not in timed:
            variant.parity = why
            finished.append(line(row, count, variant, timed))
            timed[variant.backend] = variant
    return finished


def fastest(found):
    """backend -> the fastest of its forms."""
    best = {}
    for variant in found:
        kept = best.get(variant.backend)
        if kept is None or measure.percentiles(variant.samples)[0] < measure.percentiles(kept.samples)[0]:
            best[variant.backend] = variant
    return best


def line(row, count, variant, timed):
    """One result: the fields of the JSON."""
    median = p20 = p80 = speed = share = None
    if variant.samples:
        median, p20, p80 = measure.percentiles(variant.samples)
        if row.nbytes:
            speed = row.nbytes / median / 1e6
            copied = [c / v for c, v in zip(timed["copy"].samples, variant.samples)]
            share = measure.percentiles(copied)[0]
    return {
        "op": row.op, "case": row.case, "backend": variant.backend, "dtype": row.dtype, "threads": count,
        "median_ms": median, "p20_ms": p20, "p80_ms": p80, "bytes": row.nbytes, "gb_per_s": speed,
        "copy_fraction": share, "saved_bytes": variant.saved_bytes, "peak_bytes": variant.peak_bytes,
        "parity": variant.parity, "form": variant.form, "launches": variant.launches,
        "samples": len(variant.samples), "disturbed": variant.disturbed,
        "samples_ms": [float(f"{sample:.5g}") for sample in variant.samples],
    }  # fmt: skip


def about(allocator):
    if allocator == "kept":
        return "freed memory is kept by this process (mallopt), so that page faults are not timed"
    return "this system's allocator may return freed memory: page faults are timed with the kernels"


def show(found, suite, as_markdown, only=""):
    print(results.table(found, as_markdown))
    disturbed, samples = (sum(row.get(name) or 0 for row in found) for name in ("disturbed", "samples"))
    if disturbed:
        print(f"\n{disturbed} of {samples} samples waited for a processor: other programs were running.")
    if suite == "bars":
        print("\n" + bars.table(found, as_markdown, only))


def say(text):
    """One line of progress on stderr; stdout is for results."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
