"""Frozen convolutions that run one after the other on bands of rows, so that what lies between them stays in the cache.

A depthwise convolution and the pointwise ones around it, as in MobileNet's blocks: what the first expands is several times as
large as the block's input and result, and is written and read once. See csrc/core/cascade.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import Module

from fastconv import _native, plan
from fastconv.fusion.frozen import FrozenConv2d
from fastconv.fusion.walking import between, only_user
from fastconv.ops._conv2d_kernels import Geometry, fwd_recipe
from fastconv.ops._dispatch import DTYPES, KERNEL, empty_strided, usual

if TYPE_CHECKING:
    from fastconv import _C
else:
    _C = _native.load()

_get_threads = torch.get_num_threads
_forced = plan.forced.get

# What a convolution is, without its numbers: weight's shape and strides, geometry, whether there is a bias, activation.
_Layer = tuple[plan.Shape, plan.Shape, Geometry, bool, str]


@dataclass(frozen=True)
class _Recipe:
    native: _C.Cascade
    plans: tuple[plan.Plan, ...]
    y_shape: plan.Shape
    y_strides: plan.Shape


@plan.cached
def _recipe(
    x: plan.Shape,
    x_strides: plan.Shape,
    dtype: torch.dtype,
    residual: tuple[plan.Shape, plan.Shape] | None,
    layers: tuple[_Layer, ...],
    threads: int,
    strict: bool,
) -> _Recipe | None:
    """None where the convolutions are better called one by one."""
    shape, strides = x, x_strides
    plans: list[plan.Plan] = []
    for w, w_strides, geometry, biased, activation in layers:
        last = len(plans) == len(layers) - 1
        recipe = fwd_recipe(
            shape, strides, w, w_strides, dtype, *geometry, biased,
            None if residual is None or not last else residual[1], activation, threads, "", strict, True,
        )  # fmt: skip
        if recipe.plan is None or recipe.copy_a is not None or recipe.copy_b is not None:
            return None
        plans.append(recipe.plan)
        shape, strides = recipe.out_shape, recipe.out_strides
    if residual is not None and residual[0] != shape:
        return None
    try:
        return _Recipe(_C.Cascade([made.native for made in plans]), tuple(plans), shape, strides)
    except NotImplementedError:
        return None


class FrozenCascade(Module):
    """`FrozenConv2d` after `FrozenConv2d`: their results, bit for bit."""

    def __init__(self, layers: Sequence[FrozenConv2d]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        # Not by the list: that is a search through Python's dictionaries for every layer of every call.
        self._each = tuple(layers)
        self._described = tuple(_described(layer) for layer in layers)
        self._channels = layers[0].weight.shape[1] * layers[0].groups
        self._dtype = layers[0].weight.dtype
        self._declined: set[tuple[plan.Shape, plan.Shape, tuple[plan.Shape, plan.Shape] | None]] = set()
        self.eval()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W) to (N, K, P, Q); ``residual`` is what can be added to the last convolution's result."""
        recipe = self._find(input, residual)
        if recipe is None:
            for layer in self._each[:-1]:
                input = layer(input)
            y: Tensor = self._each[-1](input, residual)
            return y
        y = empty_strided(recipe.y_shape, recipe.y_strides, input.dtype)
        filters = []
        for layer, made in zip(self._each, recipe.plans):
            w, bias = cast(Tensor, layer._buffers["weight"]), layer._buffers["bias"]
            packed = layer._packed.get(made, w)
            filters.append(
                (
                    w.data_ptr(),
                    0 if bias is None else bias.data_ptr(),
                    0 if packed is None else packed.data_ptr(),
                )
            )
        recipe.native.run(input.data_ptr(), 0 if residual is None else residual.data_ptr(), y.data_ptr(), filters)
        return y

    def _find(self, input: Any, residual: Any) -> _Recipe | None:
        # Whoever watches or forces kernels wants to see each convolution.
        if usual(input, input, residual) is not KERNEL or plan._observers or _forced():
            return None
        shape, strides, dtype = input.shape, input.stride(), input.dtype
        added = None if residual is None else (tuple(residual.shape), residual.stride())
        # Most images are small enough to be declined, and the long key below takes as long as two convolutions' calls.
        if (shape, strides, added) in self._declined:
            return None
        if len(shape) != 4 or shape[1] != self._channels or 0 in shape or dtype not in DTYPES:
            return None
        if dtype is not self._dtype or (residual is not None and residual.dtype is not dtype):
            return None
        recipe = _recipe(shape, strides, dtype, added, self._described, _get_threads(), plan.strict)
        if recipe is None:
            if len(self._declined) >= plan.CACHE_SIZE:
                self._declined.clear()
            self._declined.add((shape, strides, added))
        return recipe

    def extra_repr(self) -> str:
        return "in bands of rows"


def _described(layer: FrozenConv2d) -> _Layer:
    weight, bias = layer.weight, layer.bias
    geometry = cast(Geometry, layer._geometry)
    return tuple(weight.shape), weight.stride(), geometry, bias is not None, layer.activation


def find(
    graph: Graph, module_of: Callable[[Node], Module | None], writes: Callable[[Node], bool]
) -> Iterator[list[Node]]:
    """Calls of frozen convolutions that make a cascade, each used by nothing but the next."""
    taken: set[Node] = set()
    for first in list(graph.nodes):
        cascade: list[Node] = []
        node: Node | None = first
        while node is not None and node not in taken and _continues(cascade, node, module_of):
            cascade.append(node)
            node = only_user(node) if len(node.args) == 1 else None
        if len(cascade) < 2 or not any(_has_taps(module_of(node)) for node in cascade):
            continue
        if any(writes(node) for node in between(cascade[0], cascade[-1]) if node not in cascade):
            continue
        taken.update(cascade)
        yield cascade


def _continues(cascade: list[Node], node: Node, module_of: Callable[[Node], Module | None]) -> bool:
    layer = module_of(node)
    if not isinstance(layer, FrozenConv2d) or layer._geometry is None or node.kwargs or not node.args:
        return False
    if cascade and (node.args[0] is not cascade[-1] or cascade[-1] in node.args[1:]):
        return False
    _, channels, R, S = layer.weight.shape
    pointwise = (R, S) == (1, 1) and layer.groups == 1
    if not pointwise and channels != 1:
        return False
    # One with taps: two would need more rows of what is before them. One on either side of it.
    kinds = [_has_taps(module_of(before)) for before in cascade] + [not pointwise]
    return kinds in ([False], [True], [False, True], [True, False], [False, True, False])


def _has_taps(layer: Module | None) -> bool:
    return isinstance(layer, FrozenConv2d) and layer.groups > 1
