"""Where a test's tensors lie: on the CPU, on stand-ins for CUDA tensors with the emulated kernels (fake_cuda.py), on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastconv
from fastconv.ops import _cuda_launch


class Place:
    """`place(what)` brings a tensor, or a module, there.

    `dtype` is the widest that kernels there have: float64 on the CPU. On a GPU the numbers of float64 are the CPU's to say, so
    that what a test expects is computed before anything is brought there.
    """

    name, dtype, is_gpu = "cpu", torch.float64, False

    def __call__(self, what: Any) -> Any:
        return what

    def back(self, found: Any) -> Any:
        """Tensors, and what holds some, on the CPU."""
        return tree_map(lambda t: self._back(t.detach()) if isinstance(t, Tensor) else t, found)

    def _back(self, t: Tensor) -> Tensor:
        return t

    def same(self, found: Any, expected: Any, bits: int = 24, **options: Any) -> None:
        """On the CPU by torch's own tolerance. On a GPU float32 stands against float64, and the largest error may be 32 units of
        the last of so many bits, of the largest number or of 1: 24 for one sum, 18 for sums of sums.
        """
        if not self.is_gpu:
            torch.testing.assert_close(found, expected, **options)
            return
        options.pop("rtol", None), options.pop("atol", None)
        ours, theirs = (tree_leaves(self.back(both)) for both in (found, expected))
        assert len(ours) == len(theirs)
        for mine, yours in zip(ours, theirs, strict=True):
            assert (mine is None) == (yours is None)
            if mine is not None:
                finite = yours[yours.isfinite()].double().abs()
                scale = max(1.0, float(finite.max()) if finite.numel() else 0.0)
                atol = 32 * 2.0**-bits * scale if yours.is_floating_point() else 0
                torch.testing.assert_close(mine.double(), yours.double(), rtol=0, atol=atol, **options)

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype)

    @contextmanager
    def letting(self, *ops: str) -> Iterator[None]:
        """While the block runs torch may answer these, which have no kernels on a GPU, and no others."""
        if not self.is_gpu:
            yield
            return
        before = fastconv.fallback_counts()
        fastconv.set_fallback("silent")
        try:
            yield
        finally:
            fastconv.set_fallback("error")
        after = fastconv.fallback_counts()
        assert {op for (op, _), count in after.items() if count != before.get((op, _), 0)} <= set(ops)


class Gpu(Place):
    name, dtype, is_gpu = "cuda", torch.float32, True

    def __call__(self, what: Any) -> Any:
        return what.cuda()

    def _back(self, t: Tensor) -> Tensor:
        return t.cpu()

    @contextmanager
    def autocast(self, dtype: torch.dtype) -> Iterator[None]:
        """torch.autocast("cuda") also without a GPU, where that one switches itself off."""
        before = torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)


class Emulated(Gpu):
    name = "emulated"

    def __init__(self, fake_cuda: ModuleType) -> None:
        self._fake = fake_cuda

    def __call__(self, what: Any) -> Any:
        return self._fake.FakeCuda(what) if isinstance(what, Tensor) else self._fake.to_fake(what)

    def _back(self, t: Tensor) -> Tensor:
        held: Tensor = getattr(t, "held", t)
        return held


def why_no_gpu() -> str:
    """What is missing for tests on a GPU; "" where nothing is."""
    if not torch.cuda.is_available():
        return f"needs a GPU: torch {torch.__version__} finds none"
    kernels = [kernel for kernel in fastconv.kernels() if kernel.target == "sm80"]
    if not kernels:
        return f"needs CUDA kernels: {fastconv.build_info()['cuda_reason']}"
    return str(kernels[0].why_not)


@contextmanager
def kernels_answer() -> Iterator[None]:
    """On a GPU our kernels answer, in whole float32 like torch's, or nobody does."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    # What the public switch of cuDNN calls, which torch.testing's samples lock.
    torch._C._set_cudnn_allow_tf32(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    fastconv.set_cuda(True)
    fastconv.set_fallback("error")
    _cuda_launch.planned.cache_clear()
    try:
        yield
    finally:
        fastconv.set_fallback("warn")
        fastconv.set_cuda(False)
        torch._C._set_cudnn_allow_tf32(before[0])
        torch.backends.cuda.matmul.allow_tf32 = before[1]
