"""Kernels on a GPU for the harness, whose memory is the CPU's: blocks are copied there, canaries and all, and back when a kernel
has run, so that what it wrote outside of its operands is seen there too. Needs torch, which has the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastconv.testing.buffers import Block

# A copy lies as its block does within so many bytes, which is what torch's allocator aligns to on a GPU.
_ALIGNMENT = 512


class OnGpu:
    """Answers as the compiled module, or what stands in for it, on operands in the memory of `device`, for GPU 0."""

    def __init__(self, module: Any, device: str = "cuda:0") -> None:
        self._module, self._device = module, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def explain(self, op: str, problem: Any) -> Any:
        return self._module.explain(op, problem, device=0)

    def plan(self, op: str, problem: Any, threads: int, force: str) -> _Plan:
        return _Plan(self._module.plan(op, problem, threads, force, device=0), self._device)


class _Plan:
    def __init__(self, plan: Any, device: str) -> None:
        self._plan, self._device = plan, device
        self.kernel, self.workspace, self.packed = plan.kernel, plan.workspace, plan.packed

    def run_conv2d(self, *addresses: int, workspace: int) -> None:
        self._run(lambda there, scratch: self._plan.run_conv2d(*there, workspace=scratch), addresses, workspace)

    def run_pool2d(self, x: int, y: int, indices: int, workspace: int) -> None:
        self._run(lambda there, scratch: self._plan.run_pool2d(*there, workspace=scratch), (x, y, indices), workspace)

    def run_sdpa(self, addresses: Sequence[int], workspace: int) -> None:
        self._run(self._plan.run_sdpa, addresses, workspace)

    def run_norm(self, addresses: Sequence[int], workspace: int) -> None:
        self._run(self._plan.run_norm, addresses, workspace)

    def _run(self, start: Callable[[list[int], int], None], addresses: Sequence[int], workspace: int) -> None:
        copies = _Copies(self._device)
        start([copies.address(a) for a in addresses], copies.address(workspace))
        copies.bring_back()


class _Copies:
    """Of the blocks that addresses lie in."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._made: dict[Block, Tensor] = {}

    def address(self, here: int) -> int:
        """Where the byte at this address lies there; 0 for an operand that is not given."""
        if not here:
            return 0
        (block,) = (b for b in Block.live if 0 <= here - b.whole.ctypes.data < b.whole.size)
        if block not in self._made:
            self._made[block] = self._copy(block)
        return self._made[block].data_ptr() + here - int(block.whole.ctypes.data)

    def _copy(self, block: Block) -> Tensor:
        space = torch.empty(block.whole.size + _ALIGNMENT, dtype=torch.uint8, device=self._device)
        start = (int(block.whole.ctypes.data) - space.data_ptr()) % _ALIGNMENT
        return space[start : start + block.whole.size].copy_(torch.from_numpy(block.whole))

    def bring_back(self) -> None:
        for block, copy in self._made.items():
            torch.from_numpy(block.whole).copy_(copy)  # which waits for the kernel, and reports what went wrong in it
