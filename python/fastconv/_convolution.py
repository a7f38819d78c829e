"""conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d and linear, as torch.nn.functional has them.

The usual call (a batch of float32 or float64 images on the CPU, options as ints or pairs) is recognised and dispatched in a few
microseconds; `_general` takes everything else apart, raises what torch raises, or hands over to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import _conv_checks as checks
from . import plan
from ._arguments import INT_MAX
from ._conv_checks import Geometry
from ._routes import autocast, for_torch, overridden, plain_pair
from .ops import _eager
from .ops import conv2d as ops
from .ops import linear as linear_ops
from .ops._conv2d_kernels import Recipe, follow, fwd_recipe
from .ops._dispatch import DTYPES, KERNEL, WITH_HALVES, usual

_dynamo = torch.compiler.is_dynamo_compiling
_eager_conv2d, _eager_linear = _eager.native.eager_conv2d, _eager.native.eager_linear
_get_threads = torch.get_num_threads
_forced = plan.forced.get

Size = int | Sequence[int]
Pair = tuple[int, int]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Convolves `input` (N, C, L) or (C, L) with `weight` (K, C/groups, S): `torch.nn.functional.conv1d`.

    Runs as a conv2d of height 1. See `conv2d` for the options and the errors.
    """
    return _general("conv1d", 1, False, conv1d, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Convolves `input` (N, C, H, W) or (C, H, W) with `weight` (K, C/groups, R, S): `torch.nn.functional.conv2d`.

    bias: (K,). stride, dilation: an int or (height, width), in pixels. padding: the same, or "valid" (none), or "same" (the
    output has the input's size; where the total is odd the extra zero row is at the bottom, the column at the right).

    Returns (N, K, P, Q), or (K, P, Q), channels_last if input or weight is. float32 and float64 on the CPU run on our kernels;
    other dtypes, devices and layouts go to torch (see `fastconv.set_fallback`), and so does autocast, except for float64.

    Raises RuntimeError where shapes, dtypes, devices or values do not fit, TypeError where an argument has the wrong type.
    """
    if not _dynamo():
        y = _eager_conv2d(input, weight, bias, stride, padding, dilation, groups)
        if y is not None:
            return y  # type: ignore[no-any-return]
    how = usual(input, weight, bias)
    if how is not None and _is_option(stride) and _is_option(padding) and _is_option(dilation) and type(groups) is int:
        recipe = conv2d_recipe(
            input.shape, input.stride(), weight.shape, weight.stride(), input.dtype, weight.dtype,
            None if bias is None else bias.shape, None if bias is None else bias.dtype, stride, padding, dilation, groups,
            _get_threads(), _forced().get("conv2d_fwd", ""), plan.strict,
        )  # fmt: skip
        if recipe is not None:
            if how is KERNEL:
                return follow(recipe, input, weight, bias)
            return ops.apply_conv2d(input, weight, bias, recipe)
    if plain_pair(input, weight, bias):
        options = _usual(
            input.shape, weight.shape, None if bias is None else bias.shape, stride, padding, dilation, groups
        )
        if options is not None:
            return ops.conv2d(input, weight, bias, *options, groups)
    return _general("conv2d", 2, False, conv2d, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Convolves `input` (N, C, D, H, W) with `weight` (K, C/groups, T, R, S): `torch.nn.functional.conv3d`, on torch's kernels.

    There are no kernels of our own yet, and `fastconv.fallback_counts` counts the calls.
    """
    if has_torch_function_variadic(input, weight, bias):
        options = stride, padding, dilation, groups
        return overridden(conv3d, F.conv3d, (input, weight, bias), input, weight, bias, *options)  # type: ignore[no-any-return]
    for_torch("conv3d", checks.tensors("conv3d", input, weight, bias), True, "three spatial dimensions")
    return F.conv3d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """Transposed conv1d of `input` (N, C, L) with `weight` (C, K/groups, S): `torch.nn.functional.conv_transpose1d`."""
    options = stride, padding, dilation, groups, output_padding
    return _general("conv_transpose1d", 1, True, conv_transpose1d, input, weight, bias, *options)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """Transposed conv2d of `input` (N, C, H, W) with `weight` (C, K/groups, R, S): `torch.nn.functional.conv_transpose2d`.

    The input gradient of the conv2d with this weight, as a forward operation. Returns (N, K, P, Q) with
    P = (H - 1)·stride - 2·padding + dilation·(R - 1) + output_padding + 1. Dtypes, devices and errors as for `conv2d`.
    """
    options = stride, padding, dilation, groups, output_padding
    return _general("conv_transpose2d", 2, True, conv_transpose2d, input, weight, bias, *options)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input` (*, I) times the transpose of `weight` (O, I), plus `bias` (O,): `torch.nn.functional.linear`.

    Returns (*, O). float32, float64, bfloat16 and float16 on the CPU run on our kernels, which sum the last two in float32 and
    round once. CPU autocast applies as to torch's function. Raises RuntimeError where shapes, dtypes or devices do not fit,
    TypeError where an argument is no tensor.
    """
    if not _dynamo():
        y = _eager_linear(input, weight, bias)
        if y is not None:
            return y  # type: ignore[no-any-return]
    how = usual(input, weight, bias)
    if how is not None:
        recipe = linear_recipe(
            input.shape, weight.shape, weight.stride(), input.dtype, weight.dtype,
            None if bias is None else bias.shape, None if bias is None else bias.dtype,
            _get_threads(), _forced().get("conv2d_fwd", ""), plan.strict,
        )  # fmt: skip
        if recipe is not None:
            if how is KERNEL:
                return linear_ops.follow(recipe, input, weight, bias)
            return linear_ops.apply_linear(input, weight, bias, recipe)
    if plain_pair(input, weight, bias) and _usual_linear(
        input.shape, weight.shape, None if bias is None else bias.shape
    ):
        return linear_ops.linear(input, weight, bias)
    if has_torch_function_variadic(input, weight, bias):
        return overridden(linear, F.linear, (input, weight, bias), input, weight, bias)  # type: ignore[no-any-return]
    tensors = checks.tensors("linear", input, weight, bias)
    if for_torch("linear", tensors, False, dtypes=WITH_HALVES):
        return F.linear(input, weight, bias)
    input, weight, bias = autocast(input, weight, bias)
    checks.check_linear("linear", input, weight, bias)
    if 0 in input.shape or 0 in weight.shape:
        return F.linear(input, weight, bias)
    if not _usual_linear(input.shape, weight.shape, None if bias is None else bias.shape):
        otherwise = "weight is a vector" if weight.dim() == 1 else "bias is broadcast"
        for_torch("linear", tensors, False, otherwise, WITH_HALVES)
        return F.linear(input, weight, bias)
    return linear_ops.linear(input, weight, bias)


def _usual_linear(input: Sequence[int], weight: Sequence[int], bias: Sequence[int] | None) -> bool:
    return (
        len(weight) == 2
        and len(input) > 0
        and input[-1] == weight[1]
        and 0 not in weight
        and 0 not in input
        and (bias is None or (len(bias) == 1 and bias[0] == weight[0]))
    )


@plan.cached
def linear_recipe(
    input: plan.Shape,
    weight: plan.Shape,
    weight_strides: plan.Shape,
    dtype: Any,
    weight_dtype: Any,
    bias: Sequence[int] | None,
    bias_dtype: Any,
    *chosen: Any,
) -> linear_ops.Recipe | None:
    """As `conv2d_recipe`, for linear."""
    if dtype not in WITH_HALVES or weight_dtype is not dtype or (bias is not None and bias_dtype is not dtype):
        return None
    if not _usual_linear(input, weight, bias):
        return None
    return linear_ops.fwd_recipe(input, weight, weight_strides, dtype, bias is not None, *chosen)


def _pair(value: Any, least: int) -> Pair | None:
    """An int or a pair of ints of at least `least`; None where `_general` has to look."""
    if type(value) is int:
        return (value, value) if least <= value <= INT_MAX else None
    if type(value) is tuple and len(value) == 2:
        a, b = value
        if type(a) is int and type(b) is int and least <= a <= INT_MAX and least <= b <= INT_MAX:
            return value
    return None


def _usual(
    input: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> tuple[Pair, tuple[int, int, int, int], Pair] | None:
    """The options in full where this is a valid convolution of a batch of images; None where `_general` has to look."""
    if len(input) != 4 or len(weight) != 4 or type(groups) is not int or groups <= 0:
        return None
    strides, pads, dilations = _pair(stride, 1), _pair(padding, 0), _pair(dilation, 1)
    if strides is None or pads is None or dilations is None:
        return None
    _, C, H, W = input
    K, channels, R, S = weight
    (top, left), (down, across) = pads, dilations
    fits = (
        channels * groups == C
        and K % groups == 0
        and 0 not in weight
        and 0 < H > down * (R - 1) - 2 * top
        and 0 < W > across * (S - 1) - 2 * left
        and C > 0
        and (bias is None or (len(bias) == 1 and bias[0] == K))
    )
    return (strides, (top, top, left, left), dilations) if fits else None


def _is_option(value: Any) -> bool:
    """Whether the value is an int or a pair of ints by type: a key cannot tell 1 from 1.0, and torch does."""
    kind = type(value)
    return kind is int or (kind is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int)


@plan.cached
def conv2d_recipe(
    input: plan.Shape,
    input_strides: plan.Shape,
    weight: plan.Shape,
    weight_strides: plan.Shape,
    dtype: Any,
    weight_dtype: Any,
    bias: plan.Shape | None,
    bias_dtype: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    threads: int,
    force: str,
    strict: bool,
) -> Recipe | None:
    """The recipe of a call as it was written, so that the usual call looks up one key; None where `_general` has to look."""
    if dtype not in DTYPES or weight_dtype is not dtype or (bias is not None and bias_dtype is not dtype):
        return None
    options = _usual(input, weight, bias, stride, padding, dilation, groups)
    if options is None:
        return None
    return fwd_recipe(
        input, input_strides, weight, weight_strides, dtype, *options, groups, bias is not None, None, "none",
        threads, force, strict,
    )  # fmt: skip


def _general(
    op: str,
    dims: int,
    transposed: bool,
    ours: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    output_padding: Any = 0,
) -> Tensor:
    """Any convolution that is not the usual one: overridden, for torch, wrong, or in need of another shape first."""
    theirs = getattr(F, op)
    options = (stride, padding, output_padding, groups, dilation) if transposed else (stride, padding, dilation, groups)
    if has_torch_function_variadic(input, weight, bias):
        return overridden(ours, theirs, (input, weight, bias), input, weight, bias, *options)  # type: ignore[no-any-return]
    tensors = checks.tensors(op, input, weight, bias)
    if for_torch(op, tensors, True):
        return theirs(input, weight, bias, *options)  # type: ignore[no-any-return]

    # The CPU's has been for torch: this casts what lies on a GPU.
    input, weight, bias = autocast(input, weight, bias)
    checks.check_dtypes(op, input, weight, bias)
    checks.check_ranks(op, dims, input, weight)
    g = checks.geometry(op, dims, weight, stride, padding, dilation, groups, output_padding)
    batched = input.dim() == dims + 2
    x = input if batched else input.unsqueeze(0)
    checks.check_shapes(op, transposed, x, weight, bias, g.groups)
    if transposed:
        checks.check_transposed_extent(op, x, weight, g)
    else:
        checks.check_extent(op, x, weight, g)
    # No kernel runs where there is nothing to compute, and torch knows the odd shape that it gives the result.
    if 0 in input.shape[1:] or 0 in weight.shape or (transposed and input.numel() == 0):
        return theirs(input, weight, bias, *options)  # type: ignore[no-any-return]
    if g.huge():
        for_torch(op, tensors, True, "an option beyond 31 bits")
        return theirs(input, weight, bias, *options)  # type: ignore[no-any-return]

    if dims == 1:
        # Like torch: a strided sequence counts as contiguous, whatever the weight's strides say.
        x, weight = x.contiguous().unsqueeze(2), weight.unsqueeze(2)
        g = g.two_dimensional()
    y = _transposed(x, weight, bias, g) if transposed else _forward(x, weight, bias, g)
    if dims == 1:
        y = y.squeeze(2)
    return y if batched else y.squeeze(0)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    (top, left), (bottom, right) = g.before, g.after
    return ops.conv2d(x, weight, bias, _two(g.stride), (top, bottom, left, right), _two(g.dilation), g.groups)


def _transposed(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    windows = _two(g.stride), _two(g.before), _two(g.output_padding)
    return ops.conv_transpose2d(x, weight, bias, *windows, g.groups, _two(g.dilation))


def _two(values: tuple[int, ...]) -> Pair:
    height, width = values
    return height, width
