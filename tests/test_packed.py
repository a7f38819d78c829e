"""Filters in a kernel's own order: the same bits as with the filters as they are, which are not read then."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import fastconv
from fastconv import _fused
from fastconv.ops import _eager
from fastconv.ops._conv2d_kernels import run_frozen
from fastconv.ops._packed import PackedFilters
from fastconv.testing import harness
from fastconv.testing.problems import ConvCase

needs_eager = pytest.mark.skipif(not _eager.connected, reason="this torch has no DLPack exchange API")
KERNELS = sorted({k.name for k in fastconv.kernels("conv2d_fwd") if k.runnable})


def size(name: str, case: ConvCase) -> int:
    op, _, dtype, _ = name.split(".")
    return int(harness.native().plan(op, harness.native_problem(case, dtype), 1, name).packed[0])


@pytest.mark.parametrize("name", KERNELS)
def test_packed_filters_give_the_same_bits(name: str) -> None:
    op, algorithm, dtype, _ = name.split(".")
    cases = [case for case in harness.accepted(name) if isinstance(case, ConvCase) and size(name, case)]
    if not cases:
        assert algorithm in ("direct", "im2col", "depthwise", "grouped")
        pytest.skip("reads filters where they lie")
    for case in cases[::8]:
        inputs, _ = harness.problem_data(op, case)
        plain = harness.run(op, case, dtype, inputs, force=name)
        packed = harness.run(op, case, dtype, inputs, force=name, threads=2, place="high", packed=True)
        assert np.array_equal(plain.outputs["y"], packed.outputs["y"]), case


def frozen(x: torch.Tensor, w: torch.Tensor, kept: PackedFilters) -> torch.Tensor:
    return run_frozen(x, w, None, None, kept, ((1, 1), (1, 1, 1, 1), (1, 1), 1), "none")


def test_they_are_made_once_and_again_when_the_weight_changes() -> None:
    x, w = torch.randn(1, 32, 14, 14).contiguous(memory_format=torch.channels_last), torch.randn(32, 32, 3, 3)
    kept = PackedFilters()
    with fastconv.use(conv2d_fwd="implicit_gemm"):
        first = frozen(x, w, kept)
        (packed,) = kept._kept.values()
        assert torch.equal(frozen(x, w, kept), first)
        assert next(iter(kept._kept.values())) is packed
        w.mul_(2)
        assert torch.equal(frozen(x, w, kept), 2 * first)
        assert torch.equal(frozen(x, w / 2, kept), first)
        assert len(kept._kept) == 1


def eager(x: torch.Tensor, w: torch.Tensor, kept: PackedFilters) -> torch.Tensor:
    """The call in one C function, which must not leave it to Python here."""
    y = _fused._eager_conv2d(x, w, None, None, kept, (1, 1), (1, 1, 1, 1), (1, 1), 1, "none")
    assert y is not None
    return y


@needs_eager
@pytest.mark.parametrize("inference", [False, True])
def test_calls_in_c_find_them_and_see_writes(inference: bool) -> None:
    with torch.inference_mode(inference):
        x, w = torch.randn(1, 32, 6, 6).contiguous(memory_format=torch.channels_last), torch.randn(32, 32, 3, 3)
        kept, other = PackedFilters(), PackedFilters()
        first = eager(x, w, kept)
        torch.testing.assert_close(first, torch.nn.functional.conv2d(x, w, padding=1), rtol=1e-4, atol=1e-4)
        (packed,) = kept.by_recipe.values()
        assert torch.equal(eager(x, w, kept), first)
        assert next(iter(kept.by_recipe.values())) is packed
        assert torch.equal(eager(x, w, other), first)
        assert torch.equal(eager(x, w * 2, kept), 2 * first)
        if not inference:  # whose tensors torch keeps no count of
            w.mul_(4)
            assert torch.equal(eager(x, w, kept), 4 * first)
            assert torch.equal(eager(x, w, other), 4 * first)


@needs_eager
def test_calls_that_are_not_the_usual_ones_are_left_to_python() -> None:
    x, w = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
    call = _fused._eager_conv2d
    geometry = (1, 1), (1, 1, 1, 1), (1, 1), 1
    kept = PackedFilters()
    assert call(x, w, None, None, kept, *geometry, "none") is not None
    assert call(x.clone().requires_grad_(), w, None, None, kept, *geometry, "none") is None
    assert call(x, w.double(), None, None, kept, *geometry, "none") is None
    assert call(x, w, None, torch.randn(1, 4, 6, 5), kept, *geometry, "none") is None
    assert call(x, w, None, None, kept, *geometry, "no such activation") is None
    assert call(x, w[:, :3], None, None, kept, *geometry, "none") is None
    with torch.amp.autocast("cpu"):
        assert call(x, w, None, None, kept, *geometry, "none") is None


def test_each_order_is_kept() -> None:
    x, w = torch.randn(1, 32, 14, 14).contiguous(memory_format=torch.channels_last), torch.randn(32, 32, 3, 3)
    kept = PackedFilters()
    for algorithm in ("implicit_gemm", "winograd_f2x3", "im2col"):
        with fastconv.use(conv2d_fwd=algorithm):
            expected = torch.nn.functional.conv2d(x, w, padding=1)
            torch.testing.assert_close(frozen(x, w, kept), expected, rtol=0, atol=1e-4)
    assert [name.split(".")[1] for name, _ in kept._kept] == ["implicit_gemm", "winograd_f2x3"]


def test_copies_are_empty() -> None:
    x, w = torch.randn(1, 8, 5, 5).contiguous(memory_format=torch.channels_last), torch.randn(8, 8, 3, 3)
    kept = PackedFilters()
    frozen(x, w, kept)
    assert kept._kept
    assert not copy.deepcopy(kept)._kept
    assert not pickle.loads(pickle.dumps(kept))._kept


def test_a_kernel_that_keeps_none_says_so() -> None:
    problem = harness.native_problem(next(c for c in harness.accepted("conv2d_fwd.direct.f32.scalar")), "f32")
    plan = harness.native().plan("conv2d_fwd", problem, 1, "direct")
    assert plan.packed == (0, 0)
    with pytest.raises(ValueError, match="keeps no packed filters"):
        plan.pack(0, 0)
