"""Convolutions and transposed convolutions as cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastconv._fused import frozen_conv2d
from fastconv.bench.cases import MEMORY_FORMATS, Call, Layer, gradient_call
from fastconv.bench.shapes import ConvTransposeShape
from fastconv.ops._packed import PackedFilters
from fastconv.ops.conv2d import conv2d
from fastconv.testing.problems import ConvCase

# Work spent on one float64 truth: at the 20 to 40 GFLOP/s of torch's float64 convolution, a tenth to a fifth of a
# second.
_VERIFIED_FLOPS = 4e9


@dataclass
class _Weighted(Layer):
    """A layer of an image and filters, whose gradients are taken one at a time."""

    def _pass(self, forward: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, dy: Tensor) -> Call:
        """What the direction asks of a forward pass: itself, or a gradient as autograd gets it."""
        if self.direction == "dgrad":
            return gradient_call(lambda t: forward(t, w), x, dy)
        if self.direction == "wgrad":
            return gradient_call(lambda t: forward(x, t), w, dy)
        return lambda: forward(x, w)


@dataclass
class Conv(_Weighted):
    problem: ConvCase = field(kw_only=True)

    def __post_init__(self) -> None:
        self._geometry = [list(v) for v in (self.problem.stride, self.problem.pad4, self.problem.dilation)]
        self._symmetric = self.problem.pad4[::2] == self.problem.pad4[1::2]

    @property
    def family(self) -> str:
        p = self.problem
        strided = "" if p.stride == (1, 1) else " strided"
        dilated = "" if p.dilation == (1, 1) else " dilated"
        kind = "" if p.groups == 1 else "depthwise " if p.groups == p.C else "grouped "
        return f"{kind}{p.R}×{p.S}{strided}{dilated}"

    @property
    def kernel_ops(self) -> tuple[str, ...]:
        return (f"conv2d_{self.direction}",)

    @property
    def flops(self) -> float:
        return 2.0 * math.prod(self.problem.y_shape) * self.problem.terms("conv2d_fwd")

    @property
    def moved(self) -> int:
        p = self.problem
        return sum(math.prod(shape) for shape in (p.x_shape, p.w_shape, p.y_shape)) * self.itemsize

    @property
    def may_wait_for_memory(self) -> bool:
        """A 7×7 depthwise filter does 12 operations a byte, and still waits for memory where maps are large."""
        return self.problem.groups == self.problem.C > 1 or super().may_wait_for_memory

    @property
    def error_bound(self) -> float:
        return self._sum_bound(self.problem.terms(f"conv2d_{self.direction}"))

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        x = self._random(*p.x_shape, key=1)
        w = self._random(*p.w_shape, scale=p.terms("conv2d_fwd") ** -0.5, key=2)
        return x, w, self._random(*p.y_shape, key=3)

    @cached_property
    def _bias(self) -> Tensor | None:
        return self._random(self.problem.K, key=4) if self.problem.bias else None

    def _inputs(self, layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x, w, dy = (t.clone(memory_format=MEMORY_FORMATS[layout]) for t in self._tensors)
        return x, w.requires_grad_(self.records_gradient), dy, self._bias

    def fastconv_call(self, layout: str) -> Call:
        p, (x, w, dy, bias) = self.problem, self._inputs(layout)
        if self.frozen:
            kept, frozen = PackedFilters(), (p.stride, p.pad4, p.dilation, p.groups)
            return lambda: frozen_conv2d(x, w, bias, kept, frozen)
        if self._symmetric:
            return super().fastconv_call(layout)
        return self._pass(lambda x, w: conv2d(x, w, bias, p.stride, p.pad4, p.dilation, p.groups), x, w, dy)

    def _call(self, functional: Any, x: Tensor, w: Tensor, dy: Tensor, bias: Tensor | None) -> Call:
        """Either library's public function. torch has no four-sided padding: it pads a copy."""
        p = self.problem
        padding = p.pad4[::2] if self._symmetric else (0, 0)
        top, bottom, left, right = p.pad4

        def forward(x: Tensor, w: Tensor) -> Tensor:
            x = x if self._symmetric else F.pad(x, (left, right, top, bottom))
            y: Tensor = functional.conv2d(x, w, bias, p.stride, padding, p.dilation, p.groups)
            return y

        return self._pass(forward, x, w, dy)

    @cached_property
    def _part(self) -> list[int]:
        """The checked samples (fwd, dgrad) or filters (wgrad): first, last and what time allows between."""
        whole = self.problem.K if self.direction == "wgrad" else self.problem.N
        affordable = max(2, int(_VERIFIED_FLOPS / (self.flops / whole)))
        if whole <= affordable or (self.direction == "wgrad" and self.problem.groups > 1):
            return list(range(whole))
        return sorted({round(i * (whole - 1) / (affordable - 1)) for i in range(affordable)})

    def checked(self, call: Call) -> Tensor:
        out: Tensor = call()
        return out[self._part]

    @cached_property
    def truth(self) -> Tensor:
        x, w, dy = (t.double() for t in self._tensors)
        if self.direction != "wgrad":
            x, dy = x[self._part], dy[self._part]
        elif self.problem.groups == 1:
            w, dy = w[self._part], dy[:, self._part]
        out: Tensor = self._call(F, x, w, dy, None if self._bias is None else self._bias.double())()
        return out


@dataclass
class ConvTranspose(_Weighted):
    """A transposed convolution runs as the input gradient of the convolution with its weight, and that is its kernels' op."""

    problem: ConvTransposeShape = field(kw_only=True)

    @property
    def family(self) -> str:
        p = self.problem
        return f"transposed {p.R}×{p.S}, stride {p.stride[0] if p.stride[0] == p.stride[1] else p.stride}"

    @property
    def kernel_ops(self) -> tuple[str, ...]:
        return ({"fwd": "conv2d_dgrad", "dgrad": "conv2d_fwd", "wgrad": "conv2d_wgrad"}[self.direction],)

    @property
    def flops(self) -> float:
        p = self.problem
        return 2.0 * math.prod(p.x_shape) * (p.K // p.groups) * p.R * p.S

    @property
    def moved(self) -> int:
        p = self.problem
        return sum(math.prod(shape) for shape in (p.x_shape, p.w_shape, p.y_shape)) * self.itemsize

    @property
    def error_bound(self) -> float:
        p = self.problem
        meeting = -(-p.R // p.stride[0]) * -(-p.S // p.stride[1])  # taps that meet in a pixel of the result
        inputs, outputs = p.C // p.groups, p.K // p.groups
        terms = {"fwd": inputs * meeting, "dgrad": outputs * p.R * p.S, "wgrad": p.N * p.H * p.W}[self.direction]
        return self._sum_bound(terms)

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        scale = (p.C // p.groups * p.R * p.S / math.prod(p.stride)) ** -0.5
        return (
            self._random(*p.x_shape, key=1),
            self._random(*p.w_shape, scale=scale, key=2),
            self._random(*p.y_shape, key=3),
        )

    def _inputs(self, layout: str) -> tuple[Tensor, ...]:
        x, w, dy = (t.clone(memory_format=MEMORY_FORMATS[layout]) for t in self._tensors)
        return x, w.requires_grad_(self.records_gradient), dy

    def _call(self, functional: Any, x: Tensor, w: Tensor, dy: Tensor) -> Call:
        p = self.problem

        def forward(x: Tensor, w: Tensor) -> Tensor:
            y: Tensor = functional.conv_transpose2d(
                x, w, None, p.stride, p.padding, p.output_padding, p.groups, p.dilation
            )
            return y

        return self._pass(forward, x, w, dy)

    @cached_property
    def truth(self) -> Tensor:
        x, w, dy = (t.double() for t in self._tensors)
        out: Tensor = self._call(F, x, w, dy)()
        return out
