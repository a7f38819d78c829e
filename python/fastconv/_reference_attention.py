"""Attention in NumPy float64: the part of `fastconv.reference` that has queries, keys and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Input = NDArray[Any]
Pair = tuple[int, int]

_LOW32 = np.uint64(0xFFFFFFFF)


def dropout_factors(shape: tuple[int, int, int, int], p: float, key: int) -> Array:
    """What dropout multiplies the weights (B, H, Lq, Lkv) with: 0 with probability p, else 1 / (1 - p).

    The kernels' counter-based generator: 64 bits of the key and the row (the finalizer of SplitMix64, Steele et al. 2014), then
    for each key index two rounds of xor-shift and multiply.
    """
    rows = np.arange(1, shape[0] * shape[1] * shape[2] + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = np.uint64(key & 0xFFFFFFFFFFFFFFFF) + rows * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        start, twist = (x & _LOW32)[:, None], (x >> np.uint64(32))[:, None]
        y = (np.arange(shape[3], dtype=np.uint64) * np.uint64(0x9E3779B9) + start) & _LOW32
        y = ((y ^ (y >> np.uint64(16))) * np.uint64(0x21F0AAAD)) & _LOW32
        y ^= (y >> np.uint64(15)) ^ twist
        y = (y * np.uint64(0xD35A2D97)) & _LOW32
        y ^= y >> np.uint64(15)
    kept = (y >> np.uint64(8)) >= np.uint64(int(p * (1 << 24) + 0.5))
    return kept.reshape(shape) / (1 - p) if p < 1 else np.zeros(shape)


class Attention(NamedTuple):
    """The parts of an attention: scores (-inf where hidden), weights before dropout, outputs and log-sum-exp (B, H, Lq)."""

    scores: Array
    weights: Array
    out: Array
    lse: Array


def _shared(x: Input, heads: int) -> Array:
    """(B, Hkv, L, D) with every head repeated for the query heads that share it."""
    return np.repeat(np.asarray(x, np.float64), heads // x.shape[1], axis=1)


def distances(queries: int, keys: int) -> NDArray[np.int64]:
    """j - i + queries - 1 of query i and key j: where a bias by distance has their number."""
    return np.arange(keys) - np.arange(queries)[:, None] + queries - 1


def sdpa(
    q: Input,
    k: Input,
    v: Input,
    mask: Input | None = None,
    *,
    scale: float,
    band: Pair | None = None,
    softcap: float = 0.0,
    dropout: tuple[float, int] = (0.0, 0),
    bias: Input | None = None,
    sink: Input | None = None,
) -> Attention:
    """softmax(softcap(scale * q kᵀ) + mask) v.

    q (B, Hq, Lq, D), k (B, Hkv, Lkv, D), v (B, Hkv, Lkv, Dv); Hkv divides Hq. A boolean mask hides where it is False, any other
    is added; it broadcasts to (B, Hq, Lq, Lkv). band = (low, high): query i sees the keys i + low .. i + high. A softcap c makes
    a score c * tanh(score / c). dropout = (p, key). bias (B, Hq, Lq + Lkv - 1) is added where j - i + Lq - 1 is its index, sink
    (B, Hq) is the score of a key more whose value is 0. A query that sees nothing has output 0 and lse -inf.
    """
    heads, (queries, keys) = q.shape[1], (q.shape[2], k.shape[2])
    s = scale * (np.asarray(q, np.float64) @ _shared(k, heads).swapaxes(2, 3))
    if softcap:
        s = softcap * np.tanh(s / softcap)
    if bias is not None:
        s = s + np.asarray(bias, np.float64)[:, :, distances(queries, keys)]
    if mask is not None:
        s = np.where(mask, s, -np.inf) if mask.dtype == np.bool_ else s + mask
    if band is not None:
        offset = np.arange(keys) - np.arange(queries)[:, None]
        s = np.where((offset >= band[0]) & (offset <= band[1]), s, -np.inf)
    most = s.max(axis=3, initial=-np.inf)
    if sink is not None:
        most = np.maximum(most, sink[..., None])
    e = np.exp(s - np.where(np.isneginf(most), 0.0, most)[..., None])
    total = e.sum(axis=3)
    if sink is not None:
        total = total + np.exp(sink[..., None] - np.where(np.isneginf(most), 0.0, most))
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, -np.inf, most + np.log(total))
    weights = e / np.where(total == 0, 1.0, total)[..., None]
    dropped = weights * dropout_factors(weights.shape, *dropout) if dropout[0] else weights
    return Attention(s, weights, dropped @ _shared(v, heads), lse)


def sdpa_bwd(
    dout: Input,
    q: Input,
    k: Input,
    v: Input,
    mask: Input | None = None,
    dlse: Input | None = None,
    *,
    scale: float,
    band: Pair | None = None,
    softcap: float = 0.0,
    dropout: tuple[float, int] = (0.0, 0),
    bias: Input | None = None,
    sink: Input | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Gradients of q, k, v and of a mask of the full shape (B, Hq, Lq, Lkv), from those of the outputs and of lse."""
    B, heads = q.shape[:2]
    a = sdpa(q, k, v, mask, scale=scale, band=band, softcap=softcap, dropout=dropout, bias=bias, sink=sink)
    factors = dropout_factors(a.weights.shape, *dropout) if dropout[0] else 1.0
    dout = np.asarray(dout, np.float64)
    dv = (a.weights * factors).swapaxes(2, 3) @ dout
    dweights = (dout @ _shared(v, heads).swapaxes(2, 3)) * factors
    row = (dweights * a.weights).sum(axis=3) - (0.0 if dlse is None else dlse)
    ds = a.weights * (dweights - row[..., None])
    raw = scale * (np.asarray(q, np.float64) @ _shared(k, heads).swapaxes(2, 3))
    dx = ds * (1 - np.tanh(raw / softcap) ** 2) if softcap else ds
    dq = scale * dx @ _shared(k, heads)
    dk = scale * dx.swapaxes(2, 3) @ np.asarray(q, np.float64)
    groups = (B, k.shape[1], heads // k.shape[1])
    return dq, dk.reshape(*groups, *dk.shape[2:]).sum(2), dv.reshape(*groups, *dv.shape[2:]).sum(2), ds


def along_distances(ds: Array) -> Array:
    """The gradient (B, Hq, Lq + Lkv - 1) of a bias by distance, from that of the scores."""
    queries, keys = ds.shape[2:]
    sums = np.zeros((*ds.shape[:2], max(queries + keys - 1, 0)))
    for i in range(queries):
        sums[:, :, queries - 1 - i : queries - 1 - i + keys] += ds[:, :, i]
    return sums
