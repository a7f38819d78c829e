"""GoogLeNet (Szegedy et al.: Going deeper with convolutions, 2014) with BatchNorm, torchvision's keys and auxiliary heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastconv.models.inception_blocks import ConvNorm, from_imagenet_scale
from fastconv.models.layers import Layers


class GoogLeNetOutputs(NamedTuple):
    """What training returns with auxiliary heads: three times logits (N, num_classes)."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class Inception(nn.Module):
    """1×1; 1×1 and 3×3; 1×1 and 3×3 (5×5 in the paper, 3×3 in torchvision's weights); max pool and 1×1, side by side.

    ``widths`` are the paper's table 1: #1×1, #3×3 reduce, #3×3, #5×5 reduce, #5×5, pool proj.
    """

    def __init__(self, layers: Layers, in_width: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        ones, reduce3, out3, reduce5, out5, projected = widths
        self.branch1 = ConvNorm(layers, in_width, ones, kernel_size=1)
        self.branch2 = self._chain(layers, in_width, reduce3, out3)
        self.branch3 = self._chain(layers, in_width, reduce5, out5)
        self.branch4 = nn.Sequential(
            layers.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            ConvNorm(layers, in_width, projected, kernel_size=1),
        )

    @staticmethod
    def _chain(layers: Layers, in_width: int, reduced: int, out: int) -> nn.Sequential:
        first = ConvNorm(layers, in_width, reduced, kernel_size=1)
        return nn.Sequential(first, ConvNorm(layers, reduced, out, kernel_size=3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), 1)


class Auxiliary(nn.Module):
    """A classifier on the maps (N, in_width, H, W) of a middle layer: pool to 4×4, 1×1 convolution, two dense layers."""

    def __init__(self, layers: Layers, in_width: int, num_classes: int) -> None:
        super().__init__()
        self.pool = layers.AdaptiveAvgPool2d((4, 4))
        self.conv = ConvNorm(layers, in_width, 128, kernel_size=1)
        self.fc1 = layers.Linear(128 * 4 * 4, 1024)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.7)
        self.fc2 = layers.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.conv(self.pool(x)), 1)
        logits: Tensor = self.fc2(self.dropout(self.relu(self.fc1(x))))
        return logits


class GoogLeNet(nn.Module):
    """Three convolutions and nine inception modules, pools between them, one dense layer.

    Takes (N, in_channels, H, W) with H, W ≥ 15, designed for 224×224. Returns logits (N, num_classes), and GoogLeNetOutputs in
    training with auxiliary heads.

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        aux_logits: build the two auxiliary heads. torchvision's trained model has none.
        transform_input: the images come as torchvision's transforms leave them, the weights from TensorFlow.
        dropout: probability before the dense layer in training.
        norm_shift: start value of every BatchNorm bias. torchvision's is 0. The larger, the fewer ReLUs cut anything off, and the
            less a fresh network multiplies rounding errors.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        aux_logits: bool = True,
        transform_input: bool = False,
        dropout: float = 0.2,
        norm_shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.transform_input = transform_input
        self.conv1 = ConvNorm(layers, in_channels, 64, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = layers.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = ConvNorm(layers, 64, 64, kernel_size=1)
        self.conv3 = ConvNorm(layers, 64, 192, kernel_size=3, padding=1)
        self.maxpool2 = layers.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = Inception(layers, 192, (64, 96, 128, 16, 32, 32))
        self.inception3b = Inception(layers, 256, (128, 128, 192, 32, 96, 64))
        self.maxpool3 = layers.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = Inception(layers, 480, (192, 96, 208, 16, 48, 64))
        self.inception4b = Inception(layers, 512, (160, 112, 224, 24, 64, 64))
        self.inception4c = Inception(layers, 512, (128, 128, 256, 24, 64, 64))
        self.inception4d = Inception(layers, 512, (112, 144, 288, 32, 64, 64))
        self.inception4e = Inception(layers, 528, (256, 160, 320, 32, 128, 128))
        self.maxpool4 = layers.MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception5a = Inception(layers, 832, (256, 160, 320, 32, 128, 128))
        self.inception5b = Inception(layers, 832, (384, 192, 384, 48, 128, 128))
        self.aux1 = Auxiliary(layers, 512, num_classes) if aux_logits else None
        self.aux2 = Auxiliary(layers, 528, num_classes) if aux_logits else None
        self.avgpool = layers.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = layers.Linear(1024, num_classes)
        self._initialise(norm_shift)

    def _initialise(self, norm_shift: float) -> None:
        """torchvision's start: weights from N(0, 0.01²), biases torch's."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.01)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, norm_shift)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        if self.transform_input:
            x = from_imagenet_scale(x)
        x = self.maxpool2(self.conv3(self.conv2(self.maxpool1(self.conv1(x)))))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4a(x)
        first = self.aux1(x) if self.training and self.aux1 is not None else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        second = self.aux2(x) if self.training and self.aux2 is not None else None
        x = self.maxpool4(self.inception4e(x))
        x = self.avgpool(self.inception5b(self.inception5a(x)))
        logits: Tensor = self.fc(self.dropout(torch.flatten(x, 1)))
        return logits if first is None or second is None else GoogLeNetOutputs(logits, second, first)


VARIANTS: dict[str, Callable[..., nn.Module]] = {"googlenet": GoogLeNet}
