"""fastconv.numpy against the NumPy reference; torch appears only as a maker of DLPack capsules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastconv
import fastconv.numpy as fn
from fastconv import reference
from fastconv.testing import tolerance

Array = Any


def make(shape: tuple[int, ...], dtype: Any = np.float64, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def plain(a: Array) -> Array:
    return np.ascontiguousarray(a)


def nhwc(a: Array) -> Array:
    return np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def reversed_(a: Array) -> Array:
    return np.ascontiguousarray(a[:, ::-1, :, ::-1])[:, ::-1, :, ::-1]


def sliced(a: Array) -> Array:
    wide = np.full((*a.shape[:3], 3 * a.shape[3]), np.nan, a.dtype)
    wide[..., ::3] = a
    return wide[..., ::3]


def misaligned(a: Array) -> Array:
    raw = np.empty(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    assert not view.flags.aligned
    return view


def in_records(a: Array) -> Array:
    """Strides that are no whole number of elements."""
    records = np.empty(a.shape, np.dtype([("flag", np.uint8), ("value", a.dtype)]))
    records["value"] = a
    return records["value"]


LAYOUTS = [plain, nhwc, reversed_, sliced, misaligned, in_records]


def close(got: Array, expected: Array, magnitude: Array, dtype: Any) -> None:
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert np.all(np.abs(got - expected) <= tolerance.bound(magnitude, dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("w_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_conv2d_of_any_strides(x_layout: Callable[..., Array], w_layout: Callable[..., Array], dtype: Any) -> None:
    x, w, bias = make((2, 4, 9, 8), dtype), make((6, 2, 3, 2), dtype, 1), make((6,), dtype, 2)
    options = {"stride": (1, 2), "dilation": (2, 1), "groups": 2}
    got = fn.conv2d(x_layout(x), w_layout(w), bias, padding=(1, 0, 2, 1), **options)
    expected = reference.conv2d(x, w, bias, pad4=(1, 0, 2, 1), **options)
    close(got, expected, reference.conv2d_magnitude(x, w, bias, pad4=(1, 0, 2, 1), **options), dtype)


@pytest.mark.parametrize("layouts", list(itertools.product((plain, nhwc), repeat=2)))
def test_conv2d_memory_format(layouts: tuple[Callable[..., Array], ...]) -> None:
    y = fn.conv2d(layouts[0](make((2, 3, 6, 7))), layouts[1](make((4, 3, 3, 3))))
    if nhwc in layouts:
        assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    else:
        assert y.flags.c_contiguous


@pytest.mark.parametrize(
    "padding, pad4",
    [
        (1, (1, 1, 1, 1)),
        (np.int64(1), (1, 1, 1, 1)),
        ((2, 0), (2, 2, 0, 0)),
        ([0, 1, 2, 3], (0, 1, 2, 3)),
        ("valid", (0, 0, 0, 0)),
        ("same", (2, 2, 1, 2)),
    ],
)
def test_conv2d_paddings(padding: Any, pad4: tuple[int, int, int, int]) -> None:
    x, w = make((1, 2, 8, 9)), make((3, 2, 3, 4), seed=1)
    got = fn.conv2d(x, w, padding=padding, dilation=(2, 1))
    expected = reference.conv2d(x, w, pad4=pad4, dilation=(2, 1))
    close(got, expected, reference.conv2d_magnitude(x, w, pad4=pad4, dilation=(2, 1)), np.float64)
    if padding == "same":
        assert got.shape[2:] == x.shape[2:]


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("layout", [plain, nhwc])
def test_conv2d_epilogue(activation: str, layout: Callable[..., Array]) -> None:
    x, w, bias, residual = layout(make((2, 3, 5, 6))), make((4, 3, 3, 3)), make((4,)), make((2, 4, 3, 4))
    got = fn.conv2d(x, w, bias, residual=residual, activation=activation)
    np.testing.assert_allclose(
        got, reference.conv2d(x, w, bias, residual, activation=activation), rtol=1e-12, atol=1e-13
    )


def test_one_image_without_a_batch() -> None:
    x, w, residual = make((3, 6, 6)), make((4, 3, 3, 3)), make((4, 4, 4))
    np.testing.assert_array_equal(fn.conv2d(x, w, residual=residual), fn.conv2d(x[None], w, residual=residual[None])[0])
    np.testing.assert_array_equal(fn.max_pool2d(x, 2), fn.max_pool2d(x[None], 2)[0])
    np.testing.assert_array_equal(fn.avg_pool2d(x, 2), fn.avg_pool2d(x[None], 2)[0])


def test_threads_do_not_change_the_result() -> None:
    x, w = make((2, 8, 17, 19), np.float32), make((16, 8, 3, 3), np.float32)
    np.testing.assert_array_equal(fn.conv2d(x, w, threads=1), fn.conv2d(x, w, threads=3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"stride": (2, 1), "padding": (1, 0), "ceil_mode": True}, {"dilation": 2}])
def test_max_pool2d(layout: Callable[..., Array], options: dict[str, Any]) -> None:
    x = make((2, 3, 9, 8), np.float32)
    y, indices = fn.max_pool2d(layout(x), (3, 2), return_indices=True, **options)
    expected, expected_indices = torch_like_max_pool(x, (3, 2), **options)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(fn.max_pool2d(layout(x), (3, 2), **options), expected)
    if layout is nhwc:
        assert y.transpose(0, 2, 3, 1).flags.c_contiguous


def torch_like_max_pool(
    x: Array, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Any:
    torch = pytest.importorskip("torch")
    y, indices = torch.nn.functional.max_pool2d(
        torch.from_numpy(x), kernel, stride, padding, dilation, ceil_mode, return_indices=True
    )
    return y.numpy(), indices.numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 1), "padding": (1, 0), "ceil_mode": True},
        {"padding": 1, "count_include_pad": False},
        {"divisor_override": -3},
    ],
)
def test_avg_pool2d(layout: Callable[..., Array], options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    x = make((2, 3, 9, 8))
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(x), (3, 2), **options).numpy()
    np.testing.assert_allclose(fn.avg_pool2d(layout(x), (3, 2), **options), expected, rtol=1e-12, atol=1e-14)


def test_empty_batch() -> None:
    assert fn.conv2d(make((0, 3, 6, 6)), make((4, 3, 3, 3))).shape == (0, 4, 4, 4)
    assert fn.max_pool2d(make((0, 3, 6, 6)), 2).shape == (0, 3, 3, 3)


def test_anything_with_dlpack() -> None:
    torch = pytest.importorskip("torch")
    x, w = make((1, 3, 6, 6), np.float32), make((4, 3, 3, 3), np.float32)

    class Holder:
        def __init__(self, array: Array) -> None:
            self.array = array

        def __dlpack__(self, **kwargs: Any) -> Any:
            return self.array.__dlpack__(**kwargs)

        def __dlpack_device__(self) -> Any:
            return self.array.__dlpack_device__()

    expected = fn.conv2d(x, w)
    np.testing.assert_array_equal(fn.conv2d(Holder(x), Holder(w)), expected)
    np.testing.assert_array_equal(fn.conv2d(torch.from_numpy(x), torch.from_numpy(w)), expected)


def test_read_only_and_force_and_observe() -> None:
    x, w = make((1, 3, 6, 6), np.float32), make((4, 3, 3, 3), np.float32)
    x.flags.writeable = False
    with fastconv.use(conv2d_fwd="direct"), fastconv.observe() as records:
        fn.conv2d(x, w, threads=1)
    assert records[0].kernel.startswith("conv2d_fwd.direct.f32.")
    assert records[0].threads == 1


X, W = make((2, 4, 8, 8)), make((6, 4, 3, 3))
TYPE_ERRORS = {
    "list": lambda: fn.conv2d([[1.0]], W),
    "None": lambda: fn.conv2d(X, None),
    "half": lambda: fn.conv2d(X.astype(np.float16), W.astype(np.float16)),
    "integers": lambda: fn.conv2d(X.astype(np.int64), W.astype(np.int64)),
    "big endian": lambda: fn.conv2d(X.astype(">f8"), W),
    "two dtypes": lambda: fn.conv2d(X, W.astype(np.float32)),
    "bias dtype": lambda: fn.conv2d(X, W, np.zeros(6, np.float32)),
    "float stride": lambda: fn.conv2d(X, W, stride=1.0),
    "float padding": lambda: fn.conv2d(X, W, padding=(1.0, 1)),
    "float kernel": lambda: fn.max_pool2d(X, 2.0),
    "pool of a list": lambda: fn.avg_pool2d([1.0], 2),
}
VALUE_ERRORS = {
    "x of 2 dimensions": lambda: fn.conv2d(X[0, 0], W),
    "w of 3 dimensions": lambda: fn.conv2d(X, W[0]),
    "channels": lambda: fn.conv2d(X[:, :3], W),
    "groups": lambda: fn.conv2d(X, W, groups=2),
    "groups 0": lambda: fn.conv2d(X, W, groups=0),
    "no filters": lambda: fn.conv2d(X, W[:0]),
    "no channels": lambda: fn.conv2d(X[:, :0], W[:, :0]),
    "bias length": lambda: fn.conv2d(X, W, np.zeros(5)),
    "residual shape": lambda: fn.conv2d(X, W, residual=X),
    "stride 0": lambda: fn.conv2d(X, W, stride=0),
    "stride of 3": lambda: fn.conv2d(X, W, stride=(1, 1, 1)),
    "padding -1": lambda: fn.conv2d(X, W, padding=-1),
    "padding of 3": lambda: fn.conv2d(X, W, padding=(1, 1, 1)),
    "padding Same": lambda: fn.conv2d(X, W, padding="Same"),
    "same with stride": lambda: fn.conv2d(X, W, padding="same", stride=2),
    "kernel beyond x": lambda: fn.conv2d(X, W, dilation=4),
    "activation": lambda: fn.conv2d(X, W, activation="swish"),
    "threads": lambda: fn.conv2d(X, W, threads=0),
    "pool padding": lambda: fn.max_pool2d(X, 2, padding=2),
    "pool too large": lambda: fn.avg_pool2d(X, 9),
    "divisor": lambda: fn.avg_pool2d(X, 2, divisor_override=0),
    "pool of no rows": lambda: fn.max_pool2d(X[:, :, :0], 1),
}


@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_type_errors(name: str) -> None:
    with pytest.raises(TypeError, match=r"got .*expected"):
        TYPE_ERRORS[name]()


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_value_errors(name: str) -> None:
    with pytest.raises(ValueError, match="got"):
        VALUE_ERRORS[name]()
