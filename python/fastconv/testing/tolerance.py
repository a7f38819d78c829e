"""How far a result may be from float64, and why.

A sum of L products in a precision with unit roundoff u = eps/2 commits one rounding for each addition. For data of zero
mean, the partial sums grow like sqrt(i), each rounding is at most u times that and of random sign, so the error grows
like u * L / sqrt(6): as fast as the magnitude sum(|x * w|), which is 0.64 * L for normal data. Their ratio is 0.64 * u
for every L and every summation order that is no worse than one after the other. FACTOR * eps = 8 u is thus 12 standard
deviations, and still a bound that no dropped, doubled or misplaced term passes. It is no bound for data of nonzero
mean, where the sums themselves grow like L.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[np.float64]

FACTOR = 4.0
# Winograd's accepted error, as relative L2 norm in f32 (oneDNN's threshold for it).
WINOGRAD_L2 = 2e-5

# Largest slope of each activation: what it makes of an error in its argument.
SLOPE = {"none": 1.0, "relu": 1.0, "relu6": 1.0, "silu": 1.1, "hardswish": 1.5, "sigmoid": 0.25}
SLOPE |= {"gelu": 1.13, "gelu_tanh": 1.13}


def eps(dtype: DTypeLike) -> float:
    return float(np.finfo(np.dtype(dtype)).eps)


def stored(values: Array, name: str) -> Array:
    """What is left of numbers that are stored as bf16 or f16, and their own where `name` is another dtype's."""
    if name == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float64)
    return decode_bf16(encode_bf16(values)).astype(np.float64) if name == "bf16" else values


def encode_bf16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The upper halves of floats, rounded to nearest, ties to even. NumPy has no such dtype."""
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    halves: NDArray[np.uint16] = np.where(np.isnan(values), bits >> np.uint32(16) | np.uint32(0x40), rounded).astype(
        np.uint16
    )
    return halves


def decode_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    wide: NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


# Of bf16 and f16: eps, and the smallest number above 0.
HALVES = {"bf16": (2.0**-7, 2.0**-133), "f16": (2.0**-10, 2.0**-24)}


# What rounding both factors to tf32's 10 bits of mantissa, half a unit in the last place each, makes of a product.
TF32 = (1 + 2.0**-11) ** 2 - 1


def storing(expected: Array, allowed: Array | float, name: str) -> Array:
    """`allowed` with the rounding of a result, computed in f32, to bf16 or f16: half a unit in its last place."""
    eps, least = HALVES[name]
    return allowed + eps / 2 * (np.abs(expected) + allowed) + least


def activation_rounding(z: Array, y: Array, name: str, dtype: DTypeLike) -> Array | float:
    """What evaluating the activation adds, in absolute terms.

    sigmoid and silu make an exponential, an addition and a division of about one ulp each: 4 eps of the result.
    hardswish and gelu add a constant to something that may be its negative, so their error is relative to z and not to
    the result: 4 eps of |z|. So is that of gelu's tanh form, |z|·exp(-|2u|), whose exponential makes |2u| times as much
    of u's rounding, and |2u|·exp(-|2u|) is at most 0.37. The smallest normal number covers results that underflow. The
    others are exact.
    """
    if name in ("sigmoid", "silu"):
        return 4 * eps(dtype) * np.abs(y) + float(np.finfo(np.dtype(dtype)).tiny)
    if name in ("gelu", "gelu_tanh", "hardswish"):
        return 4 * eps(dtype) * np.abs(z) + float(np.finfo(np.dtype(dtype)).tiny)
    return 0.0


def bound(magnitude: Array, dtype: DTypeLike) -> Array:
    """The largest allowed |y - y64| of each element of a sum, from the sum of its terms' absolute values."""
    return FACTOR * eps(dtype) * magnitude


@dataclass
class Mismatch:
    """The elements that are wrong: how many, and the worst of them."""

    count: int
    size: int
    index: tuple[int, ...]
    got: float
    expected: float
    allowed: float

    def __str__(self) -> str:
        error = abs(self.got - self.expected)
        return (
            f"{self.count} of {self.size} elements wrong, worst at {self.index}: got {self.got!r}, "
            f"expected {self.expected!r}, off by {error:.3g} where {self.allowed:.3g} is allowed"
        )


def compare(got: NDArray[Any], expected: NDArray[Any], allowed: Array | float = 0.0) -> Mismatch | None:
    """None if |got - expected| <= allowed everywhere.

    NaN matches NaN, an infinity only itself, and the sign of a zero does not count.
    """
    if got.shape != expected.shape:
        raise ValueError(f"shapes differ: got {got.shape}, expected {expected.shape}")
    g, e = got.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        limit = np.broadcast_to(np.asarray(allowed, np.float64), g.shape)
        error = np.abs(g - e)
        right = (g == e) | (np.isfinite(e) & (error <= limit)) | (np.isnan(g) & np.isnan(e))
    if right.all():
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.where(right, -1.0, np.nan_to_num(error / limit, nan=np.inf, posinf=np.inf))
    index = np.unravel_index(int(np.argmax(excess)), g.shape)
    at = tuple(int(i) for i in index)
    return Mismatch(int((~right).sum()), g.size, at, float(g[index]), float(e[index]), float(limit[index]))


def relative_l2(got: NDArray[Any], expected: Array, norm: float | None = None) -> float:
    """|got - expected| / |expected| as L2 norms, or relative to ``norm``; 0 for 0/0."""
    error = float(np.linalg.norm(got.astype(np.float64) - expected))
    norm = float(np.linalg.norm(expected)) if norm is None else norm
    return error if error == 0.0 else error / norm if norm else np.inf


def l2_bound(error_growth: float, terms: int, dtype: DTypeLike) -> float:
    """Allowed relative L2 error of a kernel that says it loses ``error_growth`` times as much as a plain sum of
    ``terms`` products.

    A plain sum makes 0.41 * u * sqrt(terms) of its own norm (see above); two standard deviations of a plain sum are eps
    * sqrt(terms).
    """
    allowed = error_growth * eps(dtype) * float(np.sqrt(max(1, terms)))
    return min(allowed, WINOGRAD_L2) if np.dtype(dtype) == np.float32 else allowed


def peer_bound(peer: NDArray[Any], truth: Array, factor: float = 2.0) -> float:
    """Largest error allowed beside a peer of the same precision: ``factor`` times the peer's, and the truth's rounding.

    The second part keeps a peer that happens to be exact from failing everybody: 0.3 added and taken away rounds the
    truth twice.
    """
    rounded = truth.astype(peer.dtype)
    floor = np.abs((rounded + peer.dtype.type(0.3) - peer.dtype.type(0.3)).astype(np.float64) - truth)
    return float(factor * np.abs(peer.astype(np.float64) - truth).max(initial=0.0) + 2 * floor.max(initial=0.0))
