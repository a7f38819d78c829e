"""Fully convolutional networks (Long, Shelhamer, Darrell: Fully convolutional networks for semantic segmentation, 2014).

The backbone is ResNet-50. By default the network is torchvision's ``fcn_resnet50``, with its keys: two dilated stages and a
bilinear resize. ``transposed=True`` gives the paper's own head instead (FCN-8s).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastconv.models.blocks import activated
from fastconv.models.layers import Layers
from fastconv.models.resnet import Bottleneck, initialise

DEPTHS = (3, 4, 6, 3)


class Backbone(nn.Module):
    """ResNet-50 without its classifier; returns the maps of its last three stages: 512, 1024 and 2048 channels.

    They are at 1/8, 1/16 and 1/32 of the input's size; with ``dilated`` all at 1/8, the strides of the last two stages having
    become dilations of 2 and 4 of what follows them.
    """

    def __init__(self, layers: Layers, *, in_channels: int, dilated: bool, residual_gain: float) -> None:
        super().__init__()
        self.conv1 = layers.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = layers.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = layers.MaxPool2d(kernel_size=3, stride=2, padding=1)

        def stage(in_width: int, width: int, depth: int, stride: int, dilation: int) -> nn.Sequential:
            """The first block has the dilation of the stage before, which is half."""
            if dilation > 1:
                stride = 1
            make = partial(Bottleneck, layers)
            first = make(in_width, width, stride=stride, dilation=max(1, dilation // 2))
            return nn.Sequential(first, *(make(4 * width, width, dilation=dilation) for _ in range(depth - 1)))

        self.layer1 = stage(64, 64, DEPTHS[0], 1, 1)
        self.layer2 = stage(256, 128, DEPTHS[1], 2, 1)
        self.layer3 = stage(512, 256, DEPTHS[2], 2, 2 if dilated else 1)
        self.layer4 = stage(1024, 512, DEPTHS[3], 2, 4 if dilated else 1)
        initialise(self, residual_gain)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.layer1(self.maxpool(activated(self.bn1, self.relu, self.conv1(x))))
        eighth = self.layer2(x)
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


def _head(layers: Layers, in_width: int, num_classes: int) -> nn.Sequential:
    """torchvision's FCNHead: a 3×3 convolution to a quarter of the channels, and one to the classes."""
    return nn.Sequential(
        layers.Conv2d(in_width, in_width // 4, 3, padding=1, bias=False),
        layers.BatchNorm2d(in_width // 4),
        nn.ReLU(),
        nn.Dropout(0.1),
        layers.Conv2d(in_width // 4, num_classes, 1),
    )


class TransposedHead(nn.Module):
    """The paper's FCN-8s: scores at 1/32 doubled and added to those at 1/16, doubled and added to those at 1/8, times 8.

    Each step up is a transposed convolution that starts as bilinear interpolation and is trained on; the scores of the two finer
    stages start at zero, as the paper's.
    """

    def __init__(self, layers: Layers, num_classes: int) -> None:
        super().__init__()
        self.score32 = layers.Conv2d(2048, num_classes, 1)
        self.score16 = layers.Conv2d(1024, num_classes, 1)
        self.score8 = layers.Conv2d(512, num_classes, 1)
        for score in (self.score16, self.score8):
            nn.init.zeros_(score.weight)
        self.up32 = self._up(layers, num_classes, 2)
        self.up16 = self._up(layers, num_classes, 2)
        self.up8 = self._up(layers, num_classes, 8)

    @staticmethod
    def _up(layers: Layers, width: int, factor: int) -> nn.ConvTranspose2d:
        up = layers.ConvTranspose2d(width, width, 2 * factor, stride=factor, padding=factor // 2, bias=False)
        tent = 1 - (torch.arange(2 * factor) + 0.5 - factor).abs() / factor
        with torch.no_grad():
            up.weight.copy_(torch.eye(width)[:, :, None, None] * torch.outer(tent, tent))
        return up

    def forward(self, eighth: Tensor, sixteenth: Tensor, last: Tensor) -> Tensor:
        """Logits at 8 times the size of ``eighth``."""
        y = _cropped(self.up32(self.score32(last)), sixteenth) + self.score16(sixteenth)
        y = _cropped(self.up16(y), eighth) + self.score8(eighth)
        logits: Tensor = self.up8(y)
        return logits


def _cropped(x: Tensor, like: Tensor) -> Tensor:
    """The top left of x, as large as ``like``: doubling what was halved with a remainder gives a pixel too many."""
    return x[:, :, : like.shape[2], : like.shape[3]]


class FCN(nn.Module):
    """Class scores for every pixel.

    Takes (N, in_channels, H, W), H and W ≥ 9; returns a dictionary as torchvision does: "out", logits (N, num_classes, H, W), and
    with the auxiliary head "aux", the same from the third stage.

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        aux_loss: build the auxiliary head, which torchvision's trained model has.
        transposed: the paper's head of transposed convolutions in the place of torchvision's; then there is no "aux".
        residual_gain: as in ResNet.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        num_classes: int = 21,
        in_channels: int = 3,
        aux_loss: bool = True,
        transposed: bool = False,
        residual_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(layers, in_channels=in_channels, dilated=not transposed, residual_gain=residual_gain)
        self.transposed = transposed
        self.classifier = TransposedHead(layers, num_classes) if transposed else _head(layers, 2048, num_classes)
        self.aux_classifier = _head(layers, 1024, num_classes) if aux_loss and not transposed else None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[-2:]
        eighth, sixteenth, last = self.backbone(x)
        if self.transposed:
            y = self.classifier(eighth, sixteenth, last)
            return OrderedDict(out=y[:, :, : size[0], : size[1]])
        found = OrderedDict(out=_resized(self.classifier(last), size))
        if self.aux_classifier is not None:
            found["aux"] = _resized(self.aux_classifier(sixteenth), size)
        return found


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


VARIANTS: dict[str, Callable[..., nn.Module]] = {"fcn_resnet50": FCN}
