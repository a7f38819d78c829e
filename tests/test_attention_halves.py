"""Attention of bfloat16 and float16: accuracy beside torch's, masks of two precisions, autocast, derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import fastconv
from fastconv.functional import scaled_dot_product_attention as sdpa

OPS = torch.ops.fastconv
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


def operands(dtype: torch.dtype, q: Any, k: Any, v: Any = None) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in (q, k, v or k)]


def results(attention: Any, inputs: list[Tensor], mask: Tensor | None, dout: Tensor, **options: Any) -> list[Tensor]:
    """Output and gradients."""
    out = attention(*inputs, mask, **options)
    return [out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def no_worse(mine: Tensor, peer: Tensor, truth: Tensor) -> bool:
    """At most twice the error of torch, beside the rounding that 0.3 added and taken away makes of the truth."""
    assert mine.dtype == peer.dtype
    rounded = truth.to(peer.dtype)
    floor = ((rounded + 0.3 - 0.3).double() - truth).abs().max()
    allowed = 2 * (peer.double() - truth).abs().max() + 2 * floor
    return bool((mine.double() - truth).abs().max() <= allowed)


# A query that sees one key has a gradient of 0, beside which no peer's error is left: test_kernels bounds what it gets.
@HALVES
@pytest.mark.parametrize("lengths", [(3, 5), (7, 19), (64, 64), (197, 197), (2, 1500), (90, 1100)], ids=str)
@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "additive", "wide"])
def test_no_worse_than_torch_against_float64(kind: str, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    L, S = lengths
    inputs = operands(dtype, (1, 2, L, 40), (1, 2, S, 40), (1, 2, S, 24))
    mask: Tensor | None = None
    if kind == "boolean":
        mask = torch.rand(L, S) > 0.3
        mask[:, 0] = True
    elif kind in ("additive", "wide"):
        mask = torch.randn(L, S).masked_fill(torch.rand(L, S) < 0.2, -math.inf).to(dtype)
        mask[:, 0] = 0
        mask = mask.float() if kind == "wide" else mask
    dout = torch.randn(1, 2, L, 24).to(dtype)
    options = {"is_causal": kind == "causal"}
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = mask.double() if mask is not None and mask.is_floating_point() else mask
    truth = results(F.scaled_dot_product_attention, wide, exact, dout, **options)
    peer = results(F.scaled_dot_product_attention, inputs, mask, dout, **options)
    before = fastconv.fallback_counts()
    with fastconv.observe() as records:
        mine = results(sdpa, inputs, mask, dout, **options)
    assert [r.op for r in records] == ["sdpa_fwd", "sdpa_bwd"]
    assert fastconv.fallback_counts() == before
    for name, *three in zip(("out", "dq", "dk", "dv"), mine, peer, truth):
        assert no_worse(*three), name


@HALVES
def test_gradients_of_masks_have_their_dtype(dtype: torch.dtype) -> None:
    q, k, v = operands(dtype, (2, 3, 5, 8), (2, 3, 7, 8))
    mask = torch.randn(2, 1, 5, 7).to(dtype)
    truth = mask.double().requires_grad_()
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), truth).sum(), truth)
    for kind in (dtype, torch.float32):
        leaf = mask.to(kind).requires_grad_()
        (found,) = torch.autograd.grad(sdpa(q, k, v, leaf).sum(), leaf)
        assert found.dtype is kind
        assert_close(found.double(), expected[0], rtol=0, atol=16 * torch.finfo(dtype).eps)


@HALVES
def test_autocast_casts_as_torch_does(place: Any, dtype: torch.dtype) -> None:
    q, k, v = (place(t.detach()).requires_grad_() for t in operands(torch.float32, (1, 2, 5, 8), (1, 2, 7, 8)))
    mask = place(torch.randn(5, 7))
    doubles = [t.double() for t in (q, k, v)]
    with place.autocast(dtype), place.letting("scaled_dot_product_attention"), fastconv.observe() as records:
        found = sdpa(q, k, v, mask)
        theirs = F.scaled_dot_product_attention(q, k, v, mask) if place.name != "emulated" else found
        (grad,) = torch.autograd.grad(found.float().sum(), q)
        assert sdpa(*doubles).dtype is F.scaled_dot_product_attention(*doubles).dtype is torch.float64
    assert found.dtype is theirs.dtype is dtype
    assert grad.dtype is torch.float32
    half = "bf16" if dtype is torch.bfloat16 else "f16"
    assert {r.dtype for r in records} == ({half} if place.is_gpu else {half, "f64"})
    assert torch.equal(*place.back((found, sdpa(*(t.to(dtype) for t in (q, k, v)), mask.to(dtype)))))


@HALVES
@pytest.mark.usefixtures("widened")
def test_options_of_ours(dtype: torch.dtype) -> None:
    q, k, v = operands(dtype, (1, 4, 9, 8), (1, 2, 9, 8))
    options: Any = {"enable_gqa": True, "window": (3, 0), "softcap": 2.0, "return_lse": True}
    out, lse = sdpa(q, k, v, **options)
    expected, expected_lse = sdpa(*(t.float() for t in (q, k, v)), **options)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(lse, expected_lse)


@HALVES
def test_derivatives_that_are_composed(dtype: torch.dtype) -> None:
    inputs = [t.detach() for t in operands(dtype, (1, 1, 4, 3), (1, 1, 5, 3))]
    tangents = tuple(torch.randn(t.shape).to(dtype) for t in inputs)
    _, found = torch.func.jvp(sdpa, tuple(inputs), tangents)
    wide = torch.func.jvp(sdpa, tuple(t.double() for t in inputs), tuple(t.double() for t in tangents))[1]
    assert found.dtype is dtype
    assert_close(found.double(), wide, rtol=0, atol=8 * torch.finfo(dtype).eps)

    def second(*t: Tensor) -> Tensor:
        leaf = t[0].detach().requires_grad_()
        (grad,) = torch.autograd.grad(sdpa(leaf, *t[1:]).sin().sum(), leaf, create_graph=True)
        (again,) = torch.autograd.grad(grad.square().sum(), leaf)
        return again

    assert second(*inputs).dtype is dtype
    expected = second(*(t.double() for t in inputs))
    assert_close(second(*inputs).double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore")
def test_compiles_and_the_op_says_what_it_gives() -> None:
    q, k, v = operands(torch.bfloat16, (2, 2, 5, 8), (2, 2, 7, 8))
    compiled = torch.compile(lambda *t: sdpa(*t), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), sdpa(q, k, v))
    found, expected = (torch.autograd.grad(f(q, k, v).sum(), (q, k, v)) for f in (compiled, sdpa))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    utilities = ("test_schema", "test_faketensor")
    wide = torch.randn(1, 1, 1, 7, requires_grad=True)
    torch.library.opcheck(
        OPS.sdpa_fwd.default, (q, k, v, wide, None, None, 0.3, -5, 2, 0.0, 0.0, 0), test_utils=utilities
    )
    with pytest.raises(RuntimeError, match=r"mask is torch\.float64, expected bool, torch\.bfloat16 or torch\.float32"):
        OPS.sdpa_fwd(q, k, v, wide.double(), None, None, 0.3, -5, 2, 0.0, 0.0, 0)
