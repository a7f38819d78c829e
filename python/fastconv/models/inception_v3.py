"""Inception v3 (Szegedy et al.: Rethinking the Inception architecture for computer vision, 2015), torchvision's keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastconv.models.inception_blocks import ConvNorm, from_imagenet_scale
from fastconv.models.layers import Layers

Size = int | tuple[int, int]


class Conv(NamedTuple):
    """A convolution that keeps height and width, by its key."""

    name: str
    width: int
    kernel: Size


# A step is one convolution, or several that all see its input. A chain is a list of steps.
Step = Sequence[Conv]
Chain = Sequence[Step]


def _chain(prefix: str, *convs: tuple[int, Size]) -> list[list[Conv]]:
    """Convolutions one after the other, numbered from 1."""
    return [[Conv(f"{prefix}_{i}", *conv)] for i, conv in enumerate(convs, start=1)]


def _both(prefix: str, width: int) -> list[Conv]:
    """1×3 and 3×1 side by side."""
    return [Conv(f"{prefix}a", width, (1, 3)), Conv(f"{prefix}b", width, (3, 1))]


def _wide(projected: int) -> tuple[list[Chain], int]:
    """Figure 5 of the paper, at 35×35: the chains, and the width of the convolution after the pool."""
    fives = _chain("branch5x5", (48, 1), (64, 5))
    threes = _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))
    return [[[Conv("branch1x1", 64, 1)]], fives, threes], projected


def _factored(width: int) -> tuple[list[Chain], int]:
    """Figure 6, at 17×17: n×n as 1×n and n×1, with n = 7."""
    row, column = (1, 7), (7, 1)
    once = _chain("branch7x7", (width, 1), (width, row), (192, column))
    twice = _chain("branch7x7dbl", (width, 1), (width, column), (width, row), (width, column), (192, row))
    return [[[Conv("branch1x1", 192, 1)]], once, twice], 192


def _expanded() -> tuple[list[Chain], int]:
    """Figure 7, at 8×8: 1×3 and 3×1 side by side."""
    once = [*_chain("branch3x3", (384, 1)), _both("branch3x3_2", 384)]
    twice = [*_chain("branch3x3dbl", (448, 1), (384, 3)), _both("branch3x3dbl_3", 384)]
    return [[[Conv("branch1x1", 320, 1)]], once, twice], 192


# Between them the grid is halved: the last convolution of each chain has stride 2 and no padding.
FIRST_REDUCTION = [[[Conv("branch3x3", 384, 3)]], _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))]
SECOND_REDUCTION = [
    _chain("branch3x3", (192, 1), (320, 3)),
    _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)),
]


class Mixed(nn.Module):
    """Chains of convolutions and a pool side by side, joined along the channels: (N, in_width, H, W) to (N, width, H', W').

    With ``projected``, an average pool and a 1×1 convolution to so many channels, and H' = H; without, everything has stride 2.
    """

    def __init__(self, layers: Layers, in_width: int, chains: Sequence[Chain], projected: int | None = None) -> None:
        super().__init__()
        self.width = projected or in_width
        for chain in chains:
            width = in_width
            for step in chain:
                halves = projected is None and step is chain[-1]
                for name, out, kernel in step:
                    self.add_module(name, self._conv(layers, width, out, kernel, halves))
                width = sum(conv.width for conv in step)
            self.width += width
        self.chains = [[[conv.name for conv in step] for step in chain] for chain in chains]
        if projected is None:
            self.pool: nn.Module = layers.MaxPool2d(kernel_size=3, stride=2)
            self.branch_pool: nn.Module = nn.Identity()
        else:
            self.pool = layers.AvgPool2d(kernel_size=3, stride=1, padding=1)
            self.branch_pool = ConvNorm(layers, in_width, projected, kernel_size=1)

    @staticmethod
    def _conv(layers: Layers, in_width: int, width: int, kernel: Size, halves: bool) -> ConvNorm:
        if halves:
            return ConvNorm(layers, in_width, width, kernel_size=kernel, stride=2)
        r, s = (kernel, kernel) if isinstance(kernel, int) else kernel
        return ConvNorm(layers, in_width, width, kernel_size=kernel, padding=(r // 2, s // 2))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            made = [x]
            for step in chain:
                y = made[0] if len(made) == 1 else torch.cat(made, 1)
                made = [self.get_submodule(name)(y) for name in step]
            outputs += made
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], 1)


class Auxiliary(nn.Module):
    """A classifier on the maps (N, in_width, H, W), H and W ≥ 17, of a middle layer: pool, two convolutions, mean, dense."""

    def __init__(self, layers: Layers, in_width: int, num_classes: int) -> None:
        super().__init__()
        self.pool = layers.AvgPool2d(kernel_size=5, stride=3)
        self.conv0 = ConvNorm(layers, in_width, 128, kernel_size=1)
        self.conv1 = ConvNorm(layers, 128, 768, kernel_size=5)
        self.mean = layers.AdaptiveAvgPool2d((1, 1))
        self.fc = layers.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mean(self.conv1(self.conv0(self.pool(x))))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


class InceptionOutputs(NamedTuple):
    """What training returns with the auxiliary head: twice logits (N, num_classes)."""

    logits: Tensor
    aux_logits: Tensor


class InceptionV3(nn.Module):
    """Five convolutions, eleven mixed modules on three grids, one dense layer.

    Takes (N, in_channels, H, W) with H, W ≥ 75, designed for 299×299, and from that size on with the auxiliary head in training.
    Returns logits (N, num_classes), and InceptionOutputs in training with the head.

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        aux_logits: build the auxiliary head; torchvision's trained model has it.
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
        dropout: float = 0.5,
        norm_shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.transform_input = transform_input
        self.Conv2d_1a_3x3 = ConvNorm(layers, in_channels, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(layers, 32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = ConvNorm(layers, 32, 64, kernel_size=3, padding=1)
        self.maxpool1 = layers.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = ConvNorm(layers, 64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = ConvNorm(layers, 80, 192, kernel_size=3)
        self.maxpool2 = layers.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = Mixed(layers, 192, *_wide(32))
        self.Mixed_5c = Mixed(layers, self.Mixed_5b.width, *_wide(64))
        self.Mixed_5d = Mixed(layers, self.Mixed_5c.width, *_wide(64))
        self.Mixed_6a = Mixed(layers, self.Mixed_5d.width, FIRST_REDUCTION)
        width = self.Mixed_6a.width
        self.Mixed_6b = Mixed(layers, width, *_factored(128))
        self.Mixed_6c = Mixed(layers, width, *_factored(160))
        self.Mixed_6d = Mixed(layers, width, *_factored(160))
        self.Mixed_6e = Mixed(layers, width, *_factored(192))
        self.AuxLogits = Auxiliary(layers, width, num_classes) if aux_logits else None
        self.Mixed_7a = Mixed(layers, width, SECOND_REDUCTION)
        self.Mixed_7b = Mixed(layers, self.Mixed_7a.width, *_expanded())
        self.Mixed_7c = Mixed(layers, self.Mixed_7b.width, *_expanded())
        self.avgpool = layers.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = layers.Linear(self.Mixed_7c.width, num_classes)
        self._initialise(norm_shift)

    def _initialise(self, norm_shift: float) -> None:
        """torchvision's start: N(0, 0.1²) within ±2, the auxiliary dense layer 0.001, biases torch's.

        torchvision also marks the head's second block for a deviation of 0.01, but the mark is on the block, not on its
        convolution, where the loop over layers would see it.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                small = self.AuxLogits is not None and module is self.AuxLogits.fc
                nn.init.trunc_normal_(module.weight, std=0.001 if small else 0.1)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, norm_shift)

    def forward(self, x: Tensor) -> Tensor | InceptionOutputs:
        if self.transform_input:
            x = from_imagenet_scale(x)
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        aux = self.AuxLogits(x) if self.training and self.AuxLogits is not None else None
        x = self.avgpool(self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))))
        logits: Tensor = self.fc(torch.flatten(self.dropout(x), 1))
        return logits if aux is None else InceptionOutputs(logits, aux)


VARIANTS: dict[str, Callable[..., nn.Module]] = {"inception_v3": InceptionV3}
