"""Every op: legal arguments, schema, fake, gradient and public function, one file per family."""

from .quantize import dequantize, fake_quantize, pack, quantize, unpack
