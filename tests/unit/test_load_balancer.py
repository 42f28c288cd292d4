"""Dealing experts to replicas: the fast rules against trying everything, and against the paper."""

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan import spec_of

from cenacle.core.model_spec import DenseModule, ModelSpec, MoELayer
from cenacle.core.plan import Plan
from cenacle.errors import PlanError
from cenacle.planning.catalog import Fact, Link, Machine
from cenacle.planning.choose_plan import (
    ASSUMED_CPU_BYTES_S,
    choose_plan,
    expected_busiest,
    expert_reads,
    measured_s,
    token_s,
)
from cenacle.planning.load_balancer import (
    MAX_TOKENS_PER_EXPERT,
    assign_experts,
    assign_replicas,
    assign_tokens,
    integer_speeds,
    min_max_load,
)
from cenacle.planning.perf_model import PaperConstants
from cenacle.planning.plan_cost import MeasuredMachines


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
    dealt = assign_experts(counts, holders, speeds)
    for count, ranks, rank in zip(counts, holders, dealt, strict=True):
        assert rank in ranks if count else rank == -1
    ones = [min(c, 1) for c in counts]
    want = min_max_load(ones, holders, speeds) if any(ones) else 0
    assert busiest(ones, dealt, speeds) == pytest.approx(want)


@given(cases())
def test_tokens_are_dealt_to_holders_and_not_badly(case):
    counts, holders, speeds = case
    dealt = assign_tokens(counts, holders, speeds)
    for count, ranks, rank in zip(counts, holders, dealt, strict=True):
        assert rank in ranks if count else rank == -1
    if any(counts):
        assert busiest(counts, dealt, speeds) <= 3 * min_max_load(counts, holders, speeds)


@pytest.mark.parametrize("speeds", [[1, 1], [3, 1]])
def test_tokens_on_two_full_replicas(speeds):
    counts, holders = [50, 30, 20, 20, 20, 20], [(0, 1)] * 6
    dealt = assign_replicas(counts, holders, speeds)
    assert busiest(counts, dealt, speeds) <= 1.15 * min_max_load(counts, holders, speeds)


def test_few_tokens_balance_experts_and_many_balance_tokens():
    holders = [(0, 1)] * 4
    few, many = [MAX_TOKENS_PER_EXPERT * 4 - 3, 1, 1, 1], [MAX_TOKENS_PER_EXPERT * 4, 1, 1, 1]
    assert assign_replicas(few, holders, [1, 1]) == assign_experts(few, holders, [1, 1])
    assert (
        assign_replicas(many, holders, [1, 1])
        == assign_tokens(many, holders, [1, 1])
        == [0, 1, 1, 1]
    )
    assert sorted(assign_replicas(few, holders, [1, 1])) == [0, 0, 1, 1]


def test_an_expert_without_holders_is_left_out():
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
    holders = layer.replica_ranks(0)
    busy = []
    for chosen in combinations(range(16), 4):
        counts = [int(e in chosen) for e in range(16)]
        busy.append(busiest(counts, assign_replicas(counts, holders, [1] * nodes), [1] * nodes))
    assert sum(busy) / len(busy) < paper - 0.3


# Choosing


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.integers(1, 6),
)
def test_the_mean_of_the_busiest_is_the_mean_over_all_sets(counts, speeds, chosen):
    speeds = speeds[: len(counts)]
    owner = [r for r, c in enumerate(counts) for _ in range(c)]
    if chosen > len(owner):
        return
    seen = [
        max(sum(owner[e] == r for e in active) / s for r, s in enumerate(speeds))
        for active in combinations(range(len(owner)), chosen)
    ]
    assert expected_busiest(counts, speeds, chosen) == pytest.approx(sum(seen) / len(seen))


@pytest.mark.parametrize(("nodes", "mean"), [(1, 4), (2, 2.65), (4, 1.97)])
def test_the_busiest_of_dbrxs_nodes(nodes, mean):
    spec = replace(spec_of(experts=16, units=8), top_k=4)
    assert expert_reads(Plan.whole(spec, nodes), True) == pytest.approx(mean, abs=0.005)
    assert expert_reads(Plan.sliced(spec, nodes), True) == pytest.approx(4 / nodes)
    assert expert_reads(Plan.sliced(spec, nodes), False) == pytest.approx(4 / nodes)
    if nodes > 1:
        assert expert_reads(Plan.whole(spec, nodes), False) == 4, "stock GPU kernels skip nothing"
    if nodes == 4:
        assert expert_reads(Plan.replicated(spec, 4), True) < 1.6


def test_reads_of_unlike_nodes():
    spec = replace(spec_of(experts=4, units=4), top_k=4)
    assert expert_reads(Plan.whole(spec, 2, (3, 1)), True) == pytest.approx(
        3, rel=0.01
    )  # speeds are in thousandths
    assert expert_reads(Plan.sliced(spec, 2, (3, 1)), True) == pytest.approx(3, rel=0.01)
    assert expert_reads(Plan.replicated(spec, 2, node_weights=(3, 1)), True) == pytest.approx(
        3, rel=0.01
    )


def model(expert_bytes: int, parts: tuple[DenseModule, ...] = ()) -> ModelSpec:
    moe = tuple(MoELayer(i, 16, expert_bytes, units=8) for i in range(10))
    trunk = sum(p.bytes for p in parts) + 5000
    return ModelSpec("mixtral", 10, moe, 4, trunk, None, 9, "float32", None, parts, 1000)


HEAD = DenseModule("lm_head", "head", 100, 10**7)


def test_modelled_time_is_bytes_and_exchanges():
    spec = model(10**6, (HEAD,))
    plan = Plan.sliced(spec, 2, trunk="sharded")
    bytes_ = 4000 + 10**9 / 2 + 10 * 4 * 10**6 / 2
    assert token_s(plan, latency_s=0.5) == pytest.approx(bytes_ / ASSUMED_CPU_BYTES_S + 11 * 0.5)


@pytest.mark.parametrize(
    ("spec", "asked", "got", "said"),
    [
        (model(10**8), {}, "sliced/replicated", "experts sliced, trunk replicated: "),
        (model(10**8, (HEAD,)), {}, "sliced/sharded", "sliced/replicated"),
        (model(10**8, (HEAD,)), {"latency_s": 10}, "sliced/replicated", "10000 ms an exchange"),
        (model(10**8, (HEAD,)), {"trunk": "replicated"}, "sliced/replicated", "whole/replicated"),
        (model(10**8, (HEAD,)), {"placement": "whole"}, "whole/sharded", "whole/replicated"),
        (replace(model(10**8), unsliceable_reason="no"), {}, "whole/replicated", ""),
        (model(10**8), {"gpu": True}, "sliced/replicated", "400 GB/s"),
        (model(10**8), {"placement": "replicated"}, "replicated/replicated", ""),
        (model(10**8), {"trunk": "sharded"}, "sliced/sharded", "not plain grouped-query"),
    ],
)
def test_choices(spec, asked, got, said):
    plan, why = choose_plan(spec, 2, **asked)
    assert f"{plan.placement}/{plan.trunk}" == got
    assert said in why


SHAPE = {
    "model_type": "mixtral", "hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128,
    "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 9,
    "num_local_experts": 16, "num_experts_per_tok": 4, "max_position_embeddings": 4096,
}  # fmt: skip


def machines(*gb_s: float, latency_us: float = 100.0, config: dict = SHAPE) -> MeasuredMachines:
    """As if they had been measured: reading takes all of the time."""
    numbers = {"memory_gib": 64, "tflops": 1000, "usd": 0, "watts": 0, "efficiency": 1}
    numbers |= {"kv_efficiency": 1, "compute": 1, "attention_compute": 1, "overhead_us": 0}
    facts = {k: Fact(v, "M", "") for k, v in numbers.items()}
    found = tuple(
        Machine(f"m{r}", "", "cpu", {**facts, "bandwidth_gb_s": Fact(r, "M", "")}, 0.9)
        for r in gb_s
    )
    between = {"latency_us": Fact(latency_us, "M", ""), "gb_s": Fact(1, "M", "")}
    return MeasuredMachines(
        config, found, Link("l", "", "mesh", between), PaperConstants(0.2, 0, 1, 0), "told"
    )


def test_what_was_measured_goes_before_what_is_assumed():
    spec = model(10**8, (HEAD,))
    plan, why = choose_plan(spec, 2, measured=machines(50, 50))
    assert plan.placement == "sliced"
    assert "at 50 GB/s a node and 0.1 ms an exchange, told" in why
    sliced, whole = (
        measured_s(make(spec, 2), machines(50, 50)) for make in (Plan.sliced, Plan.whole)
    )
    assert sliced < whole
    # Reading and exchanging are all there is: twice the bandwidth halves what is not exchange.
    exchanges = 11 * 100e-6
    twice = measured_s(Plan.sliced(spec, 2), machines(100, 100))
    assert twice - exchanges == pytest.approx((sliced - exchanges) / 2, rel=0.02)
    # On GPUs stock kernels skip nothing: whole experts cost every rank all of them.
    assert measured_s(Plan.whole(spec, 2), machines(50, 50), gpu=True) > whole
    # An uneven deal is judged with each machine's own speed, an even one with the slowest's.
    spec = model(10**8)
    even, uneven = (
        measured_s(Plan.sliced(spec, 2, shares), machines(75, 25)) for shares in (None, (3, 1))
    )
    assert uneven == pytest.approx(measured_s(Plan.sliced(spec, 2), machines(50, 50)), rel=0.05)
    assert even > 1.8 * uneven


def test_a_shape_that_is_not_understood_is_judged_by_bytes():
    plan, why = choose_plan(model(10**8), 2, measured=machines(50, 25, config={"model_type": "x"}))
    assert plan.placement == "sliced"
    assert "50 GB/s a node and 0.1 ms an exchange, told" in why


def test_one_node_needs_no_choice():
    plan, why = choose_plan(model(5), 1)
    assert (plan.placement, plan.trunk, why) == ("whole", "replicated", "")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"placement": "half"}, "expected whole, sliced, replicated or auto, got 'half'"),
        ({"trunk": "half"}, "expected replicated or sharded, got 'half'"),
        ({"budgets": [1, 1]}, "budgets are for --placement replicated"),
        ({"placement": "sliced", "nodes": 9}, "8 slices at most"),
        ({"nodes": 17}, "at most 16"),
    ],
)
def test_choices_that_are_not_possible(asked, message):
    with pytest.raises(PlanError, match=message):
        choose_plan(model(5), **{"nodes": 2, **asked})
