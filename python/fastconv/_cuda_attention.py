"""Scaled dot product attention of CUDA tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import CausalBias

from . import _cuda_calls as calls
from . import plan
from ._attention import by_name, prepare, probability
from .ops import sdpa as ops

_OP = "scaled_dot_product_attention"


def _problem(dtype: str, operands: tuple[tuple[str, Any], ...], mask_kind: str, options: ops.Options) -> Any:
    band, dropout = (options.low, options.high), (options.dropout, options.key)
    return plan.sdpa_problem(dtype, dict(operands), mask_kind, options.scale, band, options.softcap, dropout)


class _Call:
    """What `ops.sdpa` executes: a kernel for one problem, on the operands' device."""

    def __init__(self, op: str, options: ops.Options, tensors: dict[str, Tensor | None], device: int) -> None:
        mask, q = tensors.get("mask"), tensors["q"]
        assert q is not None
        kind = "none" if mask is None else "boolean" if mask.dtype is torch.bool else "additive"
        if kind == "additive" and mask is not None and mask.dtype is not q.dtype:
            kind = "wide"
        operands = tuple((name, (tuple(t.shape), t.stride())) for name, t in tensors.items() if t is not None)
        self._call = op, _problem, (calls.DTYPES[q.dtype], operands, kind, options), device, q

    def execute(self, *addresses: int) -> None:
        calls.run_addresses(*self._call, *addresses)


def _finder(device: int) -> ops.Find:
    def find(op: str, options: ops.Options, tensors: dict[str, Tensor | None]) -> _Call | None:
        q = tensors["q"]
        assert q is not None
        return _Call(op, options, tensors, device) if q.shape[:3].numel() else None

    return find


class _Sdpa(Function):
    @staticmethod
    def forward(ctx: Any, device: int, options: ops.Options, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        operands = ops.Operands(*given)  # type: ignore[arg-type]
        lse = ops.row_numbers(operands.q)
        out = ops.forward(operands, options, lse, _finder(device))
        ctx.device, ctx.options = device, options
        ctx.save_for_backward(*given, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        if dout is None and dlse is None:
            return (None,) * 8
        *given, out, lse = ctx.saved_tensors
        wanted = [t is not None and needed for t, needed in zip(given[3:], ctx.needs_input_grad[5:])]
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, *more = ops.gradients(dout, dlse, *given, out, lse, wanted, *ctx.options, find=_finder(ctx.device))
        return None, None, dq, dk, dv, *(d if wants else None for d, wants in zip(more, wanted))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """`fastconv.functional.scaled_dot_product_attention` on one GPU: its arguments, shapes and results, with up to 256 features.

    All operands have gradients, the same in every run. Dropout draws its key from torch's generator of the CPU and drops what it
    drops there. Raises as that function, RuntimeError where the operands are not on one CUDA device, and NotImplementedError,
    with reasons, for a dtype or problem without a kernel.
    """
    tensors = by_name(query, key, value, None if isinstance(attn_mask, CausalBias) else attn_mask)
    device = calls.device(_OP, tensors | {"relative_bias": relative_bias, "alibi_slopes": alibi_slopes, "sinks": sinks})
    given = {
        "window": window, "softcap": softcap or None, "relative_bias": relative_bias, "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }  # fmt: skip
    own = {name: value for name, value in given.items() if value is not None}
    heads, operands, options = prepare(
        query, key, value, attn_mask, probability(dropout_p), is_causal, (scale, enable_gqa), own
    )
    if return_lse or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)):
        out, lse = _Sdpa.apply(device, options, *operands)  # type: ignore[no-untyped-call]
        return (heads.undo(out), heads.undo(lse)) if return_lse else heads.undo(out)
    return heads.undo(ops.forward(operands, options, None, _finder(device)))
