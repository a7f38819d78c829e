"""What a call adds to the process's memory at its highest, result included."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Callable
from pathlib import Path

import fastconv

# csrc/eager/scratch.h: as much as a thread keeps from one call to the next.
_KEPT_SCRATCH = 16 << 20
_MADV_DONTNEED = 4


def peak_bytes(call: Callable[[], object]) -> int | None:
    """How far resident memory rises above what it was while `call` runs, from Linux's high-water mark; None where there is none.

    What the allocator keeps of earlier calls, and the scratch that fastconv keeps (in this thread: its threads share the
    caller's), is given back first: it would serve this call unseen.
    """
    if not _measurable():
        return None
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    # The largest block it keeps: a call touches, and so counts, only the pages that it needs of it.
    scratch, page = fastconv._C.scratch(_KEPT_SCRATCH), mmap.PAGESIZE
    first = -(-scratch // page) * page
    whole = (scratch + _KEPT_SCRATCH - first) // page * page
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), _MADV_DONTNEED)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _measurable() -> bool:
    """Whether this is a Linux that resets its high-water mark, with an allocator that gives memory back."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") > 0 and hasattr(ctypes.CDLL(None), "malloc_trim")
    except OSError:
        return False


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
