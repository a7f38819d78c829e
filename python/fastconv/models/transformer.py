"""The Transformer, encoder and decoder (Vaswani et al.: Attention is all you need, 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastconv.models import positions as encodings
from fastconv.models.attention import Attention, KeyValueCache, add_norm, causal_mask
from fastconv.models.decoding import beam_search, greedy_search
from fastconv.models.layers import Layers


class FeedForward(nn.Module):
    """Two dense layers with ReLU or GELU between, position by position: (B, L, d_model) to the same."""

    def __init__(self, layers: Layers, d_model: int, d_ff: int, dropout: float, activation: str) -> None:
        super().__init__()
        self.activation = getattr(nn.functional, activation)
        self.linear1 = layers.Linear(d_model, d_ff)
        self.linear2 = layers.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return y


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each added to its input and normalised after that: (B, S, d_model)."""

    def __init__(
        self, layers: Layers, d_model: int, num_heads: int, d_ff: int, dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.self_attention = Attention(layers, d_model, num_heads, dropout)
        self.norm1 = layers.LayerNorm(d_model)
        self.feed_forward = FeedForward(layers, d_model, d_ff, dropout, activation)
        self.norm2 = layers.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
        attention = self.self_attention
        x, _ = add_norm(self.norm1, x, self.dropout(attention(x, *attention.project(x), mask, bias=bias)))
        x, _ = add_norm(self.norm2, x, self.dropout(self.feed_forward(x)))
        return x


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, and a feed-forward network: (B, T, d_model)."""

    def __init__(
        self, layers: Layers, d_model: int, num_heads: int, d_ff: int, dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.self_attention = Attention(layers, d_model, num_heads, dropout)
        self.norm1 = layers.LayerNorm(d_model)
        self.cross_attention = Attention(layers, d_model, num_heads, dropout)
        self.norm2 = layers.LayerNorm(d_model)
        self.feed_forward = FeedForward(layers, d_model, d_ff, dropout, activation)
        self.norm3 = layers.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: tuple[Tensor, Tensor], see: Sight, cache: KeyValueCache | None = None
    ) -> Tensor:
        keys, values = self.self_attention.project(x)
        if cache is not None:
            keys, values = cache.append(keys, values)
        attended = self.self_attention(x, keys, values, see.own, see.is_causal, see.bias)
        x, _ = add_norm(self.norm1, x, self.dropout(attended))
        x, _ = add_norm(self.norm2, x, self.dropout(self.cross_attention(x, *memory, see.source)))
        x, _ = add_norm(self.norm3, x, self.dropout(self.feed_forward(x)))
        return x


@dataclass(frozen=True)
class Sight:
    """What a decoder's positions see: masks of their own sequence (or is_causal) and of the source; biases of their own."""

    own: Tensor | None
    is_causal: bool
    source: Tensor | None
    bias: Tensor | None = None


@dataclass
class Decoding:
    """A translation under way: the source's keys and values for each layer, what is hidden of it, and the layers' caches."""

    model: Transformer
    memories: list[tuple[Tensor, Tensor]]
    hidden: Tensor | None
    caches: list[KeyValueCache] = field(default_factory=list)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, target_size) of what follows after ``tokens`` (B, n), which are new positions."""
        return self.model.logits(tokens, self)[:, -1]

    def reorder(self, rows: Tensor) -> None:
        self.memories = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in self.memories]
        self.hidden = None if self.hidden is None else self.hidden.index_select(0, rows)
        for cache in self.caches:
            cache.reorder(rows)


class Transformer(nn.Module):
    """Source tokens (B, S) and target tokens (B, T), int64, to logits (B, T, target_size) of the target's next tokens.

    Args:
        layers: namespace the layers come from, see :class:`fastconv.models.layers.Layers`.
        source_size, target_size: numbers of tokens in the two vocabularies.
        d_model, num_heads, num_layers, d_ff: the paper's names and, by default, its base model.
        activation: "relu", the paper's, or "gelu".
        positions: "sinusoidal", "learned" (up to max_length positions), or "relative" (biases of distances up to max_distance).
        padding: the source's token that fills rows up; nothing attends to it.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        source_size: int = 37000,
        target_size: int = 37000,
        d_model: int = 512,
        num_heads: int = 8,
        num_layers: int = 6,
        d_ff: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        positions: str = "sinusoidal",
        max_length: int = 512,
        max_distance: int = 32,
        padding: int = 0,
    ) -> None:
        super().__init__()
        if positions not in encodings.KINDS:
            raise ValueError(f"positions: got {positions!r}, expected one of {', '.join(encodings.KINDS)}")
        if activation not in ("relu", "gelu"):
            raise ValueError(f"activation: got {activation!r}, expected relu or gelu")
        self.d_model, self.padding = d_model, padding
        self.source_embedding = nn.Embedding(source_size, d_model)
        self.target_embedding = nn.Embedding(target_size, d_model)
        self.relative = positions == "relative"
        sides = ("source", "target")
        if positions == "learned":
            self.positions = nn.ModuleDict({side: encodings.Learned(d_model, max_length) for side in sides})
        elif positions == "relative":
            self.positions = nn.ModuleDict({side: encodings.RelativeBias(num_heads, max_distance) for side in sides})
        else:
            self.positions = nn.ModuleDict({side: encodings.Sinusoidal(d_model) for side in sides})
        sizes = d_model, num_heads, d_ff, dropout, activation
        self.encoder = nn.ModuleList(EncoderLayer(layers, *sizes) for _ in range(num_layers))
        self.decoder = nn.ModuleList(DecoderLayer(layers, *sizes) for _ in range(num_layers))
        self.generator = layers.Linear(d_model, target_size)
        self.dropout = nn.Dropout(dropout)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier's uniform matrices (Glorot, Bengio 2010); embeddings of variance 1/d_model, which the paper's factor undoes."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.d_model**-0.5)

    def _embed(self, side: str, tokens: Tensor, start: int = 0) -> Tensor:
        embedding: nn.Embedding = getattr(self, f"{side}_embedding")
        x = embedding(tokens) * math.sqrt(self.d_model)
        y: Tensor = self.dropout(x if self.relative else self.positions[side](x, start))
        return y

    def _bias(self, side: str, queries: int, keys: int) -> Tensor | None:
        """The biases of relative positions of a self-attention, where the model has them: of each distance, not of each score."""
        return self.positions[side](queries, keys, keys - queries) if self.relative else None

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """The encoder's output (B, S, d_model), and which positions are seen (B, 1, 1, S), None where all are."""
        padded = source == self.padding
        seen = ~padded[:, None, None] if bool(padded.any()) else None
        x = self._embed("source", source)
        bias = self._bias("source", source.shape[1], source.shape[1])
        for layer in self.encoder:
            x = layer(x, seen, bias)
        return x, seen

    def start(self, source: Tensor) -> Decoding:
        """Encodes ``source`` (B, S): the state of a translation token by token."""
        memory, seen = self.encode(source)
        memories = [layer.cross_attention.project(memory) for layer in self.decoder]  # type: ignore[operator, union-attr]
        return Decoding(self, memories, seen)

    def logits(self, tokens: Tensor, state: Decoding) -> Tensor:
        """Logits (B, n, target_size) after each of ``tokens`` (B, n), which follow those that the state's caches have seen."""
        past = state.caches[0].length if state.caches else 0
        queries, keys = tokens.shape[1], past + tokens.shape[1]
        x = self._embed("target", tokens, past)
        causal = None if past == 0 or queries == 1 else causal_mask(queries, keys, x.device)
        see = Sight(causal, past == 0 and queries > 1, state.hidden, self._bias("target", queries, keys))
        caches: Sequence[KeyValueCache | None] = state.caches or [None] * len(self.decoder)
        for layer, memory, cache in zip(self.decoder, state.memories, caches, strict=True):
            x = layer(x, memory, see, cache)
        y: Tensor = self.generator(x)
        return y

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.logits(target, self.start(source))

    def _translation(self, source: Tensor) -> Decoding:
        state = self.start(source)
        state.caches = [KeyValueCache() for _ in self.decoder]
        return state

    @torch.no_grad()
    def greedy(self, source: Tensor, *, start: int, end: int, max_length: int) -> Tensor:
        """The likeliest token at each step: (B, at most max_length), without the start symbol, filled up with the end symbol."""
        first = source.new_full((len(source), 1), start)
        return greedy_search(self._translation(source), first, end, max_length)

    @torch.no_grad()
    def beam(
        self, source: Tensor, *, start: int, end: int, max_length: int, beams: int = 4, length_penalty: float = 0.6
    ) -> Tensor:
        """The likeliest of ``beams`` sequences kept at each step; as ``greedy``. length_penalty is alpha of Wu et al. 2016."""
        first = source.new_full((len(source), 1), start)
        return beam_search(self._translation(source), first, end, max_length, beams, length_penalty)


VARIANTS: dict[str, Callable[..., nn.Module]] = {"transformer": Transformer}
