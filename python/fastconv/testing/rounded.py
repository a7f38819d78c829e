"""Numbers that know how far rounding may have moved them: a formula in NumPy, run on them, gives its own error bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from fastconv.testing import tolerance

Array = NDArray[np.float64]


class Rounded(NDArrayOperatorsMixin):
    """`value` in float64, and how many eps a computation in lower precision may be off it, to first order.

    Every operation passes on the errors of its operands, times its derivatives, and adds its own: half an eps of a product or a
    quotient, counted as a whole one; one of both parts of a sum, for in which order three are added is a program's choice; two of
    an exponential and three of a tanh, whose measured errors are below; for a matrix product what `tolerance.bound` allows.
    """

    def __init__(self, value: Any, error: Any = 0.0) -> None:
        self.value: Array = np.asarray(value, np.float64)
        self.error: Array = np.broadcast_to(np.asarray(error, np.float64), self.value.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def T(self) -> Rounded:
        return Rounded(self.value.T, self.error.T)

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: Any) -> Rounded:
        return Rounded(self.value[index], self.error[index])

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> Rounded:
        return _RULES[ufunc](*(t if isinstance(t, Rounded) else Rounded(t) for t in inputs))

    def __array_function__(self, function: Any, _: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Rounded:
        parts: Sequence[Rounded] = args[0]
        assert function in (np.stack, np.concatenate)
        return Rounded(function([t.value for t in parts], **options), function([t.error for t in parts], **options))


def _sum(sign: int) -> Callable[[Rounded, Rounded], Rounded]:
    def rule(a: Rounded, b: Rounded) -> Rounded:
        return Rounded(a.value + sign * b.value, a.error + b.error + np.abs(a.value) + np.abs(b.value))

    return rule


def _times(a: Rounded, b: Rounded) -> Rounded:
    x, y = np.abs(a.value), np.abs(b.value)
    return Rounded(a.value * b.value, a.error * y + b.error * x + x * y)


def _over(a: Rounded, b: Rounded) -> Rounded:
    y = a.value / b.value
    return Rounded(y, (a.error + np.abs(y) * b.error) / np.abs(b.value) + np.abs(y))


def _exp(a: Rounded) -> Rounded:
    y = np.exp(a.value)
    return Rounded(y, y * (a.error + 2))


def _tanh(a: Rounded) -> Rounded:
    y = np.tanh(a.value)
    return Rounded(y, (1 - y * y) * a.error + 3 * np.abs(y))


def _matmul(a: Rounded, b: Rounded) -> Rounded:
    x, y = np.abs(a.value), np.abs(b.value)
    return Rounded(a.value @ b.value, a.error @ y + x @ b.error + tolerance.FACTOR * (x @ y))


_RULES: dict[Any, Callable[..., Rounded]] = {
    np.add: _sum(1),
    np.subtract: _sum(-1),
    np.multiply: _times,
    np.divide: _over,
    np.negative: lambda a: Rounded(-a.value, a.error),
    np.exp: _exp,
    np.tanh: _tanh,
    np.matmul: _matmul,
}
