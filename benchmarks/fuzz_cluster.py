"""Messages with one to three faults at every border of a cluster: `make fuzz-cluster`.

Whoever sends one may lose its own connection, and nobody else anything: no traceback, no process
ended, no wait without an end. Head and agents are real processes (`cenacle up`, `cenacle join`)
that serve the demo model meanwhile; what only they can send is sent by played ones. The last line
of stdout is JSON; exit status 1 if something is not so.

    python benchmarks/fuzz_cluster.py --frames 10000
    python benchmarks/fuzz_cluster.py --borders orders ranks
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import logging
import os
import queue
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import cenacle
from cenacle import net
from cenacle.cluster import client, link_probe, messages
from cenacle.cluster.client import pair_with_head, query_head
from cenacle.cluster.download.task import HeadSource
from cenacle.cluster.head import Head
from cenacle.cluster.membership import Node
from cenacle.cluster.security import identity as identities
from cenacle.cluster.security import pairing
from cenacle.errors import CenacleError, ClusterError
from cenacle.message import Message, MessageError, parse
from cenacle.ranks import messages as rank_messages
from cenacle.ranks.channel import Channel
from fuzz_messages import RANK_REPLIES, damage, frame, sample_message, sample_step

# `httpx.get` reads the certificates of the system at each call: 58 ms of a processor.
HTTP = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))
HOST = "127.0.0.1"
DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
WAIT_S = 120.0  # for what must happen; the machine may be busy
MAX_WRONG = 20  # of a border whose process has to be started again for each
THREADS = 8
COSTLY = 20  # valid orders that start a process: no more than these are sent
FIRST = (
    *(messages.PairRequest, messages.AgentHello, messages.RelayHello, messages.FileRequest),
    *(messages.Query, messages.PairProof),
)


@dataclass
class Border:
    """What was sent at one border, and what must not have come of it."""

    name: str
    frames: int = 0
    results: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, result: str = "sent", frames: int = 1) -> None:
        """Count frames and what came of them."""
        with self.lock:
            self.frames += frames
            self.results[result] += frames

    def add_wrong(self, text: str) -> None:
        """Something that must not be."""
        with self.lock:
            if len(self.wrong) < 50:
                self.wrong.append(text)

    def expect(self, function: Callable[[], Any], about: Any) -> Any:
        """Call what may raise errors of ours only."""
        try:
            result = function()
        except CenacleError as error:
            if not str(error).isprintable() or len(str(error)) > 10_000:
                self.add_wrong(f"an error that cannot be shown: {str(error)[:200]!r}")
            self.count("refused")
            return None
        except Exception as error:
            self.add_wrong(f"{type(error).__name__}: {error} for {about!r:.300}")
            self.count("failed")
            return None
        self.count("accepted")
        return result


def in_threads(
    border: Border, frames: int, seed: int, work: Callable[[random.Random], None]
) -> None:
    """Call `work`, which counts what it sends, from several threads until all frames are sent."""

    def repeat(number: int) -> None:
        dice = random.Random(f"{seed}/{border.name}/{number}")
        while border.frames < frames:
            try:
                work(dice)
            except Exception as error:
                border.add_wrong(f"the sender failed: {type(error).__name__}: {error}")
                return

    threads = [threading.Thread(target=repeat, args=(n,), daemon=True) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def send_and_close(sock: socket.socket, data: bytes) -> None:
    """Send, and wait a moment for what comes of it."""
    sock.settimeout(0.05)
    with suppress(OSError):
        sock.sendall(data)
        sock.recv(65536)
    sock.close()


# ---- Real processes ---------------------------------------------------------------------------


class Process:
    """A program with its own configuration, and its log."""

    def __init__(self, folder: Path, *command: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.home, self.log = folder, folder / "log"
        environment = {
            **os.environ,
            "CENACLE_HOME": str(folder),
            "HF_ENDPOINT": f"http://{HOST}:1",
            "PYTHONUNBUFFERED": "1",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=log, stderr=log
            )

    def check(self, border: Border) -> None:
        """It lives, and has logged no traceback."""
        if (status := self.process.poll()) is not None:
            border.add_wrong(
                f"{self.home.name} ended with {status}: {self.log.read_text()[-1500:]}"
            )
        text = self.log.read_text()
        if "Traceback" in text or "never retrieved" in text or "a fault of this program" in text:
            start = min(
                at for w in ("Traceback", "never r", "a fault") if (at := text.find(w)) >= 0
            )
            border.add_wrong(f"{self.home.name} logged: {text[max(0, start - 300) : start + 2500]}")

    def close(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Wait until something is so.

    Raises:
        TimeoutError: it is not.
    """
    ends_s = time.monotonic() + WAIT_S
    while time.monotonic() < ends_s:
        with suppress(OSError, httpx.HTTPError, CenacleError, ValueError):
            if (result := condition()) is not None:
                return result
        time.sleep(0.1)
    raise TimeoutError(f"{what} within {WAIT_S:g} s")


class RealCluster:
    """A head and another node, which serve the demo model."""

    def __init__(self, folder: Path) -> None:
        self.port, self.api_port = net.free_ports(2)
        self.folder = folder
        up = ("-m", "cenacle", "up", str(DEMO), "-n", "2", "--listen", f"{HOST}:{self.port}")
        up += ("--port", str(self.api_port), "--no-mdns", "--name", "one")
        self.head = Process(folder / "head", *up)
        self.identity = identities.Identity(self.head.home / "cluster", "head")
        wait_for(self.invite, "a token")
        self.agent = Process(
            *(folder / "agent", "-m", "cenacle", "join", f"{HOST}:{self.port}", "--no-mdns"),
            *("--token", self.invite(), "--models", str(DEMO.parent), "--name", "two"),
        )
        self.before = wait_for(self._working, "a cluster that works")
        self.contexts = [self.join(f"odd{n}").client_tls_context() for n in range(THREADS)]
        self._next = itertools.count()

    def invite(self) -> str:
        """A new token."""
        answer = query_head(self.identity, HOST, self.port, messages.Query("invite"))
        return str(answer["token"])

    def join(self, name: str) -> identities.Identity:
        """A member without an agent."""
        return pair_with_head(self.folder / name, HOST, self.port, self.invite(), name)

    def _working(self) -> dict[str, Any] | None:
        health = HTTP.get(f"http://{HOST}:{self.api_port}/health", timeout=30).json()
        return dict(health) if health["status"] == "ok" and health.get("nodes") == 2 else None

    def connect(self) -> Any:
        """A connection as one of the members."""
        context = self.contexts[next(self._next) % len(self.contexts)]
        sock = socket.create_connection((HOST, self.port), timeout=30)
        return context.wrap_socket(sock, server_hostname=identities.SERVER_NAME)

    def check(self, border: Border) -> None:
        """Nothing has changed, and it answers."""
        self.head.check(border)
        self.agent.check(border)
        try:
            after = wait_for(self._working, "a cluster that works")
            for name in ("pid", "ranks", "restarts", "recoveries"):
                if after[name] != self.before[name]:
                    border.add_wrong(f"{name}: {self.before[name]} became {after[name]}")
            body = {"prompt": "12 + 30", "max_tokens": 2}
            url = f"http://{HOST}:{self.api_port}/v1/completions"
            if (answer := HTTP.post(url, json=body, timeout=WAIT_S)).status_code != 200:
                border.add_wrong(f"an answer of {answer.status_code} {answer.text[:200]}")
            self.join(f"after-{border.name}")
        except (TimeoutError, CenacleError, httpx.HTTPError) as error:
            border.add_wrong(f"afterwards: {error!r}")

    def close(self) -> None:
        """End both."""
        self.agent.close()
        self.head.close()


# ---- Borders of the head ----------------------------------------------------------------------


def strangers(cluster: RealCluster, border: Border, frames: int, seed: int) -> None:
    """First messages, and pairing, from who is no member."""
    context, token = pairing.unverified_tls_context(), cluster.invite()
    csr = identities.certificate_request(identities.new_key()).decode()

    def send(dice: random.Random) -> None:
        sock = socket.create_connection((HOST, cluster.port), timeout=30)
        stream = context.wrap_socket(sock)
        border.count()
        if dice.random() < 0.7:
            message = sample_message(dice.choice(FIRST), dice)
            send_and_close(stream, frame(damage(message, dice), dice))
            return
        channel, nonce = Channel(stream, 30), random.Random(dice.random()).randbytes(16)
        try:
            channel.send(messages.PairRequest(pairing.encode(nonce)).to_json())
            challenge = parse(channel.receive(), messages.PairChallenge)
        except ClusterError:  # another has taken its place
            channel.close()
            return
        payload = json.dumps(damage({"certificate_request": csr, "name": "x"}, dice)).encode()
        certificate = stream.getpeercert(binary_form=True) or b""
        own = (nonce, pairing.decode(challenge.nonce), certificate)
        proof = pairing.channel_bound_proof(token, "joiner", *own, payload)
        message = messages.PairProof(pairing.encode(payload), pairing.encode(proof)).to_json()
        damaged = damage(message, dice) if dice.random() < 0.5 else message
        send_and_close(stream, frame(damaged, dice))

    in_threads(border, frames, seed, send)


def members(cluster: RealCluster, border: Border, frames: int, seed: int) -> None:
    """First messages of members: as an agent, a relay, a reader of files, a command."""

    def send(dice: random.Random) -> None:
        stream = cluster.connect()
        message = sample_message(dice.choice(FIRST[1:5]), dice)
        if message.get("name") in ("leave", "down", "remove"):  # allowed: it would leave
            message["name"] = "status"
        border.count()
        send_and_close(stream, frame(damage(message, dice), dice))

    in_threads(border, frames, seed, send)


def agents(cluster: RealCluster, border: Border, frames: int, seed: int) -> None:
    """What agents send once they are connected."""
    kinds = (messages.Heartbeat, messages.OrderResult, messages.RankExited, messages.Leaving)

    def send(dice: random.Random) -> None:
        stream = cluster.connect()
        channel = Channel(stream, 30)
        with suppress(ClusterError):
            channel.send(sample_message(messages.AgentHello, dice))
            channel.receive()
            for _ in range(dice.randint(1, 5)):
                message = sample_message(dice.choice(kinds), dice)
                border.count()
                with suppress(OSError):
                    stream.sendall(frame(damage(message, dice), dice))
        send_and_close(stream, b"")

    in_threads(border, frames, seed, send)


def downloads(cluster: RealCluster, border: Border, frames: int, seed: int) -> None:
    """Requests for files of the model, several on a connection."""

    def send(dice: random.Random) -> None:
        stream = cluster.connect()
        stream.settimeout(0.2)
        with suppress(OSError):
            for _ in range(10):
                message = sample_message(messages.FileRequest, dice)
                border.count()
                stream.sendall(frame(damage(message, dice), dice))
                while True:
                    if not stream.recv(1 << 20):
                        break
        stream.close()

    in_threads(border, frames, seed, send)


# ---- Borders of a head in this process --------------------------------------------------------


class PlayedMember:
    """A member of a head in this process, and what it is told."""

    def __init__(self, folder: Path, number: int, head: Head) -> None:
        name = f"odd{number}"
        self._identity = pair_with_head(folder / name, HOST, head.port, head.invite(), name)
        self._head, self.id = head, self._identity.load_settings()["id"]

    def connect(self, message: Message) -> Channel:
        """A connection that was accepted."""
        context = self._identity.client_tls_context()
        sock = client.connect_to_head(HOST, self._head.port, context, identities.SERVER_NAME)
        channel = Channel(sock, 30)
        channel.send(message.to_json())
        parse(channel.receive(), messages.Welcome)
        return channel

    def node(self) -> Node:
        """As the head knows it."""
        return self._head._state.nodes[self.id]


@contextlib.contextmanager
def played_head(folder: Path) -> Iterator[tuple[Head, list[PlayedMember]]]:
    """A head in this process, with members."""
    head = Head(folder / "played", HOST, 0, "played")
    try:
        yield head, [PlayedMember(folder / "played-members", n, head) for n in range(THREADS)]
        gc.collect()
    finally:
        head.close()


def results(folder: Path, border: Border, frames: int, seed: int) -> None:
    """Results of orders, from agents that carry out none."""
    with played_head(folder / border.name) as (head, played):
        dice = random.Random(f"{seed}/{border.name}")
        hello = parse(sample_message(messages.AgentHello, dice), messages.AgentHello)

        def answer(member: PlayedMember, number: int) -> None:
            dice = random.Random(f"{seed}/{border.name}/{number}")
            while border.frames < frames:
                with suppress(ClusterError, OSError):
                    channel = member.connect(hello)
                    stop = threading.Event()

                    def beat(channel: Channel = channel, stop: threading.Event = stop) -> None:
                        while not stop.wait(0.25):
                            with suppress(ClusterError):
                                channel.send(messages.Heartbeat().to_json())

                    threading.Thread(target=beat, daemon=True).start()
                    try:
                        while True:
                            message = channel.receive()
                            if message["type"] != "order":
                                continue
                            kind = next(
                                o for o in messages.ORDERS if o.type == message["order"]["type"]
                            )
                            result = sample_message(kind.result_type(), dice)
                            own = {"type": "order_result", "id": message["id"]}
                            own |= (
                                {"error": {"type": "ClusterError", "message": "x"}}
                                if (dice.random() < 0.3)
                                else {"result": result}
                            )
                            damaged = damage(own, dice)
                            if isinstance(damaged, dict) and dice.random() < 0.8:
                                damaged |= {"type": "order_result", "id": message["id"]}
                            channel._socket.sendall(frame(damaged, dice))
                    finally:
                        stop.set()
                        channel.close()

        for number, member in enumerate(played):
            threading.Thread(target=answer, args=(member, number), daemon=True).start()
        taken = itertools.count()

        def order(dice: random.Random) -> None:
            member = played[next(taken) % len(played)]
            if not head.is_connected(member.node()):
                time.sleep(0.02)
                return
            kind = dice.choice(messages.ORDERS)
            try:
                made = parse(sample_message(kind, dice), kind)
            except MessageError:  # a head makes no such order
                return
            border.expect(lambda: head.send_order(member.node(), made, 2.0), made)

        in_threads(border, frames, seed, order)
        border.frames = max(border.frames, frames)  # ends the members
        honest = query_head(head.identity, HOST, head.port, messages.Query("status"), WAIT_S)
        if "phase" not in honest:
            border.add_wrong("the head does not answer")


def relays(folder: Path, border: Border, frames: int, seed: int) -> None:
    """What a rank sends through its agent's relay, as the front reads it."""
    with played_head(folder / border.name) as (head, played):
        agent_channels = [
            member.connect(
                parse(sample_message(messages.AgentHello, random.Random(0)), messages.AgentHello)
            )
            for member in played
        ]
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(0.25):
                for channel in agent_channels:
                    with suppress(ClusterError):
                        channel.send(messages.Heartbeat().to_json())

        def drain(channel: Channel) -> None:
            with suppress(ClusterError):
                while True:
                    channel.receive()

        threading.Thread(target=beat, daemon=True).start()
        for channel in agent_channels:
            threading.Thread(target=drain, args=(channel,), daemon=True).start()
        taken = itertools.count()

        def send(dice: random.Random) -> None:
            number = next(taken)
            (front,) = head.expect_relays([name := f"relay{number}"])
            try:
                far = played[number % len(played)].connect(messages.RelayHello(name))
            except ClusterError as error:
                border.add_wrong(f"a relay was refused: {error}")
                front.close()
                return
            near = Channel(front, 10)
            count = dice.randint(1, 20)
            with suppress(OSError):
                for _ in range(count):
                    message = sample_message(dice.choice(RANK_REPLIES), dice)
                    far._socket.sendall(frame(damage(message, dice), dice))
            far.close()
            border.count("sent", count)
            with suppress(ClusterError):
                while True:
                    data = near.receive()
                    with suppress(CenacleError):
                        parse(data, *RANK_REPLIES)
            near.close()

        in_threads(border, frames, seed, send)
        stop.set()
        for channel in agent_channels:
            channel.close()


# ---- Borders of ranks -------------------------------------------------------------------------


class PlayedRanks:
    """Two ranks of an epoch; rank 1 sends something faulty after some steps."""

    def __init__(self, epoch: int, border: Border, dice: random.Random) -> None:
        self.epoch, self._border, self._dice = epoch, border, dice
        pairs = [socket.socketpair() for _ in (0, 1)]
        self.channels = [Channel(near, 30) for near, _ in pairs]
        self.pids, self.ready, self.backend, self.backend_reason, self.plan = (
            [],
            [],
            "played",
            None,
            None,
        )
        for rank, (_, far) in enumerate(pairs):
            threading.Thread(target=self._serve, args=(rank, far), daemon=True).start()

    def _serve(self, rank: int, sock: socket.socket) -> None:
        channel, running = Channel(sock, 30), {}
        left = self._dice.randint(0, 2)
        with suppress(ClusterError, OSError), contextlib.closing(channel):
            while True:
                step = channel.receive()["step"]
                for request_id in step["cancelled"]:
                    running.pop(request_id, None)
                running |= {request["id"]: request["max_tokens"] for request in step["admitted"]}
                tokens = []
                for request_id in list(running):
                    running[request_id] -= 1
                    finish = None if running[request_id] else "length"
                    tokens.append([request_id, 7, finish, None, [], 0, 0])
                    if finish:
                        del running[request_id]
                result = {
                    "type": "step_result",
                    "epoch": self.epoch,
                    "number": step["number"],
                    "tokens": tokens,
                }
                if rank == 1 and left <= 0:
                    kind = self._dice.choice(RANK_REPLIES)
                    made = result if self._dice.random() < 0.5 else sample_message(kind, self._dice)
                    made = {**made, "epoch": self.epoch} if "epoch" in made else made
                    self._border.count()
                    sock.sendall(frame(damage(made, self._dice), self._dice))
                    if self._dice.random() < 0.5:
                        return
                left -= 1
                channel.send(result)

    def blame(self, rank: int, reason: str) -> Any:
        from cenacle.errors import RankLost

        return RankLost(rank, f"rank {rank} {reason}")

    def close(self, *, now: bool) -> None:  # noqa: ARG002
        for channel in self.channels:
            channel.close()


def ranks(_: Path, border: Border, frames: int, seed: int) -> None:
    """What a rank sends to its group, which starts it again each time."""
    from cenacle.core.request import Request
    from cenacle.ranks.rank_group import RankGroup
    from cenacle.ranks.ranks import Epoch
    from cenacle.scheduler import recovery
    from cenacle.scheduler.scheduler import Scheduler

    recovery.BACKOFF_S = (0.0, 0.0, 0.0)
    dice = random.Random(f"{seed}/{border.name}")

    class Source:
        def start(self, epoch: Epoch, report: object = None) -> Any:  # noqa: ARG002
            return PlayedRanks(epoch.number, border, dice)

    source = Source()
    group = RankGroup(source.start(Epoch()), Scheduler(4, 0), source, step_timeout_s=20)  # type: ignore[arg-type]
    ended: queue.Queue[Any] = queue.Queue()

    def sink(event: Any) -> None:
        if isinstance(event, CenacleError) or getattr(event, "finish", None) is not None:
            ended.put(event)

    for number in itertools.count():
        if border.frames >= frames:
            break
        if group.failure is not None:  # four failures in a row, as it should
            border.results["given up"] += 1
            group.close()
            group = RankGroup(source.start(Epoch()), Scheduler(4, 0), source, step_timeout_s=20)  # type: ignore[arg-type]
        with suppress(CenacleError):
            group.submit(Request(f"r{number}", (1, 2), 5), sink)
            try:
                ended.get(timeout=WAIT_S)
            except queue.Empty:
                border.add_wrong(f"a request got no end; {group.state}")
                break
    if not group._thread.is_alive() and group.failure is None:
        border.add_wrong("the group's thread has ended")
    group.close()


def front(folder: Path, border: Border, frames: int, seed: int) -> None:
    """What a front sends to a rank: a real one that takes steps, and goes on after a wrong one."""
    from cenacle.load_options import LoadOptions
    from cenacle.runtime import resolve

    order = resolve(LoadOptions(str(DEMO))).load_order().to_json()
    dice, numbers = random.Random(f"{seed}/{border.name}"), itertools.count(1)
    process: Process | None = None
    while border.frames < frames and len(border.wrong) < MAX_WRONG:
        number = next(numbers)
        with socket.socket(socket.AF_UNIX) as listener:
            address = tempfile.mktemp(prefix="cenacle-fuzz-")
            listener.bind(address)
            listener.listen(1)
            listener.settimeout(WAIT_S)
            process = Process(folder / f"rank{number}", __file__, "--rank", address)
            sock, _ = listener.accept()
            Path(address).unlink()
        channel = Channel(sock, WAIT_S)
        last = b""
        try:
            channel.receive()  # hello
            channel.send(order)
            while channel.receive()["type"] != "ready":
                pass
            for _ in range(min(1000, frames - border.frames)):
                kinds = (rank_messages.StepOrder, rank_messages.StepOrder, rank_messages.LoadOrder)
                kind = dice.choice(kinds)
                if kind is rank_messages.StepOrder:
                    made = {"type": "step", "epoch": 0, "step": sample_step(dice)}
                else:
                    made = {**order, "type": "load"}
                damaged = damage(made, dice)
                if isinstance(damaged, dict) and damaged.get("latency_s"):
                    damaged["latency_s"] = "1"  # it would sleep so long
                data = json.dumps(damaged).encode()
                last = data
                border.count()
                sock.sendall(net.FRAME_HEADER.pack(len(data)) + data)
                ends_s = time.monotonic() + WAIT_S
                while (answer := channel.receive())["type"] == "heartbeat":
                    if time.monotonic() > ends_s:
                        raise ClusterError(f"did not answer within {WAIT_S:g} s")
                border.results[answer["type"]] += 1
        except ClusterError as error:
            border.add_wrong(
                f"the rank {error} after {last[:600]!r}: {process.log.read_text()[-800:]}"
            )
        channel.close()
        with suppress(subprocess.TimeoutExpired):
            process.process.wait(30)
        process.process.kill()
        text = process.log.read_text()
        for line in filter(None, text.splitlines()):
            if line.startswith("unexpected"):
                border.results[line[:90]] += 1


def run_rank(address: str) -> None:
    """A rank that reports a wrong order and goes on, where a real one ends."""
    from cenacle.ranks import worker
    from cenacle.ranks.messages import LoadOrder, StepOrder, StepResult, Stop

    os.environ |= {"CENACLE_CONTROL": address, "CENACLE_TOKEN": "t", "CENACLE_RANK": "0"}

    class _Vitals(worker.Vitals):
        def watch_disk(self, folder: Path) -> None:
            """Without a thread for every order."""

    channel = worker.connect_to_front()
    threading.Thread(target=worker.send_heartbeats, args=(channel,), daemon=True).start()
    order = parse(worker.receive_message(channel), LoadOrder)
    rank = worker._Worker(channel, order, _Vitals())
    engine = rank._load()
    while True:
        data = worker.receive_message(channel)
        try:
            message = parse(data, StepOrder, LoadOrder, Stop)
            if isinstance(message, StepOrder):
                engine._next_step = message.step.number  # type: ignore[attr-defined]
                tokens, _ = engine.step(message.step)
                result = StepResult(message.epoch, message.step.number, tuple(tokens))
                channel.send(result.to_json())
                continue
            if isinstance(message, LoadOrder):
                worker._Worker(channel, message, _Vitals())._load()
                continue
            raise ClusterError("stop")
        except Exception as error:
            if not isinstance(error, CenacleError | MessageError):
                import traceback

                frames_ = traceback.extract_tb(error.__traceback__)[-1:]
                where = "".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames_)
                print(f"unexpected {type(error).__name__} at {where}", flush=True)
            worker.report_failure(channel, error)


# ---- Borders of agents and of machines that join ----------------------------------------------


class PlayedHead:
    """A head that says anything: what agents, joining machines and downloads get from it."""

    def __init__(
        self, folder: Path, serve: Callable[[Any, random.Random], None], seed: str
    ) -> None:
        self.authority = identities.Authority(folder)
        self._context = self.authority.identity.server_tls_context()
        self._listener = socket.create_server((HOST, 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._serve, self._seed, self.closed = serve, seed, False
        threading.Thread(target=self._accept, daemon=True).start()

    def member(self, folder: Path) -> identities.Identity:
        """An identity of its cluster."""
        key = identities.new_key()
        certificate = self.authority.sign(identities.certificate_request(key), "0123456789abcdef")
        return identities.store_node_identity(
            *(folder, key, certificate), id="0123456789abcdef", name="x", host=HOST, port=self.port
        )

    def _accept(self) -> None:
        with suppress(OSError):
            for number in itertools.count():
                sock, _ = self._listener.accept()
                threading.Thread(target=self._handle, args=(sock, number), daemon=True).start()

    def _handle(self, sock: socket.socket, number: int) -> None:
        sock.settimeout(WAIT_S)
        with suppress(OSError, ClusterError), sock:
            with self._context.wrap_socket(sock, server_side=True) as stream:
                self._serve(stream, random.Random(f"{self._seed}/{number}"))

    def close(self) -> None:
        """Accept nobody more."""
        self.closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def orders(folder: Path, border: Border, frames: int, seed: int) -> None:
    """What a head sends to an agent, which is a real process."""
    costly: Counter[str] = Counter()
    ids = itertools.count(1)
    finished = threading.Event()

    def make(dice: random.Random) -> Any:
        if dice.random() < 0.95:
            order = damage(sample_message(dice.choice(messages.ORDERS), dice), dice)
            return {"type": "order", "id": next(ids), "order": order}
        kinds = (
            messages.Welcome,
            messages.Heartbeat,
            messages.OrderRequest,
            messages.Shutdown,
            messages.Rejection,
        )
        return damage(sample_message(dice.choice(kinds), dice), dice)

    def is_allowed(message: Any) -> bool:
        """Not what an agent must obey by ending, and little that starts processes."""
        with suppress(CenacleError):
            made = parse(message, messages.Shutdown, messages.Rejection, messages.OrderRequest)
            if not isinstance(made, messages.OrderRequest):
                return False
            order = parse(made.order, *messages.ORDERS)
            if isinstance(order, messages.StartRank | messages.Diagnose | messages.StartDownload):
                costly[order.type or ""] += 1
                return costly[order.type or ""] <= COSTLY
        return True

    def serve(stream: Any, dice: random.Random) -> None:
        channel = Channel(stream, WAIT_S)
        first = channel.receive()
        if first.get("type") != "agent":  # a download of the agent, or a relay
            stream.sendall(frame(damage(sample_message(messages.FileList, dice), dice), dice))
            return
        channel.send(messages.Welcome("odd").to_json())
        threading.Thread(target=drain, args=(channel,), daemon=True).start()
        while border.frames < frames:
            message = make(dice)
            try:
                json.dumps(message)
            except ValueError:
                continue
            if is_allowed(message):
                border.count()
                stream.sendall(
                    frame(message, dice) if dice.random() < 0.1 else plain_frame(message)
                )
                if border.frames % 50 == 0:
                    channel.send(messages.Heartbeat().to_json())
                time.sleep(0.005)  # so that it answers some before one ends the connection
        # A good order in the end.
        channel.send({"type": "order", "id": 0, "order": messages.FindPorts(HOST, 1).to_json()})
        for _ in range(int(WAIT_S)):
            channel.send(messages.Heartbeat().to_json())
            if finished.wait(1):
                return

    def drain(channel: Channel) -> None:
        with suppress(ClusterError):
            while True:
                message = channel.receive()
                if message["type"] == "order_result":
                    border.results["error" if message.get("error") else "result"] += 1
                    if message["id"] == 0 and message.get("result"):
                        finished.set()

    head = PlayedHead(folder / "orders-head", serve, f"{seed}/{border.name}")
    head.member(folder / "orders-node")
    process = Process(folder / "orders-agent", __file__, "--agent", str(folder / "orders-node"))
    try:
        if not finished.wait(WAIT_S + frames / 5):
            border.add_wrong("the agent did not carry out a good order in the end")
        process.check(border)
    finally:
        process.close()
        head.close()


def plain_frame(message: Any) -> bytes:
    data = json.dumps(message).encode()
    return net.FRAME_HEADER.pack(len(data)) + data


def run_agent(folder: str) -> None:
    """An agent as `cenacle join` runs it, which waits less before it connects again."""
    import logging

    from cenacle.cluster import agent

    logging.basicConfig()
    agent.RECONNECT_DELAYS_S = (0.0,)
    identity = identities.Identity(Path(folder), "node")
    settings = identity.load_settings()
    parts = Path(os.environ["CENACLE_HOME"]) / "parts"
    made = agent.Agent(identity, settings["host"], settings["port"], [DEMO.parent], print, parts)
    print(agent.run(made), flush=True)


def joining(folder: Path, border: Border, frames: int, seed: int) -> None:
    """What somebody in a head's place sends to a machine that joins, and to commands."""
    token = pairing.new_token()

    def serve(stream: Any, dice: random.Random) -> None:
        channel = Channel(stream, WAIT_S)
        first = channel.receive()
        if first["type"] == "query":
            message = sample_message(dice.choice((messages.QueryResult, messages.Rejection)), dice)
            stream.sendall(frame(damage(message, dice), dice))
        elif dice.random() < 0.3:
            message = messages.PairChallenge(pairing.encode(dice.randbytes(16))).to_json()
            stream.sendall(frame(damage(message, dice), dice))
        else:
            nonce = dice.randbytes(16)
            channel.send(messages.PairChallenge(pairing.encode(nonce)).to_json())
            proof = channel.receive()
            grant = {"certificate": head.authority.pem.decode(), "id": "0" * 16, "name": "x"}
            payload = json.dumps(damage(grant, dice)).encode()
            certificate = identities.leaf_certificate_der(head.authority.identity.certificate)
            own = (pairing.decode(first["nonce"]), nonce, certificate)
            answer = pairing.channel_bound_proof(token, "head", *own, payload)
            del proof
            message = messages.PairResult(pairing.encode(payload), pairing.encode(answer)).to_json()
            damaged = damage(message, dice) if dice.random() < 0.4 else message
            stream.sendall(frame(damaged, dice))

    head = PlayedHead(folder / "joining-head", serve, f"{seed}/{border.name}")
    known = head.member(folder / "joining-node")
    numbers = itertools.count()

    def join(dice: random.Random) -> None:
        if dice.random() < 0.3:
            query = messages.Query("status")
            border.expect(lambda: query_head(known, HOST, head.port, query, 5.0), "query")
            return
        target = folder / "joining" / str(next(numbers))
        border.expect(lambda: pair_with_head(target, HOST, head.port, token, "x"), "pair")

    in_threads(border, frames, seed, join)
    head.close()


def sources(folder: Path, border: Border, frames: int, seed: int) -> None:
    """What a head sends to a node that downloads from it."""

    def serve(stream: Any, dice: random.Random) -> None:
        channel = Channel(stream, WAIT_S)
        for _ in range(20):
            request = channel.receive()
            kinds = (messages.FileList, messages.FileData, messages.RetryLater, messages.Rejection)
            right = messages.FileList if request.get("file") is None else messages.FileData
            kind = right if dice.random() < 0.8 else dice.choice(kinds)
            message = sample_message(kind, dice)
            stream.sendall(
                frame(damage(message, dice), dice) + dice.randbytes(dice.choice((0, 9, 100)))
            )

    head = PlayedHead(folder / "sources-head", serve, f"{seed}/{border.name}")
    identity = head.member(folder / "sources-node")

    def read(dice: random.Random) -> None:
        source = HeadSource(identity, HOST, head.port)
        for _ in range(10):
            if dice.random() < 0.5:
                border.expect(source.files, "files")
            else:
                border.expect(lambda: b"".join(source.read("a", 0, 100)), "read")
        source.close()

    import cenacle.cluster.download.task as task

    task.DEADLINE_S = 1.0  # for bytes that never come
    in_threads(border, frames, seed, read)
    head.close()


# ---- Borders between ranks --------------------------------------------------------------------


def mesh(_: Path, border: Border, frames: int, seed: int) -> None:
    """Handshakes of strangers with a rank that waits for its group."""
    from cenacle.collective.rendezvous import HELLO, MAGIC, VERSION, Rendezvous

    ports = net.free_ports(2)
    addresses, secret = [f"{HOST}:{port}" for port in ports], b"secret"
    connected: dict[int, Any] = {}

    def listen() -> None:
        connected[0] = Rendezvous(0, addresses, secret, 2.0).connect_all(WAIT_S + frames / 20)

    waiting = threading.Thread(target=listen, daemon=True)
    waiting.start()
    wait_for(lambda: socket.create_connection((HOST, ports[0])).close() or True, "a listener")

    def send(dice: random.Random) -> None:
        fields = [MAGIC, VERSION, 2, 1, 0, dice.randbytes(16)]
        if dice.random() < 0.5:
            fields[dice.randint(1, 4)] = dice.randint(0, 255)
        hello = bytearray(HELLO.pack(*fields))
        for _ in range(dice.randint(0, 2)):
            hello[dice.randrange(len(hello))] ^= 1 << dice.randrange(8)
        size = len(hello) if dice.random() < 0.8 else dice.randrange(1 << 16)
        data = size.to_bytes(2, "big") + bytes(hello) + dice.randbytes(dice.choice((0, 2, 34, 300)))
        border.count()
        send_and_close(socket.create_connection((HOST, ports[0]), timeout=30), data)

    in_threads(border, frames, seed, send)
    try:
        Rendezvous(1, addresses, secret, 5.0).connect_all(WAIT_S)
        waiting.join(WAIT_S)
        if 1 not in connected.get(0, {}):
            border.add_wrong("the honest rank was not connected")
    except ClusterError as error:
        border.add_wrong(f"the honest rank was not connected: {error}")


def links(folder: Path, border: Border, frames: int, seed: int) -> None:
    """What a rank with the group's secret sends into all-reduces: native code reads it."""
    process = Process(folder / border.name, __file__, "--links", str(frames), str(seed))
    try:
        status = process.process.wait(WAIT_S + frames / 5)
    except subprocess.TimeoutExpired:
        status = None
        process.process.kill()
    lines = process.log.read_text().splitlines() or ["nothing"]
    if status != 0:
        border.add_wrong(f"the process ended with {status}: {lines[-15:]}")
        return
    for result, count in json.loads(lines[-1]).items():
        border.count(result, count)
        if result not in ("refused", "taken"):
            border.add_wrong(result)


LINK_HEADER = struct.Struct("<IHBBQiIQ")  # of native/mesh/links.h


def link_bytes(dice: random.Random, count: int) -> bytes:
    """A message for an all-reduce, with one to three faults."""
    fields = [0x4D434E43, 2, 1, 1, 0, -1, 0, 4 * count]
    extreme = (0, 1, 2, 3, 7, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(fields))
        if at == 5:
            fields[at] = dice.choice((-(2**31), 0, 5, 2**31 - 1))
        elif at in (2, 3):
            fields[at] = dice.choice((0, 2, 3, 6, 9, 254, 255))
        else:
            limit = {0: 2**32, 1: 2**16, 6: 2**32}.get(at, 2**64)
            fields[at] = dice.choice(extreme) % limit
    beats = LINK_HEADER.pack(0x4D434E43, 2, 254, 0, 0, 0, 0, 0) * dice.choice((0, 0, 1, 5))
    data = beats + LINK_HEADER.pack(*fields) + dice.randbytes(dice.choice((0, 3, 4 * count, 5000)))
    return data[: dice.randrange(len(data))] if dice.random() < 0.1 else data


def run_links(frames: int, seed: int) -> None:
    """A real rank 0 in an all-reduce with a wrong rank 1, in a process for each: MLX does not go on
    after an error."""
    import mlx.core as mx

    from cenacle.collective.mesh import Mesh, MeshConfig
    from cenacle.collective.rendezvous import Rendezvous

    def reduce(folder: str, dice: random.Random) -> str:
        addresses = [f"unix:{folder}/{rank}" for rank in (0, 1)]
        count = dice.choice((1, 8, 1000))

        def send() -> None:
            (sock,) = Rendezvous(1, addresses, b"x", WAIT_S).connect_all(WAIT_S).values()
            with suppress(OSError), sock:
                sock.sendall(link_bytes(dice, count))

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        group = Mesh(0, MeshConfig(addresses, b"x", silence_s=2, deadline_s=4, join_s=WAIT_S))
        sender.join(WAIT_S)
        try:
            mx.eval(group.all_sum(mx.ones(count)))
            group.raise_if_failed()
        except (ClusterError, RuntimeError) as error:
            return "refused" if str(error) else "an error without words"
        return "taken"

    results, statuses = Counter[str](), {0: "refused", 1: "taken", 2: "an error without words"}
    for number in range(frames):
        if (pid := os.fork()) == 0:
            signal.alarm(int(WAIT_S))
            with tempfile.TemporaryDirectory(prefix="cenacle-fuzz-links-") as folder:
                result = reduce(folder, random.Random(f"{seed}/{number}"))
            os._exit({text: status for status, text in statuses.items()}[result])
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        results[statuses.get(status, f"ended with {status}, number {number}")] += 1
    print(json.dumps(results))


def probes(_: Path, border: Border, frames: int, seed: int) -> None:
    """Link probes: what strangers send to one that waits, and what a wrong one answers."""
    secret = b"0123456789abcdef"

    def send(dice: random.Random) -> None:
        port = link_probe.serve_probe(HOST, secret)
        for _ in range(20):
            data = secret[: dice.randrange(17)] + dice.randbytes(dice.choice((0, 1, 64, 5000)))
            border.count()
            with suppress(OSError):
                send_and_close(socket.create_connection((HOST, port), timeout=5), data)
        listener = socket.create_server((HOST, 0))

        def answer() -> None:
            with suppress(OSError), listener:
                sock, _ = listener.accept()
                with sock:
                    sock.settimeout(1)
                    for _ in range(dice.randint(0, 60)):
                        sock.recv(64)
                        sock.sendall(dice.randbytes(dice.choice((1, 63, 64))))

        threading.Thread(target=answer, daemon=True).start()
        port = listener.getsockname()[1]
        border.expect(lambda: link_probe.probe_link(HOST, port, secret), "probe")

    in_threads(border, frames, seed, send)


HEAD_BORDERS: dict[str, Callable[[RealCluster, Border, int, int], None]] = {
    "strangers": strangers,
    "members": members,
    "agents": agents,
    "downloads": downloads,
}
BORDERS: dict[str, Callable[[Path, Border, int, int], None]] = {
    "results": results,
    "relays": relays,
    "ranks": ranks,
    "front": front,
    "orders": orders,
    "joining": joining,
    "sources": sources,
    "mesh": mesh,
    "links": links,
    "probes": probes,
}


class _TracebackHandler(logging.Handler):
    """Keeps what is logged with a traceback, or by asyncio."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__()
        self._kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        if (record.exc_info or record.name == "asyncio") and len(self._kept) < 50:
            self._kept.append(logging.Formatter().format(record)[-900:])


def run(names: list[str], frames: int, seed: int) -> int:
    """Fuzz the borders one after the other, and print what came of it."""
    failed_threads: list[str] = []
    threading.excepthook = lambda args: failed_threads.append(
        f"{args.thread.name if args.thread else ''}: {args.exc_type.__name__}: {args.exc_value}"
    )
    logging.basicConfig(level=logging.ERROR, handlers=[_TracebackHandler(failed_threads)])
    done: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="cenacle-fuzz-", ignore_cleanup_errors=True) as made:
        folder, cluster = Path(made), None
        if any(name in HEAD_BORDERS for name in names):
            cluster = RealCluster(folder)
        for name in names:
            border, began = Border(name), time.monotonic()
            if name in HEAD_BORDERS and cluster is not None:
                HEAD_BORDERS[name](cluster, border, frames, seed)
                cluster.check(border)
            else:
                BORDERS[name](folder, border, frames, seed)
            border.wrong += failed_threads
            failed_threads.clear()
            for text in border.wrong:
                print(f"{name}: {text}", file=sys.stderr)
            seconds = round(time.monotonic() - began, 1)
            done[name] = {"frames": border.frames, "seconds": seconds, "wrong": len(border.wrong)}
            print(json.dumps({name: {**done[name], **border.results}}), flush=True)
        if cluster is not None:
            cluster.close()
    result = {
        "borders": len(done),
        "frames": {name: row["frames"] for name, row in done.items()},
        "wrong": {name: row["wrong"] for name, row in done.items() if row["wrong"]},
        "seed": seed,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))
    return 1 if result["wrong"] else 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10_000, help="at each border")
    parser.add_argument("--seed", type=int, default=0)
    every = [*HEAD_BORDERS, *BORDERS]
    parser.add_argument("--borders", nargs="+", choices=every, default=every)
    parser.add_argument("--agent", help=argparse.SUPPRESS)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--links", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.agent:
        run_agent(args.agent)
        return 0
    if args.links:
        run_links(*args.links)
        return 0
    if args.rank:
        run_rank(args.rank)
        return 0
    return run(args.borders, args.frames, args.seed)


if __name__ == "__main__":
    sys.exit(main())
