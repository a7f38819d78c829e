"""From shapes and strides to a cached plan: which kernel answers a problem, and what it needs.

Nothing here knows torch: operands arrive as tuples and addresses, so that `fastconv.numpy` shares the plans with the torch
ops. An op keeps one recipe for each combination of shapes, strides and options (see `cached`), and a recipe holds a `Plan`.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from . import _native

if TYPE_CHECKING:
    from . import _C

    Problem = (
        _C.Conv2dProblem
        | _C.Pool2dProblem
        | _C.SdpaProblem
        | _C.NormProblem
        | _C.BatchNormProblem
        | _C.RecurrentProblem
    )
else:
    _C = _native.load()

Shape = tuple[int, ...]
F = TypeVar("F", bound=Callable[..., Any])

# Recipes kept for each op. A recipe and its key take about 2 kB, and a large detector meets some hundred problems.
CACHE_SIZE = 1024

OPS = (
    "conv2d_fwd",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "max_pool2d_fwd",
    "max_pool2d_bwd",
    "avg_pool2d_fwd",
    "avg_pool2d_bwd",
    "sdpa_fwd",
    "sdpa_bwd",
    "layer_norm_fwd",
    "layer_norm_bwd",
    "batch_norm_fwd",
    "batch_norm_bwd",
    "lstm_fwd",
    "lstm_bwd",
    "gru_fwd",
    "gru_bwd",
)


# ---- What the user asked for: forced kernels and accuracy -----------------------------------------------------------------


def parse_force(text: str) -> dict[str, str]:
    """`conv2d_fwd=im2col,max_pool2d_fwd=avx2` as a dict. Raises ValueError where an item is not `op=choice`."""
    forced = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, equals, choice = (part.strip() for part in item.partition("="))
        if not equals or not choice:
            raise ValueError(f"FASTCONV_FORCE: got '{item}', expected op=algorithm, op=target or op=full.kernel.name")
        check_op(op)
        forced[op] = choice
    return forced


def check_op(op: str) -> None:
    """Raises ValueError, with the names there are, where `op` is not one of `OPS`."""
    if op not in OPS:
        raise ValueError(f"unknown op '{op}', expected one of {', '.join(OPS)}")


_environment: Mapping[str, str] = parse_force(os.environ.get("FASTCONV_FORCE", ""))

# Choices by op, in this context only (thread or task). Read at every call, so it is a plain dict that nobody mutates.
forced: ContextVar[Mapping[str, str]] = ContextVar("fastconv_forced", default=_environment)

# True: never a kernel whose error grows faster than a plain sum's.
strict = False


# ---- Plans ----------------------------------------------------------------------------------------------------------------


# The device of operands on the CPU; those of a GPU have its number.
CPU = -1

Question = tuple[
    str, Any, int, str, bool, int
]  # op, problem, threads, forced kernel, strict, device: what _C.plan and _C.explain take


class Plan:
    """One problem with the kernel chosen for it.

    `execute(*addresses)` runs it, with its operands in the order of `_C.Plan.run_conv2d`, `run_pool2d`, `SdpaArgs`,
    `NormArgs`, `BatchNormArgs` or `RecurrentArgs`, the workspace left out: the compiled module has scratch memory of its own
    for each thread.
    """

    __slots__ = ("dtype", "kernel", "native", "packed", "question", "run", "shapes", "workspace")

    def __init__(self, question: Question, native: _C.Plan, dtype: str, shapes: tuple[Shape, ...]) -> None:
        self.question = question
        self.native = native
        self.kernel = native.kernel
        self.workspace = native.workspace
        self.packed: tuple[int, int] = native.packed  # see `PackedFilters` in csrc/core/kernel.h
        self.run: Callable[..., None] = native.run_pool2d if "pool" in question[0] else native.run_conv2d
        if question[0].startswith("sdpa"):
            self.run = lambda *addresses: native.run_sdpa(addresses)
        elif question[0].startswith("layer_norm"):
            self.run = lambda *addresses: native.run_norm(addresses)
        elif question[0].startswith("batch_norm"):
            self.run = lambda *addresses: native.run_batch_norm(addresses)
        elif question[0].startswith(("lstm", "gru")):
            self.run = lambda *addresses: native.run_recurrent(addresses)
        self.dtype = dtype
        self.shapes = shapes

    def execute(self, *addresses: int) -> None:
        if _observers:
            self._watch(functools.partial(self.run, *addresses))
        else:
            self.run(*addresses)

    def start(self, run: Callable[[], None]) -> None:
        """`run()`, which executes this plan, where observers see it."""
        if _observers:
            self._watch(run)
        else:
            run()

    def _watch(self, run: Callable[[], None]) -> None:
        questions = _questions.get()
        if questions is not None:
            questions.append((self.question, self.dtype, self.shapes))
            return
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin if self.question[5] == CPU else math.nan
        record = Record(self.question[0], self.kernel, self.shapes, self.dtype, self.question[2], seconds)
        for records in _observers:
            records.append(record)

    def __repr__(self) -> str:
        return f"Plan({self.kernel}, workspace={self.workspace})"


def native() -> Any:
    """The compiled module, for who makes plans of operands on another device."""
    return _C


_caches: list[Callable[[], None]] = []


def cached(make: F) -> F:
    """Keeps the last `CACHE_SIZE` results of `make`, whose arguments must be hashable and say all that the result depends on."""
    keeper = functools.lru_cache(maxsize=CACHE_SIZE)(make)
    _caches.append(keeper.cache_clear)
    return keeper  # type: ignore[return-value]


def clear() -> None:
    """Forgets every plan: for tests, and after something that a key does not hold has changed."""
    for cache_clear in _caches:
        cache_clear()
    _C.eager_clear()


def limit_isa(name: str) -> None:
    """Allows kernels for at most this instruction set, like FASTCONV_ISA: scalar, avx2, avx512, avx512_bf16; "" for all."""
    _C.set_isa_limit(name)
    clear()


def conv2d_problem(
    dtype: str,
    x: tuple[Shape, Shape],
    w: tuple[Shape, Shape],
    y: tuple[Shape, Shape],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
    frozen: bool = False,
) -> _C.Conv2dProblem:
    """Operands as (shape, strides): x (N, C, H, W), w (K, C/groups, R, S), y (N, K, P, Q). Padding: top, bottom, left, right.

    The bottom and right padding are what P and Q make of them. `frozen`: w stays what it is, so that costs leave out what a
    kernel does to it once.
    """
    (N, C, H, W), (K, _, R, S), (_, _, P, Q) = x[0], w[0], y[0]
    k, c, r, s = w[1]
    return _C.Conv2dProblem(
        dtype=dtype, N=N, C=C, H=H, W=W, K=K, R=R, S=S, P=P, Q=Q, groups=groups, stride=stride,
        pad=(padding[0], padding[2]), dilation=dilation, x=x[1], w=(K // groups * k, k, c, r, s), y=y[1],
        bias=bias, residual=residual, activation=activation, frozen=frozen,
    )  # fmt: skip


def pool2d_problem(
    dtype: str,
    x: tuple[Shape, Shape],
    y: tuple[Shape, Shape],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
    divisor_override: int = 0,
    count_include_pad: bool = True,
    adaptive: bool = False,
) -> _C.Pool2dProblem:
    """Operands as (shape, strides): x (N, C, H, W), y and the indices (N, C, P, Q). Padding: top, bottom, left, right."""
    (N, C, H, W), (_, _, P, Q) = x[0], y[0]
    return _C.Pool2dProblem(
        dtype=dtype, N=N, C=C, H=H, W=W, P=P, Q=Q, R=kernel[0], S=kernel[1], stride=stride, pad=padding, dilation=dilation,
        x=x[1], y=y[1], divisor_override=divisor_override, count_include_pad=count_include_pad, adaptive=adaptive,
    )  # fmt: skip


def sdpa_problem(
    dtype: str,
    operands: Mapping[str, tuple[Shape, Shape]],
    mask_kind: str,
    scale: float,
    band: tuple[int, int],
    softcap: float = 0.0,
    dropout: tuple[float, int] = (0.0, 0),
) -> _C.SdpaProblem:
    """Operands as (shape, strides): q (B, Hq, Lq, D), k, v (B, Hkv, Lkv, D or Dv), out, and where they are wanted mask (B, Hq,
    Lq, Lkv), bias (B, Hq, Lq + Lkv - 1), dout, dq, dk, dv.
    """
    (B, Hq, Lq, D), (_, Hkv, Lkv, _), (*_, Dv) = operands["q"][0], operands["k"][0], operands["v"][0]
    none = ((), (0, 0, 0, 0))
    strides = [operands.get(name, none)[1] for name in ("q", "k", "v", "out", "mask", "dout", "dq", "dk", "dv")]
    return _C.SdpaProblem(
        dtype=dtype, B=B, Hq=Hq, Hkv=Hkv, Lq=Lq, Lkv=Lkv, D=D, Dv=Dv, scale=scale, softcap=softcap, mask_kind=mask_kind,
        band=band, dropout=dropout[0], key=dropout[1], strides=strides[:5], gradient_strides=strides[5:],
        bias=operands["bias"][1] if "bias" in operands else None,
    )  # fmt: skip


def norm_problem(dtype: str, shape: tuple[int, int], eps: float) -> _C.NormProblem:
    """Rows (N, C), one after the other in memory."""
    return _C.NormProblem(dtype=dtype, N=shape[0], C=shape[1], eps=eps)


def batch_norm_problem(
    dtype: str,
    shape: tuple[int, int, int],
    channels_last: bool,
    training: bool,
    residual: bool,
    activation: str,
    eps: float,
) -> _C.BatchNormProblem:
    """Samples, channels and positions (N, C, P), which lie as (N, P, C) where channels are last and as (N, C, P) otherwise."""
    N, C, P = shape
    return _C.BatchNormProblem(
        dtype=dtype, N=N, C=C, P=P, channels_last=channels_last, training=training, residual=residual,
        activation=activation, eps=eps,
    )  # fmt: skip


def recurrent_problem(dtype: str, sizes: tuple[int, int, int], reverse: bool) -> _C.RecurrentProblem:
    """Sizes: steps, sequences, hidden units (L, B, H). `reverse`: the last step comes first."""
    L, B, H = sizes
    return _C.RecurrentProblem(dtype=dtype, L=L, B=B, H=H, reverse=reverse)


def make(
    op: str,
    problem: Problem,
    dtype: str,
    shapes: tuple[Shape, ...],
    threads: int,
    force: str,
    strict: bool,
    device: int = CPU,
) -> Plan:
    """A new plan, to be asked for in a `cached` function. Raises NotImplementedError, with reasons, where no kernel applies."""
    question: Question = (op, problem, threads, force, strict, device)
    shapes = tuple(tuple(shape) for shape in shapes)
    try:
        native = _C.plan(*question)
    except NotImplementedError:
        questions = _questions.get()
        if questions is not None:
            questions.append((question, dtype, shapes))
        raise
    made = Plan(question, native, dtype, shapes)
    if os.environ.get("FASTCONV_LOG", "0") not in ("", "0"):
        costs = _C.explain(op, problem, force, strict, device)
        cost = next(cost for name, _, cost in costs if name == made.kernel)
        place = f"{threads} threads" if device == CPU else f"GPU {device}"
        sizes = " ".join("x".join(map(str, shape)) for shape in shapes)
        print(f"fastconv: {op} {sizes}: {made.kernel}, {cost * 1e6:.1f} us predicted, {place}", file=sys.stderr)
    return made


# ---- Memory formats -------------------------------------------------------------------------------------------------------


def strides_of(shape: Shape, channels_last: bool) -> Shape:
    """Strides of a dense (N, C, H, W) tensor, as torch.empty gives them: in plain order none is 0, even where a size is."""
    _, C, H, W = shape
    if channels_last:
        return (H * W * C, 1, W * C, C)
    C, H, W = max(C, 1), max(H, 1), max(W, 1)
    return (C * H * W, H * W, W, 1)


def is_dense(shape: Shape, strides: Shape, channels_last: bool) -> bool:
    """Whether the elements lie in that order without a gap. The stride of a dimension of size 1 says nothing."""
    return all(
        size == 1 or stride == want for size, stride, want in zip(shape, strides, strides_of(shape, channels_last))
    )


def prefers_channels_last(shape: Shape, strides: Shape) -> bool:
    """What torch reads from strides (`suggest_memory_format`): is this 4-D tensor meant as channels_last?

    Strides alone are ambiguous where a size is 1; torch settles that by walking C, W, H, N and asking that strides grow, with
    C = 1 in plain order and N111 counted as contiguous.
    """
    if strides[1] == 0:
        return False
    smallest = 0
    for dim in (1, 3, 2, 0):
        if shape[dim] == 0 or strides[dim] < smallest:
            return False
        if dim == 0 and smallest == strides[1]:
            return False
        smallest = strides[dim] * max(shape[dim], 1)
    return True


# ---- Watching -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One executed kernel: its op, full name, the operands' shapes (x, w, y; for pooling x, y), dtype, threads, seconds.

    Seconds are NaN for a GPU's kernel, which a call starts and does not wait for.
    """

    op: str
    kernel: str
    shapes: tuple[Shape, ...]
    dtype: str
    threads: int
    seconds: float


_observers: list[list[Record]] = []


@contextmanager
def observe() -> Iterator[list[Record]]:
    """Yields a list to which every kernel executed in this process, in whatever thread, is appended while the block runs."""
    records: list[Record] = []
    _observers.append(records)
    try:
        yield records
    finally:
        # By identity: two empty lists are equal.
        _observers[:] = [other for other in _observers if other is not records]


Asked = tuple[Question, str, tuple[Shape, ...]]

_questions: ContextVar[list[Asked] | None] = ContextVar("fastconv_questions", default=None)


@contextmanager
def rehearse() -> Iterator[list[Asked]]:
    """Yields a list to which every problem met in this thread is appended, with its dtype and shapes. No kernel runs meanwhile:
    outputs hold whatever was in their memory.
    """
    asked: list[Asked] = []
    token = _questions.set(asked)
    with observe():
        try:
            yield asked
        finally:
            _questions.reset(token)
