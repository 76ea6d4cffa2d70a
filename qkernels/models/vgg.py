"""VGG-19 with BatchNorm (Simonyan 2015; torchvision's attribute names)."""

from torch import nn

from qkernels.models.layers import conv_bn, he_init, is_small

# Channels and number of 3x3 convolutions of each stage; a stage ends in 2x2 max pooling.
STAGES = [(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)]


class VGG19(nn.Module):
    """Sixteen 3x3 convolutions, then one linear layer on small images, three with dropout on large ones.

    x: (N, in_channels, H, W) with H = W = ``image_size`` >= 32 -> (N, num_classes).
    """

    def __init__(self, num_classes, in_channels=3, image_size=32):
        super().__init__()
        if image_size < 32:
            raise ValueError(
                f"image_size={image_size}: vgg19 halves the image five times and needs at least 32"
            )
        channels, layers = in_channels, []
        for out_channels, count in STAGES:
            for _ in range(count):
                # BatchNorm cancels the bias, but the published checkpoints have it.
                layers += conv_bn(channels, out_channels, bias=True)
                channels = out_channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        if is_small(image_size):
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Linear(512, num_classes)
        else:
            self.avgpool = nn.AdaptiveAvgPool2d(7)
            hidden = []
            for inputs in (512 * 49, 4096):
                hidden += [nn.Linear(inputs, 4096), nn.ReLU(), nn.Dropout()]
            self.classifier = nn.Sequential(*hidden, nn.Linear(4096, num_classes))
        he_init(self)

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


MODELS = {"vgg19": VGG19}
