"""Every CUDA kernel on a GPU, on the CPU tests' problems and with their bounds: what the emulator's tests are of, for real.

The emulator takes the same way on a few problems, from memory that was copied there too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastconv import _native
from fastconv.testing import emulator, fill, grids, harness
from fastconv.testing.problems import Case, parse

ROOT = Path(__file__).resolve().parents[1]
ROWS = re.findall(r"^FC_KERNEL\((\w+), (\w+), (\w+), SM80\)", (ROOT / "csrc/kernels.def").read_text(), re.MULTILINE)
KERNELS = [".".join((*row, "sm80")) for row in ROWS]
# Strict, and without quotients or exponentials: of integers their sums are exact.
EXACT = [name for name in KERNELS if re.match(r"(conv2d|max_pool2d)_\w+\.(direct|depthwise)\.f32", name)]

# Whole chunks that come by asynchronous copies, several tiles each way with tails, keys that are cut into segments.
TILES = {
    "conv2d": (
        "n1c40h7w9k33r3s3u1p1d1g1-nhwc", "n3c104h7w7k72r1s1u1p0d1g1-nhwc", "n2c16h9w8k48r3s5u2p2x1x0x3d2x1g2-nhwc",
        "n3c24h11w13k72r3s3u1p1d1g1-nhwc+bias", "n1c3h40w37k70r7s7u2p3d1g1-nchw+bias",
    ),
    "sdpa": (
        "n1h1g1q130k150d64v64-bhld+causal", "n1h2g1q70k100d72v96-blhd+lower+window40+mask_qk", "n1h6g2q1k200d128v128-blhd",
        "n1h1g1q66k70d136v256-bhld+lower", "n1h4g2q20k140d64v40-bhld+drop0.3+bias_h+sink", "n1h2g1q3k2300d64v64-bhld",
    ),
}  # fmt: skip


@pytest.fixture
def there(gpu: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """The harness with kernels of operands in a GPU's memory, or in a copy for the emulator; which of the two it is."""
    from fastconv.testing.on_gpu import OnGpu

    if gpu.name == "emulated":
        module, device = emulator.Emulator(request.getfixturevalue("cuda_library")), "cpu"
    else:
        module, device = _native.load(), "cuda:0"
    with harness.using(OnGpu(module, device)):
        yield gpu.name


def some(there: str, cases: tuple[Case, ...], step: int = 1) -> tuple[Case, ...]:
    """On the emulator three, whose tests of all are elsewhere."""
    return cases[::step] if there == "cuda" else cases[:: max(1, len(cases) // 3)]


@pytest.mark.parametrize("name", KERNELS)
def test_normal_data_within_the_rounding_of_its_sums(there: str, name: str) -> None:
    cases = some(there, harness.checked(name))
    assert len(cases) >= 3
    harness.check_all(name, cases)


@pytest.mark.parametrize("name", EXACT)
def test_integers_are_exact(there: str, name: str) -> None:
    cases = [c for c in harness.accepted(name)[1:] if getattr(c, "activation", "none") in ("none", "relu", "relu6")]
    harness.check_all(name, some(there, tuple(cases), 3), fill.integers, exact=True)


@pytest.mark.parametrize("name", [name for name in KERNELS if "max_pool2d" in name])
def test_pooling_of_nan_and_infinity(there: str, name: str) -> None:
    harness.check_all(name, some(there, harness.accepted(name)), fill.with_specials)


@pytest.mark.parametrize("name", [name for name in KERNELS if name.split("_")[0] in TILES and "depthwise" not in name])
def test_tiles(there: str, name: str) -> None:
    """In every run with the same bits: what hurries past a barrier does not always."""
    op, _, dtype, _ = name.split(".")
    takes = [parse(text) for text in TILES[name.split("_")[0]]]
    for case in takes if there == "cuda" else takes[:1]:
        harness.check(name, case)
        inputs, _ = harness.problem_data(op, case, dtype=dtype)
        seen = set()
        for _ in range(10 if there == "cuda" else 2):
            outputs = harness.run(op, case, dtype, inputs, force=name).outputs
            seen.add(tuple(np.ascontiguousarray(out).tobytes() for out in outputs.values()))
        assert len(seen) == 1


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("op", ["conv2d_fwd", "conv2d_dgrad", "conv2d_wgrad"])
def test_the_direct_kernel_takes_what_nothing_else_takes(there: str, op: str, dtype: str) -> None:
    assert harness.accepted(f"{op}.direct.{dtype}.sm80") == tuple(grids.grid(op))
