"""An encoder of BERT's shape (Devlin et al.: BERT: pre-training of deep bidirectional transformers, 2018).

Keys are those of the published checkpoints: "embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastconv.models.attention import add_norm, join_heads, library, split_heads
from fastconv.models.layers import Layers

_EPS = 1e-12

# What files hold besides the encoder: heads that it was trained with, and a table of 0, 1, 2, ...
_NO_PARAMETERS = re.compile(r"cls\..*|embeddings\.position_ids")


class Embeddings(nn.Module):
    """Words, positions and segments, added and normalised: (B, L) to (B, L, width)."""

    def __init__(
        self, layers: Layers, vocabulary: int, positions: int, segments: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(segments, width)
        self.LayerNorm = layers.LayerNorm(width, eps=_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, segments: Tensor | None) -> Tensor:
        L, most = tokens.shape[1], self.position_embeddings.num_embeddings
        if most < L:
            raise IndexError(f"position {L - 1}: this model has learned {most} positions")
        kinds = self.token_type_embeddings
        x = self.word_embeddings(tokens) + (kinds.weight[0] if segments is None else kinds(segments))
        y, _ = add_norm(self.LayerNorm, x, self.position_embeddings.weight[:L].expand(x.shape))
        z: Tensor = self.dropout(y)
        return z


class SelfAttention(nn.Module):
    """Heads of attention without what follows them: (B, L, width) to the same."""

    def __init__(self, layers: Layers, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = layers.Linear(width, width)
        self.key = layers.Linear(width, width)
        self.value = layers.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, keys, values = (split_heads(part(x), self.num_heads) for part in (self.query, self.key, self.value))
        p = self.dropout if self.training else 0.0
        return join_heads(library(self.query).scaled_dot_product_attention(query, keys, values, mask, p))


class Output(nn.Module):
    """A dense layer, added to what its block was given, and normalised."""

    def __init__(self, layers: Layers, inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = layers.Linear(inputs, width)
        self.LayerNorm = layers.LayerNorm(width, eps=_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return add_norm(self.LayerNorm, self.dropout(self.dense(x)), residual)[0]


class Layer(nn.Module):
    """Attention and a two-layer network, each added to its input and normalised: (B, L, width) to the same."""

    def __init__(self, layers: Layers, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(layers, width, num_heads, dropout), "output": Output(layers, width, width, dropout)}
        )
        self.intermediate = nn.ModuleDict({"dense": layers.Linear(width, hidden)})
        self.output = Output(layers, hidden, width, dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        y: Tensor = self.output(nn.functional.gelu(self.intermediate["dense"](x)), x)
        return y


class BERT(nn.Module):
    """Tokens (B, L), int64, to their states (B, L, width) and the pooled state of the first (B, width).

    ``segments`` (B, L) says which of two texts a token is of; ``mask`` (B, L), bool or 0 and 1, where there is a token at all.

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        vocabulary, positions, segments: sizes of the three embeddings.
        width, depth, num_heads, hidden: of the encoder; by default the published base model's.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        vocabulary: int = 30522,
        positions: int = 512,
        segments: int = 2,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int = 3072,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(layers, vocabulary, positions, segments, width, dropout)
        stack = nn.ModuleList(Layer(layers, width, num_heads, hidden, dropout) for _ in range(depth))
        self.encoder = nn.ModuleDict({"layer": stack})
        self.pooler = nn.ModuleDict({"dense": layers.Linear(width, width)})
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @staticmethod
    def adapt_checkpoint(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under this model's names: without a prefix and other heads, norms' old names renewed."""
        old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
        found = {}
        for name, tensor in state.items():
            short = name.removeprefix("bert.")
            for before, after in old.items():
                short = short.replace(before, after)
            if not _NO_PARAMETERS.fullmatch(short):
                found[short] = tensor
        return found

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        seen = None if mask is None else mask.bool()[:, None, None]
        x = self.embeddings(tokens, segments)
        stack: Any = self.encoder["layer"]
        for layer in stack:
            x = layer(x, seen)
        return x, torch.tanh(self.pooler["dense"](x[:, 0]))


VARIANTS: dict[str, Callable[..., nn.Module]] = {"bert_base": BERT}
