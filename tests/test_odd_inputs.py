"""Odd input that torch accepts, and everything that steers a call elsewhere: autocast, overrides, fake tensors, fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastconv
import fastconv.functional as ours
from fastconv.ops import _conv2d_kernels

Call = Callable[[ModuleType], Any]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, W, B = _random(2, 4, 8, 8), _random(6, 4, 3, 3), _random(6)
WT = _random(4, 6, 3, 3)
X1, W1 = _random(2, 4, 8), _random(6, 4, 3)
L, LW = _random(2, 3, 4), _random(5, 4)
CL = X.contiguous(memory_format=torch.channels_last)
META = torch.device("meta")


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    fastconv.set_fallback("silent")
    yield
    fastconv.set_fallback("warn")


# ---- Odd, but right -------------------------------------------------------------------------------------------------------

RESULTS: list[tuple[str, Call]] = [
    ("conv2d unbatched", lambda F: F.conv2d(X[0], W, B)),
    ("conv2d empty batch", lambda F: F.conv2d(X[:0], W, B)),
    ("conv2d zero in-channels", lambda F: F.conv2d(X[:, :0], W[:, :0])),
    ("conv2d 1-tuples", lambda F: F.conv2d(X, W, stride=(2,), padding=[1], dilation=(1,))),
    ("conv2d lists", lambda F: F.conv2d(X, W, stride=[2, 1], padding=[1, 0])),
    ("conv2d numpy ints", lambda F: F.conv2d(X, W, stride=np.int64(2), padding=(np.int32(1), 0))),
    ("conv2d tensor int", lambda F: F.conv2d(X, W, stride=torch.tensor(2))),
    ("conv2d torch.Size", lambda F: F.conv2d(X, W, stride=torch.Size([2, 2]))),
    ("conv2d huge stride", lambda F: F.conv2d(X, W, stride=2**31)),
    ("conv2d same", lambda F: F.conv2d(X, W, B, padding="same")),
    ("conv2d same, even kernel", lambda F: F.conv2d(X, _random(6, 4, 2, 4), padding="same")),
    ("conv2d same, even, dilated", lambda F: F.conv2d(X, _random(6, 4, 2, 4), padding="same", dilation=(3, 2))),
    ("conv2d same, unbatched", lambda F: F.conv2d(X[0], W, padding="same")),
    ("conv2d valid and stride", lambda F: F.conv2d(X, W, stride=2, padding="valid")),
    ("conv2d transposed input", lambda F: F.conv2d(X.transpose(2, 3), W)),
    ("conv2d expanded input", lambda F: F.conv2d(X[:1].expand(3, 4, 8, 8), W)),
    ("conv2d sliced input", lambda F: F.conv2d(X[:, :, ::2, 1::2], W)),
    ("conv2d flipped weight strides", lambda F: F.conv2d(X, W.transpose(2, 3))),
    ("conv2d negative bit", lambda F: F.conv2d(torch.complex(X, X).conj().imag, W)),
    ("conv2d channels_last", lambda F: F.conv2d(CL, W)),
    ("conv2d channels_last weight", lambda F: F.conv2d(X, W.contiguous(memory_format=torch.channels_last))),
    ("conv2d depthwise channels_last", lambda F: F.conv2d(CL, _random(4, 1, 3, 3), groups=4)),
    ("conv2d one channel", lambda F: F.conv2d(X[:, :1].contiguous(), W[:3, :1])),
    ("conv2d one channel cl", lambda F: F.conv2d(X[:, :1].contiguous(memory_format=torch.channels_last), W[:3, :1])),
    ("conv2d pixel", lambda F: F.conv2d(X[:, :, :1, :1].contiguous(), W[:3, :, :1, :1])),
    ("conv2d pixel cl", lambda F: F.conv2d(CL[:, :, :1, :1].contiguous(memory_format=torch.channels_last), W[:3, :, :1, :1])),
    ("conv2d meta", lambda F: F.conv2d(X.to(META), W.to(META), B.to(META))),
    ("conv2d int64", lambda F: F.conv2d(X.long(), W.long())),
    ("conv2d half", lambda F: F.conv2d(X.half(), W.half(), B.half())),
    ("conv2d complex", lambda F: F.conv2d(X.to(torch.complex64), W.to(torch.complex64))),
    ("conv1d unbatched", lambda F: F.conv1d(X1[0], W1, B)),
    ("conv1d same", lambda F: F.conv1d(X1[0], W1, padding="same")),
    ("conv1d transposed", lambda F: F.conv1d(X1.transpose(1, 2).contiguous().transpose(1, 2), W1)),
    ("conv1d transposed weight", lambda F: F.conv1d(X1, W1.transpose(1, 2).contiguous().transpose(1, 2))),
    ("conv3d", lambda F: F.conv3d(_random(1, 2, 5, 5, 5), _random(3, 2, 3, 3, 3), padding=1)),
    ("transpose", lambda F: F.conv_transpose2d(X, WT, B)),
    ("transpose unbatched", lambda F: F.conv_transpose2d(X[0], WT)),
    ("transpose empty batch", lambda F: F.conv_transpose2d(X[:0], WT)),
    ("transpose to nothing", lambda F: F.conv_transpose2d(X, WT, padding=5)),
    ("transpose stride", lambda F: F.conv_transpose2d(X, WT, stride=(2, 3), padding=1, output_padding=(1, 2))),
    ("transpose FCN", lambda F: F.conv_transpose2d(X, _random(4, 1, 16, 16), stride=8, padding=4, groups=4)),
    ("transpose padded beyond stride", lambda F: F.conv_transpose2d(X, WT, dilation=2, output_padding=1)),
    ("transpose groups", lambda F: F.conv_transpose2d(X, WT, groups=2)),
    ("transpose channels_last", lambda F: F.conv_transpose2d(CL, WT)),
    ("transpose1d", lambda F: F.conv_transpose1d(X1, WT[..., 0], stride=2, output_padding=1)),
    ("transpose1d transposed", lambda F: F.conv_transpose1d(X1.transpose(1, 2).contiguous().transpose(1, 2), WT[..., 0])),
    ("linear vector", lambda F: F.linear(L[0, 0], LW)),
    ("linear vector weight", lambda F: F.linear(L, LW[0])),
    ("linear one bias", lambda F: F.linear(L, LW, B[:1])),
    ("linear scalar bias", lambda F: F.linear(L, LW, B[0])),
    ("linear matrix bias", lambda F: F.linear(L, LW, _random(3, 5))),
    ("linear no rows", lambda F: F.linear(L[:, :0], LW)),
    ("linear no features", lambda F: F.linear(L[..., :0], LW[:, :0], B[:5])),
    ("linear no outputs", lambda F: F.linear(L, LW[:0])),
    ("linear transposed", lambda F: F.linear(_random(4, 3).t(), LW)),
    ("linear expanded", lambda F: F.linear(L[:, :1].expand(2, 7, 4), LW)),
    ("linear int64", lambda F: F.linear(L.long(), LW.long())),
    ("max empty batch", lambda F: F.max_pool2d(X[:0], 2, return_indices=True)),
    ("max no stride", lambda F: F.max_pool2d(X, 2, ())),
    ("max unbatched", lambda F: F.max_pool2d(X[0], 3, 1, 1, return_indices=True)),
    ("max int64", lambda F: F.max_pool2d(X.long(), 2, return_indices=True)),
    ("max channels_last", lambda F: F.max_pool2d(CL, 3, 2, 1, return_indices=True)),
    ("max transposed", lambda F: F.max_pool2d(X.transpose(2, 3), 3, 2, 1, return_indices=True)),
    ("max one channel cl", lambda F: F.max_pool2d(X[:, :1].contiguous(memory_format=torch.channels_last), 2)),
    ("max to one pixel cl", lambda F: F.max_pool2d(CL, 8, return_indices=True)),
    ("max kernel beyond input, ceil", lambda F: F.max_pool2d(X[:, :, :2, :2], 3, 2, ceil_mode=True, return_indices=True)),
    ("max half", lambda F: F.max_pool2d(X.half(), 2)),
    ("max1d transposed", lambda F: F.max_pool1d(X1.transpose(1, 2).contiguous().transpose(1, 2), 3)),
    ("max1d transposed, both", lambda F: F.max_pool1d(X1.transpose(1, 2).contiguous().transpose(1, 2), 3, return_indices=True)),
    ("max1d with gradient", lambda F: F.max_pool1d(X1.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), 3)),
    ("avg ones, include", lambda F: F.avg_pool2d(torch.ones(1, 1, 3, 3), 3, 1, 1)),
    ("avg ones, exclude", lambda F: F.avg_pool2d(torch.ones(1, 1, 3, 3), 3, 1, 1, count_include_pad=False)),
    ("avg ones, ceil", lambda F: F.avg_pool2d(torch.ones(1, 1, 4, 4), 2, 3, 1, ceil_mode=True)),
    ("avg negative divisor", lambda F: F.avg_pool2d(X, 2, divisor_override=-3)),
    ("avg int64", lambda F: F.avg_pool2d(X.long(), 2)),
    ("avg channels_last", lambda F: F.avg_pool2d(CL, 2)),
    ("avg1d unbatched", lambda F: F.avg_pool1d(X1[0], 3, 2, 1, True, False)),
    ("avg1d transposed", lambda F: F.avg_pool1d(X1.transpose(1, 2).contiguous().transpose(1, 2), 2)),
    ("adaptive avg None", lambda F: F.adaptive_avg_pool2d(X, (None, 2))),
    ("adaptive avg 0", lambda F: F.adaptive_avg_pool2d(X, 0)),
    ("adaptive avg larger", lambda F: F.adaptive_avg_pool2d(X, (11, 3))),
    ("adaptive avg 1 of 2-D", lambda F: F.adaptive_avg_pool2d(X[0, 0], 1)),
    ("adaptive avg 1 of 5-D", lambda F: F.adaptive_avg_pool2d(X[None], 1)),
    ("adaptive avg 1 of nothing", lambda F: F.adaptive_avg_pool2d(X[:, :, :0], 1)),
    ("adaptive avg 1 cl", lambda F: F.adaptive_avg_pool2d(CL, 1)),
    ("adaptive avg cl", lambda F: F.adaptive_avg_pool2d(CL, 3)),
    ("adaptive avg no channels", lambda F: F.adaptive_avg_pool2d(X[:, :0], 2)),
    ("adaptive avg empty batch", lambda F: F.adaptive_avg_pool2d(X[:0], 2)),
    ("adaptive avg1d transposed", lambda F: F.adaptive_avg_pool1d(X1.transpose(1, 2).contiguous().transpose(1, 2), 3)),
    ("adaptive avg1d 1 transposed", lambda F: F.adaptive_avg_pool1d(X1.transpose(1, 2).contiguous().transpose(1, 2), 1)),
    ("adaptive max None", lambda F: F.adaptive_max_pool2d(X, (None, 2))),
    ("adaptive max 0", lambda F: F.adaptive_max_pool2d(X, 0, True)),
    ("adaptive max cl", lambda F: F.adaptive_max_pool2d(CL, 3, True)),
    ("adaptive max larger", lambda F: F.adaptive_max_pool2d(X, (11, 3), True)),
    ("adaptive max1d", lambda F: F.adaptive_max_pool1d(X1, 3, True)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("call", [row[1] for row in RESULTS], ids=[row[0] for row in RESULTS])
def test_result(call: Call) -> None:
    torch.testing.assert_close(call(ours), call(theirs), equal_nan=True, check_stride=True)


def test_empty_batch_backward() -> None:
    w, b = W.clone().requires_grad_(), B.clone().requires_grad_()
    x = X[:0].clone().requires_grad_()
    ours.conv2d(x, w, b).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert w.grad is not None
    assert torch.equal(w.grad, torch.zeros_like(w))
    assert b.grad is not None
    assert torch.equal(b.grad, torch.zeros_like(b))


# ---- Autocast, overrides, counting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torch_s_dtypes(dtype: torch.dtype, target: torch.dtype) -> None:
    x, w, wt, x1, lw = (t.to(dtype) for t in (X, W, WT, X1, LW))
    calls: list[Call] = [
        lambda F: F.conv2d(x, w),
        lambda F: F.conv1d(x1, w[..., 0]),
        lambda F: F.conv_transpose2d(x, wt),
        lambda F: F.linear(x[..., :4], lw),
        lambda F: F.max_pool2d(x, 2),
        lambda F: F.avg_pool2d(x, 2),
        lambda F: F.adaptive_avg_pool2d(x, 2),
        lambda F: F.adaptive_max_pool2d(x, 2),
        lambda F: F.max_pool1d(x1, 2),
    ]
    with torch.autocast("cpu", dtype=target):
        for call in calls:
            torch.testing.assert_close(call(ours), call(theirs), check_stride=True)


def test_autocast_says_so_and_leaves_float64_to_us() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = fastconv.fallback_counts()
        ours.conv2d(X.double(), W.double())
        ours.max_pool2d(X, 2)
        assert fastconv.fallback_counts() == before
        ours.conv2d(X, W)
        key = ("conv2d", "autocast to bfloat16")
        assert fastconv.fallback_counts()[key] == before.get(key, 0) + 1


class Duck:
    """Knows torch's functions, and calls them by their names."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> str:
        return str(func.__name__)


class OnlyTorch:
    """Handles torch's own conv2d, and nothing else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "handled" if func is theirs.conv2d else NotImplemented


class Tagged(Tensor):
    """A subclass as users write them: no override, and results should stay of the class."""


def test_torch_function() -> None:
    assert ours.conv2d(Duck(), W) == "conv2d"
    assert ours.conv2d(X, Duck()) == "conv2d"
    assert ours.conv_transpose2d(Duck(), W) == "conv_transpose2d"
    assert ours.linear(Duck(), W) == "linear"
    assert ours.max_pool2d(Duck(), 2) == "max_pool2d"
    assert ours.max_pool2d(Duck(), 2, return_indices=True) == "max_pool2d_with_indices"
    assert ours.max_pool1d(Duck(), 2) == "max_pool1d"
    assert ours.avg_pool2d(Duck(), 2) == "avg_pool2d"
    assert ours.adaptive_avg_pool2d(Duck(), 2) == "adaptive_avg_pool2d"
    assert ours.adaptive_max_pool2d(Duck(), 2) == "adaptive_max_pool2d"
    assert ours.conv3d(Duck(), W) == "conv3d"
    assert ours.conv2d(OnlyTorch(), W) == "handled"


def test_subclasses_are_kept_and_run_on_our_kernels() -> None:
    before = fastconv.fallback_counts()
    x = X.as_subclass(Tagged)
    for call in (lambda t: ours.conv2d(t, W), lambda t: ours.max_pool2d(t, 2), lambda t: ours.linear(t, _random(5, 8))):
        found = call(x)
        assert type(found) is Tagged
        torch.testing.assert_close(found.as_subclass(Tensor), call(X))
    assert fastconv.fallback_counts() == before


def test_function_modes_see_the_call() -> None:
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        ours.conv2d(X, W)
        ours.max_pool2d(X, 2)
    assert ours.conv2d in seen
    assert ours.max_pool2d in seen
    with torch.device("cpu"):
        torch.testing.assert_close(ours.conv2d(X, W), theirs.conv2d(X, W))


@pytest.mark.parametrize("x", [X, CL], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: ours.conv2d(x, w, padding=1),
        lambda x, w: ours.conv1d(x[:, :, 0], w[..., 0]),
        lambda x, w: ours.conv_transpose2d(x, w[:4]),
        lambda x, w: ours.linear(x, w[0, :, 0].new_ones(3, 8)),
        lambda x, w: ours.max_pool2d(x, 3, 2, 1),
        lambda x, w: ours.avg_pool2d(x, 2),
        lambda x, w: ours.adaptive_avg_pool2d(x, 2),
        lambda x, w: ours.adaptive_max_pool2d(x, 2),
    ],
    ids=["conv2d", "conv1d", "conv_transpose2d", "linear", "max", "avg", "adaptive_avg", "adaptive_max"],
)
def test_fake_and_meta_tensors(call: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> None:
    expected = call(x, W)
    with FakeTensorMode() as mode:
        fake = call(mode.from_tensor(x), mode.from_tensor(W))
    meta = call(x.to(META), W.to(META))
    for found in (fake, meta):
        assert found.shape == expected.shape
        assert found.stride() == expected.stride()


def test_fallback_modes() -> None:
    fastconv.set_fallback("error")
    with pytest.raises(NotImplementedError, match="conv2d has no kernel of fastconv's: dtype float16"):
        ours.conv2d(X.half(), W.half())
    ours.conv2d(X, W)
    fastconv.set_fallback("silent")
    ours.conv2d(X.half(), W.half())


@pytest.mark.parametrize(("C", "groups", "size"), [(32, 1, 1), (32, 1, 3), (24, 24, 3), (32, 32, 1), (16, 2, 3)])
def test_slices_of_channels_are_read_where_they_lie(C: int, groups: int, size: int) -> None:
    whole = torch.full((2, 48, 9, 10), float("nan")).contiguous(memory_format=torch.channels_last)
    x = whole[:, 8 : 8 + C]
    x.copy_(_random(2, C, 9, 10))
    w, padding = _random(C, C // groups, size, size), size // 2
    recipe = _conv2d_kernels.find_fwd(x, w, None, None, (1, 1), (padding,) * 4, (1, 1), groups, "none")
    assert recipe.copy_a is None
    dense = x.contiguous(memory_format=torch.channels_last)
    found, expected = (ours.conv2d(t, w, padding=padding, groups=groups) for t in (x, dense))
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
