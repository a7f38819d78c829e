"""The reference models: torchvision's names, sizes and starting values, on whichever layers they are built."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastconv
from fastconv import models
from fastconv.bench.networks import layer_cases
from fastconv.models import blocks

# Parameters and state_dict entries of torchvision's models of the same name, auxiliary heads included; LeNet-5's from the paper's
# table of layers (156 + 2416 + 48120 + 10164 + 850), with every map of the second convolution connected to all six of the first;
# MobileNet's, Xception's and the small ViTs' as published with the PyTorch weights that are in use.
PARAMETERS_AND_KEYS = {
    "lenet5": (61706, 10),
    "resnet18": (11689512, 122),
    "resnet34": (21797672, 218),
    "resnet50": (25557032, 320),
    "resnet101": (44549160, 626),
    "resnet152": (60192808, 932),
    "resnext50_32x4d": (25028904, 320),
    "vgg16": (138357544, 32),
    "vgg19": (143667240, 38),
    "alexnet": (61100840, 16),
    "squeezenet1_1": (1235496, 52),
    "squeezenet1_0": (1248424, 52),
    "densenet121": (7978856, 727),
    "densenet169": (14149480, 1015),
    "densenet201": (20013928, 1207),
    "mobilenet_v1": (4231976, 164),
    "mobilenet_v2": (3504872, 314),
    "mobilenet_v3_small": (2542856, 244),
    "mobilenet_v3_large": (5483032, 312),
    "googlenet": (13004888, 364),
    "inception_v3": (27161264, 580),
    "xception": (22855952, 276),
    "efficientnet_b0": (5288548, 360),
    "efficientnet_b1": (7794184, 508),
    "efficientnet_b2": (9109994, 508),
    "efficientnet_b3": (12233232, 574),
    "efficientnet_b4": (19341616, 706),
    "efficientnet_b5": (30389784, 854),
    "efficientnet_b6": (43040704, 986),
    "efficientnet_b7": (66347960, 1200),
    "fcn_resnet50": (35322218, 334),
    "vit_tiny": (5717416, 152),
    "vit_small": (22050664, 152),
    "vit_b_16": (86567656, 152),
    "vit_l_16": (304326632, 296),
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
    ("resnext50_32x4d", "layer1.0.conv2.weight", (128, 4, 3, 3)),
    ("resnext50_32x4d", "layer4.2.conv3.weight", (2048, 1024, 1, 1)),
    ("alexnet", "features.0.weight", (64, 3, 11, 11)),
    ("alexnet", "features.10.bias", (256,)),
    ("alexnet", "classifier.1.weight", (4096, 9216)),
    ("alexnet", "classifier.6.weight", (1000, 4096)),
    ("squeezenet1_0", "features.0.weight", (96, 3, 7, 7)),
    ("squeezenet1_0", "features.5.expand3x3.weight", (128, 32, 3, 3)),
    ("squeezenet1_0", "features.12.squeeze.bias", (64,)),
    ("squeezenet1_1", "features.6.expand1x1.weight", (128, 32, 1, 1)),
    ("squeezenet1_1", "classifier.1.weight", (1000, 512, 1, 1)),
    ("densenet121", "features.conv0.weight", (64, 3, 7, 7)),
    ("densenet121", "features.denseblock1.denselayer2.norm1.weight", (96,)),
    ("densenet121", "features.denseblock4.denselayer16.conv2.weight", (32, 128, 3, 3)),
    ("densenet121", "features.transition3.conv.weight", (512, 1024, 1, 1)),
    ("densenet121", "features.norm5.running_var", (1024,)),
    ("densenet169", "classifier.weight", (1000, 1664)),
    ("densenet201", "features.denseblock3.denselayer48.conv1.weight", (128, 1760, 1, 1)),
    ("googlenet", "conv3.bn.running_mean", (192,)),
    ("googlenet", "inception3a.branch3.1.conv.weight", (32, 16, 3, 3)),
    ("googlenet", "inception4d.branch4.1.conv.weight", (64, 512, 1, 1)),
    ("googlenet", "inception5b.branch2.0.conv.weight", (192, 832, 1, 1)),
    ("googlenet", "aux2.conv.conv.weight", (128, 528, 1, 1)),
    ("googlenet", "aux1.fc1.weight", (1024, 2048)),
    ("mobilenet_v2", "features.0.0.weight", (32, 3, 3, 3)),
    ("mobilenet_v2", "features.1.conv.1.weight", (16, 32, 1, 1)),
    ("mobilenet_v2", "features.7.conv.1.0.weight", (192, 1, 3, 3)),
    ("mobilenet_v2", "features.17.conv.3.bias", (320,)),
    ("mobilenet_v2", "features.18.1.running_var", (1280,)),
    ("mobilenet_v2", "classifier.1.weight", (1000, 1280)),
    ("mobilenet_v3_small", "features.1.block.1.fc1.weight", (8, 16, 1, 1)),
    ("mobilenet_v3_small", "features.11.block.2.fc2.bias", (576,)),
    ("mobilenet_v3_small", "features.12.0.weight", (576, 96, 1, 1)),
    ("mobilenet_v3_large", "features.1.block.0.0.weight", (16, 1, 3, 3)),
    ("mobilenet_v3_large", "features.4.block.2.fc1.weight", (24, 72, 1, 1)),
    ("mobilenet_v3_large", "features.13.block.1.0.weight", (672, 1, 5, 5)),
    ("mobilenet_v3_large", "classifier.0.weight", (1280, 960)),
    ("mobilenet_v3_large", "classifier.3.bias", (1000,)),
    ("inception_v3", "Conv2d_4a_3x3.conv.weight", (192, 80, 3, 3)),
    ("inception_v3", "Mixed_5b.branch5x5_2.conv.weight", (64, 48, 5, 5)),
    ("inception_v3", "Mixed_5c.branch_pool.conv.weight", (64, 256, 1, 1)),
    ("inception_v3", "Mixed_6a.branch3x3dbl_3.conv.weight", (96, 96, 3, 3)),
    ("inception_v3", "Mixed_6c.branch7x7_2.conv.weight", (160, 160, 1, 7)),
    ("inception_v3", "Mixed_6e.branch7x7dbl_4.conv.weight", (192, 192, 7, 1)),
    ("inception_v3", "AuxLogits.conv1.conv.weight", (768, 128, 5, 5)),
    ("inception_v3", "Mixed_7a.branch7x7x3_4.bn.bias", (192,)),
    ("inception_v3", "Mixed_7b.branch3x3_2b.conv.weight", (384, 384, 3, 1)),
    ("inception_v3", "Mixed_7c.branch3x3dbl_3a.conv.weight", (384, 384, 1, 3)),
    ("efficientnet_b0", "features.1.0.block.1.fc1.weight", (8, 32, 1, 1)),
    ("efficientnet_b0", "features.3.1.block.1.0.weight", (240, 1, 5, 5)),
    ("efficientnet_b0", "features.7.0.block.2.fc2.weight", (1152, 48, 1, 1)),
    ("efficientnet_b0", "features.8.0.weight", (1280, 320, 1, 1)),
    ("efficientnet_b0", "classifier.1.bias", (1000,)),
    ("efficientnet_b2", "features.0.0.weight", (32, 3, 3, 3)),
    ("efficientnet_b5", "features.4.6.block.3.0.weight", (128, 768, 1, 1)),
    ("efficientnet_b7", "features.7.3.block.0.0.weight", (3840, 640, 1, 1)),
    ("fcn_resnet50", "backbone.layer3.5.bn3.running_mean", (1024,)),
    ("fcn_resnet50", "classifier.0.weight", (512, 2048, 3, 3)),
    ("fcn_resnet50", "classifier.4.bias", (21,)),
    ("fcn_resnet50", "aux_classifier.4.weight", (21, 256, 1, 1)),
    ("vit_b_16", "class_token", (1, 1, 768)),
    ("vit_b_16", "conv_proj.weight", (768, 3, 16, 16)),
    ("vit_b_16", "encoder.pos_embedding", (1, 197, 768)),
    ("vit_b_16", "encoder.layers.encoder_layer_11.ln_1.weight", (768,)),
    ("vit_b_16", "encoder.layers.encoder_layer_0.self_attention.in_proj_weight", (2304, 768)),
    ("vit_b_16", "encoder.layers.encoder_layer_0.self_attention.out_proj.bias", (768,)),
    ("vit_b_16", "encoder.layers.encoder_layer_5.mlp.0.weight", (3072, 768)),
    ("vit_b_16", "encoder.layers.encoder_layer_5.mlp.3.bias", (768,)),
    ("vit_b_16", "encoder.ln.bias", (768,)),
    ("vit_l_16", "heads.head.weight", (1000, 1024)),
]

# torchvision has no model of this name.
OURS_ALONE = ("lenet5", "mobilenet_v1", "xception", "vit_tiny", "vit_small")
# These are longer than others of their family, and built no otherwise.
SCALED_UP = (
    "densenet169",
    "densenet201",
    *(f"efficientnet_b{i}" for i in range(1, 8)),
    "vit_small",
    "vit_b_16",
    "vit_l_16",
)

LAYER_NAMES = (
    "BatchNorm2d",
    "Conv2d",
    "ConvTranspose2d",
    "Linear",
    "MaxPool2d",
    "AvgPool2d",
    "AdaptiveAvgPool2d",
    "LayerNorm",
    "MultiheadAttention",
)

RUN = [name for name in models.names() if name not in SCALED_UP]


@cache
def on_meta(name: str, layers: object = nn) -> nn.Module:
    """The model at its real size without its memory."""
    with torch.device("meta"):
        return models.create(name, layers=layers)


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
    """A namespace with the documented names is enough, and no such layer comes from anywhere else."""
    made: list[nn.Module] = []

    def recording(layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def make(*args: object, **kwargs: object) -> nn.Module:
            made.append(layer(*args, **kwargs))
            return made[-1]

        return make

    layers = SimpleNamespace(**{layer: recording(getattr(nn, layer)) for layer in LAYER_NAMES})
    with torch.device("meta"):
        model = models.create(name, layers=layers)
    kinds = tuple(getattr(nn, layer) for layer in LAYER_NAMES)
    # The projection inside of a MultiheadAttention is a subclass of Linear that is its own.
    assert [id(module) for module in model.modules() if type(module) in kinds] == [id(module) for module in made]


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


# BatchNorm's epsilon and momentum, and the probabilities of dropout, as torchvision has them.
HYPER_PARAMETERS = [
    ("resnext50_32x4d", 1e-5, 0.1, []),
    ("alexnet", None, None, [0.5, 0.5]),
    ("squeezenet1_0", None, None, [0.5]),
    ("densenet121", 1e-5, 0.1, []),
    ("googlenet", 1e-3, 0.1, [0.7, 0.7, 0.2]),
    ("mobilenet_v2", 1e-5, 0.1, [0.2]),
    ("mobilenet_v3_small", 1e-3, 0.01, [0.2]),
    ("mobilenet_v3_large", 1e-3, 0.01, [0.2]),
    ("inception_v3", 1e-3, 0.1, [0.5]),
    ("efficientnet_b0", 1e-5, 0.1, [0.2]),
    ("efficientnet_b4", 1e-5, 0.1, [0.4]),
    ("efficientnet_b5", 1e-3, 0.01, [0.4]),
    ("efficientnet_b7", 1e-3, 0.01, [0.5]),
    ("fcn_resnet50", 1e-5, 0.1, [0.1, 0.1]),
]


@pytest.mark.parametrize(("name", "eps", "momentum", "dropout"), HYPER_PARAMETERS)
def test_hyper_parameters(name: str, eps: float | None, momentum: float | None, dropout: list[float]) -> None:
    modules = list(on_meta(name).modules())
    norms = {(module.eps, module.momentum) for module in modules if isinstance(module, nn.BatchNorm2d)}
    assert norms == ({(eps, momentum)} if eps else set())
    assert [module.p for module in modules if isinstance(module, nn.Dropout)] == dropout


def test_stochastic_depth_grows_with_the_block() -> None:
    found = [module.p for module in on_meta("efficientnet_b0").modules() if isinstance(module, blocks.StochasticDepth)]
    assert found == pytest.approx([0.2 * block / 16 for block in range(16)])


# Billions of multiply-adds of convolutions and dense layers at the model's own size, as torchvision publishes them, which a wrong
# stride, padding or group would change. MobileNet's is the paper's; FCN's is 152.717 at 520×520.
MULTIPLY_ADDS = {
    "resnext50_32x4d": 4.230,
    "alexnet": 0.714,
    "squeezenet1_1": 0.349,
    "squeezenet1_0": 0.819,
    "densenet121": 2.834,
    "googlenet": 1.498,
    "mobilenet_v1": 0.569,
    "mobilenet_v2": 0.301,
    "mobilenet_v3_small": 0.057,
    "mobilenet_v3_large": 0.217,
    "inception_v3": 5.713,
    "efficientnet_b0": 0.386,
    "fcn_resnet50": 152.717 * (28 / 65) ** 2,
}


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds(name: str) -> None:
    cases = layer_cases(name, [1], ["fwd"], "f32", seed=0)
    found = sum(case.flops * case.count for case in cases if case.op in ("conv2d", "linear")) / 2e9
    # Published with three decimals, and with pools and norms for some.
    assert found == pytest.approx(MULTIPLY_ADDS[name], rel=5e-3, abs=1e-3)


# Standard deviations of weights at the start, by torchvision's rules for each layer; a uniform one has its bound by √3.
STARTS = {
    "resnext50_32x4d": {"layer1.0.conv2.weight": (2 / (128 * 9)) ** 0.5},
    "alexnet": {"features.3.weight": (3 * 64 * 25) ** -0.5},
    "squeezenet1_1": {"features.3.expand3x3.weight": (2 / (16 * 9)) ** 0.5, "classifier.1.weight": 0.01},
    "densenet121": {"features.denseblock1.denselayer1.conv2.weight": (2 / (128 * 9)) ** 0.5},
    "googlenet": {"inception3a.branch2.1.conv.weight": 0.01, "fc.weight": 0.01},
    "mobilenet_v2": {"features.18.0.weight": (2 / 1280) ** 0.5, "classifier.1.weight": 0.01},
    "mobilenet_v3_small": {"features.9.block.1.0.weight": (2 / (288 * 25)) ** 0.5},
    "inception_v3": {"Mixed_7c.branch3x3_1.conv.weight": 0.1, "AuxLogits.fc.weight": 0.001},
    "efficientnet_b0": {"features.8.0.weight": (2 / 1280) ** 0.5, "classifier.1.weight": (3 * 1000) ** -0.5},
    "fcn_resnet50": {
        "backbone.layer4.2.conv2.weight": (2 / (512 * 9)) ** 0.5,
        "classifier.0.weight": (3 * 2048 * 9) ** -0.5,
    },
}


@pytest.mark.parametrize("name", STARTS)
def test_weights_start_like_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    parameters = dict(
        models.create(name, layers=nn, **({"hidden": 64} if name == "alexnet" else {})).named_parameters()
    )
    for key, std in STARTS[name].items():
        weight = parameters[key].detach()
        # Four standard deviations of the estimate from so many numbers.
        assert float(weight.std()) == pytest.approx(std, rel=4 * (2 * weight.numel()) ** -0.5), key


@pytest.mark.parametrize("name", RUN)
def test_num_classes_and_in_channels(name: str) -> None:
    """Of every head, at the size that the model was designed for."""
    with torch.device("meta"):
        model = models.create(name, layers=nn, num_classes=7, in_channels=5)
        height, width = models.spec(name).input_size
        output = model(torch.empty(2, 5, height, width))
        expected = (2, 7, height, width) if name.startswith("fcn") else (2, 7)
        assert {tuple(head.shape) for head in models.heads(output)} == {expected}


def test_unknown_model_lists_the_known() -> None:
    with pytest.raises(ValueError, match="no model named 'resnet19'; fastconv has lenet5, resnet18"):
        models.create("resnet19")


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="classes"):
        models.create("lenet5", layers=nn, classes=3)


@pytest.mark.parametrize("name", [name for name in models.names() if name not in OURS_ALONE])
def test_state_is_torchvisions(name: str) -> None:
    """Keys in order, shapes, and the hyper-parameters of the layers that have any."""
    torchvision = pytest.importorskip("torchvision")
    of = torchvision.models.segmentation if name.startswith("fcn") else torchvision.models
    extra = {"aux_loss": True, "weights_backbone": None} if name.startswith("fcn") else {}
    extra |= {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        theirs = getattr(of, name)(weights=None, **extra)
    ours = on_meta(name)
    assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in theirs.state_dict().items()}
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    described = [{k: repr(m) for k, m in model.named_modules() if isinstance(m, kinds)} for model in (ours, theirs)]
    assert described[0] == described[1]
