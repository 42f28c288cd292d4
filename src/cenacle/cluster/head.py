"""The head of a cluster: it lets machines in, hears their agents, and gives them orders.

Owns: the listening socket, the roster of machines that belong to the cluster, one connection per
agent, the way of each rank's messages, the way of what machines fetch, and carrying out what
`state.py` decides.
Does not know: models, plans, what orders are for (`forming.py`), HTTP.
Invariant: whoever has no certificate of this cluster's authority, or was removed, can only ask to
pair; every wait has a deadline; an agent that is lost is lost with all its ranks' connections.
Threads: everything here runs in one asyncio loop in a thread of its own; `Head`'s public methods
are for other threads.
Next: `agent.py` is the other side, `hosts.py` makes ranks of relays.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import queue
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from .. import net, paths
from ..collective import socket_options
from ..errors import CenacleError, ClusterError, InputError, error_from_json, error_to_json
from . import framing, membership, node_info
from .download.file_server import ModelFileServer
from .membership import Membership, Node
from .security import identity, pairing

log = logging.getLogger(__name__)

PORT = 4747
GREETING_S = 10.0  # in which a connection must have said who it is
GUESTS = 64  # connections that have not, at one time
WRONG_S = 0.5  # how long a wrong answer waits
ALIVE_EVERY_S = 0.25
LOOK_EVERY_S = 0.5  # who has fallen silent
SEND_S = 4.0
IDLE_S = 60.0  # in which whoever fetches asks for more
LATER_S = 0.2  # how long who asks too early waits
EXAMINE_S = 60.0  # tools of macOS take their time
T = TypeVar("T")


@dataclass(frozen=True)
class GroupMembership:
    """A group to be made.

    Args:
        group_id: higher than of all before it, also before this head was started.
        members: in rank order; the first is the head's own machine.
    """

    group_id: int
    members: tuple[Node, ...]


@dataclass(frozen=True)
class ReturningNodes:
    """Machines that are here while a group works without them.

    Args:
        group_id: of the group that works.
        members: of the group that there would be with them, in rank order.
        returning: those of them who are not in the present one.
    """

    group_id: int
    members: tuple[Node, ...]
    returning: tuple[Node, ...]


@dataclass
class _Agent:
    """A connected agent."""

    writer: asyncio.StreamWriter
    local: str  # this side's address of its connection
    orders: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    relays: set[asyncio.Task[None]] = field(default_factory=set)
    why: str = ""  # why it was hung up on, if it was


class Head:
    """The control plane of a cluster.

    Args:
        folder: where this user's keys and roster are.
        host, port: where to listen; port 0: any that is free.
        name: of the head's own machine.
        token_life_s: how long a token admits.

    Raises:
        InputError: the folder cannot be used, another head runs from it, or the port is taken.
    """

    def __init__(
        self,
        folder: Path,
        host: str = "0.0.0.0",  # machines join from elsewhere, and have to prove themselves
        port: int = PORT,
        name: str = "",
        token_life_s: float = pairing.TOKEN_LIFE_S,
    ) -> None:
        self._lock = take_lock(folder / "head.lock", "a head of this cluster")
        try:
            self._authority = identity.Authority(folder)
            self._roster_file = folder / "roster.json"
            roster = self._read_roster()
            self._socket = _listen(host, port)
        except BaseException:
            self._lock.close()
            raise
        self.identity = self._authority.identity
        self._tokens = pairing.Tokens(time.monotonic, token_life_s)
        self._der = ssl.PEM_cert_to_DER_cert(_first(self.identity.certificate.read_text()))
        self._agents: dict[str, _Agent] = {}
        self._awaited: dict[str, socket.socket] = {}  # relay's name -> the front's end of it
        self._exit_reasons: dict[tuple[int, int], str] = {}  # group, rank
        self._forms: queue.Queue[GroupMembership] = queue.Queue()
        self._returns: queue.Queue[ReturningNodes] = queue.Queue()
        self._given: ModelFileServer | None = None
        self._parts: dict[str, dict[str, int]] = {}  # how far each machine has fetched its own
        self._about: dict[str, Any] = {}  # what the program adds to `status`
        self._guests: dict[asyncio.StreamWriter, None] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._order = 0
        self.shutdown_requested = threading.Event()  # set when somebody asked for the end
        self.on_shutdown: Callable[[], None] = lambda: None
        self._state = Membership(node_info.versions(), group_id=roster["group_id"])
        self._closing = False
        self.port: int = self._socket.getsockname()[1]
        # The head's machine calls itself here; verbs do too.
        self.own_address = _EVERYWHERE.get(host, host)
        self.identity.remember(name=name, host=self.own_address, port=self.port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="head", daemon=True)
        started: Future[None] = Future()
        self._thread.start()
        self._loop.call_soon_threadsafe(self._task, self._start(roster["nodes"], name, started))
        try:
            started.result(10)
        except BaseException:
            self.close()
            raise

    # For other threads

    def invite(self) -> str:
        """A new token."""
        return self._do(_value(self._tokens.issue))

    def form_group(
        self,
        nodes: int,
        say: Callable[[str], None] = lambda _: None,
        ending: threading.Event | None = None,
        max_wait_s: float | None = None,
        temporary: bool = False,
    ) -> GroupMembership:
        """Wait until a group can be made.

        Args:
            nodes: how many machines; 0: all that belong to the cluster, two at least.
            say: told who is waited for, when that changes.
            ending: gives up when it is set.
            max_wait_s: after so long the machines that are there will do; None: never.
            temporary: more machines are wished for, and are taken in when they come.

        Raises:
            ClusterError: the head is closed, or `ending` was set.
        """
        self._do(_value(lambda: self._happens(membership.GroupRequested(nodes, temporary))))
        said, began = "", time.monotonic()
        while True:
            if max_wait_s is not None and time.monotonic() - began > max_wait_s:
                self._do(_value(self._ask_for_less))
            with contextlib.suppress(queue.Empty):
                return self._forms.get(timeout=0.2)
            if self.closed or (ending is not None and ending.is_set()):
                raise ClusterError("the cluster was ended before it was complete")
            waiting = self.describe_missing(nodes)
            if waiting != said:
                said = waiting
                say(waiting)

    @property
    def node_count(self) -> int:
        """How many machines belong to the cluster."""
        return len(self._state.nodes)

    @property
    def eligible_count(self) -> int:
        """How many of them can take part now."""
        return sum(n.eligible for n in self._state.nodes.values())

    def describe_missing(self, nodes: int) -> str:
        """Who is waited for, as a sentence."""
        now = self._state
        here = [n.name for n in now.nodes.values() if n.eligible]
        wanted = nodes or max(2, len(now.nodes))
        gone = "; ".join(f"{n.name} {n.reason}" for n in membership.ineligible_nodes(now))
        return f"{len(here)} of {wanted} machines are here ({', '.join(here)})" + (
            f": {gone}" if gone else ""
        )

    def mark_ready(self, group_id: int) -> None:
        """Note that a formation's ranks have loaded."""
        self._do(_value(lambda: self._happens(membership.GroupReady(group_id, time.monotonic()))))

    def end_group(self, group_id: int, blamed: str | None = None) -> None:
        """Note that a formation has ended; another may be made.

        Args:
            blamed: the id of the machine that failed; "": one did, it is not known which.
        """
        with contextlib.suppress(ClusterError):
            over = membership.GroupEnded(group_id, time.monotonic(), blamed)
            self._do(_value(lambda: self._happens(over)))

    def wait_for_returning(self, timeout_s: float) -> ReturningNodes | None:
        """Who is to be taken into the group that works; None: nobody within so long."""
        try:
            return self._returns.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def reject_nodes(self, nodes: Sequence[Node], reason: str) -> None:
        """Note that these cannot be taken in now."""
        unfit = membership.NodesRejected(tuple(n.id for n in nodes), time.monotonic(), reason)
        with contextlib.suppress(ClusterError):
            self._do(_value(lambda: self._happens(unfit)))

    def is_joining(self, nodes: ReturningNodes) -> bool:
        """Whether those are still to be taken in."""
        now = self._state
        return now.group_id == nodes.group_id and now.running and bool(now.joining)

    @property
    def closed(self) -> bool:
        """Whether it has ended, or is about to."""
        return self._closing or self.shutdown_requested.is_set()

    def send_order(
        self, who: Node, what: str, deadline_s: float = 10.0, **arguments: Any
    ) -> dict[str, Any]:
        """Have an agent do something.

        Raises:
            CenacleError: what the agent said, in its own class, with the machine's name.
            ClusterError: the agent is lost, or took too long.
        """
        return self._do(self._ask(who, what, arguments, deadline_s), deadline_s + 5)

    def send_orders(
        self, many: Sequence[tuple[Node, dict[str, Any]]], what: str, deadline_s: float = 10.0
    ) -> list[dict[str, Any]]:
        """The same for several at once, each with its own arguments."""

        async def all_of_them() -> list[dict[str, Any]]:
            return await asyncio.gather(*(self._ask(n, what, a, deadline_s) for n, a in many))

        return self._do(all_of_them(), deadline_s + 5)

    def expect_relays(self, names: list[str]) -> list[socket.socket]:
        """The front's ends of relays that agents will open under these (secret) names."""
        ends = []

        def prepare() -> None:
            for name in names:
                near, far = socket.socketpair()
                self._awaited[name] = far
                ends.append(near)

        self._do(_value(prepare))
        return ends

    def drop_relays(self, names: list[str]) -> None:
        """Whoever has not come under these names need not come any more."""

        def drop() -> None:
            for name in names:
                if (far := self._awaited.pop(name, None)) is not None:
                    far.close()

        with contextlib.suppress(ClusterError):
            self._do(_value(drop))

    def failure_reason(self, group: GroupMembership, rank: int) -> str | None:
        """How a rank of a group failed, as a sentence; None: it did not, as far as is known."""
        node = group.members[rank]
        if (reason := self._absence_reason(node)) is not None:
            return f"rank {rank}: node {node.name} ({node.address}) {reason}"
        if (reason := self._exit_reasons.get((group.group_id, rank))) is not None:
            return f"rank {rank} on {node.name} {reason}"
        return None

    def is_connected(self, node: Node) -> bool:
        """Whether a node's agent is connected."""
        return self._absence_reason(node) is None

    def _absence_reason(self, node: Node) -> str | None:
        current = self._state.nodes.get(node.id)
        if current is None:
            return "was removed from this cluster"
        return None if current.connected else current.reason

    def serve_files(self, given: ModelFileServer) -> None:
        """What the machines of the cluster may fetch from now on."""
        self._given = given

    def set_download_progress(self, who: Node, done: int, total: int) -> None:
        """Add to what `status` says: bytes of its part that a machine has, and bytes in all."""
        self._parts[who.id] = {"done": done, "total": total}

    def heartbeat_age_s(self, who: Node) -> float:
        """For how long a machine's agent has not been heard."""
        node = self._state.nodes.get(who.id)
        return time.monotonic() - node.last_heartbeat_s if node is not None else float("inf")

    def set_status(self, **about: Any) -> None:
        """Add to what `status` says."""
        self._about.update(about)

    def status(self) -> dict[str, Any]:
        """The state of the cluster, as JSON."""
        now = self._state
        return {
            **self._about,
            "phase": now.phase,
            "group_id": now.group_id,
            "nodes": [
                {
                    "id": node.id,
                    "name": node.name,
                    "connected": node.connected,
                    "reason": node.reason or membership.exclusion_reason(now, node),
                    "rank": now.members.index(node.id) if node.id in now.members else None,
                    "address": self._address(now.nodes)
                    if node.id == identity.HEAD
                    else node.address,
                    "heartbeat_age_s": round(self.heartbeat_age_s(node), 1)
                    if node.connected
                    else None,
                    "download_progress": self._parts.get(node.id),
                    **{k: v for k, v in node.facts.items() if k in _SHOWN},
                }
                for node in now.nodes.values()
            ],
        }

    def close(self, end_agents: bool = False) -> None:
        """Stop listening and hang up on everyone; `end_agents`: tell the agents to end as well."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(ClusterError, FutureTimeout):
            self._call(self._stop(end_agents), 10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._socket.close()
        self._lock.close()

    # In the loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T], deadline_s: float = 10.0) -> T:
        if self._closing:
            work.close()
            raise ClusterError("the head has ended")
        return self._call(work, deadline_s)

    def _call(self, work: Coroutine[Any, Any, T], deadline_s: float) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(deadline_s)
        except FutureTimeout:
            future.cancel()
            raise ClusterError(f"the head did not answer within {deadline_s:g} s") from None

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _start(self, nodes: dict[str, str], name: str, started: Future[None]) -> None:
        try:
            self._happens(membership.NodeRegistered(identity.HEAD, name or "head"))
            for who, called in nodes.items():
                self._happens(membership.NodeRegistered(who, called))
            self._server = await asyncio.start_server(
                self._guest,
                sock=self._socket,
                ssl=self.identity.server(),
                ssl_handshake_timeout=GREETING_S,
                limit=framing.PIECE,
            )
            self._task(self._tick())
            started.set_result(None)
        except BaseException as error:
            started.set_exception(error)

    async def _stop(self, end_agents: bool) -> None:
        if end_agents:
            for agent in list(self._agents.values()):
                with contextlib.suppress(ClusterError):
                    await framing.send(agent.writer, {"type": "end", "reason": _DOWN}, 1)
            ends = time.monotonic() + 3
            while self._agents.keys() - {identity.HEAD} and time.monotonic() < ends:
                await asyncio.sleep(0.02)
        self._server.close()
        for who in list(self._agents):
            self._hang_up(who, _ENDED)
        for far in self._awaited.values():
            far.close()
        for guest in list(self._guests):
            framing.hang_up(guest)
        rest = [t for t in self._tasks if t is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*rest, return_exceptions=True), 5)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._happens(membership.Tick(time.monotonic()))

    def _happens(self, event: membership.Event) -> None:
        before = self._state
        self._state, actions = membership.apply_event(before, event)
        for action in actions:
            match action:
                case membership.Disconnect(id=who, reason=reason):
                    self._hang_up(who, reason)
                case membership.Reject(id=who, reason=reason):
                    agent = self._agents[who]
                    name = self._state.nodes[who].name
                    log.warning("%s %s", name, reason)
                    self._task(self._refuse(agent.writer, ClusterError(f"this machine {reason}")))
                case membership.StartGroup(group_id=group_id, members=members):
                    # Written down first: no number is ever used twice.
                    self._write_roster()
                    nodes = tuple(self._with_address(m, members) for m in members)
                    self._forms.put(GroupMembership(group_id, nodes))
                case membership.AddNodes(ids=ids):
                    known = self._state.nodes
                    whole = [n for n in known if n in self._state.members or n in ids]
                    self._returns.put(
                        ReturningNodes(
                            self._state.group_id,
                            tuple(self._with_address(n, tuple(whole)) for n in whole),
                            tuple(known[n] for n in ids),
                        )
                    )

    def _ask_for_less(self) -> None:
        if self._state.requested_nodes is not None:  # else the group has just been begun
            self._happens(membership.GroupRequested(max(1, self.eligible_count), temporary=True))

    def _with_address(self, who: str, members: tuple[str, ...]) -> Node:
        node = self._state.nodes[who]
        return replace(node, address=self._address(members)) if who == identity.HEAD else node

    def _address(self, members: Iterable[str]) -> str:
        """The head's own: its agent calls over the loopback, but the others know a better one."""
        others = [self._agents.get(m) for m in members if m != identity.HEAD]
        seen = [agent.local for agent in others if agent is not None]
        return seen[0] if seen else self.own_address

    def _hang_up(self, who: str, reason: str) -> None:
        if (agent := self._agents.get(who)) is not None:
            agent.why = agent.why or reason
            framing.hang_up(agent.writer)
            for relay in list(agent.relays):
                relay.cancel()

    async def _refuse(
        self,
        writer: asyncio.StreamWriter,
        error: CenacleError,
        again: bool = False,
    ) -> None:
        message = {"type": "refused", "error": error_to_json(error), "again": again}
        with contextlib.suppress(ClusterError):
            await framing.send(writer, message, SEND_S)

    # Connections

    async def _guest(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if len(self._guests) >= GUESTS:  # whoever is here longest is not one of us
            framing.hang_up(next(iter(self._guests)))
        self._guests[writer] = None
        socket_options.configure_socket(writer.get_extra_info("socket"))
        try:
            await self._greet(reader, writer)
        except (CenacleError, OSError) as error:
            log.info("a connection was closed: %s", error)
        except asyncio.CancelledError:
            pass  # hung up on; asyncio would print that of a connection's task
        finally:
            self._guests.pop(writer, None)
            framing.hang_up(writer)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        hello = await framing.receive(reader, GREETING_S, framing.GREETING)
        if hello["type"] == "pair":
            await self._pair(hello, reader, writer)
            return
        if certificate is None:
            await self._say_no(
                writer, ClusterError("this machine is not of this cluster: join it with a token")
            )
            return
        who = identity.whose(certificate)
        if who not in self._state.nodes:
            await self._say_no(
                writer, ClusterError("this machine was removed from this cluster: join it again")
            )
            return
        self._guests.pop(writer, None)
        match hello["type"]:
            case "agent":
                await self._hear(who, hello, reader, writer)
            case "relay":
                await self._relay(who, hello, reader, writer)
            case "read_file":
                await self._give(who, hello, reader, writer)
            case "ask":
                try:
                    await self._answer(who, hello, writer)
                except InputError as error:
                    await self._say_no(writer, error)

    async def _say_no(
        self,
        writer: asyncio.StreamWriter,
        error: CenacleError,
        again: bool = False,
    ) -> None:
        await asyncio.sleep(WRONG_S)
        await self._refuse(writer, error, again)
        writer.close()
        with contextlib.suppress(OSError):
            await asyncio.wait_for(writer.wait_closed(), 1)

    async def _pair(
        self,
        hello: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        theirs, ours = pairing.decode(hello.get("nonce")), secrets.token_bytes(pairing.NONCE)
        await framing.send(writer, {"type": "nonce", "nonce": pairing.encode(ours)}, SEND_S)
        asked = await framing.receive(reader, GREETING_S, framing.GREETING)
        said = pairing.decode(asked.get("said"))
        try:
            if len(theirs) != pairing.NONCE:
                raise ClusterError("this is not how machines pair")
            proof = pairing.decode(asked.get("proof"))
            token = self._tokens.find(proof, theirs, ours, self._der, said)
            about = json.loads(said)
            who = secrets.token_hex(8)
            certificate = self._authority.sign(str(about["request"]).encode(), who)
            name = _printable(str(about["name"]))
        except (ClusterError, ValueError, KeyError, TypeError) as error:
            log.warning("a machine was not let in: %s", error)
            await self._say_no(writer, ClusterError(str(error)))
            return
        self._happens(membership.NodeRegistered(who, name))
        self._write_roster()
        name = self._state.nodes[who].name
        given = json.dumps({"certificate": certificate.decode(), "name": name, "id": who}).encode()
        answer = pairing.proof_of(token, "head", theirs, ours, self._der, given)
        log.info("%s has joined", name)
        await framing.send(
            writer,
            {"type": "paired", "said": pairing.encode(given), "proof": pairing.encode(answer)},
            SEND_S,
        )
        writer.close()
        with contextlib.suppress(OSError):
            await asyncio.wait_for(writer.wait_closed(), 5)

    async def _hear(
        self,
        who: str,
        hello: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """An agent's connection, until it ends."""
        if who in self._agents:
            # Perhaps its own connection of a moment ago: it may try again.
            reason = f"{self._state.nodes[who].name} is here already"
            await self._say_no(writer, ClusterError(reason), again=True)
            return
        facts = hello.get("facts")
        if not isinstance(facts, dict):
            raise ClusterError("an agent did not say what its machine is")
        agent = _Agent(writer, writer.get_extra_info("sockname")[0])
        self._agents[who] = agent
        why = "has lost its agent"
        alive = self._task(self._say_alive(writer))
        try:
            name = self._state.nodes[who].name
            await framing.send(writer, {"type": "welcome", "name": name}, SEND_S)
            address = writer.get_extra_info("peername")[0]
            self._happens(membership.NodeConnected(who, time.monotonic(), facts, address))
            log.info("%s is here (%s)", name, address)
            while True:
                # Who is silent is decided in one place, `state.decide`, and before this.
                message = await framing.receive(reader, 3 * membership.HEARTBEAT_TIMEOUT_S)
                if message["type"] == "alive":
                    said = message.get("facts")
                    now = said if isinstance(said, dict) else {}
                    self._happens(membership.Heartbeat(who, time.monotonic(), now))
                elif message["type"] == "answer":
                    future = agent.orders.pop(message.get("id", -1), None)
                    if future is not None and not future.done():
                        future.set_result(message)
                elif message["type"] == "rank_exited":
                    self._exit_reasons[(message["group_id"], message["rank"])] = (
                        f"(process {message['pid']}) {message['reason']}"
                    )
                elif message["type"] == "leaving":
                    why = "has ended its agent"
        except (CenacleError, KeyError, TypeError) as error:
            if isinstance(error, CenacleError) and str(error) != "closed the connection":
                why = str(error)
        finally:
            alive.cancel()
            del self._agents[who]
            self._hang_up_on(agent)
            node = self._state.nodes.get(who)
            self._happens(membership.NodeDisconnected(who, agent.why or why))
            log.warning("%s %s", node.name if node else who, agent.why or why)
            for future in agent.orders.values():
                if not future.done():
                    future.set_exception(ClusterError(agent.why or why))

    def _hang_up_on(self, agent: _Agent) -> None:
        for relay in list(agent.relays):
            relay.cancel()

    async def _say_alive(self, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ClusterError):
            while True:
                await asyncio.sleep(ALIVE_EVERY_S)
                await framing.send(writer, {"type": "alive"}, SEND_S)

    async def _relay(
        self,
        who: str,
        hello: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """A rank's messages, between its agent and the front."""
        far = self._awaited.pop(str(hello.get("name")), None)
        agent = self._agents.get(who)
        if far is None or agent is None:
            raise ClusterError("a relay that nobody waits for")
        near = await asyncio.open_unix_connection(sock=far, limit=framing.PIECE)
        task = asyncio.current_task()
        assert task is not None
        agent.relays.add(task)
        try:
            await framing.send(writer, {"type": "welcome"}, SEND_S)
            await framing.pass_on((reader, writer), near)
        finally:
            agent.relays.discard(task)
            near[1].close()
            # What a rank said last is on its way to the front: TLS has nothing more to give.

    async def _give(
        self,
        who: str,
        asked: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """What a machine fetches of the model, one range after the other."""
        while who in self._state.nodes:
            try:
                if self._given is None:
                    raise ClusterError("the head has no model to give yet")
                answer = await asyncio.to_thread(self._given.serve, asked)
            except CenacleError as error:
                await self._refuse(writer, error)
            else:
                if answer is None:
                    await asyncio.sleep(LATER_S)
                    await framing.send(writer, {"type": "retry_later"}, SEND_S)
                else:
                    await framing.send(writer, {"type": "file_data", **answer[0]}, SEND_S)
                    for at in range(0, len(answer[1]), framing.PIECE):
                        await framing.send_bytes(
                            writer, answer[1][at : at + framing.PIECE], GREETING_S
                        )
            asked = await framing.receive(reader, IDLE_S, framing.GREETING)

    async def _answer(self, who: str, hello: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """A verb's question."""
        match hello.get("what"):
            case "status":
                answer: dict[str, Any] = self.status()
            case "doctor":
                answer = {"machines": await self._examine()}
            case "invite" if who == identity.HEAD:
                answer = {"token": self._tokens.issue()}
            case "leave":
                answer = self._strike(who)
            case "strike" if who == identity.HEAD:
                answer = self._strike(self._named(str(hello.get("name"))))
            case "down" if who == identity.HEAD:
                answer = {"phase": "ending"}
            case _:
                await self._say_no(
                    writer, ClusterError("only the head's own machine may ask for that")
                )
                return
        await framing.send(writer, {"type": "answer", **answer}, SEND_S)
        writer.close()
        with contextlib.suppress(OSError):
            await asyncio.wait_for(writer.wait_closed(), 1)
        if hello.get("what") == "down":
            self.shutdown_requested.set()
            self.on_shutdown()

    async def _examine(self) -> dict[str, Any]:
        """What is wrong with each machine, as its own agent says; and who is not here."""

        async def one(node: Node) -> list[dict[str, str]]:
            try:
                arguments = {"now_s": time.time()}
                return list((await self._ask(node, "examine", arguments, EXAMINE_S))["findings"])
            except ClusterError as error:
                said = f"It could not be examined: {error}."
            return [{"level": "bad", "what": said, "fix": "See its agent's own words there."}]

        nodes = list(self._state.nodes.values())
        found = await asyncio.gather(*(one(node) for node in nodes))
        return {node.name: said for node, said in zip(nodes, found, strict=True)}

    def _named(self, name: str) -> str:
        for node in self._state.nodes.values():
            if name in (node.name, node.id) and node.id != identity.HEAD:
                return node.id
        names = ", ".join(n.name for n in self._state.nodes.values() if n.id != identity.HEAD)
        raise InputError(f"no machine of this cluster is called {name}; there are: {names}")

    def _strike(self, who: str) -> dict[str, Any]:
        if who == identity.HEAD:
            raise InputError("the head cannot leave its own cluster; `cenacle down` ends it")
        name = self._state.nodes[who].name
        agent = self._agents.get(who)
        if agent is not None:
            # The machine is struck when its agent has heard why.
            self._task(self._bid_farewell(agent, who))
        else:
            self._happens(membership.NodeRemoved(who))
            self._write_roster()
        return {"left": name}

    async def _bid_farewell(self, agent: _Agent, who: str) -> None:
        with contextlib.suppress(ClusterError):
            await framing.send(
                agent.writer, {"type": "end", "reason": "it left the cluster"}, SEND_S
            )
        await asyncio.sleep(0.2)
        self._happens(membership.NodeRemoved(who))
        self._write_roster()

    async def _ask(
        self, who: Node, what: str, arguments: dict[str, Any], deadline_s: float
    ) -> dict[str, Any]:
        agent = self._agents.get(who.id)
        if agent is None:
            raise _of(
                who, ClusterError(f"{who.name} {self._absence_reason(who) or 'is not connected'}")
            )
        self._order += 1
        number, future = self._order, self._loop.create_future()
        agent.orders[number] = future
        message = {"type": "order", "id": number, "what": what, "arguments": arguments}
        try:
            await framing.send(agent.writer, message, SEND_S)
            answer = await asyncio.wait_for(future, deadline_s)
        except TimeoutError:
            said = f"{who.name} did not do what it was told ({what}) within {deadline_s:g} s"
            raise _of(who, ClusterError(said)) from None
        except ClusterError as error:
            raise _of(who, ClusterError(f"{who.name} {error}")) from None
        finally:
            agent.orders.pop(number, None)
        if (refusal := answer.get("error")) is not None:
            raise _of(who, error_from_json(refusal, f"{who.name}: "))
        return dict(answer["result"])

    # The roster

    def _read_roster(self) -> dict[str, Any]:
        if not self._roster_file.exists():
            return {"group_id": 0, "nodes": {}}
        try:
            found = json.loads(paths.read_private(self._roster_file))
            return {
                "group_id": int(found["group_id"]),
                "nodes": {str(k): str(v) for k, v in found["nodes"].items()},
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self._roster_file} is damaged ({error!r}): remove it; every machine then has "
                f"to join again"
            ) from error

    def _write_roster(self) -> None:
        nodes = {n.id: n.name for n in self._state.nodes.values() if n.id != identity.HEAD}
        data = {"group_id": self._state.group_id, "nodes": nodes}
        paths.write_private(self._roster_file, json.dumps(data, indent=1).encode())


def take_lock(path: Path, what: str) -> Any:
    """An open file that only one process at a time can have; it holds the process's number.

    Raises:
        InputError: another process has it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = path.open("a+")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise InputError(f"{what} runs already (process {holder}) with {path.parent}") from None
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
    return file


def _of(who: Node, error: CenacleError) -> CenacleError:
    error.node_id = who.id
    return error


_ENDED, _DOWN = "was told that the head ends", "the head was ended"
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_SHOWN = (
    "cenacle",
    "mlx",
    "system",
    "processor",
    "memory_bytes",
    "available_bytes",
    "read_bytes_s",
    "kernels",
)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return net.listen(host, port, GUESTS)
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}:{port} ({error.strerror}); choose another with --listen",
            "listen",
        ) from error


def _first(pem: str) -> str:
    end = "-----END CERTIFICATE-----"
    return pem[: pem.index(end) + len(end)] + "\n"


def _printable(name: str) -> str:
    kept = "".join(c for c in name if c.isalnum() or c in "-_.")[:40]
    return kept or "node"


async def _value(work: Callable[[], T]) -> T:
    return work()
