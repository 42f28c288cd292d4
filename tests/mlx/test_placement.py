"""Backend, node weights and memory of a group of nodes; what links and nodes report."""

import json
import shutil
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import cenacle
from cenacle.cluster import hostsfile, link_probe, node_info, thunderbolt
from cenacle.cluster.membership import Node
from cenacle.cluster.messages import UNKNOWN_NODE, NodeInfo
from cenacle.cluster.placement import (
    PlacementOptions,
    choose_backend,
    describe_links,
    measured_machines,
    place,
    speed_weights,
)
from cenacle.core.link import Link
from cenacle.engine.memory import estimate_memory
from cenacle.engine.options import EngineOptions
from cenacle.errors import ClusterError, InputError, PlanError
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.spec_reader import read_model_spec

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
GB = 10**9
CHECKPOINT = Checkpoint.open(DEMO)
SPEC = read_model_spec(CHECKPOINT)


def node(name, read=10 * GB, free=8 * GB, **info):
    known = replace(UNKNOWN_NODE, read_bytes_per_s=read, available_bytes=free, **info)
    return Node(name, name, True, "", info=known, address="10.0.0.1")


def place_demo(members, options=PlacementOptions(), links=None):  # noqa: B008  (it is frozen)
    return place(SPEC, CHECKPOINT.config, members, links or {}, options, EngineOptions(), "native")


def test_the_mesh_if_all_have_it_else_the_ring_with_the_reason():
    both = [node("a"), node("b")]
    assert choose_backend("auto", "f32", both)[0] == "mesh"
    without = [node("a"), node("b", mesh_unavailable_reason="it was not built")]
    backend, why, _ = choose_backend("auto", "f32", without)
    assert backend == "ring"
    assert "b: it was not built" in why
    with pytest.raises(ClusterError, match=r"b: it was not built; use --backend ring"):
        choose_backend("mesh", "f32", without)
    with pytest.raises(InputError, match="expected f32"):
        choose_backend("auto", "bf16", without)
    with pytest.raises(ClusterError, match="expected auto or jaccl, nccl, mesh, ring"):
        choose_backend("mpi", "f32", both)


def port(device, uuid, to):
    return {"device": device, "uuid": uuid, "to": to}


def test_rdma_is_preferred_to_cuda_and_cuda_to_the_mesh():
    """As reports say; only mesh and ring were ever run between machines."""
    macs = {"mesh_unavailable_reason": "not on macOS"}
    a = node("a", **macs, thunderbolt=[port("rdma_en2", "A2", "B5"), port("rdma_en3", "A3", "C2")])
    b = node("b", **macs, thunderbolt=[port("rdma_en5", "B5", "A2"), port("rdma_en4", "B4", "C3")])
    c = node("c", **macs, thunderbolt=[port("rdma_en2", "C2", "A3"), port("rdma_en3", "C3", "B4")])
    backend, why, devices = choose_backend("auto", "f32", [a, b, c])
    assert (backend, "RDMA" in why) == ("jaccl", True)
    assert devices == [
        [None, "rdma_en2", "rdma_en3"],
        ["rdma_en5", None, "rdma_en4"],
        ["rdma_en2", "rdma_en3", None],
    ]
    assert choose_backend("ring", "f32", [a, b, c]).devices == ()
    cut = replace(c, info=replace(c.info, thunderbolt=[port("rdma_en2", "C2", "A3")]))
    assert choose_backend("auto", "f32", [a, b, cut])[0] == "ring"
    with pytest.raises(ClusterError, match="not every pair of nodes has a Thunderbolt cable"):
        choose_backend("jaccl", "f32", [a, b, cut])
    with pytest.raises(ClusterError, match="x: no cable with RDMA"):
        choose_backend("jaccl", "f32", [a, node("x")])
    ports = [[None, "rdma_en7"], ["rdma_en8", None]]  # a hosts file's
    assert choose_backend("auto", "f32", [node("x"), node("y")], ports).devices == ports
    with pytest.raises(InputError, match="expected f32 with the jaccl backend"):
        choose_backend("auto", "bf16", [a, b, c])
    cuda = [node("a", cuda=True), node("b", cuda=True)]
    assert choose_backend("auto", "f32", cuda)[0] == "nccl"
    assert choose_backend("auto", "f32", [*cuda, node("c")])[0] == "mesh"
    with pytest.raises(ClusterError, match="c has no CUDA"):
        choose_backend("nccl", "f32", [*cuda, node("c")])


# In the form of `system_profiler SPThunderboltDataType -json` on a Mac with three ports, two used.
PROFILE = {
    "SPThunderboltDataType": [
        {
            "_name": "thunderboltusb4_bus_0",
            "device_name_key": "Mac Studio",
            "domain_uuid_key": "AAAA",
            "receptacle_1_tag": {"receptacle_id_key": "1", "link_status_key": "0x2"},
            "_items": [{"_name": "a disk"}, {"_name": "Mac", "domain_uuid_key": "BBBB"}],
        },
        {"domain_uuid_key": "CCCC", "receptacle_1_tag": {"receptacle_id_key": "2"}},
        {
            "domain_uuid_key": "DDDD",
            "receptacle_1_tag": {"receptacle_id_key": "3"},
            "_items": [{"_name": "Mac", "domain_uuid_key": "EEEE"}],
        },
    ]
}
HARDWARE = """
Hardware Port: Ethernet
Device: en0
Ethernet Address: aa:bb:cc:dd:ee:ff

Hardware Port: Thunderbolt 1
Device: en2
Ethernet Address: aa:bb:cc:dd:ee:01

Hardware Port: Thunderbolt 3
Device: en4
Ethernet Address: aa:bb:cc:dd:ee:02
"""
DEVICES = "    device     node GUID\n    ------     ------\n    rdma_en2   8005c2d1a5a50000\n"


def test_ports_are_read_from_the_output_of_macos():
    assert thunderbolt.rdma_ports(json.dumps(PROFILE), HARDWARE, DEVICES) == [
        port("rdma_en2", "AAAA", "BBBB")
    ]
    both = DEVICES + "    rdma_en4   8005c2d1a5a50001\n"
    assert len(thunderbolt.rdma_ports(json.dumps(PROFILE), HARDWARE, both)) == 2
    for other in ("", "{}", "[]", '{"SPThunderboltDataType": 3}', '{"SPThunderboltDataType": [3]}'):
        assert thunderbolt.rdma_ports(other, HARDWARE, DEVICES) == []


def test_placements_are_compared_on_the_measured_machines():
    """A slow link makes whole experts and one exchange a layer better than cutting the trunk."""
    members = [node("a", memory_bytes=32 * GB), node("b", memory_bytes=32 * GB)]
    quick, slow = ({(0, 1): Link(latency, GB)} for latency in (10e-6, 20e-3))
    plan, why = place_demo(members, links=slow)
    assert plan.trunk == "replicated"
    assert "20 ms per all-reduce, as measured" in why
    assert "10 GB/s" in why or "7 GB/s" in why
    known = measured_machines(CHECKPOINT.config, members, quick, "mesh")
    assert known.machines[0].family == "cpu"
    assert known.machines[0]["efficiency"] == 0.7, "of its family, as it was never calibrated"
    better = [node(m.name, calibration={"efficiency": 0.9, "tflops": 0.05}) for m in members]
    known = measured_machines(CHECKPOINT.config, better, quick, "ring")
    assert known.machines[0].bytes_per_s == pytest.approx(9 * GB)
    assert known.link.topology == "ring"
    assert measured_machines(CHECKPOINT.config, members, {}, "mesh") is None
    metal = {"memory_size": 64 * GB, "max_recommended_working_set_size": 48 * GB}
    mac = node("m", metal=metal, processor="Apple M2 Ultra", gpu=True, memory_bytes=64 * GB)
    known = measured_machines(CHECKPOINT.config, [mac, mac], quick, "mesh")
    assert known.machines[0].family == "apple-m1-m2"
    assert known.machines[0].memory_fraction == 0.75


HOSTS = [
    {"ssh": "one", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2", "rdma_en3"]},
    {"ssh": "two", "ips": ["10.0.0.2", "192.168.1.2"], "rdma": ["rdma_en2", None, "rdma_en3"]},
    {"ssh": "three", "ips": ["10.0.0.3"], "rdma": ["rdma_en2", "rdma_en3", None]},
]


def test_a_hosts_file_gives_the_expected_nodes_and_their_addresses(tmp_path):
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(HOSTS))
    hosts = hostsfile.read(file)
    file.write_text(json.dumps({"backend": "jaccl", "hosts": HOSTS}))
    assert hostsfile.read(file) == hosts
    hostsfile.check_local_host(hosts, ["127.0.0.1", "10.0.0.1"])
    with pytest.raises(InputError, match=r"expected this machine first, got one .10.0.0.1."):
        hostsfile.check_local_host(hosts, ["10.0.0.2"])
    assert hostsfile.expected_hosts(hosts, ["192.168.1.2"]) == "expected: three (10.0.0.3)"
    assert hostsfile.expected_hosts(hosts, ["10.0.0.3", "10.0.0.2"]) == ""
    a, b, c = (
        replace(node(n), address=address)
        for n, address in (("a", "127.0.0.1"), ("b", "10.0.0.3"), ("c", "192.168.1.2"))
    )
    members, devices = hostsfile.order_by_hosts(hosts, [a, b, c])
    assert [m.address for m in members] == ["10.0.0.1", "10.0.0.3", "10.0.0.2"]
    assert devices[1] == ["rdma_en2", None, "rdma_en3"]
    assert devices[0] == [None, "rdma_en3", "rdma_en2"]
    members, devices = hostsfile.order_by_hosts(hosts, [a, c])
    assert devices == [[None, "rdma_en2"], ["rdma_en2", None]]
    with pytest.raises(ClusterError, match=r"x .10.0.0.9. is in this cluster but not in the"):
        hostsfile.order_by_hosts(hosts, [a, replace(node("x"), address="10.0.0.9")])


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "[1]", '[{"ssh": "a"}]', '[{"ssh": "a", "ips": ["nonsense"]}]', '{"hosts": 5}',
     '[{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.1"]}]'],
)  # fmt: skip
def test_malformed_hosts_files_are_refused(tmp_path, text):
    (tmp_path / "hosts.json").write_text(text)
    with pytest.raises(InputError, match="--hosts: "):
        hostsfile.read(tmp_path / "hosts.json")


def test_nodes_are_weighted_by_speed_but_not_by_noise():
    assert speed_weights([node("a", 10 * GB), node("b", 12 * GB)]) == [1, 1]
    assert speed_weights([node("a", 20 * GB), node("b", 10.1 * GB)]) == [2, 1]
    plan, why = place_demo([node("a", 20 * GB), node("b", 10 * GB)])
    assert "node weights by speed 2:1" in why
    assert plan.bytes_of(0)["experts"] > 1.6 * plan.bytes_of(1)["experts"]


def test_nodes_are_weighted_by_memory_if_the_model_does_not_fit_by_speed():
    plan, _ = place_demo([node("a"), node("b")])
    own = plan.bytes_of(0)["total"]
    enough = estimate_memory(CHECKPOINT.config, plan, 0, EngineOptions(), "native").unshared + 4096
    fast = node("a", 60 * GB, free=enough)
    plan, why = place_demo([fast, node("b", 10 * GB, free=4 * enough)])
    assert "by memory" in why
    assert plan.bytes_of(0)["total"] < own < plan.bytes_of(1)["total"]


def test_a_model_that_does_not_fit_is_refused_with_the_node():
    with pytest.raises(PlanError, match=r"^b: rank 1 needs .* MB are available"):
        place_demo([node("a"), node("b", free=50 * 10**6)], PlacementOptions(node_weights=(1, 1)))
    metal = {"memory_size": 64 * GB, "max_recommended_working_set_size": 100 * 10**6}
    with pytest.raises(PlanError, match=r"b: .*sudo sysctl iogpu.wired_limit_mb=\d+"):
        place_demo([node("a"), node("b", metal=metal)])


def test_slow_links_are_named():
    members = [node("a"), node("b"), node("c")]
    links = {(0, 1): Link(50e-6, GB), (0, 2): Link(300e-6, 2 * GB), (1, 2): Link(40e-6, GB / 10)}
    text = describe_links(members, links)
    assert text == "links: latency at most 300 us (a to c), bandwidth at least 0.10 GB/s"
    assert "0.4 ms per all-reduce" in place_demo(members, links=links)[1]


def test_links_are_probed_and_strangers_are_not_answered():
    secret = b"s" * 16
    port = link_probe.serve_probe("127.0.0.1", secret)
    with socket.create_connection(("127.0.0.1", port), timeout=120) as stranger:
        stranger.sendall(b"x" * 16 + bytes(link_probe.PING_BYTES))
        with suppress(ConnectionResetError):  # or the end
            assert stranger.recv(100) == b""
    link = link_probe.probe_link("127.0.0.1", port, secret)
    assert 1e-6 < link.latency_s < 0.1
    assert 1e6 < link.bytes_per_s < 1e12
    with pytest.raises(ClusterError, match="cannot be reached"):
        link_probe.probe_link("127.0.0.1", port, secret)  # it answers once


def test_models_are_found_by_name(tmp_path):
    kept = tmp_path / "kept"
    (kept / "some").mkdir(parents=True)
    (kept / "org--name").mkdir()
    for folder in ("some", "org--name"):
        (kept / folder / "config.json").write_text("{}")
    assert node_info.find_model("some", [kept]) == kept / "some"
    assert node_info.find_model("/elsewhere/some", [kept]) == kept / "some"
    assert node_info.find_model("org/name", [kept]) == kept / "org--name"
    assert node_info.find_model("demo_model", []) == DEMO
    assert node_info.find_model("other", [kept]) is None


def test_checkpoints_have_different_digests(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(DEMO, copy)
    assert node_info.checkpoint_digest(copy) == node_info.checkpoint_digest(DEMO)
    (copy / "README.md").write_text("no weights")
    assert node_info.checkpoint_digest(copy) == node_info.checkpoint_digest(DEMO)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert node_info.checkpoint_digest(copy) != node_info.checkpoint_digest(DEMO)


def test_a_node_reports_what_decisions_need():
    info = NodeInfo.from_json(json.loads(json.dumps(node_info.describe_node().to_json())))
    assert info.memory_bytes > info.available_bytes > 0
    assert info.memory_bytes > node_info.available_bytes() > 0
    assert 1e8 < info.read_bytes_per_s < 1e13
    me = replace(node("a"), info=info)
    assert place_demo([me, me])[0].nodes == 2
