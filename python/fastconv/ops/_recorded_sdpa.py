"""Attention without a mask in plain eager mode where autograd records it: operands in four dimensions, and nothing transforms.

The general way brings operands of any rank, options and masks into one form: 60 us of a recorded call of 80, whose kernel takes 2
for one head of 8 queries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

from ._dispatch import FUNCTION, KERNEL, WITH_HALVES, usual, way
from .sdpa import MaybeTensor, Operands, Options, _backward, forward, gradients, row_numbers

_NONE = (None, None, None)


class _PlainSdpa(Function):
    """q, k, v and options to the outputs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        lse = row_numbers(q)
        out = forward(Operands(q, k, v), options, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: MaybeTensor) -> tuple[Any, ...]:
        if dout is None:
            return None, None, None, None
        q, k, v, out, lse = ctx.saved_tensors
        # Recorded itself, transformed or watched, a gradient takes the general way.
        found = gradients if way(dout, q, k, v) is KERNEL else _backward
        dq, dk, dv, *_ = found(dout, None, q, k, v, *_NONE, out, lse, [False] * 3, *ctx.options)
        return dq, dk, dv, None


# The quick way past Function.apply: see ops/autograd.py.
_apply: Callable[..., Tensor] = super(Function, _PlainSdpa).apply


@functools.lru_cache(maxsize=1024)
def _options(queries: int, keys: int, features: int, is_causal: bool, scale: float | None) -> Options:
    return Options(1.0 / math.sqrt(features) if scale is None else scale, -queries, 0 if is_causal else keys)


def record(query: Tensor, key: Tensor, value: Tensor, is_causal: Any, scale: Any) -> Tensor | None:
    """The recorded outputs of a valid call on plain tensors (B, H, L, E) of as many heads, None where one has to look closely."""
    if (
        type(is_causal) is not bool
        or type(scale) not in (float, type(None))
        or usual(query, key, value) is not FUNCTION
    ):
        return None
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or query.dtype not in WITH_HALVES:
        return None
    (B, H, L, E), (_, _, S, _) = query.shape, key.shape
    if key.shape != (B, H, S, E) or value.shape[:3] != key.shape[:3]:
        return None
    if query.dtype is not key.dtype or query.dtype is not value.dtype:
        return None
    return _apply(query, key, value, _options(L, S, E, is_causal, scale))
