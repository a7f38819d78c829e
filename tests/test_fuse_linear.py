"""fastconv.fuse on linear layers: packed weights, activations and additions in the epilogue, attention's projections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastconv
from fastconv import _fused, models
from fastconv.fusion import FrozenLinear
from fastconv.ops import _frozen_linear


def tokens(length: int = 9) -> Tensor:
    return torch.arange(2 * length).reshape(2, length) % 17 + 1


def rows(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape or (2, 5, 24))


def same(found: object, expected: object) -> None:
    for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often a frozen linear layer ran as one call of a kernel, and how often torch's linear was called."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            result = function(*args, **kwargs)
            counts[name] += result is not None  # None: csrc/eager leaves the call to Python
            return result

        return call

    monkeypatch.setattr(_fused, "_eager_linear", counted("frozen", _fused._eager_linear))
    monkeypatch.setattr(_frozen_linear, "follow", counted("frozen", _frozen_linear.follow))
    monkeypatch.setattr(F, "linear", counted("linear", F.linear))
    return counts


SMALL_BERT = {"vocabulary": 20, "positions": 16, "width": 32, "num_heads": 2, "hidden": 48, "depth": 2}
SMALL_TRANSFORMER = {"source_size": 20, "target_size": 20, "d_model": 32, "num_heads": 2, "d_ff": 48, "num_layers": 2}

# The model, its inputs; linear layers, activations and additions that become one call each, counted in the papers' figures.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], tuple[int, dict[str, int], int]]] = {
    "vit": (
        lambda: models.create("vit_tiny", layers=nn, image_size=32, depth=2, head_std=0.02),
        (rows(2, 3, 32, 32),),
        (9, {"gelu": 2}, 2),
    ),
    "bert": (lambda: models.create("bert_base", layers=nn, **SMALL_BERT), (tokens(),), (13, {"gelu": 2}, 0)),
    "transformer": (
        lambda: models.create("transformer", layers=nn, **SMALL_TRANSFORMER),
        (tokens(), tokens(7)),
        (33, {"relu": 4}, 0),
    ),
    "gpt2": (
        lambda: models.create("gpt2", layers=nn, vocabulary=20, positions=16, width=32, num_heads=2, depth=2),
        (tokens(),),
        (8, {"gelu_tanh": 2}, 0),
    ),
    "torch's encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 40, activation="gelu", batch_first=True), 2),
        (rows(),),
        (8, {"gelu": 2}, 0),
    ),
    "torch's decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 3, 40, activation=nn.ReLU()), 2),
        (rows(), rows(3, 5, 24)),
        (12, {"relu": 2}, 0),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(place: Any, name: str, calls: Counter[str]) -> None:
    make, inputs, expected = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(*inputs)
    fused = fastconv.fuse(place(model))
    report = fused.report
    assert (len(report.linears), report.activations, len(report.residuals)) == (
        expected[0],
        Counter(expected[1]),
        expected[2],
    )
    assert len(set(report.linears)) == expected[0]
    assert not report.left
    calls.clear()
    with torch.no_grad():
        same(place.back(fused(*map(place, inputs))), wanted)
    # Attention to another sequence keeps its own code, projections and all.
    cross = 2 if name == "torch's decoder" else 0
    assert calls["frozen"] == (0 if place.is_gpu else expected[0] - 2 * cross)
    assert calls["linear"] == 3 * cross
    assert fastconv.unfuse(fused) is model
    assert all(torch.equal(place.back(tensor), state[key]) for key, tensor in fused.state_dict().items())
    assert list(fused.state_dict()) == list(state)


class Forward(nn.Module):
    """Two linear layers and a forward from a function."""

    def __init__(self, forward: Callable[[Forward, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Linear(24, 24), nn.Linear(24, 24, bias=False), nn.BatchNorm1d(5)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def another_use(m: Forward, x: Tensor) -> Tensor:
    y = m.a(x)
    return y.relu() * y


def summand_written_to(m: Forward, x: Tensor) -> Tensor:
    x = x * 2
    y = m.a(x)
    x.mul_(2)
    return y + x


# What to compute, and what of it is fused: linear layers, additions, activations.
GRAPHS: dict[str, tuple[Callable[[Forward, Tensor], Tensor], tuple[int, int, int]]] = {
    "activations": (lambda m, x: F.gelu(m.a(x)) + F.silu(m.b(x)).sigmoid(), (2, 0, 2)),
    "tanh-form gelu": (lambda m, x: F.gelu(m.a(x) + m.b(x), approximate="tanh"), (2, 1, 1)),
    "addition, then relu": (lambda m, x: (x + m.b(x)).relu_(), (1, 1, 1)),
    "two layers": (lambda m, x: (m.a(x) + m.b(x)).relu(), (2, 1, 1)),
    "one layer twice": (lambda m, x: m.a(m.a(x).relu()), (2, 0, 1)),
    "another use": (another_use, (1, 0, 0)),
    "summand written to": (summand_written_to, (1, 0, 0)),
    "broadcast": (lambda m, x: (m.a(x) + x.mean(1, keepdim=True)).relu(), (1, 1, 1)),
    "into more dimensions": (lambda m, x: m.a(x) + x[None], (1, 1, 0)),
    "norm": (lambda m, x: m.norm(m.a(x)).relu(), (1, 0, 0)),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_graphs(place: Any, case: str) -> None:
    function, counts = GRAPHS[case]
    model = Forward(function).eval()
    with torch.no_grad(), place.letting("batch_norm"):
        wanted = model(rows())
        fused = fastconv.fuse(place(model))
        same(place.back(fused(place(rows()))), wanted)
    report = fused.report
    assert (len(report.linears), len(report.residuals), sum(report.activations.values())) == counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_one_row_reads_the_weights_where_they_lie(dtype: torch.dtype, calls: Counter[str]) -> None:
    """They are packed for more rows, and halves for one too; a row's bits are the same either way."""
    model = nn.Linear(70, 50, dtype=dtype).eval()
    frozen = FrozenLinear.of(model, "gelu")
    x = rows(6, 70).to(dtype)
    with torch.no_grad():
        alone = frozen(x[:1])
        assert bool(frozen._packed._kept) == (dtype is not torch.float32)
        together = frozen(x)
        assert len(frozen._packed._kept) == 1
        assert torch.equal(frozen(x[:2]), together[:2])
        assert torch.equal(alone, together[:1])
        assert calls["frozen"] == 3
        (packed,) = frozen._packed._kept.values()
        assert 70 * 50 <= packed.numel() / dtype.itemsize <= 70 * 64
        if dtype is torch.float32:
            return same(together, F.gelu(model(x)))
        # Activation and addition are of the sums: one rounding, where the steps one by one make two or three.
        added = _fused.frozen_linear(x, model.weight, model.bias, frozen._packed, together, "gelu")
        wide = F.linear(x.float(), model.weight.float(), model.bias.float())
        for found, expected in ((together, F.gelu(wide)), (added, F.gelu(wide + together.float()))):
            error = (found.float() - expected).abs()
            assert (error <= torch.finfo(dtype).eps / 2 * expected.abs() * 1.01 + 1e-6).all()


@pytest.mark.filterwarnings("ignore::fastconv.FallbackWarning")
def test_unusual_tensors_take_the_steps_one_by_one(calls: Counter[str]) -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU()).eval()
    frozen = FrozenLinear.of(model[0], "relu")
    x = rows()
    same(frozen(x[0, 0]), model(x[0, 0]))
    same(frozen(x[:0]), model(x[:0]))
    same(torch.func.vmap(frozen)(x), model(x))
    before = calls["frozen"]
    assert frozen(x.double().float().requires_grad_()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16
    assert calls["frozen"] == before
    assert torch.autograd.gradcheck(fastconv.fuse(model.double()), (rows(2, 24).double().requires_grad_(),))
    with pytest.raises(RuntimeError, match=r"double.*float|Double.*Float"):
        frozen(x.double())
    with pytest.raises(RuntimeError, match=r"2x3.*24x24"):
        frozen(x[0, :2, :3])


def test_writes_are_seen_when_fused_again() -> None:
    model = nn.Sequential(nn.Linear(24, 8)).eval()
    fused = fastconv.fuse(model)
    with torch.no_grad():
        first = fused(rows())
        model[0].weight.data.mul_(2)
        assert torch.equal(fused(rows()), first)
        fastconv.fuse(fused)
        same(fused(rows()), model(rows()))
        fused.load_state_dict({key: tensor * 3 for key, tensor in model.state_dict().items()})
        same(fused(rows()), model(rows()))


def test_attention_that_is_masked_keeps_its_own_code(calls: Counter[str]) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    frozen = fastconv.fuse(model)
    assert frozen.report.linears == ["in_proj", "out_proj"]
    x, hidden = rows(), torch.arange(5).repeat(2, 1) > 3
    with torch.no_grad():
        same(frozen(x, x, x, need_weights=False)[0], model(x, x, x)[0])
        assert calls["frozen"] == 2
        for options in ({"key_padding_mask": hidden}, {"attn_mask": rows(5, 5)}, {"average_attn_weights": False}):
            same(frozen(x, x, x, **options), model(x, x, x, **options))
        same(frozen(x, x + 1, x, need_weights=False)[0], model(x, x + 1, x)[0])
        same(frozen(x[0], x[0], x[0], need_weights=False)[0], model(x[0], x[0], x[0])[0])
    assert calls["frozen"] == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"kdim": 8, "vdim": 8}, "a width of their own"), ({"add_bias_kv": True}, "adds keys"), ({"hook": True}, "hooks")],
)
def test_attention_that_is_left(options: dict[str, int], reason: str) -> None:
    hook = options.pop("hook", False)
    model = nn.Sequential(nn.MultiheadAttention(24, 3, **options)).eval()
    if hook:
        model[0].register_forward_hook(lambda module, args, y: None)
    report = fastconv.fuse(model).report
    assert not report.linears
    assert reason in str(report)


def test_report_names_linear_layers() -> None:
    fused = fastconv.fuse(
        nn.Sequential(nn.Linear(4, 4), nn.GELU(approximate="tanh"), nn.Linear(4, 2), nn.Tanh()).eval()
    )
    assert repr(fused) == "Fused(Sequential: 2 linear layers frozen, 1 gelu_tanh)"
    assert "left Tanh (3): the kernels' epilogue has no such activation" in str(fused.report)
    assert repr(FrozenLinear.of(nn.Linear(4, 2), "relu")) == "FrozenLinear(4, 2, bias=True, activation=relu)"


def test_training_parts_are_left() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    model.layers[0].self_attn.train()
    assert fastconv.fuse(model).report.linears == ["layers.0.linear1", "layers.0.linear2"]


def test_methods_other_than_forward_run_on_frozen_parts(calls: Counter[str]) -> None:
    torch.manual_seed(0)
    model = models.create("transformer", **SMALL_TRANSFORMER).eval()
    fused = fastconv.fuse(model)
    asked = {"start": 1, "end": 2, "max_length": 6}
    torch.testing.assert_close(fused.greedy(tokens(), **asked), model.greedy(tokens(), **asked))
    assert calls["frozen"] > 20
    assert not hasattr(fused, "nothing_of_the_kind")
    assert not hasattr(fused.__class__.__new__(type(fused)), "greedy")  # as while it is unpickled
