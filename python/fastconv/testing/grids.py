"""The problems every kernel is tested on: small ones at the edges of every tile, and every option at least once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import cycle

from fastconv.testing.attention import sdpa_grid
from fastconv.testing.batch_norm import batch_norm_grid
from fastconv.testing.norm import norm_grid
from fastconv.testing.problems import LAYOUTS, Case, ConvCase, PoolCase
from fastconv.testing.recurrent import recurrent_grid

# Around the widths of vectors (4, 8, 16 lanes), of register tiles (14, 28, 32, 48, 64) and their remainders.
EDGES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65)
PIXELS = (1, 2, 3, 5, 7, 8, 11, 13, 14, 15, 16, 17, 27, 28, 29, 31, 32, 33, 49, 57)
PUBLIC = ("nchw", "nhwc")


def _conv_tiles() -> Iterator[ConvCase]:
    """Channels and pixels around the edges of tiles, as 1x1 and as padded 3x3."""
    for layout in PUBLIC:
        for edge in EDGES:
            yield ConvCase(1, 5, 3, 5, edge, 1, 1, layout=layout)
            yield ConvCase(2, edge, 3, 5, 6, 1, 1, layout=layout)
            yield ConvCase(1, edge, 4, 5, 7, 3, 3, pad4=(1, 1, 1, 1), layout=layout)
            yield ConvCase(1, 3, 4, 5, edge, 3, 3, pad4=(1, 1, 1, 1), layout=layout)
        for width in PIXELS:
            yield ConvCase(1, 3, 1, width, 17, 1, 1, layout=layout)
            yield ConvCase(2, 3, 2, width, 5, 3, 3, pad4=(1, 1, 1, 1), layout=layout)
            yield ConvCase(1, 2, 3, 2 * width + 1, 9, 3, 3, stride=(2, 2), pad4=(1, 1, 1, 1), layout=layout)
        # Several blocks of everything that kernels cut up: the reduction, the filters, the pixels.
        yield ConvCase(1, 1100, 3, 5, 40, 1, 1, layout=layout)
        yield ConvCase(1, 20, 3, 5, 600, 1, 1, layout=layout)
        yield ConvCase(1, 12, 39, 45, 24, 1, 1, layout=layout)
        yield ConvCase(3, 7, 24, 27, 10, 3, 3, pad4=(1, 1, 1, 1), layout=layout)
        yield ConvCase(1, 130, 12, 12, 70, 3, 3, pad4=(1, 1, 1, 1), layout=layout)
        for reduction in (257, 520):
            yield ConvCase(1, reduction, 2, 4, 33, 1, 1, layout=layout)
            yield ConvCase(1, reduction, 3, 3, 18, 3, 3, pad4=(1, 1, 1, 1), layout=layout)
        yield ConvCase(3, 65, 7, 7, 66, 1, 1, layout=layout)
        yield ConvCase(2, 20, 9, 11, 130, 3, 3, pad4=(1, 1, 1, 1), layout=layout)
        yield ConvCase(2, 9, 30, 28, 12, 3, 3, pad4=(1, 1, 1, 1), layout=layout)


def _conv_geometry() -> Iterator[ConvCase]:
    """Filters, strides, paddings, dilations: alone and against each other."""
    same = (1, 1, 1, 1)
    shapes = [
        ConvCase(2, 4, 8, 9, 6, 1, 1, stride=(2, 2)),
        ConvCase(1, 4, 8, 9, 6, 1, 1, stride=(3, 2)),
        ConvCase(1, 4, 7, 6, 6, 1, 1, pad4=same),
        ConvCase(1, 4, 7, 6, 6, 1, 1, stride=(2, 2), pad4=(2, 1, 0, 3)),
        ConvCase(1, 5, 6, 8, 7, 1, 3, pad4=(0, 0, 1, 1)),
        ConvCase(1, 5, 8, 6, 7, 3, 1, pad4=(1, 1, 0, 0)),
        ConvCase(1, 5, 4, 12, 7, 1, 7, pad4=(0, 0, 3, 3)),
        ConvCase(1, 5, 12, 4, 7, 7, 1, pad4=(3, 3, 0, 0)),
        ConvCase(1, 3, 9, 8, 8, 2, 2),
        ConvCase(1, 3, 9, 8, 8, 2, 2, stride=(2, 2)),
        ConvCase(1, 3, 8, 8, 8, 4, 4, stride=(4, 4)),
        ConvCase(1, 3, 9, 9, 8, 2, 2, stride=(3, 3)),
        ConvCase(2, 3, 8, 8, 8, 3, 3),
        ConvCase(2, 3, 8, 9, 8, 3, 3, stride=(2, 2), pad4=same),
        ConvCase(2, 3, 10, 9, 8, 3, 3, stride=(3, 3), pad4=same),
        ConvCase(1, 3, 10, 9, 8, 3, 3, stride=(1, 2), pad4=same),
        ConvCase(1, 3, 10, 9, 8, 3, 3, stride=(2, 1), pad4=same),
        ConvCase(1, 3, 11, 9, 8, 3, 3, stride=(1, 3), pad4=(0, 1, 2, 0)),
        ConvCase(1, 3, 9, 10, 8, 5, 5, pad4=(2, 2, 2, 2)),
        ConvCase(1, 3, 9, 10, 8, 5, 5, stride=(2, 2), pad4=(2, 2, 2, 2)),
        ConvCase(1, 3, 9, 10, 8, 5, 3, pad4=(2, 2, 1, 1)),
        ConvCase(2, 19, 11, 14, 35, 5, 5, pad4=(2, 2, 2, 2), bias=True),
        ConvCase(1, 70, 9, 13, 66, 5, 5, pad4=(1, 2, 0, 3)),
        ConvCase(1, 12, 8, 9, 34, 5, 5, pad4=(4, 4, 4, 4), groups=2),
        ConvCase(2, 19, 11, 12, 35, 7, 7, pad4=(3, 3, 3, 3), bias=True),
        ConvCase(1, 66, 9, 10, 70, 7, 7, pad4=(0, 3, 2, 1)),
        ConvCase(1, 18, 4, 5, 17, 7, 7, pad4=(6, 6, 3, 4)),
        ConvCase(2, 3, 17, 19, 18, 7, 7, stride=(2, 2), pad4=(3, 3, 3, 3)),
        ConvCase(1, 3, 9, 9, 8, 7, 7, pad4=(3, 3, 3, 3)),
        ConvCase(1, 2, 12, 13, 4, 11, 11, stride=(4, 4), pad4=(2, 2, 2, 2)),
        ConvCase(1, 3, 9, 11, 8, 3, 3, pad4=(2, 2, 2, 2), dilation=(2, 2)),
        ConvCase(1, 3, 9, 11, 8, 3, 3, pad4=(1, 1, 3, 3), dilation=(1, 3)),
        ConvCase(1, 3, 11, 9, 8, 3, 3, pad4=(3, 3, 1, 1), dilation=(3, 1)),
        ConvCase(1, 3, 11, 12, 8, 3, 3, stride=(2, 2), pad4=(2, 2, 2, 2), dilation=(2, 2)),
        ConvCase(1, 3, 12, 11, 8, 3, 3, stride=(3, 2), pad4=(2, 0, 3, 1), dilation=(2, 3)),
        ConvCase(1, 3, 12, 11, 8, 2, 3, stride=(2, 3), pad4=(1, 1, 2, 2), dilation=(4, 2)),
        ConvCase(1, 3, 7, 6, 8, 3, 3, pad4=(0, 1, 0, 1)),  # TensorFlow's SAME
        ConvCase(1, 3, 7, 6, 8, 3, 3, pad4=(2, 0, 1, 3)),
        ConvCase(1, 3, 7, 6, 8, 3, 3, pad4=(0, 0, 4, 0)),
        ConvCase(1, 3, 9, 9, 8, 3, 3, pad4=(-1, -1, -1, -1)),
        ConvCase(1, 3, 9, 9, 8, 3, 3, stride=(2, 2), pad4=(-2, 1, 1, -2)),
        ConvCase(1, 3, 9, 9, 8, 1, 1, pad4=(-1, 0, -3, 2)),
        ConvCase(1, 3, 5, 5, 8, 3, 3, pad4=(4, 5, 6, 3)),  # whole windows in the padding
        ConvCase(1, 3, 5, 5, 8, 3, 3, stride=(2, 2), pad4=(5, 4, 3, 6), dilation=(2, 2)),
        ConvCase(1, 3, 2, 2, 8, 1, 1, pad4=(2, 3, 1, 4)),
        ConvCase(1, 3, 2, 3, 8, 5, 7, pad4=(3, 3, 3, 3)),  # the filter is larger than the input
        ConvCase(2, 3, 1, 1, 8, 3, 3, pad4=same),
        ConvCase(1, 3, 1, 5, 8, 3, 3, pad4=same),
        ConvCase(1, 3, 5, 1, 8, 3, 3, stride=(2, 2), pad4=same),
        ConvCase(1, 3, 3, 3, 8, 3, 3),  # one output
        ConvCase(3, 1, 3, 4, 1, 3, 4),
        ConvCase(1, 3, 8, 8, 8, 3, 3, stride=(2, 2)),  # a last row and column that no window reads
        ConvCase(1, 3, 11, 10, 8, 3, 2, stride=(4, 5)),
        ConvCase(1, 3, 6, 7, 8, 3, 3, stride=(7, 7)),  # the stride is larger than the input
        ConvCase(1, 1, 28, 28, 6, 5, 5, pad4=(2, 2, 2, 2)),  # LeNet
        ConvCase(2, 64, 1, 1, 10, 1, 1),  # a classifier
        # What FCN's heads, read backwards, ask of an input gradient: 8, 16 and 32 times the pixels.
        ConvCase(1, 6, 24, 29, 5, 16, 16, stride=(8, 8), pad4=(4, 4, 4, 4)),
        ConvCase(1, 3, 48, 33, 5, 32, 32, stride=(16, 16), pad4=(8, 8, 8, 8)),
        ConvCase(1, 2, 64, 70, 3, 64, 64, stride=(32, 32), pad4=(16, 16, 16, 16)),
        ConvCase(1, 24, 1, 40, 17, 1, 5, pad4=(0, 0, 2, 2)),  # one-dimensional
        ConvCase(1, 24, 1, 40, 17, 1, 3, stride=(1, 2), pad4=(0, 0, 1, 1), dilation=(1, 2)),
    ]
    for layout in PUBLIC:
        for shape in shapes:
            yield _with(shape, layout=layout)


def _conv_groups() -> Iterator[ConvCase]:
    """Groups, and depthwise in its forms: multiplier, stride, dilation, channels around vector widths."""
    same = (1, 1, 1, 1)
    for layout in PUBLIC:
        for groups, c, k in ((2, 6, 4), (2, 34, 66), (3, 9, 12), (4, 64, 64), (5, 5, 15), (8, 8, 16), (16, 32, 16)):
            yield ConvCase(2, c, 5, 6, k, 3, 3, pad4=same, groups=groups, layout=layout)
            yield ConvCase(1, c, 5, 6, k, 1, 1, groups=groups, layout=layout)
        for c in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65):
            yield ConvCase(2, c, 5, 6, c, 3, 3, pad4=same, groups=c, layout=layout)
        for width in PIXELS:
            yield ConvCase(1, 4, 3, width, 4, 3, 3, pad4=same, groups=4, layout=layout)
        for stride in ((2, 2), (1, 2), (3, 1)):
            yield ConvCase(2, 18, 9, 11, 18, 3, 3, stride=stride, pad4=same, groups=18, layout=layout)
        yield ConvCase(1, 18, 9, 34, 18, 3, 3, stride=(2, 2), pad4=(0, 1, 0, 1), groups=18, layout=layout)
        yield ConvCase(1, 18, 9, 9, 18, 3, 3, pad4=(2, 2, 2, 2), dilation=(2, 2), groups=18, layout=layout)
        yield ConvCase(1, 18, 9, 40, 18, 5, 5, pad4=(2, 2, 2, 2), groups=18, layout=layout)
        yield ConvCase(1, 18, 9, 20, 18, 7, 7, pad4=(3, 3, 3, 3), groups=18, layout=layout)
        yield ConvCase(1, 18, 9, 9, 18, 1, 7, pad4=(0, 0, 3, 3), groups=18, layout=layout)
        yield ConvCase(1, 18, 9, 20, 18, 7, 1, pad4=(3, 3, 0, 0), groups=18, layout=layout)
        yield ConvCase(1, 18, 9, 9, 18, 3, 3, pad4=(3, -1, 4, 2), groups=18, layout=layout)
        yield ConvCase(1, 18, 4, 5, 18, 1, 1, groups=18, layout=layout)
        yield ConvCase(1, 18, 2, 2, 18, 5, 5, pad4=(2, 2, 2, 2), groups=18, layout=layout)
        # Whole vectors of channels, whose pixels are read where they lie: each width of a tile, last tiles that overlap, clipped
        # windows on every side.
        for c, width in ((32, 7), (48, 9), (16, 16), (32, 33)):
            yield ConvCase(2, c, 4, width, c, 3, 3, pad4=same, groups=c, layout=layout)
        yield ConvCase(1, 32, 7, 29, 32, 3, 3, stride=(2, 2), pad4=(1, 0, 0, 1), groups=32, layout=layout)
        yield ConvCase(1, 16, 3, 20, 16, 3, 3, pad4=(2, 2, 2, 3), groups=16, layout=layout)
        yield ConvCase(1, 16, 9, 31, 16, 5, 5, stride=(2, 2), pad4=(2, 2, 2, 2), groups=16, layout=layout)
        # Filter gradients of them: several runs of a row, an odd last row, sums and pieces that end inside a sample, no padding.
        yield ConvCase(2, 32, 21, 61, 32, 3, 3, pad4=same, groups=32, layout=layout, bias=True)
        yield ConvCase(1, 16, 6, 117, 16, 3, 3, stride=(2, 2), pad4=(2, 0, 1, 1), groups=16, layout=layout)
        yield ConvCase(1, 32, 1, 1, 32, 3, 3, pad4=same, groups=32, layout=layout)
        yield ConvCase(1, 16, 5, 8, 16, 3, 3, groups=16, layout=layout)
        yield ConvCase(2, 48, 3, 9, 48, 1, 1, groups=48, layout=layout)
        yield ConvCase(1, 6, 7, 8, 18, 3, 3, pad4=same, groups=6, layout=layout)
        yield ConvCase(1, 17, 7, 8, 34, 5, 3, stride=(2, 1), pad4=(2, 2, 1, 1), groups=17, layout=layout)
        # Filters wider than a block of taps, and what is left of them: 8 + 4 + 1, 8 + 2, 4.
        yield ConvCase(1, 18, 7, 17, 18, 3, 13, pad4=(1, 1, 6, 6), groups=18, layout=layout, bias=True)
        yield ConvCase(1, 18, 12, 15, 18, 10, 10, stride=(1, 2), pad4=(5, 4, 5, 4), groups=18, layout=layout)
        yield ConvCase(2, 6, 5, 29, 12, 1, 4, pad4=(0, 0, 2, 1), groups=6, layout=layout)
        yield ConvCase(1, 17, 3, 15, 17, 31, 31, pad4=(15, 15, 15, 15), groups=17, layout=layout)
        yield ConvCase(1, 17, 4, 15, 17, 33, 35, pad4=(16, 16, 17, 17), groups=17, layout=layout)
        # Dilated columns that are taken apart, the last of a residue missing.
        yield ConvCase(1, 18, 9, 29, 18, 3, 3, pad4=(2, 2, 2, 2), dilation=(2, 2), groups=18, layout=layout, bias=True)
        yield ConvCase(1, 18, 5, 40, 18, 1, 5, pad4=(0, 0, 6, 6), dilation=(1, 3), groups=18, layout=layout)
        # Planes of several blocks of rows.
        yield ConvCase(1, 3, 112, 113, 3, 3, 3, stride=(2, 2), pad4=same, groups=3, layout=layout)
        yield ConvCase(2, 3, 100, 90, 3, 5, 3, pad4=(2, 2, 0, 2), groups=3, layout=layout)
        # Groups of 64 channels and more, which the dense kernels take one after the other.
        yield ConvCase(1, 128, 5, 9, 128, 3, 3, pad4=same, groups=2, layout=layout)
        yield ConvCase(1, 144, 5, 9, 96, 3, 3, pad4=same, groups=2, layout=layout, bias=True)
        # Groups of a few channels: one load and a permutation, several pieces, one group for a vector, unequal, wide.
        for groups, c, k in ((9, 36, 36), (5, 40, 40), (3, 72, 72), (2, 34, 38), (6, 12, 48), (7, 42, 14), (2, 64, 64)):
            yield ConvCase(2, c, 6, 15, k, 3, 3, pad4=same, groups=groups, layout=layout, bias=True)
        yield ConvCase(1, 36, 9, 30, 36, 3, 3, stride=(2, 2), pad4=same, groups=9, layout=layout)
        yield ConvCase(1, 36, 9, 29, 36, 3, 3, pad4=(2, 2, 2, 2), dilation=(2, 2), groups=9, layout=layout)
        yield ConvCase(1, 20, 12, 31, 20, 5, 9, pad4=(2, 2, 4, 4), groups=5, layout=layout)


def _conv_layouts() -> Iterator[ConvCase]:
    """Every stride pattern, on a 1x1, a 3x3, a strided, a grouped and a depthwise problem."""
    same = (1, 1, 1, 1)
    for layout in LAYOUTS:
        yield ConvCase(2, 19, 4, 5, 21, 1, 1, layout=layout)
        yield ConvCase(2, 17, 5, 7, 18, 3, 3, pad4=same, layout=layout, bias=True)
        yield ConvCase(2, 5, 8, 9, 7, 3, 2, stride=(2, 3), pad4=(1, 0, 2, 1), layout=layout)
        yield ConvCase(2, 6, 5, 6, 10, 3, 3, pad4=same, groups=2, layout=layout)
        yield ConvCase(2, 19, 6, 21, 19, 3, 3, pad4=same, groups=19, layout=layout, bias=True)


def _conv_epilogues() -> Iterator[ConvCase]:
    same = (1, 1, 1, 1)
    activations = cycle(("none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "sigmoid"))
    for layout in (*PUBLIC, "mixed", "slice"):
        for shape in (
            ConvCase(2, 9, 4, 5, 35, 1, 1),
            ConvCase(2, 9, 5, 6, 19, 3, 3, pad4=same),
            ConvCase(1, 4, 7, 8, 18, 3, 3, stride=(2, 2), pad4=same),
            ConvCase(1, 8, 5, 6, 12, 3, 3, pad4=same, groups=4),
            ConvCase(2, 19, 5, 20, 19, 3, 3, pad4=same, groups=19),
            ConvCase(1, 32, 4, 9, 32, 3, 3, pad4=same, groups=32),
        ):
            for bias, residual in ((True, False), (False, True), (True, True)):
                yield _with(shape, layout=layout, bias=bias, residual=residual, activation=next(activations))
    for layout in PUBLIC:
        for _ in range(8):
            yield ConvCase(1, 6, 3, 11, 20, 3, 3, pad4=same, layout=layout, activation=next(activations))
            yield ConvCase(1, 6, 3, 11, 20, 1, 1, layout=layout, bias=True, activation=next(activations))
            yield ConvCase(1, 17, 3, 11, 17, 3, 3, pad4=same, groups=17, layout=layout, activation=next(activations))


def _conv_networks() -> Iterator[ConvCase]:
    """ResNet-50's kinds of layers and MobileNet's, with sizes cut."""
    same = (1, 1, 1, 1)
    for layout in PUBLIC:
        yield ConvCase(1, 3, 32, 32, 64, 7, 7, stride=(2, 2), pad4=(3, 3, 3, 3), layout=layout)
        yield ConvCase(1, 64, 14, 14, 64, 1, 1, layout=layout)
        yield ConvCase(1, 64, 14, 14, 64, 3, 3, pad4=same, layout=layout)
        yield ConvCase(1, 64, 8, 8, 128, 1, 1, stride=(2, 2), layout=layout)
        yield ConvCase(1, 32, 14, 14, 32, 3, 3, stride=(2, 2), pad4=same, layout=layout)
        yield ConvCase(2, 128, 7, 7, 64, 1, 1, layout=layout)
        yield ConvCase(1, 96, 7, 7, 96, 3, 3, pad4=same, layout=layout)
        yield ConvCase(1, 32, 14, 14, 32, 3, 3, pad4=same, groups=32, layout=layout)
        yield ConvCase(1, 48, 15, 15, 48, 5, 5, stride=(2, 2), pad4=(2, 2, 2, 2), groups=48, layout=layout)


def layers() -> tuple[ConvCase, ...]:
    """Kinds of layers of ResNet-50 and MobileNet at their real sizes, one image."""
    same = (1, 1, 1, 1)
    shapes = [ConvCase(1, 3, 224, 224, 64, 7, 7, stride=(2, 2), pad4=(3, 3, 3, 3))]
    for c, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        shapes += [
            ConvCase(1, 4 * c, size, size, c, 1, 1),
            ConvCase(1, c, size, size, c, 3, 3, pad4=same),
            ConvCase(1, c, size, size, 4 * c, 1, 1),
            ConvCase(1, c, size, size, c, 3, 3, pad4=same, groups=c),
        ]
    for c, size in ((128, 56), (256, 28), (512, 14)):
        shapes += [
            ConvCase(1, c, size, size, c, 3, 3, stride=(2, 2), pad4=same),
            ConvCase(1, 2 * c, size, size, 4 * c, 1, 1, stride=(2, 2)),
        ]
    return tuple(_with(shape, layout=layout) for layout in PUBLIC for shape in shapes)


def _with(case: ConvCase, **changes: object) -> ConvCase:
    return replace(case, **changes)  # type: ignore[arg-type]


def _pools() -> Iterator[PoolCase]:
    same = (1, 1, 1, 1)
    for layout in PUBLIC:
        for c in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65):
            yield PoolCase(2, c, 5, 7, 2, 2, stride=(2, 2), layout=layout)
            yield PoolCase(1, c, 5, 6, 3, 3, stride=(1, 1), pad4=same, layout=layout)
        for width in PIXELS:
            yield PoolCase(1, 3, 3, width, 3, 3, stride=(1, 1), pad4=same, layout=layout)
            yield PoolCase(1, 2, 4, 2 * width + 1, 3, 3, stride=(2, 2), pad4=same, layout=layout)
            yield PoolCase(1, 2, 4, 2 * width, 2, 2, stride=(2, 2), layout=layout)
        for ceil in (False, True):
            yield PoolCase(2, 5, 8, 9, 3, 3, stride=(2, 2), layout=layout, ceil=ceil)
            yield PoolCase(2, 5, 8, 9, 3, 3, stride=(2, 2), pad4=same, layout=layout, ceil=ceil)
            yield PoolCase(1, 5, 7, 10, 3, 2, stride=(2, 3), pad4=(1, 1, 0, 0), layout=layout, ceil=ceil)
            yield PoolCase(1, 5, 10, 11, 2, 2, stride=(3, 3), pad4=same, layout=layout, ceil=ceil)
            yield PoolCase(1, 5, 10, 11, 4, 5, stride=(3, 2), pad4=(2, 1, 1, 2), layout=layout, ceil=ceil)
            yield PoolCase(1, 5, 11, 12, 3, 3, stride=(2, 2), pad4=same, dilation=(2, 2), layout=layout, ceil=ceil)
            yield PoolCase(
                1, 5, 12, 11, 2, 3, stride=(1, 2), pad4=(0, 0, 1, 1), dilation=(3, 2), layout=layout, ceil=ceil
            )
            yield PoolCase(1, 5, 9, 40, 3, 3, stride=(1, 1), pad4=same, dilation=(2, 3), layout=layout, ceil=ceil)
            yield PoolCase(1, 5, 9, 8, 3, 3, stride=(2, 2), pad4=same, layout=layout, ceil=ceil, include_pad=False)
            yield PoolCase(1, 5, 9, 38, 3, 3, stride=(1, 1), pad4=same, layout=layout, ceil=ceil, include_pad=False)
            yield PoolCase(1, 5, 9, 8, 3, 3, stride=(2, 2), pad4=same, layout=layout, ceil=ceil, divisor=5)
            yield PoolCase(
                1, 5, 9, 8, 3, 3, stride=(2, 2), pad4=same, layout=layout, ceil=ceil, divisor=-2, include_pad=False
            )
        yield PoolCase(2, 17, 7, 7, 7, 7, layout=layout)  # global
        yield PoolCase(1, 17, 3, 1, 3, 1, layout=layout)
        yield PoolCase(1, 5, 6, 6, 1, 1, layout=layout)
        yield PoolCase(1, 5, 6, 6, 1, 1, stride=(2, 3), layout=layout)
        yield PoolCase(1, 5, 1, 40, 1, 3, stride=(1, 2), pad4=(0, 0, 1, 1), layout=layout)  # one-dimensional
        yield PoolCase(1, 5, 9, 9, 2, 2, stride=(5, 4), layout=layout)
        yield PoolCase(1, 5, 20, 20, 9, 11, stride=(3, 3), pad4=(4, 4, 5, 5), layout=layout)
        yield PoolCase(1, 16, 16, 16, 3, 3, stride=(2, 2), pad4=same, layout=layout)  # ResNet's
        for size, out in (
            ((7, 7), (1, 1)),
            ((8, 9), (3, 4)),
            ((5, 6), (5, 6)),
            ((3, 2), (7, 5)),
            ((14, 13), (7, 1)),
            ((1, 1), (3, 3)),
        ):
            yield PoolCase(2, 9, *size, adaptive=out, layout=layout)
        for c in (1, 16, 33, 64):
            yield PoolCase(1, c, 6, 20, adaptive=(1, 1), layout=layout)
            yield PoolCase(1, c, 6, 20, adaptive=(4, 8), layout=layout)
    for layout in LAYOUTS:
        yield PoolCase(2, 19, 6, 7, 3, 3, stride=(2, 2), pad4=same, layout=layout, ceil=True)
        yield PoolCase(2, 5, 6, 37, 3, 2, stride=(1, 1), pad4=(1, 1, 1, 0), layout=layout)
        yield PoolCase(2, 5, 6, 37, 2, 2, stride=(2, 2), pad4=(0, 1, 1, 0), layout=layout, include_pad=False)
        yield PoolCase(2, 19, 6, 7, adaptive=(4, 3), layout=layout)


@cache
def conv_grid() -> tuple[ConvCase, ...]:
    """Every convolution problem of the tests, without duplicates."""
    parts = (_conv_tiles(), _conv_geometry(), _conv_groups(), _conv_layouts(), _conv_epilogues(), _conv_networks())
    return tuple(dict.fromkeys(case for part in parts for case in part))


@cache
def pool_grid() -> tuple[PoolCase, ...]:
    """Every pooling problem of the tests, without duplicates."""
    return tuple(dict.fromkeys(_pools()))


@cache
def grid(op: str) -> tuple[Case, ...]:
    """The problems of an op."""
    grids: dict[str, Callable[[], tuple[Case, ...]]] = {
        "conv2d": conv_grid,
        "sdpa": sdpa_grid,
        "layer_norm": norm_grid,
        "batch_norm": batch_norm_grid,
        "lstm": recurrent_grid,
        "gru": recurrent_grid,
    }
    cases = next((make for name, make in grids.items() if op.startswith(name)), pool_grid)()
    return tuple(case for case in cases if op in case.ops)
