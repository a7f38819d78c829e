"""Tables for the terminal and for files, readable at 120 columns; no drawn lines, so that grep and sort work."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastconv.bench.context import warnings
from fastconv.bench.summary import Group, Row, by_layout, chosen, group, grouped, losses, rows, scaling, selection

Record = dict[str, Any]

_PEERS = {
    "torch": "×nchw",
    "torch_channels_last": "×nhwc",
    "torch_math": "×math",
    "compile": "×comp",
    "openvino": "×openvino",
    "onnxruntime": "×onnxrt",
}
_WIDTH = 120
_NEAR = 1.05  # a choice this close to the fastest is as good: two runs of one kernel differ by as much


def console() -> Console:
    """Standard output; 120 columns where there is no terminal to ask."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH, no_color=True, highlight=False)


class Reporter:
    """Prints matches as they finish, then the summary."""

    def __init__(self) -> None:
        self.console = console()

    def heading(self, document: Record, threads: Sequence[int]) -> None:
        """What is compared, where, and the machine's ceilings."""
        context = document["context"]
        cpu, torch = (context["cpu"], f"torch {context['versions']['torch']} ({context['torch']['cpu_capability']})")
        self.say(f"{cpu['cpu']}, {cpu['usable_cores']} cores, {torch}")
        for peak in document["peaks"]["before"]:
            what, value = (
                f"copy of {peak.get('bytes', 0) >> 20} MiB",
                f"{peak.get('gbs', 0):.1f} GB/s read and written",
            )
            if peak["kind"] == "fma":
                what, value = (f"FMA peak {peak['target']} {peak['dtype']}", f"{peak['gflops']:.0f} GFLOP/s")
            self.say(f"  {what}, {peak['threads']} thread{'s' * (peak['threads'] > 1)}: {value}")
        for sentence in warnings(context, threads):
            self.say(f"warning: {sentence}", "yellow")

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar on a terminal, nothing elsewhere. Yields a function that is told what runs next."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # Refreshed only between matches: a thread that redraws while something is timed would be in the figures.
        with Progress(
            *columns, console=self.console, transient=True, auto_refresh=False, disable=not self.console.is_terminal
        ) as bar:
            task = bar.add_task("", total=total)
            done = -1

            def advance(what: str) -> None:
                nonlocal done
                done += 1
                bar.update(task, completed=done, description=what, refresh=True)

            yield advance

    def say(self, text: str, style: str = "") -> None:
        """A line of prose."""
        self.console.print(escape(text), style=style or None, soft_wrap=True)

    def table(
        self, columns: Sequence[str], cells: Sequence[Sequence[str]], styles: Sequence[str] | None = None
    ) -> None:
        """Rows under columns; a column whose title begins with > is right-aligned."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
        for title in columns:
            right = title.startswith(">")
            justify: Literal["left", "right"] = "right" if right else "left"
            fixed = right or title == "shape"
            table.add_column(title.removeprefix(">"), justify=justify, overflow="fold", no_wrap=fixed)
        for index, row in enumerate(cells):
            table.add_row(*(escape(cell) for cell in row), style=styles[index] if styles else None)
        self.console.print(table)

    def results(self, results: Sequence[Record]) -> None:
        """The rows of matches of one op and pass, under one heading."""
        members = rows({"results": results})
        for (op, direction), part in grouped(members, lambda row: (row.match["op"], row.match["direction"])).items():
            self.say(f"\n{op} {direction} {part[0].match['dtype']}", "bold")
            micro = any(row.match["run"].startswith("call") for row in part)
            rates, peers, weighed = _rates(part), _peers(part), _weighed(part)
            columns = ["shape", "lay", ">T", "kernel", ">µs" if micro else ">ms", ">IQR", *rates]
            columns += [*(f">{_PEERS[peer]}" for peer in peers), ">err"]
            columns += [">MB" if who == "fastconv" else f">MB {_PEERS[who][1:]}" for who in weighed] + ["note"]
            cells = [_cells(row, micro, rates, (peers, weighed)) for row in part]
            self.table(columns, cells, [_style(row) for row in part])

    def summary(self, document: Record) -> None:
        """Geometric means, weighted totals, the share of layers slower than torch, and each of those by name."""
        members = [row for row in rows(document) if row.match["op"] != "model"]
        if len(members) < 2:
            return
        self.say("\nsummary: ratios to the better of torch's two formats, above 1 fastconv is faster", "bold")
        lines = []
        key = attrgetter("direction", "run", "threads", "isa", "algorithm")
        for (direction, run, threads, isa, algorithm), part in grouped(members, key).items():
            for layout, half in by_layout(part).items():
                figures = group(half)
                if figures.distinct:
                    words = [run, direction, layout, *(word for word in (algorithm, isa) if word != "auto")]
                    lines.append([" ".join(words), str(threads), *_figures(figures)])
        titles = "rows >T >geomean >lowest >slower >total_ms >torch_ms >ratio >%_of_bound >noisy >void"
        self.table([title.replace("_", " ") for title in titles.split()], lines)
        self._thread_scaling(members)
        self._selection(members)
        lost = losses(members)
        if lost:
            self.say(f"\nslower than torch: {len(lost)} of {len(chosen(members))} rows", "bold")
            cells = [[_ratio(row.best_torch), *_what(row), *_identity(row), row.kernel] for row in lost]
            self.table([">×best", "op", "pass", "shape", "lay", ">T", "kernel"], cells)

    def _thread_scaling(self, members: Sequence[Row]) -> None:
        speedups = scaling(members)
        for threads, part in _by_threads(speedups).items():
            low, mid = min(part), statistics.median(part)
            figures = f"median {mid:.2f}×, lowest {low:.2f}× ({len(part)} rows)"
            self.say(f"\n{threads} threads against 1, rows over 1 ms: {figures}")

    def _selection(self, members: Sequence[Row]) -> None:
        compared = selection(members)
        if not compared:
            return
        missed = sorted((found for found in compared if found[1] > _NEAR), key=lambda found: -found[1])
        near = len(compared) - len(missed)
        share = f"{near} of {len(compared)} rows ({100 * near / len(compared):.0f} %)"
        self.say(f"\nfastconv's choice is within {100 * (_NEAR - 1):.0f} % of its fastest algorithm: {share}", "bold")
        if missed:
            cells = [
                [f"{loss:.2f}", *_what(row), *_identity(row), row.kernel, best.kernel] for row, loss, best in missed
            ]
            self.table([">× fastest", "op", "pass", "shape", "lay", ">T", "chosen", "fastest"], cells)


def _by_threads(speedups: Sequence[tuple[Row, float]]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for row, speedup in speedups:
        found.setdefault(row.variant[0], []).append(speedup)
    return found


def _rates(part: Sequence[Row]) -> dict[str, str]:
    """Column to the field of a row that it shows: operations, bytes, or both where a row may wait for either."""
    by_bytes = {">GB/s": "gbs", ">%copy": "copy_share"}
    if not part[0].match["flops"]:
        return by_bytes
    both = any(row.entry.get("copy_share") is not None for row in part)
    return {">GF/s": "gflops", ">%peak": "peak_share"} | (by_bytes if both else {})


def _peers(part: Sequence[Row]) -> list[str]:
    """torch's two formats, and the other peers that were timed; attention has but one format."""
    timed = {peer for row in part for peer in row.entry.get("ratios", {})}
    always = ("torch",) if part[0].match["op"] == "sdpa" else ("torch", "torch_channels_last")
    return [peer for peer in _PEERS if peer in timed or peer in always]


def _weighed(part: Sequence[Row]) -> list[str]:
    """Whose peak memory was measured."""
    found = {c["who"] for row in part for c in row.match["contestants"] if c.get("peak_bytes") is not None}
    return [who for who in ("fastconv", *_PEERS) if who in found]


def _megabytes(row: Row, who: str) -> str:
    """Peak memory of this row, or of a peer with as many threads."""
    entries = [row.entry] if who == "fastconv" else row.match["contestants"]
    found = [c.get("peak_bytes") for c in entries if c["who"] == who and c["threads"] == row.threads]
    return f"{found[0] / 2**20:.1f}" if found and found[0] is not None else ""


def _cells(row: Row, micro: bool, rates: dict[str, str], others: tuple[Sequence[str], Sequence[str]]) -> list[str]:
    """`others`: whose times are compared, and whose memory was measured."""
    entry, ratios = row.entry, row.entry.get("ratios", {})
    peers, weighed = others
    if not row.ok:
        blanks = [""] * (2 + len(rates) + len(peers) + len(weighed))
        return [*_identity(row), row.kernel, entry["status"].upper(), *blanks, entry["reason"]]
    error = entry["error"].get("ratio_to_torch")
    return [
        *_identity(row),
        row.kernel,
        f"{entry['median_s'] * (1e6 if micro else 1e3):.{1 if micro else 3}f}",
        f"{entry['iqr_share']:.0%}",
        *(_rate(entry[field], title) for title, field in rates.items()),
        *(_ratio(ratios.get(peer)) for peer in peers),
        "exact" if entry["error"]["rel_l2"] == 0 else "" if error is None else f"{error:.2f}",
        *(_megabytes(row, who) for who in weighed),
        _note(row),
    ]


def _rate(value: float | None, title: str) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if "%" in title else f"{value:.1f}"


def _what(row: Row) -> list[str]:
    return [row.match["op"], row.direction + (", recorded" if row.match["recorded"] else "")]


def _identity(row: Row) -> list[str]:
    entry, match = row.entry, row.match
    shape = match["shape"] + (f" ×{match['count']}" if match["count"] > 1 else "")
    forced = "" if entry["algorithm"] == "auto" and entry["isa"] == "auto" else "!"
    return [
        shape,
        ("-" if match["op"] in ("linear", "sdpa", "layer_norm") else entry["layout"]) + forced,
        str(entry["threads"]),
    ]


def _note(row: Row) -> str:
    notes = []
    if row.match["recorded"] and row.match["op"] != "model":
        notes.append("grad")
    if row.entry["status"] == "noisy":
        notes.append("noisy")
    if row.best_torch is not None and row.best_torch < 1:
        notes.append("slower")
    return " ".join(notes)


def _style(row: Row) -> str:
    if not row.ok:
        return "dim" if row.entry["status"] == "declined" else "red"
    if row.entry["status"] == "noisy":
        return "dim"
    return "yellow" if row.best_torch is not None and row.best_torch < 1 else ""


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _figures(figures: Group) -> list[str]:
    shares = figures.bound_shares
    peak = f"{shares[0]:.0%} … {statistics.median(shares):.0%} … {shares[-1]:.0%}" if shares else ""
    compared = not math.isnan(figures.torch_s)
    return [
        f"{figures.mean:.2f}×" if compared else "",
        f"{figures.lowest:.2f}×" if compared else "",
        f"{figures.slower_count} of {figures.count}" if compared else "",
        f"{figures.total_s * 1e3:.2f}",
        f"{figures.torch_s * 1e3:.2f}" if compared else "",
        f"{figures.torch_s / figures.total_s:.2f}×" if compared else "",
        peak,
        str(figures.noisy),
        str(figures.invalid),
    ]
