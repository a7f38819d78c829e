"""SqueezeNet 1.0 and 1.1 (Iandola et al.: AlexNet-level accuracy with 50x fewer parameters, 2016), torchvision's keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastconv.models.layers import Layers

# Width of each fire module's squeeze layer, its two expand layers being four times as wide; "pool" between them.
V1_0 = (16, 16, 32, "pool", 32, 48, 48, 64, "pool", 64)
V1_1 = (16, 16, "pool", 32, 32, "pool", 48, 48, 64, 64)


class Fire(nn.Module):
    """A 1×1 convolution to ``squeezed`` channels, then 1×1 and 3×3 side by side: (N, in_width, H, W) to (N, 8·squeezed, H, W)."""

    def __init__(self, layers: Layers, in_width: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = layers.Conv2d(in_width, squeezed, 1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = layers.Conv2d(squeezed, 4 * squeezed, 1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = layers.Conv2d(squeezed, 4 * squeezed, 3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        ones = self.expand1x1_activation(self.expand1x1(x))
        return torch.cat((ones, self.expand3x3_activation(self.expand3x3(x))), 1)


class SqueezeNet(nn.Module):
    """A strided convolution and eight fire modules; the last convolution's maps are averaged to the logits.

    Takes (N, in_channels, H, W) with H, W ≥ 31 (1.0) or 17 (1.1), designed for 224×224; returns logits (N, num_classes).

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        stem: width and kernel of the first convolution.
        fires: V1_0 or V1_1.
        dropout: probability before the last convolution in training.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        stem: tuple[int, int],
        fires: tuple[int | str, ...],
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        pool = partial(layers.MaxPool2d, kernel_size=3, stride=2, ceil_mode=True)
        width, kernel = stem
        parts: list[nn.Module] = [layers.Conv2d(in_channels, width, kernel, stride=2), nn.ReLU(inplace=True), pool()]
        for squeezed in fires:
            if isinstance(squeezed, str):
                parts.append(pool())
            else:
                parts.append(Fire(layers, width, squeezed))
                width = 8 * squeezed
        self.features = nn.Sequential(*parts)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            layers.Conv2d(width, num_classes, 1),
            nn.ReLU(inplace=True),
            layers.AdaptiveAvgPool2d((1, 1)),
        )
        self._initialise()

    def _initialise(self) -> None:
        """torchvision's start: He-uniform convolutions, the last one from N(0, 0.01²), biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module is self.classifier[1]:
                    nn.init.normal_(module.weight, std=0.01)
                else:
                    nn.init.kaiming_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "squeezenet1_1": partial(SqueezeNet, stem=(64, 3), fires=V1_1),
    "squeezenet1_0": partial(SqueezeNet, stem=(96, 7), fires=V1_0),
}
