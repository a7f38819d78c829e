"""Run a whole network on fastconv's kernels and on torch's, and say whether they agree and how long each took.

A real photograph goes through both with the same weights; with --train, lenet5 learns handwritten digits on both, and transformer
to read dates.
The exit status is 1 if the results differ by more than the stated limit, anything fell back to torch, or a layer ran
without a kernel of fastconv's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from fastconv.commands import CommandError
from fastconv.commands.console import print_heading, print_table

if TYPE_CHECKING:
    from torch import Tensor

    from fastconv.commands.twins import Comparison

# Largest |y − y_torch| allowed, over max |y_torch|. Through the fifty layers of ResNet-50 float32 rounding alone
# costs some 1e-6 on either backend; a wrong tap or a dropped tail costs more than 1e-2.
AGREEMENT_LIMIT = 1e-4

TOP = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastconv check``."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a reference model, such as resnet50 (any other word lists them)",
    )
    parser.add_argument("--image", metavar="F", help="photograph to classify (default: scikit-learn's china.jpg)")
    parser.add_argument("--weights", metavar="F", help=".pth or .safetensors file (default: random weights)")
    parser.add_argument(
        "--train", action="store_true", help="train instead: lenet5 on handwritten digits, transformer on written dates"
    )
    parser.add_argument("--plot", metavar="F", help="where --train puts the loss curves (default: MODEL-training.png)")
    parser.add_argument("--batch", metavar="N", type=_positive, default=1, help="crops of the photograph (default: 1)")
    parser.add_argument(
        "--threads", metavar="N", type=_positive, help="for both backends (default: torch's; 1 with --train)"
    )
    parser.add_argument("--rounds", metavar="N", type=_positive, default=7, help="timed runs of each (default: 7)")
    parser.add_argument("--channels-last", action="store_true", help="NHWC in memory instead of torch's default NCHW")
    parser.add_argument("--json", metavar="F", help="also write everything found to this file")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Exit status of ``fastconv check`` with the parsed options ``args``."""
    import torch

    from fastconv import models

    if not (args.train and args.model in models.names("sequence")):
        try:
            models.spec(args.model)
        except ValueError as error:
            raise CommandError(str(error)) from None
    if args.plot is not None and not args.train:
        raise CommandError("--plot is the picture of a training run: add --train")
    threads = torch.get_num_threads()
    # A step of networks so small is too little work to share out: on two busy cores the waiting costs ten times the step.
    torch.set_num_threads(args.threads or (1 if args.train else threads))
    try:
        found = _check_training(args) if args.train else _check_photo(args)
    finally:
        torch.set_num_threads(threads)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0 if found["passed"] else 1


def _check_photo(args: argparse.Namespace) -> dict[str, Any]:
    """Compare both backends on the photograph, print the findings and return them."""
    import torch

    from fastconv import models
    from fastconv.commands.photo import BUNDLED_PHOTO, open_photo, photo_batch
    from fastconv.commands.twins import build_twins, calibrate_batch_norm, compare

    spec = models.spec(args.model)
    x = photo_batch(open_photo(args.image), args.batch, spec.in_channels, spec.input_size)
    model, twin = build_twins(args.model, **({} if args.weights else spec.well_conditioned))
    if args.weights is not None:
        try:
            twin.load_state_dict(models.load_weights(model, args.weights).state_dict())
        except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
            raise CommandError(str(error)) from error
    else:
        calibrate_batch_norm(twin, x)
        model.load_state_dict(twin.state_dict())
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        for network in (model, twin):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    layout = "NHWC (channels_last)" if args.channels_last else "NCHW"
    print(
        f"{args.model} on {args.image or BUNDLED_PHOTO}: {tuple(x.shape)} {layout}, threads: {torch.get_num_threads()}"
    )
    if args.weights is None:
        print(
            "No --weights given, so the weights are random (seed 0, BatchNorm fitted to the photograph): "
            "the two backends must agree, but the classes mean nothing."
        )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("timing both backends", total=args.rounds)
        result = compare(model, twin, x, args.rounds, tick=lambda: progress.advance(task))

    agrees = result.agrees(AGREEMENT_LIMIT)
    _print_layers(result)
    _print_top(result)
    _print_verdict(result, agrees)
    return {
        "model": args.model,
        "image": args.image or BUNDLED_PHOTO,
        "weights": args.weights,
        "input": list(x.shape),
        "layout": layout,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "max_abs_error": result.max_error,
        "max_abs_output": result.scale,
        "limit": AGREEMENT_LIMIT,
        "top": {"fastconv": _top(result.y), "torch": _top(result.y_torch)},
        "seconds": {"fastconv": result.fastconv_s, "torch": result.torch_s},
        "layers": [vars(layer) for layer in result.layers],
        "fallbacks": result.fallbacks,
        "layers_without_kernel": result.unserved,
        "passed": agrees and not result.fallbacks and not result.unserved,
    }


def _top(y: Tensor) -> list[dict[str, float]]:
    """The first sample's most likely classes, most likely first; those of a map of pixels by its mean logits."""
    from fastconv.models import per_image

    probabilities, classes = per_image(y[:1].float())[0].softmax(0).topk(TOP)
    return [{"class": int(c), "probability": float(p)} for c, p in zip(classes, probabilities, strict=True)]


def _ratio(torch_s: float, fastconv_s: float) -> str:
    return f"{torch_s / fastconv_s:.2f}x"


def _print_layers(result: Comparison) -> None:
    print_heading("Layers (median times)")
    rows = [
        [
            layer.name,
            layer.kind,
            "x".join(map(str, layer.output)),
            f"{layer.fastconv_s * 1e3:.3f}",
            f"{layer.torch_s * 1e3:.3f}",
            _ratio(layer.torch_s, layer.fastconv_s),
            ", ".join(layer.kernels) or "none",
        ]
        for layer in result.layers
    ]
    sums = sum(layer.fastconv_s for layer in result.layers), sum(layer.torch_s for layer in result.layers)
    for title, (ours_s, theirs_s) in {
        "all of these": sums,
        "whole network": (result.fastconv_s, result.torch_s),
    }.items():
        rows.append([title, "", "", f"{ours_s * 1e3:.3f}", f"{theirs_s * 1e3:.3f}", _ratio(theirs_s, ours_s), ""])
    print_table(("layer", "kind", "output", ">fastconv ms", ">torch ms", ">speed-up", "kernel"), rows)


def _print_top(result: Comparison) -> None:
    print_heading(f"Top {TOP} classes of the centre crop")
    rows = [
        [str(rank), str(a["class"]), f"{a['probability']:.4%}", str(b["class"]), f"{b['probability']:.4%}"]
        for rank, (a, b) in enumerate(zip(_top(result.y), _top(result.y_torch), strict=True), start=1)
    ]
    print_table((">rank", ">fastconv", ">probability", ">torch", ">probability"), rows)


def _print_verdict(result: Comparison, agrees: bool) -> None:
    print_heading("Verdict")
    share = result.max_error / result.scale if result.scale else result.max_error
    print(
        f"largest difference of a logit: {result.max_error:.3g}, {share:.3g} of max|y| = {result.scale:.4g} "
        f"(limit {AGREEMENT_LIMIT:g}): {'they agree' if agrees else 'THEY DISAGREE'}"
    )
    for reason, count in result.fallbacks.items():
        print(f"fell back to torch {count} times: {reason}")
    if not result.fallbacks:
        print("fallbacks to torch: none")
    if result.unserved:
        print(f"NO FASTCONV KERNEL RAN in {', '.join(result.unserved)}")
    print(
        f"time: fastconv {result.fastconv_s * 1e3:.2f} ms, torch {result.torch_s * 1e3:.2f} ms, "
        f"{_ratio(result.torch_s, result.fastconv_s)}"
    )


def _check_training(args: argparse.Namespace) -> dict[str, Any]:
    """Train on both backends, print the findings, write the picture and return the findings."""
    from fastconv.commands import train

    for option, given in (
        ("--image", args.image),
        ("--weights", args.weights),
        ("--batch", args.batch != 1),
        ("--channels-last", args.channels_last),
    ):
        if given:
            raise CommandError(f"{option} has no meaning with --train")
    return train.check(args.model, plot=args.plot)
