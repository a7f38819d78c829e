"""The reference models: torchvision's names and sizes, the same results on fastconv's layers as on torch's, checkpoint files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fastconv
from fastconv import models
from fastconv.commands.twins import build_twins, calibrate_batch_norm

# Parameters and state_dict entries of torchvision's models of the same name; LeNet-5's from the paper's table of
# layers (156 + 2416 + 48120 + 10164 + 850), with every map of the second convolution connected to all six of the first.
PARAMETERS_AND_KEYS = {
    "lenet5": (61706, 10),
    "resnet18": (11689512, 122),
    "resnet34": (21797672, 218),
    "resnet50": (25557032, 320),
    "resnet101": (44549160, 626),
    "resnet152": (60192808, 932),
    "vgg16": (138357544, 32),
    "vgg19": (143667240, 38),
}

# Some of torchvision's keys, with their shapes, that a slip in naming, widths or the order of layers would change.
SHAPES = [
    ("resnet18", "conv1.weight", (64, 3, 7, 7)),
    ("resnet18", "layer1.1.conv2.weight", (64, 64, 3, 3)),
    ("resnet18", "layer2.0.downsample.0.weight", (128, 64, 1, 1)),
    ("resnet18", "layer2.0.downsample.1.running_mean", (128,)),
    ("resnet34", "layer3.5.bn2.num_batches_tracked", ()),
    ("resnet34", "fc.weight", (1000, 512)),
    ("resnet50", "layer1.0.conv1.weight", (64, 64, 1, 1)),
    ("resnet50", "layer1.0.downsample.0.weight", (256, 64, 1, 1)),
    ("resnet50", "layer2.0.conv2.weight", (128, 128, 3, 3)),
    ("resnet50", "layer4.2.bn3.running_var", (2048,)),
    ("resnet50", "fc.bias", (1000,)),
    ("resnet101", "layer3.22.conv3.weight", (1024, 256, 1, 1)),
    ("resnet152", "layer3.35.conv1.weight", (256, 1024, 1, 1)),
    ("resnet152", "layer2.7.conv2.weight", (128, 128, 3, 3)),
    ("vgg16", "features.0.weight", (64, 3, 3, 3)),
    ("vgg16", "features.28.bias", (512,)),
    ("vgg16", "classifier.0.weight", (4096, 25088)),
    ("vgg16", "classifier.6.weight", (1000, 4096)),
    ("vgg19", "features.34.weight", (512, 512, 3, 3)),
    ("vgg19", "classifier.3.bias", (4096,)),
]

LAYER_NAMES = ("Conv2d", "Linear", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d")

# Small enough for a test, large enough that the last stage still has more than one pixel for BatchNorm to average.
INPUTS = {"lenet5": (4, 1, 32, 32), "vgg16": (2, 3, 32, 32), "vgg19": (2, 3, 32, 32)}
RESNET_INPUT = (2, 3, 64, 64)

# VGG's dense layers hold 119 million parameters at their real width, which would test the machine's memory.
SMALLER = {"vgg16": {"hidden": 64}, "vgg19": {"hidden": 64}}


def assert_close(actual: Tensor, expected: Tensor, share: float, what: str = "") -> None:
    """max |Δ| ≤ share · max |expected|; NaN fails."""
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    assert error <= share * scale, f"{what or 'output'} differs by {error:.3g}, the largest value is {scale:.3g}"


def on_meta(name: str, layers: object = nn) -> nn.Module:
    """The model at its real size without its memory."""
    with torch.device("meta"):
        return models.create(name, layers=layers)


def twins(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor]:
    """The model on fastconv and on torch with the same weights and with BatchNorm fitted to the input, which comes third."""
    ours, theirs = build_twins(name, **models.spec(name).well_conditioned, **SMALLER.get(name, {}))
    x = torch.randn(INPUTS.get(name, RESNET_INPUT), dtype=dtype)
    calibrate_batch_norm(theirs.to(dtype), x)
    ours.to(dtype).load_state_dict(theirs.state_dict())
    return ours, theirs, x


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a cross-entropy loss with respect to the input (under the name "") and every parameter."""
    x = x.clone().requires_grad_()
    nn.functional.cross_entropy(model(x), torch.arange(len(x))).backward()
    return {"": x.grad, **{key: parameter.grad for key, parameter in model.named_parameters()}}


def test_every_model_has_facts_to_be_tested_against() -> None:
    assert models.names() == list(PARAMETERS_AND_KEYS)


@pytest.mark.parametrize("name", models.names())
def test_number_of_parameters_and_keys(name: str) -> None:
    model = on_meta(name)
    found = sum(parameter.numel() for parameter in model.parameters()), len(model.state_dict())
    assert found == PARAMETERS_AND_KEYS[name]


@pytest.mark.parametrize(("name", "key", "shape"), SHAPES)
def test_torchvision_key(name: str, key: str, shape: tuple[int, ...]) -> None:
    assert tuple(on_meta(name).state_dict()[key].shape) == shape


@pytest.mark.parametrize("name", models.names())
def test_same_keys_in_the_same_order_on_both_backends(name: str) -> None:
    ours, theirs = on_meta(name, fastconv.nn).state_dict(), on_meta(name).state_dict()
    assert [(key, tensor.shape) for key, tensor in ours.items()] == [(key, t.shape) for key, t in theirs.items()]


def test_only_the_first_blocks_of_a_stage_have_a_projection() -> None:
    assert [name for name in on_meta("resnet18").state_dict() if name.endswith("downsample.0.weight")] == [
        f"layer{stage}.0.downsample.0.weight" for stage in (2, 3, 4)
    ]
    assert [name for name in on_meta("resnet50").state_dict() if name.endswith("downsample.0.weight")] == [
        f"layer{stage}.0.downsample.0.weight" for stage in (1, 2, 3, 4)
    ]


def test_bottleneck_strides_in_its_3x3_convolution() -> None:
    block = on_meta("resnet50").layer3[0]
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))
    assert block.downsample[0].stride == (2, 2)


@pytest.mark.parametrize("name", models.names())
def test_takes_its_layers_from_the_namespace_it_is_given(name: str) -> None:
    """A namespace with the five documented names is enough, and no such layer comes from anywhere else."""
    made: list[nn.Module] = []

    def recording(layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def make(*args: object, **kwargs: object) -> nn.Module:
            made.append(layer(*args, **kwargs))
            return made[-1]

        return make

    model = on_meta(name, SimpleNamespace(**{layer: recording(getattr(nn, layer)) for layer in LAYER_NAMES}))
    kinds = tuple(getattr(nn, layer) for layer in LAYER_NAMES)
    assert [id(module) for module in model.modules() if isinstance(module, kinds)] == [id(module) for module in made]


def test_default_layers_are_fastconvs() -> None:
    kinds = {type(module) for module in models.create("lenet5").modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert kinds == {fastconv.nn.Conv2d, fastconv.nn.Linear}


def test_resnet_starts_like_torchvisions() -> None:
    torch.manual_seed(0)
    model = models.create("resnet18", layers=nn)
    weight = model.layer3[1].conv2.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert bool((model.layer3[1].bn2.weight == 1).all())
    assert float(model.fc.weight.detach().abs().max()) == pytest.approx(512**-0.5, rel=0.01)


def test_vgg_starts_like_torchvisions() -> None:
    torch.manual_seed(0)
    model = models.create("vgg16", layers=nn, hidden=256)
    assert float(model.features[28].weight.detach().std()) == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert float(model.classifier[0].weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert not any(bool(p.any()) for key, p in model.named_parameters() if key.endswith("bias"))


@pytest.mark.parametrize("name", models.names())
def test_num_classes_and_in_channels(name: str) -> None:
    with torch.device("meta"):
        model = models.create(name, layers=nn, num_classes=7, in_channels=5)
        height, width = models.spec(name).input_size
        assert model(torch.empty(2, 5, height, width)).shape == (2, 7)


def test_unknown_model_lists_the_known() -> None:
    with pytest.raises(ValueError, match="no model named 'resnet19'; fastconv has lenet5, resnet18"):
        models.create("resnet19")


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="classes"):
        models.create("lenet5", layers=nn, classes=3)


@pytest.mark.parametrize("name", models.names())
def test_output_agrees_with_torch(name: str) -> None:
    ours, theirs, x = twins(name, torch.float32)
    before = fastconv.fallback_counts()
    with torch.no_grad():
        assert_close(ours(x), theirs(x), 1e-4)
    assert fastconv.fallback_counts() == before


@pytest.mark.parametrize("name", models.names())
def test_gradients_agree_with_torch(name: str) -> None:
    """In float64: in float32 two roundings of one activation may fall on both sides of ReLU's kink or of a tie between
    two of a pool's maxima, and a gradient then takes another way on torch itself too (NCHW against NHWC: by a tenth)."""
    ours, theirs, x = twins(name, torch.float64)
    before = fastconv.fallback_counts()
    found, expected = gradients(ours, x), gradients(theirs, x)
    assert fastconv.fallback_counts() == before
    for key, gradient in found.items():
        assert_close(gradient, expected[key], 1e-9, f"gradient of {key or 'the input'}")


@pytest.mark.parametrize("name", ["lenet5", "resnet18", "resnet50", "vgg16"])
def test_float32_gradients_agree_with_torch(name: str) -> None:
    """With SiLU in the place of ReLU, for the reason above; by the 2-norm, for the sake of the pools' near-ties."""
    ours, theirs, x = twins(name, torch.float32)
    for model in (ours, theirs):
        for module in list(model.modules()):
            for key, child in module.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(module, key, nn.SiLU())
    found, expected = gradients(ours, x), gradients(theirs, x)
    for key, gradient in found.items():
        error = float((gradient - expected[key]).norm() / expected[key].norm())
        assert error <= 2e-3, f"gradient of {key or 'the input'} differs by {error:.3g} of its norm"


# ---- Checkpoint files ------------------------------------------------------------------------------------------------


@pytest.fixture
def lenet() -> nn.Module:
    torch.manual_seed(1)
    return models.create("lenet5", layers=nn)


def assert_loads(path: Path, source: nn.Module) -> None:
    """Loading ``path`` into a differently initialised copy gives ``source``'s weights, bit for bit."""
    model = copy.deepcopy(source)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    assert models.load_weights(model, path) is model
    for key, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="plain"),
        pytest.param(lambda state: {"state_dict": state, "epoch": 3}, id="state_dict"),
        pytest.param(lambda state: {"model": {"state_dict": state}}, id="two-nests"),
        pytest.param(lambda state: {f"module.{key}": t for key, t in state.items()}, id="DataParallel"),
        pytest.param(lambda state: {"model": {f"module._orig_mod.{k}": t for k, t in state.items()}}, id="compiled"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_loads_torch_files(lenet: nn.Module, tmp_path: Path, wrap: Callable[..., object], suffix: str) -> None:
    torch.save(wrap(dict(lenet.state_dict())), tmp_path / f"w{suffix}")
    assert_loads(tmp_path / f"w{suffix}", lenet)


def test_loads_safetensors(lenet: nn.Module, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(lenet.state_dict(), tmp_path / "w.safetensors")
    assert_loads(tmp_path / "w.safetensors", lenet)


def test_loads_files_older_than_num_batches_tracked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = models.create("resnet18", layers=nn, num_classes=2)
    state = {key: tensor for key, tensor in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert_loads(tmp_path / "old.pth", source)


def test_converts_to_the_models_dtype(lenet: nn.Module, tmp_path: Path) -> None:
    torch.save({key: tensor.double() for key, tensor in lenet.state_dict().items()}, tmp_path / "w.pth")
    assert models.load_weights(lenet, tmp_path / "w.pth").conv1.weight.dtype == torch.float32


def test_names_everything_that_does_not_fit_and_changes_nothing(lenet: nn.Module, tmp_path: Path) -> None:
    state = dict(copy.deepcopy(lenet.state_dict()))
    state["conv1.weight"] += 1
    state["head.weight"] = state.pop("fc3.weight")
    state["fc3.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "w.pth")
    kept = copy.deepcopy(lenet.state_dict())
    with pytest.raises(RuntimeError) as caught:
        models.load_weights(lenet, tmp_path / "w.pth")
    message = str(caught.value)
    assert "does not fit LeNet5" in message
    assert "1 missing: fc3.weight" in message
    assert "1 unexpected: head.weight" in message
    assert "1 of another shape: fc3.bias: file (5,), model (10,)" in message
    assert all(torch.equal(tensor, kept[key]) for key, tensor in lenet.state_dict().items())


def test_a_long_list_of_names_is_cut(tmp_path: Path, lenet: nn.Module) -> None:
    torch.save({"only": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=r"10 missing: conv1\.weight, .* and 2 more"):
        models.load_weights(lenet, tmp_path / "w.pth")


def test_refuses_pickled_objects(lenet: nn.Module, tmp_path: Path) -> None:
    torch.save(lenet, tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"Python objects.*save model\.state_dict\(\) instead"):
        models.load_weights(lenet, tmp_path / "whole.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2), "holds a Tensor, expected a state dict"),
        ({}, "holds an empty dictionary"),
        ({"conv1.weight": torch.zeros(1), "lr": 0.1}, "not tensors, so it is no state dict: 'lr': float"),
    ],
    ids=["tensor", "empty", "number"],
)
def test_refuses_what_is_no_state_dict(lenet: nn.Module, tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        models.load_weights(lenet, tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_refuses_other_files(lenet: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=r"could not be read|not a safetensors file"):
        models.load_weights(lenet, path)


def test_missing_file(lenet: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights file"):
        models.load_weights(lenet, tmp_path / "none.pth")
