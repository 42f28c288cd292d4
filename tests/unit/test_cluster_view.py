"""The routing counts and memory of GET /cluster, and the size of its answer."""

import json

from test_plan_info import spec_of

from cenacle.core.plan import Plan
from cenacle.server.cluster_view import routing_counts
from cenacle.server.plan_info import placement_map


def test_counts_are_in_the_plans_order_and_unchosen_experts_are_zero():
    plan = Plan.whole(spec_of(2, 4), 2)
    assert routing_counts(plan, {4: {1: 7, 3: 2}}) == [[0, 0, 0, 0], [0, 7, 0, 2]]


def test_a_large_models_answer_is_small():
    plan = Plan.whole(spec_of(60, 256), 8)
    assert len(json.dumps(placement_map(plan))) < 2000
    routed = {n + 3: {e: 99_999 for e in range(256)} for n in range(60)}
    assert len(json.dumps(routing_counts(plan, routed))) < 130_000
