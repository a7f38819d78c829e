"""The bench of GPUs, as far as it goes without one: its rows on stand-ins for CUDA tensors, and its clock on a drawn-up queue."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastconv
from fastconv.bench import gpu as bench_gpu
from fastconv.bench import gpu_cases
from fastconv.cli import main
from fastconv.testing.problems import ConvCase

TABLES = {
    "layers": lambda: (ConvCase(1, 4, 6, 5, 8, 3, 3, pad4=(1, 1, 1, 1), layout="nhwc"),),
    "DEPTHWISE": ((3, 4, 5),),
    "POOLS": ((4, 6, 3, 2, 1),),
    "ADAPTIVE": ((4, 6, 3),),
    "LINEAR": ((3, 8, 4),),
    "NORMS": ((3, 8),),
    "ATTENTION": ((2, 2, 5, 8, True),),
    "BACKENDS": (torch.nn.attention.SDPBackend.MATH,),
}


@pytest.fixture
def small(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and small rows, of tensors there."""

    def tensor(shape: tuple[int, ...], dtype: torch.dtype, last: bool = False) -> torch.Tensor:
        t = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
        made: torch.Tensor = gpu(t.to(memory_format=torch.channels_last if last else torch.contiguous_format))
        return made

    monkeypatch.setattr(gpu_cases, "tensor", tensor)
    for name, table in TABLES.items():
        monkeypatch.setattr(gpu_cases, name, table)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", [name for name in gpu_cases.FAMILIES if name != "model"])
def test_contestants_compute_the_same(gpu: Any, family: str) -> None:
    fastconv.set_cuda(False)  # who else is torch's is torch's
    rows = list(gpu_cases.FAMILIES[family](2, torch.float32))
    assert {row.direction for row in rows} == {"fwd", "bwd"}
    for row in rows:
        assert (row.bytes > 0) != (row.flops > 0)
        assert {"fastconv", "torch math" if family == "sdpa" else "torch"} <= row.calls.keys()
        if row.direction == "bwd":  # each from a gradient of its own
            assert all(g.isfinite().all() for call in row.calls.values() for g in gpu.back(call()))
            continue
        with fastconv.observe() as seen:
            ours = gpu.back(row.calls["fastconv"]())
        assert len(seen) == 1
        for call in row.calls.values():
            torch.testing.assert_close(gpu.back(call()), ours, rtol=1e-3, atol=1e-2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("gpu", ["emulated"], indirect=True)
@pytest.mark.parametrize("patience", [1000, 30], ids=["to its end", "interrupted"])
def test_a_run_writes_what_it_has_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, patience: int) -> None:
    class Stopwatch:
        """Every call takes 2 ms, until somebody has waited long enough."""

        left = patience

        def time(self, call: Callable[[], object]) -> tuple[float, bool]:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            call()
            return 2e-3, False

    most = {"copy_bytes_per_second": 2e12, "product_flops_per_second": 8e14}
    for name, value in (("why_not", str), ("Clock", Stopwatch), ("ceilings", lambda *_: most)):
        monkeypatch.setattr(bench_gpu, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: "a GPU")
    written = tmp_path / "gpu.json"
    words = ["bench", "layer_norm", "sdpa", "pool", "--device", "cuda", "--dtype", "f32", "--repetitions", "3"]
    # torch.testing's samples, which other tests use, lock cuDNN's switches.
    with torch.backends.__allow_nonbracketed_mutation():
        try:
            assert main([*words, "--json", str(written)]) == 0
            assert patience == 1000
        except KeyboardInterrupt:
            assert patience == 30
        finally:
            torch.backends.cudnn.benchmark = False
    found = json.loads(written.read_text())
    assert found["gpu"] == "a GPU"
    assert found["context"]["versions"]["torch"] == torch.__version__
    assert found["ceilings"] == most
    assert found["clocks_before"]
    assert found["clocks_after"]
    families = [row["family"] for row in found["results"]]
    assert families == (["layer_norm"] * 2 if patience < 100 else ["layer_norm"] * 2 + ["sdpa"] * 2 + ["pool"] * 6)
    for row in found["results"]:
        assert all(samples == [2e-3] * 3 for samples in row["samples"].values())
        assert "fastconv" in row["samples"]


def test_the_gpu_sleeps_until_all_work_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []

    class Event:
        def __init__(self, **_: bool) -> None:
            pass

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return slept[-1] < needed  # it has woken up

        def elapsed_time(self, _: Event) -> float:
            return 2.0

    empty: Callable[..., torch.Tensor] = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: empty(1))
    for name, value in (("Event", Event), ("_sleep", slept.append), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    clock, needed = bench_gpu.Clock(), 3 * bench_gpu.SLEEP
    assert clock.time(lambda: None) == (2e-3, False)
    assert slept == [bench_gpu.SLEEP, 2 * bench_gpu.SLEEP, 4 * bench_gpu.SLEEP]
    assert clock.time(lambda: None) == (2e-3, False)
    assert slept[3:] == [4 * bench_gpu.SLEEP]
    needed = 2 * bench_gpu.LONGEST
    assert clock.time(lambda: None) == (2e-3, True)
    assert slept[-1] == bench_gpu.LONGEST


def test_shares_of_the_ceilings() -> None:
    most = {"copy_bytes_per_second": 2e12, "product_flops_per_second": 8e14}
    medians = {"fastconv": 2e-3, "torch": 3e-3, "torch channels_last": 4e-3}
    pool, product = gpu_cases.Row("", "fwd", {}, bytes=2e9), gpu_cases.Row("", "fwd", {}, flops=8e11)
    assert bench_gpu.summary(pool, medians, most) == {"seconds": 2e-3, "times_torch": 1.5, "share": 0.5}
    assert bench_gpu.summary(product, medians, most)["share"] == 0.5
    assert math.isnan(bench_gpu.summary(gpu_cases.Row("", "step", {}), medians, most)["share"])


def test_families_are_named_where_another_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "conv2d", "--device", "cuda"]) == 2
    assert "expected some of conv, depthwise, pool, linear, layer_norm, sdpa, model" in capsys.readouterr().err
