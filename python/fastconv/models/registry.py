"""The list of reference models: every name, how it is built, what it eats.

Networks for images have a row each, since commands and tests run them on images of the size that they were designed for;
those for sequences have only a name and a builder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from fastconv.models import (
    alexnet,
    bert,
    densenet,
    efficientnet,
    fcn,
    googlenet,
    gpt2,
    inception_v3,
    lenet,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    recurrent,
    resnet,
    squeezenet,
    transformer,
    vgg,
    vit,
    xception,
)
from fastconv.models.layers import Layers


@dataclass(frozen=True)
class ModelSpec:
    """One reference model.

    ``build(layers, **config)`` makes it; ``in_channels`` and ``input_size`` (height, width in pixels) describe the
    image it was designed for. ``well_conditioned`` are keywords under which random weights make a network whose output
    does not hang on the last bit of its input, so that two backends can be compared without a trained checkpoint.
    """

    build: Callable[..., nn.Module]
    in_channels: int
    input_size: tuple[int, int]
    well_conditioned: Mapping[str, Any] = field(default_factory=dict)


# At a gain of 1, PyTorch differs from itself (NCHW against NHWC) by 2e-4 of the largest logit on a random ResNet-152;
# at 0.2 by 2e-6, as trained networks do.
_TAME = {"residual_gain": 0.2}
# Where no residual path carries the numbers past the layers: Inception v3 at 299×299 differs from itself by 6e-5 at a shift of 0,
# by 2e-6 at 1.
_SHIFTED = {"norm_shift": 1.0}


_PHOTOS: tuple[Mapping[str, Callable[..., nn.Module]], ...] = (
    vgg.VARIANTS,
    alexnet.VARIANTS,
    squeezenet.VARIANTS,
    densenet.VARIANTS,
    mobilenet_v1.VARIANTS,
    mobilenet_v2.VARIANTS,
    mobilenet_v3.VARIANTS,
)

_SPECS: dict[str, ModelSpec] = {
    **{name: ModelSpec(build, 1, (32, 32)) for name, build in lenet.VARIANTS.items()},
    **{name: ModelSpec(build, 3, (224, 224), _TAME) for name, build in resnet.VARIANTS.items()},
    **{name: ModelSpec(build, 3, (224, 224)) for variants in _PHOTOS for name, build in variants.items()},
    **{name: ModelSpec(build, 3, (224, 224), _SHIFTED) for name, build in googlenet.VARIANTS.items()},
    **{name: ModelSpec(build, 3, (299, 299), _SHIFTED) for name, build in inception_v3.VARIANTS.items()},
    **{name: ModelSpec(build, 3, (299, 299), _TAME) for name, build in xception.VARIANTS.items()},
    **{
        name: ModelSpec(build, 3, (efficientnet.SCALES[name][-1],) * 2) for name, build in efficientnet.VARIANTS.items()
    },
    **{name: ModelSpec(build, 3, (224, 224), _TAME) for name, build in fcn.VARIANTS.items()},
    **{name: ModelSpec(build, 3, (224, 224), {"head_std": 0.02}) for name, build in vit.VARIANTS.items()},
}

_SEQUENCES: dict[str, Callable[..., nn.Module]] = {
    **transformer.VARIANTS,
    **gpt2.VARIANTS,
    **bert.VARIANTS,
    **recurrent.VARIANTS,
}


def names(kind: Literal["image", "sequence"] = "image") -> list[str]:
    """Names that :func:`create` knows, of the networks for images (smallest of each family first) or for sequences."""
    return list(_SEQUENCES if kind == "sequence" else _SPECS)


def spec(name: str) -> ModelSpec:
    """The row of a network for images. ValueError, listing the known names, if there is none."""
    if name in _SEQUENCES:
        raise ValueError(f"{name} reads sequences and not images; for images fastconv has {', '.join(_SPECS)}")
    try:
        return _SPECS[name]
    except KeyError:
        every = ", ".join([*_SPECS, *_SEQUENCES])
        raise ValueError(f"no model named {name!r}; fastconv has {every}") from None


def create(name: str, layers: Layers | None = None, **config: Any) -> nn.Module:
    """Build a reference model with freshly initialised weights, in training mode as torch's modules are.

    Args:
        name: one of :func:`names`, of either kind.
        layers: namespace that Conv2d, Linear and the pools come from; ``fastconv.nn`` when left out,
            ``layers=torch.nn`` builds the same network on PyTorch, with the same keys in its ``state_dict``.
        config: the family's keywords; every network for images takes ``num_classes`` and ``in_channels``.

    Raises:
        ValueError: unknown name. TypeError: a keyword that the family does not have.
    """
    build = _SEQUENCES[name] if name in _SEQUENCES else spec(name).build
    if layers is None:
        from fastconv import nn as layers
    return build(layers, **config)
