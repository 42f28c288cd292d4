"""What other packages do when they are imported, made harmless or quicker.

Owns: keeping mlx-lm from changing the limit of open files, and from importing what downloads; a
quicker search in transformers; quicker configs of mlx-lm and mlx-vlm.
Does not know: who imports them.
Invariant: importing mlx-lm leaves the limit as it was. It would set it to 2,048, and the most
that it can be raised to to 4,096, and fail where less is allowed. transformers finds the same
names as without the hook. This is imported before the program handles Ctrl-C, and imports next to
nothing.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from functools import cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SEARCH = "create_import_structure_from_path"
HUB, DOWNLOAD = "huggingface_hub", "snapshot_download"


@contextmanager
def _keep_file_limit(_: ModuleType) -> Iterator[None]:
    import resource

    original = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        with _download_later():
            yield
    finally:
        resource.setrlimit = original


@contextmanager
def _download_later() -> Iterator[None]:
    """mlx-lm downloads with huggingface_hub, whose HTTP client takes 0.2 s to import; so it is
    imported by the first download."""
    names = vars(importlib.import_module(HUB))
    is_new = DOWNLOAD not in names
    names.setdefault(DOWNLOAD, _download)
    try:
        yield
    finally:
        if is_new:
            del names[DOWNLOAD]


def _download(*arguments: Any, **options: Any) -> Any:
    return getattr(importlib.import_module(HUB), DOWNLOAD)(*arguments, **options)


@contextmanager
def _search_from_the_end(module: ModuleType) -> Iterator[None]:
    """transformers looks for the last `__all__` of 1,700 files line by line, half of its import;
    and does so twice, because the 128 folders that it remembers are a third of all."""
    yield
    names = vars(module)
    search = getattr(names.get(SEARCH), "__wrapped__", None)
    if search is not None:
        names[SEARCH] = cache(search)
    find_names = getattr(module, "fetch__all__", None)
    if find_names is not None:
        vars(module)["fetch__all__"] = lambda text: find_names(text[text.rfind("\n__all__") + 1 :])


@contextmanager
def _read_signatures_once(module: ModuleType) -> Iterator[None]:
    """mlx-lm and mlx-vlm ask for the parameters of a config's class anew for each key of a
    config, 5 to 10 ms for a model."""
    from types import SimpleNamespace

    yield
    names = vars(module)
    if (used := names.get("inspect")) is not None:
        names["inspect"] = SimpleNamespace(**vars(used) | {"signature": cache(used.signature)})


AROUND_IMPORT: dict[str, Callable[[ModuleType], AbstractContextManager[None]]] = {
    "mlx_lm.models.base": _read_signatures_once,
    "mlx_lm.utils": _keep_file_limit,
    "mlx_vlm.models.base": _read_signatures_once,
    "transformers.utils.import_utils": _search_from_the_end,
}


class _Loader:
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with AROUND_IMPORT[module.__name__](module):
            self._loader.exec_module(module)


class _Finder:
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in AROUND_IMPORT:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # it has what is used
        return spec


def install() -> None:
    """From now on imports are as described above."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
