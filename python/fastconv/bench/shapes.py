"""Shape strings: a problem on one line that can be pasted back into the command line.

    conv2d       n1c64h56w56k64r3s3u2p1d1g1   batch, channels, height, width, filters, filter height and width,
                                              stride (u), padding (p), dilation (d), groups (g)
    transposed   n1c64h28k32r2u2              a conv2d's fields; c is what comes in, k what goes out; o1: output padding
    pools        n1c64h112w112r3s3u2p1        as above, without filters and groups; +ceil, +exclude_pad, +div9
    adaptive     n1c2048h7w7a1x1              the output's size
    linear       m197i768o3072                rows, input features, output features
    layer_norm   m197c768                     rows, numbers of a row
    batch_norm   n8c64h56w56+relu             batch, channels, height, width; +residual, +relu
    sdpa         n1h16q2048d64+causal         heads, queries, features; g heads of keys, k keys, v features of values;
                                              +bool, +float, +padding (a boolean mask of keys alone)

These are the ids of ``fastconv.testing.problems`` with everything optional that has an obvious value: n, u, d, g are 1,
p is 0, w is h, s is r, and a pool's stride is its window, as in torch. Several numbers are joined by x: u2x1, p0x1x0x1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TypeVar

from fastconv.testing.problems import ConvCase, PoolCase, parse

_NUMBERS = r"-?\d+(?:x-?\d+)*"
_FIELD = re.compile(rf"([a-z])({_NUMBERS})")
_SHAPE = re.compile(rf"((?:[a-z]{_NUMBERS})+)(?:-n(?:chw|hwc))?((?:\+\w+)*)")


@dataclass(frozen=True)
class ConvTransposeShape:
    """x (N, C, H, W), w (C, K/groups, R, S) to y (N, K, P, Q), as torch's conv_transpose2d has them, without a bias."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return self.C, self.K // self.groups, self.R, self.S

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        P, Q = (
            (size - 1) * stride - 2 * pad + dilation * (taps - 1) + more + 1
            for size, stride, pad, dilation, taps, more in zip(
                (self.H, self.W), self.stride, self.padding, self.dilation, (self.R, self.S), self.output_padding
            )
        )
        return self.N, self.K, P, Q

    def __str__(self) -> str:
        fields = {"n": self.N, "c": self.C, "h": self.H} | ({"w": self.W} if self.W != self.H else {})
        fields |= {"k": self.K, "r": self.R} | ({"s": self.S} if self.S != self.R else {})
        words = [f"{letter}{number}" for letter, number in fields.items()]
        pairs = {"u": (self.stride, 1), "p": (self.padding, 0), "o": (self.output_padding, 0), "d": (self.dilation, 1)}
        for letter, (pair, usual) in pairs.items():
            if pair != (usual, usual):
                words.append(letter + "x".join(map(str, dict.fromkeys(pair) if pair[0] == pair[1] else pair)))
        return "".join(words) + (f"g{self.groups}" if self.groups > 1 else "")


@dataclass(frozen=True)
class LinearShape:
    """y[m,o] = x[m,i] · w[o,i]ᵀ."""

    m: int
    i: int
    o: int

    def __str__(self) -> str:
        return f"m{self.m}i{self.i}o{self.o}"


@dataclass(frozen=True)
class NormShape:
    """m rows of c numbers."""

    m: int
    c: int

    def __str__(self) -> str:
        return f"m{self.m}c{self.c}"


@dataclass(frozen=True)
class BatchNormShape:
    """n images of c channels, with an addition and a ReLU behind it or without."""

    n: int
    c: int
    h: int
    w: int
    residual: bool = False
    relu: bool = False

    def __str__(self) -> str:
        width = f"w{self.w}" if self.w != self.h else ""
        return f"n{self.n}c{self.c}h{self.h}{width}" + "+residual" * self.residual + "+relu" * self.relu


MASKS = ("bool", "float", "padding")
"""Masks of attention: one boolean or floating number for each score, or a boolean for each key."""


@dataclass(frozen=True)
class SdpaShape:
    """n batch elements of h heads of q queries and g heads of k keys, with d features and v of a value.

    ``mask`` is "" or one of MASKS.
    """

    n: int
    h: int
    g: int
    q: int
    k: int
    d: int
    v: int
    causal: bool = False
    mask: str = ""

    def __str__(self) -> str:
        fields = {"n": self.n, "h": self.h, "q": self.q}
        fields |= {"g": self.g} if self.g != self.h else {}
        fields |= {"k": self.k} if self.k != self.q else {}
        fields |= {"d": self.d} | ({"v": self.v} if self.v != self.d else {})
        extras = "+causal" * self.causal + f"+{self.mask}" * bool(self.mask)
        return "".join(f"{letter}{number}" for letter, number in fields.items()) + extras


Shape = ConvCase | ConvTransposeShape | PoolCase | LinearShape | NormShape | BatchNormShape | SdpaShape

AnyCase = TypeVar("AnyCase", ConvCase, PoolCase)


def parse_conv(text: str) -> ConvCase:
    """``c64h56k64r3p1`` to a problem. ValueError names the string and the field at fault."""
    fields, extras = _split(text, known="nchwkrsupdg", needed="chkr")
    if set(extras.split("+")) - {"", "bias"}:
        raise ValueError(f"shape {text!r}: only +bias can be timed, got {extras!r}")
    f = {"n": "1", "u": "1", "p": "0", "d": "1", "g": "1", "w": fields["h"], "s": fields["r"]} | fields
    case = parse("".join(letter + f[letter] for letter in "nchwkrsupdg") + "-nchw" + extras)
    assert isinstance(case, ConvCase)
    if min(case.groups, *case.stride, *case.dilation) < 1 or case.C % case.groups or case.K % case.groups:
        raise ValueError(f"shape {text!r}: strides and dilations must be positive, groups must divide c and k")
    return _with_output(case, text)


def parse_conv_transpose(text: str) -> ConvTransposeShape:
    """``c64h28k32r2u2`` to a ConvTransposeShape."""
    fields, extras = _split(text, known="nchwkrsupodg", needed="chkr")
    if extras:
        raise ValueError(f"shape {text!r}: a transposed convolution has no extras, got {extras!r}")
    f = {"n": "1", "u": "1", "p": "0", "o": "0", "d": "1", "g": "1", "w": fields["h"], "s": fields["r"]} | fields
    n, c, h, w, k, r, s, groups = (int(f[letter]) for letter in "nchwkrsg")
    pairs = {letter: tuple(map(int, f[letter].split("x"))) for letter in "upod"}
    if not all(len(pair) in (1, 2) for pair in pairs.values()):
        raise ValueError(f"shape {text!r}: u, p, o and d are one number or two joined by x")
    u, p, o, d = ((pair[0], pair[-1]) for pair in pairs.values())
    shape = ConvTransposeShape(n, c, h, w, k, r, s, u, p, o, d, groups)
    if min(groups, *u, *d) < 1 or c % groups or k % groups:
        raise ValueError(f"shape {text!r}: strides and dilations must be positive, groups must divide c and k")
    if min(*shape.x_shape, *shape.y_shape) < 1:
        raise ValueError(
            f"shape {text!r}: every size must be positive, the output is {shape.y_shape[2]}x{shape.y_shape[3]}"
        )
    return shape


def parse_pool(text: str) -> PoolCase:
    """``c64h112r3u2p1`` or ``c2048h7a1`` to a problem."""
    fields, extras = _split(text, known="nchwrsupda", needed="ch")
    f = {"n": "1", "w": fields["h"]} | fields
    if "a" in f:
        if set(f) & set("rsupd"):
            raise ValueError(f"shape {text!r}: an adaptive pool (a) has no window, stride, padding or dilation")
        size = f["a"] if "x" in f["a"] else f"{f['a']}x{f['a']}"
        window = f"a{size}"
    elif "r" in f:
        f = {"s": f["r"], "p": "0", "d": "1"} | f
        f = {"u": f"{f['r']}x{f['s']}"} | f
        window = "".join(letter + f[letter] for letter in "rsupd")
    else:
        raise ValueError(f"shape {text!r}: a pool needs a window (r) or an output size (a)")
    case = parse("".join(letter + f[letter] for letter in "nchw") + window + "-nchw" + extras)
    assert isinstance(case, PoolCase)
    if case.pad4[0] != case.pad4[1] or case.pad4[2] != case.pad4[3]:
        raise ValueError(f"shape {text!r}: torch's pools pad both sides alike, got p{case.pad4}")
    return _with_output(case, text)


def parse_linear(text: str) -> LinearShape:
    """``m197i768o3072`` to a LinearShape."""
    fields, _ = _split(text, known="mio", needed="io")
    return LinearShape(int(fields.get("m", "1")), int(fields["i"]), int(fields["o"]))


def parse_norm(text: str) -> NormShape:
    """``m197c768`` to a NormShape."""
    fields, _ = _split(text, known="mc", needed="c")
    return NormShape(int(fields.get("m", "1")), int(fields["c"]))


def parse_batch_norm(text: str) -> BatchNormShape:
    """``n8c64h56+relu`` to a BatchNormShape."""
    fields, extras = _split(text, known="nchw", needed="ch")
    if extras not in ("", "+residual", "+relu", "+residual+relu"):
        raise ValueError(f"shape {text!r}: only +residual and +relu can be timed, got {extras!r}")
    f = {"n": "1", "w": fields["h"]} | fields
    n, c, h, w = (int(f[letter]) for letter in "nchw")
    return BatchNormShape(n, c, h, w, "+residual" in extras, "+relu" in extras)


def parse_sdpa(text: str) -> SdpaShape:
    """``h16q2048d64+causal`` to an SdpaShape."""
    fields, extras = _split(text, known="nhgqkdv", needed="hqd")
    words = extras.split("+")[1:]
    if extras and (len(words) != 1 or words[0] not in ("causal", *MASKS)):
        raise ValueError(f"shape {text!r}: only +causal or one of +{', +'.join(MASKS)} can be timed, got {extras!r}")
    f = {"n": "1", "g": fields["h"], "k": fields["q"], "v": fields["d"]} | fields
    n, h, g, q, k, d, v = (int(f[letter]) for letter in "nhgqkdv")
    causal = words == ["causal"]
    shape = SdpaShape(n, h, g, q, k, d, v, causal, "" if causal else "".join(words))
    if min(shape.n, shape.h, shape.g, shape.q, shape.k, shape.d, shape.v) < 1 or shape.h % shape.g:
        raise ValueError(f"shape {text!r}: every size must be positive and g must divide h")
    return shape


def short(shape: Shape) -> str:
    """The shortest string that parses back to the same problem: what has its default value is left out, but for n."""
    if isinstance(shape, (ConvTransposeShape, LinearShape, NormShape, BatchNormShape, SdpaShape)):
        return str(shape)
    body, _, extras = str(shape).partition("-nchw")
    fields: dict[str, str] = dict(_FIELD.findall(body))
    defaults = {"w": fields["h"], "s": fields.get("r"), "u": "1", "p": "0", "d": "1", "g": "1"}
    if isinstance(shape, PoolCase):
        defaults["u"] = str(shape.R) if (shape.R, shape.R) == (shape.S, shape.stride[0]) == shape.stride else None
    if "a" in fields:
        fields["a"] = fields["a"] if shape.P != shape.Q else str(shape.P)
    return "".join(letter + number for letter, number in fields.items() if defaults.get(letter) != number) + extras


def batched(shape: Shape, n: int) -> Shape:
    """The same problem for ``n`` samples; a linear's rows, and a norm's, are those of one sample."""
    if isinstance(shape, (LinearShape, NormShape)):
        return replace(shape, m=n * shape.m)
    if isinstance(shape, (BatchNormShape, SdpaShape)):
        return replace(shape, n=n)
    return replace(shape, N=n)


def _split(text: str, known: str, needed: str) -> tuple[dict[str, str], str]:
    whole = _SHAPE.fullmatch(text)
    if whole is None:
        raise ValueError(f"shape {text!r}: expected letters and numbers in turn, such as c64h56k64r3p1")
    fields: dict[str, str] = {}
    for letter, number in _FIELD.findall(whole[1]):
        if letter not in known:
            raise ValueError(f"shape {text!r}: unknown field {letter!r}, expected some of {' '.join(known)}")
        if letter in fields:
            raise ValueError(f"shape {text!r}: field {letter!r} is given twice")
        fields[letter] = number
    for letter in needed:
        if letter not in fields:
            raise ValueError(f"shape {text!r}: missing field {letter!r}")
    return fields, whole[2]


def _with_output(case: AnyCase, text: str) -> AnyCase:
    if min(case.N, case.C, case.H, case.W, case.P, case.Q) < 1:
        raise ValueError(f"shape {text!r}: every size must be positive, the output is {case.P}x{case.Q}")
    return case
