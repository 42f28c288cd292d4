"""Where the time of a token goes: from the ranks' clocks to terms that add up.

Owns: the arithmetic of `docs/metrics.md`, section "Time per token".
Does not know: MLX, sockets, clocks.
Invariant: trunk + experts + all_reduce + waiting + rest = total, each a mean over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StepTimings:
    """Sums over measured decode steps, in seconds; `steps` says how many, `tokens` how many tokens
    they gave to each request.

    `routed` counts, by layer and expert, how often the router chose an expert in these steps.
    `ranks` holds, in rank order, each rank's own trunk, experts, waiting and total.
    """

    steps: int = 0
    tokens: int = 0
    trunk: float = 0.0
    experts: float = 0.0
    all_reduce: float = 0.0
    waiting: float = 0.0
    total: float = 0.0
    routed: dict[int, dict[int, int]] = field(default_factory=dict)
    ranks: list[dict[str, float]] = field(default_factory=list)

    def add(self, reports: Sequence[dict[str, Any]]) -> None:
        """Add one step, given every rank's `Watch.stop()` report, in rank order.

        An exchange ends for all ranks at once and begins for each when it comes: so the shortest
        time that any rank spent in an exchange is the exchange itself, and what the others spent
        beyond it is waiting for the slowest.
        """
        if not all(r["decoding"] for r in reports):
            return
        ranks = len(reports)
        pure = [min(times) for times in zip(*(r["all_reduces_s"] for r in reports), strict=True)]
        self.steps += 1
        self.tokens += reports[0].get("tokens", 1)
        self.all_reduce += sum(pure)
        if not self.ranks:
            self.ranks = [dict.fromkeys(_RANK_TIMES, 0.0) for _ in reports]
        for report, own in zip(reports, self.ranks, strict=True):
            laps = report["laps_s"]
            own["trunk"] += laps.get("trunk", 0.0)
            own["experts"] += laps.get("experts", 0.0)
            own["waiting"] += sum(report["all_reduces_s"]) - sum(pure)
            own["total"] += report["total_s"]
        for name in _RANK_TIMES:
            setattr(self, name, sum(own[name] for own in self.ranks) / ranks)
        for layer, counts in reports[0]["routed"].items():
            seen = self.routed.setdefault(int(layer), {})
            for expert, times in counts.items():
                seen[int(expert)] = seen.get(int(expert), 0) + times

    def per_token_ms(self) -> dict[str, float]:
        """Mean milliseconds of a token by term; zeros if none was measured."""
        return self._ms({name: getattr(self, name) for name in _RANK_TIMES})

    def per_rank_ms(self) -> list[dict[str, float]]:
        """The same for each rank, in rank order; empty if none was measured."""
        return [self._ms(own) for own in self.ranks]

    def _ms(self, own: dict[str, float]) -> dict[str, float]:
        n = max(self.tokens, 1)
        named = {k: own[k] for k in ("trunk", "experts")}
        named |= {"all_reduce": self.all_reduce, "waiting": own["waiting"]}
        rest = own["total"] - sum(named.values())
        return {k: 1000 * v / n for k, v in {**named, "rest": rest, "total": own["total"]}.items()}


_RANK_TIMES = ("trunk", "experts", "waiting", "total")
