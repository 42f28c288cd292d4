"""Collectives for tests and for study; both wrap another one.

`Recorded` remembers what was exchanged; `Delayed` adds a link's latency to each exchange.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from .base import Collective, RoutingDecision


class RecordingCollective(Collective):
    """Remembers the shape and dtype of every exchange, in order, in `calls`."""

    def __init__(self, inner: Collective) -> None:
        super().__init__()
        self.rank, self.size, self._inner = inner.rank, inner.size, inner
        self.calls: list[tuple[tuple[int, ...], mx.Dtype]] = []

    def _all_sum(self, x: mx.array, chosen: RoutingDecision | None) -> mx.array:
        self.calls.append((tuple(x.shape), x.dtype))
        return self._inner.all_sum(x, chosen)

    def check(self) -> None:
        """See `Collective`."""
        self._inner.check()


class DelayedCollective(Collective):
    """Adds `latency_s` to every exchange.

    A lazy graph has no place for a sleep, so each exchange is evaluated first: the delay is that
    of a link under a program that does not overlap exchange and computation.

    Args:
        latency_s: seconds added to each exchange; may be changed at any time. 0: nothing is added
            and nothing evaluated.
        sleep: the clock's sleep, replaced in tests.
    """

    def __init__(
        self, inner: Collective, latency_s: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__()
        self.rank, self.size, self._inner = inner.rank, inner.size, inner
        self.latency_s, self._sleep = latency_s, sleep

    def _all_sum(self, x: mx.array, chosen: RoutingDecision | None) -> mx.array:
        y = self._inner.all_sum(x, chosen)
        if not self.latency_s:
            return y
        mx.eval(y)
        self._sleep(self.latency_s)
        return y

    def check(self) -> None:
        """See `Collective`."""
        self._inner.check()
