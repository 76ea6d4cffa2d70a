"""The report's sections on what `qkernels measure` found: flatness, curvature, layers, corruption, landscape."""

import math
from html import escape

from ..sharpness.formulas import NAMES
from ..tabulate import spread
from . import charts, figures
from .html import figure, legend, picture, table

_SHORT = ("Init", "Orig", "Mag-Init", "Mag-Orig") * 2
_KINDS = {"latent": "latent weights", "quantized": "quantized weights"}


def sections(several):
    """HTML sections over {(data, model): groups}; those without measurements are left out."""
    parts = []
    for (data, model), groups in several.items():
        # All groups, so that a group has one colour on the page.
        body = [part(groups) for part in (_flatness, _layers, _corruption, figures.section)]
        body.append(_landscapes(groups))
        if any(body):
            parts.append(
                f"<h2>Measures of {escape(model)} on {escape(data.partition(':')[0])}</h2>{''.join(body)}"
            )
    return parts


def _flatness(groups):
    """QGen's table 3, the sharpness of NT's table 3 and the Hessian; the lowest of a column is bold."""
    parts = []
    for kind, name in _KINDS.items():
        if not any(
            g.measured(f"{section}_{kind}") for g in groups for section in ("bounds", "linf", "hessian")
        ):
            continue
        rows = [
            (g, [spread(g.measured(_key("bounds", kind, g), "measures", b))[0] for b in NAMES])
            for g in groups
        ]
        rows = [(g, values) for g, values in rows if any(v is not None for v in values)]
        if rows:
            above = [("", 1), ("PAC-Bayes", 4), ("Sharpness", 4)]
            cells = _lowest_bold([g.label for g, _ in rows], [values for _, values in rows])
            note = (
                "√(bound / images), mean over seeds, lowest in bold. Init: from where training started, "
                "a float model for runs that start from one. Mag: perturbed in proportion to weights."
            )
            parts.append(f"<h3>Flatness bounds, {name}</h3>")
            parts.append(table(["", *_SHORT], cells, "matrix", note, above))
        parts.append(_curvature(groups, kind, name))
    return "".join(parts)


def _key(section, kind, group):
    """The weights of a float model are before and after quantizers at once; a table without any other leaves it out."""
    return f"{section}_{'latent' if group.bits == 'FP32' else kind}"


def _curvature(groups, kind, name):
    radii = list({rho: None for g in groups for found in g.measured(_key("linf", kind, g)) for rho in found})
    rows, errors = [], []
    for g in groups:
        top = [values[0] for values in g.measured(_key("hessian", kind, g), "eigenvalues") if values]
        boxes = [g.measured(_key("linf", kind, g), rho, "difference") for rho in radii]
        columns = [top, g.measured(_key("hessian", kind, g), "trace"), *boxes]
        if any(columns):
            rows.append((g.label, [spread(column)[0] for column in columns]))
            errors.append(spread(g.measured(_key("hessian", kind, g), "trace_stderr"))[0])
    if not rows:
        return ""
    cells = _lowest_bold(*zip(*rows, strict=True))
    for row, error in zip(cells, errors, strict=True):
        text, style = row[2]
        row[2] = (text if error is None else f"{text} ± {charts.number(error)}", style)
    headers = ["", "λ₁", "Trace", *(f"L∞, ρ = {rho}" for rho in radii)]
    note = (
        "λ₁ (the eigenvalue of largest magnitude), trace ± standard error: of the Hessian of the training loss. "
        "L∞: the largest rise for |e| ≤ ρ."
    )
    return f"<h3>Curvature, {name}</h3>" + table(headers, cells, "matrix", note)


def _lowest_bold(labels, values):
    """Rows of a table; the number of a column nearest to 0 is bold where there are several."""
    columns = [[v for v in column if v is not None] for column in zip(*values, strict=True)]
    lowest = [min(column, key=abs) if len(column) > 1 else None for column in columns]

    def cell(value, low):
        return charts.number(value), "best" if value is not None and value == low else ""

    return [[label, *map(cell, row, lowest)] for label, row in zip(labels, values, strict=True)]


def _layers(groups):
    """Weight norm (QGen table 2), step size and quantization error (NT table 6), and per layer (QGen figure 1)."""
    rows, lines = [], {"weight_step": [], "mean_error": []}
    for i, g in enumerate(groups):
        tables = [t for t in g.measured("layers") if t]
        if not tables:
            continue
        rows.append((g.label, [_over(tables, _norm), *(_over(tables, _column(key)) for key in lines)]))
        for key, series in lines.items():
            values = [(j + 1, charts.log10(row.get(key))) for j, row in enumerate(tables[0])]
            series.append((i, False, [v for v in values if v[1] is not None]))
    if not rows:
        return ""
    headers = ["", "‖w‖", "Mean step size", "Mean quantization error"]
    cells = [[label, *map(charts.number, values)] for label, values in rows]
    note = "‖w‖ over all layers; the means over layers. Error: mean of |Q(w) − w|. Curves: the first seed."
    plots = [
        figure(charts.line_chart(lines[key], "layer", f"log₁₀ {name}", name), name[0].upper() + name[1:])
        for key, name in (("weight_step", "step size of the weights"), ("mean_error", "quantization error"))
    ]
    parts = f"<h3>Layers</h3>{table(headers, cells, 'matrix', note)}"
    if any(plots):
        shown = [(i, groups[i].label) for i, _, line in lines["weight_step"] if line]
        parts += f'<div class="plots">{"".join(plots)}</div>{legend(shown)}'
    return parts


def _over(tables, value):
    return spread([v for v in map(value, tables) if v is not None])[0]


def _norm(layers):
    norms = [row["weight_norm"] for row in layers if row.get("weight_norm") is not None]
    return math.sqrt(sum(n * n for n in norms)) if norms else None


def _column(key):
    return lambda layers: spread([row[key] for row in layers if row.get(key) is not None])[0]


def _corruption(groups):
    """QGen's tables 4 to 6: the gap under corruption by severity, green where below the first float model's."""
    found = [g for g in groups if g.measured("generalization", "corrupted")]
    measured = [cells for g in found for cells in g.measured("generalization", "corrupted")]
    names = list({name: None for cells in measured for name in cells})
    if not names:
        return ""
    severities = sorted({s for cells in measured for cell in cells.values() for s in cell})
    reference = next((g.label for g in found if g.bits == "FP32"), None)

    def gap(g, name, severity):
        return spread(g.measured("generalization", "corrupted", name, severity, "gap"))[0]

    rows = []
    for name in [*names, "mean"]:
        row = [name.replace("_", " ")]
        for s in severities:
            values = {g.label: gap(g, name, s) for g in found}
            if name == "mean":
                values = {g.label: spread(g.measured("generalization", "mean", s, "gap"))[0] for g in found}
            base = values.get(reference)
            row += [
                (charts.number(v), _against(v, base) if g.label != reference else "")
                for g, v in zip(found, values.values(), strict=True)
            ]
        rows.append(row)
    headers = ["", *(g.label for _ in severities for g in found)]
    above = [("", 1), *((f"Severity {s}", len(found)) for s in severities)]
    note = "Loss on corrupted test images − training loss. Green: below the floating-point model; red: above."
    return f"<h3>Gap under corruption</h3>{table(headers, rows, 'matrix', note, above)}"


def _against(value, base):
    if value is None or base is None or value == base:
        return ""
    return "good" if value < base else "bad"


def _landscapes(groups):
    plots = []
    for g in groups:
        for run in g.runs:
            for path in sorted(run.path.glob("landscape*.png")):
                kind = path.stem.removeprefix("landscape").strip("_")
                text = ", ".join(filter(None, (f"{g.label}, seed {run.config['seed']}", kind)))
                plots.append(figure(picture(path, f"loss landscape of {text}"), text))
    return f'<h3>Loss landscape</h3><div class="plots pictures">{"".join(plots)}</div>' if plots else ""
