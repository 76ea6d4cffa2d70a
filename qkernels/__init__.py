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
from typing import TYPE_CHECKING

from . import backend, distill, nn, noise, optim
from .backend import use_backend
from .convert import calibrate, convert_, disabled, param_groups, quantize_, summary
from .ops import dequantize, fake_quantize, pack, quantize, unpack
from .perturbation import perturb, perturbed
from .qconfig import QConfig

backend.load()
backend._force_from_environment()

# Strings alone, for type checkers read no other list.
__all__ = [
    "QConfig", "bn_reestimate", "calibrate", "convert_", "corruptions", "dequantize", "disabled", "distill", "export",
    "fake_quantize", "models", "nn", "noise", "optim", "pack", "param_groups", "perturb", "perturbed", "quantize",
    "quantize_", "report", "sharpness", "summary", "sweep", "training", "unpack", "use_backend",
]  # fmt: skip

if TYPE_CHECKING:
    from . import corruptions, export, models, report, sharpness, sweep, training
    from .training import bn_reestimate
else:  # type checkers would take it that there is any name

    def __getattr__(name):
        """What few programs need is imported when it is first used."""
        if name == "bn_reestimate":
            return importlib.import_module(f"{__name__}.training").bn_reestimate
        if name in __all__:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
