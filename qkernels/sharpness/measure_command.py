"""`qkernels measure`: every measure of one trained run, in the run's folder."""

import copy
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from ..convert import quantizers
from ..corruptions import SEVERITIES
from ..files import read_object
from ..training import build, checkpoint, load_run
from ..training.log import progress_bar
from ..training.run import EPOCHS
from .curvature import hessian
from .figures import cosine_of_gradients, gradient_norms, hessian_trace_along, output_variance
from .gaps import generalization, layer_table
from .linf import linf_sharpness
from .measures import CHOICES, Report, measure
from .pictures import GradientCosine, GradientNorms, OutputVariance, TraceAlong
from .saved import digest, write_json
from .subject import WEIGHTS
from .surface import landscape

RADII = (1e-3, 5e-4)
# Samples, iterations and ascent steps of the bounds; steps of linf; eigenvalues, trace vectors; landscape's side.
FULL = {"bounds": (10, 15, 20), "linf": 20, "top": 3, "trace": 32, "size": 25, "severities": SEVERITIES}
QUICK = {"bounds": (3, 8, 5), "linf": 5, "top": 1, "trace": 8, "size": 9, "severities": (1, 5)}
QUICK_BATCHES = 4
FIGURES = {
    "output_variance": OutputVariance,
    "gradient_norms": GradientNorms,
    "gradient_cosine": GradientCosine,
    "hessian_trace": TraceAlong,
}


def add_arguments(parser):
    """Declares the arguments of `qkernels measure`."""
    flag = parser.add_argument
    flag("folder", metavar="RUN_DIR", help="a folder that `qkernels train` wrote")
    kinds = (*WEIGHTS, "both")
    flag("--weights", choices=kinds, default="latent", help="perturb them before or after their quantizers")
    flag("--landscape", action="store_true", help="also landscape_latent.png (or _quantized) and its numbers")
    flag(
        "--corruptions", nargs="?", const="", metavar="DIR",
        help="also the test images under 15 corruptions x 5 severities, or those of CIFAR-C or ImageNet-C in DIR",
    )  # fmt: skip
    flag(
        "--figures",
        action="store_true",
        help="also output variance, gradient norms and cosines, and the Hessian's trace, with pictures",
    )
    flag("--density", action="store_true", help="also the Hessian's spectral density")
    flag("--quick", action="store_true", help="a few batches and samples: minutes, rougher numbers")
    flag(
        "--batches",
        type=int,
        metavar="N",
        help="measure on random training images, N batches of them (default: all)",
    )
    flag("--batch-size", type=int, metavar="N", help="of the measurement (default: the run's)")
    flag("--which", choices=("checkpoint", "best"), default="checkpoint", help="the last weights or the best")
    for name, text in (
        ("noise", "sigma, or sigma^2, is the deviation"),
        ("over", "alpha: of the copies (QGen, B.2: the mean)"),
        ("ball", "of alpha: each weight's, or all weights' norm"),
        ("target", "what moves by 0.1 in the searches"),
        ("parameters", "all: BatchNorm's, too, are perturbed"),
    ):
        flag(f"--{name}", choices=CHOICES[name], default=CHOICES[name][0], help=text)
    flag("--seed", type=int, default=0, metavar="N", help="of the random draws (default: 0)")
    flag("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    flag("--threads", type=int, metavar="N", help="CPU threads")
    flag(
        "--restart",
        action="store_true",
        help="forget what an earlier call measured, as other settings require",
    )
    flag("--quiet", action="store_true", help="no progress")


def main(args):
    """Runs `qkernels measure`; returns the exit code."""
    for name in ("batches", "batch_size", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is not a positive number")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    out = Path(args.folder)
    model, data, config = load_run(out, args.device, args.batch_size, args.which)
    kinds = WEIGHTS if args.weights == "both" else (args.weights,)
    if not config["method"]:
        kinds = ("latent",)  # a float run has no quantizers to be before or after
    run = Run(args, out, model, data, config)
    try:
        run.once("generalization", run.generalization, again=args.corruptions is not None)
        run.once("layers", lambda: layer_table(model))
        for kind in kinds:
            run.kind(kind)
        for kind in kinds if args.landscape else ():
            run.picture(kind)
        if args.figures:
            run.once("figures", run.figures)
            for name, values in run.results["figures"].items():
                FIGURES[name](**values).plot(out / f"{name}.png")
    finally:
        run.progress.close()
    print(table(run.results))
    print(f"written to {run.path}")
    return 0


class Run:
    """What was measured so far, kept in RUN_DIR/measures.json after every section and continued from there."""

    def __init__(self, args, out, model, data, config):
        self.args, self.out, self.model, self.data, self.config = args, out, model, data, config
        self.sizes = QUICK if args.quick else FULL
        batches = args.batches or (QUICK_BATCHES if args.quick else None)
        self.loader = data.train_eval.sample(batches, args.seed) if batches else data.train_eval
        self.common = {"batches": batches, "seed": args.seed}
        self.path, self.progress = out / "measures.json", Progress(args.quiet)
        settings = {
            "quick": args.quick,
            **{name: getattr(args, name) for name in CHOICES},
            "which": args.which,
            "batch_size": args.batch_size or config["batch_size"],
            "weights": digest(model.parameters()),
            **self.common,
        }
        if args.restart:
            for pattern in (self.path.name, "bounds_*.partial.json", "landscape_*.json", "landscape_*.png"):
                for path in out.glob(pattern):
                    path.unlink()
        self.results = _read(self.path, settings) if self.path.exists() else {"settings": settings}

    def once(self, key, compute, again=False):
        """Measures a section unless it is there (``again``: anyway, it continues by itself), and writes the file."""
        if again or key not in self.results:
            began = time.perf_counter()
            self.results[key] = compute()
            seconds = self.results.setdefault("seconds", {})
            seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - began
            write_json(self.path, self.results)

    def generalization(self):
        """Losses, accuracies and gaps; with --corruptions the file is written as each corruption is done."""
        found = dict(self.results.get("generalization", {}))

        def tell(*what):
            write_json(self.path, {**self.results, "generalization": found})
            self.progress(*what)

        names = () if self.args.corruptions is None else "all"
        settings = {
            "published": self.args.corruptions or None,
            "seed": self.args.seed,
            "done": found,
            "progress": tell,
        }
        return generalization(self.model, self.data, names, self.sizes["severities"], **settings)

    def kind(self, weights):
        """The bounds, boxes and curvature of latent or quantized weights."""
        initial = self.out / "initial.safetensors"
        loader, common = self.loader, {"weights": weights, "parameters": self.args.parameters, **self.common}
        partial = self.out / f"bounds_{weights}.partial.json"
        samples, iterations, ascent_steps = self.sizes["bounds"]

        def bounds():
            return asdict(measure(
                self.model, loader, checkpoint.load_model(initial), noise=self.args.noise, samples=samples,
                iterations=iterations, ascent_steps=ascent_steps, m=self.data.train_size, out=partial,
                progress=self.progress, **common, over=self.args.over, ball=self.args.ball, target=self.args.target,
            ))  # fmt: skip

        def boxes():
            found = {}
            for i, rho in enumerate(RADII):
                box = linf_sharpness(
                    self.model, loader, F.cross_entropy, rho, steps=self.sizes["linf"], **common
                )
                found[f"{rho:g}"] = asdict(box)
                self.progress("linf", i + 1, len(RADII))
            return found

        def curvature():
            return hessian(
                self.model, loader, F.cross_entropy, self.sizes["top"], self.sizes["trace"],
                density_probes=4 if self.args.density else 0, progress=self.progress, **common,
            ).to_dict()  # fmt: skip

        if initial.exists():
            self.once(f"bounds_{weights}", bounds)
            partial.unlink(missing_ok=True)
        self.once(f"linf_{weights}", boxes)
        old = self.results.get(f"hessian_{weights}", {})
        self.once(f"hessian_{weights}", curvature, again=self.args.density and old.get("density") is None)

    def picture(self, weights):
        path = self.out / f"landscape_{weights}.json"
        found = landscape(
            self.model, self.loader, F.cross_entropy, self.sizes["size"], weights=weights, out=path,
            progress=self.progress, **self.common,
        )  # fmt: skip
        found.plot(path.with_suffix(".png"))

    def figures(self):
        """The sections that FIGURES names, those of them that this network can have."""
        model, data, samples = self.model, self.data, self.sizes["bounds"][0]
        common = {**self.common, "progress": self.progress}
        compared, start = model, Path(self.config["init"] or self.out / "float")
        if self.config["method"] and (start / "config.json").exists():
            compared = {"quantized": model, "float": load_run(start, self.args.device)[0]}
        found = {"output_variance": output_variance(compared, self.loader, samples=samples, **common)}
        data.train.set_epoch(0)
        if quantizers(model):
            found["gradient_norms"] = gradient_norms(model, data.train, samples=samples, **common)
        found["gradient_cosine"] = cosine_of_gradients(
            model, data.train, **_ascent(model, self.config), **common
        )
        found["hessian_trace"] = hessian_trace_along(
            self.kept(), self.loader, trace_samples=self.sizes["trace"], **common
        )
        return {name: asdict(values) for name, values in found.items()}

    def kept(self):
        """(epoch, model) of the weights that the run kept: the first, the best, the last, those of keep_every."""
        states = {}
        for folder in (self.out / "best", self.out / "selected", self.out / "checkpoint"):
            if checkpoint.latest(folder):
                state, rest = checkpoint.load(folder)
                states[rest.get("weights_epoch", rest["epoch"])] = state
        for path in (self.out / EPOCHS).glob("*.safetensors"):
            states[int(path.stem)] = checkpoint.load_model(path)
        initial = self.out / "initial.safetensors"
        if initial.exists():
            states[0] = checkpoint.load_model(initial)
        model = copy.deepcopy(self.model)
        for epoch in sorted(states):
            model.load_state_dict(states[epoch])
            yield epoch, model


def _ascent(model, config):
    """rho and case as the run was trained, or of SAQ (a float run: SAM) where it was not sharpness-aware."""
    if config["sharpness"]:
        optimizer = build.optimizer(copy.deepcopy(model), config)
        return {"rho": optimizer.param_groups[0]["rho"], "case": getattr(optimizer, "case", None)}
    quantized = any(q.role == "weight" for q in quantizers(model))
    return {"rho": 0.3, "case": 3} if quantized else {"rho": 0.05, "case": None}


def _read(path, settings):
    """What an earlier call with the same settings measured; one with others is refused, it may have taken hours."""
    values = read_object(path)
    if values is None or "settings" not in values:  # damaged
        return {"settings": settings}
    old = values["settings"]
    differs = [f"{k} {old.get(k)} instead of {v}" for k, v in settings.items() if old.get(k) != v]
    if differs:
        raise ValueError(f"{path} holds measures with {', '.join(differs)}; --restart replaces them")
    return values


def table(results):
    """The measures as text."""
    g = results["generalization"]
    sides = (
        f"{side} loss {g[f'{side}_loss']:.4f}  accuracy {g[f'{side}_acc']:.2%}" for side in ("train", "test")
    )
    lines = ["    ".join([*sides, f"gap {g['gap']:.4f}"])]
    if "mean" in g:
        mean = g["mean"]["all"]
        lines.append(
            f"corrupted: loss {mean['loss']:.4f}  accuracy {mean['acc']:.2%}    gap {mean['gap']:.4f}"
        )
    for kind in WEIGHTS:
        if f"hessian_{kind}" not in results:
            continue
        lines.append("")
        if f"bounds_{kind}" in results:
            lines.append(str(Report(**results[f"bounds_{kind}"])))
        for rho, box in results[f"linf_{kind}"].items():
            keskar = f"Keskar {box['keskar']:.3f}"
            lines.append(f"L-infinity {rho:>6}    difference {box['difference']:.5f}    {keskar}")
        h = results[f"hessian_{kind}"]
        values = [f"{v:.4g}{'' if c else '?'}" for v, c in zip(h["eigenvalues"], h["converged"], strict=True)]
        trace = f"trace {h['trace']:.4g} +- {h['trace_stderr']:.2g}"
        lines.append(f"Hessian of {kind} weights: eigenvalues {', '.join(values)}    {trace}")
    return "\n".join(lines)


class Progress:
    """A bar on a terminal, else a line on stderr when a part is done."""

    def __init__(self, quiet):
        self.quiet, self.bar, self.what = quiet, None, None

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __call__(self, what, done, of):
        if self.quiet:
            return
        if what != self.what:
            self.close()
            self.what, self.bar = what, progress_bar(total=of, desc=what)
        if self.bar is not None:
            self.bar.n = done
            self.bar.refresh()
        elif done == of:
            print(f"{what}: done", file=sys.stderr, flush=True)
