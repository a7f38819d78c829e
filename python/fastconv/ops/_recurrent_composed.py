"""Recurrent layers composed of torch's operations, step by step: what transforms and second derivatives take apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

State = tuple[Tensor, ...]
# One step: what the inputs give to the gates (B, G·H), the state, and a product with the recurrent weights.
Cell = Callable[[Tensor, State, Callable[[Tensor], Tensor]], State]


def lstm_cell(gates: Tensor, state: State, recur: Callable[[Tensor], Tensor]) -> State:
    """(h, c) of the next step. Gates in torch's order: input, forget, cell, output."""
    h, c = state
    enter, forget, new, out = (gates + recur(h)).chunk(4, 1)
    c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
    return out.sigmoid() * c.tanh(), c


def gru_cell(gates: Tensor, state: State, recur: Callable[[Tensor], Tensor]) -> State:
    """(h,) of the next step. Gates in torch's order: reset, update, new; reset is applied behind the product, as in cuDNN."""
    (h,) = state
    reset_x, update_x, new_x = gates.chunk(3, 1)
    reset_h, update_h, new_h = recur(h).chunk(3, 1)
    update = (update_x + update_h).sigmoid()
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (new + update * (h - new),)


def by_steps(
    cell: Cell,
    gates: Tensor,
    state: State,
    recur: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor] | None,
    reverse: bool,
) -> tuple[Tensor, State]:
    """Outputs (L, B, ·) and the last state of a layer in one direction. `project` is LSTM's, of each step's output."""
    outputs: list[Tensor] = []
    for step in reversed(gates.unbind(0)) if reverse else gates.unbind(0):
        state = cell(step, state, recur)
        if project is not None:
            state = project(state[0]), *state[1:]
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state
