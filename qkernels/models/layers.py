"""What the convolutional networks share: a convolution with its normalisation, and the initialisation."""

from torch import nn


def conv_bn(in_channels, out_channels, kernel_size=3, stride=1, groups=1, bias=False, activation=nn.ReLU):
    """List of convolution ("same" padding), BatchNorm and activation; ``activation=None`` leaves it out."""
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
    return [conv, nn.BatchNorm2d(out_channels), *([activation()] if activation else [])]


def he_init(model):
    """Draw every convolution from N(0, 2 / fan_out) (He 2015), zero its bias; returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def is_small(image_size):
    """Images of at most 64 pixels keep their resolution in the stem; larger ones are reduced at once."""
    return image_size <= 64
