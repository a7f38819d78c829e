"""The kernels for GPUs, on CUDA tensors: convolution, linear, pooling, attention and layer norm, with their gradients.

They are proven by emulation (docs/cuda.md) and have not run on a GPU yet. Until they are measured there, `fastconv.functional`
leaves CUDA tensors to torch, and here is where to call them: float32, bfloat16 and float16, sums always in float32. Work is
started on torch's current stream of the tensors' device and memory comes from torch's allocator, so nothing synchronises. There
is no torch.compile, autocast or second derivative yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import _conv_checks, _pool_checks, plan
from . import _cuda_calls as calls
from ._cuda_attention import scaled_dot_product_attention
from ._cuda_calls import DTYPES
from ._normalization import check_dtypes, check_shapes
from .plan import prefers_channels_last, strides_of

__all__ = [
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "conv2d", "layer_norm", "linear", "max_pool2d",
    "scaled_dot_product_attention",
]  # fmt: skip

Size = int | Sequence[int]


def _layout(t: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(t.shape), t.stride()


def _empty(like: Tensor, shape: tuple[int, ...], last: bool, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_strided(shape, strides_of(shape, last), dtype=dtype or like.dtype, device=like.device)


def _last(t: Tensor) -> bool:
    return prefers_channels_last(t.shape, t.stride())


# ---- Convolution ------------------------------------------------------------------------------------------------------------


class _Conv2d(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, device: int, y_shape: Any, geometry: Any, product: str
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.device, ctx.geometry, ctx.product = device, geometry, product
        y = _empty(x, y_shape, _last(x) or _last(w))
        bias = None if bias is None else bias.contiguous()
        problem = DTYPES[x.dtype], _layout(x), _layout(w), _layout(y), *geometry, bias is not None
        strict = not calls.allows_tf32(product)
        calls.run("conv2d_fwd", plan.conv2d_problem, problem, device, x, x, w, bias, None, y, strict=strict)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        dx = dw = db = None
        wants_x, wants_w, wants_bias = ctx.needs_input_grad[:3]
        strict = not calls.allows_tf32(ctx.product)
        if wants_x:
            dx = _empty(x, tuple(x.shape), _last(x))
            problem = DTYPES[x.dtype], _layout(dx), _layout(w), _layout(dy), *ctx.geometry
            calls.run("conv2d_dgrad", plan.conv2d_problem, problem, ctx.device, x, dx, w, None, None, dy, strict=strict)
        if wants_w or wants_bias:
            dw = _empty(w, tuple(w.shape), _last(w))
            db = torch.empty(w.shape[0], dtype=w.dtype, device=w.device) if wants_bias else None
            problem = DTYPES[x.dtype], _layout(x), _layout(dw), _layout(dy), *ctx.geometry, wants_bias
            calls.run("conv2d_wgrad", plan.conv2d_problem, problem, ctx.device, x, x, dw, db, None, dy, strict=strict)
        return dx, dw, db, None, None, None, None


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` of `input` (N, C, H, W), `weight` (K, C/groups, R, S) and `bias` (K) on one GPU.

    float32 is rounded to tf32 where torch's own `torch.backends.cudnn.allow_tf32` (or `.conv.fp32_precision`) lets it, and never
    under `set_accuracy("strict")`.
    Returns (N, K, P, Q), channels_last where an operand is. Raises what torch raises for arguments that do not fit, RuntimeError
    where the operands are not on one CUDA device, NotImplementedError, with reasons, for a dtype or problem without a kernel.
    """
    return _convolve("conv", input, weight, bias, stride, padding, dilation, groups)


def _convolve(
    product: str, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, padding: Size | str, dilation: Size,
    groups: int,
) -> Tensor:  # fmt: skip
    """conv2d, whose precision is what torch says of a `product`."""
    op = "conv2d"
    device = calls.device(op, _conv_checks.tensors(op, input, weight, bias))
    _conv_checks.check_dtypes(op, input, weight, bias)
    _conv_checks.check_ranks(op, 2, input, weight)
    g = _conv_checks.geometry(op, 2, weight, stride, padding, dilation, groups, 0)
    if input.dim() == 3:
        return _convolve(product, input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    _conv_checks.check_shapes(op, False, input, weight, bias, g.groups)
    _conv_checks.check_extent(op, input, weight, g)
    if input.numel() == 0 or weight.numel() == 0 or g.huge():
        raise NotImplementedError("fastconv.cuda.conv2d: no kernel takes an empty operand or an option beyond 31 bits")
    (top, left), (bottom, right) = g.before, g.after
    windows = zip(input.shape[2:], weight.shape[2:], g.stride, g.before, g.after, g.dilation)
    size = tuple((n + a + b - d * (r - 1) - 1) // u + 1 for n, r, u, a, b, d in windows)
    y_shape = (input.shape[0], weight.shape[0], *size)
    geometry = g.stride, (top, bottom, left, right), g.dilation, g.groups
    return _Conv2d.apply(  # type: ignore[no-any-return, no-untyped-call]
        input, weight, bias, device, y_shape, geometry, product
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input` (…, I) times `weight` (O, I) transposed, plus `bias` (O): a 1x1 convolution. Returns (…, O); errors as `conv2d`.

    tf32 where `torch.backends.cuda.matmul.allow_tf32` (or its `fp32_precision`) lets it.
    """
    _conv_checks.check_linear("linear", input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    y = _convolve("matmul", rows[:, :, None, None], weight[:, :, None, None], bias, 1, 0, 1, 1)
    return y.reshape(*input.shape[:-1], weight.shape[0])


# ---- Pooling ----------------------------------------------------------------------------------------------------------------


class _MaxPool2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, device: int, y_shape: Any, windows: Any) -> tuple[Tensor, Tensor]:
        y, indices = _empty(x, y_shape, _last(x)), _empty(x, y_shape, _last(x), torch.int64)
        calls.run(
            "max_pool2d_fwd",
            plan.pool2d_problem,
            (DTYPES[x.dtype], _layout(x), _layout(y), *windows),
            device,
            x,
            x,
            y,
            indices,
        )
        ctx.save_for_backward(indices)
        ctx.device, ctx.windows, ctx.x_shape, ctx.last = device, windows, tuple(x.shape), _last(x)
        ctx.mark_non_differentiable(indices)
        return y, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        (indices,) = ctx.saved_tensors
        if dy.stride() != indices.stride():  # the kernel walks both with one set of strides
            dy = torch.empty_like(indices, dtype=dy.dtype).copy_(dy)
        dx = _empty(dy, ctx.x_shape, ctx.last)
        problem = DTYPES[dy.dtype], _layout(dx), _layout(dy), *ctx.windows
        calls.run("max_pool2d_bwd", plan.pool2d_problem, problem, ctx.device, dy, dx, dy, indices)
        return dx, None, None, None


class _AvgPool2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, device: int, y_shape: Any, windows: Any) -> Tensor:
        y = _empty(x, y_shape, _last(x))
        calls.run(
            "avg_pool2d_fwd",
            plan.pool2d_problem,
            (DTYPES[x.dtype], _layout(x), _layout(y), *windows),
            device,
            x,
            x,
            y,
            None,
        )
        ctx.device, ctx.windows, ctx.x_shape, ctx.last = device, windows, tuple(x.shape), _last(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx = _empty(dy, ctx.x_shape, ctx.last)
        problem = DTYPES[dy.dtype], _layout(dx), _layout(dy), *ctx.windows
        calls.run("avg_pool2d_bwd", plan.pool2d_problem, problem, ctx.device, dy, dx, dy, None)
        return dx, None, None, None


def _pooled(op: str, input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Any:
    """The device, the output's shape and the windows of a pooling of images."""
    device = calls.device(op, {"input": input})
    if input.dim() != 4 or input.numel() == 0:
        raise NotImplementedError(
            f"fastconv.cuda.{op}: got shape {list(input.shape)}, expected (N, C, H, W), not empty"
        )
    w = _pool_checks.windows(op, 2, kernel_size, stride, padding, dilation)
    _pool_checks.check_windows(op, 2, tuple(input.shape), w, ceil_mode)
    from .ops.pool2d import output_shape

    (top, left), shape = w.padding, output_shape(input.shape, *w, ceil_mode)
    return device, shape, (w.kernel, w.stride, (top, top, left, left), w.dilation)


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """`torch.nn.functional.max_pool2d` of `input` (N, C, H, W) on a GPU, with a gradient that is the same in every run.

    Errors as `conv2d`.
    """
    device, shape, windows = _pooled("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode)
    found = _MaxPool2d.apply(input, device, shape, windows)  # type: ignore[no-untyped-call]
    return found if return_indices else found[0]


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`torch.nn.functional.avg_pool2d` of `input` (N, C, H, W) on a GPU. Errors as `conv2d`."""
    if divisor_override == 0:
        raise RuntimeError("divisor must be not zero: avg_pool2d() got divisor_override=0")
    device, shape, windows = _pooled("avg_pool2d", input, kernel_size, stride, padding, 1, ceil_mode)
    options = *windows, divisor_override or 0, count_include_pad
    return _AvgPool2d.apply(input, device, shape, options)  # type: ignore[no-any-return, no-untyped-call]


def _adaptive(op: str, input: Tensor, output_size: Any) -> Any:
    """The device, the output's shape and the windows of an adaptive pooling."""
    device = calls.device(op, {"input": input})
    if input.dim() != 4 or input.numel() == 0:
        raise NotImplementedError(
            f"fastconv.cuda.{op}: got shape {list(input.shape)}, expected (N, C, H, W), not empty"
        )
    size = _pool_checks.adaptive_size(op, 2, output_size, input)
    windows = (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 0, True, True
    return device, (*input.shape[:2], *size), windows


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d` of `input` (N, C, H, W) on a GPU. Errors as `conv2d`."""
    device, shape, windows = _adaptive("adaptive_avg_pool2d", input, output_size)
    return _AvgPool2d.apply(input, device, shape, windows)  # type: ignore[no-any-return, no-untyped-call]


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """`torch.nn.functional.adaptive_max_pool2d` of `input` (N, C, H, W) on a GPU, with a gradient that is the same in every run.

    Errors as `conv2d`.
    """
    device, shape, windows = _adaptive("adaptive_max_pool2d", input, output_size)
    found = _MaxPool2d.apply(input, device, shape, windows)  # type: ignore[no-untyped-call]
    return found if return_indices else found[0]


# ---- Layer normalisation ----------------------------------------------------------------------------------------------------


class _LayerNorm(Function):
    """Of rows (N, C): what is normalised, x + residual or x, and the result."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, w: Tensor | None, bias: Tensor | None, eps: float, device: int
    ) -> tuple[Tensor, Tensor]:
        y, mean, rstd = torch.empty_like(x), *x.new_empty((2, x.shape[0]), dtype=torch.float32)
        total = x if residual is None else torch.empty_like(x)
        problem = DTYPES[x.dtype], tuple(x.shape), eps
        if x.numel():
            operands = x, residual, w, bias, None if residual is None else total, y, mean, rstd, *(None,) * 5
            calls.run("layer_norm_fwd", plan.norm_problem, problem, device, x, *operands)
        ctx.save_for_backward(total, mean, rstd, w)
        ctx.device, ctx.problem = device, problem
        ctx.set_materialize_grads(False)
        return y, x.new_empty(0) if residual is None else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> Any:
        x, mean, rstd, w = ctx.saved_tensors
        wants_x, wants_residual, wants_w, wants_bias = ctx.needs_input_grad[:4]
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dsum = dsum.contiguous() if dsum is not None and dsum.numel() else None
        dx = torch.empty_like(x) if wants_x or wants_residual else None
        dw, db = (x.new_zeros(x.shape[1]) if wanted else None for wanted in (wants_w, wants_bias))
        if x.numel():
            operands = x, None, w, None, None, None, mean, rstd, dy, dsum, dx, dw, db
            calls.run("layer_norm_bwd", plan.norm_problem, ctx.problem, ctx.device, x, *operands)
        return dx if wants_x else None, dx if wants_residual else None, dw, db, None, None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Any:
    """`fastconv.functional.layer_norm` on a GPU; with `residual`, (normalised, input + residual).

    Halves normalise the sum as it is stored. All operands have gradients, the same in every run. Raises as that function,
    RuntimeError where the operands are not on one CUDA device, NotImplementedError for a dtype without a kernel.
    """
    op, shape = "layer_norm", tuple(normalized_shape)
    tensors = {"input": input, "weight": weight, "bias": bias, "residual": residual}
    device = calls.device(op, tensors)
    check_shapes(input, shape, weight, bias, residual)
    check_dtypes(input, weight, bias, residual)
    rows, C = math.prod(input.shape[: input.dim() - len(shape)]), math.prod(shape)
    matrices = (None if t is None else t.reshape(rows, C).contiguous() for t in (input, residual))
    vectors = (None if t is None else t.reshape(C).contiguous() for t in (weight, bias))
    y, total = _LayerNorm.apply(*matrices, *vectors, float(eps), device)  # type: ignore[no-untyped-call]
    return y.view(input.shape) if residual is None else (y.view(input.shape), total.view(input.shape))
