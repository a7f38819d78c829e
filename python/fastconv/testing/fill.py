"""Test data: the same for the same problem, in logical order, exactly representable as f32."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Fill = Callable[[str, tuple[int, ...]], Array]


def _rng(key: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(key.encode()))


def normal(key: str, shape: tuple[int, ...]) -> Array:
    """Zero mean, unit variance. The tolerance counts on the mean being zero, see tolerance.py."""
    return _rng(key).standard_normal(shape, np.float32).astype(np.float64)


def rectified(key: str, shape: tuple[int, ...]) -> Array:
    """Normal values after a ReLU, as the inputs of most layers are."""
    return np.maximum(normal(key, shape), 0.0)


def integers(key: str, shape: tuple[int, ...]) -> Array:
    """Integers of at most 8: every partial sum of products is exact in f32 while there are fewer than 2**24 / 64 of
    them.
    """
    return _rng(key).integers(-8, 9, shape).astype(np.float64)


def integers_with_zeros(key: str, shape: tuple[int, ...]) -> Array:
    """As integers, with so few values that windows have equal maxima."""
    return _rng(key).integers(-1, 2, shape).astype(np.float64)


def with_specials(key: str, shape: tuple[int, ...]) -> Array:
    """Normal values with NaNs and infinities strewn in, about one in sixteen."""
    rng = _rng(key)
    values = rng.standard_normal(shape, np.float32).astype(np.float64)
    kind = rng.integers(0, 48, shape)
    for i, special in enumerate((np.nan, np.inf, -np.inf)):
        values[kind == i] = special
    return values


def mostly_minus_infinity(key: str, shape: tuple[int, ...]) -> Array:
    """Windows of nothing but minus infinity, with and without padding, beside some with a number or a NaN."""
    rng = _rng(key)
    values = np.full(shape, -np.inf)
    kind = rng.integers(0, 12, shape)
    values[kind == 0] = np.nan
    values[kind == 1] = 1.0
    return values


def with_one_nan(key: str, shape: tuple[int, ...]) -> Array:
    """Normal values and one NaN, which must reach the outputs that read it and no others."""
    values = normal(key, shape)
    if values.size:
        values.flat[int(_rng(key + "nan").integers(values.size))] = np.nan
    return values
