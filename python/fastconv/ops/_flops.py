"""How much arithmetic each op is, for `torch.utils.flop_counter`: two operations for each product of the direct algorithm, taps
on padding included, as torch counts its own. Pools, like torch's, count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import recurrent  # noqa: F401 - registers its ops, which no function needs
from ._conv2d_kernels import output_size

Sizes = Sequence[int]
_ops = torch.ops.fastconv


def _products(w: Sizes, y: Sizes) -> int:
    """Of a convolution: each output (N, K, P, Q) is a sum over one filter (K, C/groups, R, S)."""
    return math.prod(y) * math.prod(w[1:])


@register_flop_formula(_ops.conv2d_fwd)
def _conv2d_fwd(
    x: Sizes, w: Sizes, bias: Any, residual: Any, stride: Sizes, padding: Sizes, dilation: Sizes, *_: Any, **__: Any
) -> int:
    size = output_size(x[2], x[3], w[2], w[3], stride, padding, dilation)
    return 2 * _products(w, (x[0], w[0], *size))


@register_flop_formula(_ops.conv2d_dgrad)
def _conv2d_dgrad(dy: Sizes, w: Sizes, *_: Any, **__: Any) -> int:
    return 2 * _products(w, dy)


@register_flop_formula(_ops.conv2d_wgrad)
def _conv2d_wgrad(dy: Sizes, x: Sizes, w_shape: Sizes, *_: Any, **__: Any) -> int:
    return 2 * _products(w_shape, dy)


@register_flop_formula(_ops.linear_fwd)
def _linear_fwd(x: Sizes, w: Sizes, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * w[0]


@register_flop_formula(_ops.linear_dgrad)
def _linear_dgrad(dy: Sizes, w: Sizes, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) * w[1]


@register_flop_formula(_ops.linear_wgrad)
def _linear_wgrad(dy: Sizes, x: Sizes, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) * x[-1]


@register_flop_formula(_ops.lstm_fwd)
def _lstm_fwd(gates: Sizes, h: Sizes, c: Sizes, w: Sizes, *_: Any, **__: Any) -> int:
    return 2 * math.prod(gates) * w[1]


@register_flop_formula(_ops.gru_fwd)
def _gru_fwd(gates: Sizes, h: Sizes, w: Sizes, *_: Any, **__: Any) -> int:
    return 2 * math.prod(gates) * w[1]


@register_flop_formula(_ops.lstm_bwd)
def _lstm_bwd(dy: Sizes, dc: Any, w: Sizes, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) * w[0]


@register_flop_formula(_ops.gru_bwd)
def _gru_bwd(dy: Sizes, w: Sizes, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) * w[0]
