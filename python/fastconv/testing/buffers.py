"""Memory that notices: tensors of any stride pattern, surrounded by canaries or by pages that must not be touched."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

Place = Literal["heap", "low", "high"]

PAGE = mmap.PAGESIZE
# Bytes on each side of a heap buffer: more than the widest vector times the deepest unroll, so that a stray store lands
# in it.
MARGIN = 1024
LINE = 64
# A NaN as f32, f64, f16 and bf16, an unlikely index as int64, and a pattern that no computation makes.
CANARY = np.uint8(0xFF)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PROT_NONE = 0


@lru_cache(maxsize=4096)
def strides_of(shape: tuple[int, ...], layout: str) -> tuple[tuple[int, ...], int, int]:
    """(strides, offset, length) in elements of a 4-D tensor in a memory format: element 0 lies at offset in a block of
    that length.

    Activations (N, C, H, W): nchw, nhwc; rows and planes are nchw with gaps after each row or after each image's
    channels, slice is nhwc with the channels cut from wider ones, step takes every other column, turned has H and W
    exchanged, expand repeats one image and one row, scalar repeats one element. Weights (K, C, R, S): kcrs, krsc, ckrs,
    and flip, which is kcrs read backwards. Attention's (B, H, L, D): heads is (B, L, H, D) in memory, shared repeats one
    batch element. Masks (B, H, Lq, Lkv): mask_ and the letters of bhqk that are not broadcast. Recurrent layers'
    (N, L, width, 1): steps is (L, N, width) in memory.
    """
    a, b, c, d = shape
    if layout.startswith("mask_"):
        return _mask_strides(shape, layout.removeprefix("mask_"))
    strides = {
        "heads": (b * c * d, d, b * d, 1),
        "shared": (0, c * d, d, 1),
        "steps": (c * d, a * c * d, d, 1),
        "nchw": (b * c * d, c * d, d, 1),
        "nhwc": (b * c * d, 1, d * b, b),
        "rows": (b * (c + 2) * (d + 3), (c + 2) * (d + 3), d + 3, 1),
        "planes": ((b + 2) * c * d, c * d, d, 1),
        "slice": (c * d * (b + 5), 1, d * (b + 5), b + 5),
        "step": (b * c * 2 * d, c * 2 * d, 2 * d, 2),
        "turned": (b * c * d, c * d, 1, c),
        "expand": (0, 1, 0, b),
        "scalar": (0, 0, 0, 0),
        "kcrs": (b * c * d, c * d, d, 1),
        "krsc": (b * c * d, 1, d * b, b),
        "ckrs": (c * d, a * c * d, d, 1),
        "flip": (b * c * d, c * d, -d, -1),
    }[layout]
    reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    offset = -sum(v for v in reach if v < 0)
    return strides, offset, offset + sum(v for v in reach if v > 0) + 1


def _mask_strides(shape: tuple[int, ...], letters: str) -> tuple[tuple[int, ...], int, int]:
    strides, step = [0] * 4, 1
    for i in reversed(range(4)):
        if "bhqk"[i] in letters:
            strides[i], step = step, step * shape[i]
    return tuple(strides), 0, step


class Block:
    """``size`` bytes with canaries around them, or flush against a page that may not be touched: behind it (high) or
    before it (low). ``whole`` is all of it, with its canaries; ``live`` are those that somebody holds.
    """

    live: ClassVar[weakref.WeakSet[Block]] = weakref.WeakSet()

    def __init__(self, size: int, place: Place = "heap", align: int = 1) -> None:
        self.size = size
        if place == "heap":
            whole = np.full(size + 2 * MARGIN + 2 * LINE, CANARY, np.uint8)
            # One element past a cache line: no kernel may count on more than the alignment of an element.
            start = MARGIN + (-(whole.ctypes.data + MARGIN)) % LINE + align % LINE
        else:
            pages = max(1, -(-size // PAGE))
            self._map = mmap.mmap(-1, (pages + 2) * PAGE)
            view = np.frombuffer(self._map, np.uint8)
            for page in (0, pages + 1):
                if _libc.mprotect(view.ctypes.data + page * PAGE, PAGE, _PROT_NONE) != 0:
                    raise OSError(ctypes.get_errno(), "mprotect failed")
            whole = view[PAGE : (pages + 1) * PAGE]
            whole[:] = CANARY
            start = 0 if place == "low" else (pages * PAGE - size) // align * align
        self.whole, self._start = whole, start
        self.bytes = whole[start : start + size]
        self.address = int(whole.ctypes.data) + start
        Block.live.add(self)

    def damage(self) -> str:
        """'' or what was written outside the block."""
        before, after = self.whole[: self._start], self.whole[self._start + self.size :]
        if not (before == CANARY).all():
            return f"wrote {self._start - int(np.argmax(before != CANARY))} bytes before its start"
        if not (after == CANARY).all():
            return f"wrote {after.size - int(np.argmax(after[::-1] != CANARY))} bytes behind its end"
        return ""


@dataclass
class Operand:
    """One tensor of a call: ``view`` is the logical array on ``block``; the gaps between its elements hold canaries
    (NaN).
    """

    block: Block
    view: NDArray[Any]
    strides: tuple[int, ...]
    offset: int
    is_output: bool
    before: bytes

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        layout: str,
        place: Place = "heap",
        data: NDArray[Any] | None = None,
    ) -> Operand:
        """A tensor holding ``data``, or nothing but canaries: the output of a call."""
        kind = np.dtype(dtype)
        strides, offset, length = strides_of(shape, layout) if len(shape) == 4 else ((1,), 0, shape[0])
        block = Block(length * kind.itemsize, place, kind.itemsize)
        view = _view(block.bytes.view(kind), shape, strides, offset)
        if data is not None:
            view[...] = data
        return cls(block, view, strides, offset, data is None, block.bytes.tobytes())

    @property
    def address(self) -> int:
        """Of the element with all indices zero."""
        return self.block.address + self.offset * self.view.itemsize

    def damage(self) -> str:
        """'' or what a call did to memory it had no business with: around the tensor, in its gaps, or in an input."""
        if outside := self.block.damage():
            return outside
        words = self._words(self.block.bytes)
        if self.is_output and words.size == self.view.size:
            return ""
        changed = words != self._words(np.frombuffer(self.before, np.uint8))
        if self.is_output:
            _view(changed, self.view.shape, self.strides, self.offset)[...] = False
        if not changed.any():
            return ""
        what = "a gap between its rows" if self.is_output else "an input"
        return f"wrote to element {int(np.argmax(changed))} of its memory, which is {what}"

    def unwritten(self) -> NDArray[np.bool_]:
        """Which elements of an output still hold the canary."""
        return _view(
            self._words(self.block.bytes) == np.iinfo(f"u{self.view.itemsize}").max,
            self.view.shape,
            self.strides,
            self.offset,
        )

    def _words(self, memory: NDArray[np.uint8]) -> NDArray[Any]:
        words: NDArray[Any] = memory.view(f"u{self.view.itemsize}")
        return words


def _view(flat: NDArray[Any], shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> NDArray[Any]:
    size = flat.itemsize
    view: NDArray[Any] = np.ndarray(shape, flat.dtype, flat, offset * size, tuple(s * size for s in strides))
    return view
