"""linear: y = x wᵀ + bias, with derivatives of every order, forward mode and vmap.

There is no kernel for it: over its last dimension a linear layer is a 1×1 convolution of channels_last images of one pixel, one
for each row of x. The plans of conv2d serve it, without a copy and without a view, and rows being samples, a row's bits do not
depend on how many others there are. bfloat16 and float16 are how operands are stored: kernels sum in float32 and round once.

    linear_fwd     y  (..., O) = x (..., I) w (O, I)ᵀ + bias (O)
    linear_dgrad   dx (..., I) = dy w
    linear_wgrad   dw (O, I) = dyᵀ x over all rows, db (O) = the sum of dy
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import plan
from ._conv2d_kernels import TAGS, Shape, library
from ._dispatch import (
    FUNCTION,
    KERNEL,
    TRANSFORM,
    WITH_HALVES,
    Way,
    check_operands,
    check_shape,
    computed_in,
    direct,
    empty_strided,
    rule_of_op,
    way,
)
from .conv2d import conv2d

Context: TypeAlias = Any  # torch.autograd.function.FunctionCtx, which takes any attribute
Grads: TypeAlias = tuple[Tensor | None, ...]

_get_threads = torch.get_num_threads
_forced = plan.forced.get


# ---- Kernels: on plain CPU tensors, arguments already checked ---------------------------------------------------------------


@plan.cached
def make_plan(
    op: str,
    rows: int,
    inputs: int,
    outputs: int,
    w_strides: Shape,
    dtype: torch.dtype,
    biased: bool,
    threads: int,
    force: str,
    strict: bool,
    residual: bool = False,
    activation: str = "none",
    frozen: bool = False,
) -> plan.Plan | None:
    if not (rows and inputs and outputs):
        return None
    x, w, y = (rows, inputs, 1, 1), (outputs, inputs, 1, 1), (rows, outputs, 1, 1)
    problem = plan.conv2d_problem(
        WITH_HALVES[dtype], (x, plan.strides_of(x, True)), (w, (*w_strides, 1, 1)), (y, plan.strides_of(y, True)),
        (1, 1), (0, 0, 0, 0), (1, 1), 1, biased, residual, activation, frozen,
    )  # fmt: skip
    return plan.make(op, problem, WITH_HALVES[dtype], (x, w, y), threads, force, strict)


def contiguous_strides(shape: Shape) -> Shape:
    """Strides of a contiguous tensor of at least one dimension, as torch.empty gives them."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * max(size, 1))
    return tuple(strides)


class Recipe(NamedTuple):
    """What a forward call does, worked out once for its shapes, strides and options."""

    plan: plan.Plan | None  # None: there is nothing to sum
    y_shape: Shape
    y_strides: Shape


@plan.cached
def fwd_recipe(
    x: Shape, w: Shape, w_strides: Shape, dtype: torch.dtype, biased: bool, threads: int, force: str, strict: bool
) -> Recipe:
    y = (*x[:-1], w[0])
    made: plan.Plan | None = make_plan(
        "conv2d_fwd", math.prod(x[:-1]), w[1], w[0], w_strides, dtype, biased, threads, force, strict
    )
    return Recipe(made, y, contiguous_strides(y))


def find_fwd(x: Tensor, w: Tensor, bias: Tensor | None) -> Recipe:
    recipe: Recipe = fwd_recipe(
        x.shape, w.shape, w.stride(), x.dtype, bias is not None,
        _get_threads(), _forced().get("conv2d_fwd", ""), plan.strict,
    )  # fmt: skip
    return recipe


def follow(recipe: Recipe, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    made, shape, strides = recipe
    y: Tensor = empty_strided(shape, strides, x.dtype)
    if made is None:
        return y.zero_() if bias is None else y.copy_(bias)
    x = x.contiguous()
    if bias is None:
        made.execute(x.data_ptr(), w.data_ptr(), 0, 0, y.data_ptr())
    else:
        bias = bias.contiguous()
        made.execute(x.data_ptr(), w.data_ptr(), bias.data_ptr(), 0, y.data_ptr())
    return y


def run_fwd(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return follow(find_fwd(x, w, bias), x, w, bias)


def _rows(t: Tensor) -> int:
    return math.prod(t.shape[:-1])


def find_dgrad(dy: Tensor, w: Tensor) -> plan.Plan | None:
    outputs, inputs = w.shape
    made: plan.Plan | None = make_plan(
        "conv2d_dgrad", _rows(dy), inputs, outputs, w.stride(), dy.dtype, False,
        _get_threads(), _forced().get("conv2d_dgrad", ""), plan.strict,
    )  # fmt: skip
    return made


def run_dgrad(dy: Tensor, w: Tensor) -> Tensor:
    dy = dy.contiguous()
    dx = dy.new_empty((*dy.shape[:-1], w.shape[1]))
    made = find_dgrad(dy, w)
    if made is None:
        return dx.zero_()
    made.execute(dx.data_ptr(), w.data_ptr(), 0, 0, dy.data_ptr())
    return dx


def find_wgrad(dy: Tensor, x: Tensor, with_bias: bool) -> plan.Plan | None:
    outputs, inputs = dy.shape[-1], x.shape[-1]
    made: plan.Plan | None = make_plan(
        "conv2d_wgrad", _rows(dy), inputs, outputs, (inputs, 1), dy.dtype, with_bias,
        _get_threads(), _forced().get("conv2d_wgrad", ""), plan.strict,
    )  # fmt: skip
    return made


def run_wgrad(dy: Tensor, x: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    outputs, inputs = dy.shape[-1], x.shape[-1]
    dy, x = dy.contiguous(), x.contiguous()
    dw: Tensor = empty_strided((outputs, inputs), (max(inputs, 1), 1), dy.dtype)
    db: Tensor = empty_strided((outputs if with_bias else 0,), (1,), dy.dtype)
    made = find_wgrad(dy, x, with_bias)
    if made is None:
        return dw.zero_(), dy.reshape(-1, outputs).sum(0) if with_bias and outputs else db
    made.execute(x.data_ptr(), dw.data_ptr(), db.data_ptr(), 0, dy.data_ptr())
    return dw, db


# ---- Registration ---------------------------------------------------------------------------------------------------------

library.define("linear_fwd(Tensor x, Tensor w, Tensor? bias) -> Tensor", tags=TAGS)
library.define("linear_dgrad(Tensor dy, Tensor w) -> Tensor", tags=TAGS)
library.define("linear_wgrad(Tensor dy, Tensor x, bool with_bias) -> (Tensor, Tensor)", tags=TAGS)


Dtypes: TypeAlias = Mapping[torch.dtype, str]


def check_fwd(x: Tensor, w: Tensor, bias: Tensor | None, dtypes: Dtypes = WITH_HALVES) -> None:
    """Raises RuntimeError where operands do not fit, NotImplementedError for a dtype that is none of these."""
    check_operands("linear_fwd", dtypes, x=x, w=w, bias=bias)
    check_shape("linear_fwd", "w", w.shape, (w.shape[0], x.shape[-1]))
    if bias is not None:
        check_shape("linear_fwd", "bias", bias.shape, (w.shape[0],))


def check_dgrad(dy: Tensor, w: Tensor, dtypes: Dtypes = WITH_HALVES) -> None:
    check_operands("linear_dgrad", dtypes, dy=dy, w=w)
    check_shape("linear_dgrad", "w", w.shape, (dy.shape[-1], w.shape[1]))


def check_wgrad(dy: Tensor, x: Tensor, dtypes: Dtypes = WITH_HALVES) -> None:
    check_operands("linear_wgrad", dtypes, dy=dy, x=x)
    check_shape("linear_wgrad", "dy", dy.shape, (*x.shape[:-1], dy.shape[-1]))


def _fwd_impl(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    check_fwd(x, w, bias)
    return run_fwd(x, w, bias)


def _dgrad_impl(dy: Tensor, w: Tensor) -> Tensor:
    check_dgrad(dy, w)
    return run_dgrad(dy, w)


def _wgrad_impl(dy: Tensor, x: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    check_wgrad(dy, x)
    return run_wgrad(dy, x, with_bias)


library.impl("linear_fwd", _fwd_impl, "CPU")
library.impl("linear_dgrad", _dgrad_impl, "CPU")
library.impl("linear_wgrad", _wgrad_impl, "CPU")


def _fwd_fake(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _dgrad_fake(dy: Tensor, w: Tensor) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], w.shape[1]))


def _wgrad_fake(dy: Tensor, x: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    return dy.new_empty((dy.shape[-1], x.shape[-1])), dy.new_empty(dy.shape[-1] if with_bias else 0)


torch.library.register_fake("fastconv::linear_fwd", _fwd_fake, lib=library)
torch.library.register_fake("fastconv::linear_dgrad", _dgrad_fake, lib=library)
torch.library.register_fake("fastconv::linear_wgrad", _wgrad_fake, lib=library)


_fwd_op = torch.ops.fastconv.linear_fwd.default
_dgrad_op = torch.ops.fastconv.linear_dgrad.default
_wgrad_op = torch.ops.fastconv.linear_wgrad.default


# ---- With derivatives -----------------------------------------------------------------------------------------------------


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I) times the transpose of w (O, I), plus bias (O), on checked arguments: (..., O), contiguous."""
    how = way(x, w, bias)
    return run_fwd(x, w, bias) if how is KERNEL else _linear(how, x, w, bias)


def _linear(how: Way, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if how is FUNCTION:
        return apply_linear(x, w, bias, find_fwd(x, w, bias))
    if how is TRANSFORM:
        return _transform_linear(x, w, bias)
    return run_fwd(x, w, bias) if how is KERNEL else _fwd_op(x, w, bias)


def _dgrad(how: Way, dy: Tensor, w: Tensor) -> Tensor:
    if how is FUNCTION:
        return _apply_dgrad(dy, w)
    if how is TRANSFORM:
        return _transform_dgrad(dy, w)
    return run_dgrad(dy, w) if how is KERNEL else _dgrad_op(dy, w)


def _wgrad(how: Way, dy: Tensor, x: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    if how is FUNCTION:
        return _apply_wgrad(dy, x, with_bias)
    if how is TRANSFORM:
        return _transform_wgrad(dy, x, with_bias)
    return run_wgrad(dy, x, with_bias) if how is KERNEL else _wgrad_op(dy, x, with_bias)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _sum_rows(t: Tensor) -> Tensor:
    return t.sum(tuple(range(t.dim() - 1))) if t.dim() > 1 else t


def _front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """vmap: `t` with the mapped dimension first; a shared tensor is expanded."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _batched(x: Tensor, w: Tensor) -> Tensor:
    """vmap: x (B, M, I) times the transpose of w (B, O, I), as one convolution with B groups; of halves in float32."""
    B, M, inputs = x.shape
    stored, computed = x.dtype, computed_in(x.dtype)
    x, w = x.to(computed), w.to(computed)
    image = x.movedim(1, 0).reshape(M, B * inputs).t()[None, :, None]
    y = conv2d(image, w.flatten(0, 1)[..., None, None], None, (1, 1), (0, 0, 0, 0), (1, 1), B)
    return y.reshape(B, w.shape[1], M).transpose(1, 2).to(stored)


def _remember(ctx: Context, x: Tensor, w: Tensor, y_shape: Shape) -> None:
    """What the derivatives need. A gradient needs the other operand only: a frozen layer keeps no activation."""
    need_dx, need_dw = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_dw else None, w if need_dx else None)
    ctx.save_for_forward(x, w)
    ctx.set_materialize_grads(False)
    ctx.y_shape = y_shape


def gradients(
    dy: Tensor | None, saved: tuple[Any, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw and db of a linear layer with the saved (x, w), each where it is needed."""
    dx = dw = db = None
    if dy is not None:
        x, w = saved
        need_dx, need_dw, need_db = needs[:3]
        if need_dx:
            dx = _dgrad(way(dy, w), dy, w)
        if need_dw:
            dw, db = _wgrad(way(dy, x), dy, x, need_db)
        elif need_db:
            db = _sum_rows(dy)
    return dx, dw, db if needs[2] else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return run_fwd(x, w, bias) if direct(x, w, bias) else _fwd_op(x, w, bias)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _ = inputs
        _remember(ctx, x, w, output.shape)

    @staticmethod
    def backward(ctx: Context, dy: Tensor | None) -> Grads:
        return gradients(dy, ctx.saved_tensors, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Context, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None) -> Tensor | None:
        x, w = ctx.saved_tensors
        ty = None if tx is None else _linear(way(tx, w), tx, w, None)
        ty = _sum(ty, None if tw is None else _linear(way(x, tw), x, tw, None))
        return _sum(ty, None if tb is None else tb.expand(ctx.y_shape))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        x_dim, w_dim, bias_dim = in_dims
        x = _front(x, x_dim, info.batch_size)
        if w_dim is None and bias_dim is None:
            return _linear(way(x, w, bias), x, w, bias), 0
        if w_dim is None:
            y = _linear(way(x, w), x, w, None)
        else:
            w = w.movedim(w_dim, 0)
            y = _batched(x.reshape(info.batch_size, -1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[1])
        if bias is not None:
            bias = _front(bias, bias_dim, info.batch_size)
            y = y + bias.reshape(info.batch_size, *(1,) * (y.dim() - 2), bias.shape[-1])
        return y, 0


class _Dgrad(torch.autograd.Function):
    @staticmethod
    def forward(dy: Tensor, w: Tensor) -> Tensor:
        return run_dgrad(dy, w) if direct(dy, w) else _dgrad_op(dy, w)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Context, g: Tensor | None) -> Grads:
        g_dy = g_w = None
        if g is not None:
            dy, w = ctx.saved_tensors
            if ctx.needs_input_grad[0]:
                g_dy = _linear(way(g, w), g, w, None)
            if ctx.needs_input_grad[1]:
                g_w, _ = _wgrad(way(dy, g), dy, g, False)
        return g_dy, g_w

    @staticmethod
    def jvp(ctx: Context, t_dy: Tensor | None, tw: Tensor | None) -> Tensor | None:
        dy, w = ctx.saved_tensors
        t = None if t_dy is None else _dgrad(way(t_dy, w), t_dy, w)
        return _sum(t, None if tw is None else _dgrad(way(dy, tw), dy, tw))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], dy: Tensor, w: Tensor) -> tuple[Tensor, int]:
        dy = _front(dy, in_dims[0], info.batch_size)
        if in_dims[1] is None:
            return _dgrad(way(dy, w), dy, w), 0
        w = w.movedim(in_dims[1], 0).transpose(1, 2)
        return _batched(dy.reshape(info.batch_size, -1, dy.shape[-1]), w).reshape(*dy.shape[:-1], w.shape[1]), 0


class _Wgrad(torch.autograd.Function):
    @staticmethod
    def forward(dy: Tensor, x: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
        return run_wgrad(dy, x, with_bias) if direct(dy, x) else _wgrad_op(dy, x, with_bias)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        dy, x, ctx.with_bias = inputs
        ctx.save_for_backward(dy, x)
        ctx.save_for_forward(dy, x)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Context, g_dw: Tensor | None, g_db: Tensor | None) -> Grads:
        dy, x = ctx.saved_tensors
        g_dy = g_x = None
        if not ctx.with_bias:
            g_db = None
        if g_dw is not None:
            if ctx.needs_input_grad[0]:
                g_dy = _linear(way(x, g_dw, g_db), x, g_dw, g_db)
            if ctx.needs_input_grad[1]:
                g_x = _dgrad(way(dy, g_dw), dy, g_dw)
        elif g_db is not None and ctx.needs_input_grad[0]:
            g_dy = g_db.expand(dy.shape)
        return g_dy, g_x, None

    @staticmethod
    def jvp(ctx: Context, t_dy: Tensor | None, tx: Tensor | None, _: None) -> tuple[Tensor | None, Tensor]:
        dy, x = ctx.saved_tensors
        t_dw = None
        # torch has no word for "this output does not move": zeros, while the other output does.
        t_db = dy.new_zeros(dy.shape[-1] if ctx.with_bias else 0)
        if t_dy is not None:
            t_dw, t_db = _wgrad(way(t_dy, x), t_dy, x, ctx.with_bias)
        if tx is not None:
            t_dw = _sum(t_dw, _wgrad(way(dy, tx), dy, tx, ctx.with_bias)[0])
        return t_dw, t_db

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], dy: Tensor, x: Tensor, with_bias: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
        size = info.batch_size
        dy, x = _front(dy, in_dims[0], size), _front(x, in_dims[1], size)
        dy, x = dy.reshape(size, -1, dy.shape[-1]), x.reshape(size, -1, x.shape[-1])
        dw = _batched(dy.transpose(1, 2), x.transpose(1, 2))
        return ((dw, dy.sum(1)), (0, 0)) if with_bias else ((dw, dy.new_empty(0)), (0, None))


class _PlainLinear(torch.autograd.Function):
    """_Linear in plain eager mode, where the recipe is known and nothing transforms."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, w: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
        _remember(ctx, x, w, recipe.y_shape)
        return follow(recipe, x, w, bias)

    @staticmethod
    def backward(ctx: Context, dy: Tensor | None) -> Grads:
        return *_Linear.backward(ctx, dy), None

    jvp = _Linear.jvp


# The quick way past Function.apply: see ops/conv2d.py.
apply_linear: Callable[..., Tensor] = super(torch.autograd.Function, _PlainLinear).apply
_apply_dgrad: Callable[..., Tensor] = super(torch.autograd.Function, _Dgrad).apply
_apply_wgrad: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, _Wgrad).apply

_transform_linear: Callable[..., Tensor] = _Linear.apply
_transform_dgrad: Callable[..., Tensor] = _Dgrad.apply
_transform_wgrad: Callable[..., tuple[Tensor, Tensor]] = _Wgrad.apply

for _op, _function in (("linear_fwd", _Linear), ("linear_dgrad", _Dgrad), ("linear_wgrad", _Wgrad)):
    torch.library.register_autograd(
        f"fastconv::{_op}", _function.backward, setup_context=_function.setup_context, lib=library
    )
    torch.library.register_vmap(f"fastconv::{_op}", rule_of_op(_function.vmap), lib=library)
