"""`qkernels train`: one training run in one folder, from a recipe to a result."""

import argparse
import contextlib
import math
import os
import shlex
import signal
import statistics
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ..annotations import StrPath
from ..files import alone, write_json
from . import build, checkpoint, distributed
from .bn import bn_reestimate
from .config import RUN, check_unchanged, float_config, make_config, read_config, starts_from_float
from .engine import Diverged, Interrupt
from .log import RunLog, read_json, read_log, say, summary_writer
from .recipe import CHOICES, SETTINGS, available_recipes, parse_assignment
from .start import data_of, lr_factor_of, new_trainer, seed_all

FLAGS = ("weight_bits", "act_bits", "epochs", "batch_size", "optimizer", "lr", "weight_decay", "accumulate",
         "clip_grad_norm", "float_epochs", "bn_reestimate", "amp", "augment", "compile", "channels_last")  # fmt: skip
# Arguments of `train` that are the machine's, and how it is used.
OPTIONS = ("resume", "device", "threads", "workers", "deterministic", "tensorboard", "keep_best", "keep_every",
           "quiet")  # fmt: skip
EPOCHS = "epochs"  # the folder of the weights that keep_every keeps


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended a run at a step boundary; its checkpoint is complete. `signal` is the number."""

    def __init__(self, number, out):
        super().__init__(f"stopped; continue with: qkernels train --out {shlex.quote(str(out))} --resume")
        self.signal = number


def add_arguments(parser):
    """Declares the arguments of `qkernels train`."""
    parser.add_argument("--out", metavar="DIR", help="the run folder: config, log, checkpoint, result")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, bit for bit")
    parser.add_argument(
        "--recipe", metavar="NAME|FILE.toml", help="which settings to start from (default: lsq)"
    )
    parser.add_argument("--model", metavar="NAME", help="the network (default: resnet20)")
    parser.add_argument(
        "--data", metavar="SPEC", help="digits (default), cifar10:DIR, cifar100:DIR or folder:DIR"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels, for folder:DIR (default: 224)")
    parser.add_argument(
        "--init",
        metavar="RUN|FILE",
        help="float weights to start from: run folder, .safetensors, .pt or .pth",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of weights, data order and noise (default: 0)")
    settings = parser.add_argument_group("settings of the recipe that can be overridden")
    for name in FLAGS:
        kind, flag = type(SETTINGS[name]), "--" + name.replace("_", "-")
        if kind is bool:
            settings.add_argument(flag, action=argparse.BooleanOptionalAction)
        else:
            accepted = ", ".join(CHOICES[name]) if name in CHOICES else None
            settings.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=accepted)
    settings.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other, or table.key=value"
    )
    machine = parser.add_argument_group("this machine")
    machine.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    machine.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="image loading processes (folder:DIR; default: one a core, at most 4)",
    )
    machine.add_argument(
        "--deterministic", action="store_true", help="deterministic cuDNN: exact repeats on a GPU too"
    )
    machine.add_argument("--tensorboard", action="store_true", help="event files in DIR/tensorboard")
    machine.add_argument(
        "--keep-best", action="store_true", help="also keep the epoch of best test accuracy, DIR/best"
    )
    machine.add_argument(
        "--keep-every",
        type=int,
        default=0,
        metavar="N",
        help="also keep the weights of every Nth epoch, DIR/epochs",
    )
    machine.add_argument("--quiet", action="store_true", help="print the result only")
    parser.add_argument("--list-recipes", action="store_true", help="name the recipes and exit")


def main(args):
    """Runs `qkernels train`; returns the exit code."""
    if args.list_recipes:
        for name, summary in available_recipes().items():
            print(f"{name:20} {summary}")
        return 0
    if args.out is None:
        raise ValueError("--out: a folder for the run is needed")
    given = {key: getattr(args, key) for key in RUN if getattr(args, key) is not None}
    overrides = {key: getattr(args, key) for key in FLAGS if getattr(args, key) is not None}
    overrides.update(parse_assignment(text) for text in args.set)
    if args.resume:
        config = read_config(args.out)
        check_unchanged(config, given, overrides, args.out)
    else:
        config = make_config(**given, **overrides)
        for key in ("weight_bits", "act_bits"):
            if not config["method"] and overrides.get(key, 32) != 32:
                raise ValueError(
                    f"{key}: {overrides[key]}, but recipe {config['recipe']} trains in floating point"
                )
        if args.image_size is not None and not config["data"].startswith("folder:"):
            raise ValueError(
                f"--image-size: is for folder:DIR; the images of {config['data']} have their own size"
            )
    try:
        result = train(config, args.out, **{name: getattr(args, name) for name in OPTIONS})
    except Interrupted as stop:
        say(f"qkernels: {stop}", quiet=distributed.rank() > 0)
        return 128 + stop.signal
    finally:
        distributed.stop()
    if result is not None:
        print(f"{args.out}: test accuracy {result['test_acc']:.2%}, loss {result['test_loss']:.4f}")
    return 0


def train(
    config: dict[str, Any],
    out: StrPath,
    *,
    resume: bool = False,
    device: str | torch.device = "auto",
    threads: int | None = None,
    workers: int = 4,
    deterministic: bool = False,
    tensorboard: bool = False,
    keep_best: bool = False,
    keep_every: int = 0,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Trains as `config` (of `make_config`) says and returns the result, as in `out/result.json`.

    A quantized run without `init` first trains the float network in `out/float`. Under `torchrun` every process calls
    this, and only the first writes and returns the result (the others None). ``keep_every`` n keeps the weights after
    epochs n, 2 n, ... in `out/epochs`, which `qkernels measure --figures` follows; 0 keeps none.

    Raises:
        Diverged: the loss became infinite or NaN.
        FileExistsError: `out` holds a run and `resume` is False, or another process trains in it, or it is a file.
        Interrupted: Ctrl-C; the checkpoint is written.
        ValueError, FileNotFoundError: of `config`, before anything is written.
    """
    out = Path(out)
    if (out / "config.json").exists() and not resume:
        raise FileExistsError(
            f"out: {out} already holds a run; add --resume (resume=True) to continue it, or choose another folder"
        )
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: {out} is not a folder")
    check_machine(threads, workers, tensorboard, keep_every)
    if resume and (out / "result.json").exists():
        result = read_json(out / "result.json")
        say(f"{out}: this run is complete", quiet)
        return result
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = deterministic
    machine = {"device": distributed.start(distributed.find_device(device)), "workers": workers}
    options = {"tensorboard": tensorboard, "keep_best": keep_best, "keep_every": keep_every}
    options["quiet"] = quiet or distributed.rank() > 0
    data = data_of(config, **machine)
    seed_all(config["seed"])
    model = build.float_model(config, data)
    # A checkpoint replaces the float weights, unless a teacher has them too.
    needs_init = config["distill"] or checkpoint.latest(out / "checkpoint") is None
    _try(config, model, needs_init)
    distributed.barrier()  # every process has looked at `out`
    if distributed.rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out: {out} cannot be made: {error.strerror}") from None
    with contextlib.ExitStack() as stack:
        if distributed.rank() == 0:
            stack.enter_context(alone(out, f"out: another process trains in {out}"))
            if (out / "config.json").exists() and not resume:
                raise FileExistsError(f"out: another process has just begun a run in {out}")
            write_json(out / "config.json", config)
        init = config["init"] if needs_init else None
        if starts_from_float(config) and needs_init:
            init = _train_float(config, out, machine, options)
        return _train_one(config, out, init, model, data, machine, options)


def check_machine(threads=None, workers=0, tensorboard=False, keep_every=0):
    """Raises ValueError or ImportError for arguments of `train` that this machine cannot serve."""
    for name, value, least in (
        ("threads", threads, 1),
        ("workers", workers, 0),
        ("keep_every", keep_every, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    if tensorboard:
        summary_writer()


def _try(config, model, needs_init):
    """Builds on a copy what the run will build, so that a bad setting fails before anything is written."""
    if config["distill"] and config["init"] is None and not config["float_recipe"]:
        raise ValueError("distill: needs a trained teacher; give init, or a float_recipe")
    probe = deepcopy(model)
    if config["init"] is not None and needs_init:
        build.load_weights(probe, config["init"])
    build.optimizer(build.quantize(probe, config), config)
    if starts_from_float(config):
        float_config(config)
    build.loss(config, probe, deepcopy(model))  # it may leave hooks on them
    lr_factor_of(config)


def _train_float(config, out, machine, options):
    """Trains (or continues, or finds done) the float start of a quantized run in `out/float`; returns that folder."""
    folder = out / "float"
    if not (folder / "result.json").exists():
        say("no init: training the float model first, in " + str(folder), options["quiet"])
        start = float_config(config)
        data = data_of(start, **machine)
        seed_all(start["seed"])
        distributed.barrier()
        if distributed.rank() == 0:
            folder.mkdir(exist_ok=True)
            write_json(folder / "config.json", start)
        try:
            _train_one(start, folder, None, build.float_model(start, data), data, machine, options)
        except Interrupted as stop:
            raise Interrupted(stop.signal, out) from None
        distributed.barrier()
    return folder


def _train_one(config, out, init, model, data, machine, options):
    """Initialises, trains with a checkpoint after every epoch, and writes the result."""
    device, first = machine["device"], distributed.rank() == 0
    saved = checkpoint.load(out / "checkpoint", device) if checkpoint.latest(out / "checkpoint") else None
    trainer = new_trainer(config, model, data, init, device, weights=None if saved is None else saved[0])
    if saved is not None:
        trainer.load_state_dict(saved[1])
        say(f"{out}: continuing from epoch {trainer.epoch}, batch {trainer.batch}", options["quiet"])
    elif first:
        checkpoint.save_tensors(out / "initial.safetensors", trainer.model.state_dict())
    log = None
    if first:
        shown = {key: options[key] for key in ("tensorboard", "quiet")}
        log = RunLog(out, config["epochs"], trainer.epoch, len(data.train), **shown)
        trainer.progress = log.step
    try:
        _train_epochs(trainer, out, log, options["keep_best"], config["select"], options["keep_every"])
    finally:
        if log is not None:
            log.close()
    return _finish(trainer, config, out, data)


def _train_epochs(trainer, out, log, keep_best, select, keep_every):
    with Interrupt() as interrupt:
        while trainer.epoch < trainer.epochs:
            record = trainer.train_epoch(stop=interrupt)
            if record is not None:
                record["test_loss"], record["test_acc"] = trainer.evaluate(trainer.data.test)
                if log is not None:
                    log.epoch(record)
                if record["test_acc"] > trainer.best_acc:
                    trainer.best_acc = record["test_acc"]
                    if keep_best:
                        _save(out / "best", trainer)
                if record["train_loss"] < trainer.best_loss:
                    trainer.best_loss = record["train_loss"]
                    if select == "train_loss":
                        _save(out / "selected", trainer)
                if log is not None and keep_every and trainer.epoch % keep_every == 0:
                    (out / EPOCHS).mkdir(exist_ok=True)
                    path = out / EPOCHS / f"{trainer.epoch:05d}.safetensors"
                    checkpoint.save_tensors(path, trainer.model.state_dict())
            _save(out / "checkpoint", trainer)
            if record is None or (trainer.epoch < trainer.epochs and interrupt()):
                raise Interrupted(interrupt.signal or signal.SIGINT, out)


def _save(path, trainer, **more):
    state = {**trainer.state_dict(), **more}  # on every process: it gathers
    if distributed.rank() == 0:
        checkpoint.save(path, trainer.model.state_dict(), state)


def _finish(trainer, config, out, data):
    """The epoch selected, BatchNorm statistics if asked for, the final measurements, `result.json`."""
    epoch = trainer.epoch
    if config["select"] == "train_loss":
        state, rest = checkpoint.load(out / "selected", trainer.device)
        trainer.model.load_state_dict(state)
        epoch = rest["epoch"]
        _save(out / "checkpoint", trainer, weights_epoch=epoch)
    if config["bn_reestimate"]:
        data.train.set_epoch(0)
        bn_reestimate(trainer.model, data.train, config["bn_reestimate"])
        _save(out / "checkpoint", trainer, weights_epoch=epoch)
    train_loss, train_acc = trainer.evaluate(data.train_eval)
    test_loss, test_acc = trainer.evaluate(data.test)
    if not math.isfinite(train_loss + test_loss):
        raise Diverged(
            f"the trained network's loss is {train_loss} on training and {test_loss} on test images"
        )
    if distributed.rank() > 0:
        return None
    lines = read_log(out)
    steps = [line["step_ms"] for line in lines if line["step_ms"] is not None]
    facts = {
        key: config[key]
        for key in ("model", "data", "recipe", "method", "weight_bits", "act_bits", "seed", "epochs")
    }
    result = {
        "train_loss": train_loss,
        "train_acc": train_acc,
        "test_loss": test_loss,
        "test_acc": test_acc,
        **facts,
        "seconds": sum(line["seconds"] for line in lines),
        "step_ms": statistics.median_high(steps) if steps else None,
        "params": sum(p.numel() for p in trainer.model.parameters()),
        "device": distributed.device_name(trainer.device),
        "threads": torch.get_num_threads(),
        "processes": distributed.world(),
    }
    write_json(out / "result.json", result)
    return result
