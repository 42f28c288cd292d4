"""The optional C++ extension: whether it is there, fits, and is wanted.

Owns: importing `cenacle._native` and saying in one sentence why not.
Does not know: models, layers.
Invariant: nothing here fails; without the extension everything runs on plain MLX.
Next: `model/native_layers.py`, which puts its layers into a model; `native/`, its source.
"""

from __future__ import annotations

import os
from types import ModuleType

import mlx.core as mx  # first: the extension takes and gives its arrays

_module: ModuleType | None = None
_why: str = ""


def _import() -> tuple[ModuleType | None, str]:
    if os.environ.get("CENACLE_NATIVE") == "0":
        return None, "the native kernels are turned off by CENACLE_NATIVE=0"
    try:
        from . import _native  # type: ignore[attr-defined, unused-ignore]
    except ImportError as error:
        return None, f"the native kernels were not built for this machine ({error})"
    if _native.mlx_version != mx.__version__:
        return None, (
            f"the native kernels were built with MLX {_native.mlx_version}, this is "
            f"{mx.__version__}: install cenacle again"
        )
    return _native, ""


_module, _why = _import()


def available() -> bool:
    """Whether the extension can be used."""
    return _module is not None


def why_not() -> str:
    """One sentence that says why it cannot be used; empty if it can."""
    return _why


def module() -> ModuleType:
    """The extension.

    Raises:
        ImportError: it is not `available`.
    """
    if _module is None:
        raise ImportError(_why)
    return _module


def set_threads(local_ranks: int = 1) -> int:
    """Give the kernels this process's share of the machine's cores, or CENACLE_THREADS.

    Args:
        local_ranks: number of ranks that share the machine.

    Returns:
        The number of threads.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    asked = os.environ.get("CENACLE_THREADS", "")
    threads = int(asked) if asked.isdecimal() and int(asked) else max(1, cores // local_ranks)
    if _module is not None:
        _module.set_threads(threads)
    return threads
