"""linear as torch sees it: values for any leading dimensions and strides, derivatives of every kind, the registered ops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import fastconv
from fastconv.ops.linear import linear

OPS = torch.ops.fastconv
LEADING = [(), (1,), (7,), (2, 3), (2, 1, 4), (0,), (2, 0)]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operands are tiny here; waking a second thread for each costs more than the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def operands(leading: tuple[int, ...] = (2, 3), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return tuple(torch.randn(s, dtype=torch.float64) for s in ((*leading, 5), (4, 5), (4,)))  # type: ignore[return-value]


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_values_and_gradients(leading: tuple[int, ...], biased: bool) -> None:
    inputs = [leaf(t) for t in operands(leading)[: 3 if biased else 2]]
    bias = inputs[2] if biased else None
    y, expected = linear(*inputs[:2], bias), F.linear(*inputs[:2], bias)
    assert_close(y, expected)
    assert y.stride() == expected.stride()
    dy = torch.randn_like(expected)
    assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy))


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def sliced(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    wide[..., ::2] = t
    return wide[..., ::2]


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def spread(t: Tensor) -> Tensor:
    return t.flatten()[0].expand(t.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["f64", "bf16"])
@pytest.mark.parametrize("which", ["x", "w", "dy"])
@pytest.mark.parametrize("layout", [transposed, sliced, expanded, spread])
def test_any_strides(layout: Callable[[Tensor], Tensor], which: str, dtype: torch.dtype) -> None:
    x, w, bias = (t.to(dtype) for t in operands((6, 7)))
    dy = torch.randn(6, 7, 4, dtype=torch.float64).to(dtype)
    x, w, dy = (layout(t) if name == which else t for name, t in (("x", x), ("w", w), ("dy", dy)))
    inputs = leaf(x), leaf(w), leaf(bias)
    if dtype is torch.float64:
        y, expected = linear(*inputs), F.linear(*inputs)
        assert_close(y, expected)
        assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy))
    else:
        for found, wide in zip(results(linear, inputs, dy), results(linear, [leaf(t.float()) for t in inputs], dy)):
            assert torch.equal(found, wide.to(dtype))


def test_runs_on_the_kernels_of_conv2d() -> None:
    inputs = [leaf(t.float()) for t in operands((16,))]
    with fastconv.observe() as records:
        linear(*inputs).sum().backward()
    assert [r.op for r in records] == ["conv2d_fwd", "conv2d_dgrad", "conv2d_wgrad"]


# Rows and features: nothing, tails, several blocks of the sum, several chunks of pixels.
@HALVES
@pytest.mark.parametrize("shape", [(0, 5, 4), (1, 70, 50), (3, 5, 4), (40, 33, 300), (530, 1600, 17)], ids=str)
def test_halves_are_rounded_once_and_no_worse_than_torch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, features, outputs = shape
    torch.manual_seed(0)
    inputs = [leaf(torch.randn(s).to(dtype)) for s in ((rows, features), (outputs, features), (outputs,))]
    dy = torch.randn(rows, outputs).to(dtype)
    before = fastconv.fallback_counts()
    mine = results(fastconv.functional.linear, inputs, dy)
    assert fastconv.fallback_counts() == before
    fastconv.plan.limit_isa("avx512")  # products of pairs are other sums
    try:
        widened = results(fastconv.functional.linear, inputs, dy)
    finally:
        fastconv.plan.limit_isa("")
    single = results(fastconv.functional.linear, [leaf(t.float()) for t in inputs], dy)
    double = results(F.linear, [leaf(t.double()) for t in inputs], dy)
    for name, selected, found, wide, truth, peer in zip(
        ("y", "dx", "dw", "db"), mine, widened, single, double, results(F.linear, inputs, dy)
    ):
        assert (selected.dtype, selected.stride()) == (dtype, peer.stride())
        assert torch.equal(found, wide.to(dtype)), name
        mistakes = [(t.double() - truth).abs().sum() for t in (selected, found, peer)]
        assert max(mistakes[:2]) <= mistakes[2] * 1.01, name


@HALVES
def test_autocast_casts_as_torch_does(place: Any, dtype: torch.dtype) -> None:
    inputs = [leaf(place(t.float())) for t in operands((16,))]
    doubles = [place(t) for t in operands()]
    with place.autocast(dtype), place.letting("linear"), fastconv.observe() as records:
        found = fastconv.functional.linear(*inputs)
        theirs = F.linear(*inputs) if place.name != "emulated" else found
        assert fastconv.functional.linear(*doubles).dtype is F.linear(*doubles).dtype is torch.float64
        grads = torch.autograd.grad(found.float().sum(), inputs)
    assert found.dtype is theirs.dtype is dtype
    assert {g.dtype for g in grads} == {torch.float32}
    half = "bf16" if dtype is torch.bfloat16 else "f16"
    assert {(r.op, r.dtype) for r in records} == {
        ("conv2d_fwd", half), ("conv2d_dgrad", half), ("conv2d_wgrad", half),
        *([] if place.is_gpu else [("conv2d_fwd", "f64")]),
    }  # fmt: skip
    assert torch.equal(*place.back((found, linear(*(t.to(dtype) for t in inputs)))))


@HALVES
def test_further_derivatives_of_halves(dtype: torch.dtype) -> None:
    inputs = [t.to(dtype) for t in operands()]

    def second(*t: Tensor) -> list[Tensor]:
        leaves = [leaf(x) for x in t]
        grads = torch.autograd.grad(linear(*leaves).square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))

    def forward(*t: Tensor) -> list[Tensor]:
        return list(torch.func.jvp(linear, t, t))

    def mapped(*t: Tensor) -> list[Tensor]:
        x, w, bias = (torch.stack((a, 2 * a)) for a in t)
        return list(torch.vmap(torch.func.grad(lambda *a: linear(*a).sum(), (0, 1, 2)))(x, w, bias))

    # Halves of a unit in the last place that chains of results may be off by, each of what it is made of; a gradient alone: one.
    for function, roundings in ((second, 8), (forward, 8), (mapped, 1.01)):
        found, expected = function(*inputs), function(*(t.double() for t in inputs))
        for a, b in zip(found, expected):
            assert a.dtype is dtype
            scale = b.abs() + 1e-4 if function is mapped else b.abs().max()
            assert ((a.double() - b).abs() <= roundings * torch.finfo(dtype).eps / 2 * scale).all(), function.__name__


def test_gradcheck() -> None:
    inputs = [leaf(t) for t in operands()]
    options = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(linear, inputs, **options)
    assert torch.autograd.gradgradcheck(linear, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("batched", [b for b in itertools.product((False, True), repeat=3) if any(b)])
def test_vmap_and_gradients_inside(batched: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    dims = tuple(dim if b else None for b, dim in zip(batched, (1, 2, 0)))
    shapes = [(2, 3, 5), (4, 5), (4,)]
    inputs = [
        torch.randn(*s[: d or 0], 6, *s[d or 0 :], dtype=torch.float64) if b else torch.randn(s, dtype=torch.float64)
        for b, d, s in zip(batched, dims, shapes)
    ]
    assert_close(torch.vmap(linear, dims)(*inputs), torch.vmap(F.linear, dims)(*inputs))

    def gradients(f: Callable[..., Tensor]) -> Any:
        return torch.vmap(torch.func.grad(lambda *t: f(*t).sin().sum(), (0, 1, 2)), dims)(*inputs)

    assert_close(gradients(linear), gradients(F.linear))


def test_transforms_nest() -> None:
    x, w, bias = operands()

    def second(f: Callable[..., Tensor]) -> Any:
        return torch.func.hessian(lambda x, w: f(x, w, bias).pow(3).sum(), (0, 1))(x, w)

    assert_close(second(linear), second(F.linear))


def test_lazily_negated_weight() -> None:
    x, w, bias = operands()
    negated = torch.complex(w, w).conj().imag
    assert negated.is_neg()
    assert_close(linear(x, negated, bias), F.linear(x, -w, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_opcheck(place: Any, dtype: torch.dtype) -> None:
    x, w, bias = (place(t.to(dtype)) for t in operands())
    dy = place(torch.randn(2, 3, 4).to(dtype))
    torch.library.opcheck(OPS.linear_fwd.default, (leaf(x), leaf(w), leaf(bias)))
    torch.library.opcheck(OPS.linear_dgrad.default, (leaf(dy), leaf(w)))
    for with_bias in (False, True):
        torch.library.opcheck(OPS.linear_wgrad.default, (leaf(dy), leaf(x), with_bias))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: OPS.linear_fwd(x[..., :4], w, b),
        lambda x, w, b: OPS.linear_fwd(x, w, b[:3]),
        lambda x, w, b: OPS.linear_fwd(x, w.float(), b),
        lambda x, w, b: OPS.linear_fwd(x.int(), w.int(), b.int()),
        lambda x, w, b: OPS.linear_dgrad(x, w),
        lambda x, w, b: OPS.linear_wgrad(x[:1], x, False),
    ],
)
def test_ops_check_their_arguments(call: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="fastconv::"):
        call(*operands())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_compiled_without_a_break(place: Any, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for leading in ((2, 3), (4, 5)):
        inputs = [leaf(place(t.to(place.dtype))) for t in operands(leading)]
        got, want = compiled(*inputs), linear(*inputs)
        assert_close(got, want)
        dy = torch.randn_like(want)
        assert_close(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy))


@pytest.mark.parametrize("target", sorted({k.target for k in fastconv.kernels("conv2d_fwd") if k.runnable}))
def test_bits_of_a_row_in_batches_of_every_size(target: str) -> None:
    """A few rows read the weight in place, many have it packed: 3000 features are two blocks of the sum, 70 outputs a tail."""
    with fastconv.use(conv2d_fwd=target):
        pairs = target == "avx512_bf16"  # of bf16 alone
        for dtype in [torch.bfloat16] if pairs else [torch.float32, torch.float64, torch.bfloat16, torch.float16]:
            x, w, bias = (torch.randn(shape).to(dtype) for shape in ((20, 3000), (70, 3000), (70,)))
            many = fastconv.functional.linear(x, w, bias)
            if dtype.itemsize == 2 and not pairs:
                wide = fastconv.functional.linear(x.float(), w.float(), bias.float())
                assert torch.equal(many, wide.to(dtype)), f"{dtype} is not float32's result rounded once"
            for count in range(1, 12):
                assert torch.equal(fastconv.functional.linear(x[-count:], w, bias), many[-count:]), (
                    f"{count} of 20 rows"
                )
