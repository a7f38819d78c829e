"""What is said, and counted, when torch answers a call in place of a kernel of ours."""

from __future__ import annotations

import sys
import threading
import warnings
from typing import Literal, get_args

Mode = Literal["silent", "warn", "error"]

_mode: Mode = "warn"
_counts: dict[tuple[str, str], int] = {}
_lock = threading.Lock()


class FallbackWarning(UserWarning):
    """A call went to torch, because no kernel of fastconv's applies."""


def set_fallback(mode: Mode) -> None:
    """What to do where no kernel applies and torch has to answer: "silent", "warn" (once for each op and reason; the
    default) or "error" (NotImplementedError with the reason). Calls are counted in every mode. Raises ValueError for another
    mode.
    """
    global _mode
    if mode not in get_args(Mode):
        raise ValueError(f"set_fallback: got {mode!r}, expected 'silent', 'warn' or 'error'")
    _mode = mode


def fallback_counts() -> dict[tuple[str, str], int]:
    """How often each op went to torch in this process, and why: {(op, reason): number of calls}. Compiled code is counted
    when it is traced.
    """
    with _lock:
        return dict(_counts)


def _callers_level() -> int:
    """`stacklevel` of the first frame, seen from `note`, that is neither in this package nor in torch's layers."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fastconv", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def note(op: str, reason: str) -> None:
    """Counts a call of `op` that torch is about to answer because of `reason`, and warns or raises as `set_fallback` says."""
    with _lock:
        count = _counts[op, reason] = _counts.get((op, reason), 0) + 1
    if _mode == "error":
        raise NotImplementedError(
            f"{op} has no kernel of fastconv's: {reason}. Hint: fastconv.set_fallback('warn') lets torch compute it."
        )
    if _mode == "warn" and count == 1:
        warnings.warn(
            f"{op} runs on torch's kernels, not fastconv's: {reason}. Hint: fastconv.fallback_counts() counts these calls, "
            "fastconv.set_fallback('error') stops at them, 'silent' hides this.",
            FallbackWarning,
            stacklevel=_callers_level(),
        )
