"""NCHW by way of NHWC, in several parts (csrc/cpu/blocks/image_stage.h): the bits of channels_last, whatever the parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fastconv.testing import fill, harness
from fastconv.testing.problems import ConvCase

TARGETS = [str(t) for t in harness.native().machine()["isa"] if t in ("scalar", "avx2", "avx512")]
# 4 MB of x and y for each thread are a part: several samples, one sample, rows of one, with and without a stride.
CASES = {
    "samples": ConvCase(5, 16, 112, 113, 8, 3, 3, stride=(2, 2), pad4=(1, 1, 1, 1)),
    "one_sample": ConvCase(2, 28, 140, 141, 9, 3, 3, stride=(1, 2), pad4=(1, 0, 2, 1)),
    "rows": ConvCase(1, 9, 420, 401, 17, 3, 3, stride=(2, 2), pad4=(1, 1, 1, 1)),
    "dilated_rows": ConvCase(2, 8, 400, 301, 20, 3, 2, stride=(1, 2), pad4=(3, 2, 0, 1), dilation=(3, 1)),
    "groups": ConvCase(1, 12, 300, 310, 18, 5, 3, stride=(2, 2), pad4=(2, 2, 1, 1), groups=3),
    "pointwise_samples": ConvCase(7, 32, 91, 90, 24, 1, 1, stride=(2, 2)),
    "pointwise_rows": ConvCase(1, 20, 260, 261, 48, 1, 1, stride=(3, 2)),
    "pointwise_padded": ConvCase(1, 20, 260, 261, 19, 1, 1, stride=(2, 2), pad4=(1, 0, 2, 1)),
}


def outputs(op: str, case: ConvCase, dtype: str, target: str, threads: int) -> np.ndarray:
    inputs = harness.make_inputs(op, replace(case, layout="nchw"), fill.normal)
    algorithm = "pointwise" if case.R * case.S == 1 else "implicit_gemm"
    (name,) = ("x",) if op == "conv2d_dgrad" else ("y",)
    found: np.ndarray = harness.run(
        op, case, dtype, inputs, force=f"{op}.{algorithm}.{dtype}.{target}", threads=threads
    ).outputs[name]
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", ["conv2d_fwd", "conv2d_dgrad"])
@pytest.mark.parametrize("name", CASES)
def test_parts_have_the_bits_of_channels_last(name: str, op: str, target: str) -> None:
    case = replace(CASES[name], bias=op == "conv2d_fwd")
    want = outputs(op, replace(case, layout="nhwc_kcrs"), "f32", target, 1)
    for threads in (1, 2, 3):
        assert np.array_equal(outputs(op, replace(case, layout="nchw"), "f32", target, threads), want), threads


def test_the_residual_is_added_on_the_way_back() -> None:
    for name in ("samples", "rows", "pointwise_samples"):
        case = replace(CASES[name], bias=True, residual=True, activation="relu")
        want = outputs("conv2d_fwd", replace(case, layout="nhwc_kcrs"), "f64", TARGETS[-1], 1)
        assert np.array_equal(outputs("conv2d_fwd", replace(case, layout="nchw"), "f64", TARGETS[-1], 2), want)
