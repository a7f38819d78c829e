"""Arguments as torch takes them (an int, a NumPy integer, a list, a 1-tuple) as tuples of ints, with torch's exceptions."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import Tensor

# torch's pooling passes its options through C ints; beyond that its convolutions leave their kernels too.
INT_MAX = 2**31 - 1

_WORDS = {1: "one int", 2: "two ints", 3: "three ints"}


def describe(value: object) -> str:
    """The type of an argument, as an error message names it."""
    kind = type(value)
    return kind.__name__ if kind.__module__ in ("builtins", "torch") else f"{kind.__module__}.{kind.__name__}"


def as_int(value: Any) -> Any:
    """`value` as an int (or a SymInt), None where torch would not take it for one: bools and floats are refused."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def ints(op: str, name: str, value: Any) -> tuple[int, ...]:
    """An int or a sequence of ints as a tuple of whatever length. TypeError for anything else, ValueError beyond 64 bits."""
    items = value if isinstance(value, (tuple, list)) else (value,)
    found = tuple(map(as_int, items))
    if None in found:
        if isinstance(value, (tuple, list)):
            at = found.index(None)
            wrong_type(op, name, "tuple of ints", value, f"found element of type {describe(items[at])} at pos {at}")
        wrong_type(op, name, "tuple of ints", value)
    for item in found:
        if not -(2**63) <= item < 2**63:
            raise ValueError(f"{op}(): Overflow when unpacking long long: {name} is {item}, expected 64 bits at most")
    return found


def integer(op: str, name: str, value: Any) -> int:
    """One int. TypeError for anything else."""
    found = as_int(value)
    if found is None:
        wrong_type(op, name, "int", value)
    return found  # type: ignore[no-any-return]


def boolean(op: str, name: str, value: Any) -> bool:
    """One bool. TypeError for anything else, an int too."""
    if isinstance(value, bool):
        return value
    wrong_type(op, name, "bool", value)


def tensor(op: str, name: str, value: Any) -> Tensor:
    """A tensor. TypeError for anything else, an array too."""
    if isinstance(value, Tensor):
        return value
    wrong_type(op, name, "Tensor", value)


def wrong_type(op: str, name: str, expected: str, value: object, instead: str = "") -> NoReturn:
    """Raises the TypeError that torch raises: its convolutions have two signatures and so word it in their own way."""
    if op in ("conv1d", "conv2d", "conv3d"):
        problem = f"received an invalid combination of arguments - got {name}={describe(value)}"
        raise TypeError(
            f"{op}() {problem}, but argument '{name}' must be {expected}" + (f", {instead}" if instead else "")
        )
    position = {
        "input": " (position 1)",
        "kernel_size": " (position 2)",
        "output_size": " (position 2)",
        "weight": " (position 2)",
    }
    got = f"but {instead}" if instead else f"not {describe(value)}"
    raise TypeError(f"{op}(): argument '{name}'{position.get(name, '')} must be {expected}, {got}")


def spread(values: tuple[int, ...], count: int) -> tuple[int, ...] | None:
    """`count` ints from one (repeated) or from `count`; None for any other number of them."""
    if len(values) == count:
        return values
    return values * count if len(values) == 1 else None


def how_many(count: int) -> str:
    """`two ints` for 2."""
    return _WORDS[count]
