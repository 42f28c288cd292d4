"""Which rank computes which expert, where several ranks hold a replica.

Owns: `assign_replicas`, with the two rules that it chooses between and their slow reference.
Does not know: MLX, which rank holds what (`core/plan.py`).
Invariant: only integers, and ties go to the lower rank: every rank that sees the same routing
decides the same, without a message. The C++ load balancer has the same rules; a test compares them.
A token reads the weights of every expert that it activates, so with few tokens the number of active
experts on the busiest rank counts (arXiv:2512.09277); with many tokens per expert the number of
tokens that it computes does.
Next: `model/expert_parallel.py` computes what is assigned to its rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

ReplicaRanks = Sequence[Sequence[int]]
"""For each expert the ranks that hold it, ascending."""

# Tokens per active expert, on average, up to which experts are balanced instead of tokens.
MAX_TOKENS_PER_EXPERT = 4


def min_max_load(loads: Sequence[int], replica_ranks: ReplicaRanks, speeds: Sequence[int]) -> float:
    """The least possible time of the busiest rank, found by trying every assignment.

    Args:
        loads: work of each expert; 0: not active.
        replica_ranks: see `ReplicaRanks`.
        speeds: relative speed of each rank.
    """
    active = [expert for expert, load in enumerate(loads) if load]
    best = float("inf")
    for choice in product(*(replica_ranks[expert] for expert in active)):
        rank_loads = [0] * len(speeds)
        for expert, rank in zip(active, choice, strict=True):
            rank_loads[rank] += loads[expert]
        best = min(best, max(w / s for w, s in zip(rank_loads, speeds, strict=True)))
    return best


def assign_replicas(
    token_counts: Sequence[int], replica_ranks: ReplicaRanks, speeds: Sequence[int]
) -> list[int]:
    """The rank that computes each expert; -1 for an expert that no token chose.

    Args:
        token_counts: how many tokens of this step chose each expert.
        replica_ranks: see `ReplicaRanks`; an expert on no rank is left out.
        speeds: relative speed of each rank, positive integers.
    """
    counts = [c if ranks else 0 for c, ranks in zip(token_counts, replica_ranks, strict=True)]
    active = sum(count > 0 for count in counts)
    if sum(counts) <= MAX_TOKENS_PER_EXPERT * active:
        return assign_experts(counts, replica_ranks, speeds)
    return assign_tokens(counts, replica_ranks, speeds)


def assign_experts(
    token_counts: Sequence[int], replica_ranks: ReplicaRanks, speeds: Sequence[int]
) -> list[int]:
    """Assign so that the busiest rank has the fewest experts for its speed; optimal.

    Experts come one by one; each goes where the next one costs least, moving others to another of
    their replicas if need be. Such augmenting paths keep an assignment of unit jobs optimal
    (semi-matching: Harvey et al., WADS 2003).
    """
    ranks, costs = len(speeds), _costs(speeds)
    assigned = [-1] * len(token_counts)
    load = [0] * ranks
    for expert, count in enumerate(token_counts):
        if not count:
            continue
        moved = [-1] * ranks  # rank -> the expert that would move to it
        queue: list[int] = []
        for rank in replica_ranks[expert]:
            moved[rank] = expert
            queue.append(rank)
        for rank in queue:  # grows during the iteration
            for other in range(expert):
                for target in replica_ranks[other] if assigned[other] == rank else ():
                    if moved[target] < 0:
                        moved[target] = other
                        queue.append(target)
        reachable = (r for r in range(ranks) if moved[r] >= 0)
        best = min(reachable, key=lambda r: (load[r] + 1) * costs[r])
        load[best] += 1
        while moved[best] != expert:
            other = moved[best]
            best, assigned[other] = assigned[other], best
        assigned[expert] = best
    return assigned


def assign_tokens(
    token_counts: Sequence[int], replica_ranks: ReplicaRanks, speeds: Sequence[int]
) -> list[int]:
    """Assign so that the busiest rank has few tokens for its speed: greedily, largest first."""
    costs = _costs(speeds)
    assigned = [-1] * len(token_counts)
    load = [0] * len(speeds)
    for expert in sorted(range(len(token_counts)), key=lambda e: (-token_counts[e], e)):
        count = token_counts[expert]
        if not count:
            break
        best = min(replica_ranks[expert], key=lambda r: (load[r] + count) * costs[r])
        load[best] += count
        assigned[expert] = best
    return assigned


def _costs(speeds: Sequence[int]) -> list[int]:
    """1 / speed of each rank, as integers with a common factor: times compare without rounding."""
    common = math.lcm(*speeds)
    return [common // speed for speed in speeds]


def integer_speeds(nodes: int, node_weights: Sequence[float] | None) -> list[int]:
    """Node weights as integers: thousandths of the largest."""
    if node_weights is None:
        return [1] * nodes
    return [max(1, round(1000 * weight / max(node_weights))) for weight in node_weights]
