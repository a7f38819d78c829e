"""How kernels for GPUs are asked for and started: on the operands' device, on torch's current stream there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import plan

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def device(op: str, tensors: dict[str, Tensor | None]) -> int:
    """The number of the GPU that holds all operands. RuntimeError where none does, NotImplementedError for a dtype."""
    first = next(t for t in tensors.values() if t is not None)
    for name, t in tensors.items():
        if t is not None and (not t.is_cuda or t.device != first.device):
            raise RuntimeError(f"fastconv.cuda.{op}: {name} is on {t.device}, expected all operands on one CUDA device")
    if first.dtype not in DTYPES:
        raise NotImplementedError(
            f"fastconv.cuda.{op}: not implemented for {first.dtype}, expected float32, bfloat16 or float16"
        )
    return first.get_device()


def allows_tf32(product: str) -> bool:
    """Whether torch's own switches let products of float32 be rounded to tf32: of a "conv", or of a "matmul".

    `torch.backends.cudnn.allow_tf32` and `torch.backends.cuda.matmul.allow_tf32` set these two.
    """
    backends: Any = torch.backends
    switch = backends.cudnn.conv if product == "conv" else backends.cuda.matmul
    return bool(switch.fp32_precision == "tf32")


def stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@plan.cached
def planned(op: str, make: Any, arguments: tuple[Any, ...], device: int, force: str, strict: bool) -> Any:
    return plan.native().plan(op, make(*arguments), 1, force, strict, device)


def run_addresses(
    op: str, make: Any, arguments: tuple[Any, ...], device: int, like: Tensor, *addresses: int, strict: bool = False
) -> None:  # fmt: skip
    """Starts the kernel for `make(*arguments)`, with its operands in the order of the problem's Args.

    `strict` asks for a plain sum's accuracy, as `set_accuracy("strict")` does.
    """
    chosen = planned(op, make, arguments, device, plan.forced.get().get(op, ""), plan.strict or strict)
    workspace = torch.empty(chosen.workspace, dtype=torch.uint8, device=like.device)
    there = {"workspace": workspace.data_ptr(), "stream": stream(device)}
    if op.startswith("sdpa"):
        chosen.run_sdpa(addresses, **there)
    elif op.startswith("layer_norm"):
        chosen.run_norm(addresses, **there)
    else:
        run = chosen.run_conv2d if op.startswith("conv2d") else chosen.run_pool2d
        run(*addresses, **there)


def run(
    op: str, make: Any, arguments: tuple[Any, ...], device: int, like: Tensor, *operands: Tensor | None, strict: bool = False
) -> None:  # fmt: skip
    """The same on tensors, None where one is absent."""
    addresses = (0 if t is None else t.data_ptr() for t in operands)
    run_addresses(op, make, arguments, device, like, *addresses, strict=strict)
