"""The report's page: sections of tables and plots over groups of runs."""

from html import escape

from ..tabulate import spread
from . import charts, measured
from .html import document, figure, legend, table

_GAP = "Gap: test loss − training loss. Step: median of one optimizer step."


def page(groups, title):
    """The HTML document over groups of runs (of `runs.group_runs`)."""
    several = {}
    for group in groups:
        several.setdefault((group.config["data"], group.config["model"]), []).append(group)
    parts = [_head(groups, title), _results(groups, several)]
    parts += [_curves(data, model, members) for (data, model), members in several.items()]
    parts += measured.sections(several)
    parts.append(_runs(groups))
    return document(title, parts)


def _head(groups, title):
    runs = [run for group in groups for run in group.runs]
    unfinished = sum(run.result is None for run in runs)
    versions = sorted({f"qkernels {v.get('qkernels')}, torch {v.get('torch')}" for v in _versions(runs)})
    facts = [
        f"{len(runs)} run{'s' * (len(runs) != 1)}",
        *([f"{unfinished} unfinished"] * bool(unfinished)),
        *versions,
    ]
    return f"<h1>{escape(title)}</h1><p>{escape('; '.join(facts))}</p>"


def _versions(runs):
    return [run.config.get("versions") or {} for run in runs]


def _results(groups, several):
    """The table of QGen's table 1, a row per group, and the accuracies as a plot."""
    headers = ["Recipe", "Model", "Data", "Settings", "Seeds", "Test acc %", "Train acc %", "Test loss",
               "Train loss", "Gap", "Step ms"]  # fmt: skip
    if not any(group.note for group in groups):
        headers.remove("Settings")
    rows = []
    for group in groups:
        config = group.config
        row = {
            "Recipe": f"{config['recipe']} {group.bits}",
            "Model": (config["model"], "text"),
            "Data": (config["data"].partition(":")[0], "text"),
            "Settings": (group.note, "text"),
            "Seeds": str(len(group.values("test_acc")) or "unfinished"),
            "Test acc %": plus_minus(group.values("test_acc"), "{:.2f}", 100),
            "Train acc %": plus_minus(group.values("train_acc"), "{:.2f}", 100),
            "Test loss": plus_minus(group.values("test_loss"), "{:.3f}"),
            "Train loss": plus_minus(group.values("train_loss"), "{:.3f}"),
            "Gap": plus_minus(group.gaps(), "{:.3f}"),
            "Step ms": plus_minus(group.values("step_ms"), "{:.1f}"),
        }
        rows.append([row[name] for name in headers])
    plots = []
    for (data, model), members in several.items():
        dots = [(g.label, i, [100 * v for v in g.values("test_acc")]) for i, g in enumerate(members)]
        name = f"Test accuracy, {model} on {data.partition(':')[0]}"
        plots.append(figure(charts.dot_chart([d for d in dots if d[2]], "test accuracy (%)", name), name))
    note = "Mean ± sample standard deviation over seeds. WxAy: bits of weights and activations. " + _GAP
    return f'<h2>Results</h2>{table(headers, rows, "cards", note)}<div class="plots">{"".join(plots)}</div>'


def plus_minus(values, form, factor=1.0):
    """ "mean ± deviation" in a cell, or nothing."""
    mean, deviation = spread([factor * v for v in values])
    if mean is None:
        return ""
    return form.format(mean) if deviation is None else f"{form.format(mean)} ± {form.format(deviation)}"


def _curves(data, model, groups):
    """Loss and accuracy over the epochs: the mean over seeds, training dashed, at most eight groups a plot."""
    groups = [(i, g) for i, g in enumerate(groups) if any(run.log for run in g.runs)]
    parts = [f"<h2>Training of {escape(model)} on {escape(data.partition(':')[0])}</h2>"] if groups else []
    for first in range(0, len(groups), charts.COLOURS):
        chosen = groups[first : first + charts.COLOURS]
        plots = []
        for key, factor, name in (("loss", 1.0, "Loss"), ("acc", 100.0, "Accuracy (%)")):
            lines = [
                (i, side == "train", _mean_curve(g, f"{side}_{key}", factor))
                for i, g in chosen
                for side in ("train", "test")
                if not (name == "Loss" and side == "train" and g.config.get("distill"))
            ]
            plots.append(figure(charts.line_chart(lines, "epoch", name.lower(), name), name))
        parts.append(f'<div class="plots">{"".join(plots)}</div>{legend([(i, g.label) for i, g in chosen])}')
    if parts:
        parts.append(
            "<p>Solid: test. Dashed: training, the mean over the steps of the epoch; not the loss with a "
            "teacher, which has further terms.</p>"
        )
    return "".join(parts)


def _mean_curve(group, key, factor):
    """[(epoch, mean over the runs that have reached it)]."""
    values = {}
    for run in group.runs:
        for line in run.log:
            if line.get(key) is not None:
                values.setdefault(line["epoch"] + 1, []).append(factor * line[key])
    return [(epoch, sum(v) / len(v)) for epoch, v in sorted(values.items())]


def _runs(groups):
    """Every run by itself, folded away."""
    headers = ["Folder", "Recipe", "Bits", "Seed", "Epochs", "Test acc %", "Train acc %", "Gap", "Step ms",
               "Minutes"]  # fmt: skip
    rows = []
    for group in groups:
        for run in group.runs:
            r, done = run.result, f"{len(run.log)} of {run.config['epochs']}"
            numbers = [""] * 5
            if r:
                done = str(r["epochs"])
                step = "" if r.get("step_ms") is None else f"{r['step_ms']:.1f}"
                numbers = [f"{100 * r['test_acc']:.2f}", f"{100 * r['train_acc']:.2f}",
                           f"{r['test_loss'] - r['train_loss']:.4f}", step, f"{r['seconds'] / 60:.1f}"]  # fmt: skip
            names = [str(run.path), (group.config["recipe"], "text"), (group.bits, "text")]
            rows.append([*names, str(run.config["seed"]), done, *numbers])
    return f"<details><summary>Every run</summary>{table(headers, rows, 'cards')}</details>"
