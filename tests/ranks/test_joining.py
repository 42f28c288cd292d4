"""Joining a cluster on one machine: real sockets, real TLS, real agents; no ranks are started.

Who may come in and who may not; what strangers can do to the head, which is nothing.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cenacle
from cenacle.cli.main import make_app
from cenacle.cluster import client, membership, messages, node_info, service_unit
from cenacle.cluster.agent import Agent
from cenacle.cluster.client import pair_with_head, query_head
from cenacle.cluster.formation import Cluster, ClusterModel
from cenacle.cluster.head import Head
from cenacle.cluster.placement import PlacementOptions
from cenacle.cluster.security import identity as identities
from cenacle.cluster.security import pairing
from cenacle.core.link import Link
from cenacle.core.plan import Plan
from cenacle.engine.memory import estimate_memory
from cenacle.engine.options import EngineOptions
from cenacle.errors import CheckpointError, ClusterError, InputError, NodesMissing
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.spec_reader import read_model_spec
from cenacle.ranks.channel import Channel
from cenacle.ranks.ranks import Epoch
from cenacle.verification import Verification
from support.program import run_here

HOST = "127.0.0.1"
DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    head = Head(tmp_path_factory.mktemp("head"), HOST, 0, "one")
    yield head
    head.close()


def until(condition, what, seconds=60.0):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return found


@contextmanager
def agent(identity, port, *folders):
    """A running agent; what it said, and in the end why it ended."""
    said, ended = [], []
    loop = asyncio.new_event_loop()
    task = loop.create_task(Agent(identity, HOST, port, list(folders), said.append).run())

    def run():
        try:
            ended.append(loop.run_until_complete(task))
        except (ClusterError, asyncio.CancelledError) as error:
            ended.append(error)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield said, ended
    finally:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(task.cancel)
        thread.join(120)


def query(identity, port, name, node="", timeout_s=10.0):
    return query_head(identity, HOST, port, messages.Query(name, node), timeout_s)


def names(head):
    return {n["name"]: n for n in head.status()["nodes"]}


# Closed, or reset when something was on its way.
LOST = r"(has lost its agent|lost its connection)"


def test_a_node_pairs_once_and_is_a_member_from_then_on(head, tmp_path):
    identity = pair_with_head(tmp_path, HOST, head.port, head.invite(), "two")
    assert identity.load_settings()["name"] == "two"
    assert not names(head)["two"]["connected"]
    with agent(identity, head.port) as (said, _):
        node = until(lambda: names(head)["two"]["connected"] and names(head)["two"], "two")
        assert until(lambda: said, "a word") == [f"two is in the cluster of {HOST}:{head.port}"]
        assert node["address"] == HOST
        assert node["memory_bytes"] > node["available_bytes"] > 0
        status, own = query(identity, head.port, "status"), head.status()
        for node in (*status["nodes"], *own["nodes"]):  # what changes between two questions
            node.pop("heartbeat_age_s", None)
            node.pop("available_bytes", None)
        assert status["nodes"] == own["nodes"]
        with agent(identity, head.port) as (other, _):  # a copied folder
            until(lambda: other, "a word")
            assert "is already connected" in other[0]
    until(lambda: not names(head)["two"]["connected"], "the end of two")
    assert re.match(LOST, names(head)["two"]["reason"])


@pytest.mark.parametrize("token", ["0000-0000-0000-0000", "nonsense"])
def test_a_wrong_token_is_refused(head, tmp_path, token):
    before = head.status()["nodes"]
    with pytest.raises((ClusterError, InputError), match="token"):
        pair_with_head(tmp_path, HOST, head.port, token, "bad")
    assert head.status()["nodes"] == before
    assert not list(tmp_path.iterdir())


def test_an_expired_token_is_refused(tmp_path):
    head = Head(tmp_path / "head", HOST, 0, "one", token_life_s=0.0)
    try:
        with pytest.raises(
            ClusterError, match=r"expired; create a new one with `cenacle nodes --invite`"
        ):
            pair_with_head(tmp_path / "node", HOST, head.port, head.invite(), "late")
        assert not (tmp_path / "node").exists()
    finally:
        head.close()


def test_a_man_in_the_middle_learns_nothing_and_is_noticed(head, tmp_path):
    """A man in the middle with a certificate of his own passes every message on."""
    other = identities.Authority(tmp_path / "other").identity.server_tls_context()
    other.verify_mode = ssl.CERT_NONE
    listener = socket.create_server((HOST, 0))
    passed = []

    def between():
        plain, _ = listener.accept()
        near = Channel(other.wrap_socket(plain, server_side=True), 5)
        sock = socket.create_connection((HOST, head.port))
        far = Channel(pairing.unverified_tls_context().wrap_socket(sock), 5)
        with suppress(ClusterError):
            for a, b in ((near, far), (far, near), (near, far), (far, near)):
                passed.append(a.receive())
                b.send(passed[-1])
        near.close()
        far.close()

    thread = threading.Thread(target=between)
    thread.start()
    before, token = head.status()["nodes"], head.invite()
    with pytest.raises(ClusterError, match="the token is wrong"):
        pair_with_head(tmp_path / "node", HOST, listener.getsockname()[1], token, "victim")
    thread.join()
    listener.close()
    assert len(passed) == 4
    assert token.replace("-", "") not in json.dumps(passed).replace("-", "")
    assert head.status()["nodes"] == before
    pair_with_head(
        tmp_path / "node", HOST, head.port, token, f"victim{len(before)}"
    )  # it is still good


def test_a_head_that_does_not_know_the_token_is_refused(tmp_path):
    """It says yes to everyone."""
    authority = identities.Authority(tmp_path / "other")
    server = authority.identity.server_tls_context()
    listener = socket.create_server((HOST, 0))

    def yes():
        plain, _ = listener.accept()
        channel = Channel(server.wrap_socket(plain, server_side=True), 5)
        channel.receive()
        channel.send(messages.PairChallenge(pairing.encode(bytes(16))).to_json())
        request = json.loads(pairing.decode(channel.receive()["payload"]))
        certificate = authority.sign(request["certificate_request"].encode(), "x").decode()
        payload = json.dumps(messages.JoinGrant(certificate, "x", "x").to_json()).encode()
        result = messages.PairResult(pairing.encode(payload), pairing.encode(bytes(32)))
        channel.send(result.to_json())
        channel.close()

    thread = threading.Thread(target=yes)
    thread.start()
    with pytest.raises(ClusterError, match="does not recognize this token"):
        pair_with_head(
            tmp_path / "n", HOST, listener.getsockname()[1], pairing.new_token(), "victim"
        )
    thread.join()
    listener.close()
    assert not (tmp_path / "n").exists()


def test_a_node_of_another_cluster_is_refused_with_the_reason(head, tmp_path):
    other = Head(tmp_path / "other", HOST, 0, "one")
    try:
        theirs = pair_with_head(tmp_path / "n", HOST, other.port, other.invite(), "n")
        with pytest.raises(ClusterError, match="not the head of this machine's cluster"):
            query(theirs, head.port, "status")
        with agent(theirs, head.port) as (said, _):
            until(lambda: said, "a word")
            assert "not the head of this node's cluster" in said[0]
        # One that does not check whom it calls gets no further.
        careless = pairing.unverified_tls_context()
        careless.load_cert_chain(theirs.certificate, theirs.key)
        raw = socket.create_connection((HOST, head.port), timeout=120)
        channel = Channel(careless.wrap_socket(raw), 5)
        with suppress(ClusterError):
            channel.send({"type": "query", "name": "status"})
        with pytest.raises(ClusterError, match=r"alert|lost|closed"):
            channel.receive()
        channel.close()
    finally:
        other.close()
    assert "n" not in names(head)


GARBAGE = [
    b"",
    b"\0" * 1000,
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    os.urandom(5000),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(40),  # a torn TLS greeting
]
FRAMES = [
    struct.pack(">I", 2**31) + b"x",
    struct.pack(">I", 5) + b"nope!",
    struct.pack(">I", 2) + b"[]",
    struct.pack(">I", 2) + b"{}",
    struct.pack(">I", 16000) + b"[" * 16000,
    *(
        struct.pack(">I", len(m)) + m
        for m in (
            b'{"type":"agent","versions":{},"group_id":0,"info":{}}',
            b'{"type":"relay","name":"x"}',
            b'{"type":"query","name":"down"}',
            b'{"type":"query","name":"status"}',
            b'{"type":"pair"}',
            b'{"type":"pair","nonce":5}',
            b'{"type":"nonsense"}',
        )
    ),
]


def test_strangers_do_no_harm(head, tmp_path):
    before = head.status()["nodes"]
    socks = []
    for data in GARBAGE:
        socks.append(socket.create_connection((HOST, head.port), timeout=120))
        with suppress(OSError):
            socks[-1].sendall(data)
    answers = []
    for data in FRAMES:
        raw = socket.create_connection((HOST, head.port), timeout=120)
        sock = pairing.unverified_tls_context().wrap_socket(raw)
        socks.append(sock)
        with suppress(OSError):
            sock.sendall(data)
        answers.append(sock)
    # While all of them hang about, a machine joins.
    identity = pair_with_head(tmp_path, HOST, head.port, head.invite(), f"good{len(before)}")
    assert query(identity, head.port, "status")["phase"] == "idle"
    said = []
    for sock in answers:
        with suppress(OSError):
            said.append(sock.recv(4096))
    assert not any(b'"nodes"' in s for s in said)
    # Who speaks the language without a certificate is told what to do.
    assert sum(b"not part of this cluster: join it with a token" in s for s in said) == 6
    for sock in socks:
        sock.close()
    assert len(head.status()["nodes"]) == len(before) + 1


@contextmanager
def as_agent(head, identity):
    """A connection of a node that sends what it likes."""
    raw = socket.create_connection((HOST, head.port), timeout=120)
    context = identity.client_tls_context()
    sock = context.wrap_socket(raw, server_hostname=identities.SERVER_NAME)
    channel = Channel(sock, 5)
    try:
        yield channel
    finally:
        channel.close()


def greet(channel, **changes):
    info = messages.UNKNOWN_NODE.to_json() | changes
    channel.send(messages.AgentHello(node_info.versions(), 0, info).to_json())


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"type": "heartbeat", "available_bytes": -3}, "heartbeat.available_bytes: expected 0 to"),
        ({"type": "heartbeat", "more": 1}, "heartbeat.more: unknown field"),
        ({"type": "rank_exited", "group_id": 1}, "rank_exited.rank: missing"),
        ({"type": "order_result", "id": "x"}, "order_result.id: expected an integer, got 'x'"),
        (
            {"type": "rank_exited", "group_id": 1, "rank": 1, "pid": 10**99, "reason": ""},
            "rank_exited.pid: expected an integer of 64 bits",
        ),
        ({"type": "heartbeat", "available_bytes": float("inf")}, "heartbeat.available_bytes:"),
        ({"type": "agent"}, "type: expected heartbeat, order_result, rank_exited, leaving, got"),
    ],
)
def test_a_malformed_message_costs_its_own_node_only(head, tmp_path, message, problem):
    name = f"wrong{len(head.status()['nodes'])}"
    identity = pair_with_head(tmp_path, HOST, head.port, head.invite(), name)
    with as_agent(head, identity) as channel:
        greet(channel)
        assert channel.receive() == {"type": "welcome", "name": name}
        until(lambda: names(head)[name]["connected"], name)
        channel.send(message)
        until(lambda: not names(head)[name]["connected"], "its loss")
    assert names(head)[name]["reason"].startswith(f"sent an invalid message ({problem}")
    assert query(identity, head.port, "status")["phase"] == "idle"


def test_a_node_that_describes_itself_wrongly_is_told_so(head, tmp_path):
    identity = pair_with_head(tmp_path, HOST, head.port, head.invite(), "vague")
    for changes, problem in (
        ({"memory_bytes": "much"}, "agent.info.memory_bytes: expected an integer, got 'much'"),
        ({"metal": 3}, "agent.info.metal: expected an object, got 3"),
        ({"metal": {}}, "info.metal.max_recommended_working_set_size: expected bytes, got None"),
        ({"read_bytes_per_s": 0}, "agent.info.read_bytes_per_s: expected"),
        ({"available_bytes": 10**30}, "agent.info.available_bytes: expected"),
        ({"memory_bytes": 2**63}, "agent.info.memory_bytes: expected"),
        ({"calibration": {"tflops": 0}}, "agent.info.calibration.tflops: expected"),
        ({"calibration": {"tflops": float("nan")}}, "agent.info.calibration.tflops: expected"),
        ({"processor": "\x1b[2Jevil"}, "agent.info.processor: expected at most 500 printable"),
        ({"thunderbolt": [{"\n": ""}]}, "agent.info.thunderbolt[0] (a key): expected"),
    ):
        with as_agent(head, identity) as channel:
            greet(channel, **changes)
            answer = channel.receive()
            assert answer["type"] == "rejected"
            assert answer["error"]["message"].startswith(problem)
            assert not names(head)["vague"]["connected"]


@pytest.mark.parametrize("group_id", [2**33, 2**63])
def test_a_node_cannot_use_up_the_ids_of_groups(head, tmp_path, group_id):
    name = f"ahead{group_id}"
    identity = pair_with_head(tmp_path, HOST, head.port, head.invite(), name)
    info = messages.UNKNOWN_NODE.to_json()
    with as_agent(head, identity) as channel:
        channel.send(messages.AgentHello(node_info.versions(), group_id, info).to_json())
        answer = channel.receive()
    assert answer["error"]["message"].startswith("agent.group_id: expected at most 4294967296")
    assert head.status()["group_id"] < 2**33


def test_an_agent_speaks_for_its_own_ranks_only(tmp_path):
    head = Head(tmp_path / "head", HOST, 0, "one")
    try:
        ended = threading.Event()
        of_two = pair_with_head(tmp_path / "two", HOST, head.port, head.invite(), "two")
        of_three = pair_with_head(tmp_path / "three", HOST, head.port, head.invite(), "three")
        with (
            as_agent(head, head.identity) as one,
            as_agent(head, of_two) as two,
            as_agent(head, of_three) as three,
        ):
            for channel in (one, two, three):
                greet(channel)
                channel.receive()

            def send_heartbeats():
                while not ended.wait(0.2):
                    for channel in (one, two, three):
                        with suppress(ClusterError):
                            channel.send({"type": "heartbeat"})

            threading.Thread(target=send_heartbeats, daemon=True).start()
            until(lambda: all(n["connected"] for n in names(head).values()), "all three")
            head._call(lambda: head._dispatch(membership.GroupRequested(2)))
            group = head._groups.get(timeout=120)
            assert group.members[0].name == "one"
            mine, other = {"two": (two, three), "three": (three, two)}[group.members[1].name]
            gone = {"type": "rank_exited", "group_id": group.group_id, "pid": 9, "reason": "x\x1b"}
            mine.send({**gone, "rank": 1, "group_id": 77})  # of a group that is long gone
            other.send({**gone, "rank": 1})
            lost = {"two", "three"} - {group.members[1].name}
            until(lambda: not all(names(head)[n]["connected"] for n in lost), "its loss")
            reason = "sent an invalid message (rank_exited.rank: rank 1 runs on another node)"
            assert [names(head)[n]["reason"] for n in lost] == [reason]
            assert head.failure_reason(group, 1) is None
            mine.send({**gone, "rank": 1})
            until(lambda: head.failure_reason(group, 1), "the failure")
            assert head.failure_reason(group, 1).endswith(r"(process 9) x\x1b")
    finally:
        ended.set()
        head.close()


def test_a_token_can_be_revoked_and_what_joined_with_it_removed(head, tmp_path):
    first, second = head.invite(), head.invite()
    identity = pair_with_head(tmp_path / "a", HOST, head.port, first, "guest")
    pair_with_head(tmp_path / "b", HOST, head.port, second, "friend")
    assert head.revoke(first.lower()) == {"tokens": 1, "stay": ["guest"]}
    with pytest.raises(ClusterError):
        pair_with_head(tmp_path / "c", HOST, head.port, first, "late")
    with pytest.raises(InputError, match="did not issue it"):
        head.revoke(first)
    assert query(identity, head.port, "status")["phase"]
    answer = head.revoke("", remove_nodes=True)
    assert answer["tokens"] >= 1
    assert "friend" in answer["removed"]
    until(lambda: "friend" not in names(head), "its removal")
    assert "guest" in names(head)
    with pytest.raises(ClusterError):
        pair_with_head(tmp_path / "d", HOST, head.port, second, "late")


def test_the_command_revokes_a_token_of_a_machine_that_has_joined(tmp_path):
    def cenacle(home, *arguments, timeout=120):
        return subprocess.run(
            [sys.executable, "-m", "cenacle", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "CENACLE_HOME": str(tmp_path / home)},
        )

    def nodes(home, *arguments):
        return run_here("nodes", *arguments, home=tmp_path / home)

    head = Head(tmp_path / "one" / "cluster", HOST, 0, "one")
    joined = None
    try:
        invited = cenacle("one", "nodes", "--invite")
        token = re.search(r"--token (\S+)", invited.stdout)[1]
        join = ("join", f"{HOST}:{head.port}", "--token", token, "--name")
        joined = subprocess.Popen(
            [sys.executable, "-m", "cenacle", *join, "two"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CENACLE_HOME": str(tmp_path / "two")},
        )
        until(lambda: "two" in names(head) and names(head)["two"]["connected"], "two", 120)

        refused = nodes("two", "--revoke", token)
        assert refused.returncode != 0
        assert "head" in refused.stderr
        kept = nodes("one", "--revoke", token.lower())
        assert kept.stderr == (
            "revoked 1 valid token\nstill in the cluster: two; to remove one, run "
            "`cenacle nodes --remove NAME`\n"
        )
        assert names(head)["two"]["connected"]
        again = nodes("one", "--revoke", token)
        assert again.returncode == 2
        assert "did not issue it" in again.stderr
        late = cenacle("three", *join, "three")
        assert late.returncode != 0
        assert "token" in late.stderr
        assert "three" not in names(head)

        second = re.search(r"--token (\S+)", nodes("one", "--invite").stdout)[1]
        pair_with_head(tmp_path / "four", HOST, head.port, second, "four")
        gone = nodes("one", "--revoke", "all", "--remove-joined")
        assert gone.stderr == "revoked 1 valid token\nremoved from the cluster: four\n"
        until(lambda: "four" not in names(head), "the removal of four")
        assert nodes("one", "--remove", "two").returncode == 0
        assert joined.wait(300) is not None
    finally:
        if joined is not None:
            joined.kill()
            joined.communicate()
        head.close()


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ('{"group_id": Infinity, "nodes": {"%s": "two"}}', ["two"]),
        (f'{{"group_id": {10**200}, "nodes": {{"a": "two"}}}}', ["two"]),
        ('{"group_id": 7, "nodes": {"a": "two", "b": 3, "c": "\\u001b[2J"}}', ["two"]),
        ('{"group_id": 7, "nodes": []}', []),
        ('{"nodes": {"a": "two"}}', ["two"]),
        ("[" * 100_000, []),
        ("\x00\x01", []),
        ("", []),
    ],
)
def test_a_damaged_roster_is_set_aside_and_heals(tmp_path, caplog, content, kept):
    folder = tmp_path / "head"
    Head(folder, HOST, 0, "one").close()
    (folder / "roster.json").write_text(content)
    (folder / "roster.json").chmod(0o600)
    with caplog.at_level("WARNING"):
        head = Head(folder, HOST, 0, "one")
    try:
        assert [n for n in names(head) if n != "one"] == kept
        assert "was damaged" in caplog.text
        assert head.status()["group_id"] > 6
        assert [p.read_text() for p in folder.glob("roster.json.damaged-*")] == [content]
        pair_with_head(tmp_path / "new", HOST, head.port, head.invite(), "new")
    finally:
        head.close()
    caplog.clear()
    Head(folder, HOST, 0, "one").close()
    assert "was damaged" not in caplog.text


def test_a_wrong_result_of_an_order_is_an_error_that_names_the_node(head, tmp_path):
    identity = pair_with_head(tmp_path, HOST, head.port, head.invite(), "liar")
    with as_agent(head, identity) as channel:
        greet(channel)
        until(lambda: names(head)["liar"]["connected"], "liar")
        node = next(n for n in head._state.nodes.values() if n.name == "liar")

        def answer():
            while (order := channel.receive())["type"] != "order":
                pass
            channel.send(messages.OrderResult(order["id"], {"ports": [0]}).to_json())

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(
            ClusterError, match=r"liar sent an invalid .*find_ports\.result"
        ) as error:
            head.send_order(node, messages.FindPorts(HOST, 1))
        thread.join()
        assert error.value.node_id == node.id


def test_only_the_head_may_end_the_cluster_or_invite(head, tmp_path):
    identity = pair_with_head(tmp_path, HOST, head.port, head.invite(), "curious")
    for name in ("down", "invite", "remove"):
        with pytest.raises(ClusterError, match="only allowed on the head"):
            query(identity, head.port, name, "one")
    with pytest.raises(ClusterError, match=r"query\.name: expected status, .*, got 'nonsense'"):
        query(identity, head.port, "nonsense")
    assert not head.shutdown_requested.is_set()
    token = query(head.identity, head.port, "invite")["token"]
    assert pairing.read_token(token) == token
    with pytest.raises(InputError, match=r"expected one of .*curious.*, got nobody"):
        query(head.identity, head.port, "remove", "nobody")


def test_a_node_that_left_or_was_removed_needs_a_new_token(head, tmp_path):
    for way in ("leave", "remove"):
        identity = pair_with_head(tmp_path / way, HOST, head.port, head.invite(), way)
        with agent(identity, head.port) as (_, ended):
            until(lambda: names(head)[way]["connected"], way)  # noqa: B023
            who = identity if way == "leave" else head.identity
            assert query(who, head.port, way, way)["removed"] == way
            until(lambda: ended, "the agent's end")
            assert ended == ["the node was removed from the cluster"]
        until(lambda: way not in names(head), "the end of its name")  # noqa: B023
        with pytest.raises(ClusterError, match="was removed from this cluster"):
            query(identity, head.port, "status")


def test_other_versions_are_explained(head, tmp_path, monkeypatch):
    identity = pair_with_head(tmp_path, HOST, head.port, head.invite(), "older")
    versions = {"cenacle": "0.0.1", "mlx": "0.1", "mlx_lm": "0.32.2"}
    monkeypatch.setattr("cenacle.cluster.agent.node_info.versions", lambda: versions)
    with agent(identity, head.port) as (_, ended):
        until(lambda: ended, "a refusal")
    assert "cenacle 0.0.1, expected" in str(ended[0])
    assert "pip install cenacle==" in str(ended[0])


def test_orders_to_a_missing_node_fail_at_once(head):
    before = time.monotonic()
    from cenacle.cluster.membership import Node

    with pytest.raises(ClusterError, match="was removed") as caught:
        head.send_order(Node("x", "gone"), messages.FindPorts(HOST, 1))
    assert caught.value.node_id == "x"
    assert time.monotonic() - before < 60


def test_a_head_keeps_its_roster_and_runs_once(tmp_path):
    head = Head(tmp_path / "h", HOST, 0, "one")
    port = head.port
    identity = pair_with_head(tmp_path / "n", HOST, port, head.invite(), "two")
    with agent(identity, port) as (said, _):
        until(lambda: names(head)["two"]["connected"], "two")
        with pytest.raises(InputError, match=f"already running .process {os.getpid()}"):
            Head(tmp_path / "h", HOST, 0, "one")
        head.close()
        until(lambda: any("waiting for it" in s for s in said), "that it is missed")
        head = Head(tmp_path / "h", HOST, port, "one")
        until(lambda: names(head).get("two", {}).get("connected"), "two again")  # needs no token
        head.close()
    assert "does not answer" in said[1]
    assert not any("Errno" in s for s in said)


def test_a_head_that_ends_reports_no_lost_agent(tmp_path, caplog):
    head = Head(tmp_path, HOST, 0, "one")
    try:
        for said in ("one has lost its agent", ""):
            with agent(head.identity, head.port):
                until(lambda: names(head)["one"]["connected"], "the agent")
                if not said:
                    head.expect_disconnections()
            until(lambda: not names(head)["one"]["connected"], "its end")
            reported = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
            assert reported == [said] * bool(said)
            caplog.clear()
    finally:
        head.close()


def test_missing_nodes_are_waited_for_until_a_deadline(tmp_path):
    waits, said = [], []

    @contextmanager
    def note(describe):
        waits.append(describe)
        yield

    head = Head(tmp_path / "h", HOST, 0, "one")
    try:
        two = pair_with_head(tmp_path / "n", HOST, head.port, head.invite(), "two")
        cluster = Cluster(head, 2, said.append, wait_s=0.2, while_waiting=note)
        model = ClusterModel(
            DEMO.name, Checkpoint.open(DEMO), PlacementOptions(), EngineOptions(), "native"
        )
        with agent(head.identity, head.port):
            until(lambda: names(head)["one"]["connected"], "the head's own node")
            missing = "1 of 2 nodes are available (one): two has not connected yet"
            with pytest.raises(NodesMissing, match=re.escape(missing) + "; start the missing"):
                cluster.form(model)
            assert (said, waits[0]()) == ([missing], missing)
            assert head.status()["phase"] == "idle"
            with agent(two, head.port):
                until(lambda: names(head)["two"]["connected"], "two")
                assert cluster.form(model).group.group_id == 1
    finally:
        head.close()


def test_a_model_that_does_not_fit_on_the_remaining_nodes_waits(tmp_path, monkeypatch):
    """Each of two machines has room for half of the demo model, not for all of it."""
    checkpoint = Checkpoint.open(DEMO)
    spec, options = read_model_spec(checkpoint), EngineOptions()
    half, whole = (
        estimate_memory(checkpoint.config, Plan.sliced(spec, n), 0, options, "native").unshared
        for n in (2, 1)
    )
    room = (half + whole) // 2
    monkeypatch.setattr("cenacle.cluster.node_info.available_bytes", lambda: room)
    said, told = [], []
    head = Head(tmp_path / "h", HOST, 0, "one")
    try:
        two = pair_with_head(tmp_path / "n", HOST, head.port, head.invite(), "two")
        cluster = Cluster(head, 2, said.append)
        model = ClusterModel(DEMO.name, checkpoint, PlacementOptions("sliced"), options, "native")
        with agent(head.identity, head.port):
            with agent(two, head.port):
                assert cluster.form(model).plan.nodes == 2
                assert head.status()["phase"] == "forming"
            until(lambda: not names(head)["two"]["connected"], "the loss of two")
            head.end_group(1)
            ending, found = threading.Event(), []
            epoch = Epoch(1, ending, told.append)
            again = threading.Thread(target=lambda: found.append(cluster._reform(epoch)))
            again.start()
            try:
                until(lambda: any("does not fit" in t for t in told), "that it does not fit")
                until(lambda: re.search(f"two {LOST}", told[-1]), "who is waited for")
                assert told[-1].startswith("the model does not fit on the remaining nodes (")
                assert "`cenacle nodes --invite`" in told[-1], "what to do"
                with agent(two, head.port):
                    until(lambda: found, "the group of both")
            finally:
                ending.set()
                again.join()
            assert [n.name for n in found[0].group.members] == ["one", "two"]
            assert found[0].group.group_id == 3, "numbers are not used twice"
            assert told == said[-len(told) :]
    finally:
        head.close()


def test_a_node_of_one_cluster_does_not_join_another(head, tmp_path):
    mine = pair_with_head(tmp_path / "n", HOST, head.port, head.invite(), "mine")
    other = Head(tmp_path / "other", HOST, 0, "one")  # of the same name
    try:
        with pytest.raises(InputError, match="the head of another: run `cenacle leave` first"):
            pair_with_head(tmp_path / "n", HOST, other.port, other.invite(), "mine")
        with pytest.raises(client.WrongHead, match="not the head of this machine's cluster"):
            client.verify_head(mine, HOST, other.port)
        assert list(names(other)) == ["one"]
    finally:
        other.close()
    client.verify_head(mine, HOST, other.port)  # nobody is there: it may come
    client.verify_head(mine, HOST, head.port)
    # With a token of its own head's it may join again, as who was removed has to.
    again = pair_with_head(tmp_path / "n", HOST, head.port, head.invite(), "mine")
    assert again.load_settings()["name"] == "mine-2"
    assert identities.Identity(tmp_path / "n", "node").load_settings()["port"] == head.port


def test_an_agent_refuses_orders_of_an_older_group(tmp_path):
    old = Agent(identities.Identity(tmp_path, "node"), HOST, 1, [])
    old._ranks.group_id = 7
    order = messages.StartRank(6, 0, 0, "mesh", (), (), "", "", "")
    with pytest.raises(ClusterError, match=r"start_rank\.group_id: expected at least 7, got 6"):
        asyncio.run(old._start_rank(order))


def test_a_node_that_cannot_be_added_does_not_disturb_the_group(tmp_path, monkeypatch):
    monkeypatch.setattr("cenacle.cluster.membership.MIN_PRESENCE_S", 0.3)
    monkeypatch.setattr("cenacle.cluster.membership.COOLDOWN_S", 1.0)
    for at, change in (("here", ""), ("there", " ")):
        shutil.copytree(DEMO, tmp_path / at / "answers")
        config = tmp_path / at / "answers" / "config.json"
        config.write_text(config.read_text() + change)
    checkpoint, moves, said = Checkpoint.open(tmp_path / "here" / "answers"), [], []
    head = Head(tmp_path / "h", HOST, 0, "one")
    try:
        two = pair_with_head(tmp_path / "n", HOST, head.port, head.invite(), "two")
        cluster = Cluster(head, 2, said.append)
        cluster.set_model(
            ClusterModel("answers", checkpoint, PlacementOptions(), EngineOptions(), "auto")
        )
        with agent(head.identity, head.port):
            formation = head.form_group(2, max_wait_s=0.1)
            assert [n.name for n in formation.members] == ["one"]
            head.mark_ready(formation.group_id)
            cluster.watch_for_returns(moves.append)
            with agent(two, head.port, tmp_path / "there"):
                seen: list[str] = []
                until(
                    lambda: seen.append(names(head)["two"]["reason"]) or "excluded" in seen[-1],
                    "why",
                )
                assert seen[-1].startswith("is excluded for 1 s: two: ")
                assert "has a different model named answers" in seen[-1]
            assert head.status()["phase"] == "running"
            assert not moves
            until(lambda: not names(head)["two"]["connected"], "the end of two")
            (tmp_path / "there" / "answers" / "config.json").write_text(
                (tmp_path / "here" / "answers" / "config.json").read_text()
            )
            with agent(two, head.port, tmp_path / "there"):
                until(lambda: moves, "that it is taken in")
                assert moves == ["two has returned: the group is formed again with two"]
                assert names(head)["two"]["reason"] == "is being added to the group"
    finally:
        head.close()


def test_a_failed_formation_is_blamed_on_the_node_that_failed(tmp_path, monkeypatch):
    for at, change in (("here", ""), ("there", " ")):
        shutil.copytree(DEMO, tmp_path / at / "answers")
        config = tmp_path / at / "answers" / "config.json"
        config.write_text(config.read_text() + change)
    checkpoint, over = Checkpoint.open(tmp_path / "here" / "answers"), []
    head = Head(tmp_path / "h", HOST, 0, "one")
    monkeypatch.setattr(head, "end_group", lambda *ended: over.append(ended))
    try:
        two = pair_with_head(tmp_path / "n", HOST, head.port, head.invite(), "two")
        cluster = Cluster(head, 2)
        cluster.set_model(
            ClusterModel("answers", checkpoint, PlacementOptions(), EngineOptions(), "auto")
        )
        with agent(head.identity, head.port), agent(two, head.port, tmp_path / "there"):
            formation = head.form_group(2)
            with pytest.raises(CheckpointError, match="different model named answers"):
                cluster._plan_group(formation, lambda _: None)
        assert over == [(formation.group_id, formation.members[1].id)]
    finally:
        head.close()


def test_every_node_is_diagnosed_by_its_own_agent(tmp_path, monkeypatch):
    head = Head(tmp_path / "h", HOST, 0, "one")
    try:
        two = pair_with_head(tmp_path / "n", HOST, head.port, head.invite(), "two")
        pair_with_head(tmp_path / "m", HOST, head.port, head.invite(), "absent")
        with agent(head.identity, head.port), agent(two, head.port):
            until(
                lambda: names(head)["two"]["connected"] and names(head)["one"]["connected"], "both"
            )
            said = query(two, head.port, "doctor", timeout_s=60)["nodes"]
            assert list(said) == ["one", "two", "absent"]
            for name in ("one", "two"):
                whats = [f["message"] for f in said[name]]
                assert any("clock agrees" in w for w in whats), whats
                assert any("Versions" in w for w in whats), whats
            (only,) = said["absent"]
            assert "absent has not connected yet" in only["message"]
            # What the verb makes of it.
            folder = tmp_path / "home" / "cluster"
            folder.parent.mkdir()
            shutil.copytree(tmp_path / "n", folder)
            monkeypatch.setenv("CENACLE_HOME", str(folder.parent))
            shown = CliRunner().invoke(make_app(), ["doctor", "--cluster", "--json"])
            assert shown.exit_code == 1, "one machine is not there"
            assert set(json.loads(shown.stdout)["nodes"]) == set(said)
            shown = CliRunner().invoke(make_app(), ["doctor", "--cluster"])
            assert "absent\n" in shown.stdout
            assert "has not connected yet" in shown.stdout
    finally:
        head.close()


def test_a_slow_link_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    measured = []

    def slow(address, port, secret):
        measured.append(address)
        return Link(50e-6, 10e6)

    monkeypatch.setattr("cenacle.cluster.link_probe.probe_link", slow)
    checkpoint = Checkpoint.open(DEMO)
    head = Head(tmp_path / "h", HOST, 0, "one")
    try:
        two = pair_with_head(tmp_path / "n", HOST, head.port, head.invite(), "two")
        cluster = Cluster(head, 2)
        test = Verification(tmp_path / "h", False)
        with agent(head.identity, head.port), agent(two, head.port):
            model = ClusterModel(
                DEMO.name, checkpoint, PlacementOptions(), EngineOptions(), "native"
            )
            formed = cluster.form(model)
            with pytest.raises(ClusterError, match="between one and two carries 10 MB/s"):
                test.prepare(checkpoint, formed.plan, {}, dict, formed, cluster.measure_links_again)
            assert len(measured) == 3
    finally:
        head.close()


def test_addresses_that_cannot_be_used(tmp_path):
    assert client.read_address("10.0.0.1") == ("10.0.0.1", 4747)
    assert client.read_address("[fd00::1]:99") == ("fd00::1", 99)
    for wrong in ("", "x:y", "x:0", "x:99999", ":5"):
        with pytest.raises(InputError, match="HOST:PORT"):
            client.read_address(wrong)
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        with pytest.raises(ClusterError, match="no head answers"):
            pair_with_head(tmp_path, HOST, taken.getsockname()[1], pairing.new_token(), "x")
        taken.listen()
        with pytest.raises(InputError, match="--listen: cannot listen on"):
            Head(tmp_path / "h", HOST, taken.getsockname()[1])


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_service_files_can_be_parsed(tmp_path, monkeypatch, platform):
    import configparser
    import plistlib
    import shlex

    monkeypatch.setenv("HOME", str(tmp_path / "a b%c"))
    path, text, enable = service_unit.service_file(tmp_path / 'x "y"', platform)
    assert path.is_relative_to(tmp_path / "a b%c")
    if platform == "darwin":
        read = plistlib.loads(text.encode())
        command, home = read["ProgramArguments"], read["EnvironmentVariables"]["CENACLE_HOME"]
        assert read["RunAtLoad"]
        assert not read["KeepAlive"]["SuccessfulExit"]
    else:
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str
        unit.read_string(text)
        command = shlex.split(unit["Service"]["ExecStart"].replace("%%", "%"))
        (value,) = shlex.split(unit["Service"]["Environment"])
        home = value.removeprefix("CENACLE_HOME=")
        assert unit["Service"]["Restart"] == "on-failure"
        assert unit["Install"]["WantedBy"] == "default.target"
    assert command[1:] == ["-m", "cenacle", "join"]
    assert home == str(tmp_path / 'x "y"')
    assert path.name in enable
