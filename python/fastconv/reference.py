"""The truth: every operation as one obvious function, in NumPy float64.

Arrays are logical NCHW, whatever their strides. ``pad4`` is (top, bottom, left, right); a negative side crops. Sizes,
kernels, strides and dilations are (height, width) pairs. Nothing here is meant to be fast, and no kernel may use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._reference_attention import Attention as Attention
from ._reference_attention import along_distances as along_distances
from ._reference_attention import distances as distances
from ._reference_attention import dropout_factors as dropout_factors
from ._reference_attention import sdpa as sdpa
from ._reference_attention import sdpa_bwd as sdpa_bwd
from ._reference_norm import Normalised as Normalised
from ._reference_norm import batch_norm as batch_norm
from ._reference_norm import batch_norm_bwd as batch_norm_bwd
from ._reference_norm import layer_norm as layer_norm
from ._reference_norm import layer_norm_bwd as layer_norm_bwd
from ._reference_recurrent import RECURRENT as RECURRENT

Array = NDArray[np.float64]
Input = NDArray[Any]
Pair = tuple[int, int]
Pad4 = tuple[int, int, int, int]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(z: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-z))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda z: z,
    "relu": lambda z: np.maximum(z, 0.0),
    "relu6": lambda z: np.minimum(np.maximum(z, 0.0), 6.0),
    "silu": lambda z: z * _sigmoid(z),
    "hardswish": lambda z: z * np.minimum(np.maximum(z + 3.0, 0.0), 6.0) / 6.0,
    "gelu": lambda z: z * 0.5 * (1.0 + _erf(z / math.sqrt(2.0))),
    # (1 + tanh(u)) / 2 is the sigmoid of 2u.
    "gelu_tanh": lambda z: z * _sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)),
    "sigmoid": _sigmoid,
}


def activation(z: Input, name: str) -> Array:
    """``name`` of z, element by element. gelu is the erf form (Hendrycks, Gimpel 2016). Raises KeyError for an unknown name."""
    return ACTIVATIONS[name](np.asarray(z, np.float64))


def conv_output_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """Number of windows of a convolution along one axis."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _overlap(size: int, before: int, after: int) -> tuple[slice, slice]:
    """Where an axis and its padded form share elements: (slice of the padded one, slice of the plain one)."""
    first, last = max(0, -before), min(size, size + after)
    last = max(first, last)
    return slice(first + before, last + before), slice(first, last)


def _pad(x: Input, pad4: Pad4) -> Array:
    top, bottom, left, right = pad4
    n, c, h, w = x.shape
    out = np.zeros((n, c, h + top + bottom, w + left + right))
    rows, x_rows = _overlap(h, top, bottom)
    cols, x_cols = _overlap(w, left, right)
    out[:, :, rows, cols] = x[:, :, x_rows, x_cols]
    return out


def _unpad(padded: Array, shape: tuple[int, ...], pad4: Pad4) -> Array:
    top, bottom, left, right = pad4
    out = np.zeros(shape)
    rows, x_rows = _overlap(shape[2], top, bottom)
    cols, x_cols = _overlap(shape[3], left, right)
    out[:, :, x_rows, x_cols] = padded[:, :, rows, cols]
    return out


def _taps(kernel: Pair, out: Pair, stride: Pair, dilation: Pair) -> Iterator[tuple[int, int, slice, slice]]:
    """Each filter position with the rows and columns of the padded input that it meets over all outputs."""
    for r in range(kernel[0]):
        for s in range(kernel[1]):
            top, left = r * dilation[0], s * dilation[1]
            rows = slice(top, top + (out[0] - 1) * stride[0] + 1, stride[0])
            cols = slice(left, left + (out[1] - 1) * stride[1] + 1, stride[1])
            yield r, s, rows, cols


def _grouped(x: Input, groups: int) -> Array:
    """(N, C, H, W) as (N, groups, C/groups, H*W)."""
    n, c, h, w = x.shape
    return np.asarray(x, np.float64).reshape(n, groups, c // groups, h * w)


def conv2d(
    x: Input,
    w: Input,
    bias: Input | None = None,
    residual: Input | None = None,
    *,
    stride: Pair = (1, 1),
    pad4: Pad4 = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    activation: str = "none",
) -> Array:
    """activation(x * w + bias + residual).

    x (N, C, H, W), w (K, C/groups, R, S), bias (K), residual and result (N, K, P, Q).
    """
    padded = _pad(x, pad4)
    k, _, kernel_h, kernel_w = w.shape
    p = (padded.shape[2] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    q = (padded.shape[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    weights = np.asarray(w, np.float64).reshape(groups, k // groups, *w.shape[1:])
    y = np.zeros((x.shape[0], groups, k // groups, p * q))
    for r, s, rows, cols in _taps((kernel_h, kernel_w), (p, q), stride, dilation):
        y += weights[:, :, :, r, s] @ _grouped(padded[:, :, rows, cols], groups)
    z = y.reshape(x.shape[0], k, p, q)
    if bias is not None:
        z += np.asarray(bias, np.float64)[:, None, None]
    if residual is not None:
        z += residual
    return ACTIVATIONS[activation](z)


def conv2d_magnitude(
    x: Input,
    w: Input,
    bias: Input | None = None,
    residual: Input | None = None,
    *,
    stride: Pair = (1, 1),
    pad4: Pad4 = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Array:
    """conv(|x|, |w|) + |bias| + |residual|: what the rounding errors of a convolution are proportional to."""
    return conv2d(
        np.abs(x),
        np.abs(w),
        None if bias is None else np.abs(bias),
        None if residual is None else np.abs(residual),
        stride=stride,
        pad4=pad4,
        dilation=dilation,
        groups=groups,
    )


def conv2d_dgrad(
    dy: Input,
    w: Input,
    x_shape: tuple[int, ...],
    *,
    stride: Pair = (1, 1),
    pad4: Pad4 = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Array:
    """Gradient of the input, of ``x_shape`` (N, C, H, W), from dy (N, K, P, Q). Also the forward of a transposed
    convolution.
    """
    n, c, h, width = x_shape
    k, _, kernel_h, kernel_w = w.shape
    p, q = dy.shape[2:]
    weights = np.asarray(w, np.float64).reshape(groups, k // groups, *w.shape[1:])
    padded = np.zeros((n, c, h + pad4[0] + pad4[1], width + pad4[2] + pad4[3]))
    for r, s, rows, cols in _taps((kernel_h, kernel_w), (p, q), stride, dilation):
        tap = weights[:, :, :, r, s].transpose(0, 2, 1) @ _grouped(dy, groups)
        padded[:, :, rows, cols] += tap.reshape(n, c, p, q)
    return _unpad(padded, x_shape, pad4)


def conv2d_wgrad(
    dy: Input,
    x: Input,
    w_shape: tuple[int, ...],
    *,
    stride: Pair = (1, 1),
    pad4: Pad4 = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> tuple[Array, Array]:
    """Gradients of the weight, of ``w_shape`` (K, C/groups, R, S), and of the bias (K), from dy (N, K, P, Q) and x (N,
    C, H, W).
    """
    k, c, kernel_h, kernel_w = w_shape
    padded = _pad(x, pad4)
    p, q = dy.shape[2:]
    dw = np.zeros((groups, k // groups, c, kernel_h, kernel_w))
    for r, s, rows, cols in _taps((kernel_h, kernel_w), (p, q), stride, dilation):
        meets = _grouped(padded[:, :, rows, cols], groups)
        dw[:, :, :, r, s] = (_grouped(dy, groups) @ meets.transpose(0, 1, 3, 2)).sum(axis=0)
    return dw.reshape(w_shape), np.asarray(dy, np.float64).sum(axis=(0, 2, 3))


def linear(x: Input, w: Input, bias: Input | None = None) -> Array:
    """x (..., I) times w (O, I) transposed, plus bias (O)."""
    y: Array = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    return y if bias is None else y + bias


def pool_output_size(
    size: int, kernel: int, stride: int, before: int, after: int, dilation: int = 1, ceil_mode: bool = False
) -> int:
    """Number of windows of a pooling along one axis; with ceil_mode, a window that would start in the padding behind is
    dropped.
    """
    span = size + before + after - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + before else out


def _window(p: int, size: int, kernel: int, stride: int, before: int, dilation: int) -> NDArray[np.int64]:
    """The positions inside the axis that window p covers."""
    positions = p * stride - before + dilation * np.arange(kernel)
    return positions[(positions >= 0) & (positions < size)]


def _adaptive_window(p: int, size: int, out: int) -> NDArray[np.int64]:
    return np.arange(p * size // out, -((p + 1) * size // -out))


def _max_over(
    x: Array, rows: list[NDArray[np.int64]], cols: list[NDArray[np.int64]]
) -> tuple[Array, NDArray[np.int64]]:
    n, c, _, width = x.shape
    values = np.empty((n, c, len(rows), len(cols)))
    indices = np.empty(values.shape, np.int64)
    for p, window_rows in enumerate(rows):
        for q, window_cols in enumerate(cols):
            flat = (window_rows[:, None] * width + window_cols).ravel()
            window = x.reshape(n, c, -1)[:, :, flat]
            nan = np.isnan(window)
            last_nan = flat.size - 1 - np.argmax(nan[:, :, ::-1], axis=2)
            pick = np.where(nan.any(axis=2), last_nan, np.argmax(np.where(nan, -np.inf, window), axis=2))
            values[:, :, p, q] = np.take_along_axis(window, pick[:, :, None], 2)[:, :, 0]
            indices[:, :, p, q] = flat[pick]
    return values, indices


def max_pool2d(
    x: Input,
    kernel: Pair,
    *,
    stride: Pair | None = None,
    pad4: Pad4 = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    ceil_mode: bool = False,
) -> tuple[Array, NDArray[np.int64]]:
    """Maxima (N, C, P, Q) and their flat positions h*W + w, as torch has them.

    The first of equal maxima wins, a NaN beats everything, and the last of several NaNs wins. Padding is minus infinity
    and never chosen. Every window must meet the input.
    """
    u = stride or kernel
    h, w = x.shape[2:]
    p = pool_output_size(h, kernel[0], u[0], pad4[0], pad4[1], dilation[0], ceil_mode)
    q = pool_output_size(w, kernel[1], u[1], pad4[2], pad4[3], dilation[1], ceil_mode)
    rows = [_window(i, h, kernel[0], u[0], pad4[0], dilation[0]) for i in range(p)]
    cols = [_window(i, w, kernel[1], u[1], pad4[2], dilation[1]) for i in range(q)]
    return _max_over(np.asarray(x, np.float64), rows, cols)


def adaptive_max_pool2d(x: Input, output_size: Pair) -> tuple[Array, NDArray[np.int64]]:
    """As max_pool2d, over the windows floor(p*H/P) .. ceil((p+1)*H/P)."""
    rows = [_adaptive_window(i, x.shape[2], output_size[0]) for i in range(output_size[0])]
    cols = [_adaptive_window(i, x.shape[3], output_size[1]) for i in range(output_size[1])]
    return _max_over(np.asarray(x, np.float64), rows, cols)


def max_pool2d_bwd(dy: Input, indices: NDArray[np.int64], x_shape: tuple[int, ...]) -> Array:
    """Gradient of the input, of ``x_shape`` (N, C, H, W): each dy (N, C, P, Q) goes to the flat position in
    ``indices``.
    """
    n, c, h, w = x_shape
    dx = np.zeros((n * c, h * w))
    plane = np.arange(n * c)[:, None]
    np.add.at(dx, (plane, indices.reshape(n * c, -1)), np.asarray(dy, np.float64).reshape(n * c, -1))
    return dx.reshape(x_shape)


def _divisor(p: int, size: int, kernel: int, stride: int, before: int, after: int, include_pad: bool) -> int:
    """How many positions of window p count along one axis: those in the padded input, or in the input itself."""
    start = p * stride - before
    if include_pad:
        return min(start + kernel, size + after) - start
    return min(start + kernel, size) - max(start, 0)


class _Average:
    """Windows and divisors of an average pooling: what its forward and backward share."""

    def __init__(
        self,
        hw: Pair,
        kernel: Pair,
        stride: Pair | None,
        pad4: Pad4,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> None:
        u = stride or kernel
        axes = []
        for size, k, step, before, after in zip(hw, kernel, u, pad4[::2], pad4[1::2], strict=True):
            out = range(pool_output_size(size, k, step, before, after, 1, ceil_mode))
            windows = [_window(i, size, k, step, before, 1) for i in out]
            counts = [_divisor(i, size, k, step, before, after, count_include_pad) for i in out]
            axes.append((windows, np.array(counts, np.float64)))
        self.rows, self.cols = axes[0][0], axes[1][0]
        self.divisor = np.outer(axes[0][1], axes[1][1])
        if divisor_override:
            self.divisor[:] = divisor_override


def _average(x: Input, rows: list[NDArray[np.int64]], cols: list[NDArray[np.int64]], divisor: Array) -> Array:
    x = np.asarray(x, np.float64)
    y = np.empty((*x.shape[:2], len(rows), len(cols)))
    for p, window_rows in enumerate(rows):
        for q, window_cols in enumerate(cols):
            y[:, :, p, q] = x[:, :, window_rows[:, None], window_cols].sum(axis=(2, 3)) / divisor[p, q]
    return y


def _average_bwd(
    dy: Input, x_shape: tuple[int, ...], rows: list[NDArray[np.int64]], cols: list[NDArray[np.int64]], divisor: Array
) -> Array:
    dx = np.zeros(x_shape)
    share = np.asarray(dy, np.float64) / divisor
    for p, window_rows in enumerate(rows):
        for q, window_cols in enumerate(cols):
            dx[:, :, window_rows[:, None], window_cols] += share[:, :, p, q, None, None]
    return dx


def avg_pool2d(
    x: Input,
    kernel: Pair,
    *,
    stride: Pair | None = None,
    pad4: Pad4 = (0, 0, 0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """Window sums (N, C, P, Q) divided by divisor_override, or by the window clipped to the padded input (or to the
    input itself).
    """
    h, w = x.shape[2:]
    a = _Average((h, w), kernel, stride, pad4, ceil_mode, count_include_pad, divisor_override)
    return _average(x, a.rows, a.cols, a.divisor)


def avg_pool2d_bwd(
    dy: Input,
    x_shape: tuple[int, int, int, int],
    kernel: Pair,
    *,
    stride: Pair | None = None,
    pad4: Pad4 = (0, 0, 0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """Gradient of the input, of ``x_shape`` (N, C, H, W), from dy (N, C, P, Q)."""
    a = _Average(x_shape[2:], kernel, stride, pad4, ceil_mode, count_include_pad, divisor_override)
    return _average_bwd(dy, x_shape, a.rows, a.cols, a.divisor)


def _adaptive(hw: Pair, output_size: Pair) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], Array]:
    rows = [_adaptive_window(i, hw[0], output_size[0]) for i in range(output_size[0])]
    cols = [_adaptive_window(i, hw[1], output_size[1]) for i in range(output_size[1])]
    return rows, cols, np.array([[r.size * c.size for c in cols] for r in rows], np.float64)


def adaptive_avg_pool2d(x: Input, output_size: Pair) -> Array:
    """Means over the windows floor(p*H/P) .. ceil((p+1)*H/P)."""
    h, w = x.shape[2:]
    return _average(x, *_adaptive((h, w), output_size))


def adaptive_avg_pool2d_bwd(dy: Input, x_shape: tuple[int, int, int, int]) -> Array:
    """Gradient of the input, of ``x_shape`` (N, C, H, W), from dy (N, C, P, Q)."""
    p, q = dy.shape[2:]
    return _average_bwd(dy, x_shape, *_adaptive(x_shape[2:], (p, q)))
