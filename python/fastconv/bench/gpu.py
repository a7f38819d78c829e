"""`fastconv bench --device cuda`: fastconv.cuda against torch on layers of ResNet-50 and MobileNet, by CUDA events.

No machine with a GPU has run it yet. Each sample starts with a cold L2 cache, contestants take turns, and what the machine can
do, a copy and a large bf16 product, is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastconv
from fastconv.bench import context
from fastconv.testing.grids import layers
from fastconv.testing.problems import ConvCase

# More than the L2 cache of any GPU so far: 50 MB on an H100, 126 on a B200.
FLUSHED = 256 << 20
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def why_not() -> str:
    """Why nothing can be measured here; "" where it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    kernels = [kernel for kernel in fastconv.kernels() if kernel.target == "sm80"]
    if not kernels:
        return f"fastconv was built without CUDA kernels: {fastconv.build_info()['cuda_reason']}"
    return kernels[0].why_not


def clocks() -> str:
    """What nvidia-smi says of clocks, temperature and power."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi not found"
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    return subprocess.run([tool, query, "--format=csv"], capture_output=True, text=True).stdout


def seconds(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Samples of each call, taken in turns."""
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name in [name for _ in range(repetitions + 2) for name in calls]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flushed.zero_()
        begin.record()
        calls[name]()
        end.record()
        torch.cuda.synchronize()
        samples[name].append(begin.elapsed_time(end) / 1e3)
    return {name: times[2:] for name, times in samples.items()}  # the first two warm up, and cuDNN tries its algorithms


def ceilings(repetitions: int) -> dict[str, float]:
    """Bytes a second of a copy, read and write, and flops a second of a bf16 product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = seconds({"copy": lambda: target.copy_(source), "product": lambda: a @ a}, repetitions)
    return {
        "copy_bytes_per_second": 2 * source.numel() / statistics.median(times["copy"]),
        "product_flops_per_second": 2 * 8192.0**3 / statistics.median(times["product"]),
    }


def layer(case: ConvCase, batch: int, dtype: torch.dtype, backward: bool) -> dict[str, Callable[[], object]]:
    """One convolution, or its two gradients, by fastconv and by torch in both of its formats."""

    def call(convolve: Callable[..., Tensor], last: bool) -> Callable[[], object]:
        memory_format = torch.channels_last if last else torch.contiguous_format
        shapes = (batch, *case.x_shape[1:]), case.w_shape
        x, w = (torch.randn(s, device="cuda", dtype=dtype).to(memory_format=memory_format) for s in shapes)
        options: Any = {"stride": case.stride, "padding": (case.pad4[0], case.pad4[2]), "groups": case.groups}
        if not backward:
            return lambda: convolve(x, w, **options)
        y = convolve(x.requires_grad_(), w.requires_grad_(), **options)
        dy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, (x, w), dy, retain_graph=True)

    last = case.layout == "nhwc"
    ours = call(fastconv.cuda.conv2d, last)
    return {"fastconv": ours, "torch": call(F.conv2d, False), "torch channels_last": call(F.conv2d, True)}


def run(args: argparse.Namespace, words: Any) -> int:
    """Times every layer, prints a table and writes the samples to --json. 2, with the reason, where there is no GPU."""
    reason = why_not()
    if reason:
        print(f"fastconv bench --device cuda: nothing to measure here: {reason}")
        return 2
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    document: dict[str, Any] = {
        "context": context.collect(words, args.seed),
        "gpu": str(torch.cuda.get_device_properties(0)),
        "clocks_before": clocks(),
        "ceilings": ceilings(args.repetitions),
        "results": [],
    }
    print(document["gpu"], document["ceilings"])
    for batch in args.batch or (64,):
        for case in layers():
            for direction in ("fwd", "bwd"):
                calls = layer(case, batch, DTYPES[args.dtype], direction == "bwd")
                times = seconds(calls, args.repetitions)
                medians = {name: statistics.median(samples) for name, samples in times.items()}
                ratio = min(medians["torch"], medians["torch channels_last"]) / medians["fastconv"]
                print(f"{direction} n{batch} {case}: {medians['fastconv'] * 1e6:.1f} us, {ratio:.2f} of torch's speed")
                document["results"].append(
                    {"case": str(case), "batch": batch, "direction": direction, "samples": times}
                )
    document["clocks_after"] = clocks()
    if args.json:
        args.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return 0
