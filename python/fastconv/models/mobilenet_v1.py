"""MobileNet (Howard et al.: MobileNets, efficient convolutional neural networks for mobile vision applications, 2017).

torchvision has none, so the names are this package's: ``features`` and ``classifier`` as in its MobileNetV2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastconv.models.blocks import conv_norm_act, initialise, relu
from fastconv.models.layers import Layers

# Output width and stride of the thirteen separable convolutions (table 1 of the paper; its last stride is a misprint).
BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


class MobileNetV1(nn.Module):
    """A strided 3×3 convolution and thirteen depthwise separable ones, each followed by BatchNorm and ReLU; one dense layer.

    Takes (N, in_channels, H, W), designed for 224×224 but open to any size; returns logits (N, num_classes).

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        width: the paper's multiplier α of every width.
    """

    def __init__(self, layers: Layers, *, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        channels = int(32 * width)
        parts = [conv_norm_act(layers, in_channels, channels, stride=2, act=relu)]
        for base, stride in BLOCKS:
            out = int(base * width)
            parts.append(
                nn.Sequential(
                    conv_norm_act(layers, channels, channels, stride=stride, groups=channels, act=relu),
                    conv_norm_act(layers, channels, out, 1, act=relu),
                )
            )
            channels = out
        self.features = nn.Sequential(*parts)
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        self.classifier = layers.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


VARIANTS: dict[str, Callable[..., nn.Module]] = {"mobilenet_v1": MobileNetV1}
