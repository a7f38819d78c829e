"""Batch norm as torch's users call it: the functional, its derivatives, the modules, and where torch answers."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastconv
import fastconv.functional as ours

SHAPES = {
    "2d": (7, 5),
    "3d": (3, 5, 11),
    "4d": (2, 6, 5, 7),
    "channels_last": (2, 6, 5, 7),
    "5d": (2, 3, 2, 5, 3),
    "transposed": (3, 5, 11),
    "strided": (2, 6, 5, 7),
}


def make(kind: str, dtype: torch.dtype = torch.float64, key: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(key)
    x = torch.randn(SHAPES[kind], generator=g, dtype=dtype) * 1.5 + 0.5
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "transposed":
        x = x.mT.contiguous().mT
    elif kind == "strided":
        x = torch.stack((x, x), -1)[..., 0]
    return x


def channels(kind: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Running mean and variance, weight, bias."""
    g, C = torch.Generator().manual_seed(1), SHAPES[kind][1]
    a, b, c, d = (torch.randn(C, generator=g, dtype=dtype) for _ in range(4))
    return [a, b.abs() + 0.5, c, d]


def theirs(x: Tensor, *args: Any, residual: Tensor | None = None, activation: str = "none") -> Tensor:
    y = F.batch_norm(x, *args)
    y = y if residual is None else y + residual
    calls = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu}
    return calls[activation](y) if activation in calls else y


def both(kind: str, training: bool, affine: bool, residual: bool, activation: str) -> list[list[Tensor]]:
    """Result, running statistics and gradients of ours and of torch's."""
    found = []
    for call in (ours.batch_norm, theirs):
        x = make(kind).requires_grad_()
        mean, variance, weight, bias = channels(kind)
        leaves = [x]
        scale = [weight.requires_grad_(), bias.requires_grad_()] if affine else [None, None]
        leaves += [t for t in scale if t is not None]
        more: dict[str, Any] = {"activation": activation}
        if residual:
            more["residual"] = make(kind, key=2).requires_grad_()
            leaves.append(more["residual"])
        y = call(x, mean, variance, *scale, training, 0.3, 1e-4, **more)
        dy = make(kind, key=3)
        found.append([y, mean, variance, *torch.autograd.grad(y, leaves, dy)])
    return found


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_agrees_with_torch(kind: str, training: bool) -> None:
    before = fastconv.fallback_counts()
    for affine, residual, activation in itertools.product((True, False), (True, False), ("none", "relu", "gelu")):
        for mine, torchs in zip(*both(kind, training, affine, residual, activation), strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-11, atol=1e-11)
    assert fastconv.fallback_counts() == before


@pytest.mark.parametrize("activation", ["relu6", "silu", "hardswish"])
@pytest.mark.parametrize("training", [True, False])
def test_activations_agree_with_torch(activation: str, training: bool) -> None:
    for mine, torchs in zip(*both("4d", training, True, True, activation), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["4d", "channels_last"])
def test_runs_on_our_kernels_and_keeps_the_memory_format(kind: str) -> None:
    before = fastconv.fallback_counts()
    x = make(kind, torch.float32).requires_grad_()
    with fastconv.observe() as records:
        y = ours.batch_norm(x, None, None, training=True)
        y.sum().backward()
    assert [record.op for record in records] == ["batch_norm_fwd", "batch_norm_bwd"]
    assert y.stride() == x.stride() == x.grad.stride()  # type: ignore[union-attr]
    assert fastconv.fallback_counts() == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["2d", "4d", "channels_last"])
def test_gradients_of_both_orders(kind: str, training: bool) -> None:
    mean, variance, weight, bias = channels(kind)
    inputs = [
        make(kind).requires_grad_(),
        weight.requires_grad_(),
        bias.requires_grad_(),
        make(kind, key=4).requires_grad_(),
    ]

    def call(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        stats = (None, None) if training else (mean, variance)
        return ours.batch_norm(x, *stats, w, b, training, residual=r, activation="silu")

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_gradients_that_are_not_contiguous_or_shared() -> None:
    x = make("channels_last").requires_grad_()
    for dy in (torch.ones(1, dtype=x.dtype).expand(x.shape), make("4d", key=5), make("strided", key=6)):
        mine, torchs = (
            torch.autograd.grad(call(x, None, None, None, None, True), x, dy)[0]
            for call in (ours.batch_norm, F.batch_norm)
        )
        torch.testing.assert_close(mine, torchs, rtol=1e-11, atol=1e-11)


def test_only_what_is_wanted() -> None:
    _, _, weight, bias = channels("4d")
    for wanted in (0, 1, 2):
        leaves = [make("4d"), weight.clone(), bias.clone()]
        leaves[wanted].requires_grad_()
        grads = [torch.autograd.grad(call(leaves[0], None, None, *leaves[1:], True).exp().sum(), leaves[wanted])[0]
                 for call in (ours.batch_norm, F.batch_norm)]  # fmt: skip
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_statistics_that_move_before_the_backward_pass() -> None:
    mean, variance, *_ = channels("4d")
    x = make("4d").requires_grad_()
    expected = torch.autograd.grad(F.batch_norm(x, mean.clone(), variance.clone()).square().sum(), x)[0]
    y, theirs_ = ours.batch_norm(x, mean, variance), F.batch_norm(x, mean, variance, training=True)
    ours.batch_norm(x, mean, variance, training=True)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
    theirs_.sum().backward()


def test_whole_numbers_for_momentum_and_eps() -> None:
    """torch takes them, so they are no reason to leave the call to torch."""
    found = []
    with fastconv.observe() as records:
        for call in (ours.batch_norm, F.batch_norm):
            stats = channels("4d")[:2]
            found.append([call(make("4d"), *stats, training=True, momentum=1, eps=1), *stats])
    assert [record.op for record in records] == ["batch_norm_fwd"]
    for mine, torchs in zip(*found, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-11, atol=1e-11)


def test_large_means_do_not_cancel() -> None:
    """An average of squares less a square would keep no digit of a deviation of 0.01 around 3000."""
    x = 3000 + 0.01 * torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for t in (x, x.contiguous(memory_format=torch.channels_last)):
        mean, variance = torch.zeros(4), torch.zeros(4)
        ours.batch_norm(t, mean, variance, training=True, momentum=1.0)
        torch.testing.assert_close(variance.double(), t.double().var((0, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["4d", "channels_last"])
def test_threads_do_not_show(kind: str) -> None:
    x = torch.randn(6, 40, 30, 30, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last) if kind == "channels_last" else x
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = ours.batch_norm(leaf, None, None, training=True, activation="relu")
            found.append([y.detach(), torch.autograd.grad(y, leaf, x)[0]])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [True, False])
def test_modules_train_as_torchs(kind: type[nn.Module], momentum: float | None, tracked: bool) -> None:
    shape = {nn.BatchNorm1d: (6, 4, 9), nn.BatchNorm2d: (4, 4, 5, 6), nn.BatchNorm3d: (3, 4, 3, 2, 5)}[kind]
    theirs_ = kind(4, momentum=momentum, track_running_stats=tracked).double()
    mine = copy.deepcopy(theirs_)
    assert fastconv.convert(mine).swapped == {kind.__name__: 1}
    assert type(mine).__module__ == "fastconv.nn"
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        torch.testing.assert_close(mine(x), theirs_(x), rtol=1e-11, atol=1e-11)
    mine.eval()
    theirs_.eval()
    torch.testing.assert_close(mine(x), theirs_(x), rtol=1e-11, atol=1e-11)
    for name, value in theirs_.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-11, atol=1e-11)
    assert type(pickle.loads(pickle.dumps(mine))) is type(mine)
    fastconv.revert(mine)
    assert type(mine) is kind


@pytest.mark.parametrize(
    "args",
    [
        (torch.ones(1, 3), None, None, None, None, True),
        (torch.ones(1, 3, 1, 1), None, None, None, None, True),
        (torch.ones(4, 3), None, None),
        (torch.ones(4, 3), torch.ones(2), torch.ones(3), None, None, True),
        (torch.ones(4, 3), torch.ones(3), None, None, None, True),
        (torch.ones(4, 3), None, None, torch.ones(2), None, True),
        (torch.ones(4, 3), None, None, None, None, True, 0.1, 0.0),
        (torch.ones(4), None, None, None, None, True),
        (torch.ones(4, 3).int(), None, None, None, None, True),
        (torch.ones(4, 3), None, None, torch.ones(3).double(), None, True),
    ],
)
def test_torchs_errors(args: tuple[Any, ...]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises
        F.batch_norm(*args)
    fastconv.set_fallback("silent")
    try:
        with pytest.raises(expected.type) as got:
            ours.batch_norm(*args)
    finally:
        fastconv.set_fallback("warn")
    assert str(got.value) == str(expected.value)


def test_our_own_errors() -> None:
    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match="activation: got 'tanh', expected none, relu"):
        ours.batch_norm(x, None, None, training=True, activation="tanh")
    with pytest.raises(
        RuntimeError, match=r"residual is \[2, 3\] of torch.float32, expected that of input, \[2, 3, 4, 4\]"
    ):
        ours.batch_norm(x, None, None, training=True, residual=torch.ones(2, 3))
    with pytest.raises(TypeError, match="'residual' must be Tensor, not int"):
        ours.batch_norm(x, None, None, training=True, residual=1)  # type: ignore[arg-type]


def test_empty_batches_are_torchs() -> None:
    for training in (True, False):
        mean, variance = torch.zeros(3), torch.ones(3)
        y = ours.batch_norm(torch.ones(0, 3, 4, 4), mean, variance, training=training)
        assert y.shape == (0, 3, 4, 4)


@pytest.mark.filterwarnings("ignore::fastconv.FallbackWarning")
def test_where_torch_answers() -> None:
    x, (mean, variance, weight, bias) = make("4d"), channels("4d")

    def call(f: Any) -> Any:
        return lambda x: f(x, None, None, weight, bias, True).square().sum()

    transforms: list[Any] = [torch.func.grad, torch.func.hessian]
    for transform in transforms:
        small = x[:, :, :2, :1]
        torch.testing.assert_close(transform(call(ours.batch_norm))(small), transform(call(F.batch_norm))(small))
    _, tangent = torch.func.jvp(call(ours.batch_norm), (x,), (x,))
    torch.testing.assert_close(tangent, torch.func.jvp(call(F.batch_norm), (x,), (x,))[1])
    half = ours.batch_norm(x.bfloat16(), mean.bfloat16(), variance.bfloat16())
    assert torch.equal(half, F.batch_norm(x.bfloat16(), mean.bfloat16(), variance.bfloat16()))
    assert any(op == "batch_norm" and "bfloat16" in why for op, why in fastconv.fallback_counts())
    negated = torch._neg_view(x)
    torch.testing.assert_close(
        ours.batch_norm(negated, None, None, training=True), F.batch_norm(-x, None, None, training=True)
    )
    assert ours.batch_norm(x.to("meta"), None, None, training=True).is_meta


def test_compiles_without_a_break() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    fastconv.convert(model)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_explains_itself() -> None:
    x = make("channels_last", torch.float32)
    for op in ("batch_norm_fwd", "batch_norm_bwd"):
        explanation = fastconv.explain(op, x, None, None, training=True)
        assert explanation.chosen is not None
        assert explanation.chosen.startswith(f"{op}.blocked.f32")


def test_a_block_in_training_is_its_three_steps() -> None:
    torch.manual_seed(0)
    block = fastconv.nn.ConvBnAct(4, 6, activation="hardswish").double()
    x, residual = torch.randn(2, 4, 6, 6).double(), torch.randn(2, 6, 6, 6).double()
    twin = copy.deepcopy(block)
    expected = F.hardswish(nn.BatchNorm2d.forward(twin.norm, twin.conv(x)) + residual)
    torch.testing.assert_close(block(x, residual), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(block.state_dict(), twin.state_dict(), rtol=1e-11, atol=1e-11)


def test_fuse_folds_ours_but_not_one_that_adds() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = fastconv.nn.Conv2d(3, 3, 3, padding=1), fastconv.nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x), x, "relu")  # type: ignore[no-any-return]

    plain = nn.Sequential(fastconv.nn.Conv2d(3, 3, 3, padding=1), fastconv.nn.BatchNorm2d(3))
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for model in (plain, Adds()):
        model(x)  # moves the statistics
        expected = model.eval()(x)
        torch.testing.assert_close(fastconv.fuse(model)(x), expected)


def test_hooks_on_an_activation_of_a_model_are_called_in_training() -> None:
    model = fastconv.models.create("resnet18", num_classes=4).train()
    seen: list[Tensor] = []
    model.get_submodule("layer1.0.relu").register_forward_hook(lambda module, args, y: seen.append(y))
    model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert len(seen) == 2
