"""Every kernel on every problem it accepts, against float64."""

from __future__ import annotations

import pytest

from fastconv.testing import fill, harness
from fastconv.testing.problems import AVG_POOL_OPS, CONV_OPS, MAX_POOL_OPS, ConvCase

EXACT_ACTIVATIONS = ("none", "relu", "relu6")


def test_normal_data_within_the_rounding_of_its_sums(kernel: str) -> None:
    harness.check_all(kernel, harness.checked(kernel))


@pytest.mark.ops(*CONV_OPS, *MAX_POOL_OPS)
def test_integers_are_exact(kernel: str) -> None:
    if harness.error_growth(kernel) > 1 and "winograd_f2x3" not in kernel:
        pytest.skip("its transform rounds even integers")
    op = kernel.split(".")[0]
    cases = [c for c in harness.checked(kernel) if getattr(c, "activation", "none") in EXACT_ACTIVATIONS]
    for case in cases:
        if isinstance(case, ConvCase):
            assert case.terms(op) * 8 * 8 + 16 < 2**24, f"{case}: f32 does not hold its sums exactly"
    harness.check_all(kernel, cases, fill.integers, exact=True)


@pytest.mark.ops(*MAX_POOL_OPS)
def test_ties_go_to_the_first(kernel: str) -> None:
    harness.check_all(kernel, harness.checked(kernel), fill.integers_with_zeros, exact=True)


@pytest.mark.ops(*MAX_POOL_OPS, *AVG_POOL_OPS)
def test_pooling_of_nan_and_infinity(kernel: str) -> None:
    harness.check_all(kernel, harness.checked(kernel), fill.with_specials)


@pytest.mark.ops("max_pool2d_fwd")
def test_windows_of_minus_infinity(kernel: str) -> None:
    harness.check_all(kernel, harness.checked(kernel), fill.mostly_minus_infinity, exact=True)


@pytest.mark.ops("max_pool2d_fwd")
def test_max_pooling_without_indices(kernel: str) -> None:
    harness.check_all(kernel, harness.checked(kernel), omit=("indices",))
    harness.check_all(kernel, harness.checked(kernel), fill.with_specials, exact=True, omit=("indices",))


@pytest.mark.ops("conv2d_fwd", "conv2d_dgrad")
def test_a_nan_reaches_what_reads_it_and_nothing_else(kernel: str) -> None:
    if "winograd" in kernel:
        pytest.skip("its tiles share their inputs: see test_winograd.py")
    harness.check_all(kernel, harness.checked(kernel)[::4], fill.with_one_nan)
