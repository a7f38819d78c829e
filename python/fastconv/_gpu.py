"""Whether calls on CUDA tensors run on our kernels: what the user chose, and what this build can do on the GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from . import _native

if TYPE_CHECKING:
    from . import _C
else:
    _C = _native.load()

# What `fastconv.set_cuda` says.
enabled = False

# Whether `fastconv.cuda` is calling, which takes no answer of torch's.
calling: ContextVar[bool] = ContextVar("fastconv_cuda", default=False)

# What an op without kernels for GPUs says.
_WITHOUT = frozenset(("batch_norm",))

_NOT_MEASURED = (
    ", and the kernels for GPUs have not been measured on one; fastconv.set_cuda(True) runs them here too, "
    "fastconv.cuda calls them"
)


@functools.cache
def _why_not(device: int) -> str:
    return _C.why_not_on_gpu(device)


def reason_for_torch(op: str, device: int) -> str:
    """Why torch has to answer a call of `op` on this GPU, in words that follow "on cuda"; "" where our kernels may."""
    if not (enabled or calling.get()):
        return _NOT_MEASURED
    if op in _WITHOUT:
        return f", where {op} has no kernel"
    why_not = _why_not(device)
    return why_not and f": {why_not}"


# As `_routes._note`: a compiler asks this while it traces, and keeps the answer.
reason_for_torch._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def only() -> Iterator[None]:
    """While the block runs, CUDA tensors are for our kernels in this thread (or asyncio task), and torch answers no call."""
    token = calling.set(True)
    try:
        yield
    finally:
        calling.reset(token)
