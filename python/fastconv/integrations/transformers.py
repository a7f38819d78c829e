"""Hugging Face transformers' models on fastconv's attention.

    import fastconv.integrations.transformers
    model = AutoModel.from_pretrained(..., attn_implementation="fastconv")
    fastconv.convert(model)                     # their Linear and LayerNorm layers too

Importing this registers the name "fastconv" with transformers' registry of attention functions, which version 4.48 and later
have; ImportError without. Masks are made as for "sdpa". T5, whose attention is in the registry from version 5 on, passes its
biases of positions as a matrix, and GPT-OSS its attention sinks. `convert` knows torch's layers: GPT-2's projections, which are
transformers' own Conv1D, stay theirs.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastconv import functional

NAME = "fastconv"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, Hq, L, E), key and value (B, Hkv, S, E), to (B, L, Hq, E) and no weights.

    Heads of queries share those of keys in groups. Without a mask, a module that is causal (its ``is_causal``) sees nothing that
    follows, as in transformers' own "sdpa"; a single query sees everything. What some models pass besides: ``softcap``,
    ``sliding_window`` and ``s_aux`` (Hq,), the score of an attention sink, are the kernel's own options; ``position_bias``
    (1|B, Hq, L, S) is added to the scores, beside the mask. Raises NotImplementedError where somebody wants the weights, or
    passes a paged cache.
    """
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            f'attn_implementation="{NAME}" never stores the weights: output_attentions needs "eager"'
        )
    if kwargs.get("cache") is not None:
        raise NotImplementedError(f'attn_implementation="{NAME}" has no paged cache: use "paged|eager"')
    L, S = query.shape[2], key.shape[2]
    mask = attention_mask if attention_mask is None else attention_mask[..., :S]
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    options: dict[str, Any] = {"softcap": kwargs["softcap"]} if kwargs.get("softcap") else {}
    if kwargs.get("s_aux") is not None:
        options["sinks"] = kwargs["s_aux"]
    causal = mask is None and is_causal and L > 1
    if causal and kwargs.get("sliding_window") is not None:
        options["window"] = (int(kwargs["sliding_window"]) - 1, -1)
    if kwargs.get("position_bias") is not None:
        mask = _biased(kwargs["position_bias"][..., :S], mask)
    out = functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale=scaling, enable_gqa=key.shape[1] != query.shape[1], **options
    )
    return out.transpose(1, 2).contiguous(), None


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    """One floating mask of a bias for each score and a mask of either kind."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else bias + mask


def _register() -> None:
    try:
        modeling = importlib.import_module("transformers.modeling_utils")
        registry = modeling.AttentionInterface
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "fastconv.integrations.transformers needs transformers 4.48 or later: pip install transformers"
        ) from error
    registry.register(NAME, attention)
    try:
        masking = importlib.import_module("transformers.masking_utils")
    except ImportError:
        return  # before 4.53 each model makes its own mask
    masking.AttentionMaskInterface.register(NAME, masking.sdpa_mask)


_register()
