"""Cenacle: a private server for Mixture-of-Experts models on a few machines.

>>> with cenacle.load("org/model", nodes=2) as model:
...     print(model.generate("What is 12 + 30?").text)
"""

from __future__ import annotations

import os

from . import import_hooks
from .errors import (
    Busy,
    CenacleError,
    CheckpointError,
    ClusterError,
    InputError,
    NodesMissing,
    PlanError,
    RankLost,
)

# Not that of `typing`: what is imported here comes before the program handles Ctrl-C.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    __version__: str
    from .api import Chunk, Completion, Model, load
    from .runtime import inspect

# Nothing is reported to anybody: huggingface_hub would tell its makers what is used.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
import_hooks.install()

__all__ = [
    "Busy",
    "CenacleError",
    "CheckpointError",
    "Chunk",
    "ClusterError",
    "Completion",
    "InputError",
    "Model",
    "NodesMissing",
    "PlanError",
    "RankLost",
    "inspect",
    "load",
]


def __getattr__(name: str) -> Any:
    """Load MLX when it is first needed: the nouns and `cenacle --help` do without."""
    if name in ("Chunk", "Completion", "Model", "load"):
        from . import api

        return getattr(api, name)
    if name == "inspect":
        from .runtime import inspect

        return inspect
    if name == "__version__":
        from importlib import metadata  # it takes a tenth of a process's start

        return metadata.version("cenacle")
    raise AttributeError(f"module 'cenacle' has no attribute {name!r}")
