"""Packages that only some commands need, which an installation may lack.

Owns: importing them, and the sentence that says which extra of Cenacle installs them.
Does not know: what they are used for.
Invariant: nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .errors import InputError


def import_extra(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: dotted name, such as "matplotlib.figure".
        extra: of pyproject.toml that installs it, such as "plots".

    Raises:
        InputError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"this needs the package {(error.name or module).partition('.')[0]}, which is not "
            "installed: run "
            f"`pip install 'cenacle[{extra}]'`"
        ) from error


def is_installed(package: str) -> bool:
    """Whether a package could be imported; imports nothing."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
