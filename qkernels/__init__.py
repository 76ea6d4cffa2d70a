"""Fused kernels for quantization-aware training, with the training layer and the measures around them."""

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

_LATER = ("corruptions", "export", "models", "report", "sharpness", "sweep", "training")


def __getattr__(name):
    """What few programs need is imported when it is first used."""
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "bn_reestimate":
        return importlib.import_module(f"{__name__}.training").bn_reestimate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
