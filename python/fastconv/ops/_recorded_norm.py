"""layer_norm in plain eager mode where autograd records it: the recipe is known, and nothing transforms.

The general Function of ops/layer_norm.py, which every transform of torch.func can take apart, spends 80 us on a call and as much
on its gradient before a kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

from ._dispatch import KERNEL, empty_strided, way
from .layer_norm import MaybeTensor, Recipe, address, backward, contiguous, find_plan
from .linear import contiguous_strides
from .pool2d import chosen


class _PlainLayerNorm(Function):
    """x, residual, weight, bias and the recipe to y, or to y and the sum where there is a residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor, found: Recipe
    ) -> Any:
        made, shape, strides, (N, _), *_ = found
        y = empty_strided(shape, strides, x.dtype)
        total = None if residual is None else empty_strided(shape, strides, x.dtype)
        stats = empty_strided((2, N), (N, 1), x.dtype)  # mean and rstd
        mean = stats.data_ptr()
        # What is saved is the input, not a copy, which has no history for a second derivative.
        operands = contiguous(x, residual, weight, bias)
        inputs = (address(t) for t in operands)
        made.execute(*inputs, address(total), y.data_ptr(), mean, mean + N * stats.itemsize, 0, 0, 0, 0, 0)
        ctx.recipe = found
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if total is None else total, stats, weight)
        return y if total is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: MaybeTensor, dsum: MaybeTensor = None) -> Any:
        need_x, need_residual, *wants = ctx.needs_input_grad[:4]
        dx_wanted = need_x or need_residual
        if dy is None:
            return dsum if need_x else None, dsum if need_residual else None, None, None, None
        x, stats, weight = ctx.saved_tensors
        operands = dy, dsum if dx_wanted else None, x, stats, weight
        gradients = _quick if way(dy, dsum, x, weight) is KERNEL else _general
        dx, dweight, dbias = gradients(ctx.recipe, *operands, dx_wanted, *wants)
        return dx if need_x else None, dx if need_residual else None, dweight, dbias, None


def _quick(
    found: Recipe, dy: Tensor, dsum: MaybeTensor, x: Tensor, stats: Tensor, weight: MaybeTensor, *wants: bool
) -> tuple[MaybeTensor, ...]:
    _, shape, strides, matrix, columns, eps = found
    made = find_plan("layer_norm_bwd", matrix, x.dtype, eps, *chosen("layer_norm_bwd"))
    assert made is not None
    places = (shape, strides), *((columns, contiguous_strides(columns)),) * 2
    out = [empty_strided(*place, x.dtype) if wanted else None for place, wanted in zip(places, wants)]
    operands = contiguous(x, weight, dy, dsum)
    rows, scale, *incoming = map(address, operands)
    mean = stats.data_ptr()
    made.execute(rows, 0, scale, 0, 0, 0, mean, mean + matrix[0] * stats.itemsize, *incoming, *map(address, out))
    return tuple(out)


def _general(
    found: Recipe, dy: Tensor, dsum: MaybeTensor, x: Tensor, stats: Tensor, weight: MaybeTensor, *wants: bool
) -> tuple[MaybeTensor, ...]:
    """Where the gradient is recorded itself, transformed or watched."""
    rows = [None if t is None else t.reshape(found.matrix) for t in (dy, dsum, x)]
    scale = None if weight is None else weight.reshape(found.matrix[1])
    out = backward(*rows, stats[0], stats[1], scale, found.eps, *wants)
    shapes = found.y_shape, found.columns, found.columns
    return tuple(t.reshape(shape) if wanted else None for t, shape, wanted in zip(out, shapes, wants))


# The quick way past Function.apply: see ops/autograd.py.
record: Callable[..., Any] = super(Function, _PlainLayerNorm).apply
