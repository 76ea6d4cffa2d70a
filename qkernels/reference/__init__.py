"""What every op means, in plain PyTorch: the specification, the fallback on any device, and what tests compare with.

Arithmetic is float32 (float64 for float64 inputs); a result is rounded to its dtype once. A change here is a change
of meaning.
"""

from .moments import standardized_distance, standardized_distance_backward
from .perturb import multi_climb, multi_dot, multi_norm, multi_perturb
from .precision import compute_type
from .quantizer import dequantize, fake_quantize, fake_quantize_backward, pack, quantize, unpack
