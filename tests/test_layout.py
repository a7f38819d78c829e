"""The house is in order: one table of contents, nobody includes what they should not, no file is too long."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "python" / "fastconv"

# Longest file that anybody has to read.
LINES = 500

# Which rooms of csrc/ a room may include, besides itself.
ROOMS = {
    "bindings.cpp": {"core", "eager"},
    "eager": {"core"},
    "core": {"kernels.def"},
    "cpu/simd": set(),
    "cpu/blocks": {"cpu/simd", "core"},
    "cpu/kernels": {"cpu/blocks", "cpu/simd", "core"},
    "cuda/blocks": {"core"},
    "cuda/kernels": {"cuda/blocks", "core"},
    "cuda/gpu.cpp": {"core"},
}

# An inline function of any other system header, compiled for one ISA, could become the copy that every CPU runs.
ISA_HEADERS = {"cstddef", "cstdint", "immintrin.h"}

# What a module of the package may import: the modules of the lines above its own, and the package's own parts.
LEVELS = [
    {
        "_C",
        "_arguments",
        "_folding",
        "_padding",
        "_reference_attention",
        "_reference_norm",
        "_reference_recurrent",
        "fallback",
    },
    {"_native", "reference"},
    {"_gpu"},
    {"_routes"},
    {"testing", "plan"},
    {"ops", "numpy"},
    {"_attention_heads", "_conv_checks", "_pool_checks"},
    {"_attention", "_batch_norm", "_convolution", "_normalization", "_pooling"},
    {"_attention_lengths", "_fused", "_resolvers", "_same_pooling"},
    {"functional"},
    {"cuda", "nn", "control"},
    {"conversion", "integrations", "models"},
    {"fusion"},
    {"commands"},
    {"bench"},
    {"cli"},
    {"__main__"},
]


def sources(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in suffixes and "__pycache__" not in p.parts)


def rows() -> list[tuple[str, str, str, str]]:
    lines = (CSRC / "kernels.def").read_text().splitlines()
    row = re.compile(r"FC_KERNEL\((\w+), (\w+), (\w+), (\w+)\)(?:\s*//.*)?")
    code = [line for line in lines if line and not line.startswith(("//", "#"))]
    matches = [(line, row.fullmatch(line)) for line in code]
    bad = [line for line, m in matches if m is None]
    assert not bad, f"not a row FC_KERNEL(op, algorithm, dtype, targets): {bad}"
    return [m.groups() for _, m in matches if m is not None]  # type: ignore[misc]


def test_a_row_for_each_file_and_a_file_for_each_row() -> None:
    for folder, suffix in (("cpu", ".cpp"), ("cuda", ".cu")):
        files = {p.name.split(".")[0] for p in sources(CSRC / folder / "kernels", suffix)}
        named = {
            f"{op}_{algorithm}"
            for op, algorithm, _, targets in rows()
            if targets.startswith("SM") == (folder == "cuda")
        }
        assert files - named == set(), f"files of {folder}/kernels without a row in kernels.def"
        assert named - files == set(), f"rows of kernels.def without a file in {folder}/kernels"


def test_no_row_twice() -> None:
    assert len(rows()) == len(set(rows()))


def test_names_of_the_rows_are_the_names_of_the_registry() -> None:
    from fastconv.testing import harness

    registered = {(k.op, k.algorithm, k.dtype) for k in harness.native().kernels()}
    built = ("CPU", "SM80") if harness.native().build()["cuda_architectures"] else ("CPU",)
    assert registered == {row[:3] for row in rows() if row[3] in built}
    for k in harness.native().kernels():
        assert k.name == f"{k.op}.{k.algorithm}.{k.dtype}.{k.target}"


def room_of(path: Path) -> str:
    relative = path.relative_to(CSRC).as_posix()
    return next(room for room in ROOMS if relative == room or relative.startswith(room + "/"))


@pytest.mark.parametrize(
    "path", sources(CSRC, ".h", ".cpp", ".cu", ".cuh"), ids=lambda p: p.relative_to(CSRC).as_posix()
)
def test_who_includes_whom(path: Path) -> None:
    room = room_of(path)
    text = path.read_text()
    for target in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        assert (CSRC / target).exists(), f"{target} is not a path from csrc/"
        allowed = ROOMS[room] | {room}
        if room == "cpu/kernels":
            allowed = ROOMS[room]  # what two kernels share is a block
        assert any(target == a or target.startswith(a + "/") for a in allowed), f"{room} may not include {target}"
    system = set(re.findall(r"^\s*#\s*include\s+<([^>]+)>", text, re.MULTILINE))
    if room.startswith("cpu/"):
        assert system <= ISA_HEADERS, f"objects of one ISA may not include {system - ISA_HEADERS}"
    if room == "core":
        foreign = {h for h in system if re.match(r"immintrin|cuda|torch|ATen|pybind11|Python", h)}
        assert not foreign, f"core knows no SIMD, CUDA, torch or Python, but includes {foreign}"
    if room not in ("bindings.cpp", "eager"):
        assert not any(h.startswith(("pybind11", "Python", "torch")) for h in system)


def imports(path: Path) -> set[str]:
    """Names of the package's own modules (first part) that a file imports, anywhere in it."""
    package = ("fastconv", *path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        found |= {name[1] for name in names if name[0] == "fastconv" and len(name) > 1}
    return found


def level(module: str) -> int:
    return next((i for i, names in enumerate(LEVELS) if module in names), -1)


@pytest.mark.parametrize("path", sources(PACKAGE, ".py"), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_who_imports_whom(path: Path) -> None:
    module = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if module == "__init__":
        return  # the public face reaches everything, lazily
    assert level(module) >= 0, f"{module} has no place in LEVELS"
    modules = {p.stem for p in PACKAGE.iterdir()} | {"_C"}
    for other in (imports(path) & modules) - {module}:
        assert 0 <= level(other) < level(module), f"{path.name} ({module}) may not import {other}"


@pytest.mark.parametrize("path", sources(ROOT / "tests", ".py"), ids=lambda p: p.name)
def test_tests_do_not_import_each_other(path: Path) -> None:
    here = {p.stem for p in sources(ROOT / "tests", ".py")} | {"tests"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            assert node.module.split(".")[0] not in here
        elif isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & here


@pytest.mark.parametrize("folder", ["csrc", "python", "tests"])
def test_no_file_is_too_long(folder: str) -> None:
    files = sources(ROOT / folder, ".h", ".cpp", ".cu", ".cuh", ".py", ".pyi", ".def")
    assert files
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in files}
    long = {name: lines for name, lines in lengths.items() if lines > LINES}
    assert not long, f"more than {LINES} lines: {long}"
