"""The bench of GPUs, as far as it goes without one: its rows on stand-ins for CUDA tensors, and its clock on a drawn-up queue."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

import fastconv
from fastconv.bench import gpu, gpu_cases
from fastconv.cli import main
from fastconv.testing import emulator
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


@pytest.mark.skipif(emulator.compiler() is None, reason="needs a host compiler")
@pytest.mark.parametrize("family", [name for name in gpu_cases.FAMILIES if name != "model"])
def test_contestants_compute_the_same(
    request: pytest.FixtureRequest, fake_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    def tensor(shape: tuple[int, ...], dtype: torch.dtype, last: bool = False) -> torch.Tensor:
        t = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        return fake_cuda.FakeCuda(t.to(memory_format=torch.channels_last if last else torch.contiguous_format))

    monkeypatch.setattr(gpu_cases, "tensor", tensor)
    for name, table in TABLES.items():
        monkeypatch.setattr(gpu_cases, name, table)
    with fake_cuda.device(emulator.Emulator(request.getfixturevalue("cuda_library"))):
        rows = list(gpu_cases.FAMILIES[family](2, torch.float32))
        assert {row.direction for row in rows} == {"fwd", "bwd"}
        for row in rows:
            assert (row.bytes > 0) != (row.flops > 0)
            assert {"fastconv", "torch math" if family == "sdpa" else "torch"} <= row.calls.keys()
            if row.direction == "bwd":  # each from a gradient of its own
                assert all(g.isfinite().all() for call in row.calls.values() for g in call())
                continue
            with fastconv.observe() as seen:
                ours = row.calls["fastconv"]()
            assert len(seen) == 1
            for call in row.calls.values():
                torch.testing.assert_close(call().held, ours.held, rtol=1e-3, atol=1e-2)


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
    clock, needed = gpu.Clock(), 3 * gpu.SLEEP
    assert clock.time(lambda: None) == (2e-3, False)
    assert slept == [gpu.SLEEP, 2 * gpu.SLEEP, 4 * gpu.SLEEP]
    assert clock.time(lambda: None) == (2e-3, False)
    assert slept[3:] == [4 * gpu.SLEEP]
    needed = 2 * gpu.LONGEST
    assert clock.time(lambda: None) == (2e-3, True)
    assert slept[-1] == gpu.LONGEST


def test_shares_of_the_ceilings() -> None:
    most = {"copy_bytes_per_second": 2e12, "product_flops_per_second": 8e14}
    medians = {"fastconv": 2e-3, "torch": 3e-3, "torch channels_last": 4e-3}
    pool, product = gpu_cases.Row("", "fwd", {}, bytes=2e9), gpu_cases.Row("", "fwd", {}, flops=8e11)
    assert gpu.summary(pool, medians, most) == {"seconds": 2e-3, "times_torch": 1.5, "share": 0.5}
    assert gpu.summary(product, medians, most)["share"] == 0.5
    assert math.isnan(gpu.summary(gpu_cases.Row("", "step", {}), medians, most)["share"])


def test_families_are_named_where_another_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "conv2d", "--device", "cuda"]) == 2
    assert "expected some of conv, depthwise, pool, linear, layer_norm, sdpa, model" in capsys.readouterr().err
