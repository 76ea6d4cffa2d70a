"""A network of every kind of layer, quantized and calibrated."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk

METHODS = ["lsq", "lsq+", "asymmetric", "saq", "pact", "dorefa", "noise_tempering", "diffq", "ewgs"]
EVEN = {"first_last_bits": None}


class Net(nn.Module):
    """Every kind of layer but Embedding, with groups; `checkpointed` runs the middle under activation checkpointing."""

    checkpointed = False

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.mix = nn.Conv1d(6, 3, 3)
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(self.mix(self.up(x).flatten(2)).mean(2))


def batch(seed=3, dtype=torch.float32):
    return torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def calibrated(config=None, model=None, **settings):
    torch.manual_seed(1)
    model = qk.quantize_(model or Net(), config or qk.QConfig(**settings))
    dtype = next(model.parameters()).dtype
    return qk.calibrate(model, [batch(i, dtype) for i in range(2)])


def same_bits(a, b):
    """Equal down to the sign of zero."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
