"""Attention as torch sees it: values, layouts and errors of torch's function, derivatives of every kind, what torch has not."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing import assert_close

import fastconv
from fastconv import reference
from fastconv.functional import scaled_dot_product_attention as sdpa
from fastconv.ops._recorded_sdpa import record
from fastconv.testing import harness
from fastconv.testing.attention import SdpaCase
from fastconv.testing.tolerance import peer_bound

OPS = torch.ops.fastconv


pytestmark = pytest.mark.usefixtures("one_thread")


def operands(q: Any, k: Any, v: Any = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in (q, k, v or k)]


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> None:
    """Output, layout and gradients are torch's."""
    inputs = [leaf(t) for t in (q, k, v)]
    if mask is not None and mask.is_floating_point():
        mask = leaf(mask)
        inputs.append(mask)
    found = sdpa(*inputs[:3], mask, **options)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        expected = F.scaled_dot_product_attention(*inputs[:3], mask, **options)
    assert_close(found, expected)
    assert found.stride() == expected.stride()
    dy = torch.randn_like(expected)
    assert_close(torch.autograd.grad(found, inputs, dy), torch.autograd.grad(expected, inputs, dy))


SHAPES: list[tuple[Any, ...]] = [
    ((2, 4, 5, 8), (2, 4, 7, 8)),
    ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    ((4, 5, 8), (4, 7, 8)),
    ((5, 8), (7, 8)),
    ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8)),
    ((2, 4, 5, 8), (2, 1, 7, 8)),  # one head of keys for all
    ((2, 4, 5, 8), (1, 4, 7, 8), (2, 4, 7, 8)),
    ((2, 4, 5, 8), (4, 7, 8), (7, 8)),
    ((2, 4, 5, 8), (2, 4, 0, 8)),
    ((2, 4, 0, 8), (2, 4, 3, 8)),
    ((0, 4, 5, 8), (0, 4, 3, 8)),
    ((2, 4, 5, 0), (2, 4, 3, 0), (2, 4, 3, 6)),
    ((1, 2, 70, 16), (1, 2, 300, 16)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_shapes(shapes: tuple[Any, ...]) -> None:
    check(*operands(*shapes))
    check(*operands(*shapes), is_causal=True)


@pytest.mark.parametrize("mask", [(5, 7), (1, 7), (5, 1), (4, 5, 7), (2, 1, 1, 7), (2, 1, 5, 1), (2, 4, 5, 7)], ids=str)
def test_masks(mask: tuple[int, ...]) -> None:
    shapes = (2, 4, 5, 8), (2, 4, 7, 8)
    check(*operands(*shapes), torch.rand(mask) > 0.4)
    check(*operands(*shapes), torch.randn(mask, dtype=torch.float64))
    check(*operands(*shapes), torch.randn(mask, dtype=torch.float32))
    check(*operands((3, *shapes[0]), (3, *shapes[1])), torch.rand(mask) > 0.4)


@pytest.mark.parametrize(
    "options", [{"scale": 0.3}, {"scale": -1}, {"scale": 0.0}, {"scale": torch.tensor(0.5)}], ids=str
)
def test_scale(options: Any) -> None:
    check(*operands((2, 4, 5, 8), (2, 4, 7, 8)), **options)


def test_groups() -> None:
    check(*operands((2, 4, 5, 8), (2, 2, 7, 8)), enable_gqa=True)
    check(*operands((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 8)), enable_gqa=True)
    check(*operands((6, 5, 8), (2, 7, 8)), enable_gqa=True, is_causal=True)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def test_the_layout_of_projections() -> None:
    q, k, v = (transposed(t) for t in operands((2, 4, 5, 8), (2, 4, 7, 8)))
    check(q, k, v)
    check(q, k, v, is_causal=True)
    packed = torch.randn(2, 5, 3, 4, 8, dtype=torch.float64)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    assert_close(sdpa(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("layout", ["turned", "sliced", "expanded"])
def test_any_strides(layout: str, which: int) -> None:
    inputs = operands((2, 4, 6, 8), (2, 4, 6, 8))
    t = inputs[which]
    if layout == "turned":
        inputs[which] = t.mT.contiguous().mT
    elif layout == "sliced":
        inputs[which] = torch.cat((t, t), 3)[..., ::2]
    else:
        inputs[which] = t[:1, :, :1].expand_as(t)
    found, expected = sdpa(*inputs), F.scaled_dot_product_attention(*inputs)
    assert_close(found, expected)


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (6, 6), (1, 40)], ids=str)
def test_causal_biases(lengths: tuple[int, int]) -> None:
    L, S = lengths
    q, k, v = operands((2, 3, L, 8), (2, 3, S, 8))
    for bias in (causal_lower_right, causal_upper_left):
        expected = F.scaled_dot_product_attention(q, k, v, bias(L, S)._materialize(q.device))
        assert_close(sdpa(q, k, v, bias(L, S)), expected)
    with pytest.raises(ValueError, match="CausalBias"):
        sdpa(q, k, v, causal_lower_right(L, S), is_causal=True)


def test_mask_and_causal_together() -> None:
    q, k, v = operands((2, 3, 6, 8), (2, 3, 7, 8))
    mask = torch.rand(6, 7) > 0.3
    both = mask & torch.ones(6, 7, dtype=torch.bool).tril()
    assert_close(sdpa(q, k, v, mask, is_causal=True), F.scaled_dot_product_attention(q, k, v, both))


@pytest.mark.parametrize("length", range(1, 301, 23))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_lengths(length: int, dtype: torch.dtype) -> None:
    """No worse than torch against float64, by the peer's rule: never more than twice its error, and the truth's own rounding."""
    for causal, masked in itertools.product((False, True), repeat=2):
        q, k, v = operands((1, 2, length, 32), (1, 2, length, 32), dtype=dtype)
        mask = (
            torch.randn(length, length, dtype=dtype).masked_fill(torch.rand(length, length) < 0.2, -math.inf)
            if masked
            else None
        )
        allowed = (
            torch.ones(length, length, dtype=torch.bool).tril()
            if causal
            else torch.ones(length, length, dtype=torch.bool)
        )
        bias = torch.zeros(length, length, dtype=dtype).masked_fill(~allowed, -math.inf)
        bias = bias if mask is None else bias + mask
        truth = reference.sdpa(*(t.numpy() for t in (q, k, v)), bias.numpy(), scale=32**-0.5).out
        peer = F.scaled_dot_product_attention(q, k, v, bias)
        error = np.abs(sdpa(q, k, v, mask, is_causal=causal).numpy() - truth).max()
        assert error <= peer_bound(peer.numpy(), truth), f"length {length}, causal {causal}, mask {masked}"


def test_queries_that_see_nothing() -> None:
    q, k, v = (leaf(t) for t in operands((1, 2, 4, 8), (1, 2, 5, 8)))
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1] = False
    out, lse = sdpa(q, k, v, mask, return_lse=True)
    assert (out[:, :, 1] == 0).all()
    assert (lse[:, :, 1] == -math.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, 1] == 0).all()


def test_specials_in_masks() -> None:
    q, k, v = operands((1, 1, 3, 8), (1, 1, 5, 8))
    mask = torch.zeros(3, 5, dtype=torch.float64)
    mask[0, 2], mask[1, 1] = math.inf, math.nan
    out = sdpa(q, k, v, mask)
    assert out[0, 0, :2].isnan().all()
    assert out[0, 0, 2].isfinite().all()


def test_scores_of_any_size() -> None:
    """Beyond what the exponent trick reaches: one weight is 1, the others 0."""
    q, k, v = operands((1, 1, 9, 16), (1, 1, 1300, 16), dtype=torch.float32)
    expected = v[0, 0][(q.double() @ k.double().mT).argmax(3)]
    for size in (1e8, 1e30):
        assert_close(sdpa(q * size, k, v), expected, rtol=0, atol=0)
    truth = F.scaled_dot_product_attention(q.double() * 1e3, k.double(), v.double())
    assert_close(sdpa(q * 1e3, k, v).double(), truth, rtol=0, atol=5e-3)


# ---- Dropout --------------------------------------------------------------------------------------------------------------


def test_dropout_follows_the_generator() -> None:
    q, k, v = (leaf(t) for t in operands((2, 3, 40, 8), (2, 3, 50, 8)))
    torch.manual_seed(5)
    a, b = sdpa(q, k, v, dropout_p=0.3), sdpa(q, k, v, dropout_p=0.3)
    torch.manual_seed(5)
    assert torch.equal(sdpa(q, k, v, dropout_p=0.3), a)
    assert not torch.equal(a, b)
    assert torch.equal(sdpa(q, k, v, dropout_p=1.0), torch.zeros_like(v[:, :, :40]))
    assert torch.equal(sdpa(q, k, v, dropout_p=0.0), sdpa(q, k, v))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_that_share_and_keeps_the_mean(p: float) -> None:
    factors = reference.dropout_factors((4, 4, 250, 250), p, key=77)
    share = (factors == 0).mean()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / factors.size)
    rows, columns = (factors == 0).mean(axis=3), (factors == 0).mean(axis=2)
    for part in (rows, columns):
        assert abs(part.std() / math.sqrt(p * (1 - p) / 250) - 1) < 0.05, "neighbours are not independent"
    assert abs(np.corrcoef((factors == 0)[..., 1:].ravel(), (factors == 0)[..., :-1].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef((factors == 0)[:, :, 1:].ravel(), (factors == 0)[:, :, :-1].ravel())[0, 1]) < 0.01


# ---- Derivatives ----------------------------------------------------------------------------------------------------------

OPTIONS: list[Any] = [{}, {"is_causal": True}, {"softcap": 2.0}, {"window": 1}, {"dropout_p": 0.4}, {"scale": -0.7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options: Any) -> None:
    q, k, v = (leaf(t) for t in operands((2, 2, 4, 3), (2, 2, 5, 3)))
    mask = leaf(torch.randn(1, 2, 4, 5, dtype=torch.float64))

    def f(*t: Tensor) -> Any:
        torch.manual_seed(3)
        return sdpa(*t, return_lse=True, **options)  # type: ignore[call-overload]

    assert torch.autograd.gradcheck(f, (q, k, v, mask), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (q, k, v, mask))


def test_gradcheck_of_groups() -> None:
    q, k, v = (leaf(t) for t in operands((1, 4, 3, 2), (1, 2, 4, 2)))
    assert torch.autograd.gradcheck(lambda *t: sdpa(*t, enable_gqa=True), (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *t: sdpa(*t, enable_gqa=True), (q, k, v))


def test_second_derivatives_go_through_the_output_once() -> None:
    """sin makes dout of out, which gradgradcheck never does."""
    inputs = operands((1, 2, 4, 3), (1, 2, 5, 3))

    def second(attention: Any) -> Any:
        leaves = [leaf(t) for t in inputs]
        first = torch.autograd.grad(attention(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    with sdpa_kernel(SDPBackend.MATH):
        expected = second(F.scaled_dot_product_attention)
    assert_close(second(sdpa), expected)


def test_vmap() -> None:
    q, k, v = operands((5, 2, 3, 4, 8), (5, 2, 3, 6, 8))
    mask = torch.rand(4, 6) > 0.3
    expected = torch.stack([sdpa(*t, mask) for t in zip(q, k, v)])
    assert_close(torch.vmap(lambda *t: sdpa(*t, mask))(q, k, v), expected)
    assert_close(torch.vmap(sdpa, (0, None, None))(q, k[0], v[0]), sdpa(q, k[0], v[0]))
    grad = torch.func.grad(lambda *t: sdpa(*t, mask).sin().sum(), (0, 1, 2))
    found = torch.vmap(grad)(q, k, v)
    for one, many in zip(zip(*(grad(*t) for t in zip(q, k, v))), found):
        assert_close(many, torch.stack(one))


def test_frozen_operands_get_no_gradient() -> None:
    q, k, v = operands((1, 2, 4, 8), (1, 2, 4, 8))
    q.requires_grad_()
    sdpa(q, k, v).sum().backward()
    assert q.grad is not None
    assert k.grad is None


@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_registered_ops(place: Any) -> None:
    q, k, v = (leaf(place(t)) for t in operands((2, 4, 5, 8), (2, 2, 7, 8), dtype=place.dtype))
    mask, *more = (leaf(place(torch.randn(s, dtype=place.dtype))) for s in ((1, 4, 1, 7), (1, 4, 11), (2, 1)))
    for m in (None, mask, mask.detach() > 0):
        torch.library.opcheck(OPS.sdpa_fwd.default, (q, k, v, m, None, None, 0.3, -5, 2, 0.0, 0.0, 0))
    torch.library.opcheck(OPS.sdpa_fwd.default, (q, k, v, None, *more, 0.3, -5, 2, 0.0, 0.0, 0))
    out, lse = OPS.sdpa_fwd(q, k, v, mask, *more, 0.3, -5, 2, 0.0, 0.0, 0)
    dout = torch.randn_like(out)
    saved = [t.detach() for t in (q, k, v, mask, *more, out, lse)]
    torch.library.opcheck(OPS.sdpa_bwd.default, (dout, None, *saved, [True] * 3, 0.3, -5, 2, 0.0, 0.0, 0))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[0], k, v),
        lambda q, k, v: (q[..., :4], k, v),
        lambda q, k, v: (q, k[:, :, :3], v),
        lambda q, k, v: (q, k.float(), v),
        lambda q, k, v: (q[:, :3], k, v),
    ],
)
def test_registered_ops_refuse(change: Any) -> None:
    q, k, v = operands((2, 4, 5, 8), (2, 2, 7, 8))
    with pytest.raises(RuntimeError, match="fastconv::sdpa_fwd"):
        OPS.sdpa_fwd(*change(q, k, v), None, None, None, 0.3, -5, 7, 0.0, 0.0, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_compiles_without_a_break(place: Any) -> None:
    q, k, v = (leaf(place(t)) for t in operands((2, 2, 5, 8), (2, 2, 7, 8), dtype=place.dtype))
    compiled = torch.compile(lambda *t: sdpa(*t, is_causal=True).sin(), backend="aot_eager", fullgraph=True)
    expected = sdpa(q, k, v, is_causal=True).sin()
    found = compiled(q, k, v)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)))


# ---- What torch has not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 3, (2, 0), (-1, 1), (4, -1)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_windows(window: Any, causal: bool) -> None:
    q, k, v = operands((1, 2, 9, 8), (1, 2, 9, 8))
    before, after = window if isinstance(window, tuple) else (window, window)
    offset = torch.arange(9) - torch.arange(9)[:, None]
    seen = (offset >= (-before if before >= 0 else -9)) & (offset <= (after if after >= 0 else 9))
    seen &= (offset <= 0) | (not causal)
    assert_close(sdpa(q, k, v, is_causal=causal, window=window), F.scaled_dot_product_attention(q, k, v, seen))


def test_softcap_and_lse() -> None:
    q, k, v = operands((1, 2, 5, 8), (1, 2, 7, 8))
    scores = 3 * torch.tanh(q @ k.mT / math.sqrt(8) / 3)
    out, lse = sdpa(q, k, v, softcap=3, return_lse=True)
    assert_close(out, scores.softmax(3) @ v)
    assert_close(lse, scores.logsumexp(3))


def test_the_context_routes_torch_s_function() -> None:
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 6, 16, requires_grad=True)
    expected = layer(x, x, x, need_weights=False)[0]
    with fastconv.observe() as records, fastconv.sdpa():
        found = layer(x, x, x, need_weights=False)[0]
    assert [r.op for r in records] == ["sdpa_fwd"]
    assert_close(found, expected)
    with fastconv.observe() as records:
        layer(x, x, x, need_weights=False)
    assert not records


# ---- Errors ---------------------------------------------------------------------------------------------------------------


SHORT = (5, 8), (7, 8), (7, 8)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (RuntimeError, "at least 2 dimensional", ((8,), (7, 8), (7, 8)), {}),
        (RuntimeError, r"key has length 7 and value 6", ((5, 8), (7, 8), (6, 8)), {}),
        (RuntimeError, r"query has 8 features and key 9", ((5, 8), (7, 9), (7, 8)), {}),
        (RuntimeError, r"size of tensor a \(4\) must match .* \(2\)", ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)), {}),
        (RuntimeError, "must divide the number of heads", ((2, 4, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {"enable_gqa": True}),
        (IndexError, "Dimension out of range", SHORT, {"enable_gqa": True}),
        (RuntimeError, "between 0 and 1, but got 1.5", SHORT, {"dropout_p": 1.5}),
        (RuntimeError, r"size of tensor a \(7\)", SHORT, {"attn_mask": torch.zeros(5, 6)}),
        (IndexError, "attn_mask", SHORT, {"attn_mask": torch.zeros(7)}),
        (RuntimeError, "attn_mask.dtype: torch.int32", SHORT, {"attn_mask": torch.zeros(5, 7, dtype=torch.int32)}),
        (TypeError, "window", SHORT, {"window": 1.5}),
        (RuntimeError, "softcap", SHORT, {"softcap": -1.0}),
    ],
)  # fmt: skip
def test_errors(error: type[Exception], message: str, args: Any, options: Any) -> None:
    with fastconv.observe() as records, pytest.raises(error, match=message) as info:
        sdpa(*(torch.zeros(shape) for shape in args), **options)
    assert info.type is error
    assert not records


def test_mixed_dtypes_and_no_tensors() -> None:
    q, k, v = operands((5, 8), (7, 8), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        sdpa(q, k.double(), v)
    with pytest.raises(TypeError, match="argument 'key' must be Tensor, not list"):
        sdpa(q, [1.0], v)  # type: ignore[call-overload]


@pytest.mark.filterwarnings("ignore")
def test_what_torch_has_to_answer_goes_there_and_options_of_ours_do_not() -> None:
    q, k, v = operands((1, 2, 5, 8), (1, 2, 7, 8))
    before = sum(fastconv.fallback_counts().values())
    traced = torch.jit.trace(sdpa, (q, k, v))
    assert sum(fastconv.fallback_counts().values()) > before
    assert_close(traced(q, k, v), F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(NotImplementedError, match="window"):
        torch.jit.trace(lambda *t: sdpa(*t, window=2), (q, k, v))


def test_subclasses_see_the_options_of_ours() -> None:
    class Spy(Tensor):
        seen: list[Any] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append((func, kwargs))
            return super().__torch_function__(func, types, args, kwargs or {})

    q, k, v = operands((5, 8), (5, 8))
    found = sdpa(q.as_subclass(Spy), k, v, window=1)
    assert Spy.seen[0][1]["window"] == 1
    assert_close(found.as_subclass(Tensor), sdpa(q, k, v, window=1))


@pytest.mark.parametrize("op", ["sdpa_fwd", "sdpa_bwd"])
@pytest.mark.parametrize("threads", [1, 16])
def test_memory_grows_with_the_length_alone(op: str, threads: int) -> None:
    """At 65536 keys scratch is some 16 gradients of the queries at most; the scores would be 1024."""
    length = 1 << 16
    case = SdpaCase(1, 1, 1, length, length, 64, 64)
    scratch = harness.native().plan(op, harness.native_problem(case, "f32"), threads).workspace
    operand = length * 64 * 4
    assert scratch < (18 if threads > 1 else 3) * operand + threads * (4 << 20)


def test_threads_and_batch_do_not_change_the_bits() -> None:
    q, k, v = operands((3, 2, 40, 16), (3, 2, 1500, 16), dtype=torch.float32)
    alone = sdpa(q[1:2], k[1:2], v[1:2])
    torch.set_num_threads(3)
    assert torch.equal(sdpa(q, k, v)[1:2], alone)
    assert torch.equal(sdpa(q[1:2, :1, :1], k[1:2, :1], v[1:2, :1]), alone[:, :1, :1])


@pytest.mark.parametrize("queries", [1, 64])
def test_many_features_are_summed_in_chains(queries: int) -> None:
    """A chain's error, relative to its sum, grows with the root of its length: of 512 features it is twice that of 128. Cut into
    chains of 128 it stays, and half-way between is the root of 2.
    """

    def error(features: int) -> float:
        q, k, v = (torch.randn(1, 4, rows, features) for rows in (queries, 512, 512))
        truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        return float((sdpa(q, k, v) - truth).norm() / truth.norm())

    torch.manual_seed(0)
    assert sum(error(512) for _ in range(4)) < math.sqrt(2) * sum(error(128) for _ in range(4))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_recorded_calls_are_the_general_function_s(is_causal: bool, transposed: bool, scale: float | None) -> None:
    """Bits, layout and derivatives of first and second order; who asks for the log-sum-exp takes the general way."""
    shapes = (2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 6)
    given = [torch.randn(s, dtype=torch.float64).transpose(1, 2) for s in shapes]
    leaves = [leaf(t if transposed else t.contiguous()) for t in given]
    g, options = torch.randn(2, 3, 5, 6, dtype=torch.float64), {"is_causal": is_causal, "scale": scale}
    found = sdpa(*leaves, **options)
    assert type(found.grad_fn).__name__ == "_PlainSdpaBackward"
    general, _ = sdpa(*leaves, **options, return_lse=True)
    with torch.no_grad():
        alone = sdpa(*leaves, **options)
    for other in (general, alone):
        assert torch.equal(found, other)
        assert found.stride() == other.stride()
    plain = torch.autograd.grad(found, leaves, g, retain_graph=True)
    first = torch.autograd.grad(found, leaves, g, create_graph=True)
    expected = torch.autograd.grad(general, leaves, g, create_graph=True)
    assert_close((plain, first), (expected, expected))
    second = [torch.autograd.grad(sum(t.square().sum() for t in grads), leaves) for grads in (first, expected)]
    assert_close(*second)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[0], k[0], v[0]), lambda q, k, v: (q, k[:, :1], v[:, :1]), lambda q, k, v: (q[:1], k, v),
        lambda q, k, v: (q, k.detach()[..., :3, :], v), lambda q, k, v: (q, k.double(), v),
    ],
)  # fmt: skip
def test_what_is_not_recorded_at_once(change: Any) -> None:
    q, k, v = change(*(torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(3)))
    assert record(q, k, v, False, None) is None
    assert record(*(torch.randn(1, 1, 2, 2, requires_grad=True) for _ in range(3)), 1, None) is None
