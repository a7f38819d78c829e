"""What a pooling may be given: every check of the max, average and adaptive pools, with torch's exceptions and sentences.

One dimension is the second of two, as in torch: the first has size 1 and a window of 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ._arguments import INT_MAX, as_int, ints, wrong_type
from .ops.pool2d import Pair, output_size

_OMITTED: tuple[Any, ...] = (None, (), [])


class Windows(NamedTuple):
    """Kernel, stride, padding and dilation, each (height, width)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair


def windows(op: str, dims: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any = 1) -> Windows:
    """The options as pairs; a stride that is None or empty is the kernel. TypeError or RuntimeError as torch has them."""
    kernel = _pair(op, dims, "kernel_size", kernel_size, 1)
    step = kernel if any(stride is o or stride == o for o in _OMITTED) else _pair(op, dims, "stride", stride, 1)
    return Windows(kernel, step, _pair(op, dims, "padding", padding, 0), _pair(op, dims, "dilation", dilation, 1))


def _pair(op: str, dims: int, name: str, value: Any, neutral: int) -> Pair:
    given = ints(op, name, value)
    if len(given) == 1:
        pair = (neutral if dims == 1 else given[0], given[0])
    elif dims == 2 and len(given) == 2:
        pair = (given[0], given[1])
    elif dims == 2:
        omitted = "be omitted, a single int" if name == "stride" else "be a single int"
        raise RuntimeError(f"{op}: {name} must either {omitted}, or a tuple of two ints, but got {tuple(given)}")
    elif op == "max_pool1d":
        none = "None, " if name == "stride" else ""
        raise RuntimeError(
            f"{op}() {name} must be {none}an int, list of ints, or tuple of ints of size 1 but got size {len(given)} "
            f"(argument '{name}' should contain one int)"
        )
    else:
        raise RuntimeError(f"{op}() argument '{name}' should contain one int (got {len(given)})")
    if any(abs(v) > INT_MAX for v in pair):
        raise RuntimeError(f"{op}(): {name} value cannot be converted to type int without overflow, got {tuple(given)}")
    return pair


def check_rank(op: str, dims: int, input: Tensor) -> None:
    """Raises unless input is batched or unbatched: RuntimeError, or IndexError where torch's average pool looks for a height."""
    if input.dim() in (dims + 1, dims + 2):
        return
    got = f"but got input of size {list(input.shape)}"
    if op == "avg_pool2d" and input.dim() < 3:
        n = max(input.dim(), 1)
        raise IndexError(
            f"Dimension out of range (expected to be in range of [-{n}, {n - 1}], but got -3): {op}() expected a 3D or 4D "
            f"input, {got}"
        )
    if op in ("avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d"):
        raise RuntimeError(
            f"Expected 2 to 3 dimensions, but got {input.dim()}-dimensional tensor for argument #1 'self' "
            f"(while checking arguments for {op}): {got}"
        )
    if op.startswith("adaptive"):
        raise RuntimeError(f"{op}(): Expected 3D or 4D tensor, but got: {list(input.shape)} for argument 'input'")
    if dims == 1:
        raise RuntimeError(
            f"{op}: Expected 2D or 3D (batch mode) tensor with optional 0 dim batch size for input, but got:{list(input.shape)}"
        )
    raise RuntimeError(
        f"non-empty 3D or 4D (batch mode) tensor expected for input: {op}: Expected 3D or 4D (batch mode) tensor with optional "
        f"0 dim batch size for input, but got:{list(input.shape)}"
    )


def check_windows(op: str, dims: int, sizes: tuple[int, ...], w: Windows, ceil_mode: bool) -> None:
    """Raises RuntimeError unless these windows can slide over an input of `sizes`, which is (N, C, H, W) or (C, H, W)."""

    def got(what: str, values: Pair) -> str:
        return " ".join(f"{what}{name}: {value}" for name, value in tuple(zip("HW", values))[-dims:])

    where = f"{op}() "
    if min(w.kernel) <= 0:
        zero = " (stride should not be zero: it defaults to the kernel size)" if 0 in w.stride else ""
        raise RuntimeError(
            f"{where}kernel size should be greater than zero, but got {got('k', w.kernel)}{zero}; "
            f"kernel_size must be greater than zero, but got {w.kernel[-1]}"
        )
    if min(w.stride) <= 0:
        zero = "stride should not be zero; " if 0 in w.stride else ""
        raise RuntimeError(
            f"{where}{zero}stride should be greater than zero, but got {got('d', w.stride)}; "
            f"stride must be greater than zero, but got {w.stride[-1]}"
        )
    if min(w.dilation) <= 0:
        raise RuntimeError(
            f"{where}dilation should be greater than zero, but got {got('dilation', w.dilation)}; "
            f"dilation must be greater than zero, but got {w.dilation[-1]}"
        )
    for k, p, d in zip(w.kernel, w.padding, w.dilation):
        if p < 0:
            raise RuntimeError(f"{where}padding must be non-negative: pad must be non-negative, but got pad: {p}")
        if p > (d * (k - 1) + 1) // 2:
            raise RuntimeError(
                f"{where}padding should be at most half of kernel size: pad should be at most half of effective kernel size, "
                f"but got pad={p}, kernel_size={k} and dilation={d}"
            )
        if p > k // 2:
            raise RuntimeError(
                f"{where}padding should be at most half of kernel size: pad should be smaller than or equal to half of kernel "
                f"size, but got padW = {w.padding[1]}, padH = {w.padding[0]}, kW = {w.kernel[1]}, kH = {w.kernel[0]}"
            )
    plane = sizes[-dims:]
    if 0 in sizes[-dims - 1 :]:
        ranks = "2D or 3D" if dims == 1 else "3D or 4D"
        raise RuntimeError(
            f"{op}: Expected {ranks} (batch mode) tensor with optional 0 dim batch size for input, but got:{list(sizes)}"
        )
    options = tuple(zip(w.kernel, w.stride, w.padding, w.dilation))[-dims:]
    out = [output_size(size, k, s, (p, p), d, ceil_mode) for size, (k, s, p, d) in zip(plane, options)]
    if min(out) < 1:
        channels, one = sizes[-dims - 1], "1x" if dims == 1 else ""
        raise RuntimeError(
            f"{where}Invalid computed output size: {min(out)}: Given input size: ({channels}x{one}{'x'.join(map(str, plane))}). "
            f"Calculated output size: ({channels}x{one}{'x'.join(map(str, out))}). Output size is too small"
        )


def adaptive_size(op: str, dims: int, value: Any, input: Tensor) -> tuple[int, ...]:
    """The output size as `dims` ints; None keeps the input's where torch allows it. Raises as torch does, case by case."""
    if dims == 1:
        given = ints(op, "output_size", value)
        if len(given) != 1:
            raise RuntimeError(f"{op}() argument 'output_size' should contain one int (got {len(given)})")
    else:
        given = _adaptive_pair(op, value, input)
    if min(given) < 0:
        if "avg" in op:
            both = given if dims == 2 else (1, *given)
            found = ", ".join(map(str, both))
            raise RuntimeError(
                f"adaptive_avg_pool2d: elements of output_size must be greater than or equal to 0 but received {{{found}}} "
                f"in {op}()"
            )
        raise RuntimeError(
            f"Trying to create tensor with negative dimension {min(given)}: {op}() got output_size={given}, expected 0 or more"
        )
    return given


def _adaptive_pair(op: str, value: Any, input: Tensor) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        whole = as_int(value)
        if whole is None:
            wrong_type(op, "output_size", "an int or a tuple of two ints or None", value)
        return whole, whole
    if len(value) != 2:
        what = "internal error: output_size.size() must be 2" if "max" in op else "output_size must be 2"
        raise RuntimeError(f"{op}(): {op}: {what}, but got {tuple(value)}")
    if input.dim() < 3:
        raise ValueError(f"Input dimension should be at least 3: {op}() got input of size {list(input.shape)}")
    kept = [size if v is None else v for v, size in zip(value, input.shape[-2:])]
    return ints(op, "output_size", tuple(kept))


def check_adaptive(op: str, dims: int, input: Tensor) -> None:
    """Raises RuntimeError where a dimension is empty that an average or a maximum is taken over. Averages may have no channel."""
    check_rank(op, dims, input)
    sizes = list(input.shape)
    first = input.dim() - dims - (1 if "max" in op else 0)
    for dim in range(first, input.dim()):
        if sizes[dim] == 0:
            raise RuntimeError(
                f"{op}(): Expected input to have non-zero size for non-batch dimensions, but input has sizes {sizes} with "
                f"dimension {dim} being empty"
            )
