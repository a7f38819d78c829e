"""Max pooling and adaptive max pooling: schemas, kernels, fakes, derivatives.

NaN wins over every number, the last NaN over the others; among equals the first wins. Padding is minus infinity. Indices are
int64, flat within the (H, W) plane, and lie in memory like the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from .. import plan
from . import pool2d
from ._dispatch import KERNEL, empty_strided, way
from .autograd import call, derive, run
from .pool2d import LIBRARY, Chosen, Pair, Quad, Recipe

Numbers: TypeAlias = tuple[int, ...]

pool2d.define(
    "max_pool2d_fwd(Tensor x, SymInt[2] kernel, SymInt[2] stride, SymInt[] padding, SymInt[2] dilation, bool ceil_mode)"
    " -> (Tensor, Tensor)"
)
# `windows` are what a kernel that gathers has to know (see `_numbers`), and nothing to one that scatters, as the CPU's does.
pool2d.define(
    "max_pool2d_bwd(Tensor grad, Tensor indices, SymInt[] x_size, bool channels_last, SymInt[] windows=[]) -> Tensor"
)
pool2d.define("adaptive_max_pool2d_fwd(Tensor x, SymInt[2] output_size) -> (Tensor, Tensor)")

_ops = torch.ops.fastconv


# ---- Kernels --------------------------------------------------------------------------------------------------------------


@plan.cached
def fwd_recipe(
    x: plan.Shape,
    x_strides: plan.Shape,
    dtype: torch.dtype,
    kernel: Pair,
    stride: Pair,
    padding: Pair | Quad,
    dilation: Pair,
    ceil_mode: bool,
    chosen: Chosen,
) -> Recipe:
    y = pool2d.output_shape(x, kernel, stride, padding, dilation, ceil_mode)
    strides = plan.strides_of(y, plan.prefers_channels_last(x, x_strides))
    made = pool2d.recipe(
        "max_pool2d_fwd", dtype, (x, x_strides), (y, strides), chosen, kernel, stride, padding, dilation
    )
    return y, strides, made


@plan.cached
def adaptive_recipe(
    x: plan.Shape, x_strides: plan.Shape, dtype: torch.dtype, output_size: Pair, chosen: Chosen
) -> Recipe:
    y = (*x[:2], *output_size)
    strides = plan.strides_of(y, plan.prefers_channels_last(x, x_strides))
    operands = (x, x_strides), (y, strides)
    return y, strides, pool2d.recipe("max_pool2d_fwd", dtype, *operands, chosen, (1, 1), (1, 1), (0, 0), adaptive=True)


@plan.cached
def bwd_recipe(
    y: plan.Shape, y_strides: plan.Shape, dtype: torch.dtype, x: plan.Shape, channels_last: bool, chosen: Chosen
) -> Recipe:
    strides = plan.strides_of(x, channels_last)
    # The indices say where each gradient goes, so the kernel asks for no window.
    return x, strides, pool2d.recipe(
        "max_pool2d_bwd", dtype, (x, strides), (y, y_strides), chosen, (1, 1), (1, 1), (0, 0)
    )  # fmt: skip


def follow(x: Tensor, recipe: Recipe) -> Tensor:
    """The maxima alone, which is all that inference needs: in float32, the indices are two thirds of what is written."""
    shape, strides, made = recipe
    y = empty_strided(shape, strides, x.dtype)
    if made is not None:
        made.execute(x.data_ptr(), y.data_ptr(), 0)
    return y


def _run_fwd(x: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    shape, strides, made = recipe
    y = empty_strided(shape, strides, x.dtype)
    indices = empty_strided(shape, strides, torch.int64)
    if made is not None:
        made.execute(x.data_ptr(), y.data_ptr(), indices.data_ptr())
    return y, indices


def _fwd(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    windows = pool2d.pair(kernel), pool2d.pair(stride), pool2d.sides(padding), pool2d.pair(dilation)
    chosen = pool2d.chosen("max_pool2d_fwd")
    return _run_fwd(x, fwd_recipe(x.shape, x.stride(), x.dtype, *windows, ceil_mode, chosen))


def _adaptive_fwd(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    size, chosen = pool2d.pair(output_size), pool2d.chosen("max_pool2d_fwd")
    return _run_fwd(x, adaptive_recipe(x.shape, x.stride(), x.dtype, size, chosen))


def _bwd(
    grad: Tensor, indices: Tensor, x_size: Sequence[int], channels_last: bool, windows: Sequence[int] = ()
) -> Tensor:
    # The kernel walks both with one set of strides, and a gradient comes expanded (from a sum) or in the other format.
    if grad.stride() != indices.stride():
        grad = torch.empty_like(indices, dtype=grad.dtype).copy_(grad)
        indices = torch.empty_like(indices).copy_(indices)
    chosen = pool2d.chosen("max_pool2d_bwd")
    shape, strides, made = bwd_recipe(grad.shape, grad.stride(), grad.dtype, tuple(x_size), channels_last, chosen)
    x = empty_strided(shape, strides, grad.dtype)
    if made is None:
        return x.zero_()
    made.execute(x.data_ptr(), grad.data_ptr(), indices.data_ptr())
    return x


LIBRARY.impl("max_pool2d_fwd", _fwd, "CPU")
LIBRARY.impl("max_pool2d_bwd", _bwd, "CPU")
LIBRARY.impl("adaptive_max_pool2d_fwd", _adaptive_fwd, "CPU")


# ---- Fakes ----------------------------------------------------------------------------------------------------------------


def _fake_outputs(x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    y = pool2d.empty_like_format(x, shape)
    return y, torch.empty_like(y, dtype=torch.int64)


def _fake_fwd(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    return _fake_outputs(x, pool2d.output_shape(x.shape, kernel, stride, padding, dilation, ceil_mode))


def _fake_adaptive_fwd(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    return _fake_outputs(x, (*x.shape[:2], *output_size))


def _fake_bwd(grad: Tensor, indices: Tensor, x_size: Sequence[int], channels_last: bool, *_: Any) -> Tensor:
    return pool2d.empty(grad, x_size, channels_last)


torch.library.register_fake("fastconv::max_pool2d_fwd", _fake_fwd, lib=LIBRARY)
torch.library.register_fake("fastconv::adaptive_max_pool2d_fwd", _fake_adaptive_fwd, lib=LIBRARY)
torch.library.register_fake("fastconv::max_pool2d_bwd", _fake_bwd, lib=LIBRARY)


# ---- Derivatives ----------------------------------------------------------------------------------------------------------


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    """x at the chosen positions: what a change of x does to the output while the choice stays."""
    N, C, P, Q = indices.shape
    return x.reshape(N, C, -1).gather(2, indices.reshape(N, C, P * Q)).reshape(N, C, P, Q)


def _numbers(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Numbers:
    """Windows as the ten numbers that `max_pool2d_bwd` takes: kernel, stride, four sides' padding, dilation."""
    return *kernel, *stride, *pool2d.four(padding), *dilation


# Those of an adaptive pooling, whose windows follow from the sizes.
_ADAPTIVE = (0,) * 10


def backward(
    grad: Tensor, indices: Tensor, x_size: tuple[int, ...], channels_last: bool, windows: Numbers = ()
) -> Tensor:
    """The gradient for x, of size x_size, differentiable to any order in `grad`."""
    what = x_size, channels_last, windows
    return call(_MaxPoolBackward, _bwd, _ops.max_pool2d_bwd, (grad, indices), *what)  # type: ignore[no-any-return]


class _MaxPoolBackward(Function):
    """Scatters the gradient to the chosen positions: linear in it, and the gather's transpose."""

    vmap = staticmethod(pool2d.vmap_bwd(lambda *args: backward(*args), 2))

    @staticmethod
    def forward(
        grad: Tensor, indices: Tensor, x_size: tuple[int, ...], channels_last: bool, windows: Numbers
    ) -> Tensor:
        what = x_size, channels_last, windows
        return run(_bwd, _ops.max_pool2d_bwd, (grad, indices), *what)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, indices, *ctx.what = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return _gather(grad, indices), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: Any) -> Any:
        (indices,) = ctx.saved_tensors
        return backward(grad, indices, *ctx.what)


def _save(ctx: Any, x: Tensor, indices: Tensor, windows: Numbers) -> None:
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices)
    ctx.save_for_forward(indices)
    ctx.what = tuple(x.shape), pool2d.channels_last(x), windows


class _MaxPool(Function):
    vmap = staticmethod(pool2d.vmap_fwd(lambda *args: max_pool2d(*args)))

    @staticmethod
    def forward(x: Tensor, kernel: Pair, stride: Pair, padding: Pair | Quad, dilation: Pair, ceil_mode: bool) -> Any:
        return run(_fwd, _ops.max_pool2d_fwd, (x,), kernel, stride, padding, dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs[0], output[1], _numbers(*inputs[1:5]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        (indices,) = ctx.saved_tensors
        dx = None if grad is None else backward(grad, indices, *ctx.what)
        return dx, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Any:
        (indices,) = ctx.saved_tensors
        return _gather(x, indices), None


class _PlainMaxPool(Function):
    """The same where only autograd watches: no transform, tangent or compiler. Half the time of the other on a small image."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
        y, indices = _run_fwd(x, recipe)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.what = x.shape, pool2d.channels_last(x)
        return y, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        return _MaxPool.backward(ctx, grad, None)[0], None


# The C function below Function.apply, see `autograd.call`.
follow_with_gradient: Callable[..., tuple[Tensor, Tensor]] = super(Function, _PlainMaxPool).apply


class _AdaptiveMaxPool(Function):
    vmap = staticmethod(pool2d.vmap_fwd(lambda *args: adaptive_max_pool2d(*args)))

    @staticmethod
    def forward(x: Tensor, output_size: Pair) -> Any:
        return run(_adaptive_fwd, _ops.adaptive_max_pool2d_fwd, (x,), output_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs[0], output[1], _ADAPTIVE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        (indices,) = ctx.saved_tensors
        return None if grad is None else backward(grad, indices, *ctx.what), None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, _: Any) -> Any:
        (indices,) = ctx.saved_tensors
        return _gather(x, indices), None


derive("max_pool2d_fwd", _MaxPool, pool2d.vmap_fwd(_ops.max_pool2d_fwd), LIBRARY)
derive("adaptive_max_pool2d_fwd", _AdaptiveMaxPool, pool2d.vmap_fwd(_ops.adaptive_max_pool2d_fwd), LIBRARY)
derive("max_pool2d_bwd", _MaxPoolBackward, pool2d.vmap_bwd(_ops.max_pool2d_bwd, 2), LIBRARY)


# ---- Public ---------------------------------------------------------------------------------------------------------------


def max_pool2d(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair | Quad, dilation: Pair, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """x (N, C, H, W) → maxima (N, C, P, Q) and their indices, differentiable to any order in x."""
    options = kernel, stride, padding, dilation, ceil_mode
    return call(_MaxPool, _fwd, _ops.max_pool2d_fwd, (x,), *options)  # type: ignore[no-any-return]


def max_values2d(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair | Quad, dilation: Pair, ceil_mode: bool
) -> Tensor:
    """The maxima alone."""
    if way(x) is not KERNEL:
        return max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)[0]
    chosen = pool2d.chosen("max_pool2d_fwd")
    return follow(x, fwd_recipe(x.shape, x.stride(), x.dtype, kernel, stride, padding, dilation, ceil_mode, chosen))


def adaptive_max_pool2d(x: Tensor, output_size: Pair) -> tuple[Tensor, Tensor]:
    """x (N, C, H, W) → maxima (N, C, P, Q) over P by Q windows that cover the plane, and their indices."""
    return call(_AdaptiveMaxPool, _adaptive_fwd, _ops.adaptive_max_pool2d_fwd, (x,), output_size)  # type: ignore[no-any-return]


def adaptive_max_values2d(x: Tensor, output_size: Pair) -> Tensor:
    """The maxima alone."""
    if way(x) is not KERNEL:
        return adaptive_max_pool2d(x, output_size)[0]
    return follow(x, adaptive_recipe(x.shape, x.stride(), x.dtype, output_size, pool2d.chosen("max_pool2d_fwd")))
