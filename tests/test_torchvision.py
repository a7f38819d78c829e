"""torchvision's models, where it is installed: their state_dict loads, and the outputs are theirs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import fastconv
from fastconv import models
from fastconv.commands.twins import calibrate_batch_norm


def torchvisions() -> ModuleType | None:
    """torchvision.models. One that was built for another torch raises RuntimeError, and is as good as none."""
    try:
        import torchvision.models
    except (ImportError, RuntimeError):
        return None
    return torchvision.models


THEIRS = torchvisions()
pytestmark = pytest.mark.skipif(THEIRS is None, reason="needs a torchvision that goes with this torch")

# Without auxiliary heads torchvision's GoogLeNet has none of their keys, and ours neither.
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False},
    "inception_v3": {"aux_logits": False},
    "vit_b_16": {"image_size": 32},
}
# What torchvision alone asks to be told, to spend no minute on a truncated normal distribution, and no download.
THEIR_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "fcn_resnet50": {"weights_backbone": None, "aux_loss": True},
}
SIZES = {"inception_v3": 107, "vit_b_16": 32}
# With random weights these differ from themselves by more than 1e-4 in float32, NCHW against NHWC: see models/registry.py.
IN_FLOAT64 = ("resnet50", "resnext50_32x4d", "fcn_resnet50", "inception_v3")
# Small enough to be run: one of each family, and each that differs from it in more than depth.
RUN = [
    "alexnet", "densenet121", "efficientnet_b0", "efficientnet_b5", "fcn_resnet50", "googlenet", "inception_v3",
    "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "resnet18", "resnet50", "resnext50_32x4d",
    "squeezenet1_0", "squeezenet1_1", "vgg16", "vit_b_16",
]  # fmt: skip


def theirs(name: str) -> torch.nn.Module:
    library = THEIRS.segmentation if name.startswith("fcn") else THEIRS  # type: ignore[union-attr]
    options = OPTIONS.get(name, {}) | THEIR_OPTIONS.get(name, {})
    if name.startswith("fcn"):
        options |= {"num_classes": 21}
    model: torch.nn.Module = getattr(library, name)(weights=None, **options)
    return model


@pytest.mark.parametrize("name", RUN)
def test_torchvisions_weights_give_torchvisions_outputs(name: str) -> None:
    torch.manual_seed(0)
    dtype, size = torch.float64 if name in IN_FLOAT64 else torch.float32, SIZES.get(name, 64)
    expected_of, x = theirs(name).eval().to(dtype), torch.randn(2, 3, size, size, dtype=dtype)
    calibrate_batch_norm(expected_of, x)
    if name.startswith("vit"):
        torch.nn.init.normal_(expected_of.heads.head.weight, std=0.02)  # which starts at 0
    model = models.create(name, **OPTIONS.get(name, {})).eval().to(dtype)
    model.load_state_dict(expected_of.state_dict())
    before = fastconv.fallback_counts()
    with torch.no_grad():
        found, expected = models.main_output(model(x)), models.main_output(expected_of(x))
    assert fastconv.fallback_counts() == before
    assert float((found - expected).abs().max()) <= (1e-9 if name in IN_FLOAT64 else 1e-4) * float(expected.abs().max())
