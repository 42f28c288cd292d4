"""What GET /cluster says of placements and counts, and that it stays small."""

import json
from collections.abc import Sequence

import pytest

from cenacle.core.model_spec import ModelSpec, MoELayer
from cenacle.core.plan import Plan
from cenacle.server.cluster_view import (
    machine_memory,
    placement_map,
    resident_bytes,
    routing_counts,
)


def spec_of(layers: int, experts: int) -> ModelSpec:
    moe = tuple(MoELayer(3 + n, experts, 1000, units=8) for n in range(layers))
    return ModelSpec("some", layers + 3, moe, 8, 1000, None, 100, "float32")


def holders(body: dict) -> list[list[Sequence[int]]]:
    """For each layer and expert its ranks: what the page makes of it."""
    rows = []
    for _, which in body["layers"]:
        rows.append([body["sets"][who] for who, many in body["maps"][which] for _ in range(many)])
    return rows


@pytest.mark.parametrize("plan", [
    Plan.whole(spec_of(3, 10), 3), Plan.whole(spec_of(2, 9), 2, (2, 1)),
    Plan.sliced(spec_of(2, 4), 4), Plan.replicated(spec_of(2, 8), 4), Plan.whole(spec_of(1, 4), 1),
])  # fmt: skip
def test_a_placement_is_read_back_as_it_was(plan):
    body = json.loads(json.dumps(placement_map(plan)))
    assert [layer for layer, _ in body["layers"]] == [p.layer for p in plan.layers]
    want = [[sorted(q.rank for q in parts) for parts in p.experts] for p in plan.layers]
    assert holders(body) == want
    other = placement_map(Plan.whole(spec_of(3, 11), 3))
    assert body["id"] != other["id"]


def test_counts_are_in_the_plans_order_and_unchosen_experts_are_nought():
    plan = Plan.whole(spec_of(2, 4), 2)
    assert routing_counts(plan, {4: {1: 7, 3: 2}}) == [[0, 0, 0, 0], [0, 7, 0, 2]]


def test_a_large_models_answer_is_small():
    plan = Plan.whole(spec_of(60, 256), 8)
    assert len(json.dumps(placement_map(plan))) < 2000
    routed = {n + 3: {e: 99_999 for e in range(256)} for n in range(60)}
    assert len(json.dumps(routing_counts(plan, routed))) < 130_000


def test_memory_of_a_process_that_is_gone_is_unknown():
    assert resident_bytes(2**22 + 1) is None
    known = machine_memory()
    assert known is None or 0 < known["available_bytes"] < known["total_bytes"]
