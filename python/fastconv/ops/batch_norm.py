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


class Operands(NamedTuple):
    """Of one call; what may be absent is None."""

    x: Tensor
    residual: MaybeTensor
    weight: MaybeTensor
    bias: MaybeTensor
    mean: Tensor
    variance: Tensor


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


def forward(given: Operands, setting: Setting) -> Tensor:
    """y of x, which lies as `setting` says. In training, mean and variance (C) are written, else they are read."""
    y = torch.empty_like(given.x)
    operands = (*given._replace(residual=_like(given.residual, given.x)), y)
    _execute("batch_norm_fwd", setting, y.dtype, *map(_address, operands), 0, 0, 0, 0, 0)
    return y


class _BatchNorm(Function):
    """The setting and the operands, one after the other, to y."""

    @staticmethod
    def forward(ctx: Any, setting: Setting, *tensors: Any) -> Tensor:
        given = Operands(*tensors)
        y = forward(given, setting)
        ctx.setting = setting
        # Only an activation's slope asks for what was added.
        ctx.save_for_backward(*(given._replace(residual=None) if setting.activation == "none" else given))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        given = Operands(*ctx.saved_tensors)
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (dy, *given))
        gradients = _composed_gradients if recorded or not plain(dy) else _gradients
        return None, *gradients(dy, given, ctx.setting, ctx.needs_input_grad[1:5]), None, None


def _gradients(dy: Tensor, given: Operands, setting: Setting, wants: tuple[bool, ...]) -> list[MaybeTensor]:
    """Of x, residual, weight and bias, where they are wanted."""
    x = given.x
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
        operands = (*given._replace(residual=_like(given.residual, x)), None, dy, *out)
        _execute("batch_norm_bwd", setting, x.dtype, *map(_address, operands))
    if wants[1] and through:
        out[1] = dy
    return out


def _composed_gradients(dy: Tensor, given: Operands, setting: Setting, wants: tuple[bool, ...]) -> list[MaybeTensor]:
    """The same of torch's operations, where the gradient is differentiated itself, or batched."""
    x, residual, weight, bias, mean, variance = given
    out: list[MaybeTensor] = [None] * 4
    if setting.activation == "none" and wants[1]:
        out[1] = dy
    places = [i for i, t in enumerate(given[:4]) if wants[i] and t is not None]
    if places:
        stats: list[Any] = [None, None] if setting.training else [mean, variance]
        with torch.enable_grad():
            y = F.batch_norm(x, stats[0], stats[1], weight, bias, setting.training, 0.0, setting.eps)
            y = y if residual is None else y + residual
            y = y if setting.activation == "none" else EVERY_ACTIVATION[setting.activation](y)
        leaves = [given[i] for i in places]
        found = torch.autograd.grad(y, leaves, dy, create_graph=torch.is_grad_enabled())  # type: ignore[arg-type]
        for i, t in zip(places, found):
            out[i] = t
    return out


# The quick way past Function.apply: see ops/autograd.py.
record: Any = super(Function, _BatchNorm).apply
