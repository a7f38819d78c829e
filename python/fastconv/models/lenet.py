"""LeNet-5 (LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastconv.models.layers import Layers


class LeNet5(nn.Module):
    """Two convolutions with average pooling and tanh, then three dense layers; 61 706 parameters at 10 classes.

    Takes images of shape (N, in_channels, 32, 32), returns logits of shape (N, num_classes). Two simplifications that
    everyone makes: the pools have no trainable gain, and every map of the second convolution sees all six of the first.
    """

    def __init__(self, layers: Layers, *, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = layers.Conv2d(in_channels, 6, kernel_size=5)
        self.pool1 = layers.AvgPool2d(kernel_size=2)
        self.conv2 = layers.Conv2d(6, 16, kernel_size=5)
        self.pool2 = layers.AvgPool2d(kernel_size=2)
        self.fc1 = layers.Linear(16 * 5 * 5, 120)
        self.fc2 = layers.Linear(120, 84)
        self.fc3 = layers.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(torch.tanh(self.conv1(x)))
        x = self.pool2(torch.tanh(self.conv2(x)))
        x = torch.tanh(self.fc1(torch.flatten(x, 1)))
        x = torch.tanh(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


VARIANTS: dict[str, Callable[..., nn.Module]] = {"lenet5": LeNet5}
