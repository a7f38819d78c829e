"""Products of pairs of bf16: reductions of several blocks, which the grid has not, and what is different about the target."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastconv
from fastconv.functional import linear
from fastconv.functional import scaled_dot_product_attention as sdpa

pytestmark = pytest.mark.skipif(
    not any(k.target == "avx512_bf16" and k.runnable for k in fastconv.kernels()),
    reason="this CPU, or the compiler of this build, has no avx512_bf16",
)


def integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).to(torch.bfloat16)


# Channels beyond 3072 are several blocks, pixels beyond 1024 several chunks, and so are 384 rows of several blocks; odd and even.
@pytest.mark.parametrize(
    "shape", [(20, 3501, 70), (400, 6500, 33), (3, 4097, 130), (1100, 7, 300), (2049, 40, 5)], ids=str
)
def test_linear_of_several_blocks_is_exact_on_integers(shape: tuple[int, int, int]) -> None:
    rows, features, outputs = shape
    torch.manual_seed(0)
    inputs = [t.requires_grad_() for t in (integers(rows, features), integers(outputs, features), integers(outputs))]
    dy = integers(rows, outputs)
    with fastconv.observe() as records:
        y = linear(*inputs)
        found = [y, *torch.autograd.grad(y, inputs, dy)]
    assert [r.kernel for r in records] == [
        f"conv2d_{op}.pointwise.bf16.avx512_bf16" for op in ("fwd", "dgrad", "wgrad")
    ]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    truth = F.linear(*doubles)
    for name, a, b in zip(("y", "dx", "dw", "db"), found, [truth, *torch.autograd.grad(truth, doubles, dy.double())]):
        assert torch.equal(a, b.to(torch.bfloat16)), name


def test_rows_and_kept_filters_have_the_same_bits() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3501, 70, dtype=torch.bfloat16)
    x = torch.randn(400, 3501).to(torch.bfloat16)
    kept = fastconv.fuse(torch.nn.Sequential(layer).eval())
    with torch.no_grad():
        many = linear(x, layer.weight, layer.bias)
        for first, last in ((0, 400), (7, 8), (3, 11), (0, 100), (399, 400)):
            assert torch.equal(linear(x[first:last], layer.weight, layer.bias), many[first:last])
            assert torch.equal(kept(x[first:last]), many[first:last])


def test_a_single_key_s_value_comes_out_as_it_is() -> None:
    """Its weight, which is a rounded number between 0.7 and 1.4, is divided by itself."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 40).to(torch.bfloat16) for length in (50, 1, 1))
    assert torch.equal(sdpa(q, k, v), v.expand(2, 3, 50, 40))


def test_subnormal_numbers_count_as_zeros() -> None:
    """So the instruction works, whatever the mode of the process; the other targets keep them."""
    x = torch.full((4, 64), 2.0**-130, dtype=torch.bfloat16)
    w = torch.full((16, 64), 2.0**20, dtype=torch.bfloat16)
    assert not linear(x, w).any()
    fastconv.plan.limit_isa("avx512")
    try:
        assert (linear(x, w) == 2.0**-104).all()
    finally:
        fastconv.plan.limit_isa("")
