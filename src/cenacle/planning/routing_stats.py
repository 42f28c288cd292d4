"""How many experts the busiest node runs.

Owns: E[max] by exact counting for uniform routing, distinct experts of several tokens, the exact
dealing of active experts to replicas, and the same from a recorded `Trace`; choosing replicas and
keeping apart experts that fire together.
Does not know: bytes, time, MLX.
Invariant: counts are exact up to 32 chosen experts (integers until the last division), floats
beyond; `tests/unit/test_routing_stats.py` enumerates small cases.
Source: arXiv:2506.23635 for E[max] and for dealing active expert i of a group to member i mod r.
Next: `cost.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..errors import InputError


@dataclass(frozen=True)
class ExpertGroup:
    """`size` experts, each held by the same `members` nodes, which share their active ones evenly.

    Args:
        cost: what one expert costs there, relative (seconds, or 1).
    """

    size: int
    members: int = 1
    cost: float = 1.0


def expected_max_load(groups: Sequence[ExpertGroup], top_k: int) -> float:
    """E[max]: expected largest of ceil(active / members) * cost over groups, uniform routing.

    "router-aided: max over nodes of active experts; i-th active expert of the group goes to member
    i mod members" (the authors' code). P(max <= t) is the number of ways to draw `top_k` experts
    with at most t in every group, by multiplying polynomials, over C(experts, top_k).

    >>> round(busiest([Group(8), Group(8)], 4), 4)  # DBRX on two nodes
    2.6462
    """
    return _busiest(tuple(groups), top_k)


@cache
def _busiest(groups: tuple[ExpertGroup, ...], top_k: int) -> float:
    experts = sum(g.size for g in groups)
    if not 0 <= top_k <= experts:
        raise InputError(f"top_k: expected 0 to {experts}, got {top_k}")
    all_ways = math.comb(experts, top_k)
    # sorted({...}): costs of which the maximum can be; between two of them P does not change.
    levels = sorted({n * g.cost for g in groups for n in range(-(-top_k // g.members) + 1)})
    expected, below = 0.0, 0.0
    for level in levels:
        ways: list[Any] = [1]
        for g in groups:
            most = min(g.size, top_k, int(level / g.cost + 1e-9) * g.members)
            choose = [math.comb(g.size, j) for j in range(most + 1)]
            ways = _times(ways, choose, top_k)
        here = ways[top_k] if len(ways) > top_k else 0
        expected += level * ((here - below) / all_ways)
        below = here
    return expected


def _times(a: list[Any], b: list[Any], degree: int) -> list[Any]:
    """The product of two polynomials up to a degree; in floats where integers would be slow."""
    if degree > 32:
        return list(np.convolve(np.asarray(a, float), np.asarray(b, float))[: degree + 1])
    out = [0] * min(len(a) + len(b) - 1, degree + 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b[: len(out) - i]):
            out[i + j] += x * y
    return out


def even_counts(experts: int, nodes: int) -> tuple[int, ...]:
    """Experts per node, as even as can be: prefix sums of equal shares."""
    cuts = [experts * r // nodes for r in range(nodes + 1)]
    return tuple(b - a for a, b in pairwise(cuts))


@cache
def distinct_experts(experts: int, top_k: int, tokens: int) -> tuple[tuple[int, float], ...]:
    """Distribution of the number of distinct experts that `tokens` tokens choose, uniformly.

    Exact up to 64 tokens, beyond that its (rounded) expectation alone, E (1 - (1 - k/E)^tokens).
    """
    if tokens > 64:
        return ((max(top_k, round(experts * (1 - (1 - top_k / experts) ** tokens))), 1.0),)
    ways = math.comb(experts, top_k)
    found = {top_k: 1.0}
    for _ in range(tokens - 1):
        after: dict[int, float] = {}
        for seen, p in found.items():
            for new in range(max(0, top_k - seen), min(top_k, experts - seen) + 1):
                q = p * (math.comb(seen, top_k - new) * math.comb(experts - seen, new) / ways)
                if q > 1e-12:
                    after[seen + new] = after.get(seen + new, 0.0) + q
        found = after
    total = sum(found.values())
    return tuple((d, p / total) for d, p in sorted(found.items()))


def expected_distinct_experts(experts: int, top_k: int, tokens: int) -> float:
    """Expected number of distinct experts of `tokens` tokens."""
    return sum(d * p for d, p in distinct_experts(experts, top_k, tokens))


def expected_max_load_of_batch(groups: Sequence[ExpertGroup], top_k: int, tokens: int) -> float:
    """E[max] of a batch: given how many distinct experts there are, they are a uniform draw.

    Exact up to 24 choices; beyond that at the expected number of distinct experts alone.
    """
    experts = sum(g.size for g in groups)
    if tokens > 1 and tokens * top_k > 24:
        return expected_max_load(groups, round(expected_distinct_experts(experts, top_k, tokens)))
    return sum(
        p * expected_max_load(groups, d) for d, p in distinct_experts(experts, top_k, tokens)
    )


def least_max_load(active: Sequence[int], holders: Sequence[frozenset[int]], nodes: int) -> int:
    """The least possible load of the busiest node when each active expert runs on one holder.

    Exact: for growing limits, augmenting paths of a bipartite matching.
    """
    limit = -(-len(active) // nodes)
    while True:
        load: dict[int, list[int]] = {r: [] for r in range(nodes)}
        if all(_place(e, holders, load, limit, set()) for e in active):
            return limit
        limit += 1


def _place(
    expert: int,
    holders: Sequence[frozenset[int]],
    load: dict[int, list[int]],
    limit: int,
    seen: set[int],
) -> bool:
    for rank in sorted(holders[expert]):
        if rank in seen:
            continue
        seen.add(rank)
        if len(load[rank]) < limit:
            load[rank].append(expert)
            return True
        for i, other in enumerate(load[rank]):
            if _place(other, holders, load, limit, seen):
                load[rank][i] = expert
                return True
    return False


def mean_max_load(
    holders: Sequence[frozenset[int]], nodes: int, top_k: int, most: int = 20_000, seed: int = 0
) -> float:
    """E[max] of any placement under uniform routing: every choice, or `most` drawn ones."""
    experts = len(holders)
    if math.comb(experts, top_k) <= most:
        loads = [least_max_load(c, holders, nodes) for c in combinations(range(experts), top_k)]
    else:
        draw = np.random.default_rng(seed)
        loads = [
            least_max_load(list(draw.choice(experts, top_k, replace=False)), holders, nodes)
            for _ in range(most // 10)
        ]
    return sum(loads) / len(loads)


# ---- recorded routing


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts each token chose.

    Args:
        layers: the model's layer index of each MoE layer.
        experts: number of routed experts.
        ids: [layers, tokens, top_k], int16; -1 where a token has fewer.
        facts: model, prompts, date: what a reader needs to know.
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
        kind = np.uint8 if self.experts <= 255 and self.ids.min() >= 0 else np.int16
        try:
            with path.open("wb") as file:
                np.savez_compressed(file, about=json.dumps(about), ids=self.ids.astype(kind))
        except OSError as error:
            raise InputError(f"trace: cannot write {path}: {error}", "out") from error

    @classmethod
    def load(cls, path: Path) -> RoutingTrace:
        """Read what `save` wrote.

        Raises:
            InputError: not a trace.
        """
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                ids = file["ids"].astype(np.int16)
            trace = cls(tuple(about["layers"]), int(about["experts"]), ids, about["facts"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise InputError(f"trace: {path} is not a trace of `cenacle trace`: {error}") from error
        if ids.ndim != 3 or len(trace.layers) != ids.shape[0] or not ids.size:
            raise InputError(f"trace: {path} holds {ids.shape}, expected [layers, tokens, top_k]")
        if ids.max() >= trace.experts:
            raise InputError(f"trace: {path} names expert {ids.max()} of {trace.experts}")
        return trace

    def half(self, second: bool) -> RoutingTrace:
        """Every other token: one half to choose a placement on, the other to judge it."""
        return RoutingTrace(self.layers, self.experts, self.ids[:, int(second) :: 2], self.facts)

    def counts(self) -> np.ndarray:
        """[layers, experts]: how often each expert was chosen."""
        return np.stack([np.bincount(t[t >= 0].ravel(), minlength=self.experts) for t in self.ids])

    def together(self, layer: int) -> np.ndarray:
        """[experts, experts]: how often two experts fired for the same token of a layer."""
        hot = self._hot(layer).astype(np.float32)
        pairs = hot.T @ hot
        np.fill_diagonal(pairs, 0)
        return pairs

    def _hot(self, layer: int) -> np.ndarray:
        ids = self.ids[layer].astype(np.int64)
        hot = np.zeros((self.tokens, self.experts + 1), dtype=bool)
        np.put_along_axis(hot, np.where(ids < 0, self.experts, ids), True, axis=1)
        return hot[:, :-1]

    def busiest(self, owner: np.ndarray) -> float:
        """E[max] of a whole placement: owner [layers, experts] of ranks."""
        total = 0.0
        for layer in range(len(self.layers)):
            hot = self._hot(layer)
            ranks = range(int(owner.max()) + 1)
            loads = np.stack([hot[:, owner[layer] == r].sum(axis=1) for r in ranks])
            total += float(loads.max(axis=0).mean())
        return total / len(self.layers)

    def busiest_replicated(self, holders: Sequence[Sequence[frozenset[int]]], nodes: int) -> float:
        """E[max] when each layer's active experts are dealt to replicas exactly."""
        loads = [
            least_max_load([int(e) for e in set(token.tolist()) if e >= 0], held, nodes)
            for layer, held in zip(self.ids, holders, strict=True)
            for token in layer
        ]
        return sum(loads) / len(loads)

    def skew(self) -> dict[str, float]:
        """How far routing is from uniform: the mean over layers of four numbers.

        `entropy`: of the choice, over that of a uniform one (1: uniform). `hottest`: the most
        frequent expert's share times the number of experts (1: uniform). `unused`: share of
        experts never chosen. `pairs`: the most frequent pair's rate over what independence gives.
        """
        rows = []
        for layer, count in enumerate(self.counts()):
            p = count / count.sum()
            entropy = -float((p[p > 0] * np.log(p[p > 0])).sum()) / math.log(self.experts)
            pairs = self.together(layer)
            expected = np.outer(count, count) / self.tokens
            seen = expected > 5  # pairs of rare experts say nothing
            lift = float((pairs[seen] / expected[seen]).max()) if seen.any() else 1.0
            rows.append((entropy, float(p.max()) * self.experts, float((count == 0).mean()), lift))
        means = np.mean(rows, axis=0)
        return dict(zip(("entropy", "hottest", "unused", "pairs"), map(float, means), strict=True))


def contiguous_owners(trace: RoutingTrace, nodes: int) -> np.ndarray:
    """Owner [layers, experts] as `Plan.whole` deals: neighbours together."""
    row = np.repeat(np.arange(nodes), even_counts(trace.experts, nodes))
    return np.tile(row, (len(trace.layers), 1))


def separate_coactivated(trace: RoutingTrace, nodes: int) -> np.ndarray:
    """Owner [layers, experts]: experts that fire together go to different ranks.

    From the contiguous deal, swap two experts of different ranks as long as that lessens the number
    of pairs that fire together on one rank. Counts per rank, and so memory, stay.
    """
    owner = contiguous_owners(trace, nodes)
    for layer in range(len(trace.layers)):
        pairs, row = trace.together(layer), owner[layer]
        while True:
            # together_with[e, r]: how often e fires with the experts of rank r
            with_rank = np.stack([pairs[:, row == r].sum(axis=1) for r in range(nodes)], axis=1)
            here = with_rank[np.arange(len(row)), row]
            # Swapping a and b: a loses its own rank's pairs, gains b's rank's, without b itself.
            gain = here[:, None] - with_rank[:, row] + here[None, :] - with_rank[:, row].T
            gain += 2 * pairs
            gain[row[:, None] == row[None, :]] = 0
            a, b = np.unravel_index(int(gain.argmax()), gain.shape)
            if gain[a, b] <= 1e-6:
                break
            row[a], row[b] = row[b], row[a]
    return owner


def choose_replicas(
    trace: RoutingTrace, owner: np.ndarray, nodes: int, extra: int, sample: int = 128
) -> list[list[frozenset[int]]]:
    """Holders [layers][experts]: `extra` more experts per rank and layer, where they help most.

    Greedy: of all copies for which a rank has room, the one that lessens the expected load of the
    busiest rank most, on `sample` of the trace's tokens; ties go to the hottest expert.
    """
    heat, step = trace.counts(), max(1, trace.tokens // sample)
    return [
        _copies(
            [[int(e) for e in set(t.tolist()) if e >= 0] for t in trace.ids[layer][::step]],
            heat[layer],
            [frozenset({int(r)}) for r in owner[layer]],
            nodes,
            extra,
        )
        for layer in range(len(trace.layers))
    ]


def _copies(
    tokens: list[list[int]],
    heat: np.ndarray,
    holders: list[frozenset[int]],
    nodes: int,
    extra: int,
) -> list[frozenset[int]]:
    """One layer's holders with copies added one by one."""

    def with_copy(expert: int, rank: int) -> list[frozenset[int]]:
        return [h | {rank} if e == expert else h for e, h in enumerate(holders)]

    def cost(held: list[frozenset[int]]) -> int:
        return sum(least_max_load(t, held, nodes) for t in tokens)

    room = [extra] * nodes
    while any(room):
        # The hottest experts are enough to look at: a copy of a cold one is seldom used.
        hot = [int(e) for e in np.argsort(-heat) if len(holders[e]) < nodes][: 4 * nodes]
        choices = [(e, r) for e in hot for r in range(nodes) if room[r] and r not in holders[e]]
        if not choices:
            break
        expert, rank = min(choices, key=lambda c: (cost(with_copy(*c)), -heat[c[0]], c))
        holders = with_copy(expert, rank)
        room[rank] -= 1
    return holders


def simulate_placements(trace: RoutingTrace, nodes: int, copies: int) -> dict[str, Any]:
    """What a recording says about `nodes` nodes, each choice judged on tokens it was not made on.

    Args:
        trace: at least two tokens.
        nodes: how many, at most the experts of a layer.
        copies: extra experts per node and layer, for replicas.

    Returns:
        {"skew": see `Trace.skew`, "busiest": name -> E[max], "fair": top-k / nodes, "nodes"}.

    Raises:
        InputError: more nodes than experts, or too few tokens.
    """
    if not 2 <= nodes <= trace.experts:
        raise InputError(f"nodes: expected 2 to {trace.experts}, got {nodes}", "nodes")
    if trace.tokens < 2:
        raise InputError(f"trace: expected at least 2 tokens, got {trace.tokens}", "trace")
    seen, unseen = trace.half(False), trace.half(True)
    whole = contiguous_owners(trace, nodes)
    apart = separate_coactivated(seen, nodes)
    uniform = expected_max_load(
        [ExpertGroup(n) for n in even_counts(trace.experts, nodes)], trace.top_k
    )
    out: dict[str, float] = {
        "uniform routing, whole": uniform,
        "this routing, neighbours together": unseen.busiest(whole),
        "fired together, set apart": unseen.busiest(apart),
    }
    if copies:
        chosen = choose_replicas(seen, apart, nodes, copies)
        out[f"and {copies} copies a node, chosen"] = unseen.busiest_replicated(chosen, nodes)
        per_node = min(trace.experts, -(-trace.experts // nodes) + copies)
        windows = overlapping_windows(trace.experts, nodes, per_node)
        out[f"neighbours and {copies} copies, unchosen"] = unseen.busiest_replicated(
            [windows] * len(trace.layers), nodes
        )
    out["sliced: a fair share"] = trace.top_k / nodes
    return {"skew": trace.skew(), "busiest": out, "nodes": nodes, "tokens": trace.tokens}


def overlapping_windows(experts: int, nodes: int, most: int) -> tuple[frozenset[int], ...]:
    """Holders of each expert when every node holds `most` neighbours from its even share on."""
    starts = [experts * r // nodes for r in range(nodes)]
    return tuple(
        frozenset(r for r in range(nodes) if (e - starts[r]) % experts < most)
        for e in range(experts)
    )
