"""`qkernels compare`: two results of `qkernels bench`, row by row."""

import argparse
import re

from . import results

RULE = (
    "A row of ours fails when its median is slower by more than the limit and its 20th percentile is above the "
    "base's 80th, that is when the spreads are apart; and when it is in the base but was refused for parity."
)


def add_arguments(parser):
    parser.epilog = RULE
    parser.add_argument("base", metavar="BASE.json", help="the earlier result")
    parser.add_argument("new", metavar="OUT.json", help="the later result")
    parser.add_argument(
        "--fail-over", metavar="P%", type=percent, help="exit 1 where a row of ours is slower by over P%%"
    )


def percent(text):
    """0.05 from "5%" or "5"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage such as 5%")
    return float(match[1]) / 100


def main(args):
    """Prints new / base for each common row; 1 where one fails, ValueError (exit 2) where nothing can be compared."""
    base, new = results.read(args.base), results.read(args.new)
    pairs, gone, added = join(base["rows"], new["rows"])
    if not pairs:
        raise ValueError(f"{args.new}: no row in common with {args.base}")
    for fact in ("machine", "torch", "allocator"):
        before, after = base["run"].get(fact), new["run"].get(fact)
        if before != after:
            print(f"note: {fact} differs: {before} and {after}")
    lines, failed = [("row", "base ms", "new ms", "new / base", "")], []
    for before, after in pairs:
        verdict = judge(before, after, args.fail_over)
        ratio = after["median_ms"] / before["median_ms"] if after["median_ms"] else None
        lines.append(
            (results.label(after), results.ms(before), results.ms(after), results.number(ratio), verdict)
        )
        if verdict.startswith("FAIL"):
            failed.append(results.label(after))
    print(results.text(lines))
    for name, rows in ((args.base, gone), (args.new, added)):
        if rows:
            print(f"only in {name}: {'; '.join(map(results.label, rows))}")
    if args.fail_over is None:
        return 0
    print(
        f"{len(failed)} of {len(pairs)} rows slower by over {args.fail_over:.3g}"
        if failed
        else "no row of ours is slower"
    )
    return 1 if failed else 0


def join(base, new):
    """(pairs, rows only in base, rows only in new); rows of the base that were never timed take no part."""
    timed = {results.key(row): row for row in base if row["median_ms"]}
    later = {results.key(row): row for row in new}
    pairs = [(timed[key], later[key]) for key in timed if key in later]
    gone = [row for key, row in timed.items() if key not in later]
    return pairs, gone, [row for key, row in later.items() if key not in timed]


def judge(before, after, limit):
    """The verdict on one row by RULE, "" for nothing to say."""
    ours = after["backend"] in results.OURS
    if not after["median_ms"]:
        return f"FAIL: {after['parity']}" if ours and limit is not None else after["parity"]
    ratio = after["median_ms"] / before["median_ms"]
    apart = after["p20_ms"] > before["p80_ms"]
    if limit is None or ratio <= 1 + limit:
        return ""
    if not apart:
        return "slower, spreads overlap"
    return f"FAIL: slower by {ratio - 1:.0%}" if ours else "slower (a rival)"
