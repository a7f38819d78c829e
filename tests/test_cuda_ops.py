"""CUDA tensors after `set_cuda(True)`, on stand-ins for them and for real (conftest.py's `gpu`): two orders of derivatives of
every function, and what is different there: who answers, autocast, fake tensors, dropout's generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastconv
import fastconv.functional as F
from fastconv import _attention, _fused, _gpu, control, fallback
from fastconv.ops import _cuda
from fastconv.ops._packed import PackedFilters


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# ---- Values, and derivatives of two orders ----------------------------------------------------------------------------------

CALLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "conv2d": (F.conv2d, T.conv2d, ((2, 4, 6, 5), (8, 4, 3, 3), (8,)), {"padding": 1, "stride": (2, 1)}),
    "conv2d of an image": (F.conv2d, T.conv2d, ((4, 6, 5), (4, 1, 3, 3)), {"groups": 4}),
    "conv1d": (F.conv1d, T.conv1d, ((2, 4, 9), (6, 4, 3), (6,)), {"padding": "same", "dilation": 2}),
    "conv_transpose2d": (F.conv_transpose2d, T.conv_transpose2d, ((2, 4, 4, 3), (4, 3, 3, 3), (3,)), {"stride": 2}),
    "linear": (F.linear, T.linear, ((2, 3, 8), (5, 8), (5,)), {}),
    "max_pool2d": (F.max_pool2d, T.max_pool2d, ((2, 4, 7, 6),), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "max_pool1d": (F.max_pool1d, T.max_pool1d, ((4, 7),), {"kernel_size": 3, "dilation": 2}),
    "avg_pool2d": (F.avg_pool2d, T.avg_pool2d, ((2, 4, 7, 6),), {"kernel_size": 3, "padding": 1, "ceil_mode": True}),
    "adaptive_max_pool2d": (F.adaptive_max_pool2d, T.adaptive_max_pool2d, ((2, 4, 7, 6),), {"output_size": (3, 2)}),
    "adaptive_avg_pool2d": (F.adaptive_avg_pool2d, T.adaptive_avg_pool2d, ((2, 4, 7, 6),), {"output_size": 1}),
    "layer_norm": (
        lambda x, w, b: F.layer_norm(x, (8,), w, b), lambda x, w, b: T.layer_norm(x, (8,), w, b),
        ((2, 3, 8), (8,), (8,)), {},
    ),
    "attention": (
        F.scaled_dot_product_attention, T.scaled_dot_product_attention, ((2, 5, 8), (2, 7, 8), (2, 7, 8)),
        {"is_causal": True},
    ),
}  # fmt: skip


def orders(call: Callable[..., Tensor], leaves: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """The result, its gradients, and those of a function of them."""
    y = call(*leaves, **options)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((t.square().sum() for t in first), y.sum() * 0), leaves)
    return [y, *first, *second]


@pytest.mark.parametrize("name", CALLS)
def test_values_and_two_orders_of_derivatives(gpu: Any, name: str) -> None:
    ours, theirs, shapes, options = CALLS[name]
    given = [randn(*shape) for shape in shapes]
    found = orders(ours, [gpu(t).requires_grad_() for t in given], options)
    expected = orders(theirs, [t.double().requires_grad_() for t in given], options)
    for a, b in zip(found, expected, strict=True):
        gpu.same(a, b, 18)


def test_halves(gpu: Any) -> None:
    x, w = gpu(randn(3, 16).bfloat16()).requires_grad_(), gpu(randn(8, 16).bfloat16())
    h = F.layer_norm(F.linear(x, w), (8,))
    assert h.dtype is torch.bfloat16
    gpu.same(h, T.layer_norm(T.linear(gpu.back(x), gpu.back(w)).float(), (8,)), 12)
    (g,) = torch.autograd.grad(h.float().square().sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.float().square().sum(), x)
    assert gg.dtype is torch.bfloat16
    assert gpu.back(gg).isfinite().all()


def test_vmap(gpu: Any) -> None:
    x, w = randn(3, 2, 4, 5, 5), randn(3, 6, 4, 3, 3)
    expected = torch.stack([T.conv2d(a, b) for a, b in zip(x.double(), w.double())])
    gpu.same(torch.vmap(F.conv2d)(gpu(x), gpu(w)), expected)
    m, n = randn(3, 5, 4), randn(3, 6, 4)
    gpu.same(torch.vmap(F.linear)(gpu(m), gpu(n)), m.double() @ n.double().mT)


def test_empty_batches(gpu: Any) -> None:
    x, w, bias = (
        gpu(randn(0, 4, 5, 5)).requires_grad_(),
        gpu(randn(8, 4, 3, 3)).requires_grad_(),
        gpu(randn(8)).requires_grad_(),
    )
    y = F.conv2d(x, w, bias)
    assert y.shape == (0, 8, 3, 3)
    dx, dw, db = torch.autograd.grad(y.sum(), [x, w, bias])
    assert dx.shape == x.shape
    assert not gpu.back(dw).any()
    assert not gpu.back(db).any()
    assert F.max_pool2d(x, 2).shape == (0, 4, 2, 2)
    assert F.layer_norm(x, (5,)).shape == x.shape


# ---- Compilers --------------------------------------------------------------------------------------------------------------


def test_fake_tensors_have_the_kernels_layouts(gpu: Any) -> None:
    calls: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda x, w: F.conv2d(x, w, padding=1), (randn(2, 4, 5, 5).to(memory_format=torch.channels_last), randn(6, 4, 3, 3))),
        (F.linear, (randn(2, 3, 8).half(), randn(5, 8).half())),
        (lambda x: F.layer_norm(x, (8,)), (randn(3, 8).bfloat16(),)),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[1], (randn(2, 4, 5, 5),)),
        (F.scaled_dot_product_attention, (randn(1, 2, 5, 8).half(),) * 3),
    ]  # fmt: skip
    for call, given in calls:
        real = call(*map(gpu, given))
        with FakeTensorMode(), torch.no_grad():
            fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in given]
            fake = call(*fakes)
        assert fake.device.type == "cuda"
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_a_traced_model_holds_the_ops(gpu: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode(), torch.no_grad():
        x, w = torch.empty(2, 4, 5, 5, device="cuda"), torch.empty(6, 4, 3, 3, device="cuda")
        graph = make_fx(lambda x, w: F.adaptive_avg_pool2d(F.conv2d(x, w), 1))(x, w)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert {"fastconv.conv2d_fwd.default", "fastconv.adaptive_avg_pool2d_fwd.default"} <= called


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels are wanted, whatever the GPU, and torch answers nothing. A compiler cannot read what the emulator patches."""
    monkeypatch.setattr(_gpu, "_why_not", lambda device: "")
    fastconv.set_cuda(True)
    fastconv.set_fallback("error")
    yield
    fastconv.set_fallback("warn")
    fastconv.set_cuda(False)


@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize("name", CALLS)
def test_compiled_without_a_break_where_there_is_no_gpu(name: str) -> None:
    """Of tensors that have no memory. Their gradients take a GPU: the tests of each op's compiled form have them."""
    ours, _, shapes, options = CALLS[name]
    if name == "attention":  # of four dimensions: a torch without CUDA cannot index such tensors, which three take
        shapes = tuple((1, *shape) for shape in shapes)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: ours(*t, **options), backend="aot_eager", fullgraph=True)
    with FakeTensorMode(), torch.no_grad():
        given = [torch.empty(shape, device="cuda") for shape in shapes]
        found, expected = compiled(*given), ours(*given, **options)
    assert found.device == expected.device == torch.device("cuda:0")
    assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_an_implementation_for_every_op() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastconv::")}
    on_cpu, on_gpu = ({name for name in ops if has(name, key)} for key in ("CPU", "CUDA"))
    assert {f"fastconv::{name}" for name in _cuda.IMPLEMENTATIONS} == on_gpu
    without = {name.split("::")[1].rsplit("_", 1)[0] for name in on_cpu - on_gpu}
    assert without - {"batch_norm", "lstm", "gru"} == set()


# ---- Autocast, epilogues, watching ------------------------------------------------------------------------------------------


def test_autocast(gpu: Any) -> None:
    x, w, m = gpu(randn(2, 8, 5, 5)), gpu(randn(8, 8, 3, 3)), gpu(randn(6, 8))
    q = gpu(randn(1, 2, 5, 8))
    with gpu.autocast(torch.bfloat16), fastconv.observe() as seen:
        assert F.conv2d(x, w).dtype is torch.bfloat16
        assert F.conv_transpose2d(x, w).dtype is torch.bfloat16
        assert F.linear(m, m).dtype is torch.bfloat16
        assert F.scaled_dot_product_attention(q, q, q).dtype is torch.bfloat16
        # torch's list of what stays in float32; pools are on none.
        assert F.layer_norm(m.bfloat16(), (8,), m[0]).dtype is torch.float32
        assert F.max_pool2d(x, 2).dtype is torch.float32
    assert [r.dtype for r in seen] == ["bf16"] * 4 + ["f32"] * 2
    assert F.conv2d(x, w).dtype is torch.float32


def test_epilogues_are_the_kernels(gpu: Any) -> None:
    x, w, bias, more = randn(2, 8, 6, 5), randn(8, 8, 3, 3), randn(8), randn(2, 8, 6, 5)
    geometry = (1, 1), (1, 1, 1, 1), (1, 1), 1
    with fastconv.observe() as seen, torch.no_grad():
        y = _fused.frozen_conv2d(gpu(x), gpu(w), gpu(bias), PackedFilters(), geometry, gpu(more), "relu")
    assert len(seen) == 1
    gpu.same(y, T.relu(T.conv2d(x.double(), w.double(), bias.double(), padding=1) + more))
    x, w, more = randn(2, 3, 8), randn(8, 8), randn(2, 3, 8)
    with fastconv.observe() as seen, torch.no_grad():
        y = _fused.frozen_linear(gpu(x), gpu(w), gpu(bias), PackedFilters(), gpu(more), "gelu")
    assert len(seen) == 1
    gpu.same(y, T.gelu(T.linear(x.double(), w.double(), bias.double()) + more))


def test_calls_are_seen(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTCONV_LOG", "1")
    x, w = gpu(randn(2, 4, 6, 5)), gpu(randn(6, 4, 3, 3))
    with fastconv.observe() as seen:
        F.conv2d(x, w)
    assert [(r.op, r.shapes[0], r.dtype, r.seconds == r.seconds) for r in seen] == [
        ("conv2d_fwd", (2, 4, 6, 5), "f32", False)
    ]
    assert "conv2d_fwd.direct.f32.sm80" in capsys.readouterr().err
    for op in ("conv2d_fwd", "conv2d_dgrad", "conv2d_wgrad"):
        explained = fastconv.explain(op, x, w, padding=1)
        assert explained.problem.endswith("GPU 0")
        assert explained.chosen is not None
        assert explained.chosen.endswith(".sm80")
    with fastconv.observe() as seen, monkeypatch.context() as patch:
        patch.setattr(_cuda.plan, "strict", True)
        F.linear(gpu(randn(3, 8)), gpu(randn(8, 8)))
    assert [r.kernel for r in seen] == ["conv2d_fwd.direct.f32.sm80"]


# ---- Models -----------------------------------------------------------------------------------------------------------------


def test_a_converted_model_trains_like_torchs(gpu: Any) -> None:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Conv2d(8, 8, 3, groups=8),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4),
    ]  # fmt: skip
    theirs = torch.nn.Sequential(*layers).double()
    ours = copy.deepcopy(theirs).float()
    fastconv.convert(ours)
    gpu(ours)
    x = randn(2, 3, 10, 10)
    with fastconv.observe() as seen:
        ours(gpu(x)).square().sum().backward()
    # Forward each of six layers; backward two products of each, one of the first, and one pass of each other.
    assert len(seen) == 6 + (2 + 2 + 1) + 3
    theirs(x.double()).square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        gpu.same(p.grad, q.grad, 18)


def test_a_fused_model_leaves_norms_additions_and_activations_to_its_kernels(gpu: Any) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = (
                torch.nn.Conv2d(8, 8, 3, padding=1),
                torch.nn.BatchNorm2d(8),
                torch.nn.Linear(8, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            return T.gelu(self.head(T.relu(self.norm(self.conv(x)) + x).mean((2, 3))))

    torch.manual_seed(0)
    theirs = Block().eval()
    theirs.norm.running_var.uniform_(0.5, 2)
    x = randn(2, 8, 6, 5)
    expected = theirs.double()(x.double())
    with torch.no_grad():
        fused = fastconv.fuse(gpu(theirs.float()))
        with fastconv.observe() as seen:
            gpu.same(fused(gpu(x)), expected, 18)
    assert [r.op for r in seen] == ["conv2d_fwd"] * 2


def test_a_transformer_of_ours(gpu: Any) -> None:
    torch.manual_seed(0)
    theirs, ours = (
        module.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
        for module in (torch.nn, fastconv.nn)
    )
    ours.load_state_dict(theirs.state_dict())
    x = randn(2, 5, 16)
    with torch.no_grad():
        gpu.same(gpu(ours)(gpu(x)), theirs.double()(x.double()), 18)


# ---- Who answers ------------------------------------------------------------------------------------------------------------


def test_torch_answers_until_somebody_wants_the_kernels(gpu: Any) -> None:
    fastconv.set_cuda(False)
    x, w = gpu(randn(2, 4, 6, 5)), gpu(randn(6, 4, 3, 3))
    for call in (lambda: F.conv2d(x, w), lambda: F.max_pool2d(x, 2), lambda: F.linear(x, w[0, 0, :, :1].expand(3, 5))):
        with pytest.raises(
            NotImplementedError, match=r"on cuda, .*not been measured.*set_cuda\(True\).*fastconv\.cuda"
        ):
            call()
    assert fastconv.cuda.conv2d(x, w).shape == (2, 6, 4, 3)
    q = gpu(randn(1, 5, 8))
    fastconv.set_fallback("silent")
    with pytest.raises(
        NotImplementedError, match=r"window.*fastconv\.cuda\.scaled_dot_product_attention.*set_cuda\(True\)"
    ):
        F.scaled_dot_product_attention(q, q, q, window=2)
    fastconv.set_cuda(True)
    assert F.scaled_dot_product_attention(q, q, q, window=2).shape == q.shape
    with pytest.raises(TypeError, match="set_cuda: got 1, expected True or False"):
        fastconv.set_cuda(1)  # type: ignore[arg-type]


def test_what_has_no_kernel_goes_to_torch_or_is_an_error(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = gpu(randn(2, 4, 6, 5).double()), gpu(randn(6, 4, 3, 3).double())
    with pytest.raises(NotImplementedError, match="dtype float64"):
        F.conv2d(x, w)
    with pytest.raises(NotImplementedError, match=r"fastconv\.cuda\.conv2d has no kernel for this call: dtype float64"):
        fastconv.cuda.conv2d(x, w)
    x, w = gpu(randn(2, 4, 6, 5)), gpu(randn(6, 4, 3, 3))
    with pytest.raises(NotImplementedError, match="weight is on cpu, other operands on cuda:0"):
        F.conv2d(x, gpu.back(w))
    _, indices = F.max_pool2d(x, 2, return_indices=True)
    with pytest.raises(NotImplementedError, match="max_pool2d_bwd on cuda: got no windows"):
        torch.ops.fastconv.max_pool2d_bwd(indices.float(), indices, [2, 4, 6, 5], False)
    with pytest.raises(NotImplementedError, match="where batch_norm has no kernel"):
        F.batch_norm(x, None, None, training=True)
    monkeypatch.setattr(_gpu, "_why_not", lambda device: f"GPU {device} is sm_70")
    fastconv.set_fallback("silent")
    monkeypatch.setattr(fallback, "_counts", {})
    gpu.same(F.conv2d(x, w), T.conv2d(gpu.back(x), gpu.back(w)))
    assert fastconv.fallback_counts() == {("conv2d", "input is on cuda: GPU 0 is sm_70"): 1}


@pytest.mark.parametrize("gpu", ["emulated"], indirect=True)
def test_what_is_on_the_cpu_does_not_come_to_the_emulator(gpu: Any) -> None:
    """Which has a kernel for it, and whose plan would be kept for tests to come."""
    x, w = randn(1, 3, 17, 19), randn(5, 3, 3, 2)  # shapes that no other test has
    with pytest.raises(AssertionError, match="conv2d_fwd of operands on the CPU came to the emulated GPU"):
        F.conv2d(x, w)
    assert F.conv2d(gpu(x), gpu(w)).shape == (1, 5, 15, 18)


def test_which_gpus_a_build_is_for() -> None:
    why_not = fastconv._C.why_not_capability
    assert why_not(8, 0, "80 90") == why_not(8, 6, "80 90") == why_not(12, 0, "80") == why_not(9, 0, "90 80") == ""
    for built in ("90", "90 100"):
        assert why_not(8, 0, built).startswith(f"sm_80, and this build's CUDA kernels are for {built} and later")
    assert why_not(7, 5, "80 90").startswith("sm_75")
    assert why_not(9, 0, "")


def test_the_driver_is_asked_by_nobody_who_only_names_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel(SimpleNamespace):
        @property
        def runnable(self) -> bool:
            raise AssertionError("the driver was started")

        why_not = runnable

    named = Kernel(op="conv2d_fwd", algorithm="direct", target="sm80", name="conv2d_fwd.direct.f32.sm80")
    monkeypatch.setattr(control, "_C", SimpleNamespace(kernels=lambda: [named]))
    assert fastconv.kernels("conv2d_fwd") == [named]
    with fastconv.use(conv2d_fwd="direct"):
        pass
    # The module's own say it when they are asked, and not before.
    monkeypatch.undo()
    assert isinstance(type(fastconv.kernels()[0]).why_not, property)


def test_pools_have_gradients_under_deterministic_algorithms(gpu: Any) -> None:
    """torch refuses those of adaptive pools there, which it adds up with atomics."""
    torch.use_deterministic_algorithms(True)
    try:
        for ours, theirs, args in (
            (F.max_pool2d, T.max_pool2d, (3, 2, 1)), (F.avg_pool2d, T.avg_pool2d, (3, 2, 1)),
            (F.adaptive_max_pool2d, T.adaptive_max_pool2d, ((4, 3),)), (F.adaptive_avg_pool2d, T.adaptive_avg_pool2d, ((4, 3),)),
        ):  # fmt: skip
            x = randn(2, 5, 9, 8)
            given, expected = gpu(x).requires_grad_(), x.double().requires_grad_()
            theirs(expected, *args).square().sum().backward()
            found = [torch.autograd.grad(ours(given, *args).square().sum(), given)[0] for _ in range(2)]
            gpu.same(found[0], expected.grad)
            assert torch.equal(*gpu.back(found))
    finally:
        torch.use_deterministic_algorithms(False)


def test_dropout_draws_from_the_gpus_generator(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Generator:
        seed, place = 7, 0

        def initial_seed(self) -> int:
            return self.seed

        def get_offset(self) -> int:
            return self.place

        def set_offset(self, place: int) -> None:
            assert place % 4 == 0  # torch demands it
            self.place = place

    generator = Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    device = torch.device("cuda:0")
    keys = [_attention._draw(device) for _ in range(3)]
    assert len(set(keys)) == 3
    assert all(0 <= key < 2**63 for key in keys)
    generator.place = 0
    assert _attention._draw(device) == keys[0]
    generator.seed, generator.place = 8, 0
    assert _attention._draw(device) not in keys
    q, state = gpu(randn(1, 2, 5, 8)), torch.get_rng_state()
    assert F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).shape == q.shape
    assert torch.equal(torch.get_rng_state(), state)
    assert generator.place == 8


def test_dropout_in_a_graph_is_refused_and_not_replayed(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    q = gpu(randn(1, 2, 5, 8))
    for call in (F.scaled_dot_product_attention, fastconv.cuda.scaled_dot_product_attention):
        with pytest.raises(
            RuntimeError, match="while a CUDA graph is captured, whose every replay would drop the same"
        ):
            call(q, q, q, dropout_p=0.5)
        assert call(q, q, q).shape == q.shape
