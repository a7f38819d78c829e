"""fastconv on NumPy arrays, and on anything that speaks DLPack. Does not import torch.

    y = fastconv.numpy.conv2d(x, w, bias, stride=2, padding="same", activation="relu")

Arrays are float32 or float64, indexed (N, C, H, W) as everywhere in this package, or (C, H, W) for one image. NHWC is a matter of
memory: pass `nhwc.transpose(0, 3, 1, 2)`, which costs nothing, and get a result whose memory lies the same way; `conv2d` also
takes TensorFlow's order of dimensions, data_format="NHWC". Other strides are copied first. The kernels are those of the torch
layers, and `fastconv.use` and `fastconv.observe` apply.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from . import plan
from ._padding import SAME, same
from .reference import ACTIVATIONS, conv_output_size, pool_output_size

Array: TypeAlias = NDArray[Any]
Size: TypeAlias = int | Sequence[int]
Pair: TypeAlias = tuple[int, int]
Quad: TypeAlias = tuple[int, int, int, int]

_DTYPES = {np.dtype(np.float32): "f32", np.dtype(np.float64): "f64"}

__all__ = ["avg_pool2d", "conv2d", "max_pool2d"]


def conv2d(
    x: Any,
    w: Any,
    bias: Any = None,
    stride: Size = 1,
    padding: Size | Literal["same", "SAME", "valid"] = 0,
    dilation: Size = 1,
    groups: int = 1,
    residual: Any = None,
    activation: str = "none",
    threads: int | None = None,
    data_format: Literal["NCHW", "NHWC"] = "NCHW",
) -> Array:
    """activation(conv(x, w) + bias + residual), as `torch.nn.functional.conv2d` defines the convolution.

    x: (N, C, H, W) or (C, H, W); w: (K, C/groups, R, S); bias: (K); residual: the shape of the result. All of one dtype.
    stride, dilation: an int or (height, width), in pixels. padding, in pixels of zeros: an int, (height, width), (top, bottom,
    left, right), "valid" (none), "same" (with stride 1 the result has the size of x; an odd pixel goes to the end) or "SAME",
    TensorFlow's (the same for any stride: the result has ceil(H/stride) rows).
    activation: "none", "relu", "relu6", "silu", "hardswish", "gelu" (the erf form), "gelu_tanh" or "sigmoid".
    threads: at most so many; None: torch's number if torch is imported, else OMP_NUM_THREADS or the cores of this process.
    data_format: "NHWC" for TensorFlow's order: x (N, H, W, C) or (H, W, C), w (R, S, C/groups, K), and residual and result (N, P,
    Q, K) or (P, Q, K). Nothing is copied for it.

    Returns (N, K, P, Q) or (K, P, Q), in NHWC memory if x or w is. Raises TypeError for operands of another type or dtype,
    ValueError for shapes and options that do not fit.
    """
    x, w = _array("x", x), _array("w", w)
    _expect("w", w, x.dtype, dims=(4,))
    if data_format not in ("NCHW", "NHWC"):
        raise ValueError(f"data_format: got {data_format!r}, expected 'NCHW' or 'NHWC'")
    nhwc = data_format == "NHWC"
    if nhwc:
        x, w = _channels_first("x", x), w.transpose(3, 2, 0, 1)
        residual = None if residual is None else _channels_first("residual", residual)
    image = _batch("x", x)
    N, C, H, W = image.shape
    K, per_group, R, S = w.shape
    strides, dilations = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    groups = _integer("groups", groups, 1)
    if per_group * groups != C or K % groups or not K * C * R * S:
        raise ValueError(
            f"w: got shape {w.shape} with groups={groups}, expected (K, {C}/groups, R, S) for x of shape {x.shape}"
        )
    pads = _four_sides(padding, (H, W), (R, S), strides, dilations)
    P = conv_output_size(H, R, strides[0], pads[0], pads[1], dilations[0])
    Q = conv_output_size(W, S, strides[1], pads[2], pads[3], dilations[1])
    if P < 1 or Q < 1:
        raise ValueError(
            f"x: got {H}x{W} pixels, with padding (top, bottom, left, right) {pads}; the filter covers "
            f"{dilations[0] * (R - 1) + 1}x{dilations[1] * (S - 1) + 1}, which must not be more"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got '{activation}', expected one of {', '.join(ACTIVATIONS)}")
    if bias is not None:
        bias = np.ascontiguousarray(_expect("bias", _array("bias", bias), x.dtype, shape=(K,)))
    last = nhwc or _is_channels_last(image) or _is_channels_last(w)
    y = _empty((N, K, P, Q), x.dtype, last)
    if residual is not None:
        shape = y.shape if x.ndim == 4 else y.shape[1:]
        residual = _dense(
            _batch("residual", _expect("residual", _array("residual", residual), x.dtype, shape=shape)), last
        )
    if y.size:
        image, w = _dense(image, last), _whole_strides(w)
        made = _conv2d_plan(
            image.shape, w.shape, _strides(w), y.shape, last, _DTYPES[x.dtype], strides, pads, dilations, groups,
            bias is not None, residual is not None, activation, *_chosen("conv2d_fwd", threads),
        )  # fmt: skip
        made.execute(*map(_address, (image, w, bias, residual, y)))
    y = y if x.ndim == 4 else y[0]
    return np.moveaxis(y, -3, -1) if nhwc else y


@overload
def max_pool2d(
    x: Any,
    kernel: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: Literal[False] = False,
    threads: int | None = None,
) -> Array: ...
@overload
def max_pool2d(
    x: Any,
    kernel: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    *,
    return_indices: Literal[True],
    threads: int | None = None,
) -> tuple[Array, NDArray[np.int64]]: ...
def max_pool2d(
    x: Any,
    kernel: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    threads: int | None = None,
) -> Array | tuple[Array, NDArray[np.int64]]:
    """The maximum of each window, as `torch.nn.functional.max_pool2d` defines it: NaN wins, padding is minus infinity.

    x: (N, C, H, W) or (C, H, W). kernel, stride (None: the kernel), padding, dilation: an int or (height, width), in pixels. With
    return_indices also the positions of the maxima, h*W + w in their plane, int64. threads, memory and errors as for `conv2d`.
    """
    x = _array("x", x)
    image = _batch("x", x)
    window, steps, pads = _window(kernel, stride, padding)
    spread = _pair("dilation", dilation, 1)
    y = _pooled(image, window, steps, pads, spread, ceil_mode)
    indices = _empty(y.shape, np.dtype(np.int64), _is_channels_last(image))
    if y.size:
        _pool("max_pool2d_fwd", image, y, indices, (window, steps, pads, spread), threads)
    if x.ndim == 3:
        y, indices = y[0], indices[0]
    return (y, indices) if return_indices else y


def avg_pool2d(
    x: Any,
    kernel: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    threads: int | None = None,
) -> Array:
    """The mean of each window, as `torch.nn.functional.avg_pool2d` defines it.

    x: (N, C, H, W) or (C, H, W). kernel, stride (None: the kernel), padding: an int or (height, width), in pixels. The divisor is
    the number of pixels of the window within the padded image (within the image itself if not count_include_pad), or
    divisor_override. threads, memory and errors as for `conv2d`.
    """
    x = _array("x", x)
    image = _batch("x", x)
    window, steps, pads = _window(kernel, stride, padding)
    if divisor_override == 0:
        raise ValueError("divisor_override: got 0, expected another int or None")
    divisor = 0 if divisor_override is None else _integer("divisor_override", divisor_override, None)
    y = _pooled(image, window, steps, pads, (1, 1), ceil_mode)
    if y.size:
        options = window, steps, pads, (1, 1), divisor, bool(count_include_pad)
        _pool("avg_pool2d_fwd", image, y, None, options, threads)
    return y if x.ndim == 4 else y[0]


# ---- Plans ----------------------------------------------------------------------------------------------------------------


@plan.cached
def _conv2d_plan(
    x: plan.Shape, w: plan.Shape, w_strides: plan.Shape, y: plan.Shape, last: bool, dtype: str,
    stride: Pair, padding: Quad, dilation: Pair, groups: int, bias: bool, residual: bool, activation: str,
    threads: int, force: str, strict: bool,
) -> plan.Plan:  # fmt: skip
    problem = plan.conv2d_problem(
        dtype, (x, plan.strides_of(x, last)), (w, w_strides), (y, plan.strides_of(y, last)),
        stride, padding, dilation, groups, bias, residual, activation,
    )  # fmt: skip
    return plan.make("conv2d_fwd", problem, dtype, (x, w, y), threads, force, strict)


@plan.cached
def _pool2d_plan(
    op: str, x: plan.Shape, y: plan.Shape, last: bool, dtype: str, options: tuple[Any, ...],
    threads: int, force: str, strict: bool,
) -> plan.Plan:  # fmt: skip
    kernel, stride, (down, across), *rest = options
    operands = (x, plan.strides_of(x, last)), (y, plan.strides_of(y, last))
    problem = plan.pool2d_problem(dtype, *operands, kernel, stride, (down, down, across, across), *rest)
    return plan.make(op, problem, dtype, (x, y), threads, force, strict)


def _pool(
    op: str, image: Array, y: Array, indices: Array | None, options: tuple[Any, ...], threads: int | None
) -> None:
    last = _is_channels_last(image)
    image = _dense(image, last)
    made = _pool2d_plan(op, image.shape, y.shape, last, _DTYPES[image.dtype], options, *_chosen(op, threads))
    made.execute(_address(image), _address(y), _address(indices))


def _chosen(op: str, threads: int | None) -> tuple[int, str, bool]:
    count = _default_threads() if threads is None else _integer("threads", threads, 1)
    return count, plan.forced.get().get(op, ""), plan.strict


def _default_threads() -> int:
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    # OpenMP's variable may hold a number for each nesting level.
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else len(os.sched_getaffinity(0))


# ---- Arrays ---------------------------------------------------------------------------------------------------------------


def _array(name: str, value: Any) -> Array:
    """An array of float32 or float64 on this machine's memory. Raises TypeError for anything else."""
    if not isinstance(value, np.ndarray):
        if not hasattr(value, "__dlpack__"):
            raise TypeError(f"{name}: got {type(value).__name__}, expected an ndarray or an object with __dlpack__")
        value = np.from_dlpack(value)
    array: Array = value
    if array.dtype not in _DTYPES:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected float32 or float64")
    return array


def _expect(
    name: str, a: Array, dtype: np.dtype[Any], dims: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
) -> Array:
    if a.dtype != dtype:
        raise TypeError(f"{name}: got dtype {a.dtype}, expected {dtype}, the dtype of x")
    if dims is not None and a.ndim not in dims:
        raise ValueError(f"{name}: got shape {a.shape}, expected {' or '.join(map(str, dims))} dimensions")
    if shape is not None and a.shape != shape:
        raise ValueError(f"{name}: got shape {a.shape}, expected {shape}")
    return a


def _batch(name: str, a: Array) -> Array:
    return a[None] if _expect(name, a, a.dtype, dims=(3, 4)).ndim == 3 else a


def _channels_first(name: str, value: Any) -> Array:
    """A view of an array (…, H, W, C) as (…, C, H, W)."""
    a = _array(name, value)
    return np.moveaxis(_expect(name, a, a.dtype, dims=(3, 4)), -1, -3)


def _strides(a: Array) -> tuple[int, ...]:
    """Strides in elements."""
    return tuple(stride // a.itemsize for stride in a.strides)


def _whole_strides(a: Array) -> Array:
    """`a`, or a copy of it where its elements are not aligned or a stride is no whole number of them."""
    return a if a.flags.aligned and all(stride % a.itemsize == 0 for stride in a.strides) else a.copy()


def _is_channels_last(a: Array) -> bool:
    return plan.prefers_channels_last(a.shape, a.strides)


def _dense(a: Array, last: bool) -> Array:
    """`a`, or a copy of it where its memory is not dense NHWC (last) or NCHW."""
    if plan.is_dense(a.shape, _strides(_whole_strides(a)), last) and a.flags.aligned:
        return a
    copy = _empty(a.shape, a.dtype, last)
    copy[...] = a
    return copy


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any], last: bool) -> Array:
    if not last:
        return np.empty(shape, dtype)
    N, C, H, W = shape
    nhwc = np.empty((N, H, W, C), dtype)
    return np.moveaxis(nhwc, 3, 1)


def _address(a: Array | None) -> int:
    return 0 if a is None else a.ctypes.data


# ---- Options --------------------------------------------------------------------------------------------------------------


def _integer(name: str, value: Any, least: int | None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, expected an int") from None
    if least is not None and number < least:
        raise ValueError(f"{name}: got {number}, expected at least {least}")
    return number


def _sizes(name: str, value: Any, least: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        return (_integer(name, value, least),) * 2
    if len(value) not in lengths:
        raise ValueError(f"{name}: got {value!r}, expected an int or {' or '.join(map(str, lengths))} of them")
    return tuple(_integer(name, item, least) for item in value)


def _pair(name: str, value: Any, least: int) -> Pair:
    height, width = _sizes(name, value, least, (2,))
    return height, width


def _four_sides(padding: Any, image: Pair, filter_size: Pair, stride: Pair, dilation: Pair) -> Quad:
    """Padding as (top, bottom, left, right)."""
    if isinstance(padding, str) and padding == SAME:
        return same(image, filter_size, stride, dilation)
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride {stride}")
        down, across = (d * (size - 1) for d, size in zip(dilation, filter_size))
        return down // 2, down - down // 2, across // 2, across - across // 2
    if isinstance(padding, str):
        raise ValueError(f"padding: got '{padding}', expected 'same', 'SAME', 'valid', an int, 2 or 4 ints")
    sides = _sizes("padding", padding, 0, (2, 4))
    if len(sides) == 2:
        return sides[0], sides[0], sides[1], sides[1]
    top, bottom, left, right = sides
    return top, bottom, left, right


def _window(kernel: Any, stride: Any, padding: Any) -> tuple[Pair, Pair, Pair]:
    window, pads = _pair("kernel", kernel, 1), _pair("padding", padding, 0)
    return window, window if stride is None else _pair("stride", stride, 1), pads


def _pooled(image: Array, window: Pair, steps: Pair, pads: Pair, dilation: Pair, ceil_mode: bool) -> Array:
    """An uninitialised output of a pooling, in the memory format of the image."""
    for pad, size in zip(pads, window):
        if pad > size // 2:
            raise ValueError(f"padding: got {pads} with kernel {window}, expected at most half of the kernel")
    N, C, H, W = image.shape
    P, Q = (
        pool_output_size(size, kernel, step, pad, pad, spread, ceil_mode)
        for size, kernel, step, pad, spread in zip((H, W), window, steps, pads, dilation)
    )
    if P < 1 or Q < 1 or not C * H * W:
        raise ValueError(f"x: got shape {image.shape}, too small for windows of {window} with padding {pads}")
    return _empty((N, C, P, Q), image.dtype, _is_channels_last(image))
