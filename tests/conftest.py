"""Tests that take a `kernel` run once for each kernel of fastconv, by its name; `ops` says of which operations.

test_kernels, test_memory, test_bits, test_acceptance, test_harness, test_reference and test_layout need NumPy only.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fastconv.testing import emulator, harness

ROOT = Path(__file__).resolve().parents[1]
# Under AddressSanitizer, as .ci/run starts Python, the CUDA kernels are compiled with it and with UndefinedBehaviorSanitizer.
SANITIZE = "libasan" in os.environ.get("LD_PRELOAD", "")


@pytest.fixture(scope="session")
def cuda_cache(request: pytest.FixtureRequest) -> Path:
    """Where emulated kernels are built."""
    assert request.config.cache is not None
    return Path(request.config.cache.mkdir("cuda_emulator"))


@pytest.fixture(scope="session")
def cuda_library(cuda_cache: Path) -> Path:
    return emulator.build(ROOT, cuda_cache, sanitize=SANITIZE)


@pytest.fixture(scope="session")
def fake_cuda() -> ModuleType:
    """The module beside this file: tests/ is not on sys.path, and some tests have no torch."""
    spec = importlib.util.spec_from_file_location("fake_cuda", Path(__file__).with_name("fake_cuda.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(cuda_library: Path) -> Iterator[emulator.Emulator]:
    """The harness with the emulated kernels in the place of the compiled module's."""
    module = emulator.Emulator(cuda_library)
    with harness.using(module):
        yield module


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
