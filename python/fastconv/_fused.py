"""A convolution with everything that its kernels can do on the way: padding on four sides, an addition, an activation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._convolution import conv2d as plain_conv2d
from ._padding import Quad
from ._routes import plain, plain_pair
from .ops import conv2d as ops
from .ops._conv2d_kernels import Geometry, run_frozen
from .ops._dispatch import KERNEL, way
from .ops._packed import PackedFilters

Pair = tuple[int, int]

ACTIVATIONS = ops.ACTIVATIONS


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
    y = plain_conv2d(input, weight, bias, stride, pads, dilation, groups)
    if residual is not None:
        y = y + residual
    return y if activation == "none" else ACTIVATIONS[activation](y)


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
    if _in_one(input, weight, bias, residual, *geometry) and way(input, weight, bias, residual) is KERNEL:
        return run_frozen(input, weight, bias, residual, kept, geometry, activation)
    return conv2d(input, weight, bias, *geometry, residual, activation)


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
    if not plain_pair(input, weight, bias) or input.dim() != 4 or weight.dim() != 4:
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
        plain(residual) and residual.dtype is input.dtype and tuple(residual.shape) == (N, K, P, Q)
    )
