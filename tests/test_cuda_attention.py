"""The CUDA kernels of attention, emulated: tests/cuda_emulator, docs/cuda.md."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from fastconv.testing import emulator, fill, harness
from fastconv.testing.attention import SdpaCase
from fastconv.testing.problems import parse

ROOT = Path(__file__).resolve().parents[1]
DEF = (ROOT / "csrc/kernels.def").read_text()
KERNELS = [f"{op}.flash.{dtype}.sm80" for op, dtype in re.findall(r"\((sdpa_\w+), flash, (\w+), SM80\)", DEF)]
F32 = [name for name in KERNELS if ".f32." in name]
HALVES = sorted(set(KERNELS) - set(F32))

SANITIZE = "libasan" in os.environ.get("LD_PRELOAD", "")
SPARSE = 5 if SANITIZE else 1

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="needs a host compiler")


@pytest.mark.parametrize("place", ["low", "heap"])
@pytest.mark.parametrize("name", F32)
def test_normal_data_within_the_rounding_of_its_sums(
    emulated: emulator.Emulator, name: str, place: harness.Place
) -> None:
    harness.check_all(name, harness.accepted(name)[place == "heap" :: 19 * SPARSE], place=place)


@pytest.mark.parametrize("name", HALVES)
def test_halves(emulated: emulator.Emulator, name: str) -> None:
    harness.check_all(name, harness.accepted(name)[:: 29 * SPARSE], place="low")


# Several tiles each way with tails, where features come by asynchronous copies and where they are gathered: every width of tile,
# every option that scores have, heads that share keys in one tile.
TILES = (
    "n1h1g1q130k150d64v64-bhld+causal",
    "n1h2g1q70k100d72v96-blhd+lower+window40+mask_qk",
    "n1h1g1q66k70d136v256-bhld+lower",
    "n1h4g2q20k140d64v40-bhld+drop0.3+bias_h+sink",
    "n1h1g1q70k67d33v65-step+cap2+mask_k+bool",
    "n1h2g2q5k66d129v7-turned+causal",
    "n1h6g2q1k200d128v128-blhd",
)


@pytest.mark.parametrize("name", KERNELS)
def test_tiles(emulated: emulator.Emulator, name: str) -> None:
    for emulated.seed, case in enumerate(TILES[::SPARSE]):
        harness.check(name, parse(case), place="low")


FORWARD_KERNELS = [name for name in KERNELS if "fwd" in name]

# Two segments of keys, which are joined; in the second problem queries see the last one alone, or nothing at all.
SEGMENTS = (
    "n1h4g2q1k2100d16v24-blhd+sink+bias_h",
    "n1h2g1q3k2200d16v16-bhld+lower+window900",
    "n1h1g1q2k2048d8v40-bhld+mask_k+bool",
)


@pytest.mark.parametrize("name", FORWARD_KERNELS)
def test_segments_of_keys(emulated: emulator.Emulator, name: str) -> None:
    for emulated.seed, case in enumerate(SEGMENTS):
        harness.check(name, parse(case), place="low")


@pytest.mark.parametrize("name", [name for name in FORWARD_KERNELS if ".f16." not in name])
def test_segments_are_cut_whatever_runs_beside(emulated: emulator.Emulator, cuda_cache: Path, name: str) -> None:
    """A query alone, beside another, and where the sums of one tile at a time have room."""
    case = parse("n2h1g1q2k2100d16v16-bhld+lower")
    inputs, _ = harness.problem_data("sdpa_fwd", case, dtype=name.split(".")[2])
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    whole = forward(name, case, q=q, k=k, v=v)
    alone = forward(name, parse("n1h1g1q1k2100d16v16-bhld+lower"), q=q[1:, :, -1:], k=k[1:], v=v[1:])
    np.testing.assert_array_equal(alone[0, 0, 0], whole[1, 0, -1])
    file, *narrow = NARROW["sdpa_fwd"]
    edits = {file: (*narrow, "kSumsAtMost = 64 << 20", "kSumsAtMost = 1")}
    library = emulator.build(ROOT, cuda_cache, sanitize=SANITIZE, edits=edits, only="sdpa_fwd.flash")
    with harness.using(emulator.Emulator(library)):
        np.testing.assert_array_equal(forward(name, case, q=q, k=k, v=v), whole)


@pytest.mark.parametrize("name", [name for name in KERNELS if ".f16." not in name])
def test_bits_depend_on_no_schedule(emulated: emulator.Emulator, name: str) -> None:
    op, _, dtype, _ = name.split(".")
    case = parse("n1h2g1q70k90d16v24-bhld+causal+bias_h+mask_qk")
    inputs, _ = harness.problem_data(op, case, dtype=dtype)
    seen = set()
    for emulated.seed in range(3):
        outputs = harness.run(op, case, dtype, inputs, force=name).outputs
        seen.add(tuple(np.ascontiguousarray(out).tobytes() for out in outputs.values()))
    assert len(seen) == 1


def forward(name: str, case: SdpaCase, **inputs: np.ndarray) -> np.ndarray:
    op, _, dtype, _ = name.split(".")
    return harness.run(op, case, dtype, inputs, force=name).outputs["out"]


@pytest.mark.parametrize("name", FORWARD_KERNELS)
def test_a_query_depends_on_itself_and_the_keys_it_sees(emulated: emulator.Emulator, name: str) -> None:
    """Beside others and alone, from wherever it lies in its tile, and whatever hidden values hold."""
    case = parse("n2h2g1q70k90d16v24-bhld+lower+window30")
    assert isinstance(case, SdpaCase)
    inputs, _ = harness.problem_data("sdpa_fwd", case, dtype=name.split(".")[2])
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    whole = forward(name, case, q=q, k=k, v=v)
    # The last query of one head in one batch element, from the corner that counts from the end.
    alone = forward(name, parse("n1h1g1q1k90d16v24-bhld+lower+window30"), q=q[1:, :1, -1:], k=k[1:], v=v[1:])
    np.testing.assert_array_equal(alone[0, 0, 0], whole[1, 0, -1])
    for special in (np.nan, np.inf):
        spoiled, keys = v.copy(), k.copy()
        spoiled[:, :, 40:42], keys[:, :, 40] = special, np.nan
        got = forward(name, case, q=q, k=keys, v=spoiled)
        reached = (np.arange(70) + 20 >= 40) & (np.arange(70) - 10 <= 41)  # keys i - 10 .. i + 20
        np.testing.assert_array_equal(got[:, :, ~reached], whole[:, :, ~reached])
        assert np.isnan(got[:, :, reached][..., 0]).any()


@pytest.mark.parametrize("name", KERNELS)
def test_too_many_features_are_refused_in_words(emulated: emulator.Emulator, name: str) -> None:
    case = parse("n1h1g1q2k3d257v8-bhld")
    verdicts = harness.verdicts(name.split(".")[0], case, name.split(".")[2])
    assert verdicts[name] == "a query or a value has more than 256 features"


# ---- The emulator notices -----------------------------------------------------------------------------------------------------

FORWARD, BACKWARD = (f"csrc/cuda/kernels/sdpa_{way}_flash.cu" for way in ("fwd", "bwd"))
TENSOR, SIMT, BOTH = (f"csrc/cuda/blocks/attention{which}.h" for which in ("_tensor", "_simt", ""))

# One width of tile is enough to see a fault, and compiles in a fifth of the time.
NARROW = {
    "sdpa_fwd": (
        FORWARD,
        "(features <= 128 ? start<SimtTiles<T, 128, 1, 2>> : start<SimtTiles<T, 256, 1, 2>>)",
        "(void)features, start<SimtTiles<T, 128, 1, 2>>",
        "(features <= 64    ? start<TensorTiles<T, 64, 64, 1, 2>>\n"
        "     : features <= 128 ? start<TensorTiles<T, 128, 64, 1, 2>>\n"
        "                       : start<TensorTiles<T, 256, 32, 1, 2>>)",
        "(void)features, start<TensorTiles<T, 64, 64, 1, 2>>",
    ),
    "sdpa_bwd": (
        BACKWARD,
        "(features <= 128 ? start_all<SimtTiles<T, 128, 1, 2>, SimtTiles<T, 128, 2, 2>>\n"
        "                     : start_all<SimtTiles<T, 256, 1, 2>, SimtTiles<T, 256, 2, 2>>)",
        "(void)features, start_all<SimtTiles<T, 128, 1, 2>, SimtTiles<T, 128, 2, 2>>",
        "(features <= 64    ? start_all<TensorTiles<T, 64, 64, 1, 2>, TensorTiles<T, 64, 64, 2, 2>>\n"
        "     : features <= 128 ? start_all<TensorTiles<T, 128, 32, 1, 2>, TensorTiles<T, 128, 32, 2, 2>>\n"
        "                       : start_all<TensorTiles<T, 256, 16, 1, 2>, TensorTiles<T, 256, 16, 2, 2>>)",
        "(void)features, start_all<TensorTiles<T, 64, 64, 1, 2>, TensorTiles<T, 64, 64, 2, 2>>",
    ),
}

# What is wrong: (file, text, replacement, kernel and problem that show it).
MUTANTS = {
    "no barrier before a tile is read": (
        FORWARD,
        "    __syncthreads();  // this tile",
        "    // this tile",
        "sdpa_fwd.flash.bf16 n1h1g1q66k130d16v16-bhld",
    ),
    "another swizzle for values than for keys": (
        TENSOR,
        "        load_matrices_transposed(b, x + swizzled(k * 16 + lane() % 16, 2 * j + lane() / 16));\n"
        "        multiply_add",
        "        load_matrices_transposed(b, x + swizzled(k * 16 + lane() % 16, (2 * j + lane() / 16) ^ 1));\n"
        "        multiply_add",
        "sdpa_fwd.flash.bf16 n1h1g1q20k70d16v32-bhld",
    ),
    "a key too many": (
        BOTH,
        "j < keys.end; }",
        "j <= keys.end; }",
        "sdpa_fwd.flash.f32 n1h1g1q20k30d8v8-bhld+causal",
    ),
    "sums of a segment that nobody saw": (
        FORWARD,
        " && (seen >> s & 1)",
        "",
        "sdpa_fwd.flash.bf16 n1h1g1q1k2048d8v8-bhld+lower+window900",
    ),
    "a segment that begins a tile too late": (
        FORWARD,
        "int n = seen_from(begin), stage",
        "int n = seen_from(begin + (begin ? Tiles::kN : 0)), stage",
        "sdpa_fwd.flash.bf16 n1h1g1q1k2048d8v8-bhld",
    ),
    "no barrier before weights are read": (
        SIMT,
        "    __syncthreads();\n  }\n\n private:",
        "  }\n\n private:",
        "sdpa_fwd.flash.f32 n1h1g1q66k130d16v16-bhld",
    ),
    "no barrier before queries are overwritten": (
        BACKWARD,
        "    __syncthreads();  // this tile",
        "    // this tile",
        "sdpa_bwd.flash.f16 n1h1g1q130k66d16v16-bhld",
    ),
    "a diagonal that begins a key too late": (
        BACKWARD,
        "const int column = m + mine - half",
        "const int column = m + mine + 1 - half",
        "sdpa_bwd.flash.f32 n1h1g1q66k130d8v8-bhld+bias_h",
    ),
}


@pytest.mark.skipif(SANITIZE, reason="a sanitizer ends the process where it finds something")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_kernel_fails(cuda_cache: Path, mutant: str) -> None:
    path, text, replacement, check = MUTANTS[mutant]
    name, case = check.split()
    file, *narrow = NARROW[name.split(".")[0]]
    edits = {file: tuple(narrow)}
    edits[path] = (*edits.get(path, ()), text, replacement)
    library = emulator.build(ROOT, cuda_cache, edits=edits, only=name.rpartition(".")[0])
    with harness.using(emulator.Emulator(library)), pytest.raises((harness.KernelFault, emulator.EmulatorError)):
        harness.check(f"{name}.sm80", parse(case), fill.normal, place="low")
