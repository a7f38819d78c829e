"""What fastconv.fuse draws together in a graph, and what it leaves: reads and writes, options, norms, special modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn

import fastconv
from fastconv.commands.twins import calibrate_batch_norm


def small() -> nn.Sequential:
    """Convolution, norm, activation, with statistics of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    calibrate_batch_norm(model, torch.randn(4, 3, 8, 8) + 1)
    return model.eval()


def images(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape or (2, 3, 8, 8))


def assert_same(model: nn.Module, fused: nn.Module, x: Tensor, share: float = 1e-5) -> None:
    with torch.no_grad():
        assert_near(fused(x), model(x), share)


def assert_near(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= share * scale, f"differs by {error:.3g}, the largest value is {scale:.3g}"


class Forward(nn.Module):
    """Layers and a forward from a function, for the cases below."""

    def __init__(self, forward: Callable[[Forward, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for key, layer in layers.items():
            self.add_module(key, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(width: int = 4) -> nn.Conv2d:
    return nn.Conv2d(width, 4, 3, padding=1)


def another_use(m: Forward, x: Tensor) -> Tensor:
    y = m.a(x)
    return y.relu() * y


def input_written_to(m: Forward, x: Tensor) -> Tensor:
    x = x * 2
    y = m.a(x)
    return y + x.relu_()


def summand_written_to(m: Forward, x: Tensor) -> Tensor:
    x = x * 2
    y = m.a(x)
    x.mul_(2)
    return y + x


def written_to_before_the_activation(m: Forward, x: Tensor) -> Tensor:
    x = x * 2
    y = m.a(x)
    x.mul_(2)
    return y.relu()


def added_to_itself(m: Forward, x: Tensor) -> Tensor:
    y = m.a(x)
    return y + y


# What to compute, and what of it is fused: convolutions, additions, activations.
GRAPHS: dict[str, tuple[Callable[[Forward, Tensor], Tensor], tuple[int, int, int]]] = {
    "functions": (lambda m, x: torch.relu(m.a(x)) + nn.functional.silu(m.b(x)).sigmoid(), (2, 0, 2)),
    "relu before the addition": (lambda m, x: x + m.a(x).relu(), (1, 0, 1)),
    "addition, then relu": (lambda m, x: (x + m.a(x)).relu(), (1, 1, 1)),
    "two convolutions": (lambda m, x: (m.a(x) + m.b(x)).relu(), (2, 1, 1)),
    "one convolution twice": (lambda m, x: m.a(x).relu() + m.a(x), (2, 1, 1)),
    "in place": (lambda m, x: m.a(x).add_(x).relu_(), (1, 1, 1)),
    "into the other summand": (lambda m, x: x.sigmoid().add_(m.a(x)), (1, 0, 0)),
    "another use": (another_use, (1, 0, 0)),
    "input written to": (input_written_to, (1, 0, 0)),
    "summand written to": (summand_written_to, (1, 0, 0)),
    "written to before the activation": (written_to_before_the_activation, (1, 0, 1)),
    "added to itself": (added_to_itself, (1, 0, 0)),
    "broadcast": (lambda m, x: (m.a(x) + x.mean((2, 3), keepdim=True)).relu(), (1, 1, 1)),
    "a number": (lambda m, x: m.a(x) + 1, (1, 0, 0)),
    "scaled": (lambda m, x: torch.add(m.a(x), x, alpha=2), (1, 0, 0)),
    "tanh-form gelu": (lambda m, x: nn.functional.gelu(m.a(x), approximate="tanh"), (1, 0, 1)),
    "an option": (lambda m, x: torch.sigmoid(m.a(x), out=torch.empty_like(x)), (1, 0, 0)),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_graphs(place: Any, case: str) -> None:
    """The order of reads and writes is the original's, whatever is drawn together."""
    function, counts = GRAPHS[case]
    torch.manual_seed(0)
    model = Forward(function, a=conv(), b=conv()).eval()
    with torch.no_grad():
        expected = model(images(2, 4, 6, 5))
        fused = fastconv.fuse(place(model))
        assert_near(place.back(fused(place(images(2, 4, 6, 5)))), expected)
    report = fused.report
    assert (len(report.frozen), len(report.residuals), sum(report.activations.values())) == counts


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "same": lambda: nn.Conv2d(4, 4, 4, padding="same"),
    "valid": lambda: nn.Conv2d(4, 4, 3, padding="valid"),
    "SAME": lambda: fastconv.nn.Conv2d(4, 4, 3, stride=2, padding="SAME"),
    "reflect": lambda: nn.Conv2d(4, 4, 3, padding=(2, 1), padding_mode="reflect"),
    "circular same": lambda: nn.Conv2d(4, 4, 4, padding="same", padding_mode="circular"),
    "dilated, grouped, strided": lambda: nn.Conv2d(4, 4, 3, (2, 1), (1, 2), (2, 1), 2, bias=False),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", LAYERS)
def test_options_of_the_convolution(place: Any, case: str) -> None:
    if place.name == "emulated" and case == "SAME":
        pytest.skip("its reference is ours, on the CPU, whose kernels the emulated stand in for")
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[case](), nn.BatchNorm2d(4), nn.SiLU())
    x = images(2, 4, 9, 8)
    y = x[0][None].contiguous(memory_format=torch.channels_last)
    calibrate_batch_norm(model, x)
    with torch.no_grad():
        expected = model.eval()(x), model(y)
        fused = fastconv.fuse(place(model))
        assert fused.report.norms == ["0"]
        for given, wanted in zip((x, y), expected, strict=True):
            assert_near(place.back(fused(place(given))), wanted)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "no factors": lambda: nn.BatchNorm2d(4, affine=False),
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "in training": lambda: nn.BatchNorm2d(4),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4),
}


@pytest.mark.parametrize(
    ("case", "left"),
    [("no factors", ""), ("no statistics", "it keeps no statistics"), ("in training", "it is in training mode"),
     ("group", ""), ("instance", "it is InstanceNorm2d")],
)  # fmt: skip
def test_norms(case: str, left: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), NORMS[case](), nn.ReLU()).eval()
    if case == "in training":
        model[1].train().momentum = 0.0
    fused = fastconv.fuse(model)
    assert len(fused.report.norms) == (case == "no factors")
    assert (left in str(fused.report)) if left else not fused.report.left
    assert_same(model, fused, images(2, 4, 6, 5))


def test_what_is_special_is_left_alone() -> None:
    """A hook, a parametrization, a subclass: called as they are."""

    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    model = nn.Sequential(conv(), Doubled(4, 4, 1), conv(), nn.ReLU(), conv())
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    nn.utils.parametrize.register_parametrization(model[2], "weight", Half())
    fused = fastconv.fuse(model.eval())
    assert_same(model, fused, images(2, 4, 6, 5))
    assert len(seen) == 2
    assert fused.report.frozen == ["4"]
    assert "left Conv2d (0): it has hooks" in str(fused.report)


@pytest.mark.parametrize("traced", [True, False])
def test_transposed_convolutions_are_listed_as_left(traced: bool) -> None:
    up = nn.ConvTranspose2d(6, 4, 2, stride=2)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), up) if traced else nn.ModuleList([nn.Conv2d(3, 6, 3), up])
    report = fastconv.fuse(model.eval()).report
    assert report.frozen == ["0"]
    assert [(kept.name, kept.kind) for kept in report.left] == [("1", "ConvTranspose2d")]
    assert "only the weights of Conv2d and Linear are kept packed" in str(report)


def test_a_block_with_a_hook_is_fused_inside() -> None:
    model = nn.Sequential(small(), conv(8)).eval()
    seen: list[tuple[int, ...]] = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    fused = fastconv.fuse(model)
    assert_same(model, fused, images())
    assert seen == [(2, 8, 8, 8)] * 2
    assert sorted(fused.report.frozen) == ["0.0", "1"]
    assert fused.report.norms == ["0.0"]


class Branching(nn.Module):
    """A forward that looks at the numbers, which torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.features = small()
        self.blocks = nn.ModuleList([small()[:1], nn.Sequential(conv(8))])
        self.last = conv(4)
        self.block = fastconv.nn.ConvBnAct(4, 4)
        self.head = conv(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        assert len(self.features) == 3  # the parts are still what they were
        if float(y.mean()) > 1e9:
            return y
        for block in self.blocks[1:]:
            y = block(y)
        y = nn.functional.conv2d(self.block(self.last(y)), self.last.weight, padding=1)
        return self.head(y)


class Optional(nn.Module):
    """A forward whose optional argument a trace would settle."""

    def __init__(self) -> None:
        super().__init__()
        self.features = small()

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = self.features(x)
        return y if scale is None else y * scale


def test_what_cannot_be_traced_is_reported_and_fused_in_parts() -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    fused = fastconv.fuse(model)
    assert_same(model, fused, images())
    report = fused.report
    assert [(kept.name, kept.kind) for kept in report.untraced] == [("", "Branching")]
    assert sorted(report.frozen) == ["block", "blocks.0.0", "blocks.1.0", "features.0", "head", "last"]
    assert sorted(report.norms) == ["block", "features.0"]
    assert report.activations == {"relu": 2}
    assert "not traced: Branching (the model itself): TypeError: float()" in str(report)


def test_optional_arguments_keep_their_meaning() -> None:
    model = Optional().eval()
    fused = fastconv.fuse(model)
    torch.testing.assert_close(fused(images(), scale=3.0), model(images(), 3.0))
    torch.testing.assert_close(fused(images()), model(images()))
    assert fused.report.norms == ["features.0"]
    assert "optional argument, scale" in fused.report.untraced[0].reason


def test_a_forward_set_on_the_object_is_called() -> None:
    model = small()
    model.forward = lambda x: x + 1  # type: ignore[method-assign]
    fused = fastconv.fuse(model)
    assert torch.equal(fused(images()), images() + 1)
    assert fused.report.frozen == []
    assert "set on the object" in str(fused.report)


@torch.fx.wrap
def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """torchvision's, in name and arguments."""
    return input * 0 if training else input


@pytest.mark.parametrize("training", [True, False])
def test_functions_that_do_nothing_in_eval(training: bool) -> None:
    def forward(m: Forward, x: Tensor) -> Tensor:
        y = nn.functional.dropout(m.a(x), 0.0, training)
        return stochastic_depth(y, 0.2, "row", training) + x

    model = Forward(forward, a=conv()).eval()
    fused = fastconv.fuse(model)
    assert_same(model, fused, images(2, 4, 6, 5))
    assert len(fused.report.residuals) == (not training)
