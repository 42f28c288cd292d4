"""Dealing experts to replicas: the fast rules against trying everything, and against the paper."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan import spec_of

from cenacle.model.balance import (
    FEW,
    deal,
    deal_experts,
    deal_tokens,
    reference,
    speeds_of,
)
from cenacle.plan import Plan


@st.composite
def cases(draw):
    """Counts, holders and speeds of a few experts on a few ranks."""
    ranks = draw(st.integers(1, 4))
    experts = draw(st.integers(0, 6))
    some = st.sets(st.integers(0, ranks - 1), min_size=1).map(sorted)
    holders = draw(st.lists(some, min_size=experts, max_size=experts))
    counts = draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts))
    return counts, holders, draw(st.lists(st.integers(1, 5), min_size=ranks, max_size=ranks))


def busiest(weights, dealt, speeds) -> float:
    load = [0] * len(speeds)
    for weight, rank in zip(weights, dealt, strict=True):
        if weight:
            load[rank] += weight
    return max(w / s for w, s in zip(load, speeds, strict=True))


@given(cases())
def test_experts_are_dealt_as_well_as_can_be(case):
    counts, holders, speeds = case
    dealt = deal_experts(counts, holders, speeds)
    for count, ranks, rank in zip(counts, holders, dealt, strict=True):
        assert rank in ranks if count else rank == -1
    ones = [min(c, 1) for c in counts]
    want = reference(ones, holders, speeds) if any(ones) else 0
    assert busiest(ones, dealt, speeds) == pytest.approx(want)


@given(cases())
def test_tokens_are_dealt_to_holders_and_not_badly(case):
    counts, holders, speeds = case
    dealt = deal_tokens(counts, holders, speeds)
    for count, ranks, rank in zip(counts, holders, dealt, strict=True):
        assert rank in ranks if count else rank == -1
    if any(counts):
        assert busiest(counts, dealt, speeds) <= 3 * reference(counts, holders, speeds)


@pytest.mark.parametrize("speeds", [[1, 1], [3, 1]])
def test_tokens_on_two_full_replicas(speeds):
    counts, holders = [50, 30, 20, 20, 20, 20], [(0, 1)] * 6
    dealt = deal(counts, holders, speeds)
    assert busiest(counts, dealt, speeds) <= 1.15 * reference(counts, holders, speeds)


def test_few_tokens_balance_experts_and_many_balance_tokens():
    holders = [(0, 1)] * 4
    few, many = [FEW * 4 - 3, 1, 1, 1], [FEW * 4, 1, 1, 1]
    assert deal(few, holders, [1, 1]) == deal_experts(few, holders, [1, 1])
    assert deal(many, holders, [1, 1]) == deal_tokens(many, holders, [1, 1]) == [0, 1, 1, 1]
    assert sorted(deal(few, holders, [1, 1])) == [0, 0, 1, 1]


def test_an_expert_without_holders_is_left_out():
    assert deal([1, 1], [(), (0,)], [1]) == [-1, 0]


def test_speeds():
    assert speeds_of(3, None) == [1, 1, 1]
    assert speeds_of(2, (1e-9, 4.0)) == [1, 1000]


@pytest.mark.parametrize(("nodes", "paper"), [(3, 2.32), (4, 1.57)])
def test_the_papers_layouts(nodes, paper):
    """Experts on the busiest node of DBRX (16 experts, top-4), 8 on each node as in
    arXiv:2506.23635, over every set of four."""
    spec = spec_of(experts=16, layers=1, expert_bytes=100, trunk=0)
    layer = Plan.replicated(spec, nodes, [800] * nodes).layers[0]
    holders = layer.holders(0)
    busy = []
    for chosen in combinations(range(16), 4):
        counts = [int(e in chosen) for e in range(16)]
        busy.append(busiest(counts, deal(counts, holders, [1] * nodes), [1] * nodes))
    assert sum(busy) / len(busy) <= paper
