"""LSTM and GRU as torch sees them: values, gradients of every order, bits, options, registered ops, and what they run on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv.models.recurrent import GRU, LSTM
from fastconv.ops import recurrent as ops
from fastconv.testing.rounded import Rounded
from fastconv.testing.tolerance import peer_bound

OPS = torch.ops.fastconv
KINDS = {"lstm": (LSTM, nn.LSTM, ops.LSTM), "gru": (GRU, nn.GRU, ops.GRU)}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def twins(name: str, *sizes: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    ours, theirs, _ = KINDS[name]
    mine, other = ours(*sizes, **options).to(dtype), theirs(*sizes, **options).to(dtype)
    mine.load_state_dict(other.state_dict())
    return mine, other


def flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for part in found for t in flat(part)]


def layer_operands(name: str, L: int = 3, B: int = 2, inputs: int = 4, H: int = 5, **options: Any) -> list[Tensor]:
    """x, w_ih, w_hh, b_ih, b_hh and the state of one layer."""
    _, _, kind = KINDS[name]
    shapes = [(L, B, inputs), (kind.gates * H, inputs), (kind.gates * H, H), (kind.gates * H,), (kind.gates * H,)]
    shapes += [(B, H)] * kind.states
    return [torch.randn(shape, dtype=torch.float64, **options) for shape in shapes]


def run(name: str, reverse: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    x, w_ih, w_hh, b_ih, b_hh, *state = tensors
    y, last = ops.layer(KINDS[name][2], x, (w_ih, w_hh), (b_ih, b_hh), tuple(state), reverse)
    return y, *last


@pytest.mark.parametrize("H", [1, 7, 17, 33])
@pytest.mark.parametrize("options", [{}, {"bias": False, "bidirectional": True}, {"batch_first": True}], ids=str)
def test_values_and_gradients_are_torch_s(name: str, H: int, options: dict[str, Any]) -> None:
    ours, theirs = twins(name, 6, H, num_layers=2, **options)
    for shape in ((5, 3, 6), (1, 1, 6), (4, 6)):
        results = []
        for model in (ours, theirs):
            torch.manual_seed(1)
            x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            found = flat(model(x))
            leaves = [x, *model.parameters()]
            results.append((found, torch.autograd.grad(sum(t.sin().sum() for t in found), leaves)))
        assert_close(results[0], results[1])


def test_one_kernel_for_all_steps(name: str) -> None:
    ours, _ = twins(name, 6, 8, dtype=torch.float32)
    x = torch.randn(4, 2, 6)
    with fastconv.observe() as records:
        y, _ = ours(x)
        y.sum().backward()
    assert [r.op for r in records if r.op.startswith(name)] == [f"{name}_fwd", f"{name}_bwd"]
    # One product makes the gates, and two over all steps the gradients of weights; nobody asks for that of x.
    assert [r.op for r in records if r.op.startswith("conv2d")] == ["conv2d_fwd", "conv2d_wgrad", "conv2d_wgrad"]


@pytest.mark.parametrize("L", [1, 40])
@pytest.mark.parametrize("H", [16, 100])
def test_no_worse_than_torch(name: str, L: int, H: int) -> None:
    """Outputs and the input's gradient. Those of weights are one sum over all steps, as in any linear layer of L·B rows."""
    ours, theirs = twins(name, 24, H, dtype=torch.float32)
    exact = KINDS[name][1](24, H).double()
    exact.load_state_dict(theirs.state_dict())
    x, g = torch.randn(L, 8, 24), torch.randn(L, 8, H)

    def results(model: nn.Module, dtype: torch.dtype) -> list[np.ndarray]:
        leaf = x.to(dtype).requires_grad_()
        y, _ = model(leaf)
        return [t.detach().numpy() for t in (y, *torch.autograd.grad((y * g).sum(), leaf))]

    found = results(ours, torch.float32), results(theirs, torch.float32), results(exact, torch.float64)
    for mine, other, truth in zip(*found):
        assert np.abs(mine - truth).max() <= peer_bound(other, truth)


@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives(name: str, reverse: bool) -> None:
    tensors = layer_operands(name, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: run(name, reverse, *t), tensors)
    assert torch.autograd.gradgradcheck(
        lambda *t: run(name, reverse, *t)[0], layer_operands(name, L=2, B=1, H=2, requires_grad=True)
    )


def test_gradients_that_are_not_asked_for(name: str) -> None:
    tensors = layer_operands(name)
    for i in range(len(tensors)):
        wanted = [t.detach().requires_grad_(i == place) for place, t in enumerate(tensors)]
        every = [t.detach().requires_grad_() for t in tensors]
        (alone,) = torch.autograd.grad(run(name, False, *wanted)[0].sum(), wanted[i])
        assert_close(alone, torch.autograd.grad(run(name, False, *every)[0].sum(), every[i])[0], rtol=0, atol=0)


def test_gradient_of_the_last_cell_alone() -> None:
    tensors = layer_operands("lstm", requires_grad=True)
    found = torch.autograd.grad(run("lstm", False, *tensors)[2].sum(), tensors)
    expected = torch.autograd.grad(ops._composed(ops.LSTM, False, *tensors)[1].sum(), tensors)
    assert_close(found, expected)


def test_transforms_and_forward_mode(name: str) -> None:
    tensors = layer_operands(name)

    def ours(*t: Tensor) -> Tensor:
        return run(name, True, *t)[0].sin().sum()

    def composed(*t: Tensor) -> Tensor:
        return ops._composed(KINDS[name][2], True, *t)[0].sin().sum()

    assert_close(torch.func.grad(ours, 2)(*tensors), torch.func.grad(composed, 2)(*tensors))
    stacked = torch.randn(3, *tensors[0].shape, dtype=torch.float64)
    mapped = torch.vmap(lambda x: run(name, False, x, *tensors[1:])[0])(stacked)
    assert_close(mapped, torch.stack([run(name, False, x, *tensors[1:])[0] for x in stacked]))
    tangents = [torch.randn_like(t) for t in tensors]
    assert_close(
        torch.func.jvp(ours, tuple(tensors), tuple(tangents)), torch.func.jvp(composed, tuple(tensors), tuple(tangents))
    )


@pytest.mark.parametrize("L", [1, 3, 9])
def test_bits_of_a_sequence_are_its_own(name: str, L: int) -> None:
    ours, _ = twins(name, 6, 33, dtype=torch.float32, bidirectional=True)
    x = torch.randn(L, 70, 6)
    with torch.no_grad():
        together = ours(x)[0]
        for first, count in ((0, 1), (5, 3), (20, 50)):
            assert torch.equal(ours(x[:, first : first + count])[0], together[:, first : first + count])
        torch.set_num_threads(3)
        assert torch.equal(ours(x)[0], together)
        torch.set_num_threads(1)
    # Recorded or not, the same kernel.
    assert torch.equal(ours(x)[0], together)


def test_there_is_nothing_to_explain(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name}_fwd is asked by fastconv.models' layers"):
        fastconv.explain(f"{name}_fwd", torch.zeros(1))


def test_nothing_is_kept_without_a_backward_pass(name: str) -> None:
    kind = KINDS[name][2]
    x, w_ih, w_hh, b_ih, b_hh, *state = layer_operands(name)
    gates = nn.functional.linear(x, w_ih, b_ih)
    *_, kept = ops._forward(kind, gates, tuple(state), w_hh, b_hh, False, False)
    assert kept.numel() == 0
    *_, kept = ops._forward(kind, gates, tuple(state), w_hh, b_hh, False, True)
    assert kept.shape == (3, 2, kind.kept * 5)


def test_changed_operands_are_noticed(name: str) -> None:
    tensors = layer_operands(name, requires_grad=True)
    y = run(name, False, *tensors)[0]
    with torch.no_grad():
        tensors[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_run_step_by_step(name: str, dtype: torch.dtype) -> None:
    ours, theirs = twins(name, 6, 8, dtype=dtype)
    x = torch.randn(4, 2, 6, dtype=dtype)
    with fastconv.observe() as records, torch.no_grad():
        found = ours(x)[0]
    assert not [r for r in records if r.op.startswith(name)]
    exact = theirs.double()(x.double())[0]
    # Four steps, each of which rounds its gates and its state.
    assert (found.double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps


def test_under_autocast(name: str) -> None:
    ours, _ = twins(name, 6, 8, dtype=torch.float32)
    x = torch.randn(4, 2, 6)
    expected = ours(x)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), fastconv.observe() as records:
        found = ours(x)[0]
    assert {r.dtype for r in records} == {"bf16"}
    assert (found - expected).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps


# ---- Registered ops --------------------------------------------------------------------------------------------------------


def op_operands(name: str) -> tuple[Any, ...]:
    x, w_ih, w_hh, b_ih, b_hh, *state = layer_operands(name)
    gates = nn.functional.linear(x, w_ih, b_ih)
    return *(t.float().requires_grad_() for t in (gates, *state, w_hh, b_hh)), True, True


def test_registered_ops(name: str) -> None:
    operands = op_operands(name)
    torch.library.opcheck(getattr(OPS, f"{name}_fwd").default, operands)
    tensors = [t.detach() for t in operands[:-2]]
    _, h, *c, w, _ = tensors
    y, *last, kept = getattr(OPS, f"{name}_fwd")(*tensors, True, True)
    dy = torch.randn_like(y)
    rest = (dy, torch.randn_like(last[0]), w, *c, kept, True) if last else (dy, w, h, y, kept, True)
    torch.library.opcheck(getattr(OPS, f"{name}_bwd").default, rest)


def test_registered_ops_refuse(name: str) -> None:
    gates, h, *rest = op_operands(name)
    op = getattr(OPS, f"{name}_fwd")
    for bad in ((gates[..., 1:], h, *rest), (gates, h[:1], *rest), (gates, h.double(), *rest), (gates[0], h, *rest)):
        with pytest.raises(RuntimeError, match=f"fastconv::{name}_fwd"):
            op(*bad)


@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_break(name: str) -> None:
    # A layer, for torch traces none of its recurrent modules.
    tensors = layer_operands(name, requires_grad=True)
    compiled = torch.compile(lambda *t: run(name, True, *t)[0].sin(), backend="aot_eager", fullgraph=True)
    found, expected = compiled(*tensors), run(name, True, *tensors)[0].sin()
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(expected.sum(), tensors))


def test_arithmetic_is_counted(name: str) -> None:
    """The inputs' product and the state's; backward both for what went in and for weights."""
    ours, _ = twins(name, 6, 8, dtype=torch.float32)
    x = torch.randn(4, 2, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y, _ = ours(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * 4 * 2 * KINDS[name][2].gates * 8 * (6 + 8)
    assert counter.get_total_flops() == 3 * forward


# ---- The bound that kernels are tested with --------------------------------------------------------------------------------


def test_rounded_numbers_bound_what_float32_makes() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((40, 40)).astype(np.float32) for _ in range(2))
    formulas = [
        lambda x, y: x @ y.T,
        lambda x, y: np.tanh(x) * (x - y) + x / (1.0 + np.exp(-y)),
        lambda x, y: np.tanh(np.tanh(x @ y) @ y) - y,
    ]
    for formula in formulas:
        bound = formula(Rounded(a), Rounded(b))
        error = np.abs(formula(a, b) - formula(a.astype(np.float64), b.astype(np.float64)))
        assert np.allclose(bound.value, formula(a.astype(np.float64), b.astype(np.float64)), rtol=1e-14)
        assert (error <= np.finfo(np.float32).eps * bound.error).all()
        assert (error > 1e-3 * np.finfo(np.float32).eps * bound.error).any()
