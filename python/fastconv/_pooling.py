"""The max, average and adaptive pools of torch.nn.functional, over one and two dimensions.

A pool over one dimension is one over images of height 1. The usual call of a 2-D pool is recognised and dispatched in a few
microseconds; everything else goes through `_general` or `_adaptive`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import _pool_checks as checks
from . import plan
from ._arguments import INT_MAX, boolean, integer, tensor
from ._pool_checks import Windows
from ._routes import for_torch, overridden, plain
from .ops import _eager
from .ops import avg_pool2d as avg_ops
from .ops import max_pool2d as max_ops
from .ops._dispatch import DTYPES, KERNEL, usual
from .ops.pool2d import Recipe, chosen

_dynamo = torch.compiler.is_dynamo_compiling
_eager_max, _eager_avg = _eager.native.eager_max_pool2d, _eager.native.eager_avg_pool2d
_eager_adaptive_avg = _eager.native.eager_adaptive_avg_pool2d

Size = int | Sequence[int]
OptionalSize = int | Sequence[int | None]
Pair = tuple[int, int]


# ---- Max ------------------------------------------------------------------------------------------------------------------


def max_pool1d_with_indices(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """Maxima of `input` (N, C, L) or (C, L) and their positions: `torch.nn.functional.max_pool1d_with_indices`."""
    options = kernel_size, stride, padding, dilation, ceil_mode
    return _max("max_pool1d", 1, max_pool1d_with_indices, F.max_pool1d_with_indices, input, options)  # type: ignore[no-any-return]


def max_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Maxima of windows over `input` (N, C, L) or (C, L): `torch.nn.functional.max_pool1d`. See `max_pool2d`."""
    if return_indices:
        return max_pool1d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode, True)
    return _max("max_pool1d", 1, max_pool1d, F.max_pool1d, input, (kernel_size, stride, padding, dilation, ceil_mode))


def max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """Maxima of `input` (N, C, H, W) or (C, H, W) and their positions: `torch.nn.functional.max_pool2d_with_indices`.

    The positions are int64, flat within the (H, W) plane. The other arguments are those of `max_pool2d`.
    """
    if plain(input):
        windows = usual_windows(input.shape, kernel_size, stride, padding, dilation, ceil_mode)
        if windows is not None:
            return max_ops.max_pool2d(input, *windows, ceil_mode)
    options = kernel_size, stride, padding, dilation, ceil_mode
    return _max("max_pool2d", 2, max_pool2d_with_indices, F.max_pool2d_with_indices, input, options)  # type: ignore[no-any-return]


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Maxima of windows over `input` (N, C, H, W) or (C, H, W): `torch.nn.functional.max_pool2d`.

    kernel_size, stride (default: kernel_size), padding (minus infinity, at most half the kernel) and dilation are ints or
    (height, width), in pixels. ceil_mode rounds the number of windows up and drops one that would start in the padding.

    Returns (N, C, P, Q), or (C, P, Q), in the input's memory format; with return_indices also the positions (int64, flat in the
    plane). NaN beats every number, and among equals the first wins. float32 and float64 on the CPU run on our kernels, other
    dtypes and devices go to torch. Raises RuntimeError where sizes or values do not fit, TypeError for a wrong type.
    """
    if not return_indices and not _dynamo():
        y = _eager_max(input, kernel_size, stride, padding, dilation, ceil_mode)
        if y is not None:
            return y
    how = None if return_indices else usual(input, input, None)
    if how is not None and _are_options(kernel_size, stride, padding, dilation, ceil_mode):
        options = kernel_size, stride, padding, dilation, ceil_mode
        recipe = max_recipe(input.shape, input.stride(), input.dtype, *options, *chosen("max_pool2d_fwd"))
        if recipe is not None:
            return max_ops.follow(input, recipe) if how is KERNEL else max_ops.follow_with_gradient(input, recipe)[0]
    if plain(input):
        windows = usual_windows(input.shape, kernel_size, stride, padding, dilation, ceil_mode)
        if windows is not None:
            pool = max_ops.max_pool2d if return_indices else max_ops.max_values2d
            return pool(input, *windows, ceil_mode)
    if return_indices:
        return max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode, True)
    return _max("max_pool2d", 2, max_pool2d, F.max_pool2d, input, (kernel_size, stride, padding, dilation, ceil_mode))


def _max(
    op: str,
    dims: int,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    input: Tensor,
    options: tuple[Any, ...],
) -> Any:
    """What `theirs` gives, maxima or (maxima, indices), from our kernels, from torch or from an override."""
    *sizes, ceil_mode = options
    with_indices = ours in (max_pool1d_with_indices, max_pool2d_with_indices)
    if has_torch_function_variadic(input):
        flags = {"ceil_mode": ceil_mode, "return_indices": with_indices}
        return overridden(ours, theirs, (input,), input, *sizes, **flags)
    if for_torch(op, {"input": tensor(op, "input", input)}, False):
        return theirs(input, *options)
    boolean(op, "ceil_mode", ceil_mode)
    checks.check_rank(op, dims, input)
    w = checks.windows(op, dims, *sizes)
    checks.check_windows(op, dims, tuple(input.shape), w, ceil_mode)
    if with_indices:
        found = max_ops.max_pool2d(_as_images(input, dims), *w, ceil_mode)
        return tuple(_like_input(t, input, dims) for t in found)
    y = _like_input(max_ops.max_values2d(_as_images(input, dims), *w, ceil_mode), input, dims)
    # Without a gradient torch takes another path here, and that one always answers with a contiguous tensor.
    return y.contiguous() if dims == 1 and not y.requires_grad else y


def usual_windows(
    sizes: Sequence[int], kernel_size: Any, stride: Any, padding: Any, dilation: Any, flag: Any
) -> Windows | None:
    """The windows where this is a valid pooling of a batch of images; None where the general way has to look."""
    if len(sizes) != 4 or (flag is not False and flag is not True):
        return None
    kernel, pads, dilations = c_pair(kernel_size), c_pair(padding), c_pair(dilation)
    strides = kernel if stride is None else c_pair(stride)
    if kernel is None or strides is None or pads is None or dilations is None:
        return None
    (R, S), (top, left), (down, across) = kernel, pads, dilations
    _, C, H, W = sizes
    fits = (
        C > 0
        and R > 0
        and S > 0
        and min(strides) > 0
        and down > 0
        and across > 0
        and 0 <= 2 * top <= R
        and 0 <= 2 * left <= S
        and 0 < H > down * (R - 1) - 2 * top
        and 0 < W > across * (S - 1) - 2 * left
    )
    return Windows(kernel, strides, pads, dilations) if fits else None


def _are_options(kernel_size: Any, stride: Any, padding: Any, dilation: Any, flag: Any) -> bool:
    """Whether these are ints, pairs of ints and a bool by type: a key cannot tell 1 from 1.0 and True, and torch does."""
    for value in (kernel_size, padding, dilation, kernel_size if stride is None else stride):
        kind = type(value)
        if kind is not int and (
            kind is not tuple or len(value) != 2 or type(value[0]) is not int or type(value[1]) is not int
        ):
            return False
    return flag is True or flag is False


@plan.cached
def max_recipe(
    shape: plan.Shape, strides: plan.Shape, dtype: Any, kernel: Any, stride: Any, padding: Any, dilation: Any,
    ceil_mode: bool, *chosen: Any,
) -> Recipe | None:  # fmt: skip
    """The recipe of a call as it was written, so that the usual call looks up one key; None where `_max` has to look."""
    windows = usual_windows(shape, kernel, stride, padding, dilation, ceil_mode) if dtype in DTYPES else None
    return None if windows is None else max_ops.fwd_recipe(shape, strides, dtype, *windows, ceil_mode, chosen)


@plan.cached
def avg_recipe(
    shape: plan.Shape, strides: plan.Shape, dtype: Any, kernel: Any, stride: Any, padding: Any,
    ceil_mode: bool, count_include_pad: bool, *chosen: Any,
) -> Recipe | None:  # fmt: skip
    """The same for averages."""
    windows = usual_windows(shape, kernel, stride, padding, 1, ceil_mode) if dtype in DTYPES else None
    if windows is None:
        return None
    return avg_ops.fwd_recipe(shape, strides, dtype, *windows[:3], ceil_mode, count_include_pad, None, chosen)


def c_pair(value: Any) -> Pair | None:
    """An int or a pair of ints that a C int holds; None where the general way has to look."""
    if type(value) is int:
        return (value, value) if -INT_MAX <= value <= INT_MAX else None
    if type(value) is tuple and len(value) == 2:
        a, b = value
        if type(a) is int and type(b) is int and -INT_MAX <= a <= INT_MAX and -INT_MAX <= b <= INT_MAX:
            return value
    return None


def _as_images(input: Tensor, dims: int) -> Tensor:
    """(N, C, H, W) from whatever a pool takes."""
    x = input if input.dim() == dims + 2 else input.unsqueeze(0)
    return x if dims == 2 else x.unsqueeze(2)


def _like_input(y: Tensor, input: Tensor, dims: int) -> Tensor:
    """The way back."""
    if dims == 1:
        y = y.squeeze(2)
    return y if input.dim() == dims + 2 else y.squeeze(0)


# ---- Average --------------------------------------------------------------------------------------------------------------


def avg_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Means of windows over `input` (N, C, L) or (C, L): `torch.nn.functional.avg_pool1d`. See `avg_pool2d`."""
    return _avg("avg_pool1d", 1, avg_pool1d, input, (kernel_size, stride, padding, ceil_mode, count_include_pad))


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Means of windows over `input` (N, C, H, W) or (C, H, W): `torch.nn.functional.avg_pool2d`.

    kernel_size, stride (default: kernel_size) and padding (zeros, at most half the kernel) are ints or (height, width), in
    pixels. A window's sum is divided by divisor_override, or by the pixels in it, with the padding's unless count_include_pad is
    False; what ceil_mode adds beyond the padding never counts. Results, dtypes and errors as for `max_pool2d`.
    """
    if divisor_override is None and (count_include_pad is True or count_include_pad is False):
        if not _dynamo():
            y = _eager_avg(input, kernel_size, stride, padding, ceil_mode, count_include_pad)
            if y is not None:
                return y  # type: ignore[no-any-return]
        if usual(input, input, None) is KERNEL and _are_options(kernel_size, stride, padding, 1, ceil_mode):
            windows = kernel_size, stride, padding, ceil_mode, count_include_pad
            recipe = avg_recipe(input.shape, input.stride(), input.dtype, *windows, *chosen("avg_pool2d_fwd"))
            if recipe is not None:
                return avg_ops.follow(input, recipe)
        if plain(input):
            found = usual_windows(input.shape, kernel_size, stride, padding, 1, ceil_mode)
            if found is not None:
                return avg_ops.avg_pool2d(input, *found[:3], ceil_mode, count_include_pad, None)
    options = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    return _avg("avg_pool2d", 2, avg_pool2d, input, options)


def _avg(op: str, dims: int, ours: Callable[..., Tensor], input: Tensor, options: tuple[Any, ...]) -> Tensor:
    theirs = getattr(F, op)
    if has_torch_function_variadic(input):
        return overridden(ours, theirs, (input,), input, *options)  # type: ignore[no-any-return]
    if for_torch(op, {"input": tensor(op, "input", input)}, False):
        return theirs(input, *options)  # type: ignore[no-any-return]
    kernel_size, stride, padding, ceil_mode, count_include_pad, *more = options
    boolean(op, "ceil_mode", ceil_mode)
    boolean(op, "count_include_pad", count_include_pad)
    divisor = None if not more or more[0] is None else integer(op, "divisor_override", more[0])
    if divisor == 0:
        raise RuntimeError(f"divisor must be not zero: {op}() got divisor_override=0")
    checks.check_rank(op, dims, input)
    w = checks.windows(op, dims, kernel_size, stride, padding)
    checks.check_windows(op, dims, tuple(input.shape), w, ceil_mode)
    y = avg_ops.avg_pool2d(_as_images(input, dims), *w[:3], ceil_mode, count_include_pad, divisor)
    return _like_input(y, input, dims)


# ---- Adaptive -------------------------------------------------------------------------------------------------------------


def adaptive_avg_pool1d(input: Tensor, output_size: Size) -> Tensor:
    """`output_size` means that cover `input` (N, C, L) or (C, L): `torch.nn.functional.adaptive_avg_pool1d`."""
    theirs = F.adaptive_avg_pool1d
    return _adaptive("adaptive_avg_pool1d", 1, adaptive_avg_pool1d, theirs, input, output_size)  # type: ignore[no-any-return]


def adaptive_avg_pool2d(input: Tensor, output_size: OptionalSize) -> Tensor:
    """A grid of means that covers `input` (N, C, H, W) or (C, H, W): `torch.nn.functional.adaptive_avg_pool2d`.

    output_size: an int, or (P, Q), where None keeps the input's size. Mean p is over rows floor(p·H/P) to ceil((p+1)·H/P).
    Returns (N, C, P, Q) in the input's memory format. Dtypes and errors as for `max_pool2d`.
    """
    if not _dynamo():
        y = _eager_adaptive_avg(input, output_size)
        if y is not None:
            return y  # type: ignore[no-any-return]
    if plain(input) and input.dim() == 4 and input.numel() > 0:
        size = c_pair(output_size)
        if size is not None and min(size) > 0:
            return avg_ops.adaptive_avg_pool2d(input, size)
    theirs = F.adaptive_avg_pool2d
    return _adaptive("adaptive_avg_pool2d", 2, adaptive_avg_pool2d, theirs, input, output_size)  # type: ignore[no-any-return]


def adaptive_max_pool1d_with_indices(
    input: Tensor, output_size: Size, return_indices: bool = False
) -> tuple[Tensor, Tensor]:
    """`output_size` maxima that cover `input`, and their positions: `torch.nn.functional.adaptive_max_pool1d_with_indices`."""
    theirs = F.adaptive_max_pool1d_with_indices
    ours = adaptive_max_pool1d_with_indices
    return _adaptive("adaptive_max_pool1d", 1, ours, theirs, input, output_size, return_indices)  # type: ignore[no-any-return]


def adaptive_max_pool1d(input: Tensor, output_size: Size, return_indices: bool = False) -> Any:
    """`output_size` maxima that cover `input` (N, C, L) or (C, L): `torch.nn.functional.adaptive_max_pool1d`."""
    if return_indices:
        return adaptive_max_pool1d_with_indices(input, output_size, True)
    theirs = F.adaptive_max_pool1d
    return _adaptive("adaptive_max_pool1d", 1, adaptive_max_pool1d, theirs, input, output_size, False)


def adaptive_max_pool2d_with_indices(
    input: Tensor, output_size: OptionalSize, return_indices: bool = False
) -> tuple[Tensor, Tensor]:
    """A grid of maxima that covers `input`, and their positions: `torch.nn.functional.adaptive_max_pool2d_with_indices`."""
    theirs = F.adaptive_max_pool2d_with_indices
    ours = adaptive_max_pool2d_with_indices
    return _adaptive("adaptive_max_pool2d", 2, ours, theirs, input, output_size, return_indices)  # type: ignore[no-any-return]


def adaptive_max_pool2d(input: Tensor, output_size: OptionalSize, return_indices: bool = False) -> Any:
    """A grid of maxima that covers `input` (N, C, H, W) or (C, H, W): `torch.nn.functional.adaptive_max_pool2d`.

    The windows are those of `adaptive_avg_pool2d`; NaN, ties and positions are as for `max_pool2d`.
    """
    if return_indices:
        return adaptive_max_pool2d_with_indices(input, output_size, True)
    theirs = F.adaptive_max_pool2d
    return _adaptive("adaptive_max_pool2d", 2, adaptive_max_pool2d, theirs, input, output_size, False)


def _adaptive(
    op: str,
    dims: int,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    input: Tensor,
    output_size: Any,
    return_indices: bool | None = None,
) -> Any:
    """What `theirs` gives, from our kernels, from torch or from an override. `return_indices` is None for averages."""
    if has_torch_function_variadic(input):
        flags = {} if return_indices is None else {"return_indices": return_indices}
        return overridden(ours, theirs, (input,), input, output_size, **flags)
    tensors: dict[str, Tensor | None] = {"input": tensor(op, "input", input)}
    if for_torch(op, tensors, False):
        return theirs(input, output_size)
    size = checks.adaptive_size(op, dims, output_size, input)
    if op == "adaptive_avg_pool2d" and size == (1, 1) and input.dim() not in (3, 4):
        for_torch(op, tensors, False, f"input has {input.dim()} dimensions, so this is its mean")
        return theirs(input, output_size)
    if not (op.startswith("adaptive_avg") and set(size) == {1}):
        checks.check_adaptive(op, dims, input)
    else:
        checks.check_rank(op, dims, input)
    # No kernel runs where there is nothing to compute; the mean of nothing, which is NaN, is torch's business too.
    if input.numel() == 0 or 0 in size:
        return theirs(input, output_size)
    x, pair = _as_images(input, dims), (size[0] if dims == 2 else 1, size[-1])
    if "avg" in op:
        return _like_input(avg_ops.adaptive_avg_pool2d(x, pair), input, dims)
    if ours in (adaptive_max_pool1d, adaptive_max_pool2d):
        return _like_input(max_ops.adaptive_max_values2d(x, pair), input, dims)
    return tuple(_like_input(t, input, dims) for t in max_ops.adaptive_max_pool2d(x, pair))
