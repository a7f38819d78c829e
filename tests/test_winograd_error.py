"""tools/winograd_error.py: what it measures stays within what the kernels say of themselves."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastconv
from fastconv.testing import tolerance

TOOL = Path(__file__).resolve().parents[1] / "tools" / "winograd_error.py"


@pytest.mark.parametrize(
    ("size", "algorithms"), [(3, {"winograd_f2x3", "winograd_f4x3", "winograd_f6x3"}), (5, {"winograd_f4x5"})]
)
def test_errors_are_within_error_growth(size: int, algorithms: set[str]) -> None:
    spec = importlib.util.spec_from_file_location("winograd_error", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    growth = {k.algorithm: k.error_growth for k in fastconv.kernels("conv2d_fwd")}
    terms = 48 * size * size
    torch.manual_seed(0)
    layer = nn.Conv2d(48, 40, size, padding=size // 2)
    found = tool.errors(layer, torch.randn(1, 48, 23, 19).relu())
    assert set(found) == algorithms
    for algorithm, (error, plain) in found.items():
        assert 0 < error <= tolerance.l2_bound(growth[algorithm], terms, np.float32), algorithm
        assert 0 < plain <= tolerance.l2_bound(1.0, terms, np.float32)
