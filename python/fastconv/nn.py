"""torch.nn's convolutions, pools, Linear and MultiheadAttention on fastconv's kernels.

Each class subclasses the one it is named after: constructor, initialisation, parameters, repr, state_dict and pickle are torch's,
and so is every error of the constructor. Only the forward pass differs, and it calls `fastconv.functional`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional as F
from ._attention import sdpa
from .fallback import note

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AvgPool1d",
    "AvgPool2d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MultiheadAttention",
]


def _convolve(module: Any, function: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = module.padding
    if module.padding_mode != "zeros":
        input = torch.nn.functional.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    return function(input, weight, bias, module.stride, padding, module.dilation, module.groups)  # type: ignore[no-any-return]


class Conv1d(torch.nn.Conv1d):
    """`torch.nn.Conv1d` on fastconv's kernels: (N, C, L) or (C, L) to (N, K, Q) or (K, Q)."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(self, F.conv1d, input, weight, bias)


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` on fastconv's kernels: (N, C, H, W) or (C, H, W) to (N, K, P, Q) or (K, P, Q)."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(self, F.conv2d, input, weight, bias)


class Conv3d(torch.nn.Conv3d):
    """`torch.nn.Conv3d`, which for now runs on torch's kernels and says so (see `fastconv.set_fallback`)."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolve(self, F.conv3d, input, weight, bias)


def _convolve_transposed(module: Any, dims: int, function: Any, input: Tensor, output_size: list[int] | None) -> Tensor:
    if module.padding_mode != "zeros":
        raise ValueError(
            f"Only `zeros` padding mode is supported for {type(module).__name__}, got '{module.padding_mode}'"
        )
    windows = module.stride, module.padding, module.kernel_size
    output_padding = (
        module.output_padding
        if output_size is None
        else module._output_padding(input, output_size, *windows, dims, module.dilation)
    )
    options = module.stride, module.padding, output_padding, module.groups, module.dilation
    return function(input, module.weight, module.bias, *options)  # type: ignore[no-any-return]


class ConvTranspose1d(torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` on fastconv's kernels. `output_size` picks one of the sizes that a stride leaves open."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _convolve_transposed(self, 1, F.conv_transpose1d, input, output_size)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on fastconv's kernels. `output_size` picks one of the sizes that a stride leaves open."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _convolve_transposed(self, 2, F.conv_transpose2d, input, output_size)


class MaxPool1d(torch.nn.MaxPool1d):
    """`torch.nn.MaxPool1d` on fastconv's kernels."""

    def forward(self, input: Tensor) -> Any:
        windows = self.kernel_size, self.stride, self.padding, self.dilation
        return F.max_pool1d(input, *windows, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class MaxPool2d(torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` on fastconv's kernels."""

    def forward(self, input: Tensor) -> Any:
        windows = self.kernel_size, self.stride, self.padding, self.dilation
        return F.max_pool2d(input, *windows, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class AvgPool1d(torch.nn.AvgPool1d):
    """`torch.nn.AvgPool1d` on fastconv's kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool1d(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


class AvgPool2d(torch.nn.AvgPool2d):
    """`torch.nn.AvgPool2d` on fastconv's kernels."""

    def forward(self, input: Tensor) -> Tensor:
        windows = self.kernel_size, self.stride, self.padding
        return F.avg_pool2d(input, *windows, self.ceil_mode, self.count_include_pad, self.divisor_override)


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    """`torch.nn.AdaptiveAvgPool1d` on fastconv's kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` on fastconv's kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(input, self.output_size)  # type: ignore[arg-type]


class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    """`torch.nn.AdaptiveMaxPool1d` on fastconv's kernels."""

    def forward(self, input: Tensor) -> Any:
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """`torch.nn.AdaptiveMaxPool2d` on fastconv's kernels."""

    def forward(self, input: Tensor) -> Any:
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)  # type: ignore[arg-type]


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` on fastconv's kernels: (*, in_features) to (*, out_features)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose attention runs on fastconv's kernels; the projections around it are torch's.

    With `need_weights=True`, torch's default, somebody wants the matrix that our kernels never store: torch computes the whole
    call then, and it is counted (see `fastconv.set_fallback`).
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights or any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value)):
            note("MultiheadAttention", "need_weights=True" if need_weights else "nested tensors")
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = self.batch_first and query.dim() == 3
        if batched:
            # One projection serves operands that are the same tensor: they have to stay that.
            turned = {id(t): t.transpose(0, 1) for t in (query, key, value)}
            query, key, value = (turned[id(t)] for t in (query, key, value))
        own: dict[str, Any] = {}
        if not self._qkv_same_embed_dim:
            weights = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            own = {"use_separate_proj_weight": True, **{name: getattr(self, name) for name in weights}}
        with sdpa():
            out, _ = torch.nn.functional.multi_head_attention_forward(
                query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias,
                self.bias_k, self.bias_v, self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias,
                training=self.training, key_padding_mask=key_padding_mask, need_weights=False, attn_mask=attn_mask,
                is_causal=is_causal, **own,
            )  # fmt: skip
        return (out.transpose(0, 1) if batched else out), None
