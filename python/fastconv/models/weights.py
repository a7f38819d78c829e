"""Checkpoint files into models: .pth/.pt and .safetensors, strictly and with the names in the error."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Where training scripts put the state dict, and what wrappers put before each key (DataParallel, torch.compile).
_NESTS = ("state_dict", "model_state_dict", "model_state", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")

# DenseNet's layers in torchvision's files, which are older than its classes: "denselayer1.norm.1.weight".
_OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.")

_SHOWN_NAMES = 8


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Copy a checkpoint's tensors into ``model`` and return it.

    Every parameter and buffer must be in the file with the model's shape, and nothing else may be; the one exception
    is BatchNorm's ``num_batches_tracked``, which files older than torch 0.4.1 lack. State dicts nested under
    "state_dict", "model" and the like are found, "module." and "_orig_mod." prefixes dropped, the old names in
    torchvision's DenseNet files known, and what a model's ``adapt_checkpoint`` knows of its files; dtypes are converted to
    the model's. No code in the file is run. On any error the model is left as it was.

    Args:
        path: ``.safetensors`` file, or anything ``torch.load`` reads (``.pth``, ``.pt``, ``.bin``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no plain dictionary of tensors.
        RuntimeError: names or shapes differ from the model's; the message lists them.
        ModuleNotFoundError: a .safetensors file without the safetensors package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    adapt = getattr(model, "adapt_checkpoint", None)
    if adapt is not None:
        state = adapt(state)
    wanted = model.state_dict()
    for name in wanted:
        if name.endswith(".num_batches_tracked") and name not in state:
            state[name] = torch.zeros_like(wanted[name])
    _check_fit(state, wanted, path, type(model).__name__)
    model.load_state_dict(state)
    return model


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs the safetensors package: pip install safetensors") from error
    try:
        return _plain_state(load_file(path), path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} could not be read as tensors ({reason}). Files that hold Python objects, such as a whole pickled "
            "model, are refused: save model.state_dict() instead"
        ) from error
    return _plain_state(content, path)


def _plain_state(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict in what a file held, and take the wrappers' prefixes off its keys."""
    while isinstance(content, Mapping):
        nest = next((key for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    if not isinstance(content, Mapping) or not content:
        held = "an empty dictionary" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"{path} holds {held}, expected a state dict: a dictionary from names to tensors")
    odd = [f"{key!r}: {type(value).__name__}" for key, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{path} holds entries that are not tensors, so it is no state dict: {_some(odd)}")
    state: dict[str, Tensor] = dict(content)
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return {_OLD_DENSENET.sub(r"\1\2.", name): tensor for name, tensor in state.items()}


def _check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, model_name: str) -> None:
    """RuntimeError naming every kind of difference between a file's tensors and a model's."""
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    shapes = [
        f"{name}: file {tuple(state[name].shape)}, model {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    problems = [
        f"{len(found)} {what}: {_some(found)}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise RuntimeError(f"{path} does not fit {model_name}:\n  " + "\n  ".join(problems))


def _some(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    listed = list(items)
    rest = len(listed) - _SHOWN_NAMES
    return ", ".join(listed[:_SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")
