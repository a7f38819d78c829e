"""Loads the compiled module `fastconv._C`, on the OpenMP runtime that torch uses."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from types import ModuleType


def _share_openmp_with_torch() -> None:
    """Maps torch's `libgomp.so.1` before `_C` asks for that name, so that one thread pool serves both.

    Two runtimes in a process mean two pools that fight over the cores. torch itself is only located, not imported: NumPy
    users do not pay for it. A torch without its own copy (conda, distributions) takes the system's, and so does `_C`.
    """
    if "torch" in sys.modules:
        return
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return
    for folder in spec.submodule_search_locations:
        library = os.path.join(folder, "lib", "libgomp.so.1")
        if os.path.exists(library):
            ctypes.CDLL(library)
            return


@functools.cache
def load() -> ModuleType:
    """The module `fastconv._C`. Raises ImportError, in one sentence that says what to do, where it cannot be loaded."""
    _share_openmp_with_torch()
    try:
        return importlib.import_module("fastconv._C")
    except ImportError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ImportError(
            f"fastconv's compiled module cannot be loaded under Python {version} ({error}); "
            "run `pip install --force-reinstall --no-deps fastconv`, or `pip install .` in a clone, with this Python."
        ) from error
