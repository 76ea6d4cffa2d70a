"""From settings to objects: the model, its quantization, the optimizer and the loss of a training run."""

import inspect

import torch

import qkernels as qk
from qkernels.annotations import Model, StrPath
from qkernels.models import build_model

from . import checkpoint, distributed

_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel, torch.compile
NOISES = tuple(kind.__name__ for kind in qk.noise.KINDS)


def float_model(config, data):
    """The floating-point network of a run, freshly initialised from the global random state."""
    return build_model(config["model"], data.num_classes, data.in_channels, data.image_size)


def quantize(model, config):
    """Swaps the quantized layers of the run's method into `model`; a float run returns it unchanged."""
    if not config["method"]:
        return model
    arguments = _arguments(config["quantizer"])
    bits = {key: None if config[key] == 32 else config[key] for key in ("weight_bits", "act_bits")}
    return qk.quantize_(model, _made("quantizer", qk.QConfig, method=config["method"], **bits, **arguments))


def calibrate(model, data, config):
    """Sets the step sizes from the first batches of training, or from so many images, which the processes share."""
    images = config["calibration_images"]
    if not images:
        return qk.calibrate(model, data.train, config["calibration_batches"])
    batches = _first(data.train, -(-images // distributed.world()))
    return qk.calibrate(model, batches, max(len(batches), 1))


def _first(batches, images):
    """The first images, in as many batches as they came in, but of one size: BatchNorm needs more than one image."""
    taken = []
    for x, _ in batches:
        taken.append(x)
        if sum(map(len, taken)) >= images:
            break
    return torch.cat(taken)[:images].tensor_split(len(taken)) if taken else []


def _arguments(table):
    return {key: _argument(key, value) for key, value in table.items()}


def _argument(key, value):
    """A QConfig argument from TOML, which has no None ("none") and no objects ({kind = "Tempering", c = 0.2})."""
    if isinstance(value, dict) and key == "overrides":  # of single layers: tables of such arguments
        return {
            name: _arguments(table) if isinstance(table, dict) else table for name, table in value.items()
        }
    if isinstance(value, dict):
        arguments = dict(value)
        kind = arguments.pop("kind", None)
        if kind not in NOISES:
            raise ValueError(f"quantizer.{key}.kind: {kind!r} is not one of {', '.join(NOISES)}")
        return _made(f"quantizer.{key}", getattr(qk.noise, kind), **arguments)
    return None if value == "none" and key != "weight_norm" else value


def load_weights(model: Model, path: StrPath) -> Model:
    """Loads what `checkpoint.load_model` reads (a run folder, a file of float weights) into `model`.

    Raises:
        ValueError: its names or shapes are those of another network; the message names the first of each kind.
    """
    state, own = checkpoint.load_model(path), model.state_dict()
    for _ in _WRAPPERS:
        for prefix in _WRAPPERS:
            if not own.keys() & state.keys() and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
    for name in own.keys() - state.keys():
        if name.endswith(".num_batches_tracked"):  # absent from files of torch before 0.4.1
            state[name] = own[name]
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in sorted(own.keys() & state.keys()) if own[name].shape != state[name].shape]
    if missing or unexpected or shapes:
        facts = [
            f"{len(names)} {what} (first: {names[0]})"
            for what, names in (("missing", missing), ("unknown", unexpected), ("of another shape", shapes))
            if names
        ]
        raise ValueError(f"init: {path} does not hold this network's weights: {', '.join(facts)}")
    model.load_state_dict(state)
    return model


def optimizer(model, config):
    """The optimizer over `qk.param_groups`, inside the sharpness-aware wrapper the settings name, if any."""
    decay = config["weight_decay"] * config["weight_decay_by_bits"].get(str(config["weight_bits"]), 1.0)
    if config["method"]:
        groups = qk.param_groups(model, lr=config["lr"], weight_decay=decay)
    else:
        groups = [{"params": list(model.parameters()), "lr": config["lr"], "weight_decay": decay}]
    kind = config["optimizer"]
    if kind == "sgd":
        base = torch.optim.SGD(groups, momentum=config["momentum"], nesterov=config["nesterov"])
    elif kind == "rmsprop":
        base = torch.optim.RMSprop(groups)
    else:
        base = (torch.optim.AdamW if kind == "adamw" else torch.optim.Adam)(
            groups, betas=tuple(config["betas"])
        )
    return _sharpness_aware(model, base, config) if config["sharpness"] else base


def _sharpness_aware(model, base, config):
    arguments = dict(config["sharpness"])
    kind = arguments.pop("kind", None)
    wrappers = {"sam": "SAM", "saq": "SAQ"}
    if kind not in wrappers:
        raise ValueError(f"sharpness.kind: {kind!r} is not one of {', '.join(wrappers)}")
    name = config["model"].rpartition(":")[2]  # timm's and torchvision's are the same networks
    radii = arguments.pop("rho_by_model", {}).get(name, arguments.pop("rho_by_bits", None))
    arguments.pop("rho_by_bits", None)
    if radii and not isinstance(radii, dict):
        raise ValueError(f"sharpness.rho_by_bits: {radii!r} is not a table of bits and rho")
    if radii and "rho" not in arguments:
        nearest = min(sorted(map(int, radii)), key=lambda bits: abs(bits - config["weight_bits"]))
        arguments["rho"] = radii[str(nearest)]
    clip = config["clip_grad_norm"] or None
    return _made("sharpness", getattr(qk.optim, wrappers[kind]), model, base, max_norm=clip, **arguments)


def _made(setting, make, *args, **arguments):
    """`make(...)`, where an argument that it does not know or of another type is a bad setting."""
    accepted = [*inspect.signature(make).parameters][len(args) :]
    for name in arguments:
        if name not in accepted:
            raise ValueError(f"{setting}.{name}: unknown; known are {', '.join(accepted)}")
    try:
        return make(*args, **arguments)
    except TypeError as error:
        raise ValueError(f"{setting}: {error}") from None


def loss(config, model, teacher):
    """`loss(output, target, x)`: cross-entropy, plus what the settings' `distill` table asks for.

    "logits": (1 - weight) * CE + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)), Hinton 2015.
    "features": CE + weight * `qk.distill.FeatureDistillation`, with its arguments `reduction` and `layers`.
    """
    cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=config["label_smoothing"])
    if not config["distill"]:
        return lambda output, target, x: cross_entropy(output.float(), target)
    arguments = dict(config["distill"])
    kind, weight = arguments.pop("kind", None), arguments.pop("weight", 1.0)
    temperature = arguments.pop("temperature", 4.0) if kind == "logits" else 1.0
    for name, value in (("weight", weight), ("temperature", temperature)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"distill.{name}: {value!r} is not a number of at least 0")
    if kind == "features":
        distill = _made("distill", qk.distill.FeatureDistillation, model, teacher, **arguments)
        return lambda output, target, x: cross_entropy(output.float(), target) + weight * distill.loss(x)
    if kind != "logits":
        raise ValueError(f"distill.kind: {kind!r} is not one of logits, features")
    if temperature == 0 or weight > 1:
        raise ValueError(
            f"distill: {weight=}, {temperature=}; logits takes a weight from 0 to 1 and no temperature 0"
        )
    if arguments:
        raise ValueError(f"distill: unknown {', '.join(arguments)}; logits takes weight and temperature")

    def logits_loss(output, target, x):
        with torch.no_grad():
            wanted = teacher(x)
        divergence = qk.distill.logit_distillation(output, wanted, temperature)
        return (1 - weight) * cross_entropy(output.float(), target) + weight * divergence

    return logits_loss
