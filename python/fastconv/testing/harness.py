"""Runs one kernel, by name, on one problem, and says what is wrong with the result. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastconv import _native, reference
from fastconv.testing import fill, grids, tolerance
from fastconv.testing.attention import SdpaCase, native_sdpa, sdpa_inputs
from fastconv.testing.attention_truth import sdpa_truth
from fastconv.testing.batch_norm import OPERANDS as BATCH_NORM_OPERANDS
from fastconv.testing.batch_norm import BatchNormCase, batch_norm_inputs, batch_norm_truth, native_batch_norm
from fastconv.testing.buffers import CANARY, Block, Operand, Place, strides_of
from fastconv.testing.norm import OPERANDS as NORM_OPERANDS
from fastconv.testing.norm import NormCase, native_norm, norm_inputs, norm_truth
from fastconv.testing.problems import LAYOUTS, Case, ConvCase, PoolCase
from fastconv.testing.recurrent import OPERANDS as RECURRENT_OPERANDS
from fastconv.testing.recurrent import RecurrentCase, native_recurrent, recurrent_inputs, recurrent_truth

Array = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

# How each dtype is stored here: NumPy has no bf16, so its bits are kept.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": np.dtype(np.uint16),
    "f16": np.dtype(np.float16),
}

# Which operands an op reads and which it writes; bias and residual join them where the problem has them.
CONV_ROLES = {
    "conv2d_fwd": (("x", "w"), ("y",)),
    "conv2d_dgrad": (("y", "w"), ("x",)),
    "conv2d_wgrad": (("x", "y"), ("w",)),
}
POOL_ROLES = {
    "max_pool2d_fwd": (("x",), ("y", "indices")),
    "max_pool2d_bwd": (("y", "indices"), ("x",)),
    "avg_pool2d_fwd": (("x",), ("y",)),
    "avg_pool2d_bwd": (("y",), ("x",)),
}


class KernelFault(AssertionError):
    """A kernel gave a wrong result, left something unwritten or touched memory that is not its own."""


_stand_in: Any = None


def native() -> Any:
    """The compiled module, or what stands in for it."""
    return _stand_in or _native.load()


class _Dense(NamedTuple):
    """What the harness asks of cases whose operands are dense."""

    problem: Callable[..., Any]
    inputs: Callable[..., Arrays]
    truth: Callable[..., Any]
    operands: tuple[str, ...]
    run: str


DENSE_CASES = (NormCase, BatchNormCase, RecurrentCase)
_DENSE: dict[type, _Dense] = {
    NormCase: _Dense(native_norm, norm_inputs, norm_truth, NORM_OPERANDS, "run_norm"),
    BatchNormCase: _Dense(
        native_batch_norm, batch_norm_inputs, batch_norm_truth, BATCH_NORM_OPERANDS, "run_batch_norm"
    ),
    RecurrentCase: _Dense(native_recurrent, recurrent_inputs, recurrent_truth, RECURRENT_OPERANDS, "run_recurrent"),
}


@contextmanager
def using(module: Any) -> Iterator[None]:
    """Checks the kernels of `module`, which answers as the compiled one does, while the block runs."""
    global _stand_in

    def forget() -> None:
        for keeper in (native_problem, accepted, _accepted, error_growth):
            keeper.cache_clear()

    _stand_in = module
    forget()
    try:
        yield
    finally:
        _stand_in = None
        forget()


@cache
def native_problem(case: Case, dtype: str) -> Any:
    """The case as the compiled module's problem, with the strides of its layout."""
    if isinstance(case, SdpaCase):
        return native_sdpa(native(), case, dtype)
    if isinstance(case, DENSE_CASES):
        return _DENSE[type(case)].problem(native(), case, dtype)
    formats = LAYOUTS[case.layout]
    x = _strides(case.x_shape, formats[0])
    y = _strides(case.y_shape, formats[2])
    common: dict[str, Any] = {name: getattr(case, name) for name in ("N", "C", "H", "W", "P", "Q", "R", "S")}
    common |= {"dtype": dtype, "stride": case.stride, "dilation": case.dilation, "x": x, "y": y}
    if isinstance(case, PoolCase):
        return native().Pool2dProblem(
            **common,
            pad=case.pad4,
            divisor_override=case.divisor,
            count_include_pad=case.include_pad,
            adaptive=case.adaptive is not None,
        )
    k, c, r, s = _strides(case.w_shape, formats[1])
    return native().Conv2dProblem(
        **common,
        K=case.K,
        groups=case.groups,
        pad=(case.pad4[0], case.pad4[2]),
        w=(case.K // case.groups * k, k, c, r, s),
        bias=case.bias,
        residual=case.residual,
        activation=case.activation,
    )


def _strides(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    return strides_of(shape, layout)[0]


def verdicts(op: str, case: Case, dtype: str) -> dict[str, str]:
    """Each kernel of the op by name: '' if it accepts the case, otherwise why not."""
    return {name: verdict for name, verdict, _ in native().explain(op, native_problem(case, dtype))}


def make_inputs(op: str, case: Case, values: fill.Fill = fill.normal) -> Arrays:
    """Logical arrays of what the op reads, the same for every dtype. Elements that a layout repeats are repeated."""
    if isinstance(case, SdpaCase):
        return sdpa_inputs(op, case, values)
    if isinstance(case, DENSE_CASES):
        return _DENSE[type(case)].inputs(op, case, values)
    formats = LAYOUTS[case.layout]
    shapes = {"x": (case.x_shape, formats[0]), "y": (case.y_shape, formats[2])}
    if isinstance(case, ConvCase):
        shapes["w"] = (case.w_shape, formats[1])
    reads = (CONV_ROLES | POOL_ROLES)[op][0]
    inputs: Arrays = {}
    for role in reads:
        if role == "indices":
            continue
        shape, layout = shapes[role]
        steps = _strides(shape, layout)
        # A NaN must not meet the zeros of the padding in a product, which implementations are free to skip.
        data = (fill.normal if role == "w" and values is fill.with_one_nan else values)(f"{case}{role}", shape)
        inputs[role] = np.broadcast_to(data[tuple(slice(None if step else 1) for step in steps)], shape)
    if isinstance(case, ConvCase) and op == "conv2d_fwd":
        plain = fill.normal if values is fill.with_one_nan else values
        if case.bias:
            inputs["bias"] = plain(f"{case}bias", (case.K,))
        if case.residual:
            inputs["residual"] = plain(f"{case}residual", case.y_shape)
    if "indices" in reads:
        assert isinstance(case, PoolCase)
        inputs["indices"] = max_pool_truth(case, np.asarray(values(f"{case}x", case.x_shape)))[1]
    return inputs


def max_pool_truth(case: PoolCase, x: Array) -> tuple[Array, NDArray[np.int64]]:
    if case.adaptive is not None:
        return reference.adaptive_max_pool2d(x, case.adaptive)
    return reference.max_pool2d(
        x, (case.R, case.S), stride=case.stride, pad4=case.pad4, dilation=case.dilation, ceil_mode=case.ceil
    )


@dataclass
class Truth:
    """What an op must give: the expected outputs, and for each the error allowed to a dtype with a plain sum's
    rounding. ``norm`` is the L2 norm that relative errors refer to, where it is not the output's own. ``rounding`` is what
    tensor cores add, to which intermediate results go as halves and floats as tf32.
    """

    outputs: Arrays
    allowed: Callable[[str, np.dtype[Any]], Array | float]
    norm: float | None = None
    rounding: Callable[[str, str], Array | float] | None = None


def _conv_truth(op: str, case: ConvCase, inputs: Arrays) -> Truth:
    geometry: Any = {"stride": case.stride, "pad4": case.pad4, "dilation": case.dilation, "groups": case.groups}
    if op == "conv2d_fwd":
        operands: Any = inputs
        z = reference.conv2d(**operands, **geometry)
        y = reference.activation(z, case.activation)
        magnitude = tolerance.SLOPE[case.activation] * reference.conv2d_magnitude(**operands, **geometry)

        def allowed(_: str, dtype: np.dtype[Any]) -> Array | float:
            return tolerance.bound(magnitude, dtype) + tolerance.activation_rounding(z, y, case.activation, dtype)

        # An activation passes on the error of its argument, which for a saturated sigmoid is far larger than its result.
        norm = tolerance.SLOPE[case.activation] * float(np.linalg.norm(z))
        return Truth({"y": y}, allowed, max(norm, float(np.linalg.norm(y))), lambda *_: tolerance.TF32 * magnitude)

    def gradients(y: Array, x_or_w: Array) -> dict[str, Array]:
        if op == "conv2d_dgrad":
            return {"x": reference.conv2d_dgrad(y, x_or_w, case.x_shape, **geometry)}
        dw, db = reference.conv2d_wgrad(y, x_or_w, case.w_shape, **geometry)
        return {"w": dw, "bias": db} if case.bias else {"w": dw}

    other = inputs["w" if op == "conv2d_dgrad" else "x"]
    sizes = gradients(np.abs(inputs["y"]), np.abs(other))
    return Truth(
        gradients(inputs["y"], other),
        lambda name, dtype: tolerance.bound(sizes[name], dtype),
        rounding=lambda name, _: tolerance.TF32 * sizes[name],
    )


def _pool_truth(op: str, case: PoolCase, inputs: Arrays) -> Truth:
    if op == "max_pool2d_fwd":
        return Truth(dict(zip(("y", "indices"), max_pool_truth(case, inputs["x"]), strict=True)), lambda *_: 0.0)
    if op == "max_pool2d_bwd":
        dx = reference.max_pool2d_bwd(inputs["y"], inputs["indices"], case.x_shape)
        sizes = reference.max_pool2d_bwd(np.abs(inputs["y"]), inputs["indices"], case.x_shape)
        return Truth({"x": dx}, lambda _, dtype: tolerance.bound(sizes, dtype))
    out = "y" if op == "avg_pool2d_fwd" else "x"
    expected, size = _average(op, case, inputs), _average(op, case, {k: np.abs(v) for k, v in inputs.items()})
    return Truth({out: expected}, lambda _, dtype: tolerance.bound(np.abs(size), dtype))


def _average(op: str, case: PoolCase, inputs: Arrays) -> Array:
    if case.adaptive is not None:
        if op == "avg_pool2d_fwd":
            return reference.adaptive_avg_pool2d(inputs["x"], case.adaptive)
        return reference.adaptive_avg_pool2d_bwd(inputs["y"], case.x_shape)
    geometry: Any = {"kernel": (case.R, case.S), "stride": case.stride, "pad4": case.pad4, "ceil_mode": case.ceil}
    geometry |= {"count_include_pad": case.include_pad, "divisor_override": case.divisor or None}
    if op == "avg_pool2d_fwd":
        return reference.avg_pool2d(inputs["x"], **geometry)
    return reference.avg_pool2d_bwd(inputs["y"], case.x_shape, **geometry)


def problem_data(op: str, case: Case, values: fill.Fill = fill.normal, dtype: str = "f32") -> tuple[Arrays, Truth]:
    """Inputs and truth of an op on a case, computed once for all kernels. Halves have inputs that they hold exactly."""
    return _problem_data(op, case, values, dtype if dtype in tolerance.HALVES else "f32")


@cache
def _problem_data(op: str, case: Case, values: fill.Fill, dtype: str) -> tuple[Arrays, Truth]:
    if isinstance(case, SdpaCase):
        inputs = sdpa_inputs(op, case, values, dtype)
        outputs, allowed, rounding = sdpa_truth(op, case, inputs)
        return inputs, Truth(outputs, allowed, rounding=rounding)
    if isinstance(case, DENSE_CASES):
        inputs = _DENSE[type(case)].inputs(op, case, values, dtype)
        return inputs, Truth(*_DENSE[type(case)].truth(op, case, inputs, dtype))
    inputs = {n: v if n == "indices" else tolerance.stored(v, dtype) for n, v in make_inputs(op, case, values).items()}
    with np.errstate(invalid="ignore"):
        truth = _conv_truth(op, case, inputs) if isinstance(case, ConvCase) else _pool_truth(op, case, inputs)
    return inputs, truth


@dataclass
class Result:
    outputs: Arrays
    kernel: str


def run(
    op: str,
    case: Case,
    dtype: str,
    inputs: Arrays,
    *,
    force: str = "",
    threads: int = 1,
    place: Place = "heap",
    scratch: int = int(CANARY),
    omit: tuple[str, ...] = (),
    packed: bool = False,
) -> Result:
    """Runs ``force`` ('' = whatever is selected) on fresh memory and returns the logical outputs.

    Outputs and gaps hold NaN canaries before, the workspace is filled with the byte ``scratch``. Operands named in
    ``omit`` are not given, as max pooling's indices need not be. With ``packed``, the kernel gets the filters in its own
    order, and NaN where they were. Raises NotImplementedError if the kernel does not accept
    the case and KernelFault if it touches memory that is not its own, changes an input or leaves an output unwritten.
    """
    plan = native().plan(op, native_problem(case, dtype), threads, force)
    operands = _operands(op, case, dtype, inputs, place)
    for name in omit:
        del operands[name]
    workspace = Block(plan.workspace, place, 64)
    workspace.bytes[:] = scratch
    address = {name: operand.address for name, operand in operands.items()}
    scratch_address = workspace.address if plan.workspace else 0
    memories: dict[str, Operand | Block] = {**operands, "workspace": workspace}
    if isinstance(case, ConvCase):
        if packed:
            memories["packed"] = kept = Block(plan.packed[0], place, 64)
            kept.bytes[:] = int(CANARY)
            plan.pack(address["w"], kept.address)
            address["packed"] = kept.address
            del memories["w"]
            operands["w"].view[...] = tolerance.encode_bf16(np.array(np.nan)) if dtype == "bf16" else np.nan
        names = ("x", "w", "bias", "residual", "y", "packed")
        plan.run_conv2d(*(address.get(name, 0) for name in names), workspace=scratch_address)
    elif isinstance(case, SdpaCase):
        every = (
            "q",
            "k",
            "v",
            "mask",
            "out",
            "lse",
            "dout",
            "dlse",
            "dq",
            "dk",
            "dv",
            "dmask",
            "bias",
            "sink",
            "dbias",
        )
        plan.run_sdpa([address.get(name, 0) for name in every], scratch_address)
    elif isinstance(case, DENSE_CASES):
        dense = _DENSE[type(case)]
        getattr(plan, dense.run)([address.get(name, 0) for name in dense.operands], scratch_address)
    else:
        plan.run_pool2d(*(address.get(name, 0) for name in ("x", "y", "indices")), scratch_address)
    for name, memory in memories.items():
        if damage := memory.damage():
            raise KernelFault(f"{plan.kernel} on {case}: {name}: {damage}")
    outputs: Arrays = {}
    for name, operand in operands.items():
        if not operand.is_output:
            continue
        if (left := operand.unwritten()).any():
            raise KernelFault(
                f"{plan.kernel} on {case}: {name}: {int(left.sum())} of {left.size} elements left unwritten"
            )
        bits = dtype == "bf16" and operand.view.dtype == NUMPY_DTYPES[dtype]
        outputs[name] = tolerance.decode_bf16(operand.view) if bits else operand.view
    return Result(outputs, plan.kernel)


def _operands(op: str, case: Case, dtype: str, inputs: Arrays, place: Place) -> dict[str, Operand]:
    kind = NUMPY_DTYPES[dtype]
    wide = np.dtype(np.float32) if dtype in tolerance.HALVES else kind
    if isinstance(case, SdpaCase):
        kinds = {name: kind if name in case.stored else wide for name in case.operands(op)}
        kinds |= {"mask": np.dtype(np.bool_)} if case.boolean and case.mask else {}
        data = dict(inputs)
        if dtype == "bf16":
            data |= {n: tolerance.encode_bf16(v) for n, v in inputs.items() if n in case.stored}
        with np.errstate(over="ignore"):  # large neighbours, in f16
            return {n: Operand.make(case.shapes[n][0], kinds[n], case.shapes[n][1], place, data.get(n)) for n in kinds}
    if isinstance(case, DENSE_CASES):
        kinds = {n: kind if n in case.stored else wide for n in case.operands(op)}
        data = dict(inputs)
        if dtype == "bf16":
            data |= {n: tolerance.encode_bf16(v) for n, v in inputs.items() if n in case.stored}
        formats = {n: getattr(case, "layout", "nchw") if len(case.shape(n)) == 4 else "nchw" for n in kinds}
        formats |= {n: layout for n, layout in getattr(case, "formats", {}).items() if n in kinds}
        return {n: Operand.make(case.shape(n), kinds[n], formats[n], place, data.get(n)) for n in kinds}
    x_format, w_format, y_format = LAYOUTS[case.layout]
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any], str]] = {
        "x": (case.x_shape, kind, x_format),
        "y": (case.y_shape, kind, y_format),
    }
    if isinstance(case, ConvCase):
        shapes |= {
            "w": (case.w_shape, kind, w_format),
            "residual": (case.y_shape, kind, y_format),
            "bias": ((case.K,), kind, ""),
        }
    else:
        shapes["indices"] = (case.y_shape, np.dtype(np.int64), y_format)
    reads, writes = (CONV_ROLES | POOL_ROLES)[op]
    roles = [*reads, *writes, *(name for name in ("bias", "residual") if getattr(case, name, False))]
    made = {}
    for name in roles:
        shape, dtype_of, layout = shapes[name]
        values = inputs.get(name)
        if dtype == "bf16" and values is not None and name != "indices":
            values = tolerance.encode_bf16(values)
        with np.errstate(over="ignore"):  # large neighbours, in f16
            made[name] = Operand.make(shape, dtype_of, layout, place, values)
    return made


def check(
    name: str,
    case: Case,
    values: fill.Fill = fill.normal,
    *,
    exact: bool = False,
    threads: int = 1,
    place: Place = "heap",
    omit: tuple[str, ...] = (),
) -> None:
    """Runs the kernel called ``name`` on a case that it accepts and raises KernelFault if the result is wrong.

    With ``exact``, sums of integers must come out without any error.
    """
    op, _, dtype, _ = name.split(".")
    inputs, truth = problem_data(op, case, values, dtype)
    result = run(op, case, dtype, inputs, force=name, threads=threads, place=place, omit=omit)
    if result.kernel != name:
        raise KernelFault(f"asked for {name}, got {result.kernel}")
    growth = error_growth(name)
    # What tensor cores multiply is rounded: floats to tf32, attention's weights to halves. So are those of products of pairs.
    half_weights = isinstance(case, SdpaCase) and dtype in tolerance.HALVES
    pairs = name.endswith(".avx512_bf16")
    rounded = half_weights if pairs else name.endswith(".sm80") and (growth > 1 or half_weights)
    for output, got in result.outputs.items():
        expected = truth.outputs[output]
        if exact and dtype in tolerance.HALVES and isinstance(case, ConvCase):
            expected = tolerance.stored(expected, dtype)  # of an exact sum one rounding is left
        if growth > 1 and not exact and not rounded and isinstance(case, ConvCase):
            error = tolerance.relative_l2(got, expected, truth.norm)
            allowed = tolerance.l2_bound(growth, case.terms(op), got.dtype)
            fault = f"relative L2 error {error:.3g}, {allowed:.3g} is allowed" if not error <= allowed else ""
        else:
            # float16 is not computed in, and neither is what arrives as the float32 that bf16 was computed in.
            computed = np.dtype(np.float32) if dtype in tolerance.HALVES else got.dtype
            limit: Any = 0.0 if exact else truth.allowed(output, computed)
            halved = output in case.stored if isinstance(case, (SdpaCase, *DENSE_CASES)) else output != "indices"
            if rounded and truth.rounding and not exact:
                limit = limit + truth.rounding(output, dtype)
                if pairs and output == "out":  # divided by the sum of the rounded weights, which is off by as much
                    limit = limit + tolerance.HALVES[dtype][0] / 2 * np.abs(expected)
            if dtype in tolerance.HALVES and halved and not exact:
                limit = tolerance.storing(expected, limit, dtype)
            mismatch = tolerance.compare(got, expected, limit)
            fault = str(mismatch) if mismatch else ""
        if fault:
            again = repro(name, case, values, exact, threads, place, omit)
            raise KernelFault(f"{name} on {case}: {output}: {fault}\n  again: {again}")


@cache
def accepted(name: str) -> tuple[Case, ...]:
    """The problems of the grid that the kernel called ``name`` accepts."""
    op, _, dtype, _ = name.split(".")
    return _accepted(op, dtype).get(name, ())


def checked(name: str) -> tuple[Case, ...]:
    """Those of them that tests run. Halves share f32's code but for loading and storing, so every fifth problem serves them,
    where they are not multiplied in pairs.
    """
    _, _, dtype, target = name.split(".")
    return accepted(name)[:: 5 if dtype in tolerance.HALVES and target != "avx512_bf16" else 1]


@cache
def _accepted(op: str, dtype: str) -> dict[str, tuple[Case, ...]]:
    cases: dict[str, list[Case]] = {}
    for case in grids.grid(op):
        for name, verdict in verdicts(op, case, dtype).items():
            if not verdict:
                cases.setdefault(name, []).append(case)
    return {name: tuple(accepted) for name, accepted in cases.items()}


def check_all(name: str, cases: Iterable[Case], values: fill.Fill = fill.normal, **options: Any) -> None:
    """check() on each case; raises one KernelFault that counts the failures and shows the first three."""
    faults, count = [], 0
    for case in cases:
        count += 1
        try:
            check(name, case, values, **options)
        except KernelFault as fault:
            faults.append(str(fault))
    if faults:
        raise KernelFault("\n".join([f"{len(faults)} of {count} problems fail", *faults[:3]]))


@cache
def error_growth(name: str) -> float:
    return next(float(k.error_growth) for k in native().kernels() if k.name == name)


def repro(
    name: str, case: Case, values: fill.Fill, exact: bool, threads: int, place: Place, omit: tuple[str, ...] = ()
) -> str:
    """The command that runs this check alone."""
    words = ["python -m fastconv.testing", name, str(case), f"--fill {values.__name__}", f"--threads {threads}"]
    words += ["--exact"] * exact + [f"--place {place}"] * (place != "heap") + [f"--omit {operand}" for operand in omit]
    return " ".join(words)
