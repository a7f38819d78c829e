"""Layer and batch normalisation in NumPy float64: the part of `fastconv.reference` that normalises."""

from __future__ import annotations

from collections.abc import Callable
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


class BatchNormalised(NamedTuple):
    """Mean, variance (C), what the activation is applied to, and the result (N, C, P)."""

    mean: Array
    variance: Array
    z: Array
    y: Array


_SLOPES: dict[str, Callable[[Array], Array]] = {
    "none": np.ones_like,
    "relu": lambda z: np.where(z > 0, 1.0, 0.0),
    "relu6": lambda z: np.where((z > 0) & (z < 6), 1.0, 0.0),
    "silu": lambda z: (1 + z * (1 - 1 / (1 + np.exp(-z)))) / (1 + np.exp(-z)),
    "hardswish": lambda z: np.where(z < -3, 0.0, np.where(z <= 3, z / 3 + 0.5, 1.0)),
}
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda z: z,
    "relu": lambda z: np.maximum(z, 0.0),
    "relu6": lambda z: np.clip(z, 0.0, 6.0),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "hardswish": lambda z: z * np.clip(z + 3, 0.0, 6.0) / 6,
}


def batch_norm(
    x: Input,
    weight: Input | None = None,
    bias: Input | None = None,
    *,
    eps: float,
    stats: tuple[Input, Input] | None = None,
    residual: Input | None = None,
    activation: str = "none",
) -> BatchNormalised:
    """x (N, C, P) by the mean and variance of each channel, or by `stats`, times weight (C), plus bias (C), plus residual."""
    x = np.asarray(x, np.float64)
    mean, variance = (x.mean(axis=(0, 2)), x.var(axis=(0, 2))) if stats is None else map(np.asarray, stats)
    h = (x - mean[:, None]) / np.sqrt(variance + eps)[:, None]
    z = h if weight is None else h * np.asarray(weight)[:, None]
    z = z if bias is None else z + np.asarray(bias)[:, None]
    z = z if residual is None else z + residual
    return BatchNormalised(mean, variance, z, _ACTIVATIONS[activation](z))


def batch_norm_bwd(
    dy: Input,
    x: Input,
    weight: Input | None = None,
    bias: Input | None = None,
    *,
    eps: float,
    stats: tuple[Input, Input] | None = None,
    residual: Input | None = None,
    activation: str = "none",
) -> tuple[Array, Array, Array, Array]:
    """Gradients of x, residual (N, C, P), weight and bias (C)."""
    a = batch_norm(x, weight, bias, eps=eps, stats=stats, residual=residual, activation=activation)
    rstd = 1 / np.sqrt(a.variance + eps)[:, None]
    h = (np.asarray(x, np.float64) - a.mean[:, None]) * rstd
    g = np.asarray(dy, np.float64) * _SLOPES[activation](a.z)
    dx = g
    if stats is None:
        dx = g - g.mean(axis=(0, 2))[:, None] - h * (g * h).mean(axis=(0, 2))[:, None]
    scale = rstd if weight is None else rstd * np.asarray(weight)[:, None]
    return dx * scale, g, (g * h).sum(axis=(0, 2)), g.sum(axis=(0, 2))
