"""The report's tables and plots of `qkernels measure --figures`: noise, gradients, the trace along training."""

from ..tabulate import spread
from . import charts
from .html import figure, legend, table

_NORMS = {"none": "‖g‖", "weights": "noise on weights", "features": "noise on features"}


def section(groups):
    """HTML of FPQ's figures 1 and 2, SAQ's figure 4 and the Hessian's trace; curves are of a group's first seed."""
    return _gradients(groups) + _curves(groups)


def _gradients(groups):
    rows = []
    for g in groups:
        found = [spread(g.measured("figures", "gradient_norms", "mean", name))[0] for name in _NORMS]
        cosine, deviation = spread(g.measured("figures", "gradient_cosine", "mean"))
        if cosine is None and not any(v is not None for v in found):
            continue
        text = "" if cosine is None else f"{cosine:.3f}"
        text += "" if deviation is None else f" ± {deviation:.3f}"
        rho, case = (
            (g.measured("figures", "gradient_cosine", "settings", k) or [None])[0] for k in ("rho", "case")
        )
        ascent = "" if rho is None else f"ρ = {rho:g}, " + ("SAM" if case is None else f"SAQ case {case}")
        rows.append([g.label, *map(charts.number, found), text, ascent])
    if not rows:
        return ""
    note = (
        "Norm of the gradient of the weights, without noise and under noise of one quantization step. Cosine: of the "
        "gradients at perturbed and at present weights, perturbed as named, mean over batches (± over seeds)."
    )
    return "<h3>Gradients</h3>" + table(
        ["", *_NORMS.values(), "cos(gₛ, g)", "Perturbed by"], rows, "matrix", note
    )


def _curves(groups):
    variance, cosine, trace = [], [], []
    for i, g in enumerate(groups):
        for found in g.measured("figures", "output_variance")[:1]:
            for name, of in found["variance"].items():
                points = zip(map(charts.log10, found["levels"]), map(charts.log10, of["output"]), strict=True)
                variance.append((i, name != "quantized", list(points)))
        for values in g.measured("figures", "gradient_cosine", "cosine")[:1]:
            cosine.append((i, False, list(enumerate(values, 1)) if len(values) > 1 else []))
        for runs in g.measured("figures", "hessian_trace", "runs")[:1]:
            for run in runs.values():
                points = zip(run["epochs"], map(charts.log10, run["trace"]), strict=True)
                trace.append((i, False, list(points)))
    plots = [
        figure(charts.line_chart(lines, x, y, name), name)
        for name, x, y, lines in (
            ("Output variance under input noise", "log₁₀ deviation of the noise", "log₁₀ variance", variance),
            ("Cosine of perturbed and vanilla gradient", "batch", "cosine", cosine),
            ("Trace of the Hessian along training", "epoch", "log₁₀ trace", trace),
        )
    ]
    if not any(plots):
        return ""
    shown = sorted({i for i, _, line in (*variance, *cosine, *trace) if line})
    note = "<p>Curves: the first seed. Output variance: dashed without quantizers, or of the float model.</p>"
    names = legend([(i, groups[i].label) for i in shown])
    return f'<h3>Noise, gradients, training</h3><div class="plots">{"".join(plots)}</div>{names}{note}'
