"""What there is to say about a model of a server.

Owns: the states of a model, and numbers about it.
Does not know: why a state changes (`model_pool.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ModelState(StrEnum):
    """Of one model."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(frozen=True)
class ModelStatus:
    """What there is to say about a model.

    Args:
        name: of it.
        state: see `ModelState`.
        reason: of its last failure; empty: none since it was loaded.
        since_s: seconds since its state changed.
        pinned: it is never unloaded.
        running, waiting: numbers of requests that it answers, and that wait for it to be loaded.
        loads, unloads, load_failures: how often.
    """

    name: str
    state: ModelState
    reason: str
    since_s: float
    pinned: bool
    running: int
    waiting: int
    loads: int
    unloads: int
    load_failures: int
