"""Every CUDA kernel of images, without a GPU: its source compiled for the CPU, with a fiber for each thread.

tests/cuda_emulator gives CUDA its meaning; see docs/cuda.md. Needs the sources and a host compiler.
"""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastconv.testing import emulator, fill, grids, harness
from fastconv.testing.problems import CONV_OPS, parse

ROOT = Path(__file__).resolve().parents[1]
ROWS = re.findall(r"^FC_KERNEL\((\w+), (\w+), (\w+), SM80\)", (ROOT / "csrc/kernels.def").read_text(), re.MULTILINE)
EVERY = [".".join((*row, "sm80")) for row in ROWS]
# Those of images: attention and layer norm have files of their own.
KERNELS = [name for name in EVERY if "2d_" in name]
F32 = [name for name in KERNELS if ".f32." in name and "implicit_gemm" not in name]
TENSOR = [name for name in KERNELS if "implicit_gemm" in name]

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="needs a host compiler")


# Under AddressSanitizer a kernel takes five times as long: how many problems are skipped for one that is run.
SANITIZE = "libasan" in os.environ.get("LD_PRELOAD", "")
SPARSE = 3 if SANITIZE else 1


def test_every_row_is_emulated(emulated: emulator.Emulator) -> None:
    assert emulated.names == EVERY


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("op", CONV_OPS)
def test_the_direct_kernel_takes_what_nothing_else_takes(emulated: emulator.Emulator, op: str, dtype: str) -> None:
    assert harness.accepted(f"{op}.direct.{dtype}.sm80") == tuple(grids.grid(op))


# Memory that starts at a page serves the kernels that move 16 bytes at a time, memory one element off those that cannot; both end
# where a stray access is seen.
@pytest.mark.parametrize("place", ["low", "heap"])
@pytest.mark.parametrize("name", F32)
def test_normal_data_within_the_rounding_of_its_sums(
    emulated: emulator.Emulator, name: str, place: harness.Place
) -> None:
    cases = harness.accepted(name)[place == "heap" :: 9 * SPARSE]
    assert len(cases) >= 3
    harness.check_all(name, cases, place=place)


@pytest.mark.parametrize("name", sorted(set(KERNELS) - set(F32)))
def test_halves_and_tf32(emulated: emulator.Emulator, name: str) -> None:
    # An emulated product on the tensor cores costs a hundred on the FMA units. A filter gradient has most of them, and tf32
    # shares all but its fragments with halves.
    sparse = SPARSE * (4 if "wgrad.implicit_gemm" in name or "implicit_gemm.f32" in name else 1)
    harness.check_all(name, harness.accepted(name)[:: 37 * sparse], place="low")


# Whole chunks of channels that come by asynchronous copies, with tails in every direction; the last two gather one operand each.
TILES = (
    "n1c40h7w9k33r3s3u1p1d1g1-nhwc",
    "n3c104h7w7k72r1s1u1p0d1g1-nhwc",
    "n2c16h9w8k48r3s5u2p2x1x0x3d2x1g2-nhwc",
    "n1c24h12w13k8r7s7u2p3d1g1-slice",
    "n1c40h7w9k16r3s3u1p1d1g1-nhwc_kcrs",
    "n1c41h7w9k16r3s3u1p1d1g1-nhwc",
)
# A filter gradient sums over 429 pixels in two parts; groups; a gathered x; both gathered, with channels and filters to spare.
WGRAD_TILES = (
    "n3c24h11w13k72r3s3u1p1d1g1-nhwc+bias",
    "n2c16h9w8k48r3s5u2p2x1x0x3d2x1g2-nhwc+bias",
    "n1c3h12w13k16r7s7u2p3d1g1-nhwc+bias",
    "n2c41h7w9k33r1s1u1p0d1g1-nchw+bias",
)


@pytest.mark.parametrize("name", TENSOR)
def test_tensor_core_tiles(emulated: emulator.Emulator, name: str) -> None:
    cases = WGRAD_TILES if "wgrad" in name else TILES
    for seed, case in enumerate(cases[::SPARSE]):
        emulated.seed = seed
        harness.check(name, parse(case), place="low")
        # Small integers are exact in tf32, and so are sums of their products in fp32.
        harness.check(name, parse(case), fill.integers, exact=".f32." in name, place="low")


# torch's default strides of (rows, features, 1, 1), which a linear layer has: those of a size of 1 say nothing.
@pytest.mark.parametrize("op", ["conv2d_fwd", "conv2d_wgrad"])
def test_a_linear_layer_comes_by_asynchronous_copies(emulated: emulator.Emulator, op: str) -> None:
    x, w, y = np.zeros((3, 72, 64), np.uint16)
    workspace = np.zeros(1 << 20, np.uint8)
    started = []
    for single in (1, 64):
        images = {"N": 72, "C": 64, "H": 1, "W": 1, "K": 64, "R": 1, "S": 1, "P": 1, "Q": 1, "groups": 1}
        strides = {"x": (64, 1, single, single), "w": (4096, 64, 1, single, single), "y": (64, 1, single, single)}
        problem = emulated.Conv2dProblem(
            dtype="bf16", **images, **strides, stride=(1, 1), pad=(0, 0), dilation=(1, 1), bias=False
        )
        plan = emulated.plan(op, problem, 1, f"{op}.implicit_gemm.bf16.sm80")
        assert plan.workspace <= workspace.nbytes
        plan.run_conv2d(x.ctypes.data, w.ctypes.data, 0, 0, y.ctypes.data, 0, workspace.ctypes.data)
        started.append(emulated.copies)
    assert started[0] == started[1] > 0


@pytest.mark.parametrize("name", F32)
def test_integers_are_exact(emulated: emulator.Emulator, name: str) -> None:
    if "avg" in name:
        pytest.skip("its quotients are no integers")
    cases = [
        c
        for c in harness.accepted(name)[2 :: 31 * SPARSE]
        if getattr(c, "activation", "none") in ("none", "relu", "relu6")
    ]
    harness.check_all(name, cases, fill.integers, exact=True)


@pytest.mark.parametrize("name", [name for name in F32 if "pool2d" in name])
def test_pooling_of_nan_and_infinity(emulated: emulator.Emulator, name: str) -> None:
    harness.check_all(name, harness.accepted(name)[3 :: 23 * SPARSE], fill.with_specials)


@pytest.mark.parametrize("name", [*F32, "conv2d_wgrad.implicit_gemm.bf16.sm80"])
def test_bits_depend_on_no_schedule(emulated: emulator.Emulator, name: str) -> None:
    op, _, dtype, _ = name.split(".")
    case = max(harness.accepted(name)[::40], key=lambda c: str(c).count("nhwc"))
    inputs, _ = harness.problem_data(op, case, dtype=dtype)
    seen = set()
    for emulated.seed in range(3):
        result = harness.run(op, case, dtype, inputs, force=name)
        seen.add(tuple(np.ascontiguousarray(out).tobytes() for out in result.outputs.values()))
    assert len(seen) == 1


@pytest.mark.parametrize("name", [name for name in (*F32, "conv2d_fwd.implicit_gemm.f32.sm80") if "wgrad" not in name])
def test_bits_of_a_sample_do_not_depend_on_its_company(emulated: emulator.Emulator, name: str) -> None:
    op = name.split(".")[0]
    case = next(c for c in harness.accepted(name) if c.N == 2 and c.layout == "nhwc")
    inputs, _ = harness.problem_data(op, case)
    together = harness.run(op, case, "f32", inputs, force=name).outputs
    single = {role: value if role in ("w", "bias") else value[1:] for role, value in inputs.items()}
    alone = harness.run(op, replace(case, N=1), "f32", single, force=name).outputs
    for role, value in alone.items():
        np.testing.assert_array_equal(value[0], together[role][1])


# ---- Far away -----------------------------------------------------------------------------------------------------------------

FAR = 2**31 + 8  # elements from one row of an image to the next, with whole packs of 16 bytes
FAR_PROBLEMS = {
    "conv2d_fwd.direct.f32": 1, "conv2d_fwd.implicit_gemm.f32": 1, "conv2d_fwd.depthwise.f32": 8, "conv2d_dgrad.direct.f32": 1,
    "conv2d_wgrad.implicit_gemm.f32": 1, "conv2d_wgrad.depthwise.f32": 8, "max_pool2d_fwd.direct.f32": 0,
    "max_pool2d_bwd.direct.f32": 0, "avg_pool2d_fwd.direct.f32": 0, "avg_pool2d_bwd.direct.f32": 0,
}  # fmt: skip


class Images:
    """Two images of 8 channels, 3 rows and 4 columns, channels last, in memory that nobody has reserved."""

    shape = 2, 8, 3, 4

    def __init__(self, row: int, dtype: type[np.generic]) -> None:
        self.strides = 3 * row, 1, row, 8
        size = np.dtype(dtype).itemsize
        # MAP_NORESERVE, which Python does not name: 100 GB of addresses, of which some pages are touched.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
        self._memory = mmap.mmap(-1, 6 * row * size, flags=flags)
        whole = np.frombuffer(self._memory, dtype)
        self.address = whole.ctypes.data
        self.values = np.lib.stride_tricks.as_strided(whole, self.shape, [s * size for s in self.strides])


@pytest.mark.skipif(SANITIZE, reason="a sanitizer has no shadow for so many addresses")
@pytest.mark.parametrize("name", FAR_PROBLEMS)
def test_offsets_beyond_31_bits(emulated: emulator.Emulator, name: str) -> None:
    op, groups = name.split(".")[0], FAR_PROBLEMS[name]
    drawn = np.random.default_rng(0)
    x, y = (drawn.integers(-4, 5, Images.shape).astype(np.float32) for _ in range(2))
    w = drawn.integers(-4, 5, (8, 8 // max(groups, 1), 3, 3)).astype(np.float32)
    # Where each maximum lies: at the window's own place.
    places = np.broadcast_to(np.arange(12).reshape(3, 4), Images.shape)
    found = []
    for row in (32, FAR):
        far_x, far_y, indices = Images(row, np.float32), Images(row, np.float32), Images(row, np.int64)
        far_x.values[:], far_y.values[:], indices.values[:] = x, y, places
        sizes = {"N": 2, "C": 8, "H": 3, "W": 4, "P": 3, "Q": 4, "R": 3, "S": 3, "stride": (1, 1), "dilation": (1, 1)}
        workspace = np.zeros(1 << 20, np.uint8)
        there = workspace.ctypes.data
        if groups:
            filters = w.copy()
            strides = tuple(step // 4 for step in w.strides)
            problem = emulated.Conv2dProblem(
                dtype="f32", **sizes, K=8, groups=groups, pad=(1, 1), x=far_x.strides, w=(w.size // groups, *strides),
                y=far_y.strides,
            )  # fmt: skip
            plan = emulated.plan(op, problem, 1, f"{name}.sm80")
            assert plan.workspace <= workspace.nbytes
            plan.run_conv2d(far_x.address, filters.ctypes.data, 0, 0, far_y.address, 0, there)
            written = {"fwd": far_y.values, "dgrad": far_x.values, "wgrad": filters}
        else:
            problem = emulated.Pool2dProblem(
                dtype="f32", **sizes, pad=(1, 1, 1, 1), x=far_x.strides, y=far_y.strides, divisor_override=0,
                count_include_pad=True, adaptive=False,
            )  # fmt: skip
            plan = emulated.plan(op, problem, 1, f"{name}.sm80")
            plan.run_pool2d(far_x.address, far_y.address, indices.address, there)
            written = {"fwd": far_y.values, "bwd": far_x.values}
        found.append(written[op.rsplit("_", 1)[1]].copy())
    np.testing.assert_array_equal(found[1], found[0])
    assert not np.array_equal(found[0], {"y": y, "x": x, "w": w}["w" if "wgrad" in op else "y" if "fwd" in op else "x"])


# ---- The emulator notices -----------------------------------------------------------------------------------------------------

# One way to bring operands is enough to see a fault, and compiles in a third of the time.
NARROW = {
    "conv2d_fwd.implicit_gemm": (
        "csrc/cuda/kernels/conv2d_fwd_implicit_gemm.cu",
        "(x_fits && w_fits ? start<T, true, true> : x_fits ? start<T, true, false> : start<T, false, false>)",
        "(void)x_fits, (void)w_fits, start<T, true, true>",
    ),
    "conv2d_wgrad.implicit_gemm": (
        "csrc/cuda/kernels/conv2d_wgrad_implicit_gemm.cu",
        "(x_fits && y_fits ? start<T, true, true> : y_fits ? start<T, false, true> : start<T, false, false>)",
        "(void)x_fits, (void)y_fits, start<T, true, true>",
    ),
}

MUTANTS = {
    "no barrier before a slice is read": (
        "csrc/cuda/blocks/simt_gemm.h",
        "    __syncthreads();\n    FC_UNROLL",
        "    FC_UNROLL",
        "conv2d_fwd.direct.f32 n1c40h5w7k70r3s3u1p1d1g1-nhwc",
    ),
    "no barrier before a slice is overwritten": (
        "csrc/cuda/blocks/simt_gemm.h",
        "    __syncthreads();  // the next slice",
        "    // the next slice",
        "conv2d_fwd.direct.f32 n1c40h5w7k70r3s3u1p1d1g1-nhwc",
    ),
    "a barrier that a part of the block skips": (
        "csrc/cuda/kernels/conv2d_wgrad_depthwise.cu",
        "    __syncthreads();\n    // One thread",
        "    if (threadIdx.x < 64) __syncthreads();\n    // One thread",
        "conv2d_wgrad.depthwise.f32 n2c18h9w11k18r3s3u2p1d1g18-nhwc",
    ),
    "no barrier before sums are overwritten": (
        "csrc/cuda/kernels/conv2d_wgrad_depthwise.cu",
        "    __syncthreads();  // the next taps",
        "    // the next taps",
        "conv2d_wgrad.depthwise.f32 n1c18h9w40k18r5s5u1p2d1g18-nhwc",
    ),
    "a thread too many": (
        "csrc/cuda/kernels/max_pool2d_fwd_direct.cu",
        "if (number >= count) return;",
        "if (number > count) return;",
        "max_pool2d_fwd.direct.f32 n2c5h8w9r3s3u2p1d1-nchw",
    ),
    "a column of padding too few": (
        "csrc/cuda/kernels/conv2d_fwd_depthwise.cu",
        "column >= a.W) continue",
        "column > a.W) continue",
        "conv2d_fwd.depthwise.f32 n2c18h9w11k18r3s3u2p1d1g18-nhwc",
    ),
    "a filter too many": (
        "csrc/cuda/kernels/conv2d_fwd_direct.cu",
        "if (k_in_group >= filters) break;",
        "if (k_in_group > filters) break;",
        "conv2d_fwd.direct.f32 n1c5h3w5k65r1s1u1p0d1g1-nhwc",
    ),
    "another swizzle for reading than for writing": (
        "csrc/cuda/kernels/conv2d_fwd_implicit_gemm.cu",
        "stage.x + swizzled<T>(warp_m + i * 16 + lane % 16, k + lane / 16)",
        "stage.x + swizzled<T>(warp_m + i * 16 + lane % 16, (k + lane / 16) ^ 1)",
        "conv2d_fwd.implicit_gemm.bf16 n1c64h7w7k33r3s3u1p1d1g1-nhwc",
    ),
    "rows in the same banks": (
        "csrc/cuda/kernels/conv2d_fwd_implicit_gemm.cu",
        "(chunk ^ (row / 2 % kChunks)) * kWide<T>",
        "chunk * kWide<T>",
        "conv2d_fwd.implicit_gemm.bf16 n1c64h7w7k33r3s3u1p1d1g1-nhwc",
    ),
    "a wait for one copy too few": (
        "csrc/cuda/kernels/conv2d_fwd_implicit_gemm.cu",
        "wait_for_copies<kStages - 2>();",
        "wait_for_copies<kStages - 1>();",
        "conv2d_fwd.implicit_gemm.bf16 n1c64h7w7k33r3s3u1p1d1g1-nhwc",
    ),
    "no barrier between stages": (
        "csrc/cuda/kernels/conv2d_fwd_implicit_gemm.cu",
        "    __syncthreads();  // everybody's part",
        "    // everybody's part",
        "conv2d_fwd.implicit_gemm.bf16 n1c64h7w7k33r3s3u1p1d1g1-nhwc",
    ),
    # Only a copy that lands at once, in the slice that a slower warp still multiplies, shows it.
    "a slice that is brought before the barrier": (
        "csrc/cuda/kernels/conv2d_fwd_implicit_gemm.cu",
        "    __syncthreads();  // everybody's part of this slice is there, and the slice before it has been multiplied\n",
        "    if (step + kStages - 1 < steps) operands.bring(shared.stages[(step + kStages - 1) % kStages], step + kStages - 1);\n"
        "    __syncthreads();\n    if (true) {\n    } else\n  ",
        "conv2d_fwd.implicit_gemm.bf16 n1c64h7w7k33r3s3u1p1d1g1-nhwc",
    ),
    "filters that are not rounded to tf32": (
        "csrc/cuda/kernels/conv2d_fwd_implicit_gemm.cu",
        "      FC_UNROLL\n      for (uint32_t& word : w[j]) round_operand<T>(word);\n",
        "",
        "conv2d_fwd.implicit_gemm.f32 n1c16h5w5k8r1s1u1p0d1g1-nhwc",
    ),
    "a pixel too many": (
        "csrc/cuda/kernels/conv2d_wgrad_implicit_gemm.cu",
        "if (n >= end) return",
        "if (n > end) return",
        "conv2d_wgrad.implicit_gemm.bf16 n2c8h11w12k8r1s1u1p0d1g1-nhwc",
    ),
    "floats of another filter": (
        "csrc/cuda/kernels/conv2d_wgrad_implicit_gemm.cu",
        "(kOfA ? i % 2 : i / 2) * 8",
        "(kOfA ? i / 2 : i / 2) * 8",
        "conv2d_wgrad.implicit_gemm.f32 n2c8h12w12k16r1s1u1p0d1g1-nhwc",
    ),
    "places that are read before they are there": (
        "csrc/cuda/kernels/conv2d_wgrad_implicit_gemm.cu",
        "  __syncthreads();  // the first places",
        "  // the first places",
        "conv2d_wgrad.implicit_gemm.bf16 n2c8h12w12k8r1s1u1p0d1g1-nhwc",
    ),
    "places that are overwritten while they are read": (
        "csrc/cuda/kernels/conv2d_wgrad_implicit_gemm.cu",
        "shared.places[step % kStages][lane]",
        "shared.places[next % kStages][lane]",
        "conv2d_wgrad.implicit_gemm.bf16 n2c8h12w12k8r1s1u1p0d1g1-nhwc",
    ),
    "gradients of another filter": (
        "csrc/cuda/kernels/conv2d_wgrad_implicit_gemm.cu",
        "kOfA ? lane / 8 % 2 :",
        "kOfA ? lane / 8 % 2 ^ 1 :",
        "conv2d_wgrad.implicit_gemm.bf16 n2c8h12w12k16r1s1u1p0d1g1-nhwc",
    ),
    "shared memory that was never asked for": (
        "csrc/cuda/kernels/conv2d_fwd_direct.cu",
        "SimtTile::kThreads, sizeof(SimtShared), a",
        "SimtTile::kThreads, 64 << 10 << 10, a",
        "conv2d_fwd.direct.f32 n1c5h3w5k65r1s1u1p0d1g1-nhwc",
    ),
}


@pytest.mark.skipif(SANITIZE, reason="a sanitizer ends the process where it finds something")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_kernel_fails(cuda_cache: Path, mutant: str) -> None:
    path, text, replacement, check = MUTANTS[mutant]
    name, case = check.split()
    kernel = name.rpartition(".")[0]
    edits: dict[str, tuple[str, ...]] = {}
    if kernel in NARROW:
        file, *narrow = NARROW[kernel]
        edits[file] = tuple(narrow)
    edits[path] = (*edits.get(path, ()), text, replacement)
    library = emulator.build(ROOT, cuda_cache, edits=edits, only=kernel)
    with harness.using(emulator.Emulator(library)), pytest.raises((harness.KernelFault, emulator.EmulatorError)):
        harness.check(f"{name}.sm80", parse(case), place="low")


@pytest.mark.skipif(SANITIZE, reason="a sanitizer ends the process where it finds something")
def test_a_debug_build_says_what_went_wrong_in_a_kernel_at_the_call_that_started_it(cuda_cache: Path) -> None:
    """The emulator is one: NDEBUG is not set."""
    waits = "cudaStreamSynchronize(stream)"
    edits = {"csrc/cuda/blocks/device.h": (waits, f"({waits}, cudaErrorInvalidValue)")}
    name = "avg_pool2d_fwd.direct"
    library = emulator.build(ROOT, cuda_cache, edits=edits, only=name)
    with (
        harness.using(emulator.Emulator(library)),
        pytest.raises(emulator.EmulatorError, match="CUDA: a kernel, or one before it: invalid argument"),
    ):
        harness.check(f"{name}.f32.sm80", parse("n2c5h8w9r3s3u2p1d1-nchw"), place="low")
