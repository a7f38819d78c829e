"""When an op may skip torch's dispatcher, and what is said where it may not.

A call through `torch.ops` costs three times as much as the rest of a small convolution (16 of 24 us on the machine where this was
measured), all of it in boxing arguments for a kernel written in Python. In plain eager mode the dispatcher would change nothing,
so the ops call their kernels directly there. The registered ops serve everything that has to see the call or to rewrite its
operands: torch.compile, export, tracing, fake tensors, dispatch modes, tensor subclasses, lazily negated or zero tensors.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

DTYPES = {torch.float32: "f32", torch.float64: "f64"}
# With those that only store: their kernels compute in f32.
WITH_HALVES = {**DTYPES, torch.bfloat16: "bf16", torch.float16: "f16"}


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The precision that numbers of this dtype are computed in."""
    return dtype if dtype in DTYPES else torch.float32


def _empty_strided(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cpu")


# torch's allocation of a CPU tensor without a dispatcher call, 0.8 instead of 1.7 us, where this torch has it: the code that
# inductor generates calls it too.
empty_strided: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    torch._C._dynamo.guards, "_empty_strided_cpu", _empty_strided
)

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_modes_active = torch._C._len_torch_dispatch_stack
_dynamo = torch.compiler.is_dynamo_compiling
_function_modes_active = torch._C._len_torch_function_stack
_autocast = torch._C._is_any_autocast_enabled
_tracing = torch._C._is_tracing

_functorch_active = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled

# What somebody who wants to see or to change a call has switched on, for csrc/eager, which asks each of them.
WATCHERS = (_functorch_active, _modes_active, _function_modes_active, _autocast, _tracing)


class Way(enum.Enum):
    """How to call an op on given tensors."""

    KERNEL = 0  # the kernel itself: nothing asks for a derivative
    FUNCTION = 1  # autograd.Function, in plain eager mode
    TRANSFORM = 2  # autograd.Function that calls the registered op: under vmap, grad, jvp of torch.func
    OP = 3  # the registered op, which has the same derivatives


# By names of the module: `Way.KERNEL` is a call of a descriptor in Python 3.11, half a microsecond each time.
KERNEL, FUNCTION, TRANSFORM, OP = Way


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


def _functionalizing() -> bool:
    """Whether functorch's transforms are functionalize, and vmap at most.

    torch has no rule for an autograd.Function under functionalize; the registered op needs none. Together with grad or jvp torch
    raises, as for every Function: those levels do not look into an op, whose tangent would silently be zero.
    """
    kinds = torch._C._functorch.TransformType
    levels = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    return kinds.Functionalize in levels and all(level in (kinds.Functionalize, kinds.Vmap) for level in levels)


_rule = threading.local()


def rule_of_op(vmap: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's rule for vmap as the registered op's own: inside, ops are called, for torch refuses a Function there."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        before = getattr(_rule, "of_op", False)
        _rule.of_op = True
        try:
            return vmap(info, in_dims, *args)
        finally:
            _rule.of_op = before

    return rule


def way(*tensors: Tensor | None) -> Way:
    """How to call an op on these tensors. Dynamo folds the first test to a constant and sees nothing of the rest."""
    if torch.compiler.is_compiling():
        return OP
    if _functorch_active():
        return OP if getattr(_rule, "of_op", False) or _functionalizing() else TRANSFORM
    if _modes_active() or _tracing():
        return OP
    grad = _grad_enabled()
    # Inside torch.autograd.forward_ad.dual_level, any tensor may be a dual number.
    derive = forward_ad._current_level >= 0
    for t in tensors:
        if t is not None:
            if not plain(t):
                # No op has a rule for tangents; the Functions have.
                return TRANSFORM if forward_ad._current_level >= 0 else OP
            if grad and t.requires_grad:
                derive = True
    if profiler._is_profiler_enabled:
        # A profiler knows registered ops by name. Below this Function is the op, see `direct`.
        return TRANSFORM if derive else OP
    return FUNCTION if derive else KERNEL


def usual(x: Any, w: Any, bias: Any) -> Way | None:
    """KERNEL or FUNCTION where three arguments, as a user gave them, are plain tensors in a plain moment; None: look closely.

    The test of every common call, so `plain` is written out for each tensor: a third of its time would be spent calling it.
    """
    if (
        _dynamo()
        or _functorch_active()
        or _modes_active()
        or _function_modes_active()
        or _autocast()
        or _tracing()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
        or type(x) not in _PLAIN_TYPES
        or type(w) not in _PLAIN_TYPES
    ):
        return None
    try:
        if not (x.is_cpu and w.is_cpu and x.data_ptr() and w.data_ptr()) or x.is_neg() or w.is_neg():
            return None
        if bias is None:
            derive = _grad_enabled() and (x.requires_grad or w.requires_grad)
        elif type(bias) not in _PLAIN_TYPES or not (bias.is_cpu and bias.data_ptr()) or bias.is_neg():
            return None
        else:
            derive = _grad_enabled() and (x.requires_grad or w.requires_grad or bias.requires_grad)
    except RuntimeError:  # no address
        return None
    return FUNCTION if derive else KERNEL


def direct(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called on these tensors without the dispatcher, below autograd."""
    if torch.compiler.is_compiling() or _functorch_active() or _modes_active() or _tracing():
        return False
    if profiler._is_profiler_enabled:
        return False
    return all(t is None or plain(t) for t in tensors)


def check_operands(op: str, dtypes: Mapping[torch.dtype, str] = DTYPES, **tensors: Tensor | None) -> None:
    """Raises RuntimeError unless all operands have one dtype of `dtypes`, on the CPU: for calls through torch.ops."""
    first = next(t for t in tensors.values() if t is not None)
    if first.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise NotImplementedError(f'"fastconv::{op}" not implemented for {first.dtype}, expected {expected}')
    for name, t in tensors.items():
        if t is not None and (t.dtype is not first.dtype or t.device != first.device):
            raise RuntimeError(
                f"fastconv::{op}: {name} is {t.dtype} on {t.device}, expected {first.dtype} on {first.device}"
            )


def check_shape(op: str, name: str, got: torch.Size, expected: tuple[int, ...]) -> None:
    """Raises RuntimeError where a shape differs from the expected one."""
    if tuple(got) != expected:
        raise RuntimeError(f"fastconv::{op}: {name} has shape {list(got)}, expected {list(expected)}")
