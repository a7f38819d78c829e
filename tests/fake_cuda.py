"""CUDA tensors without a GPU: their numbers lie in the CPU's memory, and the emulated kernels compute on them.

A tensor says that it is on `cuda:0` to whoever asks in Python, so that a call goes the way of a GPU's tensor: routes, autocast,
autograd, vmap, the registered op. fastconv's ops then call what is registered for CUDA, on CPU tensors that hold the numbers, and
every other operation is the CPU's. To torch's own C++ it is a CPU tensor, since autograd in a torch without CUDA ends the process
over any other. So what is not shown is torch's CUDA: its streams, its allocator, its dispatcher's last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastconv import _gpu, _routes, plan
from fastconv.ops import _cuda, _cuda_launch
from fastconv.testing.emulator import Emulator


class FakeCuda(Tensor):
    """A tensor on `cuda:0` whose numbers are those of the CPU tensor `held`."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> FakeCuda:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    device = property(lambda self: torch.device("cuda:0"))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FakeCuda({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = func.namespace == "fastconv"
        call = _cuda.IMPLEMENTATIONS[func._schema.name.removeprefix("fastconv::")] if ours else func
        changed = {id(t.held): t for t in args if isinstance(t, FakeCuda)}
        args, kwargs = tree_map(_unwrap, (args, kwargs or {}))
        # An operation in place answers with the tensor that it was given.
        return tree_map(lambda t: changed.get(id(t)) if id(t) in changed else _wrap(t), call(*args, **kwargs))


def _unwrap(value: Any) -> Any:
    return value.held if isinstance(value, FakeCuda) else value


def _wrap(value: Any) -> Any:
    return FakeCuda(value) if isinstance(value, Tensor) else value


def to_fake(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its parameters and buffers there."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(FakeCuda(p.detach()), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = FakeCuda(b)
    return module


# What makes tensors on a device.
_FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros")


def _factory(made_on_cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        there = device is not None and torch.device(device).type == "cuda" and torch._C._len_torch_dispatch_stack() == 0
        made = made_on_cpu(*args, device="cpu" if there else device, **kwargs)
        return FakeCuda(made) if there else made

    return make


@contextmanager
def device(library: Emulator) -> Iterator[None]:
    """While the block runs there is such a device, and its kernels are the library's."""
    own_memory = _routes._own_memory
    with (
        mock.patch.object(plan, "_C", library),
        mock.patch.object(_cuda_launch, "device_of", return_value=0),
        mock.patch.object(_cuda_launch, "stream", return_value=0),
        mock.patch.object(_gpu, "_why_not", return_value=""),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.multiple(torch, **{name: _factory(getattr(torch, name)) for name in _FACTORIES}),
        mock.patch.object(_routes, "_own_memory", lambda t: isinstance(t, FakeCuda) or own_memory(t)),
    ):
        _cuda_launch.planned.cache_clear()
        try:
            yield
        finally:
            _cuda_launch.planned.cache_clear()
