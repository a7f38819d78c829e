"""The models for sequences: published sizes and keys, torch's own layers as an oracle, both backends alike, decoding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fastconv
from fastconv import models
from fastconv.commands.twins import build_twins
from fastconv.models import decoding, positions
from fastconv.models.attention import causal_mask

pytestmark = pytest.mark.usefixtures("one_thread")


TRANSFORMER = {"source_size": 11, "target_size": 7, "d_model": 24, "num_heads": 3, "num_layers": 2, "d_ff": 20}
GPT2 = {"vocabulary": 19, "positions": 32, "width": 24, "depth": 2, "num_heads": 3}
BERT = {"vocabulary": 23, "positions": 16, "width": 24, "depth": 2, "num_heads": 3, "hidden": 20}


def tokens(size: int, *shape: int) -> Tensor:
    return torch.randint(1, size, shape)


def padded(size: int, *shape: int) -> Tensor:
    """With the ends of some rows padded with 0."""
    found = tokens(size, *shape)
    found[0, -2:] = 0
    return found


# Name, keywords, inputs.
RUNS: dict[str, tuple[str, dict[str, Any], Callable[[], tuple[Any, ...]]]] = {
    **{
        f"transformer-{kind}": (
            "transformer", {**TRANSFORMER, "positions": kind, "max_distance": 3},
            lambda: (padded(11, 3, 9), tokens(7, 3, 6)),
        )
        for kind in positions.KINDS
    },
    "gpt2": ("gpt2", GPT2, lambda: (tokens(19, 2, 13),)),
    "bert": ("bert_base", BERT, lambda: (tokens(23, 2, 9), tokens(2, 2, 9), torch.rand(2, 9) > 0.2)),
    "lstm": ("lstm", {"input_size": 5, "hidden_size": 6}, lambda: (torch.randn(4, 3, 5),)),
    "gru": ("gru", {"input_size": 5, "hidden_size": 6}, lambda: (torch.randn(4, 3, 5),)),
}  # fmt: skip


def tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for part in output for t in tensors(part)]


@pytest.mark.parametrize("run", RUNS)
def test_both_backends_agree(place: Any, run: str) -> None:
    """In eval mode in float32, and by gradients and the weights after a training step, dropout included, in float64 (on a GPU in
    float32 and without dropout, whose generator is another there)."""
    name, config, make = RUNS[run]
    ours, theirs = build_twins(name, **config)
    inputs = make()
    there = [place(t) for t in inputs]
    before = fastconv.fallback_counts()
    with torch.no_grad(), fastconv.observe() as records:
        expected = tensors(theirs(*inputs))
    assert not records
    place(ours)
    with torch.no_grad(), fastconv.observe() as records:
        found = tensors(ours(*there))
    assert {"sdpa_fwd", "layer_norm_fwd"} <= {r.op for r in records} or run in ("lstm", "gru")
    assert_close(place.back(found), expected, rtol=1e-4, atol=1e-5)
    states = []
    for model, given, dtype in ((ours, there, place.dtype), (theirs, inputs, torch.float64)):
        model.to(dtype).train()
        for layer in model.modules():
            if hasattr(layer, "num_heads"):
                layer.dropout = 0.0  # the generator of dropped weights is ours
            if place.is_gpu and isinstance(layer, nn.Dropout):
                layer.p = 0.0
        torch.manual_seed(1)
        outputs = tensors(model(*(t.to(dtype) if t.is_floating_point() else t for t in given)))
        sum(t.sin().sum() for t in outputs).backward()  # type: ignore[union-attr]
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        states.append(({key: p.grad for key, p in model.named_parameters()}, model.state_dict()))
    place.same(states[0], states[1], 18, rtol=1e-8, atol=1e-9)
    assert fastconv.fallback_counts() == before


@pytest.mark.parametrize(("name", "parameters", "keys"), [("gpt2", 124439808, 148), ("bert_base", 109482240, 199)])
def test_published_sizes(name: str, parameters: int, keys: int) -> None:
    with torch.device("meta"):
        model = models.create(name, layers=nn)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == (parameters, keys)


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("gpt2", "wpe.weight", (1024, 768)),
        ("gpt2", "h.0.attn.c_attn.weight", (768, 2304)),
        ("gpt2", "h.11.mlp.c_proj.weight", (3072, 768)),
        ("gpt2", "ln_f.bias", (768,)),
        ("bert_base", "embeddings.token_type_embeddings.weight", (2, 768)),
        ("bert_base", "embeddings.LayerNorm.weight", (768,)),
        ("bert_base", "encoder.layer.11.attention.self.query.weight", (768, 768)),
        ("bert_base", "encoder.layer.0.attention.output.LayerNorm.bias", (768,)),
        ("bert_base", "encoder.layer.3.intermediate.dense.weight", (3072, 768)),
        ("bert_base", "pooler.dense.bias", (768,)),
    ],
)
def test_published_keys(name: str, key: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        assert tuple(models.create(name, layers=nn).state_dict()[key].shape) == shape


def test_the_paper_s_base_model() -> None:
    """512 wide, six layers: 44.1 million parameters between the embeddings and the last layer."""
    with torch.device("meta"):
        model = models.create("transformer", layers=nn)
    between = sum(p.numel() for part in (model.encoder, model.decoder) for p in part.parameters())
    assert between == 44138496
    assert len(model.encoder) == len(model.decoder) == 6


@pytest.mark.parametrize("name", ["gpt2", "bert_base"])
def test_checkpoints_load_as_published(name: str, tmp_path: Any) -> None:
    model = models.create(name, layers=nn, **(GPT2 if name == "gpt2" else BERT))
    state = dict(model.state_dict())
    if name == "gpt2":
        state = {f"transformer.{key}": tensor for key, tensor in state.items()}
        state |= {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32), "lm_head.weight": model.wte.weight.detach()}
    else:
        renamed = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for key, tensor in state.items()}
        state = {f"bert.{key}": tensor for key, tensor in renamed.items()}
        state |= {"cls.predictions.bias": torch.zeros(23), "bert.embeddings.position_ids": torch.arange(16)[None]}
    torch.save(state, tmp_path / "model.bin")
    copy = models.create(name, layers=fastconv.nn, **(GPT2 if name == "gpt2" else BERT))
    models.load_weights(copy, tmp_path / "model.bin")
    assert_close(copy.state_dict(), model.state_dict(), rtol=0, atol=0)


# ---- Against torch's own layers -------------------------------------------------------------------------------------------


def packed(attention: Any) -> dict[str, Tensor]:
    parts = attention.query, attention.key, attention.value
    return {
        "in_proj_weight": torch.cat([part.weight for part in parts]),
        "in_proj_bias": torch.cat([part.bias for part in parts]),
        "out_proj.weight": attention.out.weight,
        "out_proj.bias": attention.out.bias,
    }


def test_layers_are_torch_s_transformer_layers() -> None:
    model = models.create("transformer", **TRANSFORMER).eval()
    sizes: Any = {"d_model": 24, "nhead": 3, "dim_feedforward": 20, "batch_first": True}
    x, memory = torch.randn(2, 6, 24), torch.randn(2, 9, 24)
    parts = {"linear1": "feed_forward.linear1", "linear2": "feed_forward.linear2"}
    for kind, names in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "multihead_attn"))):
        layer = getattr(model, kind)[1]
        theirs = getattr(nn, f"Transformer{kind.capitalize()}Layer")(**sizes).eval()
        state = {}
        for name, ours in zip(names, ("self_attention", "cross_attention")):
            state |= {f"{name}.{key}": t for key, t in packed(getattr(layer, ours)).items()}
        norms = {f"norm{i}": f"norm{i}" for i in range(1, len(names) + 2)}
        for name, ours in {**parts, **norms}.items():
            state |= {f"{name}.{key}": t for key, t in layer.get_submodule(ours).state_dict().items()}
        theirs.load_state_dict(state)
        if kind == "encoder":
            assert_close(layer(x, None), theirs(x))
        else:
            from fastconv.models.transformer import Sight

            expected = theirs(x, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(6))
            assert_close(layer(x, layer.cross_attention.project(memory), Sight(None, True, None)), expected)


def test_sinusoids_are_the_paper_s() -> None:
    table = positions.sinusoids(40, 16)
    for pos, i in itertools.product((0, 1, 7, 39), range(8)):
        angle = pos / 10000 ** (2 * i / 16)
        assert float(table[pos, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-5)
        assert float(table[pos, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-5)
    long = positions.Sinusoidal(16)
    assert_close(long(torch.zeros(1, 3, 16), start=200)[0], positions.sinusoids(203, 16)[200:])


def test_relative_biases_follow_the_distance() -> None:
    bias = positions.RelativeBias(2, 2)
    nn.init.normal_(bias.weight)
    line = bias(3, 6, start=3)
    assert line.shape == (2, 3 + 6 - 1)
    found = positions.matrix(line, 3)
    for h, i, j in itertools.product(range(2), range(3), range(6)):
        assert found[h, i, j] == bias.weight[h, max(-2, min(2, j - (i + 3))) + 2]


def test_relative_biases_are_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """On our kernels; a mask stays boolean, and a causal one no mask at all."""
    seen = []
    right = fastconv.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, **options: Any) -> Any:
        seen.append((None if mask is None else mask.dtype, causal, {name: t.shape for name, t in options.items()}))
        return right(q, k, v, mask, p, causal, **options)

    monkeypatch.setattr(fastconv.functional, "scaled_dot_product_attention", spy)
    model = models.create("transformer", **{**TRANSFORMER, "num_layers": 1}, positions="relative").eval()
    model(padded(11, 3, 9), tokens(7, 3, 6))
    shape = {"relative_bias": (3, 17)}
    assert seen == [(torch.bool, False, shape), (None, True, {"relative_bias": (3, 11)}), (torch.bool, False, {})]


def test_positions_beyond_what_was_learned() -> None:
    model = models.create("transformer", **TRANSFORMER, positions="learned", max_length=4)
    with pytest.raises(IndexError, match="position 4"):
        model(tokens(11, 1, 5), tokens(7, 1, 2))
    with pytest.raises(IndexError, match="position 32"):
        models.create("gpt2", **GPT2)(tokens(19, 1, 33))
    with pytest.raises(ValueError, match="positions: got 'none'"):
        models.create("transformer", **TRANSFORMER, positions="none")


def test_padding_changes_nothing() -> None:
    model = models.create("transformer", **TRANSFORMER).eval()
    source, target = tokens(11, 2, 5), tokens(7, 2, 4)
    longer = torch.cat((source, source.new_zeros(2, 3)), 1)
    assert_close(model(longer, target), model(source, target), rtol=1e-5, atol=1e-5)


# ---- Decoding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [name for name in RUNS if name.startswith(("transformer", "gpt2"))])
def test_token_by_token_as_all_at_once(place: Any, run: str) -> None:
    name, config, make = RUNS[run]
    model = place(models.create(name, **config).eval())
    *source, target = map(place, make())
    with torch.no_grad():
        whole = model(*source, target)
        state = model.start(*source)
        if source:
            state = model._translation(*source)
        cuts = [0, 1, 2, 5, target.shape[1]]  # pieces of one and of several tokens
        for begin, end in itertools.pairwise(cuts):
            one, all_ = place.back((state(target[:, begin:end]), whole[:, end - 1]))
            assert_close(one, all_, rtol=1e-4, atol=1e-5)


def test_causal_mask() -> None:
    mask = causal_mask(2, 4, torch.device("cpu"))
    assert mask.tolist() == [[True, True, True, False], [True, True, True, True]]


def test_greedy_takes_the_likeliest_token_at_each_step() -> None:
    model = models.create("transformer", **TRANSFORMER).eval()
    source = padded(11, 3, 6)
    found = model.greedy(source, start=1, end=2, max_length=5)
    assert 0 < found.shape[1] <= 5
    for row in range(3):
        target = [1]
        for following in found[row].tolist():
            logits = model(source[row : row + 1], torch.tensor([target]))[0, -1]
            assert following == (2 if 2 in target[1:] else int(logits.argmax()))
            target.append(following)


class Markov:
    """A step whose logits depend on the last token and on how many there were."""

    def __init__(self, size: int) -> None:
        self.table = torch.randn(4, size, size)
        self.time = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.time += 1
        return self.table[self.time - 1, tokens[:, -1]]

    def reorder(self, rows: Tensor) -> None:
        pass


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("seed", range(5))
def test_wide_beams_find_the_best_of_all_sequences(seed: int, alpha: float) -> None:
    torch.manual_seed(seed)
    size, end, length = 4, 2, 4
    step = Markov(size)
    table = step.table.log_softmax(2)

    def score(sequence: tuple[int, ...]) -> float:
        total, last = 0.0, 1
        for t, token in enumerate(sequence):
            total += float(table[t, last, token])
            last = token
        return total / ((5 + len(sequence)) / 6) ** alpha

    every = [s for n in range(1, length + 1) for s in itertools.product(range(size), repeat=n)]
    whole = [s for s in every if end not in s[:-1] and (s[-1] == end or len(s) == length)]
    best = max(whole, key=score)
    found = decoding.beam_search(step, torch.tensor([[1]]), end, length, size**length, alpha)[0].tolist()
    assert tuple(found[: len(best)]) == best
    assert set(found[len(best) :]) <= {end}


def test_one_beam_is_greedy_and_rows_are_independent() -> None:
    model = models.create("transformer", **TRANSFORMER).eval()
    source = tokens(11, 4, 6)
    options: Any = {"start": 1, "end": 2, "max_length": 6}
    greedy, one = model.greedy(source, **options), model.beam(source, beams=1, **options)
    assert one.tolist() == greedy.tolist()
    together = model.beam(source, beams=3, **options)
    for row in range(4):
        alone = model.beam(source[row : row + 1], beams=3, **options)[0].tolist()
        assert together[row, : len(alone)].tolist() == alone
    with pytest.raises(ValueError, match="beams: got 0"):
        model.beam(source, beams=0, **options)
    text = models.create("gpt2", **GPT2).eval()
    prompt = tokens(19, 2, 3)
    assert text.beam(prompt, end=0, max_length=4, beams=1).tolist() == text.greedy(prompt, end=0, max_length=4).tolist()


# ---- Recurrent networks ---------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"num_layers": 2},
    {"bidirectional": True, "batch_first": True},
    {"bias": False, "num_layers": 2, "bidirectional": True},
    {"proj_size": 3, "bidirectional": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_options(name: str, options: dict[str, Any]) -> None:
    if name == "gru" and "proj_size" in options:
        pytest.skip("torch's GRU has no projections")
    ours, theirs = (model.double() for model in build_twins(name, input_size=5, hidden_size=6, **options))
    assert type(theirs) is (nn.LSTM if name == "lstm" else nn.GRU)
    assert repr(ours) == repr(theirs)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    state = theirs(x)[1]
    state = tuple(t.detach() for t in state) if name == "lstm" else state.detach()
    for inputs in ((x,), (x, state), (x[0],)):
        results = []
        for model in (ours, theirs):
            leaf = inputs[0].clone().requires_grad_()
            found = tensors(model(leaf, *inputs[1:]))
            results.append((found, torch.autograd.grad(sum(t.sin().sum() for t in found), [leaf, *model.parameters()])))
        assert_close(results[0], results[1])


def test_recurrent_errors_and_packed_sequences() -> None:
    ours, theirs = build_twins("lstm", input_size=5, hidden_size=6)
    for bad in (torch.randn(4, 3, 6), torch.randn(5), torch.randn(0, 3, 5)):
        for model in (ours, theirs):
            with pytest.raises((RuntimeError, ValueError)):
                model(bad)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        ours(torch.randn(4, 3, 5), (torch.zeros(1, 2, 6), torch.zeros(1, 3, 6)))
    ragged = nn.utils.rnn.pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    before = sum(fastconv.fallback_counts().values())
    fastconv.set_fallback("silent")
    try:
        assert_close(ours(ragged)[0].data, theirs(ragged)[0].data)
    finally:
        fastconv.set_fallback("warn")
    assert sum(fastconv.fallback_counts().values()) == before + 1
