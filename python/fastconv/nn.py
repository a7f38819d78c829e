"""torch.nn's convolutions, pools, Linear, BatchNorm, LayerNorm, MultiheadAttention and Transformer encoder on fastconv's kernels.

Each class subclasses the one it is named after: constructor, initialisation, parameters, repr, state_dict and pickle are torch's,
and so is every error of the constructor. Only the forward pass differs, and it calls `fastconv.functional`.

One option is added: padding="SAME" of Conv2d, MaxPool2d and AvgPool2d is TensorFlow's, for any stride (see `fastconv._padding`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len
from torch.nn.modules.utils import _pair

from . import _fused, _same_pooling
from . import functional as F
from ._attention import sdpa, weights_of, with_our_attention
from ._folding import ACTIVATION_LAYERS, fold, why_not_folded
from ._padding import SAME, same
from ._routes import for_torch
from .ops._dispatch import WITH_HALVES

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AvgPool1d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBnAct",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "LayerNorm",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MultiheadAttention",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


def _is_same(module: Any) -> bool:
    return module.padding == SAME  # type: ignore[no-any-return]


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
    """`torch.nn.Conv2d` on fastconv's kernels: (N, C, H, W) or (C, H, W) to (N, K, P, Q) or (K, P, Q).

    padding="SAME" is TensorFlow's: P = ceil(H/stride), the padding what that takes, its odd pixel at the bottom and right. The
    kernels read four different sides in place, so it costs no copy.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        is_same = isinstance(padding, str) and padding == SAME
        if is_same and padding_mode != "zeros":
            raise ValueError(f"padding='SAME' pads with zeros, got padding_mode='{padding_mode}'")
        options = stride, 0 if is_same else padding, dilation, groups, bias, padding_mode, device, dtype
        super().__init__(in_channels, out_channels, kernel_size, *options)
        if is_same:
            self.padding = SAME

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _is_same(self):
            pads = same(input.shape[-2:], weight.shape[-2:], self.stride, self.dilation)
            stride, dilation = _pair(self.stride), _pair(self.dilation)
            return _fused.conv2d(input, weight, bias, stride, pads, dilation, self.groups)
        return _convolve(self, F.conv2d, input, weight, bias)


class ConvBnAct(torch.nn.Sequential):
    """Convolution without bias, BatchNorm, activation: (N, C, H, W) to (N, K, P, Q), P = ceil(H/stride) unless padding is given.

    In eval mode the norm is folded into the weights at each call and the rest is done by the convolution's kernel, as is an
    addition before the activation: ``block(x, residual)``. Gradients flow as ever. `fastconv.fuse` keeps the folded weights. In
    training mode the convolution is one step, and norm, addition and activation are another. Keys are those of a Sequential: "0"
    the convolution, "1" the norm, as in torchvision's blocks.

    Args:
        activation: "relu", "relu6", "silu", "hardswish", "gelu" (the erf form), "gelu_tanh", "sigmoid" or "none".
        padding: as `Conv2d` takes it; None: (kernel_size - 1)//2·dilation on every side.
        eps, momentum: the norm's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any = 3,
        stride: Any = 1,
        padding: Any = None,
        dilation: Any = 1,
        groups: int = 1,
        *,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        if activation != "none" and activation not in ACTIVATION_LAYERS:
            raise ValueError(f"activation: got '{activation}', expected none, {', '.join(ACTIVATION_LAYERS)}")
        if padding is None:
            padding = tuple((k - 1) // 2 * d for k, d in zip(_pair(kernel_size), _pair(dilation)))
        conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        acts = [] if activation == "none" else [ACTIVATION_LAYERS[activation]()]
        super().__init__(conv, BatchNorm2d(out_channels, eps=eps, momentum=momentum), *acts)
        self.activation = activation

    @property
    def conv(self) -> torch.nn.Conv2d:
        return self[0]  # type: ignore[return-value]

    @property
    def norm(self) -> torch.nn.BatchNorm2d:
        return self[1]  # type: ignore[return-value]

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.training or why_not_folded(self.norm):
            y: Tensor = self.conv(input)
            if type(self.norm) is BatchNorm2d:
                return self.norm(y, residual, self.activation)  # type: ignore[no-any-return]
            y = self.norm(y)
            y = y if residual is None else y + residual
            return y if self.activation == "none" else _fused.ACTIVATIONS[self.activation](y)
        weight, bias = fold(self.conv.weight, self.conv.bias, self.norm)
        stride, dilation = _pair(self.conv.stride), _pair(self.conv.dilation)
        if _is_same(self.conv):
            sides = same(input.shape[-2:], weight.shape[-2:], stride, dilation)
        else:
            left, right, top, bottom = self.conv._reversed_padding_repeated_twice
            sides = top, bottom, left, right
        return _fused.conv2d(input, weight, bias, stride, sides, dilation, self.conv.groups, residual, self.activation)


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


def _windows(module: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernel and stride of a 2-D pool, each as (height, width)."""
    return _pair(module.kernel_size), _pair(module.stride)


class MaxPool1d(torch.nn.MaxPool1d):
    """`torch.nn.MaxPool1d` on fastconv's kernels."""

    def forward(self, input: Tensor) -> Any:
        windows = self.kernel_size, self.stride, self.padding, self.dilation
        return F.max_pool1d(input, *windows, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class MaxPool2d(torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` on fastconv's kernels. padding="SAME" is TensorFlow's: no dilation, and ceil_mode changes nothing."""

    def forward(self, input: Tensor) -> Any:
        if _is_same(self):
            if _pair(self.dilation) != (1, 1):
                raise ValueError(f"padding='SAME' of a pool takes no dilation, got dilation={self.dilation}")
            return _same_pooling.max_pool2d(input, *_windows(self), self.return_indices)
        windows = self.kernel_size, self.stride, self.padding, self.dilation
        return F.max_pool2d(input, *windows, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class AvgPool1d(torch.nn.AvgPool1d):
    """`torch.nn.AvgPool1d` on fastconv's kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool1d(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


class AvgPool2d(torch.nn.AvgPool2d):
    """`torch.nn.AvgPool2d` on fastconv's kernels.

    padding="SAME" is TensorFlow's: the padding never counts, whatever count_include_pad says, and ceil_mode changes nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_same(self):
            return _same_pooling.avg_pool2d(input, *_windows(self), self.divisor_override)
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


def _batch_norm(module: Any, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    module._check_input_dim(input)
    momentum = module.momentum
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if momentum is None:  # the average over all batches
            momentum = 1.0 / float(module.num_batches_tracked)
    mean, variance = module.running_mean, module.running_var
    training = module.training or (mean is None and variance is None)
    if module.training and not module.track_running_stats:
        mean = variance = None
    options = module.weight, module.bias, training, 0.0 if momentum is None else momentum, module.eps
    return F.batch_norm(input, mean, variance, *options, residual=residual, activation=activation)


class BatchNorm1d(torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on fastconv's kernels: (N, C) or (N, C, L) to the same."""

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input, None, "none")


class BatchNorm2d(torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on fastconv's kernels: (N, C, H, W) to the same.

    ``norm(x, residual, activation)`` is activation(norm(x) + residual) in the same passes over memory, forward and backward: see
    `fastconv.functional.batch_norm`. Residual networks of `fastconv.models` call it so in training.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        return _batch_norm(self, input, residual, activation)


class BatchNorm3d(torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on fastconv's kernels: (N, C, D, H, W) to the same."""

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input, None, "none")


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on fastconv's kernels: (*, *normalized_shape) to the same.

    ``norm(x, residual)`` returns (norm of x + residual, x + residual): see `fastconv.functional.layer_norm`.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        options = self.normalized_shape, self.weight, self.bias, self.eps
        return F.layer_norm(input, *options) if residual is None else F.layer_norm(input, *options, residual=residual)


_traced_forward = with_our_attention(torch.nn.functional.multi_head_attention_forward)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose attention runs on fastconv's kernels; the projections around it are torch's.

    With `need_weights=True`, torch's default, somebody wants the matrix that our kernels never store: the output is theirs all
    the same, and the weights (N, L, S), or (N, heads, L, S) without `average_attn_weights`, are exp(scores - log-sum-exp) by
    torch's operations, with gradients; under torch.compile torch computes the whole call, and it is counted. A query that may
    attend to nothing has output and weights 0, where torch has NaN.
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
        tensors: dict[str, Tensor | None] = {"query": query, "key": key, "value": value}
        nested = any(isinstance(t, Tensor) and t.is_nested for t in tensors.values())
        traced = "torch.compile traces need_weights=True" if need_weights and torch.compiler.is_compiling() else ""
        if (nested or need_weights) and for_torch("MultiheadAttention", tensors, False, traced, WITH_HALVES):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if need_weights and attn_mask is not None:
            is_causal = False  # a hint, which torch does not take here either
        batched = self.batch_first and query.dim() == 3
        if batched:
            # One projection serves operands that are the same tensor: they have to stay that.
            turned = {id(t): t.transpose(0, 1) for t in (query, key, value)}
            query, key, value = (turned[id(t)] for t in (query, key, value))
        own: dict[str, Any] = {}
        if not self._qkv_same_embed_dim:
            weights = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            own = {"use_separate_proj_weight": True, **{name: getattr(self, name) for name in weights}}
        arguments = (
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias,
            self.bias_k, self.bias_v, self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias,
            self.training, key_padding_mask, False, attn_mask,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            out, _ = _traced_forward(*arguments, is_causal=is_causal, **own)
            return (out.transpose(0, 1) if batched else out), None
        with sdpa(), weights_of(need_weights) as found:
            out, _ = torch.nn.functional.multi_head_attention_forward(*arguments, is_causal=is_causal, **own)
        out = out.transpose(0, 1) if batched else out
        if not need_weights:
            return out, None
        matrix = found[0].mean(dim=1) if average_attn_weights else found[0]
        return out, matrix if query.dim() == 3 else matrix.squeeze(0)


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fastconv's kernels.

    In eval mode torch's own computes the whole layer in one call of its, past the layers inside. This one never does. An addition
    and the norm behind it are one pass over memory.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention
        for linear in (self.linear1, self.linear2):
            linear.__class__ = Linear
        for norm in (self.norm1, self.norm2):
            norm.__class__ = LayerNorm

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        padding, mask = _canonical_masks(src, src_mask, "src_mask", src_key_padding_mask)
        x = src
        if self.norm_first:
            y, x = _add_norm(self.norm2, x, self._sa_block(self.norm1(x), mask, padding, is_causal))
            return x + self._ff_block(y)
        x, _ = _add_norm(self.norm1, x, self._sa_block(x, mask, padding, is_causal))
        return _add_norm(self.norm2, x, self._ff_block(x))[0]


def _add_norm(norm: Any, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of x + more, and the sum: in one pass where the norm is ours and not, say, somebody's RMSNorm in its place."""
    if isinstance(norm, LayerNorm):
        return norm(x, more)  # type: ignore[no-any-return]
    total = x + more
    return norm(total), total


class TransformerEncoder(torch.nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` for layers of fastconv's: no nested tensors, which only torch's fast path takes.

    Where torch would have used them, padded positions of the output are 0 (before a last norm), as there.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        padding, whole = _canonical_masks(src, mask, "mask", src_key_padding_mask)
        length = _get_seq_len(src, self.layers[0].self_attn.batch_first)
        causal = _detect_is_causal_mask(whole, is_causal, length)
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=whole, is_causal=causal, src_key_padding_mask=padding)
        if padding is not None and whole is None and self._torch_would_nest(src, padding):
            x = x.masked_fill((padding != 0)[..., None], 0.0)
        return x if self.norm is None else self.norm(x)

    def _torch_would_nest(self, src: Tensor, padding: Tensor) -> bool:
        tensors = (src, *self.layers[0].parameters())
        return (
            bool(self.use_nested_tensor)
            and torch.backends.mha.get_fastpath_enabled()
            and not self.layers[0].training
            and src.dim() == 3
            and not torch.is_autocast_enabled()
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            and not (self.mask_check and torch.compiler.is_compiling())
            and (not self.mask_check or torch._nested_tensor_from_mask_left_aligned(src, padding == 0))
        )


def _canonical_masks(
    src: Tensor, mask: Tensor | None, name: str, padding: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """An encoder's padding and mask as numbers to add, with torch's errors."""
    f = torch.nn.functional
    padding = f._canonical_mask(
        mask=padding, mask_name="src_key_padding_mask", other_type=f._none_or_dtype(mask), other_name=name,
        target_type=src.dtype,
    )  # fmt: skip
    whole = f._canonical_mask(
        mask=mask, mask_name=name, other_type=None, other_name="", target_type=src.dtype, check_other=False
    )
    return padding, whole
