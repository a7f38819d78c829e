"""VGG (Simonyan, Zisserman: Very deep convolutional networks for large-scale image recognition, 2014).

Attribute names follow torchvision, so that its checkpoints load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fastconv.models.layers import Layers

STAGE_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of biased 3×3 convolutions with ReLU, each closed by a 2×2 max pool; three dense layers.

    Takes (N, in_channels, H, W) with H, W ≥ 32, designed for 224×224; an adaptive pool brings any size to 7×7.
    Returns logits (N, num_classes).

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        depths: number of convolutions in each of the five stages.
        hidden: width of the two hidden dense layers. At 4096 they hold 119 of VGG-16's 138 million parameters.
        dropout: probability used after both hidden layers in training.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        depths: tuple[int, int, int, int, int],
        num_classes: int = 1000,
        in_channels: int = 3,
        hidden: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()

        def features() -> Iterator[nn.Module]:
            width = in_channels
            for depth, stage_width in zip(depths, STAGE_WIDTHS, strict=True):
                for _ in range(depth):
                    yield layers.Conv2d(width, stage_width, kernel_size=3, padding=1)
                    yield nn.ReLU(inplace=True)
                    width = stage_width
                yield layers.MaxPool2d(kernel_size=2, stride=2)

        self.features = nn.Sequential(*features())
        self.avgpool = layers.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            layers.Linear(STAGE_WIDTHS[-1] * 7 * 7, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            layers.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            layers.Linear(hidden, num_classes),
        )
        self._initialise()

    def _initialise(self) -> None:
        """torchvision's start: He-normal convolutions by fan-out, dense weights from N(0, 0.01²), all biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "vgg16": partial(VGG, depths=(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, depths=(2, 2, 4, 4, 4)),
}
