"""Layer normalisation of rows, with an addition before it: schemas, kernels, fakes, derivatives.

    layer_norm_fwd   y, sum (N, C), mean, rstd (N)  of x, residual (N, C), weight, bias (C)
    layer_norm_bwd   dx (N, C), dweight, dbias (C)  from the gradients of y and sum

sum = x + residual is what is normalised; without a residual it has no rows, and of the gradients what is not wanted is empty.
First derivatives run on kernels. Second ones and forward mode are composed of torch's operations.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from .. import plan
from ._conv2d_kernels import TAGS, library
from ._dispatch import DTYPES, check_operands, check_shape, computed_in, empty_strided
from .autograd import call, derive, run
from .linear import contiguous_strides

Context: TypeAlias = Any
MaybeTensor: TypeAlias = Tensor | None


# ---- Kernels: on plain CPU tensors, arguments already checked ---------------------------------------------------------------


@plan.cached
def find_plan(
    op: str, shape: tuple[int, int], dtype: torch.dtype, eps: float, threads: int, force: str, strict: bool
) -> plan.Plan | None:
    if 0 in shape:
        return None
    problem = plan.norm_problem(DTYPES[dtype], shape, eps)
    return plan.make(op, problem, DTYPES[dtype], (shape,), threads, force, strict)


def _find(op: str, x: Tensor, eps: float) -> plan.Plan | None:
    N, C = x.shape
    made: plan.Plan | None = find_plan(
        op, (N, C), x.dtype, eps, torch.get_num_threads(), plan.forced.get().get(op, ""), plan.strict
    )
    return made


def address(t: MaybeTensor) -> int:
    return 0 if t is None else t.data_ptr()


def contiguous(*tensors: MaybeTensor) -> list[MaybeTensor]:
    return [None if t is None else t.contiguous() for t in tensors]


def _fwd(x: Tensor, residual: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor, eps: float) -> tuple[Tensor, ...]:
    x = x.contiguous()
    residual, weight, bias = contiguous(residual, weight, bias)
    y, mean, rstd = torch.empty_like(x), x.new_empty(x.shape[0]), x.new_empty(x.shape[0])
    total = x.new_empty((0, x.shape[1])) if residual is None else torch.empty_like(x)
    made = _find("layer_norm_fwd", x, eps)
    if made is not None:
        inputs = x.data_ptr(), address(residual), address(weight), address(bias)
        made.execute(*inputs, total.data_ptr(), y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), 0, 0, 0, 0, 0)
    return y, total, mean, rstd


def _bwd(
    dy: Tensor,
    dsum: MaybeTensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: MaybeTensor,
    eps: float,
    dx_wanted: bool,
    dweight_wanted: bool,
    dbias_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, mean, rstd = dy.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous()
    dsum, weight = contiguous(dsum, weight)
    dx = torch.empty_like(x) if dx_wanted else x.new_empty((0, x.shape[1]))
    dweight, dbias = (x.new_empty(x.shape[1] if wanted else 0) for wanted in (dweight_wanted, dbias_wanted))
    made = _find("layer_norm_bwd", x, eps)
    if made is None:
        return dx, dweight.zero_(), dbias.zero_()
    wanted = [t.data_ptr() if w else 0 for t, w in ((dx, dx_wanted), (dweight, dweight_wanted), (dbias, dbias_wanted))]
    made.execute(
        x.data_ptr(), 0, address(weight), 0, 0, 0, mean.data_ptr(), rstd.data_ptr(), dy.data_ptr(), address(dsum), *wanted
    )  # fmt: skip
    return dx, dweight, dbias


class Recipe(NamedTuple):
    """What a call on plain tensors does, worked out once for its shape and options."""

    plan: plan.Plan
    y_shape: plan.Shape
    y_strides: plan.Shape
    matrix: tuple[int, int]  # rows, and the numbers of each
    columns: plan.Shape  # of weight and bias
    eps: float


@plan.cached
def recipe(
    shape: plan.Shape, dims: int, dtype: torch.dtype, eps: float, threads: int, force: str, strict: bool
) -> Recipe | None:
    """For an input of this shape that is normalised over its last ``dims`` dimensions; None where there is nothing to compute."""
    cut = len(shape) - dims
    matrix = math.prod(shape[:cut]), math.prod(shape[cut:])
    made = find_plan("layer_norm_fwd", matrix, dtype, eps, threads, force, strict)
    if made is None:
        return None
    return Recipe(made, tuple(shape), contiguous_strides(shape), matrix, tuple(shape[cut:]), eps)


def follow(
    found: Recipe, x: Tensor, residual: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor
) -> tuple[Tensor, MaybeTensor]:
    """y, and the sum where there is a residual."""
    made, shape, strides, *_ = found
    x = x.contiguous()
    residual, weight, bias = contiguous(residual, weight, bias)
    y: Tensor = empty_strided(shape, strides, x.dtype)
    total = None if residual is None else empty_strided(shape, strides, x.dtype)
    inputs = x.data_ptr(), address(residual), address(weight), address(bias)
    made.execute(*inputs, address(total), y.data_ptr(), 0, 0, 0, 0, 0, 0, 0)
    return y, total


# ---- Registration ---------------------------------------------------------------------------------------------------------

library.define(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
library.define(
    "layer_norm_bwd(Tensor dy, Tensor? dsum, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, float eps, bool dx, "
    "bool dweight, bool dbias) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


def check(
    op: str,
    x: Tensor,
    rows: dict[str, MaybeTensor],
    columns: dict[str, MaybeTensor],
    statistics: Mapping[str, Tensor] = types.MappingProxyType({}),
    dtypes: Mapping[torch.dtype, str] = DTYPES,
) -> None:
    """Raises RuntimeError unless the operands make one normalisation: the registered ops are open to anybody.

    Statistics are of the precision that is computed in.
    """
    if x.dim() != 2:
        raise RuntimeError(f"fastconv::{op}: x has {x.dim()} dimensions, expected 2")
    check_operands(op, dtypes, x=x, **rows, **columns)
    for name, t in rows.items():
        if t is not None:
            check_shape(op, name, t.shape, tuple(x.shape))
    for name, t in columns.items():
        if t is not None:
            check_shape(op, name, t.shape, (x.shape[1],))
    for name, t in statistics.items():
        check_operands(op, {computed_in(x.dtype): ""}, **{name: t})
        check_shape(op, name, t.shape, (x.shape[0],))


def _fwd_impl(
    x: Tensor, residual: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor, eps: float
) -> tuple[Tensor, ...]:
    check("layer_norm_fwd", x, {"residual": residual}, {"weight": weight, "bias": bias})
    return _fwd(x, residual, weight, bias, eps)


def _bwd_impl(
    dy: Tensor, dsum: MaybeTensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: MaybeTensor, *rest: Any
) -> Any:
    check("layer_norm_bwd", x, {"dy": dy, "dsum": dsum}, {"weight": weight}, {"mean": mean, "rstd": rstd})
    return _bwd(dy, dsum, x, mean, rstd, weight, *rest)


def _fwd_fake(x: Tensor, residual: MaybeTensor, *_: Any) -> tuple[Tensor, ...]:
    rows = x.new_empty(x.shape)
    total = x.new_empty((0, x.shape[1])) if residual is None else x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[0], dtype=computed_in(x.dtype)) for _ in range(2))
    return rows, total, mean, rstd


def _bwd_fake(dy: Tensor, dsum: MaybeTensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dx, dweight, dbias = rest[-3:]
    C = x.shape[1]
    return x.new_empty(x.shape if dx else (0, C)), x.new_empty(C if dweight else 0), x.new_empty(C if dbias else 0)


library.impl("layer_norm_fwd", _fwd_impl, "CPU")
library.impl("layer_norm_bwd", _bwd_impl, "CPU")
torch.library.register_fake("fastconv::layer_norm_fwd", _fwd_fake, lib=library)
torch.library.register_fake("fastconv::layer_norm_bwd", _bwd_fake, lib=library)
_ops = torch.ops.fastconv


# ---- Composed of torch's operations -----------------------------------------------------------------------------------------


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rows at mean 0 and variance 1, and what they were divided by, inverted (N, 1)."""
    distance = x - x.mean(1, keepdim=True)
    rstd = (distance.square().mean(1, keepdim=True) + eps).rsqrt()
    return distance * rstd, rstd


def _project(v: Tensor, h: Tensor) -> Tensor:
    """v without the parts that a normalisation takes away: its mean and what lies along h."""
    return v - v.mean(1, keepdim=True) - h * (v * h).mean(1, keepdim=True)


def _gradients(
    dy: Tensor, dsum: MaybeTensor, x: Tensor, weight: MaybeTensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    stored, computed = x.dtype, computed_in(x.dtype)
    dy, x = dy.to(computed), x.to(computed)
    h, rstd = _normalised(x, eps)
    dx = rstd * _project(dy if weight is None else dy * weight, h)
    dx = dx if dsum is None else dx + dsum
    return dx.to(stored), (dy * h).sum(0).to(stored), dy.sum(0).to(stored)


# ---- Derivatives ----------------------------------------------------------------------------------------------------------


def _front(info: Any, t: MaybeTensor, dim: int | None) -> Any:
    """vmap: with the mapped dimension first; a shared tensor is expanded."""
    if t is None:
        return None
    return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def _merge(t: MaybeTensor) -> Any:
    return None if t is None else t.flatten(0, 1)


def _split(info: Any, t: Tensor) -> Tensor:
    parts: Tensor = t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size))
    return parts


class _LayerNorm(Function):
    @staticmethod
    def forward(x: Tensor, residual: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor, eps: float) -> Any:
        return run(_fwd, _ops.layer_norm_fwd, (x, residual, weight, bias), eps)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, _, ctx.eps = inputs
        _, total, mean, rstd = output
        ctx.residual = residual is not None
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(total if ctx.residual else x, mean, rstd, weight)
        ctx.save_for_forward(total if ctx.residual else x, mean, rstd, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Context, dy: MaybeTensor, dsum: MaybeTensor, *_: Any) -> Any:
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        if not ctx.residual:
            dsum = None
        if dy is None:
            return dsum if need_x else None, dsum if need_residual else None, None, None, None
        x, mean, rstd, weight = ctx.saved_tensors
        wants = need_x or need_residual, need_weight, need_bias
        dx, dweight, dbias = backward(dy, dsum if wants[0] else None, x, mean, rstd, weight, ctx.eps, *wants)
        return (
            dx if need_x else None,
            dx if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Context, tx: MaybeTensor, tr: MaybeTensor, tw: MaybeTensor, tb: MaybeTensor, _: None) -> Any:
        x, *_, weight = ctx.saved_tensors
        h, rstd = _normalised(x, ctx.eps)
        moved = tx if tr is None else tr if tx is None else tx + tr
        ty = torch.zeros_like(h) if moved is None else rstd * _project(moved, h)
        ty = ty if weight is None else ty * weight
        ty = ty if tw is None else ty + h * tw
        ty = ty if tb is None else ty + tb
        tsum = (torch.zeros_like(h) if moved is None else moved) if ctx.residual else x.new_zeros((0, x.shape[1]))
        return ty, tsum, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        x, residual = (_front(info, t, dim) for t, dim in zip(inputs[:2], in_dims))
        weight, bias = inputs[2:4]
        rows = (_merge(x), _merge(residual))
        if in_dims[2] is None and in_dims[3] is None:
            y, total, mean, rstd = layer_norm(*rows, weight, bias, inputs[4])
            y = _split(info, y)
        else:
            y, total, mean, rstd = layer_norm(*rows, None, None, inputs[4])
            y = _split(info, y)
            y = y if weight is None else y * _front(info, weight, in_dims[2])[:, None]
            y = y if bias is None else y + _front(info, bias, in_dims[3])[:, None]
        total, kept = (total, None) if residual is None else (_split(info, total), 0)
        return (y, total, _split(info, mean), _split(info, rstd)), (0, kept, 0, 0)


class _LayerNormBackward(Function):
    @staticmethod
    def forward(
        dy: Tensor, dsum: MaybeTensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: MaybeTensor, *rest: Any
    ) -> Any:
        return run(_bwd, _ops.layer_norm_bwd, (dy, dsum, x, mean, rstd, weight), *rest)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
        dy, dsum, x, _, _, weight, ctx.eps, *ctx.wants = inputs
        ctx.save_for_backward(dy, dsum, x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Context, *g: MaybeTensor) -> Any:
        # mean and rstd are functions of x: what flows through them is part of what flows through x.
        saved, eps = ctx.saved_tensors, ctx.eps
        places = [i for i, t in enumerate(saved) if t is not None]
        chosen = [i for i, t in enumerate(g) if t is not None and ctx.wants[i]]

        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            operands: list[Any] = [None] * 4
            for i, t in zip(places, tensors):
                operands[i] = t
            dy, dsum, x, weight = operands
            found = _gradients(dy, dsum, x, weight, eps)
            return tuple(found[i] for i in chosen)

        second: list[MaybeTensor] = [None] * 4
        if chosen:
            pull: Any = torch.func.vjp(first, *(saved[i] for i in places))[1]
            for i, t in zip(places, pull(tuple(g[i] for i in chosen))):
                second[i] = t
        dy, dsum, x, weight = second
        return dy, dsum, x, None, None, weight, *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        dy, dsum, x, mean, rstd = (_front(info, t, dim) for t, dim in zip(inputs[:5], in_dims))
        weight, (eps, dx_wanted, *wants) = inputs[5], inputs[6:]
        h = (x - mean[..., None]) * rstd[..., None]
        # Gradients of each member of the batch: sums that the kernel would run together.
        dweight, dbias = (
            t.sum(1) if wanted else dy.new_empty((info.batch_size, 0)) for t, wanted in zip((dy * h, dy), wants)
        )
        if in_dims[5] is not None:
            dy, weight = dy * weight.movedim(in_dims[5], 0)[:, None], None
        merged = (_merge(t) for t in (dy, dsum, x, mean, rstd))
        dx, _, _ = backward(*merged, weight, eps, dx_wanted, False, False)
        dx, kept = (_split(info, dx), 0) if dx_wanted else (dx, None)
        return (dx, dweight, dbias), (kept, 0, 0)


def backward(*inputs: Any) -> Any:
    """dx, dweight and dbias of rows (N, C), with derivatives; the arguments are those of layer_norm_bwd."""
    return call(_LayerNormBackward, _bwd, _ops.layer_norm_bwd, inputs[:6], *inputs[6:])


derive("layer_norm_fwd", _LayerNorm, _LayerNorm.vmap, library)
derive("layer_norm_bwd", _LayerNormBackward, _LayerNormBackward.vmap, library)


# ---- Public ---------------------------------------------------------------------------------------------------------------


def layer_norm(
    x: Tensor, residual: MaybeTensor, weight: MaybeTensor, bias: MaybeTensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, sum, mean and rstd of rows (N, C), on checked arguments; without a residual the sum has no rows."""
    tensors = (x, residual, weight, bias)
    return call(_LayerNorm, _fwd, _ops.layer_norm_fwd, tensors, eps)  # type: ignore[no-any-return, arg-type]
