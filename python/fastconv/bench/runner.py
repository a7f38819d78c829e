"""One match: fastconv and its peers on one case, checked, timed against each other, and written down as plain data."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastconv
from fastconv.bench import peaks
from fastconv.bench.cases import Call, Case
from fastconv.bench.memory import peak_bytes
from fastconv.plan import observe
from fastconv.testing.timing import Contestant, Probe, Protocol, Samples, describe, interleave

PEERS = {
    "torch": "nchw",
    "torch_channels_last": "nhwc",
    "torch_math": "nchw",
    "compile": "nhwc",
    "openvino": "nchw",
    "onnxruntime": "nchw",
}
"""Peers and the layout each is given; engines choose their own inside."""

EAGER = ("torch", "torch_channels_last")
"""What "the better of torch's two formats" chooses from."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is timed for each case.

    ``algorithms`` holds ``auto``, names, or ``all``; ``isas`` holds ``auto`` or names of targets.
    """

    threads: tuple[int, ...] = (1,)
    layouts: tuple[str, ...] = ("nchw", "nhwc")
    algorithms: tuple[str, ...] = ("auto",)
    isas: tuple[str, ...] = ("auto",)
    peers: tuple[str, ...] = EAGER
    protocol: Protocol = field(default_factory=Protocol)


@dataclass
class _Entry:
    record: Record
    call: Call
    forced: dict[str, str]
    grad: bool
    first: Tensor | None = None

    @property
    def name(self) -> str:
        r = self.record
        return " ".join(
            str(r[key]) for key in ("who", "layout", "threads", "isa", "algorithm") if r.get(key) is not None
        )

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """The thread count, grad mode and forced kernels of this contestant."""
        before = torch.get_num_threads()
        with ExitStack() as stack:
            torch.set_num_threads(self.record["threads"])
            stack.callback(torch.set_num_threads, before)
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.forced:
                stack.enter_context(fastconv.use(**self.forced))
            yield


def run(case: Case, settings: Settings) -> Record:
    """Checks, times, checks again. The result is JSON: see ``schema.py`` for its fields."""
    if "compile" in settings.peers:
        torch._dynamo.reset()
    records: list[Record] = []
    entries: list[_Entry] = []
    for record, forced in _line_up(case, settings):
        records.append(record)
        try:
            entries.append(_enter(case, record, forced))
        except Exception as error:
            _fail(record, "failed", describe(error))
    entries = [entry for entry in entries if _check_first(case, entry)]
    _bound_errors(case, records)
    entries = [entry for entry in entries if entry.record["status"] == "ok"]
    for entry in entries if case.measures_memory else ():
        with entry.conditions():
            entry.record["peak_bytes"] = peak_bytes(entry.call)
    contestants = [Contestant(entry.name, entry.call, entry.conditions) for entry in entries]
    probes = _probes(case, settings, records)
    samples = interleave(contestants, [probe for probe, _ in probes], settings.protocol)
    for entry in entries:
        _write_samples(entry.record, samples[entry.name])
        if entry.record["status"] in ("ok", "noisy"):
            _check_again(case, entry)
    result: Record = {
        "op": case.op,
        "direction": case.direction,
        "shape": case.name,
        "dtype": case.dtype,
        "family": case.family,
        "labels": case.labels,
        "count": case.count,
        "recorded": case.records_gradient,
        "flops": case.flops,
        "bytes": case.moved,
        "probes": [facts | _probe_values(samples[probe.name]) for probe, facts in probes],
        "contestants": records,
    }
    derive(result)
    return result


def _line_up(case: Case, settings: Settings) -> Iterator[tuple[Record, dict[str, str]]]:
    for threads in settings.threads:
        for peer in settings.peers:
            if PEERS[peer] in case.layouts or peer == "compile":
                yield (_record(peer, PEERS[peer] if PEERS[peer] in case.layouts else case.layouts[0], threads), {})
        for layout in (layout for layout in settings.layouts if layout in case.layouts):
            for isa in settings.isas:
                for algorithm in _algorithms(case, settings, isa):
                    record = _record("fastconv", layout, threads) | {"isa": isa, "algorithm": algorithm}
                    yield record, _forced(case, isa, algorithm)


def _record(who: str, layout: str, threads: int) -> Record:
    return {"who": who, "layout": layout, "threads": threads, "status": "ok", "reason": ""}


def _algorithms(case: Case, settings: Settings, isa: str) -> list[str]:
    names = [name for name in settings.algorithms if name != "all"]
    if "all" in settings.algorithms:
        target = widest_isa(case) if isa == "auto" else isa
        names += [
            k.algorithm
            for k in fastconv.kernels()
            if k.op in case.kernel_ops and k.dtype == case.dtype and k.target == target and k.algorithm not in names
        ]
    return list(dict.fromkeys(names))


def _forced(case: Case, isa: str, algorithm: str) -> dict[str, str]:
    if algorithm == "auto":
        return {} if isa == "auto" else dict.fromkeys(case.kernel_ops, isa)
    if isa == "auto" or "." in algorithm:
        return dict.fromkeys(case.kernel_ops, algorithm)
    return {op: f"{op}.{algorithm}.{case.dtype}.{isa}" for op in case.kernel_ops}


def widest_isa(case: Case) -> str:
    """The last target that runs here and has kernels of the case's kind."""
    served = {k.target for k in fastconv.kernels() if k.op in case.kernel_ops and k.dtype == case.dtype}
    return _last(served)


def _last(some: Container[str]) -> str:
    targets: list[str] = fastconv._C.machine()["isa"]
    return next((target for target in reversed(targets) if target in some), targets[0])


def _enter(case: Case, record: Record, forced: dict[str, str]) -> _Entry:
    layout = record["layout"]
    if record["who"] == "fastconv":
        call = case.fastconv_call(layout)
    elif record["who"] == "compile":
        call = case.compiled_call(layout)
    elif record["who"] == "torch_math":
        call = case.math_call(layout)
    elif record["who"] not in EAGER:
        call = case.engine_call(record["who"], record["threads"])
    else:
        call = case.torch_call(layout)
    return _Entry(record, call, forced, case.records_gradient)


def _check_first(case: Case, entry: _Entry) -> bool:
    """Runs the contestant once: which kernels answer, and how far from the truth. False if it cannot run."""
    record, before = entry.record, fastconv.fallback_counts()
    try:
        with entry.conditions(), observe() as observed:
            entry.first = case.checked(entry.call).detach()
        record["error"] = error_of(entry.first, case.truth)
    except Exception as error:
        fell_back = fastconv.fallback_counts() != before
        declined = isinstance(error, NotImplementedError) and entry.forced and not fell_back
        _fail(record, "declined" if declined else "failed", describe(error))
        return False
    if record["who"] != "fastconv":
        return True
    record["kernel"] = " + ".join(dict.fromkeys(seen.kernel for seen in observed))
    if fastconv.fallback_counts() != before:
        _fail(record, "failed", "fell back to torch")
    elif not observed:
        _fail(record, "failed", "no fastconv kernel ran")
    return bool(record["status"] == "ok")


def error_of(result: Tensor, truth: Tensor) -> Record:
    """Relative L2 error, and the largest error in units of the truth's root mean square."""
    if result.shape != truth.shape:
        raise ValueError(f"the result has shape {tuple(result.shape)}, expected {tuple(truth.shape)}")
    difference = result.double() - truth
    scale = float(truth.norm()) or 1.0
    root_mean_square = scale / math.sqrt(max(1, truth.numel()))
    return {"rel_l2": float(difference.norm()) / scale, "max": float(difference.abs().max()) / root_mean_square}


def _bound_errors(case: Case, records: Sequence[Record]) -> None:
    """Voids what is wrong, and says how each error compares with torch's in the same layout."""
    growth = {kernel.name: kernel.error_growth for kernel in fastconv.kernels()}
    for record in records:
        if "error" not in record:
            continue
        error, torch_errors = record["error"], _torch_errors(record, records)
        peer = torch_errors.get(record["layout"], max(torch_errors.values(), default=0.0))
        bound = case.allowed_error(list(torch_errors.values()))
        if record["who"] == "fastconv":
            bound *= max((1.0, *(growth.get(name, 1.0) for name in record["kernel"].split(" + "))))
            error["ratio_to_torch"] = error["rel_l2"] / peer if peer > 0 else None
        error["bound"] = bound
        # Numbers of very different sizes: a causal query that sees one key has a result twenty times as large as one that sees a
        # thousand, and half of its last place in bf16 is more than every other error. Torch's result has it too.
        largest = max(case.max_over_l2 * bound, 2 * max(_largest_torch_errors(record, records), default=0.0))
        if not (error["rel_l2"] <= bound and error["max"] <= largest):
            _fail(record, "void", f"wrong result: relative L2 error {error['rel_l2']:.1e}, allowed {bound:.1e}")
        # JSON has no NaN.
        record["error"] = {key: v if v is None or math.isfinite(v) else None for key, v in error.items()}


def _largest_torch_errors(record: Record, records: Sequence[Record]) -> list[float]:
    return [
        float(other["error"]["max"])
        for other in records
        if other["who"] in EAGER
        and other["threads"] == record["threads"]
        and other.get("error", {}).get("max") is not None
    ]


def _torch_errors(record: Record, records: Sequence[Record]) -> dict[str, float]:
    """torch's errors by layout, on this row's number of threads."""
    return {
        other["layout"]: float(other["error"]["rel_l2"])
        for other in records
        if other["who"] in EAGER
        and other["threads"] == record["threads"]
        and other.get("error", {}).get("rel_l2") is not None
    }


def _probes(case: Case, settings: Settings, records: Sequence[Record]) -> list[tuple[Probe, Record]]:
    found: list[tuple[Probe, Record]] = []
    for threads in settings.threads:
        for isa in sorted({widest_isa(case) if name == "auto" else name for name in settings.isas}):
            if case.flops and isa in fastconv._C.machine()["isa"]:
                found.append((peaks.fma_probe(isa, case.dtype, threads), _fact("fma", threads) | {"target": isa}))
        if case.may_wait_for_memory:
            found.append((peaks.copy_probe(case.moved, threads), _fact("copy", threads) | {"bytes": case.moved}))
    return found


def _fact(kind: str, threads: int) -> Record:
    return {"kind": kind, "threads": threads}


def _probe_values(samples: Samples) -> Record:
    return {"samples": samples.values, "median": samples.median if samples.values else None, "error": samples.error}


def _write_samples(record: Record, samples: Samples) -> None:
    if samples.error:
        _fail(record, "failed", samples.error)
        return
    record |= {
        "inner": samples.inner,
        "samples_s": [float(f"{seconds:.6g}") for seconds in samples.values],
        "median_s": samples.median,
        "iqr_share": samples.iqr_share,
        "min_s": samples.minimum,
    }
    if samples.noisy:
        record |= {"status": "noisy", "reason": f"interquartile range is {samples.iqr_share:.0%} of the median"}


def _check_again(case: Case, entry: _Entry) -> None:
    """After the timing: a repeatable contestant of ours still gives the bits it gave before."""
    if entry.record["who"] != "fastconv" or not case.repeatable:
        return
    with entry.conditions():
        again = case.checked(entry.call)
    if entry.first is None or not torch.equal(again, entry.first):
        _fail(entry.record, "void", "the result's bits changed while it was timed")


def _fail(record: Record, status: str, reason: str) -> None:
    """Marks a row and takes its times away, so that no summary can count them."""
    record |= {"status": status, "reason": reason}
    for key in ("samples_s", "median_s", "iqr_share", "min_s", "inner"):
        record.pop(key, None)


def derive(result: Record) -> None:
    """Adds rates and ratios to fastconv's timed rows: everything in them can be computed again from the raw samples."""
    probes = {(probe["kind"], probe["threads"], probe.get("target")): probe["median"] for probe in result["probes"]}
    peers = [c for c in result["contestants"] if c["who"] != "fastconv" and "median_s" in c]
    for row in result["contestants"]:
        if "median_s" not in row:
            continue
        seconds = row["median_s"]
        row["gflops"] = result["flops"] / seconds * 1e-9 if result["flops"] else None
        row["gbs"] = result["bytes"] / seconds * 1e-9 if result["bytes"] else None
        isa = row.get("isa", "auto")
        measured = {target for kind, threads, target in probes if (kind, threads) == ("fma", row["threads"])}
        peak = probes.get(("fma", row["threads"], _last(measured) if isa == "auto" else isa))
        copy = probes.get(("copy", row["threads"], None))
        row["peak_share"] = row["gflops"] / peak if peak and row["gflops"] else None
        row["copy_share"] = row["gbs"] / copy if copy and row["gbs"] else None
        if row["who"] != "fastconv":
            continue
        ratios = {peer["who"]: peer["median_s"] / seconds for peer in peers if peer["threads"] == row["threads"]}
        row["ratios"] = ratios
        row["best_torch"] = min((ratios[name] for name in EAGER if name in ratios), default=None)
