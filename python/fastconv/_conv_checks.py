"""What a convolution may be given: every check of conv1d, conv2d, conv_transpose1d, conv_transpose2d and linear.

Exceptions have torch's type and contain torch's sentence, then say which argument came as what, and what was expected.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ._arguments import INT_MAX, integer, ints, spread, tensor, wrong_type

Ints = tuple[int, ...]

# torch's names of scalar types in its C++ messages, where they are not the dtype's own name.
_SCALARS = {
    "float16": "c10::Half", "bfloat16": "c10::BFloat16", "float32": "float", "float64": "double",
    "complex64": "c10::complex<float>", "complex128": "c10::complex<double>",
    "int64": "long int", "int32": "int", "int16": "short int", "int8": "signed char", "uint8": "unsigned char",
}  # fmt: skip
_KINDS = {"float16": "Half", "bfloat16": "BFloat16", "float32": "Float", "float64": "Double"}


class Geometry(NamedTuple):
    """One convolution's options, spread over its spatial dimensions."""

    stride: Ints
    before: Ints  # padding at the low end of each dimension
    after: Ints  # and at the high end
    dilation: Ints
    groups: int
    output_padding: Ints

    def huge(self) -> bool:
        """Whether an option is beyond 31 bits, where the kernels' 64-bit products of two of them might wrap."""
        return max(*self.stride, *self.before, *self.after, *self.dilation, *self.output_padding) > INT_MAX

    def two_dimensional(self) -> Geometry:
        """The same one-dimensional convolution over images of height 1."""
        pads = (0, *self.before), (0, *self.after)
        return Geometry((1, *self.stride), *pads, (1, *self.dilation), self.groups, (0, *self.output_padding))


def tensors(op: str, input: Any, weight: Any, bias: Any) -> dict[str, Tensor | None]:
    """The operands by name. TypeError for what is no tensor."""
    return {
        "input": tensor(op, "input", input),
        "weight": tensor(op, "weight", weight),
        "bias": None if bias is None else tensor(op, "bias", bias),
    }


def _named(t: Tensor) -> str:
    name = str(t.dtype).removeprefix("torch.")
    return _SCALARS.get(name, name)


def check_dtypes(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises RuntimeError unless all operands have one dtype."""
    if bias is not None and bias.dtype is not input.dtype:
        raise RuntimeError(
            f"Input type ({_named(input)}) and bias type ({_named(bias)}) should be the same: {op}() got bias with dtype "
            f"{bias.dtype}, expected {input.dtype}"
        )
    if weight.dtype is not input.dtype:
        kinds = [_KINDS.get(str(t.dtype).removeprefix("torch."), str(t.dtype)) for t in (input, weight)]
        raise RuntimeError(
            f"Input type ({input.type()}) and weight type ({weight.type()}) should be the same: {op}() got weight with dtype "
            f"{weight.dtype}, expected scalar type {kinds[0]} but found {kinds[1]}"
        )


def geometry(
    op: str, dims: int, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: Any, output_padding: Any = 0
) -> Geometry:
    """The options, checked by themselves. TypeError for a wrong type, RuntimeError for a wrong length or value."""
    groups = integer(op, "groups", groups)
    if groups <= 0:
        raise RuntimeError(f"non-positive groups is not supported: {op}() got groups={groups}, expected at least 1")
    strides = _values(op, "stride", stride, dims, 1)
    dilations = _values(op, "dilation", dilation, dims, 1)
    extra = _values(op, "output_padding", output_padding, dims, 0)
    if not isinstance(padding, str):
        pads = _values(op, "padding", padding, dims, 0)
        return Geometry(strides, pads, pads, dilations, groups, extra)
    if op.startswith("conv_transpose"):
        wrong_type(op, "padding", "tuple of ints", padding)
    if padding == "valid":
        pads = (0,) * dims
        return Geometry(strides, pads, pads, dilations, groups, extra)
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: '{padding}': {op}() expected 'valid', 'same' or ints for padding")
    if any(s != 1 for s in strides):
        raise RuntimeError(
            f"padding='same' is not supported for strided convolutions: {op}() got stride={strides}, expected 1 everywhere"
        )
    total = tuple(d * (k - 1) for d, k in zip(dilations, weight.shape[2:]))
    before = tuple(t // 2 for t in total)
    return Geometry(strides, before, tuple(t - b for t, b in zip(total, before)), dilations, groups, extra)


def _values(op: str, name: str, value: Any, dims: int, least: int) -> Ints:
    given = ints(op, name, value)
    found = spread(given, dims)
    if found is None:
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of {dims} values to match the convolution dimensions, "
            f"but got {name}={list(given)} in {op}()"
        )
    if any(v < least for v in found):
        if least == 0:
            raise RuntimeError(f"negative {name} is not supported: {op}() got {name}={found}, expected 0 or more")
        hint = "dilation should be greater than zero" if name == "dilation" else f"{name} should be greater than zero"
        raise RuntimeError(f"non-positive {name} is not supported: {op}() got {name}={found}, and {hint}")
    return found


def check_ranks(op: str, dims: int, input: Tensor, weight: Tensor) -> None:
    """Raises RuntimeError unless weight has `dims` + 2 dimensions and input as many, or one less (unbatched)."""
    if weight.dim() < 3:
        raise RuntimeError(
            f"weight should have at least three dimensions: {op}() got weight of size {list(weight.shape)}, "
            f"expected {dims + 2} dimensions"
        )
    if weight.dim() != dims + 2:
        raise RuntimeError(
            f"Expected {weight.dim()}-dimensional input for {weight.dim()}-dimensional weight {list(weight.shape)}, but got "
            f"{input.dim()}-dimensional input of size {list(input.shape)} instead: {op}() takes a {dims + 2}-dimensional weight"
        )
    if input.dim() not in (dims + 1, dims + 2):
        raise RuntimeError(
            f"Expected {dims + 1}D (unbatched) or {dims + 2}D (batched) input to {op}, but got input of size: {list(input.shape)}"
        )


def check_shapes(op: str, transposed: bool, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Raises RuntimeError unless channels, groups and bias fit together. `input` is batched."""
    size = list(weight.shape)
    given = f"Given {'transposed=1' if transposed else f'groups={groups}'}"
    if weight.shape[0] < groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, but got weight of size {size} "
            f"instead in {op}()"
        )
    if weight.shape[0] % groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, but got weight of size "
            f"[{size}] instead in {op}()"
        )
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    if input.shape[1] != channels:
        raise RuntimeError(
            f"{given}, weight of size {size}, expected input{list(input.shape)} to have {channels} channels, "
            f"but got {input.shape[1]} channels instead in {op}()"
        )
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs):
        prefix = f"{given}, weight" if transposed else "Given weight"
        raise RuntimeError(
            f"{prefix} of size {size}, expected bias to be 1-dimensional with {outputs} elements, but got bias of size "
            f"{list(bias.shape)} instead in {op}()"
        )
    if any(k == 0 for k in weight.shape[2:]):
        raise RuntimeError(f"kernel size should be greater than zero: {op}() got weight of size {size}")


def check_extent(op: str, input: Tensor, weight: Tensor, g: Geometry) -> None:
    """Raises RuntimeError where the kernel is larger than the padded input, or the input has no pixel. `input` is batched."""
    padded = [h + b + a for h, b, a in zip(input.shape[2:], g.before, g.after)]
    kernel = [d * (k - 1) + 1 for d, k in zip(g.dilation, weight.shape[2:])]
    if any(k > p for k, p in zip(kernel, padded)):
        raise RuntimeError(
            f"Calculated padded input size per channel: ({' x '.join(map(str, padded))}). "
            f"Kernel size: ({' x '.join(map(str, kernel))}). Kernel size can't be greater than actual input size: {op}() got "
            f"input of size {list(input.shape)}, weight of size {list(weight.shape)}, dilation={g.dilation}"
        )
    _check_pixels(op, input)


def _check_pixels(op: str, input: Tensor) -> None:
    if any(h == 0 for h in input.shape[2:]):
        raise RuntimeError(
            f"Only zero batch or zero channel inputs are supported, but got input shape: {list(input.shape)} in {op}()"
        )


def check_transposed_extent(op: str, input: Tensor, weight: Tensor, g: Geometry) -> None:
    """Raises RuntimeError where output_padding is too large or nothing would be left of the output. `input` is batched."""
    if any(o >= s and o >= d for o, s, d in zip(g.output_padding, g.stride, g.dilation)):
        names = ("height", "width")[-len(g.stride) :]
        values = zip(("output_padding", "stride", "dilation"), (g.output_padding, g.stride, g.dilation))
        found = " ".join(f"{what}_{name}: {v}" for what, three in values for name, v in zip(names, three))
        raise RuntimeError(f"output padding must be smaller than either stride or dilation, but got {found} in {op}()")
    _check_pixels(op, input)
    rows = zip(input.shape[2:], g.stride, g.before, g.dilation, weight.shape[2:], g.output_padding)
    out = [(h - 1) * s - 2 * p + d * (k - 1) + o + 1 for h, s, p, d, k, o in rows]
    if any(size < 0 for size in out):
        raise RuntimeError(
            f"Given input size per channel: ({' x '.join(map(str, input.shape[2:]))}). Calculated output size per channel: "
            f"({' x '.join(map(str, out))}). Output size is too small: {op}() got padding={g.before}"
        )


def check_linear(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises RuntimeError unless input (*, I), weight (O, I) or (I) and bias (O) fit together."""
    if input.dim() == 0 or weight.dim() == 0:
        raise RuntimeError(
            f"both arguments to linear need to be at least 1D, but they are {input.dim()}D and {weight.dim()}D: expected "
            "input (*, in_features) and weight (out_features, in_features)"
        )
    if weight.dim() > 2:
        raise RuntimeError(
            f"t() expects a tensor with <= 2 dimensions, but self is {weight.dim()}D: {op}() got weight of size "
            f"{list(weight.shape)}, expected (out_features, in_features)"
        )
    if weight.dtype is not input.dtype:
        names = _named(input), _named(weight)
        raise RuntimeError(
            f"expected m1 and m2 to have the same dtype, but got: {names[0]} != {names[1]}: {op}() got weight with dtype "
            f"{weight.dtype}, expected {input.dtype}"
        )
    if bias is not None and bias.dtype is not input.dtype:
        raise RuntimeError(
            f"self and mat2 must have the same dtype, but got {bias.dtype} and {input.dtype}: {op}() expected bias with "
            f"dtype {input.dtype}"
        )
    if weight.dim() == 1 and bias is not None:
        raise RuntimeError(f"mat2 must be a matrix, got 1-D tensor: {op}() takes a 1-D weight only without bias")
    features = weight.shape[-1]
    if input.shape[-1] != features:
        rows = input.numel() // input.shape[-1] if input.shape[-1] else 0
        right = f"{features}x{weight.shape[0]}" if weight.dim() == 2 else f"{features}"
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({rows}x{input.shape[-1]} and {right}): {op}() got input of size "
            f"{list(input.shape)}, expected {features} in its last dimension"
        )
    if bias is not None and not _broadcasts(tuple(bias.shape), (*input.shape[:-1], weight.shape[0])):
        raise RuntimeError(
            f"The expanded size of the tensor ({weight.shape[0]}) must match the existing size "
            f"({bias.shape[-1] if bias.dim() else 1}) at non-singleton dimension {bias.dim() - 1}: {op}() got bias of size "
            f"{list(bias.shape)}, expected [{weight.shape[0]}]"
        )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(s in (1, t) for s, t in zip(reversed(shape), reversed(to)))
