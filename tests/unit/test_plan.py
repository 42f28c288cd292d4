"""Every expert exactly once, whatever is asked; and nothing that breaks this gets through."""

import copy
import json
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.core.model_spec import ModelSpec, MoELayer, TrunkPart
from cenacle.core.plan import LayerPlan, Part, Plan, human
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
def deals(draw):
    """A spec, a number of nodes and shares (or None)."""
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
    shares = draw(st.none() | st.lists(share, min_size=nodes, max_size=nodes))
    return spec, nodes, shares


@given(deals())
def test_every_expert_once_and_bytes_add_up(deal):
    spec, nodes, shares = deal
    plan = Plan.whole(spec, nodes, shares)
    for layer, moe in zip(plan.layers, spec.moe, strict=True):
        held = [layer.held_by(rank) for rank in range(nodes)]
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
def test_even_deals_differ_by_one_at_most(experts, data):
    nodes = data.draw(st.integers(1, experts))
    plan = Plan.whole(spec_of(experts, layers=1), nodes)
    counts = [len(plan.layers[0].held_by(rank)) for rank in range(nodes)]
    assert set(counts) <= {experts // nodes, -(-experts // nodes)}


@given(st.integers(1, 300), st.data())
def test_shares_are_proportional(experts, data):
    nodes = data.draw(st.integers(1, min(experts, 8)))
    shares = data.draw(st.lists(st.integers(1, 50), min_size=nodes, max_size=nodes))
    plan = Plan.whole(spec_of(experts, layers=1), nodes, shares)
    counts = [len(plan.layers[0].held_by(rank)) for rank in range(nodes)]
    fair = [Fraction(experts * share, sum(shares)) for share in shares]
    if min(fair) >= 1:  # else the least expert that every rank holds takes from the others
        assert all(abs(c - f) < 1 for c, f in zip(counts, fair, strict=True))
        # Largest remainders: who was rounded up had at least the remainder of who was not.
        up = [f % 1 for c, f in zip(counts, fair, strict=True) if c > f]
        down = [f % 1 for c, f in zip(counts, fair, strict=True) if c < f]
        assert not up or not down or min(up) >= max(down)
    for a in range(nodes):
        for b in range(nodes):
            assert shares[a] <= shares[b] or counts[a] >= counts[b], "a larger share, fewer experts"


@pytest.mark.parametrize(
    ("experts", "shares", "counts"),
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
def test_examples_of_shares(experts, shares, counts):
    plan = Plan.whole(spec_of(experts), len(shares), shares)
    assert [len(plan.layers[0].held_by(r)) for r in range(len(shares))] == counts


def test_shared_experts_even_out_the_bytes():
    plan = Plan.whole(spec_of(experts=5, layers=4, expert_bytes=10, shared_bytes=10), 2)
    assert plan.layers[0].shared == (Part(1, 0, 1),), "rank 0 holds three of five experts"
    totals = [plan.bytes_of(rank)["total"] for rank in (0, 1)]
    assert abs(totals[0] - totals[1]) <= 10


@pytest.mark.parametrize(
    ("nodes", "shares", "message"),
    [
        (17, None, "at most 16, the number of experts of a layer, got 17"),
        (0, None, "nodes: expected at least 1, got 0"),
        (-1, None, "nodes: expected at least 1, got -1"),
        (2, (1, 1, 1), "shares: expected 2 numbers, one per node, got 3"),
        (2, (1,), "shares: expected 2 numbers, one per node, got 1"),
        (2, (1, 0), "shares: expected positive"),
        (2, (1, -1), "shares: expected positive"),
        (2, (1, float("nan")), "shares: expected positive"),
        (2, (float("inf"), 1), "shares: expected positive"),
    ],
)
def test_refused(nodes, shares, message):
    with pytest.raises(PlanError, match=message):
        Plan.whole(spec_of(), nodes, shares)


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
        (put(1, Part(0, 0, 1), Part(0, 0, 1)), "layer 1: expert 1 must be held exactly once"),
        (put(2), "layer 1: expert 2 is held up to 0 of 1"),
        (put(3, Part(2, 0, 1)), "layer 1: expert 3 is given to rank 2, expected 0 to 1"),
        (put(3, Part(-1, 0, 1)), "layer 1: expert 3 is given to rank -1"),
        (put(0, Part(0, 0, 2)), "held up to 2 of 1"),
        (put(1, Part(0, 0, 1), Part(1, 0, 1)), r"rank 1 must hold equally many .* got \[2, 3\]"),
        (put(0, Part(0, 1, 1)), "exactly once"),
        (lambda e: e.pop(), "layer 1: expected a holder for each of 4 experts, got 3"),
        (lambda e: e.append((Part(0, 0, 1),)), "of 4 experts, got 5"),
        (lambda e: e.__setitem__(slice(2, 4), e[:2]), r"layer 1: ranks \[1\] hold no expert"),
    ],
)
def test_broken_invariants(change, message):
    with pytest.raises(PlanError, match=message):
        broken(change)()


def test_sliced_experts_tile_their_width():
    spec = spec_of(experts=2, layers=1, expert_bytes=100, units=4)
    parts = (Part(0, 0, 3), Part(1, 3, 4))
    plan = Plan("sliced", 2, 4, (LayerPlan(1, (parts, parts), ()),), spec)
    assert [plan.bytes_of(r)["experts"] for r in (0, 1)] == [150, 50]
    gap = (Part(0, 0, 2), Part(1, 3, 4))
    other = (Part(0, 0, 2), Part(1, 2, 4))
    for second, message in ((gap, "do not tile 0 to 4"), (other, "rank 0 holds different slices")):
        with pytest.raises(PlanError, match=message):
            Plan("sliced", 2, 4, (LayerPlan(1, (parts, second), ()),), spec)
    with pytest.raises(PlanError, match="4 units, which cannot be cut in 3 equal pieces"):
        Plan("sliced", 1, 3, (LayerPlan(1, ((Part(0, 0, 3),),) * 2, ()),), spec)


@pytest.mark.parametrize(
    ("shared_bytes", "shared", "message"),
    [
        (0, (Part(0, 0, 1),), "take 0 bytes but are given to rank 0"),
        (7, (), "to no rank"),
        (7, (Part(2, 0, 1),), "given to rank 2"),
        (7, (Part(0, 0, 1), Part(1, 0, 1)), "shared experts must be held exactly once"),
    ],
)
def test_shared_experts_are_held_once(shared_bytes, shared, message):
    spec = spec_of(experts=2, layers=1, shared_bytes=shared_bytes)
    owners = ((Part(0, 0, 1),), (Part(1, 0, 1),))
    with pytest.raises(PlanError, match=message):
        Plan("whole", 2, 1, (LayerPlan(1, owners, shared),), spec)


@given(st.integers(1, 12), st.integers(1, 60), st.sampled_from([0, 1, 5, 24]), st.data())
def test_slices_tile_every_width_and_bytes_add_up(nodes, units, shared_units, data):
    shares = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=nodes, max_size=nodes))
    spec = spec_of(
        *(6, 2, 7 * units, 3 * shared_units), units=units, shared_units=max(1, shared_units)
    )
    if units < nodes:
        with pytest.raises(PlanError, match=f"{units} pieces at most .* got {nodes} nodes; use"):
            Plan.sliced(spec, nodes, shares)
        return
    plan = Plan.sliced(spec, nodes, shares)
    each = [plan.bytes_of(r) for r in range(nodes)]
    assert sum(b["experts"] for b in each) == spec.expert_bytes
    assert sum(b["shared"] for b in each) == spec.shared_bytes
    assert all(plan.layers[0].held_by(r) == tuple(range(6)) for r in range(nodes))
    if shares is None:
        assert max(b["experts"] for b in each) - min(b["experts"] for b in each) <= 2 * 6 * 7
    assert len(plan.layers[0].shared) == (
        0 if not shared_units else 1 if shared_units < nodes else nodes
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_biases_are_on_every_rank_that_holds_a_slice():
    moe = (MoELayer(0, 4, 100, 50, 4, 2, kept_bytes=20, shared_kept_bytes=10),)
    spec = ModelSpec("gpt_oss", 1, moe, 2, 7, None, 9, "float32")
    plan = Plan.sliced(spec, 2, (3, 1))
    each = [plan.bytes_of(r) for r in (0, 1)]
    assert [b["experts"] for b in each] == [4 * (60 + 20), 4 * (20 + 20)]
    assert [b["shared"] for b in each] == [20 + 10, 20 + 10]


def test_experts_that_cannot_be_cut():
    spec = replace(spec_of(units=64), unsliced="each is normalised")
    with pytest.raises(PlanError, match="each is normalised; use --placement whole"):
        Plan.sliced(spec, 2)
    assert Plan.sliced(spec, 1).nodes == 1


HEADS = TrunkPart("model.layers.0.self_attn", "attention", 16, 10, 4, 6)


@pytest.mark.parametrize(
    ("nodes", "shares", "heads"),
    [
        (2, None, [(0, 8, 0, 2), (8, 16, 2, 4)]),
        (3, None, [(0, 8, 0, 2), (8, 12, 2, 3), (12, 16, 3, 4)]),
        (2, (3, 1), [(0, 12, 0, 3), (12, 16, 3, 4)]),
        # more ranks than key heads: they share some and split their queries
        (5, None, [(0, 4, 0, 1), (4, 8, 1, 2), (8, 12, 2, 3), (12, 14, 3, 4), (14, 16, 3, 4)]),
    ],
)
def test_heads_go_with_the_keys_they_use(nodes, shares, heads):
    spec = replace(spec_of(units=nodes), parts=(HEADS,), trunk_bytes=1000)
    plan = Plan.sliced(spec, nodes, shares, trunk="sharded")
    got = [plan.heads_of(HEADS, r) for r in range(nodes)]
    assert [(h.start, h.stop, h.first, h.last) for h in got] == heads
    held = [plan.bytes_of(r)["trunk"] - (1000 - HEADS.bytes) for r in range(nodes)]
    assert held == [10 * (b - a) + 6 * (d - c) for a, b, c, d in heads]


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 8), st.data())
def test_every_query_head_once_with_its_key(nodes, groups, queries, data):
    shares = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=nodes, max_size=nodes))
    part = TrunkPart("a", "attention", groups * queries, 1, groups, 1)
    spec = replace(spec_of(units=nodes), parts=(part,))
    plan = Plan.sliced(spec, nodes, shares, trunk="sharded")
    if not plan.divides(part):
        assert nodes == 1 or nodes > groups * queries or queries < -(-nodes // groups)
        assert plan.exchanges == len(plan.layers)
        return
    assert plan.exchanges == len(plan.layers) + 1
    seen = []
    for rank in range(nodes):
        h = plan.heads_of(part, rank)
        assert h.start < h.stop
        assert {q // queries for q in range(h.start, h.stop)} == set(range(h.first, h.last))
        seen += range(h.start, h.stop)
    assert seen == list(range(part.units))


def test_small_parts_stay_replicated():
    parts = (TrunkPart("m", "mlp", 2, 50), TrunkPart("h", "head", 8, 10))
    spec = replace(spec_of(units=8), parts=parts)
    plan = Plan.sliced(spec, 4, trunk="sharded")
    assert [plan.divides(p) for p in parts] == [False, True]
    assert plan.bytes_of(0)["trunk"] == 5000 - 80 + 20
    assert Plan.sliced(spec, 4).bytes_of(0)["trunk"] == 5000


def test_tied_head_is_read_in_slices_and_held_whole():
    part = TrunkPart("embed", "tied", 4, 100)
    plan = Plan.sliced(replace(spec_of(units=2), parts=(part,)), 2, trunk="sharded")
    assert plan.part_bytes(part, 1) == 200
    assert plan.bytes_of(1)["trunk"] == 5000


@given(st.integers(1, 8), st.integers(1, 40), st.data())
def test_replicas(nodes, experts, data):
    shares = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=nodes, max_size=nodes))
    if experts < nodes:
        return
    plan = Plan.replicated(spec_of(experts), nodes, shares=shares)
    layer = plan.layers[0]
    copies = 2 if nodes > 2 else 1
    assert all(len(parts) == copies for parts in layer.experts)
    counts = [len(layer.held_by(r)) for r in range(nodes)]
    assert all(1 <= c <= experts for c in counts)
    if shares is None:
        assert max(counts) - min(counts) <= 1
    assert layer.holders(0) == tuple(tuple(p.rank for p in e) for e in layer.experts)
    assert sum(plan.bytes_of(r)["experts"] for r in range(nodes)) == copies * plan.spec.expert_bytes
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_replicas_fill_the_budgets():
    spec = spec_of(experts=8, layers=2, expert_bytes=100, trunk=1000)
    plan = Plan.replicated(spec, 2, [1000 + 6 * 200, 1000 + 5 * 200 + 199])
    assert [len(plan.layers[0].held_by(r)) for r in (0, 1)] == [6, 5]
    assert sorted(len(parts) for parts in plan.layers[0].experts) == [1] * 5 + [2] * 3
    for budgets, message in (
        ([1600, 1600], r"hold \[3, 3\] experts .* expected at least one on each and 8 together"),
        ([1000, 9000], r"hold \[0, 8\] experts"),
        ([9000], "budgets: expected 2 numbers, got 1"),
    ):
        with pytest.raises(PlanError, match=message):
            Plan.replicated(spec, 2, budgets)


def test_layers_are_the_models():
    plan = Plan.whole(spec_of(layers=2), 2)
    with pytest.raises(
        PlanError, match=r"covers layers \[1\], the model's MoE layers are \[1, 2\]"
    ):
        Plan("whole", 2, 1, plan.layers[:1], plan.spec)
    with pytest.raises(PlanError, match="no MoE layer"):
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
            ("format", 1),
            ("format", 3),
            ("trunk", "half"),
            ("trunk", None),
            ("shares", [1]),
            ("surplus", 1),
            ("layers", None),
            ("layers", [1]),
            ("layers", []),
        ],
        *[("layers", {"layer": 1}), ("spec", None), ("spec", []), ("spec", {})],
        *[("shares", "ab"), ("shares", 2), ("shares", ["1", "1"])],
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
def test_human(n, text):
    assert human(n) == text
