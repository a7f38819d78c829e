"""What a model asks of the namespace it takes its layers from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import nn


class Layers(Protocol):
    """A namespace with torch.nn's names for the layers that fastconv has kernels for.

    ``fastconv.nn`` and ``torch.nn`` both fit, and so does any object whose layers keep torch's constructors and
    ``state_dict``. Everything else in a model (activations, dropout, embeddings) comes from ``torch.nn``.
    """

    @property
    def Conv2d(self) -> Callable[..., nn.Conv2d]: ...
    @property
    def ConvTranspose2d(self) -> Callable[..., nn.ConvTranspose2d]: ...
    @property
    def Linear(self) -> Callable[..., nn.Linear]: ...
    @property
    def MaxPool2d(self) -> Callable[..., nn.MaxPool2d]: ...
    @property
    def AvgPool2d(self) -> Callable[..., nn.AvgPool2d]: ...
    @property
    def AdaptiveAvgPool2d(self) -> Callable[..., nn.AdaptiveAvgPool2d]: ...
    @property
    def BatchNorm2d(self) -> Callable[..., nn.BatchNorm2d]: ...
    @property
    def LayerNorm(self) -> Callable[..., nn.LayerNorm]: ...
    @property
    def MultiheadAttention(self) -> Callable[..., nn.MultiheadAttention]: ...
