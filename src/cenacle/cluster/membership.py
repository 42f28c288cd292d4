"""What the head knows of its nodes, and what it does next: a pure function of reported events.

Owns: the events, the state they lead to, and the resulting actions: when a group starts, which
node is lost, and which nodes are added to a group that is already running.
Does not know: clocks (events carry their time), sockets, models.
Invariant: the same events give the same state and actions. There is at most one group at a time,
and its id is higher than every id before it.
Next: `head.py`, which turns what happens into events and carries out the actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .messages import UNKNOWN_NODE, NodeInfo

HEARTBEAT_TIMEOUT_S = 4.0  # agents send four heartbeats a second
MIN_PRESENCE_S = 5.0  # a node must have been connected this long before a group is re-formed for it
COOLDOWN_S = 10.0  # exclusion after a failed join; doubles with every failure
MAX_COOLDOWN_S = 600.0
MAX_TRIAL_COOLDOWN_S = 60.0  # after a failed trial, which did not disturb the running group
PROVEN_AFTER_S = 60.0  # a node that has worked this long starts again with a short cooldown

FAILED_AFTER_JOIN = "the group failed after it had joined"

VERSIONS = ("cenacle", "mlx", "mlx_lm")
"""Packages whose versions must be equal on all nodes, so that ranks compute the same."""
OPTIONAL_VERSIONS = ("mlx_vlm",)
"""The same, of packages that not every node has: only some families need them."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Args:
        id: proved by its certificate.
        name: for people; unique in the cluster.
        connected: whether its agent is connected.
        reason: why it cannot take part; empty if it can.
        connected_at_s: when its agent connected.
        last_heartbeat_s: when its agent was last heard.
        versions: of its packages, see `VERSIONS`.
        info: what its agent reported about it.
        address: where other nodes reach it.
        cooldown_s: length of its last cooldown; 0: it has not failed.
        cooldown_until_s: when its present cooldown ends; 0: it has none.
        failure: what led to the cooldown.
    """

    id: str
    name: str
    connected: bool = False
    reason: str = "has not connected yet"
    connected_at_s: float = 0.0
    last_heartbeat_s: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    info: NodeInfo = UNKNOWN_NODE
    address: str = ""
    cooldown_s: float = 0.0
    cooldown_until_s: float = 0.0
    failure: str = ""

    @property
    def eligible(self) -> bool:
        """Whether it can be a member of a group."""
        return self.connected and not self.reason

    @property
    def cooldown_reason(self) -> str:
        """Why it is excluded for now; empty if it is not."""
        if not self.cooldown_until_s:
            return ""
        return f"is excluded for {self.cooldown_s:g} s: {self.failure}"


@dataclass(frozen=True)
class Membership:
    """Everything that decisions depend on.

    Args:
        versions: the head's own; nodes must have the same.
        nodes: by id, in the order in which they joined; the head's own node is the first.
        group_id: of the last group that was started.
        members: of the present group, in rank order; empty: there is none.
        requested_nodes: a group of at least so many nodes is requested (0: of all nodes of the
            cluster); None: no group is requested.
        target_nodes: how many nodes shall take part once they are available; 0: all.
        running: whether the present group has loaded.
        ready_at_s: since when.
        last_members: of the last group that has loaded.
        unproven: members of the present group that were not in the one before, until they have
            worked for `PROVEN_AFTER_S`.
        joining: nodes that are being added.
        next_members: exactly these form the next group if all are still eligible, because the last
            group ended in order to add some of them. Nodes that connected meanwhile have not been
            tried.
    """

    versions: Mapping[str, str]
    nodes: Mapping[str, Node] = field(default_factory=dict)
    group_id: int = 0
    members: tuple[str, ...] = ()
    requested_nodes: int | None = None
    target_nodes: int = 0
    running: bool = False
    ready_at_s: float = 0.0
    last_members: tuple[str, ...] = ()
    unproven: tuple[str, ...] = ()
    joining: tuple[str, ...] = ()
    next_members: tuple[str, ...] = ()

    @property
    def phase(self) -> str:
        """`running`, `forming`, `waiting` or `idle`."""
        if self.running:
            return "running"
        if self.members:
            return "forming"
        return "idle" if self.requested_nodes is None else "waiting"

    @property
    def desired_nodes(self) -> int:
        """How many nodes shall take part."""
        return self.target_nodes or max(2, len(self.nodes))


@dataclass(frozen=True)
class NodeRegistered:
    """A node belongs to the cluster: it has paired now or earlier."""

    id: str
    name: str


@dataclass(frozen=True)
class NodeConnected:
    """An agent has connected and described its node.

    `group_id`: of the last group that it knows.
    """

    id: str
    at_s: float
    versions: Mapping[str, str]
    info: NodeInfo
    address: str
    group_id: int = 0


@dataclass(frozen=True)
class HeartbeatReceived:
    """An agent is alive; `available_bytes`: of its node's memory, if it was measured."""

    id: str
    at_s: float
    available_bytes: int | None = None


@dataclass(frozen=True)
class NodeDisconnected:
    """An agent's connection has ended."""

    id: str
    reason: str


@dataclass(frozen=True)
class NodeRemoved:
    """A node no longer belongs to the cluster."""

    id: str


@dataclass(frozen=True)
class GroupRequested:
    """A group of `nodes` nodes is requested; 0: of all nodes of the cluster, but at least two.

    `temporary`: the group may be smaller than desired; further nodes are added when they connect.
    """

    nodes: int
    temporary: bool = False


@dataclass(frozen=True)
class GroupRequestCancelled:
    """Nobody waits for a group any more."""


@dataclass(frozen=True)
class GroupReady:
    """All ranks of a group have loaded."""

    group_id: int
    at_s: float = 0.0


@dataclass(frozen=True)
class GroupEnded:
    """A group has ended.

    `blamed`: the node that failed; "": one failed, it is not known which; None: none failed.
    """

    group_id: int
    at_s: float = 0.0
    blamed: str | None = None


@dataclass(frozen=True)
class NodesRejected:
    """Nodes that were to be added cannot be."""

    ids: tuple[str, ...]
    at_s: float
    reason: str


@dataclass(frozen=True)
class Tick:
    """Time has passed."""

    at_s: float


Event = (
    NodeRegistered
    | NodeConnected
    | HeartbeatReceived
    | NodeDisconnected
    | NodeRemoved
    | GroupRequested
    | GroupRequestCancelled
    | GroupReady
    | GroupEnded
    | NodesRejected
    | Tick
)


@dataclass(frozen=True)
class StartGroup:
    """Start a group of these nodes, in rank order."""

    group_id: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class AddNodes:
    """The group is running without these nodes: try them, then re-form it with them."""

    group_id: int
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Disconnect:
    """Close an agent's connection; its ranks are lost."""

    id: str
    reason: str


@dataclass(frozen=True)
class Reject:
    """Tell an agent why its node cannot take part."""

    id: str
    reason: str


Action = StartGroup | AddNodes | Disconnect | Reject


def apply_event(state: Membership, event: Event) -> tuple[Membership, tuple[Action, ...]]:
    """The state after an event, and what has to be done now."""
    actions: list[Action] = []
    match event:
        case NodeRegistered(id=node_id, name=name):
            if node_id not in state.nodes:
                state = _with(state, Node(node_id, _unique_name(state, name)))
        case NodeConnected():
            state = _connect(state, event, actions)
        case HeartbeatReceived(id=node_id, at_s=at_s, available_bytes=available_bytes):
            node = state.nodes.get(node_id)
            if node is not None and node.connected:
                if available_bytes is not None:
                    node = replace(node, info=replace(node.info, available_bytes=available_bytes))
                state = _with(state, replace(node, last_heartbeat_s=at_s))
        case NodeDisconnected(id=node_id, reason=reason):
            state = _disconnect(state, node_id, reason)
        case NodeRemoved(id=node_id):
            if node_id in state.nodes:
                actions.append(Disconnect(node_id, "was removed from this cluster"))
                others = {k: n for k, n in state.nodes.items() if k != node_id}
                state = replace(state, nodes=others)
        case GroupRequested(nodes=nodes, temporary=temporary):
            target = state.target_nodes if temporary else nodes
            state = replace(state, requested_nodes=nodes, target_nodes=target)
        case GroupRequestCancelled():
            state = replace(state, requested_nodes=None)
        case GroupReady(group_id=group_id, at_s=at_s):
            if group_id == state.group_id and state.members:
                members = state.members
                state = replace(state, running=True, ready_at_s=at_s, last_members=members)
        case GroupEnded():
            state = _end_group(state, event)
        case NodesRejected(ids=ids, at_s=at_s, reason=reason):
            tried = [i for i in ids if i in state.joining]
            state = _cool_down(state, tried, at_s, reason, MAX_TRIAL_COOLDOWN_S)
            state = replace(state, joining=())
        case Tick(at_s=at_s):
            state = _advance_time(state, at_s, actions)
    return _start_group(state, actions), tuple(actions)


def ineligible_nodes(state: Membership) -> list[Node]:
    """The nodes that cannot be members of a group now."""
    return [n for n in state.nodes.values() if not n.eligible]


def exclusion_reason(state: Membership, node: Node) -> str:
    """Why an eligible node is not in the running group; empty: it is, or no group is running."""
    if not state.running or not node.eligible or node.id in state.members:
        return ""
    if node.id in state.joining:
        return "is being added to the group"
    if len(state.members) >= state.desired_nodes:
        return f"is not needed: {state.desired_nodes} nodes were requested"
    return f"will be added after it has been connected for {MIN_PRESENCE_S:g} s"


def describe_mismatch(expected: Mapping[str, str], versions: Mapping[str, str]) -> str:
    """How a node's versions differ from the head's, and what to do; empty if they do not."""
    differences = [
        f"{name} {versions.get(name)}, expected {expected[name]}"
        for name in VERSIONS
        if versions.get(name) != expected[name]
    ] + [
        f"{name} {versions[name]}, expected {expected[name]}"
        for name in OPTIONAL_VERSIONS
        if name in versions and name in expected and versions[name] != expected[name]
    ]
    if not differences:
        return ""
    install = f"pip install cenacle=={expected['cenacle']}"
    return (
        f"runs {' and '.join(differences)} as on the head: run `{install}` on it, then start its "
        f"agent again"
    )


def _connect(state: Membership, event: NodeConnected, actions: list[Action]) -> Membership:
    node = state.nodes.get(event.id)
    if node is None:
        actions.append(Disconnect(event.id, "was removed from this cluster: join it again"))
        return state
    mismatch = describe_mismatch(state.versions, event.versions)
    if node.failure != FAILED_AFTER_JOIN:  # the cause may have been fixed
        node = replace(node, cooldown_s=0.0, cooldown_until_s=0.0)
    if mismatch:
        actions.append(Reject(event.id, mismatch))
    node = replace(
        node,
        connected=True,
        reason=mismatch or node.cooldown_reason,
        connected_at_s=event.at_s,
        last_heartbeat_s=event.at_s,
        versions=event.versions,
        info=event.info,
        address=event.address,
    )
    state = _with(state, node)
    if not state.members:
        # The head's roster may be older than what its nodes have seen.
        state = replace(state, group_id=max(state.group_id, event.group_id))
    return state


def _end_group(state: Membership, event: GroupEnded) -> Membership:
    if event.group_id != state.group_id:
        return state
    failed = [i for i in state.unproven if event.blamed in ("", i)]
    state = _cool_down(state, failed, event.at_s, FAILED_AFTER_JOIN, MAX_COOLDOWN_S)
    ended_to_add = event.blamed is None and state.joining
    next_members = (*state.members, *state.joining) if ended_to_add else ()
    return replace(
        state, members=(), running=False, unproven=(), joining=(), next_members=next_members
    )


def _advance_time(state: Membership, now_s: float, actions: list[Action]) -> Membership:
    for node in state.nodes.values():
        if node.connected and now_s - node.last_heartbeat_s > HEARTBEAT_TIMEOUT_S:
            reason = f"has sent no heartbeat for {HEARTBEAT_TIMEOUT_S:g} s"
            actions.append(Disconnect(node.id, reason))
            state = _disconnect(state, node.id, reason)
    for node in state.nodes.values():
        if node.cooldown_until_s and now_s >= node.cooldown_until_s:
            reason = "" if node.reason == node.cooldown_reason else node.reason
            state = _with(state, replace(node, cooldown_until_s=0.0, reason=reason))
    if state.running and state.unproven and now_s - state.ready_at_s >= PROVEN_AFTER_S:
        for node_id in state.unproven:
            if (proven := state.nodes.get(node_id)) is not None:
                state = _with(state, replace(proven, cooldown_s=0.0))
        state = replace(state, unproven=())
    if node_ids := _nodes_to_add(state, now_s):
        state = replace(state, joining=node_ids)
        actions.append(AddNodes(state.group_id, node_ids))
    return state


def _nodes_to_add(state: Membership, now_s: float) -> tuple[str, ...]:
    """The nodes for which the running group is to be re-formed now."""
    complete = all(m in state.nodes and state.nodes[m].eligible for m in state.members)
    settled = now_s - state.ready_at_s >= MIN_PRESENCE_S
    if not state.running or state.joining or not complete or not settled:
        return ()
    room = max(0, state.desired_nodes - len(state.members))
    others = [n for n in state.nodes.values() if n.eligible and n.id not in state.members][:room]
    present = [n for n in others if now_s - n.connected_at_s >= MIN_PRESENCE_S]
    # Nodes that connect together are added together, unless one of them keeps reconnecting.
    if len(present) < len(others) and all(
        now_s - n.connected_at_s < 3 * MIN_PRESENCE_S for n in present
    ):
        return ()
    return tuple(n.id for n in present)


def _start_group(state: Membership, actions: list[Action]) -> Membership:
    members = _members_of_next_group(state)
    if members is None:
        return state
    added = tuple(m for m in members if state.last_members and m not in state.last_members)
    state = replace(
        state,
        group_id=state.group_id + 1,
        members=members,
        requested_nodes=None,
        next_members=(),
        running=False,
        unproven=added,
    )
    actions.append(StartGroup(state.group_id, members))
    return state


def _members_of_next_group(state: Membership) -> tuple[str, ...] | None:
    if state.requested_nodes is None or state.members:
        return None
    eligible = [n.id for n in state.nodes.values() if n.eligible]
    if state.next_members and set(state.next_members) <= set(eligible):
        return tuple(i for i in eligible if i in state.next_members)
    required = state.requested_nodes or max(2, len(state.nodes))
    # The head's own node comes first and has rank 0: its tokens take the shortest way.
    if len(eligible) < required or not next(iter(state.nodes.values())).eligible:
        return None
    return tuple(eligible[:required])


def _cool_down(
    state: Membership, node_ids: Iterable[str], now_s: float, failure: str, limit_s: float
) -> Membership:
    """Exclude nodes for twice as long as last time."""
    for node_id in node_ids:
        node = state.nodes.get(node_id)
        if node is None:
            continue
        cooldown_s = min(limit_s, 2 * node.cooldown_s or COOLDOWN_S)
        node = replace(
            node, cooldown_s=cooldown_s, cooldown_until_s=now_s + cooldown_s, failure=failure
        )
        if node.eligible:
            node = replace(node, reason=node.cooldown_reason)
        state = _with(state, node)
    return state


def _disconnect(state: Membership, node_id: str, reason: str) -> Membership:
    node = state.nodes.get(node_id)
    if node is None or not node.connected:
        return state
    return _with(state, replace(node, connected=False, reason=reason))


def _with(state: Membership, node: Node) -> Membership:
    return replace(state, nodes={**state.nodes, node.id: node})


def _unique_name(state: Membership, name: str) -> str:
    names = {n.name for n in state.nodes.values()}
    candidate, count = name, 1
    while candidate in names:
        count += 1
        candidate = f"{name}-{count}"
    return candidate
