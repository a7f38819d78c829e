"""conv2d and conv_transpose2d with derivatives of every order, forward mode and vmap.

The three `autograd.Function`s stand outside the registered ops: in eager mode that costs a fraction of an autograd kernel behind
the dispatcher. Compiled code sees the ops, to which the same rules are registered at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import prefers_channels_last
from . import _conv2d_kernels as kernels
from ._conv2d_kernels import (
    Forward,
    Pair,
    Quad,
    Recipe,
    Shape,
    find_fwd,
    follow,
    library,
    run_dgrad,
    run_fwd,
    run_wgrad,
)
from ._dispatch import FUNCTION, KERNEL, OP, TRANSFORM, Way, rule_of_op, way

Context: TypeAlias = Any  # torch.autograd.function.FunctionCtx, which takes any attribute
Grads: TypeAlias = tuple[Tensor | None, ...]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


# ---- Public ---------------------------------------------------------------------------------------------------------------


def conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(conv(x, w) + bias + residual) on checked arguments; `functional.conv2d` is for everybody else.

    x (N, C, H, W), w (K, C/groups, R, S), bias (K), residual and result (N, K, P, Q): float32 or float64, any strides. Padding is
    (top, bottom, left, right). The result is channels_last if x or w is, as torch's. Where a derivative is wanted, residual and
    activation are steps of their own, whose gradients need the values between.
    """
    how = way(x, w, bias, residual)
    if how is KERNEL:
        return run_fwd(x, w, bias, residual, stride, padding, dilation, groups, activation)
    if residual is None and activation == "none":
        return _conv2d(how, x, w, bias, stride, padding, dilation, groups)
    if how is OP and not (torch.is_grad_enabled() and _any_requires_grad(x, w, bias, residual)):
        return kernels.fwd_op(x, w, bias, residual, stride, padding, dilation, groups, activation)
    y = _conv2d(how, x, w, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y + residual
    return y if activation == "none" else ACTIVATIONS[activation](y)


def conv_transpose2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    groups: int,
    dilation: Pair,
) -> Tensor:
    """The transposed convolution on checked arguments: the input gradient of the convolution that has this weight.

    x (N, K, P, Q), w (K, C/groups, R, S), bias (C), result (N, C, H, W) with H = (P-1)*stride - 2*padding + dilation*(R-1) +
    output_padding + 1. The result is channels_last if x or w is.
    """
    (N, _, P, Q), (_, C, R, S) = x.shape, w.shape
    H = (P - 1) * stride[0] - 2 * padding[0] + dilation[0] * (R - 1) + output_padding[0] + 1
    W = (Q - 1) * stride[1] - 2 * padding[1] + dilation[1] * (S - 1) + output_padding[1] + 1
    # Output padding is rows that the convolution does not look at: less padding at the bottom, so that P and Q come out again
    # even where output_padding >= stride, which torch allows while it is less than the dilation.
    four = (padding[0], padding[0] - output_padding[0], padding[1], padding[1] - output_padding[1])
    last = _is_last(x) or _is_last(w)
    return _dgrad(way(x, w, bias), x, w, bias, (N, C * groups, H, W), last, stride, four, dilation, groups)


# ---- The three ops with derivatives -----------------------------------------------------------------------------------------


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _is_last(t: Tensor) -> bool:
    return prefers_channels_last(t.shape, t.stride())


def _conv2d(how: Way, *args: Any) -> Tensor:
    if how is TRANSFORM:
        return _transform_conv2d(*args)
    x, w, bias, stride, padding, dilation, groups = args
    if how is FUNCTION:
        return apply_conv2d(x, w, bias, find_fwd(x, w, bias, None, stride, padding, dilation, groups, "none"))
    call = run_fwd if how is KERNEL else kernels.fwd_op
    return call(x, w, bias, None, stride, padding, dilation, groups, "none")


def _dgrad(how: Way, *args: Any) -> Tensor:
    if how is FUNCTION:
        return _apply_dgrad(*args)
    if how is TRANSFORM:
        return _transform_dgrad(*args)
    return run_dgrad(*args) if how is KERNEL else kernels.dgrad_op(*args)


def _wgrad(how: Way, *args: Any) -> tuple[Tensor, Tensor]:
    if how is FUNCTION:
        return _apply_wgrad(*args)
    if how is TRANSFORM:
        return _transform_wgrad(*args)
    return run_wgrad(*args) if how is KERNEL else kernels.wgrad_op(*args)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """vmap: `t` with the mapped dimension first; a shared tensor is expanded."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _into_batch(t: Tensor, dim: int | None, size: int) -> Tensor:
    """vmap: (B, N, ...) as (B*N, ...)."""
    return _front(t, dim, size).flatten(0, 1)


def _into_channels(t: Tensor, dim: int | None, size: int) -> Tensor:
    """vmap: (B, N, C, ...) as (N, B*C, ...), for B times as many groups."""
    return _front(t, dim, size).movedim(0, 1).flatten(1, 2)


def _add_channels(t: Tensor, bias: Tensor, dim: int, size: int) -> Tensor:
    """vmap: adds a mapped bias (B, C) to t (B, N, C, ...)."""
    return t + _front(bias, dim, size)[:, None, :, None, None]


def _remember(ctx: Context, x: Tensor, w: Tensor, of: Forward) -> None:
    """What the derivatives of conv(x, w) need. A gradient needs the other operand only: a frozen network keeps no activations."""
    need_dx, need_dw = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_dw else None, w if need_dx else None)
    ctx.save_for_forward(x, w)
    ctx.set_materialize_grads(False)
    ctx.of = of


def gradients(
    dy: Tensor | None, saved: tuple[Tensor | None, ...], needs: tuple[bool, ...], of: Forward
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw and db of a convolution with the saved (x, w), each where it is needed."""
    dx = dw = db = None
    if dy is not None:
        x, w = saved
        x_shape, w_shape, _, x_last, w_last, geometry = of
        need_dx, need_dw, need_db = needs[:3]
        if need_dx:
            dx = _dgrad(way(dy, w), dy, w, None, x_shape, x_last, *geometry)
        if need_dw:
            dw, db = _wgrad(way(dy, x), dy, x, w_shape, w_last, need_db, *geometry)
        elif need_db:
            db = dy.sum((0, 2, 3))
    return dx, dw, db if needs[2] else None


class _Conv2d(torch.autograd.Function):
    """y = conv(x, w) + bias."""

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, bias: Tensor | None, stride: Pair, padding: Quad, dilation: Pair, groups: int
    ) -> Tensor:
        return kernels.fwd(x, w, bias, None, stride, padding, dilation, groups, "none")

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _, *geometry = inputs
        w_last = _is_last(w)
        _remember(ctx, x, w, Forward(x.shape, w.shape, output.shape, w_last or _is_last(x), w_last, tuple(geometry)))

    @staticmethod
    def backward(ctx: Context, dy: Tensor | None) -> Grads:
        return *gradients(dy, ctx.saved_tensors, ctx.needs_input_grad, ctx.of), None, None, None, None

    @staticmethod
    def jvp(ctx: Context, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None) -> Tensor | None:
        x, w = ctx.saved_tensors
        ty = None if tx is None else _conv2d(way(tx, w), tx, w, None, *ctx.of.geometry)
        ty = _sum(ty, None if tw is None else _conv2d(way(x, tw), x, tw, None, *ctx.of.geometry))
        return _sum(ty, None if tb is None else tb[:, None, None].expand(ctx.of.y_shape))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        x, w, bias, stride, padding, dilation, groups = args
        x_dim, w_dim, bias_dim = in_dims[:3]
        size, K = info.batch_size, w.shape[0 if w_dim is None or w_dim > 0 else 1]
        if w_dim is None:
            x = _into_batch(x, x_dim, size)
            shared = bias if bias_dim is None else None
            y = _conv2d(way(x, w, shared), x, w, shared, stride, padding, dilation, groups)
            y = y.unflatten(0, (size, y.shape[0] // size))
            return y if bias_dim is None else _add_channels(y, bias, bias_dim, size), 0
        w = _into_batch(w, w_dim, size)
        bias = None if bias is None else _front(bias, bias_dim, size).flatten()
        if x_dim is not None or groups > 1:
            x, groups = _into_channels(x, x_dim, size), size * groups
        y = _conv2d(way(x, w, bias), x, w, bias, stride, padding, dilation, groups)
        return y.unflatten(1, (size, K)), 1


class _Dgrad(torch.autograd.Function):
    """dx = the gradient for x, plus a bias for each of its channels."""

    @staticmethod
    def forward(
        dy: Tensor, w: Tensor, bias: Tensor | None, x_shape: Shape, channels_last: bool,
        stride: Pair, padding: Quad, dilation: Pair, groups: int,
    ) -> Tensor:  # fmt: skip
        return kernels.dgrad(dy, w, bias, x_shape, channels_last, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, w, _, _, _, *ctx.geometry = inputs
        need_dy, need_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(dy if need_w else None, w if need_dy else None)
        ctx.save_for_forward(dy, w)
        ctx.inputs = inputs[3:]
        ctx.w_shape = w.shape
        ctx.w_last = _is_last(w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Context, g: Tensor | None) -> Grads:
        g_dy = g_w = g_bias = None
        if g is not None:
            dy, w = ctx.saved_tensors
            if ctx.needs_input_grad[0]:
                g_dy = _conv2d(way(g, w), g, w, None, *ctx.geometry)
            if ctx.needs_input_grad[1]:
                g_w, _ = _wgrad(way(dy, g), dy, g, ctx.w_shape, ctx.w_last, False, *ctx.geometry)
            if ctx.needs_input_grad[2]:
                g_bias = g.sum((0, 2, 3))
        return g_dy, g_w, g_bias, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Context, t_dy: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None) -> Tensor | None:
        dy, w = ctx.saved_tensors
        t = None if t_dy is None else _dgrad(way(t_dy, w), t_dy, w, None, *ctx.inputs)
        t = _sum(t, None if tw is None else _dgrad(way(dy, tw), dy, tw, None, *ctx.inputs))
        return _sum(t, None if tb is None else tb[:, None, None].expand(ctx.inputs[0]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        dy, w, bias, (N, C, H, W), last, stride, padding, dilation, groups = args
        dy_dim, w_dim, bias_dim = in_dims[:3]
        size = info.batch_size
        if w_dim is None:
            dy = _into_batch(dy, dy_dim, size)
            shared = bias if bias_dim is None else None
            how = way(dy, w, shared)
            dx = _dgrad(how, dy, w, shared, (size * N, C, H, W), last, stride, padding, dilation, groups)
            dx = dx.unflatten(0, (size, N))
            return dx if bias_dim is None else _add_channels(dx, bias, bias_dim, size), 0
        dy, w = _into_channels(dy, dy_dim, size), _into_batch(w, w_dim, size)
        bias = None if bias is None else _front(bias, bias_dim, size).flatten()
        how = way(dy, w, bias)
        dx = _dgrad(how, dy, w, bias, (N, size * C, H, W), last, stride, padding, dilation, size * groups)
        return dx.unflatten(1, (size, C)), 1


class _Wgrad(torch.autograd.Function):
    """(dw, db) = the gradients for w and, if with_bias, for the bias; else db has length 0."""

    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, w_shape: Shape, channels_last: bool, with_bias: bool,
        stride: Pair, padding: Quad, dilation: Pair, groups: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return kernels.wgrad(dy, x, w_shape, channels_last, with_bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        dy, x, _, _, ctx.with_bias, *ctx.geometry = inputs
        need_dy, need_x = ctx.needs_input_grad[:2]
        ctx.save_for_backward(dy if need_x else None, x if need_dy else None)
        ctx.save_for_forward(dy, x)
        ctx.inputs = inputs[2:]
        ctx.x_shape, ctx.y_shape = x.shape, dy.shape
        ctx.x_last = _is_last(x)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Context, g_dw: Tensor | None, g_db: Tensor | None) -> Grads:
        dy, x = ctx.saved_tensors
        g_dy = g_x = None
        if not ctx.with_bias:
            g_db = None
        if g_dw is not None:
            if ctx.needs_input_grad[0]:
                g_dy = _conv2d(way(x, g_dw, g_db), x, g_dw, g_db, *ctx.geometry)
            if ctx.needs_input_grad[1]:
                g_x = _dgrad(way(dy, g_dw), dy, g_dw, None, ctx.x_shape, ctx.x_last, *ctx.geometry)
        elif g_db is not None and ctx.needs_input_grad[0]:
            g_dy = g_db[:, None, None].expand(ctx.y_shape)
        return g_dy, g_x, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Context, t_dy: Tensor | None, tx: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor]:
        dy, x = ctx.saved_tensors
        t_dw = None
        # torch has no word for "this output does not move": zeros, while the other output does.
        t_db = dy.new_zeros(ctx.y_shape[1] if ctx.with_bias else 0)
        if t_dy is not None:
            t_dw, t_db = _wgrad(way(t_dy, x), t_dy, x, *ctx.inputs)
        if tx is not None:
            t_dw = _sum(t_dw, _wgrad(way(dy, tx), dy, tx, *ctx.inputs)[0])
        return t_dw, t_db

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
        dy, x, (K, C, R, S), last, with_bias, stride, padding, dilation, groups = args
        size = info.batch_size
        dy, x = _into_channels(dy, in_dims[0], size), _into_channels(x, in_dims[1], size)
        w_shape = (size * K, C, R, S)
        dw, db = _wgrad(way(dy, x), dy, x, w_shape, last, with_bias, stride, padding, dilation, size * groups)
        if not with_bias:
            return (dw.unflatten(0, (size, K)), db), (0, None)
        return (dw.unflatten(0, (size, K)), db.unflatten(0, (size, K))), (0, 0)


class _PlainConv2d(torch.autograd.Function):
    """_Conv2d in plain eager mode, where the recipe is known and nothing transforms: half the work of a call."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, w: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
        _remember(ctx, x, w, recipe.forward)
        return follow(recipe, x, w, bias)

    @staticmethod
    def backward(ctx: Context, dy: Tensor | None) -> Grads:
        return _Conv2d.backward(ctx, dy)[:4]

    jvp = _Conv2d.jvp


# Function.apply binds its arguments through inspect.signature whenever setup_context is defined (65 of 80 us a call, measured),
# which is for default arguments; these have none. Below it is the same C function.
apply_conv2d: Callable[..., Tensor] = super(torch.autograd.Function, _PlainConv2d).apply
_apply_dgrad: Callable[..., Tensor] = super(torch.autograd.Function, _Dgrad).apply
_apply_wgrad: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, _Wgrad).apply

# Transforms need what apply adds.
_transform_conv2d: Callable[..., Tensor] = _Conv2d.apply
_transform_dgrad: Callable[..., Tensor] = _Dgrad.apply
_transform_wgrad: Callable[..., tuple[Tensor, Tensor]] = _Wgrad.apply


# ---- The same rules for the registered ops ----------------------------------------------------------------------------------


def _tuples(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The dispatcher hands over sizes as lists; recipes are looked up by tuples."""
    return tuple(tuple(value) if isinstance(value, list) else value for value in inputs)


def _setup_fwd(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, bias, _, *geometry, activation = _tuples(inputs)
    if activation != "none":
        raise NotImplementedError(
            f"fastconv::conv2d_fwd has no gradient with activation='{activation}'; call fastconv.functional.conv2d, which "
            "applies the activation as a step of its own where a gradient is wanted"
        )
    _Conv2d.setup_context(ctx, (x, w, bias, *geometry), output)


def _setup_dgrad(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    _Dgrad.setup_context(ctx, _tuples(inputs), output)


def _setup_wgrad(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _Wgrad.setup_context(ctx, _tuples(inputs), output)


def _backward_fwd(ctx: Context, dy: Tensor | None) -> Grads:
    dx, dw, db, *rest = _Conv2d.backward(ctx, dy)
    return dx, dw, db, dy if ctx.needs_input_grad[3] else None, *rest, None


def _vmap_fwd(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    x, w, bias, residual, *geometry, activation = args
    y, dim = _Conv2d.vmap(info, in_dims[:3], x, w, bias, *geometry)
    if residual is not None:
        y, dim = _front(y, dim, info.batch_size) + _front(residual, in_dims[3], info.batch_size), 0
    return (y if activation == "none" else ACTIVATIONS[activation](y)), dim


for _op, _backward, _setup, _vmap in (
    ("fastconv::conv2d_fwd", _backward_fwd, _setup_fwd, _vmap_fwd),
    ("fastconv::conv2d_dgrad", _Dgrad.backward, _setup_dgrad, _Dgrad.vmap),
    ("fastconv::conv2d_wgrad", _Wgrad.backward, _setup_wgrad, _Wgrad.vmap),
):
    torch.library.register_autograd(_op, _backward, setup_context=_setup, lib=library)
    torch.library.register_vmap(_op, rule_of_op(_vmap), lib=library)
