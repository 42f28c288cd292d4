"""What a group needs of ranks, wherever they run.

Owns: the protocols `Ranks` and `RankSource`, and `Epoch`.
Does not know: processes, machines, models.
Next: `local_ranks.py` and `cluster/remote_ranks.py` implement them, `rank_group.py` uses them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..core.link import Link
from ..core.plan import Plan
from ..errors import RankLost
from .channel import Channel
from .messages import Ready

ReportProgress = Callable[[int, int, int], None]
"""Called with a rank, bytes of its weights that are loaded, and bytes in all."""


class Ranks(Protocol):
    """Running ranks of one epoch that have loaded their parts of a model."""

    @property
    def channels(self) -> Sequence[Channel]:
        """To each rank; only the load order has been sent on them."""
        ...

    @property
    def pids(self) -> Sequence[int]:
        """The process of each rank."""
        ...

    @property
    def ready(self) -> Sequence[Ready]:
        """What each rank reported when it had loaded."""
        ...

    @property
    def plan(self) -> Plan:
        """What each rank holds."""
        ...

    @property
    def backend(self) -> str:
        """How the ranks communicate."""
        ...

    @property
    def backend_reason(self) -> str | None:
        """Why so; None: it was requested."""
        ...

    @property
    def links(self) -> Mapping[tuple[int, int], Link]:
        """Measured links between pairs of ranks, the lower one first; empty: on one machine."""
        ...

    def blame(self, rank: int, reason: str) -> RankLost:
        """The error for a failure of the group: which rank caused it, and how.

        A rank or node that ended comes before the ranks that noticed.

        Args:
            rank: the rank at which the failure was noticed.
            reason: what was noticed, to follow the rank's name.
        """
        ...

    def close(self, *, now: bool) -> None:
        """End every rank; `now`: without asking it first. May be called again.

        When it returns, the ranks have ended or cannot be heard any more.
        """
        ...


@dataclass(frozen=True)
class Epoch:
    """Which of a group's successive sets of ranks is to be started.

    Args:
        number: larger than that of all sets before; every message carries it.
        closing: set when the group is closed; a start that takes long checks it and gives up.
        report: called with what the start waits for, such as a node; shown by /health.
        reason: why the ranks before these ended; empty for the first.
    """

    number: int = 0
    closing: threading.Event = field(default_factory=threading.Event)
    report: Callable[[str], None] = lambda _: None
    reason: str = ""


class RankSource(Protocol):
    """Starts the ranks of a group, again and again."""

    def start(self, epoch: Epoch, report: ReportProgress | None = None) -> Ranks:
        """Start and load the ranks of an epoch.

        Args:
            report: told how far each rank has loaded.

        Raises:
            CenacleError: they could not be started; none is left.
        """
        ...
