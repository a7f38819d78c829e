"""Filters that do not change, kept in the orders that kernels want them in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import Plan


class PackedFilters:
    """One weight in every order that a kernel has asked for, each made when it is first asked for.

    They take as much memory as the weight itself, 16/9 to 64/9 of it for Winograd kernels. Where the weight is another one than
    at the last call, or torch knows that it was written to, they are made again. Copies and pickles are empty.
    """

    __slots__ = ("_kept", "_weight")

    def __init__(self) -> None:
        self._weight: tuple[int, int] | None = None
        self._kept: dict[tuple[str, int], Tensor] = {}

    def get(self, plan: Plan, w: Tensor) -> Tensor | None:
        """Bytes in the order of the plan's kernel, or None where it reads w as it is."""
        size, arrangement = plan.packed
        if size == 0:
            return None
        weight = w.data_ptr(), 0 if w.is_inference() else w._version
        if weight != self._weight:
            self._weight, self._kept = weight, {}
        kept = self._kept
        packed = kept.get((plan.kernel, arrangement))
        if packed is None:
            packed = torch.empty(size, dtype=torch.uint8)
            plan.native.pack(w.data_ptr(), packed.data_ptr())
            kept[plan.kernel, arrangement] = packed
        return packed

    def __reduce__(self) -> tuple[type[PackedFilters], tuple[()]]:
        return PackedFilters, ()
