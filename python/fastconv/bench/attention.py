"""Attention as a bench case: one layout, a forward or a backward, and peak memory is what nobody stores."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastconv.bench.cases import Call, Layer
from fastconv.bench.shapes import SdpaShape

_SEEN = 0.75  # share of the keys that a query sees under a boolean mask of the bench


def torch_math(*operands: Any, **options: Any) -> Tensor:
    """torch's attention by three operations, which stores the scores: its other way on a CPU beside flash."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*operands, **options)


@dataclass
class Sdpa(Layer):
    """(B, H, L, E) in memory, which is called nchw here because its torch contestant is the plain one."""

    problem: SdpaShape = field(kw_only=True)
    measures_memory: ClassVar[bool] = True

    @property
    def family(self) -> str:
        p = self.problem
        masked = "masked " if p.mask else ""
        return "decode" if p.q == 1 else "causal attention" if p.causal else f"{masked}attention"

    @property
    def layouts(self) -> tuple[str, ...]:
        return ("nchw",)

    @property
    def kernel_ops(self) -> tuple[str, ...]:
        return (f"sdpa_{self.direction}",)

    @property
    def flops(self) -> float:
        """Two products forward, five backward (the scores are computed again); of a causal mask what it leaves, of others all."""
        p = self.problem
        seen = sum(min(i + 1, p.k) for i in range(p.q)) if p.causal else p.q * p.k
        products = p.d + p.v if self.direction == "fwd" else 3 * p.d + 2 * p.v
        return 2.0 * p.n * p.h * seen * products

    @property
    def moved(self) -> int:
        p = self.problem
        forward = p.n * (p.h * p.q + p.g * p.k) * (p.d + p.v)
        return (forward if self.direction == "fwd" else 2 * forward + p.n * p.h * p.q * p.v) * self.itemsize

    @property
    def error_bound(self) -> float:
        """A weighted mean of k values has 1 / sqrt(k) of their size, and the weights are off by the scores' rounding.

        What is stored in a half is rounded: forward the result, backward also the result of the forward pass, which it reads.
        """
        p = self.problem
        roundings = 1 if self.direction == "fwd" else 2
        return 4 * self._sum_bound(p.d + p.v) + self._sum_bound(p.k) + roundings * self._storing

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        p = self.problem
        shapes = (p.n, p.h, p.q, p.d), (p.n, p.g, p.k, p.d), (p.n, p.g, p.k, p.v), (p.n, p.h, p.q, p.v)
        return tuple(self._random(*shape, key=key) for key, shape in enumerate(shapes, 1))

    @cached_property
    def _mask(self) -> Tensor | None:
        """bool and float have a number for each score, padding hides the last quarter of the keys from all queries."""
        p = self.problem
        if not p.mask:
            return None
        if p.mask == "padding":
            return (torch.arange(p.k) < -(-3 * p.k // 4)).expand(p.n, 1, 1, p.k)
        scores = self._random(p.n, p.h, p.q, p.k, key=5)
        return scores if p.mask == "float" else scores < float(torch.special.ndtri(torch.tensor(_SEEN)))

    def _inputs(self, layout: str) -> tuple[Tensor, ...]:
        q, k, v, dout = self._tensors
        return q, k, v.clone().requires_grad_(self.records_gradient), dout

    def math_call(self, layout: str) -> Call:
        return self._call(SimpleNamespace(scaled_dot_product_attention=torch_math), *self._inputs(layout))

    def _call(self, functional: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Call:
        attention, p, mask = functional.scaled_dot_product_attention, self.problem, self._mask
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        options = {"attn_mask": mask, "is_causal": p.causal, "enable_gqa": p.g != p.h}
        if self.direction == "fwd":
            return lambda: attention(q, k, v, **options)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            out = attention(*leaves, **options)
        return lambda: torch.cat([t.flatten() for t in torch.autograd.grad(out, leaves, dout, retain_graph=True)])

    @cached_property
    def truth(self) -> Tensor:
        out: Tensor = self._call(F, *(t.double() for t in self._tensors))()
        return out
