"""Recurrent layers as problems: plain data with an id, the grid of them, their inputs and what their kernels must give.

lstm3l2n17+bias+reverse+keep      three steps of two sequences with 17 hidden units, from the last step to the first
gru3l2n17+bias                    nothing is kept for a backward pass
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
from fastconv.testing.rounded import Rounded

Array = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

RECURRENT_OPS = ("lstm_fwd", "lstm_bwd", "gru_fwd", "gru_bwd")
# In the order of RecurrentArgs.
OPERANDS = (
    "gates", "w", "bias", "h", "c", "y", "c_last", "kept", "dy", "dc_last", "dgates", "dproduct", "dh", "dc",
)  # fmt: skip
_STEPS = ("gates", "y", "kept", "dy", "dgates", "dproduct")


@dataclass(frozen=True)
class RecurrentCase:
    """L steps of N sequences with H hidden units, forward and backward."""

    kind: str
    L: int
    N: int
    H: int
    bias: bool = False
    reverse: bool = False
    keep: bool = False

    @property
    def ops(self) -> tuple[str, ...]:
        return (f"{self.kind}_fwd", f"{self.kind}_bwd")

    @property
    def formats(self) -> dict[str, str]:
        """Steps come first in memory."""
        return dict.fromkeys(_STEPS, "steps")

    def shape(self, name: str) -> tuple[int, ...]:
        """Sequences come first here, (N, L, width, 1) or (N, H, 1, 1), so that tests see samples everywhere."""
        gates, kept = (4, 5) if self.kind == "lstm" else (3, 4)
        if name in ("w", "bias"):
            return (gates * self.H, self.H, 1, 1) if name == "w" else (gates * self.H,)
        width = {"gates": gates, "dgates": gates, "dproduct": gates, "kept": kept}.get(name, 1) * self.H
        return (self.N, self.L, width, 1) if name in _STEPS else (self.N, self.H, 1, 1)

    def operands(self, op: str) -> tuple[str, ...]:
        """What the op reads and writes here. Where there is a bias, there is a gradient of the last c."""
        bias, keep = ("bias",) * self.bias, ("kept",) * self.keep
        if op == "lstm_fwd":
            return ("gates", "w", *bias, "h", "c", "y", "c_last", *keep)
        if op == "gru_fwd":
            return ("gates", "w", *bias, "h", "y", *keep)
        if op == "lstm_bwd":
            return ("w", "c", "kept", "dy", *("dc_last",) * self.bias, "dgates", "dh", "dc")
        return ("w", "h", "y", "kept", "dy", "dgates", "dproduct", "dh")

    @property
    def stored(self) -> frozenset[str]:
        """The operands of the problem's own dtype: all."""
        return frozenset(OPERANDS)

    def __str__(self) -> str:
        words = [name for name in ("bias", "reverse", "keep") if getattr(self, name)]
        return "+".join([f"{self.kind}{self.L}l{self.N}n{self.H}", *words])


_RECURRENT = re.compile(r"(lstm|gru)(\d+)l(\d+)n(\d+)(\+bias)?(\+reverse)?(\+keep)?", re.ASCII)


def parse_recurrent(text: str) -> RecurrentCase | None:
    """The case whose ``str`` is ``text``, None where it is not a recurrent layer."""
    m = _RECURRENT.fullmatch(text)
    if m is None:
        return None
    return RecurrentCase(m[1], int(m[2]), int(m[3]), int(m[4]), *(word is not None for word in m.groups()[4:]))


def native_recurrent(native: Any, case: RecurrentCase, dtype: str) -> Any:
    """The case as the compiled module's problem."""
    return native.RecurrentProblem(dtype=dtype, L=case.L, B=case.N, H=case.H, reverse=case.reverse)


def recurrent_inputs(op: str, case: RecurrentCase, values: fill.Fill, dtype: str = "f32") -> Arrays:
    """Logical arrays of what the op reads. Weights of H units are 1/sqrt(H) as large, as torch makes them.

    What a backward pass reads of a forward pass is that of such inputs, rounded to f32.
    """
    wanted = ("w", "dy", "dc_last") if op.endswith("bwd") else ("gates", "w", "bias", "h", "c")
    found: Arrays = {n: values(f"{case}{n}", case.shape(n)) for n in wanted if n in case.operands(op)}
    found["w"] = np.float32(found["w"] / np.sqrt(case.H)).astype(np.float64)
    if op.endswith("bwd"):
        state = "hc" if case.kind == "lstm" else "h"
        given = {n: values(f"{case}{n}", case.shape(n)) for n in ("gates", *state)} | {"w": found["w"]}
        forward = reference.RECURRENT[f"{case.kind}_fwd"](**_by_steps(given), reverse=case.reverse)
        kept = {n: np.float32(t).astype(np.float64) for n, t in _by_samples(case, forward).items()}
        found |= {n: t for n, t in (given | kept).items() if n in ("h", "c", "y", "kept") and n in case.operands(op)}
    return found


def _by_steps(arrays: Arrays) -> Arrays:
    """As the reference takes them, (L, B, ·) and (B, H)."""
    flat = {n: t if t.ndim == 1 else t[..., 0] if n in _STEPS else t[..., 0, 0] for n, t in arrays.items()}
    return {n: t.swapaxes(0, 1) if n in _STEPS else t for n, t in flat.items()}


def _by_samples(case: RecurrentCase, arrays: dict[str, Any]) -> Arrays:
    return {n: (t.swapaxes(0, 1) if n in _STEPS else t).reshape(case.shape(n)) for n, t in arrays.items()}


Allowed = Callable[[str, np.dtype[Any]], Array]


def recurrent_truth(op: str, case: RecurrentCase, inputs: Arrays, dtype: str = "f32") -> tuple[Arrays, Allowed]:
    """The expected outputs, and the error allowed to each: what all roundings so far may have made of each step, to first order.

    To a product with weights that is what a sum of its length is allowed. The smallest normal number covers what underflows.
    """
    given = {n: Rounded(t) for n, t in _by_steps(inputs).items()}
    found = reference.RECURRENT[op](**given, reverse=case.reverse)
    errors = _by_samples(case, {n: t.error for n, t in found.items()})

    def allowed(name: str, dtype: np.dtype[Any]) -> Array:
        return tolerance.eps(dtype) * errors[name] + float(np.finfo(dtype).tiny)

    return _by_samples(case, {n: t.value for n, t in found.items()}), allowed


def _grid() -> Iterator[RecurrentCase]:
    for kind in ("lstm", "gru"):
        for H in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100, 130):
            yield RecurrentCase(kind, 4, 2, H, True, False, True)
            yield RecurrentCase(kind, 1, 3, H, True, True)
        for options in ((a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)):
            yield RecurrentCase(kind, 3, 5, 20, *options)
        # Tiles of every number of rows, several rows of tiles, and several blocks of a product's depth, packed and in place.
        for N in (1, 3, 6, 7, 8, 9, 10, 12, 13, 17, 47, 48, 49, 100):
            yield RecurrentCase(kind, 2, N, 12, True, False, True)
        for L in (1, 4):
            yield RecurrentCase(kind, L, 2, 530, True, True, True)
        yield RecurrentCase(kind, 30, 2, 10, True, False, True)


@cache
def recurrent_grid() -> tuple[RecurrentCase, ...]:
    """Every recurrent problem of the tests, without duplicates."""
    return tuple(dict.fromkeys(_grid()))
