"""Races of the CUDA kernels' threads are seen in whatever order they ran: tests/cuda_emulator/races.h, docs/cuda.md.

That all kernels have none is what test_cuda_emulator, test_cuda_attention and test_cuda_norm show besides: they run with the same
eyes open.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fastconv.testing import emulator, harness
from fastconv.testing.problems import parse

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(emulator.compiler() is None, reason="needs a host compiler"),
    pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer has the hooks' place"),
]

# What is wrong: (file, text, replacement, kernel and problem, what the report says).
MUTANTS = {
    "no barrier before a slice is read": (
        "csrc/cuda/blocks/simt_gemm.h",
        "    __syncthreads();\n    FC_UNROLL",
        "    FC_UNROLL",
        "conv2d_fwd.direct.f32 n1c5h3w5k65r1s1u1p0d1g1-nhwc",
        r"byte \d+ of shared memory: thread \d+ of block \d+ .* no barrier between",
    ),
    # Right values in every order: all lanes write what one of them has to.
    "threads that write the same": (
        "csrc/cuda/blocks/attention.h",
        "if (threadIdx.x % kWarp == 0) votes[",
        "votes[",
        "sdpa_fwd.flash.f32 n1h1g1q20k30d8v8-bhld+causal",
        r"shared memory: thread \d+ of block \d+ wrote at attention.h:\d+ .*, thread \d+ of block \d+ writes at attention.h",
    ),
    "threads that write the same result": (
        "csrc/cuda/kernels/max_pool2d_fwd_direct.cu",
        "number = thread_number();\n  if (number >= count) return;",
        "number = thread_number() < count ? thread_number() : count - 1;",
        "max_pool2d_fwd.direct.f32 n2c5h8w9r3s3u2p1d1-nchw",
        r"0x[0-9a-f]+ in global memory: thread \d+ of block \d+ wrote",
    ),
    "a wait for one copy too few": (
        "csrc/cuda/kernels/conv2d_fwd_implicit_gemm.cu",
        "wait_for_copies<kStages - 2>();",
        "wait_for_copies<kStages - 1>();",
        "conv2d_fwd.implicit_gemm.bf16 n1c64h7w7k33r3s3u1p1d1g1-nhwc",
        r"shared memory: thread \d+ of block \d+ copies to it at .* has not waited for the copy",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_race_is_reported(cuda_cache: Path, mutant: str) -> None:
    path, text, replacement, check, report = MUTANTS[mutant]
    name, case = check.split()
    library = emulator.build(ROOT, cuda_cache, edits={path: (text, replacement)}, only=name.rpartition(".")[0])
    with harness.using(emulator.Emulator(library)), pytest.raises(emulator.EmulatorError) as info:
        harness.check(f"{name}.sm80", parse(case), place="low")
    assert str(info.value).startswith(f"{name}.sm80: a race at ")
    assert re.search(report, str(info.value)), str(info.value)
