"""Imports mlx-lm without transformers, which only tokenizers need.

Owns: a stand-in for transformers in a process that may never tokenize; importing its renderer of
chat templates alone.
Does not know: tokenizers, ranks.
Invariant: what needs more than the names that mlx-lm imports gets the real package.
The import takes a second of processor time, more than all else that a rank imports.
Next: `ranks/worker.py` defers, `text/text_backend.py` loads.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "transformers"
USER = "mlx_lm.tokenizer_utils"
RENDERER = f"{PACKAGE}.utils.chat_template_utils"
# What mlx-lm imports at its top: classes to derive from, to register and to compare with.
NAMES = {
    PACKAGE: ("AutoTokenizer", "PreTrainedTokenizer", "PreTrainedTokenizerFast"),
    f"{PACKAGE}.tokenization_utils_base": ("PreTrainedTokenizerBase",),
}


class _StandIn(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []
        for class_name in NAMES[name]:
            register = classmethod(lambda *_, **__: None)
            setattr(self, class_name, type(class_name, (), {"register": register}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        load()
        return getattr(importlib.import_module(self.__name__), name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the other modules of the real package."""

    def find_spec(
        self, name: str, _: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{PACKAGE}.") or not isinstance(sys.modules[PACKAGE], _StandIn):
            return None
        load()
        return PathFinder.find_spec(name, sys.modules[PACKAGE].__path__, target)


def import_renderer() -> Any:
    """transformers' `render_jinja_template`, without the rest of the package if that is possible.

    For a process that needs nothing else of it: a third of the time, and the rest cannot be
    imported afterwards. Where transformers is there already, that one's.
    """
    load()
    spec = importlib.util.find_spec(PACKAGE) if PACKAGE not in sys.modules else None
    bare = (PACKAGE, f"{PACKAGE}.utils")
    if spec is not None and spec.origin is not None:
        for name in bare:
            module = ModuleType(name)  # in place of its `__init__.py`, which imports everything
            module.__path__ = [str(Path(spec.origin).parent.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = module
        try:
            return importlib.import_module(RENDERER).render_jinja_template
        except (ImportError, AttributeError):  # of another version: it needs more
            for name in [n for n in sys.modules if n.split(".")[0] == PACKAGE]:
                del sys.modules[name]
    return importlib.import_module(RENDERER).render_jinja_template


def defer() -> None:
    """From now on imports of mlx-lm do not import transformers, if nothing has yet."""
    if PACKAGE not in sys.modules:
        sys.modules |= {name: _StandIn(name) for name in NAMES}
        sys.meta_path.insert(0, _Finder())


def load() -> None:
    """Import transformers, if it was deferred."""
    if not isinstance(sys.modules.get(PACKAGE), _StandIn):
        return
    for name in NAMES:
        del sys.modules[name]
    importlib.import_module(PACKAGE)
    if USER in sys.modules:
        importlib.reload(sys.modules[USER])
