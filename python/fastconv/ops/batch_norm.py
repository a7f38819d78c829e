"""Batch normalisation with an addition and an activation behind it, in plain eager mode: its kernels and their derivatives.

Nothing here is a registered op: compilers, transforms of torch.func and tracers see torch's own batch_norm, which they can take
apart and fuse with what surrounds it (`fastconv._batch_norm`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, profiler

from .. import plan
from ._dispatch import DTYPES, plain
from .conv2d import ACTIVATIONS as EVERY_ACTIVATION
from .pool2d import chosen

MaybeTensor = Tensor | None

# Those that the kernels know the slope of.
ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish")


class Setting(NamedTuple):
    """What does not change from call to call: (N, C, P) as the kernels see it, and the options."""

    shape: tuple[int, int, int]
    channels_last: bool
    training: bool
    residual: bool
    activation: str
    eps: float


@plan.cached
def find_plan(op: str, setting: Setting, dtype: torch.dtype, threads: int, force: str, strict: bool) -> plan.Plan:
    problem = plan.batch_norm_problem(DTYPES[dtype], *setting)
    return plan.make(op, problem, DTYPES[dtype], (setting.shape,), threads, force, strict)


def setting_of(x: Tensor, training: bool, residual: bool, activation: str, eps: float) -> Setting | None:
    """How kernels see x (N, C, *), None where it lies in neither of the two layouts."""
    N, C = x.shape[:2]
    P = math.prod(x.shape[2:])
    if x.movedim(1, -1).is_contiguous():
        last = True
    elif x.is_contiguous():
        last = False
    else:
        return None
    return Setting((N, C, P), last, training, residual, activation, eps)


def _address(t: MaybeTensor) -> int:
    return 0 if t is None else t.data_ptr()


def _like(t: MaybeTensor, x: Tensor) -> MaybeTensor:
    """t in x's order in memory."""
    if t is None or t.stride() == x.stride():
        return t
    return torch.empty_like(x).copy_(t)


def _execute(op: str, setting: Setting, dtype: torch.dtype, *addresses: int) -> None:
    made = find_plan(op, setting, dtype, *chosen(op))
    if profiler._is_profiler_enabled:
        with profiler.record_function(f"fastconv::{op}"):
            made.execute(*addresses)
    else:
        made.execute(*addresses)


def forward(
    x: Tensor,
    residual: MaybeTensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    mean: Tensor,
    variance: Tensor,
    setting: Setting,
) -> Tensor:
    """y of x, which lies as `setting` says. In training, mean and variance (C) are written, else they are read."""
    y = torch.empty_like(x)
    operands = (x, _like(residual, x), weight, bias, mean, variance, y)
    _execute("batch_norm_fwd", setting, x.dtype, *map(_address, operands), 0, 0, 0, 0, 0)
    return y


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: MaybeTensor,
        weight: MaybeTensor,
        bias: MaybeTensor,
        mean: Tensor,
        variance: Tensor,
        setting: Setting,
    ) -> Tensor:
        y = forward(x, residual, weight, bias, mean, variance, setting)
        ctx.setting = setting
        ctx.residual_strides = None if residual is None else residual.stride()
        ctx.save_for_backward(x, None if setting.activation == "none" else residual, weight, bias, mean, variance)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, residual, weight, bias, mean, variance = ctx.saved_tensors
        setting, wants = ctx.setting, ctx.needs_input_grad[:4]
        recorded = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (dy, x, residual, weight, bias)
        )
        if recorded or not plain(dy):
            return *_composed_gradients(dy, x, residual, weight, bias, mean, variance, setting, wants), None, None, None
        return *_gradients(dy, x, residual, weight, bias, mean, variance, setting, wants), None, None, None


def _gradients(
    dy: Tensor,
    x: Tensor,
    residual: MaybeTensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    mean: Tensor,
    variance: Tensor,
    setting: Setting,
    wants: tuple[bool, ...],
) -> list[MaybeTensor]:
    """Of x, residual, weight and bias, where they are wanted."""
    dy = _like(dy, x)  # type: ignore[assignment]
    # Without an activation, the gradient of what is added is dy itself.
    through = setting.activation == "none"
    out = [
        torch.empty_like(x) if wants[0] else None,
        torch.empty_like(x) if wants[1] and not through else None,
        x.new_empty(setting.shape[1]) if wants[2] else None,
        x.new_empty(setting.shape[1]) if wants[3] else None,
    ]
    if any(t is not None for t in out):
        operands = (x, _like(residual, x), weight, bias, mean, variance, None, dy, *out)
        _execute("batch_norm_bwd", setting, x.dtype, *map(_address, operands))
    if wants[1] and through:
        out[1] = dy
    return out


def _composed_gradients(
    dy: Tensor,
    x: Tensor,
    residual: MaybeTensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    mean: Tensor,
    variance: Tensor,
    setting: Setting,
    wants: tuple[bool, ...],
) -> list[MaybeTensor]:
    """The same of torch's operations, where the gradient is differentiated itself, or batched."""
    inputs: list[MaybeTensor] = [x, residual, weight, bias]
    out: list[MaybeTensor] = [None] * 4
    if setting.activation == "none" and wants[1]:
        out[1] = dy
    chosen_ones = [i for i, t in enumerate(inputs) if wants[i] and t is not None]
    if chosen_ones:
        with torch.enable_grad():
            given = not setting.training
            y = F.batch_norm(
                x, mean if given else None, variance if given else None, weight, bias, not given, 0.0, setting.eps
            )
            y = y if residual is None else y + residual
            y = y if setting.activation == "none" else EVERY_ACTIVATION[setting.activation](y)
        leaves = [inputs[i] for i in chosen_ones]
        found = torch.autograd.grad(y, leaves, dy, create_graph=torch.is_grad_enabled())  # type: ignore[arg-type]
        for i, t in zip(chosen_ones, found):
            out[i] = t
    return out


# The quick way past Function.apply: see ops/autograd.py.
record: Any = super(Function, _BatchNorm).apply
