"""What a call costs besides arithmetic: problems so small that it is all checks, dispatch and allocation."""

from __future__ import annotations

from dataclasses import replace

from fastconv.bench.cases import Case, make
from fastconv.bench.shapes import Shape, parse_conv, parse_linear, parse_pool

_TINY: tuple[tuple[str, Shape], ...] = (
    ("conv2d", parse_conv("c8h8k8r3p1")),
    ("conv2d", parse_conv("c16h4k16r1")),
    ("conv2d", parse_conv("c32h8k32r3p1g32")),
    ("max_pool2d", parse_pool("c8h8r2")),
    ("avg_pool2d", parse_pool("c8h8r2")),
    ("adaptive_avg_pool2d", parse_pool("c16h4a1")),
    ("linear", parse_linear("i16o16")),
)


def call_cases(dtype: str, seed: int) -> list[Case]:
    """Each tiny problem without and with autograd recording it."""
    plain = [make(op, shape, "fwd", dtype=dtype, seed=seed) for op, shape in _TINY]
    return plain + [replace(case, records_gradient=True) for case in plain]
