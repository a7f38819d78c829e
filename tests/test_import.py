"""What importing fastconv does: nothing that anybody could notice."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import textwrap

import pytest

import fastconv


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )


def imported(result: subprocess.CompletedProcess[str]) -> set[str]:
    """Modules that the process imported, from -X importtime."""
    return {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


def other_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if not line.startswith("import time:")]


def test_import_is_lazy_and_silent() -> None:
    result = run(
        """
        import os
        import fastconv
        assert len(os.listdir("/proc/self/task")) == 1
        """
    )
    assert result.returncode == 0, other_lines(result)
    assert result.stdout == ""
    assert other_lines(result) == []
    assert imported(result).isdisjoint({"torch", "numpy", "fastconv._C", "fastconv.plan"})


def test_numpy_face_imports_no_torch_and_starts_no_thread() -> None:
    result = run(
        """
        import os
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's BLAS starts its own at import
        import numpy
        import fastconv.numpy
        assert len(os.listdir("/proc/self/task")) == 1
        y = fastconv.numpy.conv2d(numpy.ones((1, 2, 4, 4), "f"), numpy.ones((3, 2, 3, 3), "f"), threads=1)
        assert (y == 18).all()
        assert len(os.listdir("/proc/self/task")) == 1
        """
    )
    assert result.returncode == 0, other_lines(result)
    assert result.stdout == ""
    assert other_lines(result) == []
    assert "torch" not in imported(result)


def test_torch_face_starts_no_thread() -> None:
    result = run(
        """
        import os
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        import torch
        before = len(os.listdir("/proc/self/task"))
        import fastconv.functional, fastconv.nn, fastconv.conversion
        fastconv.kernels()
        assert len(os.listdir("/proc/self/task")) == before
        """
    )
    assert result.returncode == 0, other_lines(result)
    assert result.stdout == ""


@pytest.mark.parametrize("first", ["torch", "fastconv.numpy"])
def test_one_openmp_runtime(first: str) -> None:
    result = run(
        f"""
        import {first}
        import torch, numpy, fastconv.numpy
        fastconv.numpy.conv2d(numpy.ones((1, 2, 4, 4), "f"), numpy.ones((3, 2, 3, 3), "f"))
        torch.ones(9).sum()
        with open("/proc/self/maps") as maps:
            print(*sorted({{line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}}), sep="\\n")
        """
    )
    assert result.returncode == 0, other_lines(result)
    assert len(result.stdout.split()) == 1, result.stdout


def test_every_public_name_exists() -> None:
    for name in fastconv.__all__:
        assert getattr(fastconv, name) is not None
    assert set(fastconv.__all__) <= set(dir(fastconv))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastconv.nonsense  # noqa: B018


def test_a_module_that_cannot_be_loaded_is_one_sentence_at_first_use() -> None:
    result = run(
        """
        import sys
        import fastconv
        sys.modules["fastconv._C"] = None  # what an extension for another Python looks like
        try:
            fastconv.kernels()
        except ImportError as error:
            print(error)
        """
    )
    assert result.returncode == 0, other_lines(result)
    (line,) = result.stdout.splitlines()
    assert "compiled module cannot be loaded" in line
    assert "pip install" in line


def test_results_where_inputs_are_nan() -> None:
    torch = pytest.importorskip("torch")
    x, w = torch.zeros(1, 3, 6, 6), torch.ones(4, 3, 3, 3)
    x[0, 1, 2, 2] = float("nan")
    y = fastconv.functional.conv2d(x, w, padding=1)
    assert torch.equal(y.isnan(), torch.nn.functional.conv2d(x, w, padding=1).isnan())


def test_no_function_has_the_name_of_a_module() -> None:
    """Importing fastconv.X anywhere leaves the module in fastconv's namespace as X, in place of a function X."""
    modules = {module.name for module in pkgutil.iter_modules(fastconv.__path__)}
    assert not modules & fastconv._HOMES.keys()


SUBNORMALS = """
    import torch
    import fastconv
    import fastconv.functional as F

    {before}
    x, tiny = torch.full((2, 32, 64, 64), 1e-40), 2.0**-1074
    y = F.conv2d(x, torch.ones(32, 1, 1, 1), groups=32)  # loads the kernels, and runs them on every thread
    assert torch.equal(x.view(torch.int32), y.view(torch.int32)), "a kernel flushes subnormal numbers"
    assert 2 * tiny / 2 == tiny != 0, "the process flushes subnormal numbers"
    """


def test_subnormal_numbers_stay_in_kernels_and_in_the_user_s_process() -> None:
    """-ffast-math anywhere in the build would link start-up code that turns on flush-to-zero for everybody."""
    result = run(SUBNORMALS.format(before=""))
    assert result.returncode == 0, other_lines(result)


def test_flush_to_zero_would_be_seen() -> None:
    result = run(SUBNORMALS.format(before="assert torch.set_flush_denormal(True)"))
    assert any("flushes subnormal numbers" in line for line in other_lines(result))
