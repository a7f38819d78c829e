"""Tests that take a `kernel` run once for each kernel of fastconv, by its name; `ops` says of which operations.

test_kernels, test_memory, test_bits, test_acceptance, test_harness, test_reference and test_layout need NumPy only.
"""

from __future__ import annotations

import pytest

from fastconv.testing import harness


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops(*names): the operations whose kernels a test takes; all without it")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("ops")
    params = []
    for kernel in harness.native().kernels():
        if marker is None or kernel.op in marker.args:
            marks = [] if kernel.runnable else [pytest.mark.skip(reason=kernel.why_not)]
            params.append(pytest.param(kernel.name, marks=marks))
    metafunc.parametrize("kernel", params)
