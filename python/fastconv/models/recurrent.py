"""LSTM and GRU on fastconv's kernels, with torch's parameters, options and results.

    Hochreiter, Schmidhuber: Long short-term memory, 1997
    Cho et al.: Learning phrase representations using RNN encoder-decoder, 2014

The inputs of all steps go through one matrix product, and all steps of a layer through one kernel (docs/kernels/recurrent.md).
Projections, halves and what transforms the call run step by step, on linear layers and torch's elementwise operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastconv import functional as F
from fastconv import nn as ours
from fastconv.fallback import note
from fastconv.models.layers import Layers
from fastconv.ops import recurrent as ops
from fastconv.ops._dispatch import DTYPES
from fastconv.ops._recurrent_composed import State, by_steps


def _direction(
    module: Any, x: Tensor, state: State, kind: ops.Kind, suffix: str, backwards: bool
) -> tuple[Tensor, State]:
    """One layer in one direction over x (L, B, inputs): outputs (L, B, outputs) and the last state."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    w_ih, w_hh, b_ih, b_hh, w_hr = (getattr(module, f"{name}_{suffix}", None) for name in names)
    assert w_ih is not None
    assert w_hh is not None
    if w_hr is None and _whole(x, w_ih, w_hh, b_ih, b_hh, *state):
        return ops.layer(kind, x, (w_ih, w_hh), (b_ih, b_hh), state, backwards)

    def recur(h: Tensor) -> Tensor:
        return F.linear(h, w_hh, b_hh)

    project = None if w_hr is None else lambda h: F.linear(h, w_hr)
    return by_steps(kind.cell, F.linear(x, w_ih, b_ih), state, recur, project, backwards)


def _whole(*tensors: Tensor | None) -> bool:
    """Whether one kernel takes all steps: CPU tensors of one dtype that it computes in, of which none is empty."""
    if torch.is_autocast_enabled("cpu"):
        return False
    first = tensors[0]
    assert first is not None
    return first.dtype in DTYPES and all(
        t is None or (t.is_cpu and t.dtype is first.dtype and t.numel() > 0) for t in tensors
    )


def _run(module: Any, input: Tensor, states: tuple[Tensor, ...], kind: ops.Kind) -> tuple[Tensor, list[State]]:
    """All layers and directions over input (L, B, inputs), from states each (layers·directions, B, ·)."""
    finals: list[State] = []
    x = input
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(2 if module.bidirectional else 1):
            start = tuple(state[len(finals)] for state in states)
            suffix = f"l{layer}" + "_reverse" * direction
            y, final = _direction(module, x, start, kind, suffix, direction == 1)
            outputs.append(y)
            finals.append(final)
        x = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
        if module.dropout and module.training and layer + 1 < module.num_layers:
            x = nn.functional.dropout(x, module.dropout)
    return x, finals


def _steps(module: Any, input: Tensor) -> tuple[Tensor, bool]:
    """The input as (L, B, inputs), and whether it came without a batch."""
    if input.dim() not in (2, 3):
        raise ValueError(f"{type(module).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    single = input.dim() == 2
    if single:
        return input[:, None], True
    return (input.transpose(0, 1) if module.batch_first else input), False


def _forward(
    module: Any, input: Tensor, given: tuple[Tensor, ...] | None, widths: tuple[int, ...], kind: ops.Kind
) -> Any:
    """Output and final states, in the shapes that torch's forward returns."""
    x, single = _steps(module, input)
    count = module.num_layers * (2 if module.bidirectional else 1)
    if x.shape[0] == 0:
        raise RuntimeError(f"{type(module).__name__}: Expected sequence length to be larger than 0 in RNN")
    if given is None:
        states = tuple(x.new_zeros((count, x.shape[1], width)) for width in widths)
    else:
        states = tuple(state[:, None] if single and state.dim() == 2 else state for state in given)
    # torch's own checks, which name what they got.
    module.check_forward_args(x if not module.batch_first else x.transpose(0, 1), _as_hidden(states), None)
    y, finals = _run(module, x, states, kind)
    last = tuple(torch.stack([final[i] for final in finals]) for i in range(len(widths)))
    if single:
        return y[:, 0], tuple(state[:, 0] for state in last)
    return y.transpose(0, 1) if module.batch_first else y, last


def _as_hidden(states: tuple[Tensor, ...]) -> Any:
    return states if len(states) == 2 else states[0]


def _packed(module: nn.Module, input: Any) -> bool:
    """Whether torch has to answer, said aloud: sequences of different lengths that were packed."""
    if isinstance(input, nn.utils.rnn.PackedSequence):
        note(type(module).__name__, "packed sequences")
        return True
    return False


class LSTM(nn.LSTM):
    """`torch.nn.LSTM` on fastconv's kernels: (L, B, inputs), or (B, L, inputs) with batch_first, to outputs, (h, c).

    All options of torch's; packed sequences go to torch. Raises what torch raises for shapes that do not fit.
    """

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        if _packed(self, input):
            return super().forward(input, hx)
        widths = self.proj_size or self.hidden_size, self.hidden_size
        return _forward(self, input, hx, widths, ops.LSTM)


class GRU(nn.GRU):
    """`torch.nn.GRU` on fastconv's kernels: (L, B, inputs), or (B, L, inputs) with batch_first, to outputs and h.

    All options of torch's; packed sequences go to torch. Raises what torch raises for shapes that do not fit.
    """

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        if _packed(self, input):
            return super().forward(input, hx)
        y, (h,) = _forward(self, input, None if hx is None else (hx,), (self.hidden_size,), ops.GRU)
        return y, h


def _on(layers: Layers) -> bool:
    return isinstance(layers.Linear, type) and issubclass(layers.Linear, ours.Linear)


def lstm(layers: Layers, *, input_size: int = 128, hidden_size: int = 256, **options: Any) -> nn.Module:
    """An LSTM on our kernels, torch's own where the namespace's layers are torch's. The options are those of torch.nn.LSTM."""
    return (LSTM if _on(layers) else nn.LSTM)(input_size, hidden_size, **options)


def gru(layers: Layers, *, input_size: int = 128, hidden_size: int = 256, **options: Any) -> nn.Module:
    """A GRU on our kernels, torch's own where the namespace's layers are torch's. The options are those of torch.nn.GRU."""
    return (GRU if _on(layers) else nn.GRU)(input_size, hidden_size, **options)


VARIANTS: dict[str, Callable[..., nn.Module]] = {"lstm": lstm, "gru": gru}
