"""The bench on layers: families, frozen weights, transposed convolutions, and what a row is held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastconv import models
from fastconv.bench import main, peaks, schema
from fastconv.bench.cases import make
from fastconv.bench.families import FAMILIES, family_cases
from fastconv.bench.networks import layer_cases
from fastconv.bench.readme import markdown
from fastconv.bench.runner import Settings, derive, run
from fastconv.bench.shapes import batched, parse_conv, parse_conv_transpose, parse_linear, parse_pool, short
from fastconv.bench.summary import group, rows
from fastconv.testing.timing import Protocol

SETTINGS = Settings(
    protocol=Protocol(repetitions=9, max_repetitions=9, min_sample_s=1e-6, warmup_s=0.0, max_seconds=1.0)
)
QUICK_WORDS = ["--repetitions", "9", "--seconds", "0"]


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_SETTLED_S", 1e-3)
    monkeypatch.setattr(peaks, "_MEMORY_BYTES", 1 << 16)


def ours(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in result["contestants"] if entry["who"] == "fastconv"]


# ---- What is timed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["c64h28k32r2u2", "n2c21h7k21r64u32p16", "c256h14w9k128r3s2u2x1p1x0o1x0g2", "c8h5k6r3d2x1"]
)
def test_transposed_shape(text: str) -> None:
    """Sizes of weight and result are torch's, and the string comes back."""
    shape = parse_conv_transpose(text)
    assert short(shape) == ("" if text.startswith("n") else "n1") + text
    assert parse_conv_transpose(short(shape)) == shape
    with torch.device("meta"):
        layer = nn.ConvTranspose2d(
            shape.C, shape.K, (shape.R, shape.S), shape.stride, shape.padding, shape.output_padding, shape.groups,
            bias=False, dilation=shape.dilation,
        )  # fmt: skip
        assert tuple(layer.weight.shape) == shape.w_shape
        assert tuple(layer(torch.empty(shape.x_shape)).shape) == shape.y_shape
    assert batched(shape, 5) == parse_conv_transpose("n5" + short(shape)[2:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c6h4k6r3g4", "groups must divide"),
        ("c6h4k6r3p4", "the output is -2x-2"),
        ("c6h4k6r3u1x2x3", "two joined by x"),
        ("c6h4k6r3+bias", "no extras"),
    ],
)
def test_bad_transposed_shape(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_conv_transpose(text)


def test_families_are_the_layers_that_they_say() -> None:
    found = {name: family_cases(name, [1], ["fwd"], "f32", seed=0) for name in FAMILIES}
    for name, cases in found.items():
        assert len({case.name for case in cases}) == len(cases) > 1, name
    # ResNet-18 has 4, 3, 3 such layers on 56, 28 and 14, ResNet-50 3, 3, 5, VGG-16 12 with 64 channels or more.
    assert sum(case.count for case in found["3x3"]) == 10 + 11 + 12
    assert {case.family for case in found["3x3"]} == {"3×3"}
    assert {case.family for case in found["depthwise"]} >= {"depthwise 7×7", "depthwise 5×5 strided", "depthwise 31×31"}
    # MobileNetV1 has 13, V2 17, EfficientNet-B0 16, ConvNeXt-T 18; and two large filters.
    assert sum(case.count for case in found["depthwise"]) == 13 + 17 + 16 + 18 + 2
    per_group = {case.problem.C // case.problem.groups for case in found["grouped"]}  # type: ignore[attr-defined]
    assert min(per_group) == 4
    assert max(per_group) == 320
    assert {case.family for case in found["rectangular"]} == {"1×7", "7×1", "1×3", "3×1"}
    assert {case.family for case in found["dilated"]} == {"3×3 dilated"}


def test_a_transposed_convolution_is_checked_and_timed() -> None:
    for direction in ("fwd", "dgrad", "wgrad"):
        result = run(make("conv_transpose2d", parse_conv_transpose("n2c5h4w6k3r3u2p1o1"), direction), SETTINGS)
        for entry in ours(result):
            assert entry["status"] in ("ok", "noisy"), entry["reason"]
            assert set(entry["ratios"]) == {"torch", "torch_channels_last"}
    # Each product of an input and a tap is added to some output: 2 · (2·5·4·6) · 3 · 3·3.
    assert make("conv_transpose2d", parse_conv_transpose("n2c5h4w6k3r3u2p1o1"), "fwd").flops == 2 * 240 * 27


def test_frozen_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastconv.ops._packed import PackedFilters

    kept: list[PackedFilters] = []
    start = PackedFilters.__init__
    monkeypatch.setattr(PackedFilters, "__init__", lambda self: (start(self), kept.append(self))[0])
    case = make("conv2d", parse_conv("c64h14k64r3p1+bias"), "fwd", frozen=True)
    for entry in ours(run(case, SETTINGS)):
        assert entry["status"] in ("ok", "noisy"), entry["reason"]
    assert [len(filters._kept) for filters in kept] == [1, 1]
    result = run(make("linear", parse_linear("m3i40o50"), "fwd", frozen=True), SETTINGS)
    assert [entry["status"] in ("ok", "noisy") for entry in ours(result)] == [True]
    assert len(kept[-1]._kept) == 1


@pytest.mark.parametrize(
    ("op", "shape", "direction"), [("conv2d", "c8h6k8r3", "wgrad"), ("max_pool2d", "c8h6r2", "fwd")]
)
def test_what_has_no_weights_to_freeze(op: str, shape: str, direction: str) -> None:
    problem = parse_conv(shape) if op == "conv2d" else parse_pool(shape)
    with pytest.raises(ValueError, match="weights are frozen in the forward of conv2d and linear, got"):
        make(op, problem, direction, frozen=True)


def test_frozen_layers_of_a_model_are_those_with_weights() -> None:
    cases = layer_cases("resnet18", [1], ["fwd"], "f32", 0, frozen=True)
    assert {case.op for case in cases} == {"conv2d", "linear"}
    assert sum(case.count for case in cases) == 21
    assert all(name in models.names() for family in FAMILIES.values() for name in family.models)


def test_frozen_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "frozen.json"
    assert main(["conv2d", "--shape", "c8h6k8r3p1", "--frozen", "--json", str(path), *QUICK_WORDS]) == 0
    found = json.loads(path.read_text())
    assert schema.problems(found) == []
    assert found["results"][0]["run"] == "conv2d frozen"
    assert "--frozen" in found["results"][0]["repro"]
    capsys.readouterr()
    assert main(["3x3", "--frozen", "--batch", "2", "--list"]) == 0
    assert "3x3 n2 frozen: conv2d fwd n2c64h56k64r3p1 ×7\n" in capsys.readouterr().out
    for words, message in (
        (["conv2d", "--pass", "wgrad"], "--frozen is for the forward of layers"),
        (["resnet18", "--pass", "dgrad"], "--frozen is for the forward of layers"),
        (["model", "resnet18"], "with 'model' and --fuse"),
        (["conv_transpose2d"], "got conv_transpose2d fwd"),
    ):
        assert main([*words, "--frozen", "--list"]) == 2
        assert message in capsys.readouterr().err


# ---- What a row is held against -------------------------------------------------------------------------------------


def timed(who: str, seconds: float, status: str = "ok", layout: str = "nhwc") -> dict[str, Any]:
    record = {"who": who, "layout": layout, "threads": 1, "status": status, "reason": ""}
    if who == "fastconv":
        record |= {"isa": "avx2", "algorithm": "auto", "kernel": "conv2d_fwd.direct.f32.avx2"}
    error = {"rel_l2": 1e-7, "max": 1e-6, "bound": 1e-5, "ratio_to_torch": 1.0}
    record |= {"median_s": seconds, "min_s": seconds, "iqr_share": 0.0, "inner": 1, "samples_s": [seconds]}
    return record | {"error": error}


def document(contestants: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A results file of one made-up row: 1 GFLOP and 1 GB beside ceilings of 100 GFLOP/s and 50 GB/s."""
    probes = [
        {"kind": "fma", "threads": 1, "target": "avx2", "samples": [100.0], "median": 100.0},
        {"kind": "copy", "threads": 1, "bytes": 1000, "samples": [50.0], "median": 50.0},
    ]
    result = {
        "run": "depthwise n1", "repro": "", "op": "conv2d", "direction": "fwd", "shape": "n1c8", "dtype": "f32",
        "family": "depthwise 3×3", "labels": ["x"], "count": 1, "recorded": False, "flops": 1e9, "bytes": 1e9,
        "probes": probes, "contestants": contestants,
    }  # fmt: skip
    result |= changes
    derive(result)
    where = {"cpu": "A CPU", "usable_cores": 2, "isa": ["scalar", "avx2"]}
    about = {"date": "2026-01-01T00:00:00+00:00", "command": "fastconv bench depthwise", "seed": 0, "git": None}
    about |= {"versions": {"torch": "2"}, "build": {}, "torch": {}, "cpu": where, "environment": {}}
    peak = {"kind": "fma", "target": "avx2", "dtype": "f32", "threads": 1, "gflops": 100.0}
    return {"schema_version": schema.SCHEMA_VERSION, "context": about, "peaks": {"before": [peak]}, "results": [result]}


def test_the_tighter_ceiling_counts() -> None:
    """1 GB at 50 GB/s takes 20 ms, 1 GFLOP at 100 GFLOP/s 10 ms: of 40 ms, moving explains a half and computing a quarter."""
    by_bytes = document([timed("torch", 0.08), timed("fastconv", 0.04)])
    (row,) = rows(by_bytes)
    assert (row.entry["peak_share"], row.entry["copy_share"]) == (pytest.approx(0.25), pytest.approx(0.5))
    assert (row.bound_share, row.waits_for_memory) == (pytest.approx(0.5), True)
    assert group([row]).by_bytes
    assert "| depthwise 3×3 | fwd | 1 | 2.00 | 2.00 | 50% copy |" in markdown([by_bytes])
    (row,) = rows(document([timed("fastconv", 0.04)], flops=4e9))
    assert (row.bound_share, row.waits_for_memory) == (pytest.approx(1.0), False)
    (row,) = rows(document([timed("fastconv", 0.04)], probes=[]))
    assert (row.bound_share, row.waits_for_memory) == (None, False)


def test_depthwise_layers_are_timed_beside_a_copy() -> None:
    """Also where a large filter computes more than it moves; a dense 3×3 is not."""
    wanted = {"c8h9k8r3p1g8": True, "c8h9k8r7p3g8": True, "c64h9k64r3p1": False}
    for text, copied in wanted.items():
        probes = run(make("conv2d", parse_conv(text), "fwd"), SETTINGS)["probes"]
        assert ("copy" in {probe["kind"] for probe in probes}) == copied, text


def test_noisy_figures_are_marked() -> None:
    """A row's own noise and that of the torch contestant it is divided by; not that of the slower one."""
    quiet, loud = "| 2.00 | 2.00 |", "| ≈2.00 | ≈2.00 |"
    slower = timed("torch", 0.2, "noisy", "nchw")
    for contestants, cells in (
        ([timed("torch_channels_last", 0.08), slower, timed("fastconv", 0.04)], quiet),
        ([timed("torch_channels_last", 0.08, "noisy"), slower, timed("fastconv", 0.04)], loud),
        ([timed("torch_channels_last", 0.08), slower, timed("fastconv", 0.04, "noisy")], loud),
    ):
        assert cells in markdown([document(contestants)])


def test_models_have_a_ratio_to_every_engine() -> None:
    peers = [timed("torch", 0.08), timed("openvino", 0.02, "noisy"), timed("onnxruntime", 0.06)]
    text = markdown([document([*peers, timed("fastconv", 0.04)], op="model", direction="infer", family="inference")])
    assert "| fastconv | × torch | × OpenVINO | × ONNX Runtime |" in text
    assert "| 80.0 | ≈20.0 | 60.0 | 40.0 | **2.00** | **≈0.50** | **1.50** |" in text


def test_the_share_of_right_choices_is_a_line() -> None:
    shares = [
        {"op": "conv2d_fwd", "layout": "nhwc", "setting": "n1t1", "layers": 90, "near": 89},
        {"op": "conv2d_wgrad", "layout": "nchw", "setting": "n8t2", "layers": 10, "near": 8},
    ]
    choices = {
        "date": "2026-01-01T00:00:00",
        "git": {"sha": "0" * 40, "dirty": False},
        "within": 1.05,
        "shares": shares,
    }
    text = markdown([document([timed("fastconv", 0.04)])], choices)
    assert "On 97 of 100 layers (97.0%) the algorithm that is chosen takes at most 5% longer" in text
    assert "on 80.0%, in `conv2d_wgrad, NCHW, n8t2`" in text
    assert "Selection" not in markdown([document([timed("fastconv", 0.04)])])
