"""BatchNorm in eval mode as part of the convolution before it: y = gamma·(conv(x) - mean)/sqrt(var + eps) + beta is one again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What the kernels' epilogue can do, as modules.
ACTIVATION_LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "relu": torch.nn.ReLU,
    "relu6": torch.nn.ReLU6,
    "silu": torch.nn.SiLU,
    "hardswish": torch.nn.Hardswish,
    "gelu": torch.nn.GELU,
    "gelu_tanh": partial(torch.nn.GELU, approximate="tanh"),
    "sigmoid": torch.nn.Sigmoid,
}

# By what torch calls the form of gelu.
# torch.nn.BatchNorm2d, and the same on our kernels: subclasses of somebody else's may do anything.
_PLAIN = ("torch.nn.modules.batchnorm", "fastconv.nn")
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}

# As functions, and as methods by their names.
_ACTIVATION_CALLS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
}


def activation_of(module: torch.nn.Module) -> str | None:
    """The epilogue's name for an activation layer; None where it has none."""
    if type(module) is torch.nn.GELU:
        return _GELUS.get(module.approximate)
    return next((name for name, kind in ACTIVATION_LAYERS.items() if type(module) is kind), None)


def activation_called(target: Any, options: Mapping[str, Any]) -> str | None:
    """The same for a function, or a method's name, called with these keywords."""
    options = {key: value for key, value in options.items() if key != "inplace"}
    if target is F.gelu and options.keys() == {"approximate"}:
        return _GELUS.get(options["approximate"])
    return None if options else _ACTIVATION_CALLS.get(target)


def activation_name(activation: Any) -> str | None:
    """The same for what a Transformer layer calls its activation, a module or a function; None where it has none."""
    if isinstance(activation, torch.nn.Module):
        return activation_of(activation)
    return activation_called(activation, {})


def why_not_folded(norm: torch.nn.Module) -> str:
    """Why this layer is no factor and summand of each channel; "" where it is."""
    if not isinstance(norm, torch.nn.BatchNorm2d) or type(norm).__module__ not in _PLAIN:
        return f"it is {type(norm).__name__}, which cannot be folded"
    if norm.training:
        return "it is in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no statistics"
    return ""


def fold(weight: Tensor, bias: Tensor | None, norm: torch.nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight (K, C/groups, R, S) and bias (K) of the convolution that is the given one and then `norm`.

    The factors are computed in float64, so that each weight is rounded once on the way. Differentiable.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight.double() * scale
    shift = ((0.0 if bias is None else bias.double()) - mean.double()) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return weight * scale.to(weight.dtype)[:, None, None, None], shift.to(weight.dtype)
