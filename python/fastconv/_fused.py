"""A convolution, and a linear layer, with all that their kernels can do on the way: four sides' padding, addition, activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._convolution import conv2d as plain_conv2d
from ._convolution import linear as plain_linear
from ._padding import Quad
from ._routes import on_gpu as kernels_on_gpu
from ._routes import plain, plain_pair
from .ops import _frozen_linear
from .ops import conv2d as ops
from .ops._conv2d_kernels import Geometry, find_frozen, run_frozen
from .ops._cuda import linear_fused
from .ops._dispatch import KERNEL, usual, way
from .ops._eager import Answer, native
from .ops._packed import PackedFilters

Pair = tuple[int, int]

ACTIVATIONS = ops.ACTIVATIONS

_dynamo = torch.compiler.is_dynamo_compiling
_eager_conv2d = native.eager_frozen_conv2d
_eager_linear = native.eager_frozen_linear


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(conv(input, weight) + bias + residual) for tensors of any kind; the options are those of a valid layer.

    input (N, C, H, W) or (C, H, W), weight (K, C/groups, R, S), bias (K), residual what can be added to the result; padding, at
    least 0, is (top, bottom, left, right). activation: "none" or one of ACTIVATIONS. On float32 and float64 CPU tensors this is
    one call of a kernel. Everything else takes the steps one by one through `fastconv.functional`, whose routes and errors apply;
    only there are sides that differ padded by a copy.
    """
    if _in_one(input, weight, bias, residual, stride, padding, dilation, groups):
        return ops.conv2d(input, weight, bias, stride, padding, dilation, groups, residual, activation)
    top, bottom, left, right = padding
    pads = top, left
    if (top, left) != (bottom, right):
        input, pads = F.pad(input, (left, right, top, bottom)), (0, 0)
    return _finished(plain_conv2d(input, weight, bias, stride, pads, dilation, groups), residual, activation)


def frozen_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: PackedFilters,
    geometry: Geometry,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`conv2d` with a weight that does not change, which kernels find in ``kept`` in the order that they want."""
    if not _dynamo():
        y: Tensor | None = _eager_conv2d(input, weight, bias, residual, kept, *geometry, activation)
        if y is not None:
            return y
    if _in_one(input, weight, bias, residual, *geometry) and way(input, weight, bias, residual) is KERNEL:
        return run_frozen(input, weight, bias, residual, kept, geometry, activation)
    return conv2d(input, weight, bias, *geometry, residual, activation)


def frozen_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: PackedFilters,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(linear(input, weight) + bias + residual), with a weight that does not change, for tensors of any kind.

    input (..., I), weight (O, I), bias (O), residual what can be added to the result (..., O). As `frozen_conv2d`: one call of
    a kernel where nothing asks for another way, otherwise steps through `fastconv.functional`.
    """
    if not _dynamo():
        y: Tensor | None = _eager_linear(input, weight, bias, residual, kept, activation)
        if y is not None:
            return y
    if usual(input, weight, bias) is KERNEL and (residual is None or usual(residual, weight, None) is KERNEL):
        recipe = _frozen_linear.find(input, weight, bias, residual, activation)
        if recipe is not None:
            return _frozen_linear.follow(recipe, input, weight, bias, residual, kept)
    if _linear_in_one(input, weight, bias, residual):
        return linear_fused(input, weight, bias, residual, activation)
    return _finished(plain_linear(input, weight, bias), residual, activation)


def _linear_in_one(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether this is a valid layer on a GPU of which nobody wants a derivative."""
    if input.is_cpu or not kernels_on_gpu("linear", input, weight, bias, residual):
        return False
    given = [t for t in (input, weight, bias, residual) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    if input.dim() < 1 or weight.dim() != 2 or input.shape[-1] != weight.shape[1] or 0 in (*input.shape, *weight.shape):
        return False
    y = (*input.shape[:-1], weight.shape[0])
    return (bias is None or bias.shape == weight.shape[:1]) and (residual is None or tuple(residual.shape) == y)


def _finished(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """An epilogue step by step."""
    y = y if residual is None else y + residual
    return y if activation == "none" else ACTIVATIONS[activation](y)


def _in_one(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
) -> bool:
    """Whether this is a valid convolution of a batch of plain images, with a residual of the result's shape."""
    on_gpu = not input.is_cpu and kernels_on_gpu("conv2d", input, weight, bias, residual)
    if not (on_gpu or plain_pair(input, weight, bias)) or input.dim() != 4 or weight.dim() != 4:
        return False
    (N, C, H, W), (K, channels, R, S) = input.shape, weight.shape
    top, bottom, left, right = padding
    P = (H + top + bottom - dilation[0] * (R - 1) - 1) // stride[0] + 1
    Q = (W + left + right - dilation[1] * (S - 1) - 1) // stride[1] + 1
    if channels * groups != C or K % groups or min(C, H, W, P, Q) < 1 or 0 in weight.shape:
        return False
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != K):
        return False
    return residual is None or (
        (on_gpu or plain(residual)) and residual.dtype is input.dtype and tuple(residual.shape) == (N, K, P, Q)
    )


# ---- What csrc/eager asks for when it meets a call for the first time; see _resolvers.py ------------------------------


def _resolve_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kept: PackedFilters,
    stride: Pair, padding: Quad, dilation: Pair, groups: int, activation: str,
) -> Answer | None:  # fmt: skip
    geometry = stride, padding, dilation, groups
    if activation not in ("none", *ACTIVATIONS) or not _in_one(input, weight, bias, residual, *geometry):
        return None
    recipe = find_frozen(input, weight, bias, residual, geometry, activation)
    if recipe.plan is None or recipe.copy_a is not None or recipe.copy_b is not None:
        return None
    if bias is not None and not bias.is_contiguous():
        return None
    return recipe.plan.native, recipe.out_shape, recipe.out_strides, recipe.plan


def _resolve_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kept: PackedFilters, activation: str
) -> Answer | None:
    if activation not in ("none", *ACTIVATIONS):
        return None
    recipe = _frozen_linear.find(input, weight, bias, residual, activation)
    if recipe is None or recipe.plan is None:
        return None
    if not all(t is None or t.is_contiguous() for t in (input, bias, residual)):
        return None
    return recipe.plan.native, recipe.y_shape, recipe.y_strides, recipe.plan


native.eager_register("frozen_conv2d", _resolve_conv2d, PackedFilters.for_recipe)
native.eager_register("frozen_linear", _resolve_linear, PackedFilters.for_recipe)
