"""Vision transformers: DeiT-Ti (Touvron 2021; timm's attribute names) and a small one for 32x32 images."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Multi-head self-attention softmax(q k^T / sqrt(d)) v; (N, T, dim) -> (N, T, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        n, t, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, dim))


class Mlp(nn.Module):
    """Two linear layers with GELU between, four times as wide inside."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer encoder layer."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map; (N, C, H, W) -> (N, HW / patch^2, dim)."""

    def __init__(self, in_channels, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Class token and learned positions, ``depth`` encoder layers, linear head on the class token.

    x: (N, in_channels, image_size, image_size) -> (N, num_classes). Second derivatives need PyTorch's
    "math" attention: take them under ``torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)``.
    """

    def __init__(
        self,
        num_classes,
        in_channels=3,
        image_size=224,
        *,
        patch=16,
        dim=192,
        depth=12,
        heads=3,
        position_std=0.02,
    ):
        super().__init__()
        if image_size < patch or image_size % patch:
            raise ValueError(f"image_size={image_size}: expected a multiple of the patch size {patch}")
        self.patch_embed = PatchEmbed(in_channels, dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=position_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def _vit_tiny(num_classes, in_channels, image_size):
    # Patches of 2 leave 8x8 images sixteen tokens rather than four.
    patch = 4 if image_size >= 32 else 2
    # Positions as large as the patch embeddings: at 0.02 a short training sees an unordered bag of patches.
    return VisionTransformer(num_classes, in_channels, image_size, patch=patch, depth=6, position_std=0.5)


MODELS = {"vit_tiny": _vit_tiny, "deit_tiny": VisionTransformer}
