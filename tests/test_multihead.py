"""nn.MultiheadAttention against torch's: every option, every mask, gradients, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_map

import fastconv
from fastconv import nn as ours

pytestmark = pytest.mark.usefixtures("one_thread")


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
@pytest.mark.parametrize("options", [
    {}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 12, "vdim": 12, "bias": False}
], ids=str)  # fmt: skip
def test_weights(options: dict[str, Any], average: bool) -> None:
    """The weights and their gradients are torch's, the output comes from our kernel, and no fallback is counted."""
    mine, theirs = pair(12, 3, **options)
    x = torch.randn(5, 6, 12, dtype=torch.float64)
    batch, length = (5, 6) if options.get("batch_first") else (6, 5)
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[1, 2:] = True
    masks: list[dict[str, Any]] = [
        {}, {"attn_mask": causal, "is_causal": True}, {"attn_mask": torch.randn(length, length, dtype=torch.float64)},
        {"key_padding_mask": padding}, {"key_padding_mask": padding, "attn_mask": causal},
        {"attn_mask": torch.randn(3 * batch, length, length, dtype=torch.float64)},
    ]  # fmt: skip
    before = fastconv.fallback_counts()
    for mask in masks:
        results = []
        for layer in (mine, theirs):
            leaf = x.detach().requires_grad_()
            with fastconv.observe() as records:
                out, weights = layer(leaf, leaf, leaf, average_attn_weights=average, **mask)
            assert [r.op for r in records] == (["sdpa_fwd"] if layer is mine else [])
            grads = torch.autograd.grad(out.sin().sum() + weights.square().sum(), [leaf, *layer.parameters()])
            results.append((out, weights, grads))
        assert_close(*results)
    assert fastconv.fallback_counts() == before
    if not options:
        assert_close(mine(x[0], x[0], x[0]), theirs(x[0], x[0], x[0]))


def test_weights_are_what_dropout_left() -> None:
    mine, _ = pair(12, 3, dropout=0.4, batch_first=True)
    x = torch.randn(2, 40, 12, dtype=torch.float64)
    out, weights = mine(x, x, x, average_attn_weights=False)
    share = (weights == 0).double().mean().item()
    assert abs(share - 0.4) < 0.03
    w, b = mine.in_proj_weight[24:], mine.in_proj_bias[24:]
    values = (x @ w.T + b).unflatten(2, (3, 4)).transpose(1, 2)
    assert_close(mine.out_proj((weights @ values).transpose(1, 2).flatten(2)), out)


def test_a_query_that_may_attend_to_nothing() -> None:
    mine, _ = pair(12, 3)
    x = torch.randn(4, 1, 12, dtype=torch.float64)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2] = True
    out, weights = mine(x, x, x, attn_mask=mask)
    assert (weights[0, 2] == 0).all()
    assert_close(out[2, 0], mine.out_proj.bias)


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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_encoders_in_eval_mode_run_on_our_kernels(grad: bool, norm_first: bool, padded: bool) -> None:
    """torch's fast path would compute a converted layer whole; where it nests, padded positions come out as 0."""
    layer = torch.nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    norm = torch.nn.LayerNorm(12, dtype=torch.float64) if norm_first else None
    model = torch.nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(3, 6, 12, dtype=torch.float64)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    options = {"src_key_padding_mask": padding} if padded else {}
    with torch.set_grad_enabled(grad):
        expected = model(x, **options)
        assert fastconv.convert(model).swapped["TransformerEncoderLayer"] == 2
        with fastconv.observe() as records:
            found = model(x, **options)
    assert [r.op for r in records].count("sdpa_fwd") == 2
    assert_close(found, expected)
    fastconv.revert(model)
    assert type(model) is torch.nn.TransformerEncoder
    assert type(model.layers[0]) is torch.nn.TransformerEncoderLayer


def test_an_encoder_of_ours_is_torch_s_in_training() -> None:
    torch.manual_seed(3)
    theirs = torch.nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True, dtype=torch.float64)
    mine = ours.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True, dtype=torch.float64)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    results = []
    for layer in (mine, theirs):
        out = layer(x, src_mask=causal, is_causal=True)
        results.append((out, torch.autograd.grad(out.sin().sum(), list(layer.parameters()))))
    assert_close(*results)
    assert type(mine.self_attn) is ours.MultiheadAttention


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_addition_and_its_norm_are_one_call(norm_first: bool) -> None:
    layer = ours.TransformerEncoderLayer(12, 3, 20, 0.0, norm_first=norm_first)
    residuals = []
    for norm in (layer.norm1, layer.norm2):
        norm.register_forward_hook(lambda module, args, result: residuals.append(len(args) == 2))
    with fastconv.observe() as records:
        layer(torch.randn(5, 2, 12))
    assert residuals == ([False, True] if norm_first else [True, True])
    assert [r.op for r in records].count("layer_norm_fwd") == 2
    layer.norm2 = torch.nn.RMSNorm(12)
    assert layer(torch.randn(5, 2, 12)).shape == (5, 2, 12)


def test_subclasses_that_the_fast_path_would_bypass_are_reported() -> None:
    class Own(torch.nn.TransformerEncoderLayer):
        pass

    (kept,) = (k for k in fastconv.convert(Own(12, 2)).kept if k.kind == "Own")
    assert "set_fastpath_enabled(False)" in kept.reason


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
    call((5, 2, 12), attn_mask=torch.zeros(3, 5, 5)),
    call((5, 2, 12), attn_mask=torch.zeros(5)),
    call((5, 2, 12), key_padding_mask=torch.zeros(2, 5, dtype=torch.int)),
]


@pytest.mark.parametrize("bad", BAD)
def test_errors_are_torch_s(bad: Any) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        bad(torch.nn)
    with pytest.raises(theirs.type) as mine:
        bad(ours)
    assert mine.type is theirs.type
    assert str(mine.value) == str(theirs.value)


# ---- torch's own samples, and the rest of parity ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_samples_of_torch_s_own_tests(place: Any, training: bool) -> None:
    (info,) = (info for info in module_db if info.module_cls is torch.nn.MultiheadAttention)
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
    assert len(samples) > 10

    def there(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return place(t.detach().to(place.dtype if t.is_floating_point() else t.dtype)).requires_grad_(t.requires_grad)

    for sample in samples:
        made, called = sample.constructor_input, sample.forward_input
        torch.manual_seed(0)
        theirs = torch.nn.MultiheadAttention(*made.args, **made.kwargs, dtype=torch.float64).train(training)
        mine = ours.MultiheadAttention(*made.args, **made.kwargs, dtype=place.dtype).train(training)
        mine.load_state_dict(theirs.state_dict())
        found, expected = [], []
        for layer, outcome, bring in ((place(mine), found, there), (theirs, expected, lambda t: t)):
            torch.manual_seed(1)
            args, kwargs = tree_map(bring, (called.args, called.kwargs))
            out, weights = layer(*args, **kwargs)
            leaves = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
            outcome += [
                out,
                weights,
                torch.autograd.grad(out.sin().sum(), [*leaves, *layer.parameters()], allow_unused=True),
            ]
        place.same(found, expected, 20)


def test_masks_of_two_kinds_warn_as_torch_s_do() -> None:
    x = torch.randn(5, 2, 12, dtype=torch.float64)
    causal, padding = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.bool)
    for layer in pair(12, 3):
        for masks in ((causal, padding), (causal.bool(), padding.double())):
            with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask is deprecated"):
                layer(x, x, x, attn_mask=masks[0], key_padding_mask=masks[1], need_weights=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_compiles_without_a_break(place: Any) -> None:
    """Without weights; the matrix of weights is torch's under torch.compile, which fullgraph would not notice."""
    mine, theirs = (layer.eval() for layer in pair(12, 3, batch_first=True))
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)

    def call(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = layer(x, x, x, attn_mask=mask, need_weights=False)[0]
        return out

    expected = call(theirs, x, causal)
    place(mine.to(place.dtype))
    compiled = torch.compile(lambda x, mask: call(mine, x, mask), backend="aot_eager", fullgraph=True)
    with fastconv.observe() as records:
        place.same(compiled(place(x.to(place.dtype)), place(causal)), expected)
    assert [r.op for r in records] == ["sdpa_fwd"]
