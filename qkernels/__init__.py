"""Fused kernels for quantization-aware training, with the training layer and the measures around them.

    model = qk.quantize_(model, weight_bits=4, act_bits=4)             # layers of torch.nn become quantized ones
    qk.calibrate(model, loader)                                        # step sizes from data
    optimizer = torch.optim.SGD(qk.param_groups(model, lr=0.01))       # then train as ever
    qk.convert_(model)                                                 # integer weights, the same outputs

`qk.fake_quantize` is the operation itself; `qk.optim` has SAM and SAQ, `qk.distill` feature distillation,
`qk.sharpness` the measures, `qk.training` the loop behind the `qkernels` command.
"""

__version__ = "0.1.0"

import importlib

from . import backend, distill, nn, noise, optim
from .backend import use_backend
from .convert import calibrate, convert_, disabled, param_groups, quantize_, summary
from .ops import dequantize, fake_quantize, pack, quantize, unpack
from .perturbation import perturb, perturbed
from .qconfig import QConfig

backend.load()
backend._force_from_environment()

_LATER = ("bn_reestimate", "corruptions", "export", "models", "report", "sharpness", "sweep", "training")
__all__ = [
    "QConfig", "calibrate", "convert_", "dequantize", "disabled", "distill", "fake_quantize", "nn", "noise", "optim",
    "pack", "param_groups", "perturb", "perturbed", "quantize", "quantize_", "summary", "unpack", "use_backend",
    *_LATER,
]  # fmt: skip


def __getattr__(name):
    """What few programs need is imported when it is first used."""
    if name == "bn_reestimate":
        return importlib.import_module(f"{__name__}.training").bn_reestimate
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
