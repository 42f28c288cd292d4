"""What a group of given machines does: exchange, shares, memory; what links and machines say."""

import json
import shutil
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import cenacle
from cenacle.cluster import links, machine
from cenacle.cluster.links import Link
from cenacle.cluster.placing import Wanted, describe_links, exchange, place, shares_of
from cenacle.cluster.state import Node
from cenacle.engine.engine import Options, need_of
from cenacle.errors import ClusterError, InputError, PlanError
from cenacle.model.weights import Checkpoint, describe

DEMO = Path(cenacle.__file__).parent / "demo_model"
GB = 10**9
CHECKPOINT = Checkpoint.open(DEMO)
SPEC = describe(CHECKPOINT)


def node(name, read=10 * GB, free=8 * GB, **facts):
    given = {"read_bytes_s": read, "available_bytes": free, "gpu": False, "metal": None}
    return Node(name, name, True, "", facts={**given, "no_mesh": None, **facts}, address="10.0.0.1")


def placed(members, wanted=Wanted(), found=None):  # noqa: B008  (it is frozen)
    return place(SPEC, CHECKPOINT.config, members, found or {}, wanted, Options(), "native")


def test_the_mesh_where_all_have_it_else_the_ring_and_why():
    both = [node("a"), node("b")]
    assert exchange("auto", "f32", both)[0] == "mesh"
    without = [node("a"), node("b", no_mesh="it was not built")]
    backend, why = exchange("auto", "f32", without)
    assert backend == "ring"
    assert "b: it was not built" in why
    with pytest.raises(ClusterError, match=r"b: it was not built; use --backend ring"):
        exchange("mesh", "f32", without)
    with pytest.raises(InputError, match="expected f32"):
        exchange("auto", "bf16", without)
    with pytest.raises(ClusterError, match="expected auto, mesh or ring"):
        exchange("jaccl", "f32", both)


def test_machines_are_dealt_by_speed_but_not_by_noise():
    assert shares_of([node("a", 10 * GB), node("b", 12 * GB)]) == [1, 1]
    assert shares_of([node("a", 20 * GB), node("b", 10.1 * GB)]) == [2, 1]
    plan, why = placed([node("a", 20 * GB), node("b", 10 * GB)])
    assert "dealt by speed 2:1" in why
    assert plan.bytes_of(0)["experts"] > 1.6 * plan.bytes_of(1)["experts"]


def test_what_does_not_fit_by_speed_is_dealt_by_memory():
    plan, _ = placed([node("a"), node("b")])
    own = plan.bytes_of(0)["total"]
    enough = need_of(CHECKPOINT.config, plan, 0, Options(), "native").own + 4096
    fast = node("a", 60 * GB, free=enough)
    plan, why = placed([fast, node("b", 10 * GB, free=4 * enough)])
    assert "by memory" in why
    assert plan.bytes_of(0)["total"] < own < plan.bytes_of(1)["total"]


def test_what_fits_nowhere_is_refused_by_name():
    with pytest.raises(PlanError, match=r"^b: rank 1 needs .* MB are available"):
        placed([node("a"), node("b", free=50 * 10**6)], Wanted(shares=(1, 1)))
    metal = {"memory_size": 64 * GB, "max_recommended_working_set_size": 100 * 10**6}
    with pytest.raises(PlanError, match=r"b: .*sudo sysctl iogpu.wired_limit_mb=\d+"):
        placed([node("a"), node("b", metal=metal)])


def test_slow_links_are_seen_and_named():
    members = [node("a"), node("b"), node("c")]
    found = {(0, 1): Link(50e-6, GB), (0, 2): Link(300e-6, 2 * GB), (1, 2): Link(40e-6, GB / 10)}
    said = describe_links(members, found)
    assert said == "links: 300 us at most (half a round trip, a to c), 0.10 GB/s at least"
    assert "0.4 ms an exchange" in placed(members, found=found)[1]


def test_links_are_measured_and_strangers_are_not_answered():
    secret = b"s" * 16
    port = links.answer("127.0.0.1", secret)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
        stranger.sendall(b"x" * 16 + bytes(links.PING_BYTES))
        with suppress(ConnectionResetError):  # or the end
            assert stranger.recv(100) == b""
    link = links.measure("127.0.0.1", port, secret)
    assert 1e-6 < link.latency_s < 0.1
    assert 1e6 < link.bytes_s < 1e12
    with pytest.raises(ClusterError, match="cannot be reached"):
        links.measure("127.0.0.1", port, secret)  # it answers once


def test_models_are_found_by_name_wherever_they_are(tmp_path):
    kept = tmp_path / "kept"
    (kept / "some").mkdir(parents=True)
    (kept / "org--name").mkdir()
    for folder in ("some", "org--name"):
        (kept / folder / "config.json").write_text("{}")
    assert machine.find("some", [kept]) == kept / "some"
    assert machine.find("/elsewhere/some", [kept]) == kept / "some"
    assert machine.find("org/name", [kept]) == kept / "org--name"
    assert machine.find("demo_model", []) == DEMO
    assert machine.find("other", [kept]) is None


def test_checkpoints_are_told_apart(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(DEMO, copy)
    assert machine.digest(copy) == machine.digest(DEMO)
    (copy / "README.md").write_text("no weights")
    assert machine.digest(copy) == machine.digest(DEMO)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert machine.digest(copy) != machine.digest(DEMO)


def test_facts_are_what_decisions_need():
    facts = json.loads(json.dumps({**machine.facts(), **machine.changing()}))
    assert facts.items() >= machine.versions().items()
    assert facts["memory_bytes"] > facts["available_bytes"] > 0
    assert 1e8 < facts["read_bytes_s"] < 1e13
    me = replace(node("a"), facts=facts)
    assert placed([me, me])[0].nodes == 2
