"""Every op: legal arguments, schema, fake, gradient and public function, one file per family."""

from ..reference.perturb import ADAPTIVE, ALONG
from .arguments import bounds
from .integer import dequantize, pack, quantize, unpack
from .moments import standardized_distance
from .perturb import check_list, empty_copies, multi_climb, multi_dot, multi_norm, multi_perturb
from .quantizer import fake_quantize
