"""fastconv.cuda: on the emulated kernels with CPU tensors in the place of CUDA's, and for real where there is a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastconv
from fastconv import cuda, plan
from fastconv.cli import main
from fastconv.testing import emulator

ROOT = Path(__file__).resolve().parents[1]
GPU = any(kernel.target == "sm80" and kernel.runnable for kernel in fastconv.kernels()) and torch.cuda.is_available()
DEVICES = [
    pytest.param("emulated", marks=pytest.mark.skipif(emulator.compiler() is None, reason="needs a host compiler")),
    pytest.param("cuda", marks=pytest.mark.skipif(not GPU, reason="needs a GPU, a CUDA torch and a build with nvcc")),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "emulated":
        assert request.config.cache is not None
        library = emulator.build(ROOT, Path(request.config.cache.mkdir("cuda_emulator")))
        monkeypatch.setattr(plan, "_C", emulator.Emulator(library))
        monkeypatch.setattr(cuda, "_device", lambda op, tensors: 0)
        monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    cuda._plan.cache_clear()
    yield "cpu" if request.param == "emulated" else "cuda"
    cuda._plan.cache_clear()


def operand(device: str, *shape: int, last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)
    return t.to(
        memory_format=torch.channels_last if last and t.dim() == 4 else torch.contiguous_format
    ).requires_grad_()


def compare(ours: Tensor, theirs: Tensor, leaves: list[Tensor], dtype: torch.dtype) -> None:
    """Values, memory formats and gradients, with float64's answer as the truth."""
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(ours.double(), theirs, **tolerance)
    dy = torch.randn_like(theirs)
    got = torch.autograd.grad(ours, leaves, dy.to(ours.dtype))
    expected = torch.autograd.grad(theirs, leaves, dy.to(ours.dtype).double())
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.double(), b.double(), **tolerance)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 16])
def test_convolution_and_its_gradients(device: str, last: bool, dtype: torch.dtype, groups: int) -> None:
    x = operand(device, 2, 16, 7, 6, last=last, dtype=dtype)
    w = operand(device, 16, 16 // groups, 3, 3, last=last, dtype=dtype)
    bias = operand(device, 16, last=False, dtype=dtype)
    options = {"stride": (2, 1), "padding": 1, "groups": groups}
    y = cuda.conv2d(x, w, bias, **options)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    compare(y, F.conv2d(x.double(), w.double(), bias.double(), **options), [x, w, bias], dtype)


def test_linear(device: str) -> None:
    x, w, bias = (operand(device, *shape, last=False) for shape in ((2, 5, 24), (10, 24), (10,)))
    compare(cuda.linear(x, w, bias), F.linear(x.double(), w.double(), bias.double()), [x, w, bias], torch.float32)


@pytest.mark.parametrize("last", [False, True])
def test_pooling(device: str, last: bool) -> None:
    x = operand(device, 2, 8, 9, 7, last=last)
    options = {"stride": 2, "padding": 1, "ceil_mode": True}
    for ours, theirs in ((cuda.max_pool2d, F.max_pool2d), (cuda.avg_pool2d, F.avg_pool2d)):
        compare(ours(x, 3, **options), theirs(x.double(), 3, **options), [x], torch.float32)
    compare(cuda.adaptive_avg_pool2d(x, (4, 3)), F.adaptive_avg_pool2d(x.double(), (4, 3)), [x], torch.float32)
    _, indices = cuda.max_pool2d(x, 3, return_indices=True)
    assert torch.equal(indices, F.max_pool2d(x, 3, return_indices=True)[1])


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
    if GPU:
        pytest.skip("there is a GPU")
    assert main(["bench", "--device", "cuda"]) == 2
    assert re.search(r"no CUDA device|without CUDA kernels|no GPU", capsys.readouterr().out)
    assert main(["bench", "conv2d", "--device", "cuda"]) == 2
    assert "has its own layers" in capsys.readouterr().err
