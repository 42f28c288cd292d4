"""How many experts the busiest node computes.

Owns: E[max], counted exactly for uniform routing or from a recorded `RoutingTrace`; the number of
distinct experts of several tokens; choosing replicas, and separating experts that fire together.
Does not know: bytes, time, MLX.
Invariant: counts are exact up to 32 chosen experts (integers until the last division) and floats
beyond; `tests/unit/test_routing_stats.py` enumerates small cases.
Source: arXiv:2506.23635 for E[max] and for giving active expert i of a group to member i mod r.
Next: `perf_model.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..errors import InputError
from .load_balancer import ReplicaRanks, assign_experts

EXACT_TOKENS = 64  # batches up to which the number of distinct experts is counted exactly
EXACT_CHOICES = 24  # choices of a batch up to which E[max] is averaged over that number
INTEGER_DEGREE = 32  # chosen experts up to which integers are used


@dataclass(frozen=True)
class ExpertGroup:
    """`size` experts on the same `members` nodes, which share the active ones evenly.

    Args:
        cost: relative cost of one expert there (seconds, or 1).
    """

    size: int
    members: int = 1
    cost: float = 1.0


def expected_max_load(groups: Sequence[ExpertGroup], top_k: int) -> float:
    """E[max]: expected largest of ceil(active / members) * cost over groups, uniform routing.

    "router-aided: max over nodes of active experts; i-th active expert of the group goes to member
    i mod members" (the authors' code). P(max <= t) is the number of ways to draw `top_k` experts
    with at most t in every group, a product of polynomials, over C(experts, top_k).

    >>> round(expected_max_load([ExpertGroup(8), ExpertGroup(8)], 4), 4)  # DBRX on two nodes
    2.6462
    """
    return _expected_max_load(tuple(groups), top_k)


@cache
def _expected_max_load(groups: tuple[ExpertGroup, ...], top_k: int) -> float:
    experts = sum(group.size for group in groups)
    if not 0 <= top_k <= experts:
        raise InputError(f"top_k: expected 0 to {experts}, got {top_k}")
    # Numbers of ways, or, where integers would be slow and exceed a float, those times
    # q^j (1 - q)^(n - j): the same factor above and below the fraction line.
    q = min(top_k, experts - 0.5) / experts
    count = math.comb if top_k <= INTEGER_DEGREE else partial(_binomial, q)
    all_ways = count(experts, top_k)
    # The maximum is one of these; between two of them P does not change.
    levels = sorted({n * g.cost for g in groups for n in range(-(-top_k // g.members) + 1)})
    expected, ways_below = 0.0, 0.0
    for level in levels:
        limits = [min(g.size, top_k, int(level / g.cost + 1e-9) * g.members) for g in groups]
        if sum(limits) < top_k:
            continue
        ways: list[Any] = [1]
        for group, limit in zip(groups, limits, strict=True):
            ways = _multiply(ways, [count(group.size, j) for j in range(limit + 1)], top_k)
        expected += level * ((ways[top_k] - ways_below) / all_ways)
        ways_below = ways[top_k]
        if ways_below >= all_ways * (1 - 1e-9):
            break
    return expected


def _binomial(q: float, n: int, j: int) -> float:
    log_ways = math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1)
    return math.exp(log_ways + j * math.log(q) + (n - j) * math.log1p(-q))


def _multiply(a: list[Any], b: list[Any], degree: int) -> list[Any]:
    """The product of two polynomials up to a degree; in floats where integers would be slow."""
    if degree > INTEGER_DEGREE:
        return list(np.convolve(np.asarray(a, float), np.asarray(b, float))[: degree + 1])
    product = [0] * min(len(a) + len(b) - 1, degree + 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b[: len(product) - i]):
            product[i + j] += x * y
    return product


def even_counts(experts: int, nodes: int) -> tuple[int, ...]:
    """Experts per node, as even as possible: prefix sums of equal shares."""
    borders = [experts * r // nodes for r in range(nodes + 1)]
    return tuple(b - a for a, b in pairwise(borders))


@cache
def distinct_experts(experts: int, top_k: int, tokens: int) -> tuple[tuple[int, float], ...]:
    """Distribution of the number of distinct experts that `tokens` tokens choose, uniformly.

    Exact up to `EXACT_TOKENS`; beyond, only its rounded expectation, E (1 - (1 - k/E)^tokens).
    """
    if tokens > EXACT_TOKENS:
        return ((max(top_k, round(experts * (1 - (1 - top_k / experts) ** tokens))), 1.0),)
    ways = math.comb(experts, top_k)
    distribution = {top_k: 1.0}
    for _ in range(tokens - 1):
        after: dict[int, float] = {}
        for count, p in distribution.items():
            for new in range(max(0, top_k - count), min(top_k, experts - count) + 1):
                q = p * (math.comb(count, top_k - new) * math.comb(experts - count, new) / ways)
                if q > 1e-12:
                    after[count + new] = after.get(count + new, 0.0) + q
        distribution = after
    total = sum(distribution.values())
    return tuple((count, p / total) for count, p in sorted(distribution.items()))


def expected_distinct_experts(experts: int, top_k: int, tokens: int) -> float:
    """Expected number of distinct experts of `tokens` tokens."""
    return sum(count * p for count, p in distinct_experts(experts, top_k, tokens))


def expected_max_load_of_batch(groups: Sequence[ExpertGroup], top_k: int, tokens: int) -> float:
    """E[max] of a batch: given how many distinct experts there are, they are a uniform draw.

    Exact up to `EXACT_CHOICES`; beyond, at the expected number of distinct experts alone.
    """
    experts = sum(group.size for group in groups)
    if tokens > 1 and tokens * top_k > EXACT_CHOICES:
        distinct = round(expected_distinct_experts(experts, top_k, tokens))
        return expected_max_load(groups, distinct)
    return sum(
        p * expected_max_load(groups, n) for n, p in distinct_experts(experts, top_k, tokens)
    )


def balanced_max_load(active: Iterable[int], replica_ranks: ReplicaRanks, nodes: int) -> int:
    """The load of the busiest node when each active expert runs on the best of its replicas."""
    ranks_of_active = [replica_ranks[expert] for expert in active]
    ranks = assign_experts([1] * len(ranks_of_active), ranks_of_active, [1] * nodes)
    return max(map(ranks.count, range(nodes)))


def mean_max_load(
    replica_ranks: ReplicaRanks, nodes: int, top_k: int, limit: int = 20_000
) -> float:
    """E[max] of any placement, uniform routing: over all choices, or over some if that is many.

    Args:
        limit: most choices to enumerate; of more than that a tenth of it is drawn.
    """
    experts = len(replica_ranks)
    choices: Iterable[Iterable[int]]
    if math.comb(experts, top_k) <= limit:
        choices = combinations(range(experts), top_k)
    else:
        rng = np.random.default_rng(0)
        choices = [rng.choice(experts, top_k, replace=False) for _ in range(limit // 10)]
    loads = [balanced_max_load(choice, replica_ranks, nodes) for choice in choices]
    return sum(loads) / len(loads)


def overlapping_windows(experts: int, nodes: int, window: int) -> tuple[tuple[int, ...], ...]:
    """Ranks of each expert when each holds `window` neighbors from its even share on."""
    starts = [experts * r // nodes for r in range(nodes)]
    return tuple(
        tuple(r for r in range(nodes) if (e - starts[r]) % experts < window) for e in range(experts)
    )


# ---- recorded routing


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts each token chose.

    Args:
        layers: the model's layer index of each MoE layer.
        experts: number of routed experts.
        ids: [layers, tokens, top_k], int16; -1 where a token has fewer.
        facts: model, prompts and date of the recording.
    """

    layers: tuple[int, ...]
    experts: int
    ids: np.ndarray
    facts: dict[str, Any]

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(self.ids.shape[2])

    @property
    def tokens(self) -> int:
        """Tokens recorded."""
        return int(self.ids.shape[1])

    def save(self, path: Path) -> None:
        """Write a compressed npz.

        Raises:
            InputError: the file cannot be written.
        """
        about = {"layers": self.layers, "experts": self.experts, "facts": self.facts}
        dtype = np.uint8 if self.experts <= 255 and self.ids.min() >= 0 else np.int16
        try:
            with path.open("wb") as file:
                np.savez_compressed(file, about=json.dumps(about), ids=self.ids.astype(dtype))
        except OSError as error:
            raise InputError(f"routing trace: cannot write {path}: {error}", "out") from error

    @classmethod
    def load(cls, path: Path) -> RoutingTrace:
        """Read a file that `save` wrote.

        Raises:
            InputError: not a routing trace.
        """
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                ids = file["ids"].astype(np.int16)
            trace = cls(tuple(about["layers"]), int(about["experts"]), ids, about["facts"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise InputError(
                f"routing trace: expected a file of `cenacle record-routing`, got {path}: {error}"
            ) from error
        if ids.ndim != 3 or len(trace.layers) != ids.shape[0] or not ids.size:
            raise InputError(
                f"routing trace: expected {len(trace.layers)} layers x tokens x experts in {path}, "
                f"got {ids.shape}"
            )
        if ids.max() >= trace.experts:
            raise InputError(
                f"routing trace: expected expert ids below {trace.experts} in {path}, got "
                f"{ids.max()}"
            )
        return trace

    def half(self, second: bool) -> RoutingTrace:
        """Every other token: one half to choose a placement on, the other to judge it."""
        return RoutingTrace(self.layers, self.experts, self.ids[:, int(second) :: 2], self.facts)

    def expert_counts(self) -> np.ndarray:
        """[layers, experts]: how often each expert was chosen."""
        return np.stack([np.bincount(t[t >= 0].ravel(), minlength=self.experts) for t in self.ids])

    def coactivations(self, layer: int) -> np.ndarray:
        """[experts, experts]: how often two experts fired for the same token of a layer."""
        active = self._active(layer).astype(np.float32)
        pairs = active.T @ active
        np.fill_diagonal(pairs, 0)
        return pairs

    def _active(self, layer: int) -> np.ndarray:
        """[tokens, experts]: whether a token chose an expert."""
        ids = self.ids[layer].astype(np.int64)
        active = np.zeros((self.tokens, self.experts + 1), dtype=bool)
        np.put_along_axis(active, np.where(ids < 0, self.experts, ids), True, axis=1)
        return active[:, :-1]

    def chosen(self, layer: int, step: int = 1) -> list[list[int]]:
        """The distinct experts of every `step`-th token of a layer."""
        tokens = self.ids[layer][::step].tolist()
        return [[expert for expert in set(ids) if expert >= 0] for ids in tokens]

    def max_load(self, owners: np.ndarray) -> float:
        """E[max] of whole experts; owners [layers, experts] are ranks."""
        total = 0.0
        ranks = range(int(owners.max()) + 1)
        for layer in range(len(self.layers)):
            active = self._active(layer)
            loads = np.stack([active[:, owners[layer] == r].sum(axis=1) for r in ranks])
            total += float(loads.max(axis=0).mean())
        return total / len(self.layers)

    def balanced_max_load(self, replica_ranks: Sequence[ReplicaRanks], nodes: int) -> float:
        """E[max] when each token's experts are assigned to their replicas of a layer optimally."""
        loads = [
            balanced_max_load(active, ranks, nodes)
            for layer, ranks in enumerate(replica_ranks)
            for active in self.chosen(layer)
        ]
        return sum(loads) / len(loads)

    def relative_max_load(self, nodes: int) -> float:
        """E[max] of neighboring experts on each of `nodes` nodes, over that of uniform routing."""
        groups = [ExpertGroup(count) for count in even_counts(self.experts, nodes)]
        uniform = expected_max_load(groups, self.top_k)
        return self.max_load(contiguous_owners(self, nodes)) / uniform

    def skew(self) -> dict[str, float]:
        """How far routing is from uniform: the mean over layers of four numbers.

        `entropy`: of the choice, over that of a uniform one (1: uniform). `hottest`: the most
        frequent expert's share times the number of experts (1: uniform). `unused`: share of
        experts never chosen. `pairs`: the most frequent pair's rate over what independence gives.
        """
        rows = []
        for layer, count in enumerate(self.expert_counts()):
            p = count / count.sum()
            entropy = -float((p[p > 0] * np.log(p[p > 0])).sum()) / math.log(self.experts)
            pairs = self.coactivations(layer)
            expected = np.outer(count, count) / self.tokens
            frequent = expected > 5  # the rates of rare pairs are noise
            lift = float((pairs[frequent] / expected[frequent]).max()) if frequent.any() else 1.0
            rows.append((entropy, float(p.max()) * self.experts, float((count == 0).mean()), lift))
        means = np.mean(rows, axis=0)
        return dict(zip(("entropy", "hottest", "unused", "pairs"), map(float, means), strict=True))


def contiguous_owners(trace: RoutingTrace, nodes: int) -> np.ndarray:
    """Owners [layers, experts] as `Plan.whole` places experts: neighbors together."""
    row = np.repeat(np.arange(nodes), even_counts(trace.experts, nodes))
    return np.tile(row, (len(trace.layers), 1))


def separate_coactivated(trace: RoutingTrace, nodes: int) -> np.ndarray:
    """Owners [layers, experts]: experts that fire together go to different ranks.

    From `contiguous_owners`, swap two experts of different ranks as long as that lowers the number
    of pairs that fire together on one rank. Counts per rank, and so memory, stay.
    """
    owners = contiguous_owners(trace, nodes)
    for layer in range(len(trace.layers)):
        pairs, row = trace.coactivations(layer), owners[layer]
        while True:
            # with_rank[e, r]: how often e fires with the experts of rank r
            with_rank = np.stack([pairs[:, row == r].sum(axis=1) for r in range(nodes)], axis=1)
            with_own = with_rank[np.arange(len(row)), row]
            # Swapping a and b: a loses its own rank's pairs, gains b's rank's, without b itself.
            gain = with_own[:, None] - with_rank[:, row] + with_own[None, :] - with_rank[:, row].T
            gain += 2 * pairs
            gain[row[:, None] == row[None, :]] = 0
            a, b = np.unravel_index(int(gain.argmax()), gain.shape)
            if gain[a, b] <= 1e-6:
                break
            row[a], row[b] = row[b], row[a]
    return owners


def choose_replicas(
    trace: RoutingTrace, owners: np.ndarray, nodes: int, extra: int, sample: int = 128
) -> list[ReplicaRanks]:
    """Replica ranks of each layer: `extra` more experts per rank, where they help most.

    Greedy: of all replicas for which a rank has room, the one that lowers the expected load of the
    busiest rank most, on `sample` of the trace's tokens; ties go to the hottest expert.
    """
    counts, step = trace.expert_counts(), max(1, trace.tokens // sample)
    return [
        _add_replicas(
            trace.chosen(layer, step),
            counts[layer],
            [(int(rank),) for rank in owners[layer]],
            nodes,
            extra,
        )
        for layer in range(len(trace.layers))
    ]


def _add_replicas(
    tokens: list[list[int]],
    counts: np.ndarray,
    replica_ranks: list[tuple[int, ...]],
    nodes: int,
    extra: int,
) -> list[tuple[int, ...]]:
    def with_replica(expert: int, rank: int) -> list[tuple[int, ...]]:
        added = list(replica_ranks)
        added[expert] = tuple(sorted((*added[expert], rank)))
        return added

    def total_load(ranks: ReplicaRanks) -> int:
        return sum(balanced_max_load(active, ranks, nodes) for active in tokens)

    room = [extra] * nodes
    while any(room):
        # The hottest experts suffice: a replica of a cold one is seldom used.
        hot = [int(e) for e in np.argsort(-counts) if len(replica_ranks[e]) < nodes][: 4 * nodes]
        choices = [
            (e, r) for e in hot for r in range(nodes) if room[r] and r not in replica_ranks[e]
        ]
        if not choices:
            break
        expert, rank = min(choices, key=lambda c: (total_load(with_replica(*c)), -counts[c[0]], c))
        replica_ranks = with_replica(expert, rank)
        room[rank] -= 1
    return replica_ranks


def simulate_placements(trace: RoutingTrace, nodes: int, replicas: int) -> dict[str, Any]:
    """E[max] of several placements; each is judged on tokens that it was not chosen on.

    Args:
        trace: at least two tokens.
        nodes: how many, at most the experts of a layer.
        replicas: additional experts per node and layer.

    Returns:
        {"skew": see `RoutingTrace.skew`, "max_load": placement -> E[max], "nodes", "tokens"}.

    Raises:
        InputError: more nodes than experts, or too few tokens.
    """
    if not 2 <= nodes <= trace.experts:
        raise InputError(f"nodes: expected 2 to {trace.experts}, got {nodes}", "nodes")
    if trace.tokens < 2:
        raise InputError(f"routing trace: expected at least 2 tokens, got {trace.tokens}", "trace")
    training, held_out = trace.half(False), trace.half(True)
    separated = separate_coactivated(training, nodes)
    groups = [ExpertGroup(count) for count in even_counts(trace.experts, nodes)]
    max_load = {
        "uniform routing, whole experts": expected_max_load(groups, trace.top_k),
        "recorded routing, neighbors": held_out.max_load(contiguous_owners(trace, nodes)),
        "co-activated experts separated": held_out.max_load(separated),
    }
    if replicas:
        chosen = choose_replicas(training, separated, nodes, replicas)
        name = f"the same with {replicas} chosen replicas"
        max_load[name] = held_out.balanced_max_load(chosen, nodes)
        per_node = min(trace.experts, -(-trace.experts // nodes) + replicas)
        windows = overlapping_windows(trace.experts, nodes, per_node)
        name = f"neighbors and {replicas} replicas"
        max_load[name] = held_out.balanced_max_load([windows] * len(trace.layers), nodes)
    max_load["sliced: a fair share"] = trace.top_k / nodes
    return {"skew": trace.skew(), "max_load": max_load, "nodes": nodes, "tokens": trace.tokens}
