"""One network on two backends: built with the same weights, run on the same input, timed side by side."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fastconv
from fastconv import models
from fastconv.plan import observe

# The layers that fastconv has kernels for; every other module counts as "the rest" on both sides.
TIMED_LAYERS = (
    nn.Conv2d,
    nn.Linear,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.LayerNorm,
    nn.MultiheadAttention,
)


@dataclass
class Layer:
    """One layer of the network: what ran it and the median seconds it took on each backend."""

    name: str
    kind: str
    output: tuple[int, ...]
    kernels: list[str]
    fastconv_s: float = 0.0
    torch_s: float = 0.0


@dataclass
class Comparison:
    """Outputs, times and fallbacks of one network on fastconv and on torch. Seconds are medians over the rounds."""

    y: Tensor
    y_torch: Tensor
    layers: list[Layer]
    fastconv_s: float
    torch_s: float
    fallbacks: dict[str, int]

    @property
    def max_error(self) -> float:
        """Largest absolute difference of an output; NaN where either side has one."""
        return float((self.y.double() - self.y_torch.double()).abs().max())

    @property
    def unserved(self) -> list[str]:
        """Names of layers in which no kernel of fastconv's ran."""
        return [layer.name for layer in self.layers if not layer.kernels]

    @property
    def scale(self) -> float:
        """Torch's largest absolute output, which errors are measured against."""
        return float(self.y_torch.double().abs().max())

    def agrees(self, limit: float) -> bool:
        """Whether ``max_error`` is at most ``limit`` times ``scale``, and both are numbers."""
        return math.isfinite(self.scale) and self.max_error <= limit * self.scale


def build_twins(name: str, seed: int = 0, **config: Any) -> tuple[nn.Module, nn.Module]:
    """The model on fastconv's layers and on torch's, with the same freshly drawn weights, in eval mode."""
    torch.manual_seed(seed)
    model = models.create(name, **config).eval()
    with torch.device("meta"):
        twin = models.create(name, layers=nn, **config).eval()
    twin.load_state_dict({key: tensor.clone() for key, tensor in model.state_dict().items()}, assign=True)
    return model, twin


def calibrate_batch_norm(model: nn.Module, x: Tensor) -> int:
    """Set every BatchNorm's running statistics to those of ``x``; returns how many there were.

    With random weights and the initial statistics (mean 0, variance 1) each residual block doubles the variance of
    its input, and after fifty blocks a comparison of logits would see little else than that growth.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return len(norms)


def count_fallbacks() -> Counter[str]:
    """How often each op went to torch so far, and why; subtract two of these to see what went on in between."""
    counts = fastconv.fallback_counts()
    return Counter({key if isinstance(key, str) else ": ".join(map(str, key)): n for key, n in counts.items()})


def compare(model: nn.Module, twin: nn.Module, x: Tensor, rounds: int, tick: Callable[[], None]) -> Comparison:
    """Run both networks on ``x`` and time them, whole and by layer.

    The two backends take turns within each round, so that a machine that slows down slows both. Whole runs are timed
    without hooks. ``tick`` is called after each of the ``rounds``.
    """
    before = count_fallbacks()
    with torch.inference_mode():
        layers, y = _observe(model, x)
        y_torch = models.main_output(twin(x))
        whole: tuple[list[float], list[float]] = ([], [])
        by_layer: tuple[dict[str, list[float]], dict[str, list[float]]] = (defaultdict(list), defaultdict(list))
        for _ in range(rounds):
            for network, whole_s, layer_s in zip((model, twin), whole, by_layer, strict=True):
                start = time.perf_counter()
                network(x)
                whole_s.append(time.perf_counter() - start)
                _time_layers(network, x, layer_s)
            tick()
    for layer in layers:
        layer.fastconv_s, layer.torch_s = (median(seconds[layer.name]) for seconds in by_layer)
    return Comparison(
        y=y,
        y_torch=y_torch,
        layers=layers,
        fastconv_s=median(whole[0]),
        torch_s=median(whole[1]),
        fallbacks=dict(count_fallbacks() - before),
    )


@contextmanager
def _hooks(model: nn.Module, enter: Callable[[], None], leave: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """While open, call ``enter()`` before and ``leave(name, module, output)`` after each timed layer of ``model``."""
    with ExitStack() as handles:
        for name, module in model.named_modules():
            if isinstance(module, TIMED_LAYERS):
                handles.enter_context(module.register_forward_pre_hook(lambda module, inputs: enter()))
                handles.enter_context(
                    module.register_forward_hook(lambda module, inputs, y, name=name: leave(name, module, y))
                )
        yield


def _observe(model: nn.Module, x: Tensor) -> tuple[list[Layer], Tensor]:
    """One forward run: the network's layers in order, each with the kernels that ran during it, and the output."""
    layers: list[Layer] = []
    first_record = 0

    with observe() as records:

        def enter() -> None:
            nonlocal first_record
            first_record = len(records)

        def leave(name: str, module: nn.Module, y: Any) -> None:
            kernels = [record.kernel for record in records[first_record:]]
            layers.append(Layer(name, type(module).__name__, tuple(models.main_output(y).shape), kernels))

        with _hooks(model, enter, leave):
            y = models.main_output(model(x))
    return layers, y


def _time_layers(model: nn.Module, x: Tensor, seconds: dict[str, list[float]]) -> None:
    """One forward run; appends the time of each layer to its entry in ``seconds``."""
    started = 0.0

    def enter() -> None:
        nonlocal started
        started = time.perf_counter()

    def leave(name: str, module: nn.Module, y: Any) -> None:
        seconds[name].append(time.perf_counter() - started)

    with _hooks(model, enter, leave):
        model(x)
