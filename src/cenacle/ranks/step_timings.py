"""Where the time of a token goes: from the ranks' clocks to phases that add up.

Owns: the arithmetic of `docs/metrics.md`, section "Time per token".
Does not know: MLX, sockets, clocks.
Invariant: trunk + experts + all_reduce + waiting + rest = total, each a mean over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepReport:
    """One rank's clocks in a measured step.

    Args:
        total_s: seconds of the whole step.
        laps_s: seconds by phase.
        all_reduces_s: seconds of each all-reduce, in order.
        routed: layer -> expert -> how often the router chose it.
        decoding: the step had a pass of the model, gave tokens and processed no prompt.
        tokens: how many tokens it gave to one request at most.
        sent_bytes: bytes that the rank has put into all-reduces since it started.
    """

    total_s: float
    laps_s: Mapping[str, float]
    all_reduces_s: tuple[float, ...]
    routed: Mapping[int, Mapping[int, int]]
    decoding: bool
    tokens: int = 1
    sent_bytes: int = 0


@dataclass
class StepTimings:
    """Sums over measured decode steps, in seconds.

    Args:
        steps: how many steps.
        tokens: how many tokens they gave to each request.
        routed: layer -> expert -> how often the router chose it in these steps.
        ranks: each rank's own trunk, experts, waiting and total, in rank order.
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

    def add(self, reports: Sequence[StepReport]) -> None:
        """Add one step, given every rank's report in rank order.

        An all-reduce ends on all ranks at once and begins on each rank when that rank reaches it.
        So the shortest time that any rank spends in it is the all-reduce itself, and what the
        others spend beyond that is waiting for the slowest.
        """
        if not all(report.decoding for report in reports):
            return
        all_reduces = zip(*(report.all_reduces_s for report in reports), strict=True)
        shortest_s = sum(min(of_ranks) for of_ranks in all_reduces)
        self.steps += 1
        self.tokens += reports[0].tokens
        self.all_reduce += shortest_s
        if not self.ranks:
            self.ranks = [dict.fromkeys(_RANK_PHASES, 0.0) for _ in reports]
        for report, rank in zip(reports, self.ranks, strict=True):
            rank["trunk"] += report.laps_s.get("trunk", 0.0)
            rank["experts"] += report.laps_s.get("experts", 0.0)
            rank["waiting"] += sum(report.all_reduces_s) - shortest_s
            rank["total"] += report.total_s
        for name in _RANK_PHASES:
            setattr(self, name, sum(rank[name] for rank in self.ranks) / len(reports))
        for layer, counts in reports[0].routed.items():
            layer_counts = self.routed.setdefault(layer, {})
            for expert, count in counts.items():
                layer_counts[expert] = layer_counts.get(expert, 0) + count

    def per_token_ms(self) -> dict[str, float]:
        """Mean milliseconds of a token by phase; zeros if nothing was measured."""
        return self._to_ms({name: getattr(self, name) for name in _RANK_PHASES})

    def per_rank_ms(self) -> list[dict[str, float]]:
        """The same for each rank, in rank order; empty if nothing was measured."""
        return [self._to_ms(rank) for rank in self.ranks]

    def _to_ms(self, seconds: Mapping[str, float]) -> dict[str, float]:
        phases = {name: seconds[name] for name in ("trunk", "experts")}
        phases |= {"all_reduce": self.all_reduce, "waiting": seconds["waiting"]}
        phases["rest"] = seconds["total"] - sum(phases.values())
        phases["total"] = seconds["total"]
        return {name: 1000 * value / max(self.tokens, 1) for name, value in phases.items()}


_RANK_PHASES = ("trunk", "experts", "waiting", "total")
