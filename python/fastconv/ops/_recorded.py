"""The autograd.Functions of csrc/eager's calls: both passes of the usual recorded call are C functions.

What is not usual in a backward pass (it is recorded itself, watched, or its gradient has odd strides) goes on in Python, with the
rules of the other Functions. A forward pass is only ever made by csrc/eager, in plain eager mode without tangents, so there is no
rule for forward mode or vmap here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _conv2d_kernels as kernels
from . import avg_pool2d, conv2d, linear, max_pool2d, pool2d
from ._eager import Answer, native

_dynamo = torch.compiler.is_dynamo_compiling
_register = native.eager_register
_chosen = pool2d.chosen


class _Conv2d(Function):
    forward = staticmethod(native.eager_record_product)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        grads = None if _dynamo() else native.eager_backward_conv2d(ctx, dy)
        return _conv2d_backward(ctx, dy, ctx.saved_tensors) if grads is None else grads


def _conv2d_backward(ctx: Any, dy: Tensor | None, saved: tuple[Tensor | None, ...]) -> Any:
    return *conv2d.gradients(dy, saved, ctx.needs_input_grad, ctx.recipe.info), None


def _resolve_conv2d_dgrad(of: kernels.Forward, dy: Tensor, w: Tensor) -> Answer | None:
    recipe = kernels.find_dgrad(dy, w, of.x_shape, of.x_last, *of.geometry)
    if recipe.plan is None or recipe.copy_a is not None:
        return None
    return recipe.plan.native, recipe.out_shape, recipe.out_strides, None


def _resolve_conv2d_wgrad(of: kernels.Forward, dy: Tensor, x: Tensor, with_bias: bool) -> Answer | None:
    recipe = kernels.find_wgrad(dy, x, of.w_shape, of.w_last, with_bias, *of.geometry)
    if recipe.plan is None or recipe.copy_a is not None or recipe.copy_b is not None:
        return None
    return recipe.plan.native, recipe.out_shape, recipe.out_strides, ((of.w_shape[0],), (1,))


class _Linear(Function):
    forward = staticmethod(native.eager_record_product)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        grads = None if _dynamo() else native.eager_backward_linear(ctx, dy)
        return _linear_backward(ctx, dy, ctx.saved_tensors) if grads is None else grads


def _linear_backward(ctx: Any, dy: Tensor | None, saved: tuple[Tensor | None, ...]) -> Any:
    return *linear.gradients(dy, saved, ctx.needs_input_grad), None


def _resolve_linear_dgrad(_: Any, dy: Tensor, w: Tensor) -> Answer | None:
    made = linear.find_dgrad(dy, w) if dy.is_contiguous() else None
    if made is None:
        return None
    shape = (*dy.shape[:-1], w.shape[1])
    return made.native, shape, linear.contiguous_strides(shape), None


def _resolve_linear_wgrad(_: Any, dy: Tensor, x: Tensor, with_bias: bool) -> Answer | None:
    made = linear.find_wgrad(dy, x, with_bias) if dy.is_contiguous() and x.is_contiguous() else None
    if made is None:
        return None
    outputs, inputs = dy.shape[-1], x.shape[-1]
    return made.native, (outputs, inputs), (inputs, 1), ((outputs,), (1,))


class _MaxPool2d(Function):
    forward = staticmethod(native.eager_record_max)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        grads = None if _dynamo() else native.eager_backward_max_pool2d(ctx, dy)
        return _max_backward(ctx, dy, ctx.saved_tensors) if grads is None else grads


def _max_backward(ctx: Any, dy: Tensor | None, saved: tuple[Tensor, ...]) -> Any:
    return None if dy is None else max_pool2d.backward(dy, saved[0], *ctx.recipe.info), None


def _resolve_max_bwd(what: tuple[Any, ...], dy: Tensor) -> Answer | None:
    x_size, last = what
    return _pool_answer(max_pool2d.bwd_recipe(dy.shape, dy.stride(), dy.dtype, x_size, last, _chosen("max_pool2d_bwd")))


class _AvgPool2d(Function):
    forward = staticmethod(native.eager_record_avg)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        grads = None if _dynamo() else native.eager_backward_avg_pool2d(ctx, dy)
        return _avg_backward(ctx, dy, ()) if grads is None else grads


def _avg_backward(ctx: Any, dy: Tensor | None, _: tuple[()]) -> Any:
    return None if dy is None else avg_pool2d.backward(dy, *ctx.recipe.info), None


def _resolve_avg_bwd(what: tuple[Any, ...], dy: Tensor) -> Answer | None:
    x_size, last, kernel, stride, padding, _, count_include_pad, divisor = what
    options = x_size, last, kernel, stride, padding, count_include_pad, divisor
    return _pool_answer(avg_pool2d.bwd_recipe(dy.shape, dy.stride(), dy.dtype, *options, _chosen("avg_pool2d_bwd")))


class _AdaptiveAvgPool2d(Function):
    forward = staticmethod(native.eager_record_avg)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        grads = None if _dynamo() else native.eager_backward_adaptive_avg_pool2d(ctx, dy)
        return _adaptive_avg_backward(ctx, dy, ()) if grads is None else grads


def _adaptive_avg_backward(ctx: Any, dy: Tensor | None, _: tuple[()]) -> Any:
    return None if dy is None else avg_pool2d.adaptive_backward(dy, *ctx.recipe.info), None


def _resolve_adaptive_avg_bwd(what: tuple[Any, ...], dy: Tensor) -> Answer | None:
    x_size, last = what
    return _pool_answer(
        avg_pool2d.adaptive_bwd_recipe(dy.shape, dy.stride(), dy.dtype, x_size, last, _chosen("avg_pool2d_bwd"))
    )


def _pool_answer(recipe: pool2d.Recipe) -> Answer | None:
    shape, strides, made = recipe
    return None if made is None else (made.native, shape, strides, None)


def apply(function: Any) -> Callable[..., Any]:
    """The C function below Function.apply, see ops/conv2d.py."""
    # The context's class, with a slot for what the forward pass leaves, or each call would make a dict for it; and with the
    # backward pass in the place of the method that looks for it in every call.
    base = function._backward_cls
    function._backward_cls = type(base.__name__, (base,), {"__slots__": ("recipe",), "apply": function.backward})
    return super(Function, function).apply  # type: ignore[no-any-return]


RECORDERS = {
    "conv2d": apply(_Conv2d),
    "linear": apply(_Linear),
    "max_pool2d": apply(_MaxPool2d),
    "avg_pool2d": apply(_AvgPool2d),
    "adaptive_avg_pool2d": apply(_AdaptiveAvgPool2d),
}

_register("conv2d_dgrad", _resolve_conv2d_dgrad, _conv2d_backward)
_register("conv2d_wgrad", _resolve_conv2d_wgrad, None)
_register("linear_dgrad", _resolve_linear_dgrad, _linear_backward)
_register("linear_wgrad", _resolve_linear_wgrad, None)
_register("max_pool2d_bwd", _resolve_max_bwd, _max_backward)
_register("avg_pool2d_bwd", _resolve_avg_bwd, _avg_backward)
_register("adaptive_avg_pool2d_bwd", _resolve_adaptive_avg_bwd, _adaptive_avg_backward)
