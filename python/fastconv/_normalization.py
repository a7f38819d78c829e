"""torch.nn.functional.layer_norm on fastconv's kernels, with an addition before it."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from ._arguments import describe, ints, tensor
from ._routes import autocast_up, for_torch, overridden
from .ops import layer_norm as ops
from .ops._dispatch import DTYPES, KERNEL, usual
from .ops._eager import native
from .ops._recorded_norm import record
from .ops.pool2d import chosen

_OP = "layer_norm"
_dynamo = torch.compiler.is_dynamo_compiling
_eager_layer_norm = native.eager_layer_norm


@overload
def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
) -> Tensor: ...


@overload
def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimensions: `torch.nn.functional.layer_norm`.

    `input` (..., *normalized_shape); weight and bias have the normalized shape. Ba, Kiros, Hinton: Layer normalization, 2016. The
    variance is that of the numbers themselves (divided by their count). float32 and float64 on the CPU run on our kernels, other
    dtypes and devices go to torch. A row's bits depend on that row alone.

    Not in torch: with `residual`, of input's shape and dtype, x = input + residual, and (normalised, x) is returned: the addition
    and the norm of a Transformer's block in one pass over memory. Both are differentiable.

    Raises RuntimeError where shapes, dtypes or devices do not fit, TypeError where an argument is of the wrong kind.
    """
    if not _dynamo():
        y = _eager_layer_norm(input, normalized_shape, weight, bias, eps, residual)
        if y is not None:
            return y  # type: ignore[no-any-return]
    if type(normalized_shape) is tuple and type(eps) is float and not _dynamo():
        quick = _usual(input, normalized_shape, weight, bias, residual, eps)
        if quick is not None:
            return quick
    given = tuple(t for t in (input, weight, bias, residual) if t is not None)
    if has_torch_function_variadic(*given):
        return overridden(layer_norm, _theirs, given, input, normalized_shape, weight, bias, eps, residual=residual)  # type: ignore[no-any-return]
    tensor(_OP, "input", input)
    tensors = {"input": input, "weight": weight, "bias": bias, "residual": residual}
    for name, t in tensors.items():
        if t is not None:
            tensor(_OP, name, t)
    shape = ints(_OP, "normalized_shape", normalized_shape)
    if not isinstance(normalized_shape, (tuple, list)):
        raise TypeError(
            f"{_OP}(): argument 'normalized_shape' (position 2) must be tuple of ints, not {describe(normalized_shape)}"
        )
    check_shapes(input, shape, weight, bias, residual)
    if for_torch(_OP, tensors, False):
        return _theirs(input, shape, weight, bias, eps, residual=residual)  # type: ignore[no-any-return]
    input, weight, bias, residual = autocast_up(input, weight, bias, residual)
    check_dtypes(input, weight, bias, residual)
    return _apply(input, shape, weight, bias, float(eps), residual)


def _usual(
    input: Any, shape: tuple[int, ...], weight: Any, bias: Any, residual: Any, eps: float
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The result of a valid call on plain tensors in a plain moment, None where `layer_norm` has to look closely.

    The checks and the operators that the other way takes are five times the work of a small layer (60 of 85 us there).
    """
    how = usual(input, input if weight is None else weight, bias)
    if residual is not None and how is not None:
        beside = usual(input, residual, None)
        how = how if beside is KERNEL else beside
    if how is None or input.shape[-len(shape) :] != shape or not shape:
        return None
    dtype, affine = input.dtype, (weight, bias)
    if dtype not in DTYPES or any(t is not None and (t.shape != shape or t.dtype is not dtype) for t in affine):
        return None
    if residual is not None and (residual.shape != input.shape or residual.dtype is not dtype):
        return None
    found = ops.recipe(input.shape, len(shape), dtype, eps, *chosen("layer_norm_fwd"))
    if found is None:
        return None
    if how is not KERNEL:
        return record(input, residual, weight, bias, found)  # type: ignore[no-any-return]
    y, total = ops.follow(found, input, residual, weight, bias)
    return y if total is None else (y, total)


def _apply(
    input: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """On checked arguments, with derivatives."""
    C = math.prod(shape)
    matrix = (math.prod(input.shape[: input.dim() - len(shape)]), C)
    y, total, *_ = ops.layer_norm(
        input.reshape(matrix),
        None if residual is None else residual.reshape(matrix),
        None if weight is None else weight.reshape(C),
        None if bias is None else bias.reshape(C),
        eps,
    )
    if residual is None:
        return y.view(input.shape)
    return y.view(input.shape), total.view(input.shape)


def _theirs(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Any:
    if residual is None:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    total = input + residual
    return F.layer_norm(total, normalized_shape, weight, bias, eps), total


def check_shapes(
    input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> None:
    listed = list(shape)
    if not shape:
        raise RuntimeError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, but got "
            "normalized_shape = []"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and tuple(t.shape) != shape:
            raise RuntimeError(
                f"Expected {name} to be of same shape as normalized_shape, but got {name} of shape {list(t.shape)} and "
                f"normalized_shape = {listed}"
            )
    if tuple(input.shape[max(input.dim() - len(shape), 0) :]) != shape:
        expected = ", ".join(["*", *map(str, shape)])
        raise RuntimeError(
            f"Given normalized_shape={listed}, expected input with shape [{expected}], but got input of size{list(input.shape)}"
        )
    if residual is not None and residual.shape != input.shape:
        raise RuntimeError(
            f"{_OP}(): residual has shape {list(residual.shape)}, expected that of input, {list(input.shape)}"
        )


def check_dtypes(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        if t is not None and t.dtype is not input.dtype:
            raise RuntimeError(f"mixed dtype (CPU): {_OP}() got input of {input.dtype} and {name} of {t.dtype}")
