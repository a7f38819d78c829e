"""EfficientNet (Tan, Le: Rethinking model scaling for convolutional neural networks, 2019), with torchvision's keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastconv.models.blocks import (
    PLAIN,
    Options,
    SqueezeExcitation,
    StochasticDepth,
    conv_norm_act,
    round_channels,
    silu,
)
from fastconv.models.layers import Layers

# Expansion, kernel, stride of the first block, output width, number of blocks: table 1 of the paper, from a stem of 32.
STAGES = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
)  # fmt: skip

# TensorFlow's epsilon, and its decay of 0.99 as torch counts it; torchvision's B5 to B7 come from there.
TENSORFLOW_NORM: Options = {"eps": 0.001, "momentum": 0.01}


class MBConv(nn.Module):
    """1×1 expansion (left out at 1), depthwise, squeeze-and-excitation, linear 1×1, and the input added where it fits."""

    def __init__(
        self,
        layers: Layers,
        in_width: int,
        width: int,
        *,
        expansion: int,
        depthwise: tuple[int, int],
        drop: float,
        norm: Options,
        padding: str | None,
    ) -> None:
        super().__init__()
        hidden, (kernel, stride) = in_width * expansion, depthwise
        expand = [conv_norm_act(layers, in_width, hidden, 1, norm=norm, act=silu)] if expansion != 1 else []
        options = {"stride": stride, "groups": hidden}
        self.block = nn.Sequential(
            *expand,
            conv_norm_act(layers, hidden, hidden, kernel, **options, norm=norm, act=silu, padding=padding),
            SqueezeExcitation(layers, hidden, max(1, in_width // 4), act=silu),
            conv_norm_act(layers, hidden, width, 1, norm=norm),
        )
        self.stochastic_depth = StochasticDepth(drop)
        self.residual = stride == 1 and in_width == width

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return self.stochastic_depth(y) + x if self.residual else y


class EfficientNet(nn.Module):
    """A strided 3×3 convolution, seven stages of MBConv, a 1×1 convolution to four times their width, one dense layer.

    Takes (N, in_channels, H, W) of any size; returns logits (N, num_classes).

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        width, depth: multipliers of every width (rounded to 8) and of every stage's number of blocks (rounded up).
        dropout: probability before the dense layer in training.
        norm: options of every BatchNorm.
        drop_path: stochastic depth grows over the blocks from 0 to this probability.
        tensorflow: for weights trained in TensorFlow: its "SAME" padding, which needs ``fastconv.nn`` for the layers, and its
            BatchNorm's epsilon of 0.001.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        width: float,
        depth: float,
        dropout: float,
        norm: Options = PLAIN,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.2,
        tensorflow: bool = False,
    ) -> None:
        super().__init__()
        norm, padding = (TENSORFLOW_NORM, "SAME") if tensorflow else (norm, None)
        channels = round_channels(32 * width)
        stem = conv_norm_act(layers, in_channels, channels, stride=2, norm=norm, act=silu, padding=padding)
        parts, block = [stem], 0
        blocks = sum(math.ceil(count * depth) for *_, count in STAGES)
        for expansion, kernel, stride, base, count in STAGES:
            out, stage = round_channels(base * width), []
            for index in range(math.ceil(count * depth)):
                stage.append(
                    MBConv(
                        layers,
                        channels,
                        out,
                        expansion=expansion,
                        depthwise=(kernel, 1 if index else stride),
                        drop=drop_path * block / blocks,
                        norm=norm,
                        padding=padding,
                    )
                )
                channels, block = out, block + 1
            parts.append(nn.Sequential(*stage))
        parts.append(conv_norm_act(layers, channels, 4 * channels, 1, norm=norm, act=silu))
        self.features = nn.Sequential(*parts)
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout, inplace=True), layers.Linear(4 * channels, num_classes))
        self._initialise()

    def _initialise(self) -> None:
        """torchvision's start: He-normal convolutions by fan-out, dense weights uniform within 1/√outputs, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                bound = module.out_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


# Width, depth, dropout and image size (height = width, in pixels); torchvision feeds B2 with 288, the paper with 260.
SCALES = {
    "efficientnet_b0": (1.0, 1.0, 0.2, 224),
    "efficientnet_b1": (1.0, 1.1, 0.2, 240),
    "efficientnet_b2": (1.1, 1.2, 0.3, 288),
    "efficientnet_b3": (1.2, 1.4, 0.3, 300),
    "efficientnet_b4": (1.4, 1.8, 0.4, 380),
    "efficientnet_b5": (1.6, 2.2, 0.4, 456),
    "efficientnet_b6": (1.8, 2.6, 0.5, 528),
    "efficientnet_b7": (2.0, 3.1, 0.5, 600),
}


def _variant(name: str) -> Callable[..., nn.Module]:
    width, depth, dropout, _ = SCALES[name]
    norm = TENSORFLOW_NORM if name[-1] in "567" else PLAIN
    return partial(EfficientNet, width=width, depth=depth, dropout=dropout, norm=norm)


VARIANTS: dict[str, Callable[..., nn.Module]] = {name: _variant(name) for name in SCALES}
