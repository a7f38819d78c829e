"""The CUDA kernels without a GPU: compiled by the host compiler against tests/cuda_emulator, which gives CUDA its meaning.

`build` makes a library of all .cu files and answers with an `Emulator`, which stands in for the compiled module wherever the
harness asks for one (`harness.using`). Needs the sources: a clone, not an installed package.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FLAGS = ("-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-ffp-contract=off")
# Without a sanitizer, kernels call a hook before each access (tests/cuda_emulator/races.h). The emulator itself does not, and
# ThreadSanitizer's library, which has hooks of these names, is not linked.
RACES = "-DFASTCONV_RACES"
HOOKS = ("-fsanitize=thread", "-g1")
OWN = ("-O2",)  # the emulator's own files, which are called at each of them
# As in CMakeLists.txt: null pointers are faults, and objects' sizes redzones, without a check of their own.
SANITIZE = (
    "-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer", "-g1",
)  # fmt: skip

_i64, _i32 = ctypes.c_int64, ctypes.c_int32
_DTYPES = ("f32", "f64", "bf16", "f16")
_MASKS = ("none", "boolean", "additive", "wide")
_ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "sigmoid")


def compiler() -> str | None:
    """The host compiler: CXX, g++ or c++; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++"))), None)


# ---- Problems, as csrc/core/problem.h lays them out -------------------------------------------------------------------------


class _Epilogue(ctypes.Structure):
    _fields_ = (("bias", ctypes.c_bool), ("residual", ctypes.c_bool), ("activation", _i32))


def _numbers(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _i64) for name in names)


class _Conv2d(ctypes.Structure):
    _fields_ = (
        ("dtype", _i32),
        *_numbers("N", "C", "H", "W", "K", "R", "S", "P", "Q", "groups"),
        *_numbers("stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w"),
        ("x", _i64 * 4),
        ("w", _i64 * 5),
        ("y", _i64 * 4),
        ("epilogue", _Epilogue),
        ("frozen", ctypes.c_bool),
    )


class _Pool2d(ctypes.Structure):
    _fields_ = (
        ("dtype", _i32),
        *_numbers("N", "C", "H", "W", "P", "Q", "R", "S", "stride_h", "stride_w"),
        *_numbers("pad_top", "pad_bottom", "pad_left", "pad_right", "dilation_h", "dilation_w", "divisor_override"),
        ("count_include_pad", ctypes.c_bool),
        ("adaptive", ctypes.c_bool),
        ("x", _i64 * 4),
        ("y", _i64 * 4),
    )


class _RelativeBias(ctypes.Structure):
    _fields_ = (("given", ctypes.c_bool), *_numbers("b", "h", "distance"))


class _Dropout(ctypes.Structure):
    _fields_ = (("p", ctypes.c_double), ("key", _i64))


class _Sdpa(ctypes.Structure):
    _fields_ = (
        ("dtype", _i32),
        *_numbers("B", "Hq", "Hkv", "Lq", "Lkv", "D", "Dv"),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("mask_kind", _i32),
        ("bias", _RelativeBias),
        ("band", _i64 * 2),
        ("dropout", _Dropout),
        ("strides", _i64 * 4 * 5),
        ("gradient_strides", _i64 * 4 * 4),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("dtype", _i32), *_numbers("N", "C"), ("eps", ctypes.c_double))


def _conv2d(
    *, dtype: str, stride: Sequence[int], pad: Sequence[int], dilation: Sequence[int], x: Sequence[int], w: Sequence[int],
    y: Sequence[int], bias: bool = False, residual: bool = False, activation: str = "none", frozen: bool = False, **sizes: int,
) -> _Conv2d:  # fmt: skip
    return _Conv2d(
        dtype=_DTYPES.index(dtype), **sizes, stride_h=stride[0], stride_w=stride[1], pad_top=pad[0], pad_left=pad[1],
        dilation_h=dilation[0], dilation_w=dilation[1], x=tuple(x), w=tuple(w), y=tuple(y),
        epilogue=_Epilogue(bias, residual, _ACTIVATIONS.index(activation)), frozen=frozen,
    )  # fmt: skip


def _pool2d(
    *, dtype: str, stride: Sequence[int], pad: Sequence[int], dilation: Sequence[int], x: Sequence[int], y: Sequence[int],
    **rest: int,
) -> _Pool2d:  # fmt: skip
    return _Pool2d(
        dtype=_DTYPES.index(dtype), **rest, stride_h=stride[0], stride_w=stride[1], pad_top=pad[0], pad_bottom=pad[1],
        pad_left=pad[2], pad_right=pad[3], dilation_h=dilation[0], dilation_w=dilation[1], x=tuple(x), y=tuple(y),
    )  # fmt: skip


def _sdpa(
    *, dtype: str, band: Sequence[int], strides: Sequence[Sequence[int]], softcap: float = 0.0, mask_kind: str = "none",
    dropout: float = 0.0, key: int = 0, gradient_strides: Sequence[Sequence[int]] = ((0,) * 4,) * 4,
    bias: Sequence[int] | None = None, **rest: Any,
) -> _Sdpa:  # fmt: skip
    def fours(found: Sequence[Sequence[int]]) -> Any:
        return (_i64 * 4 * len(found))(*((_i64 * 4)(*four) for four in found))

    return _Sdpa(
        dtype=_DTYPES.index(dtype), **rest, softcap=softcap, mask_kind=_MASKS.index(mask_kind),
        bias=_RelativeBias(bias is not None, *(bias or (0, 0, 0))), band=tuple(band), dropout=_Dropout(dropout, key),
        strides=fours(strides), gradient_strides=fours(gradient_strides),
    )  # fmt: skip


def _norm(*, dtype: str, N: int, C: int, eps: float) -> _Norm:
    return _Norm(dtype=_DTYPES.index(dtype), N=N, C=C, eps=eps)


# ---- The module -------------------------------------------------------------------------------------------------------------


class EmulatorError(AssertionError):
    """A kernel did what would hang or be undefined on a GPU."""


class _Plan:
    """What `_C.Plan` is: one kernel on one problem."""

    def __init__(self, emulator: Emulator, row: int, problem: Any) -> None:
        self._emulator, self._row, self._problem = emulator, row, problem
        self.kernel = emulator.names[row]
        self.packed = 0, 0
        self.workspace: int = emulator.library.emulator_workspace(row, ctypes.byref(problem))

    def _run(self, workspace: int, *addresses: int) -> None:
        args = (ctypes.c_void_p * len(addresses))(*addresses)
        error = self._emulator.library.emulator_run(
            self._row, ctypes.byref(self._problem), args, workspace, self._emulator.seed
        )
        if error:
            raise EmulatorError(f"{self.kernel}: {_with_lines(error.decode(), self._emulator.path)}")

    def run_conv2d(
        self, x: int, w: int, bias: int, residual: int, y: int, packed: int = 0, workspace: int = 0, stream: int = 0
    ) -> None:
        self._run(workspace, x, w, bias, residual, y, packed)

    def run_pool2d(self, x: int, y: int, indices: int, workspace: int = 0, stream: int = 0) -> None:
        self._run(workspace, x, y, indices)

    def run_sdpa(self, addresses: Sequence[int], workspace: int = 0, stream: int = 0) -> None:
        self._run(workspace, *addresses)

    run_norm = run_sdpa


class Emulator:
    """Answers what the harness asks of the compiled module, for the kernels whose target is sm80.

    `seed` draws who runs next between barriers.
    """

    Conv2dProblem = staticmethod(_conv2d)
    Pool2dProblem = staticmethod(_pool2d)
    SdpaProblem = staticmethod(_sdpa)
    NormProblem = staticmethod(_norm)

    def __init__(self, path: Path, seed: int = 0) -> None:
        self.path = path
        self.library: Any = ctypes.CDLL(str(path))
        self.seed = seed
        for name, result in (
            ("name", ctypes.c_char_p), ("reject", ctypes.c_char_p), ("run", ctypes.c_char_p), ("cost", ctypes.c_double),
            ("growth", ctypes.c_double), ("workspace", _i64), ("size", _i64), ("copies", ctypes.c_uint64),
        ):  # fmt: skip
            getattr(self.library, f"emulator_{name}").restype = result
        self.library.emulator_run.argtypes = (ctypes.c_int, *(ctypes.c_void_p,) * 3, ctypes.c_uint64)
        structures = {b"conv2d": _Conv2d, b"pool2d": _Pool2d, b"sdpa": _Sdpa, b"norm": _Norm}
        for problem, structure in structures.items():
            if self.library.emulator_size(problem) != ctypes.sizeof(structure):
                raise RuntimeError(
                    f"{structure.__name__} is not laid out as core/problem.h's {problem.decode()} problem"
                )
        self.names: list[str] = [self.library.emulator_name(i).decode() for i in range(self.library.emulator_count())]

    @property
    def copies(self) -> int:
        """Asynchronous copies of 16 bytes that the last run started: none where operands are gathered element by element."""
        return int(self.library.emulator_copies())

    def kernels(self) -> list[Any]:
        fields = ("op", "algorithm", "dtype", "target")
        return [
            SimpleNamespace(
                name=name, **dict(zip(fields, name.split("."), strict=True)), runnable=True, why_not="",
                error_growth=self.library.emulator_growth(row),
            )
            for row, name in enumerate(self.names)
        ]  # fmt: skip

    def explain(
        self, op: str, problem: Any, force: str = "", strict: bool = False, device: int = 0
    ) -> list[tuple[str, str, float]]:
        if device < 0:
            raise AssertionError(
                f"{op} of operands on the CPU came to the emulated GPU, whose plan would be remembered for it"
            )
        found = []
        for row, name in enumerate(self.names):
            if name.startswith(f"{op}.") and name.split(".")[2] == _DTYPES[problem.dtype]:
                reason = self.library.emulator_reject(row, ctypes.byref(problem))
                if force not in ("", name, *name.split(".")[1::2]):
                    reason = f"not the forced '{force}'".encode()
                elif strict and self.library.emulator_growth(row) > 1:
                    reason = b"asked for strict accuracy"
                cost = float("inf") if reason else self.library.emulator_cost(row, ctypes.byref(problem))
                found.append((name, (reason or b"").decode(), cost))
        return found

    def plan(self, op: str, problem: Any, threads: int, force: str, strict: bool = False, device: int = 0) -> _Plan:
        name, verdict, _ = min(self.explain(op, problem, force, strict, device), key=lambda row: row[2])
        if verdict:
            raise NotImplementedError(f"{name}: {verdict}")
        return _Plan(self, self.names.index(name), problem)


def _with_lines(text: str, library: Path) -> str:
    """The text with lines of kernels for addresses in the library, @0x…, where binutils are at hand."""
    tool = shutil.which("addr2line")
    if tool is None:
        return text

    def lines(address: re.Match[str]) -> str:
        words = [tool, "-i", "-e", str(library), address[1]]
        found = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split("\n")
        # From the innermost function that was inlined to the kernel.
        frames = [Path(line.split(" ")[0]).name for line in found if "/csrc/cuda/" in line]
        return " < ".join(frames) or address[0]

    return re.sub(r"@(0x[0-9a-f]+)", lines, text)


# ---- Building ---------------------------------------------------------------------------------------------------------------


def build(
    root: Path, cache: Path, *, sanitize: bool = False, edits: Mapping[str, tuple[str, ...]] | None = None, only: str = ""
) -> Path:  # fmt: skip
    """The library of all CUDA kernels under `root`, built in `cache` where it is not there yet.

    `edits` breaks kernels on purpose: {path below root: (text, replacement, text, ...)}, applied to copies, and seen by the
    kernel `only` ("op.algorithm"; by all without it). Raises RuntimeError with the compiler's words where it fails, and
    ValueError where a text to replace is not there exactly once.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("no host compiler")
    flags = [command, *FLAGS, *(SANITIZE if sanitize else (RACES,))]
    sources = sorted((root / "csrc/cuda/kernels").glob("*.cu")) + sorted((root / "tests/cuda_emulator").glob("*.cpp"))
    headers = [
        p for folder in ("csrc/core", "csrc/cuda/blocks", "tests/cuda_emulator") for p in (root / folder).glob("*.h")
    ]
    plain = _digest(
        repr((flags, HOOKS, OWN)).encode(), *(p.read_bytes() for p in sorted([*headers, root / "csrc/kernels.def"]))
    )
    cache.mkdir(parents=True, exist_ok=True)
    changed = {path: _edited(root / path, *edit) for path, edit in (edits or {}).items()}
    overlay = cache / f"edited-{_digest(repr(sorted(changed.items())).encode())}"
    for path, text in changed.items():
        (overlay / path).parent.mkdir(parents=True, exist_ok=True)
        (overlay / path).write_text(text)

    def compile_one(source: Path) -> Path:
        relative = source.relative_to(root).as_posix()
        edited = bool(changed) and only.replace(".", "_") in ("", source.stem)
        roots = [overlay, root] if edited else [root]
        key = _digest(plain.encode(), repr(sorted(changed.items()) if edited else "").encode(), source.read_bytes())
        made = cache / f"{source.stem}-{key}.o"
        place = overlay / relative if edited and relative in changed else source
        includes = [f"-I{base / folder}" for base in roots for folder in ("tests/cuda_emulator", "csrc")]
        extra = () if sanitize else HOOKS if source.suffix == ".cu" else OWN
        _make(made, *flags, *extra, *includes, "-x", "c++", "-c", str(place))
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = cache / f"emulator-{_digest(*(p.name.encode() for p in objects))}.so"
    _make(library, *flags, "-shared", *map(str, objects))
    return library


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _edited(path: Path, *texts: str) -> str:
    source = path.read_text()
    for text, replacement in zip(texts[::2], texts[1::2], strict=True):
        if source.count(text) != 1:
            raise ValueError(f"{path.name}: {text!r} is there {source.count(text)} times, expected once")
        source = source.replace(text, replacement)
    return source


def _make(made: Path, *command: str) -> None:
    """Runs the command for a file that is not there. One process does while others that want the same file wait for it."""
    with made.with_suffix(f"{made.suffix}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _run(*command, made=made)


def _run(*command: str, made: Path) -> None:
    draft = made.with_suffix(f".draft{made.suffix}")  # a build that is killed leaves no half of a file under its name
    # A sanitizer that this process runs under is none of the compiler's business.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([*command, "-o", str(draft)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    draft.rename(made)
