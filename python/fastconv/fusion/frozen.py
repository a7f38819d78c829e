"""A convolution, a linear layer and a norm whose weights do not change any more."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from fastconv import _fused
from fastconv._batch_norm import batch_norm
from fastconv._folding import fold
from fastconv._padding import SAME, Quad, same
from fastconv.nn import ConvBnAct
from fastconv.ops._dispatch import DTYPES
from fastconv.ops._packed import PackedFilters

Pair = tuple[int, int]


class FrozenConv2d(torch.nn.Module):
    """activation(norm(conv(x)) + residual) in one call of a kernel, with weights of its own that are made once, here.

    This is the one place that owns folded weights, and those that kernels have packed or transformed. ``weight`` is (K, C/groups,
    R, S) and ``bias`` (K) or None; they are buffers that no state_dict shows. Without a norm they share the layer's memory.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, conv: torch.nn.Conv2d, norm: torch.nn.BatchNorm2d | None = None, activation: str = "none"
    ) -> None:
        super().__init__()
        self.stride = cast(Pair, _pair(conv.stride))
        self.dilation = cast(Pair, _pair(conv.dilation))
        self.groups = conv.groups
        self.activation = activation
        self.padding_mode = conv.padding_mode
        # As F.pad has them, last dimension first; for padding="same" they may differ.
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        self.sides: Quad | None = None if cast(object, conv.padding) == SAME else (top, bottom, left, right)
        # A tensor made in inference mode could not be used where gradients are recorded later.
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
            if norm is not None:
                weight, bias = fold(weight, bias, norm)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._packed = PackedFilters()
        # Where it does not depend on the input.
        plain = self.sides is not None and self.padding_mode == "zeros"
        self._geometry = (self.stride, cast(Quad, self.sides), self.dilation, self.groups) if plain else None
        self.eval()

    @classmethod
    def of(cls, layer: torch.nn.Conv2d | ConvBnAct) -> FrozenConv2d:
        """The whole of a layer."""
        if isinstance(layer, ConvBnAct):
            return cls(layer.conv, layer.norm, layer.activation)
        return cls(layer)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W) or (C, H, W) to (N, K, P, Q) or (K, P, Q); ``residual`` is what can be added to the result."""
        # Not by name: torch finds a buffer only after Python has looked everywhere else, which takes as long as the call in C.
        buffers = self._buffers
        weight, bias = cast(Tensor, buffers["weight"]), buffers["bias"]
        geometry = self._geometry
        if geometry is None:
            sides = self.sides
            if sides is None:
                sides = same(input.shape[-2:], weight.shape[-2:], self.stride, self.dilation)
            else:
                top, bottom, left, right = sides
                input = torch.nn.functional.pad(input, (left, right, top, bottom), mode=self.padding_mode)
                sides = 0, 0, 0, 0
            geometry = self.stride, sides, self.dilation, self.groups
        return _fused.frozen_conv2d(input, weight, bias, self._packed, geometry, residual, self.activation)

    def extra_repr(self) -> str:
        K, C, R, S = self.weight.shape
        return f"{C * self.groups}, {K}, kernel_size=({R}, {S}), stride={self.stride}, activation={self.activation}"


class FrozenLinear(torch.nn.Module):
    """activation(linear(x) + residual) in one call of a kernel, with the filters that the kernel packs kept here.

    ``weight`` (O, I) and ``bias`` (O) or None share the memory of what is given; they are buffers that no state_dict shows.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        # As above: no tensors made in inference mode.
        with torch.inference_mode(False):
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._packed = PackedFilters()
        self.eval()

    @classmethod
    def of(cls, layer: torch.nn.Linear, activation: str = "none") -> FrozenLinear:
        """A layer's weight and bias, and the activation behind it."""
        return cls(layer.weight, layer.bias, activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., I) to (..., O); ``residual`` is what can be added to the result."""
        buffers = self._buffers
        weight, bias = cast(Tensor, buffers["weight"]), buffers["bias"]
        return _fused.frozen_linear(input, weight, bias, self._packed, residual, self.activation)

    def extra_repr(self) -> str:
        O, I = self.weight.shape
        return f"{I}, {O}, bias={self.bias is not None}, activation={self.activation}"


class FrozenNorm(torch.nn.Module):
    """activation(norm(x)) in one pass over memory, for a BatchNorm2d in eval mode that no convolution stands before.

    In channels_last it is a depthwise 1×1 convolution, which reads a slice of channels where it lies. ``weight`` (C, 1, 1, 1) and
    ``bias`` (C) are that convolution's; the other four (C) share the layer's memory. All are buffers that no state_dict shows.
    """

    def __init__(self, norm: torch.nn.BatchNorm2d, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.eps = norm.eps
        columns = {"mean": norm.running_mean, "variance": norm.running_var, "gamma": norm.weight, "beta": norm.bias}
        with torch.inference_mode(False), torch.no_grad():
            for name, column in columns.items():
                self.register_buffer(name, None if column is None else column.detach(), persistent=False)
            mean = cast(Tensor, self._buffers["mean"])
            weight, bias = fold(torch.ones_like(mean)[:, None, None, None], None, norm)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._packed = PackedFilters()
        self._geometry = (1, 1), (0, 0, 0, 0), (1, 1), mean.numel()
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")  # as torch.nn.BatchNorm2d
        own = self._buffers
        weight, bias = cast(Tensor, own["weight"]), own["bias"]
        # Where our kernels would not take the convolution, a norm is better than torch's; autocast would round its factors.
        ours = input.is_cpu and input.dtype is weight.dtype and input.dtype in DTYPES
        if ours and input.stride(1) == 1 and not torch.is_autocast_enabled("cpu"):
            return _fused.frozen_conv2d(input, weight, bias, self._packed, self._geometry, None, self.activation)
        columns = own["mean"], own["variance"], own["gamma"], own["beta"]
        return batch_norm(input, *columns, eps=self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{self._geometry[3]}, eps={self.eps}, activation={self.activation}"
