"""Hugging Face transformers on fastconv's attention, where that package is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import fastconv

transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")

SIZES: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def configuration(kind: str) -> Any:
    if kind == "bert":
        return transformers.BertConfig(vocab_size=50, **SIZES)
    if kind == "gpt2":
        return transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    if kind == "gpt_oss":
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 4}
        return transformers.GptOssConfig(vocab_size=50, num_key_value_heads=2, **experts, **SIZES)
    return transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "gpt_oss"])
def test_models_give_what_their_own_attention_gives(kind: str, padded: bool) -> None:
    import fastconv.integrations.transformers

    torch.manual_seed(0)
    models = []
    for implementation in ("fastconv", "eager"):
        config = configuration(kind)
        config._attn_implementation = implementation
        models.append(transformers.AutoModel.from_config(config, attn_implementation=implementation).eval())
    ours, theirs = models
    for name, parameter in ours.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(1, 50, (2, 9))
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, -3:] = 0
    with fastconv.observe() as records, torch.no_grad():
        found = ours(tokens, attention_mask=mask)[0]
    assert sum(r.op == "sdpa_fwd" for r in records) == 2
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask)[0]
    assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_biases_of_positions(padded: bool) -> None:
    """T5: learned biases of distances in encoder and decoder, causal in the latter, gradients of the biases included."""
    if not hasattr(transformers.models.t5.modeling_t5, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("this T5 has an attention of its own: transformers 5 or later")
    import fastconv.integrations.transformers

    torch.manual_seed(0)
    sizes: Any = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    tokens, target = torch.randint(1, 50, (2, 9)), torch.randint(1, 50, (2, 7))
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, -3:] = 0
    found: list[Any] = []
    state: Any = None
    for implementation, calls in (("fastconv", 6), ("eager", 0)):
        config = transformers.T5Config(vocab_size=50, **sizes)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation)
        state = state or model.state_dict()
        model.load_state_dict(state)
        with fastconv.observe() as records:
            out = model(tokens, attention_mask=mask, decoder_input_ids=target).logits
        assert sum(r.op == "sdpa_fwd" for r in records) == calls
        biases = [p for name, p in model.named_parameters() if "relative_attention_bias" in name]
        assert len(biases) == 2
        found.append((out, torch.autograd.grad(out.sin().sum(), biases)))
    assert_close(*found, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache() -> None:
    import fastconv.integrations.transformers  # noqa: F401

    torch.manual_seed(0)
    config = configuration("llama")
    ours = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastconv").eval()
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    theirs.load_state_dict(ours.state_dict())
    prompt = torch.randint(1, 50, (1, 5))
    options: Any = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert ours.generate(prompt, **options).tolist() == theirs.generate(prompt, **options).tolist()


def test_weights_are_refused() -> None:
    from fastconv.integrations.transformers import attention

    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        attention(torch.nn.Identity(), q, q, q, None, output_attentions=True)
    with pytest.raises(NotImplementedError, match="paged cache"):
        attention(torch.nn.Identity(), q, q, q, None, cache=object())


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_reference_models_are_theirs(name: str) -> None:
    """fastconv.models' GPT-2 and BERT with the weights of Hugging Face's, under Hugging Face's keys."""
    torch.manual_seed(0)
    theirs = transformers.AutoModel.from_config(configuration(name), attn_implementation="eager").eval()
    if name == "gpt2":
        sizes = {"vocabulary": 50, "positions": 32, "width": 32, "depth": 2, "num_heads": 4}
    else:
        sizes = {"vocabulary": 50, "width": 32, "depth": 2, "num_heads": 4, "hidden": 48}
    ours: Any = fastconv.models.create("gpt2" if name == "gpt2" else "bert_base", **sizes).eval()
    ours.load_state_dict(ours.adapt_checkpoint(theirs.state_dict()))
    tokens = torch.randint(1, 50, (2, 9))
    with torch.no_grad():
        expected = theirs(tokens)
        if name == "gpt2":
            found = ours(tokens)
            assert_close(found, expected[0] @ theirs.wte.weight.T, rtol=1e-4, atol=1e-5)
        else:
            found = ours(tokens)
            assert_close(found, (expected[0], expected[1]), rtol=1e-4, atol=1e-5)
