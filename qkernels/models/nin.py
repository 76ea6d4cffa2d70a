"""Network in network as QGen's grid of depths and widths builds it."""

from torch import nn

from qkernels.models.layers import conv_bn, he_init

BASE_WIDTH = 25


class NiN(nn.Sequential):
    """``depth`` blocks of 25 * ``width`` channels, a 1x1 convolution to the classes, pooled over the image.

    A block is a 3x3 convolution of stride 2 and two 1x1 convolutions, each with BatchNorm and ReLU.
    Source: QGen, section 4; x: (N, in_channels, H, W) -> (N, num_classes).
    """

    def __init__(self, depth, width, num_classes, in_channels=3):
        if depth < 1 or width < 1:
            raise ValueError(f"nin_d{depth}_w{width}: depth and width must be at least 1")
        channels, layers = in_channels, []
        for _ in range(depth):
            layers += conv_bn(channels, BASE_WIDTH * width, 3, 2)
            channels = BASE_WIDTH * width
            layers += conv_bn(channels, channels, 1) + conv_bn(channels, channels, 1)
        super().__init__(*layers, *conv_bn(channels, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        he_init(self)
