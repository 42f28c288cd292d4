"""Where the time of a token goes: from the ranks' clocks to terms that add up.

Owns: the arithmetic of `docs/metrics.md`, section "Time of a token".
Does not know: MLX, sockets, clocks.
Invariant: trunk + experts + exchange + waiting + rest = total, each a mean over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Terms:
    """Sums over measured decode steps, in seconds; `steps` says how many.

    `routed` counts, by layer and expert, how often the router chose an expert in these steps.
    """

    steps: int = 0
    trunk: float = 0.0
    experts: float = 0.0
    exchange: float = 0.0
    waiting: float = 0.0
    total: float = 0.0
    routed: dict[int, dict[int, int]] = field(default_factory=dict)

    def add(self, reports: Sequence[dict[str, Any]]) -> None:
        """Add one step, given every rank's `Watch.stop()` report.

        An exchange ends for all ranks at once and begins for each when it comes: so the shortest
        time that any rank spent in an exchange is the exchange itself, and what the others spent
        beyond it is waiting for the slowest.
        """
        if not all(r["decoding"] for r in reports):
            return
        ranks = len(reports)
        pure = [min(times) for times in zip(*(r["exchanges_s"] for r in reports), strict=True)]
        self.steps += 1
        self.exchange += sum(pure)
        for report in reports:
            laps = report["laps_s"]
            self.trunk += laps.get("trunk", 0.0) / ranks
            self.experts += laps.get("experts", 0.0) / ranks
            self.waiting += (sum(report["exchanges_s"]) - sum(pure)) / ranks
            self.total += report["total_s"] / ranks
        for layer, counts in reports[0]["routed"].items():
            seen = self.routed.setdefault(int(layer), {})
            for expert, times in counts.items():
                seen[int(expert)] = seen.get(int(expert), 0) + times

    def per_token_ms(self) -> dict[str, float]:
        """Mean milliseconds of a decode step by term; zeros if none was measured."""
        n = max(self.steps, 1)
        named = {
            "trunk": self.trunk,
            "experts": self.experts,
            "exchange": self.exchange,
            "waiting": self.waiting,
        }
        rest = self.total - sum(named.values())
        return {k: 1000 * v / n for k, v in {**named, "rest": rest, "total": self.total}.items()}
