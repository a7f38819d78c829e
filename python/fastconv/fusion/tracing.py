"""Which modules torch.fx follows, and what becomes of those that it cannot follow."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.fx import Graph, Tracer
from torch.nn import Module
from torch.nn.modules import batchnorm, conv

from fastconv import nn
from fastconv.conversion import Kept
from fastconv.fusion.attention import freeze_attention, freeze_feed_forward
from fastconv.fusion.frozen import FrozenConv2d, FrozenLinear
from fastconv.fusion.report import Report
from fastconv.fusion.rewriting import LAYERS, hooked, rewrite, why_not_frozen

_OURS: tuple[type[Module], ...] = tuple(getattr(nn, name) for name in nn.__all__)
# They hold modules and compute nothing.
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)
# Layers of torch.nn that call the modules they are made of.
_COMPOSED = (
    torch.nn.Transformer,
    torch.nn.TransformerEncoder,
    torch.nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoder,
    torch.nn.TransformerDecoderLayer,
)
_HOLLOW = (torch.nn.MultiheadAttention, *_COMPOSED)


def freeze(module: Module, name: str, report: Report) -> None:
    """Gives a module of a cloned tree, or the modules in it, a forward with frozen weights. ``name`` is its name in the model."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        if any(module.children()):
            report.untraced.append(
                Kept(name, type(module).__name__, "its forward is its own, set on the object or compiled")
            )
        return
    if isinstance(module, LAYERS):
        _freeze_layer(module, name, report)
        return
    if isinstance(module, torch.nn.MultiheadAttention):
        freeze_attention(module, name, report)
        return
    if isinstance(module, _COMPOSED):
        freeze_feed_forward(module, name, report)
        _freeze_children(module, name, report)
        return
    if _is_layer(module):
        if isinstance(module, batchnorm._NormBase):
            report.left.append(Kept(name, type(module).__name__, "what comes before it is not known"))
        _list_other_convolution(module, name, report)
        return
    reason = "" if isinstance(module, _LISTS) else _why_not(module)
    if not reason and not isinstance(module, _LISTS):
        try:
            graph = _Follower().trace(module)
        except (
            Exception
        ) as error:  # forward is anybody's code, which may fail in any way when it is given no real tensors
            reason = f"{type(error).__name__}: {(str(error).strip() or 'without a message').splitlines()[0]}"
        else:
            leaves = _leaves(graph, module)
            for target in sorted({str(node.target) for node in graph.nodes if node.op == "call_module"}):
                _list_other_convolution(module.get_submodule(target), f"{name}.{target}" if name else target, report)
            frozen = rewrite(module, graph, name, report)
            for target, leaf in leaves.items():
                freeze(leaf, f"{name}.{target}" if name else target, report)
            # Set past Module.__setattr__, which would make it a child: the tree stays as the model's own code expects it.
            module.__dict__["forward"] = frozen.forward
            return
    if reason:
        report.untraced.append(Kept(name, type(module).__name__, reason))
    _freeze_children(module, name, report)


def _freeze_children(module: Module, name: str, report: Report) -> None:
    for key, child in module.named_children():
        freeze(child, f"{name}.{key}" if name else key, report)


def _freeze_layer(layer: Module, name: str, report: Report) -> None:
    """A convolution or linear layer whose neighbours are not known."""
    reason = why_not_frozen(layer)
    if reason:
        report.left.append(Kept(name, type(layer).__name__, reason))
        return
    if isinstance(layer, torch.nn.Linear):
        layer.__dict__["forward"] = FrozenLinear.of(layer).forward
        report.linears.append(name)
        return
    assert isinstance(layer, (torch.nn.Conv2d, nn.ConvBnAct))
    layer.__dict__["forward"] = FrozenConv2d.of(layer).forward
    report.frozen.append(name)
    if isinstance(layer, nn.ConvBnAct):
        report.norms.append(name)
        report.activations.update([layer.activation] * (layer.activation != "none"))


def _list_other_convolution(layer: Module, name: str, report: Report) -> None:
    """Transposed ones, and those of one and three dimensions."""
    if isinstance(layer, conv._ConvNd) and not isinstance(layer, LAYERS):
        report.left.append(Kept(name, type(layer).__name__, "only the weights of Conv2d and Linear are kept packed"))


class _Follower(Tracer):
    """Follows everything but layers, and modules with hooks, which have to be called as modules."""

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return _is_layer(m) or hooked(m)


def _is_layer(module: Module) -> bool:
    """Whether this is a layer, torch's or ours, and not made of others."""
    if isinstance(module, _OURS):
        return True
    kind = type(module)
    return kind.__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(
        module, (torch.nn.Sequential, *_LISTS)
    )


def _leaves(graph: Graph, module: Module) -> dict[str, Module]:
    """Modules that the graph calls and that are made of others: each is frozen by itself."""
    targets = sorted({str(node.target) for node in graph.nodes if node.op == "call_module"})
    leaves = {target: module.get_submodule(target) for target in targets}
    return {target: leaf for target, leaf in leaves.items() if isinstance(leaf, _HOLLOW) or not _is_layer(leaf)}


def _why_not(module: Module) -> str:
    """Why a trace would not stand for every call of this module's forward; "" where it does."""
    parameters: list[Any] = list(inspect.signature(type(module).forward).parameters.values())[1:]
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return f"its forward takes any arguments ({parameter})"
        if parameter.default is not parameter.empty:
            return f"its forward has an optional argument, {parameter.name}"
    return ""
