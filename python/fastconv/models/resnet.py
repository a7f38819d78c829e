"""Residual networks (He, Zhang, Ren, Sun: Deep residual learning for image recognition, 2015), and ResNeXt (Xie, Girshick,
Dollár, Tu, He: Aggregated residual transformations for deep neural networks, 2016), which gives the 3×3 convolutions groups.

Attribute names and the placement of strides follow torchvision, so that its checkpoints load: in a bottleneck the
3×3 convolution carries the stride, not the first 1×1 ("v1.5").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from fastconv.models.blocks import activated
from fastconv.models.layers import Layers


def _shortcut(layers: Layers, in_width: int, out_width: int, stride: int) -> nn.Sequential | None:
    """Projection that brings a block's input to its output's shape, or None where the shapes already agree."""
    if stride == 1 and in_width == out_width:
        return None
    return nn.Sequential(
        layers.Conv2d(in_width, out_width, kernel_size=1, stride=stride, bias=False), layers.BatchNorm2d(out_width)
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions: (N, in_width, H, W) to (N, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, layers: Layers, in_width: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = layers.Conv2d(in_width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = layers.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = layers.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = layers.BatchNorm2d(width)
        self.downsample = _shortcut(layers, in_width, width * self.expansion, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(activated(self.bn1, self.relu, self.conv1(x)))
        return activated(self.bn2, self.relu, y, x if self.downsample is None else self.downsample(x))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions: (N, in_width, H, W) to (N, 4·width, H/stride, W/stride).

    The 3×3 has ``groups`` of ``group_width`` channels (times width/64), which are ``dilation`` pixels apart.
    """

    expansion = 4

    def __init__(
        self,
        layers: Layers,
        in_width: int,
        width: int,
        *,
        stride: int = 1,
        groups: int = 1,
        group_width: int = 64,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        out_width = width * self.expansion
        # ResNeXt's table 1: at a stage of 64, each group has group_width channels.
        inner = width * group_width // 64 * groups
        spread = {"padding": dilation, "dilation": dilation, "groups": groups}
        self.conv1 = layers.Conv2d(in_width, inner, kernel_size=1, bias=False)
        self.bn1 = layers.BatchNorm2d(inner)
        self.conv2 = layers.Conv2d(inner, inner, kernel_size=3, stride=stride, **spread, bias=False)
        self.bn2 = layers.BatchNorm2d(inner)
        self.conv3 = layers.Conv2d(inner, out_width, kernel_size=1, bias=False)
        self.bn3 = layers.BatchNorm2d(out_width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(layers, in_width, out_width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = activated(self.bn1, self.relu, self.conv1(x))
        y = self.conv3(activated(self.bn2, self.relu, self.conv2(y)))
        return activated(self.bn3, self.relu, y, x if self.downsample is None else self.downsample(x))


def initialise(model: nn.Module, residual_gain: float) -> None:
    """torchvision's start: He-normal convolutions by fan-out; BatchNorm and Linear keep torch's own defaults."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (BasicBlock, Bottleneck)):
            nn.init.constant_(module.last_norm.weight, residual_gain)


class ResNet(nn.Module):
    """Stem, four stages of residual blocks at widths 64, 128, 256, 512, average pool, one dense layer.

    Takes (N, in_channels, H, W), designed for 224×224 but open to any size; returns logits (N, num_classes).

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        block: BasicBlock or Bottleneck.
        depths: number of blocks in each of the four stages.
        options: keywords of every block: a ResNeXt's ``groups`` and ``group_width``.
        residual_gain: start value of the last BatchNorm weight of each block. torchvision's is 1, its
            ``zero_init_residual`` is 0. The smaller, the closer a fresh network is to the identity, and the less it
            multiplies rounding errors.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        options: Mapping[str, int] | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        residual_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv1 = layers.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = layers.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = layers.MaxPool2d(kernel_size=3, stride=2, padding=1)

        make: Callable[..., nn.Module] = partial(block, layers, **(options or {}))
        expansion = block.expansion

        def stage(in_width: int, width: int, depth: int, stride: int) -> nn.Sequential:
            first = make(in_width, width, stride=stride)
            return nn.Sequential(first, *(make(width * expansion, width) for _ in range(depth - 1)))

        self.layer1 = stage(64, 64, depths[0], stride=1)
        self.layer2 = stage(64 * expansion, 128, depths[1], stride=2)
        self.layer3 = stage(128 * expansion, 256, depths[2], stride=2)
        self.layer4 = stage(256 * expansion, 512, depths[3], stride=2)
        self.avgpool = layers.AdaptiveAvgPool2d((1, 1))
        self.fc = layers.Linear(512 * expansion, num_classes)
        initialise(self, residual_gain)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(activated(self.bn1, self.relu, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, block=BasicBlock, depths=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, block=BasicBlock, depths=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, block=Bottleneck, depths=(3, 4, 6, 3)),
    "resnet101": partial(ResNet, block=Bottleneck, depths=(3, 4, 23, 3)),
    "resnet152": partial(ResNet, block=Bottleneck, depths=(3, 8, 36, 3)),
    "resnext50_32x4d": partial(ResNet, block=Bottleneck, depths=(3, 4, 6, 3), options={"groups": 32, "group_width": 4}),
}
