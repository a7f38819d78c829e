"""How the pooling ops are called: the kernel, an autograd.Function around it, or the registered op, whichever is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ._dispatch import FUNCTION, KERNEL, TRANSFORM, direct, rule_of_op, way


def call(
    function: type[Function],
    kernel: Callable[..., Any],
    op: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    *options: Any,
) -> Any:
    """`kernel(*tensors, *options)` with the derivatives that `function` gives it, where somebody wants them."""
    how = way(*tensors)
    if how is KERNEL:
        return kernel(*tensors, *options)
    if how is FUNCTION:
        # Function.apply binds default arguments through inspect.signature, which costs 60 us; no forward here has any. Below it
        # is the same C function.
        return super(Function, function).apply(*tensors, *options)  # type: ignore[misc]
    if how is TRANSFORM or _dual():
        return function.apply(*tensors, *options)
    return op(*tensors, *options)


def run(kernel: Callable[..., Any], op: Callable[..., Any], tensors: tuple[Tensor, ...], *options: Any) -> Any:
    """The forward of such a function: the kernel itself, or the op where torch has to see the call."""
    return (kernel if direct(*tensors) else op)(*tensors, *options)


def derive(op: str, function: type[Function], vmap: Callable[..., Any], library: torch.library.Library) -> None:
    """Registers a function's derivative and a vmap rule for the op itself, for compilers: they trace no Function with a jvp."""
    name = f"fastconv::{op}"
    torch.library.register_autograd(name, function.backward, setup_context=function.setup_context, lib=library)
    torch.library.register_vmap(name, rule_of_op(vmap), lib=library)


def _dual() -> bool:
    """Whether tensors may carry forward-mode tangents, which an op passes on by no rule. Compilers never see any."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0
