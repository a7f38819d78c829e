"""torch.nn's attention and Transformer layers with frozen projections: what is inside them is called by their own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fastconv import functional, nn
from fastconv._folding import activation_name
from fastconv.conversion import Kept
from fastconv.fusion.frozen import FrozenLinear
from fastconv.fusion.report import Report
from fastconv.fusion.rewriting import special, why_not_frozen

# Their forward, torch's or ours, computes linear2(dropout(activation(linear1(x)))).
_FEED_FORWARD = (nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)


class FrozenSelfAttention:
    """The forward of a `MultiheadAttention` whose query, key and value are one tensor, without a mask and without weights.

    The projections before and after it are frozen. Every other call goes to the layer's own forward.
    """

    def __init__(self, layer: torch.nn.MultiheadAttention) -> None:
        self.layer = layer
        self.inner = FrozenLinear(layer.in_proj_weight, layer.in_proj_bias)
        self.outer = FrozenLinear(layer.out_proj.weight, layer.out_proj.bias)

    def __call__(
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
        layer = self.layer
        masked = is_causal or attn_mask is not None or key_padding_mask is not None
        if masked or need_weights or not (query is key is value) or query.is_nested or query.dim() != 3:
            result: tuple[Tensor, Tensor | None] = type(layer).forward(
                layer, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return result
        heads = self.inner(query).unflatten(-1, (3, layer.num_heads, layer.head_dim))
        batch, length = (0, 1) if layer.batch_first else (1, 0)
        # (N, heads, L, E) each, views of the projection's result.
        q, k, v = heads.permute(2, batch, 3, length, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        together = y.permute(0, 2, 1, 3) if layer.batch_first else y.permute(2, 0, 1, 3)
        return self.outer(together.flatten(2)), None


def freeze_attention(layer: torch.nn.MultiheadAttention, name: str, report: Report) -> None:
    """Gives an attention of a cloned tree frozen projections."""
    reason = _why_not(layer)
    if reason:
        report.left.append(Kept(name, type(layer).__name__, reason))
        return
    layer.__dict__["forward"] = FrozenSelfAttention(layer).__call__
    report.linears.extend((f"{name}.in_proj" if name else "in_proj", f"{name}.out_proj" if name else "out_proj"))


def _why_not(layer: torch.nn.MultiheadAttention) -> str:
    if type(layer) is not nn.MultiheadAttention:
        return "it is a subclass of MultiheadAttention"
    if any(special(part) for part in layer.modules()):
        return "it has hooks, parametrizations or a forward of its own"
    if layer.training:
        return "it is in training mode"
    if not layer._qkv_same_embed_dim:
        return "keys or values have a width of their own"
    if layer.bias_k is not None or layer.add_zero_attn:
        return "it adds keys of its own"
    return ""


def freeze_feed_forward(layer: Module, name: str, report: Report) -> None:
    """Leaves the activation of a Transformer layer of a cloned tree to its first linear layer, where both are as usual."""
    if type(layer) not in _FEED_FORWARD or special(layer) or layer.training:
        return
    linear, activation = layer.linear1, activation_name(layer.activation)
    if not isinstance(linear, torch.nn.Linear) or activation is None or why_not_frozen(linear):
        return
    linear.__dict__["forward"] = FrozenLinear.of(linear, activation).forward
    # Past Module.__setattr__: where the activation is a module, it stays one of the tree's.
    layer.__dict__["activation"] = _same
    report.linears.append(f"{name}.linear1" if name else "linear1")
    report.activations[activation] += 1


def _same(x: Any) -> Any:
    return x
