"""What a plan costs: reads of its ranks, its lower bound and its prediction."""

from dataclasses import replace

import pytest
from test_choose_plan import HEAD, machines, model
from test_plan import spec_of

from cenacle.core.model_spec import ModelSpec, MoELayer
from cenacle.core.plan import Plan
from cenacle.planning.plan_cost import (
    dense_bytes,
    lower_bound_s,
    max_experts,
    mean_experts,
    token_read_bytes,
    token_s,
    unskipped_ratio,
)


@pytest.mark.parametrize(("nodes", "mean"), [(1, 4), (2, 2.65), (4, 1.97)])
def test_experts_of_the_busiest_of_dbrxs_nodes(nodes, mean):
    spec = replace(spec_of(experts=16, units=8), top_k=4)
    whole, sliced = Plan.whole(spec, nodes), Plan.sliced(spec, nodes)
    assert max_experts(whole) == pytest.approx(mean, abs=0.005)
    assert max_experts(sliced) == pytest.approx(4 / nodes)
    assert unskipped_ratio(sliced) == 1
    if nodes > 1:
        # Stock GPU kernels skip nothing.
        assert max_experts(whole) * unskipped_ratio(whole) == pytest.approx(4)
    if nodes == 4:
        assert max_experts(Plan.replicated(spec, 4)) < 1.6


def test_experts_of_unlike_nodes():
    spec = replace(spec_of(experts=4, units=4), top_k=4)
    for plan in (
        Plan.whole(spec, 2, (3, 1)),
        Plan.sliced(spec, 2, (3, 1)),
        Plan.replicated(spec, 2, node_weights=(3, 1)),
    ):
        # Speeds are in thousandths.
        assert max_experts(plan, weighted=True) == pytest.approx(3, rel=0.01)


def test_the_lower_bound_is_reads_and_all_reduces():
    plan = Plan.sliced(model(10**6, (HEAD,)), 2, trunk="sharded")
    read = 4000 + 10**9 / 2 + 10 * 4 * 10**6 / 2
    assert dense_bytes(plan, 0) == 4000 + 10**9 / 2
    bound = lower_bound_s(plan, latency_s=0.5, bytes_per_s=20e9)
    assert bound == pytest.approx(read / 20e9 + 11 * 0.5)


def test_a_prediction_is_reads_and_all_reduces_where_nothing_else_takes_time():
    spec = model(10**8, (HEAD,))
    sliced, whole = (token_s(make(spec, 2), machines(50, 50)) for make in (Plan.sliced, Plan.whole))
    assert sliced < whole
    # Twice the bandwidth halves what is not all-reduce.
    all_reduces_s = 11 * 100e-6
    twice = token_s(Plan.sliced(spec, 2), machines(100, 100))
    assert twice - all_reduces_s == pytest.approx((sliced - all_reduces_s) / 2, rel=0.02)
    # On GPUs stock kernels skip nothing: whole experts cost every rank all of them.
    assert token_s(Plan.whole(spec, 2), machines(50, 50), skips=False) > whole


def test_weighted_parts_are_judged_with_each_machines_speed_and_even_ones_with_the_slowests():
    spec = model(10**8)
    even, uneven = (
        token_s(Plan.sliced(spec, 2, weights), machines(75, 25)) for weights in (None, (3, 1))
    )
    alike = token_s(Plan.sliced(spec, 2), machines(50, 50))
    assert uneven == pytest.approx(alike, rel=0.05)
    assert even > 1.8 * uneven


def test_mean_and_busiest_of_slices_and_replicas():
    spec = replace(spec_of(experts=16, units=8), top_k=4)
    whole, sliced = Plan.whole(spec, 4), Plan.sliced(spec, 4)
    assert (mean_experts(sliced), max_experts(sliced)) == ([1.0] * 4, 1.0)
    assert mean_experts(whole) == [1.0] * 4
    replicated = Plan.replicated(spec, 4)
    assert mean_experts(replicated) == pytest.approx([1.0] * 4, rel=0.1)
    assert 1.0 < max_experts(replicated) < max_experts(whole)


def two_layer_spec():
    layers = (MoELayer(0, 16, 1000, units=8), MoELayer(1, 16, 1000, units=8))
    return ModelSpec("x", 2, layers, 4, 500, None, 100, "bfloat16", embedding_bytes=100)


@pytest.mark.parametrize(("nodes", "experts"), [(1, 4.0), (2, 2.6462), (4, 1.9692)])
def test_token_bytes_are_the_mean_and_those_of_the_busiest_rank(nodes, experts):
    mean, busiest = token_read_bytes(Plan.whole(two_layer_spec(), nodes))
    assert mean == pytest.approx([400 + 2 * 4000 / nodes] * nodes, rel=0.001)
    assert busiest == pytest.approx([400 + 2 * 1000 * experts] * nodes, rel=0.001)
