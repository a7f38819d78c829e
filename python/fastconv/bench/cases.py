"""What is timed: one problem with its inputs, its calls on fastconv and on torch, and the truth to check both against.

A case is one pass (forward or a gradient) of one op at one shape. Calls take a layout, ``nchw`` or ``nhwc`` (torch's
contiguous and channels_last), and return closures that hold their inputs, so that nothing but the op itself is inside
the timed region.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import fastconv.functional
from fastconv._fused import frozen_linear
from fastconv.bench.shapes import BatchNormShape, ConvTransposeShape, LinearShape, NormShape, SdpaShape, Shape, short
from fastconv.ops._dispatch import computed_in
from fastconv.ops._packed import PackedFilters
from fastconv.testing.problems import ConvCase, PoolCase

MEMORY_FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
POOLS = ("max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d")
FREEZABLE = ("conv2d", "linear")
"""Ops whose weights `fastconv.fuse` freezes."""

PASSES = dict.fromkeys((*FREEZABLE, "conv_transpose2d"), ("fwd", "dgrad", "wgrad")) | dict.fromkeys(
    (*POOLS, "sdpa", "layer_norm", "batch_norm"), ("fwd", "bwd")
)
"""Public op to the passes it can be timed in."""

# Below this many operations a byte, a case is read as moving memory, and the copy bandwidth is measured beside it.
_BANDWIDTH_INTENSITY = 8.0

Call = Callable[[], Any]


@dataclass
class Case(ABC):
    """One pass of one public op.

    ``labels`` are the layers of a model that ask for it, empty for a shape typed by hand. ``records_gradient``: the
    forward is timed while autograd records it. ``repeatable``: two calls give the same bits (a training step changes
    the weights).
    """

    op: str
    direction: str
    dtype: str = "f32"
    seed: int = 0
    labels: list[str] = field(default_factory=list)
    records_gradient: bool = False
    repeatable: bool = True

    @property
    @abstractmethod
    def name(self) -> str:
        """The shape string."""

    @property
    @abstractmethod
    def family(self) -> str:
        """Group of the summary it counts for."""

    @property
    @abstractmethod
    def kernel_ops(self) -> tuple[str, ...]:
        """The ops of ``kernels.def`` that run inside, and whose kernels are forced for this case."""

    @property
    @abstractmethod
    def flops(self) -> float:
        """Operations of the direct algorithm, taps on padding included; 0 where bytes are what counts."""

    @property
    @abstractmethod
    def moved(self) -> int:
        """Bytes that must be read and written at least once; 0 if unknown."""

    @property
    def may_wait_for_memory(self) -> bool:
        """Whether moving the bytes may take as long as the operations, so that a copy is timed beside it."""
        return bool(self.moved) and self.flops / self.moved < _BANDWIDTH_INTENSITY

    @property
    @abstractmethod
    def error_bound(self) -> float:
        """Largest relative L2 error against float64 that rounding explains, at an algorithm with error_growth 1."""

    @abstractmethod
    def fastconv_call(self, layout: str) -> Call: ...

    @abstractmethod
    def torch_call(self, layout: str) -> Call: ...

    def compiled_call(self, layout: str) -> Call:
        """torch.compile's contestant. NotImplementedError where there is nothing to compile."""
        raise NotImplementedError(f"torch.compile is not timed on {self.op} {self.direction}")

    def math_call(self, layout: str) -> Call:
        """torch's attention that stores the scores. NotImplementedError for all but attention."""
        raise NotImplementedError(f"torch_math is not timed on {self.op} {self.direction}")

    def engine_call(self, engine: str, threads: int) -> Call:
        """The contestant of one of ``engines.ENGINES``. NotImplementedError for all but whole networks in f32."""
        raise NotImplementedError(f"{engine} is not timed on {self.op} {self.direction}")

    @cached_property
    @abstractmethod
    def truth(self) -> Tensor:
        """The checked part of the result in float64."""

    def checked(self, call: Call) -> Tensor:
        """Runs a contestant's call and returns the part of its result that ``truth`` covers."""
        out: Tensor = call()
        return out

    def allowed_error(self, torch_errors: Sequence[float]) -> float:
        """The bound beside contestants of torch's that have these relative L2 errors; there may be none."""
        return self.error_bound

    # How far the largest error, in units of the truth's root mean square, may be above the bound of the L2 error: a single
    # wrong element must not hide among a million right ones, whose largest is 5 if they are normal.
    max_over_l2: ClassVar[float] = 20.0

    # Whether peak memory is measured: where one contestant stores what another does not.
    measures_memory: ClassVar[bool] = False

    @property
    def layouts(self) -> tuple[str, ...]:
        return tuple(MEMORY_FORMATS)

    @property
    def count(self) -> int:
        """How often a model runs this case; 1 for a shape typed by hand."""
        return max(1, len(self.labels))

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def _random(self, *size: int, scale: float = 1.0, key: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 8 + key)
        return torch.randn(*size, generator=generator, dtype=torch.float64).mul_(scale).to(DTYPES[self.dtype])

    def _sum_bound(self, terms: int) -> float:
        """Rounding of a plain sum of random terms walks to 0.2·eps·√terms of the sum; five times that is a fault."""
        return float(torch.finfo(computed_in(DTYPES[self.dtype])).eps) * (2 + math.sqrt(terms))

    @property
    def _storing(self) -> float:
        """Rounding of what is stored in a half, which is computed in float32: at most half a unit in the last place."""
        stored = DTYPES[self.dtype]
        return 0.0 if computed_in(stored) is stored else float(torch.finfo(stored).eps) / 2


@dataclass
class Layer(Case):
    """A case with one problem and inputs drawn for it.

    ``frozen``: fastconv has been told that the weights stay, as `fastconv.fuse` tells it, and keeps them packed.
    """

    problem: Any = field(kw_only=True)
    frozen: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        return short(self.problem)

    @abstractmethod
    def _inputs(self, layout: str) -> tuple[Any, ...]: ...

    @abstractmethod
    def _call(self, functional: Any, *inputs: Any) -> Call: ...

    def fastconv_call(self, layout: str) -> Call:
        return self._call(fastconv.functional, *self._inputs(layout))

    def torch_call(self, layout: str) -> Call:
        return self._call(F, *self._inputs(layout))

    def compiled_call(self, layout: str) -> Call:
        if self.direction != "fwd":
            return super().compiled_call(layout)
        call: Call = torch.compile(self.torch_call(layout))
        return call


def gradient_call(forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Call:
    """The gradient for ``x`` alone, through autograd, of a forward that is run once, here."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        y = forward(leaf)
    return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]


@dataclass
class Pool(Layer):
    problem: PoolCase = field(kw_only=True)

    @property
    def family(self) -> str:
        return self.op.removesuffix("2d").replace("_", " ")

    @property
    def kernel_ops(self) -> tuple[str, ...]:
        return (f"{self.op.removeprefix('adaptive_')}_{self.direction}",)

    @property
    def flops(self) -> float:
        return 0.0

    @property
    def moved(self) -> int:
        x, y = math.prod(self.problem.x_shape), math.prod(self.problem.y_shape)
        indices = 8 * y if self.kernel_ops == ("max_pool2d_bwd",) else 0
        return (x + y) * self.itemsize + indices

    @property
    def error_bound(self) -> float:
        """A maximum is exact; everything else here is a short sum."""
        if self.kernel_ops == ("max_pool2d_fwd",):
            return 0.0
        p = self.problem
        return self._sum_bound(p.R * p.S if p.adaptive is None else -(-p.H // p.P) * -(-p.W // p.Q))

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        return self._random(*self.problem.x_shape, key=1), self._random(*self.problem.y_shape, key=2)

    def _call(self, functional: Any, x: Tensor, dy: Tensor) -> Call:
        p, function = self.problem, getattr(functional, self.op)
        args: tuple[Any, ...] = (p.adaptive,)
        if p.adaptive is None:
            args = ((p.R, p.S), p.stride, p.pad4[::2])
            args += (p.dilation, p.ceil) if self.op == "max_pool2d" else (p.ceil, p.include_pad, p.divisor or None)
        if self.direction == "bwd":
            return gradient_call(lambda t: function(t, *args), x, dy)
        return lambda: function(x, *args)

    def _inputs(self, layout: str) -> tuple[Tensor, Tensor]:
        x, dy = (t.clone(memory_format=MEMORY_FORMATS[layout]) for t in self._tensors)
        return x.requires_grad_(self.records_gradient), dy

    @cached_property
    def truth(self) -> Tensor:
        x, dy = (t.double() for t in self._tensors)
        out: Tensor = self._call(F, x, dy)()
        return out


@dataclass
class Linear(Layer):
    """A Linear has one layout, which is called nchw here because its torch contestant is the plain one."""

    problem: LinearShape = field(kw_only=True)

    @property
    def family(self) -> str:
        return "linear"

    @property
    def layouts(self) -> tuple[str, ...]:
        return ("nchw",)

    @property
    def kernel_ops(self) -> tuple[str, ...]:
        return (f"conv2d_{self.direction}",)

    @property
    def flops(self) -> float:
        return 2.0 * self.problem.m * self.problem.i * self.problem.o

    @property
    def moved(self) -> int:
        m, i, o = self.problem.m, self.problem.i, self.problem.o
        return (m * i + i * o + m * o) * self.itemsize

    @property
    def error_bound(self) -> float:
        terms = {"fwd": self.problem.i, "dgrad": self.problem.o, "wgrad": self.problem.m}[self.direction]
        return self._sum_bound(terms) + self._storing

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        m, i, o = self.problem.m, self.problem.i, self.problem.o
        return (self._random(m, i, key=1), self._random(o, i, scale=i**-0.5, key=2), self._random(m, o, key=3))

    def _call(self, functional: Any, x: Tensor, w: Tensor, dy: Tensor) -> Call:
        linear = functional.linear
        if self.direction == "dgrad":
            return gradient_call(lambda t: linear(t, w), x, dy)
        if self.direction == "wgrad":
            return gradient_call(lambda t: linear(x, t), w, dy)
        return lambda: linear(x, w)

    def _inputs(self, layout: str) -> tuple[Tensor, ...]:
        x, w, dy = self._tensors
        return x, w.clone().requires_grad_(self.records_gradient), dy

    def fastconv_call(self, layout: str) -> Call:
        if not self.frozen:
            return super().fastconv_call(layout)
        (x, w, _), kept = self._inputs(layout), PackedFilters()
        return lambda: frozen_linear(x, w, None, kept)

    @cached_property
    def truth(self) -> Tensor:
        x, w, dy = (t.double() for t in self._tensors)
        out: Tensor = self._call(F, x, w, dy)()
        return out


def make(op: str, shape: Shape, direction: str, **common: Any) -> Case:
    """The case of a public op. ValueError if the op has no such pass, or nothing that could be frozen in it."""
    if direction not in PASSES[op]:
        raise ValueError(f"{op} has the passes {', '.join(PASSES[op])}, got {direction!r}")
    if common.get("frozen") and (op not in FREEZABLE or direction != "fwd"):
        raise ValueError(f"weights are frozen in the forward of {' and '.join(FREEZABLE)}, got {op} {direction}")
    if isinstance(shape, (ConvCase, ConvTransposeShape)):
        from fastconv.bench.convolutions import Conv, ConvTranspose

        if isinstance(shape, ConvCase):
            return Conv(op, direction, **common, problem=shape)
        return ConvTranspose(op, direction, **common, problem=shape)
    if isinstance(shape, PoolCase):
        return Pool(op, direction, **common, problem=shape)
    if isinstance(shape, SdpaShape):
        from fastconv.bench.attention import Sdpa

        return Sdpa(op, direction, **common, problem=shape)
    if isinstance(shape, NormShape):
        from fastconv.bench.norms import LayerNorm

        return LayerNorm(op, direction, **common, problem=shape)
    if isinstance(shape, BatchNormShape):
        from fastconv.bench.norms import BatchNorm

        return BatchNorm(op, direction, **common, problem=shape)
    return Linear(op, direction, **common, problem=shape)
