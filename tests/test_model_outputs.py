"""The reference models on fastconv's layers against the same on torch's: outputs, gradients, a training step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastconv
from fastconv import models
from fastconv.commands.twins import build_twins, calibrate_batch_norm
from fastconv.models import blocks

# The others are longer than one of their family, and built no otherwise; those of WIDER are wider as well.
WIDER = [f"efficientnet_b{i}" for i in range(1, 8)]
LONGER = ["resnet34", "resnet101", "resnet152", "vgg19", "densenet169", "densenet201"]
RUN = [name for name in models.names() if name not in (*LONGER, *WIDER, "vit_small", "vit_b_16", "vit_l_16")]


# Small enough for a test, large enough that the last stage still has more than one pixel for BatchNorm to average.
INPUTS = {
    "lenet5": (4, 1, 32, 32),
    "vgg16": (2, 3, 32, 32),
    "vgg19": (2, 3, 32, 32),
    "inception_v3": (2, 3, 107, 107),
}
USUAL_INPUT = (2, 3, 64, 64)

# Dense layers hold 119 of VGG's and 59 of AlexNet's million parameters, which would test the machine's memory.
# Inception's auxiliary head wants images of 299×299.
SMALLER = {
    "vgg16": {"hidden": 64},
    "vgg19": {"hidden": 64},
    "alexnet": {"hidden": 64},
    "inception_v3": {"aux_logits": False},
    "vit_tiny": {"image_size": 64},
    # A block a stage: each width of its own is there, and what a stage repeats is in B0's stages of two to four.
    **{name: {"depth": 0.25} for name in WIDER},
}


def assert_close(actual: Tensor, expected: Tensor, share: float, what: str = "", least: float = 0.0) -> None:
    """max |Δ| ≤ share · max |expected|, or share · ``least`` where that is more; NaN fails."""
    error, scale = float((actual - expected).abs().max()), max(least, float(expected.abs().max()))
    assert error <= share * scale, f"{what or 'output'} differs by {error:.3g}, the largest value is {scale:.3g}"


def twins(name: str, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """The model on fastconv and on torch with the same weights and with BatchNorm fitted to the input, which comes third."""
    ours, theirs = build_twins(name, **models.spec(name).well_conditioned, **SMALLER.get(name, {}), **options)
    x = torch.randn(INPUTS.get(name, USUAL_INPUT), dtype=dtype)
    calibrate_batch_norm(theirs.to(dtype), x)
    ours.to(dtype).load_state_dict(theirs.state_dict())
    return ours, theirs, x


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the loss with respect to the input (under the name "") and every parameter."""
    x = x.clone().requires_grad_()
    models.classification_loss(model(x), torch.arange(len(x), device=x.device)).backward()
    return {"": x.grad, **{key: parameter.grad for key, parameter in model.named_parameters()}}


def step(model: nn.Module, x: Tensor, lr: float = 0.1) -> dict[str, Tensor]:
    """The gradients of a step of SGD in training mode, and the state that it leaves, all by name."""
    torch.manual_seed(2)  # both models draw the same dropout masks
    found = {f"gradient of {key or 'the input'}": tensor for key, tensor in gradients(model.train(), x).items()}
    torch.optim.SGD(model.parameters(), lr=lr).step()
    return {**found, **model.state_dict()}


# The emulator takes its time: LeNet's 400 thousand multiplications are enough for it.
PLACES = (
    [("cpu", name) for name in (*RUN, *LONGER, *WIDER)] + [("emulated", "lenet5")] + [("cuda", name) for name in RUN]
)


@pytest.mark.parametrize(("place", "name"), PLACES, indirect=["place"])
def test_output_agrees_with_torch(place: Any, name: str) -> None:
    ours, theirs, x = twins(name, torch.float32)
    before = fastconv.fallback_counts()
    with torch.no_grad():
        expected = models.main_output(theirs(x))
        with place.letting("batch_norm"):
            found = models.main_output(place(ours)(place(x)))
    assert_close(place.back(found), expected, 1e-4)
    assert fastconv.fallback_counts() == before or place.is_gpu


@pytest.mark.parametrize("name", RUN)
def test_training_step_agrees_with_torch(name: str) -> None:
    """Gradients, and the weights and statistics that a step leaves behind.

    In float64: in float32 two roundings of one activation may fall on both sides of ReLU's kink or of a tie between
    two of a pool's maxima, and a gradient then takes another way on torch itself too (NCHW against NHWC: by a tenth)."""
    ours, theirs, x = twins(name, torch.float64)
    before = fastconv.fallback_counts()
    found, expected = (step(model, x) for model in (ours, theirs))
    assert fastconv.fallback_counts() == before
    # A bias that another BatchNorm takes out again has a gradient of 0, and what is computed of it is rounding, 1e-15.
    least = 1e-4 * max(float(tensor.abs().max()) for key, tensor in expected.items() if key.startswith("gradient"))
    for key, tensor in found.items():
        assert_close(tensor, expected[key], 1e-9, key, least)


def smooth(model: nn.Module) -> None:
    """SiLU in the place of every ReLU: in float32 a kink is met from both sides, see above."""
    for module in list(model.modules()):
        for key, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6)):
                setattr(module, key, nn.SiLU())


@pytest.mark.parametrize(
    ("place", "name"),
    [("emulated", "lenet5"), *itertools.product(("cpu", "cuda"), ("lenet5", "resnet18", "resnet50", "vgg16"))],
    indirect=["place"],
)
def test_float32_gradients_agree_with_torch(place: Any, name: str) -> None:
    """By the 2-norm, for the sake of the pools' near-ties."""
    ours, theirs, x = twins(name, torch.float32)
    for model in (ours, theirs):
        smooth(model)
    expected = gradients(theirs, x)
    with place.letting("batch_norm"):
        found = place.back(gradients(place(ours), place(x)))
    for key, gradient in found.items():
        error = float((gradient - expected[key]).norm() / expected[key].norm())
        assert error <= 2e-3, f"gradient of {key or 'the input'} differs by {error:.3g} of its norm"


# Images on which torch in float32 is near torch in float64, and the share of all gradients' norm that may differ: the largest
# seen was 3e-5, and 2e-3 with GoogLeNet, where two maxima of a pool are as good as equal.
STEPPED = {
    "mobilenet_v2": ({}, (4, 3, 96, 96), 2e-4),
    "densenet121": ({}, (2, 3, 64, 64), 2e-4),
    "googlenet": ({"aux_logits": False}, (4, 3, 96, 96), 1e-2),
    "fcn_resnet50": ({"transposed": True}, (2, 3, 64, 64), 2e-4),
}


@pytest.mark.parametrize("name", STEPPED)
def test_float32_gradients_after_a_training_step_agree_with_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model takes its own step and is asked again, in float32 as users train, with the statistics of the batch."""
    options, size, share = STEPPED[name]
    monkeypatch.setitem(INPUTS, name, size)
    ours, theirs, x = twins(name, torch.float32, **options)
    before = fastconv.fallback_counts()
    found = []
    for model in (ours, theirs):
        smooth(model)
        step(model, x, lr=1e-3)
        model.zero_grad()
        torch.manual_seed(3)
        found.append(torch.cat([gradient.flatten() for gradient in gradients(model, x).values()]))
    assert fastconv.fallback_counts() == before
    error = float((found[0] - found[1]).norm() / found[1].norm())
    assert error <= share, f"gradients differ by {error:.3g} of their norm"


def test_auxiliary_heads_agree_with_torch() -> None:
    """Of Inception v3, whose head wants the full size, and without dropout; the other heads are in the training steps."""
    ours, theirs = build_twins("inception_v3", norm_shift=1.0, dropout=0.0)
    x = torch.randn(2, 3, 299, 299)
    with torch.no_grad():
        found, expected = ours.train()(x), theirs.train()(x)
    assert type(found).__name__ == "InceptionOutputs"
    for name, head, other in zip(found._fields, found, expected, strict=True):
        assert_close(head, other, 1e-4, name)


def test_transposed_head_agrees_with_torch() -> None:
    ours, theirs = build_twins("fcn_resnet50", transposed=True, residual_gain=0.2)
    x = torch.randn(1, 3, 67, 90)  # of which no stage is an even half
    calibrate_batch_norm(theirs, x)
    ours.load_state_dict(theirs.state_dict())
    before = fastconv.fallback_counts()
    with torch.no_grad():
        found, expected = ours(x), theirs(x)
    assert fastconv.fallback_counts() == before
    assert list(found) == ["out"]
    assert found["out"].shape == (1, 21, 67, 90)
    assert_close(found["out"], expected["out"], 1e-4)


def test_transposed_head_starts_as_bilinear_interpolation() -> None:
    """Of the scores at 1/32: inside, a constant map stays that constant through all three steps."""
    head = models.create("fcn_resnet50", layers=nn, transposed=True, num_classes=2).classifier
    nn.init.zeros_(head.score32.weight)
    nn.init.constant_(head.score32.bias, 3.0)
    for score in (head.score16, head.score8):
        nn.init.zeros_(score.bias)
    with torch.no_grad():
        y = head(torch.randn(1, 512, 16, 16), torch.randn(1, 1024, 8, 8), torch.randn(1, 2048, 4, 4))
    assert y.shape == (1, 2, 128, 128)
    assert_close(y[:, :, 32:-32, 32:-32], torch.full((1, 2, 64, 64), 3.0), 1e-6)


def test_stochastic_depth_drops_whole_samples() -> None:
    layer = blocks.StochasticDepth(0.25)
    x = torch.ones(4000, 1, 2, 2)
    assert layer.eval()(x) is x
    torch.manual_seed(0)
    y = layer.train()(x)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert bool((y == y[:, :, :1, :1]).all())
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.02)  # three standard deviations


@pytest.mark.parametrize(
    ("channels", "rounded"), [(3, 8), (12, 16), (33.6, 32), (36, 40), (44, 48), (10.5, 16), (76.8, 80)]
)
def test_channels_are_rounded_by_mobilenets_rule(channels: float, rounded: int) -> None:
    assert blocks.round_channels(channels) == rounded
