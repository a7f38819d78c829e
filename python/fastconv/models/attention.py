"""What the Transformer models share: attention between projections, a cache of keys and values, addition with layer norm.

Vaswani et al.: Attention is all you need, 2017
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor, nn

from fastconv import functional
from fastconv import nn as ours
from fastconv._routes import exporting
from fastconv.models.layers import Layers
from fastconv.models.positions import matrix


def library(beside: nn.Module) -> ModuleType:
    """fastconv.functional where ``beside`` is a layer of fastconv's, otherwise torch.nn.functional.

    torch.nn has no module for an attention between projections, nor for a product with an embedding's weights, so these follow
    the layer next to them. It is asked in every call: convert() and revert() give a layer another class.
    """
    return functional if isinstance(beside, (ours.Linear, ours.LayerNorm)) else nn.functional


def add_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and the sum itself: one pass over memory with fastconv's layers."""
    if isinstance(norm, ours.LayerNorm):
        return norm(x, residual)  # type: ignore[no-any-return]
    total = x + residual
    return norm(total), total


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, H·E) as (B, H, L, E), without a copy."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


def join_heads(x: Tensor) -> Tensor:
    """(B, H, L, E) as (B, L, H·E)."""
    return x.transpose(1, 2).flatten(2)


class KeyValueCache:
    """Keys and values (B, H, L, E) of the positions met so far, in memory that doubles when it is full."""

    def __init__(self) -> None:
        self.length = 0
        self._memory: tuple[Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds positions; returns all of them."""
        end = self.length + keys.shape[2]
        if self._memory is None or end > self._memory[0].shape[2]:
            B, H, _, E = keys.shape
            grown = keys.new_empty((B, H, 2 * end, E)), values.new_empty((B, H, 2 * end, E))
            for new, old in zip(grown, self._memory or ()):
                new[:, :, : self.length] = old[:, :, : self.length]
            self._memory = grown
        for memory, more in zip(self._memory, (keys, values)):
            memory[:, :, self.length : end] = more
        self.length = end
        return self._memory[0][:, :, :end], self._memory[1][:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Makes row i of the batch what row rows[i] was: rows may repeat, and be more or fewer."""
        if self._memory is not None:
            keys, values = (memory.index_select(0, rows) for memory in self._memory)
            self._memory = keys, values


class Attention(nn.Module):
    """Multi-head attention with four projections: queries from x (B, Lq, d_model), keys and values from a context like it."""

    def __init__(self, layers: Layers, d_model: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"num_heads must divide d_model: got {num_heads} and {d_model}")
        self.num_heads, self.dropout = num_heads, dropout
        self.query = layers.Linear(d_model, d_model)
        self.key = layers.Linear(d_model, d_model)
        self.value = layers.Linear(d_model, d_model)
        self.out = layers.Linear(d_model, d_model)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, Lkv, E) of a context."""
        return split_heads(self.key(context), self.num_heads), split_heads(self.value(context), self.num_heads)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(B, Lq, d_model), from projected keys and values.

        The mask, boolean where there is a bias, and is_causal are those of scaled_dot_product_attention; ``bias``
        (H, Lq + Lkv - 1) is added by distance, without a matrix on fastconv's kernels.
        """
        query = split_heads(self.query(x), self.num_heads)
        p = self.dropout if self.training else 0.0
        attend = library(self.out).scaled_dot_product_attention
        options: dict[str, Tensor] = {}
        traced = torch._C._get_tracing_state() is not None or exporting()
        if bias is not None and attend is functional.scaled_dot_product_attention and x.is_cpu and not traced:
            options["relative_bias"] = bias
        elif bias is not None:
            mask, is_causal = _added(bias, mask, is_causal, query.shape[2], keys.shape[2]), False
        y: Tensor = self.out(join_heads(attend(query, keys, values, mask, p, is_causal, **options)))
        return y


def _added(bias: Tensor, seen: Tensor | None, is_causal: bool, queries: int, keys: int) -> Tensor:
    """One floating mask of biases by distance, a boolean mask and the upper left causal one: all that torch's attention takes."""
    scores = matrix(bias, queries)
    if is_causal:
        lower = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).tril()
        scores = scores.masked_fill(~lower, -math.inf)
    return scores if seen is None else scores.masked_fill(~seen, -math.inf)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys), True where a key is seen: the last query sees all of them, each one before it one fewer."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
