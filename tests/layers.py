"""A network of every kind of layer, quantized and calibrated; single quantizers, and the formulas they follow."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels.observe import Statistics

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
    """Equal down to the sign of zero: two tensors, or lists of them."""
    pairs = [(a, b)] if isinstance(a, torch.Tensor) else zip(a, b, strict=True)
    return all(
        (s.dtype, s.shape) == (t.dtype, t.shape)
        and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (s, t)))
        for s, t in pairs
    )


def conv(method, bits=4, axis=0, act_bits=None, **settings):
    """A quantized convolution in float64, its step sizes too, where not calibrated from float32."""
    layer = nn.Conv2d(3, 5, 3).double()
    with torch.no_grad():
        layer.weight.mul_(2).add_(0.05)
    settings = {
        "weight_bits": bits, "act_bits": act_bits, "weight_axis": axis, "first_last_bits": None, **settings
    }  # fmt: skip
    return qk.quantize_(layer, qk.QConfig(method=method, **settings))


def activation(method, bits, x, signed=None, **settings):
    """An activation quantizer calibrated on x."""
    quantizer = qk.QConfig(method=method, act_bits=bits, act_signed=signed, **settings).activation_quantizer()
    statistics = Statistics()
    statistics.update(x)
    quantizer.start_from(statistics)
    return quantizer


def rows_of(weight, axis):
    return weight.flatten(1) if axis == 0 else weight.reshape(1, -1)


def per_channel(values, axis):
    return values.double().view(-1, 1, 1, 1) if axis == 0 else values.double()


def straight_round(v):
    return v + (v.round() - v).detach()
