"""nn.MultiheadAttention against torch's: every option, every mask, gradients, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fastconv
from fastconv import nn as ours


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pair(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A layer of ours and one of torch's with the same parameters."""
    theirs = torch.nn.MultiheadAttention(*args, **kwargs, dtype=torch.float64)
    mine = ours.MultiheadAttention(*args, **kwargs, dtype=torch.float64)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def same(mine: Any, theirs: Any, inputs: list[Tensor], **options: Any) -> None:
    results = []
    for layer in (mine, theirs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        q, k, v = leaves * 3 if len(leaves) == 1 else leaves
        with fastconv.observe() as records:
            out, weights = layer(q, k, v, need_weights=False, **options)
        assert [r.op for r in records] == (["sdpa_fwd"] if layer is mine else [])
        assert weights is None
        grads = torch.autograd.grad(out.sin().sum(), [*leaves, *layer.parameters()], allow_unused=True)
        results.append((out, grads))
    assert_close(results[0], results[1])
    assert results[0][0].stride() == results[1][0].stride()


@pytest.mark.parametrize("options", [
    {}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_options(options: dict[str, Any], training: bool) -> None:
    mine, theirs = (layer.train(training) for layer in pair(12, 3, **options))
    x = torch.randn(5, 6, 12, dtype=torch.float64)
    same(mine, theirs, [x])
    same(mine, theirs, [x, torch.randn_like(x), torch.randn_like(x)])
    same(mine, theirs, [x[0]])


def test_other_widths_of_keys_and_values() -> None:
    mine, theirs = pair(12, 3, kdim=5, vdim=7, batch_first=True)
    same(mine, theirs, [torch.randn(2, n, width, dtype=torch.float64) for n, width in ((4, 12), (6, 5), (6, 7))])


def test_masks() -> None:
    mine, theirs = pair(12, 3, batch_first=True)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    additive = torch.randn(6, 6, dtype=torch.float64)
    per_head = torch.rand(6, 6, 6) > 0.6
    per_head[..., 0] = False
    same(mine, theirs, [x], attn_mask=causal)
    same(mine, theirs, [x], attn_mask=causal, is_causal=True)
    same(mine, theirs, [x], attn_mask=additive)
    same(mine, theirs, [x], attn_mask=per_head)
    same(mine, theirs, [x], key_padding_mask=padding)
    same(mine, theirs, [x], key_padding_mask=padding, attn_mask=causal)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.filterwarnings("ignore::fastconv.FallbackWarning")
def test_weights_come_from_torch_and_are_counted(average: bool) -> None:
    mine, theirs = pair(12, 3)
    x = torch.randn(5, 6, 12, dtype=torch.float64)
    before = fastconv.fallback_counts().get(("MultiheadAttention", "need_weights=True"), 0)
    assert_close(mine(x, x, x, average_attn_weights=average), theirs(x, x, x, average_attn_weights=average))
    assert fastconv.fallback_counts()["MultiheadAttention", "need_weights=True"] == before + 1


def test_inference_runs_on_our_kernels() -> None:
    mine, theirs = (layer.eval() for layer in pair(12, 3, batch_first=True))
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    with torch.no_grad(), fastconv.observe() as records:
        found = mine(x, x, x, need_weights=False)[0]
    assert [r.op for r in records] == ["sdpa_fwd"]
    assert_close(found, theirs(x, x, x, need_weights=False)[0])


def test_conversion_and_back() -> None:
    model = torch.nn.TransformerDecoderLayer(12, 3, 20, batch_first=True).double().eval()
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    expected = model(x, x)
    fastconv.convert(model)
    assert type(model.self_attn) is ours.MultiheadAttention
    with fastconv.observe() as records:
        assert_close(model(x, x), expected)
    assert [r.op for r in records].count("sdpa_fwd") == 2
    fastconv.revert(model)
    assert type(model.self_attn) is torch.nn.MultiheadAttention


def call(*shapes: tuple[int, ...], **options: Any) -> Any:
    inputs = [torch.zeros(shape) for shape in (shapes * 3 if len(shapes) == 1 else shapes)]
    return lambda m: m.MultiheadAttention(12, 3)(*inputs, need_weights=False, **options)


BAD: list[Any] = [
    lambda m: m.MultiheadAttention(0, 1),
    lambda m: m.MultiheadAttention(12, 5),
    call((1, 2, 3, 12)),
    call((5, 2, 12), (5, 12), (5, 12)),
    call((5, 2, 10)),
    call((5, 2, 12), (6, 2, 12), (5, 2, 12)),
    call((5, 2, 12), attn_mask=torch.zeros(4, 5)),
    call((5, 2, 12), attn_mask=torch.zeros(5, 5, dtype=torch.int)),
    call((5, 2, 12), key_padding_mask=torch.zeros(2, 4)),
    call((5, 2, 12), is_causal=True),
]


@pytest.mark.parametrize("bad", BAD)
def test_errors_are_torch_s(bad: Any) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        bad(torch.nn)
    with pytest.raises(theirs.type) as mine:
        bad(ours)
    assert mine.type is theirs.type
    assert str(mine.value) == str(theirs.value)
