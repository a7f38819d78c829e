"""Attention problems: as plain data with an id, the grid of them, and their inputs. What kernels must give: attention_truth.

    n2h4g2q33k65d16v24-bhld+causal+mask_bqk+bool+cap3

g is the number of heads of keys and values, q and k the number of queries and keys, v the features of a value. Words behind the
layout: causal (from the upper left corner), lower (causal from the lower right), window5 (at most 5 keys back), mask_<the
dimensions of bhqk it has>, bool (otherwise the mask is added), cap3 (softcap), scale-0.5, drop0.3, bias_<bh, those that a bias
by distance has>, sink.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastconv import reference
from fastconv.testing import fill, tolerance
from fastconv.testing.buffers import strides_of

Array = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[tuple[int, ...], str]]

SDPA_OPS = ("sdpa_fwd", "sdpa_bwd")
KEY = 0x1234567

# name: formats of q, k and v, out (see buffers.strides_of).
SDPA_LAYOUTS = {
    "bhld": ("nchw", "nchw", "nchw", "nchw"),
    "blhd": ("heads", "heads", "heads", "heads"),
    "rows": ("rows", "rows", "rows", "rows"),
    "step": ("step", "step", "step", "step"),
    "turned": ("turned", "turned", "turned", "turned"),
    "flip": ("flip", "flip", "flip", "flip"),
    "mixed": ("heads", "nchw", "turned", "rows"),
    "shared": ("nchw", "shared", "shared", "nchw"),
    "scalar": ("scalar", "nchw", "scalar", "nchw"),
}
READS = {"sdpa_fwd": ("q", "k", "v"), "sdpa_bwd": ("q", "k", "v", "out", "lse", "dout", "dlse")}
WRITES = {"sdpa_fwd": ("out", "lse"), "sdpa_bwd": ("dq", "dk", "dv")}


@dataclass(frozen=True)
class SdpaCase:
    """One attention problem, forward and backward. N is the batch, as everywhere in the tests."""

    N: int
    Hq: int
    Hkv: int
    Lq: int
    Lkv: int
    D: int
    Dv: int
    layout: str = "bhld"
    causal: str = ""
    window: int = -1
    mask: str = ""
    boolean: bool = False
    softcap: float = 0.0
    scale: float | None = None
    dropout: float = 0.0
    bias: str | None = None
    sink: bool = False

    @property
    def factor(self) -> float:
        return max(self.D, 1) ** -0.5 if self.scale is None else self.scale

    @property
    def band(self) -> tuple[int, int]:
        high = {"": self.Lkv, "causal": 0, "lower": self.Lkv - self.Lq}[self.causal]
        return (-self.Lq if self.window < 0 else (high if self.causal else 0) - self.window), high

    @property
    def ops(self) -> tuple[str, ...]:
        return SDPA_OPS

    @property
    def shapes(self) -> Shapes:
        """Shape and memory format of every operand."""
        q, k, v, out = SDPA_LAYOUTS[self.layout]
        # Gradients have memory of their own where operands share theirs.
        dq, dk, dv = ("nchw" if name in ("shared", "scalar") else name for name in (q, k, v))
        rows = (self.N, self.Hq, self.Lq)
        keys = (self.N, self.Hkv, self.Lkv)
        scores = (*rows, self.Lkv)
        return {
            "q": ((*rows, self.D), q),
            "k": ((*keys, self.D), k),
            "v": ((*keys, self.Dv), v),
            "out": ((*rows, self.Dv), out),
            "lse": ((*rows, 1), "nchw"),
            "mask": (scores, f"mask_{self.mask}"),
            "dout": ((*rows, self.Dv), out),
            "dlse": ((*rows, 1), "nchw"),
            "dq": ((*rows, self.D), dq),
            "dk": ((*keys, self.D), dk),
            "dv": ((*keys, self.Dv), dv),
            "dmask": (scores, "nchw"),
            "bias": ((self.N, self.Hq, 1, self.distances), f"mask_{self.bias or ''}k"),
            "sink": ((self.N, self.Hq, 1, 1), "nchw"),
            "dbias": ((self.N, self.Hq, 1, self.distances), "nchw"),
        }

    @property
    def distances(self) -> int:
        """Numbers of a bias: one for each distance of a key from its query."""
        return max(self.Lq + self.Lkv - 1, 0)

    @property
    def stored(self) -> frozenset[str]:
        """The operands of the problem's own dtype; others have the one that is computed in, or are bytes."""
        mask = ("mask",) * (bool(self.mask) and not self.boolean)
        return frozenset(("q", "k", "v", "out", "dout", "dq", "dk", "dv", *mask))

    def operands(self, op: str) -> tuple[str, ...]:
        """What the op reads and writes here."""
        mask = ("mask",) * bool(self.mask)
        dmask = ("dmask",) * (op == "sdpa_bwd" and bool(self.mask) and not self.boolean)
        return (
            *READS[op],
            *mask,
            *self.added(op),
            *WRITES[op],
            *dmask,
            *("dbias",) * (op == "sdpa_bwd" and self.biased),
        )

    @property
    def biased(self) -> bool:
        return self.bias is not None

    def added(self, op: str) -> tuple[str, ...]:
        """Backward has the sink in lse."""
        return ("bias",) * self.biased + ("sink",) * (self.sink and op == "sdpa_fwd")

    def __str__(self) -> str:
        sizes = f"n{self.N}h{self.Hq}g{self.Hkv}q{self.Lq}k{self.Lkv}d{self.D}v{self.Dv}"
        words = [self.causal] * bool(self.causal) + [f"window{self.window}"] * (self.window >= 0)
        words += [f"mask_{self.mask}"] * bool(self.mask) + ["bool"] * self.boolean
        words += [f"cap{self.softcap:g}"] * bool(self.softcap) + [f"drop{self.dropout:g}"] * bool(self.dropout)
        words += [f"bias_{self.bias}"] * self.biased + ["sink"] * self.sink
        words += [] if self.scale is None else [f"scale{self.scale:g}"]
        return "+".join([f"{sizes}-{self.layout}", *words])


_SDPA = re.compile(r"n(\d+)h(\d+)g(\d+)q(\d+)k(\d+)d(\d+)v(\d+)-(\w+)((?:\+[\w.-]+)*)", re.ASCII)


def parse_sdpa(text: str) -> SdpaCase | None:
    """The case whose ``str`` is ``text``, None where it is not one of attention."""
    m = _SDPA.fullmatch(text)
    if m is None:
        return None
    if m[8] not in SDPA_LAYOUTS:
        raise ValueError(f"unknown layout {m[8]!r}, expected one of {', '.join(SDPA_LAYOUTS)}")
    options: dict[str, Any] = {}
    for word in filter(None, m[9].split("+")):
        if word in ("causal", "lower"):
            options["causal"] = word
        elif word in ("bool", "sink"):
            options["boolean" if word == "bool" else "sink"] = True
        elif re.fullmatch(r"bias_b?h?", word):
            options["bias"] = word.removeprefix("bias_")
        elif number := re.fullmatch(r"(window|cap|drop|scale)(-?[\d.e-]+)", word):
            name = {"window": "window", "cap": "softcap", "drop": "dropout", "scale": "scale"}[number[1]]
            options[name] = int(number[2]) if name == "window" else float(number[2])
        elif re.fullmatch(r"mask_b?h?q?k?", word):
            options["mask"] = word.removeprefix("mask_")
        else:
            raise ValueError(
                f"expected causal, lower, window, mask_, bool, cap, drop, bias_, sink or scale, got {word!r}"
            )
    N, Hq, Hkv, Lq, Lkv, D, Dv = (int(v) for v in m.groups()[:7])
    return SdpaCase(N, Hq, Hkv, Lq, Lkv, D, Dv, m[8], **options)


def native_sdpa(native: Any, case: SdpaCase, dtype: str) -> Any:
    """The case as the compiled module's problem."""
    strides = {name: strides_of(shape, layout)[0] for name, (shape, layout) in case.shapes.items()}
    names = ("N", "Hq", "Hkv", "Lq", "Lkv", "D", "Dv", "softcap", "band", "dropout")
    options: dict[str, Any] = {name: getattr(case, name) for name in names}
    options["B"] = options.pop("N")
    kind = "none" if not case.mask else "boolean" if case.boolean else "additive"
    every = [strides[name] for name in ("q", "k", "v", "out", "mask")]
    gradients = [strides[name] for name in ("dout", "dq", "dk", "dv")]
    options |= {"strides": every, "gradient_strides": gradients}
    if case.biased:
        b, h, _, step = strides["bias"]
        options["bias"] = (b, h, step)
    return native.SdpaProblem(dtype=dtype, scale=case.factor, mask_kind=kind, key=KEY, **options)


def sdpa_inputs(op: str, case: SdpaCase, values: fill.Fill, dtype: str = "f32") -> Arrays:
    """Logical arrays of what the op reads, as the dtype holds them. Elements that a layout repeats are repeated."""
    shapes = case.shapes
    inputs: Arrays = {}
    more = ["mask"] * bool(case.mask) + ["bias"] * case.biased + ["sink"] * case.sink
    for name in ("q", "k", "v", *more, *(["dout", "dlse"] if op == "sdpa_bwd" else [])):
        shape, layout = shapes[name]
        steps = strides_of(shape, layout)[0]
        data = (fill.normal if name == "mask" else values)(f"{case}{name}", shape)
        if name == "mask":
            # One key in four is hidden, and one query in four sees nothing.
            hidden = (data < -0.7) | ((np.arange(case.Lq) % 4 == 3)[:, None] & ("q" in case.mask))
            data = ~hidden if case.boolean else np.where(hidden, -np.inf, data)
        if name in case.stored:
            data = tolerance.stored(data, dtype)
        inputs[name] = np.broadcast_to(data[tuple(slice(None if step else 1) for step in steps)], shape)
    if op == "sdpa_bwd":
        a = reference.sdpa(inputs["q"], inputs["k"], inputs["v"], inputs.get("mask"), **options_of(case, inputs))
        inputs |= {"out": tolerance.stored(a.out, dtype), "lse": a.lse[..., None]}
    return inputs


def options_of(case: SdpaCase, inputs: Arrays) -> dict[str, Any]:
    """The case's options as `reference.sdpa` takes them."""
    options = {"scale": case.factor, "band": case.band, "softcap": case.softcap, "dropout": (case.dropout, KEY)}
    added = {"bias": inputs["bias"][:, :, 0]} if case.biased else {}
    return options | added | ({"sink": inputs["sink"][:, :, 0, 0]} if case.sink else {})


def _grid() -> Iterator[SdpaCase]:
    for layout in ("bhld", "blhd"):
        for L in (1, 2, 3, 5, 6, 7, 11, 13, 16, 17, 23, 24, 25, 31, 33, 47, 49, 63, 64, 65):
            yield SdpaCase(1, 2, 2, L, L, 8, 8, layout)
            yield SdpaCase(1, 2, 1, L, L + 3, 5, 7, layout, causal="causal")
        for D in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 96, 128):
            yield SdpaCase(1, 2, 2, 7, 19, D, D, layout)
        yield SdpaCase(1, 1, 1, 9, 40, 32, 130, layout, causal="causal")
        yield SdpaCase(1, 1, 1, 3, 70, 256, 16, layout)
        yield SdpaCase(1, 1, 1, 3, 20, 0, 5, layout)  # all scores are 0
    for D in (257, 384, 512):  # wider than every tile and what blocks are cut for
        yield SdpaCase(1, 2, 1, 7, 70, D, D - 1, causal="causal")
    for layout in ("bhld", "blhd"):
        # Several blocks and several segments of keys, several chunks of queries.
        yield SdpaCase(1, 1, 1, 5, 1100, 16, 16, layout, causal="lower")
        yield SdpaCase(1, 2, 1, 1, 2600, 8, 24, layout)
        yield SdpaCase(1, 1, 1, 800, 530, 8, 8, layout, causal="causal")
        yield SdpaCase(2, 4, 2, 100, 300, 16, 16, layout)
        yield SdpaCase(1, 2, 1, 110, 1100, 8, 8, layout, bias="h", sink=True)
    for shape in (
        (2, 3, 3, 9, 9, 16, 16),
        (2, 4, 2, 13, 37, 24, 20),
        (1, 6, 1, 33, 12, 8, 8),
        (2, 2, 2, 12, 280, 16, 8),
    ):
        for causal in ("causal", "lower"):
            yield SdpaCase(*shape, causal=causal)
            yield SdpaCase(*shape, causal=causal, window=5)
            yield SdpaCase(*shape, causal=causal, mask="bhqk", boolean=True)
        yield SdpaCase(*shape, window=4)
        for mask in ("bhqk", "qk", "bk", "hq", "bqk", "k", "q"):
            yield SdpaCase(*shape, mask=mask, boolean=True)
            yield SdpaCase(*shape, mask=mask)
        for bias in ("", "h", "b", "bh"):
            yield SdpaCase(*shape, bias=bias, sink=bias == "b")
        yield SdpaCase(*shape, bias="h", causal="lower", mask="bk", boolean=True, softcap=3.0, dropout=0.2)
        yield SdpaCase(*shape, bias="bh", causal="causal", window=5, mask="bhqk", sink=True)
        yield SdpaCase(*shape, sink=True)
        yield SdpaCase(*shape, sink=True, causal="causal", mask="bhqk", boolean=True)
        for softcap in (2.0, 50.0):
            yield SdpaCase(*shape, softcap=softcap)
            yield SdpaCase(*shape, softcap=softcap, causal="causal", mask="qk")
        for scale in (0.0, 1.0, -0.3):
            yield SdpaCase(*shape, scale=scale)
            yield SdpaCase(*shape, scale=scale, causal="causal", mask="bhqk", boolean=True)
        for dropout in (0.1, 0.5, 1.0):
            yield SdpaCase(*shape, dropout=dropout)
            yield SdpaCase(*shape, dropout=dropout, causal="causal", mask="bk", boolean=True)
        for layout in SDPA_LAYOUTS:
            yield SdpaCase(*shape, layout=layout)
            yield SdpaCase(*shape, layout=layout, causal="causal", mask="bhqk")


@cache
def sdpa_grid() -> tuple[SdpaCase, ...]:
    """Every attention problem of the tests, without duplicates."""
    return tuple(dict.fromkeys(_grid()))
