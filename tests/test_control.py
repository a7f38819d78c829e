"""kernels, use, explain, set_accuracy, build_info, the environment variables, fallbacks, plans."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch

import fastconv
from fastconv import _native, fallback, plan
from fastconv.functional import avg_pool2d, conv2d, max_pool2d

ISA = "scalar"


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 4, 9, 8), torch.randn(6, 4, 3, 3)


def ran(call: object, *args: object, **kwargs: object) -> str:
    with fastconv.observe() as records:
        call(*args, **kwargs)  # type: ignore[operator]
    (record,) = records
    return record.kernel


# ---- kernels, build_info --------------------------------------------------------------------------------------------------


def test_kernels_are_named_by_their_parts() -> None:
    for kernel in fastconv.kernels():
        assert kernel.name == f"{kernel.op}.{kernel.algorithm}.{kernel.dtype}.{kernel.target}"
        assert kernel.runnable == (kernel.why_not == "")
        assert kernel.error_growth >= 1
    assert {kernel.op for kernel in fastconv.kernels()} == set(plan.OPS)
    assert {kernel.op for kernel in fastconv.kernels("conv2d_dgrad")} == {"conv2d_dgrad"}


def test_kernels_of_an_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"unknown op 'conv9d', expected one of conv2d_fwd, .*avg_pool2d_bwd"):
        fastconv.kernels("conv9d")


def test_build_info() -> None:
    info = fastconv.build_info()
    assert {"version", "compiler", "flags", "targets", "cuda", "cuda_reason", "openmp", "machine"} <= info.keys()
    assert info["machine"]["cores"] >= 1


# ---- use ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["direct", ISA, f"conv2d_fwd.im2col.f32.{ISA}"])
def test_use_forces_by_algorithm_target_or_name(images: tuple[torch.Tensor, torch.Tensor], choice: str) -> None:
    expected = conv2d(*images)
    with fastconv.use(conv2d_fwd=choice):
        assert choice in ran(conv2d, *images)
        torch.testing.assert_close(conv2d(*images), expected)


def test_use_nests_and_ends(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    free = ran(conv2d, *images)
    with fastconv.use(conv2d_fwd=f"conv2d_fwd.direct.f32.{ISA}"):
        with fastconv.use(max_pool2d_fwd="direct"):
            assert ran(conv2d, *images) == f"conv2d_fwd.direct.f32.{ISA}"
        with fastconv.use(conv2d_fwd=""):
            assert ran(conv2d, *images) == free
        with pytest.raises(KeyError), fastconv.use(conv2d_fwd="im2col"):
            raise KeyError
        assert ran(conv2d, *images) == f"conv2d_fwd.direct.f32.{ISA}"
    assert ran(conv2d, *images) == free


def test_use_reaches_gradients_and_linear() -> None:
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with (
        fastconv.use(conv2d_fwd="direct", conv2d_dgrad="direct", conv2d_wgrad="direct"),
        fastconv.observe() as records,
    ):
        fastconv.functional.linear(x, w).sum().backward()
    assert [r.kernel.split(".")[1] for r in records] == ["direct"] * 3


def test_use_is_for_this_thread_alone(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    free = ran(conv2d, *images)
    found = []
    with fastconv.use(conv2d_fwd=f"conv2d_fwd.direct.f32.{ISA}"):
        thread = threading.Thread(target=lambda: found.append(ran(conv2d, *images)))
        thread.start()
        thread.join()
    assert found == [free]


def test_unknown_names_are_listed() -> None:
    with (
        pytest.raises(ValueError, match=r"unknown op 'conv9d', expected one of conv2d_fwd"),
        fastconv.use(conv9d="im2col"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"conv2d_fwd: unknown kernel 'im3col'.*direct.*im2col.*scalar"),
        fastconv.use(conv2d_fwd="im3col"),
    ):
        pass


def test_forcing_what_rejects_says_why(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    with fastconv.use(conv2d_fwd="pointwise"), pytest.raises(NotImplementedError, match="larger than 1x1"):
        conv2d(*images)


# ---- explain --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["conv2d_fwd", "conv2d_dgrad", "conv2d_wgrad"])
def test_explain_names_the_kernel_that_runs(images: tuple[torch.Tensor, torch.Tensor], op: str) -> None:
    x, w = images
    explanation = fastconv.explain(op, x, w, stride=2, padding=1)
    inputs = x.clone().requires_grad_(op == "conv2d_dgrad"), w.clone().requires_grad_(op == "conv2d_wgrad")
    with fastconv.observe() as records:
        y = conv2d(*inputs, stride=2, padding=1)
        if y.requires_grad:
            y.backward(torch.ones_like(y))
    assert explanation.chosen == {r.op: r.kernel for r in records}[op]
    assert {c.name for c in explanation.candidates} == {k.name for k in fastconv.kernels(op) if k.dtype == "f32"}
    (marked,) = [line for line in str(explanation).splitlines() if line.startswith("*")]
    assert marked.split()[1] == explanation.chosen
    costs = {c.name: c.cost for c in explanation.candidates if not c.verdict}
    assert costs[explanation.chosen] == min(costs.values())


@pytest.mark.parametrize("op", ["max_pool2d_fwd", "max_pool2d_bwd", "avg_pool2d_fwd", "avg_pool2d_bwd"])
def test_explain_pools(images: tuple[torch.Tensor, torch.Tensor], op: str) -> None:
    x = images[0].clone().requires_grad_()
    explanation = fastconv.explain(op, x, 3, padding=1)
    call = max_pool2d if op.startswith("max") else avg_pool2d
    with fastconv.observe() as records:
        y = call(x, 3, padding=1)
        y.backward(torch.ones_like(y))
    assert explanation.chosen == {r.op: r.kernel for r in records}[op]


@pytest.mark.parametrize("op", ["conv2d_fwd", "conv2d_dgrad", "conv2d_wgrad"])
def test_explain_linear(op: str) -> None:
    explanation = fastconv.explain(op, torch.ones(3, 8).bfloat16(), torch.ones(4, 8).bfloat16())
    assert "bf16" in explanation.problem
    assert explanation.chosen is not None
    assert explanation.chosen.startswith(f"{op}.pointwise.bf16.")


def test_explain_runs_nothing_and_leaves_no_gradient(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, w = (t.clone().requires_grad_() for t in images)
    with fastconv.observe() as records:
        fastconv.explain("conv2d_wgrad", x, w)
    assert records == []
    assert x.grad is None
    assert w.grad is None


def test_explain_what_nothing_accepts(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    with fastconv.use(conv2d_fwd="pointwise"):
        explanation = fastconv.explain("conv2d_fwd", *images)
    assert explanation.chosen is None
    assert "no kernel applies" in str(explanation)
    assert "larger than 1x1" in str(explanation)


def test_explain_what_torch_answers(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, w = (t.to(torch.bfloat16) for t in images)
    with pytest.raises(NotImplementedError, match="torch answers it"):
        fastconv.explain("conv2d_fwd", x, w)
    with pytest.raises(ValueError, match="unknown op"):
        fastconv.explain("conv9d", x, w)


# ---- Accuracy and ISA -----------------------------------------------------------------------------------------------------


@pytest.fixture
def strict() -> Iterator[None]:
    fastconv.set_accuracy("strict")
    yield
    fastconv.set_accuracy("fast")


@pytest.mark.usefixtures("strict")
def test_strict_accuracy_rules_out_inexact_kernels(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    growth = {kernel.name: kernel.error_growth for kernel in fastconv.kernels()}
    for candidate in fastconv.explain("conv2d_fwd", *images).candidates:
        assert candidate.verdict or growth[candidate.name] <= 1


def test_unknown_accuracy() -> None:
    with pytest.raises(ValueError, match="'fast' or 'strict'"):
        fastconv.set_accuracy("exact")  # type: ignore[arg-type]


def test_isa_limit(images: tuple[torch.Tensor, torch.Tensor]) -> None:
    try:
        plan.limit_isa("scalar")
        assert ran(conv2d, *images).endswith(".scalar")
    finally:
        plan.limit_isa("")


# ---- Environment ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch, fastconv
with fastconv.observe() as records:
    fastconv.functional.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3))
print(records[0].kernel)
"""


def run(env: dict[str, str], script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_environment_forces_and_logs() -> None:
    result = run({"FASTCONV_FORCE": f"conv2d_fwd=direct, max_pool2d_fwd={ISA}", "FASTCONV_LOG": "1"})
    assert result.stdout.startswith("conv2d_fwd.direct.f32."), result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fastconv:")]
    assert result.stdout.strip() in line
    assert "1x2x5x5 3x2x3x3 1x3x3x3" in line


def test_environment_limits_the_isa() -> None:
    result = run({"FASTCONV_ISA": "scalar"})
    assert result.stdout.strip().endswith(".scalar"), result.stderr


@pytest.mark.parametrize("value, message", [("conv9d=direct", "unknown op 'conv9d'"), ("direct", "FASTCONV_FORCE")])
def test_environment_with_a_mistake(value: str, message: str) -> None:
    result = run({"FASTCONV_FORCE": value})
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]


# ---- Fallbacks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_fallbacks() -> Iterator[None]:
    before = dict(fallback._counts)
    fallback._counts.clear()
    yield
    fastconv.set_fallback("warn")
    fallback._counts.clear()
    fallback._counts.update(before)


@pytest.mark.usefixtures("fresh_fallbacks")
def test_fallback_warns_once_for_each_reason_and_counts() -> None:
    x, w = torch.ones(1, 1, 3, 3, dtype=torch.float16), torch.ones(1, 1, 1, 1, dtype=torch.float16)
    with pytest.warns(fastconv.FallbackWarning, match=r"conv2d .*float16.* Hint: ") as caught:
        conv2d(x, w)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conv2d(x, w)
    with pytest.warns(fastconv.FallbackWarning, match="bfloat16"):
        conv2d(x.bfloat16(), w.bfloat16())
    assert sorted(fastconv.fallback_counts().values()) == [1, 2]
    assert {op for op, _ in fastconv.fallback_counts()} == {"conv2d"}


@pytest.mark.usefixtures("fresh_fallbacks")
def test_fallback_silent_and_error() -> None:
    x, w = torch.ones(1, 1, 3, 3, dtype=torch.float16), torch.ones(1, 1, 1, 1, dtype=torch.float16)
    fastconv.set_fallback("silent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conv2d(x, w)
    fastconv.set_fallback("error")
    with pytest.raises(NotImplementedError, match=r"conv2d .*float16"):
        conv2d(x, w)
    assert sum(fastconv.fallback_counts().values()) == 2
    with pytest.raises(ValueError, match="'silent', 'warn' or 'error'"):
        fastconv.set_fallback("loud")  # type: ignore[arg-type]


# ---- Plans ----------------------------------------------------------------------------------------------------------------


KEPT_SCRATCH = 16 << 20  # csrc/eager/scratch.h


def test_scratch_is_aligned_kept_and_each_threads_own() -> None:
    address = _native.load().scratch(1000)
    assert address % 64 == 0
    assert _native.load().scratch(10) == address
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(_native.load().scratch(1000)))
    thread.start()
    thread.join()
    assert found[0] != address
    assert _native.load().scratch(KEPT_SCRATCH + 1) != address
    assert _native.load().scratch(10) == address


def test_scratch_holds_what_it_says() -> None:
    for nbytes in (1, 63, 64, 5000, KEPT_SCRATCH):
        ctypes.memset(_native.load().scratch(nbytes), 0, nbytes)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 1, 1), (0, 3, 4, 5), (2, 3, 0, 5)])
def test_strides_are_torchs(shape: tuple[int, ...], channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert plan.strides_of(shape, channels_last) == torch.empty(shape, memory_format=memory_format).stride()


def test_memory_format_is_read_like_torch_reads_it() -> None:
    # The prims' function is torch's own statement of the rule; conv2d's output shows what C++ does with the same strides.
    sizes = ((2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 1, 4), (3, 4, 1, 1), (1, 1, 1, 1), (2, 3, 1, 5))
    for shape in sizes:
        base = torch.randn(tuple(2 * s for s in shape))
        for order in ((0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0), (0, 3, 1, 2)):
            inverse = [order.index(i) for i in range(4)]
            for step in (1, 2):
                t = base.permute(order).contiguous().permute(inverse)
                t = t[tuple(slice(0, s * step, step) for s in shape)]
                y = torch.conv2d(t, torch.ones(2, shape[1], 1, 1).contiguous())
                expected = y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
                if y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last):
                    continue
                assert plan.prefers_channels_last(t.shape, t.stride()) == expected, (t.shape, t.stride())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("groups", [1, 4, 96], ids=["dense", "grouped", "depthwise"])
def test_an_algorithm_is_chosen_in_its_widest_vectors(groups: int, layout: torch.memory_format) -> None:
    x = torch.randn(1, 96, 56, 56).contiguous(memory_format=layout)
    with fastconv.observe() as records:
        conv2d(x, torch.randn(96, 96 // groups, 3, 3), stride=2, padding=1, groups=groups)
    algorithm = records[0].kernel.rpartition(".")[0]
    widest = next(
        kernel
        for kernel in fastconv.kernels("conv2d_fwd")
        if kernel.runnable and kernel.name.startswith(algorithm + ".")
    )
    assert records[0].kernel == widest.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_depthwise_is_depthwise_at_every_stride(layout: torch.memory_format, stride: int, dtype: torch.dtype) -> None:
    """The matrix multiplications, with one channel to multiply, take 4 to 60 times as long; stride 4 in f64 once chose one."""
    for size, filter_size in ((48, 3), (96, 5), (33, 4)):
        x = torch.randn(1, size, 64, 48, dtype=dtype).contiguous(memory_format=layout)
        w = torch.randn(size, 1, filter_size, filter_size, dtype=dtype)
        answer = fastconv.explain("conv2d_fwd", x, w, stride=stride, padding=filter_size // 2, groups=size)
        assert ".depthwise." in str(answer).split("*")[1].splitlines()[0], str(answer)
