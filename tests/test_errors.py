"""Bad input, odd input and borderline input, row by row: torch's exception type and sentence, or torch's result.

Each row runs against torch as well, so a row that misquotes torch fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor

import fastconv
import fastconv.functional as ours

Call = Callable[[ModuleType], Any]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, W, B = _random(2, 4, 8, 8), _random(6, 4, 3, 3), _random(6)
WT = _random(4, 6, 3, 3)
X1, W1 = _random(2, 4, 8), _random(6, 4, 3)
L, LW = _random(2, 3, 4), _random(5, 4)
CL = X.contiguous(memory_format=torch.channels_last)
META = torch.device("meta")

RE, VE, TE, NIE, IE = RuntimeError, ValueError, TypeError, NotImplementedError, IndexError

# Rows where torch's own words (or its silence) are no model: an internal error of oneDNN, a misleading hint, garbage.
BETTER = "torch does worse"

# What is tested, the call, the exception's type, a pattern in its message, and perhaps BETTER.
ERRORS: list[tuple[Any, ...]] = [
    # conv2d
    ("conv2d zero out-channels", lambda F: F.conv2d(X, W[:0]), RE, r"expected weight to be at least 1 at dimension 0"),
    ("conv2d zero height", lambda F: F.conv2d(X[:, :, :0], W), RE, r"\(0 x 8\). Kernel size: \(3 x 3\)"),
    ("conv2d zero height, padded", lambda F: F.conv2d(X[:, :, :0], W, padding=2), RE, r"Only zero batch or zero channel"),
    ("conv2d kernel too large", lambda F: F.conv2d(X, _random(6, 4, 9, 3)), RE, r"\(8 x 8\). Kernel size: \(9 x 3\)"),
    ("conv2d dilated kernel", lambda F: F.conv2d(X, W, dilation=4), RE, r"Kernel size: \(9 x 9\). Kernel size"),
    ("conv2d 2-D input", lambda F: F.conv2d(X[0, 0], W), RE, r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv2d"),
    ("conv2d 5-D input", lambda F: F.conv2d(X[None], W), RE, r"but got input of size: \[1, 2, 4, 8, 8\]"),
    ("conv2d 3-D weight", lambda F: F.conv2d(X, W[0]), RE, r"conv2d\(\) takes a 4-dimensional weight", BETTER),
    ("conv2d 2-D weight", lambda F: F.conv2d(X, W[0, 0]), RE, r"weight should have at least three dimensions"),
    ("conv2d channels", lambda F: F.conv2d(X[:, :3], W), RE, r"expected input\[2, 3, 8, 8\] to have 4 channels, but got 3"),
    ("conv2d groups and input", lambda F: F.conv2d(X, W, groups=3), RE, r"to have 12 channels, but got 4 channels instead"),
    ("conv2d groups and weight", lambda F: F.conv2d(X, W, groups=4), RE, r"weight to be divisible by 4 at dimension 0"),
    ("conv2d groups 0", lambda F: F.conv2d(X, W, groups=0), RE, r"non-positive groups is not supported"),
    ("conv2d groups -1", lambda F: F.conv2d(X, W, groups=-1), RE, r"non-positive groups is not supported"),
    ("conv2d short bias", lambda F: F.conv2d(X, W, B[:5]), RE, r"1-dimensional with 6 elements, but got bias of size \[5\]"),
    ("conv2d 2-D bias", lambda F: F.conv2d(X, W, B[None]), RE, r"but got bias of size \[1, 6\] instead"),
    ("conv2d 0-D bias", lambda F: F.conv2d(X, W, B[0]), RE, r"but got bias of size \[\] instead"),
    ("conv2d empty bias", lambda F: F.conv2d(X, W, B[:0]), RE, r"but got bias of size \[0\] instead"),
    ("conv2d bias dtype", lambda F: F.conv2d(X, W, B.double()), RE, r"Input type \(float\) and bias type \(double\)"),
    ("conv2d half and bias", lambda F: F.conv2d(X.half(), W, B), RE, r"Input type \(c10::Half\) and bias type \(float\)"),
    ("conv2d half input", lambda F: F.conv2d(X.half(), W), RE, r"expected scalar type Half but found Float"),
    ("conv2d double weight", lambda F: F.conv2d(X, W.double()), RE, r"\(torch.FloatTensor\) and weight type \(torch.Double"),
    ("conv2d stride 0", lambda F: F.conv2d(X, W, stride=0), RE, r"non-positive stride is not supported"),
    ("conv2d stride (1, -1)", lambda F: F.conv2d(X, W, stride=(1, -1)), RE, r"non-positive stride is not supported"),
    ("conv2d stride length", lambda F: F.conv2d(X, W, stride=(1, 1, 1)), RE, r"or a list of 2 values .* stride=\[1, 1, 1\]"),
    ("conv2d no stride", lambda F: F.conv2d(X, W, stride=()), RE, r"expected stride to be a single integer value"),
    ("conv2d padding length", lambda F: F.conv2d(X, W, padding=(1, 1, 1)), RE, r"but got padding=\[1, 1, 1\]"),
    ("conv2d float stride", lambda F: F.conv2d(X, W, stride=2.0), TE, r"conv2d\(\) received an invalid combination"),
    ("conv2d float in stride", lambda F: F.conv2d(X, W, stride=(2.0, 2)), TE, r"conv2d\(\) received an invalid comb"),
    ("conv2d bool stride", lambda F: F.conv2d(X, W, stride=True), TE, r"conv2d\(\) received an invalid combination"),
    ("conv2d float groups", lambda F: F.conv2d(X, W, groups=1.0), TE, r"conv2d\(\) received an invalid combination"),
    ("conv2d padding None", lambda F: F.conv2d(X, W, padding=None), TE, r"conv2d\(\) received an invalid combination"),
    ("conv2d stride array", lambda F: F.conv2d(X, W, stride=np.array([2, 2])), TE, r"conv2d\(\) received an invalid"),
    ("conv2d array", lambda F: F.conv2d(X.numpy(), W), TE, r"conv2d\(\) received an invalid combination of arguments"),
    ("conv2d no weight", lambda F: F.conv2d(X, None), TE, r"conv2d\(\) received an invalid combination of arguments"),
    ("conv2d bias 3", lambda F: F.conv2d(X, W, 3), TE, r"conv2d\(\) received an invalid combination of arguments"),
    ("conv2d stride beyond 64 bits", lambda F: F.conv2d(X, W, stride=2**63), VE, r"Overflow when unpacking long long"),
    ("conv2d padding -1", lambda F: F.conv2d(X, W, padding=-1), RE, r"negative padding is not supported"),
    ("conv2d dilation 0", lambda F: F.conv2d(X, W, dilation=0), RE, r"non-positive dilation is not supported"),
    ("conv2d dilation -1", lambda F: F.conv2d(X, W, dilation=-1), RE, r"dilation should be greater than zero"),
    ("conv2d dilation length", lambda F: F.conv2d(X, W, dilation=(1, 1, 1)), RE, r"but got dilation=\[1, 1, 1\]"),
    ("conv2d kernel size 0", lambda F: F.conv2d(X, _random(6, 4, 0, 3)), RE, r"kernel size should be greater than zero", BETTER),
    ("conv2d same and stride", lambda F: F.conv2d(X, W, stride=2, padding="same"), RE, r"padding='same' is not supported"),
    ("conv2d padding SAME", lambda F: F.conv2d(X, W, padding="SAME"), RE, r"Invalid padding string: 'SAME'"),
    ("conv2d meta weight", lambda F: F.conv2d(X, W.to(META)), RE, r"got input on cpu, weight on meta", BETTER),
    ("conv2d meta input", lambda F: F.conv2d(X.to(META), W), RE, r"on the same device", BETTER),
    ("conv2d meta bias", lambda F: F.conv2d(X, W, B.to(META)), RE, r"bias on meta", BETTER),
    ("conv2d sparse", lambda F: F.conv2d(X.to_sparse(), W), RE, r"Input type \(torch.sparse.FloatTensor\) and weight type"),
    ("conv2d bool", lambda F: F.conv2d(X.bool(), W.bool()), NIE, r"not implemented for 'Bool'"),
    # conv1d and conv3d
    ("conv1d 2-D stride", lambda F: F.conv1d(X1, W1, stride=(1, 1)), RE, r"stride to be .* a list of 1 values"),
    ("conv1d 4-D weight", lambda F: F.conv1d(X1, W), RE, r"Expected 4-dimensional input for 4-dimensional weight"),
    ("conv1d 4-D input", lambda F: F.conv1d(X, W1), RE, r"Expected 2D \(unbatched\) or 3D \(batched\) input to conv1d"),
    ("conv1d 1-D input", lambda F: F.conv1d(X1[0, 0], W1), RE, r"but got input of size: \[8\]"),
    ("conv1d too short", lambda F: F.conv1d(X1[:, :, :2], W1), RE, r"Calculated padded input size per channel: \(2\)"),
    ("conv3d 2-D weight", lambda F: F.conv3d(X, W), RE, r"."),
    # conv_transpose2d
    ("transpose output_padding", lambda F: F.conv_transpose2d(X, WT, stride=2, output_padding=(2, 0)), RE,
     r"either stride or dilation, but got output_padding_height: 2 output_padding_width: 0 stride_height: 2"),
    ("transpose output_padding -1", lambda F: F.conv_transpose2d(X, WT, output_padding=-1), RE, r"negative output_padding is"),
    ("transpose nothing left", lambda F: F.conv_transpose2d(X, WT, padding=10), RE, r"Output size is too small", BETTER),
    ("transpose channels", lambda F: F.conv_transpose2d(X, W), RE, r"Given transposed=1, weight of size .* 6 channels"),
    ("transpose groups", lambda F: F.conv_transpose2d(X, WT, groups=3), RE, r"expected weight to be divisible by 3"),
    ("transpose bias", lambda F: F.conv_transpose2d(X, WT, B[:5]), RE, r"Given transposed=1.* bias of size \[5\]"),
    ("transpose dilation 0", lambda F: F.conv_transpose2d(X, WT, dilation=0), RE, r"non-positive dilation", BETTER),
    ("transpose padding same", lambda F: F.conv_transpose2d(X, WT, padding="same"), TE,
     r"argument 'padding' must be tuple of ints, not str"),
    ("transpose float stride", lambda F: F.conv_transpose2d(X, WT, stride=1.5), TE, r"argument 'stride' must be tuple of ints"),
    ("transpose output_size", lambda F: F.conv_transpose2d(X, WT, output_size=(3, 3)), TE, r"unexpected keyword argument"),
    ("transpose 2-D input", lambda F: F.conv_transpose2d(X[0, 0], WT), RE, r"input to conv_transpose2d, but got input"),
    ("transpose 3-D weight", lambda F: F.conv_transpose2d(X, WT[0]), RE, r"takes a 4-dimensional weight", BETTER),
    ("transpose zero height", lambda F: F.conv_transpose2d(X[:, :, :0], WT), RE, r"Only zero batch or zero channel inputs"),
    ("transpose meta", lambda F: F.conv_transpose2d(X, WT.to(META)), RE, r"on the same device", BETTER),
    ("transpose1d output_padding", lambda F: F.conv_transpose1d(X1, WT[..., 0], output_padding=1), RE,
     r"output padding must be smaller than either stride or dilation"),
    # linear
    ("linear features", lambda F: F.linear(L, LW[:, :3]), RE, r"mat1 and mat2 shapes cannot be multiplied \(6x4 and 3x5\)"),
    ("linear bias", lambda F: F.linear(L[0], LW, B[:4]), RE, r"size of the tensor \(5\) must match the existing"),
    ("linear dtype", lambda F: F.linear(L, LW.double()), RE, r"m1 and m2 to have the same dtype, .*: float != double"),
    ("linear 3-D weight", lambda F: F.linear(L, LW[None]), RE, r"expects a tensor with <= 2 dimensions, but self is 3D"),
    ("linear 0-D", lambda F: F.linear(L[0, 0, 0], LW), RE, r"both arguments to linear need to be at least 1D"),
    ("linear no weight", lambda F: F.linear(L, None), TE, r"argument 'weight' \(position 2\) must be Tensor, not NoneType"),
    ("linear meta", lambda F: F.linear(L, LW.to(META)), RE, r"on the same device", BETTER),
    # max_pool2d
    ("max kernel 0", lambda F: F.max_pool2d(X, 0), RE, r"stride should not be zero"),
    ("max kernel -1", lambda F: F.max_pool2d(X, -1), RE, r"kernel size should be greater than zero, but got kH: -1 kW: -1"),
    ("max kernel 3-tuple", lambda F: F.max_pool2d(X, (1, 2, 3)), RE, r"kernel_size must either be a single int, or"),
    ("max stride 3-tuple", lambda F: F.max_pool2d(X, 2, (2, 2, 2)), RE, r"stride must either be omitted, a single int, or"),
    ("max padding empty", lambda F: F.max_pool2d(X, 2, padding=()), RE, r"padding must either be a single int, or"),
    ("max stride 0", lambda F: F.max_pool2d(X, 2, 0), RE, r"stride should not be zero"),
    ("max stride -1", lambda F: F.max_pool2d(X, 2, -1), RE, r"stride should be greater than zero, but got dH: -1 dW: -1"),
    ("max pad -1", lambda F: F.max_pool2d(X, 2, padding=-1), RE, r"pad must be non-negative, but got pad: -1"),
    ("max pad too large", lambda F: F.max_pool2d(X, 2, padding=2), RE,
     r"at most half of effective kernel size, but got pad=2, kernel_size=2 and dilation=1"),
    ("max pad within dilation", lambda F: F.max_pool2d(X, 3, padding=2, dilation=2), RE,
     r"pad should be smaller than or equal to half of kernel size, but got padW = 2, padH = 2, kW = 3, kH = 3"),
    ("max dilation 0", lambda F: F.max_pool2d(X, 2, dilation=0), RE, r"greater than zero, but got dilationH: 0 dilationW: 0"),
    ("max too small", lambda F: F.max_pool2d(X, 9), RE,
     r"Given input size: \(4x8x8\). Calculated output size: \(4x0x0\). Output size is too small"),
    ("max 2-D input", lambda F: F.max_pool2d(X[0, 0], 2), RE, r"non-empty 3D or 4D \(batch mode\) tensor expected for input"),
    ("max 5-D input", lambda F: F.max_pool2d(X[None], 2), RE, r"non-empty 3D or 4D \(batch mode\) tensor expected for input"),
    ("max zero channels", lambda F: F.max_pool2d(X[:, :0], 2), RE, r"but got:\[2, 0, 8, 8\]"),
    ("max zero height", lambda F: F.max_pool2d(X[:, :, :0], 2), RE, r"0 dim batch size for input, but got:\[2, 4, 0, 8\]"),
    ("max float kernel", lambda F: F.max_pool2d(X, 2.5), TE, r"'kernel_size' \(position 2\) must be tuple of ints, not float"),
    ("max no kernel", lambda F: F.max_pool2d(X, None), TE, r"'kernel_size' \(position 2\) must be tuple of ints, not NoneType"),
    ("max ceil_mode 1", lambda F: F.max_pool2d(X, 2, ceil_mode=1), TE, r"argument 'ceil_mode' .*must be bool, not int"),
    ("max array", lambda F: F.max_pool2d(X.numpy(), 2), TE, r"'input' \(position 1\) must be Tensor, not numpy.ndarray"),
    ("max huge kernel", lambda F: F.max_pool2d(X, 2**40), RE, r"cannot be converted to type int without overflow"),
    ("max huge stride", lambda F: F.max_pool2d(X, 2, 2**40), RE, r"cannot be converted to type int without overflow"),
    ("max beyond 64 bits", lambda F: F.max_pool2d(X, 2, 2**63), VE, r"Overflow when unpacking long long"),
    ("max bool", lambda F: F.max_pool2d(X.bool(), 2), NIE, r"\"max_pool2d\" not implemented for 'Bool'"),
    ("max complex", lambda F: F.max_pool2d(X.to(torch.complex64), 2), NIE, r"not implemented for 'ComplexFloat'"),
    # max_pool1d
    ("max1d kernel length", lambda F: F.max_pool1d(X1, (1, 1)), RE, r"of size 1 but got size 2"),
    ("max1d kernel 0", lambda F: F.max_pool1d(X1, 0), RE, r"kernel_size must be greater than zero, but got 0"),
    ("max1d kernel 0 with indices", lambda F: F.max_pool1d(X1, 0, return_indices=True), RE, r"stride should not be zero"),
    ("max1d padding", lambda F: F.max_pool1d(X1, 2, padding=2), RE, r"padding should be at most half of kernel size"),
    ("max1d padding -1", lambda F: F.max_pool1d(X1, 2, padding=-1), RE, r"padding must be non-negative"),
    ("max1d dilation", lambda F: F.max_pool1d(X1, 2, dilation=0), RE, r"dilation must be greater than zero, but got 0"),
    ("max1d too small", lambda F: F.max_pool1d(X1, 9), RE, r"Invalid computed output size: 0"),
    ("max1d 4-D input", lambda F: F.max_pool1d(X, 2), RE, r"max_pool1d: Expected 2D or 3D \(batch mode\) tensor"),
    ("max1d int64", lambda F: F.max_pool1d(X1.long(), 2), NIE, r"\"max_pool1d_impl\" not implemented for 'Long'"),
    # avg_pool
    ("avg divisor 0", lambda F: F.avg_pool2d(X, 2, divisor_override=0), RE, r"divisor must be not zero"),
    ("avg float divisor", lambda F: F.avg_pool2d(X, 2, divisor_override=2.5), TE, r"'divisor_override' must be int, not float"),
    ("avg bool divisor", lambda F: F.avg_pool2d(X, 2, divisor_override=True), TE, r"'divisor_override' must be int, not bool"),
    ("avg dilation", lambda F: F.avg_pool2d(X, 2, dilation=1), TE, r"unexpected keyword argument 'dilation'"),
    ("avg count_include_pad 1", lambda F: F.avg_pool2d(X, 2, count_include_pad=1), TE, r"must be bool, not int"),
    ("avg 2-D input", lambda F: F.avg_pool2d(X[0, 0], 2), IE, r"expected to be in range of \[-2, 1\], but got -3"),
    ("avg 1-D input", lambda F: F.avg_pool2d(X[0, 0, 0], 2), IE, r"expected to be in range of \[-1, 0\], but got -3"),
    ("avg 5-D input", lambda F: F.avg_pool2d(X[None], 2), RE, r"Expected 3D or 4D \(batch mode\) tensor with optional 0 dim"),
    ("avg zero channels", lambda F: F.avg_pool2d(X[:, :0], 2), RE, r"but got:\[2, 0, 8, 8\]"),
    ("avg pad", lambda F: F.avg_pool2d(X, 2, padding=2), RE, r"pad should be at most half of effective kernel size"),
    ("avg too small", lambda F: F.avg_pool2d(X, 9), RE, r"Output size is too small"),
    ("avg int32", lambda F: F.avg_pool2d(X.int(), 2), NIE, r"\"avg_pool2d\" not implemented for 'Int'"),
    ("avg1d kernel length", lambda F: F.avg_pool1d(X1, (2, 2)), RE, r"argument 'kernel_size' should contain one int \(got 2\)"),
    ("avg1d 4-D input", lambda F: F.avg_pool1d(X, 2), RE, r"Expected 2 to 3 dimensions, but got 4-dimensional tensor"),
    ("avg1d divisor", lambda F: F.avg_pool1d(X1, 2, divisor_override=2), TE, r"unexpected keyword argument"),
    # adaptive pools
    ("adaptive avg -1", lambda F: F.adaptive_avg_pool2d(X, (-1, 2)), RE,
     r"must be greater than or equal to 0 but received \{-1, 2\}"),
    ("adaptive avg ()", lambda F: F.adaptive_avg_pool2d(X, ()), RE, r"adaptive_avg_pool2d: output_size must be 2"),
    ("adaptive avg 3 ints", lambda F: F.adaptive_avg_pool2d(X, (2, 2, 2)), RE, r"adaptive_avg_pool2d: output_size must be 2"),
    ("adaptive avg None", lambda F: F.adaptive_avg_pool2d(X, None), TE, r"."),
    ("adaptive avg float", lambda F: F.adaptive_avg_pool2d(X, (2.5, 2)), TE, r"found element of type float at pos 0"),
    ("adaptive avg 2-D and tuple", lambda F: F.adaptive_avg_pool2d(X[0, 0], (2, 2)), VE, r"Input dimension should be at least 3"),
    ("adaptive avg 2-D and int", lambda F: F.adaptive_avg_pool2d(X[0, 0], 2), RE, r"Expected 3D or 4D tensor, but got"),
    ("adaptive avg zero height", lambda F: F.adaptive_avg_pool2d(X[:, :, :0], 2), RE, r"with dimension 2 being empty"),
    ("adaptive avg int64", lambda F: F.adaptive_avg_pool2d(X.long(), 1), RE, r"could not infer output dtype"),
    ("adaptive avg1d ()", lambda F: F.adaptive_avg_pool1d(X1, ()), RE, r"'output_size' should contain one int \(got 0\)"),
    ("adaptive avg1d 4-D", lambda F: F.adaptive_avg_pool1d(X, 1), RE, r"Expected 2 to 3 dimensions, but got 4-dimensional"),
    ("adaptive max -1", lambda F: F.adaptive_max_pool2d(X, (-1, 2)), RE, r"Trying to create tensor with negative dimension"),
    ("adaptive max ()", lambda F: F.adaptive_max_pool2d(X, ()), RE, r"internal error: output_size.size\(\) must be 2"),
    ("adaptive max zero channels", lambda F: F.adaptive_max_pool2d(X[:, :0], 2), RE,
     r"Expected input to have non-zero size for non-batch dimensions, .* with dimension 1 being empty"),
    ("adaptive max 2-D", lambda F: F.adaptive_max_pool2d(X[0, 0], 1), RE, r"Expected 3D or 4D tensor, but got: \[8, 8\]"),
    ("adaptive max 5-D", lambda F: F.adaptive_max_pool2d(X[None], 1), RE, r"Expected 3D or 4D tensor, but got: \[1, 2, 4"),
    ("adaptive max int64", lambda F: F.adaptive_max_pool2d(X.long(), 1), NIE, r"not implemented for 'Long'"),
    ("adaptive max1d None", lambda F: F.adaptive_max_pool1d(X1, None), TE, r"must be tuple of ints, not NoneType"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    fastconv.set_fallback("silent")
    yield
    fastconv.set_fallback("warn")


@pytest.mark.parametrize("row", ERRORS, ids=[row[0] for row in ERRORS])
def test_error(row: tuple[Any, ...]) -> None:
    _, call, kind, pattern, *better = row
    with pytest.raises(Exception) as info:  # noqa: PT011
        call(ours)
    assert info.type is kind, repr(info.value)
    assert re.search(pattern, str(info.value)), str(info.value)
    if not better:
        with pytest.raises(Exception) as info:  # noqa: PT011
            call(theirs)
        assert info.type is kind, repr(info.value)
        assert re.search(pattern, str(info.value)), str(info.value)


def test_row_names_are_unique() -> None:
    names = [row[0] for row in ERRORS]
    assert len(names) == len(set(names))
