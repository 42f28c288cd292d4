"""A collective that wraps another one, and one that adds latency to it."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from .base import Collective, RoutingDecision


class WrappedCollective(Collective):
    """Another collective, called through `_inner`."""

    def __init__(self, inner: Collective) -> None:
        super().__init__()
        self.rank, self.size, self._inner = inner.rank, inner.size, inner

    def raise_if_failed(self) -> None:
        """See `Collective`."""
        self._inner.raise_if_failed()

    def close(self) -> None:
        """See `Collective`."""
        self._inner.close()


class DelayedCollective(WrappedCollective):
    """Adds a link's latency to every all-reduce.

    A lazy graph has no place for a sleep, so each all-reduce is evaluated first. This is the delay
    of a program that does not overlap communication and computation.

    Args:
        latency_s: may be changed at any time. 0: neither delay nor evaluation.
        sleep: replaced in tests.
    """

    def __init__(
        self, inner: Collective, latency_s: float, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__(inner)
        self.latency_s, self._sleep = latency_s, sleep

    def _all_sum(self, x: mx.array, routing: RoutingDecision | None) -> mx.array:
        y = self._inner.all_sum(x, routing)
        if self.latency_s:
            mx.eval(y)
            self._sleep(self.latency_s)
        return y
