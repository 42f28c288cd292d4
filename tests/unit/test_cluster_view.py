"""The routing counts and memory of GET /cluster, and the size of its answer."""

import json

from test_plan_info import spec_of

from cenacle.core.link import Link
from cenacle.core.plan import Plan
from cenacle.ranks.messages import Heartbeat
from cenacle.server.cluster_view import (
    MAX_USAGE_ROWS,
    describe_link,
    routing_counts,
    usage_json,
)
from cenacle.server.metrics import KeyUsage
from cenacle.server.plan_info import placement_map


def test_counts_are_in_the_plans_order_and_unchosen_experts_are_zero():
    plan = Plan.whole(spec_of(2, 4), 2)
    assert routing_counts(plan, {4: {1: 7, 3: 2}}) == [[0, 0, 0, 0], [0, 7, 0, 2]]


def test_a_large_models_answer_is_small():
    plan = Plan.whole(spec_of(60, 256), 8)
    assert len(json.dumps(placement_map(plan))) < 2000
    routed = {n + 3: {e: 99_999 for e in range(256)} for n in range(60)}
    assert len(json.dumps(routing_counts(plan, routed))) < 130_000


def test_only_the_clients_own_key_is_named_and_rows_are_bounded():
    usage = {"ann": KeyUsage(0, 5, 6), "bob": KeyUsage(2, 7, 8), "": KeyUsage(1, 1, 1)}
    numbers = ["requests", "prompt_tokens", "generated_tokens"]
    for own_key, names in (("ann", ["ann", None, ""]), ("", ["", None, None])):
        rows = usage_json(usage, own_key)
        assert [row["name"] for row in rows] == names
        found = sorted(tuple(row[n] for n in numbers) for row in rows)
        assert found == sorted(usage.values())
    many = {f"key {n}": KeyUsage(1, n, 2 * n) for n in range(500)}
    rows = usage_json(many, "key 7")
    assert len(rows) == MAX_USAGE_ROWS
    assert rows[0]["name"] == "key 7"
    assert not any(row["name"] for row in rows[1:])
    for name, factor in (("keys", 0), ("requests", 0), ("prompt_tokens", 1)):
        total = 500 if not factor else sum(range(500))
        assert sum(row[name] for row in rows) == total
    assert usage_json({}, "ann") == []


def test_the_slowest_link_of_a_rank_counts():
    links = {(0, 1): Link(1e-4, 2e9), (0, 2): Link(3e-4, 1e9), (1, 2): Link(2e-4, 5e8)}
    last = Heartbeat(sent_bytes=7)
    assert describe_link(0, links, last) == {"latency_s": 3e-4, "bytes_per_s": 1e9, "sent_bytes": 7}
    assert describe_link(1, links, last)["bytes_per_s"] == 5e8
    alone = {"latency_s": None, "bytes_per_s": None, "sent_bytes": 0}
    assert describe_link(0, {}, Heartbeat()) == alone
