"""Attention over all odd lengths up to 300, every kind of mask and every dtype, and over heads wider than any tile."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import fastconv
from fastconv.functional import scaled_dot_product_attention as sdpa

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
LENGTHS = range(1, 301, 2)
# Lengths whose gradients are checked too. torch's own backward in f16 goes lane by lane, and would be most of the time.
BACKWARD = range(3, 301, 22)


pytestmark = pytest.mark.usefixtures("one_thread")


def mask_of(kind: str, length: int, dtype: torch.dtype) -> Tensor | None:
    """Every query sees its first key: what happens to those that see none is tested elsewhere."""
    if kind in ("none", "causal"):
        return None
    if kind == "broadcast":
        mask = torch.rand(1, 1, 1, length) > 0.3
    else:
        mask = torch.rand(1, 2, length, length) > 0.3
    mask[..., 0] = True
    return torch.randn(mask.shape).to(dtype).masked_fill(~mask, -math.inf) if kind == "additive" else mask


def results(
    attention: Any, inputs: list[Tensor], mask: Tensor | None, causal: bool, dout: Tensor | None
) -> list[Tensor]:
    """The output, and with `dout` the gradients."""
    if dout is None:
        return [attention(*inputs, mask, is_causal=causal)]
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = attention(*leaves, mask, is_causal=causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def excess(mine: Tensor, peer: Tensor, truth: Tensor) -> float:
    """How many times the allowed error `mine` has, as L2 norms: twice the peer's, and the rounding of the truth that 0.3
    added and taken away makes. Of some hundred tensors, many are so small that the largest error of each is a matter of luck."""
    rounded = truth.to(peer.dtype)
    floor = ((rounded + 0.3 - 0.3).double() - truth).norm()
    return float((mine.double() - truth).norm() / (2 * (peer.double() - truth).norm() + 2 * floor))


@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "additive", "broadcast"])
@pytest.mark.parametrize("name", DTYPES)
def test_odd_lengths(name: str, kind: str) -> None:
    dtype, wrong = DTYPES[name], {}
    before = fastconv.fallback_counts()
    for length in LENGTHS:
        shape = (1, 2, length, 16)
        inputs = [torch.randn(shape).to(dtype) for _ in range(3)]
        dout = torch.randn(shape).to(dtype) if length in BACKWARD else None
        mask, causal = mask_of(kind, length, dtype), kind == "causal"
        mine = results(sdpa, inputs, mask, causal, dout)
        if dtype is torch.float64:
            # Nothing is more precise: the truth is torch's other algorithm, and the bound the one of its own tests.
            with sdpa_kernel(SDPBackend.MATH):
                truth = results(F.scaled_dot_product_attention, inputs, mask, causal, dout)
            found = [float(((a - b).abs() / (1e-7 + 1e-7 * b.abs())).max()) for a, b in zip(mine, truth)]
        else:
            peer = results(F.scaled_dot_product_attention, inputs, mask, causal, dout)
            exact = mask.double() if mask is not None and mask.is_floating_point() else mask
            truth = results(F.scaled_dot_product_attention, [t.double() for t in inputs], exact, causal, dout)
            found = [excess(*three) for three in zip(mine, peer, truth)]
        wrong |= {(length, which): e for which, e in zip(("out", "dq", "dk", "dv"), found) if not e <= 1}
    assert not wrong
    assert fastconv.fallback_counts() == before


@pytest.mark.parametrize("features", [257, 384, 512])
def test_wide_heads(features: int) -> None:
    """Values have a width of their own. The kernels' own bounds hold there too (test_kernels); this is the way to them."""
    for causal in (False, True):
        inputs = [torch.randn(1, 2, n, e) for n, e in ((37, features), (70, features), (70, features - 1))]
        dout = torch.randn(1, 2, 37, features - 1)
        with fastconv.observe() as records:
            mine = results(sdpa, inputs, None, causal, dout)
        assert [r.op for r in records] == ["sdpa_fwd", "sdpa_bwd"]
        truth = results(F.scaled_dot_product_attention, [t.double() for t in inputs], None, causal, dout)
        assert_close([t.double() for t in mine], truth, rtol=1.3e-6, atol=1e-5)  # torch's for float32
