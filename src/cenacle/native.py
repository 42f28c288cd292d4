"""The optional C++ extension: whether it is there, fits, and is wanted.

Owns: importing `cenacle._native` and saying in one sentence why not.
Does not know: models, layers.
Invariant: nothing here fails; without the extension everything runs on plain MLX.
Next: `model/native_layers.py`, which puts its layers into a model; `native/`, its source.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

import mlx.core  # noqa: F401  first: the extension takes and gives its arrays


def _import() -> tuple[ModuleType | None, str]:
    if os.environ.get("CENACLE_NATIVE") == "0":
        return None, "the native kernels are turned off by CENACLE_NATIVE=0"
    try:
        extension = import_module("cenacle._native")
    except ImportError as error:
        return None, f"the native kernels were not built for this machine ({error})"
    mlx_version = version("mlx")
    if extension.mlx_version != mlx_version:
        return None, (
            f"the native kernels were built with MLX {extension.mlx_version}, this is "
            f"{mlx_version}: install cenacle again"
        )
    return extension, ""


_module, _why = _import()


def is_available() -> bool:
    """Whether the extension can be used."""
    return _module is not None


def unavailable_reason() -> str:
    """One sentence that says why it cannot be used; empty if it can."""
    return _why


def extension() -> ModuleType:
    """The extension.

    Raises:
        ImportError: it is not `available`.
    """
    if _module is None:
        raise ImportError(_why)
    return _module


def describe_kernels() -> str:
    """What computes on this machine's CPU, in a few words."""
    if _module is None:
        return f"plain MLX, because {_why}"
    threads = _module.threads()
    said = f"{_module.used()} kernels, {threads} thread{'s' if threads > 1 else ''}"
    return said + (", int8 activations" if _module.activations() == 8 else "")


def set_activations(name: str) -> None:
    """Which integers the kernels make of activations, in layers that are made from now on.

    "int8", a scale for every 32 values, is there for 4- and 8-bit weights and mxfp4 on processors
    with AVX-512 and VNNI; everything else goes on with 16 bits.

    Args:
        name: "int16" or "int8".
    """
    if _module is not None:
        _module.use_activations(int(name.removeprefix("int")))


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
