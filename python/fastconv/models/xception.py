"""Xception (Chollet: Deep learning with depthwise separable convolutions, 2016).

torchvision has none. The names are those of the trained PyTorch weights that are in use: ``conv1`` and ``pointwise`` in a
separable convolution, ``rep``, ``skip`` and ``skipbn`` in a block, ``fc`` for the dense layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastconv.models.blocks import activated
from fastconv.models.layers import Layers

# Widths of the blocks' separable convolutions, and their strides (figure 5 of the paper); block 1 has no leading ReLU.
BLOCKS = (
    ((128, 128), 2),
    ((256, 256), 2),
    ((728, 728), 2),
    *(((728, 728, 728), 1),) * 8,
    ((728, 1024), 2),
)


class SeparableConv2d(nn.Module):
    """A depthwise 3×3 and a 1×1 convolution with nothing between: (N, in_width, H, W) to (N, width, H, W)."""

    def __init__(self, layers: Layers, in_width: int, width: int) -> None:
        super().__init__()
        self.conv1 = layers.Conv2d(in_width, in_width, 3, padding=1, groups=in_width, bias=False)
        self.pointwise = layers.Conv2d(in_width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pointwise(self.conv1(x))
        return y


class Block(nn.Module):
    """ReLU, separable convolution and BatchNorm two or three times, a max pool where it strides, and a shortcut."""

    def __init__(
        self, layers: Layers, in_width: int, widths: tuple[int, ...], stride: int, *, relu_first: bool
    ) -> None:
        super().__init__()
        self.skip: nn.Module | None = None
        self.skipbn: nn.Module | None = None
        if stride != 1 or widths[-1] != in_width:
            self.skip = layers.Conv2d(in_width, widths[-1], 1, stride=stride, bias=False)
            self.skipbn = layers.BatchNorm2d(widths[-1])
        parts: list[nn.Module] = []
        width = in_width
        for out in widths:
            # Not in place: the first one's input is also the shortcut's.
            parts += [nn.ReLU(inplace=bool(parts)), SeparableConv2d(layers, width, out), layers.BatchNorm2d(out)]
            width = out
        if stride != 1:
            parts.append(layers.MaxPool2d(3, stride, padding=1))
        self.rep = nn.Sequential(*parts if relu_first else parts[1:])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rep(x)
        return y + (x if self.skip is None or self.skipbn is None else self.skipbn(self.skip(x)))


class Xception(nn.Module):
    """Two convolutions, twelve residual blocks of separable convolutions, two more of those, one dense layer.

    Takes (N, in_channels, H, W), designed for 299×299 but open to any size from 32 on; returns logits (N, num_classes).

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        residual_gain: start value of the last BatchNorm weight of each block, as in ResNet.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        residual_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = layers.Conv2d(in_channels, 32, 3, stride=2, bias=False)
        self.bn1 = layers.BatchNorm2d(32)
        self.conv2 = layers.Conv2d(32, 64, 3, bias=False)
        self.bn2 = layers.BatchNorm2d(64)
        width, blocks = 64, []
        for index, (widths, stride) in enumerate(BLOCKS, start=1):
            blocks.append(Block(layers, width, widths, stride, relu_first=index > 1))
            self.add_module(f"block{index}", blocks[-1])
            width = widths[-1]
        self.conv3 = SeparableConv2d(layers, width, 1536)
        self.bn3 = layers.BatchNorm2d(1536)
        self.conv4 = SeparableConv2d(layers, 1536, 2048)
        self.bn4 = layers.BatchNorm2d(2048)
        self.avgpool = layers.AdaptiveAvgPool2d((1, 1))
        self.fc = layers.Linear(2048, num_classes)
        self._initialise(residual_gain)

    def _initialise(self, residual_gain: float) -> None:
        """He-normal convolutions by fan-out, as the other families start."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                last = [part for part in module.rep if isinstance(part, nn.BatchNorm2d)][-1]
                nn.init.constant_(last.weight, residual_gain)

    def forward(self, x: Tensor) -> Tensor:
        x = activated(self.bn1, self.relu, self.conv1(x))
        x = activated(self.bn2, self.relu, self.conv2(x))
        for index in range(1, len(BLOCKS) + 1):
            x = self.get_submodule(f"block{index}")(x)
        x = activated(self.bn3, self.relu, self.conv3(x))
        x = activated(self.bn4, self.relu, self.conv4(x))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


VARIANTS: dict[str, Callable[..., nn.Module]] = {"xception": Xception}
