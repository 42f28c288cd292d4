"""A cluster of three hosts: real agents, real TLS, real sockets over a bridge, the demo model.

One cluster serves all tests, in order: from nothing to answering, then every kind of loss.
"""

import json
import os
import re
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cenacle.model.checkpoint import Checkpoint
from cluster import API, CHAT, CONTROL, JOIN, MESSAGES, SUM, UP, WORKER, Cluster, Streaming
from namespaces import Capture, unavailable_reason, wait_until

UNAVAILABLE = unavailable_reason()
pytestmark = pytest.mark.skipif(
    UNAVAILABLE is not None, reason=f"CLUSTERS OF SEVERAL HOSTS ARE NOT TESTED: {UNAVAILABLE}"
)


def is_waited_for(cluster: Cluster) -> None:
    """The head has ended: nothing of it is left, and no rank anywhere; agents wait."""
    wait_until(lambda: not cluster.a.pids(), "the end of all on the head's host", 15)
    for host in (cluster.b, cluster.c):
        wait_until(lambda: not host.pids(WORKER), "the end of all ranks", 6)  # noqa: B023
        assert host.pids(JOIN)
        assert not host.listening()
    with pytest.raises(OSError, match="refused"):
        cluster.b.connect(cluster.a.address, CONTROL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("hosts"))
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def capture(cluster) -> Iterator[Capture]:
    """All that is sent from before the first machine joins."""
    capture = Capture(cluster.network)
    try:
        yield capture
    finally:
        capture.close()


@pytest.fixture(scope="module")
def undisturbed(cluster) -> str:
    """The long answer without any fault."""
    return Streaming(cluster).end()


def test_one_command_per_host_starts_a_cluster(cluster, capture):
    line = cluster.up().split()
    assert line[:2] == ["join", f"{cluster.a.address}:{CONTROL}"]
    cluster.token = line[3]
    wrong = cluster.b.run("join", line[1], "--token", "0000-0000-0000-0000")
    assert wrong.returncode == 5
    assert "the token is wrong" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    cluster.join(cluster.b, *line[1:], "--models", "models")
    wait_until(lambda: "b is in the cluster" in cluster.b.log.read_text(), "b")
    # No address: the head is found by its name.
    cluster.join(cluster.c, *line[2:], "--models", "other/place")
    health = cluster.wait_until_healthy()
    log = cluster.a.log.read_text()
    assert "verification: passed" in log, log
    assert log.index("verification: first a single node") < log.index("verification: passed")
    assert f"found a at {cluster.a.address}:{CONTROL}" in cluster.c.log.read_text()
    assert health["nodes"] == 3
    assert cluster.answer() == "42"
    status = cluster.status(cluster.b)  # from any machine
    assert (status["phase"], status["model"]) == ("running", "answers")
    assert {n["name"]: (n["rank"], n["address"]) for n in status["nodes"]} == {
        "a": (0, cluster.a.address),
        "b": (1, cluster.b.address),
        "c": (2, cluster.c.address),
    }
    assert "links: " in status["backend_reason"]
    for rank in cluster.ask("/cluster")[1]["ranks"]:
        assert rank["link"]["latency_s"] > 0
        assert rank["link"]["bytes_per_s"] > 0
    for host in cluster.network.hosts:
        assert len(host.pids(WORKER)) == 1
        for file in (host.folder / ".config" / "cenacle" / "cluster").iterdir():
            if file.suffix in (".key", ".json"):
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_hosts_listen_on_their_own_address_only(cluster):
    for host in (cluster.b, cluster.c):
        assert {address for address, _ in host.listening()} <= {host.address}
    assert set(cluster.a.listening()) == {("0.0.0.0", CONTROL), ("127.0.0.1", API)}


def test_nothing_secret_is_in_clear_on_the_control_channel(cluster, capture, undisturbed):
    seen = capture.payloads()
    assert b"cenacle-mesh" in seen, "the exchange is in clear, and captured"
    control = capture.payloads(CONTROL)
    assert len(control) > 100_000
    letters = cluster.token.replace("-", "").encode()
    words = (SUM.encode(), b'"step"', b'"tokens"', b'"hello"', b"PRIVATE", b"CERTIFICATE")
    for word in (cluster.token.encode(), letters, *words, b'"secret"', b"head.cenacle"):
        name = word.decode()
        # The name of the server is asked for in TLS's greeting, as anywhere.
        assert (word in control) == (name == "head.cenacle"), name
    assert SUM.encode() not in seen


def test_garbage_on_every_port_does_no_harm(cluster, undisturbed):
    stream = Streaming(cluster).wait_for_start()
    socks = []
    for host in cluster.network.hosts:
        for address, port in host.listening():
            if address == "127.0.0.1":
                continue
            for data in (b"\0" * 5000, b"GET / HTTP/1.1\r\n\r\n", os.urandom(3000)):
                caller = cluster.c if host is not cluster.c else cluster.b
                sock = caller.connect(host.address, port)
                socks.append(sock)
                with suppress(OSError):
                    sock.sendall(data)
    assert len(socks) >= 3
    assert stream.end() == undisturbed
    for sock in socks:
        sock.close()


def test_a_killed_rank_costs_no_answer(cluster, undisturbed):
    stream = Streaming(cluster).wait_for_start()
    (killed,) = cluster.c.kill(WORKER)
    assert stream.end() == undisturbed
    assert f"rank 2 on c (process {killed}) was killed by SIGKILL" in cluster.a.log.read_text()
    assert cluster.wait_until_healthy()["nodes"] == 3
    print(f"a rank killed: longest pause {stream.longest_pause_s:.1f} s")


def test_the_rank_of_a_killed_agent_ends(cluster, undisturbed):
    stream = Streaming(cluster).wait_for_start()
    began = time.monotonic()
    cluster.b.kill(JOIN)
    wait_until(lambda: not cluster.b.pids(), "the end of its rank", 60)
    assert not any(cluster.b.temporary_dir.iterdir())
    wait_until(lambda: not cluster.nodes()["b"]["connected"], "that it is missed", 60)
    assert time.monotonic() - began < 60
    assert stream.end() == undisturbed  # on two machines
    assert cluster.wait_until_healthy()["nodes"] == 2
    print(f"an agent killed: longest pause {stream.longest_pause_s:.1f} s")


def test_a_returning_node_is_added_between_steps(cluster, undisturbed):
    streams: list[Streaming] = []
    back = threading.Event()

    def ask() -> None:
        while not back.is_set():
            streams.append(mine := Streaming(cluster))
            mine.wait()

    asking = [threading.Thread(target=ask) for _ in range(2)]  # one of them is always answered
    for thread in asking:
        thread.start()
    try:
        cluster.join(cluster.b)  # no token, no address
        wait_until(lambda: cluster.ask("/health")[1].get("nodes") == 3, "a group of three", 40)
    finally:
        back.set()
        for thread in asking:
            thread.join()
    assert [s.end() for s in streams] == [undisturbed] * len(streams)
    paused = max(s.longest_pause_s for s in streams)
    print(f"a machine taken in: longest pause {paused:.1f} s")
    assert paused > 1, "a stream went on in another group than it began in"
    why = "b has returned: the group is formed again with b"
    assert why in cluster.a.log.read_text()
    status = cluster.status(cluster.c)
    assert status["reformed"] == f"re-formed: {why}"
    assert [n["reason"] for n in status["nodes"]] == ["", "", ""]


def test_an_unplugged_cable_is_noticed_on_both_sides(cluster, undisturbed):
    stream = Streaming(cluster).wait_for_start()
    (rank,) = cluster.c.pids(WORKER)
    began = time.monotonic()
    cluster.network.link(cluster.c, "down")
    wait_until(
        lambda: "c has sent no heartbeat" in cluster.a.log.read_text(), "that it is missed", 6
    )
    missed = time.monotonic() - began
    wait_until(lambda: rank not in cluster.c.pids(), "the end of its rank", 6)
    assert stream.end() == undisturbed
    print(f"cable pulled: missed after {missed:.1f} s, pause {stream.longest_pause_s:.1f} s")
    assert missed < 5
    assert "node c (10.99.0.3) has sent no heartbeat for 4 s" in cluster.a.log.read_text()
    cluster.network.link(cluster.c, "up")
    wait_until(lambda: cluster.nodes()["c"]["connected"], "c again")  # by itself


def test_two_heads_do_not_accept_each_others_nodes(cluster):
    again = cluster.a.run("up", "here/answers", "--port", "0")
    assert again.returncode == 2
    assert "the head of this cluster is already running (process " in again.stderr
    before = len(cluster.b.log.read_text())
    its = {"CENACLE_HOME": str(cluster.b.folder / "other")}
    words = ("up", "models/answers", "--port", "0", "--name", "a")  # its name, too
    other = cluster.b.start(*words, **its)
    line = wait_until(
        lambda: re.search(r"cenacle join (\S+) --token (\S+)", cluster.b.log.read_text()[before:]),
        "the line of the other head",
    )
    where, token = line.groups()
    assert where == f"{cluster.b.address}:{CONTROL}"
    called = cluster.c.run("join", where, "--token", token)
    assert called.returncode == 2
    assert "this machine's agent is already running" in called.stderr
    other.terminate()
    other.wait(120)
    assert cluster.status(cluster.c)["model"] == "answers"
    assert cluster.answer() == "42"


def flip(folder: Path) -> None:
    """Change one bit of one weight; again: as it was."""
    tensors = Checkpoint.open(folder).tensors
    tensor = next(t for n, t in tensors.items() if "experts" not in n and t.start > 3 << 20)
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start + 400)
        byte = file.read(1)[0]
        file.seek(tensor.start + 400)
        file.write(bytes([byte ^ 1]))


def test_a_head_that_is_ended_tells_its_clients_and_agents_wait_for_it(cluster):
    before = cluster.status(cluster.b)["group_id"]
    streams = [Streaming(cluster, 900, path, temperature=1.0) for path in (CHAT, MESSAGES)]
    for stream in streams:
        stream.wait_for_start()
    supervisor, _ = sorted(cluster.a.pids(UP))  # the one that was started first
    os.kill(supervisor, signal.SIGTERM)
    for stream in streams:
        assert stream.wait()
        assert stream.error == "the server is shutting down"
    assert streams[0].last["error"]["type"] == "server_error"
    assert streams[1].last["type"] == "error"
    is_waited_for(cluster)
    # Meanwhile a bit of c's copy has changed: found, named, and not served.
    damaged = cluster.c.folder / "other/place/answers"
    flip(damaged)
    up = ("up", "here/answers", "-n", "3", "--port", "0", "--name", "a")
    refused = cluster.a.run(*up, "--verify", "--trunk", "replicated")
    flip(damaged)
    assert refused.returncode == 5, refused.stderr
    assert "verification: c does not hold the checkpoint's " in refused.stderr
    assert "The model is not served" in refused.stderr
    assert "Traceback" not in refused.stderr
    is_waited_for(cluster)
    cluster.up()
    assert cluster.wait_until_healthy()["nodes"] == 3
    assert cluster.status(cluster.b)["group_id"] > before
    assert cluster.answer() == "42"


def test_agents_wait_for_a_killed_head_and_need_no_token(cluster):
    stream = Streaming(cluster, 600).wait_for_start()
    cluster.a.kill(UP)  # not its rank, which notices
    assert stream.wait()
    assert stream.truncated
    assert not stream.error
    is_waited_for(cluster)
    hosts = [{"ssh": h.letter, "ips": [h.address], "rdma": []} for h in cluster.members]
    (cluster.a.folder / "hosts.json").write_text(json.dumps(hosts))
    wrong = cluster.b.run("up", "models/answers", "--hosts", "../a/hosts.json")
    assert wrong.returncode == 2
    assert "expected this machine first" in wrong.stderr
    cluster.up("--hosts", "hosts.json")
    assert cluster.wait_until_healthy()["nodes"] == 3
    assert cluster.answer() == "42"


def test_all_nodes_are_diagnosed_from_any(cluster):
    done = cluster.b.run("doctor", "--cluster", "--json")
    nodes = json.loads(done.stdout)["nodes"]
    assert set(nodes) == {"a", "b", "c"}
    for name in "bc":
        assert any("The other nodes are reached over eth0" in f["message"] for f in nodes[name]), (
            nodes
        )


def test_the_others_continue_without_a_dead_host(cluster, undisturbed):
    stream = Streaming(cluster).wait_for_start()
    cluster.c.kill()
    assert stream.end() == undisturbed
    assert cluster.wait_until_healthy()["nodes"] == 2
    print(f"a host killed: longest pause {stream.longest_pause_s:.1f} s")
    cluster.join(cluster.c)
    wait_until(lambda: cluster.nodes()["c"]["connected"], "c again")


def test_nothing_is_left_at_the_end(cluster):
    done = cluster.c.run("leave")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: not cluster.c.pids(), "the end of c's agent", 60)
    assert not list((cluster.c.folder / ".config/cenacle/cluster").glob("node.*"))
    assert "not part of a cluster" in cluster.c.run("status").stderr
    assert cluster.b.run("down").returncode == 2
    assert cluster.a.run("down").returncode == 0
    for host in cluster.network.hosts:
        wait_until(lambda: not host.pids(), f"the end of all that ran on {host.letter}", 10)  # noqa: B023
        assert not any(host.temporary_dir.iterdir())
    assert cluster.ask("/health")[0] == 0
    logs = cluster.logs()
    assert "Exception in callback" not in logs
    assert "never retrieved" not in logs
    assert SUM not in logs
    with pytest.raises(OSError, match="refused"):
        cluster.b.connect(cluster.a.address, CONTROL)
