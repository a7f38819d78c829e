"""When an op may skip torch's dispatcher, and what is said where it may not.

A call through `torch.ops` costs three times as much as the rest of a small convolution (16 of 24 us on the machine where this was
measured), all of it in boxing arguments for a kernel written in Python. In plain eager mode the dispatcher would change nothing,
so the ops call their kernels directly there. The registered ops serve everything that has to see the call or to rewrite its
operands: torch.compile, export, tracing, fake tensors, dispatch modes, tensor subclasses, lazily negated or zero tensors.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = {torch.float32: "f32", torch.float64: "f64"}

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_modes_active = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing

_functorch_active = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled


class Way(enum.Enum):
    """How to call an op on given tensors."""

    KERNEL = 0  # the kernel itself: nothing asks for a derivative
    FUNCTION = 1  # autograd.Function, in plain eager mode
    TRANSFORM = 2  # autograd.Function under vmap, grad, jvp of torch.func
    OP = 3  # the registered op, which has the same derivatives


def plain(t: Tensor) -> bool:
    """Whether the values of `t` lie in memory of its own, as they are.

    Not so for a subclass, another device, a lazy negation, a ZeroTensor (a derivative known to vanish: sizes, but no memory), and
    for what has no address at all: sparse tensors, the wrappers of vmap, also the older one behind `is_grads_batched`.
    """
    if type(t) not in _PLAIN_TYPES or not t.is_cpu or t.is_neg():
        return False
    try:
        return t.data_ptr() != 0 or (t.numel() == 0 and not t._is_zerotensor())
    except RuntimeError:
        return False


def way(*tensors: Tensor | None) -> Way:
    """How to call an op on these tensors. Dynamo folds the first test to a constant and sees nothing of the rest."""
    if torch.compiler.is_compiling():
        return Way.OP
    if _functorch_active():
        return Way.TRANSFORM
    if _modes_active() or _tracing():
        return Way.OP
    grad = _grad_enabled()
    # Inside torch.autograd.forward_ad.dual_level, any tensor may be a dual number.
    derive = forward_ad._current_level >= 0
    for t in tensors:
        if t is not None:
            if not plain(t):
                return Way.OP
            if grad and t.requires_grad:
                derive = True
    return Way.FUNCTION if derive else Way.KERNEL


def direct(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called on these tensors without the dispatcher, below autograd."""
    if torch.compiler.is_compiling() or _functorch_active() or _modes_active() or _tracing():
        return False
    return all(t is None or plain(t) for t in tensors)


def check_operands(op: str, **tensors: Tensor | None) -> None:
    """Raises RuntimeError unless all operands are float32, or all float64, on the CPU: for calls through torch.ops."""
    first = next(t for t in tensors.values() if t is not None)
    if first.dtype not in DTYPES:
        raise NotImplementedError(f'"fastconv::{op}" not implemented for {first.dtype}, expected float32 or float64')
    for name, t in tensors.items():
        if t is not None and (t.dtype is not first.dtype or t.device != first.device):
            raise RuntimeError(f"fastconv::{op}: {name} is {t.dtype} on {t.device}, expected {first.dtype} on {first.device}")


def check_shape(op: str, name: str, got: torch.Size, expected: tuple[int, ...]) -> None:
    """Raises RuntimeError where a shape differs from the expected one."""
    if tuple(got) != expected:
        raise RuntimeError(f"fastconv::{op}: {name} has shape {list(got)}, expected {list(expected)}")
