"""LSTM and GRU as whole models: 128 steps in, the last step's output out, in inference and in training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import fastconv
from fastconv import models
from fastconv.bench.cases import DTYPES, Call
from fastconv.bench.networks import Network
from fastconv.models.layers import Layers

STEPS, INPUTS = 128, 128
# Gates of each unit.
GATES = {"lstm": 4, "gru": 3}


class LastOutput(nn.Module):
    """A recurrent layer whose last output (B, H) stands for the sequence (L, B, inputs)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.layer(x)[0][-1]
        return last


@dataclass
class RecurrentNetwork(Network):
    """A model of `GATES` at its own sizes. fastconv's contestant is the same model on its layers, with the same weights."""

    @property
    def layouts(self) -> tuple[str, ...]:
        return ("nchw",)

    def _created(self, layers: Layers) -> LastOutput:
        return LastOutput(models.create(self.model, layers=layers))

    @cached_property
    def _parts(self) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(self.seed)
        network = self._created(nn).to(DTYPES[self.dtype])
        x = self._random(STEPS, self.batch, INPUTS, key=1)
        return network, x, torch.arange(self.batch)

    @cached_property
    def flops(self) -> float:
        network: Any = self._parts[0]
        H: int = network.layer.hidden_size
        forward = 2.0 * STEPS * self.batch * GATES[self.model] * H * (INPUTS + H)
        return forward * (3 if self.direction == "train" else 1)

    def fastconv_call(self, layout: str) -> Call:
        def ours(twin: nn.Module) -> nn.Module:
            made = self._created(fastconv.nn).to(DTYPES[self.dtype])
            made.load_state_dict(twin.state_dict())
            return made

        return self._contestant(layout, ours)
