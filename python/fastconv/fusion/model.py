"""`fuse` and `unfuse`, and the module that stands between a model and its frozen copy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn import Module

from fastconv.conversion import convert
from fastconv.fusion.report import Report
from fastconv.fusion.tracing import freeze

M = TypeVar("M", bound=Module)


class Fused(Module):
    """A model whose forward runs on folded weights, while its parameters, buffers, keys and modules are the original's.

    They are the original's own objects: ``to``, ``load_state_dict`` and the like change both, and fold the weights again. A
    change that no module is told of, such as an optimizer's step or a write into a parameter, is not seen: call ``fuse`` on the
    result to fold again. Calling ``train()`` raises RuntimeError; ``unfuse`` first. Copies and pickles hold the original and fuse
    it anew. Hooks on the parts that were there before run as ever, and what has them is not fused; later ones are not seen.

    ``original`` is the model that was fused, ``report`` what was done. Methods of its class other than forward (a Transformer's
    ``greedy``) run on the frozen parts that they reach as modules.
    """

    original: Module
    report: Report

    def __init__(self, original: Module) -> None:
        super().__init__()
        # Everything is shared, the dictionaries of parameters and modules themselves too, but for the dictionaries of hooks.
        for key, value in vars(original).items():
            if key != "forward":
                self.__dict__[key] = OrderedDict(value) if "_hooks" in key and isinstance(value, dict) else value
        self.__dict__["original"] = original
        self.register_load_state_dict_post_hook(_fold_again)  # type: ignore[no-untyped-call]
        self.refresh()

    def refresh(self) -> None:
        """Folds the weights as they are now."""
        body = cloned(self.original)
        convert(body)
        report = Report(type(self.original).__name__)
        freeze(body, "", report)
        self.__dict__["_body"], self.__dict__["report"] = body, report

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_body"].forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("original")
            if original is None or not hasattr(type(original), name):
                raise
        return getattr(self.__dict__["_body"], name)

    def train(self: M, mode: bool = True) -> M:
        if mode:
            raise RuntimeError(
                "a fused model has frozen weights and cannot train: fastconv.unfuse(model) gives the original back"
            )
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.original._load_from_state_dict(*args)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Fused:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.refresh()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_body", "report")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.refresh()

    def __repr__(self) -> str:
        return f"Fused({self.report.summary})"


def _fold_again(module: Module, incompatible_keys: Any) -> None:
    assert isinstance(module, Fused)
    module.refresh()


def cloned(module: Module, seen: dict[Module, Module] | None = None) -> Module:
    """A tree of new module objects with the same parameters and buffers: what is done to the tree is not done to the model."""
    seen = {} if seen is None else seen
    if isinstance(module, Fused):
        module = module.original
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if module not in seen:
        clone = seen[module] = type(module).__new__(type(module))
        clone.__dict__.update(vars(module))
        for name in ("_parameters", "_buffers"):
            clone.__dict__[name] = dict(vars(module)[name])
        clone.__dict__["_modules"] = {
            key: None if child is None else cloned(child, seen) for key, child in module._modules.items()
        }
    return seen[module]


def fuse(model: Module) -> Fused:
    """A model that computes what `model` does in eval mode, with its weights frozen; `model` itself is left as it is.

    BatchNorms are folded into the convolutions before them. The activation behind a convolution or a linear layer (relu, relu6,
    silu, hardswish, gelu in both forms, sigmoid) and an addition before it are done by its kernel, which finds the weights in
    its own order. torch.nn's layers are taken as fastconv's, and dropout is left out.
    The parts are found with torch.fx. A module that it cannot follow keeps its own forward, and each module in it is tried by
    itself. Where a forward has optional arguments it is not followed, because a trace would hold for one choice of them; what
    else a trace cannot see (a branch on the input's type, a random number) is as torch.fx documents it.

    Returns a `Fused`: print its ``report``. Its state_dict is the model's, and `unfuse` gives the model back.

    Raises TypeError where `model` is no module, RuntimeError where it is in training mode.
    """
    if not isinstance(model, Module):
        raise TypeError(f"fuse(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, Fused):
        model.refresh()
        return model
    if model.training:
        raise RuntimeError("fuse(): the model is in training mode, expected eval mode: call model.eval() first")
    return Fused(model)


def unfuse(model: Module) -> Module:
    """The original of a fused model; in any other model, the originals are put back in place of fused parts.

    Raises TypeError where `model` is no module.
    """
    if not isinstance(model, Module):
        raise TypeError(f"unfuse(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, Fused):
        return model.original
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, Fused):
                parent._modules[name] = child.original
    return model
