"""Whole models that read text: tokens in, one layout, weights as they start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fastconv import models
from fastconv.bench.cases import DTYPES, Call
from fastconv.bench.networks import Inference, Network, counted_flops

# Tokens of a text: a paragraph, and what published CPU figures of these models take.
LENGTHS = {"gpt2": 128, "bert_base": 128}


@dataclass
class TextNetwork(Network):
    """A model of `LENGTHS` on a batch of random texts, for inference."""

    @property
    def layouts(self) -> tuple[str, ...]:
        return ("nchw",)

    @cached_property
    def _parts(self) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(self.seed)
        network = models.create(self.model, layers=nn).to(DTYPES[self.dtype]).eval()
        generator = torch.Generator().manual_seed(self.seed)
        # The vocabularies begin with tokens that stand for no word.
        tokens = torch.randint(1000, 30000, (self.batch, LENGTHS[self.model]), generator=generator)
        return network, tokens, torch.empty(0)

    @cached_property
    def flops(self) -> float:
        with torch.device("meta"):
            network = models.create(self.model, layers=nn).eval()
            tokens = torch.zeros(self.batch, LENGTHS[self.model], dtype=torch.int64)
        return counted_flops(network, tokens)

    def _contestant(
        self, layout: str, change: Callable[[nn.Module], nn.Module], dtype: torch.dtype | None = None
    ) -> Call:
        network, tokens, _ = self._parts
        return Inference(change(copy.deepcopy(network).to(dtype)), tokens)
