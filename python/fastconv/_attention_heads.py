"""Attention's operands in the four dimensions that kernels know, whatever their rank, and results back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import describe
from .ops._dispatch import computed_in

OP = "scaled_dot_product_attention"


def _broadcast(shapes: Sequence[torch.Size], what: str) -> tuple[int, ...]:
    """The shape that all of them broadcast to, with torch's sentence where there is none."""
    rank = max(len(shape) for shape in shapes)
    found: list[int] = []
    for dim in range(-rank, 0):
        sizes = [shape[dim] for shape in shapes if len(shape) >= -dim]
        size = next((s for s in sizes if s != 1), 1)
        for s in sizes:
            if s not in (1, size):
                raise RuntimeError(
                    f"The size of tensor a ({size}) must match the size of tensor b ({s}) at non-singleton dimension "
                    f"{rank + dim}: {what} of {OP}() have shapes {[list(shape) for shape in shapes]}"
                )
        found.append(size)
    return tuple(found)


class Heads:
    """Operands of any rank as (B, H, L, E), and results back. Nothing is copied where the rank is at most 4."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> None:
        if grouped:
            key, value = self._groups(query, key, value)
        leading = [t.shape[: -3 if grouped else -2] for t in (query, key, value)]
        self.batch = _broadcast(leading, "query, key and value")
        if grouped:
            self.batch = (*self.batch, query.shape[-3])
        self.scores = (*self.batch, query.shape[-2], key.shape[-2])
        # A head of keys and values that all heads of queries share stays one.
        shared = not grouped and len(self.batch) > 0 and all(t.dim() < 3 or t.shape[-3] == 1 for t in (key, value))
        kv = self.batch[:-1] + ((1,) if shared else (key.shape[-3],) if grouped else self.batch[-1:])
        self.q, self.k, self.v = self._four(query, self.batch), self._four(key, kv), self._four(value, kv)

    def _groups(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if min(query.dim(), key.dim(), value.dim()) < 3:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [-2, 1], but got -3): {OP}() with enable_gqa needs heads, "
                f"got {query.dim()}, {key.dim()} and {value.dim()} dimensions"
            )
        heads, of_key, of_value = query.shape[-3], key.shape[-3], value.shape[-3]
        if of_key == 0 or of_value == 0 or heads % of_key or heads % of_value:
            raise RuntimeError(
                "Number of heads in key and value must divide the number of heads in query, but got "
                f"{of_key} and {of_value} for {heads}"
            )
        if of_key != of_value:
            key, value = key.repeat_interleave(heads // of_key, -3), value.repeat_interleave(heads // of_value, -3)
        return key, value

    def _four(self, t: Tensor, batch: tuple[int, ...]) -> Tensor:
        t = t.expand(*batch, *t.shape[-2:])
        if len(batch) < 2:
            return t[(None,) * (2 - len(batch))]
        return t if len(batch) == 2 else t.flatten(0, len(batch) - 2)

    def mask(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The mask in 4 dimensions, of size 1 where it is broadcast."""
        if mask is None:
            return None
        if mask.dim() < 2:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [-1, 0], but got -2): attn_mask of {OP}() has shape "
                f"{list(mask.shape)}, expected {list(self.scores)} or what broadcasts to it"
            )
        if (
            mask.dim() > len(self.scores)
            or _broadcast([torch.Size(self.scores), mask.shape], "scores and attn_mask") != self.scores
        ):
            raise RuntimeError(f"attn_mask of {OP}() has shape {list(mask.shape)}, expected {list(self.scores)} or 1s")
        if mask.dtype not in (torch.bool, dtype):
            mask = mask.to(computed_in(dtype))
        if len(self.scores) <= 4:
            return mask[(None,) * (4 - mask.dim())]
        leading = mask.dim() - 3
        if leading > 0 and any(size != 1 for size in mask.shape[:leading]):
            mask = mask.expand(*self.batch[:-1], *mask.shape[-3:])
        return mask.flatten(0, mask.dim() - 4) if leading > 0 else mask[(None,) * (4 - mask.dim())]

    def numbers(self, name: str, found: Any, *sizes: int) -> Tensor | None:
        """`found` as (B, Hq, *sizes), of size 1 where it is broadcast, in the precision that is computed in."""
        if found is None:
            return None
        whole = torch.Size((*self.batch, *sizes))
        if not isinstance(found, Tensor):
            raise TypeError(f"{OP}(): argument '{name}' must be Tensor, not {describe(found)}")
        t: Tensor = found
        fits = t.dim() <= len(whole) and t.dim() >= len(sizes) and t.shape[t.dim() - len(sizes) :] == torch.Size(sizes)
        if not fits or any(m not in (1, s) for m, s in zip(reversed(t.shape), reversed(whole))):
            raise RuntimeError(
                f"{name} of {OP}() has shape {list(t.shape)}, expected {list(whole)} or what broadcasts to it"
            )
        if not t.is_floating_point() or t.device != self.q.device:
            raise RuntimeError(
                f"{name} of {OP}() is {t.dtype} on {t.device}, expected floating numbers on {self.q.device}"
            )
        t = t.to(computed_in(self.q.dtype))
        t = t[(None,) * (max(len(whole), 2 + len(sizes)) - t.dim())]
        leading = len(self.batch) - 2
        if leading <= 0:
            return t
        return t.expand(*self.batch[:-1], *t.shape[leading + 1 :]).flatten(0, leading)

    def undo(self, t: Tensor) -> Tensor:
        if len(self.batch) < 2:
            return t[(0,) * (2 - len(self.batch))]
        return t if len(self.batch) == 2 else t.unflatten(0, self.batch[:-1])
