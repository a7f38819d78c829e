"""Attention beyond torch's: biases by distance, sinks, ragged batches, decoding from a cache."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import fastconv
from fastconv.functional import scaled_dot_product_attention as sdpa
from fastconv.functional import scaled_dot_product_attention_varlen as varlen
from fastconv.functional import scaled_dot_product_attention_with_cache as with_cache
from fastconv.testing import harness
from fastconv.testing.attention import SdpaCase

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def spread(bias: Tensor, L: int, S: int) -> Tensor:
    """The matrix that a bias by distance stands for."""
    return bias[..., torch.arange(S) - torch.arange(L)[:, None] + L - 1]


@pytest.mark.parametrize("shape", [(11,), (1, 11), (4, 11), (2, 1, 11), (2, 4, 11)], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "enable_gqa": True}], ids=str)
def test_relative_bias(options: Any, shape: tuple[int, ...]) -> None:
    q, k, v = random(2, 4, 5, 8), random(2, 2 if options else 4, 7, 8), random(2, 2 if options else 4, 7, 6)
    bias = random(*shape)
    found = sdpa(q, k, v, relative_bias=bias, **options)
    matrix = spread(bias, 5, 7)
    if options:
        matrix = matrix.masked_fill(~torch.ones(5, 7, dtype=torch.bool).tril(), -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, matrix, enable_gqa=bool(options))
    assert_close(found, expected)
    dout = torch.randn_like(found)
    grads = [torch.autograd.grad(y, (q, k, v, bias), dout) for y in (found, expected)]
    assert_close(*grads)


def test_alibi_counts_from_the_causal_diagonal() -> None:
    q, k, v, slopes = random(2, 4, 5, 8), random(2, 4, 7, 8), random(2, 4, 7, 8), random(4)
    for corner, shift in ((None, 0), (torch.nn.attention.bias.causal_lower_right(5, 7), 2)):
        distance = (torch.arange(7) - torch.arange(5)[:, None] - shift).abs()
        matrix = -slopes[:, None, None] * distance
        seen = torch.ones(5, 7, dtype=torch.bool).tril(shift)
        expected = F.scaled_dot_product_attention(q, k, v, matrix.masked_fill(~seen, -torch.inf))
        found = sdpa(q, k, v, corner, is_causal=corner is None, alibi_slopes=slopes)
        assert_close(found, expected)
        assert_close(*(torch.autograd.grad(y.sin().sum(), slopes) for y in (found, expected)))


@pytest.mark.parametrize("shape", [(), (4,), (2, 4)], ids=str)
def test_sinks_are_a_key_whose_value_is_nothing(shape: tuple[int, ...]) -> None:
    q, k, v, sinks = random(2, 4, 5, 8), random(2, 4, 7, 8), random(2, 4, 7, 6), random(*shape)
    scores = torch.cat(((q @ k.mT) / 8**0.5, sinks.expand(2, 4)[..., None, None].expand(2, 4, 5, 1)), 3)
    expected = scores.softmax(3)[..., :7] @ v, scores.logsumexp(3)
    found = sdpa(q, k, v, sinks=sinks, return_lse=True)
    assert_close(found, expected)
    leaves = (q, k, v, sinks)
    assert_close(*(torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves) for out, lse in (found, expected)))


def test_sinks_of_any_size_and_queries_that_see_nothing_else() -> None:
    q, k, v = random(1, 1, 3, 8), random(1, 1, 5, 8), random(1, 1, 5, 8)
    plain = sdpa(q, k, v)
    assert torch.equal(sdpa(q, k, v, sinks=torch.tensor(-torch.inf)), plain)
    assert torch.equal(sdpa(q, k, v, sinks=torch.tensor(-1e30)), plain)
    assert (sdpa(q, k, v, sinks=torch.tensor(1e30)) == 0).all()
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    out, lse = sdpa(q, k, v, hidden, sinks=torch.tensor(2.5), return_lse=True)
    assert (out == 0).all()
    assert_close(lse, torch.full_like(lse, 2.5))


def test_derivatives_of_what_is_added() -> None:
    leaves = random(1, 2, 3, 2), random(1, 1, 4, 2), random(1, 1, 4, 2), random(2, 6), random(2)

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Any:
        return sdpa(q, k, v, relative_bias=bias, sinks=sinks, enable_gqa=True, return_lse=True)

    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_vmap_over_what_is_added() -> None:
    q, bias, sinks = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 9), torch.randn(3, 2)
    expected = torch.stack([sdpa(a, a, a, relative_bias=b, sinks=s) for a, b, s in zip(q, bias, sinks)])
    assert_close(torch.vmap(lambda a, b, s: sdpa(a, a, a, relative_bias=b, sinks=s))(q, bias, sinks), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.usefixtures("widened")
def test_halves_take_them_too(dtype: torch.dtype) -> None:
    q, bias, sinks = random(1, 2, 9, 8, dtype=dtype), random(2, 17, dtype=torch.float32), random(2, dtype=dtype)
    found = sdpa(q, q, q, relative_bias=bias, sinks=sinks)
    wide = sdpa(*[q.float()] * 3, relative_bias=bias, sinks=sinks.float())
    assert torch.equal(found, wide.to(dtype))
    grads = torch.autograd.grad(found.sum(), (q, bias, sinks))
    assert [g.dtype for g in grads] == [dtype, torch.float32, dtype]


@pytest.mark.parametrize("threads", [1, 16])
def test_nothing_of_the_size_of_the_scores(threads: int) -> None:
    """65536 queries and keys with a bias by distance: scratch is some gradients of queries; a matrix would be 1024."""
    length = 1 << 16
    case = SdpaCase(1, 1, 1, length, length, 64, 64, bias="")
    for op in ("sdpa_fwd", "sdpa_bwd"):
        scratch = harness.native().plan(op, harness.native_problem(case, "f32"), threads).workspace
        assert scratch < (18 if threads > 1 else 3) * length * 64 * 4 + threads * (4 << 20)


CUTS = [0, 5, 5, 6, 40]


@pytest.mark.parametrize("options", [
    {}, {"is_causal": True}, {"window": (3, 0), "softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0])},
    {"alibi_slopes": torch.tensor([0.5, 0.1]), "is_causal": True},
], ids=["plain", "causal", "window", "sinks", "alibi"])  # fmt: skip
def test_a_ragged_batch_is_its_sequences(options: Any) -> None:
    q, k, v = random(40, 2, 8), random(40, 2, 8), random(40, 2, 6)
    found = varlen(q, k, v, torch.tensor(CUTS), **options)
    parts = []
    for a, b in itertools.pairwise(CUTS):
        heads = (t[a:b].transpose(0, 1) for t in (q, k, v))
        parts.append(sdpa(*heads, **options).transpose(0, 1))
    expected = torch.cat(parts)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    assert_close(*(torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in (found, expected)))


def test_ragged_queries_at_the_end_of_their_keys() -> None:
    q, k = random(3, 2, 8), random(12, 2, 8)
    found = varlen(q, k, k, [0, 1, 3], [0, 5, 12], is_causal=True, lower_right=True)
    mask = torch.ones(2, 7, dtype=torch.bool).tril(5)
    last = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q[1:], k[5:], k[5:])), mask).transpose(0, 1)
    assert_close(found[1:], last)


def test_ragged_biases_and_log_sums() -> None:
    """One line of biases for all sequences, its middle for the longest's first key and last query; gradients of it too."""
    cuts_q, cuts_k = [0, 3, 3, 9], [0, 2, 6, 13]
    q, k, v = random(9, 2, 8), random(13, 2, 8), random(13, 2, 6)
    bias = random(2, 6 + 7 - 1)
    found = varlen(q, k, v, cuts_q, cuts_k, relative_bias=bias, return_lse=True)
    outs, sums = [], []
    for (a, b), (c, d) in zip(itertools.pairwise(cuts_q), itertools.pairwise(cuts_k)):
        distance = torch.arange(d - c) - torch.arange(b - a)[:, None]
        heads = (t.transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d]))
        out, lse = sdpa(*heads, bias[:, distance + 5], return_lse=True)
        outs.append(out.transpose(0, 1))
        sums.append(lse.transpose(0, 1))
    expected = torch.cat(outs), torch.cat(sums)
    assert_close(found, expected)
    grads = (torch.autograd.grad(y[0].sin().sum() + y[1].sum(), (q, k, v, bias)) for y in (found, expected))
    assert_close(*grads)
    none = varlen(q[:0], k[:0], v[:0], [0], return_lse=True)
    assert (none[0].shape, none[1].shape) == ((0, 2, 6), (0, 2))


@pytest.mark.parametrize("heads", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize("lengths", [9, [3, 9]], ids=str)
def test_biases_and_log_sums_of_a_cache(lengths: Any, heads: tuple[int, ...]) -> None:
    B, L, M = 2, 2, 12
    q, k, v = random(B, 4, L, 8), random(B, 4, M, 8), random(B, 4, M, 8)
    bias = random(*heads, M + L - 1)
    out, lse = with_cache(q, k, v, lengths, relative_bias=bias, return_lse=True)
    for b, n in enumerate([lengths] * B if isinstance(lengths, int) else lengths):
        distance = torch.arange(n) - torch.arange(n - L, n)[:, None]
        mine = bias[b] if len(heads) > 1 else bias
        mask = mine[:, distance + M - 1].masked_fill(distance > 0, -torch.inf)
        assert_close((out[b], lse[b]), sdpa(q[b], k[b, :, :n], v[b, :, :n], mask, return_lse=True))


@pytest.mark.parametrize("lengths", [9, [3, 9], torch.tensor([7, 1])], ids=str)
@pytest.mark.parametrize("writes", [False, True])
def test_decoding_from_a_cache(writes: bool, lengths: Any) -> None:
    """Each sequence against what its cache holds, whatever lies behind; NaN there would show."""
    B, L, M = 2, 2, 12
    q, new_k, new_v = (torch.randn(B, h, L, 8, dtype=torch.float64) for h in (4, 2, 2))
    k, v = (torch.randn(B, 2, M, 8, dtype=torch.float64) for _ in range(2))
    listed = [lengths] * B if isinstance(lengths, int) else [int(n) for n in lengths]
    for cache in (k, v):
        for b, n in enumerate(listed):
            cache[b, :, n:] = torch.nan
    options: Any = {"enable_gqa": True, "sinks": torch.randn(B, 4, dtype=torch.float64)}
    expected = []
    for b, n in enumerate(listed):
        keys, values = ((c[b : b + 1, :, :n]) for c in (k, v))
        if writes:
            keys, values = torch.cat((keys, new_k[b : b + 1]), 2), torch.cat((values, new_v[b : b + 1]), 2)
        total = keys.shape[2]
        mask = torch.ones(L, total, dtype=torch.bool).tril(total - L)
        expected.append(sdpa(q[b : b + 1], keys, values, mask, enable_gqa=True, sinks=options["sinks"][b]))
    more = {"key": new_k, "value": new_v} if writes else {}
    found = with_cache(q, k, v, lengths, **more, **options)
    assert_close(found, torch.cat(expected))
    if writes:
        assert all(torch.equal(k[b, :, n : n + L], new_k[b]) for b, n in enumerate(listed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_decoding_has_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    """One head of keys: threads take segments of 1024 of them, at places that follow from the length."""
    q, k = random(1, 2, 1, 64, dtype=dtype), random(1, 1, 5000, 64, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(with_cache(q, k, k, 4500, enable_gqa=True))
    assert all(torch.equal(r, results[0]) for r in results)
    assert_close(results[0].double(), sdpa(*(t.double() for t in (q, k[:, :, :4500], k[:, :, :4500])), enable_gqa=True),
                 rtol=0, atol=8e-3 if dtype is torch.bfloat16 else 1e-6)  # fmt: skip


T = torch.zeros
BAD: list[Any] = [
    (RuntimeError, "relative_bias .* expected", lambda: sdpa(T(5, 8), T(7, 8), T(7, 8), relative_bias=T(12))),
    (RuntimeError, "sinks .* expected", lambda: sdpa(T(2, 5, 8), T(2, 7, 8), T(2, 7, 8), sinks=T(3))),
    (RuntimeError, "expected floating", lambda: sdpa(T(5, 8), T(7, 8), T(7, 8), sinks=T((), dtype=torch.int))),
    (TypeError, "argument 'sinks' must be Tensor", lambda: sdpa(T(5, 8), T(7, 8), T(7, 8), sinks=1.0)),  # type: ignore[call-overload]
    (RuntimeError, "rise from 0 to 5", lambda: varlen(*[T(5, 2, 8)] * 3, [0, 4])),
    (RuntimeError, "rise from 0 to 5", lambda: varlen(*[T(5, 2, 8)] * 3, [0, 4, 2, 5])),
    (RuntimeError, "expected the same", lambda: varlen(*[T(5, 2, 8)] * 3, [0, 5], [0, 2, 5])),
    (TypeError, "attn_mask", lambda: varlen(*[T(5, 2, 8)] * 3, [0, 5], attn_mask=T(5, 5))),
    (TypeError, "integers", lambda: varlen(*[T(5, 2, 8)] * 3, T(2))),
    (RuntimeError, r"expected \(..., 9\)", lambda: varlen(*[T(5, 2, 8)] * 3, [0, 5], relative_bias=T(2, 10))),
    (TypeError, "relative_bias", lambda: varlen(*[T(5, 2, 8)] * 3, [0, 5], relative_bias=0.5)),
    (RuntimeError, r"expected \(..., 9\)", lambda: with_cache(*[T(1, 2, 5, 8)] * 3, 1, relative_bias=T(2, 5))),
    (RuntimeError, "a length is 6", lambda: with_cache(*[T(1, 2, 5, 8)] * 3, 6)),
    (RuntimeError, "has 3 numbers, expected 1", lambda: with_cache(*[T(1, 2, 5, 8)] * 3, [1, 2, 3])),
    (RuntimeError, "key alone", lambda: with_cache(*[T(1, 2, 5, 8)] * 3, 1, key=T(1, 2, 5, 8))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "bad"), BAD)
def test_errors(error: type[Exception], message: str, bad: Any) -> None:
    with fastconv.observe() as records, pytest.raises(error, match=message):
        bad()
    assert not records


# ---- On a GPU -------------------------------------------------------------------------------------------------------------


def test_ragged_batches_and_caches_on_a_gpu(gpu: Any) -> None:
    """A kernel for each sequence; cuts and lengths that lie on the CPU are read without waiting."""
    theirs = F.scaled_dot_product_attention
    q, k, v = (random(40, 2, 8).detach().float() for _ in range(3))
    leaves = [gpu(t).requires_grad_() for t in (q, k, v)]
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    found = varlen(*leaves, CUTS, is_causal=True)
    parts = [[t[a:b].transpose(0, 1) for t in exact] for a, b in itertools.pairwise(CUTS)]
    expected = torch.cat([theirs(*part, is_causal=True).transpose(0, 1) for part in parts])
    gpu.same(found, expected, 20)
    found.backward(gpu(q))
    expected.backward(q.double())
    gpu.same([t.grad for t in leaves], [t.grad for t in exact], 20)
    one, keys, values = (random(2, 2, n, 8).detach().float() for n in (1, 12, 12))
    with torch.no_grad():
        found = with_cache(gpu(one), gpu(keys), gpu(values), [3, 9])
    exact = [t.double() for t in (one, keys, values)]
    gpu.same(found, torch.stack([theirs(*(t[b, :, :n] for t in exact)) for b, n in enumerate((3, 9))]), 20)
