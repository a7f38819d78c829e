"""Which way a call goes: to our kernels, to torch, or back to the caller as an error."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _gpu
from .fallback import note

_f32, _f64, _strided = torch.float32, torch.float64, torch.strided
# What the kernels for GPUs take.
ON_GPU = (_f32, torch.bfloat16, torch.float16)
_any_autocast = torch._C._is_any_autocast_enabled
_tracing = torch._C._get_tracing_state
_is_exporting = torch.compiler.is_exporting


def quiet() -> bool:
    """Whether nobody casts, traces or exports the calls made now."""
    return not _any_autocast() and _tracing() is None and not _is_exporting()


def plain(x: Any) -> bool:
    """Whether x is a dense float32 or float64 CPU tensor that nobody overrides, in a quiet moment: the common case, in 1 us."""
    kind = type(x)
    if kind is not Tensor and kind is not Parameter:
        return False
    dtype = x.dtype
    return (
        (dtype is _f32 or dtype is _f64)
        and x.is_cpu
        and x.layout is _strided
        and not has_torch_function_variadic(x)
        and quiet()
    )


def plain_pair(x: Any, w: Any, bias: Any) -> bool:
    """The same for an input, a weight and perhaps a bias of one dtype."""
    kind = type(w)
    if (kind is not Parameter and kind is not Tensor) or not plain(x):
        return False
    dtype = x.dtype
    if w.dtype is not dtype or not w.is_cpu or w.layout is not _strided:
        return False
    if bias is None:
        return True
    kind = type(bias)
    return (kind is Parameter or kind is Tensor) and bias.dtype is dtype and bias.is_cpu and bias.layout is _strided


def overridden(
    ours: Callable[..., Any], theirs: Callable[..., Any], tensors: tuple[Any, ...], *args: Any, **kwargs: Any
) -> Any:
    """The answer of whoever overrides `__torch_function__`. Types that only know torch's function are offered that."""
    try:
        return handle_torch_function(ours, tensors, *args, **kwargs)
    except TypeError as error:
        if not str(error).startswith("Multiple dispatch failed") and "no implementation found for" not in str(error):
            raise
    return handle_torch_function(theirs, tensors, *args, **kwargs)


def _own_memory(t: Tensor) -> bool:
    """Whether a tensor of a subclass is an ordinary one (or stands for one, while a compiler traces)."""
    if type(t).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return True
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(t, (FakeTensor, FunctionalTensor))


def autocast_to(tensors: list[Tensor]) -> torch.dtype | None:
    """What autocast of their device makes of them; None where it leaves them alone, as it leaves float64."""
    kind = "cuda" if tensors and tensors[0].is_cuda else "cpu"
    if not torch.is_autocast_enabled(kind):
        return None
    if not any(t.is_floating_point() and t.dtype is not _f64 for t in tensors):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(*tensors: Tensor | None) -> Any:
    """Operands of an op on torch's list of those of lower precision, as autocast casts them. float64 is left alone."""
    dtype = autocast_to([t for t in tensors if t is not None])
    return tensors if dtype is None else _cast(tensors, dtype)


def autocast_up(*tensors: Tensor | None) -> Any:
    """Operands of an op that autocast of CUDA, and not the CPU's, computes in float32."""
    present = [t for t in tensors if t is not None]
    return _cast(tensors, _f32) if present[0].is_cuda and autocast_to(present) is not None else tensors


def _cast(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    return [t if t is None or not t.is_floating_point() or t.dtype is _f64 else t.to(dtype) for t in tensors]


def on_gpu(op: str, x: Any, *others: Any) -> bool:
    """Whether these, and those that are not None, are CUDA tensors of one dtype for our kernels, in a quiet moment."""
    given = [t for t in (x, *others) if t is not None]
    if not (isinstance(x, Tensor) and x.is_cuda and all(isinstance(t, Tensor) for t in given)):
        return False
    if has_torch_function_variadic(*given) or not quiet() or any(t.dtype is not x.dtype for t in given):
        return False
    return not reason_for_torch({str(place): t for place, t in enumerate(given)}, False, op=op)


def exporting() -> bool:
    """Whether the call is being written down for another runtime, which knows torch's operators and not ours."""
    return _is_exporting() or torch.onnx.is_in_onnx_export()


def reason_for_torch(
    tensors: dict[str, Tensor | None], casts: bool, dtypes: Collection[torch.dtype] = (_f32, _f64), op: str = ""
) -> str:
    """Why torch has to answer; "" where we can. `casts`: the CPU's autocast applies to this op, and to dtypes that are not ours;
    on a GPU there are kernels for what autocast makes. `dtypes` are the CPU's.
    """
    present = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(present.values()))
    for name, t in present.items():
        if not _own_memory(t):
            return f"{name} is a {type(t).__name__}"
        if t.is_cuda:
            reason = _gpu.reason_for_torch(op, t.get_device())
            if reason:
                return f"{name} is on cuda{reason}"
            casts, dtypes = False, ON_GPU
        elif t.device.type not in ("cpu", "meta"):
            return f"{name} is on {t.device.type}"
        if (t.is_cuda or first.is_cuda) and t.device != first.device:
            return f"{name} is on {t.device}, other operands on {first.device}"
        if t.is_nested or t.layout is not _strided:
            return f"{name} is {'nested' if t.is_nested else str(t.layout).removeprefix('torch.')}"
    if _tracing() is not None:
        return "torch.jit traces it"
    dtype = autocast_to(list(present.values())) if casts else None
    if dtype is not None:
        return f"autocast to {str(dtype).removeprefix('torch.')}"
    for t in present.values():
        if t.dtype not in dtypes:
            return f"dtype {str(t.dtype).removeprefix('torch.')}"
    return ""


def check_one_device(op: str, tensors: dict[str, Tensor | None]) -> None:
    """Raises RuntimeError where meta tensors meet others: torch computes garbage from the memory that a meta tensor has not."""
    places = {name: t.device for name, t in tensors.items() if t is not None}
    if len({device.type == "meta" for device in places.values()}) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise RuntimeError(f"Expected all tensors to be on the same device: {op}() got {found}")


def for_torch(
    op: str,
    tensors: dict[str, Tensor | None],
    casts: bool,
    otherwise: str = "",
    dtypes: Collection[torch.dtype] = (_f32, _f64),
) -> bool:
    """Whether torch answers this call; says why, unless it is being exported and so nothing is computed here.

    `otherwise` is why, where the tensors themselves are no reason; `dtypes` are those that the op has kernels for. Raises
    RuntimeError where operands do not share a device.
    """
    check_one_device(op, tensors)
    if exporting():
        return True
    reason = reason_for_torch(tensors, casts, dtypes, op) or otherwise
    if reason:
        _note(op, reason)
    return bool(reason)


def _note(op: str, reason: str) -> None:
    if _gpu.calling.get():
        raise NotImplementedError(f"fastconv.cuda.{op} has no kernel for this call: {reason}")
    note(op, reason)


# What torch.compiler.assume_constant_result does, without importing the compiler: it calls this while it traces, instead of
# tracing into it, so that compiled code is counted and no graph breaks.
_note._dynamo_marked_constant = True  # type: ignore[attr-defined]
