"""The bench's cases for sequences: layer norm, attention in halves, whole models that read texts."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastconv
from fastconv.bench import main, sequences, texts
from fastconv.bench.attention import Sdpa
from fastconv.bench.cases import make
from fastconv.bench.memory import peak_bytes
from fastconv.bench.networks import Network
from fastconv.bench.runner import Settings, run
from fastconv.bench.shapes import NormShape, batched, parse_linear, parse_norm, parse_sdpa, short
from fastconv.testing.timing import Protocol

SETTINGS = Settings(
    protocol=Protocol(repetitions=9, max_repetitions=9, min_sample_s=1e-6, warmup_s=0.0, max_seconds=1.0)
)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_layer_norm_is_verified_against_torch(direction: str) -> None:
    shape = parse_norm("m300c33")
    assert (shape, parse_norm(short(shape)), batched(shape, 2)) == (NormShape(300, 33), shape, NormShape(600, 33))
    result = run(make("layer_norm", shape, direction), SETTINGS)
    assert [c["who"] for c in result["contestants"]] == ["torch", "fastconv"]
    assert {c["status"] for c in result["contestants"]} <= {"ok", "noisy"}
    assert result["contestants"][1]["kernel"].startswith(f"layer_norm_{direction}.rows.f32")
    assert result["bytes"] == (2 if direction == "fwd" else 3) * 4 * 300 * 33


def test_a_wrong_layer_norm_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastconv.functional.layer_norm
    monkeypatch.setattr(fastconv.functional, "layer_norm", lambda x, *rest: right(x, *rest) * (1 + 1e-5))
    result = run(make("layer_norm", parse_norm("m300c33"), "bwd"), SETTINGS)
    assert [c["status"] for c in result["contestants"] if c["who"] == "fastconv"] == ["void"]


HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("dtype", HALVES)
def test_attention_in_halves(dtype: str, direction: str) -> None:
    result = run(make("sdpa", parse_sdpa("h2q33d16"), direction, dtype=dtype), SETTINGS)
    assert {c["status"] for c in result["contestants"]} <= {"ok", "noisy"}
    ours = result["contestants"][-1]
    assert ours["kernel"].startswith(f"sdpa_{direction}.flash.{dtype}.")
    # What storing alone explains, and no more: a fault of one unit in the last place would be seen.
    assert ours["error"]["rel_l2"] < ours["error"]["bound"] < torch.finfo(HALVES[dtype]).eps * 1.01


WITH_MATH = replace(SETTINGS, peers=("torch", "torch_math"))


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("mask", ["causal", "bool", "float", "padding"])
def test_masked_attention(mask: str, direction: str) -> None:
    shape = parse_sdpa(f"n2h2q33k40d16+{mask}")
    assert parse_sdpa(short(shape)) == shape
    assert (shape.causal, shape.mask) == ((True, "") if mask == "causal" else (False, mask))
    case = make("sdpa", shape, direction)
    assert isinstance(case, Sdpa)
    result = run(case, WITH_MATH)
    assert [c["who"] for c in result["contestants"]] == ["torch", "torch_math", "fastconv"]
    assert {c["status"] for c in result["contestants"]} <= {"ok", "noisy"}
    assert result["contestants"][-1]["kernel"].startswith(f"sdpa_{direction}.flash.f32")
    if mask != "causal":
        plain = make("sdpa", replace(shape, mask=""), direction)
        assert not torch.allclose(case.truth, plain.truth, rtol=0.1), "the mask is not in the timed call"


def test_one_mask_at_a_time() -> None:
    for text in ("h2q8d8+causal+bool", "h2q8d8+sliding"):
        with pytest.raises(ValueError, match=r"only \+causal or one of \+bool"):
            parse_sdpa(text)


def test_peak_memory_counts_scratch_and_scores() -> None:
    """MATH stores the scores of 2 heads, 8 MB. Scratch that ours keeps between calls counts in each, beside 512 KB of results."""
    case = make("sdpa", parse_sdpa("h2q1024d64"), "fwd")
    for _ in range(2):
        found = {c["who"]: c["peak_bytes"] for c in run(case, WITH_MATH)["contestants"]}
        if found["fastconv"] is None:
            pytest.skip("no high-water mark of memory here")
        assert found["torch_math"] >= 8 << 20
        assert 700 << 10 <= found["fastconv"] < 4 << 20


def test_peaks_are_of_calls_that_may_fail() -> None:
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 // 0)
    with pytest.raises(NotImplementedError, match="torch_math is not timed on linear fwd"):
        make("linear", parse_linear("m7i40o33"), "fwd").math_call("nchw")


def test_peers_of_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sdpa", "--shape", "h1q16d8+padding", "--repetitions", "9", "--seconds", "0.1"]
    assert main([*words, "--json", str(tmp_path / "sdpa.json")]) == 0
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("×math", "MB nchw", "MB math"))
    (result,) = json.loads((tmp_path / "sdpa.json").read_text())["results"]
    assert [c["who"] for c in result["contestants"]] == ["torch", "torch_math", "fastconv"]
    assert "--peers torch,torch_math" in result["repro"]
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "fastconv bench lengths --help" in capsys.readouterr().out


@pytest.mark.parametrize("direction", ["fwd", "dgrad", "wgrad"])
def test_linear_in_halves(direction: str) -> None:
    result = run(make("linear", parse_linear("m7i40o33"), direction, dtype="bf16"), SETTINGS)
    assert {c["status"] for c in result["contestants"]} <= {"ok", "noisy"}
    ours = result["contestants"][-1]
    assert ours["kernel"].startswith(f"conv2d_{direction}.pointwise.bf16.")
    assert ours["error"]["rel_l2"] < ours["error"]["bound"] < torch.finfo(torch.bfloat16).eps / 2 * 1.01


def test_halves_are_for_attention_and_linear(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sdpa", "linear", "--dtype", "bf16", "--list"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("sdpa bf16: sdpa fwd n1h16q2048d64\n")
    assert "\nlinear bf16: linear fwd m1i4096o4096\n" in listed
    for words in (["conv2d"], ["sdpa", "conv2d"], ["model", "resnet18"]):
        assert main([*words, "--dtype", "f16"]) == 2
        assert "--dtype f16 is for sdpa, linear and --device cuda alone" in capsys.readouterr().err


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_of_texts(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocabulary": 30000, "positions": 16, "width": 32, "num_heads": 2, "depth": 2}
    monkeypatch.setattr(texts.models, "create", functools.partial(texts.models.create, **small))
    monkeypatch.setitem(texts.LENGTHS, "gpt2", 16)
    case = texts.TextNetwork("model", "infer", model="gpt2", batch=2, fused=fused)
    # Twelve square matrices in each block, scores and their product with values, and the embedding as the last layer.
    assert case.flops == 2 * 32 * (2 * (12 * 32 * 32 + 2 * 16 * 32) + 30000 * 32)
    result = run(case, SETTINGS)
    assert [(c["who"], c["layout"]) for c in result["contestants"]] == [("torch", "nchw"), ("fastconv", "nchw")]
    assert {c["status"] for c in result["contestants"]} <= {"ok", "noisy"}
    assert result["family"] == ("inference, fused" if fused else "inference")


def test_texts_are_not_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "gpt2", "bert_base", "--list"]) == 0
    assert capsys.readouterr().out == "gpt2 n1: model infer gpt2 n1\nbert_base n1: model infer bert_base n1\n"
    assert main(["model", "gpt2", "--train"]) == 2
    assert "--train is for networks for images, lstm and gru, got gpt2" in capsys.readouterr().err


@pytest.mark.parametrize("direction", ["infer", "train"])
@pytest.mark.parametrize("model", ["lstm", "gru"])
def test_a_recurrent_model(model: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "STEPS", 5)
    result = run(sequences.RecurrentNetwork("model", direction, model=model, batch=2), SETTINGS)
    assert [(c["who"], c["layout"]) for c in result["contestants"]] == [("torch", "nchw"), ("fastconv", "nchw")]
    assert {c["status"] for c in result["contestants"]} <= {"ok", "noisy"}
    assert f"{model}_fwd.steps.f32" in result["contestants"][1]["kernel"]


def test_recurrent_models_are_not_fused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "lstm", "gru", "--train", "--batch", "2", "--list"]) == 0
    assert capsys.readouterr().out == "lstm n2: model train lstm n2\ngru n2: model train gru n2\n"
    assert main(["model", "lstm", "--fuse"]) == 2
    assert "--fuse has nothing to fuse in lstm" in capsys.readouterr().err


def test_no_model_is_verified_against_nothing() -> None:
    """A fresh ViT's last layer is 0, and every network with a wrong encoder would give the right logits."""
    assert float(Network("model", "infer", model="vit_tiny", batch=1).truth.norm()) > 1
