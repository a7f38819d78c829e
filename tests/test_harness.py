"""The harness finds broken kernels: a right one passes, and each of these mutants is caught."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastconv import reference
from fastconv.testing import fill, grids, harness, problems, tolerance
from fastconv.testing.buffers import Block, Operand
from fastconv.testing.problems import ConvCase

CONV, POOL = "conv2d_fwd.fake.f32.scalar", "max_pool2d_fwd.fake.f32.scalar"
Memory = dict[str, np.ndarray]
Judge = Callable[[str, Any], None]


def conv(p: Any, m: Memory, **changes: Any) -> np.ndarray:
    """A right convolution on raw memory, unless the changes make it wrong."""
    u, d = changes.get("stride", p.stride), changes.get("dilation", p.dilation)
    top, left = changes.get("pad", p.pad)
    bottom = (p.P - 1) * u[0] + d[0] * (p.R - 1) + 1 - p.H - top
    right = (p.Q - 1) * u[1] + d[1] * (p.S - 1) + 1 - p.W - left
    return reference.conv2d(
        m["x"],
        m["w"],
        m.get("bias") if changes.get("bias", True) else None,
        m.get("residual"),
        stride=u,
        pad4=(top, bottom, left, right),
        dilation=d,
        groups=p.groups,
        activation=changes.get("activation", p.activation),
    )


def right(p: Any, m: Memory) -> None:
    m["y"][...] = conv(p, m)


def dropped_channel_tail(p: Any, m: Memory) -> None:
    y = conv(p, m)
    m["y"][:, : max(1, p.K // 8 * 8)] = y[:, : max(1, p.K // 8 * 8)]


def dropped_reduction_tail(p: Any, m: Memory) -> None:
    c = max(1, m["w"].shape[1] // 4 * 4)
    w = m["w"].copy()
    w[:, c:] = 0
    m["y"][...] = conv(p, m | {"w": w})


def dropped_last_pixel(p: Any, m: Memory) -> None:
    y = conv(p, m)
    m["y"][..., :-1] = y[..., :-1]


def pad_off_by_one(p: Any, m: Memory) -> None:
    m["y"][...] = conv(p, m, pad=(p.pad[0], p.pad[1] - 1))


def strides_exchanged(p: Any, m: Memory) -> None:
    m["y"][...] = conv(p, m, stride=p.stride[::-1])


def dilations_exchanged(p: Any, m: Memory) -> None:
    m["y"][...] = conv(p, m, dilation=p.dilation[::-1])


def filter_turned(p: Any, m: Memory) -> None:
    m["y"][...] = conv(p, m | {"w": m["w"][:, :, ::-1, ::-1]})


def bias_forgotten(p: Any, m: Memory) -> None:
    m["y"][...] = conv(p, m, bias=False)


def activation_forgotten(p: Any, m: Memory) -> None:
    m["y"][...] = conv(p, m, activation="none")


def half_precision(p: Any, m: Memory) -> None:
    m["y"][...] = conv(p, m).astype(np.float16)


def nan_swallowed(p: Any, m: Memory) -> None:
    m["y"][...] = np.nan_to_num(conv(p, m))


def _poke(array: np.ndarray, element: int, value: float = 1.0) -> None:
    ctypes.c_float.from_address(array.ctypes.data + 4 * element).value = value


def writes_behind(p: Any, m: Memory) -> None:
    right(p, m)
    _poke(m["y"], sum((n - 1) * s // 4 for n, s in zip(m["y"].shape, m["y"].strides, strict=True)) + 1)


def writes_before(p: Any, m: Memory) -> None:
    right(p, m)
    _poke(m["y"], -1)


def writes_between_rows(p: Any, m: Memory) -> None:
    right(p, m)
    _poke(m["y"], p.Q * m["y"].strides[3] // 4)


def writes_behind_workspace(p: Any, m: Memory) -> None:
    right(p, m)
    _poke(m["workspace"], 16)


def changes_an_input(p: Any, m: Memory) -> None:
    right(p, m)
    m["x"][0, 0, 0, 0] += 1


def reads_behind(p: Any, m: Memory) -> None:
    last = sum((n - 1) * s // 4 for n, s in zip(m["x"].shape, m["x"].strides, strict=True))
    m["y"][...] = conv(p, m) + ctypes.c_float.from_address(m["x"].ctypes.data + 4 * last + 4).value


def reads_workspace_before_writing(p: Any, m: Memory) -> None:
    m["y"][...] = conv(p, m) + m["workspace"][3]


CONV_MUTANTS = [
    dropped_channel_tail,
    dropped_reduction_tail,
    dropped_last_pixel,
    pad_off_by_one,
    strides_exchanged,
    dilations_exchanged,
    filter_turned,
    bias_forgotten,
    activation_forgotten,
    half_precision,
    nan_swallowed,
    writes_behind,
    writes_before,
    writes_between_rows,
    writes_behind_workspace,
    changes_an_input,
    reads_behind,
    reads_workspace_before_writing,
]


def max_pool(p: Any, m: Memory, x: np.ndarray) -> None:
    case = problems.PoolCase(p.N, p.C, p.H, p.W, p.R, p.S, p.stride, p.pad, p.dilation)
    if p.adaptive:
        case = problems.PoolCase(p.N, p.C, p.H, p.W, adaptive=(p.P, p.Q))
    elif (case.P, case.Q) != (p.P, p.Q):
        case = problems.PoolCase(p.N, p.C, p.H, p.W, p.R, p.S, p.stride, p.pad, p.dilation, ceil=True)
    m["y"][...], m["indices"][...] = harness.max_pool_truth(case, x.astype(np.float64))


def right_pool(p: Any, m: Memory) -> None:
    max_pool(p, m, m["x"])


def last_of_equals(p: Any, m: Memory) -> None:
    max_pool(p, m, m["x"] + np.arange(p.H * p.W).reshape(p.H, p.W) * 1e-4)
    m["y"][...] = np.take_along_axis(m["x"].reshape(p.N, p.C, -1), m["indices"].reshape(p.N, p.C, -1), 2).reshape(
        p.N, p.C, p.P, p.Q
    )


def padding_is_zero(p: Any, m: Memory) -> None:
    right_pool(p, m)
    if any(p.pad):
        m["y"][...] = np.maximum(m["y"], 0)


def nan_loses(p: Any, m: Memory) -> None:
    max_pool(p, m, np.where(np.isnan(m["x"]), -np.inf, m["x"]))


def index_in_the_window(p: Any, m: Memory) -> None:
    right_pool(p, m)
    m["indices"][...] %= p.W


POOL_MUTANTS = [last_of_equals, padding_is_zero, nan_loses, index_in_the_window]


def test_a_right_convolution_passes(judge: Judge) -> None:
    judge(CONV, right)


def test_a_right_pooling_passes(judge: Judge) -> None:
    judge(POOL, right_pool)


@pytest.mark.parametrize("mutant", CONV_MUTANTS, ids=lambda f: f.__name__)
def test_convolution_mutants_are_caught(judge: Judge, mutant: Any) -> None:
    with pytest.raises(harness.KernelFault):
        judge(CONV, mutant)


@pytest.mark.parametrize("mutant", POOL_MUTANTS, ids=lambda f: f.__name__)
def test_pooling_mutants_are_caught(judge: Judge, mutant: Any) -> None:
    with pytest.raises(harness.KernelFault):
        judge(POOL, mutant)


def test_a_failure_can_be_run_again(fake: Callable[[Any], None]) -> None:
    fake(bias_forgotten)
    case = problems.parse("n1c2h3w3k4r1s1u1p0d1g1-nhwc+bias")
    with pytest.raises(
        harness.KernelFault, match=r"again: python -m fastconv\.testing conv2d_fwd\S+ n1c2h3w3\S+\+bias "
    ):
        harness.check(CONV, case)


def test_ids_come_back() -> None:
    for case in (*grids.conv_grid(), *grids.pool_grid()):
        assert problems.parse(str(case)) == case


@pytest.mark.parametrize(
    "text",
    [
        "",
        "n1c1",
        "n1c1h2w2k1r1s1u1p0d1g1-sideways",
        "n1c1h2w2k1r1s1u1x2x3p0d1g1-nchw",
        "n1c1h2w2k1r1s1u1p0d1g1-nchw+tanh",
    ],
)
def test_bad_ids_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|not a problem id|unknown layout"):
        problems.parse(text)


def test_every_layout_has_memory_of_its_own() -> None:
    """No two elements of an output share an address, and no element lies outside its block."""
    for layout in {f for formats in problems.LAYOUTS.values() for f in formats} - {"expand", "scalar"}:
        operand = Operand.make((2, 3, 4, 5), np.float32, layout)
        operand.view[...] = np.arange(120).reshape(2, 3, 4, 5)
        assert np.unique(operand.view).size == 120, layout
        assert not operand.block.damage(), layout
        assert not operand.damage(), layout
        assert not operand.unwritten().any(), layout


@pytest.mark.parametrize("place", ["low", "high"])
def test_guarded_blocks_lie_against_their_page(place: Any) -> None:
    block = Block(100, place, 4)
    edge = block.address if place == "low" else block.address + 100
    assert edge % 4096 == 0


def test_the_bound_does_not_depend_on_luck() -> None:
    """A plain f32 sum, one product after the other, stays within a third of the bound for short and long sums."""
    for terms in (1, 7, 64, 1000, 4608):
        x = fill.normal(f"x{terms}", (terms, 500)).astype(np.float32)
        w = fill.normal(f"w{terms}", (terms, 500)).astype(np.float32)
        total = np.zeros(500, np.float32)
        for a, b in zip(x, w, strict=True):
            total += a * b
        exact = (x.astype(np.float64) * w).sum(axis=0)
        allowed = tolerance.bound(np.abs(x.astype(np.float64) * w).sum(axis=0), np.float32)
        assert (np.abs(total - exact) <= allowed / 3).all(), terms


def test_the_bound_notices_one_missing_term() -> None:
    x = fill.normal("missing", (4608, 200))
    allowed = tolerance.bound(np.abs(x).sum(axis=0), np.float32)
    assert (np.abs(x).max(axis=0) > allowed).all()


def test_relative_l2_and_peers() -> None:
    truth = np.array([3.0, 4.0])
    assert tolerance.relative_l2(np.array([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert tolerance.relative_l2(truth, truth) == 0.0
    peer = np.array([3.0, 4.25], np.float32)
    assert tolerance.peer_bound(peer, truth) == pytest.approx(0.5, abs=1e-6)
    assert tolerance.l2_bound(8.0, 10**9, np.float32) == tolerance.WINOGRAD_L2


def test_dgrad_and_wgrad_cases_have_right_operands() -> None:
    case = ConvCase(2, 3, 5, 6, 4, 3, 3)
    assert set(harness.make_inputs("conv2d_dgrad", case)) == {"y", "w"}
    assert set(harness.make_inputs("conv2d_wgrad", case)) == {"x", "y"}
