"""Concatenations that fuse lets grow in one memory, and those that it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastconv

Forward = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """Three convolutions of 5 channels each, whose inputs are all that the forward puts together."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(19 + 5 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(19 + 5 * i, 5, 3, padding=1) for i in range(3))
        self.last = nn.Conv2d(34, 3, 1)
        self.how = forward

    def step(self, i: int, x: Tensor) -> Tensor:
        y: Tensor = self.convs[i](torch.relu(self.norms[i](x)))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def one_by_one(block: Block, x: Tensor) -> Tensor:
    for i in range(3):
        x = torch.cat((x, block.step(i, x)), dim=1)
    return x


def from_lists(block: Block, x: Tensor) -> Tensor:
    """torchvision's DenseNet."""
    parts = [x]
    for i in range(3):
        parts.append(block.step(i, torch.cat(parts, 1) if i else x))
    return torch.cat(parts, 1)


def written_to(block: Block, x: Tensor) -> Tensor:
    first = torch.cat((x, block.step(0, x)), 1)
    second = torch.cat((first, block.step(1, first)), 1)
    whole = torch.cat((second, block.step(2, second)), 1)
    whole.mul_(2)
    return whole + torch.relu(block.norms[2](second)).sum()  # which must not be twice what it was


def two_behind_one(block: Block, x: Tensor) -> Tensor:
    first = torch.cat((x, block.step(0, x)), 1)
    left = torch.cat((first, block.step(1, first)), 1)
    right = torch.cat((first, block.convs[1](torch.relu(block.norms[1](first)) + 1)), 1)
    return torch.cat((left, block.step(2, right)), 1)


def seen_by_others(block: Block, x: Tensor) -> Tensor:
    first = torch.cat((x, block.step(0, x)), 1)
    first.mul_(2)
    second = torch.cat((first, block.step(1, first)), 1)
    return torch.cat((second, block.step(2, second)), 1)


# How many chains each has: two_behind_one's second half is one, and so is what follows the write.
FORWARDS = {one_by_one: 1, from_lists: 1, written_to: 1, two_behind_one: 1, seen_by_others: 1}


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_growing(place: Any, forward: Forward, last: bool) -> None:
    torch.manual_seed(1)
    model = Block(forward).eval()
    for norm in model.norms:
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    x = torch.randn(2, 19, 6, 9).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    kept = x.clone()
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        expected = model(x)
    (expected_gradient,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    fused, there = fastconv.fuse(place(model)), place(x)
    assert len(fused.report.grown) == FORWARDS[forward]
    with torch.no_grad(), place.letting("batch_norm"):
        results = place.back([fused(there) for _ in range(2)])
    assert torch.equal(place.back(there), kept)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)
        assert result.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    # A gradient through it, which is recorded by torch's own concatenation.
    leaf = place(x.clone()).requires_grad_()
    with place.letting("batch_norm"):
        (found,) = torch.autograd.grad(fused(leaf).square().sum(), leaf)
    torch.testing.assert_close(place.back(found), expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_norms_of_halves_stay_norms(how: str) -> None:
    """A convolution in their place would be torch's, with factors of 8 bits."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU()).eval()
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.running_mean, -1, 1)  # type: ignore[arg-type]
    x = torch.randn(2, 32, 5, 6).contiguous(memory_format=torch.channels_last)
    if how == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    fused = fastconv.fuse(model)
    assert len(fused.report.joined) == 1
    with torch.no_grad(), torch.autocast("cpu", enabled=how == "autocast"):
        expected, found = model(x), fused(x)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="expected 4D input"):
        fused(x[0])
