"""Concatenations that put more channels behind those that are there, again and again: DenseNet's blocks.

Torch copies all that there is for each of them. Here memory for all is taken at the first, and each later one writes its own part
behind the rest; what comes out is a view of the channels so far.
"""

from __future__ import annotations

import torch
from torch import Tensor


def begin(first: Tensor, second: Tensor, room: int) -> Tensor:
    """torch.cat((first, second), 1), (N, C, H, W) as a view of memory with ``room`` more channels behind it."""
    if not _fits(first, second):
        return torch.cat((first, second), 1)
    N, C, H, W = first.shape
    grown = C + second.shape[1]
    last = first.stride(1) == 1 and C > 1
    memory = first.new_empty((N, H, W, grown + room) if last else (N, grown + room, H, W))
    memory = memory.permute(0, 3, 1, 2) if last else memory
    memory[:, :C] = first
    memory[:, C:grown] = second
    return memory[:, :grown]


def extend(grown: Tensor, more: Tensor) -> Tensor:
    """torch.cat((grown, more), 1) for what `begin` or this function made, whose memory has room for ``more``."""
    N, C, H, W = grown.shape
    wider = C + more.shape[1]
    last = grown.stride(1) == 1
    channels = grown.stride(3) if last else grown.stride(0) // (H * W)
    if not _fits(grown, more) or channels < wider:
        return torch.cat((grown, more), 1)
    whole = grown.as_strided((N, wider, H, W), grown.stride())
    whole[:, C:] = more
    return whole


def _fits(a: Tensor, b: Tensor) -> bool:
    """Whether the two are joined without conversions, and no gradient is recorded."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return False
    return a.dim() == b.dim() == 4 and a.dtype == b.dtype and a.device == b.device and min(a.shape) > 0
