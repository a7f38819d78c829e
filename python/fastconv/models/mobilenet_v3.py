"""MobileNetV3 (Howard et al.: Searching for MobileNetV3, 2019), with torchvision's keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastconv.models.blocks import SqueezeExcitation, conv_norm_act, hardswish, initialise, relu, round_channels
from fastconv.models.layers import Layers


class Row(NamedTuple):
    """A row of the paper's tables 1 and 2: bneck with its kernel, expanded and output width, SE, non-linearity, stride."""

    kernel: int
    expanded: int
    out: int
    gated: bool
    act: Callable[[], nn.Module]
    stride: int


LARGE = (
    Row(3, 16, 16, False, relu, 1),
    Row(3, 64, 24, False, relu, 2),
    Row(3, 72, 24, False, relu, 1),
    Row(5, 72, 40, True, relu, 2),
    Row(5, 120, 40, True, relu, 1),
    Row(5, 120, 40, True, relu, 1),
    Row(3, 240, 80, False, hardswish, 2),
    Row(3, 200, 80, False, hardswish, 1),
    Row(3, 184, 80, False, hardswish, 1),
    Row(3, 184, 80, False, hardswish, 1),
    Row(3, 480, 112, True, hardswish, 1),
    Row(3, 672, 112, True, hardswish, 1),
    Row(5, 672, 160, True, hardswish, 2),
    Row(5, 960, 160, True, hardswish, 1),
    Row(5, 960, 160, True, hardswish, 1),
)
SMALL = (
    Row(3, 16, 16, True, relu, 2),
    Row(3, 72, 24, False, relu, 2),
    Row(3, 88, 24, False, relu, 1),
    Row(5, 96, 40, True, hardswish, 2),
    Row(5, 240, 40, True, hardswish, 1),
    Row(5, 240, 40, True, hardswish, 1),
    Row(5, 120, 48, True, hardswish, 1),
    Row(5, 144, 48, True, hardswish, 1),
    Row(5, 288, 96, True, hardswish, 2),
    Row(5, 576, 96, True, hardswish, 1),
    Row(5, 576, 96, True, hardswish, 1),
)

# TensorFlow's epsilon, and its decay of 0.99 as torch counts it.
_NORM = {"eps": 0.001, "momentum": 0.01}


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise, squeeze-and-excitation, linear 1×1: (N, in_width, H, W) to (N, out, H/stride, W/stride)."""

    def __init__(self, layers: Layers, in_width: int, row: Row) -> None:
        super().__init__()
        width, act = row.expanded, row.act
        parts: list[nn.Module] = []
        if width != in_width:
            parts.append(conv_norm_act(layers, in_width, width, 1, norm=_NORM, act=act))
        depthwise = {"stride": row.stride, "groups": width}
        parts.append(conv_norm_act(layers, width, width, row.kernel, **depthwise, norm=_NORM, act=act))
        if row.gated:
            parts.append(SqueezeExcitation(layers, width, round_channels(width // 4), gate=nn.Hardsigmoid))
        parts.append(conv_norm_act(layers, width, row.out, 1, norm=_NORM))
        self.block = nn.Sequential(*parts)
        self.residual = row.stride == 1 and in_width == row.out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y + x if self.residual else y


class MobileNetV3(nn.Module):
    """A strided 3×3 convolution, the table's blocks, a 1×1 convolution to six times their width, two dense layers.

    Takes (N, in_channels, H, W), designed for 224×224 but open to any size; returns logits (N, num_classes).

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        rows: LARGE or SMALL.
        hidden: width of the first dense layer.
        dropout: probability between the dense layers in training.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        rows: tuple[Row, ...],
        hidden: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        width = 16
        parts: list[nn.Module] = [conv_norm_act(layers, in_channels, width, stride=2, norm=_NORM, act=hardswish)]
        for row in rows:
            parts.append(InvertedResidual(layers, width, row))
            width = row.out
        parts.append(conv_norm_act(layers, width, 6 * width, 1, norm=_NORM, act=hardswish))
        self.features = nn.Sequential(*parts)
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            layers.Linear(6 * width, hidden),
            nn.Hardswish(inplace=True),
            nn.Dropout(dropout, inplace=True),
            layers.Linear(hidden, num_classes),
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v3_small": partial(MobileNetV3, rows=SMALL, hidden=1024),
    "mobilenet_v3_large": partial(MobileNetV3, rows=LARGE, hidden=1280),
}
