"""What is tested and timed: problems as plain data, each with a short id that can be typed back.

    n2c64h14w14k65r3s3u1p1d1g1-nhwc+bias+relu      a convolution
    n1c8h7w9r3s3u2p1d1-nchw+ceil                   a pooling; +exclude_pad and +div5 are average pooling's
    n1c8h7w9a3x2-nchw                              an adaptive pooling to 3x2
    n2h4g2q33k65d16v24-bhld+causal                 an attention, see testing.attention

u is the stride, p the padding (top, bottom, left, right), d the dilation; a number with no x holds for all sides. The
word after the dash is the memory layout of x, w and y, see LAYOUTS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fastconv import reference
from fastconv.testing.attention import SdpaCase, parse_sdpa
from fastconv.testing.batch_norm import BatchNormCase, parse_batch_norm
from fastconv.testing.norm import NormCase, parse_norm
from fastconv.testing.recurrent import RecurrentCase, parse_recurrent

Pair = tuple[int, int]
Pad4 = tuple[int, int, int, int]

CONV_OPS = ("conv2d_fwd", "conv2d_dgrad", "conv2d_wgrad")
MAX_POOL_OPS = ("max_pool2d_fwd", "max_pool2d_bwd")
AVG_POOL_OPS = ("avg_pool2d_fwd", "avg_pool2d_bwd")

# name: formats of x, w, y (see buffers.strides_of). The first two are what users have; the others are views that torch
# accepts.
LAYOUTS = {
    "nchw": ("nchw", "kcrs", "nchw"),
    "nhwc": ("nhwc", "krsc", "nhwc"),
    "nhwc_kcrs": ("nhwc", "kcrs", "nhwc"),
    "nchw_krsc": ("nchw", "krsc", "nchw"),
    "mixed": ("nchw", "krsc", "nhwc"),
    "unmixed": ("nhwc", "kcrs", "nchw"),
    "rows": ("rows", "kcrs", "rows"),
    "planes": ("planes", "kcrs", "planes"),
    "slice": ("slice", "krsc", "slice"),
    "step": ("step", "ckrs", "step"),
    "turned": ("turned", "flip", "turned"),
    "expand": ("expand", "kcrs", "nchw"),
    "expand_y": ("nchw", "kcrs", "expand"),
    "scalar_y": ("nhwc", "krsc", "scalar"),
}


def _join(numbers: Iterable[int]) -> str:
    values = list(numbers)
    return "x".join(map(str, values[:1] if len(set(values)) == 1 else values))


def _split(text: str, length: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in text.split("x"))
    if len(values) == 1:
        values *= length
    if len(values) != length:
        raise ValueError(f"expected 1 or {length} numbers joined by x, got {text!r}")
    return values


@dataclass(frozen=True)
class ConvCase:
    """One convolution problem and its gradients, with four-sided padding and a layout."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: Pair = (1, 1)
    pad4: Pad4 = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    layout: str = "nchw"
    bias: bool = False
    residual: bool = False
    activation: str = "none"

    @property
    def P(self) -> int:
        return reference.conv_output_size(self.H, self.R, self.stride[0], *self.pad4[:2], self.dilation[0])

    @property
    def Q(self) -> int:
        return reference.conv_output_size(self.W, self.S, self.stride[1], *self.pad4[2:], self.dilation[1])

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return self.K, self.C // self.groups, self.R, self.S

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.K, self.P, self.Q

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that this problem can be asked of: outputs cannot overlap, and only a forward has an epilogue."""
        ops = set(CONV_OPS)
        if LAYOUTS[self.layout][0] == "expand":
            ops.discard("conv2d_dgrad")
        if LAYOUTS[self.layout][2] in ("expand", "scalar"):
            ops.discard("conv2d_fwd")
        if self.residual or self.activation != "none":
            ops -= {"conv2d_dgrad", "conv2d_wgrad"}
        if self.bias:
            ops.discard("conv2d_dgrad")
        return tuple(op for op in CONV_OPS if op in ops)

    def terms(self, op: str) -> int:
        """Length of the longest sum that makes one output of ``op``."""
        if op == "conv2d_wgrad":
            return self.N * self.P * self.Q
        return (self.C if op == "conv2d_fwd" else self.K) // self.groups * self.R * self.S

    def __str__(self) -> str:
        sizes = f"n{self.N}c{self.C}h{self.H}w{self.W}k{self.K}r{self.R}s{self.S}"
        window = f"u{_join(self.stride)}p{_join(self.pad4)}d{_join(self.dilation)}g{self.groups}"
        extras = ["bias"] * self.bias + ["residual"] * self.residual + [self.activation] * (self.activation != "none")
        return "+".join([f"{sizes}{window}-{self.layout}", *extras])


@dataclass(frozen=True)
class PoolCase:
    """One pooling problem, forward and backward. ``adaptive`` is the output size of an adaptive pooling, which has no
    window.
    """

    N: int
    C: int
    H: int
    W: int
    R: int = 0
    S: int = 0
    stride: Pair = (1, 1)
    pad4: Pad4 = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    layout: str = "nchw"
    ceil: bool = False
    include_pad: bool = True
    divisor: int = 0
    adaptive: Pair | None = None

    @property
    def P(self) -> int:
        return self._out(0)

    @property
    def Q(self) -> int:
        return self._out(1)

    def _out(self, axis: int) -> int:
        if self.adaptive is not None:
            return self.adaptive[axis]
        size, kernel = (self.H, self.W)[axis], (self.R, self.S)[axis]
        before, after = self.pad4[2 * axis : 2 * axis + 2]
        return reference.pool_output_size(
            size, kernel, self.stride[axis], before, after, self.dilation[axis], self.ceil
        )

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.P, self.Q

    @property
    def ops(self) -> tuple[str, ...]:
        ops: tuple[str, ...] = MAX_POOL_OPS if self.divisor == 0 and self.include_pad else ()
        if self.dilation == (1, 1):
            ops += AVG_POOL_OPS
        x_format, _, y_format = LAYOUTS[self.layout]
        if x_format == "expand":
            ops = tuple(op for op in ops if op.endswith("_fwd"))
        if y_format in ("expand", "scalar"):
            ops = tuple(op for op in ops if op == "avg_pool2d_bwd")
        return ops

    def __str__(self) -> str:
        sizes = f"n{self.N}c{self.C}h{self.H}w{self.W}"
        window = f"r{self.R}s{self.S}u{_join(self.stride)}p{_join(self.pad4)}d{_join(self.dilation)}"
        if self.adaptive is not None:
            window = f"a{self.adaptive[0]}x{self.adaptive[1]}"
        extras = (
            ["ceil"] * self.ceil
            + ["exclude_pad"] * (not self.include_pad)
            + [f"div{self.divisor}"] * (self.divisor != 0)
        )
        return "+".join([f"{sizes}{window}-{self.layout}", *extras])


Case = ConvCase | PoolCase | SdpaCase | NormCase | BatchNormCase | RecurrentCase

_LIST = r"-?\d+(?:x-?\d+)*"
_CONV = re.compile(
    rf"n(\d+)c(\d+)h(\d+)w(\d+)k(\d+)r(\d+)s(\d+)u({_LIST})p({_LIST})d({_LIST})g(\d+)-(\w+)((?:\+\w+)*)", re.ASCII
)
_POOL = re.compile(
    rf"n(\d+)c(\d+)h(\d+)w(\d+)r(\d+)s(\d+)u({_LIST})p({_LIST})d({_LIST})-(\w+)((?:\+\w+|\+div-\d+)*)", re.ASCII
)
_ADAPTIVE = re.compile(r"n(\d+)c(\d+)h(\d+)w(\d+)a(\d+)x(\d+)-(\w+)", re.ASCII)


def _layout(name: str) -> str:
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}, expected one of {', '.join(LAYOUTS)}")
    return name


def _parse_conv(m: re.Match[str]) -> ConvCase:
    n, c, h, w, k, r, s = (int(v) for v in m.groups()[:7])
    extras = [e for e in m[13].split("+") if e]
    activations = [e for e in extras if e not in ("bias", "residual")]
    if len(activations) > 1 or any(a not in reference.ACTIVATIONS for a in activations):
        raise ValueError(f"expected at most one activation of {', '.join(reference.ACTIVATIONS)}, got {activations}")
    return ConvCase(
        n,
        c,
        h,
        w,
        k,
        r,
        s,
        stride=_split(m[8], 2),  # type: ignore[arg-type]
        pad4=_split(m[9], 4),  # type: ignore[arg-type]
        dilation=_split(m[10], 2),  # type: ignore[arg-type]
        groups=int(m[11]),
        layout=_layout(m[12]),
        bias="bias" in extras,
        residual="residual" in extras,
        activation=activations[0] if activations else "none",
    )


def _parse_pool(m: re.Match[str]) -> PoolCase:
    n, c, h, w, r, s = (int(v) for v in m.groups()[:6])
    extras = [e for e in m[11].split("+") if e]
    divisors = [int(e[3:]) for e in extras if e.startswith("div")]
    unknown = [e for e in extras if e not in ("ceil", "exclude_pad") and not e.startswith("div")]
    if unknown or len(divisors) > 1:
        raise ValueError(f"expected +ceil, +exclude_pad or one +div<number>, got {'+'.join(extras)!r}")
    return PoolCase(
        n,
        c,
        h,
        w,
        r,
        s,
        stride=_split(m[7], 2),  # type: ignore[arg-type]
        pad4=_split(m[8], 4),  # type: ignore[arg-type]
        dilation=_split(m[9], 2),  # type: ignore[arg-type]
        layout=_layout(m[10]),
        ceil="ceil" in extras,
        include_pad="exclude_pad" not in extras,
        divisor=divisors[0] if divisors else 0,
    )


def parse(text: str) -> Case:
    """The case whose ``str`` is ``text``. Raises ValueError for anything else."""
    if m := _CONV.fullmatch(text):
        return _parse_conv(m)
    if m := _POOL.fullmatch(text):
        return _parse_pool(m)
    if m := _ADAPTIVE.fullmatch(text):
        n, c, h, w, p, q = (int(v) for v in m.groups()[:6])
        return PoolCase(n, c, h, w, adaptive=(p, q), layout=_layout(m[7]))
    if sdpa := parse_sdpa(text):
        return sdpa
    if batch_norm := parse_batch_norm(text):
        return batch_norm
    if norm := parse_norm(text):
        return norm
    if recurrent := parse_recurrent(text):
        return recurrent
    raise ValueError(
        f"not a problem id: {text!r} (examples: n1c8h7w7k16r3s3u1p1d1g1-nhwc+bias, n1c8h7w7r3s3u2p1d1-nchw)"
    )
