"""Counting experts: exact formulas against enumeration, dealing against every assignment."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cenacle.errors import InputError
from cenacle.planning import routing_stats
from cenacle.planning.routing_stats import (
    ExpertGroup,
    RoutingTrace,
    balanced_max_load,
    choose_replicas,
    contiguous_owners,
    distinct_experts,
    even_counts,
    expected_distinct_experts,
    expected_max_load,
    expected_max_load_of_batch,
    mean_max_load,
    overlapping_windows,
    separate_coactivated,
    simulate_placements,
)


def test_the_papers_layouts():
    assert expected_max_load((ExpertGroup(8), ExpertGroup(8)), 4) == pytest.approx(2.6462, abs=5e-5)
    assert expected_max_load((ExpertGroup(8), ExpertGroup(8, 2)), 4) == pytest.approx(
        2.3231, abs=5e-5
    )
    assert expected_max_load((ExpertGroup(8, 2), ExpertGroup(8, 2)), 4) == pytest.approx(
        1.5692, abs=5e-5
    )
    assert expected_max_load((ExpertGroup(4),) * 4, 4) == pytest.approx(1.9692, abs=5e-5)


@given(
    groups=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.5, 1.0, 2.0])),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
@settings(max_examples=80)
def test_busiest_is_the_mean_over_all_choices(groups, data):
    experts = sum(size for size, _, _ in groups)
    top_k = data.draw(st.integers(1, experts))
    owner = [g for g, (size, _, _) in enumerate(groups) for _ in range(size)]
    loads = []
    for chosen in combinations(range(experts), top_k):
        counts = [sum(owner[e] == g for e in chosen) for g in range(len(groups))]
        pairs = zip(counts, groups, strict=True)
        loads.append(max(-(-n // members) * cost for n, (_, members, cost) in pairs))
    expected = sum(loads) / len(loads)
    assert expected_max_load([ExpertGroup(*g) for g in groups], top_k) == pytest.approx(expected)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.integers(1, 6),
)
def test_e_max_of_unlike_nodes_is_the_mean_over_all_choices(counts, speeds, top_k):
    speeds = speeds[: len(counts)]
    owner = [r for r, c in enumerate(counts) for _ in range(c)]
    assume(top_k <= len(owner))
    loads = [
        max(sum(owner[e] == r for e in active) / s for r, s in enumerate(speeds))
        for active in combinations(range(len(owner)), top_k)
    ]
    groups = [ExpertGroup(count, cost=1 / s) for count, s in zip(counts, speeds, strict=True)]
    assert expected_max_load(groups, top_k) == pytest.approx(sum(loads) / len(loads))


@given(st.integers(2, 5), st.integers(1, 3), st.data())
@settings(max_examples=30)
def test_distinct_experts_of_a_batch(experts, tokens, data):
    top_k = data.draw(st.integers(1, experts))
    one = [set(c) for c in combinations(range(experts), top_k)]
    sizes = [len(set().union(*several)) for several in product(one, repeat=tokens)]
    for number, probability in distinct_experts(experts, top_k, tokens):
        assert probability == pytest.approx(sizes.count(number) / len(sizes))
    assert expected_distinct_experts(experts, top_k, tokens) == pytest.approx(
        sum(sizes) / len(sizes)
    )


def test_floats_count_what_integers_do():
    groups = (ExpertGroup(16), ExpertGroup(16, 2), ExpertGroup(16))
    fast = expected_max_load(groups, 33)
    ways = [math.comb(16, j) for j in range(17)]
    total, below, expected = math.comb(48, 33), 0, 0.0
    for level in range(17):
        count = sum(
            ways[a] * ways[b] * ways[33 - a - b]
            for a in range(min(16, level) + 1)
            for b in range(min(16, 2 * level) + 1)
            if 0 <= 33 - a - b <= min(16, level)
        )
        expected += level * (count - below) / total
        below = count
    assert fast == pytest.approx(expected, rel=1e-9)


def test_a_batch_on_two_nodes_by_enumeration():
    one = list(combinations(range(6), 2))
    loads = [
        max(len([e for e in {*a, *b} if e < 3]), len([e for e in {*a, *b} if e >= 3]))
        for a, b in product(one, one)
    ]
    got = expected_max_load_of_batch((ExpertGroup(3), ExpertGroup(3)), 2, tokens=2)
    assert got == pytest.approx(sum(loads) / len(loads))


def test_many_tokens_touch_almost_all_experts():
    assert expected_distinct_experts(16, 4, 500) == 16


@given(
    st.lists(st.frozensets(st.integers(0, 2), min_size=1), min_size=1, max_size=6),
)
def test_dealing_to_replicas_is_the_best_there_is(holders):
    active = list(range(len(holders)))
    choices = product(*[sorted(h) for h in holders])
    best = min(max(ranks.count(r) for r in ranks) for ranks in choices)
    assert balanced_max_load(active, [sorted(h) for h in holders], 3) == best


def test_dealing_of_groups_agrees_with_the_formula():
    replica_ranks = [(0,)] * 4 + [(1, 2)] * 4
    assert mean_max_load(replica_ranks, 3, 3) == pytest.approx(
        expected_max_load((ExpertGroup(4), ExpertGroup(4, 2)), 3)
    )


@given(st.integers(1, 40), st.integers(1, 8))
def test_even_counts_and_windows_hold_every_expert(experts, nodes):
    counts = even_counts(experts, nodes)
    assert sum(counts) == experts
    assert max(counts) - min(counts) <= 1
    most = -(-experts // nodes)
    assert all(overlapping_windows(experts, nodes, most))


def trace_of(ids: list[list[int]], experts: int) -> RoutingTrace:
    return RoutingTrace((0,), experts, np.array([ids], dtype=np.int16), {"expert_bytes": 1})


def test_experts_that_fire_together_are_set_apart():
    # 0 with 1 and 2 with 3, always: neighbors together make one rank run both.
    trace = trace_of([[0, 1], [2, 3]] * 20, 4)
    assert trace.max_load(contiguous_owners(trace, 2)) == 2
    owner = separate_coactivated(trace, 2)
    assert trace.max_load(owner) == 1
    assert sorted(np.bincount(owner[0])) == [2, 2]


def test_copies_go_where_they_help():
    trace = trace_of([[0, 1], [0, 2], [1, 2]] * 20, 6)
    owner = contiguous_owners(trace, 2)  # 0, 1, 2 on rank 0
    assert trace.max_load(owner) == 2
    holders = choose_replicas(trace, owner, 2, extra=2)
    assert trace.balanced_max_load(holders, 2) == 1
    assert sum(len(h) - 1 for h in holders[0]) <= 4


def test_uniform_routing_looks_uniform():
    draw = np.random.default_rng(0)
    ids = [list(draw.choice(16, 4, replace=False)) for _ in range(4000)]
    trace = trace_of(ids, 16)
    skew = trace.skew()
    assert skew["entropy"] > 0.999
    assert skew["hottest"] < 1.2
    assert trace.max_load(contiguous_owners(trace, 2)) == pytest.approx(2.6462, rel=0.02)


def test_a_trace_is_read_back(tmp_path):
    trace = trace_of([[0, 3], [1, -1]], 4)
    trace.save(tmp_path / "t.npz")
    again = RoutingTrace.load(tmp_path / "t.npz")
    assert np.array_equal(again.ids, trace.ids)
    assert (again.layers, again.experts, again.facts) == (trace.layers, 4, trace.facts)


def test_what_is_no_trace_is_an_error(tmp_path):
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match="expected a file of `cenacle record-routing`"):
        RoutingTrace.load(tmp_path / "t.npz")
    with pytest.raises(InputError, match="expected 2 to 4"):
        simulate_placements(trace_of([[0, 1]] * 4, 4), nodes=5, replicas=0)


@given(st.integers(0, 1000), st.integers(2, 3))
@settings(max_examples=20)
def test_no_swap_is_left_that_sets_more_apart(seed, nodes):
    draw = np.random.default_rng(seed)
    trace = trace_of([list(draw.choice(7, 3, replace=False)) for _ in range(30)], 7)
    owner, pairs = separate_coactivated(trace, nodes)[0], trace.coactivations(0)

    def inside(row):
        return sum(pairs[a, b] for a in range(7) for b in range(a) if row[a] == row[b])

    for a, b in combinations(range(7), 2):
        swapped = owner.copy()
        swapped[a], swapped[b] = owner[b], owner[a]
        assert inside(swapped) >= inside(owner)


def test_many_experts_do_not_exceed_a_float(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2500 < expected_max_load([ExpertGroup(4000), ExpertGroup(4000)], 5000) < 2600
    groups = [ExpertGroup(150), ExpertGroup(100, 2, 1.5)]
    in_floats = expected_max_load(groups, 120)
    monkeypatch.setattr(routing_stats, "INTEGER_DEGREE", 1000)
    routing_stats._expected_max_load.cache_clear()
    assert in_floats == pytest.approx(expected_max_load(groups, 120), rel=1e-8)
