"""Average pooling and adaptive average pooling: schemas, kernels, fakes, derivatives.

Both are linear, so each backward is the transposed map, and every further derivative is one of the two again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import plan
from . import pool2d
from ._dispatch import empty_strided
from .autograd import call, derive, run
from .pool2d import LIBRARY, Chosen, Pair, Quad, Recipe

pool2d.define(
    "avg_pool2d_fwd(Tensor x, SymInt[2] kernel, SymInt[2] stride, SymInt[] padding, bool ceil_mode, bool count_include_pad,"
    " int? divisor_override) -> Tensor"
)
pool2d.define(
    "avg_pool2d_bwd(Tensor grad, SymInt[] x_size, bool channels_last, SymInt[2] kernel, SymInt[2] stride, SymInt[] padding,"
    " bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor"
)
pool2d.define("adaptive_avg_pool2d_fwd(Tensor x, SymInt[2] output_size) -> Tensor")
pool2d.define("adaptive_avg_pool2d_bwd(Tensor grad, SymInt[] x_size, bool channels_last) -> Tensor")

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
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    chosen: Chosen,
) -> Recipe:
    y = pool2d.output_shape(x, kernel, stride, padding, (1, 1), ceil_mode)
    strides = plan.strides_of(y, plan.prefers_channels_last(x, x_strides))
    divisor = divisor_override or 0
    made = pool2d.recipe(
        "avg_pool2d_fwd", dtype, (x, x_strides), (y, strides), chosen,
        kernel, stride, padding, (1, 1), divisor, count_include_pad,
    )  # fmt: skip
    return y, strides, made


@plan.cached
def bwd_recipe(
    y: plan.Shape,
    y_strides: plan.Shape,
    dtype: torch.dtype,
    x: plan.Shape,
    channels_last: bool,
    kernel: Pair,
    stride: Pair,
    padding: Pair | Quad,
    count_include_pad: bool,
    divisor_override: int | None,
    chosen: Chosen,
) -> Recipe:
    strides = plan.strides_of(x, channels_last)
    divisor = divisor_override or 0
    made = pool2d.recipe(
        "avg_pool2d_bwd", dtype, (x, strides), (y, y_strides), chosen,
        kernel, stride, padding, (1, 1), divisor, count_include_pad,
    )  # fmt: skip
    return x, strides, made


@plan.cached
def adaptive_recipe(
    x: plan.Shape, x_strides: plan.Shape, dtype: torch.dtype, output_size: Pair, chosen: Chosen
) -> Recipe:
    y = (*x[:2], *output_size)
    strides = plan.strides_of(y, plan.prefers_channels_last(x, x_strides))
    operands = (x, x_strides), (y, strides)
    return y, strides, pool2d.recipe("avg_pool2d_fwd", dtype, *operands, chosen, (1, 1), (1, 1), (0, 0), adaptive=True)


@plan.cached
def adaptive_bwd_recipe(
    y: plan.Shape, y_strides: plan.Shape, dtype: torch.dtype, x: plan.Shape, channels_last: bool, chosen: Chosen
) -> Recipe:
    strides = plan.strides_of(x, channels_last)
    operands = (x, strides), (y, y_strides)
    return x, strides, pool2d.recipe("avg_pool2d_bwd", dtype, *operands, chosen, (1, 1), (1, 1), (0, 0), adaptive=True)


def follow(x: Tensor, recipe: Recipe) -> Tensor:
    """The means."""
    shape, strides, made = recipe
    y = empty_strided(shape, strides, x.dtype)
    if made is not None:
        made.execute(x.data_ptr(), y.data_ptr(), 0)
    return y


def _run_bwd(grad: Tensor, recipe: Recipe) -> Tensor:
    shape, strides, made = recipe
    x = empty_strided(shape, strides, grad.dtype)
    if made is None:
        return x.zero_()
    made.execute(x.data_ptr(), grad.data_ptr(), 0)
    return x


def _fwd(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    windows = pool2d.pair(kernel), pool2d.pair(stride), pool2d.sides(padding)
    divisor = ceil_mode, count_include_pad, divisor_override
    return follow(x, fwd_recipe(x.shape, x.stride(), x.dtype, *windows, *divisor, pool2d.chosen("avg_pool2d_fwd")))


def _bwd(
    grad: Tensor,
    x_size: Sequence[int],
    channels_last: bool,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    windows = pool2d.pair(kernel), pool2d.pair(stride), pool2d.sides(padding)
    options = tuple(x_size), channels_last, *windows, count_include_pad, divisor_override
    return _run_bwd(grad, bwd_recipe(grad.shape, grad.stride(), grad.dtype, *options, pool2d.chosen("avg_pool2d_bwd")))


def _adaptive_fwd(x: Tensor, output_size: Sequence[int]) -> Tensor:
    size, chosen = pool2d.pair(output_size), pool2d.chosen("avg_pool2d_fwd")
    return follow(x, adaptive_recipe(x.shape, x.stride(), x.dtype, size, chosen))


def _adaptive_bwd(grad: Tensor, x_size: Sequence[int], channels_last: bool) -> Tensor:
    chosen = pool2d.chosen("avg_pool2d_bwd")
    return _run_bwd(
        grad, adaptive_bwd_recipe(grad.shape, grad.stride(), grad.dtype, tuple(x_size), channels_last, chosen)
    )


LIBRARY.impl("avg_pool2d_fwd", _fwd, "CPU")
LIBRARY.impl("avg_pool2d_bwd", _bwd, "CPU")
LIBRARY.impl("adaptive_avg_pool2d_fwd", _adaptive_fwd, "CPU")
LIBRARY.impl("adaptive_avg_pool2d_bwd", _adaptive_bwd, "CPU")


# ---- Fakes ----------------------------------------------------------------------------------------------------------------


def _fake_fwd(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool, *_: Any
) -> Tensor:
    return pool2d.empty_like_format(x, pool2d.output_shape(x.shape, kernel, stride, padding, (1, 1), ceil_mode))


def _fake_bwd(grad: Tensor, x_size: Sequence[int], channels_last: bool, *_: Any) -> Tensor:
    return pool2d.empty(grad, x_size, channels_last)


def _fake_adaptive_fwd(x: Tensor, output_size: Sequence[int]) -> Tensor:
    return pool2d.empty_like_format(x, (*x.shape[:2], *output_size))


def _fake_adaptive_bwd(grad: Tensor, x_size: Sequence[int], channels_last: bool) -> Tensor:
    return pool2d.empty(grad, x_size, channels_last)


torch.library.register_fake("fastconv::avg_pool2d_fwd", _fake_fwd, lib=LIBRARY)
torch.library.register_fake("fastconv::avg_pool2d_bwd", _fake_bwd, lib=LIBRARY)
torch.library.register_fake("fastconv::adaptive_avg_pool2d_fwd", _fake_adaptive_fwd, lib=LIBRARY)
torch.library.register_fake("fastconv::adaptive_avg_pool2d_bwd", _fake_adaptive_bwd, lib=LIBRARY)


# ---- Derivatives ----------------------------------------------------------------------------------------------------------


class _AvgPool(Function):
    vmap = staticmethod(pool2d.vmap_fwd(lambda *args: avg_pool2d(*args)))

    @staticmethod
    def forward(x: Tensor, *options: Any) -> Tensor:
        return run(_fwd, _ops.avg_pool2d_fwd, (x,), *options)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.options = inputs
        ctx.what = tuple(x.shape), pool2d.channels_last(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return backward(grad, *ctx.what, *ctx.options), *(None,) * len(ctx.options)

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Any:
        return avg_pool2d(x, *ctx.options)


class _AvgPoolBackward(Function):
    vmap = staticmethod(pool2d.vmap_bwd(lambda *args: backward(*args), 1))

    @staticmethod
    def forward(grad: Tensor, *what: Any) -> Tensor:
        return run(_bwd, _ops.avg_pool2d_bwd, (grad,), *what)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.what = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return avg_pool2d(grad, *ctx.what[2:]), *(None,) * len(ctx.what)

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: Any) -> Any:
        return backward(grad, *ctx.what)


class _AdaptiveAvgPool(Function):
    vmap = staticmethod(pool2d.vmap_fwd(lambda *args: adaptive_avg_pool2d(*args)))

    @staticmethod
    def forward(x: Tensor, output_size: Pair) -> Tensor:
        return run(_adaptive_fwd, _ops.adaptive_avg_pool2d_fwd, (x,), output_size)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.output_size = inputs
        ctx.what = tuple(x.shape), pool2d.channels_last(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return adaptive_backward(grad, *ctx.what), None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, _: Any) -> Any:
        return adaptive_avg_pool2d(x, ctx.output_size)


class _AdaptiveAvgPoolBackward(Function):
    vmap = staticmethod(pool2d.vmap_bwd(lambda *args: adaptive_backward(*args), 1))

    @staticmethod
    def forward(grad: Tensor, x_size: tuple[int, ...], channels_last: bool) -> Tensor:
        what = x_size, channels_last
        return run(_adaptive_bwd, _ops.adaptive_avg_pool2d_bwd, (grad,), *what)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, *ctx.what = inputs
        ctx.output_size = tuple(grad.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return adaptive_avg_pool2d(grad, ctx.output_size), None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, *_: Any) -> Any:
        return adaptive_backward(grad, *ctx.what)


def backward(grad: Tensor, *what: Any) -> Tensor:
    """The gradient for x from (x_size, channels_last, and the options of the pooling), differentiable to any order."""
    return call(_AvgPoolBackward, _bwd, _ops.avg_pool2d_bwd, (grad,), *what)  # type: ignore[no-any-return]


def adaptive_backward(grad: Tensor, *what: Any) -> Tensor:
    """The same for the adaptive pooling, from (x_size, channels_last)."""
    return call(_AdaptiveAvgPoolBackward, _adaptive_bwd, _ops.adaptive_avg_pool2d_bwd, (grad,), *what)  # type: ignore[no-any-return]


derive("avg_pool2d_fwd", _AvgPool, pool2d.vmap_fwd(_ops.avg_pool2d_fwd), LIBRARY)
derive("avg_pool2d_bwd", _AvgPoolBackward, pool2d.vmap_bwd(_ops.avg_pool2d_bwd, 1), LIBRARY)
derive("adaptive_avg_pool2d_fwd", _AdaptiveAvgPool, pool2d.vmap_fwd(_ops.adaptive_avg_pool2d_fwd), LIBRARY)
derive("adaptive_avg_pool2d_bwd", _AdaptiveAvgPoolBackward, pool2d.vmap_bwd(_ops.adaptive_avg_pool2d_bwd, 1), LIBRARY)


# ---- Public ---------------------------------------------------------------------------------------------------------------


def avg_pool2d(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair | Quad,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """x (N, C, H, W) → means (N, C, P, Q). A divisor_override of None divides by the window's size."""
    options = kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
    return call(_AvgPool, _fwd, _ops.avg_pool2d_fwd, (x,), *options)  # type: ignore[no-any-return]


def adaptive_avg_pool2d(x: Tensor, output_size: Pair) -> Tensor:
    """x (N, C, H, W) → means (N, C, P, Q) over P by Q windows that cover the plane."""
    return call(_AdaptiveAvgPool, _adaptive_fwd, _ops.adaptive_avg_pool2d_fwd, (x,), output_size)  # type: ignore[no-any-return]
