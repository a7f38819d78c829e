"""What LeNet learns in the training check: scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, each image moved by up to ``shift`` pixels; SGD with momentum and a cosine schedule.

    Of the two backends' losses: rounding differs from the first step on and the weights drift apart with it. torch differs from
    itself, with and without oneDNN, by up to 1.1e-6 over this run, so 1e-5 leaves room for another order of summation and none
    for a wrong gradient.
    """

    epochs: int = 12
    batch: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    shift: int = 2
    seed: int = 0
    loss_tolerance: float = 1e-5
    min_accuracy: float = 0.97

    title: ClassVar[str] = "scikit-learn's digits"
    unit: ClassVar[str] = "digits"
    extras: ClassVar[tuple[str, ...]] = ("sklearn", "matplotlib")
    config: ClassVar[dict[str, Any]] = {}

    @cached_property
    def _data(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return load_digits(self.seed)

    @property
    def _steps_per_epoch(self) -> int:
        return len(self._data[0][0]) // self.batch

    @property
    def steps(self) -> int:
        return self.epochs * self._steps_per_epoch

    @property
    def compared(self) -> int:
        return self.steps

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        x, labels = self._data[0]
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            order = torch.randperm(len(x), generator=generator)
            for batch in order[: self._steps_per_epoch * self.batch].view(self._steps_per_epoch, self.batch):
                yield _shift(x[batch], self.shift, generator), labels[batch]

    def optimise(self, network: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD(network.parameters(), lr=self.learning_rate, momentum=self.momentum)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)

    def loss(self, network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, labels = batch
        return functional.cross_entropy(network(x), labels)

    def accuracy(self, network: nn.Module) -> float:
        x, labels = self._data[1]
        return float((network(x).argmax(1) == labels).double().mean())


def _shift(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each (1, H, W) image of x moved by its own random number of pixels, up to ``most``, in both directions."""
    n, _, height, width = x.shape
    down, right = torch.randint(-most, most + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) - down) % height
    columns = (torch.arange(width) - right) % width
    return x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def load_digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 1797 digits as (images, labels) to train on, four fifths, and to test on, evenly by class.

    The 8×8 images are enlarged to 24×24 and framed to LeNet's 32×32, so that shifts of up to 4 pixels lose no ink;
    images have shape (n, 1, 32, 32), zero mean and unit variance over all of them.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    x = torch.from_numpy(digits.images).float().unsqueeze(1)
    x = functional.pad(functional.interpolate(x, size=(24, 24), mode="bilinear", align_corners=False), (4, 4, 4, 4))
    x = (x - x.mean()) / x.std()
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(x)), test_size=0.2, stratify=digits.target, random_state=seed)
    return (x[train], labels[train]), (x[test], labels[test])
