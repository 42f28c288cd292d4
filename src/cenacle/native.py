"""The optional C++ extension: whether it is available.

Owns: importing `cenacle._native`, the reason if that fails, and its threads.
Does not know: models, layers.
Invariant: nothing here fails; without the extension everything runs on plain MLX.
Next: `model/native_layers.py` installs its layers in a model; `native/` is its source.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

import mlx.core  # noqa: F401  first: the extension takes and gives its arrays

from .machine import usable_cores


def _import() -> tuple[ModuleType | None, str]:
    if os.environ.get("CENACLE_NATIVE") == "0":
        return None, "the native kernels are turned off by CENACLE_NATIVE=0"
    try:
        extension = import_module("cenacle._native")
    except ImportError as error:
        return None, f"the native kernels were not built for this machine ({error})"
    mlx_version = import_module("mlx.core").__version__
    if extension.mlx_version != mlx_version:
        return None, (
            f"the native kernels were built with MLX {extension.mlx_version}, this is MLX "
            f"{mlx_version}: install cenacle again"
        )
    return extension, ""


_extension, _unavailable_reason = _import()


def is_available() -> bool:
    """Whether the extension can be used."""
    return _extension is not None


def unavailable_reason() -> str:
    """Why the extension cannot be used, in one sentence; empty if it can."""
    return _unavailable_reason


def trim() -> None:
    """Give freed memory back to the machine, where the extension can."""
    if _extension is not None:
        _extension.trim()


def extension() -> ModuleType:
    """The extension.

    Raises:
        ImportError: it is not available.
    """
    if _extension is None:
        raise ImportError(_unavailable_reason)
    return _extension


def describe_kernels() -> str:
    """What computes on this machine's CPU, in a few words."""
    if _extension is None:
        return f"plain MLX, because {_unavailable_reason}"
    threads = _extension.threads()
    text = f"{_extension.selected_kernels()} kernels, {threads} thread{'s' if threads > 1 else ''}"
    return text + (", int8 activations" if _extension.activation_bits() == 8 else "")


def set_activations(name: str) -> None:
    """Choose the integers to which layers that are installed from now on quantize activations.

    "int8", with a scale for every 32 values (16 for nvfp4), works for affine 4-bit weights, mxfp4
    and nvfp4 on x86-64, and for affine 8-bit weights with AVX-512 and VNNI. Else integers have 16
    bits; weights of 8-bit floats are multiplied with floats.

    Args:
        name: "int16" or "int8".
    """
    if _extension is not None:
        _extension.set_activation_bits(int(name.removeprefix("int")))


def set_threads(local_ranks: int = 1) -> int:
    """Set the number of kernel threads: this process's share of the cores, or CENACLE_THREADS.

    Args:
        local_ranks: number of ranks on this machine.

    Returns:
        The number of threads.
    """
    cores = len(usable_cores())
    limit = os.environ.get("CENACLE_THREADS", "")
    threads = int(limit) if limit.isdecimal() and int(limit) else max(1, cores // local_ranks)
    if _extension is not None:
        _extension.set_threads(threads)
    return threads
