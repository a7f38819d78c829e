"""fastconv.fuse: the same numbers with less to do, the original untouched, and a report that leaves nothing out."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
import torch.fx
from torch import Tensor, nn

import fastconv
from fastconv import models
from fastconv.commands.twins import build_twins, calibrate_batch_norm
from fastconv.fusion import FrozenConv2d, Fused

# Inception's last maps are 3x3 then. Of 107 pixels they would be 1x1, and norms fitted to two numbers multiply rounding: torch's
# own result was 4e-5 off there.
INPUTS = {"lenet5": (2, 1, 32, 32), "inception_v3": (2, 3, 139, 139)}
USUAL_INPUT = (2, 3, 64, 64)
SMALLER = {"vgg16": {"hidden": 64}, "alexnet": {"hidden": 64}, "inception_v3": {"aux_logits": False}}

# Additions and activations that the epilogues take over, by hand from the papers' figures, and how many norms and activations are
# left: MobileNetV3's gates are hard sigmoids. DenseNet's 62 norms that stand before their convolutions go with the relu behind.
EXPECTED: dict[str, tuple[int, dict[str, int], int]] = {
    "lenet5": (0, {}, 0),
    "resnet18": (8, {"relu": 17}, 0),
    "resnet50": (16, {"relu": 49}, 0),
    "resnext50_32x4d": (16, {"relu": 49}, 0),
    "vgg16": (0, {"relu": 15}, 0),
    "alexnet": (0, {"relu": 7}, 0),
    "squeezenet1_1": (0, {"relu": 26}, 0),
    "densenet121": (0, {"relu": 59 + 62}, 0),
    "googlenet": (0, {"relu": 57}, 0),
    "inception_v3": (0, {"relu": 94}, 0),
    "mobilenet_v1": (0, {"relu": 27}, 0),
    "mobilenet_v2": (10, {"relu6": 35}, 0),
    "mobilenet_v3_small": (6, {"relu": 14, "hardswish": 19}, 9),
    "mobilenet_v3_large": (10, {"relu": 19, "hardswish": 21}, 8),
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


def conv(width: int = 4) -> nn.Conv2d:
    return nn.Conv2d(width, 4, 3, padding=1)


def images(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape or (2, 3, 8, 8))


def assert_same(model: nn.Module, fused: nn.Module, x: Tensor, share: float = 1e-5) -> None:
    with torch.no_grad():
        expected, found = models.main_output(model(x)), models.main_output(fused(x))
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= share * scale, f"differs by {error:.3g}, the largest value is {scale:.3g}"


def assert_accurate(model: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Both within 1e-4 of float64: deep networks at their start multiply rounding, torch's too."""
    with torch.no_grad():
        exact = models.main_output(copy.deepcopy(model).double()(x.double()))
        for network in (model, fused):
            error = float((models.main_output(network(x)) - exact).abs().max() / exact.abs().max())
            assert error <= 1e-4, f"differs by {error:.3g} of the largest value"


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
    assert len(report.joined) == (62 if name == "densenet121" else 0)
    assert len(report.norms) + len(report.joined) == norms
    assert (len(report.residuals), report.activations) == (residuals, Counter(activations))
    assert len(report.left) == left
    assert not report.untraced
    before = fastconv.fallback_counts()
    with fastconv.observe() as records:
        assert_accurate(model, fused, x)
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
    fused = fastconv.fuse(nn.Sequential(*small(), conv(8), nn.Flatten(2), nn.Linear(64, 5), nn.ReLU()).eval())
    with torch.no_grad():
        assert torch.equal(torch.compile(fused, backend="aot_eager", fullgraph=True)(images()), fused(images()))


def test_repr_is_the_summary() -> None:
    fused = fastconv.fuse(small())
    assert isinstance(fused, Fused)
    assert repr(fused) == "Fused(Sequential: 1 convolution frozen, 1 norm folded, 1 relu)"
    frozen = FrozenConv2d(conv(), None, "relu")
    assert repr(frozen) == "FrozenConv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), activation=relu)"
