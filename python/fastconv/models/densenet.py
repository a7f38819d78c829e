"""DenseNet (Huang, Liu, van der Maaten, Weinberger: Densely connected convolutional networks, 2016), with torchvision's keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastconv.models.blocks import activated
from fastconv.models.layers import Layers

GROWTH = 32
BOTTLENECK = 4  # the 1×1 convolution of a layer makes so many times the growth
STEM = 64


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1×1, BatchNorm, ReLU, 3×3: (N, in_width, H, W) to GROWTH more channels, put behind the input's."""

    def __init__(self, layers: Layers, in_width: int) -> None:
        super().__init__()
        self.norm1 = layers.BatchNorm2d(in_width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = layers.Conv2d(in_width, BOTTLENECK * GROWTH, 1, bias=False)
        self.norm2 = layers.BatchNorm2d(BOTTLENECK * GROWTH)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = layers.Conv2d(BOTTLENECK * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(activated(self.norm1, self.relu1, x))
        y = self.conv2(activated(self.norm2, self.relu2, y))
        return torch.cat((x, y), 1)


def _block(layers: Layers, in_width: int, depth: int) -> nn.Sequential:
    named = [(f"denselayer{i + 1}", DenseLayer(layers, in_width + i * GROWTH)) for i in range(depth)]
    return nn.Sequential(OrderedDict(named))


def _transition(layers: Layers, width: int) -> nn.Sequential:
    """Half the channels, half the height and width."""
    return nn.Sequential(
        OrderedDict(
            norm=layers.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
            conv=layers.Conv2d(width, width // 2, 1, bias=False),
            pool=layers.AvgPool2d(kernel_size=2, stride=2),
        )
    )


class DenseNet(nn.Module):
    """ResNet's stem, four blocks in which each layer sees all before it, transitions between them, one dense layer.

    Takes (N, in_channels, H, W) with H, W ≥ 29, designed for 224×224; returns logits (N, num_classes).

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        depths: number of layers in each of the four blocks.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=layers.Conv2d(in_channels, STEM, kernel_size=7, stride=2, padding=3, bias=False),
            norm0=layers.BatchNorm2d(STEM),
            relu0=nn.ReLU(inplace=True),
            pool0=layers.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        width = STEM
        for index, depth in enumerate(depths, start=1):
            parts[f"denseblock{index}"] = _block(layers, width, depth)
            width += depth * GROWTH
            if index < len(depths):
                parts[f"transition{index}"] = _transition(layers, width)
                width //= 2
        parts["norm5"] = layers.BatchNorm2d(width)
        self.features = nn.Sequential(parts)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = layers.AdaptiveAvgPool2d((1, 1))
        self.classifier = layers.Linear(width, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """torchvision's start: He-normal convolutions by fan-in, torch's own dense weights, a dense bias of 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.relu(self.features(x)))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "densenet121": partial(DenseNet, depths=(6, 12, 24, 16)),
    "densenet169": partial(DenseNet, depths=(6, 12, 32, 32)),
    "densenet201": partial(DenseNet, depths=(6, 12, 48, 32)),
}
