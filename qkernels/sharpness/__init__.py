"""What QGen measures on a trained, quantized network: bounds, sharpness, curvature, landscape, generalization."""

from .curvature import Density, Hessian, hessian, spectral_density
from .figures import (
    cosine_of_gradients,
    gradient_norms,
    hessian_trace_along,
    output_variance,
    training_epochs,
)
from .formulas import bounds
from .gaps import generalization, layer_table
from .linf import LinfSharpness, linf_sharpness
from .measures import Report, measure
from .surface import Landscape, landscape

__all__ = [
    "Density",
    "Hessian",
    "Landscape",
    "LinfSharpness",
    "Report",
    "bounds",
    "cosine_of_gradients",
    "generalization",
    "gradient_norms",
    "hessian",
    "hessian_trace_along",
    "landscape",
    "layer_table",
    "linf_sharpness",
    "measure",
    "output_variance",
    "spectral_density",
    "training_epochs",
]
