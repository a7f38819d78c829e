"""What torch's attention refuses, and what it takes from elsewhere: dtypes, devices, ranks, nested tensors, chosen backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import fastconv
from fastconv.functional import scaled_dot_product_attention as sdpa


def operands(q: Any = (2, 4, 5, 8), k: Any = (2, 4, 7, 8), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in (q, k, k)]


@pytest.mark.filterwarnings("ignore")  # the fallback's, which is counted below
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_dtypes_without_attention(dtype: torch.dtype) -> None:
    inputs = operands(dtype=dtype)
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.scaled_dot_product_attention(*inputs)
    with fastconv.observe() as records, pytest.raises(theirs.type) as mine:
        sdpa(*inputs)
    assert mine.type is theirs.type
    assert str(mine.value) == str(theirs.value)
    assert not records


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_operands_on_two_devices(which: int) -> None:
    inputs = [*operands(), torch.zeros(5, 7, dtype=torch.float64)]
    inputs[which] = inputs[which].to("meta")
    name = ("query", "key", "value", "attn_mask")[which]
    with pytest.raises(RuntimeError, match="device") as error:
        sdpa(*inputs)  # type: ignore[call-overload]
    assert name in str(error.value)


def test_masks_of_more_dimensions_than_scores() -> None:
    for rank in (5, 6):
        mask = torch.ones((1,) * (rank - 4) + (2, 4, 5, 7), dtype=torch.bool)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(*operands(), mask)
        with pytest.raises(RuntimeError, match=r"attn_mask .* has shape \[1, .* expected \[2, 4, 5, 7\]"):
            sdpa(*operands(), mask)


def test_seven_positionals() -> None:
    for function in (F.scaled_dot_product_attention, sdpa):
        with pytest.raises(TypeError, match=r"positional arguments|takes from 3 to 6"):
            function(*operands(), None, 0.0, False, 0.3)


@pytest.mark.filterwarnings("ignore")  # torch's on nested tensors being a prototype, and the fallback's
def test_nested_tensors() -> None:
    """Jagged ones are torch's to compute, and counted; the ragged batches of ours are packed tensors."""
    parts = [torch.randn(n, 4, 8, dtype=torch.float64) for n in (3, 6, 2)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    before = sum(fastconv.fallback_counts().values())
    found, expected = sdpa(jagged, jagged, jagged), F.scaled_dot_product_attention(jagged, jagged, jagged)
    assert_close(found.transpose(1, 2).values(), expected.transpose(1, 2).values())
    assert sum(fastconv.fallback_counts().values()) > before
    for part, out in zip(parts, found.transpose(1, 2).unbind()):
        one = part.transpose(0, 1)
        assert_close(out.transpose(0, 1), sdpa(one, one, one))


def test_torch_s_backends_do_not_concern_ours() -> None:
    """`sdpa_kernel` chooses between torch's kernels. Under a choice that torch cannot follow, ours answers as ever."""
    inputs = operands()
    expected = sdpa(*inputs)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with fastconv.observe() as records, fastconv.sdpa(), sdpa_kernel(backend):
            assert torch.equal(F.scaled_dot_product_attention(*inputs), expected)
        assert [r.op for r in records] == ["sdpa_fwd"]


@pytest.mark.filterwarnings("ignore")
def test_torch_s_backends_concern_what_torch_answers() -> None:
    """A forced backend that does not take the call: torch's error, inside the block and outside."""
    inputs = operands(dtype=torch.complex64)
    for function in (F.scaled_dot_product_attention, sdpa):
        with (
            sdpa_kernel(SDPBackend.FLASH_ATTENTION),
            pytest.raises(RuntimeError, match=r"No viable backend|No available"),
        ):
            function(*inputs)
