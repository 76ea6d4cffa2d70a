"""`qkernels tables`: the ablations and comparisons of the papers, for any model and data; each cell trains once."""

import statistics
from pathlib import Path

from ..files import write_json, write_text
from ..sweep import exit_code, run_cells
from ..tabulate import markdown, spread
from .cells import Cell, check_cells
from .cells import results as read_results
from .log import read_json, read_log
from .papers import METHODS, TABLES, Row, Table
from .recipe import load_recipe, overlap, parse_assignment
from .start import load_run


def add_arguments(parser):
    """Declares the arguments of `qkernels tables`."""
    flag = parser.add_argument
    flag("name", choices=sorted(TABLES), metavar="NAME", help=", ".join(sorted(TABLES)))
    flag("--model", default="resnet20", metavar="NAME", help="the network (default: resnet20)")
    flag("--data", default="digits", metavar="SPEC", help="digits (default), cifar10:DIR, ...")
    flag("--out", required=True, metavar="DIR", help="a run folder per cell, NAME.md, NAME.json")
    flag("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    flag("--epochs", type=int, metavar="N", help="of the quantized runs (default: as their recipes say)")
    flag("--float-epochs", type=int, metavar="N", help="of the float models (default: as the recipe says)")
    flag("--bits", default="2,4", metavar="LIST", help="columns: 2 is W2A2, 2/4 is W2A4 (default: 2,4)")
    flag("--methods", metavar="LIST", help=f"rows of `methods` (default: {','.join(METHODS)})")
    flag("--init", metavar="RUN|FILE", help="float weights for all seeds, instead of one float run per seed")
    flag("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every quantized run")
    flag("--batches", type=int, default=8, metavar="N", help="training batches for eigenvalues (default: 8)")
    flag("--workers", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    flag("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    flag("--threads", type=int, metavar="N", help="CPU threads of a worker")
    flag("--retry", action="store_true", help="train the runs that failed again, from the start")
    flag("--quiet", action="store_true", help="print the tables only")


def main(args):
    """Runs `qkernels tables`; returns the exit code, 1 where a cell failed or is left."""
    for name in ("seeds", "batches", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: {value} is not a positive number")
    tables, bits, out = chosen(args.name, args.methods), parse_bits(args.bits), Path(args.out).resolve()
    starts, cells = plan(tables, bits, out, args)
    # Rows of two tables may be the same run.
    distinct = list({cell.name: cell for cell in cells.values()}.values())
    check_cells([*starts, *distinct], out)
    stopped, errors = _train(starts, distinct, out, args)
    if stopped:
        return exit_code([*starts, *distinct], out, stopped, errors)
    found, failed = read_results([*starts, *distinct], out)
    runs = {
        key: _measured(cell, found[cell.name], tables, out, args)
        for key, cell in cells.items()
        if cell.name in found
    }
    floats = [found[cell.name]["test_acc"] for cell in starts if cell.name in found]
    rows = {table.title: [_row(table, row, bits, args.seeds, runs) for row in table.rows] for table in tables}
    text = "\n\n".join(
        [*(as_text(table, bits, rows[table.title]) for table in tables), footer(floats, args.seeds)]
    )
    write_text(out / f"{args.name}.md", text + "\n")
    write_json(out / f"{args.name}.json", {"tables": rows, "float_test_acc": floats, "failed": failed})
    print(text)
    return exit_code([*starts, *distinct], out, 0, errors)


def _train(starts, cells, out, args):
    """The float models, then what starts from them; returns as `run_cells`."""
    options = {key: getattr(args, key) for key in ("workers", "quiet", "device", "threads", "retry")}
    stopped, errors = run_cells(starts, out, **options)
    if stopped:
        return stopped, errors
    trained, _ = read_results(starts, out)
    missing = {str(out / cell.name): cell.name for cell in starts if cell.name not in trained}
    ready = []
    for cell in cells:
        if cell.arguments["init"] in missing:
            errors[cell.name] = f"its float model {missing[cell.arguments['init']]} is not trained"
        else:
            ready.append(cell)
    stopped, more = run_cells(ready, out, **options)
    return stopped, errors | more


def chosen(name, methods=None):
    """The tables of a name; `methods` is the comma-separated rows of the table "methods"."""
    if methods is None:
        return TABLES[name]
    if name != "methods":
        raise ValueError(f"--methods: {methods!r} is for the table 'methods' alone")
    return (Table(TABLES[name][0].title, tuple(Row(m, m, m) for m in methods.split(","))),)


def parse_bits(text):
    """ "2,2/4" as [(2, 2), (2, 4)]: bits of weights and activations."""
    pairs = []
    for word in text.split(","):
        numbers = word.strip().split("/")
        if not 1 <= len(numbers) <= 2 or not all(n.isdigit() for n in numbers):
            raise ValueError(
                f"--bits: {word!r} is neither a number of bits nor weights/activations, such as 2/4"
            )
        pairs.append((int(numbers[0]), int(numbers[-1])))
    return pairs


def plan(tables, bits, out, args):
    """([cells of the float models], {(row's short name, bits, seed): cell}); rows of one seed share a float model."""
    common = {"model": args.model, "data": args.data}
    given = dict(map(parse_assignment, args.set))
    if args.epochs is not None:
        given["epochs"] = args.epochs
    starts, cells = {}, {}
    for row in (row for table in tables for row in table.rows):
        for key in given:
            if any(overlap(key, own) for own in (*row.settings, "weight_bits", "act_bits", "seed")):
                raise ValueError(f"--set: {key} is what the cells of this table differ in")
        float_recipe = load_recipe(row.recipe, args.data)["float_recipe"]
        for seed in range(args.seeds):
            start = f"{float_recipe}_s{seed}"
            init = str(out / start) if float_recipe else None
            if float_recipe == "float" and args.init is not None:
                init = args.init
            elif float_recipe:
                epochs = {} if args.float_epochs is None else {"epochs": args.float_epochs}
                starts[start] = Cell(start, {**common, "recipe": float_recipe, "seed": seed, **epochs})
            for weight_bits, act_bits in bits:
                settings = {"weight_bits": weight_bits, "act_bits": act_bits, **row.settings, **given}
                arguments = {**common, "recipe": row.recipe, "seed": seed, "init": init, **settings}
                name = f"{row.short}_w{weight_bits}a{act_bits}_s{seed}"
                cells[row.short, (weight_bits, act_bits), seed] = Cell(name, arguments)
    return list(starts.values()), cells


def _measured(cell, result, tables, out, args):
    """The result with what the tables show besides, which is kept in the run's folder with the batches it is of."""
    wanted = {column for table in tables for column in table.columns}
    path = out / cell.name / "extras.json"
    extras = read_json(path) if path.exists() else {}
    if extras.get("batches") != args.batches:
        extras = {"batches": args.batches}
    missing = wanted - extras.keys()
    if missing:
        extras |= {column: _COLUMNS[column](out / cell.name, args) for column in sorted(missing)}
        write_json(path, extras)
    return {**result, **extras}


def _images_per_s(folder, args):
    return statistics.median(line["images_per_s"] for line in read_log(folder))


def _over_layers(key):
    """The mean over the layers of the run's bits (the first and last may have others)."""

    def mean(folder, args):
        from ..sharpness.gaps import layer_table

        model, _, config = load_run(folder, args.device)
        rows = [row for row in layer_table(model) if row[key] is not None]
        inner = [row for row in rows if row["weight_bits"] == config["weight_bits"]]
        return statistics.fmean(row[key] for row in inner or rows)

    return mean


def _dominant_eigenvalue(folder, args):
    from ..sharpness import hessian

    model, data, _ = load_run(folder, args.device)
    loader = data.train_eval.sample(args.batches) if args.batches else data.train_eval
    return hessian(model, loader, top=1, trace_samples=0, tolerance=1e-2).eigenvalues[0]


_COLUMNS = {
    "images/s": _images_per_s,
    "quantization error": _over_layers("mean_error"),
    "step size": _over_layers("weight_step"),
    "dominant eigenvalue": _dominant_eigenvalue,  # the largest in magnitude; it may be negative
}


def _row(table, row, bits, seeds, runs):
    """Per precision: accuracies by seed, their mean and deviation, the paired difference to the table's first row."""
    columns = {}
    for pair in bits:
        own, first = (
            {seed: runs[short, pair, seed] for seed in range(seeds) if (short, pair, seed) in runs}
            for short in (row.short, table.rows[0].short)
        )
        values = [run["test_acc"] for run in own.values()]
        pairs = [own[seed]["test_acc"] - first[seed]["test_acc"] for seed in own if seed in first]
        entry = {
            "test_acc": values,
            **_spread("mean", values),
            **_spread("change", pairs if row != table.rows[0] else []),
            "pairs": len(pairs),
        }
        for column in table.columns:
            entry |= _spread(column, [run[column] for run in own.values()])
        columns["W{}A{}".format(*pair)] = entry
    return {"name": row.name, "recipe": row.recipe, "settings": row.settings, "columns": columns}


def _spread(name, values):
    return dict(zip((name, f"{name}_std"), spread(values)))


def as_text(table, bits, rows):
    """A table in Markdown."""
    names = ["W{}A{}".format(*pair) for pair in bits]
    headers = [
        "",
        *(f"{name}{suffix}" for name in names for suffix in ("", *(f" {c}" for c in table.columns))),
    ]
    lines = []
    for row in rows:
        cells = [row["name"]]
        for name in names:
            entry = row["columns"][name]
            cells += [_accuracy(entry), *(_number(entry[column]) for column in table.columns)]
        lines.append(cells)
    return "\n".join([f"**{table.title}**", "", *markdown(headers, lines)])


def _accuracy(entry):
    if entry["mean"] is None:
        return "-"
    text = f"{100 * entry['mean']:.2f}"
    if entry["mean_std"] is not None:
        text += f" ± {100 * entry['mean_std']:.2f}"
    if entry["change"] is not None:
        error = ""
        if entry["change_std"] is not None:
            error = f" ± {100 * entry['change_std'] / entry['pairs'] ** 0.5:.2f}"
        text += f" ({100 * entry['change']:+.2f}{error})"
    return text


def _number(value):
    return "-" if value is None else f"{value:.4g}"


def footer(floats, seeds):
    """What the numbers are."""
    text = "Top-1 test accuracy in %"
    if seeds > 1:
        text += (
            f", mean ± sample standard deviation over {seeds} seeds; in brackets the mean difference to the first row "
            "for the same seed, ± its standard error: within twice that it may be chance"
        )
    else:
        text += "; in brackets the difference to the first row, of one seed: it may be chance"
    if floats:
        text += f". Float models: {100 * statistics.fmean(floats):.2f}"
    return text + "."
