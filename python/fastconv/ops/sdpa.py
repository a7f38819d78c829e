"""Scaled dot product attention: schemas, kernels, fakes, derivatives.

    sdpa_fwd   out (B, Hq, Lq, Dv), lse (B, Hq, Lq)  of q (B, Hq, Lq, D), k (B, Hkv, Lkv, D), v (B, Hkv, Lkv, Dv), mask
    sdpa_bwd   the gradients of q, k, v and mask from those of out and lse

The mask has 4 dimensions, of size 1 where it is broadcast. First derivatives run on kernels and store nothing of size Lq x Lkv;
only the gradient of a mask has that size, since it is one. Second derivatives and forward mode are composed of torch's operations
(`_sdpa_composed`), which do.

bfloat16 and float16 are how operands are stored: kernels compute in float32, and lse is float32 beside them. A mask may be of the
operands' dtype or of the one that they are computed in.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from .. import plan
from . import _sdpa_composed as composed
from ._conv2d_kernels import TAGS, library
from ._dispatch import KERNEL, WITH_HALVES, check_operands, check_shape, computed_in, way
from .autograd import call, derive, run

Context: TypeAlias = Any
MaybeTensor: TypeAlias = Tensor | None


class Options(NamedTuple):
    """What is asked besides the operands: query i sees the keys i + low .. i + high."""

    scale: float
    low: int
    high: int
    softcap: float = 0.0
    dropout: float = 0.0
    key: int = 0


# ---- Kernels --------------------------------------------------------------------------------------------------------------


@plan.cached
def _plan(
    op: str,
    dtype: torch.dtype,
    operands: tuple[tuple[str, plan.Shape, plan.Shape], ...],
    mask_kind: str,
    options: Options,
    threads: int,
    force: str,
    strict: bool,
) -> plan.Plan | None:
    named = {name: (shape, strides) for name, shape, strides in operands}
    B, Hq, Lq, _ = named["q"][0]
    if not (B and Hq and Lq):
        return None
    band, dropout = (options.low, options.high), (options.dropout, options.key)
    problem = plan.sdpa_problem(WITH_HALVES[dtype], named, mask_kind, options.scale, band, options.softcap, dropout)
    shapes = tuple(named[name][0] for name in ("q", "k", "v"))
    return plan.make(op, problem, WITH_HALVES[dtype], shapes, threads, force, strict)


def _find(op: str, options: Options, tensors: dict[str, MaybeTensor]) -> plan.Plan | None:
    mask, q = tensors.get("mask"), tensors["q"]
    assert q is not None
    kind = "none" if mask is None else "boolean" if mask.dtype is torch.bool else "additive"
    if kind == "additive" and mask is not None and mask.dtype is not q.dtype:
        kind = "wide"
    operands = tuple((name, tuple(t.shape), t.stride()) for name, t in tensors.items() if t is not None)
    made: plan.Plan | None = _plan(
        op, q.dtype, operands, kind, options, torch.get_num_threads(), plan.forced.get().get(op, ""), plan.strict
    )
    return made


def _expanded(mask: MaybeTensor, q: Tensor, k: Tensor) -> MaybeTensor:
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2])


def _output(q: Tensor, v: Tensor) -> Tensor:
    """An empty output in torch's layout, which is the query's: (B, H, L, E), or (B, L, H, E) in memory."""
    B, H, L, _ = q.shape
    if q.stride(1) < q.stride(2) and q.stride(3) == 1:
        return q.new_empty((B, L, H, v.shape[3])).transpose(1, 2)
    return q.new_empty((B, H, L, v.shape[3]))


def _row_numbers(q: Tensor) -> Tensor:
    """An empty log-sum-exp (B, Hq, Lq)."""
    return q.new_empty(q.shape[:3], dtype=computed_in(q.dtype))


def _fwd(q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, *options: Any) -> tuple[Tensor, Tensor]:
    lse = _row_numbers(q)
    return _run(q, k, v, mask, Options(*options), lse), lse


def _run(q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, options: Options, lse: MaybeTensor) -> Tensor:
    mask, out = _expanded(mask, q, k), _output(q, v)
    made = _find("sdpa_fwd", options, {"q": q, "k": k, "v": v, "mask": mask, "out": out})
    if made is not None:
        optional = [0 if t is None else t.data_ptr() for t in (mask, lse)]
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr(), optional[0], out.data_ptr(), optional[1]
        made.execute(*addresses, 0, 0, 0, 0, 0, 0)
    return out


def _bwd(
    dout: Tensor,
    dlse: MaybeTensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaybeTensor,
    out: Tensor,
    lse: Tensor,
    mask_gradient: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    whole = _expanded(mask, q, k)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dmask = q.new_empty((*q.shape[:3], k.shape[2]) if mask_gradient else (0,), dtype=computed_in(q.dtype))
    operands = {"q": q, "k": k, "v": v, "mask": whole, "out": out, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
    made = _find("sdpa_bwd", Options(*options), operands)
    if made is None:
        return (
            dq.zero_(),
            dk.zero_(),
            dv.zero_(),
            _no_mask(q) if mask is None or not mask_gradient else mask.new_zeros(mask.shape),
        )
    dlse = None if dlse is None else dlse.contiguous()
    made.execute(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if whole is None else whole.data_ptr(),
        out.data_ptr(), lse.contiguous().data_ptr(), dout.data_ptr(), 0 if dlse is None else dlse.data_ptr(),
        dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), dmask.data_ptr() if mask_gradient else 0,
    )  # fmt: skip
    if mask is None or not mask_gradient:
        return dq, dk, dv, _no_mask(q)
    return dq, dk, dv, dmask.sum_to_size(mask.shape).to(mask.dtype)


def _no_mask(q: Tensor) -> Tensor:
    """What stands for the gradient of a mask that nobody wants."""
    return q.new_empty((0,))


# ---- Registration ---------------------------------------------------------------------------------------------------------

_OPTIONS = "float scale, SymInt low, SymInt high, float softcap, float dropout, int key"
library.define(f"sdpa_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, {_OPTIONS}) -> (Tensor, Tensor)", tags=TAGS)
library.define(
    "sdpa_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
    f"bool mask_gradient, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, p: float) -> None:
    """Raises RuntimeError unless the operands make one attention: the registered ops are open to anybody."""
    if min(q.dim(), k.dim(), v.dim()) != 4 or max(q.dim(), k.dim(), v.dim()) != 4:
        raise RuntimeError(f"fastconv::{op}: q, k, v have {q.dim()}, {k.dim()} and {v.dim()} dimensions, expected 4")
    check_operands(op, WITH_HALVES, q=q, k=k, v=v)
    if mask is not None and mask.dtype not in (torch.bool, q.dtype, computed_in(q.dtype)):
        raise RuntimeError(f"fastconv::{op}: mask is {mask.dtype}, expected bool, {q.dtype} or {computed_in(q.dtype)}")
    check_shape(op, "k", k.shape, (q.shape[0], k.shape[1], k.shape[2], q.shape[3]))
    check_shape(op, "v", v.shape, (*k.shape[:3], v.shape[3]))
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise RuntimeError(
            f"fastconv::{op}: k has {k.shape[1]} heads, expected a number that divides the {q.shape[1]} of q"
        )
    if mask is not None:
        scores = (*q.shape[:3], k.shape[2])
        fits = mask.dim() == 4 and all(m in (1, s) for m, s in zip(mask.shape, scores))
        if not fits or not mask.is_cpu:
            raise RuntimeError(
                f"fastconv::{op}: mask has shape {list(mask.shape)} on {mask.device}, expected {list(scores)} or 1s"
            )
    if not 0 <= p <= 1:
        raise RuntimeError(f"fastconv::{op}: dropout is {p}, expected a probability")


def _fwd_impl(q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, *options: Any) -> tuple[Tensor, Tensor]:
    _check("sdpa_fwd", q, k, v, mask, options[4])
    return _fwd(q, k, v, mask, *options)


def _bwd_impl(dout: Tensor, dlse: MaybeTensor, q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, *rest: Any) -> Any:
    out, lse, mask_gradient, *options = rest
    _check("sdpa_bwd", q, k, v, mask, options[4])
    check_operands("sdpa_bwd", WITH_HALVES, q=q, dout=dout, out=out)
    check_operands("sdpa_bwd", {computed_in(q.dtype): ""}, lse=lse, dlse=dlse)
    for name, t in (("dout", dout), ("out", out)):
        check_shape("sdpa_bwd", name, t.shape, (*q.shape[:3], v.shape[3]))
    check_shape("sdpa_bwd", "lse", lse.shape, tuple(q.shape[:3]))
    if dlse is not None:
        check_shape("sdpa_bwd", "dlse", dlse.shape, tuple(q.shape[:3]))
    return _bwd(dout, dlse, q, k, v, mask, out, lse, mask_gradient, *options)


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _output(q, v), _row_numbers(q)


def _bwd_fake(dout: Tensor, dlse: MaybeTensor, q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, *rest: Any) -> Any:
    dmask = mask.new_empty(mask.shape) if rest[2] and mask is not None else _no_mask(q)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dmask


library.impl("sdpa_fwd", _fwd_impl, "CPU")
library.impl("sdpa_bwd", _bwd_impl, "CPU")
torch.library.register_fake("fastconv::sdpa_fwd", _fwd_fake, lib=library)
torch.library.register_fake("fastconv::sdpa_bwd", _bwd_fake, lib=library)
_ops = torch.ops.fastconv


# ---- Derivatives ----------------------------------------------------------------------------------------------------------


def _merged(info: Any, dims: tuple[Any, ...], tensors: tuple[Any, ...]) -> list[Any]:
    """vmap: operands with the mapped dimension made part of the batch."""
    found: list[Any] = []
    for t, dim in zip(tensors, dims):
        if t is not None:
            t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        found.append(t)
    batch = max((t.shape[1] for t in found if t is not None), default=1)
    return [None if t is None else t.expand(-1, batch, *(-1,) * (t.dim() - 2)).flatten(0, 1) for t in found]


def _split(info: Any, t: Tensor) -> Tensor:
    parts: Tensor = t.unflatten(0, (info.batch_size, -1))
    return parts


class _Sdpa(Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, *options: Any) -> tuple[Tensor, Tensor]:
        return run(_fwd, _ops.sdpa_fwd, (q, k, v, mask), *options)  # type: ignore[no-any-return, arg-type]

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, mask, *output)
        ctx.save_for_forward(q, k, v, mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Context, dout: MaybeTensor, dlse: MaybeTensor) -> Any:
        nothing = (None,) * len(ctx.options)
        if dout is None and dlse is None:
            return None, None, None, None, *nothing
        q, k, v, mask, out, lse = ctx.saved_tensors
        wants = mask is not None and ctx.needs_input_grad[3]
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, dmask = _backward(dout, dlse, q, k, v, mask, out, lse, wants, *ctx.options)
        return dq, dk, dv, dmask if wants else None, *nothing

    @staticmethod
    def jvp(ctx: Context, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor, tmask: MaybeTensor, *_: Any) -> Any:
        q, k, v, mask = ctx.saved_tensors
        return composed.jvp(q, k, v, mask, Options(*ctx.options), (tq, tk, tv, tmask))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        q, k, v, mask = _merged(info, in_dims[:4], inputs[:4])
        out, lse = sdpa(q, k, v, mask, Options(*inputs[4:]))
        return (_split(info, out), _split(info, lse)), (0, 0)


class _SdpaBackward(Function):
    @staticmethod
    def forward(dout: Tensor, dlse: MaybeTensor, q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, *rest: Any) -> Any:
        out, lse, *what = rest
        return run(_bwd, _ops.sdpa_bwd, (dout, dlse, q, k, v, mask, out, lse), *what)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
        (
            *tensors,
            _,
            _,
            ctx.wants,
        ) = inputs[:9]
        ctx.options = inputs[9:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Context, *g: MaybeTensor) -> Any:
        # out and lse are functions of the others: what flows through them is part of what flows through those.
        found = composed.double_backward(ctx.saved_tensors, Options(*ctx.options), g, ctx.needs_input_grad[:6])
        return *found, None, None, None, *(None,) * len(ctx.options)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        *tensors, wants = inputs[:9]
        mask = tensors[5]
        if wants:
            # A mask that is shared has a gradient for each: one that is not.
            tensors[5] = (
                mask.expand(info.batch_size, *mask.shape) if in_dims[5] is None else mask.movedim(in_dims[5], 0)
            )
            in_dims = (*in_dims[:5], 0, *in_dims[6:])
        merged = _merged(info, in_dims[:8], tuple(tensors))
        *found, dmask = _backward(*merged, wants, *inputs[9:])
        if wants:
            dmask = _split(info, dmask).sum_to_size(tensors[5].shape)
        return (*(_split(info, t) for t in found), dmask), (0, 0, 0, 0 if wants else None)


def _backward(*inputs: Any) -> Any:
    return call(_SdpaBackward, _bwd, _ops.sdpa_bwd, inputs[:8], *inputs[8:])


derive("sdpa_fwd", _Sdpa, _Sdpa.vmap, library)
derive("sdpa_bwd", _SdpaBackward, _SdpaBackward.vmap, library)


# ---- Public ---------------------------------------------------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, options: Options) -> tuple[Tensor, Tensor]:
    """The outputs (B, Hq, Lq, Dv) and their log-sum-exp (B, Hq, Lq), on checked arguments."""
    return _sdpa(q, k, v, mask, options)


def sdpa_out(q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, options: Options) -> Tensor:
    """The outputs alone: where no derivative needs the log-sum-exp, its logarithms are not taken."""
    if way(q, k, v, mask) is KERNEL:
        return _run(q, k, v, mask, options, None)
    return _sdpa(q, k, v, mask, options)[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: MaybeTensor, options: Options) -> tuple[Tensor, Tensor]:
    return call(_Sdpa, _fwd, _ops.sdpa_fwd, (q, k, v, mask), *options)  # type: ignore[no-any-return, arg-type]
