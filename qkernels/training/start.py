"""What a run begins with, from its config: data, seeds, a trainer; and a trained run read back from its folder."""

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..annotations import StrPath
from . import build, checkpoint, distributed
from .config import read_config
from .data import Data, build_data
from .engine import Trainer, lr_schedule


def data_of(config, device, workers):
    """The data set of a config, this process's share of it."""
    where = {"rank": distributed.rank(), "world_size": distributed.world()}
    return build_data(
        config["data"],
        config["batch_size"],
        config["seed"],
        config["augment"],
        device=device,
        image_size=config["image_size"],
        workers=workers,
        **where,
    )


def seed_all(seed):
    """Seeds python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def lr_factor_of(config):
    """epoch -> factor on the learning rates."""
    shape = {key: config[key] for key in ("epochs", "milestones", "gamma", "warmup_epochs")}
    return lr_schedule(config["schedule"], **shape)


def new_trainer(config, model, data, init, device, weights=None):
    """A Trainer at the start of a run: the float ``model`` with the weights ``init``, quantized and calibrated.

    ``weights``, of a checkpoint, stand in for the calibration.
    """
    teacher = None
    if init is not None:
        build.load_weights(model, init)
    if config["distill"]:
        teacher = deepcopy(model).to(device).eval().requires_grad_(False)
    model = build.quantize(model, config).to(device)
    if weights is not None:
        model.load_state_dict(weights)
    elif config["method"]:
        build.calibrate(model, data, config)
    seed_all(config["seed"] + distributed.rank())
    same = ("epochs", "amp", "accumulate", "clip_grad_norm", "compile", "channels_last")
    return Trainer(
        model, build.optimizer(model, config), build.loss(config, model, teacher), data, device=device,
        lr_factor=lr_factor_of(config), **{key: config[key] for key in same},
    )  # fmt: skip


def load_run(
    out: StrPath,
    device: str | torch.device = "cpu",
    batch_size: int | None = None,
    which: str = "checkpoint",
) -> tuple[nn.Module, Data, dict[str, Any]]:
    """`(model, data, config)` of a trained run, the model in eval mode with its trained weights.

    Args:
        out: the run folder.
        device: where model and batches lie.
        batch_size: of the loaders; None is that of the run.
        which: "checkpoint" (the last) or "best".

    Raises:
        FileNotFoundError: no run, or no checkpoint in it.
        RuntimeError: the checkpoint is damaged.
    """
    config, device = read_config(out), distributed.find_device(str(device))
    state, _ = checkpoint.load(Path(out) / which)
    data = data_of({**config, "batch_size": batch_size or config["batch_size"]}, device=device, workers=4)
    model = build.quantize(build.float_model(config, data), config)
    model.load_state_dict(state)
    return model.to(device).eval(), data, config
