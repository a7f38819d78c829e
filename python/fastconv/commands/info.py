"""Say what was built, what this machine can run, and for each kernel whether it is available here.

This is what to paste into a bug report.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import fastconv
from fastconv.commands.console import print_heading, print_table

if TYPE_CHECKING:
    from fastconv._C import KernelInfo

# fastconv's own three, and those of the OpenMP runtime that torch and fastconv share.
ENVIRONMENT = (
    "FASTCONV_ISA",
    "FASTCONV_FORCE",
    "FASTCONV_LOG",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "OMP_WAIT_POLICY",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
    "OMP_DYNAMIC",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastconv info``."""
    parser.add_argument("--kernels", action="store_true", help="list every kernel by its full name, one to a line")


def run(args: argparse.Namespace) -> int:
    """Print the report. 1 if the compiled module cannot be loaded, with the reason in the report."""
    print_heading("Software")
    print_table(("what", "found"), [[name, found] for name, found in _software().items()])
    print_heading("Environment variables in force")
    in_force = [[name, os.environ[name]] for name in ENVIRONMENT if name in os.environ]
    print_table(("variable", "value"), in_force or [["none of fastconv's or OpenMP's", ""]])
    try:
        build = fastconv.build_info()
    except ImportError as error:
        print_heading(f"Kernels: none, {error}")
        return 1
    machine = build.pop("machine")
    for title, facts in (("Build", build), ("Machine", machine)):
        print_heading(title)
        print_table(("what", "found"), [[name.replace("_", " "), text] for name, text in _readable(facts).items()])
    kernels = fastconv.kernels()
    print_heading(f"Kernels: {sum(kernel.runnable for kernel in kernels)} of {len(kernels)} run here")
    if args.kernels:
        rows = [[k.name, "yes" if k.runnable else "no", f"{k.error_growth:g}", k.why_not] for k in kernels]
        print_table(("kernel", "runs", ">error growth", "why not"), rows)
    else:
        _print_kernels_by_target(kernels)
    return 0


def _print_kernels_by_target(kernels: Sequence[KernelInfo]) -> None:
    """A row for each algorithm and a column for each target with the dtypes that run there; then why others do not."""
    targets = list(dict.fromkeys(kernel.target for kernel in reversed(kernels)))
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for k in kernels:
        by_target = cells.setdefault((k.op, k.algorithm), {target: [] for target in targets})
        by_target[k.target].append(k.dtype if k.runnable else f"({k.dtype})")
    rows = [[f"{op}.{algorithm}", *map(" ".join, row.values())] for (op, algorithm), row in sorted(cells.items())]
    print_table(("kernel", *targets), rows)
    reasons = Counter((kernel.target, kernel.why_not) for kernel in kernels if not kernel.runnable)
    for (target, why_not), count in reasons.items():
        print(f"{count} {target} kernels, in brackets above, do not run here: {why_not}")


def _software() -> dict[str, str]:
    found = {
        "fastconv": fastconv.__version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "NumPy": importlib.metadata.version("numpy"),
    }
    try:
        import torch
    except ImportError as error:
        return {**found, "torch": f"cannot be imported: {error}"}
    return {
        **found,
        "torch": f"{torch.__version__}, built with {'CUDA ' + torch.version.cuda if torch.version.cuda else 'no CUDA'}",
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads(), fastconv uses the same)",
    }


def _readable(facts: Mapping[str, Any]) -> dict[str, str]:
    """Values as text: lists joined, byte counts in KiB, empty ones said to be so."""
    return {
        name.removesuffix("_bytes"): f"{value // 1024} KiB"
        if name.endswith("_bytes")
        else ", ".join(value)
        if isinstance(value, list)
        else str(value).strip() or "none"
        for name, value in facts.items()
    }
