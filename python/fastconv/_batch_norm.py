"""torch.nn.functional.batch_norm on fastconv's kernels, with an addition and an activation behind it."""

from __future__ import annotations

import math
from typing import Any

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
    if _dynamo():
        return _theirs(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            activation=activation,
        )
    tensors = {
        "input": input,
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
        "residual": residual,
    }
    given = tuple(t for t in tensors.values() if t is not None)
    args = input, running_mean, running_var, weight, bias, training, momentum, eps
    if has_torch_function_variadic(*given):
        more: dict[str, Any] = {"residual": residual, "activation": activation}
        return overridden(batch_norm, _theirs, given, *args, **more)  # type: ignore[no-any-return]
    _check(input, residual, activation)
    if _for_kernels(*args) and all(t.dtype is input.dtype for t in given):
        if not for_torch(_OP, tensors, False, _why_torch(given)):
            return _apply(*args, residual, activation)
    elif isinstance(input, Tensor) and input.dtype not in DTYPES:
        for_torch(_OP, tensors, False)
    return _theirs(*args, residual=residual, activation=activation)


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


def _for_kernels(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: Any,
    momentum: Any,
    eps: Any,
) -> bool:
    """Whether this is a call that torch would compute too, with something in it. What is not, torch refuses in its own words."""
    if not isinstance(input, Tensor) or input.dim() < 2 or input.numel() == 0 or input.dtype not in DTYPES:
        return False
    if input.is_meta:
        return False
    C = input.shape[1]
    for t in (running_mean, running_var, weight, bias):
        if t is not None and (not isinstance(t, Tensor) or t.shape != (C,)):
            return False
    if (running_mean is None) != (running_var is None) or not isinstance(eps, float) or not isinstance(momentum, float):
        return False
    if training:
        return eps > 0 and input.numel() > C
    return eps >= 0 and running_mean is not None


def _apply(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    fused, after = (activation, "none") if activation in ops.ACTIVATIONS else ("none", activation)
    x = input
    setting = ops.setting_of(x, training, residual is not None, fused, eps)
    if setting is None:
        x = x.contiguous()
        setting = ops.setting_of(x, training, residual is not None, fused, eps)
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
    operands = x, residual, weight, bias, mean.contiguous(), variance.contiguous(), setting
    y: Tensor = (ops.record if derive else ops.forward)(*operands)
    if training and running_mean is not None and running_var is not None:
        count = math.prod(x.shape) // x.shape[1]
        # torch's own update does not count as a write either: a graph that was recorded before it stays valid.
        with torch.no_grad():
            running_mean.data.mul_(1 - momentum).add_(mean, alpha=momentum)
            running_var.data.mul_(1 - momentum).add_(variance, alpha=momentum * count / (count - 1))
    return y if after == "none" else ACTIVATIONS[after](y)


def _theirs(
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
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return y if activation == "none" else ACTIVATIONS[activation](y)
