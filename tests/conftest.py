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
            # The harness has no memory on a GPU: test_cuda.py has, and test_cuda_emulator.py needs none.
            why_not = kernel.why_not or ("its operands lie on a GPU" if kernel.target == "sm80" else "")
            marks = [pytest.mark.skip(reason=why_not)] if why_not else []
            params.append(pytest.param(kernel.name, marks=marks))
    metafunc.parametrize("kernel", params)
