"""The kernels for GPUs, on CUDA tensors: convolution, linear, pooling, attention and layer norm, with their gradients.

They are proven by emulation (docs/cuda.md) and have not run on a GPU yet. Until they are measured there, `fastconv.functional`
leaves CUDA tensors to torch unless `fastconv.set_cuda(True)` was called, and here is where to call them in either case: the same
functions, with derivatives of every order, but torch answers none of the calls. float32, bfloat16 and float16, sums always in
float32. Work is started on torch's current stream of the tensors' device and memory comes from torch's allocator, so nothing
synchronises. float32 is rounded to tf32 where torch's own `torch.backends.cudnn.allow_tf32` (or `.conv.fp32_precision`), for
`linear` `torch.backends.cuda.matmul.allow_tf32`, lets it, and never under `set_accuracy("strict")`.

Every function raises what its namesake in `fastconv.functional` raises, RuntimeError where the operands are not on one CUDA
device, NotImplementedError, with reasons, where no kernel takes the call. For torch.compile use `fastconv.set_cuda`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from . import _gpu, functional

__all__ = [
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d",
    "layer_norm", "linear", "max_pool2d", "scaled_dot_product_attention",
]  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])


def _on_gpu(call: F) -> F:
    """`call` on CUDA tensors, by our kernels or not at all."""
    op, names = call.__name__, tuple(inspect.signature(call).parameters)

    @functools.wraps(call)
    def ours(*args: Any, **kwargs: Any) -> Any:
        first = None
        for name, t in (*zip(names, args), *kwargs.items()):
            if isinstance(t, Tensor):
                first = t if first is None else first
                if not t.is_cuda or t.device != first.device:
                    raise RuntimeError(
                        f"fastconv.cuda.{op}: {name} is on {t.device}, expected all operands on one CUDA device"
                    )
        with _gpu.only():
            return call(*args, **kwargs)

    ours.__module__ = __name__
    return ours  # type: ignore[return-value]


adaptive_avg_pool2d = _on_gpu(functional.adaptive_avg_pool2d)
adaptive_max_pool2d = _on_gpu(functional.adaptive_max_pool2d)
avg_pool2d = _on_gpu(functional.avg_pool2d)
conv1d = _on_gpu(functional.conv1d)
conv2d = _on_gpu(functional.conv2d)
conv_transpose1d = _on_gpu(functional.conv_transpose1d)
conv_transpose2d = _on_gpu(functional.conv_transpose2d)
layer_norm = _on_gpu(functional.layer_norm)
linear = _on_gpu(functional.linear)
max_pool2d = _on_gpu(functional.max_pool2d)
scaled_dot_product_attention = _on_gpu(functional.scaled_dot_product_attention)
