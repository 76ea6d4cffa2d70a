"""Wide residual networks (Zagoruyko 2016) without dropout: pre-activation blocks, k times as wide."""

from qkernels.models.resnet import ResNet


def wide_resnet(depth, width, num_classes, in_channels=3):
    """WRN-depth-width: three stages of (depth - 4) / 6 blocks of 16, 32, 64 times ``width`` channels."""
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ValueError(f"wrn_{depth}_{width}: the depth must be 6n + 4 with n >= 1, the width at least 1")
    widths = [16 * width, 32 * width, 64 * width]
    blocks = [(depth - 4) // 6] * 3
    return ResNet(blocks, widths, num_classes, in_channels, stem_width=16, pre_activation=True)
