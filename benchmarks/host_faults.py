"""What is done to a cluster of three hosts, and what follows.

Owns: the faults, each of them a context that does something to a host and undoes it, and looking at
one of them from the fault until all three machines answer again.
Hosts are network namespaces (`tests/hosts`), so this needs Linux and the right to make them.
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
from cenacle.model.byte_ranges import JOURNAL
from cenacle.ranks.channel import Channel
from cluster import API, CONTROL, JOIN, UP, WORKER, Cluster, Health, Streaming, head
from fault_record import MAX_DETECTION_S, FaultRecord
from net import Host, inside

RECOVERED_S = 60.0  # in which the group has to answer again, on a machine that others use too
LEFT_S = 10.0  # in which whatever was ended has to be gone
GARBAGE = (b"\0" * 5000, b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff{", b"\x16\x03\x01\x02\x00")
FOREIGN = "0123456789abcdef"


class Broken(Exception):
    """A promise was broken; says which."""


def expect(good: object, what: str) -> None:
    """Raise unless it is so."""
    if not good:
        raise Broken(what)


class Trial:
    """A cluster that faults are done to, with two heads of other people beside it.

    Args:
        folder: for the hosts' files; a short path, as sockets need.
    """

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder, "abcde")
        self._turns = [host.letter for host in self.cluster.members]  # whose turn it is
        self.rival, self.stranger = self.cluster.others
        try:
            self.cluster.begin()
            self.health = Health(self.cluster)
            self.undisturbed = Streaming(self.cluster).end()
            self.standing = self.cluster.standing()
        except BaseException:
            self.cluster.close()
            raise

    def close(self) -> None:
        """End it all."""
        self.health.close()
        self.cluster.close()

    def whose_turn(self, letters: str) -> Host:
        """The one of these hosts to which nothing has happened for the longest time: who fails
        again just when it is back is left out for a while."""
        letter = next(x for x in self._turns if x in letters)
        self._turns = [*(x for x in self._turns if x != letter), letter]
        return next(host for host in self.cluster.members if host.letter == letter)

    def wait_for(self, condition: Callable[[], object], seconds: float) -> bool:
        """Whether it was so in time."""
        ends = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > ends:
                return False
            time.sleep(0.02)
        return True

    def left(self) -> list[str]:
        """What is there and was not in the beginning, once all has had time to go."""
        self.wait_for(lambda: self.cluster.standing() == self.standing, LEFT_S)
        now = self.cluster.standing()
        more = [f"left on {' '.join(what)}" for what in (now - self.standing)]
        return more + [f"missing on {' '.join(what)}" for what in (self.standing - now)]


# What can happen to a host. Each is undone at its end.


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
    """Nothing comes from it any more and all its programs end at once, as when the power fails."""
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


# What happens to a host's part of the model. It has the model no more, and fetches its part.


@contextmanager
def disk_full(trial: Trial, host: Host) -> Iterator[None]:
    """It comes back without the model, to a disk that has no room for its part."""
    cache = host.folder / ".cache"
    without_model(host)
    cache.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", cache], check=True)
    try:
        yield
        trial.cluster.join(host)
        said = trial.wait_for(lambda: "free on this disk" in why_out(trial, host), RECOVERED_S)
        expect(said, f"a full disk was not explained: {why_out(trial, host)}")
        # Programs of a host have mounts of their own: of this one they see the size only.
        subprocess.run(["mount", "-o", "remount,size=64m", "none", cache], check=True)
    finally:
        subprocess.run(["umount", "--lazy", cache], check=True)


@contextmanager
def corrupted(trial: Trial, host: Host) -> Iterator[None]:
    """It fetches its part; one byte of that is another when its agent is started again."""
    without_model(host)
    yield
    trial.cluster.join(host)
    expect(trial.wait_for(lambda: trial.health.whole, RECOVERED_S), "it did not fetch its part")
    time.sleep(PROVEN_AFTER_S + 1)  # else it is left out for a while, as one that flaps
    host.kill(JOIN)
    (part,) = (host.folder / ".cache/cenacle/models").iterdir()
    noted = [json.loads(line) for line in (part / JOURNAL).read_text().split("\n") if line]
    last = [n for n in noted if "start" in n and n["file"].endswith(".safetensors")][-1]
    at = last["start"] + last.get("kept", [(0, 0)])[0][0]
    with (part / last["file"]).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    before = len(host.log.read_text())
    trial.cluster.join(host)
    said = trial.wait_for(
        lambda: "were damaged, and fetched again" in host.log.read_text()[before:], RECOVERED_S
    )
    expect(said, "a byte that changed was not noticed")


def without_model(host: Host) -> None:
    """Its agent ends, and its copy of the model and what it has fetched are removed."""
    host.kill(JOIN)
    for folder in (*host.folder.glob("**/answers"), host.folder / ".cache"):
        shutil.rmtree(folder, ignore_errors=True)


def why_out(trial: Trial, host: Host) -> str:
    """Why a host does not take part."""
    return str(trial.cluster.nodes().get(host.letter, {}).get("reason"))


# What strangers and mistaken people do.


@contextmanager
def wrong_token(trial: Trial, _host: Host) -> Iterator[None]:
    """Somebody guesses."""
    where = f"{trial.cluster.a.address}:{CONTROL}"
    guess = pairing.new_token()
    done = trial.stranger.run("join", where, "--token", guess)
    refused(done, "the token is wrong")
    yield
    nothing_kept(trial.stranger)


@contextmanager
def old_token(trial: Trial, _host: Host) -> Iterator[None]:
    """Somebody comes too late: to the rival, whose tokens live for less than a second."""
    line = rival(trial)
    done = trial.stranger.run(*line.split())
    refused(done, "the token has expired")
    yield
    nothing_kept(trial.stranger)


@contextmanager
def foreign_certificate(trial: Trial, _host: Host) -> Iterator[None]:
    """Machines that another authority vouches for, under names that the head knows."""
    folder = trial.stranger.folder / "foreign"
    authority = identities.Authority(folder)
    known = [node["id"] for node in trial.cluster.nodes().values()]
    expect(len(known) == 3, "the head does not say who belongs to it")
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
            answer = careless(trial, identity, message)
            expect(
                answer is None or answer.get("type") == messages.Rejection.type,
                f"a foreign certificate of {who} was given {answer}",
            )
    yield


@contextmanager
def garbage(trial: Trial, _host: Host) -> Iterator[None]:
    """To every port of every host, from its neighbour; connections stay open until the end."""
    socks = throw(trial)
    expect(len(socks) > 2 * len(GARBAGE), "there were no ports to send anything to")
    yield
    for _, sock in socks:
        sock.close()


@contextmanager
def garbage_forming(trial: Trial, host: Host) -> Iterator[None]:
    """The same while ranks are being started, when they listen to one another: for a moment, which
    may be missed, so it is tried three times."""
    socks: list[tuple[int, socket.socket]] = []
    for _ in range(3):
        host.kill(WORKER)
        trial.wait_for(lambda: trial.health.now[0] != 200, MAX_DETECTION_S)
        ends = time.monotonic() + RECOVERED_S
        while trial.health.now[0] != 200 and time.monotonic() < ends:
            socks += throw(trial)
            time.sleep(0.02)
        if {port for port, _ in socks} - {CONTROL, API}:
            break
    else:
        raise Broken("no rank was met while it listened")
    yield
    for _, sock in socks:
        sock.close()


@contextmanager
def two_heads(trial: Trial, host: Host) -> Iterator[None]:
    """Another head of the same name: neither side takes the other's machines for its own; and one
    more on the head's own machine, which may not be."""
    rival(trial)
    folder = Path(".config/cenacle/cluster")
    ours = identities.Identity(host.folder / folder, "node")
    theirs = identities.Identity(trial.rival.folder / folder, identities.HEAD)
    for identity, caller, called in (
        (ours, host, trial.rival),
        (theirs, trial.rival, trial.cluster.a),
    ):
        try:
            answer = inside(
                caller.name,
                lambda i=identity, h=called: client.query_head(
                    i, h.address, CONTROL, messages.Query("down")
                ),
            )
        except ClusterError as error:
            expect("not the head of this machine's cluster" in str(error), f"said {error}")
        else:
            raise Broken(f"{caller.letter} was obeyed by {called.letter}: {answer}")
    again = trial.cluster.a.run(
        *("up", "here/answers", "-n", "3", "--port", "0", "--listen", "0.0.0.0:4748")
    )
    refused(again, "already running", 2)
    yield
    expect(set(trial.cluster.nodes()) == {"a", "b", "c"}, "the machines changed")


def rival(trial: Trial) -> str:
    """Another head called `a`, which has no machines; the line that it printed."""
    if not trial.rival.pids(UP):
        life = ("--token-minutes", "0.01")
        line = head(trial.rival, "demo", "-n", "3", "--port", "0", "--name", "a", *life)
        (trial.rival.folder / "line").write_text(line)
        time.sleep(1.0)
    return (trial.rival.folder / "line").read_text()


def refused(done: Any, why: str, status: int = 5) -> None:
    """A verb ended as it should."""
    said = done.stderr.strip()
    expect(done.returncode == status, f"expected exit status {status}, got {done.returncode}")
    expect(why in said, f"expected {why!r}, got {said!r}")
    expect("Traceback" not in said, said)


def nothing_kept(host: Host) -> None:
    """Who was refused has no keys."""
    expect(not list(host.folder.glob(".config/cenacle/cluster/node.*")), "keys were kept")


def careless(
    trial: Trial, identity: identities.Identity, message: Message
) -> dict[str, Any] | None:
    """What the head answers to one who does not look whom he talks to; None: it hangs up."""
    context = pairing.unverified_tls_context()
    context.load_cert_chain(identity.certificate, identity.key)

    def ask() -> dict[str, Any]:
        plain = socket.create_connection((trial.cluster.a.address, CONTROL), timeout=10)
        with context.wrap_socket(plain) as sock:
            channel = Channel(sock, 5)
            channel.send(message.to_json())
            return channel.receive()

    try:
        return inside(trial.stranger.name, ask)
    except (CenacleError, ssl.SSLError, OSError):
        return None


def throw(trial: Trial) -> list[tuple[int, socket.socket]]:
    """Send garbage to all ports that are listened at; each with its connection."""
    socks = []
    hosts = trial.cluster.members
    for host, neighbour in zip(hosts, (*hosts[1:], hosts[0]), strict=True):
        for address, port in host.listening():
            caller = host if address.startswith("127.") else neighbour
            for data in (*GARBAGE, os.urandom(3000)):
                with suppress(OSError):  # a rank has heard all that it was waiting for
                    sock = caller.connect("127.0.0.1" if caller is host else host.address, port)
                    socks.append((port, sock))
                    sock.sendall(data)
    return socks


@dataclass(frozen=True)
class Row:
    """A fault, and what is promised.

    Args:
        fault: what is done.
        hosts: to which of them, in turn.
        recovers: whether the group ends and is formed again; None: it may.
        seconds: how long the fault lasts; 0: until the group answers again.
    """

    fault: Callable[[Trial, Host], AbstractContextManager[None]]
    hosts: str = "bc"
    recovers: bool | None = True
    seconds: float = 0.0

    def once(self, trial: Trial, host: Host, found: FaultRecord, longest_s: float = 1e9) -> None:
        """Do it to a cluster that is whole, which it is again afterwards, and note what follows.

        Args:
            longest_s: no fault lasts longer.
        """
        stream = Streaming(trial.cluster).begun()
        began = time.monotonic()
        try:
            with self.fault(trial, host):
                if self.seconds:
                    time.sleep(max(0.0, began + min(self.seconds, longest_s) - time.monotonic()))
                if self.recovers:
                    trial.wait_for(lambda: recovered(trial, began), RECOVERED_S)
            ended = time.monotonic()
        except Broken as error:
            found.wrong.append(str(error))
            ended = time.monotonic()
        judge_stream(trial, stream, found)
        judge(self, trial, host, began, ended, found)
        left = trial.left()
        found.left += len(left)
        found.wrong += left


def recovered(trial: Trial, began: float) -> float | None:
    """Seconds after which the group answered again, if it did not and does."""
    bad = False
    for at, status, _ in trial.health.since(began):
        if status == 200 and bad:
            return at - began
        bad = bad or status != 200
    return None


def judge(
    row: Row, trial: Trial, host: Host, began: float, ended: float, found: FaultRecord
) -> None:
    """Note what /health said of a fault, and wait until the cluster is whole."""
    if not trial.wait_for(lambda: trial.health.whole, RECOVERED_S):
        found.wrong.append(f"not all machines came back: {trial.health.now}")
    elif trial.health.since(ended):
        found.back_s.append(trial.health.changes[-1][0] - ended)
    failures = [(at, body) for at, status, body in trial.health.since(began) if status != 200]
    if row.recovers is False and failures:
        found.wrong.append(f"the group was ended without need: {failures[0][1]}")
    if not failures or row.recovers is False:
        if row.recovers:
            found.wrong.append("the fault was not noticed")
        return
    at, body = failures[0]
    found.detected_s.append(at - began)
    if (took := recovered(trial, began)) is not None:
        found.recovered_s.append(took)
    if row.recovers and at - began > MAX_DETECTION_S:
        found.wrong.append(f"noticed after {at - began:.1f} s")
    if not names(str(body.get("reason")), host):
        found.wrong.append(f"{host.letter} was not named: {body}")


def names(reason: str, host: Host) -> bool:
    """Whether a reason says which machine it was."""
    return re.search(rf"\b(on|machine) {host.letter}\b", reason) is not None


def judge_stream(trial: Trial, stream: Streaming, found: FaultRecord) -> None:
    """Note how an answer went that was under way."""
    found.answers += 1
    if not stream.wait(90) or stream.error or stream.cut:
        found.lost += 1
        found.wrong.append(f"an answer was lost: {stream.error or 'it broke off'}")
    elif stream.text != trial.undisturbed:
        found.other += 1
    found.pause_s.append(stream.longest_pause_s)


@dataclass(frozen=True)
class HeadRow:
    """The head ends, by a signal, and is started again. Agents wait for it, and need no token."""

    by: signal.Signals
    hosts: str = "a"

    def once(self, trial: Trial, _: Host, found: FaultRecord, __: float = 1e9) -> None:
        """See `Row`; detected: until all ranks are gone; recovered: from the head's start."""
        stream = Streaming(trial.cluster).begun()
        began = time.monotonic()
        for pid in trial.cluster.a.pids(UP):
            os.kill(pid, self.by)
        agents = [pid for h in (trial.cluster.b, trial.cluster.c) for pid in h.pids(JOIN)]
        gone = trial.wait_for(
            lambda: not any(h.pids(WORKER) for h in trial.cluster.members), 2 * MAX_DETECTION_S
        )
        found.detected_s.append(time.monotonic() - began)
        if not gone:
            found.wrong.append("ranks outlived the head")
        if not trial.wait_for(lambda: not trial.cluster.a.pids(), LEFT_S):
            found.wrong.append("the head did not end")
        found.answers += 1
        ended = stream.wait(10)
        whole = ended and not stream.error and not stream.cut  # before the head heard of its end
        if not ended:
            found.lost += 1
            found.wrong.append("an answer did not end")
        elif whole:
            pass
        elif self.by == signal.SIGTERM and "shutting down" not in stream.error:
            found.lost += 1
            found.wrong.append(f"an answer had no clean end: {stream.error or 'it broke off'}")
        else:
            found.ended += 1
        as_far = trial.undisturbed if whole else trial.undisturbed[: len(stream.text)]
        if stream.text != as_far:
            found.other += 1
        began = time.monotonic()
        trial.cluster.up()
        if trial.wait_for(lambda: trial.health.since(began) and trial.health.whole, RECOVERED_S):
            found.recovered_s.append(time.monotonic() - began)
        else:
            found.wrong.append(f"the cluster did not come back: {trial.health.now}")
            return
        if agents != [pid for h in (trial.cluster.b, trial.cluster.c) for pid in h.pids(JOIN)]:
            found.wrong.append("agents did not wait")
        judge_stream(trial, Streaming(trial.cluster), found)
        found.pause_s.clear()
        left = trial.left()
        found.left += len(left)
        found.wrong += left


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
