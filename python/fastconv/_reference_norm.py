"""Layer normalisation in NumPy float64: the part of `fastconv.reference` that normalises rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Input = NDArray[Any]


class Normalised(NamedTuple):
    """What was normalised (N, C), its mean and inverse standard deviation (N, 1), and the result (N, C)."""

    sum: Array
    mean: Array
    rstd: Array
    y: Array


def layer_norm(
    x: Input,
    weight: Input | None = None,
    bias: Input | None = None,
    *,
    eps: float,
    residual: Input | None = None,
) -> Normalised:
    """Rows x (N, C) plus residual at mean 0 and variance 1, times weight (C), plus bias (C)."""
    total = np.asarray(x, np.float64) + (0.0 if residual is None else np.asarray(residual, np.float64))
    mean = total.mean(axis=1, keepdims=True)
    rstd = 1.0 / np.sqrt(((total - mean) ** 2).mean(axis=1, keepdims=True) + eps)
    y = (total - mean) * rstd
    y = y if weight is None else y * weight
    return Normalised(total, mean, rstd, y if bias is None else y + bias)


def layer_norm_bwd(
    dy: Input, x: Input, weight: Input | None = None, *, eps: float, dsum: Input | None = None
) -> tuple[Array, Array, Array]:
    """Gradients of what was normalised (N, C), of weight (C) and of bias (C); dsum is what else flows into the first."""
    a = layer_norm(x, eps=eps)
    dy = np.asarray(dy, np.float64)
    g = dy if weight is None else dy * weight
    dx = a.rstd * (g - g.mean(axis=1, keepdims=True) - a.y * (g * a.y).mean(axis=1, keepdims=True))
    return dx if dsum is None else dx + dsum, (dy * a.y).sum(axis=0), dy.sum(axis=0)
