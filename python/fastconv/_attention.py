"""torch.nn.functional.scaled_dot_product_attention on fastconv's kernels, with options that torch has not."""

from __future__ import annotations

import functools
import math
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import has_torch_function_variadic

from ._arguments import as_int, describe
from ._attention_heads import OP, Heads
from ._routes import autocast, check_one_device, for_torch, overridden
from .ops import sdpa as ops
from .ops._dispatch import WITH_HALVES
from .ops._eager import native
from .ops._recorded_sdpa import record

_dynamo = torch.compiler.is_dynamo_compiling
_eager_sdpa = native.eager_sdpa


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(`query` `key`ᵀ · `scale` + `attn_mask`) `value`: `torch.nn.functional.scaled_dot_product_attention`.

    `query` (..., L, E), `key` (..., S, E), `value` (..., S, Ev), leading dimensions broadcast; returns (..., L, Ev). A boolean
    mask is True where a key is seen; a floating one is added. `is_causal` counts from the upper left corner, and
    `torch.nn.attention.bias.causal_lower_right` as `attn_mask` from the other. Mask and `is_causal` may be combined. A query that
    sees no key gives 0 and has no gradient. With `enable_gqa`, heads of `query` share those of `key` and `value` in groups.
    float32, float64, bfloat16 and float16 on the CPU run on our kernels, which store nothing of size L x S and compute the last
    two in float32. CPU autocast applies as to torch's function.

    Not in torch: `window` lets a query see that many keys on each side of its own (or (before, after); -1 for all), on the
    diagonal that the causal mask has; `softcap` c makes a score c·tanh(score/c) (Gemma 2). `relative_bias` (..., L + S - 1)
    adds element j - i + L - 1 to the score of query i and key j (T5), `alibi_slopes` (...) the slope times minus their distance
    on that diagonal (Press et al. 2022), and neither makes a matrix of it; `sinks` (...) are the scores of a key whose value is
    0 (Xiao et al. 2023, as in GPT-OSS). Their leading dimensions are the batch and query heads, or broadcast to them, and all
    have gradients. `return_lse` returns (output,
    log-sum-exp of the scores (..., L)), both differentiable; the latter is float32 beside halves.

    Raises RuntimeError where shapes, dtypes or devices do not fit or `dropout_p` is no probability, TypeError where an argument
    is of the wrong kind, NotImplementedError where an option that torch has not meets tensors that only torch can serve.
    """
    ordinary = attn_mask is None and dropout_p == 0.0 and not return_lse and softcap is None and window is None
    ordinary = ordinary and relative_bias is None and alibi_slopes is None and sinks is None
    if ordinary and not _dynamo() and _asked.get() is None:
        out = _eager_sdpa(query, key, value, is_causal, scale, enable_gqa)
        if out is None and enable_gqa is False:
            out = record(query, key, value, is_causal, scale)
        if out is not None:
            return out  # type: ignore[no-any-return]
    given = {
        "window": window, "softcap": softcap or None, "relative_bias": relative_bias, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "return_lse": return_lse or None,
    }  # fmt: skip
    own = {name: value for name, value in given.items() if value is not None}
    if has_torch_function_variadic(query, key, value) or (
        has_torch_function_variadic(attn_mask) and not isinstance(attn_mask, CausalBias)
    ):
        # A jagged tensor's own attention is found by torch's function alone, as long as nobody has been asked about ours.
        with torch._C.DisableTorchFunctionSubclass():
            jagged = any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value))
        if not jagged:
            return overridden(  # type: ignore[no-any-return]
                scaled_dot_product_attention,
                _theirs,
                tuple(t for t in (query, key, value, attn_mask) if t is not None),
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, **own,
            )  # fmt: skip
    bias = attn_mask if isinstance(attn_mask, CausalBias) else None
    mask = None if bias is not None else attn_mask
    tensors = by_name(query, key, value, mask)
    check_one_device(OP, tensors)
    if mask is not None and not mask.is_floating_point():
        tensors["attn_mask"] = None  # no dtype that a kernel would lack: boolean, or an error
    if for_torch(OP, tensors, False, dtypes=WITH_HALVES):
        if own:
            hint = f"; fastconv.cuda.{OP}, and this function after fastconv.set_cuda(True), have it on a GPU"
            raise NotImplementedError(
                f"{OP}: {', '.join(own)} needs floating tensors on the CPU that nobody traces, got {describe(query)} of "
                f"{query.dtype} on {query.device}{hint if query.is_cuda else ''}"
            )
        return _theirs(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return _answer(query, key, value, attn_mask, probability(dropout_p), is_causal, (scale, enable_gqa), own)


def _answer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | CausalBias | None,
    p: float,
    is_causal: bool,
    plain: tuple[Any, bool],
    own: dict[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:
    """What our kernels make of operands that they have; `plain` is scale and enable_gqa, `own` the options that torch has not."""
    return_lse = "return_lse" in own
    if isinstance(attn_mask, CausalBias):
        query, key, value = autocast(query, key, value)
    else:
        query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    heads, given, options = prepare(query, key, value, attn_mask, p, is_causal, plain, own)
    asked = None if torch.compiler.is_compiling() else _asked.get()
    if not return_lse and asked is None:
        return heads.undo(ops.sdpa_out(given, options))
    out, lse = ops.sdpa(given, options)
    if asked is not None:
        asked.append(heads.undo(ops.weights(given, lse, options)))
        if not return_lse:
            return heads.undo(out)
    return heads.undo(out), heads.undo(lse)


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | CausalBias | None,
    p: float,
    is_causal: bool,
    plain: tuple[Any, bool],
    own: dict[str, Any],
) -> tuple[Heads, ops.Operands, ops.Options]:
    """A call's operands in four dimensions and its options, checked: the same for every device."""
    scale, enable_gqa = plain
    bias = attn_mask if isinstance(attn_mask, CausalBias) else None
    mask = None if bias is not None else attn_mask
    if bias is not None and is_causal:
        raise ValueError("CausalBias should not be used with causal=True: got is_causal=True beside a causal attn_mask")
    _check_operands(query, key, value, mask)
    heads = Heads(query, key, value, enable_gqa)
    L, S = query.shape[-2], key.shape[-2]
    lower_right = bias is not None and bias.variant == CausalVariant.LOWER_RIGHT
    if bias is not None and (bias.seq_len_q, bias.seq_len_kv) != (L, S):
        raise RuntimeError(f"attn_mask is a causal bias of {bias.seq_len_q} x {bias.seq_len_kv}, expected {L} x {S}")
    diagonal = S - L if lower_right else 0
    low, high = _band(own.get("window"), is_causal or bias is not None, diagonal, L, S)
    options = ops.Options(
        _scale(scale, query.shape[-1]),
        low,
        high,
        float(own.get("softcap", 0.0)),
        p,
        _draw(query.device) if 0 < p < 1 else 0,
    )
    if options.softcap < 0:
        raise RuntimeError(f"{OP}: softcap has to be positive, but got {options.softcap:g}")
    given = ops.Operands(
        heads.q,
        heads.k,
        heads.v,
        heads.mask(mask, query.dtype),
        _distances(own, heads, diagonal),
        heads.numbers("sinks", own.get("sinks")),
    )
    return heads, given, options


def _distances(own: dict[str, Any], heads: Heads, diagonal: int) -> Tensor | None:
    """What is added to scores for each distance j - i from 1 - L on: (B, Hq, L + S - 1), of size 1 where it is broadcast."""
    L, S = heads.scores[-2:]
    bias = heads.numbers("relative_bias", own.get("relative_bias"), max(L + S - 1, 0))
    slopes = heads.numbers("alibi_slopes", own.get("alibi_slopes"))
    if slopes is None:
        return bias
    distance = torch.arange(1 - L, max(S, 1 - L), dtype=slopes.dtype, device=slopes.device) - diagonal
    alibi = -slopes[..., None] * distance.abs()
    return alibi if bias is None else bias + alibi


def by_name(query: Any, key: Any, value: Any, mask: Any) -> dict[str, Tensor | None]:
    for name, t in (("query", query), ("key", key), ("value", value), ("attn_mask", mask)):
        if not isinstance(t, Tensor) and not (name == "attn_mask" and t is None):
            raise TypeError(f"{OP}(): argument '{name}' must be Tensor, not {describe(t)}")
    return {"query": query, "key": key, "value": value, "attn_mask": mask}


def probability(p: Any) -> float:
    probability = float(p)
    if not 0 <= probability <= 1:
        raise RuntimeError(
            f"dropout probability has to be between 0 and 1, but got {probability:g}: dropout_p of {OP}()"
        )
    return probability


def _scale(scale: Any, features: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(features) if features else 1.0
    return float(scale)


def _draw(device: torch.device) -> int:
    """A key of 63 bits from torch's generator of that device: the same dropout for the same torch.manual_seed.

    A GPU's is asked for its seed and place, which the CPU knows, and moved on by what one of its own draws takes: nothing waits.
    That happens once for each call, and a graph replays what was captured and calls nothing: it would drop the same every time.
    """
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{OP}: dropout_p is above 0 while a CUDA graph is captured, whose every replay would drop the same weights, "
                "since their key is drawn on the CPU: leave the call outside of the graph, or set dropout_p to 0"
            )
        generator = torch.cuda.default_generators[device.index]
        place = generator.get_offset()
        generator.set_offset(place + 4)
        return _mixed(_mixed(generator.initial_seed()) ^ place) >> 1
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64).item())


def _mixed(x: int) -> int:
    """64 bits, of which each depends on all of x: the output function of SplitMix64 (Steele, Lea, Flood, 2014)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _band(window: Any, causal: bool, diagonal: int, L: int, S: int) -> tuple[int, int]:
    """The first and the last key that query i sees, counted from i."""
    low, high = -L, diagonal if causal else S
    if window is None:
        return low, high
    sides = tuple(window) if isinstance(window, (tuple, list)) else (window, window)
    found = tuple(as_int(side) for side in sides)
    if len(found) != 2 or None in found or min(found) < -1:
        raise TypeError(f"{OP}(): argument 'window' must be an int or two ints, -1 or more, got {window!r}")
    before, after = found
    if before >= 0:
        low = max(low, diagonal - before)
    if after >= 0:
        high = min(high, diagonal + after)
    return low, high


def _check_operands(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """torch's checks, and two that it has not: keys and values of different length, and features of different number."""
    dtypes = f"query.dtype: {query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype} instead."
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got {dtypes}")
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(
            "Expected query, key, and value to all be  at least 2 dimensional, but got query.dim: "
            f"{query.dim()} key.dim: {key.dim()} and value.dim: {value.dim()} instead."
        )
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            f"{OP}(): query has {query.shape[-1]} features and key {key.shape[-1]}: Expected size for first two dimensions of "
            f"batch2 tensor to be: [.., {query.shape[-1]}] but got: [.., {key.shape[-1]}]."
        )
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"{OP}(): key has length {key.shape[-2]} and value {value.shape[-2]}, expected the same: got key of shape "
            f"{list(key.shape)} and value of shape {list(value.shape)}"
        )
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype: "
            f"{mask.dtype} and  query.dtype: {query.dtype} instead."
        )


_asked: ContextVar[list[Tensor] | None] = ContextVar("fastconv_attention_weights", default=None)


@contextmanager
def weights_of(wanted: bool = True) -> Iterator[list[Tensor]]:
    """Yields a list to which every attention of ours in the block appends its weights (..., L, S), dropout applied, if wanted."""
    weights: list[Tensor] = []
    token = _asked.set(weights if wanted else None)
    try:
        yield weights
    finally:
        _asked.reset(token)


# torch's function, and how many blocks have ours in its place.
_theirs = F.scaled_dot_product_attention
_lock = threading.Lock()
_blocks = 0
_routed: ContextVar[bool] = ContextVar("fastconv_sdpa", default=False)


@functools.wraps(_theirs)
def _routing(*args: Any, **kwargs: Any) -> Any:
    return (scaled_dot_product_attention if _routed.get() else _theirs)(*args, **kwargs)


def with_our_attention(function: Any) -> Any:
    """A copy of one of torch.nn.functional's functions that calls ours by torch's name: what torch.compile can trace of `sdpa`.

    Its globals say no module's name, by which the compiler would look them up in torch's instead.
    """
    names = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    names["scaled_dot_product_attention"] = scaled_dot_product_attention
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@contextmanager
def sdpa() -> Iterator[None]:
    """While the block runs, `torch.nn.functional.scaled_dot_product_attention` is fastconv's, in this thread (or asyncio task).

        with fastconv.sdpa():
            y = model(x)

    Modules of torch and of other libraries call it by that name, so nothing in them has to change; a name that somebody has
    imported from there stays torch's. What has no kernel of ours goes to torch and is counted, see `fastconv.set_fallback`.
    `torch.nn.attention.sdpa_kernel` chooses between torch's kernels, and so concerns those calls alone. torch.compile breaks the
    graph at the block; `fastconv.nn.MultiheadAttention` and `fastconv.functional` it traces whole.
    """
    global _blocks
    with _lock:
        _blocks += 1
        F.scaled_dot_product_attention = _routing
    token = _routed.set(True)
    try:
        yield
    finally:
        _routed.reset(token)
        with _lock:
            _blocks -= 1
            if not _blocks:
                F.scaled_dot_product_attention = _theirs
