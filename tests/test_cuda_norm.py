"""The CUDA kernels of layer normalisation, emulated: tests/cuda_emulator, docs/cuda.md."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastconv.testing import emulator, harness
from fastconv.testing.norm import NormCase
from fastconv.testing.problems import parse

ROOT = Path(__file__).resolve().parents[1]
DEF = (ROOT / "csrc/kernels.def").read_text()
KERNELS = [f"{op}.rows.{dtype}.sm80" for op, dtype in re.findall(r"\((layer_norm_\w+), rows, (\w+), SM80\)", DEF)]

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="needs a host compiler")


# Memory that starts at a page serves packs of 16 bytes, memory one element off does not.
@pytest.mark.parametrize("place", ["low", "heap"])
@pytest.mark.parametrize("name", KERNELS)
def test_normal_data_within_the_rounding_of_its_sums(
    emulated: emulator.Emulator, name: str, place: harness.Place
) -> None:
    assert len(harness.accepted(name)) > 50
    # Halves share float's code but for loading and storing.
    step = 1 if ".f32." in name else 4
    harness.check_all(name, harness.accepted(name)[place == "heap" :: step], place=place)


@pytest.mark.parametrize("name", KERNELS)
def test_bits_depend_on_no_schedule_and_no_alignment(emulated: emulator.Emulator, name: str) -> None:
    op, _, dtype, _ = name.split(".")
    case = NormCase(300, 40, residual=True, gamma=True, beta=True)
    inputs, _ = harness.problem_data(op, case, dtype=dtype)
    seen = set()
    for emulated.seed, place in enumerate(("low", "heap", "low")):
        outputs = harness.run(op, case, dtype, inputs, force=name, place=place).outputs
        seen.add(tuple(np.ascontiguousarray(out).tobytes() for out in outputs.values()))
    assert len(seen) == 1


@pytest.mark.parametrize("name", KERNELS)
def test_bits_of_a_row_do_not_depend_on_its_company(emulated: emulator.Emulator, name: str) -> None:
    op, _, dtype, _ = name.split(".")
    case = NormCase(21, 70, residual=True, gamma=True, beta=True)
    inputs, _ = harness.problem_data(op, case, dtype=dtype)
    together = harness.run(op, case, dtype, inputs, force=name).outputs
    last = {n: value if n in ("gamma", "beta") else value[20:] for n, value in inputs.items()}
    alone = harness.run(op, replace(case, N=1), dtype, last, force=name).outputs
    for output in set(alone) - {"dgamma", "dbeta"}:
        np.testing.assert_array_equal(alone[output][0], together[output][20])


MUTANTS = {
    "no barrier before columns are added up": (
        "csrc/cuda/kernels/layer_norm_bwd_rows.cu",
        "  __syncthreads();  // one row",
        "  // one row",
        "layer_norm_bwd.rows.f32 rows17x24+gamma+beta",
    ),
    "a number behind the row's end": (
        "csrc/cuda/blocks/norm.h",
        "numbers.v[i] = c + i < C ? to_float(row[c + i])",
        "numbers.v[i] = c + i <= C ? to_float(row[c + i])",
        "layer_norm_fwd.rows.f32 rows3x33",
    ),
}


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer ends the process where it finds something"
)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_kernel_fails(cuda_cache: Path, mutant: str) -> None:
    path, text, replacement, check = MUTANTS[mutant]
    name, case = check.split()
    library = emulator.build(ROOT, cuda_cache, edits={path: (text, replacement)}, only=name.rpartition(".")[0])
    with harness.using(emulator.Emulator(library)), pytest.raises((harness.KernelFault, emulator.EmulatorError)):
        harness.check(f"{name}.sm80", parse(case), place="low")
