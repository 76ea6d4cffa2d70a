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
