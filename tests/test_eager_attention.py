"""Attention without mask, dropout and gradient, which csrc/eager answers: the bits of Python's way, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv.functional as ours
from fastconv import _attention
from fastconv.ops import _eager
from fastconv.ops._eager import native

needs_eager = pytest.mark.skipif(not _eager.connected, reason="this torch has no DLPack exchange API")


def operands(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    swapped: bool = False,
) -> list[Tensor]:
    """Random ones; `swapped`: (B, L, H, E) in memory."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in (q, k, v)]
    return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in made] if swapped else made


def both(
    q: Tensor, k: Tensor, v: Tensor, *options: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor | None, Tensor]:
    """What C answers, and what Python makes of the same call."""
    mine = native.eager_sdpa(q, k, v, *options)
    with monkeypatch.context() as patch:
        patch.setattr(_attention, "_eager_sdpa", lambda *_: None)
        causal, scale, grouped = options
        expected = ours.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return mine, expected


@needs_eager
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3, 0.0])
def test_same_bits_and_strides(
    dtype: torch.dtype, swapped: bool, causal: bool, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for q, k, v in (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)), ((1, 2, 1, 16), (1, 2, 40, 16), (1, 2, 40, 16))):
        given = operands(q, k, v, dtype, swapped)
        for _ in range(2):  # made, and found again
            mine, expected = both(*given, causal, scale, False, monkeypatch=monkeypatch)
            assert mine is not None
            assert torch.equal(mine, expected)
            assert mine.stride() == expected.stride()


@needs_eager
def test_heads_that_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for heads, grouped in (((2, 2), True), ((1, 1), False), ((1, 1), True)):
        shapes = (2, 4, 5, 8), (2, heads[0], 7, 8), (2, heads[1], 7, 8)
        mine, expected = both(*operands(*shapes), False, None, grouped, monkeypatch=monkeypatch)
        assert mine is not None
        assert torch.equal(mine, expected)
    # Keys of 2 heads and values of 4 are brought to one number by a copy.
    mine, expected = both(
        *operands((2, 4, 5, 8), (2, 2, 7, 8), (2, 4, 7, 8)), False, None, True, monkeypatch=monkeypatch
    )
    assert mine is None
    assert expected.shape == (2, 4, 5, 8)


@needs_eager
def test_what_is_left_to_python() -> None:
    q, k, v = operands((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8))
    leaf = q.clone().requires_grad_()
    assert native.eager_sdpa(leaf, k, v, False, None, False) is None
    assert native.eager_sdpa(q[0], k[0], v[0], False, None, False) is None
    assert native.eager_sdpa(q, k, v, 0, None, False) is None
    assert native.eager_sdpa(q, k, v, False, 1, False) is None
    with torch.no_grad():
        assert native.eager_sdpa(leaf, k, v, False, None, False) is not None
    y = ours.scaled_dot_product_attention(leaf, k, v)
    assert y.requires_grad
    with _attention.weights_of() as weights:
        ours.scaled_dot_product_attention(q, k, v)
    assert [tuple(w.shape) for w in weights] == [(1, 2, 5, 7)]


def test_errors_are_the_usual_ones() -> None:
    q, k, v = operands((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8))
    with pytest.raises(RuntimeError, match="query has 8 features and key 4"):
        ours.scaled_dot_product_attention(q, k[..., :4], v)
    with pytest.raises(RuntimeError, match="key has length 7 and value 6"):
        ours.scaled_dot_product_attention(q, k, v[:, :, :6])
    with pytest.raises(RuntimeError, match="same dtype"):
        ours.scaled_dot_product_attention(q, k.double(), v)
