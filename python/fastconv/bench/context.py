"""Where and with what a run was made: all that a reader needs to judge its figures, and no name of host or path."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastconv

# Variables that change how fast torch or fastconv runs.
_RELEVANT = (
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "ONEDNN_",
    "DNNL_",
    "ATEN_",
    "FASTCONV_",
    "TORCHINDUCTOR_",
    "MALLOC_",
    "LD_PRELOAD",
)
# A word with two slashes, or one that begins with a slash; "GNU/Linux" is neither.
_PATH = re.compile(r"""[^\s"'=:,;]*/[^\s"'=:,;]*/([^\s"'=:,;/]*)|(?<![^\s"'=:,;])[.~]*/([^\s"'=:,;/]*)""")


def without_paths(text: str) -> str:
    """``text`` with each path cut to its last part."""
    return _PATH.sub(lambda match: match[1] or match[2] or "", text)


def collect(command: Sequence[str], seed: int) -> dict[str, Any]:
    """The context of a run that starts now; ``finish`` adds what is known when it ends."""
    build = fastconv._C.build()
    machine = dict(fastconv._C.machine())
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": without_paths("fastconv bench " + " ".join(command)),
        "seed": seed,
        "git": _git(),
        "versions": {
            "fastconv": str(build.get("version", "")),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "build": {key: without_paths(value) if isinstance(value, str) else value for key, value in build.items()},
        "torch": {
            "parallel_info": without_paths(torch.__config__.parallel_info()),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cpu": machine | _cpu_state(),
        "environment": {k: without_paths(v) for k, v in sorted(os.environ.items()) if k.startswith(_RELEVANT)},
        "load_before": _load(),
    }


def finish(context: dict[str, Any]) -> None:
    """Adds the load at the end of the run."""
    context["load_after"] = _load()


def warnings(context: dict[str, Any], threads: Sequence[int]) -> list[str]:
    """Sentences on what may spoil this run's figures."""
    cpu, found = context["cpu"], []
    load = context["load_before"]
    if load is not None and load > 0.25 * cpu["usable_cores"]:
        found.append(f"the machine is busy: load average {load:.2f} on {cpu['usable_cores']} cores")
    if cpu["governor"] not in (None, "performance"):
        found.append(f"the frequency governor is {cpu['governor']}, not performance")
    if cpu["smt"]:
        found.append("hyper-threading is on: neighbours on the same core slow a row down")
    if max(threads) > cpu["usable_cores"]:
        found.append(f"{max(threads)} threads were asked for, this process may use {cpu['usable_cores']} cores")
    if cpu["cgroup_quota"]:
        found.append(f"a cgroup limits this process to {cpu['cgroup_quota']:g} cores")
    return found


def _cpu_state() -> dict[str, Any]:
    quota = (_read("/sys/fs/cgroup/cpu.max") or "").split()
    return {
        "usable_cores": len(os.sched_getaffinity(0)),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "smt": _read("/sys/devices/system/cpu/smt/active") == "1",
        "cgroup_quota": int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0].isdigit() else None,
    }


def _git() -> dict[str, Any] | None:
    """Commit of the source tree this package, or else the current folder, lies in; None outside of one."""
    for folder in (Path(__file__).resolve().parent, Path.cwd()):
        try:
            root = Path(_run_git(folder, "rev-parse", "--show-toplevel"))
            if (root / "csrc" / "kernels.def").is_file():
                return {
                    "sha": _run_git(root, "rev-parse", "HEAD"),
                    "dirty": bool(_run_git(root, "status", "--porcelain")),
                }
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _run_git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None
