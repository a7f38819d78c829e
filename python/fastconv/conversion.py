"""Puts fastconv's layers into a model that exists, and takes them out again.

A layer is swapped by giving the module object another class. No parameter, buffer, hook or name is touched, nothing is copied,
and the state_dict stays what it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import Module
from torch.nn.modules import batchnorm, conv, pooling
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from . import nn
from ._padding import SAME

# Swapping Conv3d would change nothing: torch computes it either way. ConvBnAct is ours alone.
_OURS: Mapping[type[Module], type[Module]] = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if name not in ("Conv3d", "ConvBnAct")
}
_THEIRS: Mapping[type[Module], type[Module]] = {
    **{ours: theirs for theirs, ours in _OURS.items()},
    nn.Conv3d: torch.nn.Conv3d,
}

# What a report speaks of; other layers (activations, instance norms) are none of its business.
_FAMILIES = (
    batchnorm.BatchNorm1d,
    batchnorm.BatchNorm2d,
    batchnorm.BatchNorm3d,
    conv._ConvNd,
    pooling._MaxPoolNd,
    pooling._AvgPoolNd,
    pooling._AdaptiveMaxPoolNd,
    pooling._AdaptiveAvgPoolNd,
    torch.nn.Linear,
    torch.nn.LayerNorm,
    torch.nn.MultiheadAttention,
    torch.nn.TransformerEncoder,
    torch.nn.TransformerEncoderLayer,
)


@dataclass(frozen=True)
class Kept:
    """A layer that was left as it is: its name in the model ("" for the model itself), its class's name, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `convert` or `revert` did.

    `swapped` counts the layers by class name, `already` those that needed no swap, and `kept` lists those that were left alone,
    of the kinds that fastconv has: convolutions (transposed ones too), pools, linear layers, batch norms, layer norms, multi-head
    attention and encoders of Transformers. A layer that occurs under several names counts once.
    """

    action: str
    swapped: Counter[str] = field(default_factory=Counter)
    already: Counter[str] = field(default_factory=Counter)
    kept: list[Kept] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many layers were swapped."""
        return sum(self.swapped.values())

    def __str__(self) -> str:
        lines = [f"{self.action} {_listed(self.swapped)}"]
        if self.already:
            lines.append(f"{_listed(self.already)} before")
        groups: dict[tuple[str, str], list[str]] = {}
        for layer in self.kept:
            groups.setdefault((layer.kind, layer.reason), []).append(layer.name or "the model itself")
        for (kind, reason), names in groups.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"left {kind} ({shown}): {reason}")
        return "\n".join(lines)


def _listed(counts: Counter[str]) -> str:
    total = sum(counts.values())
    detail = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"{total} layer{'' if total == 1 else 's'}" + (f": {detail}" if detail else "")


def convert(model: Module) -> Report:
    """Gives every layer of torch.nn in `model` (and `model` itself) that `fastconv.nn` has too fastconv's class, in place.

    Only objects of exactly torch.nn's classes are swapped. Left alone, and listed in the report with the reason, are subclasses,
    parametrized, lazy and quantized layers, layers with a forward of their own, and those that fastconv has no kernels for.
    Hooks, deepcopy, pickle, state_dict and torch.compile keep working; for TorchScript, `revert` first. Raises TypeError where
    `model` is no module.
    """
    report = Report("converted")
    for name, module in _named_modules("convert", model):
        kind = type(module)
        if kind in _THEIRS:
            report.already[kind.__name__] += 1
            continue
        reason = _why_not(module)
        if reason:
            report.kept.append(Kept(name, kind.__name__, reason))
        elif kind in _OURS:
            module.__class__ = _OURS[kind]
            report.swapped[kind.__name__] += 1
    return report


def revert(model: Module) -> Report:
    """Gives every fastconv layer in `model` (and `model` itself) the torch.nn class that it is named after, in place.

    Raises TypeError where `model` is no module.
    """
    report = Report("reverted")
    for name, module in _named_modules("revert", model):
        kind = type(module)
        if kind in _THEIRS and getattr(module, "padding", 0) == SAME:
            report.kept.append(Kept(name, kind.__name__, "torch has no padding='SAME' that follows the input's size"))
        elif kind in _THEIRS:
            module.__class__ = _THEIRS[kind]
            report.swapped[kind.__name__] += 1
        elif kind in _OURS:
            report.already[kind.__name__] += 1
        elif isinstance(module, nn.ConvBnAct):
            report.kept.append(Kept(name, kind.__name__, "torch has no such layer, and in eval mode it runs as before"))
        elif isinstance(module, tuple(_THEIRS)):
            report.kept.append(Kept(name, kind.__name__, _subclass_reason(module)))
    return report


def _named_modules(action: str, model: Module) -> list[tuple[str, Module]]:
    if not isinstance(model, Module):
        raise TypeError(f"{action}(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    return list(model.named_modules())


def _why_not(module: Module) -> str:
    """Why this layer is not swapped; "" where it can be, and where it is no layer that a report speaks of."""
    kind = type(module)
    if kind in _OURS:
        if "forward" in vars(module):
            return "it has a forward of its own, set on the object"
        return ""
    if isinstance(module, _FAMILIES):
        if isinstance(module, LazyModuleMixin):
            return "it is lazy: run one batch through the model, then convert again"
        if kind.__module__.startswith("torch.nn.modules") and kind.__base__ not in _OURS:
            return "fastconv has no kernels for it"
        return _subclass_reason(module)
    if kind.__name__ in nn.__all__:
        quantized = "quantized" in kind.__module__
        return "it is quantized" if quantized else f"it is {kind.__module__}.{kind.__name__}, not torch.nn's"
    return ""


def _subclass_reason(module: Module) -> str:
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "it is parametrized: convert first, then register the parametrizations"
    base = next((b for b in kind.__mro__[1:] if b in _OURS or b in _THEIRS), None)
    if base is None:
        return "fastconv has no kernels for it"
    between = kind.__mro__[: kind.__mro__.index(base)]
    own = (
        " with a forward of its own" if any("forward" in vars(c) or "_conv_forward" in vars(c) for c in between) else ""
    )
    bypass = (
        "; in eval mode, torch's fast path goes past the layers inside: torch.backends.mha.set_fastpath_enabled(False)"
        if issubclass(base, (torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer))
        else ""
    )
    return f"it is a subclass of {base.__name__}{own}{bypass}"
