"""Checkpoint files into models: what is found in them, what does not fit, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fastconv import models


@pytest.fixture
def lenet() -> nn.Module:
    torch.manual_seed(1)
    return models.create("lenet5", layers=nn)


def assert_loads(path: Path, source: nn.Module) -> None:
    """Loading ``path`` into a differently initialised copy gives ``source``'s weights, bit for bit."""
    model = copy.deepcopy(source)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    assert models.load_weights(model, path) is model
    for key, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="plain"),
        pytest.param(lambda state: {"state_dict": state, "epoch": 3}, id="state_dict"),
        pytest.param(lambda state: {"model": {"state_dict": state}}, id="two-nests"),
        pytest.param(lambda state: {f"module.{key}": t for key, t in state.items()}, id="DataParallel"),
        pytest.param(lambda state: {"model": {f"module._orig_mod.{k}": t for k, t in state.items()}}, id="compiled"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_loads_torch_files(lenet: nn.Module, tmp_path: Path, wrap: Callable[..., object], suffix: str) -> None:
    torch.save(wrap(dict(lenet.state_dict())), tmp_path / f"w{suffix}")
    assert_loads(tmp_path / f"w{suffix}", lenet)


def test_loads_safetensors(lenet: nn.Module, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(lenet.state_dict(), tmp_path / "w.safetensors")
    assert_loads(tmp_path / "w.safetensors", lenet)


def test_loads_files_older_than_num_batches_tracked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = models.create("resnet18", layers=nn, num_classes=2)
    state = {key: tensor for key, tensor in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert_loads(tmp_path / "old.pth", source)


def test_loads_torchvisions_densenet_files(tmp_path: Path) -> None:
    source = models.create("densenet121", layers=nn, num_classes=2)
    old = {re.sub(r"(denselayer\d+\.(norm|conv))(\d)", r"\1.\3", key): t for key, t in source.state_dict().items()}
    assert "features.denseblock4.denselayer16.norm.2.running_var" in old
    torch.save(old, tmp_path / "densenet121.pth")
    assert_loads(tmp_path / "densenet121.pth", source)


def test_converts_to_the_models_dtype(lenet: nn.Module, tmp_path: Path) -> None:
    torch.save({key: tensor.double() for key, tensor in lenet.state_dict().items()}, tmp_path / "w.pth")
    assert models.load_weights(lenet, tmp_path / "w.pth").conv1.weight.dtype == torch.float32


def test_names_everything_that_does_not_fit_and_changes_nothing(lenet: nn.Module, tmp_path: Path) -> None:
    state = dict(copy.deepcopy(lenet.state_dict()))
    state["conv1.weight"] += 1
    state["head.weight"] = state.pop("fc3.weight")
    state["fc3.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "w.pth")
    kept = copy.deepcopy(lenet.state_dict())
    with pytest.raises(RuntimeError) as caught:
        models.load_weights(lenet, tmp_path / "w.pth")
    message = str(caught.value)
    assert "does not fit LeNet5" in message
    assert "1 missing: fc3.weight" in message
    assert "1 unexpected: head.weight" in message
    assert "1 of another shape: fc3.bias: file (5,), model (10,)" in message
    assert all(torch.equal(tensor, kept[key]) for key, tensor in lenet.state_dict().items())


def test_a_long_list_of_names_is_cut(tmp_path: Path, lenet: nn.Module) -> None:
    torch.save({"only": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=r"10 missing: conv1\.weight, .* and 2 more"):
        models.load_weights(lenet, tmp_path / "w.pth")


def test_refuses_pickled_objects(lenet: nn.Module, tmp_path: Path) -> None:
    torch.save(lenet, tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"Python objects.*save model\.state_dict\(\) instead"):
        models.load_weights(lenet, tmp_path / "whole.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2), "holds a Tensor, expected a state dict"),
        ({}, "holds an empty dictionary"),
        ({"conv1.weight": torch.zeros(1), "lr": 0.1}, "not tensors, so it is no state dict: 'lr': float"),
    ],
    ids=["tensor", "empty", "number"],
)
def test_refuses_what_is_no_state_dict(lenet: nn.Module, tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        models.load_weights(lenet, tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_refuses_other_files(lenet: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=r"could not be read|not a safetensors file"):
        models.load_weights(lenet, path)


def test_missing_file(lenet: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights file"):
        models.load_weights(lenet, tmp_path / "none.pth")
