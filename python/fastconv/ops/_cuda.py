"""The registered ops on CUDA tensors: the kernels for GPUs, on the operands' device and torch's current stream there.

Derivatives, vmap rules and fakes are those that the ops have on the CPU; only what is below the dispatcher differs. Kernels take
operands of any strides, so that little is copied. Memory comes from torch's allocator and nothing synchronises. float32, bfloat16
and float16; sums are in float32, and products of float32 are rounded to tf32 where torch's own switches let them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import plan
from ..plan import Shape, prefers_channels_last, strides_of
from . import _conv2d_kernels as conv2d
from . import layer_norm, linear, pool2d, sdpa
from ._cuda_launch import Asked, Launch, allows_tf32
from ._dispatch import check_operands, check_shape
from .conv2d import ACTIVATIONS

MaybeTensor: TypeAlias = Tensor | None
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _address(t: MaybeTensor) -> int:
    return 0 if t is None else t.data_ptr()


def _layout(t: Tensor) -> tuple[Shape, Shape]:
    return tuple(t.shape), t.stride()


def _empty(like: Tensor, shape: Shape, last: bool, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty_strided(shape, strides_of(shape, last), dtype=dtype or like.dtype)


def _last(t: Tensor) -> bool:
    return prefers_channels_last(t.shape, t.stride())


def _nothing(*tensors: Tensor) -> bool:
    return any(t.numel() == 0 for t in tensors)


# ---- Convolution ------------------------------------------------------------------------------------------------------------


def _convolve(op: str, problem: tuple[Any, ...], operands: tuple[MaybeTensor, ...], product: str = "conv") -> None:
    """Starts `op` on x, w, bias, residual, y, whose layouts begin `problem`."""
    like = operands[0]
    assert like is not None
    dtype, shapes = DTYPES[like.dtype], tuple(layout[0] for layout in problem[:3])
    asked = Asked(op, plan.conv2d_problem, (dtype, *problem), dtype, shapes)
    Launch(asked, like, not allows_tf32(product)).execute(*map(_address, operands))


def _conv2d_fwd(
    x: Tensor, w: Tensor, bias: MaybeTensor, residual: MaybeTensor, stride: Any, padding: Any, dilation: Any,
    groups: int, activation: str,
) -> Tensor:  # fmt: skip
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    shape = conv2d.check_fwd(x, w, bias, residual, *geometry, dtypes=DTYPES)
    y = _empty(x, shape, _last(x) or _last(w))
    if _nothing(x, w, y):
        return y.zero_()
    bias = None if bias is None else bias.contiguous()
    if residual is not None and residual.stride() != y.stride():
        residual = torch.empty_like(y).copy_(residual)
    problem = _layout(x), _layout(w), _layout(y), *geometry, bias is not None, residual is not None, activation
    _convolve("conv2d_fwd", problem, (x, w, bias, residual, y))
    return y


def _conv2d_dgrad(
    dy: Tensor, w: Tensor, bias: MaybeTensor, x_shape: Any, channels_last: bool, stride: Any, padding: Any, dilation: Any,
    groups: int,
) -> Tensor:  # fmt: skip
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    conv2d.check_dgrad(dy, w, bias, x_shape, *geometry, dtypes=DTYPES)
    dx = _empty(dy, tuple(x_shape), channels_last)
    if _nothing(dy, w, dx):
        dx.zero_()
    else:
        problem = _layout(dx), _layout(w), _layout(dy), *geometry
        _convolve("conv2d_dgrad", problem, (dx, w, None, None, dy))
    return dx if bias is None else dx.add_(bias.view(-1, 1, 1))


def _conv2d_wgrad(
    dy: Tensor, x: Tensor, w_shape: Any, channels_last: bool, with_bias: bool, stride: Any, padding: Any, dilation: Any,
    groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    conv2d.check_wgrad(dy, x, w_shape, *geometry, dtypes=DTYPES)
    dw = _empty(x, tuple(w_shape), channels_last)
    db = x.new_empty(w_shape[0] if with_bias else 0)
    if _nothing(dy, x, dw):
        return dw.zero_(), dy.sum((0, 2, 3)) if with_bias else db
    problem = _layout(x), _layout(dw), _layout(dy), *geometry, with_bias
    _convolve("conv2d_wgrad", problem, (x, dw, db if with_bias else None, None, dy))
    return dw, db


# ---- Linear: a 1x1 convolution of as many images of one pixel as there are rows -----------------------------------------------

_POINT = (1, 1), (0, 0, 0, 0), (1, 1), 1


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _pixels(t: Tensor) -> tuple[Shape, Shape]:
    """A matrix as images of one pixel, or as filters of one tap."""
    (N, C), (n, c) = t.shape, t.stride()
    return (N, C, 1, 1), (n, c, 1, 1)


def _product(
    op: str, x: Tensor, w: Tensor, y: Tensor, bias: MaybeTensor, residual: MaybeTensor = None, activation: str = "none"
) -> None:
    """Starts one of the three convolutions on matrices."""
    problem = _pixels(x), _pixels(w), _pixels(y), *_POINT, bias is not None, residual is not None, activation
    _convolve(op, problem, (x, w, bias, residual, y), "matmul")


def _linear_fused(x: Tensor, w: Tensor, bias: MaybeTensor, residual: MaybeTensor, activation: str) -> Tensor:
    linear.check_fwd(x, w, bias, DTYPES)
    shape = (*x.shape[:-1], w.shape[0])
    if residual is not None:
        check_operands("linear_fused", DTYPES, x=x, residual=residual)
        check_shape("linear_fused", "residual", residual.shape, shape)
    y = x.new_empty(shape)
    if _nothing(x, w, y):
        y = y.zero_() if bias is None else y.copy_(bias.expand(shape))
        y = y if residual is None else y.add_(residual)
        return y if activation == "none" else ACTIVATIONS[activation](y)
    bias, residual = (None if t is None else t.contiguous() for t in (bias, residual))
    _product("conv2d_fwd", _rows(x), w, _rows(y), bias, None if residual is None else _rows(residual), activation)
    return y


def _linear_fwd(x: Tensor, w: Tensor, bias: MaybeTensor) -> Tensor:
    return _linear_fused(x, w, bias, None, "none")


def _linear_dgrad(dy: Tensor, w: Tensor) -> Tensor:
    linear.check_dgrad(dy, w, DTYPES)
    dx = dy.new_empty((*dy.shape[:-1], w.shape[1]))
    if _nothing(dy, w, dx):
        return dx.zero_()
    _product("conv2d_dgrad", _rows(dx), w, _rows(dy), None)
    return dx


def _linear_wgrad(dy: Tensor, x: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    linear.check_wgrad(dy, x, DTYPES)
    outputs, inputs = dy.shape[-1], x.shape[-1]
    dw, db = dy.new_empty((outputs, inputs)), dy.new_empty(outputs if with_bias else 0)
    if _nothing(dy, x):
        return dw.zero_(), dy.reshape(-1, outputs).sum(0) if with_bias and outputs else db
    _product("conv2d_wgrad", _rows(x), dw, _rows(dy), db if with_bias else None)
    return dw, db


# ---- Pooling ----------------------------------------------------------------------------------------------------------------

# Stand for the windows of an adaptive pooling, which its sizes make.
_ADAPTIVE = (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 0, True, True


def _pool(op: str, x: Tensor, y: Tensor, indices: MaybeTensor, windows: tuple[Any, ...]) -> None:
    if x.dtype not in DTYPES:
        raise NotImplementedError(f'"fastconv::{op}" not implemented for {x.dtype} on cuda')
    if _nothing(x, y):
        if op.endswith("bwd"):
            x.zero_()
        return
    dtype, shapes = DTYPES[x.dtype], (tuple(x.shape), tuple(y.shape))
    asked = Asked(op, plan.pool2d_problem, (dtype, _layout(x), _layout(y), *windows), dtype, shapes)
    Launch(asked, x).execute(_address(x), _address(y), _address(indices))


def _windows(kernel: Any, stride: Any, padding: Any, dilation: Any = (1, 1)) -> tuple[Any, ...]:
    return tuple(kernel), tuple(stride), pool2d.four(padding), tuple(dilation)


def _max_fwd(x: Tensor, shape: Shape, windows: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    y, indices = _empty(x, shape, _last(x)), _empty(x, shape, _last(x), torch.int64)
    _pool("max_pool2d_fwd", x, y, indices, windows)
    return y, indices


def _max_pool2d_fwd(
    x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    shape = pool2d.output_shape(x.shape, kernel, stride, padding, dilation, ceil_mode)
    return _max_fwd(x, shape, _windows(kernel, stride, padding, dilation))


def _adaptive_max_pool2d_fwd(x: Tensor, output_size: Any) -> tuple[Tensor, Tensor]:
    return _max_fwd(x, (*x.shape[:2], *output_size), _ADAPTIVE)


def _max_pool2d_bwd(grad: Tensor, indices: Tensor, x_size: Any, channels_last: bool, windows: Any = ()) -> Tensor:
    if not windows:
        raise NotImplementedError("fastconv::max_pool2d_bwd on cuda: got no windows, which its kernel has to know")
    if grad.stride() != indices.stride():  # the kernel walks both with one set of strides
        grad = torch.empty_like(indices, dtype=grad.dtype).copy_(grad)
        indices = torch.empty_like(indices).copy_(indices)
    dx = _empty(grad, tuple(x_size), channels_last)
    R, S, u, v, top, bottom, left, right, down, across = windows
    given = (R, S), (u, v), (top, bottom, left, right), (down, across)
    _pool("max_pool2d_bwd", dx, grad, indices, given if R else _ADAPTIVE)
    return dx


def _avg_fwd(x: Tensor, shape: Shape, windows: tuple[Any, ...]) -> Tensor:
    y = _empty(x, shape, _last(x))
    _pool("avg_pool2d_fwd", x, y, None, windows)
    return y


def _avg_pool2d_fwd(
    x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool, divisor: int | None
) -> Tensor:
    shape = pool2d.output_shape(x.shape, kernel, stride, padding, (1, 1), ceil_mode)
    return _avg_fwd(x, shape, (*_windows(kernel, stride, padding), divisor or 0, count_include_pad))


def _adaptive_avg_pool2d_fwd(x: Tensor, output_size: Any) -> Tensor:
    return _avg_fwd(x, (*x.shape[:2], *output_size), _ADAPTIVE)


def _avg_bwd(grad: Tensor, x_size: Any, channels_last: bool, windows: tuple[Any, ...]) -> Tensor:
    dx = _empty(grad, tuple(x_size), channels_last)
    _pool("avg_pool2d_bwd", dx, grad, None, windows)
    return dx


def _avg_pool2d_bwd(
    grad: Tensor, x_size: Any, channels_last: bool, kernel: Any, stride: Any, padding: Any, _: bool, count_include_pad: bool,
    divisor: int | None,
) -> Tensor:  # fmt: skip
    windows = *_windows(kernel, stride, padding), divisor or 0, count_include_pad
    return _avg_bwd(grad, x_size, channels_last, windows)


def _adaptive_avg_pool2d_bwd(grad: Tensor, x_size: Any, channels_last: bool) -> Tensor:
    return _avg_bwd(grad, x_size, channels_last, _ADAPTIVE)


# ---- Layer normalisation ----------------------------------------------------------------------------------------------------


def _normalise(op: str, x: Tensor, eps: float, *operands: MaybeTensor) -> None:
    N, C = x.shape
    if x.numel():
        asked = Asked(op, plan.norm_problem, (DTYPES[x.dtype], (N, C), eps), DTYPES[x.dtype], ((N, C),))
        Launch(asked, x).execute(*map(_address, operands))


def _layer_norm_fwd(
    x: Tensor, residual: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor, eps: float
) -> tuple[Tensor, ...]:
    layer_norm.check("layer_norm_fwd", x, {"residual": residual}, {"weight": weight, "bias": bias}, dtypes=DTYPES)
    x = x.contiguous()
    residual, weight, bias = layer_norm.contiguous(residual, weight, bias)
    y, (mean, rstd) = torch.empty_like(x), x.new_empty((2, x.shape[0]), dtype=torch.float32)
    total = x.new_empty((0, x.shape[1])) if residual is None else torch.empty_like(x)
    sums = None if residual is None else total
    _normalise("layer_norm_fwd", x, eps, x, residual, weight, bias, sums, y, mean, rstd, *(None,) * 5)
    return y, total, mean, rstd


def _layer_norm_bwd(
    dy: Tensor, dsum: MaybeTensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: MaybeTensor, eps: float, *wanted: bool
) -> tuple[Tensor, ...]:
    rows = {"dy": dy, "dsum": dsum}
    layer_norm.check("layer_norm_bwd", x, rows, {"weight": weight}, {"mean": mean, "rstd": rstd}, dtypes=DTYPES)
    dy, x, mean, rstd = dy.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous()
    dsum, weight = layer_norm.contiguous(dsum, weight)
    N, C = x.shape
    dx = x.new_empty((N if wanted[0] else 0, C))
    dweight, dbias = (x.new_zeros(C if want else 0) for want in wanted[1:])
    out = (t if want else None for t, want in zip((dx, dweight, dbias), wanted))
    _normalise("layer_norm_bwd", x, eps, x, None, weight, None, None, None, mean, rstd, dy, dsum, *out)
    return dx, dweight, dbias


# ---- Attention --------------------------------------------------------------------------------------------------------------


def _attention_problem(dtype: str, operands: tuple[tuple[str, Any], ...], mask_kind: str, options: sdpa.Options) -> Any:
    band, dropout = (options.low, options.high), (options.dropout, options.key)
    return plan.sdpa_problem(dtype, dict(operands), mask_kind, options.scale, band, options.softcap, dropout)


def _find(op: str, options: sdpa.Options, tensors: dict[str, MaybeTensor]) -> Launch | None:
    q = tensors["q"]
    assert q is not None
    if not q.shape[:3].numel():
        return None
    operands = tuple((name, _layout(t)) for name, t in tensors.items() if t is not None)
    shapes = tuple(tuple(t.shape) for t in (q, tensors["k"], tensors["v"]) if t is not None)
    dtype = DTYPES[q.dtype]
    problem = dtype, operands, sdpa.mask_kind(tensors.get("mask"), q), options
    return Launch(Asked(op, _attention_problem, problem, dtype, shapes), q)


def _sdpa_fwd(*inputs: Any) -> tuple[Tensor, Tensor]:
    given, options = sdpa.Operands(*inputs[:6]), sdpa.Options(*inputs[6:])
    sdpa.check("sdpa_fwd", given, options.dropout, DTYPES)
    lse = sdpa.row_numbers(given.q)
    return sdpa.forward(given, options, lse, _find), lse


def _sdpa_bwd(dout: Tensor, dlse: MaybeTensor, *rest: Any) -> sdpa.Gradients:
    sdpa.check_bwd(dout, dlse, *rest, dtypes=DTYPES)
    return sdpa.gradients(dout, dlse, *rest, find=_find)


# ---- Registration -----------------------------------------------------------------------------------------------------------

library = torch.library.Library("fastconv", "FRAGMENT")
library.define(
    "linear_fused(Tensor x, Tensor w, Tensor? bias, Tensor? residual, str activation) -> Tensor", tags=conv2d.TAGS
)


def _linear_fused_fake(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


torch.library.register_fake("fastconv::linear_fused", _linear_fused_fake, lib=library)

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "conv2d_fwd": _conv2d_fwd,
    "conv2d_dgrad": _conv2d_dgrad,
    "conv2d_wgrad": _conv2d_wgrad,
    "linear_fwd": _linear_fwd,
    "linear_fused": _linear_fused,
    "linear_dgrad": _linear_dgrad,
    "linear_wgrad": _linear_wgrad,
    "max_pool2d_fwd": _max_pool2d_fwd,
    "max_pool2d_bwd": _max_pool2d_bwd,
    "adaptive_max_pool2d_fwd": _adaptive_max_pool2d_fwd,
    "avg_pool2d_fwd": _avg_pool2d_fwd,
    "avg_pool2d_bwd": _avg_pool2d_bwd,
    "adaptive_avg_pool2d_fwd": _adaptive_avg_pool2d_fwd,
    "adaptive_avg_pool2d_bwd": _adaptive_avg_pool2d_bwd,
    "layer_norm_fwd": _layer_norm_fwd,
    "layer_norm_bwd": _layer_norm_bwd,
    "sdpa_fwd": _sdpa_fwd,
    "sdpa_bwd": _sdpa_bwd,
}

for _name, _implementation in IMPLEMENTATIONS.items():
    library.impl(_name, _implementation, "CUDA")

# activation(x wᵀ + bias + residual) without a derivative: for layers whose weights are frozen.
linear_fused: Callable[..., Tensor] = torch.ops.fastconv.linear_fused.default
