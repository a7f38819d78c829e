#!/usr/bin/env python3
"""Is the algorithm that fastconv chooses the fastest one, and what do the cost models need to be right?

    calibrate.py measure FILE [--models …] [--op conv2d_fwd …] [--batch 1,8,32] [--threads 1,2]
    calibrate.py report FILE [--misses 40] [--keep]
    calibrate.py fit FILE [--write csrc/core/calibration.def]

`measure` times every algorithm that accepts a layer, for the distinct convolutions of the reference models, and keeps the medians
in FILE, a JSON file with one layer a line; what FILE has already is kept, so that a run can be cut off and go on. Kernels are
called directly: no checks, no torch, the same buffers again and again. An algorithm that takes more than three times as long as
the fastest is timed once, and one that takes more than six times as long is not asked again for larger batches; nor is one
asked at all whose cost model says more than ten times the lowest.

`report` asks the installed fastconv what it would choose now, and compares that with the times in FILE: the share of layers whose
choice is within 5 % of the fastest, and the worst misses with what each cost model predicted. Change a cost model, build, and
report again: nothing is measured anew. --keep writes the shares into FILE, from where the README's table has them.

`fit` looks for a factor for each algorithm and layout, by which its predictions are multiplied, so that as few layers as possible
miss by more than 5 %; it starts from the factors of the installed fastconv. --write puts them where the next build finds them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fastconv import models, plan
from fastconv.bench.context import collect
from fastconv.bench.networks import layers
from fastconv.bench.shapes import parse_conv, short
from fastconv.testing.problems import ConvCase

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
OPS = ("conv2d_fwd", "conv2d_dgrad", "conv2d_wgrad")
NEAR = 1.05
_OUT = 3.0  # times the fastest: out of the race after one call
_HOPELESS = 6.0  # not asked again
_PREDICTED_OUT = 10.0  # times the lowest cost: not asked
_SAVE_S = 30.0
_ROUNDS, _LONG_ROUNDS, _LONG_S = 7, 3, 0.05
_SAMPLE_S = 3e-4  # shorter calls are repeated inside a sample

# For filters of 1x1, the only ones that both take.
_SAME_CODE = {
    ("conv2d_wgrad", "nchw"): {"im2col", "pointwise"},
    ("conv2d_wgrad", "nhwc"): {"im2col", "pointwise"},
}

Seconds = dict[str, float]  # by algorithm


@dataclass(frozen=True)
class Setting:
    """What is measured of a layer at a time. ``frozen``: the filters are packed ahead, as ``fastconv.fuse`` does."""

    batch: int
    threads: int
    frozen: bool

    def __str__(self) -> str:
        return f"n{self.batch}t{self.threads}" + "f" * self.frozen

    @staticmethod
    def parse(text: str) -> Setting:
        batch, _, threads = text.removesuffix("f")[1:].partition("t")
        return Setting(int(batch), int(threads), text.endswith("f"))


# --- layers and problems


def distinct_layers(names: Iterable[str]) -> list[ConvCase]:
    """The convolutions of these models for one image, without what does not change the choice."""
    found: dict[ConvCase, None] = {}
    for name in names:
        for op, shape, _ in layers(name):
            if op == "conv2d":
                assert isinstance(shape, ConvCase)
                found.setdefault(replace(shape, bias=False))
    return list(found)


def problem(op: str, x: Tensor, w: Tensor, y: Tensor, case: ConvCase, frozen: bool) -> Any:
    def operand(t: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(t.shape), tuple(t.stride())

    return plan.conv2d_problem(
        "f32", operand(x), operand(w), operand(y), case.stride, case.pad4, case.dilation, case.groups, frozen=frozen
    )


def shaped(case: ConvCase, layout: str, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """x, w and y of a layer. On "meta" they hold nothing, which is all that a question needs."""
    make = torch.empty if device == "meta" else torch.randn
    shapes = (case.x_shape, case.w_shape, case.y_shape)
    x, w, y = (make(shape, device=device).to(memory_format=LAYOUTS[layout]) for shape in shapes)
    return x, w, y


# --- measure


class Runner:
    """One algorithm on one layer, on buffers of its own choosing only for what it writes."""

    def __init__(
        self, question: plan.Question, frozen: bool, operands: tuple[Tensor, Tensor, Tensor], out: Tensor
    ) -> None:
        x, w, y = operands
        self._plan = plan.native().plan(*question)
        self._keep = (x, w, y, out)
        packed = 0
        if frozen and (size := self._plan.packed[0]):
            self._packed = torch.empty(size + 64, dtype=torch.uint8)
            packed = -(-self._packed.data_ptr() // 64) * 64
            self._plan.pack(w.data_ptr(), packed)
        x, w, y = {"conv2d_fwd": (x, w, out), "conv2d_dgrad": (out, w, y), "conv2d_wgrad": (x, out, y)}[question[0]]
        self._addresses = (x.data_ptr(), w.data_ptr(), 0, 0, y.data_ptr(), packed)
        self.times: list[float] = []

    def seconds(self, calls: int = 1) -> float:
        begin = time.perf_counter_ns()
        for _ in range(calls):
            self._plan.run_conv2d(*self._addresses)
        return (time.perf_counter_ns() - begin) * 1e-9 / calls


def race(op: str, case: ConvCase, layout: str, setting: Setting, hopeless: set[str], rng: random.Random) -> Seconds:
    """Medians of all algorithms that accept the layer but the hopeless ones, interleaved."""
    case = replace(case, N=setting.batch)
    operands = shaped(case, layout)
    asked = problem(op, *operands, case, setting.frozen)
    out = torch.empty_like(operands[("conv2d_dgrad", "conv2d_wgrad", "conv2d_fwd").index(op)])
    runners, first = {}, {}
    costs = predicted(op, asked)
    for algorithm, cost in sorted(costs.items(), key=lambda item: item[1]):
        if algorithm not in hopeless and cost < _PREDICTED_OUT * min(costs.values()):
            name = f"{op}.{algorithm}.f32.{best_target()}"
            runners[algorithm] = Runner(
                (op, asked, setting.threads, name, False, plan.CPU), setting.frozen, operands, out
            )
    for algorithm, runner in runners.items():
        runner.seconds()
        first[algorithm] = min(runner.seconds(), runner.seconds())
    fastest = min(first.values())
    running = [algorithm for algorithm, seconds in first.items() if seconds < _OUT * fastest]
    rounds = 1 if len(running) == 1 else _ROUNDS if fastest < _LONG_S else _LONG_ROUNDS
    for _ in range(rounds):
        rng.shuffle(running)
        for algorithm in running:
            runner = runners[algorithm]
            runner.times.append(runner.seconds(math.ceil(_SAMPLE_S / first[algorithm])))
    return {a: statistics.median(runner.times) if runner.times else first[a] for a, runner in runners.items()}


def predicted(op: str, asked: Any) -> Seconds:
    """Costs of the algorithms that accept a problem, on the widest vectors that run here. Only their order means anything."""
    rows = plan.native().explain(op, asked)
    return {name.split(".")[1]: cost for name, why, cost in rows if not why and name.split(".")[3] == best_target()}


def best_target() -> str:
    served = {kernel.target for kernel in plan.native().kernels() if kernel.dtype == "f32"}
    return [str(target) for target in plan.native().machine()["isa"] if target in served][-1]


def measure(args: argparse.Namespace) -> None:
    document = json.loads(args.file.read_text()) if args.file.exists() else {"layers": {}}
    document["context"] = collect([], 0) | {"command": "tools/calibrate.py measure"}
    rng = random.Random(0)
    layouts = {key: shape for shape in distinct_layers(args.models) for key in [short(shape)]}
    todo = [
        (op, key, layout, Setting(batch, threads, args.frozen))
        for threads in args.threads
        for batch in args.batch
        for op in args.op
        for key in layouts
        for layout in LAYOUTS
    ]
    saved = time.monotonic()
    try:
        for op, key, layout, setting in track(todo, console=Console(stderr=True)):
            measured = document["layers"].setdefault(f"{op} {key} {layout}", {})
            if str(setting) in measured:
                continue
            earlier = [times for text, times in measured.items() if Setting.parse(text).batch < setting.batch]
            hopeless = {a for times in earlier for a, s in times.items() if s > _HOPELESS * min(times.values())}
            times = race(op, layouts[key], layout, setting, hopeless, rng)
            measured[str(setting)] = {a: float(f"{s:.3g}") for a, s in sorted(times.items(), key=lambda t: t[1])}
            if time.monotonic() - saved > _SAVE_S:
                write(args.file, document)
                saved = time.monotonic()
    finally:
        write(args.file, document)


def write(path: Path, document: dict[str, Any]) -> None:
    """JSON with a layer a line, so that a diff shows which have changed. All of it or nothing: a run may be cut off here too."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(document["layers"].items())]
    head = "".join(f'"{key}": {json.dumps(document[key])},\n' for key in ("context", "choices") if key in document)
    beside = path.with_name(path.name + ".part")
    beside.write_text("{" + head + '"layers": {\n' + ",\n".join(lines) + "\n}}\n")
    beside.replace(path)


# --- report


@dataclass(frozen=True)
class Verdict:
    op: str
    layer: str
    layout: str
    setting: Setting
    chosen: str
    fastest: str
    times: Seconds
    costs: Seconds

    @property
    def loss(self) -> float:
        """How many times the fastest one's time the chosen one takes. Infinite where it was not asked."""
        return self.loss_of(self.chosen)

    def loss_of(self, algorithm: str) -> float:
        """Algorithms that run the same code count as one, with the better time: what differs is noise."""
        alike = _SAME_CODE.get((self.op, self.layout), set())
        names = alike if algorithm in alike else {algorithm}
        return min(self.times.get(name, math.inf) for name in names) / self.times[self.fastest]


def verdicts(document: dict[str, Any]) -> Iterator[Verdict]:
    """What the installed fastconv chooses, beside what was measured."""
    for key, settings in document["layers"].items():
        op, layer, layout = key.split()
        for text, times in settings.items():
            setting = Setting.parse(text)
            case = replace(parse_conv(layer), N=setting.batch)
            asked = problem(op, *shaped(case, layout, "meta"), case, setting.frozen)
            rows = plan.native().explain(op, asked)
            costs = {
                name.split(".")[1]: cost for name, why, cost in rows if not why and name.split(".")[3] == best_target()
            }
            chosen = min(costs, key=lambda algorithm: costs[algorithm])
            yield Verdict(op, layer, layout, setting, chosen, min(times, key=times.__getitem__), times, costs)


def report(args: argparse.Namespace) -> None:
    document = json.loads(args.file.read_text())
    found = list(verdicts(document))
    console = Console(width=150)
    kept: list[dict[str, Any]] = []
    shares = Table("op", "layout", "setting", "layers", f"within {100 * (NEAR - 1):.0f} %", "time lost")
    for group in dict.fromkeys((v.op, v.layout, str(v.setting)) for v in found):
        alike = [v for v in found if (v.op, v.layout, str(v.setting)) == group]
        near = sum(v.loss <= NEAR for v in alike)
        fastest = [v.times[v.fastest] for v in alike]
        lost = sum(v.loss * t for v, t in zip(alike, fastest) if v.loss < math.inf) / sum(fastest) - 1
        kept.append({"op": group[0], "layout": group[1], "setting": group[2], "layers": len(alike), "near": near})
        shares.add_row(*group, str(len(alike)), f"{100 * near / len(alike):.1f} %", f"{100 * lost:.1f} %")
    console.print(shares)
    near = sum(v.loss <= NEAR for v in found)
    console.print(
        f"{near} of {len(found)} ({100 * near / len(found):.1f} %) within {100 * (NEAR - 1):.0f} % of the fastest"
    )
    missed = sorted((v for v in found if v.loss > NEAR), key=lambda v: -v.loss)
    for (chosen, better), count in Counter((v.chosen, v.fastest) for v in missed).most_common():
        console.print(f"  {count:4d} x {chosen} where {better} is faster")
    table = Table("loss", "op", "layer", "layout", "setting", "chosen", "fastest", "measured and predicted, µs")
    for v in missed[: args.misses]:
        detail = ", ".join(
            f"{a} {1e6 * s:.0f}/{1e6 * v.costs.get(a, math.nan):.0f}" for a, s in list(v.times.items())[:4]
        )
        table.add_row(f"{v.loss:.2f}", v.op, v.layer, v.layout, str(v.setting), v.chosen, v.fastest, detail)
    if missed and args.misses:
        console.print(table)
    if args.keep:
        now = {key: collect([], 0)[key] for key in ("date", "git")}
        write(args.file, document | {"choices": now | {"within": NEAR, "shares": kept}})


# --- fit

_FACTOR_LINE = re.compile(r"FC_CALIBRATION\((\w+), (\w+), (\w+), (\w+), ([\d.]+)\)")
Key = tuple[str, str, str, str]  # op, algorithm, target, layout


def penalty(found: Sequence[Verdict], factors: Seconds) -> float:
    """Misses, and what they cost: a layer at twice the fastest time counts as eleven that barely miss."""
    total = 0.0
    for v in found:
        loss = v.loss_of(
            min(v.times, key=lambda algorithm: v.costs.get(algorithm, math.inf) * factors.get(algorithm, 1.0))
        )
        total += (loss > NEAR) + 10 * (min(loss, 2.0) - 1)
    return total


def _exactness_kept(factors: Seconds) -> bool:
    """Larger Winograd tiles are less exact: they are not favoured over smaller ones for a few percent of time."""
    tiles = [factors.get(f"winograd_f{m}x3", 1.0) for m in (2, 4, 6)]
    return 1 <= tiles[0] <= tiles[1] <= tiles[2]


def fitted(found: Sequence[Verdict]) -> Seconds:
    """Factors for the algorithms of one op and layout, by coordinate descent in ever smaller steps."""
    factors = dict.fromkeys(sorted({algorithm for v in found for algorithm in v.times}), 1.0)
    best = penalty(found, factors)
    for step in (1.25, 1.1, 1.04, 1.02):
        improved = True
        while improved:
            improved = False
            for algorithm in factors:
                for ratio in (step, 1 / step):
                    tried = factors | {algorithm: factors[algorithm] * ratio}
                    if not _exactness_kept(tried):
                        continue
                    if (value := penalty(found, tried)) < best - 1e-9:
                        factors, best, improved = tried, value, True
    return factors


def fit(args: argparse.Namespace) -> None:
    found = [v for v in verdicts(json.loads(args.file.read_text())) if v.loss < math.inf]
    text = args.write.read_text() if args.write else ""
    factors: dict[Key, float] = {(m[1], m[2], m[3], m[4]): float(m[5]) for m in _FACTOR_LINE.finditer(text)}
    for op, layout in dict.fromkeys((v.op, v.layout) for v in found):
        alike = [v for v in found if (v.op, v.layout) == (op, layout)]
        changes = fitted(alike)
        print(f"{op} {layout}: {penalty(alike, {}):.0f} before, {penalty(alike, changes):.0f} after")
        for algorithm, change in changes.items():
            key = (op, algorithm, best_target(), layout)
            factors[key] = factors.get(key, 1.0) * change
    lines = [
        f"FC_CALIBRATION({', '.join(key)}, {factor:.3f})" for key, factor in sorted(factors.items()) if factor != 1
    ]
    print("\n".join(lines))
    if args.write:
        comments = [line for line in text.splitlines() if line.startswith("//")]
        args.write.write_text("\n".join([*comments, *lines]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("file", type=Path)
    measuring.add_argument("--models", type=_list(str), default=models.names(), help="default: all for images")
    measuring.add_argument("--op", type=_list(str), default=OPS)
    measuring.add_argument("--batch", type=_list(int), default=(1, 8, 32))
    measuring.add_argument("--threads", type=_list(int), default=(1, 2))
    measuring.add_argument("--frozen", action="store_true", help="filters packed ahead")
    measuring.set_defaults(run=measure)
    reporting = commands.add_parser("report")
    reporting.add_argument("file", type=Path)
    reporting.add_argument("--misses", type=int, default=40, help="how many to show, worst first (40)")
    reporting.add_argument("--keep", action="store_true", help="write the shares into FILE")
    reporting.set_defaults(run=report)
    fitting = commands.add_parser("fit")
    fitting.add_argument("file", type=Path)
    fitting.add_argument("--write", type=Path, help="the file of factors to update")
    fitting.set_defaults(run=fit)
    args = parser.parse_args()
    args.run(args)


def _list(kind: type) -> Any:
    return lambda text: [kind(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
