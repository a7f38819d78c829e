#!/usr/bin/env python3
"""What Winograd's kernels lose on a network's own activations.

    winograd_error.py [MODEL …]      default: resnet18 vgg16 alexnet

A photograph goes through the network, and every convolution of stride 1 that they accept is computed by each of them from the
input that it gets there, and compared with float64. The weights are the model's start, batch norms have the photograph's
statistics. For each algorithm: over how many layers, the relative L2 error (least, geometric mean, largest), and how many times
the error of a plain sum that is, the kernel `direct`. Needs the extra `demo`, for the photograph.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastconv
from fastconv import models
from fastconv.bench.runner import error_of
from fastconv.commands.photo import open_photo, photo_batch
from fastconv.commands.twins import calibrate_batch_norm
from fastconv.testing.timing import geometric_mean

ALGORITHMS = sorted({k.algorithm for k in fastconv.kernels("conv2d_fwd") if k.algorithm.startswith("winograd")})
Errors = tuple[float, float]  # of an algorithm, and of a plain sum


def activations(name: str) -> list[tuple[nn.Conv2d, Tensor]]:
    """The convolutions of stride 1 of a network on the photograph, each with its input."""
    spec = models.spec(name)
    torch.manual_seed(0)
    network = models.create(name, layers=nn, **spec.well_conditioned).eval()
    image = photo_batch(open_photo(None), 1, spec.in_channels, spec.input_size)
    calibrate_batch_norm(network, image)
    found: list[tuple[nn.Conv2d, Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        # A copy: the activation behind may be in place.
        found.append((layer, inputs[0].clone(memory_format=torch.channels_last)))

    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.stride == (1, 1) and module.kernel_size[0] > 1:
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        network(image)
    return found


def errors(layer: nn.Conv2d, x: Tensor) -> dict[str, Errors]:
    """Relative L2 error of each algorithm that takes this layer, and that of a plain sum."""
    w = layer.weight.detach().contiguous(memory_format=torch.channels_last)
    assert not isinstance(layer.padding, str)
    padding, dilation = (layer.padding[0], layer.padding[1]), (layer.dilation[0], layer.dilation[1])
    truth = F.conv2d(x.double(), w.double(), None, 1, padding, dilation, layer.groups)

    def error(algorithm: str) -> float:
        with fastconv.use(conv2d_fwd=algorithm):
            y = fastconv.functional.conv2d(x, w, None, 1, padding, dilation, layer.groups)
        return float(error_of(y, truth)["rel_l2"])

    plain, found = error("direct"), {}
    for algorithm in ALGORITHMS:
        try:
            found[algorithm] = (error(algorithm), plain)
        except NotImplementedError:
            continue  # a filter of another size
    return found


def main(names: Sequence[str]) -> None:
    table = Table("network", "algorithm", "layers", "relative L2 error", "× a plain sum's")
    for name in names:
        by_algorithm: dict[str, list[Errors]] = defaultdict(list)
        for layer, x in activations(name):
            for algorithm, pair in errors(layer, x).items():
                by_algorithm[algorithm].append(pair)
        for algorithm, pairs in sorted(by_algorithm.items()):
            values, growths = [error for error, _ in pairs], [error / plain for error, plain in pairs]
            figures = [f"{min(v):.2g} … {geometric_mean(v):.2g} … {max(v):.2g}" for v in (values, growths)]
            table.add_row(name, algorithm, str(len(pairs)), *figures)
    Console(width=120).print(table)


if __name__ == "__main__":
    main(sys.argv[1:] or ["resnet18", "vgg16", "alexnet"])
