"""Convolutions that fuse runs one after the other on bands of rows, and those that it must not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastconv
from fastconv.fusion import cascade
from fastconv.fusion.cascade import FrozenCascade
from fastconv.fusion.frozen import FrozenConv2d

L2 = fastconv.build_info()["machine"]["l2_bytes"]
LAST = torch.channels_last


def rows_beyond_l2(channels: int, width: int, size: int = 4) -> int:
    """So many rows take a little more than the L2, and are odd."""
    return (L2 // (channels * width * size) + 5) | 1


class Block(nn.Module):
    """MobileNetV2's block, all of it or some: what expands, what is depthwise, what projects."""

    def __init__(
        self, parts: str = "edp", kernel: int = 3, stride: int = 1, dilation: int = 1, add: bool = False
    ) -> None:
        super().__init__()
        wide = 48
        layers: list[nn.Module] = []
        if "e" in parts:
            layers += [nn.Conv2d(16, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        if "d" in parts:
            channels = wide if "e" in parts else 16
            pad = dilation * (kernel // 2)
            layers += [nn.Conv2d(channels, channels, kernel, stride, pad, dilation, channels), nn.SiLU()]
        if "p" in parts:
            layers.append(nn.Conv2d(wide if "e" in parts else 16, 16, 1))
        self.layers = nn.Sequential(*layers)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y + x if self.add else y


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of a cascade, whether it went band by band."""
    calls: list[bool] = []
    find = FrozenCascade._find

    def spy(self: FrozenCascade, input: Tensor, residual: Tensor | None) -> object:
        found = find(self, input, residual)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(FrozenCascade, "_find", spy)
    return calls


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def one_by_one(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(FrozenCascade, "_find", lambda self, input, residual: None)
        y: Tensor = model(x)
    return y


def images(n: int, h: int, w: int, dtype: torch.dtype = torch.float32, channels: int = 16) -> Tensor:
    return torch.randn(n, channels, h, w, dtype=dtype).to(memory_format=LAST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "block",
    [
        Block(),
        Block(add=True),
        Block(stride=2),
        Block(kernel=5, dilation=2),
        Block(kernel=5, stride=2),
        Block("ed"),
        Block("dp", kernel=7),
    ],
    ids=["block", "residual", "stride", "dilation", "5x5", "expand", "project"],
)
@torch.inference_mode()
def test_bits_are_those_of_the_convolutions_one_by_one(
    block: Block, dtype: torch.dtype, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fastconv.fuse(block.eval().to(dtype))
    assert model.report.cascades == ["layers.0"], "by the model's name for it"
    width = 33
    x = images(2, rows_beyond_l2(16, width, x_size(dtype)), width, dtype)
    y = model(x)
    assert taken == [True]
    assert torch.equal(y, one_by_one(model, x, monkeypatch))
    torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-4)
    assert y.is_contiguous(memory_format=LAST)


def x_size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


@torch.inference_mode()
def test_rows_that_no_band_reads(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastconv.fuse(Block(stride=4).eval())
    x = images(1, rows_beyond_l2(16, 33), 33)
    assert torch.equal(model(x), one_by_one(model, x, monkeypatch))
    assert taken == [True]


@torch.inference_mode()
def test_threads_take_parts_of_an_image(two_threads: None, taken: list[bool]) -> None:
    model = fastconv.fuse(Block(add=True, kernel=5).eval())
    x = images(3, rows_beyond_l2(16, 40), 40)
    together = model(x)
    torch.set_num_threads(1)
    assert torch.equal(together, model(x))
    torch.set_num_threads(2)
    assert torch.equal(together[1:2], model(x[1:2]))
    assert all(taken)


@torch.inference_mode()
def test_a_slice_of_channels_is_read_where_it_lies(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastconv.fuse(Block("ed").eval())
    x = images(1, rows_beyond_l2(16, 40), 40, channels=24)[:, 4:20]
    assert torch.equal(model(x), one_by_one(model, x, monkeypatch))
    assert taken == [True]


@torch.inference_mode()
def test_what_is_left_to_the_convolutions_one_by_one(taken: list[bool]) -> None:
    block = Block(add=True).eval()
    model = fastconv.fuse(block)
    large = images(1, rows_beyond_l2(16, 40), 40)
    small = images(1, 9, 9)
    with fastconv.use(conv2d_fwd="avx2" if "avx2" in fastconv.build_info()["machine"]["isa"] else "scalar"):
        model(large)
    with fastconv.observe() as records:
        model(large)
    assert len(records) == 3, "an observer sees each convolution"
    for x in (small, small, large.contiguous(), large[:0]):
        torch.testing.assert_close(model(x), block(x), rtol=1e-4, atol=1e-4)
    assert taken == [False] * 6
    model(large)
    assert taken.pop()


def test_a_gradient_is_recorded(taken: list[bool]) -> None:
    # In float64: a number that another rounding takes over the edge of relu6 has another gradient.
    block = Block(add=True).eval().double()
    model = fastconv.fuse(block)
    x = images(1, rows_beyond_l2(16, 40, 8), 40, torch.float64).requires_grad_()
    (dx,) = torch.autograd.grad(model(x).sum(), x)
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    torch.testing.assert_close(dx, expected)
    assert not any(taken)


@torch.inference_mode()
def test_a_residual_that_is_declined_declines_no_other(taken: list[bool]) -> None:
    cascade_of = FrozenCascade(
        [FrozenConv2d(nn.Conv2d(16, 48, 1)), FrozenConv2d(nn.Conv2d(48, 48, 3, padding=1, groups=48))]
    )
    x = images(1, rows_beyond_l2(16, 40), 40)
    residual = torch.randn(1, 48, *x.shape[2:])
    expected = cascade_of(x, residual)
    assert torch.equal(cascade_of(x, residual.to(memory_format=LAST)), expected)
    assert taken == [False, True]


@torch.inference_mode()
def test_wrong_operands_get_the_convolutions_errors() -> None:
    model = fastconv.fuse(Block().eval())
    with pytest.raises(RuntimeError, match="channels"):
        model(images(1, rows_beyond_l2(15, 40), 40, channels=15))
    with pytest.raises(RuntimeError):
        model(images(1, rows_beyond_l2(16, 40), 40, torch.float64))


class InParts(Block):
    """Its layers one by one, because torch.fx does not follow a slice of a Sequential."""

    def expand(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = self.layers[i](x)
        return x

    def rest(self, wide: Tensor) -> Tensor:
        for i in range(3, 6):
            wide = self.layers[i](wide)
        return wide


class UsedTwice(InParts):
    def forward(self, x: Tensor) -> Tensor:
        wide = self.expand(x)
        return self.rest(wide).sum() + wide.sum()


class WrittenBetween(InParts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        wide = self.expand(x)
        x.mul_(2)
        return self.rest(wide) + x


# What may still be one: the two that come after.
FIRST = [(InParts, "layers.0"), (UsedTwice, "layers.3"), (WrittenBetween, "layers.3")]


@pytest.mark.parametrize(("kind", "first"), FIRST)
@torch.inference_mode()
def test_what_is_no_cascade(kind: type[Block], first: str) -> None:
    block = kind().eval()
    model = fastconv.fuse(block)
    assert not model.report.untraced
    assert model.report.cascades == [first]
    x = images(1, rows_beyond_l2(16, 40), 40)
    torch.testing.assert_close(model(x), block(x), rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_a_layer_in_two_cascades_is_packed_for_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(self.block(x))
            return y

    model = fastconv.fuse(Twice().eval())
    assert len(model.report.cascades) == 2
    x = images(1, rows_beyond_l2(16, 40), 40)
    torch.testing.assert_close(model(x), model.original(x), rtol=1e-4, atol=1e-4)


def test_a_band_is_half_of_the_l2_and_less_than_that_is_refused() -> None:
    w = (16, 16, 1, 1)
    plain = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    taps = ((1, 1), (1, 1, 1, 1), (1, 1), 16)
    layers = ((w, (16, 1, 1, 1), plain, False, "none"), ((16, 1, 3, 3), (9, 9, 3, 1), taps, False, "none"))

    def find(shape: tuple[int, ...]) -> cascade._Recipe | None:
        _, C, H, W = shape
        return cascade._recipe(shape, (C * H * W, 1, C * W, C), torch.float32, None, layers, 1, False)

    found = find((1, 16, rows_beyond_l2(16, 64), 64))
    assert found is not None
    row = 16 * 64 * 4
    assert L2 // 4 < (found.native.rows + 2) * row <= L2 // 2
    assert found.native.workspace < L2
    assert find((1, 16, L2 // row, 64)) is None
    assert find((1, 16, 8, L2 // 64)) is None, "one row is more than that"
