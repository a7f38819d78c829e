"""The three convolution ops below autograd: recipes, kernels, registration with torch.library, fake kernels.

    conv2d_fwd     y  = activation(conv(x, w) + bias + residual)
    conv2d_dgrad   dx = the x that conv(x, w) meets dy through; also the forward pass of a transposed convolution
    conv2d_wgrad   dw = the same for w, with db = the sum of dy

A convolution is linear in x and in w, so each of the three is a derivative of the other two and no further op is needed for
gradients of any order. Padding is (top, bottom, left, right) and may be negative (it crops).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import plan
from ..plan import is_dense, prefers_channels_last, strides_of
from ._dispatch import DTYPES, check_operands, check_shape, direct, empty_strided
from ._packed import PackedFilters

Pair = tuple[int, int]
Quad = tuple[int, int, int, int]
Shape = tuple[int, ...]
Geometry = tuple[Pair, Quad, Pair, int]  # stride, padding, dilation, groups

_FORMAT = (torch.contiguous_format, torch.channels_last)
_get_threads = torch.get_num_threads
_forced = plan.forced.get


class _Recipe:
    """What a call does, worked out once for its shapes, strides and options. `None` for a copy: the operand is used as it is."""

    __slots__ = ("copy_a", "copy_b", "out_shape", "out_strides", "plan")

    def __init__(
        self,
        made: plan.Plan | None,
        out_shape: Shape,
        out_strides: Shape,
        copy_a: torch.memory_format | None,
        copy_b: torch.memory_format | None = None,
    ) -> None:
        self.plan = made
        self.out_shape = tuple(out_shape)  # a torch.Size is not what empty_strided takes
        self.out_strides = out_strides
        self.copy_a = copy_a
        self.copy_b = copy_b


class Forward(NamedTuple):
    """What the gradients of a convolution need to know of it, besides its operands."""

    x_shape: Shape
    w_shape: Shape
    y_shape: Shape
    x_last: bool  # whether y, dy and dx are channels_last
    w_last: bool  # the same for dw
    geometry: Geometry


class Recipe(_Recipe):
    """The recipe of a forward call."""

    __slots__ = ("forward",)
    forward: Forward


def _copy(shape: Shape, strides: Shape, channels_last: bool) -> torch.memory_format | None:
    return None if is_dense(shape, strides, channels_last) else _FORMAT[channels_last]


def _is_slice(shape: Shape, strides: Shape) -> bool:
    """Whether these are the first channels, or any, of the pixels of a channels_last batch: kernels read them where they lie."""
    N, C, H, W = shape
    pixel = strides[3]
    if strides[1] != 1 or min(C, H, W) < 2 or pixel <= C:
        return False
    return strides[2] == W * pixel and (N == 1 or strides[0] == H * W * pixel)


def output_size(
    H: int, W: int, R: int, S: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Pair:
    """(P, Q) of a convolution; padding is (top, bottom, left, right)."""
    return (
        (H + padding[0] + padding[1] - dilation[0] * (R - 1) - 1) // stride[0] + 1,
        (W + padding[2] + padding[3] - dilation[1] * (S - 1) - 1) // stride[1] + 1,
    )


def _empty(*shapes: Shape) -> bool:
    return any(size == 0 for shape in shapes for size in shape)


# ---- Recipes --------------------------------------------------------------------------------------------------------------


@plan.cached
def fwd_recipe(
    x: Shape,
    x_strides: Shape,
    w: Shape,
    w_strides: Shape,
    dtype: torch.dtype,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    biased: bool,
    residual_strides: Shape | None,
    activation: str,
    threads: int,
    force: str,
    strict: bool,
    frozen: bool = False,
) -> Recipe:
    w_last = prefers_channels_last(w, w_strides)
    last = w_last or prefers_channels_last(x, x_strides)
    y = (x[0], w[0], *output_size(x[2], x[3], w[2], w[3], stride, padding, dilation))
    y_strides = strides_of(y, last)
    recipe = Recipe(None, y, y_strides, None)
    recipe.forward = Forward(x, w, y, last, w_last, (stride, padding, dilation, groups))
    if _empty(x, w, y):
        return recipe
    in_place = last and _is_slice(x, x_strides)
    problem = plan.conv2d_problem(
        DTYPES[dtype], (x, x_strides if in_place else strides_of(x, last)), (w, w_strides), (y, y_strides),
        stride, padding, dilation, groups, biased, residual_strides is not None, activation, frozen,
    )  # fmt: skip
    recipe.plan = plan.make("conv2d_fwd", problem, DTYPES[dtype], (x, w, y), threads, force, strict)
    recipe.copy_a = None if in_place else _copy(x, x_strides, last)
    if residual_strides is not None:
        recipe.copy_b = _copy(y, residual_strides, last)
    return recipe


@plan.cached
def _dgrad_recipe(
    dy: Shape,
    dy_strides: Shape,
    w: Shape,
    w_strides: Shape,
    dtype: torch.dtype,
    x: Shape,
    last: bool,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    threads: int,
    force: str,
    strict: bool,
) -> _Recipe:
    x_strides = strides_of(x, last)
    if _empty(dy, w, x):
        return _Recipe(None, x, x_strides, None)
    problem = plan.conv2d_problem(
        DTYPES[dtype], (x, x_strides), (w, w_strides), (dy, strides_of(dy, last)), stride, padding, dilation, groups
    )
    made = plan.make("conv2d_dgrad", problem, DTYPES[dtype], (x, w, dy), threads, force, strict)
    return _Recipe(made, x, x_strides, _copy(dy, dy_strides, last))


@plan.cached
def _wgrad_recipe(
    dy: Shape,
    dy_strides: Shape,
    x: Shape,
    x_strides: Shape,
    dtype: torch.dtype,
    w: Shape,
    w_last: bool,
    with_bias: bool,
    stride: Pair,
    padding: Quad,
    dilation: Pair,
    groups: int,
    threads: int,
    force: str,
    strict: bool,
) -> _Recipe:
    w_strides = strides_of(w, w_last)
    if _empty(dy, x, w):
        return _Recipe(None, w, w_strides, None)
    # Kernels want both operands in one format. Where they differ, the forward pass ran in channels_last.
    last = prefers_channels_last(x, x_strides) or prefers_channels_last(dy, dy_strides)
    problem = plan.conv2d_problem(
        DTYPES[dtype], (x, strides_of(x, last)), (w, w_strides), (dy, strides_of(dy, last)),
        stride, padding, dilation, groups, with_bias,
    )  # fmt: skip
    made = plan.make("conv2d_wgrad", problem, DTYPES[dtype], (x, w, dy), threads, force, strict)
    return _Recipe(made, w, w_strides, _copy(dy, dy_strides, last), _copy(x, x_strides, last))


# ---- Kernels: on plain CPU tensors, arguments already checked ---------------------------------------------------------------


def find_fwd(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None,
    stride: Pair, padding: Quad, dilation: Pair, groups: int, activation: str,
) -> Recipe:  # fmt: skip
    return fwd_recipe(
        x.shape, x.stride(), w.shape, w.stride(), x.dtype, stride, padding, dilation, groups, bias is not None,
        None if residual is None else residual.stride(), activation,
        _get_threads(), _forced().get("conv2d_fwd", ""), plan.strict,
    )  # fmt: skip


def follow(
    recipe: Recipe,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    kept: PackedFilters | None = None,
) -> Tensor:
    if recipe.copy_a is not None:
        x = x.contiguous(memory_format=recipe.copy_a)
    y: Tensor = empty_strided(recipe.out_shape, recipe.out_strides, x.dtype)
    if recipe.plan is not None:
        bias_address = residual_address = 0
        if bias is not None:
            bias = bias.contiguous()
            bias_address = bias.data_ptr()
        if residual is not None:
            if recipe.copy_b is not None:
                residual = residual.contiguous(memory_format=recipe.copy_b)
            residual_address = residual.data_ptr()
        packed = None if kept is None else kept.get(recipe.plan, w)
        recipe.plan.execute(
            x.data_ptr(), w.data_ptr(), bias_address, residual_address, y.data_ptr(),
            0 if packed is None else packed.data_ptr(),
        )  # fmt: skip
    return y


def run_fwd(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None,
    stride: Pair, padding: Quad, dilation: Pair, groups: int, activation: str,
) -> Tensor:  # fmt: skip
    recipe = find_fwd(x, w, bias, residual, stride, padding, dilation, groups, activation)
    return follow(recipe, x, w, bias, residual)


def find_frozen(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry, activation: str
) -> Recipe:
    """`find_fwd` for a weight that does not change."""
    return fwd_recipe(
        x.shape, x.stride(), w.shape, w.stride(), x.dtype, *geometry, bias is not None,
        None if residual is None else residual.stride(), activation,
        _get_threads(), _forced().get("conv2d_fwd", ""), plan.strict, True,
    )  # fmt: skip


def run_frozen(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, kept: PackedFilters,
    geometry: Geometry, activation: str,
) -> Tensor:  # fmt: skip
    """`run_fwd` for a weight that does not change: kernels are chosen for it, and find it in `kept` as they want it."""
    return follow(find_frozen(x, w, bias, residual, geometry, activation), x, w, bias, residual, kept)


def find_dgrad(
    dy: Tensor, w: Tensor, x_shape: Shape, channels_last: bool,
    stride: Pair, padding: Quad, dilation: Pair, groups: int,
) -> _Recipe:  # fmt: skip
    return _dgrad_recipe(
        dy.shape, dy.stride(), w.shape, w.stride(), dy.dtype, x_shape, channels_last, stride, padding, dilation, groups,
        _get_threads(), _forced().get("conv2d_dgrad", ""), plan.strict,
    )  # fmt: skip


def run_dgrad(
    dy: Tensor, w: Tensor, bias: Tensor | None, x_shape: Shape, channels_last: bool,
    stride: Pair, padding: Quad, dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    recipe = find_dgrad(dy, w, x_shape, channels_last, stride, padding, dilation, groups)
    if recipe.copy_a is not None:
        dy = dy.contiguous(memory_format=recipe.copy_a)
    dx: Tensor = empty_strided(recipe.out_shape, recipe.out_strides, dy.dtype)
    if recipe.plan is None:
        dx.zero_()
    else:
        recipe.plan.execute(dx.data_ptr(), w.data_ptr(), 0, 0, dy.data_ptr())
    if bias is not None:
        dx.add_(bias.view(-1, 1, 1))
    return dx


def find_wgrad(
    dy: Tensor, x: Tensor, w_shape: Shape, channels_last: bool, with_bias: bool,
    stride: Pair, padding: Quad, dilation: Pair, groups: int,
) -> _Recipe:  # fmt: skip
    return _wgrad_recipe(
        dy.shape, dy.stride(), x.shape, x.stride(), dy.dtype, w_shape, channels_last, with_bias,
        stride, padding, dilation, groups, _get_threads(), _forced().get("conv2d_wgrad", ""), plan.strict,
    )  # fmt: skip


def run_wgrad(
    dy: Tensor, x: Tensor, w_shape: Shape, channels_last: bool, with_bias: bool,
    stride: Pair, padding: Quad, dilation: Pair, groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    recipe = find_wgrad(dy, x, w_shape, channels_last, with_bias, stride, padding, dilation, groups)
    if recipe.copy_a is not None:
        dy = dy.contiguous(memory_format=recipe.copy_a)
    if recipe.copy_b is not None:
        x = x.contiguous(memory_format=recipe.copy_b)
    dw: Tensor = empty_strided(recipe.out_shape, recipe.out_strides, x.dtype)
    if recipe.plan is None:
        return dw.zero_(), dy.sum((0, 2, 3)) if with_bias else dw.new_empty(0)
    db: Tensor = empty_strided((w_shape[0] if with_bias else 0,), (1,), x.dtype)
    recipe.plan.execute(x.data_ptr(), dw.data_ptr(), db.data_ptr(), 0, dy.data_ptr())
    return dw, db


# ---- Registration ---------------------------------------------------------------------------------------------------------

library = torch.library.Library("fastconv", "FRAGMENT")

# The fake kernels read strides, so compiled code has to hand over the strides that were traced.
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

library.define(
    "conv2d_fwd(Tensor x, Tensor w, Tensor? bias, Tensor? residual, SymInt[2] stride, SymInt[4] padding, "
    "SymInt[2] dilation, SymInt groups, str activation) -> Tensor",
    tags=TAGS,
)
library.define(
    "conv2d_dgrad(Tensor dy, Tensor w, Tensor? bias, SymInt[4] x_shape, bool channels_last, SymInt[2] stride, "
    "SymInt[4] padding, SymInt[2] dilation, SymInt groups) -> Tensor",
    tags=TAGS,
)
library.define(
    "conv2d_wgrad(Tensor dy, Tensor x, SymInt[4] w_shape, bool channels_last, bool with_bias, SymInt[2] stride, "
    "SymInt[4] padding, SymInt[2] dilation, SymInt groups) -> (Tensor, Tensor)",
    tags=TAGS,
)


def _check_positive(op: str, stride: Sequence[int], dilation: Sequence[int], groups: int) -> None:
    if groups < 1 or min(*stride, *dilation) < 1:
        raise RuntimeError(
            f"fastconv::{op}: got stride {list(stride)}, dilation {list(dilation)}, groups {groups}, expected positive numbers"
        )


def _check_fit(
    op: str,
    x: Shape,
    w: Shape,
    y: Shape,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Raises RuntimeError unless the three shapes make one convolution: the registered ops are open to anybody."""
    _check_positive(op, stride, dilation, groups)
    if x[1] != w[1] * groups or w[0] % groups:
        raise RuntimeError(
            f"fastconv::{op}: weight {list(w)} in {groups} groups does not fit the {x[1]} channels of {list(x)}"
        )
    expected = (x[0], w[0], *output_size(x[2], x[3], w[2], w[3], stride, padding, dilation))
    if tuple(y) != expected or min(expected) < 0:
        raise RuntimeError(f"fastconv::{op}: {list(x)} and {list(w)} make an output of {list(expected)}, got {list(y)}")


def _check_bias(op: str, bias: Tensor | None, channels: int) -> None:
    if bias is not None:
        check_shape(op, "bias", bias.shape, (channels,))


def _fwd_impl(x, w, bias, residual, stride, padding, dilation, groups, activation):  # type: ignore[no-untyped-def]
    check_operands("conv2d_fwd", x=x, w=w, bias=bias, residual=residual)
    _check_positive("conv2d_fwd", stride, dilation, groups)
    y = (
        x.shape[0],
        w.shape[0],
        *output_size(x.shape[2], x.shape[3], w.shape[2], w.shape[3], stride, padding, dilation),
    )
    _check_fit("conv2d_fwd", x.shape, w.shape, y, stride, padding, dilation, groups)
    _check_bias("conv2d_fwd", bias, w.shape[0])
    if residual is not None:
        check_shape("conv2d_fwd", "residual", residual.shape, y)
    return run_fwd(x, w, bias, residual, tuple(stride), tuple(padding), tuple(dilation), groups, activation)


def _dgrad_impl(dy, w, bias, x_shape, channels_last, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    check_operands("conv2d_dgrad", dy=dy, w=w, bias=bias)
    _check_fit("conv2d_dgrad", x_shape, w.shape, dy.shape, stride, padding, dilation, groups)
    _check_bias("conv2d_dgrad", bias, x_shape[1])
    return run_dgrad(dy, w, bias, tuple(x_shape), channels_last, tuple(stride), tuple(padding), tuple(dilation), groups)


def _wgrad_impl(dy, x, w_shape, channels_last, with_bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    check_operands("conv2d_wgrad", dy=dy, x=x)
    _check_fit("conv2d_wgrad", x.shape, w_shape, dy.shape, stride, padding, dilation, groups)
    return run_wgrad(
        dy, x, tuple(w_shape), channels_last, with_bias, tuple(stride), tuple(padding), tuple(dilation), groups
    )


library.impl("conv2d_fwd", _fwd_impl, "CPU")
library.impl("conv2d_dgrad", _dgrad_impl, "CPU")
library.impl("conv2d_wgrad", _wgrad_impl, "CPU")


def _fwd_fake(x, w, bias, residual, stride, padding, dilation, groups, activation):  # type: ignore[no-untyped-def]
    last = prefers_channels_last(x.shape, x.stride()) or prefers_channels_last(w.shape, w.stride())
    y = (
        x.shape[0],
        w.shape[0],
        *output_size(x.shape[2], x.shape[3], w.shape[2], w.shape[3], stride, padding, dilation),
    )
    return x.new_empty_strided(y, strides_of(y, last))


def _dgrad_fake(dy, w, bias, x_shape, channels_last, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return dy.new_empty_strided(x_shape, strides_of(x_shape, channels_last))


def _wgrad_fake(dy, x, w_shape, channels_last, with_bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return x.new_empty_strided(w_shape, strides_of(w_shape, channels_last)), x.new_empty(w_shape[0] if with_bias else 0)


torch.library.register_fake("fastconv::conv2d_fwd", _fwd_fake, lib=library)
torch.library.register_fake("fastconv::conv2d_dgrad", _dgrad_fake, lib=library)
torch.library.register_fake("fastconv::conv2d_wgrad", _wgrad_fake, lib=library)


# ---- The ops below autograd, by the shortest way that is right here ---------------------------------------------------------

fwd_op: Callable[..., Tensor] = torch.ops.fastconv.conv2d_fwd.default
dgrad_op: Callable[..., Tensor] = torch.ops.fastconv.conv2d_dgrad.default
wgrad_op: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fastconv.conv2d_wgrad.default


def fwd(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None,
    stride: Pair, padding: Quad, dilation: Pair, groups: int, activation: str = "none",
) -> Tensor:  # fmt: skip
    """activation(conv(x, w) + bias + residual), of shape (N, K, P, Q); channels_last if x or w is."""
    call = run_fwd if direct(x, w, bias, residual) else fwd_op
    return call(x, w, bias, residual, stride, padding, dilation, groups, activation)


def dgrad(
    dy: Tensor, w: Tensor, bias: Tensor | None, x_shape: Shape, channels_last: bool,
    stride: Pair, padding: Quad, dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    """The gradient for x, of shape `x_shape`, plus a bias for each of its channels if one is given."""
    call = run_dgrad if direct(dy, w, bias) else dgrad_op
    return call(dy, w, bias, x_shape, channels_last, stride, padding, dilation, groups)


def wgrad(
    dy: Tensor, x: Tensor, w_shape: Shape, channels_last: bool, with_bias: bool,
    stride: Pair, padding: Quad, dilation: Pair, groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients for w, of shape `w_shape`, and for the bias (of length 0 if `with_bias` is false)."""
    call = run_wgrad if direct(dy, x) else wgrad_op
    return call(dy, x, w_shape, channels_last, with_bias, stride, padding, dilation, groups)
