"""Convolutions of one kind, from all the networks that are known for them: what a kernel made for that kind has to be fast at.

A family is a target of ``fastconv bench`` beside the models. Its layers count as often as its networks have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from fastconv.bench.cases import Case, make
from fastconv.bench.networks import layers
from fastconv.bench.shapes import batched, parse_conv
from fastconv.testing.problems import ConvCase

# Networks that `fastconv.models` does not have: their layers for one image of 224×224, and how often they occur.
_CONVNEXT_T = {"c96h56k96r7p3g96": 3, "c192h28k192r7p3g192": 3, "c384h14k384r7p3g384": 9, "c768h7k768r7p3g768": 3}
_REGNET_X_400MF = {
    "c32h112k32r3u2p1g2": 1,
    "c64h56k64r3u2p1g4": 1,
    "c64h28k64r3p1g4": 1,
    "c160h28k160r3u2p1g10": 1,
    "c160h14k160r3p1g10": 6,
    "c400h14k400r3u2p1g25": 1,
    "c400h7k400r3p1g25": 11,
}
_REGNET_Y_1_6GF = {
    "c48h56k48r3p1g2": 1,
    "c120h28k120r3p1g5": 5,
    "c336h28k336r3u2p1g14": 1,
    "c336h14k336r3p1g14": 16,
    "c888h7k888r3p1g37": 1,
}
# The first of the two 1×1 of a unit, and the second, with three groups.
_SHUFFLENET_V1 = {
    "c240h28k60r1g3": 3,
    "c60h28k240r1g3": 3,
    "c480h14k120r1g3": 7,
    "c120h14k480r1g3": 7,
    "c960h7k240r1g3": 3,
    "c240h7k960r1g3": 3,
}
# What large-kernel networks use.
_LARGE = {"c128h56k128r13p6g128": 1, "c128h56k128r31p15g128": 1}


@dataclass(frozen=True)
class Family:
    """The convolutions of ``models`` that are ``wanted``, and those ``typed`` here: network to shape to how often."""

    models: tuple[str, ...]
    wanted: Callable[[ConvCase], bool]
    typed: dict[str, dict[str, int]] = field(default_factory=dict)

    def layers(self) -> Iterator[tuple[ConvCase, str]]:
        """(problem for one image, name of the layer) as often as each occurs. A bias makes no other problem."""
        for model in self.models:
            for op, shape, label in layers(model):
                if op == "conv2d" and isinstance(shape, ConvCase) and self.wanted(shape):
                    yield replace(shape, bias=False), f"{model} {label}"
        for network, shapes in self.typed.items():
            for text, count in shapes.items():
                for _ in range(count):
                    yield parse_conv(text), network


def _winograd(p: ConvCase) -> bool:
    return (p.R, p.S, p.stride, p.dilation, p.groups) == (3, 3, (1, 1), (1, 1), 1) and p.C >= 64 and p.H >= 14


FAMILIES = {
    "3x3": Family(("resnet18", "resnet50", "vgg16"), _winograd),
    "depthwise": Family(
        ("mobilenet_v1", "mobilenet_v2", "efficientnet_b0"),
        lambda p: p.groups == p.C > 1,
        {"convnext_t": _CONVNEXT_T, "large kernels": _LARGE},
    ),
    "grouped": Family(
        ("resnext50_32x4d",),
        lambda p: 1 < p.groups < p.C,
        {"regnet_x_400mf": _REGNET_X_400MF, "regnet_y_1_6gf": _REGNET_Y_1_6GF, "shufflenet_v1": _SHUFFLENET_V1},
    ),
    "rectangular": Family(("inception_v3",), lambda p: p.R != p.S),
    "dilated": Family(("fcn_resnet50",), lambda p: p.dilation != (1, 1)),
}
"""By the name that the command line knows."""


def family_cases(
    name: str, batches: Sequence[int], directions: Sequence[str], dtype: str, seed: int, frozen: bool = False
) -> list[Case]:
    """The distinct layers of a family, with the names of the layers that share each."""
    distinct: dict[ConvCase, list[str]] = {}
    for shape, label in FAMILIES[name].layers():
        distinct.setdefault(shape, []).append(label)
    common = {"dtype": dtype, "seed": seed, "frozen": frozen}
    return [
        make("conv2d", batched(shape, batch), direction, **common, labels=list(labels))
        for batch in batches
        for direction in directions
        for shape, labels in distinct.items()
    ]
