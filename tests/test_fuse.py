"""fastconv.fuse: the same numbers with less to do, the original untouched, and a report that leaves nothing out."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.fx
from torch import Tensor, nn

import fastconv
from fastconv import models
from fastconv.commands.twins import build_twins, calibrate_batch_norm
from fastconv.fusion import FrozenConv2d, Fused

INPUTS = {"lenet5": (2, 1, 32, 32), "inception_v3": (2, 3, 107, 107)}
USUAL_INPUT = (2, 3, 64, 64)
SMALLER = {"vgg16": {"hidden": 64}, "alexnet": {"hidden": 64}, "inception_v3": {"aux_logits": False}}

# Additions and activations that the epilogues take over, by hand from the papers' figures, and how many norms and activations are
# left: DenseNet's norms stand before their convolutions, and MobileNetV3's gates are hard sigmoids.
EXPECTED: dict[str, tuple[int, dict[str, int], int]] = {
    "lenet5": (0, {}, 0),
    "resnet18": (8, {"relu": 17}, 0),
    "resnet50": (16, {"relu": 49}, 0),
    "resnext50_32x4d": (16, {"relu": 49}, 0),
    "vgg16": (0, {"relu": 13}, 0),
    "alexnet": (0, {"relu": 5}, 0),
    "squeezenet1_1": (0, {"relu": 26}, 0),
    "densenet121": (0, {"relu": 59}, 62),
    "googlenet": (0, {"relu": 57}, 0),
    "inception_v3": (0, {"relu": 94}, 0),
    "mobilenet_v1": (0, {"relu": 27}, 0),
    "mobilenet_v2": (10, {"relu6": 35}, 0),
    "mobilenet_v3_small": (6, {"relu": 14, "hardswish": 18}, 9),
    "mobilenet_v3_large": (10, {"relu": 19, "hardswish": 20}, 8),
    "efficientnet_b0": (9, {"silu": 49, "sigmoid": 16}, 0),
    "xception": (12, {"relu": 24}, 11),
    "fcn_resnet50": (16, {"relu": 51}, 0),
}


def built(name: str, layers: object = fastconv.nn) -> tuple[nn.Module, Tensor]:
    """The model in eval mode with BatchNorm fitted to the input, which comes second, and no factor or summand at its default."""
    ours, theirs = build_twins(name, **models.spec(name).well_conditioned, **SMALLER.get(name, {}))
    x = torch.randn(INPUTS.get(name, USUAL_INPUT))
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.mul_(torch.rand_like(module.weight) + 0.5)
                module.bias.add_(0.1 * torch.randn_like(module.bias))
    calibrate_batch_norm(theirs, x)
    if layers is nn:
        return theirs, x
    ours.load_state_dict(theirs.state_dict())
    return ours, x


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
        expected, found = models.main_output(model(x)), models.main_output(fused(x))
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= share * scale, f"differs by {error:.3g}, the largest value is {scale:.3g}"


def bits(model: nn.Module) -> dict[str, bytes]:
    return {key: tensor.contiguous().numpy().tobytes() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_models(name: str) -> None:
    model, x = built(name)
    state, modules = bits(model), list(model.modules())
    fused = fastconv.fuse(model)
    report = fused.report
    convolutions = sum(isinstance(module, nn.Conv2d) for module in modules if module is not model) - heads(model)[0]
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in modules) - heads(model)[1]
    residuals, activations, left = EXPECTED[name]
    assert len(report.frozen) == convolutions
    assert len(report.norms) == norms - (left if name == "densenet121" else 0)
    assert (len(report.residuals), report.activations) == (residuals, Counter(activations))
    assert len(report.left) == left
    assert not report.untraced
    before = fastconv.fallback_counts()
    with fastconv.observe() as records:
        assert_same(model, fused, x, 1e-4)
    assert fastconv.fallback_counts() == before
    assert sum(record.op == "conv2d_fwd" for record in records) >= 2 * convolutions
    assert bits(fused) == bits(model) == state
    assert fastconv.unfuse(fused) is model
    assert list(model.modules()) == modules


def heads(model: nn.Module) -> tuple[int, int]:
    """Convolutions and norms of auxiliary heads, which do nothing in eval mode."""
    aux = [getattr(model, name, None) for name in ("aux1", "aux2")]
    parts = [part for head in aux if head is not None for part in head.modules()]
    return sum(isinstance(p, nn.Conv2d) for p in parts), sum(isinstance(p, nn.BatchNorm2d) for p in parts)


def test_a_model_of_torchs_layers_runs_on_ours() -> None:
    model, x = built("resnet18", nn)
    fused = fastconv.fuse(model)
    with fastconv.observe() as records:
        assert_same(model, fused, x, 1e-4)
    assert Counter(record.op for record in records) == {"conv2d_fwd": 21, "max_pool2d_fwd": 1, "avg_pool2d_fwd": 1}
    assert not any(isinstance(module, fastconv.nn.Conv2d) for module in model.modules())


def test_state_is_the_originals() -> None:
    model = small()
    fused = fastconv.fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [id(p) for p in fused.parameters()] == [id(p) for p in model.parameters()]
    assert not any(key.startswith("frozen") for key, _ in fused.named_modules())
    outer = nn.Sequential(fused, nn.Flatten())
    assert list(outer.state_dict()) == [f"0.{key}" for key in model.state_dict()]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_folds_again(nested: bool, assign: bool) -> None:
    model = small()
    fused = fastconv.fuse(model)
    outer = nn.Sequential(fused) if nested else fused
    other = {key: t + 1 if t.is_floating_point() else t for key, t in copy.deepcopy(outer.state_dict()).items()}
    y = fused(images())
    outer.load_state_dict(other, assign=assign)
    assert bits(outer).items() == {k: t.numpy().tobytes() for k, t in other.items()}.items()
    assert not torch.allclose(fused(images()), y)
    assert_same(model, fused, images())


def test_moving_folds_again() -> None:
    model = small()
    fused = fastconv.fuse(model).double()
    assert fused(images().double()).dtype == torch.float64
    assert_same(model, fused, images().double())


def test_fusing_again_sees_writes() -> None:
    model = small()
    fused = fastconv.fuse(model)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(AssertionError):
        assert_same(model, fused, images())
    assert fastconv.fuse(fused) is fused
    assert_same(model, fused, images())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way: str) -> None:
    fused = fastconv.fuse(small())
    if way == "deepcopy":
        other = copy.deepcopy(fused)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(fused))
    else:
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other(images()), fused(images()))
    assert bits(other) == bits(fused)
    assert other.original is not fused.original
    assert [id(p) for p in other.parameters()] == [id(p) for p in other.original.parameters()]
    assert str(other.report) == str(fused.report)


def test_training_is_refused() -> None:
    model = small()
    with pytest.raises(RuntimeError, match=r"in training mode, expected eval mode: call model\.eval\(\) first"):
        fastconv.fuse(model.train())
    fused = fastconv.fuse(model.eval())
    assert fused.eval() is fused
    with pytest.raises(RuntimeError, match=r"cannot train: fastconv\.unfuse"):
        nn.Sequential(fused).train()
    assert not any(module.training for module in model.modules())


def test_wrong_types() -> None:
    for function in (fastconv.fuse, fastconv.unfuse):
        with pytest.raises(TypeError, match=r"argument 'model' must be torch\.nn\.Module, not int"):
            function(3)  # type: ignore[operator]


def test_unfuse_finds_fused_parts() -> None:
    model = small()
    outer = nn.Sequential(fastconv.fuse(model), nn.Flatten())
    assert fastconv.unfuse(outer) is outer
    assert outer[0] is model


def test_gradients_reach_the_input() -> None:
    model = small().double()
    fused = fastconv.fuse(model)
    assert torch.autograd.gradcheck(fused, (images(1, 3, 4, 4).double().requires_grad_(),))
    x = images().requires_grad_()
    fused.float()(x).sum().backward()
    assert all(parameter.grad is None for parameter in fused.parameters())


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
    "tanh-form gelu": (lambda m, x: nn.functional.gelu(m.a(x), approximate="tanh"), (1, 0, 0)),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_graphs(case: str) -> None:
    """The order of reads and writes is the original's, whatever is drawn together."""
    function, counts = GRAPHS[case]
    torch.manual_seed(0)
    model = Forward(function, a=conv(), b=conv()).eval()
    fused = fastconv.fuse(model)
    report = fused.report
    assert_same(model, fused, images(2, 4, 6, 5))
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
def test_options_of_the_convolution(case: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[case](), nn.BatchNorm2d(4), nn.SiLU())
    calibrate_batch_norm(model, images(2, 4, 9, 8))
    fused = fastconv.fuse(model.eval())
    assert fused.report.norms == ["0"]
    assert_same(model, fused, images(2, 4, 9, 8))
    assert_same(model, fused, images(2, 4, 9, 8)[0][None].contiguous(memory_format=torch.channels_last))


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


def test_fusing_in_inference_mode() -> None:
    with torch.inference_mode():
        fused = fastconv.fuse(small())
    x = images().requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None


def test_a_layer_by_itself() -> None:
    model = small()[0]
    assert_same(model, fastconv.fuse(model), images())
    assert fastconv.fuse(model).report.frozen == [""]


@pytest.mark.filterwarnings("ignore::fastconv.FallbackWarning")
def test_unusual_tensors_take_the_steps_one_by_one() -> None:
    model = nn.Sequential(*small(), conv(8), nn.GELU()).eval()
    fused = fastconv.fuse(model)
    x = images()
    torch.testing.assert_close(fused(x[0]), model(x)[0])
    torch.testing.assert_close(torch.func.vmap(fused)(x[:, None])[:, 0], model(x))
    before = sum(fastconv.fallback_counts().values())
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == torch.bfloat16
    assert sum(fastconv.fallback_counts().values()) == before + 2


def test_compiles_without_a_graph_break() -> None:
    fused = fastconv.fuse(nn.Sequential(*small(), conv(8)).eval())
    with torch.no_grad():
        assert torch.equal(torch.compile(fused, backend="aot_eager", fullgraph=True)(images()), fused(images()))


def test_repr_is_the_summary() -> None:
    fused = fastconv.fuse(small())
    assert isinstance(fused, Fused)
    assert repr(fused) == "Fused(Sequential: 1 convolution frozen, 1 norm folded, 1 relu)"
    frozen = FrozenConv2d(conv(), None, "relu")
    assert repr(frozen) == "FrozenConv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), activation=relu)"


# ---- ConvBnAct ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish", "gelu", "sigmoid"])
def test_conv_bn_act(activation: str, residual: bool) -> None:
    torch.manual_seed(0)
    block = fastconv.nn.ConvBnAct(4, 6, (3, 5), stride=(1, 2), dilation=(2, 1), groups=2, activation=activation)
    x, r = images(2, 4, 9, 8), images(2, 6, 9, 4) if residual else None
    trained = block(x, r)
    steps = nn.Sequential(*list(block)[:2])
    expected = steps.train()(x)
    expected = expected if r is None else expected + r
    expected = expected if activation == "none" else block[2](expected)
    torch.testing.assert_close(trained, expected)
    block.eval()
    y = block[1](block[0](x))
    y = y if r is None else y + r
    y = y if activation == "none" else block[2](y)
    assert y.shape == (2, 6, 9, 4)
    with torch.no_grad(), fastconv.observe() as records:
        found = block(x, r)
    assert [record.op for record in records] == ["conv2d_fwd"]
    torch.testing.assert_close(found, y)
    gradients = [torch.autograd.grad(out.square().sum(), block[0].weight)[0] for out in (block(x, r), y)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_conv_bn_act_in_a_fused_model() -> None:
    torch.manual_seed(0)
    model = Forward(lambda m, x: m.b(m.a(x), x), a=fastconv.nn.ConvBnAct(4, 4), b=fastconv.nn.ConvBnAct(4, 4))
    calibrate_batch_norm(model, images(2, 4, 6, 5))
    fused = fastconv.fuse(model.eval())
    assert_same(model, fused, images(2, 4, 6, 5))
    assert (len(fused.report.norms), len(fused.report.residuals), fused.report.activations) == (2, 1, {"relu": 2})
    assert list(model.a.state_dict())[:2] == ["0.weight", "1.weight"]


def test_conv_bn_act_refuses_other_activations() -> None:
    with pytest.raises(ValueError, match="activation: got 'tanh', expected none, relu"):
        fastconv.nn.ConvBnAct(4, 4, activation="tanh")
