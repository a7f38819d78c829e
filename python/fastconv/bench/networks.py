"""Models: their layers as cases, and the whole network, or one training step of it, as a case."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv import models
from fastconv.bench.cases import DTYPES, FREEZABLE, MEMORY_FORMATS, PASSES, Call, Case, make
from fastconv.bench.engines import ENGINES
from fastconv.bench.shapes import LinearShape, Shape, batched
from fastconv.commands.twins import calibrate_batch_norm
from fastconv.plan import OPS
from fastconv.testing.problems import ConvCase, PoolCase

# Times the worse of torch's own errors. FlashAttention allows 2 for one op; in a network a ReLU whose input is nothing but
# rounding flips a whole gradient, and torch's two layouts alone differ by 10 (ResNet-18, batch 2: 5e-4 and 5e-3).
_TORCH_ERRORS = 4.0
# Floor of that bound, in units of the dtype's epsilon: in float64, torch's contiguous contestant is the truth itself.
_LEAST_ERROR = 1000.0


def layer_cases(
    model: str, batches: Sequence[int], directions: Sequence[str], dtype: str, seed: int, frozen: bool = False
) -> list[Case]:
    """The distinct layers of a reference model, with the names of the layers that share each; op by op.

    ``fwd`` takes all of them; the gradients take convolutions and Linear (dgrad, wgrad) and pools (bwd); ``frozen`` leaves those
    that have weights to freeze.
    """
    distinct: dict[tuple[str, Shape], list[str]] = {}
    for op, shape, label in layers(model):
        distinct.setdefault((op, shape), []).append(label)
    image = next(iter(distinct))  # whose gradient nobody asks for
    order = sorted(distinct, key=lambda layer: list(PASSES).index(layer[0]))
    common = {"dtype": dtype, "seed": seed, "frozen": frozen}
    return [
        make(op, batched(shape, batch), direction, **common, labels=list(distinct[op, shape]))
        for batch in batches
        for direction in directions
        for op, shape in order
        if direction in PASSES[op] and not (direction == "dgrad" and (op, shape) == image)
        if op in FREEZABLE or not frozen
    ]


@cache
def layers(model: str) -> tuple[tuple[str, Shape, str], ...]:
    """(op, shape, name) of each convolution, pool and Linear in the order they run, for one sample, on meta."""
    spec = models.spec(model)
    found: list[tuple[str, Shape, str]] = []
    with torch.device("meta"):
        network = models.create(model, layers=nn).eval()
        sample = torch.empty(1, spec.in_channels, *spec.input_size)

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.append((*_problem(module, inputs[0], output), name))

        module.register_forward_hook(hook)

    for name, module in network.named_modules():
        if isinstance(
            module, (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
        ):
            watch(name, module)
    with torch.no_grad():
        network(sample)
    return tuple(found)


def _problem(module: nn.Module, x: Tensor, y: Tensor) -> tuple[str, Shape]:
    if isinstance(module, nn.Linear):
        return "linear", LinearShape(math.prod(x.shape[:-1]), module.in_features, module.out_features)
    size = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    if isinstance(module, nn.Conv2d):
        pad = _pair(module.padding)
        r, s = _pair(module.kernel_size)
        return "conv2d", ConvCase(
            *size,
            module.out_channels,
            r,
            s,
            stride=_pair(module.stride),
            pad4=(pad[0], pad[0], pad[1], pad[1]),
            dilation=_pair(module.dilation),
            groups=module.groups,
            bias=module.bias is not None,
        )
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        op = "adaptive_avg_pool2d" if isinstance(module, nn.AdaptiveAvgPool2d) else "adaptive_max_pool2d"
        return op, PoolCase(*size, adaptive=(y.shape[2], y.shape[3]))
    assert isinstance(module, (nn.MaxPool2d, nn.AvgPool2d))
    pad = _pair(module.padding)
    window = _pair(module.kernel_size)
    pool = PoolCase(
        *size,
        *window,
        stride=_pair(module.stride or module.kernel_size),
        pad4=(pad[0], pad[0], pad[1], pad[1]),
        ceil=bool(module.ceil_mode),
    )
    if isinstance(module, nn.MaxPool2d):
        return "max_pool2d", replace(pool, dilation=_pair(module.dilation))
    divisor = module.divisor_override or 0
    return "avg_pool2d", replace(pool, include_pad=bool(module.count_include_pad), divisor=divisor)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        raise ValueError(f"the bench cannot expand a layer with padding={value!r}")
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def counted_flops(network: nn.Module, x: Tensor) -> float:
    """Operations of a forward pass, of convolutions and matrix products, on meta."""
    # With gradients, because torch's shortcut through a whole attention layer, which it takes without, is not counted.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        network(x)
    return float(counter.get_total_flops())


@dataclass
class Network(Case):
    """A whole model. ``direction`` is ``infer`` (eval mode, no gradients) or ``train`` (forward, backward, SGD step).

    fastconv's contestant is ``fastconv.convert`` of a copy, or ``fastconv.fuse`` where ``fused``, and torch's are copies
    in each layout, all with the same weights.
    """

    model: str = field(kw_only=True)
    batch: int = field(kw_only=True)
    fused: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self.records_gradient = self.direction == "train"
        self.repeatable = not self.records_gradient

    @property
    def name(self) -> str:
        return f"{self.model} n{self.batch}"

    @property
    def family(self) -> str:
        if self.direction == "train":
            return "training step"
        return "inference, fused" if self.fused else "inference"

    @property
    def kernel_ops(self) -> tuple[str, ...]:
        return OPS

    @cached_property
    def flops(self) -> float:
        """Those of convolutions and matrix products; a training step is taken as three forwards."""
        spec = models.spec(self.model)
        with torch.device("meta"):
            network = models.create(self.model, layers=nn).eval()
            forward = counted_flops(network, torch.empty(self.batch, spec.in_channels, *spec.input_size))
        return forward * (3 if self.direction == "train" else 1)

    @property
    def moved(self) -> int:
        return 0

    @property
    def error_bound(self) -> float:
        return 1e-3

    def allowed_error(self, torch_errors: Sequence[float]) -> float:
        least = _LEAST_ERROR * float(torch.finfo(DTYPES[self.dtype]).eps)
        return max(least, _TORCH_ERRORS * max(torch_errors)) if torch_errors else self.error_bound

    # Gradients of different layers differ by orders of magnitude: their common root mean square measures none of them.
    max_over_l2 = math.inf

    @cached_property
    def _parts(self) -> tuple[nn.Module, Tensor, Tensor]:
        """The network on torch's layers with calibrated statistics, an input and class labels."""
        spec = models.spec(self.model)
        torch.manual_seed(self.seed)
        # Well conditioned: a fresh ViT's logits are all 0, which any wrong network would agree with.
        network = models.create(self.model, layers=nn, **spec.well_conditioned).to(DTYPES[self.dtype])
        x = self._random(self.batch, spec.in_channels, *spec.input_size, key=1)
        calibrate_batch_norm(network, x)
        network.eval()
        with torch.no_grad():
            classes = models.main_output(network(x[:1])).shape[1]
        return network, x, torch.arange(self.batch) * 7919 % classes

    def _contestant(
        self, layout: str, change: Callable[[nn.Module], nn.Module], dtype: torch.dtype | None = None
    ) -> Call:
        network, x, target = self._parts
        memory_format = MEMORY_FORMATS[layout]
        # Module.to takes a memory format for 4-D parameters; its stub does not know the combination.
        twin = copy.deepcopy(network).to(dtype=dtype or x.dtype).to(memory_format=memory_format)  # type: ignore[call-overload]
        twin = change(twin)
        x = x.to(dtype or x.dtype, copy=True).contiguous(memory_format=memory_format)
        return TrainingStep(twin, x, target) if self.direction == "train" else Inference(twin, x)

    def fastconv_call(self, layout: str) -> Call:
        def converted(twin: nn.Module) -> nn.Module:
            if self.fused:
                return fastconv.fuse(twin)
            fastconv.convert(twin)
            return twin

        return self._contestant(layout, converted)

    def torch_call(self, layout: str) -> Call:
        return self._contestant(layout, lambda twin: twin)

    def compiled_call(self, layout: str) -> Call:
        return self._contestant(layout, lambda twin: cast(nn.Module, torch.compile(twin)))

    def engine_call(self, engine: str, threads: int) -> Call:
        if self.direction == "train" or self.dtype != "f32":
            return super().engine_call(engine, threads)
        network, x, _ = self._parts
        return ENGINES[engine](copy.deepcopy(network), x, threads)

    def checked(self, call: Call) -> Tensor:
        """Logits, or all gradients of the first step in one vector."""
        out: Tensor = call()
        return call.gradients() if isinstance(call, TrainingStep) else out

    @cached_property
    def truth(self) -> Tensor:
        with torch.set_grad_enabled(self.records_gradient):
            return self.checked(self._contestant("nchw", lambda twin: twin, torch.float64)).double()


@dataclass
class Inference:
    """One forward of a network in eval mode."""

    network: nn.Module
    x: Tensor

    def __post_init__(self) -> None:
        self.network.eval()

    def __call__(self) -> Tensor:
        return models.main_output(self.network(self.x))


@dataclass
class TrainingStep:
    """Forward, cross entropy of every head, backward and an SGD step with momentum, on the same batch each time."""

    network: nn.Module
    x: Tensor
    target: Tensor

    def __post_init__(self) -> None:
        self.network.train()
        # So small a step that forty of them leave the network where it was: the work is the same, the numbers stay
        # tame.
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-6, momentum=0.9)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = models.classification_loss(self.network(self.x), self.target)
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss

    def gradients(self) -> Tensor:
        """The last step's gradients, as one vector."""
        return torch.cat([p.grad.reshape(-1) for p in self.network.parameters() if p.grad is not None])
