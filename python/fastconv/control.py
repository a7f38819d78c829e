"""What a user may ask of the kernels: which there are, which one runs and why, and to run another."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from . import _gpu, _native, plan

if TYPE_CHECKING:
    from . import _C
else:
    _C = _native.load()


def kernels(op: str | None = None) -> list[_C.KernelInfo]:
    """Every kernel that was built, or those of one op: objects with name, op, algorithm, dtype, target, runnable, why_not ("" if
    it runs here) and error_growth (worst rounding error, where a plain sum's is 1). The first `runnable` or `why_not` of a GPU's
    kernel starts the driver. Raises ValueError for an unknown op.
    """
    if op is not None:
        plan.check_op(op)
    return [kernel for kernel in _C.kernels() if op is None or kernel.op == op]


def set_cuda(enabled: bool) -> None:
    """Whether `fastconv.functional`, the layers of `fastconv.nn` and what `convert` makes run CUDA tensors on our kernels.

    False, the default, leaves them to torch: those kernels are proven by emulation and have not been measured on a GPU
    (docs/cuda.md). For the whole process; code that torch.compile has traced keeps what was set then. `fastconv.cuda` calls the
    kernels in either case. Raises TypeError where `enabled` is no bool.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"set_cuda: got {enabled!r}, expected True or False")
    _gpu.enabled = enabled


def build_info() -> dict[str, Any]:
    """What was built (version, compiler, flags, targets, openmp, cuda and cuda_reason) and the machine it runs on (machine)."""
    return {**_C.build(), "machine": _C.machine()}


@contextlib.contextmanager
def use(**forced: str) -> Iterator[None]:
    """Forces a kernel for each named op while the block runs, in this thread (or asyncio task) only.

        with fastconv.use(conv2d_fwd="im2col", conv2d_dgrad="avx2"):
            y = fastconv.functional.conv2d(x, w)

    A choice is an algorithm, a target or a full kernel name; "" lifts a choice made outside. Blocks nest. Raises ValueError,
    with the names there are, for an unknown op or choice; a call whose problem the forced kernel rejects raises
    NotImplementedError with its reason.
    """
    for op, choice in forced.items():
        _check_choice(op, choice)
    token = plan.forced.set({**plan.forced.get(), **forced})
    try:
        yield
    finally:
        plan.forced.reset(token)


def _check_choice(op: str, choice: str) -> None:
    candidates = kernels(op)
    names = {name for k in candidates for name in (k.algorithm, k.target, k.name)}
    if choice and choice not in names:
        algorithms = sorted({k.algorithm for k in candidates})
        targets = sorted({k.target for k in candidates})
        raise ValueError(
            f"{op}: unknown kernel '{choice}', expected an algorithm ({', '.join(algorithms)}), a target "
            f"({', '.join(targets)}) or a full name from fastconv.kernels('{op}')"
        )


def set_accuracy(mode: Literal["fast", "strict"]) -> None:
    """With "strict", no kernel runs whose rounding error grows faster than a plain sum's (error_growth > 1); with "fast", the
    default, any may. For the whole process. Raises ValueError for another mode.
    """
    if mode not in ("fast", "strict"):
        raise ValueError(f"set_accuracy: got {mode!r}, expected 'fast' or 'strict'")
    plan.strict = mode == "strict"


@dataclass(frozen=True)
class Candidate:
    """A kernel and what became of it: verdict is "" or the reason why not, cost the predicted seconds."""

    name: str
    verdict: str
    cost: float


@dataclass(frozen=True)
class Explanation:
    """The kernels considered for one problem. `chosen` is the winner's full name, None where none applies."""

    op: str
    problem: str
    candidates: tuple[Candidate, ...]
    chosen: str | None

    def __str__(self) -> str:
        lines = [f"{self.op} {self.problem}"]
        width = max((len(c.name) for c in self.candidates), default=0)
        for c in sorted(self.candidates, key=lambda c: (c.verdict != "", 0.0 if c.verdict else c.cost)):
            mark = "*" if c.name == self.chosen else " "
            lines.append(f"{mark} {c.name:{width}}  " + (c.verdict or f"{c.cost * 1e6:12.2f} us predicted"))
        if self.chosen is None:
            lines.append("no kernel applies")
        return "\n".join(lines)


# op: the functional it belongs to, and the operand whose gradient it is ("" for the output).
_CALLS = {
    "conv2d_fwd": ("conv2d", ""),
    "conv2d_dgrad": ("conv2d", "input"),
    "conv2d_wgrad": ("conv2d", "weight"),
    "max_pool2d_fwd": ("max_pool2d", ""),
    "max_pool2d_bwd": ("max_pool2d", "input"),
    "avg_pool2d_fwd": ("avg_pool2d", ""),
    "avg_pool2d_bwd": ("avg_pool2d", "input"),
    "sdpa_fwd": ("scaled_dot_product_attention", ""),
    "sdpa_bwd": ("scaled_dot_product_attention", "query"),
    "layer_norm_fwd": ("layer_norm", ""),
    "layer_norm_bwd": ("layer_norm", "input"),
    "batch_norm_fwd": ("batch_norm", ""),
    "batch_norm_bwd": ("batch_norm", "input"),
}


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Why a call runs the kernel it runs: every candidate with its verdict and predicted time, `*` at the winner.

        print(fastconv.explain("conv2d_fwd", x, w, stride=2, padding=1))

    The arguments are those of `fastconv.functional.conv2d` (of `linear`, where the weight of a convolution's op is a matrix),
    `max_pool2d`, `avg_pool2d`, `scaled_dot_product_attention`, `layer_norm` or `batch_norm`, for the gradients too: what is then
    explained is the backward pass of that call. No kernel runs. Choices by `use`, `set_accuracy` and the number of threads count.

    Raises ValueError for an unknown op, NotImplementedError for one that no function asks and for a call that torch answers, and
    what the call itself would raise.
    """
    plan.check_op(op)
    import torch

    from . import functional

    if op not in _CALLS:
        raise NotImplementedError(
            f"{op} is asked by fastconv.models' layers and by no function; its one algorithm takes all"
        )
    name, wanted = _CALLS[op]
    weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
    if name == "conv2d" and isinstance(weight, torch.Tensor) and weight.dim() == 2:
        name = "linear"
    call = getattr(functional, name)
    bound = inspect.signature(call).bind(*args, **kwargs)
    for key, value in bound.arguments.items():
        if isinstance(value, torch.Tensor):
            # A bias is part of the weight's gradient: the kernel sums it on the way.
            derive = key == wanted or (key == "bias" and wanted == "weight" and value.requires_grad)
            bound.arguments[key] = value.detach().requires_grad_(derive)
    with plan.rehearse() as asked, contextlib.suppress(NotImplementedError), torch.set_grad_enabled(wanted != ""):
        y = call(*bound.args, **bound.kwargs)
        if wanted:
            torch.autograd.backward(y, torch.empty_like(y))
    for question, dtype, shapes in asked:
        if question[0] == op:
            return _explained(question, dtype, shapes)
    raise NotImplementedError(
        f"{op}: this call asks no kernel of fastconv's; torch answers it, or there is nothing to compute"
    )


def _explained(question: plan.Question, dtype: str, shapes: tuple[plan.Shape, ...]) -> Explanation:
    op, problem, threads, force, strict, device = question
    try:
        chosen = plan.native().plan(*question).kernel
    except NotImplementedError:
        chosen = None
    place = f"{threads} threads" if device == plan.CPU else f"GPU {device}"
    return Explanation(
        op=op,
        problem=f"{', '.join('x'.join(map(str, shape)) for shape in shapes)}, {dtype}, {place}",
        candidates=tuple(Candidate(*row) for row in plan.native().explain(op, problem, force, strict, device)),
        chosen=chosen,
    )
