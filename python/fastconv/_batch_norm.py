"""torch.nn.functional.batch_norm on fastconv's kernels, with an addition and an activation behind it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from ._routes import for_torch, overridden
from .ops import batch_norm as ops
from .ops._dispatch import DTYPES, plain
from .ops.conv2d import ACTIVATIONS

_OP = "batch_norm"
_dynamo = torch.compiler.is_dynamo_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_modes_active = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias for each channel: `torch.nn.functional.batch_norm`.

    `input` (N, C) or (N, C, *), the rest (C). Ioffe, Szegedy: Batch normalization, 2015. In training, mean and variance are the
    batch's, and the running ones, where given, move towards them by `momentum` (the variance divided by its count less one);
    otherwise the running ones are used. float32 and float64 on the CPU run on our kernels, contiguous and channels_last alike;
    other dtypes and devices go to torch, and so do calls inside torch.compile, transforms of torch.func and tracing, which take
    torch's operation apart. Statistics are summed in blocks, about a number near their mean, and merged in float64; a result
    depends on the batch and not on the number of threads.

    Not in torch: activation(normalised + residual) in the same pass over memory, forward and backward. `residual` has input's
    shape and dtype; `activation` is "none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh" or "sigmoid", of which the
    last three are a pass of their own.

    Raises what torch raises, and RuntimeError or ValueError where residual or activation do not fit.
    """
    call = _Call(input, running_mean, running_var, weight, bias, training, momentum, eps)
    more: dict[str, Any] = {"residual": residual, "activation": activation}
    if _dynamo():
        return _theirs(*call, **more)
    tensors = call._asdict() | {"residual": residual}
    for name in ("training", "momentum", "eps"):
        del tensors[name]
    given = tuple(t for t in tensors.values() if t is not None)
    if has_torch_function_variadic(*given):
        return overridden(batch_norm, _theirs, given, *call, **more)  # type: ignore[no-any-return]
    _check(input, residual, activation)
    if _for_kernels(call) and all(t.dtype is input.dtype for t in given):
        if not for_torch(_OP, tensors, False, _why_torch(given)):
            return _apply(call, residual, activation)
    elif isinstance(input, Tensor) and input.dtype not in DTYPES:
        for_torch(_OP, tensors, False)
    return _theirs(*call, **more)


class _Call(NamedTuple):
    """The arguments of torch's function, in its order."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float


def _check(input: Any, residual: Any, activation: str) -> None:
    if activation != "none" and activation not in ACTIVATIONS:
        raise ValueError(f"activation: got '{activation}', expected none, {', '.join(ACTIVATIONS)}")
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"{_OP}(): argument 'residual' must be Tensor, not {type(residual).__name__}")
    if residual.shape != input.shape or residual.dtype is not input.dtype:
        raise RuntimeError(
            f"{_OP}(): residual is {list(residual.shape)} of {residual.dtype}, expected that of input, {list(input.shape)} of "
            f"{input.dtype}"
        )


def _why_torch(given: tuple[Tensor, ...]) -> str:
    """Who takes operations apart here, so that they should be torch's; "" in plain eager mode on plain tensors."""
    if _functorch_active():
        return "a transform of torch.func takes it apart"
    if _modes_active() or _tracing() or torch.compiler.is_compiling():
        return "a tracer or a dispatch mode takes it apart"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    return "" if all(map(plain, given)) else "an operand has no memory of its own"


def _for_kernels(call: _Call) -> bool:
    """Whether this is a call that torch would compute too, with something in it. What is not, torch refuses in its own words."""
    x: Any = call.input
    if not isinstance(x, Tensor) or x.is_meta or x.dim() < 2 or x.numel() == 0 or x.dtype not in DTYPES:
        return False
    C = x.shape[1]
    columns: tuple[Any, ...] = call[1:5]
    for t in columns:
        if t is not None and (not isinstance(t, Tensor) or t.shape != (C,)):
            return False
    numbers: tuple[Any, ...] = call.eps, call.momentum
    if not all(isinstance(number, (int, float)) for number in numbers):
        return False
    if (call.running_mean is None) != (call.running_var is None):
        return False
    if call.training:
        return call.eps > 0 and x.numel() > C
    return call.eps >= 0 and call.running_mean is not None


def _apply(call: _Call, residual: Tensor | None, activation: str) -> Tensor:
    x, running_mean, running_var, weight, bias, training, momentum, eps = call
    fused, after = (activation, "none") if activation in ops.ACTIVATIONS else ("none", activation)
    options = bool(training), residual is not None, fused, float(eps)
    setting = ops.setting_of(x, *options)
    if setting is None:
        x = x.contiguous()
        setting = ops.setting_of(x, *options)
        assert setting is not None
    mean, variance = running_mean, running_var
    if training:
        mean, variance = x.new_empty(2, x.shape[1]).unbind()
    assert mean is not None
    assert variance is not None
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    derive = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias))
    if derive and not training:
        mean, variance = mean.clone(), variance.clone()  # a training step may move them before the backward pass
    given = ops.Operands(x, residual, weight, bias, mean.contiguous(), variance.contiguous())
    y: Tensor = ops.record(setting, *given) if derive else ops.forward(given, setting)
    if training:
        count = x.numel() // x.shape[1]
        _move(running_mean, mean, momentum, 1.0)
        _move(running_var, variance, momentum, count / (count - 1))
    return y if after == "none" else ACTIVATIONS[after](y)


def _move(running: Tensor | None, found: Tensor, momentum: float, factor: float) -> None:
    """Towards factor·found. torch's own update does not count as a write either: a graph recorded before it stays valid."""
    if running is not None:
        with torch.no_grad():
            running.data.mul_(1 - momentum).add_(found, alpha=momentum * factor)


def _theirs(*call: Any, residual: Tensor | None = None, activation: str = "none", **named: Any) -> Tensor:
    y: Tensor = F.batch_norm(*call, **named)
    y = y if residual is None else y + residual
    return y if activation == "none" else ACTIVATIONS[activation](y)
