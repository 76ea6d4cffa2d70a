"""A network, its settings and its trainer, small enough for every test; the fixture `tiny` gives the network a name."""

import torch
from torch import nn

import qkernels as qk
from qkernels.training import build, make_config
from qkernels.training.data import build_data
from qkernels.training.engine import Trainer, lr_schedule

QUANTIZED = ["lsq", "lsq+", "pact", "dorefa", "saq_clip", "kd", "noise_tempering", "diffq", "ewgs", "fpq", "saq",
             "saq_vit", "saq_mobilenet", "sam", "sam_then_sgd"]  # fmt: skip
TINY = {"model": "tiny", "data": "fake:3x8x8:4", "batch_size": 32, "epochs": 2, "augment": False}
SHORT = ["--model", "nin_d1_w1", "--data", "fake:3x8x8:4", "--threads", "1", "--quiet"]
TINY_RUN = {"model": "nin_d1_w1", "data": "fake:3x8x8:4", "lr": 0.01}


class Tiny(nn.Module):
    """Convolutions, BatchNorm and dropout: state, buffers and random numbers to lose."""

    def __init__(self, classes=4, bn=True):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8) if bn else nn.Identity()
        self.conv2, self.drop, self.fc = (
            nn.Conv2d(8, 8, 3, 2, 1),
            nn.Dropout(0.1 if bn else 0.0),
            nn.Linear(32, classes),
        )

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        return self.fc(self.drop(torch.relu(self.conv2(x)).flatten(1)))


def trainer(recipe="float", model=None, **changes):
    """A trainer of a tiny model, as `train` would build it."""
    options = {key: changes.pop(key) for key in ("progress", "loss", "wrap") if key in changes}
    config = make_config(**{**TINY, "recipe": recipe, **changes})
    torch.manual_seed(0)
    data = build_data(config["data"], config["batch_size"], 0, config["augment"])
    model = build.quantize(model or Tiny(), config)
    if config["method"]:
        qk.calibrate(model, data.train, batches=2)
    optimizer = options.pop("wrap", lambda base: base)(build.optimizer(model, config))
    loss = options.pop("loss", None) or build.loss(config, model, None)
    names = ("epochs", "amp", "accumulate", "clip_grad_norm", "compile", "channels_last")
    settings = {name: config[name] for name in names}
    schedule = lr_schedule(config["schedule"], epochs=config["epochs"])
    torch.manual_seed(1)
    return Trainer(model, optimizer, loss, data, lr_factor=schedule, **settings, **options)


def stop_after(steps):
    """A `stop` that is true at the n-th step boundary."""
    count = iter(range(1, 10**6))
    return lambda: next(count) == steps


def assert_same(a, b, where=""):
    """Equal bit for bit, through nested dicts, lists and tuples."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b, where
