"""Fused kernels for quantization-aware training, with the training layer and the measures around them."""

__version__ = "0.1.0"

from . import backend, distill, nn, noise, optim, sharpness
from .backend import use_backend
from .convert import QConfig, calibrate, convert_, param_groups, quantize_, summary
from .ops import dequantize, fake_quantize, pack, quantize, unpack
from .perturbation import perturb, perturbed

backend.load()
backend._force_from_environment()
