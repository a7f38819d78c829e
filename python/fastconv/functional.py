"""torch.nn.functional's convolutions, pools, linear, batch norm, layer norm and attention on fastconv's kernels.

Signatures, results, memory formats and exceptions are torch's.

What torch accepts is accepted here: where no kernel of ours applies, torch computes the result and `fastconv.fallback_counts`
says how often and why.
"""

from __future__ import annotations

from . import _resolvers  # noqa: F401 - registers itself, as does the next
from ._attention import scaled_dot_product_attention
from ._attention_lengths import scaled_dot_product_attention_varlen, scaled_dot_product_attention_with_cache
from ._batch_norm import batch_norm
from ._convolution import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, linear
from ._normalization import layer_norm
from ._pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_max_pool1d,
    adaptive_max_pool1d_with_indices,
    adaptive_max_pool2d,
    adaptive_max_pool2d_with_indices,
    avg_pool1d,
    avg_pool2d,
    max_pool1d,
    max_pool1d_with_indices,
    max_pool2d,
    max_pool2d_with_indices,
)
from .ops import _cuda, _flops  # noqa: F401 - register what they have

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool1d",
    "adaptive_max_pool1d_with_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "layer_norm",
    "linear",
    "max_pool1d",
    "max_pool1d_with_indices",
    "max_pool2d",
    "max_pool2d_with_indices",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_varlen",
    "scaled_dot_product_attention_with_cache",
]

# They are public here, wherever they are written: in reprs, pickles and the code that torch.fx makes.
for _name in __all__:
    globals()[_name].__module__ = __name__
