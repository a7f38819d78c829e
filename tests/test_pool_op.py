"""The pooling ops by themselves: what wins, what is counted, where it lies in memory, derivatives, registration."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.testing import assert_close

import fastconv.functional as ours
from fastconv import reference

OPS = torch.ops.fastconv

# One of each kind of pool, with options that leave borders, overlaps and dropped rows.
POOLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "max": lambda F, x: F.max_pool2d(x, 3, 2, 1),
    "max_dilated_ceil": lambda F, x: F.max_pool2d(x, 2, (1, 2), 1, 2, True),
    "avg": lambda F, x: F.avg_pool2d(x, (3, 2), 2, 1),
    "avg_exclude_ceil": lambda F, x: F.avg_pool2d(x, 3, 2, 1, True, False),
    "avg_divisor": lambda F, x: F.avg_pool2d(x, 2, 1, divisor_override=3),
    "adaptive_avg": lambda F, x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive_avg_1": lambda F, x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_max": lambda F, x: F.adaptive_max_pool2d(x, (2, 3)),
}
pools = pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


def distinct(*shape: int) -> Tensor:
    """Doubles a unit apart and shuffled: a finite difference never changes which is the largest."""
    count = int(np.prod(shape))
    return torch.randperm(count, generator=torch.Generator().manual_seed(7)).double().reshape(shape)


# ---- Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 3, 17, 64])
def test_nan_ties_and_infinities(channels: int, channels_last: bool) -> None:
    """Few values, so that every window has ties, and NaN and infinities in many of them: the same element must win."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, float("nan"), float("-inf"), float("-inf"), float("inf")])
    x = values[torch.randint(8, (2, channels, 13, 21), generator=torch.Generator().manual_seed(3))]
    x[0, 0] = float("-inf")
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for kernel, stride, padding, dilation, ceil in itertools.product((2, 3), (1, 2), (0, 1), (1, 2), (False, True)):
        options = kernel, stride, padding, dilation, ceil, True
        found, expected = ours.max_pool2d(x, *options), theirs.max_pool2d(x, *options)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_stride=True)
        # The sign of a zero says which of two equal elements was taken; without indices the same one has to be.
        for values in (found[0], ours.max_pool2d(x, *options[:-1])):
            assert_close(values, expected[0], rtol=0, atol=0, equal_nan=True, check_stride=True)
            assert torch.equal(torch.signbit(values), torch.signbit(expected[0]))
    found, expected = ours.adaptive_max_pool2d(x, (4, 5), True), theirs.adaptive_max_pool2d(x, (4, 5), True)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert_close(ours.adaptive_max_pool2d(x, (4, 5)), expected[0], rtol=0, atol=0, equal_nan=True)


def test_the_last_nan_and_the_first_of_equals() -> None:
    nan = float("nan")
    x = torch.tensor([[1.0, nan, 3.0, nan], [7.0, 7.0, 7.0, 0.0]]).reshape(1, 2, 1, 4)
    _, indices = ours.max_pool2d(x, (1, 4), return_indices=True)
    assert indices.flatten().tolist() == [3, 0]
    _, indices = ours.max_pool2d(torch.full((1, 1, 2, 2), float("-inf")), 2, return_indices=True)
    assert indices.item() == 0


def test_divisors() -> None:
    ones = torch.ones(1, 1, 3, 3)
    corners = ours.avg_pool2d(ones, 3, 1, 1)
    assert_close(corners[0, 0, 0], torch.tensor([4 / 9, 6 / 9, 4 / 9]))
    assert torch.equal(ours.avg_pool2d(ones, 3, 1, 1, count_include_pad=False), ones)
    ceil = ours.avg_pool2d(torch.ones(1, 1, 4, 4), 2, 3, 1, ceil_mode=True)
    assert ceil.flatten().tolist() == [0.25, 0.5, 0.5, 1.0]
    assert_close(ours.avg_pool2d(ones, 2, divisor_override=-2), torch.full((1, 1, 1, 1), -2.0))


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_against_the_reference(ceil: bool, include: bool) -> None:
    x = random(2, 5, 11, 14, dtype=torch.float64)
    for kernel, stride, padding in itertools.product((2, 3, 5), (1, 2, 3), (0, 1)):
        found = ours.avg_pool2d(x, kernel, stride, padding, ceil, include)
        windows = {"stride": (stride, stride), "pad4": (padding,) * 4, "ceil_mode": ceil, "count_include_pad": include}
        expected = reference.avg_pool2d(x.numpy(), (kernel, kernel), **windows)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)


# ---- Memory formats and gradients of any layout -----------------------------------------------------------------------------

SHAPES = [(2, 3, 9, 8), (2, 1, 9, 8), (1, 3, 9, 8), (2, 3, 4, 4), (3, 17, 5, 6), (2, 8, 12, 1), (2, 8, 1, 12)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "sliced_channels": lambda x: x.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "sum": lambda g: g.new_ones(()).expand_as(g),
    "cat": lambda g: torch.cat([g, g, g], 1)[:, g.shape[1] : 2 * g.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["max", "avg", "adaptive_avg", "adaptive_avg_1", "adaptive_max"])
def test_formats_are_torch_s(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    for shape in SHAPES:
        options = (3, 2, 1) if min(shape[2:]) > 1 else (1, 1, 0)
        x, y = layout(random(*shape)).requires_grad_(), layout(random(*shape)).requires_grad_()
        pool: dict[str, Callable[[Any, Tensor], Any]] = {
            "max": lambda F, t, options=options: F.max_pool2d(t, *options, return_indices=True),
            "avg": lambda F, t, options=options: F.avg_pool2d(t, *options),
            "adaptive_avg": lambda F, t: F.adaptive_avg_pool2d(t, (3, 2)),
            "adaptive_avg_1": lambda F, t: F.adaptive_avg_pool2d(t, 1),
            "adaptive_max": lambda F, t: F.adaptive_max_pool2d(t, (3, 2), True),
        }
        found, expected = pool[name](ours, x), pool[name](theirs, y)
        assert_close(found, expected, check_stride=True)
        out = [r[0] if isinstance(r, tuple) else r for r in (found, expected)]
        for result, leaf in zip(out, (x, y), strict=True):
            (leaf.g,) = torch.autograd.grad(result, leaf, torch.ones_like(result))  # type: ignore[attr-defined]
        # The mean that torch takes for an output of 1 answers with an expanded gradient; ours is dense.
        assert_close(x.g, y.g, check_stride=name != "adaptive_avg_1")  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pools
def test_gradients_of_any_layout(
    pool: Callable[..., Tensor], channels_last: bool, layout: Callable[[Tensor], Tensor]
) -> None:
    x = random(3, 5, 9, 8)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = pool(ours, x), pool(theirs, y)
    g = layout(random(*found.shape))
    assert_close(torch.autograd.grad(found, x, g), torch.autograd.grad(expected, y, g))


@pools
def test_a_sum_s_gradient(pool: Callable[..., Tensor]) -> None:
    x, y = random(2, 5, 9, 8).requires_grad_(), random(2, 5, 9, 8).requires_grad_()
    pool(ours, x).sum().backward()
    pool(theirs, y).sum().backward()
    assert_close(x.grad, y.grad)


# ---- Derivatives of every kind ----------------------------------------------------------------------------------------------


@pools
def test_gradcheck(pool: Callable[..., Tensor]) -> None:
    x = distinct(1, 2, 5, 4).requires_grad_()

    def function(t: Tensor) -> Tensor:
        return pool(ours, t)

    assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (x,), check_fwd_over_rev=True, check_rev_over_rev=True)


@pools
def test_transforms(pool: Callable[..., Tensor]) -> None:
    x = distinct(4, 3, 1, 2, 6, 5)[:, :, 0] / 7

    def mine(t: Tensor) -> Tensor:
        return pool(ours, t)

    def yours(t: Tensor) -> Tensor:
        return pool(theirs, t)

    batch = x[0]
    assert_close(vmap(mine)(x), vmap(yours)(x))
    assert_close(vmap(mine, in_dims=2, out_dims=1)(x), vmap(yours, in_dims=2, out_dims=1)(x))
    assert_close(vmap(vmap(mine))(x), vmap(vmap(yours))(x))
    assert_close(jacrev(mine)(batch), jacrev(yours)(batch))
    assert_close(jacfwd(mine)(batch), jacfwd(yours)(batch))
    small = x[0, :1]
    assert_close(hessian(lambda t: mine(t).square().sum())(small), hessian(lambda t: yours(t).square().sum())(small))
    per_sample = vmap(grad(lambda t: mine(t).square().sum()))
    assert_close(per_sample(x), vmap(grad(lambda t: yours(t).square().sum()))(x))


@pools
def test_double_backward(pool: Callable[..., Tensor]) -> None:
    results = []
    for F in (ours, theirs):
        x = random(2, 3, 9, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        (first,) = torch.autograd.grad(pool(F, x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((first.detach(), second))
    assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pools
def test_inference_mode_and_no_grad(pool: Callable[..., Tensor]) -> None:
    x = random(2, 3, 9, 8)
    expected = pool(theirs, x)
    with torch.inference_mode():
        assert_close(pool(ours, x), expected)
    x.requires_grad_()
    with torch.no_grad():
        assert not pool(ours, x).requires_grad
    assert pool(ours, x).requires_grad


def test_indices_carry_no_gradient() -> None:
    x = random(2, 3, 9, 8).requires_grad_()
    y, indices = ours.max_pool2d(x, 2, return_indices=True)
    assert y.requires_grad
    assert not indices.requires_grad
    assert_close(theirs.max_unpool2d(y, indices, 2, output_size=x.shape).count_nonzero(), torch.tensor(y.numel()))


# ---- Registration -----------------------------------------------------------------------------------------------------------

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_opcheck(place: Any, layout: str, requires_grad: bool) -> None:
    def make(*shape: int) -> Tensor:
        t = LAYOUTS[layout](place(random(*shape)))
        return t if layout == "expanded" and requires_grad else t.requires_grad_(requires_grad)

    x, g = make(2, 3, 9, 8), make(2, 3, 5, 4)
    indices = place(torch.randint(72, (2, 3, 5, 4)))
    windows = [3, 3, 2, 2, 1, 1, 1, 1, 1, 1] if place.is_gpu else []  # which a GPU's gather has to know
    pairs = [3, 3], [2, 2], [1, 1]
    for op, args in (
        (OPS.max_pool2d_fwd, (x, *pairs, [1, 1], False)),
        (OPS.max_pool2d_bwd, (g, indices, [2, 3, 9, 8], layout == "channels_last", windows)),
        (OPS.adaptive_max_pool2d_fwd, (x, [3, 2])),
        (OPS.avg_pool2d_fwd, (x, *pairs, False, True, None)),
        (OPS.avg_pool2d_bwd, (g, [2, 3, 9, 8], layout == "channels_last", *pairs, False, True, 3)),
        (OPS.adaptive_avg_pool2d_fwd, (x, [3, 2])),
        (OPS.adaptive_avg_pool2d_bwd, (g, [2, 3, 9, 8], layout == "channels_last")),
    ):
        torch.library.opcheck(op.default, args, test_utils=TESTS)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_compile(place: Any, requires_grad: bool, dynamic: bool) -> None:
    torch._dynamo.reset()

    def net(F: Any, t: Tensor) -> Tensor:
        t = F.max_pool2d(t, 3, 2, 1)
        t = F.avg_pool2d(t, (3, 2), 1, 1, True, False)
        t = F.adaptive_max_pool2d(t, (5, 4)) + F.adaptive_avg_pool2d(t, (5, 4))
        return F.max_pool1d(t[0], 2).square()  # type: ignore[no-any-return]

    compiled = torch.compile(lambda t: net(ours, t), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 3, 17, 16), (2, 3, 25, 30), (3, 5, 33, 17)):
        for format in (torch.contiguous_format, torch.channels_last):
            x = place(random(*shape).contiguous(memory_format=format).clone()).requires_grad_(requires_grad)
            found, expected = compiled(x), net(theirs, x)
            assert_close(found, expected)
            if requires_grad:
                assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_ops_refuse_other_dtypes() -> None:
    with pytest.raises(NotImplementedError, match="expected float32 or float64"):
        OPS.avg_pool2d_fwd(random(1, 1, 4, 4).half(), [2, 2], [2, 2], [0, 0], False, True, None)
