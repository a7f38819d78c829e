"""Max and average pooling with TensorFlow's "SAME" padding, whose sides follow from the input's size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _pooling
from ._padding import same
from ._routes import plain
from .ops import avg_pool2d as avg_ops
from .ops import max_pool2d as max_ops

Pair = tuple[int, int]


def max_pool2d(input: Tensor, kernel: Pair, stride: Pair, return_indices: bool = False) -> Any:
    """Maxima of ceil(H/stride) by ceil(W/stride) windows over `input` (N, C, H, W) or (C, H, W), as `functional.max_pool2d`."""
    pads = same(input.shape[-2:], kernel, stride, (1, 1))
    if plain(input) and input.dim() == 4 and input.numel() > 0:
        pool = max_ops.max_pool2d if return_indices else max_ops.max_values2d
        return pool(input, kernel, stride, pads, (1, 1), False)
    top, bottom, left, right = pads
    # A window holds at least one pixel of the image, so no maximum comes from this padding.
    padded = F.pad(input, (left, right, top, bottom), value=-torch.inf)
    found = _pooling.max_pool2d(padded, kernel, stride, return_indices=return_indices)
    if not return_indices:
        return found
    y, indices = found
    rows, columns = indices // padded.shape[-1], indices % padded.shape[-1]
    return y, (rows - top) * input.shape[-1] + columns - left


def avg_pool2d(input: Tensor, kernel: Pair, stride: Pair, divisor_override: int | None = None) -> Tensor:
    """Means of the same windows, each over the pixels of the image that are in it, as TensorFlow's: padding does not count."""
    pads = same(input.shape[-2:], kernel, stride, (1, 1))
    if plain(input) and input.dim() == 4 and input.numel() > 0:
        return avg_ops.avg_pool2d(input, kernel, stride, pads, False, False, divisor_override)
    top, bottom, left, right = pads
    around = left, right, top, bottom
    y = _pooling.avg_pool2d(F.pad(input, around), kernel, stride, divisor_override=divisor_override)
    if divisor_override is not None:
        return y
    ones = input.new_ones((1, *input.shape[-2:]), dtype=torch.float32)
    inside = F.avg_pool2d(F.pad(ones, around), kernel, stride)
    return (y / inside).to(y.dtype)
