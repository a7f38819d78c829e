"""`fastconv bench --device cuda`: fastconv on a GPU against torch in every way that it has, by CUDA events.

No machine with a GPU has run it yet. Each sample starts with a cold L2 cache, contestants take turns, and what the machine can
do, a copy and a large bf16 product, is measured in the same run. Python's time is not measured: the GPU is kept asleep until all
of a sample's work is in its queue. Where that takes longer than the longest sleep, the sample says so.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch

import fastconv
from fastconv.bench import context
from fastconv.bench.gpu_cases import FAMILIES, Row

# More than the L2 cache of any GPU so far: 50 MB on an H100, 126 on a B200.
FLUSHED = 256 << 20
# Cycles that the GPU sleeps, at first and at most: 0.5 ms and 0.5 s at 2 GHz.
SLEEP, LONGEST = 1 << 20, 1 << 30
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def why_not() -> str:
    """Why nothing can be measured here; "" where it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    kernels = [kernel for kernel in fastconv.kernels() if kernel.target == "sm80"]
    if not kernels:
        return f"fastconv was built without CUDA kernels: {fastconv.build_info()['cuda_reason']}"
    return kernels[0].why_not


def clocks() -> str:
    """What nvidia-smi says of clocks, temperature and power."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi not found"
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    return subprocess.run([tool, query, "--format=csv"], capture_output=True, text=True).stdout


class Clock:
    """Seconds of the GPU, without those that it waits for Python."""

    def __init__(self) -> None:
        self._flushed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
        self._sleep = SLEEP

    def time(self, call: Callable[[], object]) -> tuple[float, bool]:
        """One sample, and whether the GPU waited for Python within it."""
        while True:
            asleep, begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            torch.cuda._sleep(self._sleep)
            asleep.record()
            self._flushed.zero_()
            begin.record()
            call()
            end.record()
            waited = asleep.query()
            torch.cuda.synchronize()
            if not waited or self._sleep >= LONGEST:
                return begin.elapsed_time(end) / 1e3, waited
            self._sleep *= 2


def seconds(
    clock: Clock, calls: dict[str, Callable[[], object]], repetitions: int
) -> tuple[dict[str, list[float]], set[str]]:
    """Samples of each call, taken in turns, and whose include time that the GPU waited for Python."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    waiting = set()
    for turn in range(repetitions + 2):  # the first two warm up, and cuDNN tries its algorithms
        for name, call in calls.items():
            took, waited = clock.time(call)
            if turn >= 2:
                samples[name].append(took)
                waiting |= {name} if waited else set()
    return samples, waiting


def ceilings(clock: Clock, repetitions: int) -> dict[str, float]:
    """Bytes a second of a copy, read and write, and flops a second of a bf16 product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times, _ = seconds(clock, {"copy": lambda: target.copy_(source), "product": lambda: a @ a}, repetitions)
    return {
        "copy_bytes_per_second": 2 * source.numel() / statistics.median(times["copy"]),
        "product_flops_per_second": 2 * 8192.0**3 / statistics.median(times["product"]),
    }


def summary(row: Row, medians: dict[str, float], most: dict[str, float]) -> dict[str, float]:
    """fastconv's seconds, its speed next to torch's best, and its share of what the machine can do (NaN for a whole model)."""
    ours = medians["fastconv"]
    theirs = min((t for name, t in medians.items() if name.startswith("torch")), default=math.nan)
    least = max(row.bytes / most["copy_bytes_per_second"], row.flops / most["product_flops_per_second"])
    return {"seconds": ours, "times_torch": theirs / ours, "share": least / ours if least else math.nan}


def run(args: argparse.Namespace, words: Any) -> int:
    """Times every row of the families asked for, prints a table and writes the samples to --json.

    2, with the reason, where there is no GPU.
    """
    reason = why_not()
    if reason:
        print(f"fastconv bench --device cuda: nothing to measure here: {reason}")
        return 2
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    clock = Clock()
    document: dict[str, Any] = {
        "context": context.collect(words, args.seed),
        "gpu": str(torch.cuda.get_device_properties(0)),
        "clocks_before": clocks(),
        "ceilings": ceilings(clock, args.repetitions),
        "results": [],
    }
    print(document["gpu"], document["ceilings"])
    try:
        for family in args.targets or FAMILIES:
            for batch in args.batch or (64,):
                for row in FAMILIES[family](batch, DTYPES[args.dtype]):
                    document["results"].append(
                        _measured(clock, family, batch, row, args.repetitions, document["ceilings"])
                    )
    finally:
        fastconv.set_cuda(False)
        document["clocks_after"] = clocks()
        if args.json:  # what there is, also of a run that was cut short
            args.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return 0


def _measured(
    clock: Clock, family: str, batch: int, row: Row, repetitions: int, most: dict[str, float]
) -> dict[str, Any]:
    times, waiting = seconds(clock, row.calls, repetitions)
    found = summary(row, {name: statistics.median(samples) for name, samples in times.items()}, most)
    late = f", waited for Python: {', '.join(sorted(waiting))}" if waiting else ""
    print(
        f"{family} {row.direction} n{batch} {row.name}: {found['seconds'] * 1e6:.1f} us, {found['times_torch']:.2f} of torch's "
        f"speed, {found['share']:.0%} of the ceiling{late}"
    )
    return {
        "family": family, "case": row.name, "batch": batch, "direction": row.direction, "bytes": row.bytes,
        "flops": row.flops, "samples": times, "waited_for_python": sorted(waiting),
    }  # fmt: skip
