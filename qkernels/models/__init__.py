"""Networks by name: plain torch.nn modules, which `quantize_` can swap."""

import importlib
import re

from torch import nn

from qkernels.models import mobilenet, resnet, vgg, vit
from qkernels.models.nin import NiN
from qkernels.models.wide_resnet import wide_resnet

__all__ = ["available_models", "build_model"]

_MODELS = resnet.MODELS | mobilenet.MODELS | vgg.MODELS | vit.MODELS
_NUMBERED = {r"nin_d(\d+)_w(\d+)": NiN, r"wrn_(\d+)_(\d+)": wide_resnet}
_EXAMPLES = ["nin_d2_w1", "nin_d4_w10", "wrn_16_4", "wrn_28_10"]


def available_models() -> list[str]:
    """Sorted names for `build_model`; a few stand for all nin_d<depth>_w<width> and wrn_<depth>_<width>."""
    return sorted([*_MODELS, *_EXAMPLES])


def build_model(name: str, num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Network ``name`` with new random weights, (N, in_channels, image_size, image_size) -> (N, num_classes).

    Images of at most 64 pixels get the CIFAR stem, larger ones the ImageNet stem. Besides `available_models`,
    any ``nin_d<depth>_w<width>``, ``wrn_<depth>_<width>``, ``timm:<name>`` and ``torchvision:<name>`` (those
    two packages are imported only then, and choose their own stem). ValueError: unknown name, a size below 1,
    an image the network cannot take. ImportError: absent package.
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    for argument, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument}={value!r}: expected an integer of at least 1")
    package, _, rest = name.partition(":")
    if package in ("timm", "torchvision") and rest:
        return _build_foreign(package, rest, num_classes, in_channels)
    if name in _MODELS:
        return _MODELS[name](num_classes, in_channels, image_size)
    for pattern, build in _NUMBERED.items():
        if match := re.fullmatch(pattern, name):
            return build(int(match[1]), int(match[2]), num_classes, in_channels)
    raise ValueError(
        f"name={name!r}: unknown model; expected one of {', '.join(available_models())}, "
        "nin_d<depth>_w<width>, wrn_<depth>_<width>, timm:<name> or torchvision:<name>"
    )


def _build_foreign(package, name, num_classes, in_channels):
    try:
        library = importlib.import_module(package if package == "timm" else "torchvision.models")
    except ImportError as error:
        message = f"name='{package}:{name}': needs the package {package} (pip install {package}); {error}"
        raise ImportError(message) from error
    known = library.is_model(name) if package == "timm" else name in library.list_models()
    if not known:
        raise ValueError(f"name='{package}:{name}': {package} has no model {name!r}")
    if package == "timm":
        return library.create_model(name, num_classes=num_classes, in_chans=in_channels)
    if in_channels != 3:
        raise ValueError(f"in_channels={in_channels}: torchvision models take 3")
    return library.get_model(name, weights=None, num_classes=num_classes)
