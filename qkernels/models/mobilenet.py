"""MobileNet V1 (Howard 2017) and V2 (Sandler 2018; torchvision's attribute names).

On small images the first two strides are 1, so that the total stride is 8 and not 32, as in CIFAR ResNets.
"""

from functools import partial

from torch import nn

from qkernels.models.layers import conv_bn, he_init, is_small

# Output channels and stride of each depthwise separable layer; the stem has 32 channels.
V1_LAYERS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# Expansion, output channels, number of layers, and stride of the first, of each group of inverted residuals.
V2_GROUPS = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


class MobileNetV1(nn.Module):
    """Depthwise 3x3 and 1x1 convolutions, each with BatchNorm and ReLU; (N, C, H, W) -> (N, num_classes)."""

    def __init__(self, num_classes, in_channels=3, small=False):
        super().__init__()
        channels, layers = 32, conv_bn(in_channels, 32, 3, 1 if small else 2)
        for out_channels, stride in V1_LAYERS:
            if small and out_channels == 128:
                stride = 1
            layers += conv_bn(channels, channels, 3, stride, groups=channels)
            layers += conv_bn(channels, out_channels, 1)
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        he_init(self)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection; added to the input where the shapes agree."""

    def __init__(self, in_channels, out_channels, stride, expansion):
        super().__init__()
        hidden = in_channels * expansion
        layers = (
            [nn.Sequential(*conv_bn(in_channels, hidden, 1, activation=nn.ReLU6))] if expansion > 1 else []
        )
        layers.append(nn.Sequential(*conv_bn(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6)))
        self.conv = nn.Sequential(*layers, *conv_bn(hidden, out_channels, 1, activation=None))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Inverted residuals of width 1.0; (N, C, H, W) -> (N, num_classes)."""

    def __init__(self, num_classes, in_channels=3, small=False, dropout=0.0):
        super().__init__()
        layers = [nn.Sequential(*conv_bn(in_channels, 32, 3, 1 if small else 2, activation=nn.ReLU6))]
        channels = 32
        for expansion, out_channels, count, first_stride in V2_GROUPS:
            for i in range(count):
                stride = first_stride if i == 0 and not (small and out_channels == 24) else 1
                layers.append(InvertedResidual(channels, out_channels, stride, expansion))
                channels = out_channels
        layers.append(nn.Sequential(*conv_bn(channels, 1280, 1, activation=nn.ReLU6)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))
        he_init(self)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def _build(num_classes, in_channels, image_size, *, network):
    return network(num_classes, in_channels, is_small(image_size))


MODELS = {
    "mobilenet_v1": partial(_build, network=MobileNetV1),
    "mobilenet_v2": partial(_build, network=MobileNetV2),
}
