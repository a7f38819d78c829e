"""fastconv.nn.ConvBnAct: three steps in training, one call of a kernel in eval."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastconv
from fastconv.commands.twins import calibrate_batch_norm


def images(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape)


class TwoBlocks(nn.Module):
    """A block and a residual one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = fastconv.nn.ConvBnAct(4, 4), fastconv.nn.ConvBnAct(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x), x)
        return y


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "sigmoid"])
def test_conv_bn_act(place: Any, activation: str, residual: bool) -> None:
    torch.manual_seed(0)
    block = fastconv.nn.ConvBnAct(4, 6, (3, 5), stride=(1, 2), dilation=(2, 1), groups=2, activation=activation)
    place(block)
    x, r = place(images(2, 4, 9, 8)), place(images(2, 6, 9, 4)) if residual else None
    with place.letting("batch_norm"):
        compare(place, block, x, r, activation)


def compare(place: Any, block: Any, x: Tensor, r: Tensor | None, activation: str) -> None:
    """The block beside its steps, in training and in eval mode."""
    trained = block(x, r)
    steps = nn.Sequential(*list(block)[:2])
    expected = steps.train()(x)
    expected = expected if r is None else expected + r
    expected = expected if activation == "none" else block[2](expected)
    place.same(trained, expected)
    block.eval()
    y = block[1](block[0](x))
    y = y if r is None else y + r
    y = y if activation == "none" else block[2](y)
    assert y.shape == (2, 6, 9, 4)
    with torch.no_grad(), fastconv.observe() as records:
        found = block(x, r)
    assert [record.op for record in records] == ["conv2d_fwd"]
    place.same(found, y)
    gradients = [torch.autograd.grad(out.square().sum(), block[0].weight)[0] for out in (block(x, r), y)]
    place.same(*gradients, 18, rtol=1e-4, atol=1e-4)


def test_conv_bn_act_in_a_fused_model() -> None:
    torch.manual_seed(0)
    model = TwoBlocks()
    calibrate_batch_norm(model, images(2, 4, 6, 5))
    fused = fastconv.fuse(model.eval())
    torch.testing.assert_close(fused(images(2, 4, 6, 5)), model(images(2, 4, 6, 5)))
    assert (len(fused.report.norms), len(fused.report.residuals), fused.report.activations) == (2, 1, {"relu": 2})
    assert list(model.a.state_dict())[:2] == ["0.weight", "1.weight"]


def test_conv_bn_act_refuses_other_activations() -> None:
    with pytest.raises(ValueError, match="activation: got 'tanh', expected none, relu"):
        fastconv.nn.ConvBnAct(4, 4, activation="tanh")


def test_conv_bn_act_with_tensorflows_padding() -> None:
    torch.manual_seed(0)
    block = fastconv.nn.ConvBnAct(4, 6, 3, stride=2, padding="SAME", activation="silu")
    calibrate_batch_norm(block, images(2, 4, 8, 7))
    x = images(2, 4, 8, 7)
    y = block.eval()(x)
    assert y.shape == (2, 6, 4, 4)
    torch.testing.assert_close(y, block[2](block[1](block[0](x))))


def test_revert_says_that_the_block_stays() -> None:
    report = fastconv.revert(nn.Sequential(fastconv.nn.ConvBnAct(4, 4)))
    assert "left ConvBnAct (0): torch has no such layer" in str(report)
