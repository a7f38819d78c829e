"""Layer norm as a bench case: rows one after the other, no arithmetic to speak of, so bytes are what counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv.bench.cases import Call, Layer
from fastconv.bench.shapes import NormShape


@dataclass
class LayerNorm(Layer):
    """One layout, which is called nchw here because its torch contestant is the plain one."""

    problem: NormShape = field(kw_only=True)

    @property
    def family(self) -> str:
        return "layer norm"

    @property
    def layouts(self) -> tuple[str, ...]:
        return ("nchw",)

    @property
    def kernel_ops(self) -> tuple[str, ...]:
        return (f"layer_norm_{self.direction}",)

    @property
    def flops(self) -> float:
        return 0.0

    @property
    def moved(self) -> int:
        """x and y, or x, dy and dx; the rest is as small as a row."""
        return (2 if self.direction == "fwd" else 3) * self.problem.m * self.problem.c * self.itemsize

    @property
    def error_bound(self) -> float:
        """Sums over a row, twice; backward over all rows too, and rows' sums enter a difference."""
        p = self.problem
        return self._sum_bound(p.c) + (self._sum_bound(p.m) if self.direction == "bwd" else 0)

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        m, c = self.problem.m, self.problem.c
        gamma, beta = 1 + self._random(c, scale=0.1, key=2), self._random(c, scale=0.1, key=3)
        return self._random(m, c, key=1), gamma, beta, self._random(m, c, key=4)

    def _inputs(self, layout: str) -> tuple[Tensor, ...]:
        x, gamma, beta, dy = self._tensors
        return x, gamma.clone().requires_grad_(self.records_gradient), beta, dy

    def _call(self, functional: Any, x: Tensor, gamma: Tensor, beta: Tensor, dy: Tensor) -> Call:
        norm, shape = functional.layer_norm, (self.problem.c,)
        if self.direction == "fwd":
            return lambda: norm(x, shape, gamma, beta)
        leaves = [t.detach().requires_grad_() for t in (x, gamma, beta)]
        with torch.enable_grad():
            y = norm(leaves[0], shape, *leaves[1:])
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    def checked(self, call: Call) -> Tensor:
        """The result, or all three gradients in one vector, sums over m rows divided by √m: to the size of the others."""
        out = call()
        if isinstance(out, Tensor):
            return out
        dx, dgamma, dbeta = out
        return torch.cat([dx.flatten(), dgamma / math.sqrt(self.problem.m), dbeta / math.sqrt(self.problem.m)])

    @cached_property
    def truth(self) -> Tensor:
        return self.checked(self._call(F, *(t.double() for t in self._tensors)))
