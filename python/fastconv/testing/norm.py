"""Layer normalisation problems: as plain data with an id, the grid of them, their inputs and what their kernels must give.

rows5x768+residual+gamma+beta          five rows of 768 numbers; a word for each operand that may be absent
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastconv import reference
from fastconv.testing import fill, tolerance

Array = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

NORM_OPS = ("layer_norm_fwd", "layer_norm_bwd")
EPS = 1e-5
# In the order of NormArgs.
OPERANDS = ("x", "residual", "gamma", "beta", "sum", "y", "mean", "rstd", "dy", "dsum", "dx", "dgamma", "dbeta")


@dataclass(frozen=True)
class NormCase:
    """N rows of C numbers, forward and backward."""

    N: int
    C: int
    residual: bool = False
    gamma: bool = False
    beta: bool = False

    @property
    def ops(self) -> tuple[str, ...]:
        return NORM_OPS

    def shape(self, name: str) -> tuple[int, ...]:
        """Rows are (N, C, 1, 1) and what there is one of for each row (N, 1, 1, 1), so that tests see samples everywhere."""
        if name in ("gamma", "beta", "dgamma", "dbeta"):
            return (self.C,)
        return (self.N, 1 if name in ("mean", "rstd") else self.C, 1, 1)

    def operands(self, op: str) -> tuple[str, ...]:
        """What the op reads and writes here."""
        gamma, beta = ("gamma",) * self.gamma, ("beta",) * self.beta
        if op == "layer_norm_fwd":
            extra = ("residual", "sum") * self.residual
            return ("x", *extra, *gamma, *beta, "y", "mean", "rstd")
        gradients = ("dgamma",) * self.gamma + ("dbeta",) * self.beta
        return ("x", "mean", "rstd", *gamma, "dy", *("dsum",) * self.residual, "dx", *gradients)

    @property
    def stored(self) -> frozenset[str]:
        """The operands of the problem's own dtype; the others have the one that is computed in."""
        return frozenset(OPERANDS) - {"mean", "rstd"}

    def __str__(self) -> str:
        return "+".join(
            [f"rows{self.N}x{self.C}", *(name for name in ("residual", "gamma", "beta") if getattr(self, name))]
        )


_NORM = re.compile(r"rows(\d+)x(\d+)(\+residual)?(\+gamma)?(\+beta)?", re.ASCII)


def parse_norm(text: str) -> NormCase | None:
    """The case whose ``str`` is ``text``, None where it is not one of layer normalisation."""
    m = _NORM.fullmatch(text)
    return None if m is None else NormCase(int(m[1]), int(m[2]), *(word is not None for word in m.groups()[2:]))


def native_norm(native: Any, case: NormCase, dtype: str) -> Any:
    """The case as the compiled module's problem."""
    return native.NormProblem(dtype=dtype, N=case.N, C=case.C, eps=EPS)


def norm_inputs(op: str, case: NormCase, values: fill.Fill, dtype: str = "f32") -> Arrays:
    """Logical arrays of what the op reads, as the dtype holds them."""
    names = ("x", "residual", "gamma", "beta") if op == "layer_norm_fwd" else ("x", "gamma", "dy", "dsum")
    found = {n: values(f"{case}{n}", case.shape(n)) for n in names if n in case.operands(op)}
    inputs: Arrays = {n: tolerance.stored(value, dtype) for n, value in found.items()}
    if op == "layer_norm_bwd":
        a = reference.layer_norm(_rows(inputs["x"]), eps=EPS)
        inputs |= {"mean": a.mean[..., None, None], "rstd": a.rstd[..., None, None]}
    return inputs


def _rows(x: NDArray[Any]) -> NDArray[Any]:
    return x.reshape(x.shape[:2])


Allowed = Callable[[str, np.dtype[Any]], Array]


def norm_truth(op: str, case: NormCase, inputs: Arrays, dtype: str = "f32") -> tuple[Arrays, Allowed]:
    """The expected outputs, and the error allowed to each, to first order in eps. Halves normalise the sum that they store.

    A distance d from the mean is off by the rounding of its two parts; rstd, relative to itself, by what those errors make of the
    variance, and by the variance's own sum.
    """
    rows = {n: _rows(t) if t.ndim == 4 else t for n, t in inputs.items()}
    residual, gamma = rows.get("residual"), rows.get("gamma")
    x, beside = rows["x"], residual
    if residual is not None and dtype in tolerance.HALVES:
        x, beside = tolerance.stored(x + residual, dtype), None
    a = reference.layer_norm(x, gamma, rows.get("beta"), eps=EPS, residual=beside)
    parts = np.abs(rows["x"]) + (0 if residual is None else np.abs(residual))
    mean_size = parts.mean(axis=1, keepdims=True)
    distance = parts + mean_size
    d = np.abs(a.sum - a.mean)
    rstd_size = 1 + a.rstd**2 * (d * distance).mean(axis=1, keepdims=True)
    h = d * a.rstd
    h_size = a.rstd * distance + h * rstd_size
    weight = 1.0 if gamma is None else np.abs(gamma)
    if op == "layer_norm_fwd":
        sizes = {
            "sum": parts,
            "y": h_size * weight + (np.abs(rows["beta"]) if case.beta else 0.0),
            "mean": mean_size,
            "rstd": a.rstd * rstd_size,
        }
        outputs = {"sum": a.sum, "y": a.y, "mean": a.mean, "rstd": a.rstd}
    else:
        dy, dsum = rows["dy"], rows.get("dsum")
        g = np.abs(dy) * weight
        along = (g * h).mean(axis=1, keepdims=True)
        along_size = (g * h_size).mean(axis=1, keepdims=True)
        inner = g + g.mean(axis=1, keepdims=True) + h * along
        sizes = {
            "dx": a.rstd * (rstd_size * inner + h_size * along + h * along_size)
            + (0 if dsum is None else np.abs(dsum)),
            "dgamma": (np.abs(dy) * (h + h_size)).sum(axis=0),
            "dbeta": np.abs(dy).sum(axis=0),
        }
        outputs = dict(
            zip(("dx", "dgamma", "dbeta"), reference.layer_norm_bwd(dy, rows["x"], gamma, eps=EPS, dsum=dsum))
        )

    def allowed(name: str, dtype: np.dtype[Any]) -> Array:
        return tolerance.bound(np.reshape(sizes[name], case.shape(name)), dtype)

    return {name: np.reshape(value, case.shape(name)) for name, value in outputs.items()}, allowed


def _grid() -> Iterator[NormCase]:
    every = tuple(itertools.product((False, True), repeat=3))
    for C in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 128, 130, 255, 257, 768):
        yield NormCase(2, C, True, True, True)
        yield NormCase(3, C)
    for options in every:
        yield NormCase(5, 37, *options)
        yield NormCase(33, 20, *options)
    # Several chunks of a row, several tasks, several blocks of rows with more than the least number of rows in each.
    yield NormCase(2, 5000, True, True, True)
    yield NormCase(40, 1030, False, True, True)
    yield NormCase(1100, 6, True, True, True)
    for N in (1, 15, 16, 17, 32, 33, 64, 100):
        yield NormCase(N, 24, False, True, True)


@cache
def norm_grid() -> tuple[NormCase, ...]:
    """Every layer normalisation problem of the tests, without duplicates."""
    return tuple(dict.fromkeys(_grid()))
