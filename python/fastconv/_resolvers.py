"""What csrc/eager asks for when it meets a call of functional.py for the first time: the plan, and the output to allocate.

A resolver gets the arguments of the call, which are of the right types already, and answers None where the call has to go through
Python every time: the arguments are not valid or not the usual ones, an operand needs a copy first, there is nothing to compute.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._attention import prepare
from ._convolution import conv2d_recipe, linear_recipe
from ._pooling import avg_recipe, c_pair, max_recipe, usual_windows
from .ops import avg_pool2d, layer_norm, linear, pool2d, sdpa
from .ops._conv2d_kernels import Recipe
from .ops._eager import Answer, native
from .ops._recorded import RECORDERS
from .ops.pool2d import chosen


def _resolve_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Answer | None:
    """What csrc/eager keeps for a call that it has not met: a recipe that needs no copy, or None."""
    recipe: Recipe | None = conv2d_recipe(
        input.shape, input.stride(), weight.shape, weight.stride(), input.dtype, weight.dtype,
        None if bias is None else bias.shape, None if bias is None else bias.dtype, stride, padding, dilation, groups,
        *chosen("conv2d_fwd"),
    )  # fmt: skip
    if recipe is None or recipe.plan is None or recipe.copy_a is not None:
        return None
    if bias is not None and not bias.is_contiguous():
        return None
    return recipe.plan.native, recipe.out_shape, recipe.out_strides, recipe.forward


def _resolve_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Answer | None:
    """The same for linear."""
    recipe: linear.Recipe | None = linear_recipe(
        input.shape, weight.shape, weight.stride(), input.dtype, weight.dtype,
        None if bias is None else bias.shape, None if bias is None else bias.dtype,
        *chosen("conv2d_fwd"),
    )  # fmt: skip
    if recipe is None or recipe.plan is None or not input.is_contiguous():
        return None
    if bias is not None and not bias.is_contiguous():
        return None
    return recipe.plan.native, recipe.y_shape, recipe.y_strides, recipe.y_shape


def _answer(recipe: pool2d.Recipe | None, input: Tensor, *options: Any) -> Answer | None:
    """What csrc/eager keeps for a call that it has not met, or None. The options are those of the op's backward pass."""
    if recipe is None:
        return None
    shape, strides, made = recipe
    if made is None:
        return None
    return made.native, shape, strides, (tuple(input.shape), pool2d.channels_last(input), *options)


def _resolve_max(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Answer | None:
    options = kernel_size, stride, padding, dilation, ceil_mode
    return _answer(max_recipe(input.shape, input.stride(), input.dtype, *options, *chosen("max_pool2d_fwd")), input)


def _resolve_avg(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool
) -> Answer | None:
    options = ceil_mode, count_include_pad
    windows = usual_windows(input.shape, kernel_size, stride, padding, 1, ceil_mode)
    if windows is None:
        return None
    what = input.shape, input.stride(), input.dtype, *windows[:3], *options
    return _answer(avg_recipe(*what, *chosen("avg_pool2d_fwd")), input, *windows[:3], *options, None)


def _resolve_adaptive_avg(input: Tensor, output_size: Any) -> Answer | None:
    size = c_pair(output_size)
    if size is None or min(size) < 1 or input.dim() != 4:
        return None
    what = input.shape, input.stride(), input.dtype, size, chosen("avg_pool2d_fwd")
    return _answer(avg_pool2d.adaptive_recipe(*what), input)


def _resolve_layer_norm(
    input: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Answer | None:
    affine = [t for t in (weight, bias) if t is not None]
    rows = [input] if residual is None else [input, residual]
    if not shape or input.shape[-len(shape) :] != shape or any(t.shape != shape for t in affine):
        return None
    if rows[-1].shape != input.shape or not all(t.is_contiguous() for t in (*rows, *affine)):
        return None
    found: layer_norm.Recipe | None = layer_norm.recipe(
        input.shape, len(shape), input.dtype, eps, *chosen("layer_norm_fwd")
    )
    return None if found is None else (found.plan.native, found.y_shape, found.y_strides, None)


def _resolve_sdpa(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Answer | None:
    if not query.dim() == key.dim() == value.dim() == 4:
        return None
    _, given, options = prepare(query, key, value, None, 0.0, is_causal, (scale, enable_gqa), {})
    four = given.q, given.k, given.v
    if any(t.data_ptr() != own.data_ptr() for t, own in zip((query, key, value), four)):
        return None  # heads were repeated into new memory
    out = sdpa.output(given.q, given.v)
    found = sdpa.find("sdpa_fwd", options, {"q": given.q, "k": given.k, "v": given.v, "out": out})
    return None if found is None else (found.native, tuple(out.shape), out.stride(), None)


# Where a gradient is wanted, nobody takes over: the call goes on in Python.
native.eager_register("layer_norm", _resolve_layer_norm, None)
native.eager_register("sdpa", _resolve_sdpa, None)

for _name, _resolver in (
    ("conv2d", _resolve_conv2d),
    ("linear", _resolve_linear),
    ("max_pool2d", _resolve_max),
    ("avg_pool2d", _resolve_avg),
    ("adaptive_avg_pool2d", _resolve_adaptive_avg),
):
    native.eager_register(_name, _resolver, RECORDERS[_name])
