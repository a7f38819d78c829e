"""What was installed: the right files, one version everywhere, a command that runs, a module that drags nothing in."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

import fastconv

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fastconv.__file__).parent

try:
    DISTRIBUTION: metadata.Distribution | None = metadata.distribution("fastconv")
except metadata.PackageNotFoundError:
    DISTRIBUTION = None

installed = pytest.mark.skipif(DISTRIBUTION is None, reason="fastconv is imported from a folder, not installed")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, check=False)


def compiled_module() -> Path:
    (path,) = PACKAGE.glob("_C*.so")
    return path


def pyproject_version() -> str:
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert match
    return match[1]


@installed
def test_one_version() -> None:
    assert fastconv.__version__ == pyproject_version()


@installed
def test_metadata_agrees() -> None:
    assert DISTRIBUTION is not None
    assert DISTRIBUTION.version == pyproject_version()
    assert fastconv.build_info()["version"] == pyproject_version()


@installed
def test_torch_is_a_minimum_and_never_a_pin() -> None:
    assert DISTRIBUTION is not None
    required = {re.split(r"[^\w-]", line)[0]: line for line in DISTRIBUTION.requires or [] if "extra ==" not in line}
    assert set(required) == {"torch", "numpy", "rich"}
    assert re.fullmatch(r"torch>=[\d.]+", required["torch"])


@installed
def test_wheel_holds_the_package_and_nothing_else() -> None:
    assert DISTRIBUTION is not None
    files = [str(path) for path in DISTRIBUTION.files or []]
    outside = [
        name for name in files if not re.match(r"fastconv/|fastconv-[\d.]+\.dist-info/|(\.\./)+bin/fastconv$", name)
    ]
    assert outside == []
    unexpected = [name for name in files if not name.endswith((".py", ".pyc", ".pyi", ".so", "py.typed"))]
    assert [name for name in unexpected if ".dist-info/" not in name and not name.endswith("bin/fastconv")] == []
    assert sum(name.endswith(".so") for name in files) == 1
    assert any(name.endswith("LICENSE") for name in files)


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()


def test_build_info_says_what_was_built() -> None:
    info = fastconv.build_info()
    assert info["targets"][0] == "scalar"
    assert info["compiler"]
    # CUDA kernels, or a reason why there are none.
    assert bool(info["cuda_reason"]) != bool(info["cuda_architectures"])
    assert bool(info["cuda_architectures"]) == any(kernel.target == "sm80" for kernel in fastconv.kernels())


def test_the_module_is_no_burden_to_download() -> None:
    """With kernels for every CPU and for GPUs: 13 MB for two of them, 15 MB for four."""
    assert compiled_module().stat().st_size < 40_000_000


@installed
def test_console_script() -> None:
    script = Path(sysconfig.get_path("scripts")) / "fastconv"
    result = run(script, "info")
    assert result.returncode == 0, result.stderr
    assert pyproject_version() in result.stdout


def test_python_dash_m() -> None:
    result = run(sys.executable, "-m", "fastconv", "--help")
    assert result.returncode == 0, result.stderr
    for command in ("info", "check", "bench"):
        assert command in result.stdout


def test_unknown_command_is_a_usage_error() -> None:
    result = run(sys.executable, "-m", "fastconv", "frobnicate")
    assert result.returncode == 2
    assert "frobnicate" in result.stderr


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_module_links_no_torch_and_openmp_by_its_plain_name() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", compiled_module()).stdout)
    assert needed, "readelf found no NEEDED entry"
    assert [name for name in needed if re.search(r"torch|c10|cuda|libpython", name)] == []
    # A vendored copy would be a second thread pool beside torch's.
    openmp = [name for name in needed if "omp" in name]
    assert openmp in (["libgomp.so.1"], ["libomp.so.5"])


def test_one_openmp_runtime_is_mapped() -> None:
    code = """
import torch, fastconv
fastconv.functional.conv2d(torch.randn(1, 8, 32, 32), torch.randn(8, 8, 3, 3))
maps = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}
assert len(maps) == 1, maps
"""
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr


def test_import_is_silent_and_starts_no_thread_and_no_torch() -> None:
    code = """
import os, sys, numpy  # numpy's BLAS starts threads of its own
before = len(os.listdir("/proc/self/task"))
import fastconv
assert len(os.listdir("/proc/self/task")) == before, "a thread was started"
assert "torch" not in sys.modules, "torch was imported"
"""
    result = run(sys.executable, "-W", "error", "-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_numpy_face_imports_no_torch() -> None:
    code = """
import sys, numpy, fastconv.numpy
x, w = numpy.ones((1, 2, 5, 5), numpy.float32), numpy.ones((3, 2, 3, 3), numpy.float32)
y = fastconv.numpy.conv2d(x, w)
assert y.shape == (1, 3, 3, 3) and (y == 18).all(), y
assert "torch" not in sys.modules
"""
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
