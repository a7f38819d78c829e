"""Positional encodings: sinusoids, learned vectors, and learned biases of relative positions.

Vaswani et al.: Attention is all you need, 2017, section 3.5
Shaw, Uszkoreit, Vaswani: Self-attention with relative position representations, 2018 (distances beyond a limit are that limit)
Raffel et al.: Exploring the limits of transfer learning, 2020 (one number for each head and distance, added to the scores)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KINDS = ("sinusoidal", "learned", "relative")


def sinusoids(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """(length, width): sin(pos / 10000^(2i/width)) in column 2i and the cosine of the same in column 2i + 1."""
    even = torch.arange(0, width, 2, device=device, dtype=torch.float64)
    angle = torch.arange(length, device=device)[:, None] / 10000 ** (even / width)
    return torch.stack((angle.sin(), angle.cos()), 2).flatten(1)[:, :width].float()


class Sinusoidal(nn.Module):
    """Adds sinusoids to (B, L, width) whose first position is ``start``. It has no parameters and no limit on length."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        # Made when it is needed: it is no state, and a model that is built on meta has to find it on its own device.
        self._table = torch.empty(0, width)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        end = start + x.shape[1]
        if end > len(self._table) or self._table.dtype != x.dtype or self._table.device != x.device:
            self._table = sinusoids(2 * end, self.width, x.device).to(x.dtype)
        return x + self._table[start:end]


class Learned(nn.Module):
    """Adds one learned vector for each position to (B, L, width). IndexError beyond max_length."""

    def __init__(self, width: int, max_length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, width).normal_(std=0.02))

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        end = start + x.shape[1]
        if end > len(self.weight):
            raise IndexError(f"position {end - 1}: this model has learned {len(self.weight)} positions")
        return x + self.weight[start:end]


class RelativeBias(nn.Module):
    """What is added to the scores of a head, by the distance from query to key, which counts up to max_distance on each side."""

    def __init__(self, num_heads: int, max_distance: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1))

    def forward(self, queries: int, keys: int, start: int = 0) -> Tensor:
        """(num_heads, queries + keys - 1), the first query being at position ``start`` of the keys: what
        ``fastconv.functional.scaled_dot_product_attention`` takes as relative_bias."""
        most = self.max_distance
        distance = torch.arange(1 - queries, keys, device=self.weight.device) - start
        return self.weight[:, distance.clamp(-most, most) + most]


def matrix(bias: Tensor, queries: int) -> Tensor:
    """The (num_heads, queries, keys) matrix that such biases stand for: each query's line begins one place before the last's."""
    return bias.unfold(1, bias.shape[1] - queries + 1, 1).flip(1)
