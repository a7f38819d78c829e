"""The harness finds broken gradients as it finds broken forwards: right ones pass, and each of these mutants is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastconv import reference
from fastconv.testing import harness

DGRAD, WGRAD = "conv2d_dgrad.fake.f32.scalar", "conv2d_wgrad.fake.f32.scalar"
Memory = dict[str, np.ndarray]
Judge = Callable[[str, Any], None]


def geometry(p: Any, **changes: Any) -> dict[str, Any]:
    """The reference's keywords: stride, padding on four sides, dilation, groups."""
    u, d = changes.get("stride", p.stride), changes.get("dilation", p.dilation)
    top, left = changes.get("pad", p.pad)
    bottom = (p.P - 1) * u[0] + d[0] * (p.R - 1) + 1 - p.H - top
    right = (p.Q - 1) * u[1] + d[1] * (p.S - 1) + 1 - p.W - left
    return {"stride": u, "pad4": (top, bottom, left, right), "dilation": d, "groups": p.groups}


def dgrad(p: Any, m: Memory, **changes: Any) -> np.ndarray:
    """A right input gradient, unless the changes make it wrong."""
    return reference.conv2d_dgrad(m["y"], m["w"], m["x"].shape, **geometry(p, **changes))


def right_dgrad(p: Any, m: Memory) -> None:
    m["x"][...] = dgrad(p, m)


def dgrad_overwrites_at_tile_edges(p: Any, m: Memory) -> None:
    """Tiles of four columns of y: where two tiles meet in a column of x, the second writes over the first."""
    m["x"][...] = 0
    for q in range(0, p.Q, 4):
        tile = np.zeros(m["y"].shape)
        tile[..., q : q + 4] = m["y"][..., q : q + 4]
        part = dgrad(p, m | {"y": tile})
        np.copyto(m["x"], part.astype(np.float32), where=part != 0)


def dgrad_drops_reduction_tail(p: Any, m: Memory) -> None:
    y = m["y"].copy()
    y[:, max(1, p.K // 4 * 4) :] = 0
    m["x"][...] = dgrad(p, m | {"y": y})


def dgrad_drops_channel_tail(p: Any, m: Memory) -> None:
    channels = max(1, p.C // 8 * 8)
    m["x"][:, :channels] = dgrad(p, m)[:, :channels]


def dgrad_strides_exchanged(p: Any, m: Memory) -> None:
    m["x"][...] = dgrad(p, m, stride=p.stride[::-1])


def dgrad_dilations_exchanged(p: Any, m: Memory) -> None:
    m["x"][...] = dgrad(p, m, dilation=p.dilation[::-1])


def dgrad_pad_off_by_one(p: Any, m: Memory) -> None:
    m["x"][...] = dgrad(p, m, pad=(p.pad[0] - 1, p.pad[1]))


def dgrad_filter_turned(p: Any, m: Memory) -> None:
    m["x"][...] = dgrad(p, m | {"w": m["w"][:, :, ::-1, ::-1]})


def dgrad_leaves_what_no_tap_reaches(p: Any, m: Memory) -> None:
    """A strided gradient is zero where no window looks, and that has to be written too."""
    reached = reference.conv2d_dgrad(np.ones(m["y"].shape), np.ones(m["w"].shape), m["x"].shape, **geometry(p)) != 0
    np.copyto(m["x"], dgrad(p, m).astype(np.float32), where=reached)


def dgrad_half_precision(p: Any, m: Memory) -> None:
    m["x"][...] = dgrad(p, m).astype(np.float16)


DGRAD_MUTANTS = [
    dgrad_overwrites_at_tile_edges,
    dgrad_drops_reduction_tail,
    dgrad_drops_channel_tail,
    dgrad_strides_exchanged,
    dgrad_dilations_exchanged,
    dgrad_pad_off_by_one,
    dgrad_filter_turned,
    dgrad_leaves_what_no_tap_reaches,
    dgrad_half_precision,
]


def wgrad(p: Any, m: Memory, **changes: Any) -> None:
    """A right filter gradient, and that of the bias where there is one, unless the changes make them wrong."""
    dw, db = reference.conv2d_wgrad(m["y"], m["x"], m["w"].shape, **geometry(p, **changes))
    m["w"][...] = dw
    if "bias" in m:
        m["bias"][...] = db


def right_wgrad(p: Any, m: Memory) -> None:
    wgrad(p, m)


def wgrad_loses_windows_across_tiles(p: Any, m: Memory) -> None:
    """Tiles of four columns of y that see no more of x than the columns their own pixels stand on."""
    right_dw, columns = np.zeros(m["w"].shape), np.arange(p.W)
    for q in range(0, p.Q, 4):
        tile = np.zeros(m["y"].shape)
        tile[..., q : q + 4] = m["y"][..., q : q + 4]
        first, last = (i * p.stride[1] - p.pad[1] for i in (q, min(q + 4, p.Q) - 1))
        seen = (columns >= first) & (columns <= last + p.dilation[1] * (p.S - 1) // 2)
        right_dw += reference.conv2d_wgrad(tile, m["x"] * seen, m["w"].shape, **geometry(p))[0]
    wgrad(p, m)
    m["w"][...] = right_dw


def wgrad_drops_last_image(p: Any, m: Memory) -> None:
    y = m["y"].copy()
    y[max(1, p.N // 2 * 2) :] = 0
    wgrad(p, m | {"y": y})


def wgrad_drops_last_pixel(p: Any, m: Memory) -> None:
    y = m["y"].copy()
    y[..., max(1, p.Q // 8 * 8) :] = 0
    wgrad(p, m | {"y": y})


def wgrad_drops_filter_tail(p: Any, m: Memory) -> None:
    dw, filters = np.empty(m["w"].shape, np.float32), max(1, p.K // 8 * 8)
    wgrad(p, m | {"w": dw})
    m["w"][:filters] = dw[:filters]


def wgrad_strides_exchanged(p: Any, m: Memory) -> None:
    wgrad(p, m, stride=p.stride[::-1])


def wgrad_dilations_exchanged(p: Any, m: Memory) -> None:
    wgrad(p, m, dilation=p.dilation[::-1])


def wgrad_pad_off_by_one(p: Any, m: Memory) -> None:
    wgrad(p, m, pad=(p.pad[0], p.pad[1] - 1))


def wgrad_adds_to_what_is_there(p: Any, m: Memory) -> None:
    before = m["w"].copy()
    wgrad(p, m)
    m["w"][...] += before


def wgrad_bias_of_the_first_image(p: Any, m: Memory) -> None:
    wgrad(p, m)
    if "bias" in m:
        m["bias"][...] = m["y"][:1].sum(axis=(0, 2, 3))


def wgrad_half_precision(p: Any, m: Memory) -> None:
    wgrad(p, m)
    m["w"][...] = m["w"].astype(np.float16)


WGRAD_MUTANTS = [
    wgrad_loses_windows_across_tiles,
    wgrad_drops_last_image,
    wgrad_drops_last_pixel,
    wgrad_drops_filter_tail,
    wgrad_strides_exchanged,
    wgrad_dilations_exchanged,
    wgrad_pad_off_by_one,
    wgrad_adds_to_what_is_there,
    wgrad_bias_of_the_first_image,
    wgrad_half_precision,
]


@pytest.mark.parametrize(("name", "right"), [(DGRAD, right_dgrad), (WGRAD, right_wgrad)], ids=["dgrad", "wgrad"])
def test_right_gradients_pass(judge: Judge, name: str, right: Any) -> None:
    judge(name, right)


@pytest.mark.parametrize("mutant", DGRAD_MUTANTS, ids=lambda f: f.__name__)
def test_input_gradient_mutants_are_caught(judge: Judge, mutant: Any) -> None:
    with pytest.raises(harness.KernelFault):
        judge(DGRAD, mutant)


@pytest.mark.parametrize("mutant", WGRAD_MUTANTS, ids=lambda f: f.__name__)
def test_filter_gradient_mutants_are_caught(judge: Judge, mutant: Any) -> None:
    with pytest.raises(harness.KernelFault):
        judge(WGRAD, mutant)
