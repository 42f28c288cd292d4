"""The limit of open files of this process.

Owns: keeping mlx-lm from changing the limit, and raising it as far as the system allows.
Does not know: who opens files.
Invariant: importing mlx-lm leaves the limit as it was. It would set it to 2,048, and the most
that it can be raised to to 4,096, and fail where less is allowed.
"""

from __future__ import annotations

import importlib.abc
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

MODULE = "mlx_lm.utils"  # changes the limit when it is imported
WANTED_FILES = 65_536


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        original = resource.setrlimit
        resource.setrlimit = lambda *_: None
        try:
            self._loader.exec_module(module)
        finally:
            resource.setrlimit = original


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def keep_limit() -> None:
    """From now on the import of mlx-lm leaves the limit alone."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def raise_limit() -> int:
    """Allow as many open files as the system does, up to `WANTED_FILES`; how many may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return WANTED_FILES if soft == resource.RLIM_INFINITY else soft
