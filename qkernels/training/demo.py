"""`qkernels demo`: float, 4-bit and 2-bit training on handwritten digits, side by side."""

from pathlib import Path

from qkernels.report import write_report

from .config import make_config
from .log import say
from .run import Interrupted, train

RUNS = {"float": (32, 32), "w4a4": (4, 4), "w2a2": (2, 2)}


def add_arguments(parser):
    """Declares the arguments of `qkernels demo`."""
    parser.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="where the runs go (default: runs/demo)"
    )
    parser.add_argument("--resume", action="store_true", help="continue a demo that was interrupted")
    parser.add_argument("--model", default="resnet20", metavar="NAME", help="the network (default: resnet20)")
    parser.add_argument(
        "--recipe", default="lsq", metavar="NAME", help="of the quantized runs (default: lsq)"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="of each run (default: as the recipes say)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")


def main(args):
    """Runs the demo: three runs, a table, a report; returns the exit code."""
    out, results = Path(args.out), {}
    if any((out / name).exists() for name in RUNS) and not args.resume:
        raise FileExistsError(f"--out: {out} already holds a demo; add --resume, or choose another folder")
    for number, (name, (weight_bits, act_bits)) in enumerate(RUNS.items(), 1):
        quantized = {
            "recipe": args.recipe,
            "init": str(out / "float"),
            "weight_bits": weight_bits,
            "act_bits": act_bits,
        }
        settings = {"recipe": "float"} if name == "float" else quantized
        if args.epochs is not None:
            settings["epochs"] = args.epochs
        config = make_config(model=args.model, data="digits", seed=args.seed, **settings)
        say(f"[{number}/{len(RUNS)}] {name}: {config['summary']}")
        folder = out / name
        resume = (folder / "config.json").exists()
        try:
            results[name] = train(config, folder, resume=resume, device=args.device, threads=args.threads)
        except Interrupted as stop:
            say(f"qkernels: stopped; continue with: qkernels demo --out {out} --resume")
            return 128 + stop.signal
    print(table(results))
    write_report([out / name for name in RUNS], out / "report.html")
    print(f"report: {out / 'report.html'}")
    return 0


def table(results):
    """The results of the runs as aligned text, with the accuracy lost against the first of them."""
    lines = [
        f"{'run':8} {'weights':>8} {'activations':>12} {'train acc':>10} {'test acc':>10} {'change':>8} {'step':>9}"
    ]
    reference = next(iter(results.values()))["test_acc"]
    for name, r in results.items():
        lines.append(
            f"{name:8} {r['weight_bits']:>4} bit {r['act_bits']:>8} bit {r['train_acc']:10.2%} {r['test_acc']:10.2%} "
            f"{100 * (r['test_acc'] - reference):+8.2f} {r['step_ms']:6.1f} ms"
        )
    return "\n".join(lines)
