"""Timing measured steps: where the time of a token goes on this rank.

Owns: the laps of one step and the routing decisions recorded in it.
Does not know: what is measured, other ranks.
Invariant: outside a measured step nothing is evaluated and nothing is kept, so the lazy graph
stays whole; inside one each lap waits for its arrays, which costs a synchronization.
Next: `engine/engine.py` starts and ends steps; `docs/metrics.md` defines the timings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np


class StepTimer:
    """Takes laps between the parts of a step.

    Args:
        clock: seconds, replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.running = False
        self._start_s = self._last_lap_s = 0.0
        self._laps: list[tuple[str, float]] = []
        self._routed: dict[int, dict[int, int]] = {}

    def start(self) -> None:
        """Begin a measured step."""
        self.running = True
        self._laps, self._routed = [], {}
        self._start_s = self._last_lap_s = self._clock()

    def lap(self, name: str, *arrays: mx.array) -> None:
        """Wait for `arrays`; the time since the last lap was spent on `name`."""
        if not self.running:
            return
        mx.eval(*arrays)
        now_s = self._clock()
        self._laps.append((name, now_s - self._last_lap_s))
        self._last_lap_s = now_s

    def record_routing(self, layer: int, ids: mx.array) -> None:
        """Count the experts chosen in a layer: ids [..., k]."""
        if not self.running:
            return
        counts = self._routed.setdefault(layer, {})
        for expert, times in zip(*np.unique(np.asarray(ids), return_counts=True), strict=True):
            counts[int(expert)] = counts.get(int(expert), 0) + int(times)

    def stop(self) -> dict[str, Any]:
        """End the step.

        Returns:
            A JSON object: "total_s"; "laps_s", the seconds of each lap name; "all_reduces_s", the
            seconds of each all-reduce in order; "routed", layer -> expert -> times chosen.
        """
        self.running = False
        laps_s: dict[str, float] = {}
        for name, seconds in self._laps:
            laps_s[name] = laps_s.get(name, 0.0) + seconds
        return {
            "total_s": self._clock() - self._start_s,
            "laps_s": laps_s,
            "all_reduces_s": [s for name, s in self._laps if name == "all_reduce"],
            "routed": self._routed,
        }
