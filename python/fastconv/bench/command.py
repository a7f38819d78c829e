"""The command line of ``fastconv bench``: words to cases, cases to results, results to tables and a JSON file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.bench.schema import SCHEMA_VERSION
from fastconv.testing.timing import LEAST_REPETITIONS, Protocol

if TYPE_CHECKING:
    from fastconv.bench.cases import Case
    from fastconv.bench.report import Reporter
    from fastconv.bench.runner import Settings

_EPILOG = """\
targets:
  conv2d | conv_transpose2d | linear | sdpa | layer_norm | batch_norm
  max_pool2d | avg_pool2d | adaptive_avg_pool2d | adaptive_max_pool2d
  pool                  both plain kinds
  resnet50 …            every distinct layer of a model, with how often it occurs
  3x3 | depthwise | grouped | rectangular | dilated
                        the convolutions of that kind of the networks that have them
  model resnet50 …      the whole converted model (gpt2 and bert_base too, on 128 tokens, lstm and gru, on 128 steps);
                        with --train a training step (forward, backward, SGD)
  call                  what a call on a tiny problem costs
  lengths               attention over its length: time, peak memory, a picture (fastconv bench lengths --help)
  readme                rewrite the results table of a README from a JSON file (fastconv bench readme --help)

examples:
  fastconv bench conv2d --shape n1c64h56k64r3p1 --threads 1,2 --layout nhwc --algorithms all
  fastconv bench resnet50 --batch 1,8 --pass fwd,dgrad,wgrad --json resnet50.json
  fastconv bench 3x3 --frozen --layout nhwc
  fastconv bench model resnet18 --train --batch 8
  fastconv bench sdpa linear --dtype bf16
  fastconv bench model vit_b_16 gpt2 bert_base --fuse
  fastconv bench mobilenet_v2 --all-algorithms --peers none
"""

# Typed shapes when none are given: one layer of each kind, at the sizes they have in ResNet-50 and MobileNetV2.
_DEFAULT_SHAPES = {
    "conv2d": (
        "c3h224k64r7u2p3",
        "c64h56k256r1",
        "c64h56k64r3p1",
        "c128h56k128r3u2p1",
        "c256h14k256r3p1",
        "c1024h14k2048r1u2",
        "c32h112k32r3p1g32",
        "c512h14k512r3p1g512",
    ),
    "conv_transpose2d": (
        "c512h28k256r2u2",
        "c128h112k64r2u2",
        "c256h14k128r3u2p1o1",
        "c512h8k256r4u2p1",
        "c128h32k64r4u2p1",
        "c21h28k21r16u8p4",
        "c21h7k21r64u32p16",
    ),
    "linear": ("i2048o1000", "i4096o4096", "m197i768o3072"),
    "sdpa": (
        "h16q2048d64",
        "h16q2048d64+causal",
        "h16q2048d128",
        "h16q2048d128+causal",
        "h12q197d64",
        "h8q512d64",
        "h12q1k4096d64",
        "h32g8q1k4096d128",
        *(f"h8q512d{features}" for features in (32, 80, 96, 128, 256)),
        *(f"h8q512d64+{mask}" for mask in ("causal", "bool", "float", "padding")),
    ),
    "layer_norm": ("m1c768", "m16c64", "m197c768", "m512c1024", "m3136c96", "m4096c4096"),
    "batch_norm": ("n8c64h112+relu", "n8c64h56+residual+relu", "n8c128h28+relu", "n8c512h7+relu", "n8c256h56"),
    "max_pool2d": ("c64h112r3u2p1", "c64h224r2"),
    "avg_pool2d": ("c64h112r3u2p1", "c128h56r2"),
    "adaptive_avg_pool2d": ("c2048h7a1", "c512h14a7"),
    "adaptive_max_pool2d": ("c2048h7a1", "c512h14a7"),
}


class UsageError(Exception):
    """One sentence on what is wrong with the command line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. 0: done; 1: some row was void or failed; 2: it could not run."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["readme"]:
        from fastconv.bench.readme import main as readme

        return readme(words[1:])
    if words[:1] == ["lengths"]:
        from fastconv.bench.lengths import main as lengths

        return lengths(words[1:])
    args = _parser().parse_args(words)
    args.peers = args.peers or ("torch", "torch_math" if set(args.targets) == {"sdpa"} else "torch_channels_last")
    missing = [name for name in ("torch", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"fastconv bench: this needs {', '.join(missing)}; get it with: pip install 'fastconv[bench]'",
            file=sys.stderr,
        )
        return 2
    try:
        return _run(args, words)
    except UsageError as error:
        print(f"fastconv bench: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastconv bench",
        description="Time fastconv against torch, interleaved and verified.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="ops, models, 'model NAME …' or 'call'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: layers and models on a GPU")
    parser.add_argument("--shape", action="append", default=[], help="a shape string; may be repeated")
    parser.add_argument(
        "--batch", type=numbers, help="batch sizes, such as 1,8 (models: default 1; shapes: their own n)"
    )
    parser.add_argument("--threads", type=numbers, default=(1,), help="thread counts, such as 1,2 (default 1)")
    parser.add_argument(
        "--layout", type=_names("nchw", "nhwc"), default=("nchw", "nhwc"), help="fastconv's layouts (both)"
    )
    parser.add_argument(
        "--algorithms", type=_names(), default=("auto",), help="auto, all, or names of algorithms (auto)"
    )
    parser.add_argument(
        "--all-algorithms",
        dest="algorithms",
        action="store_const",
        const=("auto", "all"),
        help="the same as --algorithms auto,all: is what fastconv chooses the fastest?",
    )
    parser.add_argument("--isa", type=_names(), default=("auto",), help="auto, or targets such as avx2,avx512 (auto)")
    parser.add_argument(
        "--peers",
        type=_names("torch", "torch_channels_last", "torch_math", "compile", "openvino", "onnxruntime", "none"),
        help="torch, torch_channels_last, compile, none; openvino and onnxruntime for whole models; torch_math for sdpa "
        "(the first two; for sdpa alone torch,torch_math)",
    )
    parser.add_argument(
        "--pass", dest="directions", type=_names("fwd", "dgrad", "wgrad", "bwd"), help="fwd (default), …"
    )
    parser.add_argument(
        "--dtype",
        choices=("f32", "f64", "bf16", "f16"),
        default="f32",
        help="default f32; halves are for sdpa, linear and --device cuda",
    )
    parser.add_argument("--train", action="store_true", help="with 'model': a training step")
    parser.add_argument("--fuse", action="store_true", help="with 'model': fastconv's weights frozen by fastconv.fuse")
    parser.add_argument(
        "--frozen", action="store_true", help="with layers: weights packed ahead, as fastconv.fuse keeps them"
    )
    parser.add_argument("--only", default="", help="regular expression on shape strings: run only these")
    parser.add_argument(
        "--repetitions", type=int, default=15, help=f"samples of each row, at least {LEAST_REPETITIONS} (15)"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="a noisy row is sampled again up to this long (15)")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the order of contestants (0)")
    parser.add_argument("--json", type=Path, help="write everything, raw samples too, to this file")
    parser.add_argument("--list", action="store_true", help="print the shapes that would run, time nothing")
    return parser


def numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers joined by commas, got {text!r}") from None
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers, got {text!r}")
    return numbers


def _names(*known: str) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(word for word in text.split(",") if word)
        unknown = [name for name in names if known and name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known) or 'a list of names'}, got {text!r}")
        return names

    return parse


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    if args.device == "cuda":
        from fastconv.bench import gpu
        from fastconv.bench.gpu_cases import FAMILIES

        if not set(args.targets) <= set(FAMILIES) or args.dtype == "f64":
            raise UsageError(
                f"--device cuda has its own layers, in f32, bf16 or f16: expected some of {', '.join(FAMILIES)}, no f64"
            )
        return gpu.run(args, words)
    if not args.targets:
        raise UsageError("expected a target: see fastconv bench --help")
    if args.dtype in ("bf16", "f16") and not set(args.targets) <= {"sdpa", "linear"}:
        raise UsageError(
            f"--dtype {args.dtype} is for sdpa, linear and --device cuda alone, got {' '.join(args.targets)}"
        )
    import fastconv
    from fastconv.bench import context, peaks
    from fastconv.bench.report import Reporter

    settings = _settings(args)
    cases = _cases(args)
    if args.json and not args.json.parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no such folder")
    if args.list:
        for run, case in cases:
            print(f"{run}: {case.op} {case.direction} {case.name}" + (f" ×{case.count}" if case.count > 1 else ""))
        return 0
    reporter = Reporter()
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "context": context.collect(words, args.seed),
        "peaks": {"before": peaks.measure(args.threads, args.dtype)},
        "results": [],
    }
    reporter.heading(document, args.threads)
    fastconv.set_fallback("error")
    try:
        _run_cases(cases, settings, document, reporter, args)
    except KeyboardInterrupt:
        document["interrupted"] = True
        reporter.say("interrupted: what was measured until now follows", "yellow")
    finally:
        fastconv.set_fallback("warn")
    document["peaks"]["after"] = peaks.measure(args.threads, args.dtype)
    context.finish(document["context"])
    reporter.summary(document)
    if args.json:
        args.json.write_text(_as_json(document), encoding="utf-8")
    states = {
        entry["status"] for match in document["results"] for entry in match["contestants"] if entry["who"] == "fastconv"
    }
    return 1 if states & {"void", "failed"} else 0


def _as_json(document: dict[str, Any]) -> str:
    """A result a line, so that a file of raw samples stays small and two of them can be compared by diff."""
    head = json.dumps({key: value for key, value in document.items() if key != "results"}, indent=1, allow_nan=False)
    lines = ",\n".join(json.dumps(result, allow_nan=False, ensure_ascii=False) for result in document["results"])
    return f'{head[:-2]},\n "results": [\n{lines}\n ]\n}}\n'


def _run_cases(
    cases: list[tuple[str, Case]],
    settings: Settings,
    document: dict[str, Any],
    reporter: Reporter,
    args: argparse.Namespace,
) -> None:
    from fastconv.bench.runner import run

    pending: list[dict[str, Any]] = []
    waiting = list(reversed(cases))
    cases.clear()
    with reporter.progress(len(waiting)) as advance:
        while waiting:
            name, case = waiting.pop()  # a case holds its tensors, and all of a model's at batch 8 would not fit
            advance(f"{case.op} {case.direction} {case.name}")
            result = {"run": name, "repro": _repro(case, args)} | run(case, settings)
            document["results"].append(result)
            if pending and (pending[0]["op"], pending[0]["direction"]) != (case.op, case.direction):
                reporter.results(pending)
                pending = []
            pending.append(result)
    reporter.results(pending)


def _settings(args: argparse.Namespace) -> Settings:
    import fastconv
    from fastconv.bench.runner import Settings

    targets = fastconv._C.machine()["isa"]
    unknown = [isa for isa in args.isa if isa not in ("auto", *targets)]
    if unknown:
        raise UsageError(f"--isa {unknown[0]} does not run here, expected auto or some of {', '.join(targets)}")
    if args.repetitions < LEAST_REPETITIONS:
        raise UsageError(f"--repetitions must be at least {LEAST_REPETITIONS}, got {args.repetitions}")
    protocol = Protocol(
        repetitions=args.repetitions, max_repetitions=3 * args.repetitions, max_seconds=args.seconds, seed=args.seed
    )
    peers = tuple(peer for peer in args.peers if peer != "none")
    return Settings(args.threads, args.layout, args.algorithms, args.isa, peers, protocol)


def _cases(args: argparse.Namespace) -> list[tuple[str, Case]]:
    """(name of the run, case) for everything the command line asks for."""
    from fastconv.bench.calls import call_cases
    from fastconv.bench.families import FAMILIES, family_cases
    from fastconv.bench.networks import Network, layer_cases
    from fastconv.bench.sequences import GATES, RecurrentNetwork
    from fastconv.bench.texts import LENGTHS, TextNetwork
    from fastconv.models import names

    targets = list(args.targets)
    found: list[tuple[str, Case]] = []
    known, frozen = names(), " frozen" * args.frozen
    if args.fuse and (args.train or targets[0] != "model"):
        raise UsageError(
            "--fuse freezes the weights of a whole model in inference: it goes with 'model', without --train"
        )
    if args.frozen and ({"model", "call"} & set(targets) or set(args.directions or ("fwd",)) != {"fwd"}):
        raise UsageError("--frozen is for the forward of layers; a model's weights are frozen with 'model' and --fuse")
    if targets[0] == "model":
        for model in targets[1:] or ["resnet50"]:
            if model not in (*known, *LENGTHS, *GATES):
                expected = ", ".join([*known, *LENGTHS, *GATES])
                raise UsageError(f"no model named {model!r}, expected some of {expected}")
            if model in LENGTHS and args.train:
                raise UsageError(f"--train is for networks for images, lstm and gru, got {model}")
            if model in GATES and args.fuse:
                raise UsageError(f"--fuse has nothing to fuse in {model}")
            for batch in args.batch or (8 if args.train else 1,):
                direction = "train" if args.train else "infer"
                options = {"model": model, "batch": batch, "fused": args.fuse}
                kind = TextNetwork if model in LENGTHS else RecurrentNetwork if model in GATES else Network
                network = kind("model", direction, args.dtype, args.seed, **options)
                found.append((f"{model} n{batch}", network))
        return found
    for target in targets:
        if target == "call":
            cases = call_cases(args.dtype, args.seed)
            found += [("call recorded" if case.records_gradient else "call", case) for case in cases]
        elif target in known or target in FAMILIES:
            expand = layer_cases if target in known else family_cases
            for batch in args.batch or (1,):
                cases = expand(target, [batch], args.directions or ("fwd",), args.dtype, args.seed, args.frozen)
                found += [(f"{target} n{batch}{frozen}", case) for case in cases]
        else:
            run = (target if args.dtype in ("f32", "f64") else f"{target} {args.dtype}") + frozen
            found += [(run, case) for case in _op_cases(target, args)]
    found = [(run, case) for run, case in found if re.search(args.only, case.name)]
    if not found:
        raise UsageError("nothing to run: no shape matches")
    return found


def _op_cases(target: str, args: argparse.Namespace) -> list[Case]:
    from fastconv.bench import shapes as known
    from fastconv.bench.cases import PASSES, POOLS, make
    from fastconv.bench.families import FAMILIES
    from fastconv.models import names

    if target == "pool":
        return [case for pool in POOLS[:2] for case in _op_cases(pool, args)]
    if target not in PASSES:
        raise UsageError(
            f"no op or model named {target!r}, expected {', '.join([*PASSES, 'pool', 'call', *FAMILIES])} or {', '.join(names())}"
        )
    parsers: dict[str, Callable[[str], known.Shape]] = {
        "conv2d": known.parse_conv,
        "conv_transpose2d": known.parse_conv_transpose,
        "linear": known.parse_linear,
        "sdpa": known.parse_sdpa,
        "layer_norm": known.parse_norm,
        "batch_norm": known.parse_batch_norm,
    }
    parse = parsers.get(target, known.parse_pool)
    try:
        shapes: list[known.Shape] = [parse(text) for text in args.shape or _DEFAULT_SHAPES[target]]
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.batch:
        shapes = [known.batched(shape, n) for n in args.batch for shape in shapes]
    wanted = args.directions or ("fwd",)
    directions = [direction for direction in PASSES[target] if direction in wanted]
    if not directions:
        raise UsageError(f"{target} has the passes {', '.join(PASSES[target])}, got {', '.join(wanted)}")
    common = {"dtype": args.dtype, "seed": args.seed, "frozen": args.frozen}
    try:
        return [make(target, shape, d, **common) for d in directions for shape in shapes]
    except ValueError as error:
        raise UsageError(str(error)) from None


def _repro(case: Case, args: argparse.Namespace) -> str:
    """The command that runs this case alone, with the same options."""
    if case.op == "model":
        model, batch = case.name.split(" n")
        words = ["model", model, "--batch", batch] + ["--train"] * (case.direction == "train")
        words += ["--fuse"] * case.family.endswith("fused")
    elif case.records_gradient:
        words = ["call", "--only", f"^{re.escape(case.name)}$"]
    else:
        words = [case.op, "--shape", case.name, "--pass", case.direction] + ["--frozen"] * args.frozen
    for option in ("threads", "layout", "algorithms", "isa", "peers", "dtype", "seed"):
        value = getattr(args, option)
        words += [f"--{option}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(["fastconv", "bench", *words])
