"""The bench itself: parsing, statistics, verification, files. How fast anything is is never a test."""

from __future__ import annotations

import json
import math
import platform
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import fastconv
from fastconv.bench import context, lengths, main, peaks, readme, schema
from fastconv.bench.cases import make
from fastconv.bench.convolutions import Conv
from fastconv.bench.networks import layer_cases
from fastconv.bench.runner import Settings, derive, error_of, run
from fastconv.bench.shapes import LinearShape, parse_conv, parse_linear, parse_pool, parse_sdpa, short
from fastconv.bench.summary import group, losses, rows, scaling, selection
from fastconv.testing.timing import Contestant, Probe, Protocol, Samples, geometric_mean, interleave

QUICK = Protocol(repetitions=9, max_repetitions=9, min_sample_s=1e-6, warmup_s=0.0, max_seconds=1.0)
SETTINGS = Settings(protocol=QUICK)
QUICK_WORDS = ["--repetitions", "9", "--seconds", "0"]


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_SETTLED_S", 1e-3)
    monkeypatch.setattr(peaks, "_MEMORY_BYTES", 1 << 16)


# ---- Shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, output",
    [
        ("n1c64h56w56k64r3s3p1", (1, 64, 56, 56)),
        ("c64h56k64r3p1", (1, 64, 56, 56)),
        ("n2c3h224k64r7u2p3", (2, 64, 112, 112)),
        ("c8h9w7k6r1s3u2x1p0x0x1x1d1x2g2+bias", (1, 6, 5, 5)),
        ("n2c64h14w14k65r3s3u1p1d1g1-nhwc+bias", (2, 65, 14, 14)),
    ],
)
def test_conv_shape(text: str, output: tuple[int, ...]) -> None:
    case = parse_conv(text)
    assert case.y_shape == output
    assert parse_conv(short(case)) == case


@pytest.mark.parametrize(
    "text, output",
    [
        ("c64h112r3u2p1", (1, 64, 56, 56)),
        ("c64h112r2", (1, 64, 56, 56)),
        ("n3c4h9w11r3s2u1p1x1x0x0", (3, 4, 9, 10)),
        ("c4h9r2+ceil", (1, 4, 5, 5)),
        ("c2048h7a1", (1, 2048, 1, 1)),
        ("c8h14a7x3", (1, 8, 7, 3)),
    ],
)
def test_pool_shape(text: str, output: tuple[int, ...]) -> None:
    case = parse_pool(text)
    assert case.y_shape == output
    assert parse_pool(short(case)) == case


def test_linear_shape() -> None:
    assert (
        parse_linear("m197i768o3072") == LinearShape(197, 768, 3072) == parse_linear(short(LinearShape(197, 768, 3072)))
    )


@pytest.mark.parametrize(
    "text, flops",
    [("n1h16q2048d64", 4 * 16 * 2048**2 * 64), ("n2h8q4g2k6d8v4+causal", 4 * 8 * (1 + 2 + 3 + 4) * (8 + 4))],
)
def test_sdpa_shape(text: str, flops: int) -> None:
    shape = parse_sdpa(text)
    assert parse_sdpa(short(shape)) == shape
    assert make("sdpa", shape, "fwd").flops == flops


@pytest.mark.parametrize(
    "parse, text, message",
    [
        (parse_conv, "c64h56k64", "missing field 'r'"),
        (parse_conv, "c64h56k64r3q1", "unknown field 'q'"),
        (parse_conv, "c64h56k64r3c64", "'c' is given twice"),
        (parse_conv, "hello world", "letters and numbers in turn"),
        (parse_conv, "c64h56k64r3g3", "groups must divide"),
        (parse_conv, "c64h2k64r3", "the output is 0x0"),
        (parse_conv, "c64h56k64r3+relu", r"only \+bias can be timed"),
        (parse_pool, "c64h56", "a window"),
        (parse_pool, "c64h56r3p0x1x0x1", "both sides alike"),
        (parse_pool, "c64h56a7r3", "has no window"),
        (parse_linear, "m3i4", "missing field 'o'"),
        (parse_sdpa, "h16q2048", "missing field 'd'"),
        (parse_sdpa, "h16g3q8d4", "g must divide h"),
        (parse_sdpa, "h16q8d4+bias", "only .causal"),
    ],
)
def test_bad_shape(parse: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_model_layers() -> None:
    """ResNet-50 has 53 convolutions, two pools and one Linear, and 4.09 billion multiply-adds."""
    cases = layer_cases("resnet50", [1], ["fwd"], "f32", seed=0)
    assert sum(case.count for case in cases) == 56
    assert sum(case.count for case in cases if case.op == "conv2d") == 53
    assert sum(case.flops * case.count for case in cases) == pytest.approx(2 * 4.089e9, rel=1e-3)
    assert len({(case.op, case.name) for case in cases}) == len(cases)
    batch = layer_cases("resnet50", [8], ["fwd"], "f32", seed=0)
    assert [case.flops for case in batch] == [8 * case.flops for case in cases]


# ---- Timing ---------------------------------------------------------------------------------------------------------


def test_statistics() -> None:
    samples = Samples([1.0, 2.0, 3.0, 4.0, 10.0])
    assert (samples.median, samples.minimum, samples.maximum) == (3.0, 1.0, 10.0)
    assert samples.iqr_share == pytest.approx(2 / 3)
    assert samples.noisy
    assert not Samples([1.00, 1.01, 1.02, 0.99]).noisy
    assert math.isnan(Samples().median)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([2.0, 8.0], [3, 1]) == pytest.approx(2 * math.sqrt(2))


def test_interleaving_is_random_and_complete() -> None:
    order: list[str] = []
    contestants = [Contestant(name, lambda name=name: order.append(name)) for name in "abc"]  # type: ignore[misc]
    protocol = Protocol(repetitions=9, max_repetitions=9, min_sample_s=0.0, warmup_s=0.0)
    samples = interleave(contestants, [Probe("p", lambda: 7.0)], protocol)
    assert [len(samples[name].values) for name in "abcp"] == [9] * 4
    assert samples["p"].median == 7.0
    assert all(samples[name].inner == 1 for name in "abc")
    timed = order[6:]  # two warm-up calls each; then a call to warm the caches and a timed one
    firsts = {tuple(timed[i : i + 6 : 2]) for i in range(0, len(timed), 6)}
    assert all(sorted(first) == ["a", "b", "c"] for first in firsts)
    assert len(firsts) > 1


def test_a_sample_is_long_enough() -> None:
    samples = interleave([Contestant("quick", lambda: None)], protocol=Protocol(9, 9, min_sample_s=1e-4, warmup_s=1e-4))
    assert samples["quick"].inner > 50


def test_a_contestant_that_raises_is_dropped() -> None:
    calls = 0

    def late() -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("late\nmore")

    def early() -> None:
        raise ValueError("early")

    entrants = [Contestant("good", lambda: None), Contestant("late", late), Contestant("early", early)]
    samples = interleave(entrants, protocol=Protocol(9, 9, min_sample_s=0.0, warmup_s=0.0))
    assert samples["early"].error == "ValueError: early"
    assert samples["late"].error == "RuntimeError: late"
    assert len(samples["good"].values) == 9


def test_bad_protocols() -> None:
    with pytest.raises(ValueError, match="at least 9"):
        Protocol(repetitions=5)
    with pytest.raises(ValueError, match="must differ"):
        interleave([Contestant("a", lambda: None), Contestant("a", lambda: None)])


# ---- Verification ---------------------------------------------------------------------------------------------------


def conv(direction: str = "fwd") -> Any:
    return make("conv2d", parse_conv("n2c8h6k8r3p1"), direction)


def ours(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in result["contestants"] if entry["who"] == "fastconv"]


@pytest.mark.parametrize("direction", ["fwd", "dgrad", "wgrad"])
def test_a_right_result_is_timed(direction: str) -> None:
    result = run(conv(direction), SETTINGS)
    assert {entry["layout"] for entry in ours(result)} == {"nchw", "nhwc"}
    for entry in ours(result):
        assert entry["status"] in ("ok", "noisy"), entry["reason"]
        assert entry["kernel"].startswith("conv2d_")
        assert entry["error"]["rel_l2"] <= entry["error"]["bound"]
        assert set(entry["ratios"]) == {"torch", "torch_channels_last"}


@pytest.mark.parametrize("fault", [0.01, math.nan, math.inf])
def test_a_wrong_result_voids_the_row(fault: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong element of 576, in one of the two layouts."""
    right = Conv.fastconv_call

    def wrong(self: Conv, layout: str) -> Any:
        call = right(self, layout)

        def spoilt() -> torch.Tensor:
            y = call().clone()
            if layout == "nhwc":
                y[0, 0, 0, 0] += fault
            return y

        return spoilt

    monkeypatch.setattr(Conv, "fastconv_call", wrong)
    result = run(conv(), SETTINGS)
    good, bad = sorted(ours(result), key=lambda entry: entry["layout"])
    assert good["status"] in ("ok", "noisy")
    assert bad["status"] == "void"
    assert "wrong result" in bad["reason"]
    assert "median_s" not in bad
    assert "samples_s" not in bad
    json.dumps(result, allow_nan=False)


def test_bits_that_change_void_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = Conv.fastconv_call, [0]

    def drifting(self: Conv, layout: str) -> Any:
        call = right(self, layout)

        def drift() -> torch.Tensor:
            calls[0] += 1
            return call() * (1 if calls[0] == 1 else 1 + 1e-7)

        return drift

    monkeypatch.setattr(Conv, "fastconv_call", drifting)
    (entry,) = ours(run(conv(), Settings(layouts=("nhwc",), protocol=QUICK)))
    assert entry["status"] == "void"
    assert "bits changed" in entry["reason"]
    assert "median_s" not in entry


def test_a_call_that_never_reaches_a_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv, "fastconv_call", Conv.torch_call)
    for entry in ours(run(conv(), SETTINGS)):
        assert (entry["status"], entry["reason"]) == ("failed", "no fastconv kernel ran")


def test_forced_kernels() -> None:
    names = {kernel.algorithm for kernel in fastconv.kernels() if kernel.op == "conv2d_fwd" and kernel.dtype == "f32"}
    settings = Settings(layouts=("nhwc",), algorithms=("all",), isas=("scalar",), protocol=QUICK)
    entries = ours(run(conv(), settings))
    assert {entry["algorithm"] for entry in entries} == names
    for entry in entries:
        assert entry["status"] in ("ok", "noisy", "declined"), entry["reason"]
        if entry["status"] != "declined":
            assert entry["kernel"] == f"conv2d_fwd.{entry['algorithm']}.f32.scalar"


def test_error_of() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    error = error_of(torch.tensor([3.0, 4.5]), truth)
    assert error["rel_l2"] == pytest.approx(0.1)
    assert error["max"] == pytest.approx(0.5 / math.sqrt(12.5))
    with pytest.raises(ValueError, match="has shape"):
        error_of(torch.zeros(3), truth)


# ---- Figures --------------------------------------------------------------------------------------------------------


def entry(who: str, seconds: float | None, layout: str = "nhwc", threads: int = 1, **more: Any) -> dict[str, Any]:
    record = {"who": who, "layout": layout, "threads": threads, "status": "ok", "reason": ""}
    if who == "fastconv":
        record |= {"isa": "avx2", "algorithm": "auto", "kernel": "conv2d_fwd.direct.f32.avx2"}
    if seconds is not None:
        record |= {"median_s": seconds, "min_s": seconds, "iqr_share": 0.0, "inner": 1, "samples_s": [seconds]}
        record["error"] = {"rel_l2": 1e-7, "max": 1e-6, "bound": 1e-5, "ratio_to_torch": 1.0}
    return record | more


def document(*matches: tuple[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """A results file of made-up 3×3 layers that occur so many times."""
    results = []
    for i, (count, contestants) in enumerate(matches):
        result = {
            "run": "resnet50 n1",
            "repro": "",
            "op": "conv2d",
            "direction": "fwd",
            "shape": f"n1c{i}",
            "dtype": "f32",
            "family": "3×3",
            "labels": ["x"] * count,
            "count": count,
            "recorded": False,
            "flops": 1e9,
            "bytes": 1000,
            "probes": [{"kind": "fma", "threads": 1, "target": "avx2", "samples": [100.0], "median": 100.0}],
            "contestants": contestants,
        }
        derive(result)
        results.append(result)
    where = {"cpu": "A CPU", "usable_cores": 2, "isa": ["scalar", "avx2"]}
    about = {"date": "2026-01-01T00:00:00+00:00", "command": "fastconv bench resnet50", "seed": 0, "git": None}
    about |= {"versions": {"torch": "2"}, "build": {}, "torch": {}, "cpu": where, "environment": {}}
    peak = {"kind": "fma", "target": "avx2", "dtype": "f32", "threads": 1, "gflops": 100.0}
    return {"schema_version": schema.SCHEMA_VERSION, "context": about, "peaks": {"before": [peak]}, "results": results}


def test_figures() -> None:
    """The better of torch's formats counts, layers count as often as they occur, and voided rows not at all."""
    slow = [entry("torch", 0.04, "nchw"), entry("torch_channels_last", 0.08), entry("fastconv", 0.02)]
    lost = [entry("torch", 0.09, "nchw"), entry("torch_channels_last", 0.01), entry("fastconv", 0.02)]
    void = [entry("torch", 0.09, "nchw"), entry("fastconv", None, status="void", reason="wrong")]
    members = rows(document((3, slow), (1, lost), (5, void)))
    assert [row.best_torch for row in members] == [2.0, 0.5, None]
    assert members[0].entry["gflops"] == pytest.approx(50)
    assert members[0].entry["peak_share"] == pytest.approx(0.5)
    figures = group(members)
    assert (figures.distinct, figures.count, figures.slower, figures.slower_count, figures.invalid) == (2, 4, 1, 1, 1)
    assert figures.mean == pytest.approx((2**3 * 0.5) ** 0.25)
    assert figures.total_s == pytest.approx(0.08)
    assert figures.torch_s == pytest.approx(0.13)
    assert [row.match["shape"] for row in losses(members)] == ["n1c1"]


def test_scaling() -> None:
    both = [entry("fastconv", 0.02), entry("fastconv", 0.0125, threads=2), entry("fastconv", 0.02, "nchw", threads=2)]
    short_one = [entry("fastconv", 0.0005), entry("fastconv", 0.0005, threads=2)]
    assert [speedup for _, speedup in scaling(rows(document((1, both), (1, short_one))))] == [pytest.approx(1.6)]


def test_selection() -> None:
    """The choice is compared with every forced kernel; the same kernel's two rows are one; declined ones are not there."""

    def contestant(algorithm: str, kernel: str, seconds: float | None, **more: Any) -> dict[str, Any]:
        return entry("fastconv", seconds, **more) | {"algorithm": algorithm, "kernel": f"conv2d_fwd.{kernel}.f32.avx2"}

    right = [
        contestant("auto", "direct", 0.02),
        contestant("direct", "direct", 0.01),
        contestant("im2col", "im2col", 0.015),
    ]
    wrong = [
        contestant("auto", "direct", 0.03),
        contestant("direct", "direct", 0.04),
        contestant("im2col", "im2col", 0.02),
    ]
    alone = [contestant("auto", "direct", 0.03), contestant("im2col", "", None, status="declined", reason="")]
    found = selection(rows(document((1, right), (1, wrong), (1, alone))))
    assert [(row.match["shape"], loss, best.algorithm) for row, loss, best in found] == [
        ("n1c0", 1.0, "direct"),
        ("n1c1", pytest.approx(1.5), "im2col"),
    ]


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One small run of everything: rows, a valid file that names neither host nor folder, and a README from it."""
    path = tmp_path / "out.json"
    words = ["conv2d", "max_pool2d", "--shape", "c8h8k8r3p1", "--json", str(path), *QUICK_WORDS]
    assert main(words) == 2  # a convolution's string is no pool's
    assert "unknown field 'k'" in capsys.readouterr().err
    assert main(["conv2d", "--pass", "fwd,wgrad", *words[2:]]) == 0
    printed = capsys.readouterr().out
    assert "conv2d wgrad f32" in printed
    assert max(map(len, printed.splitlines())) <= 120
    text = path.read_text()
    found = json.loads(text)
    assert schema.problems(found) == []
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert platform.node() not in text
    assert found["context"]["command"].endswith("--json out.json " + " ".join(QUICK_WORDS))
    repro = shlex.split(found["results"][0]["repro"])
    assert repro[:2] == ["fastconv", "bench"]
    assert main([*repro[2:], "--list"]) == 0
    assert capsys.readouterr().out == "conv2d: conv2d fwd n1c8h8k8r3p1\n"
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert main(["readme", "--json", str(path), "--check", str(page)]) == 1
    assert main(["readme", "--json", str(path), str(page)]) == 0
    assert main(["readme", "--json", str(path), "--check", str(page)]) == 0
    assert page.read_text().startswith(f"before\n{readme.BEGIN}\n")
    assert page.read_text().endswith(f"{readme.END}\nafter\n")
    assert "old" not in page.read_text()


def test_whole_models(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for extra in ([], ["--train"], ["--fuse"]):
        path = tmp_path / "model.json"
        assert main(["model", "lenet5", "--batch", "2", "--json", str(path), *extra, *QUICK_WORDS]) == 0
        found = json.loads(path.read_text())
        assert schema.problems(found) == []
        assert {e["status"] for match in found["results"] for e in match["contestants"]} <= {"ok", "noisy"}
        repro = found["results"][0]["repro"]
        assert all(word in repro for word in extra)
    assert "model train f32" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--causal", "--backward", "--dtype", "bf16"]], ids=["forward", "backward"])
def test_lengths(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / f"lengths.{name}" for name in ("json", "png")}
    sizes = ["--lengths", "8,1024", "--heads", "2", "--features", "8"]
    assert main(["lengths", *sizes, *words, "--json", str(files["json"]), "--plot", str(files["png"])]) == 0
    assert capsys.readouterr().out.count("torch MATH") == 2
    rows = {(row["who"], row["length"]): row for row in json.loads(files["json"].read_text())["rows"]}
    assert all(row["seconds"] > 0 for row in rows.values())
    # MATH stores 1024 x 1024 scores of 2 heads: 8 MB in float32. The others store none.
    assert rows["torch MATH", 1024]["bytes"] > rows["fastconv", 1024]["bytes"] + (2 << 20)
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    assert {row["samples"] >= 9 for row in rows.values()} == {True}


def test_long_calls_are_timed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lengths, "_LONG_SECONDS", 0.0)
    path = tmp_path / "lengths.json"
    assert main(["lengths", "--lengths", "64", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert [row["samples"] for row in document["rows"]] == [1, 1, 1]
    assert document["context"]["command"] == "fastconv bench lengths --lengths 64 --json lengths.json"


def test_readme_hides_nothing() -> None:
    lost = [entry("torch", 0.01, "nchw"), entry("fastconv", 0.02)]
    void = [entry("torch", 0.09, "nchw"), entry("fastconv", None, status="void", reason="wrong by a mile")]
    table = readme.markdown([document((1, lost), (2, void))])
    assert "Slower than torch: 1 of 1 rows" in table
    assert "`n1c0`" in table
    assert "wrong by a mile" in table
    assert "A CPU, 2 cores, avx2; measured FMA peak 100 GFLOP/s on 1 thread" in table


@pytest.mark.parametrize("text", ["", readme.BEGIN, readme.END + readme.BEGIN, (readme.BEGIN + readme.END) * 2])
def test_readme_without_markers(text: str) -> None:
    with pytest.raises(ValueError, match="expected one"):
        readme.replace_between(text, "table")


def test_schema_finds_faults() -> None:
    good = document((1, [entry("torch", 0.01), entry("fastconv", 0.02)]))
    assert schema.problems(good) == []
    assert schema.problems({"schema_version": 0}) == ["schema_version: expected 1"]
    timed_void = document((1, [entry("fastconv", 0.02, status="void")]))
    assert "yet the row has times" in schema.problems(timed_void)[0]
    del good["results"][0]["contestants"][1]["samples_s"]
    assert schema.problems(good) == ["results[0].contestants[1].samples_s: missing"]


@pytest.mark.parametrize(
    "text, clean",
    [
        ("--json /home/me/out.json", "--json out.json"),
        ("--json=bench/results/out.json", "--json=out.json"),
        ("-I/usr/include -O3", "include -O3"),
        ("Linux/GNU 3.2", "Linux/GNU 3.2"),
        ("LD_PRELOAD=/usr/lib/libtcmalloc.so:/opt/x.so", "LD_PRELOAD=libtcmalloc.so:x.so"),
        ("~/x.json ../y.json", "x.json y.json"),
    ],
)
def test_paths_are_cut(text: str, clean: str) -> None:
    assert context.without_paths(text) == clean


@pytest.mark.parametrize(
    "words, message",
    [
        (["resnet51"], "no op or model named 'resnet51'"),
        (["model", "resnet51"], "no model named 'resnet51'"),
        (["model", "lenet5", "--fuse", "--train"], "--fuse freezes the weights"),
        (["lenet5", "--fuse"], "--fuse freezes the weights"),
        (["max_pool2d", "--pass", "dgrad"], "max_pool2d has the passes fwd, bwd"),
        (["conv2d", "--isa", "sse9"], "sse9 does not run here"),
        (["conv2d", "--only", "nothing"], "nothing to run"),
        (["conv2d", "--repetitions", "3"], "at least 9"),
    ],
)
def test_usage_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
