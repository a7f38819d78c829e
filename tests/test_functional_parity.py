"""torch's own OpInfo samples and error inputs, for every function of fastconv.functional that has them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import fastconv
import fastconv.functional as ours
from fastconv import fallback_counts

PREFIX = "nn.functional."
OPS = {
    op.name.removeprefix(PREFIX): op
    for op in op_db
    if op.name.startswith(PREFIX) and op.name.removeprefix(PREFIX) in ours.__all__ and not op.variant_test_name
}
NAMES = sorted(OPS)

# rtol and atol where torch's own tests of these samples take others than its defaults: scores up to 200.
TOLERANCES = {
    ("scaled_dot_product_attention", torch.float32): {"rtol": 5e-6, "atol": 5e-5},
    # The gradient of a row of one number is 0, and 0 here; torch makes a rounding times 1/sqrt(eps) = 316 of it.
    ("layer_norm", torch.float32): {"rtol": 1.3e-6, "atol": 5e-5},
    # Two roundings each; test_attention_halves.py holds ours against float64.
    ("scaled_dot_product_attention", torch.float16): {"rtol": 2e-3, "atol": 2e-3},
    ("scaled_dot_product_attention", torch.bfloat16): {"rtol": 1.6e-2, "atol": 1.6e-2},
}
HALVES = (torch.float16, torch.bfloat16)

# Ops that have no kernels of their own.
ALWAYS_TORCH = {"conv3d"}


def test_every_function_that_torch_has_samples_for() -> None:
    beyond = ("_with_indices", "_varlen", "_with_cache")  # torch has none of the last two, see test_attention_more.py
    expected = {name for name in ours.__all__ if not name.endswith(beyond)}
    assert set(NAMES) == expected


def assert_same(ours: Any, theirs: Any, exact: bool = False, name: str = "", strides: bool = True) -> None:
    """Same structure, shapes, strides, dtypes; values equal or within torch's default tolerance for the dtype."""
    if not isinstance(theirs, Tensor):
        assert type(ours) is type(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, exact, name, strides)
        return
    tolerance = TOLERANCES.get((name, theirs.dtype), {})
    if exact or not theirs.is_floating_point():
        tolerance = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours, theirs, equal_nan=True, check_stride=strides, **tolerance)


def samples(op: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Without those that drop weights at random: that generator is ours, see test_attention_op."""
    for sample in op.sample_inputs(*args, **kwargs):
        if not 0 < sample.kwargs.get("dropout_p", 0.0) < 1:
            yield sample


def leaves(sample: Any) -> list[Tensor]:
    everything = [sample.input, *sample.args, *sample.kwargs.values()]
    return [t for t in everything if isinstance(t, Tensor) and t.requires_grad]


def gradients(out: Any, inputs: list[Tensor], there: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor | None]:
    """Gradients of an output that is weighted unevenly, so that no two of its elements can be exchanged."""
    first = out if isinstance(out, Tensor) else out[0]
    weights = torch.arange(1, first.numel() + 1, dtype=first.dtype).reshape(first.shape) / max(first.numel(), 1)
    return list(torch.autograd.grad(first, inputs, there(weights), allow_unused=True))


def leaf(like: Tensor, t: Tensor) -> Tensor:
    """t, which somebody wants a gradient of where somebody wants one of the other."""
    return t.detach().requires_grad_(like.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    function = getattr(ours, name)
    exact = name.startswith(("max_pool", "adaptive_max_pool"))
    before = fallback_counts()
    count = 0
    for sample in samples(op, "cpu", dtype, requires_grad=True):
        expected = op.op(sample.input, *sample.args, **sample.kwargs)
        found = function(sample.input, *sample.args, **sample.kwargs)
        assert_same(found, expected, exact, name)
        inputs = leaves(sample)
        for ours_, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
            if theirs is None:
                assert ours_ is None
            else:
                # Those of attention's gradients depend on which of torch's implementations answers.
                assert_same(ours_, theirs, name=name, strides=name != "scaled_dot_product_attention")
        count += 1
    assert count >= 6
    if name not in ALWAYS_TORCH:
        assert fallback_counts() == before


# float64 on the CPU is what a GPU's float32 stands against, with the numbers of 24 bits where one sum is, and of 18 elsewhere.
ON_GPU = [name for name in NAMES if name not in {*ALWAYS_TORCH, "batch_norm"}]


@pytest.mark.parametrize("name", ON_GPU)
def test_samples_on_a_gpu(gpu: Any, name: str) -> None:
    op, function = OPS[name], getattr(ours, name)
    # Every 19th of the max pools' 1440: 19 has no factor in common with the lists they are the product of.
    step = 19 if name.startswith("max_pool") else 1
    count = 0
    for sample in itertools.islice(samples(op, "cpu", torch.float32, requires_grad=True), 0, None, step):
        wide = sample.transform(lambda t: leaf(t, t.double() if t.is_floating_point() else t))
        there = sample.transform(lambda t: leaf(t, gpu(t.detach())))
        expected = op.op(wide.input, *wide.args, **wide.kwargs)
        found = function(there.input, *there.args, **there.kwargs)
        gpu.same(found, expected, 20, equal_nan=True)
        gpu.same(gradients(found, leaves(there), gpu), gradients(expected, leaves(wide)), 18, equal_nan=True)
        count += 1
    assert count >= 6


@pytest.mark.parametrize("name", NAMES)
def test_samples_without_gradient(name: str) -> None:
    op = OPS[name]
    function = getattr(ours, name)
    # Every seventh of the max pools' 1440: seven has no factor in common with the lists they are the product of.
    step = 7 if name.startswith("max_pool") else 1
    with torch.no_grad():
        for sample in itertools.islice(samples(op, "cpu", torch.float32), 0, None, step):
            expected = op.op(sample.input, *sample.args, **sample.kwargs)
            found = function(sample.input, *sample.args, **sample.kwargs)
            assert_same(found, expected, name.startswith("max_pool"), name)


@pytest.mark.parametrize("name", NAMES)
def test_samples_channels_last(name: str) -> None:
    op = OPS[name]
    function = getattr(ours, name)
    step = 7 if name.startswith("max_pool") else 1
    for sample in itertools.islice(samples(op, "cpu", torch.float32), 0, None, step):
        if not isinstance(sample.input, Tensor) or sample.input.dim() != 4:
            continue
        x = sample.input.contiguous(memory_format=torch.channels_last)
        expected = op.op(x, *sample.args, **sample.kwargs)
        assert_same(function(x, *sample.args, **sample.kwargs), expected, name=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.int64], ids=str)
def test_other_dtypes_give_torch_s_answer_and_are_counted(name: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    if dtype not in op.supported_dtypes("cpu"):
        pytest.skip(f"torch's {name} has no {dtype}")
    function = getattr(ours, name)
    before = sum(fallback_counts().values())
    some = list(itertools.islice(samples(op, "cpu", dtype), 20))
    own = name in ("scaled_dot_product_attention", "linear") and dtype in HALVES
    with fallback("silent"):
        for sample in some:
            expected = op.op(sample.input, *sample.args, **sample.kwargs)
            assert_same(function(sample.input, *sample.args, **sample.kwargs), expected, exact=not own, name=name)
    assert sum(fallback_counts().values()) == before + (0 if own else len(some))


class fallback:
    """set_fallback for one block."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        fastconv.set_fallback(self.mode)

    def __exit__(self, *_: object) -> None:
        fastconv.set_fallback("warn")


@pytest.mark.parametrize("name", [name for name in NAMES if OPS[name].error_inputs_func])
def test_error_inputs(name: str) -> None:
    op = OPS[name]
    function = getattr(ours, name)
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type) as info:
            function(sample.input, *sample.args, **sample.kwargs)
        assert info.type is error.error_type
        assert re.search(error.error_regex, str(info.value)), str(info.value)
        assert len(str(info.value)) < 600
