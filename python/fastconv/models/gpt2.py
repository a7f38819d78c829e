"""A decoder of GPT-2's shape (Radford et al.: Language models are unsupervised multitask learners, 2019).

Keys and shapes are those of the published checkpoint, where dense weights lie as (inputs, outputs).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastconv.models.attention import KeyValueCache, add_norm, causal_mask, join_heads, library, split_heads
from fastconv.models.decoding import beam_search, greedy_search
from fastconv.models.layers import Layers

# What files hold besides parameters: causal masks, and the last layer, which is the embedding again.
_NO_PARAMETERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|lm_head\.weight")


def _turned(layer: nn.Linear) -> nn.Linear:
    """The layer, whose weight (out, in) is (in, out) in every state_dict."""

    def save(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"].t()

    def load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}weight" in state:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].t().contiguous()

    layer.register_state_dict_post_hook(save)
    layer.register_load_state_dict_pre_hook(load)
    return layer


class Attention(nn.Module):
    """Causal self-attention with one projection to queries, keys and values: (B, L, width) to the same."""

    def __init__(self, layers: Layers, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.c_attn = _turned(layers.Linear(width, 3 * width))
        self.c_proj = _turned(layers.Linear(width, width))

    def forward(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        query, keys, values = (split_heads(part, self.num_heads) for part in self.c_attn(x).chunk(3, -1))
        if cache is not None:
            keys, values = cache.append(keys, values)
        L, S = query.shape[2], keys.shape[2]
        mask = None if L in (1, S) else causal_mask(L, S, x.device)
        p = self.dropout if self.training else 0.0
        attend = library(self.c_proj).scaled_dot_product_attention
        y: Tensor = self.c_proj(join_heads(attend(query, keys, values, mask, p, L == S and L > 1)))
        return y


class FeedForward(nn.Module):
    """Two dense layers with GELU between, in its tanh form."""

    def __init__(self, layers: Layers, width: int) -> None:
        super().__init__()
        self.c_fc = _turned(layers.Linear(width, 4 * width))
        self.c_proj = _turned(layers.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))
        return y


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm and added to its input: (B, L, width) to the same."""

    def __init__(self, layers: Layers, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = layers.LayerNorm(width)
        self.attn = Attention(layers, width, num_heads, dropout)
        self.ln_2 = layers.LayerNorm(width)
        self.mlp = FeedForward(layers, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        y, x = add_norm(self.ln_2, x, self.dropout(self.attn(self.ln_1(x), cache)))
        return x + self.dropout(self.mlp(y))  # type: ignore[no-any-return]


@dataclass
class Continuation:
    """A text under way: the caches of its layers."""

    model: GPT2
    caches: list[KeyValueCache]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, vocabulary) of what follows after ``tokens`` (B, n), which are new positions."""
        return self.model(tokens, self.caches)[:, -1]  # type: ignore[no-any-return]

    def reorder(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.reorder(rows)


class GPT2(nn.Module):
    """Tokens (B, L), int64, to logits (B, L, vocabulary) of the tokens that follow.

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        vocabulary, positions: how many tokens there are, and how many fit into a text.
        width, depth, num_heads: of the blocks; by default the smallest published model's.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        vocabulary: int = 50257,
        positions: int = 1024,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(positions, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(layers, width, num_heads, dropout) for _ in range(depth))
        self.ln_f = layers.LayerNorm(width)
        self._initialise(depth)

    def _initialise(self, depth: int) -> None:
        """N(0, 0.02²), positions N(0, 0.01²), biases 0; what is added to the residual path is smaller by √(2·depth)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = 0.01 if name == "wpe.weight" else 0.02
                nn.init.normal_(parameter, std=std / (2 * depth) ** 0.5 if "c_proj" in name else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @staticmethod
    def adapt_checkpoint(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under this model's names: without the prefix of some files, the masks and the tied last layer."""
        names = {name: name.removeprefix("transformer.") for name in state}
        return {short: state[name] for name, short in names.items() if not _NO_PARAMETERS.fullmatch(short)}

    def forward(self, tokens: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        start = caches[0].length if caches else 0
        end = start + tokens.shape[1]
        if end > self.wpe.num_embeddings:
            raise IndexError(f"position {end - 1}: this model has learned {self.wpe.num_embeddings} positions")
        x = self.drop(self.wte(tokens) + self.wpe.weight[start:end])
        for i, block in enumerate(self.h):
            x = block(x, caches[i] if caches else None)
        x = self.ln_f(x)
        return library(self.ln_f).linear(x, self.wte.weight)  # type: ignore[no-any-return]

    def start(self) -> Continuation:
        """The state of a text token by token."""
        return Continuation(self, [KeyValueCache() for _ in self.h])

    @torch.no_grad()
    def greedy(self, tokens: Tensor, *, end: int, max_length: int) -> Tensor:
        """The likeliest continuation of ``tokens`` (B, n) step by step: (B, at most max_length), filled up with ``end``."""
        return greedy_search(self.start(), tokens, end, max_length)

    @torch.no_grad()
    def beam(self, tokens: Tensor, *, end: int, max_length: int, beams: int = 4, length_penalty: float = 0.6) -> Tensor:
        """The likeliest of ``beams`` continuations kept at each step; as ``greedy``."""
        return beam_search(self.start(), tokens, end, max_length, beams, length_penalty)


VARIANTS: dict[str, Callable[..., nn.Module]] = {"gpt2": GPT2}
