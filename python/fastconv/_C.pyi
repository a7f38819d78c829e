"""The compiled module: plain data in, kernels run on addresses. Load it through `fastconv._native.load()`."""

from collections.abc import Callable, Sequence
from typing import Any, overload

class KernelInfo:
    @property
    def name(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def runnable(self) -> bool: ...
    @property
    def why_not(self) -> str: ...
    @property
    def error_growth(self) -> float: ...

class Conv2dProblem:
    def __init__(
        self,
        *,
        dtype: str,
        N: int,
        C: int,
        H: int,
        W: int,
        K: int,
        R: int,
        S: int,
        P: int,
        Q: int,
        groups: int,
        stride: Sequence[int],
        pad: Sequence[int],
        dilation: Sequence[int],
        x: Sequence[int],
        w: Sequence[int],
        y: Sequence[int],
        bias: bool = False,
        residual: bool = False,
        activation: str = "none",
        frozen: bool = False,
    ) -> None: ...

class Pool2dProblem:
    def __init__(
        self,
        *,
        dtype: str,
        N: int,
        C: int,
        H: int,
        W: int,
        P: int,
        Q: int,
        R: int,
        S: int,
        stride: Sequence[int],
        pad: Sequence[int],
        dilation: Sequence[int],
        x: Sequence[int],
        y: Sequence[int],
        divisor_override: int = 0,
        count_include_pad: bool = True,
        adaptive: bool = False,
    ) -> None: ...

class SdpaProblem:
    def __init__(
        self,
        *,
        dtype: str,
        B: int,
        Hq: int,
        Hkv: int,
        Lq: int,
        Lkv: int,
        D: int,
        Dv: int,
        scale: float,
        softcap: float = 0.0,
        mask_kind: str = "none",
        band: Sequence[int],
        dropout: float = 0.0,
        key: int = 0,
        strides: Sequence[Sequence[int]],
        gradient_strides: Sequence[Sequence[int]] = ...,
        bias: Sequence[int] | None = None,
    ) -> None: ...

class NormProblem:
    def __init__(self, *, dtype: str, N: int, C: int, eps: float) -> None: ...

class BatchNormProblem:
    def __init__(
        self,
        *,
        dtype: str,
        N: int,
        C: int,
        P: int,
        channels_last: bool,
        training: bool,
        residual: bool,
        activation: str,
        eps: float,
    ) -> None: ...

class RecurrentProblem:
    def __init__(self, *, dtype: str, L: int, B: int, H: int, reverse: bool) -> None: ...

class Plan:
    @property
    def kernel(self) -> str: ...
    @property
    def workspace(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def packed(self) -> tuple[int, int]: ...
    def pack(self, w: int, packed: int) -> None: ...
    def run_conv2d(
        self,
        x: int,
        w: int,
        bias: int,
        residual: int,
        y: int,
        packed: int = 0,
        workspace: int | None = None,
        stream: int = 0,
    ) -> None: ...
    def run_pool2d(self, x: int, y: int, indices: int, workspace: int | None = None, stream: int = 0) -> None: ...
    def run_sdpa(self, addresses: Sequence[int], workspace: int | None = None, stream: int = 0) -> None: ...
    def run_norm(self, addresses: Sequence[int], workspace: int | None = None, stream: int = 0) -> None: ...
    def run_batch_norm(self, addresses: Sequence[int], workspace: int | None = None, stream: int = 0) -> None: ...
    def run_recurrent(self, addresses: Sequence[int], workspace: int | None = None, stream: int = 0) -> None: ...

class Cascade:
    def __init__(self, plans: Sequence[Plan]) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def workspace(self) -> int: ...
    def run(self, x: int, residual: int, y: int, filters: Sequence[tuple[int, int, int]]) -> None: ...

def kernels() -> list[KernelInfo]: ...
def why_not_on_gpu(device: int) -> str: ...
def why_not_capability(major: int, minor: int, built: str) -> str: ...
def machine() -> dict[str, Any]: ...
def build() -> dict[str, Any]: ...
def scratch(bytes: int) -> int: ...
def set_isa_limit(name: str) -> None: ...
def fma_peak(target: str, dtype: str, threads: int, seconds: float) -> float: ...
@overload
def plan(
    op: str, problem: Conv2dProblem, threads: int, force: str = "", strict: bool = False, device: int = -1
) -> Plan: ...
@overload
def plan(
    op: str, problem: Pool2dProblem, threads: int, force: str = "", strict: bool = False, device: int = -1
) -> Plan: ...
@overload
def plan(
    op: str, problem: SdpaProblem, threads: int, force: str = "", strict: bool = False, device: int = -1
) -> Plan: ...
@overload
def plan(
    op: str, problem: NormProblem, threads: int, force: str = "", strict: bool = False, device: int = -1
) -> Plan: ...
@overload
def plan(
    op: str, problem: BatchNormProblem, threads: int, force: str = "", strict: bool = False, device: int = -1
) -> Plan: ...
@overload
def plan(
    op: str, problem: RecurrentProblem, threads: int, force: str = "", strict: bool = False, device: int = -1
) -> Plan: ...
@overload
def explain(
    op: str, problem: Conv2dProblem, force: str = "", strict: bool = False, device: int = -1
) -> list[tuple[str, str, float]]: ...
@overload
def explain(
    op: str, problem: Pool2dProblem, force: str = "", strict: bool = False, device: int = -1
) -> list[tuple[str, str, float]]: ...
@overload
def explain(
    op: str, problem: SdpaProblem, force: str = "", strict: bool = False, device: int = -1
) -> list[tuple[str, str, float]]: ...
@overload
def explain(
    op: str, problem: NormProblem, force: str = "", strict: bool = False, device: int = -1
) -> list[tuple[str, str, float]]: ...
@overload
def explain(
    op: str, problem: BatchNormProblem, force: str = "", strict: bool = False, device: int = -1
) -> list[tuple[str, str, float]]: ...
@overload
def explain(
    op: str, problem: RecurrentProblem, force: str = "", strict: bool = False, device: int = -1
) -> list[tuple[str, str, float]]: ...

# ---- Calls on torch's tensors: csrc/eager --------------------------------------------------------------------------------------
#
# Each takes the arguments of fastconv.functional's function and returns its result, or None where the call is not the usual one.

def eager_conv2d(
    input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any, /
) -> Any: ...
def eager_linear(input: Any, weight: Any, bias: Any, /) -> Any: ...
def eager_max_pool2d(
    input: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any, /
) -> Any: ...
def eager_avg_pool2d(
    input: Any, kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any, count_include_pad: Any, /
) -> Any: ...
def eager_adaptive_avg_pool2d(input: Any, output_size: Any, /) -> Any: ...
def eager_frozen_conv2d(
    input: Any, weight: Any, bias: Any, residual: Any, kept: Any, stride: Any, padding: Any, dilation: Any, groups: Any,
    activation: Any, /,
) -> Any: ...  # fmt: skip
def eager_frozen_linear(input: Any, weight: Any, bias: Any, residual: Any, kept: Any, activation: Any, /) -> Any: ...
def eager_layer_norm(input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, residual: Any, /) -> Any: ...
def eager_sdpa(query: Any, key: Any, value: Any, is_causal: Any, scale: Any, enable_gqa: Any, /) -> Any: ...
def eager_record_product(context: Any, x: Any, w: Any, bias: Any, recipe: Any, /) -> Any: ...
def eager_record_max(context: Any, x: Any, recipe: Any, /) -> Any: ...
def eager_record_avg(context: Any, x: Any, recipe: Any, /) -> Any: ...
def eager_backward_conv2d(context: Any, dy: Any, /) -> Any: ...
def eager_backward_linear(context: Any, dy: Any, /) -> Any: ...
def eager_backward_max_pool2d(context: Any, dy: Any, /) -> Any: ...
def eager_backward_avg_pool2d(context: Any, dy: Any, /) -> Any: ...
def eager_backward_adaptive_avg_pool2d(context: Any, dy: Any, /) -> Any: ...
def eager_connect(needs: type, exchange_api: object, /) -> None: ...
def eager_register(name: str, resolver: Callable[..., Any], takes_over: Callable[..., Any] | None, /) -> None: ...
def eager_clear() -> None: ...
