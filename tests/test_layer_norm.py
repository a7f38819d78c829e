"""layer_norm as torch sees it: values and gradients, the added residual, derivatives of every kind, errors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import fastconv
from fastconv import reference
from fastconv.functional import layer_norm
from fastconv.ops._eager import connected, native
from fastconv.testing.tolerance import peer_bound

OPS = torch.ops.fastconv


pytestmark = pytest.mark.usefixtures("one_thread")


def operands(rows: int = 3, width: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, residual, weight, bias."""
    shapes = (rows, width), (rows, width), (width,), (width,)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def added(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Any:
    return layer_norm(x, x.shape[-1:], weight, bias, residual=residual)  # type: ignore[call-overload]


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (1, 7, 4), (0, 4), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("affine", list(itertools.product((False, True), repeat=2)), ids=str)
def test_residual(shape: tuple[int, ...], affine: tuple[bool, bool]) -> None:
    x, residual = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) if wanted else None for wanted in affine)
    leaves = [t for t in (x, residual, weight, bias) if t is not None]
    y, total = added(x, residual, weight, bias)
    expected = F.layer_norm(x + residual, (4,), weight, bias)
    assert_close((y, total), (expected, x + residual))
    g, h = torch.randn_like(expected), torch.randn_like(expected)
    assert_close(
        torch.autograd.grad((y, total), leaves, (g, h)), torch.autograd.grad((expected, x + residual), leaves, (g, h))
    )


def test_sum_alone_and_frozen_operands() -> None:
    x, residual, weight, bias = operands()
    _, total = added(x, residual, weight, bias)
    assert [g is None for g in torch.autograd.grad(total.sum(), (x, residual, weight), allow_unused=True)] == [
        False,
        False,
        True,
    ]
    y, _ = added(x.detach(), residual.detach(), weight, bias)
    assert_close(torch.autograd.grad(y.sum(), bias)[0], torch.full((5,), 3.0, dtype=torch.float64))


def test_strides_and_broadcast() -> None:
    for x in (torch.randn(6, 5).t(), torch.randn(5, 12)[:, ::2], torch.randn(1, 6).expand(5, 6)):
        y = layer_norm(x, (6,))
        assert_close(y, F.layer_norm(x, (6,)))
        assert y.is_contiguous()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("width", [1, 2, 3, 17, 64, 100, 768, 3000])
def test_no_worse_than_torch(width: int, offset: float) -> None:
    x = torch.randn(20, width) + offset
    truth = reference.layer_norm(x.numpy(), eps=1e-5).y
    error = np.abs(layer_norm(x, (width,)).numpy() - truth).max()
    assert error <= peer_bound(F.layer_norm(x, (width,)).numpy(), truth)


def test_runs_on_its_kernels() -> None:
    x, residual, weight, bias = operands(dtype=torch.float32)
    with fastconv.observe() as records:
        added(x, residual, weight, bias)[0].sum().backward()
    assert [r.op for r in records] == ["layer_norm_fwd", "layer_norm_bwd"]
    assert fastconv.explain("layer_norm_bwd", x, (5,), weight, bias).chosen


def test_gradcheck() -> None:
    x, residual, weight, bias = operands()
    options = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(added, (x, residual, weight, bias), **options)
    assert torch.autograd.gradcheck(added, (x, None, weight, None), **options)
    assert torch.autograd.gradgradcheck(added, (x, residual, weight, bias))
    assert torch.autograd.gradgradcheck(added, (x, None, None, None))


@pytest.mark.parametrize("batched", [b for b in itertools.product((False, True), repeat=4) if any(b)], ids=str)
def test_vmap(batched: tuple[bool, ...]) -> None:
    shapes = (3, 5), (3, 5), (5,), (5,)
    inputs = [
        torch.randn(4, *s, dtype=torch.float64) if b else torch.randn(s, dtype=torch.float64)
        for b, s in zip(batched, shapes)
    ]
    dims = tuple(0 if b else None for b in batched)

    def theirs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return F.layer_norm(x + residual, (5,), weight, bias), x + residual

    assert_close(torch.vmap(added, dims)(*inputs), torch.vmap(theirs, dims)(*inputs))

    def gradients(f: Any) -> Any:
        def loss(*t: Tensor) -> Tensor:
            y, total = f(*t)
            return (y.sin() + total.cos()).sum()

        return torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)), dims)(*inputs)

    assert_close(gradients(added), gradients(theirs))


@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_registered_ops(place: Any) -> None:
    x, residual, weight, bias = (place(t.detach().float()).requires_grad_() for t in operands())
    torch.library.opcheck(OPS.layer_norm_fwd.default, (x, residual, weight, bias, 1e-5))
    _, total, mean, rstd = (t.detach() for t in OPS.layer_norm_fwd(x, residual, weight, bias, 1e-5))
    dy = torch.randn_like(x)
    for wants in ((True, False, True), (False, True, False)):
        torch.library.opcheck(OPS.layer_norm_bwd.default, (dy, None, total, mean, rstd, weight, 1e-5, *wants))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, r, w, b: (x[0], r, w, b),
        lambda x, r, w, b: (x, r[:2], w, b),
        lambda x, r, w, b: (x, r, w[:3], b),
        lambda x, r, w, b: (x, r, w, b.float()),
    ],
)
def test_registered_ops_refuse(change: Any) -> None:
    with pytest.raises(RuntimeError, match="fastconv::layer_norm_fwd"):
        OPS.layer_norm_fwd(*change(*operands()), 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_compiles_without_a_break(place: Any) -> None:
    inputs = [place(t.detach().to(place.dtype)).requires_grad_() for t in operands()]
    compiled = torch.compile(lambda *t: added(*t)[0].sin(), backend="aot_eager", fullgraph=True)
    found, expected = compiled(*inputs), added(*inputs)[0].sin()
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


def test_module_and_convert() -> None:
    theirs = torch.nn.LayerNorm((2, 3), elementwise_affine=True)
    torch.nn.init.normal_(theirs.weight)
    x = torch.randn(4, 2, 3)
    expected = theirs(x)
    assert fastconv.convert(theirs).swapped == {"LayerNorm": 1}
    assert type(theirs) is fastconv.nn.LayerNorm
    with fastconv.observe() as records:
        assert_close(theirs(x), expected)
    assert [r.op for r in records] == ["layer_norm_fwd"]
    fastconv.revert(theirs)
    assert type(theirs) is torch.nn.LayerNorm


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (RuntimeError, r"Given normalized_shape=\[4\], expected input with shape \[\*, 4\]", ((2, 3), (4,)), {}),
        (RuntimeError, r"Given normalized_shape=\[2, 3\]", ((3,), (2, 3)), {}),
        (RuntimeError, "at least 1-dimensional", ((2, 3), ()), {}),
        (RuntimeError, "Expected weight to be of same shape", ((2, 3), (3,)), {"weight": torch.ones(2)}),
        (RuntimeError, "Expected bias to be of same shape", ((2, 3), (3,)), {"bias": torch.ones(3, 1)}),
        (RuntimeError, "mixed dtype", ((2, 3), (3,)), {"weight": torch.ones(3).double()}),
        (RuntimeError, "residual has shape", ((2, 3), (3,)), {"residual": torch.ones(3)}),
        (TypeError, "normalized_shape", ((2, 3), 3), {}),
        (TypeError, "input", (None, (3,)), {}),
    ],
)
def test_errors(error: type[Exception], message: str, args: Any, options: Any) -> None:
    x = None if args[0] is None else torch.ones(args[0])
    with pytest.raises(error, match=message):
        layer_norm(x, args[1], **options)
    if "residual" not in options:
        with pytest.raises(error):
            F.layer_norm(x, args[1], **options)


# ---- csrc/eager ------------------------------------------------------------------------------------------------------------


def quick(*args: Any) -> Any:
    """What csrc/eager says to a call: its result, or None."""
    return native.eager_layer_norm(*args)


FORMS: dict[str, Any] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_call_in_c_gives_the_same_bits(form: str, dtype: torch.dtype) -> None:
    x, residual = (FORMS[form](torch.randn(3, 2, 4, 5, dtype=dtype)) for _ in range(2))
    for shape in ((5,), (4, 5)):
        weight, bias = (FORMS[form](torch.randn(shape, dtype=dtype)) for _ in range(2))
        for args in ((weight, bias, 1e-5), (weight, None, 1e-3), (None, None, 1e-5)):
            for more in ({}, {"residual": residual}):
                with fastconv.observe() as records:  # who observes keeps csrc/eager away
                    expected = layer_norm(x, shape, *args, **more)
                assert len(records) == 1
                for _ in range(2):  # when it is met for the first time, and known
                    found = layer_norm(x, shape, *args, **more)
                    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.skipif(not connected, reason="this torch has no DLPack exchange API")
def test_which_calls_c_answers() -> None:
    x, r, w, b = (t.detach() for t in operands(dtype=torch.float32))
    for args in ((x, (5,), w, b, 1e-5, None), (x, x.shape, None, None, 1e-5, r), (x[:1], (5,), None, b, 1.0, r[:1])):
        assert quick(*args) is not None
    y, total = quick(x, (5,), w, b, 1e-5, r)
    assert_close((y, total), (F.layer_norm(x + r, (5,), w, b), x + r))
    assert not torch.equal(quick(x, (5,), w, b, 1e-5, None), quick(x, (5,), w, b, 1.0, None))
    for args in (
        (x, [5], w, b, 1e-5, None), (x, 5, w, b, 1e-5, None), (x, (5.0,), w, b, 1e-5, None), (x, (), w, b, 1e-5, None),
        (x, (5,), w, b, 1, None), (x, (3,), w, b, 1e-5, None), (x, (5,), w[:3], b, 1e-5, None), (x, (2, 3, 5), w, b, 1e-5, None),
        (x, (5,), w.double(), b, 1e-5, None), (x, (5,), w, b, 1e-5, r[:1]), (x.t(), (3,), None, None, 1e-5, None),
        (x[:0], (5,), w, b, 1e-5, None), (x.clone().requires_grad_(), (5,), w, b, 1e-5, None),
        (x, (5,), w.clone().requires_grad_(), b, 1e-5, None), (x, (5,), w, b, 1e-5, r.clone().requires_grad_()),
        (x.bfloat16(), (5,), None, None, 1e-5, None), (None, (5,), w, b, 1e-5, None), (x, (5,), w, b, 1e-5),
    ):  # fmt: skip
        assert quick(*args) is None
    with torch.no_grad():
        assert quick(x.clone().requires_grad_(), (5,), w, b, 1e-5, None) is not None
    with fastconv.use(layer_norm_fwd="scalar"):
        assert quick(x, (5,), w, b, 1e-5, None) is None


# ---- Recorded, in a plain moment -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("residual", [False, True])
def test_recorded_calls_have_the_general_functions_derivatives(form: str, residual: bool) -> None:
    """Of first and second order; twice, because a recipe that is known takes another way than one that is not."""
    shape = (4, 5)
    leaves = [torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    leaves += [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def outputs(norm: Any) -> Any:
        x, r, w, b = (FORMS[form](t) for t in leaves)
        return norm(x, r, w, b) if residual else (norm(x, None, w, b),)

    def theirs(x: Tensor, r: Tensor | None, w: Tensor, b: Tensor) -> Any:
        return F.layer_norm(x, shape, w, b) if r is None else (F.layer_norm(x + r, shape, w, b), x + r)

    def derivatives(norm: Any) -> list[Tensor]:
        torch.manual_seed(1)
        y = outputs(norm)
        used = leaves if residual else [leaves[0], *leaves[2:]]
        first = torch.autograd.grad(y, used, [torch.randn(t.shape, dtype=t.dtype) for t in y], create_graph=True)
        plain = torch.autograd.grad(outputs(norm)[0].square().sum(), used)
        second = torch.autograd.grad([(g * g).sum() for g in first], used, allow_unused=True)
        return [*first, *plain, *(torch.zeros(()) if g is None else g for g in second)]

    expected = derivatives(theirs)
    for _ in range(2):
        assert_close(derivatives(lambda x, r, w, b: layer_norm(x, shape, w, b, residual=r)), expected)  # type: ignore[call-overload]


def test_a_recorded_call_keeps_what_it_needs_and_computes_what_is_asked() -> None:
    x, r, w, b = operands(dtype=torch.float32)
    with fastconv.observe() as records:
        y = layer_norm(x, (5,), w.detach(), b)
        _, total = layer_norm(x, (5,), w, b, residual=r)
        (only,) = torch.autograd.grad(total.sum(), x)
        (db,) = torch.autograd.grad(y.sum(), b)
    assert [record.op for record in records] == ["layer_norm_fwd", "layer_norm_fwd", "layer_norm_bwd"]
    assert_close((only, db), (torch.ones_like(x), torch.full_like(b, 3)))
    x.data.mul_(2)
    y = layer_norm(x, (5,), w, b)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
