"""Fused kernels for quantization-aware training, with the training layer and the measures around them."""

__version__ = "0.1.0"

from . import backend, noise
from .backend import use_backend
from .ops import dequantize, fake_quantize, pack, quantize, unpack

backend.load()
backend._force_from_environment()
