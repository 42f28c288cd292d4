"""Replicas: the fast rules against trying every assignment, and against the paper."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan import spec_of

from cenacle.core.plan import Plan
from cenacle.planning.load_balancer import (
    MAX_TOKENS_PER_EXPERT,
    assign_experts,
    assign_replicas,
    assign_tokens,
    integer_speeds,
    min_max_load,
)


@st.composite
def cases(draw):
    """Token counts, replica ranks and speeds of a few experts on a few ranks."""
    ranks = draw(st.integers(1, 4))
    experts = draw(st.integers(0, 6))
    some = st.sets(st.integers(0, ranks - 1), min_size=1).map(sorted)
    replica_ranks = draw(st.lists(some, min_size=experts, max_size=experts))
    counts = draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts))
    return counts, replica_ranks, draw(st.lists(st.integers(1, 5), min_size=ranks, max_size=ranks))


def busiest(weights, assigned, speeds) -> float:
    load = [0] * len(speeds)
    for weight, rank in zip(weights, assigned, strict=True):
        if weight:
            load[rank] += weight
    return max(w / s for w, s in zip(load, speeds, strict=True))


@given(cases())
def test_experts_are_assigned_optimally(case):
    counts, replica_ranks, speeds = case
    assigned = assign_experts(counts, replica_ranks, speeds)
    for count, ranks, rank in zip(counts, replica_ranks, assigned, strict=True):
        assert rank in ranks if count else rank == -1
    ones = [min(c, 1) for c in counts]
    expected = min_max_load(ones, replica_ranks, speeds) if any(ones) else 0
    assert busiest(ones, assigned, speeds) == pytest.approx(expected)


@given(cases())
def test_tokens_are_assigned_to_replicas_and_not_badly(case):
    counts, replica_ranks, speeds = case
    assigned = assign_tokens(counts, replica_ranks, speeds)
    for count, ranks, rank in zip(counts, replica_ranks, assigned, strict=True):
        assert rank in ranks if count else rank == -1
    if any(counts):
        assert busiest(counts, assigned, speeds) <= 3 * min_max_load(counts, replica_ranks, speeds)


@pytest.mark.parametrize("speeds", [[1, 1], [3, 1]])
def test_tokens_on_two_full_replicas(speeds):
    counts, replica_ranks = [50, 30, 20, 20, 20, 20], [(0, 1)] * 6
    assigned = assign_replicas(counts, replica_ranks, speeds)
    assert busiest(counts, assigned, speeds) <= 1.15 * min_max_load(counts, replica_ranks, speeds)


def test_few_tokens_balance_experts_and_many_balance_tokens():
    replica_ranks = [(0, 1)] * 4
    few, many = [MAX_TOKENS_PER_EXPERT * 4 - 3, 1, 1, 1], [MAX_TOKENS_PER_EXPERT * 4, 1, 1, 1]
    assert assign_replicas(few, replica_ranks, [1, 1]) == assign_experts(few, replica_ranks, [1, 1])
    assert (
        assign_replicas(many, replica_ranks, [1, 1])
        == assign_tokens(many, replica_ranks, [1, 1])
        == [0, 1, 1, 1]
    )
    assert sorted(assign_replicas(few, replica_ranks, [1, 1])) == [0, 0, 1, 1]


def test_an_expert_on_no_rank_is_left_out():
    assert assign_replicas([1, 1], [(), (0,)], [1]) == [-1, 0]


def test_speeds():
    assert integer_speeds(3, None) == [1, 1, 1]
    assert integer_speeds(2, (1e-9, 4.0)) == [1, 1000]


@pytest.mark.parametrize(("nodes", "paper"), [(3, 2.32), (4, 1.57)])
def test_better_than_the_papers_layouts(nodes, paper):
    """Experts on the busiest node of DBRX (16 experts, top-4), 8 on each node as in
    arXiv:2506.23635, which replicates groups of eight; over every set of four."""
    spec = spec_of(experts=16, layers=1, expert_bytes=100, trunk=0)
    layer = Plan.replicated(spec, nodes, [800] * nodes).layers[0]
    replica_ranks = layer.replica_ranks(0)
    busy = []
    for chosen in combinations(range(16), 4):
        counts = [int(e in chosen) for e in range(16)]
        busy.append(
            busiest(counts, assign_replicas(counts, replica_ranks, [1] * nodes), [1] * nodes)
        )
    assert sum(busy) / len(busy) < paper - 0.3
