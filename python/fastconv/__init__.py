"""Convolution, pooling, linear and attention layers for PyTorch on kernels of our own.

    import fastconv
    y = fastconv.functional.conv2d(x, w, padding=1)     # torch.nn.functional's signatures
    model = fastconv.convert(model)                     # swaps the layers of a torch.nn model

Importing this costs nothing: torch and the compiled module are loaded at the first use of a name below.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import cuda, functional, models, nn, numpy
    from ._attention import sdpa
    from .control import build_info, explain, kernels, set_accuracy, set_cuda, use
    from .conversion import convert, revert
    from .fallback import FallbackWarning, fallback_counts, set_fallback
    from .fusion import fuse, unfuse
    from .plan import observe

    __version__: str

# Where each name lives; a submodule lives in itself. None is a submodule's name: importing that would replace it.
_HOMES = {
    "FallbackWarning": "fallback",
    "build_info": "control",
    "convert": "conversion",
    "explain": "control",
    "fallback_counts": "fallback",
    "fuse": "fusion",
    "kernels": "control",
    "observe": "plan",
    "revert": "conversion",
    "sdpa": "_attention",
    "set_accuracy": "control",
    "set_cuda": "control",
    "set_fallback": "fallback",
    "unfuse": "fusion",
    "use": "control",
}
_SUBMODULES = ("_native", "cuda", "functional", "models", "nn", "numpy", "plan", "reference", "testing")

__all__ = [
    "FallbackWarning",
    "__version__",
    "build_info",
    "convert",
    "cuda",
    "explain",
    "fallback_counts",
    "functional",
    "fuse",
    "kernels",
    "models",
    "nn",
    "numpy",
    "observe",
    "revert",
    "sdpa",
    "set_accuracy",
    "set_cuda",
    "set_fallback",
    "unfuse",
    "use",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            value: Any = importlib.metadata.version("fastconv")
        except importlib.metadata.PackageNotFoundError:
            value = "0+not.installed"
    elif name == "_C":
        from ._native import load

        value = load()
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"fastconv.{_HOMES[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"fastconv.{name}")
    else:
        raise AttributeError(f"module 'fastconv' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
