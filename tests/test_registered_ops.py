"""torch.vmap over the registered ops themselves, which compiled and exported programs call: the same as one call for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv.functional  # noqa: F401 - registers them

OPS = torch.ops.fastconv
PAIR, PAD = (1, 1), (1, 1, 1, 1)


def forward(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return OPS.conv2d_fwd(x, w, bias, residual, PAIR, PAD, PAIR, 2, "none")


def activated(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return OPS.conv2d_fwd(x, w, bias, residual, PAIR, PAD, PAIR, 2, "relu")


def dgrad(dy: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return OPS.conv2d_dgrad(dy, w, bias, (2, 4, 5, 6), False, PAIR, PAD, PAIR, 2)


def wgrad(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return OPS.conv2d_wgrad(dy, x, (6, 2, 3, 3), False, True, PAIR, PAD, PAIR, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return OPS.sdpa_fwd(q, k, v, None, None, None, 0.5, 0, 2, 0.0, 0.0, 0)


def layer_norm(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return OPS.layer_norm_fwd(x, None, gamma, None, 1e-5)


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    return OPS.max_pool2d_fwd(x, (2, 2), (2, 2), (0, 0), PAIR, False)


X, W, Y = (2, 4, 5, 6), (6, 2, 3, 3), (2, 6, 5, 6)
CALLS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "forward": (forward, (X, W, (6,), Y)),
    "activated": (activated, (X, W, (6,), Y)),
    "dgrad": (dgrad, (Y, W, (4,))),
    "wgrad": (wgrad, (Y, X)),
    "linear": (OPS.linear_fwd, ((2, 4), (5, 4), (5,))),
    "linear_wgrad": (lambda dy, x: OPS.linear_wgrad(dy, x, True), ((7, 5), (7, 4))),
    "attention": (attention, ((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8))),
    "layer_norm": (layer_norm, ((7, 5), (5,))),
    "max_pool": (max_pool, (X,)),
}


def both(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


WAYS = [(c, m) for c, (_, shapes) in CALLS.items() for m in ("all", "first", "others") if m == "all" or len(shapes) > 1]


@pytest.mark.parametrize(("call", "mapped"), WAYS)
def test_vmap_of_an_op(place: Any, call: str, mapped: str) -> None:
    function, shapes = CALLS[call]
    torch.manual_seed(0)
    given = [place(torch.randn(3, *shape, dtype=place.dtype)) for shape in shapes]
    dims = [None if mapped == ("others" if i == 0 else "first") else 0 for i in range(len(given))]
    given = [t if dim == 0 else t[0] for t, dim in zip(given, dims, strict=True)]
    found = both(torch.vmap(function, tuple(dims))(*given))
    each = [both(function(*(t[i] if d == 0 else t for t, d in zip(given, dims, strict=True)))) for i in range(3)]
    for outputs, single in zip(found, zip(*each, strict=True), strict=True):
        place.same(outputs, torch.stack(single))


def test_derivatives_of_the_mapped_op(place: Any) -> None:
    torch.manual_seed(0)
    given = [place(torch.randn(3, *s, dtype=place.dtype)).requires_grad_() for s in (X, W, (6,), Y)]
    mapped = torch.vmap(forward)(*given)
    single = torch.stack([forward(*(t[i] for t in given)) for i in range(3)])
    weights = torch.randn_like(single)
    for ours, other in zip(
        torch.autograd.grad(mapped, given, weights), torch.autograd.grad(single, given, weights), strict=True
    ):
        place.same(ours, other)
