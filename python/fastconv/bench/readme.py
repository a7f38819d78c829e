"""The results table of a README, written from results files between two HTML markers."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from fastconv.bench import schema
from fastconv.bench.summary import Row, by_layout, chosen, group, grouped, losses, rows, scaling

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

Record = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """``fastconv bench readme --json a.json [--json b.json …] README.md``. 0: written, or up to date; 1: stale; 2: cannot."""
    parser = argparse.ArgumentParser(prog="fastconv bench readme", description=__doc__)
    parser.add_argument("readme", type=Path, help=f"file with the markers {BEGIN} and {END}")
    parser.add_argument(
        "--json", type=Path, action="append", required=True, help="a file of fastconv bench; repeatable"
    )
    parser.add_argument("--selection", type=Path, help="a file of tools/calibrate.py, with the shares of its report")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit with 1 if the table is not the files'"
    )
    args = parser.parse_args(argv)
    try:
        documents = [load(path) for path in args.json]
        before = args.readme.read_text(encoding="utf-8")
        choices = json.loads(args.selection.read_text(encoding="utf-8"))["choices"] if args.selection else None
        after = replace_between(before, markdown(documents, choices))
    except (OSError, ValueError) as error:
        print(f"fastconv bench readme: {error}", file=sys.stderr)
        return 2
    except KeyError:
        print(f"fastconv bench readme: {args.selection} has no shares: calibrate.py report --keep", file=sys.stderr)
        return 2
    if args.check:
        return int(before != after)
    args.readme.write_text(after, encoding="utf-8")
    return 0


def load(path: Path) -> Record:
    """A results file. ValueError with the first faults if it is not one."""
    document = json.loads(path.read_text(encoding="utf-8"))
    wrong = schema.problems(document)
    if wrong:
        raise ValueError(f"{path.name} is not a results file: {'; '.join(wrong[:3])}")
    return dict(document)


def replace_between(text: str, table: str) -> str:
    """``text`` with what stands between the markers replaced. ValueError unless each marker is there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one {BEGIN} and after it one {END}")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table.strip()}\n{END}{tail}"


def markdown(documents: Sequence[Record], choices: Record | None = None) -> str:
    """Machine, layers by kind, whole models, calls, selection, and every row that torch wins or that did not count."""
    members = [row for document in documents for row in rows(document)]
    layers = [row for row in members if row.match["op"] != "model" and not row.match["run"].startswith("call")]
    models = [row for row in members if row.match["op"] == "model"]
    calls = [row for row in members if row.match["run"].startswith("call")]
    parts = [_machine(documents), _layers(layers), _models(models), _calls(calls), _selection(choices)]
    parts += [_losses(members), _invalid(members)]
    return "\n\n".join(part for part in parts if part)


def _machine(documents: Sequence[Record]) -> str:
    lines = []
    for document in documents:
        context = document["context"]
        cpu, git = context["cpu"], context.get("git")
        commit = f", commit {git['sha'][:10]}{' with changes' if git['dirty'] else ''}" if git else ""
        peaks = ", ".join(
            f"{p['gflops']:.0f} GFLOP/s on {p['threads']} thread{'s' * (p['threads'] > 1)}"
            for p in document["peaks"]["before"]
            if p["kind"] == "fma" and p["target"] == cpu["isa"][-1]
        )
        lines.append(
            f"{cpu['cpu']}, {cpu['usable_cores']} cores, {cpu['isa'][-1]}; measured FMA peak {peaks}. "
            f"torch {context['versions']['torch']}, {context['date'][:10]}{commit}: `{context['command']}`"
        )
    return "\n\n".join(dict.fromkeys(lines))


def _layers(layers: Sequence[Row]) -> str:
    """One table a run and thread count: a line for each kind of layer and pass, three columns for each layout."""
    parts = []
    head = ["layers", "pass", ">", ">NHWC × torch", ">lowest", ">of bound", ">NCHW × torch", ">lowest", ">of bound"]
    plain = [row for row in layers if row.entry["algorithm"] == "auto"]
    key = attrgetter("run", "threads", "isa")
    for (run, threads, isa), part in grouped(plain, key).items():
        lines = []
        for (direction, family), kind in grouped(
            part, lambda row: (row.match["direction"], row.match["family"])
        ).items():
            count = group(next(iter(by_layout(kind).values()))).count
            lines.append([family, direction, str(count), *_layout_cells(kind, "nhwc"), *_layout_cells(kind, "nchw")])
        for direction, kind in grouped(part, lambda row: row.match["direction"]).items():
            total = [*_layout_cells(kind, "nhwc"), *_layout_cells(kind, "nchw")]
            lines.append(["**all**", direction, "", *(f"**{cell}**" if cell else "" for cell in total)])
        scaled = _scaled([row for row in plain if (row.run, row.isa) == (run, isa) and row.threads in (1, threads)])
        title = f"**{run}, {threads} thread{'s' * (threads > 1)}{'' if isa == 'auto' else ', ' + isa}**"
        title += f" ({scaled})" if scaled and threads > 1 else ""
        parts.append(f"{title}\n\n{_table(head, lines)}")
    note = (
        "× torch: geometric mean, over the layers as often as the model has them, of the time of the better of torch's "
        "two formats (contiguous, channels_last) divided by fastconv's; above 1, fastconv is faster. Of bound: median share "
        "of the tighter of two ceilings measured between the samples, the FMA peak or (*copy*, where it is that for all) a "
        "copy of as many bytes. ≈: the row, or more than half of the rows of a mean, moved by more than 10 % meanwhile."
    )
    return "\n\n".join([*parts, note]) if parts else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a column whose title begins with > is right-aligned."""
    rule = ["---:" if title.startswith(">") else "---" for title in head]
    cells = [[title.removeprefix(">") for title in head], rule, *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _layout_cells(kind: Sequence[Row], layout: str) -> list[str]:
    halves = by_layout(kind)
    figures = group(halves.get(layout, halves.get("", [])))
    if not figures.distinct:
        return ["", "", ""]
    ratios = ["", ""]
    if not math.isnan(figures.mean):
        ratios = [
            _figure(figures.mean, 2 * figures.noisy > figures.distinct),
            _figure(figures.lowest, figures.lowest_noisy),
        ]
    share = f"{statistics.median(figures.bound_shares):.0%}" if figures.bound_shares else ""
    return [*ratios, share + " copy" * figures.by_bytes]


def _figure(value: float, noisy: bool, digits: int = 2) -> str:
    return f"{'≈' * noisy}{value:.{digits}f}"


def _scaled(members: Sequence[Row]) -> str:
    values = [speedup for _, speedup in scaling(members)]
    return f"rows over 1 ms: {statistics.median(values):.2f}× one thread, lowest {min(values):.2f}×" if values else ""


_ENGINES = {
    "torch": "torch NCHW, ms",
    "torch_channels_last": "torch NHWC",
    "compile": "torch.compile",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
}
# torch's two formats share one column of ratios.
_RATIOS = [who for who in _ENGINES if not who.startswith("torch")]


def _models(models: Sequence[Row]) -> str:
    """Times in milliseconds, and the ratio to each peer. A peer that was timed nowhere has no column."""
    timed_somewhere = {c["who"] for row in models for c in row.match["contestants"] if "median_s" in c}
    engines = [who for who in _ENGINES if who in timed_somewhere]
    lines = []
    for row in models:
        if not row.ok:
            continue
        threads = row.entry["threads"]
        timed = {c["who"]: c for c in row.match["contestants"] if "median_s" in c and c["threads"] == threads}
        peers = [timed.get(who) for who in engines]
        times = [
            _figure(peer["median_s"] * 1e3, peer["status"] == "noisy", 1) if peer else ""
            for peer in [*peers, row.entry]
        ]
        ratios = row.entry.get("ratios", {})
        lines.append(
            [
                row.match["shape"],
                row.match["family"],
                str(threads),
                row.entry["layout"].upper(),
                *times,
                _bold(row.best_torch, row.noisy),
                *(_bold(ratios.get(who), row.noisy_beside(who)) for who in _RATIOS if who in engines),
            ]
        )
    head = [
        "model",
        "",
        ">threads",
        "layout",
        *(f">{_ENGINES[who]}" for who in engines),
        ">fastconv",
        ">× torch",
        *(f">× {_ENGINES[who]}" for who in _RATIOS if who in engines),
    ]
    return (
        f"**Whole models** (× torch: against the better of its two formats)\n\n{_table(head, lines)}" if lines else ""
    )


def _bold(ratio: float | None, noisy: bool = False) -> str:
    return "" if ratio is None else f"**{_figure(ratio, noisy)}**"


def _calls(calls: Sequence[Row]) -> str:
    lines = []
    for row in calls:
        ratio = row.entry.get("ratios", {}).get("torch")
        if row.ok and ratio is not None and row.entry["layout"] == "nchw" and row.entry["threads"] == 1:
            ours = row.entry["median_s"] * 1e6
            times = [f"{ours * ratio:.1f}", f"{ours:.1f}", _bold(ratio, row.noisy_beside("torch"))]
            recorded = "recorded" if row.match["recorded"] else ""
            lines.append([row.match["op"], f"`{row.match['shape']}`", recorded, *times])
    head = ["op", "shape", "autograd", ">torch, µs", ">fastconv, µs", ">× torch"]
    return f"**What a call costs on a tiny problem**\n\n{_table(head, lines)}" if lines else ""


def _selection(choices: Record | None) -> str:
    """How often the algorithm that is chosen is as good as the fastest, in all and where it is least often."""
    if choices is None:
        return ""
    shares, commit = choices["shares"], choices["git"]
    near, count = (sum(share[key] for share in shares) for key in ("near", "layers"))
    least = min(shares, key=lambda share: float(share["near"] / share["layers"]))
    words = f"{least['op']}, {least['layout'].upper()}, {least['setting']}"
    return (
        f"**Selection.** On {near} of {count} layers ({near / count:.1%}) the algorithm that is chosen takes at most "
        f"{choices['within'] - 1:.0%} longer than the fastest that accepts the layer; least often, on "
        f"{least['near'] / least['layers']:.1%}, in `{words}` (n: batch, t: threads). Chosen {choices['date'][:10]}"
        + (f", commit {commit['sha'][:10]}{' with changes' if commit['dirty'] else ''}." if commit else ".")
    )


def _losses(members: Sequence[Row]) -> str:
    lost = losses(members)
    valid = sum(row.best_torch is not None for row in chosen(members))
    if not lost:
        return f"No row of {valid} is slower than torch." if valid else ""
    lines = []
    for row in lost:
        what = f"{row.match['op']} {row.match['direction']}" + (", recorded" if row.match["recorded"] else "")
        where = [row.entry["layout"].upper(), str(row.entry["threads"]), f"`{row.kernel}`"]
        lines.append([_figure(row.best_torch or 0.0, row.noisy), what, f"`{row.match['shape']}`", *where])
    table = _table([">× torch", "op", "shape", "layout", ">threads", "kernel"], lines)
    summary = f"<summary>Slower than torch: {len(lost)} of {valid} rows</summary>"
    return f"<details>\n{summary}\n\n{table}\n\n</details>"


def _invalid(members: Sequence[Row]) -> str:
    lines = [
        f"- {row.match['op']} {row.match['direction']} `{row.match['shape']}` {row.entry['layout']}, "
        f"{row.entry['threads']} threads: {row.entry['status']}, {row.entry['reason']}"
        for row in members
        if row.entry["status"] in ("void", "failed")
    ]
    return "Rows that do not count:\n\n" + "\n".join(lines) if lines else ""
