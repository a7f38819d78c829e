"""The tool that guards the ISA objects: it must let a clean object pass and name what is wrong with a bad one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "check_isa_objects.py"

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("g++", "nm", "readelf"))), reason="needs g++, nm and readelf to make and read an object"
)

CLEAN = """
namespace fastconv::avx2 {
struct Tile { int rows; };
template <class T> struct Vec { T v; };
template <class T> [[gnu::noinline]] Vec<T> twice(Vec<T> a) { return {a.v + a.v}; }
[[gnu::noinline]] inline int& counter() { static int count = 4; return count; }
extern const Tile kTile;
const Tile kTile{6};
static int hidden(int x) { return x + 1; }
int run(int x) { return hidden(x) + twice(Vec<int>{x}).v + counter(); }
}
"""

BAD = {
    "an inline function of std": (
        """
        #include <algorithm>
        namespace fastconv::avx2 { const int& run(const int& a, const int& b) { return std::max(a, b); } }
        """,
        "weak symbol outside fastconv::avx2: int const& std::max<int>",
    ),
    "a std template that returns and takes our types": (
        """
        namespace std { template <class T> [[gnu::noinline]] T id(T x) { return x; } }
        namespace fastconv::avx2 { struct Tile { int rows; }; int run() { return std::id(Tile{6}).rows; } }
        """,
        "fastconv::avx2::Tile std::id<fastconv::avx2::Tile>",
    ),
    "a helper shared by all ISAs": (
        """
        namespace fastconv { [[gnu::noinline]] inline int ceil_div(int a, int b) { return (a + b - 1) / b; } }
        namespace fastconv::avx2 { int run(int a) { return ceil_div(a, 8); } }
        """,
        "weak symbol outside fastconv::avx2: fastconv::ceil_div(int, int)",
    ),
    "a symbol of another ISA": (
        "namespace fastconv::avx512 { int run() { return 1; } }",
        "global symbol outside fastconv::avx2: fastconv::avx512::run()",
    ),
    "a namespace that only begins like ours": (
        "namespace fastconv::avx2_vnni { int run() { return 1; } }",
        "global symbol outside fastconv::avx2: fastconv::avx2_vnni::run()",
    ),
    "a C symbol": ('extern "C" int run() { return 1; }', "global symbol outside fastconv::avx2: run"),
    "a global with a constructor": (
        "int seed(); namespace fastconv::avx2 { static int state = seed(); int run() { return state; } }",
        "section .init_array",
    ),
}


def compile_object(source: str, folder: Path) -> Path:
    (folder / "unit.cpp").write_text(source)
    # -O0 keeps every inline function as a symbol, which is the case that the tool is for.
    command = ["g++", "-std=c++20", "-O0", "-c", "unit.cpp", "-o", "unit.o"]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    return folder / "unit.o"


def check(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_clean_object_passes(tmp_path: Path) -> None:
    result = check("--isa", "avx2", compile_object(CLEAN, tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 objects (avx2): 0 problems" in result.stdout


@pytest.mark.parametrize("case", BAD)
def test_bad_object_is_named(case: str, tmp_path: Path) -> None:
    source, message = BAD[case]
    result = check("--isa", "avx2", compile_object(source, tmp_path))
    assert result.returncode == 1, result.stdout + result.stderr
    assert message in result.stdout


def test_build_directory_is_searched(tmp_path: Path) -> None:
    folder = tmp_path / "CMakeFiles" / "fastconv_cpu_avx2.dir" / "csrc"
    folder.mkdir(parents=True)
    compile_object(BAD["a C symbol"][0], folder)
    assert check(tmp_path).returncode == 1


def test_empty_build_directory_is_an_error(tmp_path: Path) -> None:
    result = check(tmp_path)
    assert result.returncode == 2
    assert "no object" in result.stderr
