"""Pooling over images: what its ops share. The ops are in `max_pool2d` and `avg_pool2d`.

All tensors are 4-D, float32 or float64; sizes, kernels, strides and dilations are (height, width). Padding is that too, or (top,
bottom, left, right). Nothing is checked here: `fastconv.functional` has done that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import plan
from ._dispatch import DTYPES

Pair = tuple[int, int]
Quad = tuple[int, int, int, int]
Chosen = tuple[int, str, bool]
# Output shape, output strides, and the plan; None where there is nothing to compute.
Recipe = tuple[plan.Shape, plan.Shape, plan.Plan | None]

LIBRARY = torch.library.Library("fastconv", "FRAGMENT")


def define(schema: str) -> None:
    """Registers an op of namespace `fastconv`. Outputs take their strides from the inputs, so compilers must keep those."""
    LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))


def pair(values: Sequence[int]) -> Pair:
    """Two ints, which torch hands to an op as a list, as a key can hold them."""
    if type(values) is tuple:
        return values
    height, width = values
    return height, width


def sides(padding: Sequence[int]) -> Pair | Quad:
    """Padding as a key can hold it, two ints or four."""
    if type(padding) is tuple:
        return padding
    return pair(padding) if len(padding) == 2 else four(padding)


def four(padding: Sequence[int]) -> Quad:
    """Padding as (top, bottom, left, right)."""
    if len(padding) == 2:
        return padding[0], padding[0], padding[1], padding[1]
    top, bottom, left, right = padding
    return top, bottom, left, right


def output_size(size: int, kernel: int, stride: int, padding: Pair, dilation: int, ceil_mode: bool) -> int:
    """Number of windows along an axis padded (before, after). With ceil_mode, one that would start in the far padding is not."""
    before, after = padding
    room = size + before + after - dilation * (kernel - 1) - 1
    windows = (room + stride - 1 if ceil_mode else room) // stride + 1
    if ceil_mode and (windows - 1) * stride >= size + before:
        windows -= 1
    return windows


def output_shape(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, int, int, int]:
    """(N, C, P, Q) of a pooled (N, C, H, W)."""
    N, C, H, W = shape
    top, bottom, left, right = four(padding)
    P = output_size(H, kernel[0], stride[0], (top, bottom), dilation[0], ceil_mode)
    Q = output_size(W, kernel[1], stride[1], (left, right), dilation[1], ceil_mode)
    return N, C, P, Q


def channels_last(x: Tensor) -> bool:
    """Whether torch takes x, and so everything computed from it, for channels_last."""
    return plan.prefers_channels_last(x.shape, x.stride())


def empty_like_format(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of this shape in x's memory format."""
    return empty(x, shape, channels_last(x), dtype)


def empty(x: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised 4-D tensor on x's device, in x's dtype unless another is given."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


def recipe(
    op: str,
    dtype: torch.dtype,
    x: tuple[plan.Shape, plan.Shape],
    y: tuple[plan.Shape, plan.Shape],
    chosen: Chosen,
    kernel: Pair,
    stride: Pair,
    padding: Pair | Quad,
    dilation: Pair = (1, 1),
    divisor_override: int = 0,
    count_include_pad: bool = True,
    adaptive: bool = False,
) -> plan.Plan | None:
    """The plan for operands (shape, strides); None where one is empty. NotImplementedError for a dtype without kernels."""
    name = DTYPES.get(dtype)
    if name is None:
        raise NotImplementedError(f'"fastconv::{op}" not implemented for {dtype}, expected float32 or float64')
    if 0 in x[0] or 0 in y[0]:
        return None
    problem = plan.pool2d_problem(
        name, x, y, kernel, stride, four(padding), dilation, divisor_override, count_include_pad, adaptive
    )
    return plan.make(op, problem, name, (x[0], y[0]), *chosen)


def chosen(op: str) -> Chosen:
    """What a plan depends on besides the problem: threads, the forced kernel, strict accuracy."""
    return torch.get_num_threads(), plan.forced.get().get(op, ""), plan.strict


def fold(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """vmap's (…, B, …) with B at `dim` (None: not there) as (B*N, …): a batched pooling is a larger batch."""
    if dim is None:
        tensor = tensor.expand(batch_size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def unfold(tensor: Tensor, batch_size: int) -> Tensor:
    """(B*N, …) as (B, N, …)."""
    return tensor.unflatten(0, (batch_size, tensor.shape[0] // batch_size))  # type: ignore[no-any-return]


def vmap_fwd(pool: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule of `pool(x, *options)`, which returns one tensor or several."""

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *options: Any) -> Any:
        out = pool(fold(x, in_dims[0], info.batch_size), *options)
        if isinstance(out, tuple):
            return tuple(unfold(t, info.batch_size) for t in out), (0,) * len(out)
        return unfold(out, info.batch_size), 0

    return rule


def vmap_bwd(pool: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """The vmap rule of `pool(*tensors, x_size, *options)`, which returns a tensor of size x_size."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        folded = [fold(t, dim, info.batch_size) for t, dim in zip(args[:tensors], in_dims)]
        N, *plane = args[tensors]
        out = pool(*folded, (info.batch_size * N, *plane), *args[tensors + 1 :])
        return unfold(out, info.batch_size), 0

    return rule
