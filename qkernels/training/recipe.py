"""Recipes: which settings exist, what a recipe file says about them, and what the user overrides.

A recipe is a TOML file of settings. `base = "lsq"` starts from another recipe, and a table `[data.NAME]` holds what
differs on that data set.
"""

import importlib.resources
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..annotations import StrPath

SETTINGS: dict[str, Any] = {
    "summary": "",  # one line for --list-recipes
    "method": "",  # of QConfig; empty trains in floating point
    "weight_bits": 4,  # 2 to 8; 32 stays in floating point. Both 32: no method, no distill, no sharpness of kind saq
    "act_bits": 4,
    "epochs": 100,
    "batch_size": 128,
    "augment": True,
    "optimizer": "sgd",  # or "adam", "adamw", "rmsprop"
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "betas": [0.9, 0.999],
    "weight_decay": 1e-4,
    "weight_decay_by_bits": {},  # weight bits -> factor on weight_decay
    "schedule": "cosine",  # or "step", "cosine_steps", "constant"
    "milestones": [],  # of the steps, as fractions of the epochs
    "gamma": 0.1,
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
    "accumulate": 1,  # batches per optimizer step
    "clip_grad_norm": 0.0,  # 0 is off
    "amp": "none",  # or "bf16", "fp16"
    "compile": False,
    "channels_last": False,
    "float_recipe": "float",  # of that float model; "" starts a quantized run from random weights
    "float_epochs": 0,  # of the float model a quantized run without --init trains first; 0: as the float recipe says
    "calibration_batches": 8,
    "calibration_images": 0,  # in place of batches; 0: as many as these have
    "select": "last",  # or "train_loss": the result is the epoch of lowest training loss
    "bn_reestimate": 0,  # batches for the BatchNorm statistics after training; 0 is off
    "quantizer": {},  # further arguments of QConfig; None is "none", a noise { kind = "Tempering", c = 0.2 }
    "distill": {},  # kind = "logits" | "features" | "none", weight, ...: a loss against the float model
    "sharpness": {},  # kind = "sam" | "saq" | "none", ...: the optimizer around the optimizer
}
LEAST = {
    "epochs": 1, "batch_size": 1, "accumulate": 1, "weight_bits": 2, "act_bits": 2, "calibration_batches": 1,
    "calibration_images": 0, "float_epochs": 0, "bn_reestimate": 0, "momentum": 0, "weight_decay": 0, "gamma": 0,
    "warmup_epochs": 0, "label_smoothing": 0, "clip_grad_norm": 0,
}  # fmt: skip
CHOICES = {
    "optimizer": ("sgd", "adam", "adamw", "rmsprop"),
    "schedule": ("cosine", "step", "cosine_steps", "constant"),
    "amp": ("none", "bf16", "fp16"),
    "select": ("last", "train_loss"),
}
_FOLDER = importlib.resources.files(__package__) / "recipes"


def available_recipes() -> dict[str, str]:
    """Name -> one-line summary of the recipes that come with the package."""
    return {name: _read(name)["summary"] for name in names_in(_FOLDER)}


def load_recipe(name: StrPath, data: str = "", overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The complete settings of a recipe: defaults, then its file, then its `[data.NAME]` table, then `overrides`.

    Args:
        name: the name of a recipe of the package, or the path of a TOML file.
        data: the data set, as given to `--data` (`digits`, `cifar10:DIR`); selects the table.
        overrides: setting -> value; `table.key` reaches into a table.

    Raises:
        ValueError: an unknown recipe, setting or choice, or a value of another type; nothing is guessed.
    """
    given = _read(name)
    tables = given.pop("data", {})
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in SETTINGS.items()}
    for source, layer in (
        (f"recipe {name}", given),
        (f"recipe {name} [data]", tables.get(data.partition(":")[0], {})),
        ("overrides", overrides or {}),
    ):
        for key, value in layer.items():
            _set(settings, key, value, source)
    for key in ("distill", "sharpness"):
        if settings[key].get("kind") == "none":
            settings[key] = {}
    if settings["weight_bits"] == settings["act_bits"] == 32:
        settings["method"], settings["distill"] = "", {}
        if settings["sharpness"].get("kind") == "saq":
            settings["sharpness"] = {}
    _check(settings)
    if not settings["method"]:
        settings["weight_bits"] = settings["act_bits"] = 32
    return settings


def parse_assignment(text):
    """`key=value` of `--set` as (key, value), the value read as TOML, or as a string when it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set: {text!r} is not of the form key=value")
    toml = _toml()
    try:
        return key.strip(), toml.loads("value = " + value)["value"]
    except toml.TOMLDecodeError:
        return key.strip(), value.strip()


def overlap(key, other):
    """Whether both keys set the same: they are equal, or one is a table and the other inside of it."""
    return key == other or key.startswith(other + ".") or other.startswith(key + ".")


def names_in(folder):
    """The names of a folder's .toml files, sorted."""
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def read_toml(file, what):
    """What a TOML file holds; ValueError naming it and ``what`` it should be."""
    toml = _toml()
    try:
        return toml.loads(file.read_text(encoding="utf-8"))
    except toml.TOMLDecodeError as error:
        raise ValueError(f"{what}: {file} is not valid TOML: {error}") from None


def _read(name):
    file = Path(name) if str(name).endswith(".toml") else _FOLDER / f"{name}.toml"
    if not file.is_file():
        raise ValueError(
            f"recipe: {name!r} is neither a .toml file nor one of {', '.join(names_in(_FOLDER))}"
        )
    own = read_toml(file, "recipe")
    base = _read(own.pop("base")) if "base" in own else {"summary": ""}
    tables = base.get("data", {})
    own["data"] = tables | {name: tables.get(name, {}) | table for name, table in own.get("data", {}).items()}
    return base | own


def _set(settings, key, value, source):
    key, _, inner = key.partition(".")
    if key not in SETTINGS:
        raise ValueError(f"{source}: unknown setting {key!r}; known are {', '.join(SETTINGS)}")
    if inner:
        if not isinstance(SETTINGS[key], dict):
            raise ValueError(f"{source}: {key}.{inner}: {key} is not a table")
        settings[key] = {**settings[key], inner: value}
        return
    kind = type(SETTINGS[key])
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{source}: {key} = {value!r} is a {type(value).__name__}; expected {kind.__name__}")
    settings[key] = {**settings[key], **value} if kind is dict else value


def _check(settings):
    for key, least in LEAST.items():
        if settings[key] < least:
            raise ValueError(f"{key}: {settings[key]} is not a number of at least {least}")
    for key in ("weight_bits", "act_bits"):
        if 8 < settings[key] != 32:
            raise ValueError(f"{key}: {settings[key]} is not 2 to 8, or 32 for floating point")
    for key, value in settings.items():
        _check_finite(key, value)
    for key, choices in CHOICES.items():
        if settings[key] not in choices:
            raise ValueError(f"{key}: {settings[key]!r} is not one of {', '.join(choices)}")
    for key, numbers in (("betas", settings["betas"]), ("milestones", settings["milestones"]),
                         ("weight_decay_by_bits", settings["weight_decay_by_bits"].values())):  # fmt: skip
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise ValueError(f"{key}: {settings[key]} holds something else than numbers")
    if settings["label_smoothing"] > 1:
        raise ValueError(f"label_smoothing: {settings['label_smoothing']} is not a number from 0 to 1")
    if settings["distill"] and not settings["method"]:
        raise ValueError(
            "distill: needs a quantized method; the teacher is the float model that run starts from"
        )
    if settings["sharpness"].get("kind") == "saq" and not settings["method"]:
        raise ValueError("sharpness.kind: 'saq' needs a quantized method; 'sam' is for floating point")
    if settings["lr"] <= 0:
        raise ValueError(f"lr: {settings['lr']} is not positive")


def _check_finite(key, value):
    """JSON, in which the settings are kept, has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: {value} is not a finite number")
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inside:
        _check_finite(f"{key}.{name}", part)


def _toml():
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ImportError("recipes need tomli on Python 3.10: pip install qkernels[train]") from error
    return tomllib
