"""A plan places every expert exactly once, and a plan that does not is refused."""

import copy
import json
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.core.model_spec import DenseModule, ModelSpec, MoELayer
from cenacle.core.plan import LayerPlan, Plan, WidthSlice
from cenacle.core.units import format_bytes
from cenacle.errors import PlanError


def spec_of(
    experts=16, layers=2, expert_bytes=1000, shared_bytes=0, trunk=5000, units=1, shared_units=1
) -> ModelSpec:
    moe = tuple(
        MoELayer(i + 1, experts, expert_bytes, shared_bytes, units, shared_units)
        for i in range(layers)
    )
    return ModelSpec("mixtral", layers + 1, moe, 2, trunk, 4096, 32000, "bfloat16")


@st.composite
def placements(draw):
    """A spec, a number of nodes and weights (or None)."""
    experts = draw(st.integers(1, 300))
    nodes = draw(st.integers(1, min(experts, 40)))
    spec = spec_of(
        experts,
        draw(st.integers(1, 4)),
        draw(st.integers(1, 10**9)),
        draw(st.sampled_from([0, 0, 777, 10**9])),
        draw(st.integers(0, 10**11)),
    )
    share = st.one_of(
        st.integers(1, 100), st.floats(min_value=0, exclude_min=True, max_value=1.7e308)
    )
    weights = draw(st.none() | st.lists(share, min_size=nodes, max_size=nodes))
    return spec, nodes, weights


@given(placements())
def test_every_expert_once_and_bytes_add_up(case):
    spec, nodes, weights = case
    plan = Plan.whole(spec, nodes, weights)
    for layer, moe in zip(plan.layers, spec.moe, strict=True):
        held = [layer.experts_of(rank) for rank in range(nodes)]
        assert sorted(e for ids in held for e in ids) == list(range(moe.experts))
        for ids in held:
            assert len(ids) >= 1
            assert list(ids) == list(range(ids[0], ids[-1] + 1)), "not one range of bytes"
        assert (layer.shared == ()) == (moe.shared_bytes == 0)
    each = [plan.bytes_of(rank) for rank in range(nodes)]
    assert sum(b["experts"] for b in each) == spec.expert_bytes
    assert sum(b["shared"] for b in each) == spec.shared_bytes
    assert {b["trunk"] for b in each} == {spec.trunk_bytes}
    assert sum(b["total"] for b in each) == spec.total_bytes + (nodes - 1) * spec.trunk_bytes
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(st.integers(1, 300), st.data())
def test_even_counts_differ_by_one_at_most(experts, data):
    nodes = data.draw(st.integers(1, experts))
    plan = Plan.whole(spec_of(experts, layers=1), nodes)
    counts = [len(plan.layers[0].experts_of(rank)) for rank in range(nodes)]
    assert set(counts) <= {experts // nodes, -(-experts // nodes)}


@given(st.integers(1, 300), st.data())
def test_counts_are_proportional_to_node_weights(experts, data):
    nodes = data.draw(st.integers(1, min(experts, 8)))
    weights = data.draw(st.lists(st.integers(1, 50), min_size=nodes, max_size=nodes))
    plan = Plan.whole(spec_of(experts, layers=1), nodes, weights)
    counts = [len(plan.layers[0].experts_of(rank)) for rank in range(nodes)]
    fair = [Fraction(experts * share, sum(weights)) for share in weights]
    if min(fair) >= 1:  # else the least expert that every rank holds takes from the others
        assert all(abs(c - f) < 1 for c, f in zip(counts, fair, strict=True))
        # Largest remainders: who was rounded up had at least the remainder of who was not.
        up = [f % 1 for c, f in zip(counts, fair, strict=True) if c > f]
        down = [f % 1 for c, f in zip(counts, fair, strict=True) if c < f]
        assert not up or not down or min(up) >= max(down)
    for a in range(nodes):
        for b in range(nodes):
            assert weights[a] <= weights[b] or counts[a] >= counts[b], (
                "a larger share, fewer experts"
            )


@pytest.mark.parametrize(
    ("experts", "weights", "counts"),
    [
        (16, (2, 1, 1), [8, 4, 4]),
        (10, (9, 1), [9, 1]),
        (100, (70, 20, 10), [70, 20, 10]),
        (7, (1, 1, 1), [3, 2, 2]),
        (3, (1000, 1, 1), [1, 1, 1]),
        (8, (1000, 1, 1), [6, 1, 1]),
        (6, (0.1, 0.2, 0.3), [1, 2, 3]),
        (8, (1e308, 1e308), [4, 4]),
        (8, (5e-324, 5e-324), [4, 4]),
    ],
)
def test_examples_of_node_weights(experts, weights, counts):
    plan = Plan.whole(spec_of(experts), len(weights), weights)
    assert [len(plan.layers[0].experts_of(r)) for r in range(len(weights))] == counts


def test_shared_experts_even_out_the_bytes():
    plan = Plan.whole(spec_of(experts=5, layers=4, expert_bytes=10, shared_bytes=10), 2)
    assert plan.layers[0].shared == (WidthSlice(1, 0, 1),), "rank 0 holds three of five experts"
    totals = [plan.bytes_of(rank)["total"] for rank in (0, 1)]
    assert abs(totals[0] - totals[1]) <= 10


@pytest.mark.parametrize(
    ("nodes", "weights", "message"),
    [
        (17, None, "at most 16, the number of experts of a layer, got 17"),
        (0, None, "nodes: expected at least 1, got 0"),
        (-1, None, "nodes: expected at least 1, got -1"),
        (2, (1, 1, 1), "node_weights: expected 2 numbers, one per node, got 3"),
        (2, (1,), "node_weights: expected 2 numbers, one per node, got 1"),
        (2, (1, 0), "node_weights: expected positive"),
        (2, (1, -1), "node_weights: expected positive"),
        (2, (1, float("nan")), "node_weights: expected positive"),
        (2, (float("inf"), 1), "node_weights: expected positive"),
    ],
)
def test_refused(nodes, weights, message):
    with pytest.raises(PlanError, match=message):
        Plan.whole(spec_of(), nodes, weights)


def broken(change):
    """A good plan for two ranks of four experts, with `change` made to its first layer's owners."""
    spec = spec_of(experts=4, layers=2)
    plan = Plan.whole(spec, 2)
    experts = list(plan.layers[0].experts)
    change(experts)
    layers = (LayerPlan(1, tuple(experts), ()), plan.layers[1])
    return lambda: Plan("whole", 2, 1, layers, spec)


def put(index, *parts):
    def change(experts):
        experts[index] = parts

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put(1, WidthSlice(0, 0, 1), WidthSlice(0, 0, 1)),
            "layer 1: expert 1 must be held at most once",
        ),
        (put(2), "layer 1: expert 2 is held up to 0 of 1"),
        (put(3, WidthSlice(2, 0, 1)), "layer 1: expert 3: expected a rank from 0 to 1, got 2"),
        (put(3, WidthSlice(-1, 0, 1)), "layer 1: expert 3: expected a rank from 0 to 1, got -1"),
        (put(0, WidthSlice(0, 0, 2)), "held up to 2 of 1"),
        (
            put(1, WidthSlice(0, 0, 1), WidthSlice(1, 0, 1)),
            r"rank 1: expected equally many .* got \[2, 3\]",
        ),
        (put(0, WidthSlice(0, 1, 1)), "exactly once"),
        (lambda e: e.pop(), "layer 1: expected a rank for each of 4 experts, got 3"),
        (lambda e: e.append((WidthSlice(0, 0, 1),)), "of 4 experts, got 5"),
        (lambda e: e.__setitem__(slice(2, 4), e[:2]), r"layer 1: ranks \[1\] hold no expert"),
    ],
)
def test_broken_invariants(change, message):
    with pytest.raises(PlanError, match=message):
        broken(change)()


def test_sliced_experts_tile_their_width():
    spec = spec_of(experts=2, layers=1, expert_bytes=100, units=4)
    parts = (WidthSlice(0, 0, 3), WidthSlice(1, 3, 4))
    plan = Plan("sliced", 2, 4, (LayerPlan(1, (parts, parts), ()),), spec)
    assert [plan.bytes_of(r)["experts"] for r in (0, 1)] == [150, 50]
    gap = (WidthSlice(0, 0, 2), WidthSlice(1, 3, 4))
    other = (WidthSlice(0, 0, 2), WidthSlice(1, 2, 4))
    for second, message in ((gap, "do not tile 0 to 4"), (other, "rank 0 holds different slices")):
        with pytest.raises(PlanError, match=message):
            Plan("sliced", 2, 4, (LayerPlan(1, (parts, second), ()),), spec)
    with pytest.raises(PlanError, match="4 units, which cannot be divided into 3 equal pieces"):
        Plan("sliced", 1, 3, (LayerPlan(1, ((WidthSlice(0, 0, 3),),) * 2, ()),), spec)


@pytest.mark.parametrize(
    ("shared_bytes", "shared", "message"),
    [
        (0, (WidthSlice(0, 0, 1),), "take 0 bytes but are assigned to rank 0"),
        (7, (), "to no rank"),
        (7, (WidthSlice(2, 0, 1),), "expected a rank from 0 to 1, got 2"),
        (7, (WidthSlice(0, 0, 1), WidthSlice(1, 0, 1)), "shared experts must be held exactly once"),
    ],
)
def test_shared_experts_are_held_once(shared_bytes, shared, message):
    spec = spec_of(experts=2, layers=1, shared_bytes=shared_bytes)
    owners = ((WidthSlice(0, 0, 1),), (WidthSlice(1, 0, 1),))
    with pytest.raises(PlanError, match=message):
        Plan("whole", 2, 1, (LayerPlan(1, owners, shared),), spec)


@given(st.integers(1, 12), st.integers(1, 60), st.sampled_from([0, 1, 5, 24]), st.data())
def test_slices_tile_every_width_and_bytes_add_up(nodes, units, shared_units, data):
    weights = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=nodes, max_size=nodes))
    spec = spec_of(
        *(6, 2, 7 * units, 3 * shared_units), units=units, shared_units=max(1, shared_units)
    )
    if units < nodes:
        with pytest.raises(PlanError, match=f"{units} slices at most .* got {nodes} nodes; use"):
            Plan.sliced(spec, nodes, weights)
        return
    plan = Plan.sliced(spec, nodes, weights)
    each = [plan.bytes_of(r) for r in range(nodes)]
    assert sum(b["experts"] for b in each) == spec.expert_bytes
    assert sum(b["shared"] for b in each) == spec.shared_bytes
    assert all(plan.layers[0].experts_of(r) == tuple(range(6)) for r in range(nodes))
    if weights is None:
        assert max(b["experts"] for b in each) - min(b["experts"] for b in each) <= 2 * 6 * 7
    assert len(plan.layers[0].shared) == (
        0 if not shared_units else 1 if shared_units < nodes else nodes
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_biases_are_on_every_rank_that_holds_a_slice():
    moe = (MoELayer(0, 4, 100, 50, 4, 2, unsliced_bytes=20, shared_unsliced_bytes=10),)
    spec = ModelSpec("gpt_oss", 1, moe, 2, 7, None, 9, "float32")
    plan = Plan.sliced(spec, 2, (3, 1))
    each = [plan.bytes_of(r) for r in (0, 1)]
    assert [b["experts"] for b in each] == [4 * (60 + 20), 4 * (20 + 20)]
    assert [b["shared"] for b in each] == [20 + 10, 20 + 10]


def test_experts_that_cannot_be_sliced():
    spec = replace(spec_of(units=64), unsliceable_reason="each is normalized")
    with pytest.raises(PlanError, match="each is normalized; use --placement whole"):
        Plan.sliced(spec, 2)
    assert Plan.sliced(spec, 1).nodes == 1


HEADS = DenseModule("model.layers.0.self_attn", "attention", 16, 10, 4, 6)


@pytest.mark.parametrize(
    ("nodes", "weights", "heads"),
    [
        (2, None, [(0, 8, 0, 2), (8, 16, 2, 4)]),
        (3, None, [(0, 8, 0, 2), (8, 12, 2, 3), (12, 16, 3, 4)]),
        (2, (3, 1), [(0, 12, 0, 3), (12, 16, 3, 4)]),
        # more ranks than key heads: they share some and split their queries
        (5, None, [(0, 4, 0, 1), (4, 8, 1, 2), (8, 12, 2, 3), (12, 14, 3, 4), (14, 16, 3, 4)]),
    ],
)
def test_heads_go_with_the_keys_they_use(nodes, weights, heads):
    spec = replace(spec_of(units=nodes), dense_modules=(HEADS,), trunk_bytes=1000)
    plan = Plan.sliced(spec, nodes, weights, trunk="sharded")
    got = [plan.heads_of(HEADS, r) for r in range(nodes)]
    assert [(h.query_start, h.query_stop, h.kv_start, h.kv_stop) for h in got] == heads
    held = [plan.bytes_of(r)["trunk"] - (1000 - HEADS.bytes) for r in range(nodes)]
    assert held == [10 * (b - a) + 6 * (d - c) for a, b, c, d in heads]


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 8), st.data())
def test_every_query_head_once_with_its_key(nodes, groups, queries, data):
    weights = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=nodes, max_size=nodes))
    part = DenseModule("a", "attention", groups * queries, 1, groups, 1)
    spec = replace(spec_of(units=nodes), dense_modules=(part,))
    plan = Plan.sliced(spec, nodes, weights, trunk="sharded")
    if not plan.is_sharded(part):
        assert nodes == 1 or nodes > groups * queries or queries < -(-nodes // groups)
        assert plan.all_reduces == len(plan.layers)
        return
    assert plan.all_reduces == len(plan.layers) + 1
    seen = []
    for rank in range(nodes):
        h = plan.heads_of(part, rank)
        heads = range(h.query_start, h.query_stop)
        assert heads
        assert {q // queries for q in heads} == set(range(h.kv_start, h.kv_stop))
        seen += heads
    assert seen == list(range(part.units))


def test_small_modules_stay_replicated():
    parts = (DenseModule("m", "mlp", 2, 50), DenseModule("h", "head", 8, 10))
    spec = replace(spec_of(units=8), dense_modules=parts)
    plan = Plan.sliced(spec, 4, trunk="sharded")
    assert [plan.is_sharded(p) for p in parts] == [False, True]
    assert plan.bytes_of(0)["trunk"] == 5000 - 80 + 20
    assert Plan.sliced(spec, 4).bytes_of(0)["trunk"] == 5000


def test_tied_head_is_read_in_slices_and_held_whole():
    part = DenseModule("embed", "tied", 4, 100)
    plan = Plan.sliced(replace(spec_of(units=2), dense_modules=(part,)), 2, trunk="sharded")
    assert plan.module_bytes(part, 1) == 200
    assert plan.bytes_of(1)["trunk"] == 5000


@given(st.integers(1, 8), st.integers(1, 40), st.data())
def test_replicas(nodes, experts, data):
    weights = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=nodes, max_size=nodes))
    if experts < nodes:
        return
    plan = Plan.replicated(spec_of(experts), nodes, node_weights=weights)
    layer = plan.layers[0]
    copies = 2 if nodes > 2 else 1
    assert all(len(parts) == copies for parts in layer.experts)
    counts = [len(layer.experts_of(r)) for r in range(nodes)]
    assert all(1 <= c <= experts for c in counts)
    if weights is None:
        assert max(counts) - min(counts) <= 1
    assert layer.replica_ranks(0) == tuple(tuple(p.rank for p in e) for e in layer.experts)
    assert sum(plan.bytes_of(r)["experts"] for r in range(nodes)) == copies * plan.spec.expert_bytes
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_replicas_fill_the_memory():
    spec = spec_of(experts=8, layers=2, expert_bytes=100, trunk=1000)
    plan = Plan.replicated(spec, 2, [1000 + 6 * 200, 1000 + 5 * 200 + 199])
    assert [len(plan.layers[0].experts_of(r)) for r in (0, 1)] == [6, 5]
    assert sorted(len(parts) for parts in plan.layers[0].experts) == [1] * 5 + [2] * 3
    for limits, message in (
        (
            [1600, 1600],
            r"at least one expert of each layer on each node, and for 8 .* got \[3, 3\]",
        ),
        ([1000, 9000], r"got \[0, 8\]"),
        ([9000], "node_memory_bytes: expected 2 numbers, got 1"),
    ):
        with pytest.raises(PlanError, match=message):
            Plan.replicated(spec, 2, limits)


def test_layers_are_the_models():
    plan = Plan.whole(spec_of(layers=2), 2)
    with pytest.raises(
        PlanError, match=r"covers layers \[1\], the model's MoE layers are \[1, 2\]"
    ):
        Plan("whole", 2, 1, plan.layers[:1], plan.spec)
    with pytest.raises(PlanError, match="has no MoE layer"):
        Plan.whole(spec_of(layers=0), 1)


def test_file_round_trip(tmp_path):
    plan = Plan.whole(spec_of(shared_bytes=9), 3, (3, 2, 1))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[1]", b"null", b"3", b'"x"', b"\xff\xfe"])
def test_files_that_are_no_plan(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError):
        Plan.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(PlanError, match=r"cannot read the plan .*none\.json"):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            ("format", 2),
            ("format", 4),
            ("trunk", "half"),
            ("trunk", None),
            ("node_weights", [1]),
            ("surplus", 1),
            ("layers", None),
            ("layers", [1]),
            ("layers", []),
        ],
        *[("layers", {"layer": 1}), ("spec", None), ("spec", []), ("spec", {})],
        *[("node_weights", "ab"), ("node_weights", 2), ("node_weights", ["1", "1"])],
        *[("nodes", "2"), ("nodes", 0), ("nodes", None), ("width", 0), ("width", None)],
    ],
)
def test_corrupted_keys(key, value):
    data = Plan.whole(spec_of(experts=4), 2).to_json() | {key: value}
    with pytest.raises(PlanError):
        Plan.from_json(data)


@given(st.data())
def test_corrupted_anywhere(data):
    """Whatever one value is replaced by: an error of ours, or a plan that still holds."""
    tree = json.loads(json.dumps(Plan.whole(spec_of(experts=3, layers=1), 2).to_json()))
    node, key = tree, data.draw(st.sampled_from(sorted(tree)))
    while isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(
            st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
        )
    junk = st.none() | st.integers(-2, 4) | st.text(max_size=2) | st.just([]) | st.just({})
    if isinstance(node, dict) and data.draw(st.booleans()):
        del node[key]
    else:
        node[key] = data.draw(junk | st.just(copy.deepcopy(node)))
    try:
        plan = Plan.from_json(tree)
    except PlanError:
        return
    for layer, moe in zip(plan.layers, plan.spec.moe, strict=True):
        owners = [rank for e in layer.experts for rank in {part.rank for part in e}]
        assert len(layer.experts) == moe.experts
        assert set(owners) == set(range(plan.nodes))
    plan.table()


def test_table():
    spec = spec_of(experts=16, layers=1, expert_bytes=158_000_000, trunk=180_400_000)
    lines = Plan.whole(spec, 2).table().splitlines()
    assert lines[0].split() == ["rank", "experts", "of", "trunk", "experts", "shared", "total"]
    assert " ".join(lines[1].split()) == "0 8 16 180.4 MB 1.26 GB 0 B 1.44 GB"
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("n", "text"),
    [
        *[(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (1.27e9, "1.27 GB")],
        *[(65e12, "65.0 TB"), (2e15, "2000.0 TB")],
    ],
)
def test_format_bytes(n, text):
    assert format_bytes(n) == text
