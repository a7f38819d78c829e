"""What several families are made of. Attribute names and the numbers inside a Sequential are torchvision's keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import fastconv.nn
from fastconv._folding import activation_of
from fastconv.models.layers import Layers

Options = Mapping[str, float]  # of a BatchNorm: eps, momentum
PLAIN: Options = MappingProxyType({})


def round_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, at least ``divisor`` and at least nine tenths of ``channels``.

    MobileNet's rule (Sandler et al. 2018), in its authors' code: half a divisor is added, the rest dropped.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def conv_norm_act(
    layers: Layers,
    in_width: int,
    width: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    groups: int = 1,
    norm: Options = PLAIN,
    act: Callable[[], nn.Module] | None = None,
    padding: int | str | None = None,
) -> nn.Sequential:
    """Convolution without bias, normalisation, activation: keys "0" and "1". Padded to keep H/stride unless said otherwise."""
    pad = (kernel_size - 1) // 2 if padding is None else padding
    options: dict[str, Any] = {"stride": stride, "padding": pad, "groups": groups, "bias": False}
    parts = [layers.Conv2d(in_width, width, kernel_size, **options), layers.BatchNorm2d(width, **norm)]
    return nn.Sequential(*parts) if act is None else ConvNormAct(*parts, act())


class ConvNormAct(nn.Sequential):
    """Convolution, normalisation, activation, of which the last two are one where `activated` can."""

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, act = self
        return activated(norm, act, conv(x))


def activated(norm: nn.Module, act: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """act(norm(x) + residual): in training one call of fastconv's BatchNorm, where the norm is one and nobody hooks the parts."""
    if norm.training and type(norm) is fastconv.nn.BatchNorm2d and not _hooked(norm) and not _hooked(act):
        name = activation_of(act)
        if name is not None:
            return norm(x, residual, name)  # type: ignore[no-any-return]
    y: Tensor = norm(x)
    if residual is not None:
        y += residual
    y = act(y)
    return y


def _hooked(module: nn.Module) -> bool:
    every = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(every)


def relu6() -> nn.Module:
    return nn.ReLU6(inplace=True)


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def silu() -> nn.Module:
    return nn.SiLU(inplace=True)


def hardswish() -> nn.Module:
    return nn.Hardswish(inplace=True)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from all channels' means (Hu, Shen, Sun: Squeeze-and-excitation, 2017).

    (N, width, H, W) to the same. The two dense layers are 1×1 convolutions, as torchvision's.
    """

    def __init__(
        self,
        layers: Layers,
        width: int,
        squeezed: int,
        *,
        act: Callable[[], nn.Module] = relu,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        self.fc1 = layers.Conv2d(width, squeezed, 1)
        self.fc2 = layers.Conv2d(squeezed, width, 1)
        self.activation = act()
        self.scale_activation = gate()

    def forward(self, x: Tensor) -> Tensor:
        gates: Tensor = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return gates * x


class StochasticDepth(nn.Module):
    """In training, drops whole samples with probability ``p`` and scales the others by 1/(1-p) (Huang et al. 2016)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        kept = torch.empty((len(x), 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.p)
        return x * kept.div_(1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def initialise(model: nn.Module) -> None:
    """The start of torchvision's mobile networks: He-normal convolutions by fan-out, dense N(0, 0.01²), biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
