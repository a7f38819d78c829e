"""fastconv.nn's layers against torch.nn's, and convert and revert."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv
from fastconv import nn as ours

theirs = torch.nn

IMAGES, SEQUENCES = (2, 4, 9, 8), (2, 4, 9)

# Class name, constructor arguments, input shape.
LAYERS: list[tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = [
    ("Conv1d", (4, 6, 3), {}, SEQUENCES),
    ("Conv1d", (4, 6, 3), {"padding": "same", "dilation": 2, "bias": False}, SEQUENCES),
    ("Conv1d", (4, 6, 3), {"padding": 2, "padding_mode": "circular", "groups": 2}, SEQUENCES),
    ("Conv2d", (4, 6, 3), {}, IMAGES),
    ("Conv2d", (4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "bias": False}, IMAGES),
    ("Conv2d", (4, 6, 3), {"padding": "same", "dilation": (2, 1), "padding_mode": "reflect"}, IMAGES),
    ("Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "circular"}, IMAGES),
    ("Conv2d", (4, 8, 3), {"padding": 2, "padding_mode": "replicate", "groups": 4}, IMAGES),
    ("Conv2d", (4, 6, 2), {"padding": "same"}, IMAGES),
    ("Conv2d", (4, 6, 3), {"padding": "valid", "stride": 2}, IMAGES),
    ("Conv2d", (4, 6, 3), {"bias": None}, IMAGES),
    ("Conv2d", (4, 6, 3), {"dtype": torch.float64}, IMAGES),
    ("Conv3d", (4, 6, 3), {"padding": 1}, (2, 4, 5, 5, 5)),
    ("ConvTranspose1d", (4, 6, 3), {"stride": 2, "output_padding": 1}, SEQUENCES),
    ("ConvTranspose2d", (4, 6, 3), {}, IMAGES),
    (
        "ConvTranspose2d",
        (4, 6, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": 2},
        IMAGES,
    ),
    ("MaxPool1d", (2,), {}, SEQUENCES),
    ("MaxPool2d", (3,), {"stride": 2, "padding": 1, "ceil_mode": True}, IMAGES),
    ("MaxPool2d", ((3, 2),), {"dilation": 2, "return_indices": True}, IMAGES),
    ("AvgPool1d", (2,), {"padding": 1, "count_include_pad": False}, SEQUENCES),
    ("AvgPool2d", (3,), {"stride": 2, "padding": 1, "count_include_pad": False, "ceil_mode": True}, IMAGES),
    ("AvgPool2d", (2,), {"divisor_override": 3}, IMAGES),
    ("AdaptiveAvgPool1d", (3,), {}, SEQUENCES),
    ("AdaptiveAvgPool2d", ((3, None),), {}, IMAGES),
    ("AdaptiveAvgPool2d", (1,), {}, IMAGES),
    ("AdaptiveMaxPool1d", (3,), {"return_indices": True}, SEQUENCES),
    ("AdaptiveMaxPool2d", ((3, 2),), {}, IMAGES),
    ("LayerNorm", (8,), {"eps": 1e-3}, IMAGES),
    ("LayerNorm", ((9, 8),), {"bias": False}, IMAGES),
    ("LayerNorm", (8,), {"elementwise_affine": False}, (8,)),
    ("Linear", (8, 5), {}, IMAGES),
    ("Linear", (8, 5), {"bias": False}, (8,)),
]
IDS = [f"{name}-{index}" for index, (name, *_) in enumerate(LAYERS)]

pytestmark = pytest.mark.filterwarnings("ignore::fastconv.FallbackWarning", "ignore:Using padding='same'")


def build(module: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(3)
    return getattr(module, name)(*args, **kwargs)  # type: ignore[no-any-return]


def sample(shape: tuple[int, ...], layer: torch.nn.Module) -> Tensor:
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, check_stride=True, equal_nan=True)


@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), LAYERS, ids=IDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_layer(
    place: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...], channels_last: bool
) -> None:
    if place.is_gpu and (name == "Conv3d" or kwargs.get("dtype") is torch.float64):
        pytest.skip("no kernel for GPUs")
    one, other = build(ours, name, args, kwargs), build(theirs, name, args, kwargs)
    assert isinstance(one, type(other))
    assert type(one).__name__ == name
    assert repr(one) == repr(other)
    assert list(one.state_dict()) == list(other.state_dict())
    assert vars(one).keys() == vars(other).keys()
    for mine, yours in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, yours)
    one.load_state_dict(other.state_dict(), strict=True)

    x, y = (sample(shape, one) for _ in range(2))
    if place.is_gpu:
        other, y = other.double(), y.double()
    if channels_last:
        if len(shape) != 4:
            pytest.skip("channels_last is for images")
        x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
        one, other = one.to(memory_format=torch.channels_last), other.to(memory_format=torch.channels_last)
    one, x = place(one), place(x).requires_grad_()
    y.requires_grad_()
    found, expected = one(x), other(y)
    place.same(found, expected, check_stride=True, equal_nan=True)
    first, second = (result[0] if isinstance(result, tuple) else result for result in (found, expected))
    dy = torch.linspace(-1, 1, second.numel(), dtype=first.dtype).reshape(second.shape)
    first.backward(place(dy))
    second.backward(dy.to(second.dtype))
    place.same(x.grad, y.grad, 20, check_stride=True)
    for mine, yours in zip(one.parameters(), other.parameters(), strict=True):
        place.same(mine.grad, yours.grad, 20, check_stride=True)


@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), LAYERS, ids=IDS)
def test_copies(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer = build(ours, name, args, kwargs)
    x = sample(shape, layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert type(twin) is type(layer)
        assert_close(twin(x), layer(x))
    half = copy.deepcopy(layer).half()
    assert all(p.dtype is torch.float16 for p in half.parameters())


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name != "ConvBnAct"])
def test_every_class_subclasses_torch_s(name: str) -> None:
    assert getattr(ours, name).__mro__[1] is getattr(theirs, name)
    elsewhere = {"MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer"}  # in test_multihead
    elsewhere |= {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}  # in test_batch_norm
    assert {case[0] for case in LAYERS} | elsewhere == set(ours.__all__) - {"ConvBnAct"}


BAD: list[tuple[str, Callable[[Any], Any]]] = [
    ("groups 0", lambda m: m.Conv2d(4, 6, 3, groups=0)),
    ("in_channels", lambda m: m.Conv2d(4, 6, 3, groups=3)),
    ("out_channels", lambda m: m.Conv2d(4, 6, 3, groups=4)),
    ("padding_mode", lambda m: m.Conv2d(4, 6, 3, padding_mode="mirror")),
    ("padding string", lambda m: m.Conv2d(4, 6, 3, padding="full")),
    ("same and stride", lambda m: m.Conv2d(4, 6, 3, padding="same", stride=2)),
    ("kernel -1", lambda m: m.Conv2d(4, 6, -1)),
    ("kernel float", lambda m: m.Conv2d(4, 6, 3.0)),
    ("int64 parameters", lambda m: m.Conv2d(4, 6, 3, dtype=torch.int64)),
    ("transposed padding_mode", lambda m: m.ConvTranspose2d(4, 6, 3, padding_mode="reflect")),
    ("transposed padding same", lambda m: m.ConvTranspose2d(4, 6, 3, padding="same")(torch.randn(IMAGES))),
    ("output_size length", lambda m: m.ConvTranspose2d(4, 6, 3, 2)(torch.randn(IMAGES), output_size=[20])),
    ("output_size", lambda m: m.ConvTranspose2d(4, 6, 3, 2)(torch.randn(IMAGES), output_size=[40, 40])),
    ("stride 0 at call", lambda m: m.Conv2d(4, 6, 3, stride=0)(torch.randn(IMAGES))),
    ("reflect too large", lambda m: m.Conv2d(4, 6, 3, padding=9, padding_mode="reflect")(torch.randn(IMAGES))),
    ("circular too large", lambda m: m.Conv2d(4, 6, 3, padding=10, padding_mode="circular")(torch.randn(IMAGES))),
    ("channels", lambda m: m.Conv2d(3, 6, 3)(torch.randn(IMAGES))),
    ("features", lambda m: m.Linear(3, 6)(torch.randn(IMAGES))),
    ("state_dict", lambda m: m.Conv2d(4, 6, 3).load_state_dict(m.Conv2d(4, 5, 3).state_dict())),
]


@pytest.mark.parametrize("call", [call for _, call in BAD], ids=[name for name, _ in BAD])
def test_bad_input(call: Callable[[Any], Any]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call(theirs)
    with pytest.raises(Exception) as found:  # noqa: PT011
        call(ours)
    assert found.type is expected.type
    # torch counts positions; ours may be called by keyword.
    sentence = str(expected.value).split(", but")[0].split("\n")[0].replace(" (position 5)", "")
    assert sentence in str(found.value)


def test_output_size() -> None:
    one, other = (build(m, "ConvTranspose2d", (4, 6, 3), {"stride": 2}) for m in (ours, theirs))
    x = sample(IMAGES, one)
    for size in ([20, 17], [2, 6, 19, 18]):
        assert_close(one(x, output_size=size), other(x, output_size=size))


def test_hooks_and_overridden_conv_forward() -> None:
    """timm and PEFT call `_conv_forward` with a weight of their own; weight_norm (the old one) sets it in a hook."""
    x = torch.randn(IMAGES)
    one, other = (build(m, "Conv2d", (4, 6, 3), {"padding": 1}) for m in (ours, theirs))
    weight = torch.randn_like(one.weight)  # type: ignore[arg-type]
    assert_close(one._conv_forward(x, weight, None), other._conv_forward(x, weight, None))
    calls = []
    one.register_forward_hook(lambda *_: calls.append("forward"))
    one.register_forward_pre_hook(lambda *_: calls.append("before"))
    one(x)
    assert calls == ["before", "forward"]


# ---- convert and revert ---------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = theirs.Conv2d(4, 4, 3, padding=1)
        self.again = self.conv
        self.norm = theirs.BatchNorm2d(4)
        self.down = theirs.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(self.again(x)))) + self.down(x)  # type: ignore[no-any-return]


class OwnForward(theirs.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OnlyNamed(theirs.MaxPool2d):
    pass


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return theirs.Sequential(
        theirs.Conv2d(3, 4, 3),
        theirs.MaxPool2d(2),
        Block(),
        theirs.AdaptiveAvgPool2d(1),
        theirs.Flatten(),
        theirs.Linear(4, 5),
    ).eval()


def classes(model: torch.nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def test_convert_and_revert() -> None:
    model = network()
    twin = copy.deepcopy(model)
    before = dict(model.named_parameters())
    state = list(model.state_dict())
    x = torch.randn(2, 3, 12, 12)

    report = fastconv.convert(model)
    assert report.swapped == {"Conv2d": 3, "BatchNorm2d": 1, "MaxPool2d": 1, "AdaptiveAvgPool2d": 1, "Linear": 1}
    assert report.count == 7
    assert not report.kept
    assert not report.already
    assert "converted 7 layers: 1 AdaptiveAvgPool2d, 1 BatchNorm2d, 3 Conv2d, 1 Linear, 1 MaxPool2d" in str(report)
    assert type(model[0]) is ours.Conv2d
    assert type(model[2].conv) is ours.Conv2d
    assert model[2].again is model[2].conv
    assert repr(model) == repr(twin)
    assert list(model.state_dict()) == state
    assert all(p is before[name] for name, p in model.named_parameters())
    assert_close(model(x), twin(x))

    again = fastconv.convert(model)
    assert again.count == 0
    assert sum(again.already.values()) == 7
    back = fastconv.revert(model)
    assert back.count == 7
    assert classes(model) == classes(twin)


def test_convert_a_single_layer_and_reject_what_is_no_module() -> None:
    layer = theirs.Linear(3, 4)
    assert fastconv.convert(layer).count == 1
    assert type(layer) is ours.Linear
    assert fastconv.revert(layer).count == 1
    assert type(layer) is theirs.Linear
    for function in (fastconv.convert, fastconv.revert):
        with pytest.raises(TypeError, match=r"argument 'model' must be torch\.nn\.Module, not dict"):
            function({})  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_what_is_left_alone_is_reported() -> None:
    patched = theirs.Conv2d(4, 4, 1)
    patched.forward = patched.forward  # type: ignore[method-assign]
    model = theirs.Sequential()
    model.add_module("own", OwnForward(4, 4, 1))
    model.add_module("named", OnlyNamed(2))
    model.add_module("patched", patched)
    model.add_module("lazy", theirs.LazyConv2d(4, 1))
    model.add_module("normed", theirs.utils.parametrizations.weight_norm(theirs.Conv2d(4, 4, 1)))
    model.add_module("hooked", theirs.utils.weight_norm(theirs.Conv2d(4, 4, 1)))
    model.add_module("volume", theirs.Conv3d(4, 4, 1))
    model.add_module("attention", theirs.MultiheadAttention(4, 2))
    before = classes(model)
    report = fastconv.convert(model)
    reasons = {kept.name: kept.reason for kept in report.kept}
    assert reasons == {
        "own": "it is a subclass of Conv2d with a forward of its own",
        "named": "it is a subclass of MaxPool2d",
        "patched": "it has a forward of its own, set on the object",
        "lazy": "it is lazy: run one batch through the model, then convert again",
        "normed": "it is parametrized: convert first, then register the parametrizations",
        "volume": "fastconv has no kernels for it",
        "attention.out_proj": "it is a subclass of Linear",
    }
    assert report.swapped == {"Conv2d": 1, "MultiheadAttention": 1}
    assert type(model.hooked) is ours.Conv2d
    for name, reason in reasons.items():
        assert name in str(report)
        assert reason in str(report)
    fastconv.revert(model)
    assert classes(model) == before

    x = torch.randn(2, 3, 4, 4)
    model.lazy(x)
    assert fastconv.convert(model.lazy).count == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_converted_layers_can_be_parametrized_and_shared() -> None:
    model = theirs.Sequential(theirs.Conv2d(4, 4, 1), theirs.Conv2d(4, 4, 1))
    model[1] = model[0]
    assert fastconv.convert(model).count == 1
    theirs.utils.parametrizations.weight_norm(model[0])
    twin = copy.deepcopy(model)
    report = fastconv.revert(twin)
    assert [kept.name for kept in report.kept] == ["0"]
    assert model(torch.randn(1, 4, 3, 3)).shape == (1, 4, 3, 3)


def test_a_converted_model_trains_like_the_other(place: Any) -> None:
    model, twin = network().train(), network().train()
    fastconv.convert(model)
    x, target = torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 3])
    losses = []
    for net, images, classes in ((place(model), place(x), place(target)), (twin, x, target)):
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            with place.letting("batch_norm"):
                loss = torch.nn.functional.cross_entropy(net(images), classes)
                loss.backward()
            optimizer.step()
        losses.append(place.back(loss))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["cpu", "cuda"], indirect=True)
def test_a_converted_model_pickles_and_compiles_without_a_graph_break(place: Any) -> None:
    model, twin = network(), network()
    fastconv.convert(model)
    x, there = (f(torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))) for f in (lambda t: t, place))
    place(model)
    with place.letting("batch_norm"):
        place.same(pickle.loads(pickle.dumps(model))(there), twin(x), 20)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        place.same(compiled(there), twin(x), 20)
        before = [p.grad for p in model.parameters()]
        assert before == [None] * len(before)
        compiled(there).sum().backward()
    twin(x).sum().backward()
    for mine, yours in zip(model.parameters(), twin.parameters(), strict=True):
        place.same(mine.grad, yours.grad, 18)


def test_export_gives_aten_operators() -> None:
    model = network()
    fastconv.convert(model)
    program = torch.export.export(model, (torch.randn(2, 3, 12, 12),))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"aten.conv2d.default", "aten.max_pool2d.default", "aten.linear.default"} <= targets
    assert not any("fastconv" in target for target in targets)
