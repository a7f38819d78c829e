"""Law 7: a sample's bits do not depend on its company, nor any result on threads, on the workspace or on the day."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastconv.testing import fill, grids, harness
from fastconv.testing.attention import SDPA_OPS, SdpaCase
from fastconv.testing.norm import NormCase
from fastconv.testing.problems import AVG_POOL_OPS, CONV_OPS, MAX_POOL_OPS, Case, parse
from fastconv.testing.recurrent import RECURRENT_OPS

SAMPLE_OPS = ("conv2d_fwd", "conv2d_dgrad", *MAX_POOL_OPS, *AVG_POOL_OPS, *SDPA_OPS, "layer_norm_fwd", *RECURRENT_OPS)
REPEATING_LAYOUTS = ("expand", "expand_y", "scalar_y", "shared", "scalar")
# Squares overflow and products with anything are far from the sample's.
HUGE = 3e37


def same_bits(a: harness.Arrays, b: harness.Arrays) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def some(cases: tuple[Case, ...], count: int) -> list[Case]:
    """About ``count`` of the cases, spread over the grid, with one sample of its own memory each."""
    plain = [replace(case, N=1) for case in cases if getattr(case, "layout", "") not in REPEATING_LAYOUTS]
    # Which weights dropout drops depends on the place in the batch.
    plain = [case for case in plain if not getattr(case, "dropout", 0.0)]
    return list(dict.fromkeys(plain[:: max(1, len(plain) // count)]))


def in_company(op: str, case: Case, inputs: harness.Arrays, neighbours: list[float | None]) -> harness.Arrays:
    """The inputs of one sample as a batch: None stands for the sample, a number for a neighbour filled with it."""
    batch: harness.Arrays = {}
    for name, value in inputs.items():
        if name in ("w", "bias", "gamma", "beta"):
            batch[name] = value
        elif isinstance(case, SdpaCase) and name in ("mask", "bias") and "b" not in (getattr(case, name) or ""):
            batch[name] = np.broadcast_to(value, (len(neighbours), *value.shape[1:]))
        elif name == "indices":
            batch[name] = np.concatenate([value] * len(neighbours))
        else:
            parts = [value if other is None else np.full_like(value, other) for other in neighbours]
            batch[name] = np.concatenate(parts)
    return batch


def check_company(op: str, case: Case, dtype: str, force: str) -> None:
    inputs = harness.make_inputs(op, case)
    alone = harness.run(op, case, dtype, inputs, force=force).outputs
    for neighbours, threads in (([np.nan, None], 1), ([None, HUGE, None, np.nan], 2), ([-1.5, 0.25, None], 3)):
        batch = replace(case, N=len(neighbours))
        crowd = in_company(op, case, inputs, neighbours)
        outputs = harness.run(op, batch, dtype, crowd, force=force, threads=threads).outputs
        for position, neighbour in enumerate(neighbours):
            if neighbour is None:
                mine = {name: value[position : position + 1] for name, value in outputs.items()}
                again = f"{force or 'selected'} on {case}: sample {position} of {neighbours}, {threads} threads"
                assert same_bits(mine, alone), f"{again}: its bits differ from those it has alone"


@pytest.mark.ops(*SAMPLE_OPS)
def test_any_company(kernel: str) -> None:
    op, _, dtype, _ = kernel.split(".")
    for case in some(harness.checked(kernel), 32):
        check_company(op, case, dtype, kernel)


@pytest.mark.ops("layer_norm_bwd")
def test_any_company_of_a_row_s_gradient(kernel: str) -> None:
    """Those of gamma and beta are sums over the rows, so they are not asked for."""
    op, _, dtype, _ = kernel.split(".")
    for case in some(harness.accepted(kernel), 32):
        assert isinstance(case, NormCase)
        check_company(op, replace(case, gamma=False, beta=False), dtype, kernel)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("op", SAMPLE_OPS)
def test_any_company_of_the_selected_kernel(op: str, dtype: str) -> None:
    for case in some(grids.grid(op), 60):
        check_company(op, case, dtype, "")


def test_any_threads_any_workspace_any_day(kernel: str) -> None:
    op, _, dtype, _ = kernel.split(".")
    cases = harness.checked(kernel)
    for case in cases[:: max(1, len(cases) // 32)]:
        inputs, _ = harness.problem_data(op, case, dtype=dtype)
        once = harness.run(op, case, dtype, inputs, force=kernel, threads=1, scratch=0).outputs
        # 0xFF is NaN as f32 and f64, 0x7F a huge number.
        for threads, scratch in ((1, 0xFF), (2, 0x7F), (3, 0xFF), (4, 0)):
            outputs = harness.run(op, case, dtype, inputs, force=kernel, threads=threads, scratch=scratch).outputs
            assert same_bits(outputs, once), (
                f"{kernel} on {case}: {threads} threads, workspace {scratch:#x}: bits differ"
            )


def chosen(op: str, case: Case, dtype: str, threads: int) -> str:
    return str(harness.native().plan(op, harness.native_problem(case, dtype), threads).kernel)


def size(case: Case) -> int:
    return case.N * (case.Lq * case.Lkv if isinstance(case, SdpaCase) else case.C * case.H * case.W)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("op", CONV_OPS + MAX_POOL_OPS + AVG_POOL_OPS + SDPA_OPS)
def test_selection_keeps_the_bits(op: str, dtype: str) -> None:
    """A batch or a thread count may select another kernel only if both make the same bits of a sample."""
    batches = (1,) if op == "conv2d_wgrad" else (1, 2, 3, 8, 64)
    pairs: dict[tuple[str, str], list[Case]] = {}
    for case in some(grids.grid(op) + (grids.layers() if op in CONV_OPS else ()), 300):
        names = {chosen(op, replace(case, N=n), dtype, t) for n in batches for t in (1, 2, 4, 16)}
        base = chosen(op, case, dtype, 1)
        for other in names - {base}:
            pairs.setdefault((base, other), []).append(case)
    for (base, other), cases in pairs.items():
        for case in sorted(cases, key=size)[:: max(1, len(cases) // 8)]:
            inputs = harness.make_inputs(op, case, fill.normal)
            a, b = (harness.run(op, case, dtype, inputs, force=name).outputs for name in (base, other))
            assert same_bits(a, b), f"{op} {case}: batch or threads change {base} to {other}, and the bits with it"


@pytest.mark.ops("sdpa_fwd")
def test_queries_keep_their_bits_among_others(kernel: str) -> None:
    """A query's result follows from itself and the keys: the other queries, their number and where tiles end do not show."""
    _, _, dtype, _ = kernel.split(".")
    for text in ("n1h2g1q45k70d9v20-bhld", "n1h1g1q800k1100d8v8-bhld+lower", "n1h2g2q33k40d16v16-blhd+mask_qk+cap3"):
        case = parse(text)
        assert isinstance(case, SdpaCase)
        inputs = harness.make_inputs("sdpa_fwd", case)
        whole = harness.run("sdpa_fwd", case, dtype, inputs, force=kernel).outputs
        for first, count in ((0, 1), (case.Lq - 1, 1), (7, 5), (3, case.Lq - 3)):
            # With the lower right corner for the upper left, a slice of the queries sees what it saw.
            last = first + count
            part = replace(case, Lq=count, causal="lower" if case.causal else "")
            some = {n: v[:, :, first:last] if n in ("q", "mask") else v for n, v in inputs.items()}
            if case.causal:
                keys = case.Lkv - case.Lq + last
                part = replace(part, Lkv=keys)
                some |= {n: v[:, :, :keys] for n, v in inputs.items() if n in ("k", "v")}
            alone = harness.run("sdpa_fwd", part, dtype, some, force=kernel).outputs
            mine = {name: value[:, :, first:last] for name, value in whole.items()}
            assert same_bits(mine, alone), f"{kernel} on {case}: queries {first} to {last} have other bits alone"


@pytest.mark.ops("sdpa_fwd")
def test_what_a_query_does_not_see_may_hold_anything(kernel: str) -> None:
    """Keys and values behind a causal edge, as in a cache that is longer than what was written to it."""
    _, _, dtype, _ = kernel.split(".")
    for text in ("n1h1g1q12k33d8v8-bhld+causal", "n1h2g1q30k32d8v24-blhd+lower", "n1h1g1q24k24d8v8-bhld+lower+window3"):
        case = parse(text)
        assert isinstance(case, SdpaCase)
        inputs = harness.make_inputs("sdpa_fwd", case)
        clean = harness.run("sdpa_fwd", case, dtype, inputs, force=kernel).outputs
        for rubbish in (np.nan, np.inf):
            spoiled = {n: v.copy() for n, v in inputs.items()}
            for name in ("k", "v"):
                spoiled[name][:, :, 5:] = rubbish
            got = harness.run("sdpa_fwd", case, dtype, spoiled, force=kernel).outputs
            sees = [i for i in range(case.Lq) if i + case.band[1] < 5]
            for name in ("out", "lse"):
                mine, before = (
                    np.ascontiguousarray(got[name][:, :, sees]),
                    np.ascontiguousarray(clean[name][:, :, sees]),
                )
                assert mine.tobytes() == before.tobytes(), f"{kernel} on {case}: {name} changes with what is hidden"


@pytest.mark.ops("sdpa_fwd")
def test_keys_behind_a_boolean_mask_may_hold_anything(kernel: str) -> None:
    """Their values may not: they are multiplied by 0, as torch does."""
    _, _, dtype, _ = kernel.split(".")
    for text in ("n1h2g2q12k33d8v8-bhld+mask_k+bool", "n1h2g1q30k32d8v24-blhd+causal+mask_bk+bool+cap3"):
        case = parse(text)
        assert isinstance(case, SdpaCase)
        inputs = harness.make_inputs("sdpa_fwd", case)
        hidden = ~inputs["mask"][0, 0, 0]
        assert 0 < hidden.sum() < case.Lkv
        clean = harness.run("sdpa_fwd", case, dtype, inputs, force=kernel).outputs
        for rubbish in (np.nan, np.inf, -np.inf):
            keys = inputs["k"].copy()
            keys[:, :, hidden] = rubbish
            got = harness.run("sdpa_fwd", case, dtype, inputs | {"k": keys}, force=kernel).outputs
            assert same_bits(got, clean), f"{kernel} on {case}: it changes with what is hidden"
