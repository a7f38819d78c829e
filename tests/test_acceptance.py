"""Selection: kernels accept what they are for, everything is accepted by somebody, and a refusal gives its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from fastconv.testing import grids, harness
from fastconv.testing.attention import SDPA_OPS
from fastconv.testing.batch_norm import BATCH_NORM_OPS
from fastconv.testing.norm import NORM_OPS
from fastconv.testing.problems import AVG_POOL_OPS, CONV_OPS, MAX_POOL_OPS, Case
from fastconv.testing.tolerance import HALVES

OPS = CONV_OPS + MAX_POOL_OPS + AVG_POOL_OPS + SDPA_OPS + NORM_OPS + BATCH_NORM_OPS
DTYPES = ("f32", "f64")
PAIRS = [(op, dtype) for op in OPS for dtype in (*DTYPES, *(("bf16", "f16") if op in SDPA_OPS else ()))]

# The share of its op's problems that an algorithm must accept, where it is meant for a part of them only: filters of one
# kind, or one of the two public layouts, which have 45 % of the grid each. Every other algorithm must accept half: less
# would mean that it is hardly tested, or that its reject() refuses by mistake.
SPECIALISTS = {
    "pointwise": 0.15,
    "implicit_gemm": 0.25,
    "depthwise": 0.12,
    "grouped": 0.05,
    "subpixel": 0.1,
    "winograd_f4x5": 0.01,
    "winograd_f2x7": 0.01,
    "winograd": 0.05,
    "channels": 0.4,
    "rows": 0.4,
    "windows": 0.4,
    "global": 0.02,
    "transposed": 0.4,
}
GENERALISTS = 0.5


@pytest.fixture
def isa_limit() -> Iterator[None]:
    yield
    harness.native().set_isa_limit("")


def test_a_kernel_accepts_its_share(kernel: str) -> None:
    op, algorithm, dtype, _ = kernel.split(".")
    share = len(harness.accepted(kernel)) / len(grids.grid(op))
    least = next((v for name, v in SPECIALISTS.items() if algorithm.startswith(name)), GENERALISTS)
    if dtype in HALVES and algorithm == "pointwise":
        least *= 0.45  # channels_last
    assert share >= least, (
        f"{kernel} accepts {share:.0%} of the {len(grids.grid(op))} problems of {op}, expected {least:.0%}"
    )


@pytest.mark.parametrize(("op", "dtype"), PAIRS)
def test_some_kernel_of_every_target_accepts_everything(op: str, dtype: str) -> None:
    kernels = [k for k in harness.native().kernels() if k.op == op and k.dtype == dtype]
    targets = harness.native().build()["targets"]
    assert kernels, f"no kernel for {op} in {dtype}"
    # One target has kernels of a few operations only, beside another's.
    for target in [t for t in targets if t != "avx512_bf16" or any(k.target == t for k in kernels)]:
        complete = [
            k.name
            for k in kernels
            if k.target == target and (not k.runnable or harness.accepted(k.name) == grids.grid(op))
        ]
        assert complete, f"no {target} kernel of {op} in {dtype} accepts every problem"


def samples(op: str) -> tuple[Case, ...]:
    return grids.grid(op)[::25]


@pytest.mark.parametrize(("op", "dtype"), PAIRS)
def test_plan_agrees_with_explain(op: str, dtype: str) -> None:
    native = harness.native()
    for case in samples(op):
        problem = harness.native_problem(case, dtype)
        candidates = native.explain(op, problem)
        assert {name for name, _, _ in candidates} == {
            k.name for k in native.kernels() if k.op == op and k.dtype == dtype
        }
        costs = {name: cost for name, verdict, cost in candidates if not verdict}
        assert all(cost > 0 for cost in costs.values()), f"{case}: costs must be positive: {costs}"
        chosen = native.plan(op, problem, 1).kernel
        assert costs[chosen] == min(costs.values()), f"{case}: {chosen} is not the cheapest of {costs}"
        for name, verdict, _ in candidates:
            if not verdict:
                assert native.plan(op, problem, 1, name).kernel == name
            else:
                assert not verdict.endswith("."), f"{name}: a reason has no full stop: {verdict!r}"
                with pytest.raises(NotImplementedError) as refusal:
                    native.plan(op, problem, 1, name)
                assert verdict in str(refusal.value)


@pytest.mark.parametrize("op", OPS)
def test_force_by_algorithm_and_by_target(op: str) -> None:
    native = harness.native()
    for case in samples(op)[::3]:
        problem = harness.native_problem(case, "f32")
        for name in (n for n, verdict, _ in native.explain(op, problem) if not verdict):
            _, algorithm, _, target = name.split(".")
            assert native.plan(op, problem, 1, algorithm).kernel.split(".")[1] == algorithm
            assert native.plan(op, problem, 1, target).kernel.split(".")[3] == target


def test_unknown_names_are_errors() -> None:
    native, problem = harness.native(), harness.native_problem(grids.conv_grid()[0], "f32")
    with pytest.raises(ValueError, match="conv2d_sideways"):
        native.plan("conv2d_sideways", problem, 1)
    with pytest.raises(ValueError, match="im2colour"):
        native.plan("conv2d_fwd", problem, 1, "im2colour")


@pytest.mark.parametrize("limit", ["scalar", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("op", OPS)
def test_every_isa_serves_every_problem(op: str, limit: str, isa_limit: None) -> None:
    native = harness.native()
    levels = ["scalar", "avx2", "avx512", "avx512_bf16"]
    allowed = levels[: levels.index(limit) + 1]
    native.set_isa_limit(limit)
    assert set(native.machine()["isa"]) <= set(allowed)
    for dtype in DTYPES:
        for case in samples(op):
            target = native.plan(op, harness.native_problem(case, dtype), 1).kernel.split(".")[3]
            assert target in allowed, f"{op} on {case}: chose {target}, allowed are {allowed}"


def test_a_kernel_above_the_limit_says_so(isa_limit: None) -> None:
    native = harness.native()
    wide = [k.name for k in native.kernels() if k.target == "avx512" and k.op == "conv2d_fwd" and k.dtype == "f32"]
    native.set_isa_limit("avx2")
    stopped = [k for k in native.kernels() if k.name in wide]
    assert stopped
    assert all(not k.runnable and k.why_not for k in stopped)
    problem = harness.native_problem(grids.conv_grid()[0], "f32")
    with pytest.raises(NotImplementedError, match="avx512"):
        native.plan("conv2d_fwd", problem, 1, wide[0])


@pytest.mark.ops(*CONV_OPS)
def test_workspace_is_cache_sized(kernel: str) -> None:
    """Scratch of one thread: packed weights, with tiles filled up, and an L2-sized block; never a batch of anything.

    Winograd's F(m, r) packs (m + r - 1)^2 numbers for the r^2 of a filter. A stage of images (csrc/cpu/blocks/image_stage.h) is
    4 MB, because filters are packed for each part that it holds.
    """
    native = harness.native()
    op, algorithm, dtype, _ = kernel.split(".")
    growth = 2.0
    if algorithm.startswith("winograd"):
        m, r = int(algorithm[-3]), int(algorithm[-1])
        growth = (m + r - 1) ** 2 / r**2
    cache = native.machine()["l2_bytes"]
    for case in (replace(layer, N=64) for layer in grids.layers()):
        problem = harness.native_problem(case, dtype)
        if not harness.verdicts(op, case, dtype)[kernel]:
            weights = case.K * (case.C // case.groups) * case.R * case.S * (8 if dtype == "f64" else 4)
            staged = op != "conv2d_wgrad" and algorithm in ("implicit_gemm", "pointwise") and case.layout == "nchw"
            size = native.plan(op, problem, 1, kernel).workspace
            allowed = growth * weights + 3 * cache // 2 + staged * (4 << 20)
            assert size <= allowed, f"{kernel} on {case}: {size} bytes, {allowed} are allowed"
