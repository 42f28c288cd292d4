"""."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import RankLost
from .channel import Channel


class Ranks(Protocol):
    """Running ranks of one epoch, loaded, as `cluster.launcher` starts them.

    Args:
        channels: to each rank; nothing has been sent on them but the order to load.
        pids, ready: of each rank its process, and what it said when it was ready.
        backend, backend_reason: how they exchange, and why so (None: it was asked for).
    """

    channels: list[Channel]
    pids: list[int]
    ready: list[dict[str, Any]]
    backend: str
    backend_reason: str | None

    def blame(self, rank: int, reason: str) -> RankLost:
        """The rank that really failed (a dead one before those that noticed), and why."""
        ...

    def close(self, *, now: bool) -> None:
        """End every rank; `now`: without asking first. When it returns they are gone, or cannot be
        heard any more. May be called again."""
        ...


@dataclass(frozen=True)
class Epoch:
    """Which ranks are to be started.

    Args:
        number: larger than of all ranks before; with every message to and from these.
        closing: set when the group is closed: a start that takes long looks at it and gives up.
        report: to be told what a start waits for, such as a machine; /health passes it on.
        reason: why the ranks before these were ended; empty for the first ones.
    """

    number: int
    closing: threading.Event
    report: Callable[[str], None] = lambda _: None
    reason: str = ""


RankStarter = Callable[[Epoch], Ranks]
"""Starts and loads the ranks of an epoch; raises a `CenacleError` if it cannot, and leaves none."""
