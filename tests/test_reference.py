"""The reference itself: against loops over single numbers, its own definitions, and cases worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from fastconv import reference
from fastconv.testing import fill
from fastconv.testing.problems import Case, ConvCase, PoolCase, parse

CONVS = [
    "n2c3h5w6k4r3s3u1p1d1g1-nchw",
    "n1c2h6w5k3r3s2u2x1p1x0x2x1d1g1-nchw",
    "n2c4h7w8k6r2s3u2x3p2x1x0x3d2x1g2-nchw",
    "n1c6h5w5k6r3s3u1p1d1g6-nchw",
    "n1c3h4w5k6r3s3u2p1d1g3-nchw",
    "n1c2h7w6k3r3s3u1p-1x-2x1x-1d1g1-nchw",
    "n1c2h3w3k2r3s3u2p5x4x3x6d2g1-nchw",
    "n1c2h2w3k2r5s7u1p3d1g1-nchw",
    "n1c2h8w8k2r1s1u3p0d1g1-nchw",
    "n1c1h4w4k1r2s2u1p-3x3x0x0d1g1-nchw",
]
POOLS = [
    "n2c2h6w7r3s3u2p1d1-nchw",
    "n1c2h8w9r3s2u2x3p1x0x0x1d1-nchw+ceil",
    "n2c2h5w7a3x4-nchw",
    "n1c2h3w2a5x7-nchw",
]
MAX_POOLS = [*POOLS, "n1c1h7w7r3s3u1p0d2-nchw"]
AVG_POOLS = [*POOLS, "n1c2h9w8r2s2u3p1d1-nchw+ceil+exclude_pad", "n1c2h9w8r3s3u2p1d1-nchw+div5"]


def scalar_conv(x: Any, w: Any, case: ConvCase) -> np.ndarray:
    y = np.zeros(case.y_shape)
    per_k, per_c = case.K // case.groups, case.C // case.groups
    for n, k, p, q in itertools.product(*map(range, y.shape)):
        for c, r, s in itertools.product(range(per_c), range(case.R), range(case.S)):
            h = p * case.stride[0] - case.pad4[0] + r * case.dilation[0]
            v = q * case.stride[1] - case.pad4[2] + s * case.dilation[1]
            if 0 <= h < case.H and 0 <= v < case.W:
                y[n, k, p, q] += x[n, k // per_k * per_c + c, h, v] * w[k, c, r, s]
    return y


def windows(case: PoolCase, p: int, q: int) -> tuple[list[int], list[int]]:
    if case.adaptive is not None:
        spans = [
            range(math.floor(i * size / out), math.ceil((i + 1) * size / out))
            for i, size, out in ((p, case.H, case.P), (q, case.W, case.Q))
        ]
        return list(spans[0]), list(spans[1])
    tops = [p * case.stride[0] - case.pad4[0] + r * case.dilation[0] for r in range(case.R)]
    lefts = [q * case.stride[1] - case.pad4[2] + s * case.dilation[1] for s in range(case.S)]
    return [h for h in tops if 0 <= h < case.H], [w for w in lefts if 0 <= w < case.W]


def scalar_max(x: Any, case: PoolCase) -> tuple[np.ndarray, np.ndarray]:
    y, indices = np.zeros(case.y_shape), np.zeros(case.y_shape, np.int64)
    for n, c, p, q in itertools.product(*map(range, y.shape)):
        rows, cols = windows(case, p, q)
        best, at = -math.inf, rows[0] * case.W + cols[0]
        for h, w in itertools.product(rows, cols):
            if x[n, c, h, w] > best or math.isnan(x[n, c, h, w]):
                best, at = x[n, c, h, w], h * case.W + w
        y[n, c, p, q], indices[n, c, p, q] = best, at
    return y, indices


def scalar_average(x: Any, case: PoolCase) -> np.ndarray:
    y = np.zeros(case.y_shape)
    for n, c, p, q in itertools.product(*map(range, y.shape)):
        rows, cols = windows(case, p, q)
        divisor = len(rows) * len(cols)
        if case.adaptive is None and case.include_pad:
            ends = []
            for i, size, kernel, step, before, after in (
                (p, case.H, case.R, case.stride[0], *case.pad4[:2]),
                (q, case.W, case.S, case.stride[1], *case.pad4[2:]),
            ):
                ends.append(sum(-before <= i * step - before + r < size + after for r in range(kernel)))
            divisor = ends[0] * ends[1]
        y[n, c, p, q] = sum(x[n, c, h, w] for h in rows for w in cols) / (case.divisor or divisor)
    return y


def conv_options(case: ConvCase) -> dict[str, Any]:
    return {"stride": case.stride, "pad4": case.pad4, "dilation": case.dilation, "groups": case.groups}


def average(x: Any, case: PoolCase) -> np.ndarray:
    if case.adaptive:
        return reference.adaptive_avg_pool2d(x, case.adaptive)
    return reference.avg_pool2d(x, (case.R, case.S), **average_options(case))


def average_options(case: PoolCase) -> dict[str, Any]:
    return {
        "stride": case.stride,
        "pad4": case.pad4,
        "ceil_mode": case.ceil,
        "count_include_pad": case.include_pad,
        "divisor_override": case.divisor or None,
    }


def maximum(x: Any, case: PoolCase) -> tuple[np.ndarray, np.ndarray]:
    if case.adaptive:
        return reference.adaptive_max_pool2d(x, case.adaptive)
    options = {"stride": case.stride, "pad4": case.pad4, "dilation": case.dilation, "ceil_mode": case.ceil}
    return reference.max_pool2d(x, (case.R, case.S), **options)


@pytest.fixture(params=CONVS)
def conv(request: pytest.FixtureRequest) -> Case:
    return parse(request.param)


def test_conv2d(conv: ConvCase) -> None:
    x, w = fill.normal("x", conv.x_shape), fill.normal("w", conv.w_shape)
    np.testing.assert_allclose(
        reference.conv2d(x, w, **conv_options(conv)), scalar_conv(x, w, conv), rtol=0, atol=1e-12
    )


def test_gradients_are_the_adjoints(conv: ConvCase) -> None:
    """conv2d is linear in x and in w, so <dy, conv(e)> over the unit vectors e is the gradient, element by element."""
    x, w = fill.normal("x", conv.x_shape), fill.normal("w", conv.w_shape)
    dy = fill.normal("dy", conv.y_shape)
    dx = reference.conv2d_dgrad(dy, w, conv.x_shape, **conv_options(conv))
    dw, db = reference.conv2d_wgrad(dy, x, conv.w_shape, **conv_options(conv))
    for flat in range(x.size):
        unit = np.zeros(x.size)
        unit[flat] = 1
        assert dx.flat[flat] == pytest.approx((dy * scalar_conv_at(unit.reshape(x.shape), w, conv)).sum(), abs=1e-12)
    for flat in range(0, w.size, max(1, w.size // 20)):
        unit = np.zeros(w.size)
        unit[flat] = 1
        assert dw.flat[flat] == pytest.approx((dy * scalar_conv(x, unit.reshape(w.shape), conv)).sum(), abs=1e-12)
    np.testing.assert_allclose(db, [dy[:, k].sum() for k in range(conv.K)], atol=1e-12)


def scalar_conv_at(x: np.ndarray, w: Any, case: ConvCase) -> np.ndarray:
    """scalar_conv for an x that is zero but for one element: only the terms that read it."""
    n, channel, h, v = (int(i[0]) for i in np.nonzero(x))
    y = np.zeros(case.y_shape)
    per_k, per_c = case.K // case.groups, case.C // case.groups
    group, c = divmod(channel, per_c)
    for p, q, r, s in itertools.product(range(case.P), range(case.Q), range(case.R), range(case.S)):
        row = p * case.stride[0] - case.pad4[0] + r * case.dilation[0]
        col = q * case.stride[1] - case.pad4[2] + s * case.dilation[1]
        if (row, col) == (h, v):
            for k in range(group * per_k, (group + 1) * per_k):
                y[n, k, p, q] += w[k, c, r, s]
    return y


def test_a_box_by_hand() -> None:
    """3x3 box over 1..9, one ring of padding: neighbour sums that can be added up on paper."""
    x = np.arange(1.0, 10).reshape(1, 1, 3, 3)
    y = reference.conv2d(x, np.ones((1, 1, 3, 3)), pad4=(1, 1, 1, 1))
    np.testing.assert_array_equal(y[0, 0], [[12, 21, 16], [27, 45, 33], [24, 39, 28]])


def test_orientation_by_hand() -> None:
    """A filter is not turned: w[0, 0] meets the pixel above and to the left, also in a gradient."""
    x = np.arange(9.0).reshape(1, 1, 3, 3)
    w = np.array([[[[1.0, 0], [0, 10]]]])
    np.testing.assert_array_equal(reference.conv2d(x, w)[0, 0], [[40, 51], [73, 84]])
    dx = reference.conv2d_dgrad(np.array([[[[1.0, 2], [3, 4]]]]), w, (1, 1, 3, 3))
    np.testing.assert_array_equal(dx[0, 0], [[1, 2, 0], [3, 14, 20], [0, 30, 40]])


def test_groups_bias_and_residual_by_hand() -> None:
    x = np.array([2.0, 3]).reshape(1, 2, 1, 1)
    w = np.array([1.0, 10, 100, 1000]).reshape(4, 1, 1, 1)
    y = reference.conv2d(x, w, np.array([1.0, 2, 3, -4000]), np.full((1, 4, 1, 1), 0.5), groups=2, activation="relu")
    np.testing.assert_array_equal(y.ravel(), [3.5, 22.5, 303.5, 0])


def test_magnitude_bounds_the_result() -> None:
    case = parse(CONVS[2])
    x, w, b = fill.normal("x", case.x_shape), fill.normal("w", case.w_shape), fill.normal("b", (case.K,))
    options = conv_options(case)
    assert (np.abs(reference.conv2d(x, w, b, **options)) <= reference.conv2d_magnitude(x, w, b, **options)).all()
    np.testing.assert_allclose(
        reference.conv2d_magnitude(x, -w, b, **options), scalar_conv(abs(x), abs(w), case) + abs(b)[:, None, None]
    )


@pytest.mark.parametrize(
    "values", [fill.normal, fill.integers_with_zeros, fill.with_specials, fill.mostly_minus_infinity]
)
@pytest.mark.parametrize("pool", MAX_POOLS)
def test_max_pool2d(pool: str, values: fill.Fill) -> None:
    case = parse(pool)
    x = values("x", case.x_shape)
    for got, expected in zip(maximum(x, case), scalar_max(x, case), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("pool", MAX_POOLS)
def test_max_pool2d_bwd(pool: str) -> None:
    case = parse(pool)
    _, indices = maximum(fill.normal("x", case.x_shape), case)
    dy = fill.normal("dy", case.y_shape)
    expected = np.zeros(case.x_shape)
    for n, c, p, q in itertools.product(*map(range, case.y_shape)):
        expected[n, c, indices[n, c, p, q] // case.W, indices[n, c, p, q] % case.W] += dy[n, c, p, q]
    np.testing.assert_allclose(reference.max_pool2d_bwd(dy, indices, case.x_shape), expected, atol=1e-13)


@pytest.mark.parametrize("pool", AVG_POOLS)
def test_avg_pool2d(pool: str) -> None:
    case = parse(pool)
    x, dy = fill.normal("x", case.x_shape), fill.normal("dy", case.y_shape)
    np.testing.assert_allclose(average(x, case), scalar_average(x, case), atol=1e-13)
    if case.adaptive:
        dx = reference.adaptive_avg_pool2d_bwd(dy, case.x_shape)
    else:
        dx = reference.avg_pool2d_bwd(dy, case.x_shape, (case.R, case.S), **average_options(case))
    for flat in range(x.size):
        unit = np.zeros(x.size)
        unit[flat] = 1
        assert dx.flat[flat] == pytest.approx((dy * average(unit.reshape(x.shape), case)).sum(), abs=1e-13)


def test_average_divisors_by_hand() -> None:
    ones = np.ones((1, 1, 3, 3))
    y = reference.avg_pool2d(ones, (3, 3), stride=(1, 1), pad4=(1, 1, 1, 1))
    np.testing.assert_allclose(y[0, 0], np.array([[4, 6, 4], [6, 9, 6], [4, 6, 4]]) / 9)
    y = reference.avg_pool2d(ones, (3, 3), stride=(1, 1), pad4=(1, 1, 1, 1), count_include_pad=False)
    np.testing.assert_array_equal(y, np.ones((1, 1, 3, 3)))
    y = reference.avg_pool2d(ones, (3, 3), divisor_override=-3)
    np.testing.assert_array_equal(y, [[[[-3.0]]]])
    y = reference.avg_pool2d(np.ones((1, 1, 4, 4)), (2, 2), stride=(3, 3), pad4=(1, 1, 1, 1), ceil_mode=True)
    np.testing.assert_array_equal(y[0, 0], [[0.25, 0.5], [0.5, 1.0]])


def test_ceil_mode_by_hand() -> None:
    assert reference.pool_output_size(6, 3, 2, 0, 0) == 2
    assert reference.pool_output_size(6, 3, 2, 0, 0, ceil_mode=True) == 3
    # The third window would start at 5 + 1, in the padding behind: dropped.
    assert reference.pool_output_size(5, 2, 3, 1, 1, ceil_mode=True) == 2
    assert reference.pool_output_size(9, 3, 2, 1, 1, dilation=2, ceil_mode=True) == 4


def test_nan_ties_and_infinities_by_hand() -> None:
    nan, inf = math.nan, math.inf
    x = np.array([[nan, 1.0, nan, 0], [5, 5, -inf, -inf], [5, 0, -inf, -inf]]).reshape(1, 1, 3, 4)
    y, indices = reference.max_pool2d(x, (1, 4))
    np.testing.assert_array_equal(y.ravel(), [nan, 5, 5])
    np.testing.assert_array_equal(indices.ravel(), [2, 4, 8])
    y, indices = reference.max_pool2d(x[:, :, 1:, 2:], (2, 2), stride=(1, 1), pad4=(1, 0, 1, 0))
    np.testing.assert_array_equal(y.ravel(), [-inf] * 4)
    np.testing.assert_array_equal(indices.ravel(), [0, 0, 0, 0])


def test_adaptive_windows_by_hand() -> None:
    x = np.arange(5.0).reshape(1, 1, 1, 5)
    np.testing.assert_array_equal(reference.adaptive_avg_pool2d(x, (1, 3)).ravel(), [0.5, 2, 3.5])
    np.testing.assert_array_equal(reference.adaptive_max_pool2d(x, (1, 2))[1].ravel(), [2, 4])
    np.testing.assert_array_equal(reference.adaptive_avg_pool2d(x[..., :2], (1, 3)).ravel(), [0, 0.5, 1])


def test_linear_by_hand() -> None:
    y = reference.linear(np.array([[1.0, 2], [3, 4]]), np.array([[1.0, 1], [0, 1], [2, 0]]), np.array([0.0, 10, 0]))
    np.testing.assert_array_equal(y, [[3, 12, 2], [7, 14, 6]])


def test_activations_by_hand() -> None:
    z = np.array([-4.0, -1, 0, 1, 4, 7])
    expected = {
        "none": z,
        "relu": [0, 0, 0, 1, 4, 7],
        "relu6": [0, 0, 0, 1, 4, 6],
        "hardswish": [0, -1 / 3, 0, 2 / 3, 4, 7],
        "sigmoid": [1 / (1 + math.exp(-v)) for v in z],
        "silu": [v / (1 + math.exp(-v)) for v in z],
        "gelu": [0.5 * v * math.erfc(-v / math.sqrt(2)) for v in z],
        "gelu_tanh": [v / (1 + math.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v))) for v in z],
    }
    assert expected.keys() == reference.ACTIVATIONS.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(reference.activation(z, name), values, rtol=1e-14, atol=1e-16, err_msg=name)
    np.testing.assert_array_equal(reference.activation(np.array([-1e4, 1e4]), "sigmoid"), [0, 1])
