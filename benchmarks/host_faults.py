"""Faults of a cluster of three hosts, and how the cluster reacts.

Owns: the faults, each a context manager that does something to a host and undoes it, and observing
the cluster from the fault until all three nodes take part again.
Hosts are network namespaces (`namespaces.py`), so this needs Linux and the right to create them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cenacle.cluster import client, messages
from cenacle.cluster.membership import PROVEN_AFTER_S
from cenacle.cluster.security import identity as identities
from cenacle.cluster.security import pairing
from cenacle.errors import CenacleError, ClusterError
from cenacle.message import Message
from cenacle.model.byte_ranges import JOURNAL, byte_range_from_json
from cenacle.ranks.channel import Channel
from cluster import API, CONTROL, JOIN, UP, WORKER, Cluster, Health, Streaming, start_head
from fault_record import MAX_DETECTION_S, FaultRecord
from namespaces import Host, run_in_namespace

RECOVERY_TIMEOUT_S = 60.0  # until the group answers again, also on a busy machine
CLEANUP_TIMEOUT_S = 10.0  # until nothing of what was ended is left
GARBAGE = (b"\0" * 5000, b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff{", b"\x16\x03\x01\x02\x00")
FOREIGN = "0123456789abcdef"


class BrokenPromise(Exception):
    """A promise was broken; the message says which."""


def expect(good: object, what: str) -> None:
    """Raise `BrokenPromise` unless the condition holds."""
    if not good:
        raise BrokenPromise(what)


class Trial:
    """A cluster to inject faults into, with a rival head and a stranger beside it.

    Args:
        folder: for the files of the hosts; sockets need a short path.
    """

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder, "abcde")
        self._turns = [host.letter for host in self.cluster.members]  # the next one first
        self.rival, self.stranger = self.cluster.others
        try:
            self.cluster.start()
            self.health = Health(self.cluster)
            self.undisturbed = Streaming(self.cluster).end()
            self.standing = self.cluster.standing()
        except BaseException:
            self.cluster.close()
            raise

    def close(self) -> None:
        """End all hosts."""
        self.health.close()
        self.cluster.close()

    def next_host(self, letters: str) -> Host:
        """The host of these that has had no fault for the longest time, because a node that fails
        again as soon as it is back is excluded for a while."""
        letter = next(x for x in self._turns if x in letters)
        self._turns = [*(x for x in self._turns if x != letter), letter]
        return next(host for host in self.cluster.members if host.letter == letter)

    def wait_for(self, condition: Callable[[], object], seconds: float) -> bool:
        """Whether the condition became true in time."""
        ends = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > ends:
                return False
            time.sleep(0.02)
        return True

    def leftovers(self) -> list[str]:
        """What differs from the beginning, once everything has had time to end."""
        self.wait_for(lambda: self.cluster.standing() == self.standing, CLEANUP_TIMEOUT_S)
        now = self.cluster.standing()
        more = [f"left on {' '.join(what)}" for what in (now - self.standing)]
        return more + [f"missing on {' '.join(what)}" for what in (self.standing - now)]


# Faults of a host; each is undone at its end.


@contextmanager
def kill_rank(_trial: Trial, host: Host) -> Iterator[None]:
    """SIGKILL to its rank."""
    host.kill(WORKER)
    yield


@contextmanager
def stop_rank(_trial: Trial, host: Host) -> Iterator[None]:
    """SIGSTOP to its rank, until that has been ended."""
    pids = host.pids(WORKER)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield
    expect(not set(pids) & set(host.pids(WORKER)), "a stopped rank was not ended")


@contextmanager
def kill_agent(trial: Trial, host: Host) -> Iterator[None]:
    """SIGKILL to its agent, which is started again afterwards."""
    host.kill(JOIN)
    yield
    trial.cluster.join(host)


@contextmanager
def stop_agent(_trial: Trial, host: Host) -> Iterator[None]:
    """SIGSTOP to its agent."""
    pids = host.pids(JOIN)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def kill_host(trial: Trial, host: Host) -> Iterator[None]:
    """Its network goes down and all its programs end at once, as in a power failure."""
    trial.cluster.network.link(host, "down")
    host.kill()
    yield
    trial.cluster.network.link(host, "up")
    trial.cluster.join(host)


@contextmanager
def unplug(trial: Trial, host: Host) -> Iterator[None]:
    """Its cable is pulled."""
    trial.cluster.network.link(host, "down")
    yield
    trial.cluster.network.link(host, "up")


# Faults of a host's part of the model: it has lost the model, and downloads its part.


@contextmanager
def disk_full(trial: Trial, host: Host) -> Iterator[None]:
    """It comes back without the model, and its disk has no room for its part."""
    cache = host.folder / ".cache"
    without_model(host)
    cache.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", cache], check=True)
    try:
        yield
        trial.cluster.join(host)
        said = trial.wait_for(
            lambda: "this disk has" in exclusion_reason(trial, host), RECOVERY_TIMEOUT_S
        )
        expect(said, f"a full disk was not explained: {exclusion_reason(trial, host)}")
        # Programs of a host have mounts of their own: of this one they see the size only.
        subprocess.run(["mount", "-o", "remount,size=64m", "none", cache], check=True)
    finally:
        subprocess.run(["umount", "--lazy", cache], check=True)


@contextmanager
def corrupted(trial: Trial, host: Host) -> Iterator[None]:
    """It downloads its part, of which one byte is changed before its agent is started again."""
    without_model(host)
    yield
    trial.cluster.join(host)
    expect(
        trial.wait_for(lambda: trial.health.complete, RECOVERY_TIMEOUT_S),
        "it did not fetch its part",
    )
    time.sleep(PROVEN_AFTER_S + 1)  # else it is excluded for a while, like a node that flaps
    host.kill(JOIN)
    (part,) = (host.folder / ".cache/cenacle/models").iterdir()
    noted = [json.loads(line) for line in (part / JOURNAL).read_text().split("\n") if line]
    last = [n for n in noted if "range" in n and n["file"].endswith(".safetensors")][-1]
    byte_range = byte_range_from_json(last["range"])
    at = byte_range[0] if len(byte_range) == 2 else next(byte_range.spans())[0]
    with (part / last["file"]).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    before = len(host.log.read_text())
    trial.cluster.join(host)
    said = trial.wait_for(
        lambda: "were damaged and were downloaded again" in host.log.read_text()[before:],
        RECOVERY_TIMEOUT_S,
    )
    expect(said, "a byte that changed was not noticed")


def without_model(host: Host) -> None:
    """End its agent, and remove its copy of the model and its downloads."""
    host.kill(JOIN)
    for folder in (*host.folder.glob("**/answers"), host.folder / ".cache"):
        shutil.rmtree(folder, ignore_errors=True)


def exclusion_reason(trial: Trial, host: Host) -> str:
    """Why a host does not take part, according to the head."""
    return str(trial.cluster.nodes().get(host.letter, {}).get("reason"))


# Attempts of strangers, and mistakes.


@contextmanager
def wrong_token(trial: Trial, _host: Host) -> Iterator[None]:
    """A stranger guesses a token."""
    where = f"{trial.cluster.a.address}:{CONTROL}"
    guess = pairing.new_token()
    done = trial.stranger.run("join", where, "--token", guess)
    expect_refusal(done, "the token is wrong")
    yield
    expect_no_keys(trial.stranger)


@contextmanager
def old_token(trial: Trial, _host: Host) -> Iterator[None]:
    """A node uses an expired token: of the rival, whose tokens live for less than a second."""
    line = start_rival(trial)
    done = trial.stranger.run(*line.split())
    expect_refusal(done, "the token has expired")
    yield
    expect_no_keys(trial.stranger)


@contextmanager
def foreign_certificate(trial: Trial, _host: Host) -> Iterator[None]:
    """Nodes with certificates of another authority, under ids that the head knows."""
    folder = trial.stranger.folder / "foreign"
    authority = identities.Authority(folder)
    known = [node["id"] for node in trial.cluster.nodes().values()]
    expect(len(known) == 3, "the head does not list its nodes")
    for who in (FOREIGN, *known):
        key = identities.new_key()
        certificate = authority.sign(identities.certificate_request(key), who)
        identity = identities.store_node_identity(folder, key, certificate)
        for message in (
            messages.AgentHello({}, 0, {}),
            messages.Query("status"),
            messages.Query("down"),
            messages.RelayHello(""),
        ):
            answer = request_unverified(trial, identity, message)
            expect(
                answer is None or answer.get("type") == messages.Rejection.type,
                f"a foreign certificate of {who} was given {answer}",
            )
    yield


@contextmanager
def garbage(trial: Trial, _host: Host) -> Iterator[None]:
    """Garbage on every port of every host, from its neighbor; connections stay open."""
    socks = send_garbage(trial)
    expect(len(socks) > 2 * len(GARBAGE), "there were no ports to send anything to")
    yield
    for _, sock in socks:
        sock.close()


@contextmanager
def garbage_forming(trial: Trial, host: Host) -> Iterator[None]:
    """The same while ranks start and listen for each other. That moment may be missed, so it is
    tried three times."""
    socks: list[tuple[int, socket.socket]] = []
    for _ in range(3):
        host.kill(WORKER)
        trial.wait_for(lambda: trial.health.latest[0] != 200, MAX_DETECTION_S)
        ends = time.monotonic() + RECOVERY_TIMEOUT_S
        while trial.health.latest[0] != 200 and time.monotonic() < ends:
            socks += send_garbage(trial)
            time.sleep(0.02)
        if {port for port, _ in socks} - {CONTROL, API}:
            break
    else:
        raise BrokenPromise("no rank was reached while it listened")
    yield
    for _, sock in socks:
        sock.close()


@contextmanager
def two_heads(trial: Trial, host: Host) -> Iterator[None]:
    """Another head of the same name, whose nodes are not accepted and which does not accept ours;
    and a second head on the same machine, which is refused."""
    start_rival(trial)
    folder = Path(".config/cenacle/cluster")
    ours = identities.Identity(host.folder / folder, "node")
    theirs = identities.Identity(trial.rival.folder / folder, identities.HEAD)
    for identity, caller, called in (
        (ours, host, trial.rival),
        (theirs, trial.rival, trial.cluster.a),
    ):
        try:
            answer = run_in_namespace(
                caller.name,
                lambda i=identity, h=called: client.query_head(
                    i, h.address, CONTROL, messages.Query("down")
                ),
            )
        except ClusterError as error:
            expect("not the head of this machine's cluster" in str(error), f"said {error}")
        else:
            raise BrokenPromise(f"{called.letter} obeyed {caller.letter}: {answer}")
    again = trial.cluster.a.run(
        *("up", "here/answers", "-n", "3", "--port", "0", "--listen", "0.0.0.0:4748")
    )
    expect_refusal(again, "already running", 2)
    yield
    expect(set(trial.cluster.nodes()) == {"a", "b", "c"}, "the nodes changed")


def start_rival(trial: Trial) -> str:
    """Start another head called `a`, without nodes; returns the line that it printed."""
    if not trial.rival.pids(UP):
        life = ("--token-minutes", "0.01")
        line = start_head(trial.rival, "demo", "-n", "3", "--port", "0", "--name", "a", *life)
        (trial.rival.folder / "line").write_text(line)
        time.sleep(1.0)
    return (trial.rival.folder / "line").read_text()


def expect_refusal(done: Any, why: str, status: int = 5) -> None:
    """Check that a command failed with this message."""
    said = done.stderr.strip()
    expect(done.returncode == status, f"expected exit status {status}, got {done.returncode}")
    expect(why in said, f"expected {why!r}, got {said!r}")
    expect("Traceback" not in said, said)


def expect_no_keys(host: Host) -> None:
    """Check that a refused host has no keys."""
    expect(not list(host.folder.glob(".config/cenacle/cluster/node.*")), "keys were kept")


def request_unverified(
    trial: Trial, identity: identities.Identity, message: Message
) -> dict[str, Any] | None:
    """What the head answers to a client that does not verify it; None: it closes the connection."""
    context = pairing.unverified_tls_context()
    context.load_cert_chain(identity.certificate, identity.key)

    def ask() -> dict[str, Any]:
        plain = socket.create_connection((trial.cluster.a.address, CONTROL), timeout=10)
        with context.wrap_socket(plain) as sock:
            channel = Channel(sock, 5)
            channel.send(message.to_json())
            return channel.receive()

    try:
        return run_in_namespace(trial.stranger.name, ask)
    except (CenacleError, ssl.SSLError, OSError):
        return None


def send_garbage(trial: Trial) -> list[tuple[int, socket.socket]]:
    """Send garbage to all listening ports; returns each port with its connection."""
    socks = []
    hosts = trial.cluster.members
    for host, neighbor in zip(hosts, (*hosts[1:], hosts[0]), strict=True):
        for address, port in host.listening():
            caller = host if address.startswith("127.") else neighbor
            for data in (*GARBAGE, os.urandom(3000)):
                with suppress(OSError):  # a rank no longer listens
                    sock = caller.connect("127.0.0.1" if caller is host else host.address, port)
                    socks.append((port, sock))
                    sock.sendall(data)
    return socks


@dataclass(frozen=True)
class Row:
    """A fault, and what is promised.

    Args:
        fault: the context manager.
        hosts: that it is applied to, in turn.
        recovers: whether the group is ended and re-formed; None: it may be.
        seconds: how long the fault lasts; 0: until the group answers again.
    """

    fault: Callable[[Trial, Host], AbstractContextManager[None]]
    hosts: str = "bc"
    recovers: bool | None = True
    seconds: float = 0.0

    def run(self, trial: Trial, host: Host, record: FaultRecord, longest_s: float = 1e9) -> None:
        """Apply the fault to a complete cluster, and record what follows until it is complete
        again.

        Args:
            longest_s: limit of the duration of the fault.
        """
        stream = Streaming(trial.cluster).wait_for_start()
        began = time.monotonic()
        try:
            with self.fault(trial, host):
                if self.seconds:
                    time.sleep(max(0.0, began + min(self.seconds, longest_s) - time.monotonic()))
                if self.recovers:
                    trial.wait_for(lambda: recovery_s(trial, began), RECOVERY_TIMEOUT_S)
            ended = time.monotonic()
        except BrokenPromise as error:
            record.wrong.append(str(error))
            ended = time.monotonic()
        record_stream(trial, stream, record)
        record_health(self, trial, host, began, ended, record)
        leftovers = trial.leftovers()
        record.left += len(leftovers)
        record.wrong += leftovers


def recovery_s(trial: Trial, began: float) -> float | None:
    """Seconds until the group answered again; None: it did not stop, or does not answer yet."""
    bad = False
    for at, status, _ in trial.health.since(began):
        if status == 200 and bad:
            return at - began
        bad = bad or status != 200
    return None


def record_health(
    row: Row, trial: Trial, host: Host, began: float, ended: float, record: FaultRecord
) -> None:
    """Record what /health reported about a fault, and wait until the cluster is complete."""
    if not trial.wait_for(lambda: trial.health.complete, RECOVERY_TIMEOUT_S):
        record.wrong.append(f"not all nodes came back: {trial.health.latest}")
    elif trial.health.since(ended):
        record.back_s.append(trial.health.changes[-1][0] - ended)
    failures = [(at, body) for at, status, body in trial.health.since(began) if status != 200]
    if row.recovers is False and failures:
        record.wrong.append(f"the group was ended unnecessarily: {failures[0][1]}")
    if not failures or row.recovers is False:
        if row.recovers:
            record.wrong.append("the fault was not noticed")
        return
    at, body = failures[0]
    record.detected_s.append(at - began)
    if (took := recovery_s(trial, began)) is not None:
        record.recovered_s.append(took)
    if row.recovers and at - began > MAX_DETECTION_S:
        record.wrong.append(f"noticed after {at - began:.1f} s")
    if not names_host(str(body.get("reason")), host):
        record.wrong.append(f"{host.letter} was not named: {body}")


def names_host(reason: str, host: Host) -> bool:
    """Whether a reason names the host."""
    return re.search(rf"\b(on|node) {host.letter}\b", reason) is not None


def record_stream(trial: Trial, stream: Streaming, record: FaultRecord) -> None:
    """Record how an answer that was being streamed ended."""
    record.answers += 1
    if not stream.wait(90) or stream.error or stream.truncated:
        record.lost += 1
        record.wrong.append(f"an answer was lost: {stream.error or 'it broke off'}")
    elif stream.text != trial.undisturbed:
        record.other += 1
    record.pause_s.append(stream.longest_pause_s)


@dataclass(frozen=True)
class HeadRow:
    """The head is ended by a signal and started again; agents wait for it and need no token."""

    number: signal.Signals
    hosts: str = "a"

    def run(self, trial: Trial, _: Host, record: FaultRecord, __: float = 1e9) -> None:
        """See `Row`; detected: until all ranks are gone; recovered: from the head's start."""
        stream = Streaming(trial.cluster).wait_for_start()
        began = time.monotonic()
        pids = trial.cluster.a.pids(UP)  # the supervisor, and the process that serves
        for pid in pids if self.number == signal.SIGKILL else pids[:1]:
            os.kill(pid, self.number)
        agents = [pid for h in (trial.cluster.b, trial.cluster.c) for pid in h.pids(JOIN)]
        gone = trial.wait_for(
            lambda: not any(h.pids(WORKER) for h in trial.cluster.members), 2 * MAX_DETECTION_S
        )
        record.detected_s.append(time.monotonic() - began)
        if not gone:
            record.wrong.append("ranks outlived the head")
        if not trial.wait_for(lambda: not trial.cluster.a.pids(), CLEANUP_TIMEOUT_S):
            record.wrong.append("the head did not end")
        record.answers += 1
        ended = stream.wait(10)
        whole = (
            ended and not stream.error and not stream.truncated
        )  # before the head got the signal
        if not ended:
            record.lost += 1
            record.wrong.append("an answer did not end")
        elif whole:
            pass
        elif self.number == signal.SIGTERM and "shutting down" not in stream.error:
            record.lost += 1
            record.wrong.append(
                f"an answer was not ended cleanly: {stream.error or 'it broke off'}"
            )
        else:
            record.ended += 1
        as_far = trial.undisturbed if whole else trial.undisturbed[: len(stream.text)]
        if stream.text != as_far:
            record.other += 1
        began = time.monotonic()
        trial.cluster.up()
        if trial.wait_for(
            lambda: trial.health.since(began) and trial.health.complete, RECOVERY_TIMEOUT_S
        ):
            record.recovered_s.append(time.monotonic() - began)
        else:
            record.wrong.append(f"the cluster did not come back: {trial.health.latest}")
            return
        if agents != [pid for h in (trial.cluster.b, trial.cluster.c) for pid in h.pids(JOIN)]:
            record.wrong.append("agents did not wait")
        record_stream(trial, Streaming(trial.cluster), record)
        record.pause_s.clear()
        leftovers = trial.leftovers()
        record.left += len(leftovers)
        record.wrong += leftovers


ROWS: dict[str, Row | HeadRow] = {
    "kill-rank": Row(kill_rank, "abc"),
    "stop-rank": Row(stop_rank, "abc"),
    "kill-agent": Row(kill_agent),
    "stop-agent": Row(stop_agent, seconds=30),
    "kill-host": Row(kill_host),
    "link-3s": Row(unplug, recovers=None, seconds=3),
    "link-60s": Row(unplug, seconds=60),
    "restart-head": HeadRow(signal.SIGTERM),
    "kill-head": HeadRow(signal.SIGKILL),
    "wrong-token": Row(wrong_token, recovers=False),
    "old-token": Row(old_token, recovers=False),
    "foreign-certificate": Row(foreign_certificate, recovers=False),
    "garbage": Row(garbage, recovers=False),
    "garbage-forming": Row(garbage_forming),
    "disk-full": Row(disk_full),
    "corrupted": Row(corrupted),
    "two-heads": Row(two_heads, recovers=False),
}
