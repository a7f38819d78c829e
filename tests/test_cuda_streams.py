"""What takes a GPU to see: CUDA graphs, the current stream, several GPUs, inductor's code, tensors of more than 2^31 elements.

Without a GPU, graphs and large tensors run on the emulator as plain calls and small ones, which tests these tests but for that.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastconv
import fastconv.functional as F

BF16, F32 = torch.bfloat16, torch.float32
ON_A_GPU = pytest.mark.parametrize("place", ["cuda"], indirect=True)


class Family(NamedTuple):
    """A call, the shapes of its operands, of which the first is x, and their dtype; images lie in channels_last."""

    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = BF16


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


# Each way that a call takes: products on tensor cores and on FMA units, sums that are cut into parts and workspace, two results.
FAMILIES = {
    "implicit_gemm": Family(lambda x, w, b: F.conv2d(x, w, b, padding=1), ((2, 16, 9, 8), (16, 16, 3, 3), (16,))),
    "direct": Family(lambda x, w, b: F.conv2d(x, w, b, padding=1), ((2, 5, 9, 8), (6, 5, 3, 3), (6,)), F32),
    "pointwise": Family(F.conv2d, ((2, 16, 9, 8), (24, 16, 1, 1))),
    "depthwise": Family(lambda x, w: F.conv2d(x, w, padding=1, groups=16), ((2, 16, 9, 8), (16, 1, 3, 3))),
    "transposed": Family(lambda x, w: F.conv_transpose2d(x, w, stride=2), ((2, 16, 5, 4), (16, 8, 2, 2))),
    "max_pool": Family(lambda x: F.max_pool2d(x, 3, 2, 1), ((2, 8, 9, 8),)),
    "avg_pool": Family(lambda x: F.avg_pool2d(x, 3, 2, 1), ((2, 8, 9, 8),)),
    "adaptive_max_pool": Family(lambda x: F.adaptive_max_pool2d(x, (4, 3)), ((2, 8, 9, 8),)),
    "adaptive_avg_pool": Family(lambda x: F.adaptive_avg_pool2d(x, (4, 3)), ((2, 8, 9, 8),)),
    "linear": Family(F.linear, ((3, 5, 32), (24, 32), (24,))),
    "layer_norm": Family(layer_norm, ((5, 7, 48), (48,), (48,))),
    "attention": Family(attention, ((2, 4, 20, 16), (2, 2, 20, 16), (2, 2, 20, 16))),
    "attention_f32": Family(attention, ((2, 4, 20, 16), (2, 2, 20, 16), (2, 2, 20, 16)), F32),
    "decoding": Family(F.scaled_dot_product_attention, ((1, 2, 1, 16), (1, 2, 2100, 16), (1, 2, 2100, 16))),
}
families = pytest.mark.parametrize("name", FAMILIES)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def operands(place: Any, family: Family, seed: int = 0) -> list[Tensor]:
    return [place(drawn(shape, family.dtype, seed + i)).requires_grad_() for i, shape in enumerate(family.shapes)]


def passes(call: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The result, and the gradient of each operand."""
    y = call(*leaves)
    return [y, *torch.autograd.grad(y, leaves, y.detach())]


def write(leaves: list[Tensor], others: list[Tensor]) -> None:
    with torch.no_grad():
        for leaf, other in zip(leaves, others, strict=True):
            leaf.copy_(other)


def same_bits(place: Any, found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(place.back(found), place.back(expected), strict=True):
        assert b.isfinite().all()
        assert b.any()
        assert torch.equal(a, b)


# ---- CUDA graphs ------------------------------------------------------------------------------------------------------------


def recorded(gpu: Any, work: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """What does the work again: a graph of it, captured after some calls on another stream, as torch's manual says."""
    if gpu.name == "emulated":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


@families
def test_a_graph_computes_from_what_its_operands_hold_now(gpu: Any, name: str) -> None:
    family = FAMILIES[name]
    leaves = operands(gpu, family)
    replay = recorded(gpu, lambda: passes(family.call, leaves))
    for seed in (10, 20):
        others = operands(gpu, family, seed)
        expected = passes(family.call, others)
        write(leaves, others)
        same_bits(gpu, replay(), expected)


@ON_A_GPU
def test_dropout_in_a_graph_is_an_error(place: Any) -> None:
    q = place(drawn((1, 2, 20, 16), BF16, 0))
    F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"), torch.cuda.graph(graph):
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    torch.cuda.synchronize()


# ---- Streams and devices ----------------------------------------------------------------------------------------------------

SLEEP = 10**9  # cycles: half a second, of which the calls in a test take a hundredth


@ON_A_GPU
@families
def test_work_waits_its_turn_on_the_current_stream_and_nobody_waits_for_it(place: Any, name: str) -> None:
    family = FAMILIES[name]
    leaves, others = operands(place, family), operands(place, family, 10)
    expected = passes(family.call, others)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Loads the kernels and fills the allocator's memory for this stream, both of which may wait.
        passes(family.call, leaves)
        stream.synchronize()
        torch.cuda._sleep(SLEEP)
        write(leaves, others)
        found = passes(family.call, leaves)
        assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    same_bits(place, found, expected)


@ON_A_GPU
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@families
def test_tensors_of_a_gpu_that_is_not_the_current_one(place: Any, name: str) -> None:
    family = FAMILIES[name]
    with torch.cuda.device(0):
        expected = passes(family.call, operands(place, family))
        leaves = [t.detach().to("cuda:1").requires_grad_() for t in operands(place, family)]
        found = passes(family.call, leaves)
        assert torch.cuda.current_device() == 0
        assert {t.device.index for t in found} == {1}
        if len(leaves) > 1:
            with pytest.raises(NotImplementedError, match="is on cuda:1, other operands on cuda:0"):
                family.call(leaves[0].to("cuda:0"), *leaves[1:])
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        same_bits(place, found, expected)


# ---- torch.compile, down to the code that it writes -------------------------------------------------------------------------


@ON_A_GPU
@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("cc")), reason="needs a C compiler, as triton does")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(place: Any, mode: str) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    layers = fastconv.nn
    model = torch.nn.Sequential(
        layers.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(), layers.Conv2d(16, 16, 3, groups=16), layers.MaxPool2d(2),
        torch.nn.Flatten(2), layers.LayerNorm(9), layers.TransformerEncoderLayer(9, 3, 18, 0.0, batch_first=True),
        layers.Linear(9, 4),
    )  # fmt: skip
    place(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for seed in range(4):
        x = place(drawn((2, 8, 8, 8), F32, seed))
        results = []
        for run in (model, compiled):
            y = run(x)
            results.append(
                [y.detach().clone(), *(g.clone() for g in torch.autograd.grad(y.square().sum(), model.parameters()))]
            )
        place.same(results[1], results[0], 18)


# ---- More than 2^31 elements ------------------------------------------------------------------------------------------------

# The elements of one sample of x and of y, and calls whose x or y, or both, are dense and large.
LARGE = {
    "pointwise": (Family(F.conv2d, ((0, 8, 256, 256), (64, 8, 1, 1))), 64 << 16),
    "direct": (Family(lambda x, w: F.conv2d(x, w, padding=1), ((0, 3, 256, 256), (33, 3, 3, 3))), 33 << 16),
    "pointwise_dgrad": (Family(F.conv2d, ((0, 64, 256, 256), (8, 64, 1, 1))), 64 << 16),
    "depthwise": (Family(lambda x, w: F.conv2d(x, w, padding=1, groups=8), ((0, 8, 256, 256), (8, 1, 3, 3))), 8 << 16),
    "max_pool": (Family(lambda x: F.max_pool2d(x, 2), ((0, 8, 256, 256),)), 8 << 16),
    "adaptive_avg_pool": (Family(lambda x: F.adaptive_avg_pool2d(x, 128), ((0, 8, 256, 256),)), 8 << 16),
    "linear": (Family(F.linear, ((0, 16), (1024, 16))), 1024),
    "layer_norm": (Family(layer_norm, ((0, 1024), (1024,), (1024,))), 1024),
    "attention": (Family(attention, ((0, 512, 64, 64), (0, 1, 64, 64), (0, 1, 64, 64))), 512 << 12),
}
# On the emulator, which is slow.
SMALLER = {256: 7, 512: 4, 1024: 40}
# Twice what q, the output, their gradients and a sum in float32 of the largest of them take in bf16.
MEMORY = 40 << 30


@pytest.mark.parametrize("name", LARGE)
def test_the_last_sample_of_more_than_31_bits_of_elements_is_computed_as_if_alone(gpu: Any, name: str) -> None:
    family, elements = LARGE[name]
    count = 2
    if gpu.name == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if free < MEMORY:
            pytest.skip(f"needs {MEMORY >> 30} GiB of the GPU's memory, {free >> 30} are free")
        count = 2**31 // elements + 2
    else:
        family = family._replace(shapes=tuple(tuple(SMALLER.get(n, n) for n in shape) for shape in family.shapes))
    leaves = []
    for shape in family.shapes:
        full = tuple(n or count for n in shape)
        last = torch.channels_last if len(full) == 4 and name != "attention" else torch.contiguous_format
        t = gpu(torch.empty(0, dtype=BF16)).new_empty(full).to(memory_format=last).normal_()
        leaves.append(t.requires_grad_())
    alone = [t[-1:].detach().clone().requires_grad_() if not shape[0] else t for t, shape in zip(leaves, family.shapes)]
    results = []
    for operands in (leaves, alone):
        y = family.call(*operands)
        # A gradient that takes no memory: one value everywhere.
        (dx,) = torch.autograd.grad(y, operands[:1], y.detach()[-1:].flatten()[-1].expand_as(y))
        results.append(gpu.back((y[-1:], dx[-1:])))
        if operands is leaves and gpu.name == "cuda":
            assert max(math.prod(y.shape), leaves[0].numel()) > 2**31
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)
