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
from .ops._dispatch import computed_in

_VARLEN = "scaled_dot_product_attention_varlen"
_CACHE = "scaled_dot_product_attention_with_cache"
_OPTIONS = ("scale", "enable_gqa", "window", "softcap", "alibi_slopes", "sinks", "relative_bias", "return_lse")


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
) -> Any:
    """Attention of a ragged batch, without padding: each sequence sees itself alone.

    `query` (total_q, Hq, E), `key` (total_k, Hkv, E), `value` (total_k, Hkv, Ev): the sequences one after the other, number n at
    cu_seqlens[n] .. cu_seqlens[n + 1] - 1; `cu_seqlens_k` is `cu_seqlens_q` unless given. Returns (total_q, Hq, Ev). `is_causal`
    counts from the upper left corner of each sequence's scores, with `lower_right` from the other. `options` are those of
    `scaled_dot_product_attention` for each sequence: dropout_p, scale, enable_gqa, window, softcap, alibi_slopes (Hq,), sinks
    (Hq,), relative_bias (Hq, Mq + Mk - 1) for the longest queries and keys, of which element j - i + Mq - 1 is added, and
    return_lse, with which (output, log-sum-exp (total_q, Hq)) is returned. A sequence's bits are those that it has alone.

    Raises RuntimeError where shapes do not fit or cu_seqlens does not rise from 0 to the total, TypeError where an argument is of
    the wrong kind.
    """
    _only(_VARLEN, options, ("dropout_p", *_OPTIONS))
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
    most_q, most_k = (max((end - begin for begin, end in cuts), default=0) for cuts in (cuts_q, cuts_k))
    bias = _line(_VARLEN, options, most_q + most_k - 1)
    found = []
    for rows, keys in zip(cuts_q, cuts_k):
        q, k, v = query[slice(*rows)], key[slice(*keys)], value[slice(*keys)]
        corner = _lower_right(q.shape[0], k.shape[0]) if is_causal and lower_right else None
        if bias is not None:
            options["relative_bias"] = bias[..., most_q - q.shape[0] : most_q + k.shape[0] - 1]
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        both = scaled_dot_product_attention(q, k, v, corner, is_causal=is_causal and not lower_right, **options)
        found.append([t.transpose(0, 1) for t in (both if isinstance(both, tuple) else (both,))])
    if not found:
        out, lse = query.new_empty((0, query.shape[1], value.shape[2])), query.new_empty((0, query.shape[1]))
        return (out, lse.to(computed_in(lse.dtype))) if options.get("return_lse") else out
    return _joined(found)


def scaled_dot_product_attention_with_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: int | Tensor | Sequence[int],
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    **options: Any,
) -> Any:
    """Decoding: the last L positions of sequences whose keys and values are kept.

    `query` (B, Hq, L, E), `key_cache` (B, Hkv, M, E), `value_cache` (B, Hkv, M, Ev), of which sequence b has filled the first
    lengths[b] of M positions (one int for all, or B). `key` (B, Hkv, L, E) and `value` (B, Hkv, L, Ev), where given, are first
    written behind them, and count: `lengths` is not changed. Query i is at position length - L + i and sees the keys up to its
    own. Returns (B, Hq, L, Ev). `options`: scale, enable_gqa, window, softcap, alibi_slopes, sinks and return_lse, as in
    `scaled_dot_product_attention`, and relative_bias (..., M + L - 1), whose element M - 1 is for a query's own position. What
    lies behind a length is never read.

    Few queries over many keys are shared out among threads by segments of keys, whose ends depend on the length alone: the bits
    are the same for any number of threads and for any other sequence in the batch.

    Raises RuntimeError where shapes do not fit or a length is beyond the cache, TypeError where an argument is of the wrong kind.
    """
    _only(_CACHE, options, _OPTIONS)
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
    _line(_CACHE, options, key_cache.shape[2] + L - 1)
    if len(set(filled)) <= 1:
        return _decode(query, key_cache, value_cache, filled[0] if filled else 0, options)
    parts = []
    for b, length in enumerate(filled):
        mine = {name: _of_sequence(name, option, b, B) for name, option in options.items()}
        only = slice(b, b + 1)
        parts.append(_decode(query[only], key_cache[only], value_cache[only], length, mine))
    return _joined([part if isinstance(part, tuple) else (part,) for part in parts])


def _decode(query: Tensor, keys: Tensor, values: Tensor, length: int, options: dict[str, Any]) -> Any:
    queries, most = query.shape[2], keys.shape[2]
    bias = options.get("relative_bias")
    if bias is not None:
        options = options | {"relative_bias": bias[..., most - length : most + queries - 1]}
    corner = _lower_right(queries, length)
    return scaled_dot_product_attention(query, keys[:, :, :length], values[:, :, :length], corner, **options)


def _of_sequence(name: str, option: Any, b: int, B: int) -> Any:
    """Slopes, sinks and biases may be each sequence's own: with a dimension for them before that of the heads."""
    dimensions = 3 if name == "relative_bias" else 2
    own = isinstance(option, Tensor) and option.dim() == dimensions and option.shape[0] == B
    return option[b : b + 1] if own else option


def _joined(parts: Sequence[Sequence[Tensor]]) -> Tensor | tuple[Tensor, Tensor]:
    """Outputs, and log-sum-exps where they are wanted, of all sequences."""
    whole = [torch.cat(same) for same in zip(*parts)]
    return whole[0] if len(whole) == 1 else (whole[0], whole[1])


def _line(op: str, options: dict[str, Any], size: int) -> Tensor | None:
    """The biases by distance, where they are given, as many as the longest sequence needs."""
    bias = options.get("relative_bias")
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}(): argument 'relative_bias' must be Tensor, not {describe(bias)}")
    if bias.dim() < 1 or bias.shape[-1] != max(size, 0):
        raise RuntimeError(f"{op}(): relative_bias has shape {list(bias.shape)}, expected (..., {max(size, 0)})")
    return bias


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
