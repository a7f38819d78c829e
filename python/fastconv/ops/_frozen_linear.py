"""A linear layer whose weight does not change: filters are kept in the kernel's order, and its epilogue adds and activates.

y (..., O) = activation(x (..., I) w (O, I)ᵀ + bias (O) + residual (..., O))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import plan
from ._conv2d_kernels import Shape
from ._dispatch import WITH_HALVES, empty_strided
from ._packed import PackedFilters
from .linear import Recipe, contiguous_strides, make_plan

_get_threads = torch.get_num_threads
_forced = plan.forced.get


@plan.cached
def _recipe(
    x: Shape,
    w: Shape,
    w_strides: Shape,
    dtypes: tuple[torch.dtype | None, ...],
    bias: Shape | None,
    residual: Shape | None,
    activation: str,
    threads: int,
    force: str,
    strict: bool,
) -> Recipe | None:
    """None where the operands, each of at least one element, are not a layer's: whoever can say why has to look."""
    dtype = dtypes[0]
    y = (*x[:-1], *w[:1])
    if dtype not in WITH_HALVES or any(other not in (None, dtype) for other in dtypes):
        return None
    if not x or len(w) != 2 or x[-1] != w[1] or bias not in (None, w[:1]) or residual not in (None, y):
        return None
    made: plan.Plan | None = make_plan(
        "conv2d_fwd", math.prod(x[:-1]), w[1], w[0], w_strides, dtype, bias is not None, threads, force, strict,
        residual is not None, activation, True,
    )  # fmt: skip
    return Recipe(made, y, contiguous_strides(y))


def find(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Recipe | None:
    """The recipe of a call on plain tensors of any shapes and dtypes, or None where it has to be taken step by step."""
    dtypes = x.dtype, w.dtype, None if bias is None else bias.dtype, None if residual is None else residual.dtype
    found: Recipe | None = _recipe(
        x.shape, w.shape, w.stride(), dtypes, None if bias is None else bias.shape,
        None if residual is None else residual.shape, activation,
        _get_threads(), _forced().get("conv2d_fwd", ""), plan.strict,
    )  # fmt: skip
    return found


def follow(
    recipe: Recipe, x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, kept: PackedFilters
) -> Tensor:
    made, shape, strides = recipe
    y: Tensor = empty_strided(shape, strides, x.dtype)
    assert made is not None
    # Each in a name of its own: what contiguous() returns has to live until the kernel is done.
    x, bias, residual = x.contiguous(), _contiguous(bias), _contiguous(residual)
    made.execute(
        x.data_ptr(), w.data_ptr(), _address(bias), _address(residual), y.data_ptr(), _address(kept.get(made, w))
    )
    return y


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
