"""The config of a run: what was asked for, complete; `config.json` of its folder."""

import platform
from pathlib import Path
from typing import Any

import torch

import qkernels as qk

from .log import read_json
from .recipe import SETTINGS, load_recipe

RUN = {"recipe": "lsq", "model": "resnet20", "data": "digits", "seed": 0, "image_size": 224, "init": None}


def make_config(**arguments: Any) -> dict[str, Any]:
    """The config of a new run: what `--recipe`, `--model`, `--data`, `--seed`, `--init` and settings say, complete.

    Raises:
        ValueError: an unknown recipe or setting, or a value that is not accepted.
    """
    config = {key: arguments.pop(key, default) for key, default in RUN.items()}
    config["init"] = resolved(config["init"])
    for key, least, below in (("seed", 0, 2**63), ("image_size", 1, 2**31)):
        if not isinstance(config[key], int) or not least <= config[key] < below:
            raise ValueError(f"{key}: {config[key]!r} is not an integer from {least} to {below - 1}")
    settings = load_recipe(config["recipe"], config["data"], arguments)
    versions = {
        "qkernels": qk.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {**config, **settings, "versions": versions}


def resolved(init):
    """The path of the float weights, which is to hold in every working directory."""
    return None if init is None else str(Path(init).resolve())


def read_config(out):
    """The config of the run in folder `out`; raises FileNotFoundError when there is none."""
    path = Path(out) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{out} is not a run folder: it has no config.json")
    config = read_json(path)
    missing = [key for key in RUN if key not in config]
    if missing:
        raise ValueError(f"{path} is not the config of a run: it lacks {', '.join(missing)}")
    return {**SETTINGS, **config}  # a run of an earlier version lacks what has been added


def check_unchanged(config, given, overrides, out):
    """A resumed run keeps its settings: one that differs is an error, not a silent mixture."""
    for key, value in {**given, **overrides}.items():
        table, _, inner = key.partition(".")
        own = config.get(table)
        own = own.get(inner) if inner and isinstance(own, dict) else own
        if key == "init":
            own, value = resolved(own), resolved(value)
        if own != value:
            raise ValueError(
                f"--resume: {key} = {value!r} differs from {own!r} of the run in {out}; leave it out, or "
                "start a new run"
            )


def starts_from_float(config):
    """Whether the run first trains the float network it starts from."""
    return config["method"] and config["init"] is None and config["float_recipe"]


def float_config(config):
    """Of the float run that a quantized one starts from."""
    same = {key: config[key] for key in ("model", "data", "seed", "image_size", "batch_size", "augment")}
    epochs = {"epochs": config["float_epochs"]} if config["float_epochs"] else {}
    return make_config(recipe=config["float_recipe"], **same, **epochs)
