"""The Triton backend: a launcher for every op, with its signature. Importing this module compiles nothing."""

from .aot import aot_specs
from .integer import dequantize, pack, quantize, unpack
from .moments import standardized_distance, standardized_distance_backward
from .perturb import multi_climb, multi_dot, multi_norm, multi_perturb
from .quantizer import fake_quantize, fake_quantize_backward
