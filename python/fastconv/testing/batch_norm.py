"""Batch normalisation problems: as plain data with an id, the grid of them, their inputs and what their kernels must give.

bn2x17x35-nhwc+residual+gamma+beta+relu     two samples of 17 channels at 35 positions, channels last; a word for each operand
                                            that may be absent, and the activation
bn2x17x35-nchw+given                        mean and variance are given, as they are in eval mode
"""

from __future__ import annotations

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

BATCH_NORM_OPS = ("batch_norm_fwd", "batch_norm_bwd")
EPS = 1e-5
# In the order of BatchNormArgs.
OPERANDS = ("x", "residual", "gamma", "beta", "mean", "variance", "y", "dy", "dx", "dresidual", "dgamma", "dbeta")
_OF_CHANNELS = ("gamma", "beta", "mean", "variance", "dgamma", "dbeta")
# Where slopes jump, and how fast they change elsewhere.
_KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
_CURVATURE = {"silu": 0.5, "hardswish": 1 / 3}


@dataclass(frozen=True)
class BatchNormCase:
    """N samples of C channels at P positions, forward and backward."""

    N: int
    C: int
    P: int
    layout: str
    given: bool = False
    residual: bool = False
    gamma: bool = False
    beta: bool = False
    activation: str = "none"

    @property
    def ops(self) -> tuple[str, ...]:
        return BATCH_NORM_OPS

    def shape(self, name: str) -> tuple[int, ...]:
        return (self.C,) if name in _OF_CHANNELS else (self.N, self.C, self.P, 1)

    def operands(self, op: str) -> tuple[str, ...]:
        """What the op reads and writes here."""
        names = ("x", *(name for name in ("residual", "gamma", "beta") if getattr(self, name)), "mean", "variance")
        if op == "batch_norm_fwd":
            return (*names, "y")
        return (*names, "dy", "dx", *(f"d{name}" for name in ("residual", "gamma", "beta") if getattr(self, name)))

    @property
    def stored(self) -> frozenset[str]:
        """The operands of the problem's own dtype: all."""
        return frozenset(OPERANDS)

    def __str__(self) -> str:
        words = [name for name in ("given", "residual", "gamma", "beta") if getattr(self, name)]
        words += [self.activation] * (self.activation != "none")
        return "+".join([f"bn{self.N}x{self.C}x{self.P}-{self.layout}", *words])


_BATCH_NORM = re.compile(
    r"bn(\d+)x(\d+)x(\d+)-(nchw|nhwc)(\+given)?(\+residual)?(\+gamma)?(\+beta)?(?:\+(relu|relu6|silu|hardswish))?",
    re.ASCII,
)


def parse_batch_norm(text: str) -> BatchNormCase | None:
    """The case whose ``str`` is ``text``, None where it is not one of batch normalisation."""
    m = _BATCH_NORM.fullmatch(text)
    if m is None:
        return None
    given, residual, gamma, beta = (word is not None for word in m.groups()[4:8])
    return BatchNormCase(int(m[1]), int(m[2]), int(m[3]), m[4], given, residual, gamma, beta, m[9] or "none")


def native_batch_norm(native: Any, case: BatchNormCase, dtype: str) -> Any:
    """The case as the compiled module's problem."""
    return native.BatchNormProblem(
        dtype=dtype, N=case.N, C=case.C, P=case.P, channels_last=case.layout == "nhwc", training=not case.given,
        residual=case.residual, activation=case.activation, eps=EPS,
    )  # fmt: skip


def batch_norm_inputs(op: str, case: BatchNormCase, values: fill.Fill, dtype: str = "f32") -> Arrays:
    """Logical arrays of what the op reads."""
    names = ("x", "residual", "gamma", "beta", *("dy",) * (op == "batch_norm_bwd"))
    every = {n: values(f"{case}{n}", case.shape(n)) for n in names if n in case.operands(op)}
    inputs: Arrays = {n: tolerance.stored(value, dtype) for n, value in every.items()}
    if case.given:
        inputs["mean"] = fill.normal(f"{case}mean", (case.C,))
        inputs["variance"] = 0.25 + np.abs(fill.normal(f"{case}variance", (case.C,)))
    elif op == "batch_norm_bwd":
        a = reference.batch_norm(_flat(inputs["x"]), eps=EPS)
        inputs |= {"mean": a.mean, "variance": a.variance}
    return inputs


def _flat(t: NDArray[Any]) -> NDArray[Any]:
    return t[..., 0] if t.ndim == 4 else t


Allowed = Callable[[str, np.dtype[Any]], Array]


def batch_norm_truth(op: str, case: BatchNormCase, inputs: Arrays, dtype: str = "f32") -> tuple[Arrays, Allowed]:
    """The expected outputs, and the error allowed to each, to first order in eps: see `norm.norm_truth`.

    Where z is closer to a kink of the activation than its own error, either slope is right.
    """
    t = {n: _flat(v) for n, v in inputs.items()}
    x, residual = t["x"], t.get("residual")
    options: dict[str, Any] = {"eps": EPS, "residual": residual, "activation": case.activation}
    if case.given:
        options["stats"] = t["mean"], t["variance"]
    a = reference.batch_norm(x, t.get("gamma"), t.get("beta"), **options)
    mean, rstd = np.abs(a.mean)[:, None], 1 / np.sqrt(a.variance + EPS)[:, None]
    average: Callable[[Array], Array] = lambda v: v.mean(axis=(0, 2))[:, None]  # noqa: E731
    mean_size = mean if case.given else average(np.abs(x))
    distance, d = np.abs(x) + mean_size, np.abs(x - a.mean[:, None])
    spread = average(d * distance)
    rstd_size = 1 + (0 if case.given else rstd**2 * spread)
    h = d * rstd
    h_size = rstd * distance + h * rstd_size
    weight = np.abs(t["gamma"])[:, None] if case.gamma else 1.0
    z_size = h_size * weight + np.abs(a.z)
    z_size = z_size + (np.abs(t["beta"])[:, None] if case.beta else 0) + (0 if residual is None else np.abs(residual))
    outputs: Arrays
    if op == "batch_norm_fwd":
        outputs = {"y": a.y, "mean": a.mean, "variance": a.variance}
        sizes = {
            "y": z_size * tolerance.SLOPE[case.activation],
            "mean": mean_size[:, 0],
            "variance": a.variance + 2 * spread[:, 0],
        }
    else:
        dx, dresidual, dgamma, dbeta = reference.batch_norm_bwd(t["dy"], x, t.get("gamma"), t.get("beta"), **options)
        outputs = {"dx": dx, "dresidual": dresidual, "dgamma": dgamma, "dbeta": dbeta}
        dy = np.abs(t["dy"])
        sizes = _gradient_sizes(
            np.abs(dresidual) + dy * (1 + _CURVATURE.get(case.activation, 0) * z_size), h, h_size, rstd_size, case.given
        )
        sizes["dx"] = sizes["dx"] * rstd * weight

    def allowed(name: str, dtype: np.dtype[Any]) -> Array:
        limit = tolerance.bound(sizes[name], dtype)
        if name == "y":
            limit = limit + tolerance.activation_rounding(a.z, a.y, case.activation, dtype)
        if op == "batch_norm_bwd":
            unsure = [np.abs(a.z - kink) <= tolerance.bound(z_size, dtype) for kink in _KINKS.get(case.activation, ())]
            jump = np.where(np.any(unsure, axis=0), dy, 0.0) if unsure else np.zeros_like(dy)
            more = _gradient_sizes(jump, h, 0 * h, 0.0, case.given)
            more["dx"] = 2 * more["dx"] * rstd * weight
            limit = limit + more[name]
        return np.reshape(limit, case.shape(name))

    return {n: np.reshape(v, case.shape(n)) for n, v in outputs.items()}, allowed


def _gradient_sizes(g: Array, h: Array, h_size: Array, rstd_size: Any, given: bool) -> dict[str, Array]:
    """Sums of magnitudes behind each gradient where the one before the activation has size g; dx without its scale."""
    average: Callable[[Array], Array] = lambda v: v.mean(axis=(0, 2))[:, None]  # noqa: E731
    inner, along, along_size = g, 0.0 * average(g), 0.0 * average(g)
    if not given:
        along, along_size = average(g * h), average(g * h_size)
        inner = g + average(g) + h * along
    return {
        "dx": (1 + rstd_size) * inner + h_size * along + h * along_size,
        "dresidual": g,
        "dgamma": (g * (h + h_size)).sum(axis=(0, 2)),
        "dbeta": g.sum(axis=(0, 2)),
    }


def _grid() -> Iterator[BatchNormCase]:
    for layout in ("nchw", "nhwc"):
        for C in (1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 70):
            yield BatchNormCase(2, C, 9, layout, False, True, True, True, "relu")
            yield BatchNormCase(3, C, 7, layout)
        for P in (1, 2, 4, 15, 16, 17, 31, 33, 64, 65, 130):
            yield BatchNormCase(2, 5, P, layout, False, False, True, True, "relu6")
            yield BatchNormCase(3, 6, P, layout, True, True, True, True, "hardswish")
        for given in (False, True):
            for activation in ("none", "relu", "relu6", "silu", "hardswish"):
                yield BatchNormCase(3, 20, 21, layout, given, True, True, True, activation)
                yield BatchNormCase(3, 20, 21, layout, given, False, True, True, activation)
            yield BatchNormCase(2, 18, 10, layout, given, True, False, True)
            yield BatchNormCase(2, 18, 10, layout, given, True, True, False, "relu")
        # Several blocks, of which the last is smaller.
        yield BatchNormCase(5, 3, 9000, layout, False, True, True, True, "relu")
        yield BatchNormCase(2, 700, 50, layout, False, False, True, True, "relu")


@cache
def batch_norm_grid() -> tuple[BatchNormCase, ...]:
    """Every batch normalisation problem of the tests, without duplicates."""
    return tuple(dict.fromkeys(_grid()))
