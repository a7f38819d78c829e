"""The machine's ceilings, measured: independent FMAs in registers, and a copy of as many bytes as a case moves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import fastconv
from fastconv.testing.timing import Probe

# One probe of a round: four of the half-millisecond windows whose best fma_peak returns, so that one interruption costs
# nothing.
_PROBE_S = 2e-3
# Before and after a run: long enough for the clock to settle under AVX-512.
_SETTLED_S = 0.2
# Read and written by the run-level copy: beyond the last-level caches of the machines this is likely to meet.
_MEMORY_BYTES = 1 << 28


@contextmanager
def with_threads(threads: int) -> Iterator[None]:
    """torch's thread count for the length of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def computed(target: str, dtype: str) -> str:
    """What a dtype's products are computed in: halves in f32, but for bf16 where there are products of its pairs."""
    if dtype == "bf16" and target == "avx512_bf16":
        return dtype
    return "f32" if dtype in ("bf16", "f16") else dtype


def fma_probe(target: str, dtype: str, threads: int) -> Probe:
    """GFLOP/s of fused multiply-adds, all threads together."""

    def measure() -> float:
        return float(fastconv._C.fma_peak(target, computed(target, dtype), threads, _PROBE_S))

    return Probe(f"fma {target} {threads}", measure, lambda: with_threads(threads))


def copy_probe(moved: int, threads: int) -> Probe:
    """GB/s (read + written) of torch's copy of ``moved / 2`` bytes, from and to memory that is used again each time.

    Sizes that fit a cache are copied within that cache, which is the ceiling of a case of that size too.
    """
    source = torch.zeros(max(64, moved // 8), dtype=torch.float32)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.itemsize
    inner = max(1, int(5e-4 * 2e10 / copied))

    def measure() -> float:
        target.copy_(source)
        begin = time.perf_counter()
        for _ in range(inner):
            target.copy_(source)
        return inner * copied / (time.perf_counter() - begin) * 1e-9

    return Probe(f"copy {threads}", measure, lambda: with_threads(threads))


def measure(threads: Sequence[int], dtype: str) -> list[dict[str, Any]]:
    """The ceilings outside any match, for each thread count and each instruction set that runs here."""
    found: list[dict[str, Any]] = []
    for count in threads:
        with with_threads(count):
            for target in fastconv._C.machine()["isa"]:
                kind = computed(target, dtype)
                peak = float(fastconv._C.fma_peak(target, kind, count, _SETTLED_S))
                found.append({"kind": "fma", "target": target, "dtype": kind, "threads": count, "gflops": peak})
            probe = copy_probe(_MEMORY_BYTES, count)
            best = max(probe.measure() for _ in range(5))
            found.append({"kind": "copy", "bytes": _MEMORY_BYTES, "threads": count, "gbs": best})
    return found
