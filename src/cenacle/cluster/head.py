"""The head of a cluster: it knows the nodes, forms groups of them, and gives their agents orders.

Owns: the state of the cluster, carrying out what `membership.py` decides, groups and how their
ranks failed, and the answers to queries.
Does not know: models, plans, what orders are for (`formation.py`), HTTP.
Invariant: every wait has a deadline; when an agent is lost, so are the relays of its ranks; a
group id is on disk before the group is used, so that none is used twice.
Threads: the state belongs to one event loop in a thread of its own; public methods are for other
threads.
Next: `head_server.py` accepts the connections, `agent.py` is the other side.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from socket import socket
from typing import Any, TypeVar

from .. import paths
from ..errors import CenacleError, ClusterError, InputError, NodesMissing, printable
from ..message import Message, MessageError
from . import framing, head_server, membership, messages, node_info
from .head_server import FileServer, HeadServer
from .loop_thread import LoopThread
from .membership import Membership, Node
from .node_connection import SEND_TIMEOUT_S, NodeConnection, blame
from .relay import Relays, Stream
from .roster import Roster
from .security import identity, pairing

log = logging.getLogger(__name__)

PORT = 4747
TICK_INTERVAL_S = 0.5
DIAGNOSIS_TIMEOUT_S = 60.0  # tools of macOS take their time
STOP_TIMEOUT_S = 10.0
AGENTS_STOP_TIMEOUT_S = 3.0
DISMISSAL_DELAY_S = 0.2  # in which an agent ends by itself
HEAD_CLOSED = "was disconnected because the head ends"
HEAD_ENDED = "the cluster was ended"
MAX_GROUP_ID = 2**32  # that an agent may know and this head does not
LOCAL_ADDRESSES = {"0.0.0.0": "127.0.0.1", "::": "::1"}
R = TypeVar("R", bound=Message)
T = TypeVar("T")


@dataclass(frozen=True)
class GroupMembership:
    """A group that is to be started.

    Args:
        group_id: higher than every id before it, also across restarts of the head.
        members: in rank order; the first is the head's own node.
    """

    group_id: int
    members: tuple[Node, ...]


@dataclass(frozen=True)
class ReturningNodes:
    """Nodes that are connected while a group runs without them.

    Args:
        group_id: of the running group.
        members: of the group with them, in rank order.
        returning: the members that are not in the running group.
    """

    group_id: int
    members: tuple[Node, ...]
    returning: tuple[Node, ...]


class Head:
    """The control plane of a cluster.

    Args:
        folder: with this user's keys and the roster.
        host, port: where to listen; port 0 takes any free port.
        name: of the head's own node.
        token_life_s: how long a token is valid.

    Raises:
        InputError: the folder cannot be used, another head uses it, or the port is taken.
    """

    def __init__(
        self,
        folder: Path,
        host: str = "0.0.0.0",  # peers have to prove who they are
        port: int = PORT,
        name: str = "",
        token_life_s: float = pairing.TOKEN_LIFE_S,
    ) -> None:
        self._lock = paths.lock_file(folder / "head.lock", "the head of this cluster")
        try:
            authority = identity.Authority(folder)
            self._roster_file = folder / "roster.json"
            roster = Roster.load(self._roster_file)
            self._listener = head_server.listen(host, port)
        except BaseException:
            self._lock.close()
            raise
        self.identity = authority.identity
        self.port: int = self._listener.getsockname()[1]
        # Where the agent and the commands of the head's own machine connect.
        self.own_address = LOCAL_ADDRESSES.get(host, host)
        self.identity.save_settings(name=name, host=self.own_address, port=self.port)
        self.shutdown_requested = threading.Event()
        self.on_shutdown: Callable[[], None] = lambda: None
        self._state = Membership(node_info.versions(), group_id=roster.group_id)
        self._connections: dict[str, NodeConnection] = {}
        self._relays = Relays()
        self._exit_reasons: dict[tuple[int, int], str] = {}  # by group id and rank
        self._groups: queue.Queue[GroupMembership] = queue.Queue()
        self._returning: queue.Queue[ReturningNodes] = queue.Queue()
        self._file_server: FileServer | None = None
        self._download_progress: dict[str, dict[str, int]] = {}
        self._status: dict[str, Any] = {}
        self._tokens = pairing.Tokens(time.monotonic, token_life_s)
        self._closing = False
        self._expects_disconnections = False
        self._loop = LoopThread("head")
        self._server = HeadServer(
            self._listener,
            authority,
            self._tokens,
            lambda node_id: node_id in self._state.nodes,
            self._add_member,
            {
                messages.AgentHello: self._serve_agent,
                messages.RelayHello: self._serve_relay,
                messages.FileRequest: self._serve_files,
                messages.Query: self._serve_query,
            },
            self._loop,
        )
        try:
            self._loop.run(self._start(roster, name))
        except BaseException:
            self.close()
            raise

    # ---- Groups -------------------------------------------------------------------------------

    def form_group(
        self,
        nodes: int,
        report: Callable[[str], None] = lambda _: None,
        cancel: threading.Event | None = None,
        max_wait_s: float | None = None,
        temporary: bool = False,
        timeout_s: float | None = None,
    ) -> GroupMembership:
        """Wait until a group can be started.

        Args:
            nodes: how many; 0: all nodes of the cluster, but at least two.
            report: told which nodes are missing, whenever that changes.
            cancel: stops waiting.
            max_wait_s: after this long the nodes that are there are enough; None: never.
            temporary: more nodes are desired, and are added when they connect.
            timeout_s: after this long nothing is waited for any more; None: never.

        Raises:
            NodesMissing: the time is over; says which.
            ClusterError: the head is closed, or `cancel` was set.
        """
        self._call(lambda: self._dispatch(membership.GroupRequested(nodes, temporary)))
        reported, started_s = "", time.monotonic()
        while True:
            waited_s = time.monotonic() - started_s
            if max_wait_s is not None and waited_s > max_wait_s:
                self._call(self._request_available_nodes)
            with suppress(queue.Empty):
                return self._groups.get(timeout=0.2)
            if timeout_s is not None and waited_s > timeout_s:
                self._call(lambda: self._dispatch(membership.GroupRequestCancelled()))
                with suppress(queue.Empty):  # it was complete in the last moment
                    return self._groups.get_nowait()
                raise NodesMissing(
                    f"{self.describe_missing(nodes)}; start the missing agents with `cenacle "
                    f"join`, add a machine with `cenacle nodes --invite`, or ask for fewer nodes "
                    f"with -n"
                )
            if self.closed or (cancel is not None and cancel.is_set()):
                raise ClusterError("the cluster was ended before all nodes were connected")
            missing = self.describe_missing(nodes)
            if missing != reported:
                reported = missing
                report(missing)

    @property
    def node_count(self) -> int:
        """Number of nodes of the cluster."""
        return len(self._state.nodes)

    @property
    def eligible_count(self) -> int:
        """Number of nodes that can be members of a group now."""
        return sum(n.eligible for n in self._state.nodes.values())

    def describe_missing(self, nodes: int) -> str:
        """Which nodes a group of this size is waiting for, as a sentence."""
        state = self._state
        available = [n.name for n in state.nodes.values() if n.eligible]
        required = nodes or max(2, len(state.nodes))
        reasons = "; ".join(f"{n.name} {n.reason}" for n in membership.ineligible_nodes(state))
        names = f" ({', '.join(available)})" if available else ""
        return f"{len(available)} of {required} nodes are available{names}" + (
            f": {reasons}" if reasons else ""
        )

    def mark_ready(self, group_id: int) -> None:
        """Note that all ranks of a group have loaded."""
        event = membership.GroupReady(group_id, time.monotonic())
        self._call(lambda: self._dispatch(event))

    def end_group(self, group_id: int, blamed: str | None = None) -> None:
        """Note that a group has ended, so that another may be started.

        Args:
            blamed: id of the node that failed; "": one failed, it is not known which.
        """
        event = membership.GroupEnded(group_id, time.monotonic(), blamed)
        with suppress(ClusterError):
            self._call(lambda: self._dispatch(event))

    def wait_for_returning(self, timeout_s: float) -> ReturningNodes | None:
        """The nodes that are to be added to the running group; None: none within the time."""
        try:
            return self._returning.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def reject_nodes(self, nodes: Sequence[Node], reason: str) -> None:
        """Note that these nodes cannot be added now."""
        event = membership.NodesRejected(tuple(n.id for n in nodes), time.monotonic(), reason)
        with suppress(ClusterError):
            self._call(lambda: self._dispatch(event))

    def is_joining(self, nodes: ReturningNodes) -> bool:
        """Whether these nodes are still to be added."""
        state = self._state
        return state.group_id == nodes.group_id and state.running and bool(state.joining)

    def failure_reason(self, group: GroupMembership, rank: int) -> str | None:
        """How a rank of a group failed, as a sentence; None: it did not, as far as is known."""
        node = group.members[rank]
        if (reason := self._absence_reason(node)) is not None:
            return f"rank {rank}: node {node.name} ({node.address}) {reason}"
        if (reason := self._exit_reasons.get((group.group_id, rank))) is not None:
            return f"rank {rank} on {node.name} {reason}"
        return None

    # ---- Nodes --------------------------------------------------------------------------------

    def invite(self) -> str:
        """A new token."""
        return self._call(self._tokens.issue)

    def revoke(self, token: str = "", remove_nodes: bool = False) -> dict[str, Any]:
        """Make a token worthless, or all of them.

        Args:
            token: as printed; "": all.
            remove_nodes: remove the nodes that joined with it since this head started.

        Returns:
            How many `tokens` were valid, and the names of the nodes that joined with them: those
            `removed`, or those that `stay`.

        Raises:
            InputError: it is not known.
        """
        return self._call(lambda: self._revoke(token, remove_nodes))

    def is_connected(self, node: Node) -> bool:
        """Whether a node's agent is connected."""
        return self._absence_reason(node) is None

    def heartbeat_age_s(self, node: Node) -> float:
        """Seconds since a node's last heartbeat."""
        current = self._state.nodes.get(node.id)
        return float("inf") if current is None else time.monotonic() - current.last_heartbeat_s

    def send_order(self, node: Node, order: messages.Order[R], timeout_s: float = 10.0) -> R:
        """Have an agent carry out an order.

        Raises:
            CenacleError: the agent's error, in its own class, with the node's name in front.
            ClusterError: the agent is lost, or took too long.
        """
        return self._run(self._execute(node, order, timeout_s), timeout_s + 5)

    def send_orders(
        self, orders: Sequence[tuple[Node, messages.Order[R]]], timeout_s: float = 10.0
    ) -> list[R]:
        """The same for several at once; the first error is raised."""

        async def execute_all() -> list[R]:
            return await asyncio.gather(*(self._execute(n, o, timeout_s) for n, o in orders))

        return self._run(execute_all(), timeout_s + 5)

    def expect_relays(self, names: Sequence[str]) -> list[socket]:
        """Sockets that are connected to ranks once agents open relays of these secret names."""
        return self._call(lambda: self._relays.expect(names))

    def cancel_relays(self, names: Sequence[str]) -> None:
        """Stop expecting relays of these names."""
        with suppress(ClusterError):
            self._call(lambda: self._relays.cancel(names))

    def serve_files(self, server: FileServer) -> None:
        """Let nodes download from this server from now on."""
        self._file_server = server

    # ---- Status -------------------------------------------------------------------------------

    def set_status(self, **fields: Any) -> None:
        """Add to `status`."""
        self._status.update(fields)

    def set_download_progress(self, node: Node, done: int, total: int) -> None:
        """Add to `status` how many bytes of its part of the model a node has."""
        self._download_progress[node.id] = {"done": done, "total": total}

    def status(self) -> dict[str, Any]:
        """The state of the cluster, as JSON."""
        state = self._state
        return {
            **self._status,
            "phase": state.phase,
            "group_id": state.group_id,
            "nodes": [self._describe_node(state, node) for node in state.nodes.values()],
        }

    def _describe_node(self, state: Membership, node: Node) -> dict[str, Any]:
        address = self._reachable_address(state.nodes) if node.id == identity.HEAD else node.address
        row = {
            "id": node.id,
            "name": node.name,
            "connected": node.connected,
            "reason": node.reason or membership.exclusion_reason(state, node),
            "rank": state.members.index(node.id) if node.id in state.members else None,
            "address": address,
            "heartbeat_age_s": round(self.heartbeat_age_s(node), 1) if node.connected else None,
            "download_progress": self._download_progress.get(node.id),
            "cenacle": node.versions.get("cenacle"),
            "mlx": node.versions.get("mlx"),
        }
        if node.info is not messages.UNKNOWN_NODE:
            row |= {
                "system": node.info.system,
                "processor": node.info.processor,
                "memory_bytes": node.info.memory_bytes,
                "available_bytes": node.info.available_bytes,
                "read_bytes_per_s": node.info.read_bytes_per_s,
                "kernels": node.info.kernels,
            }
        return row

    # ---- Start and stop -----------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it has ended, or is about to."""
        return self._closing or self.shutdown_requested.is_set()

    def expect_disconnections(self) -> None:
        """Stop reporting nodes that disconnect: the head is about to close."""
        self._expects_disconnections = True

    def close(self, end_agents: bool = False) -> None:
        """Close the port and all connections; `end_agents`: tell the agents to end as well."""
        if self._closing:
            return
        self._closing = self._expects_disconnections = True
        with suppress(ClusterError):
            self._loop.run(self._stop(end_agents), STOP_TIMEOUT_S)
        self._loop.stop()
        self._listener.close()
        self._lock.close()

    def _run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        if self._closing:
            work.close()
            raise ClusterError("the head has ended")
        return self._loop.run(work, timeout_s)

    def _call(self, work: Callable[[], T]) -> T:
        if self._closing:
            raise ClusterError("the head has ended")
        return self._loop.call(work)

    async def _start(self, roster: Roster, name: str) -> None:
        self._dispatch(membership.NodeRegistered(identity.HEAD, name or "head"))
        for node_id, node_name in roster.nodes.items():
            self._dispatch(membership.NodeRegistered(node_id, node_name))
        await self._server.start()
        self._loop.spawn(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_INTERVAL_S)
            self._dispatch(membership.Tick(time.monotonic()))

    async def _stop(self, end_agents: bool) -> None:
        if end_agents:
            for connection in list(self._connections.values()):
                with suppress(ClusterError):
                    await connection.send(messages.Shutdown(HEAD_ENDED), 1)
            ends_s = time.monotonic() + AGENTS_STOP_TIMEOUT_S
            while self._connections.keys() - {identity.HEAD} and time.monotonic() < ends_s:
                await asyncio.sleep(0.02)
        self._server.close()
        for connection in self._connections.values():
            connection.close(HEAD_CLOSED)
        self._relays.close()
        await self._loop.cancel_tasks(5)

    # ---- Decisions ----------------------------------------------------------------------------

    def _dispatch(self, event: membership.Event) -> None:
        """Apply an event, and carry out the actions that follow."""
        self._state, actions = membership.apply_event(self._state, event)
        for action in actions:
            match action:
                case membership.Disconnect(id=node_id, reason=reason):
                    if (connection := self._connections.get(node_id)) is not None:
                        connection.close(reason)
                case membership.Reject(id=node_id, reason=reason):
                    log.warning("%s %s", self._state.nodes[node_id].name, reason)
                    error = ClusterError(f"this node {reason}")
                    self._loop.spawn(self._connections[node_id].reject(error))
                case membership.StartGroup(group_id=group_id, members=members):
                    self._exit_reasons.clear()
                    self._save_roster()
                    nodes = tuple(self._with_address(i, members) for i in members)
                    self._groups.put(GroupMembership(group_id, nodes))
                case membership.AddNodes(ids=node_ids):
                    self._returning.put(self._returning_nodes(node_ids))

    def _returning_nodes(self, node_ids: tuple[str, ...]) -> ReturningNodes:
        state = self._state
        members = tuple(i for i in state.nodes if i in state.members or i in node_ids)
        return ReturningNodes(
            state.group_id,
            tuple(self._with_address(i, members) for i in members),
            tuple(state.nodes[i] for i in node_ids),
        )

    def _request_available_nodes(self) -> None:
        if self._state.requested_nodes is not None:  # else a group has just been started
            nodes = max(1, self.eligible_count)
            self._dispatch(membership.GroupRequested(nodes, temporary=True))

    def _with_address(self, node_id: str, members: Iterable[str]) -> Node:
        node = self._state.nodes[node_id]
        if node_id != identity.HEAD:
            return node
        return replace(node, address=self._reachable_address(members))

    def _reachable_address(self, members: Iterable[str]) -> str:
        """The head's address for the others; its own agent connects over the loopback device."""
        connections = (self._connections.get(i) for i in members if i != identity.HEAD)
        return next((c.local_address for c in connections if c is not None), self.own_address)

    def _absence_reason(self, node: Node) -> str | None:
        current = self._state.nodes.get(node.id)
        if current is None:
            return "was removed from this cluster"
        return None if current.connected else current.reason

    def _add_member(self, node_id: str, name: str) -> str:
        self._dispatch(membership.NodeRegistered(node_id, name))
        self._save_roster()
        return self._state.nodes[node_id].name

    def _save_roster(self) -> None:
        nodes = {n.id: n.name for n in self._state.nodes.values() if n.id != identity.HEAD}
        Roster(self._state.group_id, nodes).save(self._roster_file)

    # ---- Connections --------------------------------------------------------------------------

    async def _serve_agent(self, node_id: str, hello: messages.AgentHello, stream: Stream) -> None:
        name = self._state.nodes[node_id].name
        if node_id in self._connections:
            # Perhaps the agent's own connection of a moment ago, so it may try again.
            error = ClusterError(f"{name} is already connected")
            await head_server.reject_and_close(stream[1], error, retry=True)
            return
        self._check_group_id(hello.group_id)
        info = messages.UNKNOWN_NODE
        if not membership.describe_mismatch(self._state.versions, hello.versions):
            info = messages.NodeInfo.from_json(hello.info, "agent.info")
        connection = NodeConnection(node_id, name, stream)
        self._connections[node_id] = connection
        heartbeats = self._loop.spawn(connection.send_heartbeats())
        reason = "has lost its agent"
        try:
            await connection.send(messages.Welcome(name))
            address = stream[1].get_extra_info("peername")[0]
            now_s = time.monotonic()
            self._dispatch(
                membership.NodeConnected(
                    node_id, now_s, hello.versions, info, address, hello.group_id
                )
            )
            log.info("%s has connected (%s)", name, address)
            reason = await connection.receive(
                lambda message: self._on_agent_message(node_id, message)
            )
        except ClusterError as error:
            reason = str(error)
        finally:
            heartbeats.cancel()
            del self._connections[node_id]
            reason = connection.close(reason)
            self._dispatch(membership.NodeDisconnected(node_id, reason))
            if not self._expects_disconnections:
                log.warning("%s %s", name, reason)

    def _check_group_id(self, group_id: int) -> None:
        # The next group's id is higher than any that an agent knows: it must not get out of range.
        limit = max(MAX_GROUP_ID, self._state.group_id)
        if group_id > limit:
            raise MessageError(f"agent.group_id: expected at most {limit}, got {group_id}")

    def _on_agent_message(
        self, node_id: str, message: messages.Heartbeat | messages.RankExited
    ) -> None:
        match message:
            case messages.Heartbeat(available_bytes=available_bytes):
                self._dispatch(
                    membership.HeartbeatReceived(node_id, time.monotonic(), available_bytes)
                )
            case messages.RankExited(group_id=group_id, rank=rank, pid=pid, reason=reason):
                state = self._state
                if group_id != state.group_id or not state.members:
                    return  # of a group that has ended
                if state.members[rank : rank + 1] != (node_id,):
                    raise MessageError(f"rank_exited.rank: rank {rank} runs on another node")
                self._exit_reasons[group_id, rank] = f"(process {pid}) {printable(reason)}"

    async def _serve_relay(self, node_id: str, hello: messages.RelayHello, stream: Stream) -> None:
        connection = self._connections.get(node_id)
        if connection is None:
            raise ClusterError("relay for a node whose agent is not connected")
        await connection.relay(self._relays, hello.name, stream)

    async def _serve_files(
        self, node_id: str, request: messages.FileRequest, stream: Stream
    ) -> None:
        await head_server.serve_files(
            lambda: self._file_server, lambda: node_id in self._state.nodes, request, stream
        )

    async def _execute(self, node: Node, order: messages.Order[R], timeout_s: float) -> R:
        connection = self._connections.get(node.id)
        if connection is None:
            reason = self._absence_reason(node) or "is not connected"
            raise blame(node.id, ClusterError(f"{node.name} {reason}"))
        return await connection.execute(order, timeout_s)

    # ---- Queries ------------------------------------------------------------------------------

    async def _serve_query(self, node_id: str, query: messages.Query, stream: Stream) -> None:
        try:
            result = await self._answer_query(node_id, query)
        except CenacleError as error:
            await head_server.reject_and_close(stream[1], error)
            return
        await framing.send(stream[1], messages.QueryResult(result), SEND_TIMEOUT_S)
        await framing.close_gracefully(stream[1], head_server.CLOSE_TIMEOUT_S)
        if query.name == "down":
            self.shutdown_requested.set()
            self.on_shutdown()

    async def _answer_query(self, node_id: str, query: messages.Query) -> dict[str, Any]:
        if query.name in ("invite", "revoke", "remove", "down") and node_id != identity.HEAD:
            raise ClusterError("only allowed on the head's machine")
        match query.name:
            case "status":
                return self.status()
            case "doctor":
                return {"nodes": await self._diagnose_nodes()}
            case "invite":
                return {"token": self._tokens.issue()}
            case "revoke":
                return self._revoke(query.token, query.remove_nodes)
            case "leave":
                return {"removed": self._remove_node(node_id)}
            case "remove":
                return {"removed": self._remove_node(self._find_node(query.node))}
            case "down":
                return {"phase": "ending"}

    async def _diagnose_nodes(self) -> dict[str, Any]:
        """What `cenacle doctor` finds on each node, by name."""

        async def diagnose(node: Node) -> Sequence[dict[str, Any]]:
            try:
                order = messages.Diagnose(time.time())
                answer = await self._execute(node, order, DIAGNOSIS_TIMEOUT_S)
                return [finding.to_json() for finding in answer.findings]
            except CenacleError as error:
                message = f"It could not be checked: {error}."
            return [{"level": "bad", "message": message, "fix": "See the output of its agent."}]

        nodes = list(self._state.nodes.values())
        findings = await asyncio.gather(*(diagnose(node) for node in nodes))
        return {node.name: found for node, found in zip(nodes, findings, strict=True)}

    def _revoke(self, token: str, remove_nodes: bool) -> dict[str, Any]:
        valid, joined = self._tokens.revoke(token)
        nodes = [self._state.nodes[i] for i in joined if i in self._state.nodes]
        if remove_nodes:
            for node in nodes:
                self._remove_node(node.id)
        return {"tokens": valid, "removed" if remove_nodes else "stay": [n.name for n in nodes]}

    def _find_node(self, name: str) -> str:
        others = [n for n in self._state.nodes.values() if n.id != identity.HEAD]
        for node in others:
            if name in (node.name, node.id):
                return node.id
        names = ", ".join(n.name for n in others)
        raise InputError(f"node: expected one of {names or 'none'}, got {name}", "node")

    def _remove_node(self, node_id: str) -> str:
        if node_id == identity.HEAD:
            raise InputError("the head cannot leave its own cluster; `cenacle down` ends it")
        self._loop.spawn(self._dismiss(node_id))
        return self._state.nodes[node_id].name

    async def _dismiss(self, node_id: str) -> None:
        """Tell a node's agent to end, then remove the node."""
        if (connection := self._connections.get(node_id)) is not None:
            with suppress(ClusterError):
                await connection.send(messages.Shutdown("the node was removed from the cluster"))
            await asyncio.sleep(DISMISSAL_DELAY_S)
        self._dispatch(membership.NodeRemoved(node_id))
        self._save_roster()
