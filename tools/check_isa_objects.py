#!/usr/bin/env python3
"""Checks that objects compiled for one instruction set cannot leak it into the rest of the program.

    check_isa_objects.py BUILD_DIR                 every object of the targets fastconv_cpu_<isa>
    check_isa_objects.py --isa avx512 OBJECT...    these objects

Two things go wrong with such objects (csrc/cpu/kernels/README.md). An inline function that is not unique to the ISA is
a weak symbol; the linker keeps one copy of it for everybody, maybe the one with AVX-512 in it (numpy #25274). And
a constructor of a global runs at import, before anybody has asked what the CPU can do. So: every symbol that an object
defines for others lives in `namespace fastconv::<isa>`, and no object has an `.init_array`. Needs `nm` and `readelf`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# What may stand between _Z and the nested name: local statics (Z), guard variables (GV, GR), vtables and typeinfo (T?).
_PREFIX = r"_Z(?:Z|GV|GR|T[VTIS])*"
_QUALIFIERS = r"[rVK]*[RO]?"
_CONSTRUCTOR_SECTION = re.compile(r"\s(\.(?:preinit_array|init_array|fini_array|ctors|dtors)(?:\.\d+)?)\s")


def _output(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def _demangle(symbol: str) -> str:
    try:
        return _output("c++filt", symbol).strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return symbol


def problems(path: Path, isa: str) -> Iterator[str]:
    """One sentence for each thing in the object file `path` that an object compiled for `isa` must not have."""
    # The mangled name is matched: a demangled template starts with its return type, which would hide where it lives.
    inside = re.compile(rf"{_PREFIX}N{_QUALIFIERS}8fastconv{len(isa)}{re.escape(isa)}")
    for line in _output("nm", "--extern-only", "--defined-only", "--format=posix", path).splitlines():
        symbol, kind = line.split()[:2]
        if not inside.match(symbol):
            strength = "weak" if kind in "vVwWu" else "global"
            yield f"{path}: {strength} symbol outside fastconv::{isa}: {_demangle(symbol)}"
    for section in sorted(set(_CONSTRUCTOR_SECTION.findall(_output("readelf", "--sections", "--wide", path)))):
        yield f"{path}: section {section}: something runs at load, before the CPU is known"


def find_objects(build: Path) -> list[tuple[Path, str]]:
    """The objects of the CMake targets fastconv_cpu_<isa> under `build`, each with its isa."""
    found = []
    for path in sorted(build.rglob("*.o")):
        match = re.search(r"fastconv_cpu_(\w+)\.dir/", path.as_posix())
        if match:
            found.append((path, match[1]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks that objects compiled for one instruction set do not leak it.")
    parser.add_argument("--isa", help="the objects' instruction set; without it the argument is a build directory")
    parser.add_argument("paths", nargs="+", type=Path, help="a build directory, or with --isa object files")
    args = parser.parse_args()

    if args.isa:
        objects = [(path, args.isa) for path in args.paths]
    else:
        objects = [found for path in args.paths for found in find_objects(path)]
    if not objects:
        print("no object of a target fastconv_cpu_<isa> found", file=sys.stderr)
        return 2

    wrong = [problem for path, isa in objects for problem in problems(path, isa)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    isas = sorted({isa for _, isa in objects})
    print(f"{len(objects)} objects ({', '.join(isas)}): {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
