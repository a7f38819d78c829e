"""What GoogLeNet and Inception v3 share: a convolution with BatchNorm and ReLU, and the scale of TensorFlow's images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastconv.models.blocks import activated
from fastconv.models.layers import Layers

# Means and standard deviations of the channels that torchvision's transforms take out of a photograph.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, ReLU: torchvision's BasicConv2d, keys ``conv`` and ``bn``."""

    def __init__(self, layers: Layers, in_width: int, width: int, **options: Any) -> None:
        super().__init__()
        self.conv = layers.Conv2d(in_width, width, bias=False, **options)
        self.bn = layers.BatchNorm2d(width, eps=0.001)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.bn, self.relu, self.conv(x))


def from_imagenet_scale(x: Tensor) -> Tensor:
    """Images normalised by ImageNet's means and deviations as images in [-1, 1], which TensorFlow's weights expect."""
    mean, std = (x.new_tensor(values)[:, None, None] for values in (_IMAGENET_MEAN, _IMAGENET_STD))
    return x * (std / 0.5) + (mean - 0.5) / 0.5
