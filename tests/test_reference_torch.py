"""The reference against torch in float64, where torch is installed: both must mean the same by every option."""

from __future__ import annotations

import numpy as np
import pytest

from fastconv.testing import fill, grids, harness
from fastconv.testing.problems import ConvCase, PoolCase

torch = pytest.importorskip("torch")
functional = torch.nn.functional


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def torch_conv(case: ConvCase, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    top, bottom, left, right = case.pad4
    padded = functional.pad(x, (left, right, top, bottom))
    return functional.conv2d(padded, w, bias, case.stride, 0, case.dilation, case.groups)


def torch_activation(z: torch.Tensor, name: str) -> torch.Tensor:
    if name in ("none", "sigmoid"):
        return z if name == "none" else torch.sigmoid(z)
    return functional.gelu(z, approximate="tanh") if name == "gelu_tanh" else getattr(functional, name)(z)


def test_convolutions_and_their_gradients() -> None:
    for case in grids.conv_grid()[::7]:
        x = tensor(fill.normal(f"{case}x", case.x_shape)).requires_grad_()
        w = tensor(fill.normal(f"{case}w", case.w_shape)).requires_grad_()
        bias = tensor(fill.normal(f"{case}b", (case.K,))).requires_grad_()
        dy = fill.normal(f"{case}y", case.y_shape)
        y = torch_conv(case, x, w, bias)
        dx, dw, db = torch.autograd.grad(y, (x, w, bias), tensor(dy))
        options = {"stride": case.stride, "pad4": case.pad4, "dilation": case.dilation, "groups": case.groups}
        nx, nw, nb = (t.detach().numpy() for t in (x, w, bias))
        ours_w, ours_b = harness.reference.conv2d_wgrad(dy, nx, case.w_shape, **options)
        ours = [
            harness.reference.conv2d(nx, nw, nb, activation=case.activation, **options),
            harness.reference.conv2d_dgrad(dy, nw, case.x_shape, **options),
            ours_w,
            ours_b,
        ]
        theirs = [torch_activation(y, case.activation).detach(), dx, dw, db]
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other.numpy(), rtol=1e-10, atol=1e-11, err_msg=str(case))


def as_torch_pool(case: PoolCase) -> bool:
    """torch pads both sides alike, by at most half of the kernel."""
    top, bottom, left, right = case.pad4
    return top == bottom and left == right and 2 * top <= case.R and 2 * left <= case.S


@pytest.mark.parametrize(
    "values", [fill.normal, fill.integers_with_zeros, fill.with_specials, fill.mostly_minus_infinity]
)
def test_max_pooling(values: fill.Fill) -> None:
    checked = 0
    for case in grids.grid("max_pool2d_fwd")[::2]:
        x = values(f"{case}x", case.x_shape)
        if case.adaptive is not None:
            y, indices = functional.adaptive_max_pool2d(tensor(x), case.adaptive, return_indices=True)
        elif as_torch_pool(case):
            pad = (case.pad4[0], case.pad4[2])
            y, indices = functional.max_pool2d(
                tensor(x), (case.R, case.S), case.stride, pad, case.dilation, case.ceil, return_indices=True
            )
        else:
            continue
        checked += 1
        for mine, other in zip(harness.max_pool_truth(case, x), (y, indices), strict=True):
            np.testing.assert_array_equal(mine, other.numpy(), err_msg=str(case))
    assert checked > 100


def test_average_pooling_and_its_gradient() -> None:
    checked = 0
    for case in grids.grid("avg_pool2d_fwd")[::2]:
        x = tensor(fill.normal(f"{case}x", case.x_shape)).requires_grad_()
        if case.adaptive is not None:
            y = functional.adaptive_avg_pool2d(x, case.adaptive)
        elif as_torch_pool(case):
            pad = (case.pad4[0], case.pad4[2])
            y = functional.avg_pool2d(
                x, (case.R, case.S), case.stride, pad, case.ceil, case.include_pad, case.divisor or None
            )
        else:
            continue
        checked += 1
        dy = fill.normal(f"{case}y", case.y_shape)
        (dx,) = torch.autograd.grad(y, x, tensor(dy))
        mine = harness._average("avg_pool2d_fwd", case, {"x": x.detach().numpy()})
        np.testing.assert_allclose(mine, y.detach().numpy(), rtol=1e-12, atol=1e-13, err_msg=str(case))
        mine = harness._average("avg_pool2d_bwd", case, {"y": dy})
        np.testing.assert_allclose(mine, dx.numpy(), rtol=1e-12, atol=1e-13, err_msg=str(case))
    assert checked > 100


def test_layer_norm_and_its_gradients() -> None:
    for case in grids.norm_grid()[::3]:
        x = tensor(fill.normal(f"{case}x", (case.N, case.C))).requires_grad_()
        weight, bias = (tensor(fill.normal(f"{case}{name}", (case.C,))).requires_grad_() for name in ("gamma", "beta"))
        residual, dy = (fill.normal(f"{case}{name}", (case.N, case.C)) for name in ("residual", "dy"))
        total = x + tensor(residual)
        y = functional.layer_norm(total, (case.C,), weight, bias)
        theirs = [y.detach(), *torch.autograd.grad(y, (x, weight, bias), tensor(dy))]
        nx, nw, nb = (t.detach().numpy() for t in (x, weight, bias))
        mine = harness.reference.layer_norm(nx, nw, nb, eps=1e-5, residual=residual).y
        gradients = harness.reference.layer_norm_bwd(dy, total.detach().numpy(), nw, eps=1e-5)
        for one, other in zip((mine, *gradients), theirs, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-8, atol=1e-9, err_msg=str(case))
