"""The calls that csrc/eager answers: the same bits as the way through Python, and everything that is not plain left alone.

Nearly every other test of the functional interface goes through csrc/eager too; here is what it does differently.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import fastconv
import fastconv.functional as F
from fastconv import plan
from fastconv.ops import _eager
from fastconv.ops._eager import native

LAST = torch.channels_last

needs_eager = pytest.mark.skipif(not _eager.connected, reason="this torch has no DLPack exchange API")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


# By op: the operands, and the call by both ways with options that are not the defaults.
OPERANDS: dict[str, Callable[[torch.dtype], list[Tensor]]] = {
    "conv2d": lambda d: [rand(2, 4, 7, 6, dtype=d), rand(6, 2, 3, 3, dtype=d), rand(6, dtype=d)],
    "linear": lambda d: [rand(3, 5, dtype=d), rand(4, 5, dtype=d), rand(4, dtype=d)],
    "max_pool2d": lambda d: [rand(2, 4, 7, 6, dtype=d)],
    "avg_pool2d": lambda d: [rand(2, 4, 7, 6, dtype=d)],
    "adaptive_avg_pool2d": lambda d: [rand(2, 4, 7, 6, dtype=d)],
}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "conv2d": ((2, 1), 1, (1, 1), 2),
    "linear": (),
    "max_pool2d": ((3, 2), 2, (1, 0), 1, True),
    "avg_pool2d": (3, None, 1, False, False),
    "adaptive_avg_pool2d": ((3, 2),),
}
OPS = list(OPERANDS)


def public(op: str, tensors: list[Tensor]) -> Tensor:
    y: Tensor = getattr(F, op)(*tensors, *OPTIONS[op])
    return y


def quick(op: str, tensors: list[Any], *options: Any) -> Any:
    """What csrc/eager says to a call: a tensor, or None."""
    return getattr(native, f"eager_{op}")(*tensors, *(options or OPTIONS[op]))


def slow(op: str, tensors: list[Tensor]) -> Tensor:
    """The way through Python: whoever observes the kernels keeps csrc/eager away."""
    with plan.observe() as records:
        y = public(op, tensors)
    assert records
    return y


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.stride() == b.stride()
    assert torch.equal(a, b)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=LAST) if t.dim() == 4 else t,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
    "every second": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "expanded": lambda t: t[:1].expand_as(t),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_same_bits(op: str, form: str, dtype: torch.dtype) -> None:
    tensors = [FORMATS[form](t) for t in OPERANDS[op](dtype)]
    for _ in range(2):  # when it is met for the first time, and known
        same(public(op, tensors), slow(op, tensors))


@needs_eager
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "offset", "parameter"])
def test_answers(op: str, form: str) -> None:
    assert quick(op, [FORMATS[form](t) for t in OPERANDS[op](torch.float32)]) is not None


@needs_eager
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_halves_are_for_linear(dtype: torch.dtype) -> None:
    tensors = OPERANDS["linear"](dtype)
    for _ in range(2):
        found = quick("linear", tensors)
        same(found, slow("linear", tensors))
    leaves = [t.requires_grad_() for t in tensors]
    y = public("linear", leaves)
    assert hasattr(y.grad_fn, "recipe")
    for ours, theirs in zip(*(torch.autograd.grad(f("linear", leaves), leaves, found) for f in (public, slow))):
        same(ours, theirs)
    for op in set(OPS) - {"linear"}:
        assert quick(op, OPERANDS[op](dtype)) is None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "transposed", "offset"])
def test_same_gradients(op: str, form: str) -> None:
    def gradients(way: Callable[[str, list[Tensor]], Tensor], watch: bool) -> list[Tensor]:
        tensors = [FORMATS[form](t).requires_grad_() for t in OPERANDS[op](torch.float32)]
        y = way(op, tensors)
        with plan.observe() if watch else nullcontext():
            return [y.detach(), *torch.autograd.grad(y, tensors, rand(*y.shape))]

    for _ in range(2):
        for ours, theirs in zip(gradients(public, False), gradients(slow, True)):
            same(ours, theirs)


@needs_eager
@pytest.mark.parametrize("op", OPS)
def test_recorded_by_the_functions_in_c(op: str) -> None:
    y = public(op, [t.requires_grad_() for t in OPERANDS[op](torch.float32)])
    assert hasattr(y.grad_fn, "recipe")


@pytest.mark.parametrize(("op", "wanted"), [(op, i) for op in OPS for i in range(len(OPERANDS[op](torch.float64)))])
def test_gradients_of_every_operand_alone(op: str, wanted: int) -> None:
    tensors = [t.requires_grad_(i == wanted) for i, t in enumerate(OPERANDS[op](torch.float64))]
    torch.autograd.gradcheck(lambda t: public(op, [*tensors[:wanted], t, *tensors[wanted + 1 :]]), tensors[wanted])


@pytest.mark.parametrize("op", OPS)
def test_double_backward(op: str) -> None:
    tensors = [t.requires_grad_() for t in OPERANDS[op](torch.float64)]
    torch.autograd.gradgradcheck(lambda *t: public(op, list(t)), tensors)


@pytest.mark.parametrize("op", OPS)
def test_expanded_gradients(op: str) -> None:
    tensors = [t.requires_grad_() for t in OPERANDS[op](torch.float32)]
    torch_op = getattr(torch.nn.functional, op)
    ours = torch.autograd.grad(public(op, tensors).sum(), tensors)
    theirs = torch.autograd.grad(torch_op(*tensors, *OPTIONS[op]).sum(), tensors)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


@needs_eager
@pytest.mark.parametrize("op", OPS)
def test_missing_gradients(op: str) -> None:
    y = public(op, [t.requires_grad_() for t in OPERANDS[op](torch.float32)])
    assert y.grad_fn.apply(None)[0] is None  # type: ignore[union-attr]


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_frozen_layer_keeps_no_activation(wanted: int) -> None:
    tensors = OPERANDS["conv2d"](torch.float32)[:2]
    tensors[wanted].requires_grad_()
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        public("conv2d", [*tensors, None])  # type: ignore[list-item]
    assert [t.shape for t in packed] == [tensors[1 - wanted].shape]


@pytest.mark.parametrize("op", ["conv2d", "linear", "max_pool2d"])
def test_saved_tensors_are_unpacked_once(op: str) -> None:
    tensors = [t.requires_grad_() for t in OPERANDS[op](torch.float32)]
    expected = torch.autograd.grad(public(op, tensors).sum(), tensors)
    unpacked = []

    def unpack(t: Tensor) -> Tensor:
        unpacked.append(t)
        # Another memory format, so that the way is the one through Python.
        return t.to(memory_format=LAST) if t.dim() == 4 else t.t().contiguous().t()

    for dense in (True, False):
        unpacked.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), unpack):
            y = public(op, tensors)
            dy = torch.ones_like(y) if dense else torch.ones(()).expand_as(y)
            got = torch.autograd.grad(y, tensors, dy)
        assert len(unpacked) == (1 if op == "max_pool2d" else 2)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ["conv2d", "linear"])
def test_a_saved_tensor_that_was_written_raises(op: str) -> None:
    tensors = [t.requires_grad_() for t in OPERANDS[op](torch.float32)]
    y = public(op, tensors)
    with torch.no_grad():
        tensors[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, tensors, torch.ones_like(y))


def test_the_second_backward_of_a_freed_graph_raises() -> None:
    tensors = [t.requires_grad_() for t in OPERANDS["conv2d"](torch.float32)]
    y = public("conv2d", tensors)
    y.backward(torch.ones_like(y))
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(torch.ones_like(y))


def test_a_graph_outlives_the_table() -> None:
    tensors = [t.requires_grad_() for t in OPERANDS["avg_pool2d"](torch.float32)]
    expected = torch.autograd.grad(public("avg_pool2d", tensors).sum(), tensors)[0]
    y = public("avg_pool2d", tensors)
    plan.clear()
    gc.collect()
    same(torch.autograd.grad(y, tensors, torch.ones_like(y))[0], expected)


def test_outputs_and_graphs_are_freed() -> None:
    tensors = [t.requires_grad_() for t in OPERANDS["max_pool2d"](torch.float32)]
    y = public("max_pool2d", tensors)
    dead = weakref.ref(y), weakref.ref(y.grad_fn)
    del y
    assert [ref() for ref in dead] == [None, None]


# ---- Not ours ---------------------------------------------------------------------------------------------------------------


class Subclass(Tensor):
    pass


ODD: dict[str, Callable[[Tensor], Any]] = {
    "subclass": lambda t: t.as_subclass(Subclass),
    "half": lambda t: t.half(),
    "int": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "negative": lambda t: torch._neg_view(t),
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "empty": lambda t: t[:0],
    "array": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "none": lambda t: None,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("odd", ODD)
def test_odd_operands_are_left_alone(op: str, odd: str) -> None:
    tensors = OPERANDS[op](torch.float32)
    for at in range(len(tensors)):
        if odd == "none" and at == 2:
            continue
        assert quick(op, [ODD[odd](t) if i == at else t for i, t in enumerate(tensors)]) is None


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("conv2d", (1.0, 1, 1, 2)),
        ("conv2d", (True, 1, 1, 2)),
        ("conv2d", (1, "same", 1, 2)),
        ("conv2d", (1, 1, 1, 3)),
        ("conv2d", (1, 1, 1, 0)),
        ("conv2d", (0, 1, 1, 2)),
        ("conv2d", (1, -1, 1, 2)),
        ("conv2d", (1, 1, 9, 2)),
        ("conv2d", (1, 1, 1, 2.0)),
        ("conv2d", (1, 1 << 40, 1, 2)),
        ("conv2d", ((1, 1, 1), 1, 1, 2)),
        ("max_pool2d", (3, None, 2, 1, False)),
        ("max_pool2d", (3, None, 0, 1, 1)),
        ("max_pool2d", (0, 1, 0, 1, False)),
        ("max_pool2d", (9, None, 0, 1, False)),
        ("avg_pool2d", (2, 2, 0, False, None)),
        ("avg_pool2d", (2, 0, 0, False, True)),
        ("adaptive_avg_pool2d", (0,)),
        ("adaptive_avg_pool2d", (-1,)),
        ("adaptive_avg_pool2d", ((None, 1),)),
        ("adaptive_avg_pool2d", (2.0,)),
    ],
)
def test_odd_options_are_left_alone(op: str, options: tuple[Any, ...]) -> None:
    for _ in range(2):
        assert quick(op, OPERANDS[op](torch.float32), *options) is None


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_bool_is_no_one(at: int) -> None:
    x, w = rand(2, 4, 7, 6), rand(6, 4, 3, 3)
    assert F.conv2d(x, w, None, 1, 1, 1, 1).shape == (2, 6, 7, 6)  # known from now on
    assert quick("conv2d", [x, w, None], *(True if i == at else 1 for i in range(4))) is None


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


MOMENTS: dict[str, Callable[[], Any]] = {
    "observed": plan.observe,
    "forced": lambda: fastconv.use(max_pool2d_fwd="scalar"),
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "function mode": Mode,
    "autocast": lambda: torch.autocast("cpu"),
    "tangents": forward_ad.dual_level,
    "profiler": profile,
}


@needs_eager
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_moments_that_are_not_plain(op: str, moment: str) -> None:
    tensors = OPERANDS[op](torch.float32)
    assert quick(op, tensors) is not None
    with MOMENTS[moment]():
        assert quick(op, tensors) is None
    assert quick(op, tensors) is not None


@needs_eager
@pytest.mark.parametrize("op", OPS)
def test_transforms_are_not_plain(op: str) -> None:
    tensors = OPERANDS[op](torch.float32)
    seen: list[Any] = []

    def inner(t: Tensor) -> Tensor:
        seen.extend((quick(op, [t, *tensors[1:]]), quick(op, tensors)))
        return t.sum()

    torch.func.vmap(inner)(torch.stack([tensors[0]] * 2))
    torch.func.grad(inner)(tensors[0])
    torch.func.functionalize(inner)(tensors[0])
    assert seen == [None] * 6
    # The older vmap has no level to ask for, but its tensors have no address.
    y = getattr(F, op)(tensors[0].requires_grad_(), *tensors[1:], *OPTIONS[op])
    one = torch.autograd.grad(y, tensors[0], torch.ones_like(y), retain_graph=True)[0]
    two = torch.autograd.grad(y, tensors[0], torch.ones(2, *y.shape), is_grads_batched=True)[0]
    torch.testing.assert_close(two, torch.stack([one, one]))


@needs_eager
def test_a_forced_kernel_is_one_of_this_context_only() -> None:
    tensors = OPERANDS["conv2d"](torch.float32)
    answers = []
    with fastconv.use(conv2d_fwd="scalar"):
        thread = threading.Thread(target=lambda: answers.append(quick("conv2d", tensors)))
        thread.start()
        thread.join()
        assert quick("conv2d", tensors) is None
    assert answers[0] is not None


def test_threads_and_accuracy_are_part_of_the_key() -> None:
    tensors = OPERANDS["conv2d"](torch.float32)
    y = public("conv2d", tensors)
    torch.set_num_threads(2)
    same(public("conv2d", tensors), y)
    fastconv.set_accuracy("strict")
    try:
        torch.testing.assert_close(public("conv2d", tensors), y)
    finally:
        fastconv.set_accuracy("fast")


@needs_eager
def test_inference_mode_and_no_grad() -> None:
    tensors = [t.requires_grad_() for t in OPERANDS["conv2d"](torch.float32)]
    with torch.no_grad():
        assert not quick("conv2d", tensors).requires_grad
    with torch.inference_mode():
        assert quick("conv2d", tensors).is_inference()


def test_many_shapes_are_forgotten_together() -> None:
    w = rand(4, 5)
    for rows in range(1, 4200):
        assert F.linear(torch.ones(rows, 5), w).shape == (rows, 4)
    plan.clear()
    assert F.linear(torch.ones(3, 5), w).shape == (3, 4)


def test_threads_share_the_table() -> None:
    tensors = OPERANDS["conv2d"](torch.float32)
    expected = public("conv2d", tensors)
    wrong: list[Tensor] = []

    def work() -> None:
        torch.set_num_threads(1)
        for i in range(300):
            if i % 50 == 0:
                plan.clear()
            y = public("conv2d", tensors)
            if not torch.equal(y, expected):
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_wrong_use_of_the_module_raises() -> None:
    with pytest.raises(TypeError, match="_recorded"):
        native.eager_record_avg(None, torch.ones(1), None)
    with pytest.raises(TypeError, match="_recorded"):
        native.eager_backward_avg_pool2d(None)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="no call is named 'conv9d'"):
        native.eager_register("conv9d", lambda: None, None)


# ---- Who watches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("op", OPS)
def test_the_profiler_sees_the_op(op: str, grad: bool) -> None:
    tensors = [t.requires_grad_(grad) for t in OPERANDS[op](torch.float32)]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        y = public(op, tensors)
        if grad:
            y.sum().backward()
    found = {event.key: event.count for event in seen.key_averages()}
    assert found[f"fastconv::{op}_fwd"] == 1
    backward = {"conv2d": ["conv2d_dgrad", "conv2d_wgrad"], "linear": ["linear_dgrad", "linear_wgrad"]}
    for name in backward.get(op, [f"{op}_bwd"]):
        assert found.get(f"fastconv::{name}", 0) == int(grad)


@pytest.mark.parametrize("op", ["conv2d", "linear"])
def test_the_flop_counter_counts_what_it_counts_for_torch(op: str) -> None:
    counts = []
    for module in (F, torch.nn.functional):
        tensors = [t.requires_grad_() for t in OPERANDS[op](torch.float32)]
        if op == "conv2d":
            # In one group: torch counts a weight's gradient as if there were always one.
            tensors[0] = tensors[0][:, :2]
        with FlopCounterMode(display=False) as counter:
            getattr(module, op)(*tensors, *OPTIONS[op][:3]).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_flop_counter_counts_groups() -> None:
    x, w, _ = OPERANDS["conv2d"](torch.float32)
    with FlopCounterMode(display=False) as counter:
        y = F.conv2d(x.requires_grad_(), w.requires_grad_(), groups=2)
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * y.numel() * 2 * 3 * 3


def test_the_flop_counter_counts_a_transposed_convolution() -> None:
    x, w = rand(1, 4, 5, 6), rand(4, 3, 3, 3)
    counts = []
    for module in (F, torch.nn.functional):
        with FlopCounterMode(display=False) as counter:
            module.conv_transpose2d(x, w, stride=2)  # type: ignore[attr-defined]
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("op", OPS)
def test_functionalize(op: str) -> None:
    tensors = OPERANDS[op](torch.float32)
    y = torch.func.functionalize(lambda *t: public(op, list(t)))(*tensors)
    same(y, public(op, tensors))
    both = torch.func.functionalize(torch.func.vmap(lambda t: public(op, [t, *tensors[1:]])))
    torch.testing.assert_close(both(torch.stack([tensors[0]] * 2)), torch.stack([y, y]))
