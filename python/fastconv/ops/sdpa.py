"""Scaled dot product attention: schemas, kernels, fakes, derivatives.

    sdpa_fwd   out (B, Hq, Lq, Dv), lse (B, Hq, Lq)  of q (B, Hq, Lq, D), k (B, Hkv, Lkv, D), v (B, Hkv, Lkv, Dv) and more
    sdpa_bwd   the gradients of q, k, v, mask, bias and sink from those of out and lse

The mask has 4 dimensions; bias (B, Hq, Lq + Lkv - 1) has a number for each distance j - i, from 1 - Lq on; sink (B, Hq) is the
score of a key that every query sees and whose value is 0. All are of size 1 where they are broadcast.

First derivatives run on kernels and store nothing of size Lq x Lkv; only the gradient of a mask has that size, since it is one.
Second derivatives and forward mode are composed of torch's operations (`_sdpa_composed`), which do.

bfloat16 and float16 are how operands are stored: kernels compute in float32, and lse is float32 beside them. A mask may be of the
operands' dtype or of the one that they are computed in, which bias and sink have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


class Operands(NamedTuple):
    """What attention is a function of, besides its options."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: MaybeTensor = None
    bias: MaybeTensor = None
    sink: MaybeTensor = None


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


def mask_kind(mask: MaybeTensor, q: Tensor) -> str:
    if mask is None:
        return "none"
    return "boolean" if mask.dtype is torch.bool else "additive" if mask.dtype is q.dtype else "wide"


def find(op: str, options: Options, tensors: dict[str, MaybeTensor]) -> plan.Plan | None:
    q = tensors["q"]
    assert q is not None
    kind = mask_kind(tensors.get("mask"), q)
    operands = tuple((name, tuple(t.shape), t.stride()) for name, t in tensors.items() if t is not None)
    made: plan.Plan | None = _plan(
        op, q.dtype, operands, kind, options, torch.get_num_threads(), plan.forced.get().get(op, ""), plan.strict
    )
    return made


def _expanded(mask: MaybeTensor, q: Tensor, k: Tensor) -> MaybeTensor:
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2])


def output(q: Tensor, v: Tensor) -> Tensor:
    """An empty output in torch's layout, which is the query's: (B, H, L, E), or (B, L, H, E) in memory."""
    B, H, L, _ = q.shape
    if q.stride(1) < q.stride(2) and q.stride(3) == 1:
        return q.new_empty((B, L, H, v.shape[3])).transpose(1, 2)
    return q.new_empty((B, H, L, v.shape[3]))


def row_numbers(q: Tensor) -> Tensor:
    """An empty log-sum-exp (B, Hq, Lq)."""
    return q.new_empty(q.shape[:3], dtype=computed_in(q.dtype))


def _whole_bias(bias: MaybeTensor, q: Tensor) -> MaybeTensor:
    return None if bias is None else bias.expand(*q.shape[:2], -1)


def _whole_sink(sink: MaybeTensor, q: Tensor) -> MaybeTensor:
    return None if sink is None else sink.expand(q.shape[:2]).contiguous()


def _fwd(*inputs: Any) -> tuple[Tensor, Tensor]:
    lse = row_numbers(inputs[0])
    return forward(Operands(*inputs[:6]), Options(*inputs[6:]), lse), lse


# What answers (op, options, operands by name) with something that executes, or None where there is nothing to compute.
Find: TypeAlias = Callable[[str, Options, dict[str, MaybeTensor]], Any]


def forward(given: Operands, options: Options, lse: MaybeTensor, find: Find = find) -> Tensor:
    """The outputs; writes their log-sum-exps where there is a place for them."""
    q, k, v, mask, bias, sink = given
    mask, out = _expanded(mask, q, k), output(q, v)
    bias, sink = _whole_bias(bias, q), _whole_sink(sink, q)
    made = find("sdpa_fwd", options, {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "out": out})
    if made is not None:
        made.execute(*_addresses(q, k, v, mask, out, lse, None, None, None, None, None, None, bias, sink, None))
    return out


def _addresses(*tensors: MaybeTensor) -> tuple[int, ...]:
    """Of SdpaArgs, in its order."""
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def gradients(dout: Tensor, dlse: MaybeTensor, *rest: Any, find: Find = find) -> Gradients:
    """The gradients of all operands; those of mask, bias and sink where `wanted` says so, else empty."""
    given, out, lse, wanted, options = Operands(*rest[:6]), rest[6], rest[7], rest[8], Options(*rest[9:])
    q, k, v, mask, bias, sink = given
    whole, biases = _expanded(mask, q, k), _whole_bias(bias, q)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    precision, rows = computed_in(q.dtype), tuple(q.shape[:3])
    dmask = q.new_empty((*rows, k.shape[2]), dtype=precision) if wanted[0] else None
    dbias = q.new_empty(biases.shape, dtype=precision) if wanted[1] and biases is not None else None
    dlse = None if dlse is None else dlse.contiguous()
    lse = lse.contiguous()
    operands = {
        "q": q,
        "k": k,
        "v": v,
        "mask": whole,
        "bias": biases,
        "out": out,
        "dout": dout,
        "dq": dq,
        "dk": dk,
        "dv": dv,
    }
    made = find("sdpa_bwd", options, operands)
    if made is None:
        for t in (dq, dk, dv, dmask, dbias):
            if t is not None:
                t.zero_()
    else:
        made.execute(*_addresses(q, k, v, whole, out, lse, dout, dlse, dq, dk, dv, dmask, biases, None, dbias))
    dsink = _sink_gradient(dout, dlse, out, lse, sink) if wanted[2] and sink is not None else None
    more = zip((dmask, dbias, dsink), (mask, bias, sink))
    dmask, dbias, dsink = (
        _nothing(q) if d is None or t is None else d.sum_to_size(t.shape).to(t.dtype) for d, t in more
    )
    return dq, dk, dv, dmask, dbias, dsink


def _sink_gradient(dout: Tensor, dlse: MaybeTensor, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """A sink's weight is exp(sink - lse), and its value 0."""
    flow = -(dout.to(lse.dtype) * out.to(lse.dtype)).sum(3)
    flow = flow if dlse is None else flow + dlse
    return (torch.exp(sink[..., None] - lse) * flow).sum(2)


def _nothing(q: Tensor) -> Tensor:
    """What stands for a gradient that nobody wants."""
    return q.new_empty((0,))


# ---- Registration ---------------------------------------------------------------------------------------------------------

_OPTIONS = "float scale, SymInt low, SymInt high, float softcap, float dropout, int key"
_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? sink"
library.define(f"sdpa_fwd({_OPERANDS}, {_OPTIONS}) -> (Tensor, Tensor)", tags=TAGS)
library.define(
    f"sdpa_bwd(Tensor dout, Tensor? dlse, {_OPERANDS}, Tensor out, Tensor lse, bool[] wanted, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)


def check(op: str, given: Operands, p: float, dtypes: Mapping[torch.dtype, str] = WITH_HALVES) -> None:
    """Raises RuntimeError unless the operands make one attention: the registered ops are open to anybody."""
    q, k, v, mask, bias, sink = given
    if min(q.dim(), k.dim(), v.dim()) != 4 or max(q.dim(), k.dim(), v.dim()) != 4:
        raise RuntimeError(f"fastconv::{op}: q, k, v have {q.dim()}, {k.dim()} and {v.dim()} dimensions, expected 4")
    check_operands(op, dtypes, q=q, k=k, v=v)
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
        if not fits or mask.device != q.device:
            raise RuntimeError(
                f"fastconv::{op}: mask has shape {list(mask.shape)} on {mask.device}, expected {list(scores)} or 1s"
            )
    precision = computed_in(q.dtype)
    for name, t, sizes in (("bias", bias, (max(q.shape[2] + k.shape[2] - 1, 0),)), ("sink", sink, ())):
        whole = (*q.shape[:2], *sizes)
        if t is None:
            continue
        fits = t.dim() == len(whole) and all(m in (1, s) for m, s in zip(t.shape, whole[:2])) and t.shape[2:] == sizes
        if not fits or t.dtype is not precision or t.device != q.device:
            raise RuntimeError(
                f"fastconv::{op}: {name} is {t.dtype} of shape {list(t.shape)}, expected {precision} of {list(whole)} or 1s"
            )
    if not 0 <= p <= 1:
        raise RuntimeError(f"fastconv::{op}: dropout is {p}, expected a probability")


def _fwd_impl(*inputs: Any) -> tuple[Tensor, Tensor]:
    check("sdpa_fwd", Operands(*inputs[:6]), Options(*inputs[6:]).dropout)
    return _fwd(*inputs)


def check_bwd(dout: Tensor, dlse: MaybeTensor, *rest: Any, dtypes: Mapping[torch.dtype, str] = WITH_HALVES) -> None:
    given, out, lse = Operands(*rest[:6]), rest[6], rest[7]
    q, v = given.q, given.v
    check("sdpa_bwd", given, Options(*rest[9:]).dropout, dtypes)
    check_operands("sdpa_bwd", dtypes, q=q, dout=dout, out=out)
    check_operands("sdpa_bwd", {computed_in(q.dtype): ""}, lse=lse, dlse=dlse)
    for name, t in (("dout", dout), ("out", out)):
        check_shape("sdpa_bwd", name, t.shape, (*q.shape[:3], v.shape[3]))
    check_shape("sdpa_bwd", "lse", lse.shape, tuple(q.shape[:3]))
    if dlse is not None:
        check_shape("sdpa_bwd", "dlse", dlse.shape, tuple(q.shape[:3]))


def _bwd_impl(dout: Tensor, dlse: MaybeTensor, *rest: Any) -> Gradients:
    check_bwd(dout, dlse, *rest)
    return gradients(dout, dlse, *rest)


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return output(q, v), row_numbers(q)


def _bwd_fake(dout: Tensor, dlse: MaybeTensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Gradients:
    mask, bias, sink = (
        t.new_empty(t.shape) if wants and t is not None else _nothing(q) for t, wants in zip(rest[:3], rest[5])
    )
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), mask, bias, sink


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
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return run(_fwd, _ops.sdpa_fwd, inputs[:6], *inputs[6:])  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.options = inputs[6:]
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.save_for_forward(*inputs[:6])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Context, dout: MaybeTensor, dlse: MaybeTensor) -> Any:
        nothing = (None,) * len(ctx.options)
        if dout is None and dlse is None:
            return *(None,) * 6, *nothing
        *given, out, lse = ctx.saved_tensors
        wanted = [t is not None and needed for t, needed in zip(given[3:], ctx.needs_input_grad[3:6])]
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, *more = _backward(dout, dlse, *given, out, lse, wanted, *ctx.options)
        return dq, dk, dv, *(d if wants else None for d, wants in zip(more, wanted)), *nothing

    @staticmethod
    def jvp(ctx: Context, *tangents: Any) -> Any:
        return composed.jvp(Operands(*ctx.saved_tensors), Options(*ctx.options), tangents[:6])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        merged = _merged(info, in_dims[:6], inputs[:6])
        out, lse = sdpa(Operands(*merged), Options(*inputs[6:]))
        return (_split(info, out), _split(info, lse)), (0, 0)


class _SdpaBackward(Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return run(gradients, _ops.sdpa_bwd, inputs[:10], *inputs[10:])

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options = inputs[11:]
        ctx.save_for_backward(*inputs[:8])
        ctx.save_for_forward(*inputs[:8])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Context, *g: MaybeTensor) -> Any:
        # out and lse are functions of the others: what flows through them is part of what flows through those.
        found = composed.double_backward(ctx.saved_tensors, Options(*ctx.options), g, ctx.needs_input_grad[:8])
        return *found, None, None, None, *(None,) * len(ctx.options)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        tensors, wanted, dims = list(inputs[:10]), inputs[10], list(in_dims[:10])
        for place, wants in zip((5, 6, 7), wanted):
            if wants:
                # What is shared has a gradient for each: it is made one that is not.
                t, dim = tensors[place], dims[place]
                tensors[place] = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
                dims[place] = 0
        found = list(_backward(*_merged(info, tuple(dims), tuple(tensors)), wanted, *inputs[11:]))
        found[:3] = [_split(info, t) for t in found[:3]]
        for place, wants in zip((3, 4, 5), wanted):
            if wants:
                found[place] = _split(info, found[place]).sum_to_size(tensors[place + 2].shape)
        return tuple(found), (0, 0, 0, *(0 if wants else None for wants in wanted))


def _backward(*inputs: Any) -> Any:
    return call(_SdpaBackward, gradients, _ops.sdpa_bwd, inputs[:10], *inputs[10:])


derive("sdpa_fwd", _Sdpa, _Sdpa.vmap, library)
derive("sdpa_bwd", _SdpaBackward, _SdpaBackward.vmap, library)


# ---- Public ---------------------------------------------------------------------------------------------------------------


def sdpa(given: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """The outputs (B, Hq, Lq, Dv) and their log-sum-exp (B, Hq, Lq), on checked arguments."""
    return call(_Sdpa, _fwd, _ops.sdpa_fwd, given, *options)  # type: ignore[no-any-return, arg-type]


def sdpa_out(given: Operands, options: Options) -> Tensor:
    """The outputs alone: where no derivative needs the log-sum-exp, its logarithms are not taken."""
    if way(*given) is KERNEL:
        return forward(given, options, None)
    return sdpa(given, options)[0]


def weights(given: Operands, lse: Tensor, options: Options) -> Tensor:
    """What an attention multiplied values with, (B, Hq, Lq, Lkv), dropout applied: by torch's operations, with gradients."""
    return composed.weights(given, lse, options)
