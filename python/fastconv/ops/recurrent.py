"""One layer of an LSTM or GRU in one direction: schemas, kernels, fakes, derivatives.

    lstm_fwd   y (L, B, H), c (B, H), kept         of gates (L, B, 4H), h, c (B, H), w (4H, H), bias (4H)
    lstm_bwd   dgates (L, B, 4H), dh, dc (B, H)    from the gradients of y and of the last c
    gru_fwd    y (L, B, H), kept                   of gates (L, B, 3H), h (B, H), w (3H, H), bias (3H)
    gru_bwd    dgates, dproduct (L, B, 3H), dh     from the gradient of y; dproduct is that of w·h + bias

Gates are the inputs' products with their weights and bias, one matrix product for all steps; so are the gradients of weights and
inputs. What is kept for a backward pass is empty where none is to come. First derivatives run on kernels; second ones are
composed of torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as T

from .. import plan
from . import linear as products
from ._conv2d_kernels import TAGS, library
from ._dispatch import DTYPES, FUNCTION, KERNEL, OP, check_operands, check_shape, direct, way
from ._recurrent_composed import Cell, State, by_steps, gru_cell, lstm_cell

MaybeTensor: TypeAlias = Tensor | None


class Kind(NamedTuple):
    """What tells the two apart: their ops' name, gates of a unit, numbers kept of it, tensors of state, the composed cell."""

    name: str
    gates: int
    kept: int
    states: int
    cell: Cell


LSTM = Kind("lstm", 4, 5, 2, lstm_cell)
GRU = Kind("gru", 3, 4, 1, gru_cell)


# ---- Kernels: on plain CPU tensors, arguments already checked ---------------------------------------------------------------


@plan.cached
def find_plan(
    op: str, sizes: tuple[int, int, int], dtype: torch.dtype, reverse: bool, threads: int, force: str, strict: bool
) -> plan.Plan:
    L, B, H = sizes
    problem = plan.recurrent_problem(DTYPES[dtype], sizes, reverse)
    return plan.make(op, problem, DTYPES[dtype], ((L, B, H), (H, H)), threads, force, strict)


def _find(op: str, y: Any, dtype: torch.dtype, reverse: bool) -> plan.Plan:
    forced = plan.forced.get().get(op, "")
    return find_plan(op, tuple(y), dtype, reverse, torch.get_num_threads(), forced, plan.strict)


def _address(t: MaybeTensor) -> int:
    return 0 if t is None else t.data_ptr()


def _forward(
    kind: Kind, gates: Tensor, state: State, w: Tensor, bias: MaybeTensor, reverse: bool, keep: bool
) -> tuple[Tensor, State, Tensor]:
    """y, what is left of the state besides y, and what is kept."""
    L, B, H = gates.shape[0], gates.shape[1], w.shape[1]
    gates, w, state = gates.contiguous(), w.contiguous(), tuple(t.contiguous() for t in state)
    bias = None if bias is None else bias.contiguous()
    y = gates.new_empty((L, B, H))
    last = tuple(torch.empty_like(t) for t in state[1:])
    kept = gates.new_empty((L, B, kind.kept * H) if keep else 0)
    if y.numel():
        states = [t.data_ptr() for t in state] + [0] * (2 - len(state))
        results = y.data_ptr(), *(t.data_ptr() for t in last), *[0] * (1 - len(last)), kept.data_ptr() if keep else 0
        made = _find(f"{kind.name}_fwd", y.shape, y.dtype, reverse)
        made.execute(gates.data_ptr(), w.data_ptr(), _address(bias), *states, *results, *[0] * 6)
    return y, last, kept


def _lstm_bwd(
    dy: Tensor, dc_last: MaybeTensor, w: Tensor, c: Tensor, kept: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy, w, c, kept = (t.contiguous() for t in (dy, w, c, kept))
    dc_last = None if dc_last is None else dc_last.contiguous()
    L, B, H = dy.shape
    dgates, dh, dc = dy.new_empty((L, B, 4 * H)), torch.empty_like(c), torch.empty_like(c)
    if dy.numel():
        inputs = 0, w.data_ptr(), 0, 0, c.data_ptr(), 0, 0, kept.data_ptr(), dy.data_ptr(), _address(dc_last)
        made = _find("lstm_bwd", dy.shape, dy.dtype, reverse)
        made.execute(*inputs, dgates.data_ptr(), 0, dh.data_ptr(), dc.data_ptr())
    return dgates, dh, dc


def _gru_bwd(dy: Tensor, w: Tensor, h: Tensor, y: Tensor, kept: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    dy, w, h, y, kept = (t.contiguous() for t in (dy, w, h, y, kept))
    L, B, H = dy.shape
    dgates, dproduct, dh = dy.new_empty((L, B, 3 * H)), dy.new_empty((L, B, 3 * H)), torch.empty_like(h)
    if dy.numel():
        inputs = 0, w.data_ptr(), 0, h.data_ptr(), 0, y.data_ptr(), 0, kept.data_ptr(), dy.data_ptr(), 0
        made = _find("gru_bwd", dy.shape, dy.dtype, reverse)
        made.execute(*inputs, dgates.data_ptr(), dproduct.data_ptr(), dh.data_ptr(), 0)
    return dgates, dproduct, dh


# ---- Registration ---------------------------------------------------------------------------------------------------------

_OPERANDS = "Tensor w, Tensor? bias, bool reverse, bool keep"
library.define(f"lstm_fwd(Tensor gates, Tensor h, Tensor c, {_OPERANDS}) -> (Tensor, Tensor, Tensor)", tags=TAGS)
library.define(f"gru_fwd(Tensor gates, Tensor h, {_OPERANDS}) -> (Tensor, Tensor)", tags=TAGS)
_RESULTS = "(Tensor, Tensor, Tensor)"
library.define(
    f"lstm_bwd(Tensor dy, Tensor? dc, Tensor w, Tensor c, Tensor kept, bool reverse) -> {_RESULTS}", tags=TAGS
)
library.define(f"gru_bwd(Tensor dy, Tensor w, Tensor h, Tensor y, Tensor kept, bool reverse) -> {_RESULTS}", tags=TAGS)


def _check(op: str, kind: Kind, first: Tensor, w: Tensor, **others: tuple[MaybeTensor, tuple[int, ...]]) -> None:
    """Raises RuntimeError unless the operands make one layer: the registered ops are open to anybody."""
    if first.dim() != 3:
        raise RuntimeError(f"fastconv::{op}: the first operand has {first.dim()} dimensions, expected 3")
    check_operands(op, DTYPES, first=first, w=w, **{name: t for name, (t, _) in others.items()})
    check_shape(op, "w", w.shape, (kind.gates * w.shape[-1], w.shape[-1]))
    for name, (t, shape) in others.items():
        if t is not None:
            check_shape(op, name, t.shape, shape)


def _fwd_impl(kind: Kind, gates: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    state, (w, bias, reverse, keep) = rest[: kind.states], rest[kind.states :]
    B, H = gates.shape[1] if gates.dim() == 3 else 0, w.shape[-1]
    named = {name: (t, (B, H)) for name, t in zip("hc", state)}
    _check(f"{kind.name}_fwd", kind, gates, w, bias=(bias, (kind.gates * H,)), **named)
    check_shape(f"{kind.name}_fwd", "gates", gates.shape, (*gates.shape[:2], kind.gates * H))
    y, last, kept = _forward(kind, gates, state, w, bias, reverse, keep)
    return y, *last, kept


def _lstm_bwd_impl(
    dy: Tensor, dc: MaybeTensor, w: Tensor, c: Tensor, kept: Tensor, reverse: bool
) -> tuple[Tensor, ...]:
    L, B, H = dy.shape
    _check("lstm_bwd", LSTM, dy, w, dc=(dc, (B, H)), c=(c, (B, H)), kept=(kept, (L, B, 5 * H)))
    return _lstm_bwd(dy, dc, w, c, kept, reverse)


def _gru_bwd_impl(dy: Tensor, w: Tensor, h: Tensor, y: Tensor, kept: Tensor, reverse: bool) -> tuple[Tensor, ...]:
    L, B, H = dy.shape
    _check("gru_bwd", GRU, dy, w, h=(h, (B, H)), y=(y, (L, B, H)), kept=(kept, (L, B, 4 * H)))
    return _gru_bwd(dy, w, h, y, kept, reverse)


def _fwd_fake(kind: Kind, gates: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    state, (w, _, _, keep) = rest[: kind.states], rest[kind.states :]
    L, B, H = gates.shape[0], gates.shape[1], w.shape[1]
    kept = gates.new_empty((L, B, kind.kept * H) if keep else 0)
    return gates.new_empty((L, B, H)), *(t.new_empty((B, H)) for t in state[1:]), kept


def _bwd_fake(kind: Kind, dy: Tensor) -> tuple[Tensor, ...]:
    L, B, H = dy.shape
    gates = [dy.new_empty((L, B, kind.gates * H)) for _ in range(3 - kind.states)]
    return *gates, *(dy.new_empty((B, H)) for _ in range(kind.states))


library.impl("lstm_fwd", lambda *given: _fwd_impl(LSTM, *given), "CPU")
library.impl("gru_fwd", lambda *given: _fwd_impl(GRU, *given), "CPU")
library.impl("lstm_bwd", _lstm_bwd_impl, "CPU")
library.impl("gru_bwd", _gru_bwd_impl, "CPU")
torch.library.register_fake("fastconv::lstm_fwd", lambda *given: _fwd_fake(LSTM, *given), lib=library)
torch.library.register_fake("fastconv::gru_fwd", lambda *given: _fwd_fake(GRU, *given), lib=library)
torch.library.register_fake("fastconv::lstm_bwd", lambda dy, *_: _bwd_fake(LSTM, dy), lib=library)
torch.library.register_fake("fastconv::gru_bwd", lambda dy, *_: _bwd_fake(GRU, dy), lib=library)
_ops = torch.ops.fastconv


# ---- Derivatives of the registered ops --------------------------------------------------------------------------------------


def _before(first: Tensor, y: Tensor, reverse: bool) -> Tensor:
    """The state that each step started from (L, B, H)."""
    return torch.cat((y[1:], first[None]) if reverse else (first[None], y[:-1]))


def _of_weights(dproduct: Tensor, before: Tensor, need_w: bool, need_bias: bool) -> tuple[MaybeTensor, MaybeTensor]:
    if not (need_w or need_bias):
        return None, None
    dw, db = _ops.linear_wgrad(dproduct, before, need_bias)
    return dw if need_w else None, db if need_bias else None


def _remember_lstm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h, c, w, _, ctx.reverse, _ = inputs
    y, _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(h, c, w, y, kept)


def _derive_lstm(ctx: Any, dy: Tensor, dc: Tensor, _: Any) -> tuple[MaybeTensor | None, ...]:
    h, c, w, y, kept = ctx.saved_tensors
    dgates, dh, dc = _ops.lstm_bwd(dy, dc, w, c, kept, ctx.reverse)
    return dgates, dh, dc, *_of_weights(dgates, _before(h, y, ctx.reverse), *ctx.needs_input_grad[3:5]), None, None


def _remember_gru(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h, w, _, ctx.reverse, _ = inputs
    y, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(h, w, y, kept)


def _derive_gru(ctx: Any, dy: Tensor, _: Any) -> tuple[MaybeTensor | None, ...]:
    h, w, y, kept = ctx.saved_tensors
    dgates, dproduct, dh = _ops.gru_bwd(dy, w, h, y, kept, ctx.reverse)
    return dgates, dh, *_of_weights(dproduct, _before(h, y, ctx.reverse), *ctx.needs_input_grad[2:4]), None, None


torch.library.register_autograd("fastconv::lstm_fwd", _derive_lstm, setup_context=_remember_lstm, lib=library)
torch.library.register_autograd("fastconv::gru_fwd", _derive_gru, setup_context=_remember_gru, lib=library)


# ---- A layer ----------------------------------------------------------------------------------------------------------------


class _Layer(Function):
    """A layer in plain eager mode, of kind, whether reversed, x, w_ih, w_hh, b_ih, b_hh and the state: y, the rest of the state.

    Its backward pass computes the gates' gradients and then every other one as a single product over all steps.
    """

    @staticmethod
    def forward(ctx: Any, kind: Kind, reverse: bool, *tensors: Any) -> tuple[Tensor, ...]:
        x, w_ih, w_hh, b_ih, b_hh, *state = tensors
        gates = products.run_fwd(x, w_ih, b_ih)
        y, last, kept = _forward(kind, gates, tuple(state), w_hh, b_hh, reverse, True)
        ctx.kind, ctx.reverse = kind, reverse
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, kept)
        return y, *last

    @staticmethod
    def backward(ctx: Any, dy: MaybeTensor, dc: MaybeTensor = None) -> tuple[Any, ...]:
        kind, reverse = ctx.kind, ctx.reverse
        *tensors, y, kept = ctx.saved_tensors
        if dy is None and dc is None:
            return (None,) * (2 + len(tensors))
        dy = torch.zeros_like(y) if dy is None else dy
        if torch.is_grad_enabled() or not direct(dy, dc, *tensors):
            return None, None, *_composed_gradients(kind, reverse, tensors, dy, dc)
        x, w_ih, w_hh, _, _, h, *_ = tensors
        need_x, need_w_ih, need_w_hh, need_b_ih, need_b_hh = ctx.needs_input_grad[2:7]
        dstate: list[Tensor]
        if kind is LSTM:
            dgates, *dstate = _lstm_bwd(dy, dc, w_hh, tensors[-1], kept, reverse)
            dproduct = dgates
        else:
            dgates, dproduct, *dstate = _gru_bwd(dy, w_hh, h, y, kept, reverse)
        dx = products.run_dgrad(dgates, w_ih) if need_x else None
        dw_ih = dw_hh = db_ih = db_hh = None
        if need_w_ih or need_b_ih:
            dw_ih, db_ih = products.run_wgrad(dgates, x, need_b_ih)
        if need_w_hh or need_b_hh:
            dw_hh, db_hh = products.run_wgrad(dproduct, _before(h, y, reverse), need_b_hh)
        found = dx, dw_ih, dw_hh, db_ih, db_hh, *dstate
        return None, None, *(t if need else None for t, need in zip(found, ctx.needs_input_grad[2:]))


# The quick way past Function.apply: see ops/autograd.py.
_apply: Callable[..., Any] = super(Function, _Layer).apply


def _composed(kind: Kind, reverse: bool, *tensors: Any) -> tuple[Tensor, ...]:
    x, w_ih, w_hh, b_ih, b_hh, *state = tensors
    gates = T.linear(x, w_ih, b_ih)
    y, last = by_steps(kind.cell, gates, tuple(state), lambda h: T.linear(h, w_hh, b_hh), None, reverse)
    return y, *last[1:]


def _composed_gradients(
    kind: Kind, reverse: bool, tensors: list[Any], dy: Tensor, dc: MaybeTensor
) -> tuple[MaybeTensor, ...]:
    """Gradients that have derivatives themselves, or of tensors that no kernel takes."""
    places = [i for i, t in enumerate(tensors) if t is not None]

    def layer(*given: Tensor) -> tuple[Tensor, ...]:
        operands: list[MaybeTensor] = [None] * len(tensors)
        for i, t in zip(places, given):
            operands[i] = t
        return _composed(kind, reverse, *operands)

    pull: Any = torch.func.vjp(layer, *(tensors[i] for i in places))[1]
    incoming = (dy,) if kind is GRU else (dy, torch.zeros_like(tensors[-1]) if dc is None else dc)
    found: list[MaybeTensor] = [None] * len(tensors)
    for i, t in zip(places, pull(incoming)):
        found[i] = t
    return tuple(found)


def layer(
    kind: Kind,
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[MaybeTensor, MaybeTensor],
    state: State,
    reverse: bool,
) -> tuple[Tensor, State]:
    """y (L, B, H) and the last state of one layer in one direction over x (L, B, inputs), on checked arguments of one dtype."""
    tensors = x, *weights, *biases, *state
    rest: tuple[Tensor, ...]
    how = way(*tensors)
    if how is KERNEL:
        gates = products.run_fwd(x, weights[0], biases[0])
        y, rest, _ = _forward(kind, gates, state, weights[1], biases[1], reverse, False)
    elif how is FUNCTION:
        y, *rest = _apply(kind, reverse, *tensors)
    elif how is OP:
        gates = products.linear(x, weights[0], biases[0])
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        y, *rest, _ = getattr(_ops, f"{kind.name}_fwd")(gates, *state, weights[1], biases[1], reverse, keep)
    else:
        y, *rest = _composed(kind, reverse, *tensors)  # type: ignore[assignment]
    return y, (y[0 if reverse else -1], *rest)
