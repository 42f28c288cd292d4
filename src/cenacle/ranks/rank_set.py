"""What local and remote ranks have in common: channels, and loading.

Owns: sending the load order to every rank and waiting until all are ready.
Does not know: how ranks are started or ended.
Invariant: a rank that is silent, ends or sends something malformed while loading is named.
Next: `local_ranks.py` and `cluster/remote_ranks.py`.
"""

from __future__ import annotations

import selectors
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..core.link import Link
from ..core.plan import Plan
from ..errors import ClusterError, RankLost
from ..message import MessageError, parse
from .channel import Channel
from .messages import Heartbeat, LoadOrder, LoadProgress, MeasureOrder, RankFailure, Ready
from .ranks import Epoch, ReportProgress

# Ranks send a heartbeat four times a second: one that hangs is noticed within 5 s.
SILENCE_TIMEOUT_S = 4.0


class RankSet(ABC):
    """Ranks of one epoch, as `Ranks` once they have loaded."""

    plan: Plan

    def __init__(self, nodes: int, backend: str, backend_reason: str | None, epoch: Epoch) -> None:
        self.nodes = nodes
        self.backend, self.backend_reason = backend, backend_reason
        self.channels: Sequence[Channel] = []
        self.pids: list[int] = []
        self.ready: list[Ready] = []
        self.links: Mapping[tuple[int, int], Link] = {}
        self._epoch = epoch
        self._closed = False

    def load(self, order: LoadOrder | MeasureOrder, report: ReportProgress | None = None) -> None:
        """Send every rank its order and wait until all are ready.

        Raises:
            CenacleError: what the first failing rank reported, in its own class; or `RankLost`.
        """
        if isinstance(order, LoadOrder):
            order = replace(order, checksums=order.checksums and self._epoch.number == 0)
            self.plan = order.plan
        for rank, channel in enumerate(self.channels):
            channel.send(self._order_for(rank, order).to_json())
        ready: dict[int, Ready] = {}
        last_message_s = dict.fromkeys(range(self.nodes), time.monotonic())
        with selectors.DefaultSelector() as selector:
            for rank, channel in enumerate(self.channels):
                selector.register(channel, selectors.EVENT_READ, rank)
            while len(ready) < self.nodes:
                self._check_closing()
                for key, _ in selector.select(timeout=0.2):
                    rank = key.data
                    last_message_s[rank] = time.monotonic()
                    message = self._receive(rank)
                    if isinstance(message, Ready):
                        ready[rank] = message
                    elif isinstance(message, LoadProgress) and report is not None:
                        report(rank, message.done_bytes, message.total_bytes)
                rank = min(last_message_s, key=lambda r: last_message_s[r])
                if time.monotonic() - last_message_s[rank] > SILENCE_TIMEOUT_S:
                    reason = f"sent nothing for {SILENCE_TIMEOUT_S:g} s while loading"
                    raise self.blame(rank, reason)
        self.ready = [ready[rank] for rank in range(self.nodes)]

    def _order_for(self, rank: int, order: LoadOrder | MeasureOrder) -> LoadOrder | MeasureOrder:
        del rank
        return replace(order, backend=self.backend)

    def _receive(self, rank: int) -> Heartbeat | LoadProgress | Ready:
        try:
            message = parse(
                self.channels[rank].receive(), Heartbeat, LoadProgress, Ready, RankFailure
            )
        except MessageError as error:
            raise self.blame(rank, f"sent a malformed message ({error})") from error
        except ClusterError as error:
            raise self.blame(rank, str(error)) from error
        if isinstance(message, RankFailure):
            raise message.to_error(f"rank {rank}: ")
        return message

    def _check_closing(self) -> None:
        if self._epoch.closing.is_set():
            raise ClusterError("the group was closed while its ranks were being started")

    @abstractmethod
    def blame(self, rank: int, reason: str) -> RankLost:
        """See `Ranks.blame`."""

    @abstractmethod
    def close(self, *, now: bool) -> None:
        """See `Ranks.close`."""
