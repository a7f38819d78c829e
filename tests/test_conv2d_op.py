"""conv2d and conv_transpose2d as torch sees them: values, memory formats, derivatives of every kind, the registered ops.

torch is the reference here, in float64 wherever the memory format does not depend on it; the kernels themselves are checked in
test_kernels against NumPy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close

import fastconv
from fastconv.ops.conv2d import ACTIVATIONS, conv2d, conv_transpose2d

LAST = torch.channels_last
OPS = torch.ops.fastconv


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operands are tiny here; waking a second thread for each costs more than the test. test_bits compares thread counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case(NamedTuple):
    x: tuple[int, int, int, int]
    w: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        (down, across) = self.padding
        return self.stride, (down, down, across, across), self.dilation, self.groups

    def ours(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(x, w, bias, *self.geometry)

    def torchs(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, w, bias, self.stride, self.padding, self.dilation, self.groups)


CASES = {
    "3x3": Case((2, 4, 7, 6), (6, 4, 3, 3), padding=(1, 1)),
    "strided": Case((2, 4, 9, 8), (6, 4, 3, 2), stride=(2, 3), padding=(1, 0)),
    "dilated": Case((1, 3, 9, 9), (4, 3, 3, 3), dilation=(2, 3), padding=(2, 1)),
    "groups": Case((2, 6, 5, 6), (4, 3, 3, 3), groups=2),
    "depthwise": Case((2, 5, 6, 6), (5, 1, 3, 3), padding=(1, 1), groups=5),
    "1x1": Case((2, 4, 5, 6), (6, 4, 1, 1)),
    "1x1 strided": Case((2, 4, 5, 6), (6, 4, 1, 1), stride=(2, 2)),
    "gray": Case((2, 1, 7, 7), (4, 1, 3, 3)),
    "one output": Case((2, 4, 6, 6), (1, 4, 3, 3)),
    "1x1 image": Case((3, 4, 1, 1), (6, 4, 1, 1)),
    "to 1x1": Case((2, 4, 3, 3), (6, 4, 3, 3)),
    "all ones": Case((1, 1, 1, 1), (1, 1, 1, 1)),
    "unused rows": Case((1, 2, 8, 8), (3, 2, 3, 3), stride=(3, 3)),
}


def plain(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def last(t: Tensor) -> Tensor:
    return t.clone(memory_format=LAST)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def sliced(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:3], 2 * t.shape[3]), float("nan"))
    wide[..., ::2] = t
    return wide[..., ::2]


def inner(t: Tensor) -> Tensor:
    """channels_last within a larger image."""
    N, C, H, W = t.shape
    wide = last(t.new_full((N, C, H + 2, W + 2), float("nan")))
    wide[..., 1:-1, 1:-1] = t
    return wide[..., 1:-1, 1:-1]


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def spread(t: Tensor) -> Tensor:
    """One value everywhere: what the gradient of a sum is."""
    return t[:1, :1, :1, :1].expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (plain, last, transposed, sliced, inner, expanded, spread)
}


def operands(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(case.x, dtype=dtype), torch.randn(case.w, dtype=dtype), torch.randn(case.w[0], dtype=dtype)


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


# ---- Values and memory formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_strides_are_torchs(name: str, x_layout: str) -> None:
    case = CASES[name]
    x, w, bias = operands(case)
    x = LAYOUTS[x_layout](x)
    for w_layout in LAYOUTS.values():
        with torch.no_grad():
            y, expected = case.ours(x, w_layout(w), bias), case.torchs(x, w_layout(w), bias)
        assert_close(y, expected)
        assert y.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_formats_of_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    for x_layout, w_layout, dy_layout in itertools.product((plain, last), repeat=3):
        x, w, bias = operands(case, dtype)
        x, w = leaf(x_layout(x)), leaf(w_layout(w))
        y, expected = case.ours(x, w, bias), case.torchs(x, w, bias)
        assert y.stride() == expected.stride()
        dy = dy_layout(torch.randn_like(expected))
        dx, dw = torch.autograd.grad(y, (x, w), dy)
        torch_dx, _ = torch.autograd.grad(expected, (x, w), dy)
        assert dx.stride() == torch_dx.stride()
        # What AccumulateGrad wants for w.grad: the layout of w.
        assert all(size == 1 or got == want for size, got, want in zip(w.shape, dw.stride(), w.stride()))


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_for_any_incoming_layout(name: str, dy_layout: str) -> None:
    case = CASES[name]
    for x_layout in (plain, last, sliced, expanded):
        x, w, bias = operands(case)
        inputs = leaf(x_layout(x)), leaf(w), leaf(bias)
        y, expected = case.ours(*inputs), case.torchs(*inputs)
        dy = LAYOUTS[dy_layout](torch.randn_like(expected))
        assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy))


def test_gradient_of_a_sum_is_a_tensor_without_strides() -> None:
    case = CASES["3x3"]
    inputs = [leaf(t) for t in operands(case)]
    got = torch.autograd.grad(case.ours(*inputs).sum(), inputs)
    want = torch.autograd.grad(case.torchs(*inputs).sum(), inputs)
    assert_close(got, want)


@pytest.mark.parametrize("needed", [c for n in (1, 2) for c in itertools.combinations(range(3), n)])
def test_only_wanted_gradients_are_computed(needed: tuple[int, ...]) -> None:
    case = CASES["3x3"]
    inputs = [t.requires_grad_(i in needed) for i, t in enumerate(operands(case))]
    y = case.ours(*inputs)
    with fastconv.observe() as records:
        y.sum().backward()
    assert {r.op for r in records} == {op for i, op in enumerate(("conv2d_dgrad", "conv2d_wgrad")) if i in needed}
    assert [t.grad is not None for t in inputs] == [i in needed for i in range(3)]


def test_frozen_weights_keep_no_activation() -> None:
    case = CASES["3x3"]
    x, w, bias = operands(case)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        case.ours(leaf(x), w, bias)
    assert saved == [w.shape]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", [plain, last])
def test_residual_and_activation(activation: str, layout: Callable[[Tensor], Tensor]) -> None:
    case = CASES["3x3"]
    x, w, bias = operands(case)
    x, residual = layout(x), torch.randn(2, 6, 7, 6, dtype=torch.float64)
    fused = conv2d(x, w, bias, *case.geometry, residual, activation)
    inputs = leaf(x), leaf(w), leaf(bias), leaf(residual)
    stepwise = conv2d(*inputs[:3], *case.geometry, inputs[3], activation)
    expected = ACTIVATIONS[activation](case.torchs(x, w, bias) + residual)
    assert_close(fused, expected)
    assert_close(stepwise, expected)
    assert torch.autograd.gradcheck(lambda *t: conv2d(*t[:3], *case.geometry, t[3], activation), inputs, fast_mode=True)


@pytest.mark.parametrize("layout", [sliced, expanded, last])
def test_residual_of_any_layout(layout: Callable[[Tensor], Tensor]) -> None:
    case = CASES["3x3"]
    residual = layout(torch.randn(2, 6, 7, 6, dtype=torch.float64))
    x, w, bias = operands(case)
    assert_close(conv2d(x, w, bias, *case.geometry, residual), case.torchs(x, w, bias) + residual)


def test_padding_on_four_sides_and_cropping() -> None:
    x, w, _ = operands(Case((2, 3, 8, 7), (4, 3, 3, 3)))
    for top, bottom, left, right in ((0, 1, 2, 0), (-1, 2, 0, -2), (-2, -1, -1, -1)):
        got = conv2d(x, w, None, (1, 2), (top, bottom, left, right), (1, 1), 1)
        assert_close(got, F.conv2d(F.pad(x, (left, right, top, bottom)), w, stride=(1, 2)))


@pytest.mark.parametrize("grad", [False, True])
def test_empty_batch(grad: bool) -> None:
    case = Case((0, 4, 6, 6), (6, 4, 3, 3), padding=(1, 1))
    inputs = [t.requires_grad_(grad) for t in operands(case)]
    y, expected = case.ours(*inputs), case.torchs(*inputs)
    assert y.shape == expected.shape
    if grad:
        y.sum().backward()
        assert inputs[0].grad.shape == case.x
        assert not inputs[1].grad.any()
        assert not inputs[2].grad.any()


# ---- Transposed convolution -----------------------------------------------------------------------------------------------

TRANSPOSED = {
    # stride, padding, output_padding, groups, dilation
    "plain": ((1, 1), (0, 0), (0, 0), 1, (1, 1)),
    "doubling": ((2, 2), (1, 1), (1, 1), 1, (1, 1)),
    "groups": ((3, 2), (1, 0), (2, 1), 2, (1, 1)),
    "output_padding beyond stride": ((1, 2), (1, 1), (2, 1), 1, (3, 2)),
    "cropped": ((1, 1), (2, 2), (0, 0), 1, (1, 1)),
}


@pytest.mark.parametrize("layouts", list(itertools.product((plain, last), repeat=2)))
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(name: str, layouts: tuple[Callable[[Tensor], Tensor], ...]) -> None:
    stride, padding, output_padding, groups, dilation = TRANSPOSED[name]
    torch.manual_seed(0)
    x, w = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    inputs = leaf(layouts[0](x)), leaf(layouts[1](w)), leaf(torch.randn(3 * groups, dtype=torch.float64))
    y = conv_transpose2d(*inputs, *TRANSPOSED[name])
    expected = F.conv_transpose2d(*inputs, stride, padding, output_padding, groups, dilation)
    assert_close(y, expected)
    assert y.stride() == expected.stride()
    dy = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy))


# ---- Derivatives ----------------------------------------------------------------------------------------------------------

SMALL = {
    "3x3": Case((2, 2, 4, 3), (3, 2, 3, 2), padding=(1, 0)),
    "groups": Case((1, 4, 3, 4), (4, 2, 2, 3), stride=(1, 2), padding=(1, 1), groups=2),
    "dilated": Case((1, 2, 5, 4), (2, 2, 2, 2), dilation=(2, 1), stride=(2, 1)),
}


@pytest.mark.parametrize("layout", [plain, last])
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    case = SMALL[name]
    x, w, bias = operands(case)
    inputs = leaf(layout(x)), leaf(w), leaf(bias)
    options = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(case.ours, inputs, **options)
    assert torch.autograd.gradgradcheck(case.ours, inputs, check_fwd_over_rev=True)


def test_gradcheck_transposed() -> None:
    torch.manual_seed(0)
    shapes = (1, 4, 2, 3), (4, 1, 2, 2), (2,)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return conv_transpose2d(x, w, bias, (2, 1), (1, 0), (1, 0), 2, (1, 2))

    assert torch.autograd.gradcheck(call, inputs, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs, check_fwd_over_rev=True)


def test_third_derivative() -> None:
    case = SMALL["3x3"]
    inputs = [leaf(t) for t in operands(case)]

    def third(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        value = f(*inputs).pow(3).sum()
        for _ in range(2):
            value = sum(g.pow(2).sum() for g in torch.autograd.grad(value, inputs, create_graph=True))
        return torch.autograd.grad(value, inputs)

    assert_close(third(case.ours), third(case.torchs))


@pytest.mark.parametrize("moving", [m for m in itertools.product((False, True), repeat=3) if any(m)])
def test_forward_mode(moving: tuple[bool, ...]) -> None:
    case = SMALL["groups"]
    primals, tangents = operands(case), operands(case, seed=1)
    results = []
    for f in (case.ours, case.torchs):
        with torch.no_grad(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) if m else p for m, p, t in zip(moving, primals, tangents)]
            results.append(forward_ad.unpack_dual(f(*duals)))
    assert_close(results[0].primal, results[1].primal)
    assert_close(results[0].tangent, results[1].tangent)


@pytest.mark.parametrize("batched", [b for b in itertools.product((False, True), repeat=3) if any(b)])
@pytest.mark.parametrize("groups", [1, 2])
def test_vmap_and_gradients_inside(batched: tuple[bool, ...], groups: int) -> None:
    case = Case((2, 4, 5, 6), (6, 4 // groups, 3, 3), padding=(1, 1), groups=groups)
    torch.manual_seed(0)
    # The mapped dimension is not always the first.
    dims = tuple(dim if b else None for b, dim in zip(batched, (2, 1, 0)))
    inputs = [
        torch.randn(*s[: d or 0], 3, *s[d or 0 :]) if b else torch.randn(s)
        for b, d, s in zip(batched, dims, (case.x, case.w, case.w[:1]))
    ]
    inputs = [t.double() for t in inputs]
    assert_close(torch.vmap(case.ours, dims)(*inputs), torch.vmap(case.torchs, dims)(*inputs))

    def gradients(f: Callable[..., Tensor]) -> Any:
        return torch.vmap(torch.func.grad(lambda *t: f(*t).sin().sum(), (0, 1, 2)), dims)(*inputs)

    assert_close(gradients(case.ours), gradients(case.torchs))


def test_transforms_nest() -> None:
    case = SMALL["3x3"]
    x, w, bias = operands(case)

    def second(f: Callable[..., Tensor]) -> Any:
        return torch.func.hessian(lambda w, b: f(x, w, b).pow(3).sum(), (0, 1))(w, bias)

    assert_close(second(case.ours), second(case.torchs))
    tangents = operands(case, seed=1)
    assert_close(torch.func.jvp(case.ours, (x, w, bias), tangents), torch.func.jvp(case.torchs, (x, w, bias), tangents))


def test_transposed_under_vmap() -> None:
    torch.manual_seed(0)
    x, w, bias = (torch.randn(s, dtype=torch.float64) for s in ((3, 2, 4, 3, 3), (3, 4, 2, 2, 2), (3, 4)))

    def ours(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return conv_transpose2d(x, w, bias, (2, 2), (0, 0), (1, 1), 2, (1, 1))

    def torchs(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return F.conv_transpose2d(x, w, bias, 2, 0, 1, 2)

    for dims in ((0, 0, 0), (0, None, None), (None, 0, None), (0, None, 0)):
        args = [t if d == 0 else t[0] for t, d in zip((x, w, bias), dims)]
        assert_close(torch.vmap(ours, dims)(*args), torch.vmap(torchs, dims)(*args))


# ---- Tensors that are not what they seem ----------------------------------------------------------------------------------


def test_lazily_negated_input() -> None:
    case = CASES["3x3"]
    x, w, bias = operands(case)
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    assert_close(case.ours(negated, w, bias), case.torchs(-x, w, bias))


def test_zero_tensor() -> None:
    case = CASES["3x3"]
    _, w, bias = operands(case)
    zero = torch._efficientzerotensor(case.x, dtype=torch.float64)
    assert_close(case.ours(zero, w, bias), case.torchs(torch.zeros(case.x, dtype=torch.float64), w, bias))


def test_inference_mode_and_default_device() -> None:
    case = CASES["3x3"]
    x, w, bias = operands(case)
    with torch.inference_mode(), torch.device("meta"):
        y = case.ours(x, w, bias)
    assert y.is_inference()
    assert_close(y, case.torchs(x, w, bias))


def test_subclass_keeps_its_type() -> None:
    class Marked(Tensor):
        pass

    case = CASES["3x3"]
    x, w, bias = operands(case)
    y = case.ours(x.as_subclass(Marked), w, bias)
    assert type(y) is Marked
    assert_close(y.as_subclass(Tensor), case.torchs(x, w, bias))


def test_observed_kernel_is_the_forced_one() -> None:
    case = CASES["3x3"]
    with fastconv.use(conv2d_fwd="direct"), fastconv.observe() as records:
        case.ours(*operands(case))
    (record,) = records
    assert record.kernel.startswith("conv2d_fwd.direct.f64.")
    assert record.shapes == (case.x, case.w, (2, 6, 7, 6))
    assert record.seconds > 0


# ---- The registered ops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [plain, last])
@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_opcheck(place: Any, layout: Callable[[Tensor], Tensor]) -> None:
    case = Case((2, 4, 6, 5), (6, 2, 3, 3), stride=(1, 2), padding=(1, 1), groups=2)
    x, w, bias = map(place, operands(case, torch.float32))
    x = layout(x)
    y = case.torchs(x, w, bias)
    torch.library.opcheck(OPS.conv2d_fwd.default, (leaf(x), leaf(w), leaf(bias), leaf(y), *case.geometry, "none"))
    torch.library.opcheck(OPS.conv2d_fwd.default, (x, w, bias, y, *case.geometry, "relu"))
    is_last = layout is last
    args = leaf(y), leaf(w), leaf(x.new_ones(4)), x.shape, is_last, *case.geometry
    torch.library.opcheck(OPS.conv2d_dgrad.default, args)
    for with_bias in (False, True):
        args = leaf(y), leaf(x), w.shape, is_last, with_bias, *case.geometry
        torch.library.opcheck(OPS.conv2d_wgrad.default, args)


def test_no_gradient_through_a_fused_activation_of_the_op() -> None:
    case = CASES["3x3"]
    x, w, bias = operands(case)
    with pytest.raises(NotImplementedError, match="activation='relu'"):
        OPS.conv2d_fwd(leaf(x), w, bias, None, *case.geometry, "relu")


GEOMETRY = CASES["3x3"].geometry
WRONG = {
    "channels": lambda x, w, b: OPS.conv2d_fwd(x[:, :3], w, b, None, *GEOMETRY, "none"),
    "bias": lambda x, w, b: OPS.conv2d_fwd(x, w, b[:5], None, *GEOMETRY, "none"),
    "residual": lambda x, w, b: OPS.conv2d_fwd(x, w, b, x, *GEOMETRY, "none"),
    "bias dtype": lambda x, w, b: OPS.conv2d_fwd(x, w, b.float(), None, *GEOMETRY, "none"),
    "stride": lambda x, w, b: OPS.conv2d_fwd(x, w, b, None, (0, 1), *GEOMETRY[1:], "none"),
    "groups": lambda x, w, b: OPS.conv2d_fwd(x, w, b, None, *GEOMETRY[:3], 0, "none"),
    "kernel too large": lambda x, w, b: OPS.conv2d_fwd(x[..., :1, :1], w, b, None, (1, 1), (0,) * 4, (1, 1), 1, "none"),
    "x_shape": lambda x, w, b: OPS.conv2d_dgrad(x, w, None, (2, 4, 7, 6), False, *GEOMETRY),
    "w_shape": lambda x, w, b: OPS.conv2d_wgrad(x, x, (6, 4, 3, 3), False, False, *GEOMETRY),
    "half": lambda x, w, b: OPS.conv2d_fwd(x.half(), w.half(), None, None, *GEOMETRY, "none"),
}


@pytest.mark.parametrize("name", WRONG)
def test_ops_check_their_arguments(name: str) -> None:
    with pytest.raises(RuntimeError, match="fastconv::"):
        WRONG[name](*operands(CASES["3x3"]))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_compiled_without_a_break(place: Any, dynamic: bool) -> None:
    case = Case((2, 4, 6, 6), (6, 2, 3, 3), padding=(1, 1), groups=2)
    geometry = case.geometry  # torch 2.9 does not trace a property of a NamedTuple

    def net(x: Tensor, w: Tensor, bias: Tensor, v: Tensor) -> Tensor:
        y = conv2d(x, w, bias, *geometry, x.new_ones(()).expand(x.shape[0], 6, *x.shape[2:]), "relu")
        return conv_transpose2d(y, v, None, (2, 2), (1, 1), (1, 1), 1, (1, 1))

    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape, layout in (((2, 4, 6, 6), plain), ((2, 4, 6, 6), last), ((3, 4, 7, 8), plain)):
        torch.manual_seed(0)
        x, w, bias, v = (place(torch.randn(s)) for s in (shape, case.w, (6,), (6, 3, 2, 2)))
        inputs = leaf(layout(x)), leaf(w), leaf(bias), leaf(v)
        got, want = compiled(*inputs), net(*inputs)
        assert_close(got, want)
        assert got.stride() == want.stride()
        dy = torch.randn_like(want)
        assert_close(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy))
        with torch.no_grad():
            assert_close(compiled(*inputs), want)
