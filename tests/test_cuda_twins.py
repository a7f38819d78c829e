"""The wrappers of csrc/cuda/blocks/{copy,mma}.h against PTX's tables of fragments, and on a GPU, PTX against the twins.

tests/cuda_emulator/twins.cu calls each. Matrices hold small integers, whose products and sums are exact however they are rounded.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastconv.testing import emulator, harness

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests/cuda_emulator"
NVCC = shutil.which("nvcc")
IN, OUT = 12, 12  # words of each lane

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="needs a host compiler")

Words = NDArray[np.uint32]
Run = Callable[[int, Words], Words]


def runner(library: Path) -> Run:
    function: Any = ctypes.CDLL(str(library)).twins_run
    function.restype = ctypes.c_char_p

    def run(which: int, given: Words) -> Words:
        out = np.zeros((32, OUT), np.uint32)
        given = np.ascontiguousarray(given, np.uint32)
        pointer = ctypes.c_void_p
        error = function(which, given.ctypes.data_as(pointer), out.ctypes.data_as(pointer))
        assert error is None, error
        return out

    return run


@pytest.fixture(scope="module")
def emulated_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = tmp_path_factory.mktemp("twins") / "emulated.so"
    command = [emulator.compiler(), *emulator.FLAGS, "-shared", f"-I{SOURCES}", f"-I{ROOT / 'csrc'}", "-x", "c++"]
    subprocess.run([*command, SOURCES / "twins.cu", SOURCES / "emulator.cpp", "-o", made], check=True)  # type: ignore[list-item]
    return runner(made)


def halves(words: Words) -> NDArray[np.uint16]:
    """Each word's two, the lower first."""
    return np.stack([words & 0xFFFF, words >> 16], -1).astype(np.uint16)


def rows(seed: int = 0) -> Words:
    """16 bytes of each lane in its first four words."""
    return np.random.default_rng(seed).integers(0, 2**32, (32, IN), np.uint32)


def test_ldmatrix_and_its_copies(emulated_run: Run) -> None:
    given = rows()
    out = emulated_run(0, given)
    there = given[:, :4].copy()
    there[::5] = 0
    matrix = halves(there).reshape(4, 8, 8)  # matrix, row, column
    for lane in range(32):
        row, pair = divmod(lane, 4)
        columns = [2 * pair, 2 * pair + 1]
        assert halves(out[lane, :4]).tolist() == matrix[:, row, columns].tolist()
        assert halves(out[lane, 4:8]).tolist() == matrix[:, columns, row].tolist()


ENCODE: dict[str, Callable[[NDArray[np.float32]], NDArray[np.uint32]]] = {
    "f16": lambda x: x.astype(np.float16).view(np.uint16).astype(np.uint32),
    "bf16": lambda x: x.view(np.uint32) >> 16,
    "tf32": lambda x: x.view(np.uint32),
}


def fragments(kind: str) -> tuple[Words, NDArray[np.float32]]:
    """Operands of a warp, and the products: C of the lane l has rows l / 4 and + 8, columns 2 (l % 4) and + 1."""
    depth = 8 if kind == "tf32" else 16
    drawn = np.random.default_rng(1)
    a, b, c = (drawn.integers(-8, 9, shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
    given = np.zeros((32, IN), np.uint32)
    for lane in range(32):
        row, pair = divmod(lane, 4)
        for i in range(4):
            r = row + i % 2 * 8
            if kind == "tf32":
                given[lane, i] = ENCODE[kind](a[r, pair + i // 2 * 4])
            else:
                low, high = (ENCODE[kind](a[r, 2 * pair + i // 2 * 8 + j]) for j in range(2))
                given[lane, i] = low | high << 16
            given[lane, 6 + i] = c[row + i // 2 * 8, 2 * pair + i % 2].view(np.uint32)
        for i in range(2):
            if kind == "tf32":
                given[lane, 4 + i] = ENCODE[kind](b[pair + i * 4, row])
            else:
                low, high = (ENCODE[kind](b[2 * pair + i * 8 + j, row]) for j in range(2))
                given[lane, 4 + i] = low | high << 16
    return given, a @ b + c


@pytest.mark.parametrize(("which", "kind"), [(1, "f16"), (2, "bf16"), (3, "tf32")])
def test_mma(emulated_run: Run, which: int, kind: str) -> None:
    given, expected = fragments(kind)
    out = emulated_run(which, given)
    for lane in range(32):
        row, pair = divmod(lane, 4)
        found = out[lane, :4].view(np.float32)
        assert found.tolist() == [expected[row + i // 2 * 8, 2 * pair + i % 2] for i in range(4)]
    np.testing.assert_array_equal(out[:, 4:8], given[:, :4])


def floats() -> Words:
    """Numbers of every size, infinities, and halfway cases of tf32."""
    drawn = np.random.default_rng(2)
    x = (drawn.standard_normal((32, IN)) * 2.0 ** drawn.integers(-14, 15, (32, IN))).astype(np.float32)
    words = x.view(np.uint32)
    words[:8, 0] = words[:8, 0] & ~np.uint32(0x1FFF) | np.uint32(0x1000)
    words[8, 0], words[9, 0] = 0x7F800000, 0xFF800000
    return words


def test_words(emulated_run: Run) -> None:
    given = floats()
    out = emulated_run(4, given)
    x = given[:, :2].view(np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(halves(out[:, 0]), x.astype(np.float16).view(np.uint16))
    # To nearest, ties to even for bfloat16, away from zero for tf32.
    np.testing.assert_array_equal(halves(out[:, 1]), (given[:, :2] + 0x7FFF + (given[:, :2] >> 16 & 1)) >> 16)
    np.testing.assert_array_equal(out[:, 2], (given[:, 0] + 0x1000) & ~np.uint32(0x1FFF))


@pytest.mark.gpu
@pytest.mark.skipif(
    NVCC is None or not any(k.target == "sm80" and k.runnable for k in harness.native().kernels()),
    reason="needs a GPU, nvcc and a build with CUDA kernels",
)
def test_ptx_does_what_its_twins_say(emulated_run: Run, tmp_path: Path) -> None:
    assert NVCC is not None
    made = tmp_path / "ptx.so"
    options = ["-std=c++20", "-arch=native", "-shared", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([NVCC, *options, SOURCES / "twins.cu", "-o", made], check=True)
    on_gpu = runner(made)
    for which, given in enumerate((rows(), *(fragments(kind)[0] for kind in ("f16", "bf16", "tf32")), floats())):
        np.testing.assert_array_equal(on_gpu(which, given), emulated_run(which, given))
