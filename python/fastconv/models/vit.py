"""Vision Transformers (Dosovitskiy et al.: An image is worth 16x16 words, 2020; Touvron et al. 2021: tiny and small).

Attribute names follow torchvision, so that its checkpoints load; it has no tiny and no small one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastconv.models.attention import add_norm
from fastconv.models.layers import Layers

_EPS = 1e-6


class EncoderBlock(nn.Module):
    """Attention and a two-layer network, each behind a norm and added to its input: (N, L, width) to the same."""

    def __init__(self, layers: Layers, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = layers.LayerNorm(width, eps=_EPS)
        self.self_attention = layers.MultiheadAttention(width, num_heads, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = layers.LayerNorm(width, eps=_EPS)
        self.mlp = nn.Sequential(
            layers.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            layers.Linear(hidden, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        y, x = add_norm(self.ln_2, x, self.dropout(y))
        return x + self.mlp(y)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Learned positions, a stack of blocks and a last norm."""

    def __init__(
        self, layers: Layers, length: int, depth: int, width: int, num_heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, length, width).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        blocks = (EncoderBlock(layers, width, num_heads, hidden, dropout) for _ in range(depth))
        self.layers = nn.Sequential(OrderedDict((f"encoder_layer_{i}", block) for i, block in enumerate(blocks)))
        self.ln = layers.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ln(self.layers(self.dropout(x + self.pos_embedding)))
        return y


class VisionTransformer(nn.Module):
    """Patches as tokens, a class token before them, whose last state is classified.

    Takes (N, in_channels, image_size, image_size) in multiples of the patch, returns logits (N, num_classes).

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        patch: pixels along a side of a patch. depth, width, num_heads, hidden: of the encoder.
        image_size: pixels along a side of the images, which fixes the number of positions.
        head_std: standard deviation of the last layer's start; at torchvision's 0, all logits of a fresh network are 0.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        patch: int = 16,
        depth: int,
        width: int,
        num_heads: int,
        hidden: int,
        image_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        head_std: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"image_size must be a multiple of the patch: got {image_size} and {patch}")
        self.image_size = image_size
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv_proj = layers.Conv2d(in_channels, width, kernel_size=patch, stride=patch)
        self.encoder = Encoder(layers, (image_size // patch) ** 2 + 1, depth, width, num_heads, hidden, dropout)
        head = layers.Linear(width, num_classes)
        self.heads = nn.Sequential(OrderedDict(head=head))
        self._initialise()
        nn.init.normal_(head.weight, std=head_std)
        nn.init.zeros_(head.bias)

    def _initialise(self) -> None:
        """torchvision's start: patches truncated normal by fan-in, dense layers Xavier's with small biases."""
        fan_in = self.conv_proj.in_channels * self.conv_proj.kernel_size[0] ** 2
        nn.init.trunc_normal_(self.conv_proj.weight, std=fan_in**-0.5)
        assert self.conv_proj.bias is not None
        nn.init.zeros_(self.conv_proj.bias)
        for block in self.encoder.layers:
            for module in block.mlp:  # type: ignore[union-attr]
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.normal_(module.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != (self.image_size,) * 2:
            raise ValueError(f"images of {self.image_size}x{self.image_size} pixels expected, got {tuple(x.shape)}")
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), 1)
        logits: Tensor = self.heads(self.encoder(x)[:, 0])
        return logits


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "vit_tiny": partial(VisionTransformer, depth=12, width=192, num_heads=3, hidden=768),
    "vit_small": partial(VisionTransformer, depth=12, width=384, num_heads=6, hidden=1536),
    "vit_b_16": partial(VisionTransformer, depth=12, width=768, num_heads=12, hidden=3072),
    "vit_l_16": partial(VisionTransformer, depth=24, width=1024, num_heads=16, hidden=4096),
}
