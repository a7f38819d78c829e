"""Layer norm and batch norm as bench cases: no arithmetic to speak of, so bytes are what counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv.bench.cases import MEMORY_FORMATS, Call, Layer
from fastconv.bench.shapes import BatchNormShape, NormShape


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


@dataclass
class BatchNorm(Layer):
    """In training, with what may follow it in one call of ours and in calls of their own in torch."""

    problem: BatchNormShape = field(kw_only=True)

    @property
    def family(self) -> str:
        p = self.problem
        return "batch norm" + ", addition" * p.residual + ", ReLU" * p.relu

    @property
    def kernel_ops(self) -> tuple[str, ...]:
        return (f"batch_norm_{self.direction}",)

    @property
    def flops(self) -> float:
        return 0.0

    @property
    def _size(self) -> tuple[int, int, int, int]:
        p = self.problem
        return p.n, p.c, p.h, p.w

    @property
    def moved(self) -> int:
        """x twice, as its statistics come first, residual and y; x and dy twice, dx, residual and its gradient."""
        images = 3 + self.problem.residual if self.direction == "fwd" else 5 + 3 * self.problem.residual
        return images * math.prod(self._size) * self.itemsize

    @property
    def error_bound(self) -> float:
        """A sum over all positions, twice."""
        return 2 * self._sum_bound(math.prod(self._size) // self.problem.c)

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        c = self.problem.c
        gamma, beta = 1 + self._random(c, scale=0.1, key=2), self._random(c, scale=0.1, key=3)
        return (*(self._random(*self._size, key=key) for key in (1, 4, 5)), gamma, beta)

    def _inputs(self, layout: str) -> tuple[Tensor, ...]:
        *images, gamma, beta = self._tensors
        placed = (t.clone(memory_format=MEMORY_FORMATS[layout]) for t in images)
        return *placed, gamma.clone().requires_grad_(self.records_gradient), beta

    def _forward(self, functional: Any, x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        more, p = [None, None, gamma, beta, True], self.problem
        if functional is not F:
            fused: dict[str, Any] = {"residual": residual} if p.residual else {}
            return functional.batch_norm(x, *more, **fused, activation="relu" if p.relu else "none")  # type: ignore[no-any-return]
        y = F.batch_norm(x, *more)  # type: ignore[arg-type]
        if p.residual:
            y += residual
        return F.relu(y, inplace=True) if p.relu else y

    def _call(self, functional: Any, x: Tensor, residual: Tensor, dy: Tensor, gamma: Tensor, beta: Tensor) -> Call:
        if self.direction == "fwd":
            return lambda: self._forward(functional, x, residual, gamma, beta)
        leaves = [t.detach().requires_grad_() for t in (x, gamma, beta, residual)][: 4 if self.problem.residual else 3]
        with torch.enable_grad():
            y = self._forward(functional, leaves[0], leaves[-1], leaves[1], leaves[2])
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    def checked(self, call: Call) -> Tensor:
        """The result, or the gradient of x."""
        out = call()
        return out if isinstance(out, Tensor) else out[0]

    @cached_property
    def truth(self) -> Tensor:
        return self.checked(self._call(F, *(t.double() for t in self._tensors)))
