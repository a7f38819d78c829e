"""Tests that take a `kernel` run once for each kernel of fastconv, by its name; `ops` says of which operations.

test_kernels, test_memory, test_bits, test_acceptance, test_harness and its gradients, test_reference and test_layout need NumPy
only.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

# Read by libgomp when the imports below load it: its threads sleep where they would spin. With a worker of xdist for each core,
# all computing on every core, spinning took more than computing: 112 s of processor time for test_model_outputs, and now 36.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from fastconv.testing import emulator, fill, grids, harness
from fastconv.testing.problems import Case

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


@functools.cache
def beside(name: str) -> ModuleType:
    """The module beside this file: tests/ is not on sys.path, and some tests have no torch, which these import."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_cuda() -> ModuleType:
    return beside("fake_cuda")


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def place(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Where a test's tensors lie (places.py): a test that takes it runs in all three, or in those that
    `@pytest.mark.parametrize("place", [...], indirect=True)` names. `.ci/gpu` runs what is on "cuda".
    """
    yield from _place(request)


@pytest.fixture(params=["emulated", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The places where tensors are a GPU's."""
    yield from _place(request)


def _place(request: pytest.FixtureRequest) -> Iterator[Any]:
    places = beside("places")
    if request.param == "cpu":
        yield places.Place()
    elif request.param == "cuda":
        why_not = places.why_no_gpu()
        if why_not:
            pytest.skip(why_not)
        with places.kernels_answer():
            yield places.Gpu()
    else:
        if emulator.compiler() is None:
            pytest.skip("needs a host compiler")
        fake, library = request.getfixturevalue("fake_cuda"), request.getfixturevalue("cuda_library")
        with places.kernels_answer(), fake.device(emulator.Emulator(library)):
            yield places.Emulated(fake)


@pytest.fixture
def emulated(cuda_library: Path) -> Iterator[emulator.Emulator]:
    """The harness with the emulated kernels in the place of the compiled module's."""
    module = emulator.Emulator(cuda_library)
    with harness.using(module):
        yield module


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread, with random numbers from a seed."""
    torch = importlib.import_module("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def widened() -> Iterator[None]:
    """Halves are widened, so that they give f32's result rounded: nothing multiplies them in pairs."""
    plan = importlib.import_module("fastconv.plan")
    plan.limit_isa("avx512")
    yield
    plan.limit_isa("")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops(*names): the operations whose kernels a test takes; all without it")
    config.addinivalue_line("markers", "gpu: needs a GPU, so that `.ci/gpu` runs it; set where a parameter is `cuda`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cuda" in getattr(item, "callspec", SimpleNamespace(params={})).params.values():
            item.add_marker("gpu")


def pytest_collection_finish() -> None:
    # Thousands of tests and torch's modules live to the end: a collection, of which the bench makes several for each call that it
    # times, would walk through them every time.
    gc.collect()
    gc.freeze()


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


# ---- Kernels that are not compiled: the harness is tested on right ones and wrong ones --------------------------------

Memory = dict[str, np.ndarray]
FAKES = [f"{op}.fake.f32.scalar" for op in ("conv2d_fwd", "conv2d_dgrad", "conv2d_wgrad", "max_pool2d_fwd")]


class FakeNative:
    """Stands in for the compiled module: one kernel of each op, written in NumPy, on the same raw addresses."""

    def __init__(self, kernel: Callable[[Any, Memory], None]) -> None:
        self.kernel = kernel

    Conv2dProblem = Pool2dProblem = SimpleNamespace

    def kernels(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, error_growth=1.0) for name in FAKES]

    def plan(self, op: str, problem: Any, threads: int, force: str) -> SimpleNamespace:
        def array(address: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: type = np.float32) -> Any:
            low = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0)
            high = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s > 0) + 1
            size = np.dtype(kind).itemsize
            memory = (ctypes.c_char * ((high - low) * size)).from_address(address + low * size)
            return np.ndarray(shape, kind, memory, -low * size, tuple(s * size for s in strides))

        p = problem
        x_shape = (p.N, p.C, p.H, p.W)

        def run_conv2d(x: int, w: int, bias: int, residual: int, y: int, packed: int, *, workspace: int) -> None:
            y_shape = (p.N, p.K, p.P, p.Q)
            memory = {"x": array(x, x_shape, p.x), "y": array(y, y_shape, p.y)}
            memory["w"] = array(w, (p.K, p.C // p.groups, p.R, p.S), p.w[1:])
            memory["workspace"] = array(workspace, (16,), (1,))
            if bias:
                memory["bias"] = array(bias, (p.K,), (1,))
            if residual:
                memory["residual"] = array(residual, y_shape, p.y)
            self.kernel(p, memory)

        def run_pool2d(x: int, y: int, indices: int, workspace: int) -> None:
            y_shape = (p.N, p.C, p.P, p.Q)
            memory = {"x": array(x, x_shape, p.x), "y": array(y, y_shape, p.y)}
            memory["indices"] = array(indices, y_shape, p.y, np.int64)
            self.kernel(p, memory)

        return SimpleNamespace(kernel=force, workspace=64, run_conv2d=run_conv2d, run_pool2d=run_pool2d)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Puts a kernel written in NumPy in the place of the compiled ones."""
    caches = (harness.native_problem, harness.error_growth)

    def install(kernel: Callable[[Any, Memory], None]) -> None:
        for cache in caches:
            cache.cache_clear()
        monkeypatch.setattr(harness, "native", lambda: FakeNative(kernel))

    yield install
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def judge(fake: Callable[[Any], None]) -> Callable[[str, Any], None]:
    """Does with a kernel of one op, written in NumPy, what test_kernels does, on a part of the grid."""

    def checks(name: str, kernel: Any) -> None:
        fake(kernel)
        op = name.split(".")[0]
        cases: list[Case] = list(grids.grid(op)[::5])
        harness.check_all(name, cases)
        exact = [c for c in cases if getattr(c, "activation", "none") in ("none", "relu", "relu6")]
        harness.check_all(name, exact, fill.integers, exact=True)
        if op.startswith("max_pool"):
            harness.check_all(name, cases, fill.integers_with_zeros, exact=True)
            harness.check_all(name, cases, fill.with_specials)
        else:
            harness.check_all(name, cases, fill.with_one_nan)

    return checks
