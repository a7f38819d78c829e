"""AlexNet, its one-GPU form (Krizhevsky: One weird trick for parallelizing convolutional networks, 2014), torchvision's keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastconv.models.layers import Layers


class AlexNet(nn.Module):
    """Five biased convolutions with ReLU, three of them pooled; three dense layers.

    Takes (N, in_channels, H, W) with H, W ≥ 63, designed for 224×224; an adaptive pool brings any size to 6×6. Returns logits
    (N, num_classes). Weights start as torch's own layers do.

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        hidden: width of the two hidden dense layers. At 4096 they hold 58 of the 61 million parameters.
        dropout: probability before both hidden layers in training.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        hidden: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            layers.Conv2d(in_channels, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            layers.MaxPool2d(kernel_size=3, stride=2),
            layers.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            layers.MaxPool2d(kernel_size=3, stride=2),
            layers.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            layers.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            layers.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            layers.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = layers.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            layers.Linear(256 * 6 * 6, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            layers.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            layers.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


VARIANTS: dict[str, Callable[..., nn.Module]] = {"alexnet": AlexNet}
