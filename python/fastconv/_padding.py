"""Padding "SAME" as TensorFlow means it: as many outputs as strides fit into the input, the odd pixel of padding at the end.

torch's "same" is the case of stride 1. From stride 2 on the two sides differ with the input's size: a 3×3 window with stride 2
pads 224 pixels by 0 and 1, and 225 by 1 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence

Quad = tuple[int, int, int, int]

SAME = "SAME"


def same(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Quad:
    """(top, bottom, left, right) for an image, a window, strides and dilations given as (height, width), all in pixels."""
    (top, bottom), (left, right) = (_same(*axis) for axis in zip(size, kernel, stride, dilation))
    return top, bottom, left, right


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2
