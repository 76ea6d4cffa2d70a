"""ResNet (He 2016a) and its pre-activation variant (He 2016b), with the CIFAR and the ImageNet stem.

Attribute names are torchvision's, so its published float checkpoints load.
"""

from functools import partial

import torch.nn.functional as F
from torch import nn

from qkernels.models.layers import he_init, is_small


class PadShortcut(nn.Module):
    """Option A of He 2016a: every ``stride``-th pixel, new channels zero; no parameters."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.stride = stride
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the width (``bottleneck``).

    y = relu(x + f(x)) with BatchNorm after each convolution, or y = x + f(x) with BatchNorm and ReLU before
    each (``pre_activation``). Where the shape changes, the shortcut is a 1x1 convolution, or `PadShortcut`
    without ``projection``.
    """

    def __init__(self, in_channels, width, stride, bottleneck, pre_activation, projection):
        super().__init__()
        out_channels = width * (4 if bottleneck else 1)
        if bottleneck:
            plan = [(in_channels, width, 1, 1), (width, width, 3, stride), (width, out_channels, 1, 1)]
        else:
            plan = [(in_channels, width, 3, stride), (width, width, 3, 1)]
        self.convs, self.pre_activation, self.out_channels = len(plan), pre_activation, out_channels
        for i, (before, after, kernel_size, step) in enumerate(plan, 1):
            conv = nn.Conv2d(before, after, kernel_size, step, kernel_size // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(before if pre_activation else after))
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            if not projection:
                self.downsample = PadShortcut(in_channels, out_channels, stride)
            else:
                conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
                norm = [] if pre_activation else [nn.BatchNorm2d(out_channels)]
                self.downsample = nn.Sequential(conv, *norm)

    def forward(self, x):
        return self._forward_pre(x) if self.pre_activation else self._forward_post(x)

    def _forward_post(self, x):
        y = x
        for i in range(1, self.convs + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.convs:
                y = F.relu(y)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))

    def _forward_pre(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        for i in range(2, self.convs + 1):
            y = getattr(self, f"conv{i}")(F.relu(getattr(self, f"bn{i}")(y)))
        return y + shortcut


class ResNet(nn.Module):
    """Stages of `Block`, halving the resolution in between, then global average pooling and a linear layer.

    ``depths`` and ``widths`` have one entry per stage; ``stem`` is "cifar" (3x3, stride 1) or "imagenet"
    (7x7, stride 2, then max pooling); x: (N, in_channels, H, W) -> (N, num_classes).
    """

    def __init__(
        self,
        depths,
        widths,
        num_classes,
        in_channels=3,
        *,
        stem="cifar",
        stem_width=64,
        bottleneck=False,
        pre_activation=False,
        projection=True,
    ):
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f'stem={stem!r}: expected "cifar" or "imagenet"')
        self.pre_activation = pre_activation
        kernel_size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, stem_width, kernel_size, stride, kernel_size // 2, bias=False)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        self.stages = len(depths)
        channels = stem_width
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 1 and j == 0 else 1
                blocks.append(Block(channels, width, stride, bottleneck, pre_activation, projection))
                channels = blocks[-1].out_channels
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.bn1 = nn.BatchNorm2d(channels if pre_activation else stem_width)
        self.fc = nn.Linear(channels, num_classes)
        he_init(self)

    def forward(self, x):
        x = self.conv1(x)
        if not self.pre_activation:
            x = F.relu(self.bn1(x))
        x = self.maxpool(x)
        for i in range(1, self.stages + 1):
            x = getattr(self, f"layer{i}")(x)
        if self.pre_activation:
            x = F.relu(self.bn1(x))
        return self.fc(x.mean((2, 3)))


def _three_stages(num_classes, in_channels, image_size, *, depth, pre_activation=False):
    options = {"stem_width": 16, "pre_activation": pre_activation, "projection": False}
    return ResNet([(depth - 2) // 6] * 3, [16, 32, 64], num_classes, in_channels, **options)


def _four_stages(num_classes, in_channels, image_size, *, depths, width=64, **options):
    stem = "cifar" if is_small(image_size) else "imagenet"
    widths = [width, 2 * width, 4 * width, 8 * width]
    return ResNet(depths, widths, num_classes, in_channels, stem=stem, stem_width=width, **options)


_FOUR_STAGES = {
    "resnet18": partial(_four_stages, depths=(2, 2, 2, 2)),
    "resnet34": partial(_four_stages, depths=(3, 4, 6, 3)),
    "resnet50": partial(_four_stages, depths=(3, 4, 6, 3), bottleneck=True),
}
MODELS = {f"resnet{depth}": partial(_three_stages, depth=depth) for depth in (20, 32, 44, 56)}
MODELS |= _FOUR_STAGES
# QGen's, on CIFAR
MODELS |= {f"{name}_w16": partial(build, width=16) for name, build in _FOUR_STAGES.items()}
MODELS |= {f"preact_{name}": partial(build, pre_activation=True) for name, build in MODELS.items()}
