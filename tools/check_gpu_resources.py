#!/usr/bin/env python3
"""Checks that no CUDA kernel of a build spills registers to memory.

    check_gpu_resources.py BUILD_DIR      every OBJECT.resources that the build has left (cmake/collect_resources.py)

Tiles are chosen so that their sums stay in registers; one that does not fit is slow without being wrong, so nothing else would
notice. Prints the kernels with the most registers, and each that spills with the GPU it is compiled for.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_FUNCTION = re.compile(r"Function properties for (\S+)")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass
class Function:
    """A kernel, or a function that kernels call, for one GPU."""

    name: str
    gpu: str
    stack: int
    spilled: int  # bytes stored and loaded
    registers: int = 0


def functions(text: str) -> Iterator[Function]:
    """What ptxas -v says, function by function."""
    gpu, name, found = "", "", None
    for line in text.splitlines():
        if entry := _ENTRY.search(line):
            gpu = entry[2]
        elif function := _FUNCTION.search(line):
            name = function[1]
        elif memory := _MEMORY.search(line):
            stack, stores, loads = map(int, memory.groups())
            found = Function(name, gpu, stack, stores + loads)
            yield found
        elif (registers := _REGISTERS.search(line)) and found:
            found.registers = int(registers[1])


def _demangled(name: str) -> str:
    try:
        done = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return name
    return done.stdout.strip().replace("fastconv::sm80::(anonymous namespace)::", "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="folder of the build")
    build = parser.parse_args(arguments).build
    files = sorted(build.rglob("*.resources"))
    if not files:
        print(f"{build}: no CUDA kernel was compiled here")
        return 0
    found = [function for file in files for function in functions(file.read_text())]
    if not found:
        print(f"{build}: {len(files)} files about CUDA kernels, and none of them says anything")
        return 1
    for function in sorted(found, key=lambda f: -f.registers)[:5]:
        print(f"{function.registers:4d} registers  {function.gpu}  {_demangled(function.name)}")
    spilling = [function for function in found if function.spilled]
    for function in spilling:
        print(f"spills {function.spilled} bytes  {function.gpu}  {_demangled(function.name)}")
    print(f"{len(found)} functions for {len({f.gpu for f in found})} GPUs, {len(spilling)} of them spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
