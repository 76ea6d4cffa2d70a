"""The 15 common corruptions of Hendrycks & Dietterich (ICLR 2019), and readers of the published sets."""

from .apply import RANDOM, contact_sheet, corrupt
from .published import CORRUPTIONS, GROUPS, SEVERITIES, parameters
from .readers import ImageNetC, load_cifar_c

__all__ = [
    "CORRUPTIONS",
    "GROUPS",
    "RANDOM",
    "SEVERITIES",
    "ImageNetC",
    "contact_sheet",
    "corrupt",
    "load_cifar_c",
    "parameters",
]
