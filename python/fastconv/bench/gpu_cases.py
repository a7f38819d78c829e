"""What `fastconv bench --device cuda` measures: layers and models, each by fastconv and by torch in every way that it has.

A row says what a call has to move or to compute, so that its time is a share of what the machine can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastconv
from fastconv.testing.grids import layers
from fastconv.testing.problems import ConvCase

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One thing to compute, its contestants, and the work that none of them can avoid."""

    name: str
    direction: str
    calls: Calls
    bytes: float = 0.0  # read and written, each operand once
    flops: float = 0.0


def tensor(shape: tuple[int, ...], dtype: torch.dtype, last: bool = False) -> Tensor:
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=memory_format)


def _size(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def _call(of: Callable[..., Tensor], operands: tuple[Tensor, ...], backward: bool) -> Callable[[], Any]:
    """The forward pass, or all gradients of an earlier one."""
    if not backward:
        return lambda: of(*operands)
    leaves = tuple(t.detach().requires_grad_() for t in operands)
    y = of(*leaves)
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


Contestants = dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]


def _rows(name: str, work: tuple[float, float], calls: Contestants, backward: float = 2) -> Iterator[Row]:
    """Both directions of `work`, which is bytes and flops; a backward pass has so many times as much."""
    for direction, times in (("fwd", 1.0), ("bwd", backward)):
        made = {who: _call(of, operands, direction == "bwd") for who, (of, operands) in calls.items()}
        yield Row(name, direction, made, times * work[0], times * work[1])


# ---- Layers of images -------------------------------------------------------------------------------------------------------

# Channels, rows and columns of depthwise layers of MobileNet, EfficientNet and ConvNeXt.
DEPTHWISE = ((3, 144, 56), (5, 240, 28), (5, 672, 14), (7, 96, 56), (7, 384, 14))
# Channels, size, window, stride, padding.
POOLS = ((64, 112, 3, 2, 1), (192, 28, 2, 2, 0), (256, 35, 3, 1, 1))
ADAPTIVE = ((2048, 7, 1), (512, 14, 7))


def _convolution(name: str, batch: int, case: ConvCase, dtype: torch.dtype) -> Iterator[Row]:
    options: Any = {"stride": case.stride, "padding": (case.pad4[0], case.pad4[2]), "groups": case.groups}
    shapes = (batch, *case.x_shape[1:]), case.w_shape
    plain, last = (tuple(tensor(s, dtype, last) for s in shapes) for last in (False, True))
    outputs = float(batch * case.K * case.P * case.Q)
    flops = 2 * outputs * last[1][0].numel()
    moved = _size(*last) + outputs * last[0].element_size()
    ours, theirs = (partial(of, **options) for of in (fastconv.cuda.conv2d, F.conv2d))
    given = last if case.layout == "nhwc" else plain
    calls: Contestants = {"fastconv": (ours, given), "torch": (theirs, plain), "torch channels_last": (theirs, last)}
    depthwise = case.groups == case.w_shape[0] > 1
    yield from _rows(name, (moved, 0.0) if depthwise else (0.0, flops), calls)


def conv(batch: int, dtype: torch.dtype) -> Iterator[Row]:
    for case in layers():
        yield from _convolution(str(case), batch, case, dtype)


def depthwise(batch: int, dtype: torch.dtype) -> Iterator[Row]:
    for taps, channels, size in DEPTHWISE:
        for layout in ("nhwc", "nchw"):
            case = ConvCase(
                1, channels, size, size, channels, taps, taps, pad4=(taps // 2,) * 4, groups=channels, layout=layout
            )
            yield from _convolution(f"{taps}x{taps} {channels}x{size}x{size} {layout}", batch, case, dtype)


def pool(batch: int, dtype: torch.dtype) -> Iterator[Row]:
    cases: list[tuple[str, tuple[int, int], dict[str, int]]] = [
        (f"{kind}_pool2d", (C, size), {"kernel_size": window, "stride": stride, "padding": padding})
        for C, size, window, stride, padding in POOLS
        for kind in ("max", "avg")
    ]
    cases += [("adaptive_avg_pool2d", (C, size), {"output_size": to}) for C, size, to in ADAPTIVE]
    for name, (C, size), options in cases:
        plain, last = (tensor((batch, C, size, size), dtype, last) for last in (False, True))
        ours, theirs = (partial(getattr(functions, name), **options) for functions in (fastconv.cuda, F))
        calls: Contestants = {
            "fastconv": (ours, (last,)), "fastconv contiguous": (ours, (plain,)),
            "torch": (theirs, (plain,)), "torch channels_last": (theirs, (last,)),
        }  # fmt: skip
        described = f"{name} {C}x{size}x{size} {' '.join(f'{key} {value}' for key, value in options.items())}"
        yield from _rows(described, (_size(last, theirs(last)), 0.0), calls, backward=1)


# ---- Layers of sequences ----------------------------------------------------------------------------------------------------

# Rows of each sample, and features in and out: ViT-B's, BERT's, and ResNet-50's last.
LINEAR = ((197, 768, 3072), (197, 3072, 768), (128, 768, 768), (1, 2048, 1000))
NORMS = ((197, 768), (128, 1024), (64, 4096))
# Batch, heads, length, features, causal.
ATTENTION = ((64, 12, 197, 64, False), (8, 16, 1024, 64, True), (4, 16, 2048, 128, False), (1, 16, 8192, 128, True))
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)


def linear(batch: int, dtype: torch.dtype) -> Iterator[Row]:
    for rows, inputs, outputs in LINEAR:
        given = tensor((batch, rows, inputs), dtype), tensor((outputs, inputs), dtype), tensor((outputs,), dtype)
        flops = 2.0 * batch * rows * inputs * outputs
        calls: Contestants = {"fastconv": (fastconv.cuda.linear, given), "torch": (F.linear, given)}
        yield from _rows(f"{rows}x{inputs} to {outputs}", (0.0, flops), calls)


def _normalise(of: Callable[..., Tensor], features: int, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return of(x, (features,), w, b)


def layer_norm(batch: int, dtype: torch.dtype) -> Iterator[Row]:
    for rows, features in NORMS:
        given = tensor((batch, rows, features), dtype), tensor((features,), dtype), tensor((features,), dtype)
        ours, theirs = (partial(_normalise, of, features) for of in (fastconv.cuda.layer_norm, F.layer_norm))
        # Backward reads x and dy and writes dx.
        work = 2 * _size(given[0]), 0.0
        yield from _rows(
            f"{rows}x{features}", work, {"fastconv": (ours, given), "torch": (theirs, given)}, backward=1.5
        )


def sdpa(batch: int, dtype: torch.dtype) -> Iterator[Row]:
    """The batch is each shape's own."""
    for B, heads, length, features, causal in ATTENTION:
        given = tuple(tensor((B, heads, length, features), dtype) for _ in range(3))
        pairs = length * (length + 1) / 2 if causal else float(length) ** 2
        flops = 4.0 * B * heads * pairs * features

        ours = partial(fastconv.cuda.scaled_dot_product_attention, is_causal=causal)
        calls: Contestants = {"fastconv": (ours, given)}
        for backend in BACKENDS:
            theirs = partial(_attend, backend, causal)
            try:
                theirs(*given)
            except RuntimeError:  # not for this dtype, length or GPU, or more memory than there is
                continue
            calls[f"torch {backend.name.removesuffix('_ATTENTION').lower()}"] = theirs, given
        # A backward pass has five products where a forward pass has two.
        shape = f"{B}x{heads}x{length}x{features}{' causal' * causal}"
        yield from _rows(shape, (0.0, flops), calls, backward=2.5)


def _attend(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


# ---- Models -----------------------------------------------------------------------------------------------------------------

MODELS = ("resnet50", "mobilenet_v2", "vit_b_16")


def _step(network: nn.Module, x: Tensor, dtype: torch.dtype, ours: bool) -> Callable[[], Any]:
    """Forward and backward of a training step, in autocast where the dtype is a half."""
    cast = torch.autocast("cuda", dtype) if dtype is not torch.float32 else nullcontext()

    def step() -> None:
        fastconv.set_cuda(ours)
        for p in network.parameters():
            p.grad = None
        with cast:
            y = network(x)
        y.float().square().mean().backward()

    return step


def model(batch: int, dtype: torch.dtype) -> Iterator[Row]:
    for name in MODELS:
        calls: Calls = {}
        for who, of, last in (("fastconv", True, True), ("torch", False, False), ("torch channels_last", False, True)):
            torch.manual_seed(0)
            memory_format: Any = torch.channels_last if last else torch.contiguous_format
            network: Any = fastconv.models.create(name, layers=fastconv.nn if of else nn)
            network.to("cuda", memory_format=memory_format).train()
            calls[who] = _step(network, tensor((batch, 3, 224, 224), torch.float32, last), dtype, of)
        yield Row(name, "step", calls)


FAMILIES: dict[str, Callable[[int, torch.dtype], Iterator[Row]]] = {
    "conv": conv, "depthwise": depthwise, "pool": pool, "linear": linear, "layer_norm": layer_norm, "sdpa": sdpa, "model": model,
}  # fmt: skip
