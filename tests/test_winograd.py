"""What is special about Winograd's kernels: error by tile size, NaN within tiles, and when they are chosen."""

from __future__ import annotations

import numpy as np
import pytest

import fastconv
from fastconv.testing import fill, harness
from fastconv.testing.problems import ConvCase, parse
from fastconv.testing.tolerance import relative_l2

WINOGRAD = sorted({k.name for k in fastconv.kernels() if k.algorithm.startswith("winograd") and k.runnable})


def tile_and_filter(kernel: str) -> tuple[int, int]:
    """m and r of F(m x m, r x r)."""
    m, r = kernel.split(".")[1].removeprefix("winograd_f").split("x")
    return int(m), int(r)


def conv_case(text: str) -> ConvCase:
    case = parse(text)
    assert isinstance(case, ConvCase)
    return case


def as_in_a_network(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Activations after a ReLU; filters and gradients of both signs, without which errors are a tenth."""
    return fill.rectified(key, shape) if key.endswith("x") else fill.normal(key, shape)


@pytest.mark.parametrize("name", WINOGRAD)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_error_stays_within_what_the_default_may_pick(name: str, layout: str) -> None:
    """2e-5 relative L2, oneDNN's own bound for float32 Winograd."""
    m, r = tile_and_filter(name)
    case = conv_case(f"n2c96h23w19k40r{r}s{r}u1p{r // 2}d1g1-{layout}")
    op = name.split(".")[0]
    inputs, truth = harness.problem_data(op, case, as_in_a_network)
    result = harness.run(op, case, "f32", inputs, force=name)
    output = {"conv2d_fwd": "y", "conv2d_dgrad": "x", "conv2d_wgrad": "w"}[op]
    assert relative_l2(result.outputs[output], truth.outputs[output]) <= {4: 2e-6, 6: 4e-6, 8: 2e-5}[m + r - 1]


@pytest.mark.parametrize("name", WINOGRAD)
@pytest.mark.parametrize("window", ["p2d2", "p0x3x4x1d2x3", "p1d1x4", "p9x0x1x8d5x1"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_every_phase_of_a_dilated_convolution(name: str, window: str, layout: str) -> None:
    """Phases of unequal sizes, of which one reads nothing but padding, and paddings that start in the middle of them."""
    m, r = tile_and_filter(name)
    op = name.split(".")[0]
    for size in ("n2c20h31w27", "n1c5h29w26"):
        case = conv_case(f"{size}k18r{r}s{r}u1{window}g1-{layout}")
        inputs, truth = harness.problem_data(op, case, as_in_a_network)
        result = harness.run(op, case, "f32", inputs, force=name)
        output = {"conv2d_fwd": "y", "conv2d_dgrad": "x", "conv2d_wgrad": "w"}[op]
        assert relative_l2(result.outputs[output], truth.outputs[output]) <= {4: 2e-6, 6: 4e-6, 8: 2e-5}[m + r - 1]


@pytest.mark.parametrize("name", [k for k in WINOGRAD if "_wgrad" in k])
def test_the_error_of_a_filter_gradient_stays_small_over_many_tiles(name: str) -> None:
    """Its sums run over all tiles of a batch: 1568 here. Channels of every vector's remainder cost no accuracy."""
    case = conv_case("n8c17h56w56k18r3s3u1p1d1g1-nhwc")
    inputs, truth = harness.problem_data("conv2d_wgrad", case, as_in_a_network)
    result = harness.run("conv2d_wgrad", case, "f32", inputs, force=name)
    assert relative_l2(result.outputs["w"], truth.outputs["w"]) <= 4e-6


@pytest.mark.parametrize("name", [k for k in WINOGRAD if "_wgrad" in k])
@pytest.mark.parametrize(
    "text",
    [
        "n3c70h11w13k130r3s3u1p1d1g1-nhwc",  # more blocks of channels and filters than one, each with a remainder
        "n3c70h11w13k130r3s3u1p1d1g1-nchw",
        "n1c9h3w300k11r3s3u1p1d1g1-nhwc",  # rows of tiles that are cut
        "n5c140h4w5k24r3s3u1p2d1g2-nchw",
    ],
)
def test_blocks_of_a_filter_gradient_keep_the_bits_for_any_threads(name: str, text: str) -> None:
    case = conv_case(text)
    harness.check(name, case)
    inputs, _ = harness.problem_data("conv2d_wgrad", case, fill.normal)
    one, *others = (
        harness.run("conv2d_wgrad", case, "f32", inputs, force=name, threads=n).outputs["w"] for n in (1, 2, 3, 16)
    )
    assert all(np.array_equal(one, other) for other in others)


@pytest.mark.parametrize("name", [k for k in WINOGRAD if "_fwd" in k])
def test_a_nan_stays_in_the_tiles_that_read_it(name: str) -> None:
    """It reaches every output that reads it and, at most, the rest of their tiles; other samples never."""
    m, r = tile_and_filter(name)
    reach = r // 2
    case = conv_case(f"n3c5h17w21k9r{r}s{r}u1p{reach}d1g1-nchw")
    inputs, _ = harness.problem_data("conv2d_fwd", case, fill.normal)
    clean = harness.run("conv2d_fwd", case, "f32", inputs, force=name).outputs["y"]
    for h, w in [(0, 0), (8, 11), (16, 20), (5, 12)]:
        x = inputs["x"].copy()
        x[1, 2, h, w] = np.nan
        y = harness.run("conv2d_fwd", case, "f32", {**inputs, "x": x}, force=name).outputs["y"]
        rows, columns = np.ogrid[:17, :21]
        readers = (abs(rows - h) <= reach) & (abs(columns - w) <= reach)
        near = range(-reach, reach + 1)
        tiles = np.isin(rows // m, [(h + i) // m for i in near]) & np.isin(columns // m, [(w + i) // m for i in near])
        spoiled = np.isnan(y)
        assert spoiled[1][:, readers].all(), "outputs that read the NaN"
        assert not spoiled[1][:, ~tiles].any(), "outputs of other tiles"
        assert not spoiled[[0, 2]].any(), "other samples"
        assert np.array_equal(y[~spoiled], clean[~spoiled])


def test_strict_accuracy_rules_it_out() -> None:
    torch = pytest.importorskip("torch")
    x, w = torch.randn(8, 64, 56, 56), torch.randn(64, 64, 3, 3)
    ops = ("conv2d_fwd", "conv2d_dgrad", "conv2d_wgrad")
    assert all("winograd" in fastconv.explain(op, x, w, padding=1).chosen for op in ops)
    fastconv.set_accuracy("strict")
    try:
        assert not any("winograd" in fastconv.explain(op, x, w, padding=1).chosen for op in ops)
    finally:
        fastconv.set_accuracy("fast")
