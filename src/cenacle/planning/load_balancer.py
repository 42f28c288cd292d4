"""."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

ReplicaRanks = Sequence[Sequence[int]]
"""For each expert the ranks that can compute it, ascending."""


MAX_TOKENS_PER_EXPERT = (
    4  # tokens per active expert on average up to which experts are balanced, not tokens
)


def min_max_load(weights: Sequence[int], holders: ReplicaRanks, speeds: Sequence[int]) -> float:
    """The least possible time of the busiest rank, by trying everything.

    Args:
        weights: work of each expert; 0: not active.
        holders: see `Holders`.
        speeds: relative speed of each rank.
    """
    active = [e for e, w in enumerate(weights) if w]
    best = float("inf")
    for choice in product(*(holders[e] for e in active)):
        load = [0] * len(speeds)
        for expert, rank in zip(active, choice, strict=True):
            load[rank] += weights[expert]
        best = min(best, max(w / s for w, s in zip(load, speeds, strict=True)))
    return best


def assign_replicas(
    counts: Sequence[int], holders: ReplicaRanks, speeds: Sequence[int]
) -> list[int]:
    """The rank that computes each expert, -1 for those that nobody chose.

    Args:
        counts: how many tokens of this call chose each expert.
        holders: see `Holders`; an expert without any is left out.
        speeds: relative speed of each rank, positive integers.
    """
    counts = [c if h else 0 for c, h in zip(counts, holders, strict=True)]
    active = sum(c > 0 for c in counts)
    if sum(counts) <= MAX_TOKENS_PER_EXPERT * active:
        return assign_experts(counts, holders, speeds)
    return assign_tokens(counts, holders, speeds)


def assign_experts(
    counts: Sequence[int], holders: ReplicaRanks, speeds: Sequence[int]
) -> list[int]:
    """Deal so that the busiest rank has the fewest experts for its speed; exact.

    Experts come one by one; each goes where the next one costs least, moving others from replica
    to replica if need be. Such augmenting paths keep the deal of unit jobs optimal (semi-matching:
    Harvey et al., WADS 2003).
    """
    ranks = len(speeds)
    dealt = [-1] * len(counts)
    load = [0] * ranks
    for expert, count in enumerate(counts):
        if not count:
            continue
        moved = [-1] * ranks  # rank -> the expert that would come to it
        queue: list[int] = []
        for rank in holders[expert]:
            moved[rank] = expert
            queue.append(rank)
        for rank in queue:  # grows as it is walked
            for other in range(expert):
                for to in holders[other] if dealt[other] == rank else ():
                    if moved[to] < 0:
                        moved[to] = other
                        queue.append(to)
        best = min(
            (r for r in range(ranks) if moved[r] >= 0),
            key=lambda r: _Time(load[r] + 1, speeds[r]),
        )
        load[best] += 1
        while moved[best] != expert:
            other = moved[best]
            best, dealt[other] = dealt[other], best
        dealt[expert] = best
    return dealt


def assign_tokens(counts: Sequence[int], holders: ReplicaRanks, speeds: Sequence[int]) -> list[int]:
    """Deal so that the busiest rank has few tokens for its speed: the largest first, greedily."""
    dealt = [-1] * len(counts)
    load = [0] * len(speeds)
    for expert in sorted(range(len(counts)), key=lambda e: (-counts[e], e)):
        count = counts[expert]
        if not count:
            break
        best = min(holders[expert], key=lambda r: _Time(load[r] + count, speeds[r]))
        load[best] += count
        dealt[expert] = best
    return dealt


class _Time:
    """work / speed, compared without rounding."""

    def __init__(self, work: int, speed: int) -> None:
        self.work, self.speed = work, speed

    def __lt__(self, other: _Time) -> bool:
        return self.work * other.speed < other.work * self.speed


def integer_speeds(nodes: int, shares: Sequence[float] | None) -> list[int]:
    """Shares as whole numbers of a thousandth of the largest."""
    if shares is None:
        return [1] * nodes
    return [max(1, round(1000 * s / max(shares))) for s in shares]
