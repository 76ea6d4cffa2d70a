"""The rows of the papers' ablations and comparisons: which recipe with which settings stands behind a name."""

from dataclasses import dataclass, field

_NONE = {"sharpness.kind": "none"}
_PLAIN = {"quantizer.act_noise": "none"}
METHODS = ("lsq", "noise_tempering", "fpq", "diffq", "sam", "saq")


@dataclass(frozen=True)
class Row:
    """A line of a table: its name, the recipe and the settings over it; short names its runs' folders."""

    name: str
    short: str
    recipe: str
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """rows: the first is what the others are compared with. columns: names of what is shown beside the accuracy."""

    title: str
    rows: tuple
    columns: tuple = ()


def _perturbed(p):
    return {"quantizer.act_noise": {"kind": "FeaturePerturbation", "p": p, "where": "after"}}


def _tempered(c):
    return {"quantizer.weight_noise": {"kind": "Tempering", "c": c, "k": 50.0}}


_FPQ_BOTH = Row("perturbation, CSD", "both-p0.1", "fpq", _perturbed(0.1))
_CSD = Row("CSD", "csd", "fpq", _PLAIN)
_SGD = Row("SGD", "sgd", "saq", _NONE)
_SAQ = Row("SAQ", "saq", "saq")
_ABLATION = (
    Row("neither", "neither", "fpq", {**_PLAIN, "distill.kind": "none"}),
    Row("perturbation", "perturbed-p0.1", "fpq", {**_perturbed(0.1), "distill.kind": "none"}),
    _CSD,
    _FPQ_BOTH,
)
_P_SWEEP = (
    Row("p = 0", _CSD.short, "fpq", _CSD.settings),
    *(Row(f"p = {p}", f"both-p{p}", "fpq", _perturbed(p)) for p in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)),
)
_NOISE = (
    Row("c = 0 (LSQ)", "lsq", "noise_tempering", {"method": "lsq", "quantizer.weight_noise": "none"}),
    *(Row(f"c = {c}", f"nt-c{c}", "noise_tempering", _tempered(c)) for c in (0.1, 0.2, 0.3, 0.4)),
)
_RHO = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)

TABLES = {
    "fpq-ablation": (
        Table("FPQ, table 2: perturbation and CSD", _ABLATION),
        Table("FPQ, table 3: probability of the perturbation, with CSD", _P_SWEEP),
    ),
    "nt-noise": (
        Table("Noise tempering, tables 4 to 6: noise level", _NOISE, ("quantization error", "step size")),
    ),
    "saq-cases": (
        Table(
            "SAQ, table 4: cases",
            (_SGD, *(Row(f"case {c}", f"case{c}", "saq", {"sharpness.case": c}) for c in (1, 2, 3))),
            ("dominant eigenvalue",),
        ),
    ),
    "saq-losses": (
        Table(
            "SAQ, table 5: vanilla (VQL) and perturbed loss (PQL)",
            (
                Row("VQL", _SGD.short, "saq", _NONE),
                Row("PQL", "pql", "saq", {"sharpness.vanilla_loss": False}),
                Row("VQL + PQL", _SAQ.short, "saq"),
            ),
        ),
    ),
    "saq-throughput": (
        Table(
            "SAQ, table 6: efficient training (ET)",
            (
                _SGD,
                Row("SAQ without ET", "every1", "saq", {"sharpness.every": 1}),
                Row("SAQ with ET", "saq", "saq"),
            ),
            ("images/s",),
        ),
    ),
    "saq-sam": (
        Table(
            "SAQ, table 7: SAM before the quantization, or in it",
            (_SGD, Row("SAM, then SGD", "sam-sgd", "sam_then_sgd"), _SAQ),
        ),
    ),
    "saq-rho": (
        Table(
            "SAQ, figure A: rho",
            (_SGD, *(Row(f"rho = {rho}", f"rho{rho}", "saq", {"sharpness.rho": rho}) for rho in _RHO)),
        ),
    ),
    "methods": (Table("Methods from the same float models", tuple(Row(m, m, m) for m in METHODS)),),
}
