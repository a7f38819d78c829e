"""How kernels for GPUs are asked for and started: on the operands' device, on torch's current stream there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import plan


def device_of(t: Tensor) -> int:
    return t.get_device()


def stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def allows_tf32(product: str) -> bool:
    """Whether torch's own switches let products of float32 be rounded to tf32: of a "conv", or of a "matmul".

    `torch.backends.cudnn.allow_tf32` and `torch.backends.cuda.matmul.allow_tf32` set these two.
    """
    backends: Any = torch.backends
    switch = backends.cudnn.conv if product == "conv" else backends.cuda.matmul
    return bool(switch.fp32_precision == "tf32")


class Asked(NamedTuple):
    """A kernel's problem: made by `make(*arguments)`, of operands of these shapes."""

    op: str
    make: Callable[..., Any]
    arguments: tuple[Any, ...]
    dtype: str
    shapes: tuple[plan.Shape, ...]


@plan.cached
def planned(asked: Asked, device: int, force: str, strict: bool) -> plan.Plan:
    return plan.make(asked.op, asked.make(*asked.arguments), asked.dtype, asked.shapes, 1, force, strict, device)


class Launch:
    """A plan for one call: `execute(*addresses)` starts it, with operands in the order that `plan.Plan.execute` says."""

    def __init__(self, asked: Asked, like: Tensor, strict: bool = False) -> None:
        self._device = device_of(like)
        force = plan.forced.get().get(asked.op, "")
        self._plan: plan.Plan = planned(asked, self._device, force, plan.strict or strict)
        self._op, self._like = asked.op, like

    def execute(self, *addresses: int) -> None:
        self._plan.start(functools.partial(self._launch, addresses))

    def _launch(self, addresses: tuple[int, ...]) -> None:
        native = self._plan.native
        workspace = self._like.new_empty(self._plan.workspace, dtype=torch.uint8)
        there = {"workspace": workspace.data_ptr(), "stream": stream(self._device)}
        if self._op.startswith("sdpa"):
            native.run_sdpa(addresses, **there)
        elif self._op.startswith("layer_norm"):
            native.run_norm(addresses, **there)
        else:
            run = native.run_conv2d if self._op.startswith("conv2d") else native.run_pool2d
            run(*addresses, **there)
