"""Connects the compiled module's calls to torch: `_C.eager_conv2d` and its like take torch's tensors and answer the usual call in
one C function. They return None for everything else, and for every call where this torch has no DLPack exchange API (2.11 has
it, 2.9 does not); the way through Python is then the only one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad, profiler

from .. import _native, plan
from . import _dispatch

if TYPE_CHECKING:
    from .. import _C as native
else:
    native = _native.load()

# What a resolver answers: the plan, the shape and strides of the output, and what the op's backward pass wants to know.
Answer = tuple[native.Plan, plan.Shape, plan.Shape, Any]


class Needs:
    """What csrc/eager/torch.cpp asks for, by these names."""

    tensor = torch.Tensor
    parameter = torch.nn.Parameter
    watchers = _dispatch.WATCHERS
    forward_ad = vars(forward_ad)
    profiler = vars(profiler)
    grad_enabled = staticmethod(torch.is_grad_enabled)
    get_threads = staticmethod(torch.get_num_threads)
    empty_strided = staticmethod(_dispatch.empty_strided)
    is_neg = torch.Tensor.is_neg
    requires_grad = torch._C.TensorBase.__dict__["requires_grad"]
    float32, float64, int64 = torch.float32, torch.float64, torch.int64
    bfloat16, float16 = torch.bfloat16, torch.float16
    observers = plan._observers
    forced = plan.forced
    default_forced = plan._environment
    planning = vars(plan)


def connect() -> bool:
    """Whether calls on tensors may go through the compiled module from now on."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if api is None:
        return False
    native.eager_connect(Needs, api)
    return True


connected = connect()

__all__ = ["Answer", "connected", "native"]
