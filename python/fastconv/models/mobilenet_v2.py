"""MobileNetV2 (Sandler, Howard, Zhu, Zhmoginov, Chen: Inverted residuals and linear bottlenecks, 2018), torchvision's keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastconv.models.blocks import conv_norm_act, initialise, relu6, round_channels
from fastconv.models.layers import Layers

# Expansion, output width, number of blocks, stride of the first (table 2 of the paper).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """1×1 expansion (left out at 1), 3×3 depthwise, linear 1×1: (N, in_width, H, W) to (N, width, H/stride, W/stride)."""

    def __init__(self, layers: Layers, in_width: int, width: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_width * expansion
        expand = [conv_norm_act(layers, in_width, hidden, 1, act=relu6)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            conv_norm_act(layers, hidden, hidden, stride=stride, groups=hidden, act=relu6),
            layers.Conv2d(hidden, width, 1, bias=False),
            layers.BatchNorm2d(width),
        )
        self.residual = stride == 1 and in_width == width

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """A strided 3×3 convolution, seventeen inverted residuals, a 1×1 convolution to 1280 channels, one dense layer.

    Takes (N, in_channels, H, W), designed for 224×224 but open to any size; returns logits (N, num_classes).

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        width: multiplier of every width but the last, which only grows.
        dropout: probability before the dense layer in training.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        channels, last = round_channels(32 * width), round_channels(1280 * max(1.0, width))
        parts: list[nn.Module] = [conv_norm_act(layers, in_channels, channels, stride=2, act=relu6)]
        for expansion, base, depth, first_stride in STAGES:
            out = round_channels(base * width)
            for index in range(depth):
                stride = first_stride if index == 0 else 1
                parts.append(InvertedResidual(layers, channels, out, stride=stride, expansion=expansion))
                channels = out
        parts.append(conv_norm_act(layers, channels, last, 1, act=relu6))
        self.features = nn.Sequential(*parts)
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), layers.Linear(last, num_classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


VARIANTS: dict[str, Callable[..., nn.Module]] = {"mobilenet_v2": MobileNetV2}
