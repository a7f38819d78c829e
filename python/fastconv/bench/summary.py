"""From results to figures: rows, groups, and the layers that lost. Works on the JSON alone, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fastconv.testing.timing import geometric_mean

Record = dict[str, Any]

TIMED = ("ok", "noisy")
"""States of a row whose figures count. The others: ``void`` (wrong result), ``failed`` (raised, or fell back to torch),
``declined`` (the kernel that was asked for does not take this problem)."""


@dataclass(frozen=True)
class Row:
    """One fastconv contestant of one match."""

    match: Record
    entry: Record

    @property
    def ok(self) -> bool:
        return self.entry["status"] in TIMED

    @property
    def run(self) -> str:
        """What asked for this row: a model and its batch, an op, or ``call``."""
        return str(self.match["run"])

    @property
    def direction(self) -> str:
        return str(self.match["direction"])

    @property
    def algorithm(self) -> str:
        return str(self.entry["algorithm"])

    @property
    def layout(self) -> str:
        """``nchw`` or ``nhwc``; empty for a Linear, attention and layer norm, which have but one."""
        return "" if self.match["op"] in ("linear", "sdpa", "layer_norm") else str(self.entry["layout"])

    @property
    def threads(self) -> int:
        return int(self.entry["threads"])

    @property
    def isa(self) -> str:
        return str(self.entry["isa"])

    @property
    def variant(self) -> tuple[int, str, str, str]:
        """Threads, layout, ISA and algorithm, which tell the rows of one match apart."""
        return self.threads, self.layout, self.isa, self.algorithm

    @property
    def kernel(self) -> str:
        """The kernel's name without its op and dtype, ``implicit_gemm.avx512``; several are joined by +."""
        names = [name.split(".") for name in self.entry.get("kernel", "").split(" + ") if name]
        return (
            "+".join(dict.fromkeys(f"{name[1]}.{name[3]}" for name in names))
            if len(names) < 3
            else f"{len(names)} kernels"
        )

    @property
    def bound_share(self) -> float | None:
        """Share of the tighter of the two ceilings measured beside this row: of the FMA peak, or of a copy of as many bytes.

        Either ceiling alone would allow a shorter time than both together do, so the larger share is the one that counts.
        """
        shares = [share for share in (self.entry.get("peak_share"), self.entry.get("copy_share")) if share is not None]
        return max(shares, default=None)

    @property
    def waits_for_memory(self) -> bool:
        """Whether the copy is the tighter ceiling."""
        return self.bound_share is not None and self.bound_share == self.entry.get("copy_share")

    @property
    def noisy(self) -> bool:
        """Whether this row moved by more than 10 % while it was timed, or torch's that its ratio divides by."""
        return str(self.entry["status"]) == "noisy" or self._beside("torch", "torch_channels_last").get("noisy", False)

    def noisy_beside(self, who: str) -> bool:
        """Whether the ratio to this peer is of two times of which one moved by more than 10 %."""
        return str(self.entry["status"]) == "noisy" or self._beside(who).get("noisy", False)

    def _beside(self, *who: str) -> Record:
        """Median and noise of the fastest of these peers on as many threads; empty if none was timed."""
        peers = [
            c
            for c in self.match["contestants"]
            if c["who"] in who and c["threads"] == self.threads and c["status"] in TIMED
        ]
        best = min(peers, key=lambda peer: float(peer["median_s"]), default=None)
        return {} if best is None else {"median_s": best["median_s"], "noisy": best["status"] == "noisy"}

    @property
    def best_torch(self) -> float | None:
        ratio: float | None = self.entry.get("best_torch")
        return ratio


def rows(document: Record) -> list[Row]:
    """All of fastconv's rows, in the order they were run."""
    return [
        Row(match, entry)
        for match in document["results"]
        for entry in match["contestants"]
        if entry["who"] == "fastconv"
    ]


@dataclass(frozen=True)
class Group:
    """Figures of some rows. Ratios are torch's better time divided by fastconv's; NaN where torch was not timed.

    ``bound_shares`` are of the tighter ceiling of each row; ``by_bytes`` says that it is the copy for all of them.
    """

    distinct: int
    count: int
    mean: float
    lowest: float
    lowest_noisy: bool
    slower: int
    slower_count: int
    bound_shares: tuple[float, ...]
    by_bytes: bool
    total_s: float
    torch_s: float
    noisy: int
    invalid: int


def group(members: Iterable[Row]) -> Group:
    """Sums up rows. A layer that a model has five times counts five times, but for ``distinct`` and ``slower``."""
    members = list(members)
    timed = [row for row in members if row.ok]
    compared = [(row.best_torch, int(row.match["count"]), row) for row in timed if row.best_torch is not None]
    ratios, counts = [ratio for ratio, _, _ in compared], [count for _, count, _ in compared]
    slower = [count for ratio, count, _ in compared if ratio < 1]
    return Group(
        distinct=len(timed),
        count=sum(int(row.match["count"]) for row in timed),
        mean=geometric_mean(ratios, counts),
        lowest=min(ratios, default=math.nan),
        lowest_noisy=bool(compared) and min(compared, key=lambda found: found[0])[2].noisy,
        slower=len(slower),
        slower_count=sum(slower),
        bound_shares=_present(row.bound_share for row in timed),
        by_bytes=bool(timed) and all(row.waits_for_memory for row in timed),
        total_s=sum(row.match["count"] * row.entry["median_s"] for row in timed),
        torch_s=sum(count * ratio * row.entry["median_s"] for ratio, count, row in compared) or math.nan,
        noisy=sum(row.noisy for row in timed),
        invalid=sum(row.entry["status"] in ("void", "failed") for row in members),
    )


def grouped(members: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by key, keys in order of appearance."""
    found: dict[Any, list[Row]] = {}
    for row in members:
        found.setdefault(key(row), []).append(row)
    return found


def by_layout(members: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by layout. A Linear counts in each, so that each holds the whole of a network."""
    members = list(members)
    layouts = [row.layout for row in members if row.layout] or [""]
    return {layout: [row for row in members if row.layout in (layout, "")] for layout in dict.fromkeys(layouts)}


def losses(members: Iterable[Row]) -> list[Row]:
    """Rows of fastconv's own choice that torch's better format beats, worst first; not those that were forced to lose."""
    lost = [row for row in chosen(members) if row.best_torch is not None and row.best_torch < 1]
    return sorted(lost, key=lambda row: row.best_torch or 0.0)


def chosen(members: Iterable[Row]) -> list[Row]:
    """Timed rows whose algorithm fastconv chose."""
    return [row for row in members if row.ok and row.algorithm == "auto"]


def scaling(members: Iterable[Row]) -> list[tuple[Row, float]]:
    """Rows with more than one thread, and how much faster each is than its own one-thread row of over a millisecond."""
    members = [row for row in members if row.ok]
    single = {(id(row.match), row.variant[1:]): row.entry["median_s"] for row in members if row.variant[0] == 1}
    found = []
    for row in members:
        base = single.get((id(row.match), row.variant[1:]))
        if row.variant[0] > 1 and base is not None and base > 1e-3:
            found.append((row, base / row.entry["median_s"]))
    return found


def selection(members: Iterable[Row]) -> list[tuple[Row, float, Row]]:
    """Rows of fastconv's own choice beside forced ones: how many times the fastest row's time it takes, and that row.

    The choice's time is the better of its own row's and of the row in which the same kernel was forced, so that the noise
    between two runs of one kernel does not count as a mistake.
    """
    members = [row for row in members if row.ok]
    found = []
    for alike in grouped(members, lambda row: (id(row.match), row.variant[:-1])).values():
        choice = next((row for row in alike if row.algorithm == "auto"), None)
        forced = [row for row in alike if row.algorithm != "auto"]
        if choice is None or not forced:
            continue
        best = min(forced, key=lambda row: row.entry["median_s"])
        own = min(row.entry["median_s"] for row in alike if row.entry["kernel"] == choice.entry["kernel"])
        found.append((choice, max(1.0, own / best.entry["median_s"]), best))
    return found


def _present(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(sorted(value for value in values if value is not None))
