"""What the reference models return: one tensor of logits, a tuple with those of auxiliary heads, or a dictionary of maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def heads(output: Any) -> list[Tensor]:
    """The logits of every head, the main one first."""
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, Mapping) else output)


def main_output(output: Any) -> Tensor:
    """The logits without those of auxiliary heads."""
    return heads(output)[0]


def per_image(logits: Tensor) -> Tensor:
    """Logits (N, K) as they are, those of a map of pixels (N, K, H, W) averaged over it."""
    return logits.flatten(2).mean(2) if logits.dim() > 2 else logits


def classification_loss(output: Any, classes: Tensor) -> Tensor:
    """The sum of all heads' cross entropies with one class for each image: a loss that every parameter has a gradient of."""
    return torch.stack([F.cross_entropy(per_image(logits), classes) for logits in heads(output)]).sum()
