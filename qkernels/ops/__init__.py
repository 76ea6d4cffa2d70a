"""Every op: legal arguments, schema, fake, gradient and public function, one file per family."""

from .moments import standardized_distance
from .quantizer import bounds, dequantize, fake_quantize, pack, quantize, unpack
