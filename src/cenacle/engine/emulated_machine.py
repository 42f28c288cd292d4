"""A rank on an emulated machine, which reads memory at a given speed.

Owns: the machine's clock: how long a pass of the model would take on it, and sleeping until then.
Does not know: which bytes a rank reads (`planning.plan_cost.RankReads`), how machines are written.
Invariants: the program is the real one: it computes everything, in its own processes, with its own
all-reduces; only when an all-reduce ends is decided here. What really takes longer than on the
machine is never hidden: it is counted as late, and the result is that much slower.
How: between two all-reduces a rank reads some bytes; its arrival at the next one is the time at
which the last one ended and what reading them takes, or the real time if that is later. Ranks tell
each other when they arrive, and all of them sleep until the last arrival and the link's time are
over. What Python does between two passes counts as overlapped with the first read, as it is in the
program, which prepares a pass while the one before is computed.
Limits: only reading takes time, so prompts, which are bound by arithmetic, are not emulated (their
passes are not counted); drafts are read by no machine. Clocks are compared: all ranks must run on
one computer. Every all-reduce is evaluated, as in `collective.delayed`.
Next: `bench/emulation.py` runs groups of such ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..collective.base import Collective, RoutingDecision
from ..collective.delayed import WrappedCollective
from ..core.emulation import EmulationStats
from ..planning.plan_cost import RankReads

LATE_SHARE = 0.02  # of a pass
IDLE_S = 0.05  # a longer pause between two passes is one: the clock begins again
_WORD = 1 << 20  # clocks travel in two words of microseconds, which int32 holds exactly


class EmulatedMachine(WrappedCollective):
    """All-reduces as a machine of a given speed sees them.

    Args:
        inner: the real ones.
        reads: what this rank reads.
        bytes_per_s: at which it reads.
        link_s: of an all-reduce.
        clock: seconds, of the same origin on all ranks; replaced in tests.
        sleep: replaced in tests.
    """

    def __init__(
        self,
        inner: Collective,
        reads: RankReads,
        bytes_per_s: float,
        link_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(inner)
        self._reads, self._bytes_per_s, self._link_s = reads, bytes_per_s, link_s
        self._clock, self._sleep = clock, sleep
        self._stats = EmulationStats()
        self._now_s = -IDLE_S  # on the machine: when its last all-reduce ended
        self._kv_bytes = 0.0
        self._index, self._trunk_is_read, self._head_is_read = 0, False, True
        self._is_counted = False
        self._begin_s = 0.0
        self._pass = EmulationStats()

    def begin_pass(self, contexts: Sequence[int], tokens: int) -> None:
        """A pass of the model begins.

        Args:
            contexts: of each request, the positions that its last token attends to.
            tokens: of each request.
        """
        self._finish_pass()
        self._kv_bytes = sum(map(self._reads.cache_bytes, contexts))
        self._index, self._trunk_is_read, self._head_is_read = 0, False, False
        now_s = self._clock()
        self._is_counted = tokens == 1
        if now_s - self._now_s > IDLE_S:
            self._now_s = now_s
        self._begin_s, self._pass = self._now_s, EmulationStats()

    def observe_passes(self, model: nn.Module) -> None:
        """Have every pass of a model begin here, in place."""
        kind: Any = type(model)

        def call(module: Any, inputs: mx.array, *args: Any, **keywords: Any) -> Any:
            caches = keywords.get("cache", args[0] if args else None)
            self.begin_pass(_contexts(inputs, caches), inputs.shape[1])
            return kind.__call__(module, inputs, *args, **keywords)

        attributes = {"__call__": call, "__module__": kind.__module__}
        model.__class__ = type(kind.__name__, (kind,), attributes)

    def take_stats(self) -> EmulationStats:
        """Of the passes since the last call."""
        self._finish_pass()
        stats, self._stats = self._stats, EmulationStats()
        return stats

    def _all_sum(self, x: mx.array, routing: RoutingDecision | None) -> mx.array:
        mx.eval(x, routing.ids if routing is not None else [])
        size = self._bytes_before(routing)
        due_s = self._now_s + size / self._bytes_per_s
        arrival_s = max(due_s, self._clock())
        y = self._inner.all_sum(x, routing)
        mx.eval(y)
        last_s = self._last_arrival(arrival_s)
        end_s = last_s + self._link_s
        rest_s = end_s - self._clock()
        if rest_s > 0:
            self._sleep(rest_s)
        end_s -= min(0.0, rest_s)
        self._pass += EmulationStats(
            late_s=arrival_s - due_s + max(0.0, -rest_s),
            read_bytes=size,
            read_s=due_s - self._now_s,
            wait_s=last_s - arrival_s,
            link_s=self._link_s,
        )
        self._now_s = end_s
        return y

    def _bytes_before(self, routing: RoutingDecision | None) -> float:
        """Bytes that the rank has read since the last all-reduce."""
        reads, layers = self._reads, self._reads.moe_layers
        trunk = (reads.trunk + self._kv_bytes) / layers
        if routing is not None:
            size = 0.0 if self._trunk_is_read else trunk
            self._index, self._trunk_is_read = reads.index_of[routing.layer] + 1, False
            chosen, times = np.unique(np.asarray(routing.ids), return_counts=True)
            counts = dict(zip(chosen.tolist(), times.tolist(), strict=True))
            return size + reads.expert_bytes(self._index - 1, counts)
        if self._index < layers:  # of attention or a dense layer
            size, self._trunk_is_read = (0.0 if self._trunk_is_read else trunk), True
            return size
        size, self._head_is_read = (0.0 if self._head_is_read else reads.head), True
        return size

    def _last_arrival(self, arrival_s: float) -> float:
        """The latest of all ranks' arrivals."""
        if self.size == 1:
            return arrival_s
        words = np.zeros((self.size, 2), dtype=np.int32)
        words[self.rank] = divmod(round(1e6 * arrival_s), _WORD)
        arrivals = np.asarray(self._inner.all_sum(mx.array(words))).astype(np.int64)
        return float((arrivals[:, 0] * _WORD + arrivals[:, 1]).max()) / 1e6

    def _finish_pass(self) -> None:
        """Count the pass that has ended, if it is one that counts."""
        if self._is_counted and self._head_is_read:
            total_s = self._now_s - self._begin_s
            late = self._pass.late_s > LATE_SHARE * (total_s - self._pass.late_s)
            self._stats += replace(self._pass, passes=1, late=int(late), total_s=total_s)
        self._is_counted = False


def _contexts(inputs: mx.array, caches: Any) -> list[int]:
    """Positions that each request's last token attends to: those in its cache, and its own."""
    requests, length = inputs.shape[:2]
    offset = next((c.offset for c in caches or () if hasattr(c, "offset")), 0)
    offsets = np.broadcast_to(np.asarray(offset).reshape(-1), (requests,))
    return [int(n) + length for n in offsets]
