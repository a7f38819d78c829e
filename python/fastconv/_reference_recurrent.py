"""Layers of LSTM and GRU in NumPy: the part of `fastconv.reference` that goes from step to step.

Written with operators, exp, tanh, concatenate and stack only, so that arrays of another kind can be put in, as
`fastconv.testing.rounded` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, Any]


def _sigmoid(z: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-z))


def _split(t: Any, count: int) -> list[Any]:
    width = t.shape[-1] // count
    return [t[..., i * width : (i + 1) * width] for i in range(count)]


def _order(L: int, reverse: bool) -> list[int]:
    return list(range(L))[::-1] if reverse else list(range(L))


def _stack(steps: dict[int, Any]) -> Any:
    return np.stack([steps[place] for place in sorted(steps)])


def _product(h: Any, w: Any, bias: Any) -> Any:
    return h @ w.T if bias is None else h @ w.T + bias


def lstm_fwd(gates: Any, w: Any, h: Any, c: Any, bias: Any = None, *, reverse: bool = False) -> Arrays:
    """y (L, B, H), the last c (B, H) and what is kept (L, B, 5H: i, f, g, o, c), of gates (L, B, 4H), w (4H, H), h, c (B, H)."""
    y, kept = {}, {}
    for place in _order(len(gates), reverse):
        i, f, g, o = _split(gates[place] + _product(h, w, bias), 4)
        i, f, g, o = _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o)
        c = f * c + i * g
        h = o * np.tanh(c)
        y[place], kept[place] = h, np.concatenate([i, f, g, o, c], axis=-1)
    return {"y": _stack(y), "c_last": c, "kept": _stack(kept)}


def lstm_bwd(dy: Any, w: Any, c: Any, kept: Any, dc_last: Any = None, *, reverse: bool = False) -> Arrays:
    """dgates (L, B, 4H), dh and dc (B, H), from the gradients of y and of the last c."""
    order = _order(len(dy), reverse)
    dgates: dict[int, Any] = {}
    dh, dc = None, dc_last
    for step in reversed(range(len(order))):
        i, f, g, o, after = _split(kept[order[step]], 5)
        before = _split(kept[order[step - 1]], 5)[4] if step else c
        tanh_c = np.tanh(after)
        d = dy[order[step]] if dh is None else dy[order[step]] + dh
        into_c = d * o * (1.0 - tanh_c * tanh_c)
        into_c = into_c if dc is None else into_c + dc
        parts = [
            into_c * g * i * (1.0 - i), into_c * before * f * (1.0 - f), into_c * i * (1.0 - g * g),
            d * tanh_c * o * (1.0 - o),
        ]  # fmt: skip
        dgates[order[step]] = np.concatenate(parts, axis=-1)
        dc, dh = into_c * f, dgates[order[step]] @ w
    return {"dgates": _stack(dgates), "dh": dh, "dc": dc}


def gru_fwd(gates: Any, w: Any, h: Any, bias: Any = None, *, reverse: bool = False) -> Arrays:
    """y (L, B, H) and what is kept (L, B, 4H: r, z, n, the product that r scales), of gates (L, B, 3H), w (3H, H), h (B, H)."""
    y, kept = {}, {}
    for place in _order(len(gates), reverse):
        (r_x, z_x, n_x), (r_h, z_h, n_h) = _split(gates[place], 3), _split(_product(h, w, bias), 3)
        r, z = _sigmoid(r_x + r_h), _sigmoid(z_x + z_h)
        n = np.tanh(n_x + r * n_h)
        h = n + z * (h - n)
        y[place], kept[place] = h, np.concatenate([r, z, n, n_h], axis=-1)
    return {"y": _stack(y), "kept": _stack(kept)}


def gru_bwd(dy: Any, w: Any, h: Any, y: Any, kept: Any, *, reverse: bool = False) -> Arrays:
    """dgates and dproduct (L, B, 3H), the gradients of gates and of w·h + bias, and dh (B, H)."""
    order = _order(len(dy), reverse)
    dgates, dproduct = {}, {}
    dh = None
    for step in reversed(range(len(order))):
        r, z, n, product = _split(kept[order[step]], 4)
        before = y[order[step - 1]] if step else h
        d = dy[order[step]] if dh is None else dy[order[step]] + dh
        into_n = d * (1.0 - z) * (1.0 - n * n)
        into_r, into_z = into_n * product * r * (1.0 - r), d * (before - n) * z * (1.0 - z)
        dgates[order[step]] = np.concatenate([into_r, into_z, into_n], axis=-1)
        dproduct[order[step]] = np.concatenate([into_r, into_z, into_n * r], axis=-1)
        dh = dproduct[order[step]] @ w + d * z
    return {"dgates": _stack(dgates), "dproduct": _stack(dproduct), "dh": dh}


RECURRENT: dict[str, Callable[..., Arrays]] = {
    "lstm_fwd": lstm_fwd,
    "lstm_bwd": lstm_bwd,
    "gru_fwd": gru_fwd,
    "gru_bwd": gru_bwd,
}
