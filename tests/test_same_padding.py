"""TensorFlow's "SAME" padding: of Conv2d, the pools and the NumPy front, against sums written out in NumPy float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import fastconv
from fastconv import models
from fastconv._padding import same

Array = NDArray[Any]
Pair = tuple[int, int]

# Image, window, stride, dilation: both parities against each other, windows smaller than the stride and larger than the image.
PROBLEMS = [
    ((8, 8), (3, 3), (2, 2), (1, 1)),
    ((9, 8), (3, 3), (2, 2), (1, 1)),
    ((9, 11), (5, 4), (2, 3), (1, 1)),
    ((7, 6), (2, 2), (1, 1), (1, 1)),
    ((10, 9), (1, 1), (2, 3), (1, 1)),
    ((13, 12), (3, 2), (2, 1), (2, 3)),
    ((3, 2), (7, 5), (4, 2), (1, 1)),
]


def windows(x: Array, kernel: Pair, stride: Pair, dilation: Pair = (1, 1)) -> Array:
    """x (N, C, H, W) as (N, C, P, Q, R, S) with NaN where a window looks beyond the image: TensorFlow's rule, tap by tap."""
    N, C, H, W = x.shape
    out = [-(-size // step) for size, step in zip((H, W), stride)]
    y = np.full((N, C, *out, *kernel), np.nan)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    before = [max((n - 1) * s + span - size, 0) // 2 for n, s, span, size in zip(out, stride, spans, (H, W))]
    for p, q, r, s in np.ndindex(*out, *kernel):
        h, w = (i * step - pad + tap * d for i, step, pad, tap, d in zip((p, q), stride, before, (r, s), dilation))
        if 0 <= h < H and 0 <= w < W:
            y[:, :, p, q, r, s] = x[:, :, h, w]
    return y


def convolved(x: Array, w: Array, stride: Pair, dilation: Pair, groups: int = 1) -> Array:
    taps = np.nan_to_num(windows(x, w.shape[2:], stride, dilation))
    parts = zip(np.split(taps, groups, axis=1), np.split(w.astype(np.float64), groups))
    return np.concatenate([np.einsum("ncpqrs,kcrs->nkpq", part, filters) for part, filters in parts], axis=1)


def whole_numbers(*shape: int) -> Array:
    """Small enough that float32 sums of them are exact."""
    return np.random.default_rng(0).integers(-4, 5, shape).astype(np.float32)


def test_sides_of_the_documented_examples() -> None:
    assert same((224, 225), (3, 3), (2, 2), (1, 1)) == (0, 1, 1, 1)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("image", "window", "stride", "dilation"), PROBLEMS)
def test_conv2d(place: Any, image: Pair, window: Pair, stride: Pair, dilation: Pair, last: bool) -> None:
    layer = fastconv.nn.Conv2d(6, 4, window, stride, "SAME", dilation, groups=2, bias=False)
    w, x = whole_numbers(4, 3, *window), whole_numbers(2, 6, *image)
    layer.weight.data = torch.from_numpy(w)
    given = torch.from_numpy(x)
    if last:
        given = given.contiguous(memory_format=torch.channels_last)
    place(layer)
    with fastconv.observe() as records:
        y = place.back(layer(place(given)))
    assert [record.op for record in records] == ["conv2d_fwd"]
    np.testing.assert_array_equal(y.numpy(), convolved(x, w, stride, dilation, groups=2))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("image", "window", "stride"), [p[:3] for p in PROBLEMS if p[3] == (1, 1)])
def test_pools(place: Any, image: Pair, window: Pair, stride: Pair, last: bool) -> None:
    x = whole_numbers(2, 3, *image)
    given = torch.from_numpy(x)
    if last:
        given = given.contiguous(memory_format=torch.channels_last)
    seen = windows(x, window, stride)
    before = fastconv.fallback_counts()
    there = place(given)
    y, indices = place.back(fastconv.nn.MaxPool2d(window, stride, "SAME", return_indices=True)(there))
    np.testing.assert_array_equal(y.numpy(), np.nanmax(seen, axis=(4, 5)))
    picked = given.flatten(2).gather(2, indices.flatten(2)).reshape(y.shape)
    assert torch.equal(picked, y)
    assert torch.equal(place.back(fastconv.nn.MaxPool2d(window, stride, "SAME")(there)), y)
    mean = place.back(fastconv.nn.AvgPool2d(window, stride, "SAME")(there))
    np.testing.assert_allclose(mean.numpy(), np.nanmean(seen, axis=(4, 5)), rtol=1e-6, atol=1e-6)
    fifths = place.back(fastconv.nn.AvgPool2d(window, stride, "SAME", divisor_override=5)(there))
    np.testing.assert_allclose(fifths.numpy(), np.nansum(seen, axis=(4, 5)) / 5, rtol=1e-6, atol=1e-6)
    assert fastconv.fallback_counts() == before


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: fastconv.nn.Conv2d(4, 6, 3, stride=2, padding="SAME"),
    lambda: fastconv.nn.MaxPool2d(3, 2, "SAME"),
    lambda: fastconv.nn.AvgPool2d(3, 2, "SAME"),
]


@pytest.mark.parametrize("make", LAYERS, ids=["conv", "max", "avg"])
def test_gradients(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = make().double()
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.filterwarnings("ignore::fastconv.FallbackWarning")
@pytest.mark.parametrize("make", LAYERS, ids=["conv", "max", "avg"])
def test_tensors_that_are_not_the_usual(make: Callable[[], nn.Module]) -> None:
    """One image, another dtype, and what the size becomes without memory: the same numbers by other ways."""
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(2, 4, 6, 7)
    y = layer(x)
    torch.testing.assert_close(layer(x[0]), y[0])
    half = copy.deepcopy(layer).to(torch.bfloat16)(x.to(torch.bfloat16))
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == y.shape
    torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], y)


def test_repr_and_pickle_keep_it() -> None:
    layer = copy.deepcopy(fastconv.nn.Conv2d(4, 6, 3, stride=2, padding="SAME"))
    assert repr(layer) == "Conv2d(4, 6, kernel_size=(3, 3), stride=(2, 2), padding=SAME)"
    assert layer(torch.zeros(1, 4, 8, 8)).shape == (1, 6, 4, 4)


def test_stride_1_is_torchs_same() -> None:
    ours, theirs = fastconv.nn.Conv2d(4, 6, 4, padding="SAME"), fastconv.nn.Conv2d(4, 6, 4, padding="same")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 4, 9, 8)
    assert torch.equal(ours(x), theirs(x))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="padding='SAME' pads with zeros, got padding_mode='reflect'"):
        fastconv.nn.Conv2d(4, 6, 3, padding="SAME", padding_mode="reflect")
    with pytest.raises(ValueError, match="takes no dilation, got dilation=2"):
        fastconv.nn.MaxPool2d(3, padding="SAME", dilation=2)(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="Invalid padding string"):
        fastconv.nn.Conv2d(4, 6, 3, padding="Same")
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3 channels"):
        fastconv.nn.Conv2d(4, 6, 3, stride=2, padding="SAME")(torch.zeros(1, 3, 8, 8))


def test_revert_leaves_what_torch_cannot_do() -> None:
    model = nn.Sequential(fastconv.nn.Conv2d(4, 6, 3, stride=2, padding="SAME"), fastconv.nn.Conv2d(6, 6, 3))
    report = fastconv.revert(model)
    assert report.count == 1
    assert "left Conv2d (0): torch has no padding='SAME'" in str(report)


# ---- NumPy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image", "window", "stride", "dilation"), PROBLEMS)
@pytest.mark.parametrize(("C", "K", "groups"), [(6, 4, 2), (1, 1, 1), (5, 5, 5)])
def test_numpy_takes_tensorflows_arrays(
    image: Pair, window: Pair, stride: Pair, dilation: Pair, C: int, K: int, groups: int
) -> None:
    x, w = whole_numbers(2, C, *image), whole_numbers(K, C // groups, *window)
    expected = convolved(x, w, stride, dilation, groups)
    options = {"stride": stride, "padding": "SAME", "dilation": dilation, "groups": groups}
    np.testing.assert_array_equal(fastconv.numpy.conv2d(x, w, **options), expected)
    nhwc = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    hwio = np.ascontiguousarray(w.transpose(2, 3, 1, 0))
    y = fastconv.numpy.conv2d(nhwc, hwio, **options, data_format="NHWC")
    np.testing.assert_array_equal(y, expected.transpose(0, 2, 3, 1))
    assert y.flags.c_contiguous
    one = fastconv.numpy.conv2d(
        nhwc[0], hwio, **options, data_format="NHWC", residual=y[1], bias=np.ones(K, np.float32)
    )
    np.testing.assert_array_equal(one, y[0] + y[1] + 1)


def test_numpy_refuses_other_formats() -> None:
    x, w = whole_numbers(1, 4, 4, 4), whole_numbers(4, 4, 1, 1)
    with pytest.raises(ValueError, match="data_format: got 'NCWH', expected 'NCHW' or 'NHWC'"):
        fastconv.numpy.conv2d(x, w, data_format="NCWH")
    with pytest.raises(ValueError, match="got 'Same', expected 'same', 'SAME', 'valid'"):
        fastconv.numpy.conv2d(x, w, padding="Same")


# ---- EfficientNet -------------------------------------------------------------------------------------------------------


class Padded(nn.Conv2d):
    """torch's convolution of an image that was padded beforehand."""

    def __init__(self, *args: Any, padding: Any = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sides = padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sides == "SAME":
            top, bottom, left, right = same(x.shape[2:], self.kernel_size, self.stride, self.dilation)
            return super().forward(nn.functional.pad(x, (left, right, top, bottom)))
        assert self.sides == 0
        return super().forward(x)


def test_efficientnet_with_tensorflows_padding() -> None:
    torch.manual_seed(0)
    layers = type("Layers", (), {**vars(nn), "Conv2d": Padded})
    theirs = models.create("efficientnet_b0", layers=layers, tensorflow=True).eval()
    ours = models.create("efficientnet_b0", tensorflow=True).eval()
    ours.load_state_dict(theirs.state_dict())
    assert {m.eps for m in ours.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert [m.padding for m in ours.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)] == ["SAME"] * 17
    x = torch.randn(1, 3, 65, 64)
    before = fastconv.fallback_counts()
    with torch.no_grad():
        y, expected = ours(x), theirs(x)
    assert fastconv.fallback_counts() == before
    assert float((y - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
