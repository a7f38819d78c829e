"""Attention of sequences of different lengths: packed one after the other, or in a cache that is longer than what it holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from ._arguments import as_int, describe
from ._attention import scaled_dot_product_attention

_VARLEN = "scaled_dot_product_attention_varlen"
_CACHE = "scaled_dot_product_attention_with_cache"


def scaled_dot_product_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    *,
    is_causal: bool = False,
    lower_right: bool = False,
    **options: Any,
) -> Tensor:
    """Attention of a ragged batch, without padding: each sequence sees itself alone.

    `query` (total_q, Hq, E), `key` (total_k, Hkv, E), `value` (total_k, Hkv, Ev): the sequences one after the other, number n at
    cu_seqlens[n] .. cu_seqlens[n + 1] - 1; `cu_seqlens_k` is `cu_seqlens_q` unless given. Returns (total_q, Hq, Ev). `is_causal`
    counts from the upper left corner of each sequence's scores, with `lower_right` from the other. `options` are those of
    `scaled_dot_product_attention` for each sequence: dropout_p, scale, enable_gqa, window, softcap, alibi_slopes (Hq,) and sinks
    (Hq,). A sequence's bits are those that it has alone.

    Raises RuntimeError where shapes do not fit or cu_seqlens does not rise from 0 to the total, TypeError where an argument is of
    the wrong kind.
    """
    _only(_VARLEN, options, ("dropout_p", "scale", "enable_gqa", "window", "softcap", "alibi_slopes", "sinks"))
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{_VARLEN}(): argument '{name}' must be Tensor, not {describe(t)}")
        if t.dim() != 3:
            raise RuntimeError(f"{_VARLEN}(): {name} has shape {list(t.shape)}, expected (total, heads, features)")
    if key.shape[0] != value.shape[0]:
        raise RuntimeError(f"{_VARLEN}(): key has length {key.shape[0]} and value {value.shape[0]}, expected the same")
    cuts_q = _cuts("cu_seqlens_q", cu_seqlens_q, query.shape[0])
    cuts_k = _cuts("cu_seqlens_k", cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, key.shape[0])
    if len(cuts_q) != len(cuts_k):
        raise RuntimeError(
            f"{_VARLEN}(): cu_seqlens_q names {len(cuts_q)} sequences and cu_seqlens_k {len(cuts_k)}, expected the same"
        )
    found = []
    for rows, keys in zip(cuts_q, cuts_k):
        q, k, v = query[slice(*rows)], key[slice(*keys)], value[slice(*keys)]
        corner = _lower_right(q.shape[0], k.shape[0]) if is_causal and lower_right else None
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        out: Tensor = scaled_dot_product_attention(q, k, v, corner, is_causal=is_causal and not lower_right, **options)
        found.append(out.transpose(0, 1))
    return torch.cat(found) if found else query.new_empty((0, query.shape[1], value.shape[2]))


def scaled_dot_product_attention_with_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: int | Tensor | Sequence[int],
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Decoding: the last L positions of sequences whose keys and values are kept.

    `query` (B, Hq, L, E), `key_cache` (B, Hkv, M, E), `value_cache` (B, Hkv, M, Ev), of which sequence b has filled the first
    lengths[b] of M positions (one int for all, or B). `key` (B, Hkv, L, E) and `value` (B, Hkv, L, Ev), where given, are first
    written behind them, and count: `lengths` is not changed. Query i is at position length - L + i and sees the keys up to its
    own. Returns (B, Hq, L, Ev). `options`: scale, enable_gqa, window, softcap, alibi_slopes and sinks, as in
    `scaled_dot_product_attention`. What lies behind a length is never read.

    Few queries over many keys are shared out among threads by segments of keys, whose ends depend on the length alone: the bits
    are the same for any number of threads and for any other sequence in the batch.

    Raises RuntimeError where shapes do not fit or a length is beyond the cache, TypeError where an argument is of the wrong kind.
    """
    _only(_CACHE, options, ("scale", "enable_gqa", "window", "softcap", "alibi_slopes", "sinks"))
    for name, t in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{_CACHE}(): argument '{name}' must be Tensor, not {describe(t)}")
        if t.dim() != 4 or t.shape[0] != query.shape[0]:
            raise RuntimeError(
                f"{_CACHE}(): {name} has shape {list(t.shape)}, expected 4 dimensions and one batch size"
            )
    if key_cache.shape[:3] != value_cache.shape[:3]:
        raise RuntimeError(
            f"{_CACHE}(): key_cache has shape {list(key_cache.shape)} and value_cache {list(value_cache.shape)}, expected the "
            "same but for the features"
        )
    if (key is None) != (value is None):
        raise RuntimeError(
            f"{_CACHE}(): got {'value' if key is None else 'key'} alone, expected key and value or none of them"
        )
    B, _, L, _ = query.shape
    filled = _lengths(lengths, B, key_cache.shape[2], L if key is not None else 0)
    for name, new, cache in (("key", key, key_cache), ("value", value, value_cache)):
        if new is not None and tuple(new.shape) != (*cache.shape[:2], L, cache.shape[3]):
            raise RuntimeError(
                f"{_CACHE}(): {name} has shape {list(new.shape)}, expected {[*cache.shape[:2], L, cache.shape[3]]}"
            )
    if key is not None and value is not None:
        for b, length in enumerate(filled):
            key_cache[b, :, length : length + L] = key[b]
            value_cache[b, :, length : length + L] = value[b]
        filled = [length + L for length in filled]
    if len(set(filled)) <= 1:
        return _decode(query, key_cache, value_cache, filled[0] if filled else 0, options)
    parts = []
    for b, length in enumerate(filled):
        mine = {name: _of_sequence(option, b, B) for name, option in options.items()}
        only = slice(b, b + 1)
        parts.append(_decode(query[only], key_cache[only], value_cache[only], length, mine))
    return torch.cat(parts)


def _decode(query: Tensor, keys: Tensor, values: Tensor, length: int, options: dict[str, Any]) -> Tensor:
    corner = _lower_right(query.shape[2], length)
    out: Tensor = scaled_dot_product_attention(query, keys[:, :, :length], values[:, :, :length], corner, **options)
    return out


def _of_sequence(option: Any, b: int, B: int) -> Any:
    """Slopes and sinks may be each sequence's own."""
    return option[b : b + 1] if isinstance(option, Tensor) and option.dim() > 1 and option.shape[0] == B else option


def _lower_right(queries: int, keys: int) -> Any:
    return CausalBias(CausalVariant.LOWER_RIGHT, queries, keys)


def _only(op: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            raise TypeError(f"{op}() got an unexpected keyword argument '{name}', expected {', '.join(known)}")


def _integers(op: str, name: str, given: Any) -> list[int]:
    if isinstance(given, Tensor) and (given.dim() > 1 or given.is_floating_point() or given.dtype is torch.bool):
        raise TypeError(
            f"{op}(): argument '{name}' must be integers in one dimension, got {given.dtype} {list(given.shape)}"
        )
    listed = given.tolist() if isinstance(given, Tensor) else given
    found = [as_int(n) for n in (listed if isinstance(listed, (list, tuple)) else [listed])]
    if None in found:
        raise TypeError(f"{op}(): argument '{name}' must be integers, got {given!r}")
    return [n for n in found if n is not None]


def _cuts(name: str, given: Any, total: int) -> list[tuple[int, int]]:
    """First and last position, and one, of each sequence."""
    cuts = _integers(_VARLEN, name, given)
    if not cuts or cuts[0] != 0 or cuts[-1] != total or sorted(cuts) != cuts:
        raise RuntimeError(f"{_VARLEN}(): {name} is {cuts}, expected numbers that rise from 0 to {total}")
    return list(itertools.pairwise(cuts))


def _lengths(given: Any, B: int, most: int, more: int) -> list[int]:
    lengths = _integers(_CACHE, "lengths", given)
    if isinstance(given, int) or (isinstance(given, Tensor) and given.dim() == 0):
        lengths = lengths * B
    if len(lengths) != B:
        raise RuntimeError(f"{_CACHE}(): lengths has {len(lengths)} numbers, expected {B}")
    for length in lengths:
        if not 0 <= length <= most - more:
            raise RuntimeError(
                f"{_CACHE}(): a length is {length}, expected 0 to {most - more}: the cache has {most} positions, {more} of which "
                "are to be written"
            )
    return lengths
