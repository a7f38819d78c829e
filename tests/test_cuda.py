"""fastconv.cuda: on the emulated kernels with stand-ins for CUDA tensors (fake_cuda.py), and for real where there is a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastconv
from fastconv import cuda, plan
from fastconv.cli import main

Device = Callable[[Tensor], Tensor]


@pytest.fixture
def device(gpu: Any) -> Device:
    """What brings a tensor there. Nobody has asked for the kernels but the calls themselves."""
    fastconv.set_cuda(False)
    return gpu  # type: ignore[no-any-return]


def allow_tf32(layer: str, allowed: bool) -> None:
    """What the two public switches call: torch.testing's samples, which other tests use, lock the one of cuDNN."""
    if layer == "conv":
        torch._C._set_cudnn_allow_tf32(allowed)
    else:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def operand(device: Device, *shape: int, last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    memory_format = torch.channels_last if last and t.dim() == 4 else torch.contiguous_format
    return device(t.to(memory_format=memory_format)).requires_grad_()


def here(t: Tensor) -> Tensor:
    """On the CPU."""
    t = t.detach()
    return getattr(t, "held", t).cpu()


def compare(ours: Tensor, theirs: Tensor, leaves: list[Tensor], dtype: torch.dtype) -> None:
    """Values, memory formats and gradients, with float64's answer as the truth."""
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(here(ours.double()), here(theirs), **tolerance)
    dy = torch.randn_like(theirs)
    got = torch.autograd.grad(ours, leaves, dy.to(ours.dtype))
    expected = torch.autograd.grad(theirs, leaves, dy.to(ours.dtype).double())
    for a, b in zip(got, expected):
        torch.testing.assert_close(here(a.double()), here(b.double()), **tolerance)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 16])
def test_convolution_and_its_gradients(device: Device, last: bool, dtype: torch.dtype, groups: int) -> None:
    x = operand(device, 2, 16, 7, 6, last=last, dtype=dtype)
    w = operand(device, 16, 16 // groups, 3, 3, last=last, dtype=dtype)
    bias = operand(device, 16, last=False, dtype=dtype)
    options = {"stride": (2, 1), "padding": 1, "groups": groups}
    y = cuda.conv2d(x, w, bias, **options)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    compare(y, F.conv2d(x.double(), w.double(), bias.double(), **options), [x, w, bias], dtype)


def test_linear(device: Device) -> None:
    x, w, bias = (operand(device, *shape, last=False) for shape in ((2, 5, 24), (10, 24), (10,)))
    compare(cuda.linear(x, w, bias), F.linear(x.double(), w.double(), bias.double()), [x, w, bias], torch.float32)


@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_tf32_where_torch_allows_it_and_nobody_is_strict(device: Device, layer: str) -> None:
    x, w = operand(device, 2, 32, 5, 6, last=True), operand(device, 64, 32, 1, 1, last=True)

    def call() -> list[Tensor]:
        if layer == "conv":
            y = cuda.conv2d(x, w)
        else:
            y = cuda.linear(x.permute(0, 2, 3, 1), w.flatten(1)).permute(0, 3, 1, 2)
        return [y.detach(), *torch.autograd.grad(y, [x, w], y.detach())]

    exact = call()
    allow_tf32("linear" if layer == "conv" else "conv", True)
    assert all(map(torch.equal, call(), exact))
    allow_tf32(layer, True)
    rounded = call()
    fastconv.set_accuracy("strict")
    try:
        assert all(map(torch.equal, call(), exact))
    finally:
        fastconv.set_accuracy("fast")
    size = F.conv2d(x.detach().abs(), w.detach().abs())
    assert ((rounded[0] - exact[0]).abs() <= 2**-10 * 1.01 * size).all()
    assert not any(map(torch.equal, rounded, exact))


@pytest.mark.parametrize("last", [False, True])
def test_pooling(device: Device, last: bool) -> None:
    x = operand(device, 2, 8, 9, 7, last=last)
    options = {"stride": 2, "padding": 1, "ceil_mode": True}
    for ours, theirs in ((cuda.max_pool2d, F.max_pool2d), (cuda.avg_pool2d, F.avg_pool2d)):
        compare(ours(x, 3, **options), theirs(x.double(), 3, **options), [x], torch.float32)
    for ours, theirs in (
        (cuda.adaptive_avg_pool2d, F.adaptive_avg_pool2d),
        (cuda.adaptive_max_pool2d, F.adaptive_max_pool2d),
    ):
        compare(ours(x, (4, 3)), theirs(x.double(), (4, 3)), [x], torch.float32)
    _, indices = cuda.max_pool2d(x, 3, return_indices=True)
    assert torch.equal(indices, F.max_pool2d(x, 3, return_indices=True)[1])


OPTIONS: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "softcap": 4.0, "window": 4, "return_lse": True}


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slopes: Tensor, sinks: Tensor, bias: Tensor
) -> Tensor:
    """What OPTIONS ask for, from a matrix of scores."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    scores = 4 * torch.tanh(q @ k.mT / q.shape[3] ** 0.5 / 4) + mask - slopes[:, None, None] * (j - i).abs()
    scores = scores + bias[:, :, j - i + q.shape[2] - 1]
    scores = scores.masked_fill((j > i) | (j < i - 4), -torch.inf)
    lse = torch.logsumexp(torch.cat([scores, sinks[..., None, None].expand(*scores.shape[:3], 1)], 3), 3)
    return torch.cat([(torch.exp(scores - lse[..., None]) @ v).flatten(), lse.flatten()])


# Where the mask is float32 beside halves, it is read as that.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients(device: Device, dtype: torch.dtype) -> None:
    sizes = (2, 4, 9, 16), (2, 2, 70, 16), (2, 2, 70, 16), (4, 9, 70), (4,), (2, 4), (2, 1, 78)
    leaves = [operand(device, *s, last=False, dtype=dtype if len(s) == 4 else torch.float32) for s in sizes]
    q, k, v, mask, slopes, sinks, bias = leaves
    out, lse = cuda.scaled_dot_product_attention(
        q, k, v, mask, alibi_slopes=slopes, sinks=sinks, relative_bias=bias, **OPTIONS
    )
    ours = torch.cat([out.flatten().to(lse.dtype), lse.flatten()])
    compare(ours, dense_attention(*(t.double() for t in leaves)), leaves, dtype)


def test_attention_of_three_dimensions_with_a_boolean_mask(device: Device) -> None:
    q, k, v = (operand(device, 3, L, 8, last=False) for L in (5, 7, 7))
    mask = device(torch.arange(35).view(5, 7) % 3 != 0)
    ours = cuda.scaled_dot_product_attention(q, k, v, mask)
    compare(ours, F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask), [q, k, v], torch.float32)
    with torch.no_grad():
        assert torch.equal(cuda.scaled_dot_product_attention(q, k, v, mask), ours)


def test_attention_refuses_in_words(device: Device) -> None:
    q = device(torch.randn(1, 2, 3, 300))
    with pytest.raises(NotImplementedError, match="more than 256 features"):
        cuda.scaled_dot_product_attention(q, q, q)
    assert cuda.scaled_dot_product_attention(q[:0], q[:0], q[:0]).shape == (0, 2, 3, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("added", [False, True])
def test_layer_norm_and_its_gradients(device: Device, dtype: torch.dtype, added: bool) -> None:
    x, residual = (operand(device, 3, 5, 4, 6, last=False, dtype=dtype) for _ in range(2))
    w, bias = (operand(device, 4, 6, last=False, dtype=dtype) for _ in range(2))
    if not added:
        compare(
            cuda.layer_norm(x, (4, 6), w, bias), F.layer_norm(x.double(), (4, 6), w.double(), bias.double()),
            [x, w, bias], dtype,
        )  # fmt: skip
        return
    theirs = x.double() + residual.double()
    both = torch.stack([F.layer_norm(theirs, (4, 6), w.double()), theirs])
    compare(torch.stack(cuda.layer_norm(x, (4, 6), w, residual=residual)), both, [x, residual, w], dtype)


def test_layer_norm_of_nothing_and_of_what_does_not_fit(device: Device) -> None:
    x = device(torch.randn(0, 6)).requires_grad_()
    assert cuda.layer_norm(x, (6,)).shape == (0, 6)
    with pytest.raises(RuntimeError, match="expected input with shape"):
        cuda.layer_norm(x, (5,))


def test_tensors_elsewhere_are_errors() -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match="input is on cpu, expected all operands on one CUDA device"):
        cuda.conv2d(x, w)
    with pytest.raises(RuntimeError, match="input is on cpu"):
        cuda.max_pool2d(x, 2)


def test_operands_and_kernels_belong_to_one_kind_of_device() -> None:
    x, y = ((1, 1, 4, 4), (16, 16, 4, 1)), ((1, 1, 2, 2), (4, 4, 2, 1))
    problem = plan.pool2d_problem("f32", x, y, (2, 2), (2, 2), (0, 0, 0, 0))
    native = fastconv._C
    for name, verdict, _ in native.explain("max_pool2d_fwd", problem):
        assert (verdict == "the operands are not on a GPU") == name.endswith(".sm80")
    for name, verdict, _ in native.explain("max_pool2d_fwd", problem, device=99):
        assert verdict
        assert (verdict == "the operands are not on the CPU") != name.endswith(".sm80")
    with pytest.raises(NotImplementedError, match="the operands are not on the CPU"):
        native.plan("max_pool2d_fwd", problem, 1, device=99)


def test_bench_says_why_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "--device", "cuda"]) == 2
    assert re.search(r"no CUDA device|without CUDA kernels|no GPU", capsys.readouterr().out)
    assert main(["bench", "conv2d", "--device", "cuda"]) == 2
    assert "has its own layers" in capsys.readouterr().err
