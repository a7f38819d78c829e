"""fastconv bench lengths: time and peak memory of attention over its length, beside torch's two ways, as table and picture.

Peak memory is what a call adds to the process's, result and scratch included. Where some call lasts longer than 3 seconds, that
one call of each, which the memory is taken from, is the only sample.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastconv
from fastconv.bench import context
from fastconv.bench.attention import torch_math
from fastconv.bench.command import numbers
from fastconv.bench.memory import peak_bytes
from fastconv.testing.timing import Contestant, Protocol, Samples, interleave

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
# torch's MATH stores the scores, and its backward several of their size: beyond this it is left out.
_MOST_SCORES = 1 << 30
# A call that lasts so long is timed once: 18 of them would be minutes, and noise is a small part of one.
_LONG_SECONDS = 3.0

Row = dict[str, Any]


def _theirs(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return attention


CONTESTANTS: dict[str, Callable[..., Tensor]] = {
    "fastconv": fastconv.functional.scaled_dot_product_attention,
    "torch": _theirs(SDPBackend.FLASH_ATTENTION),
    "torch MATH": torch_math,
}


def measure(length: int, args: argparse.Namespace) -> list[Row]:
    """One length: a row for each contestant, its median in seconds and its peak in bytes."""
    shape = (1, args.heads, length, args.features)
    generator = torch.Generator().manual_seed(args.seed)
    operands = [torch.randn(shape, generator=generator).to(DTYPES[args.dtype]) for _ in range(4)]
    leaves = [t.requires_grad_(args.backward) for t in operands[:3]]

    def call(attention: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            out = attention(*leaves, is_causal=args.causal)
            return torch.autograd.grad(out, leaves, operands[3]) if args.backward else out

        return run

    calls = {name: call(attention) for name, attention in CONTESTANTS.items()}
    scores = args.heads * length * length * operands[0].element_size()
    if scores * (4 if args.backward else 2) > _MOST_SCORES:
        del calls["torch MATH"]
    peaks, single = {}, {}
    for name, run in calls.items():
        start = time.perf_counter()
        peaks[name] = peak_bytes(run) or 0
        single[name] = Samples([time.perf_counter() - start])
    if max(found.median for found in single.values()) > _LONG_SECONDS:
        return [_row(length, name, found, peaks[name]) for name, found in single.items()]
    protocol = Protocol(
        repetitions=args.repetitions, max_repetitions=2 * args.repetitions, max_seconds=10, seed=args.seed
    )
    samples = interleave([Contestant(name, run) for name, run in calls.items()], protocol=protocol)
    for name, found in samples.items():
        if found.error:
            raise RuntimeError(f"{name} at length {length}: {found.error}")
    return [_row(length, name, found, peaks[name]) for name, found in samples.items()]


def _row(length: int, name: str, found: Samples, peak: int) -> Row:
    return {"length": length, "who": name, "seconds": found.median, "samples": len(found.values), "bytes": peak}


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Write a picture: time on the left, peak memory on the right, over length, all logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(1, 2)
    for name, color in zip(CONTESTANTS, ("tab:blue", "tab:orange", "tab:gray")):
        mine = [row for row in rows if row["who"] == name]
        lengths = [row["length"] for row in mine]
        time.plot(lengths, [row["seconds"] * 1e3 for row in mine], "o-", color=color, label=name)
        # A call that fits what the allocator kept raises nothing, and a logarithm has no place for that.
        memory.plot(lengths, [row["bytes"] / 2**20 or math.nan for row in mine], "o-", color=color, label=name)
    time.set(ylabel="median time (ms)")
    memory.set(ylabel="peak memory of a call (MB)")
    for axes in (time, memory):
        axes.set(xscale="log", yscale="log", xlabel="queries and keys")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    kind = ("causal " if args.causal else "") + f"attention {'forward and backward' if args.backward else 'forward'}"
    title = f"{kind}, {args.heads} x L x {args.features}, {args.dtype}, {args.threads} thread{'' if args.threads == 1 else 's'}"
    print(f"{title}\n{'length':>8}  {'who':<11}{'ms':>10}{'peak MB':>10}{'of torch':>10}")
    rows: list[Row] = []
    for length in args.lengths:
        found = measure(length, args)
        theirs = next(row["seconds"] for row in found if row["who"] == "torch")
        for row in found:
            times, peak = row["seconds"] * 1e3, row["bytes"] / 2**20
            print(f"{length:>8}  {row['who']:<11}{times:>10.3f}{peak:>10.1f}{row['seconds'] / theirs:>10.2f}")
        rows += found
    if args.json:
        args.json.write_text(
            json.dumps(
                {"title": title, "context": context.collect(["lengths", *argv], args.seed), "rows": rows}, indent=1
            )
        )
    if args.plot:
        draw(args.plot, rows, title)
        print(f"picture: {args.plot}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastconv bench lengths", description=__doc__)
    parser.add_argument("--lengths", type=numbers, default=(128, 256, 512, 1024, 2048, 4096), help="128,…,4096")
    parser.add_argument("--heads", type=int, default=4, help="default 4")
    parser.add_argument("--features", type=int, default=64, help="of each head (64)")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="default f32")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--repetitions", type=int, default=9, help="samples of each (9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="write a picture to this file; needs matplotlib")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser
