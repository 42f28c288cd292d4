"""What a head knows of its nodes, and what it does next: a pure function of what was reported.

Owns: events, the state that they make, and the actions that follow.
Does not know: time (events carry it), sockets, models.
Invariant: the same events give the same state and actions; at most one group exists at a time, and
each has a number (its epoch) higher than any before it.
Next: `control.py`, which makes events of what happens and carries the actions out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SILENCE_S = 4.0  # agents say once a second that they live; who does not for this long is lost

VERSIONS = ("cenacle", "mlx", "mlx_lm")
"""What must be the same on all nodes: ranks have to compute the same, and speak the same."""


@dataclass(frozen=True)
class Node:
    """One machine.

    Args:
        id: proved by its certificate.
        name: for people; unique in the cluster.
        here: whether its agent is connected.
        reason: why it is not here, or cannot take part; empty if it can.
        came_s: when its agent connected.
        heard_s: when it was last heard.
        facts: what its agent said of the machine.
        address: where other nodes reach it.
    """

    id: str
    name: str
    here: bool = False
    reason: str = "has not come yet"
    came_s: float = 0.0
    heard_s: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    address: str = ""

    @property
    def fit(self) -> bool:
        """Whether it can be a member of a group."""
        return self.here and not self.reason


@dataclass(frozen=True)
class State:
    """All that decisions depend on.

    Args:
        versions: the head's own, which nodes must have too.
        nodes: by id, in the order in which they became known; the head's machine is the first.
        epoch: of the last group that was begun.
        members: of the present group, in rank order; empty: there is none.
        asked: a group is wanted, of so many nodes at least (0: of all that are known); None: not.
        running: whether the present group answers.
    """

    versions: Mapping[str, str]
    nodes: Mapping[str, Node] = field(default_factory=dict)
    epoch: int = 0
    members: tuple[str, ...] = ()
    asked: int | None = None
    running: bool = False

    @property
    def phase(self) -> str:
        """In one word."""
        if self.running:
            return "running"
        if self.members:
            return "forming"
        return "waiting" if self.asked is not None else "idle"


@dataclass(frozen=True)
class Known:
    """A machine belongs to the cluster: it paired now, or before."""

    id: str
    name: str


@dataclass(frozen=True)
class Came:
    """An agent has connected and said what its machine is."""

    id: str
    at_s: float
    facts: Mapping[str, Any]
    address: str


@dataclass(frozen=True)
class Heard:
    """An agent says that it lives."""

    id: str
    at_s: float
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Went:
    """An agent's connection has ended."""

    id: str
    reason: str


@dataclass(frozen=True)
class Struck:
    """A machine belongs to the cluster no longer."""

    id: str


@dataclass(frozen=True)
class Asked:
    """A group is wanted, of `nodes` machines; 0: of all that are known, but two at least."""

    nodes: int


@dataclass(frozen=True)
class Ready:
    """All ranks of a group have loaded."""

    epoch: int


@dataclass(frozen=True)
class Over:
    """A group has ended, in whatever way."""

    epoch: int


@dataclass(frozen=True)
class Tick:
    """Time passes."""

    at_s: float


Event = Known | Came | Heard | Went | Struck | Asked | Ready | Over | Tick


@dataclass(frozen=True)
class Form:
    """Begin a group of these, in rank order."""

    epoch: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class HangUp:
    """Close an agent's connection; what it did for a group is lost."""

    id: str
    reason: str


@dataclass(frozen=True)
class Refuse:
    """Tell an agent why it cannot take part."""

    id: str
    reason: str


Action = Form | HangUp | Refuse


def decide(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """The state after an event, and what has to be done now."""
    actions: list[Action] = []
    match event:
        case Known(id=who, name=name):
            if who not in state.nodes:
                state = _with(state, Node(who, _unique(state, name)))
        case Came(id=who, at_s=at, facts=facts, address=address):
            node = state.nodes.get(who)
            if node is None:
                actions.append(HangUp(who, "was removed from this cluster: join it again"))
            else:
                reason = _mismatch(state.versions, facts)
                if reason:
                    actions.append(Refuse(who, reason))
                state = _with(
                    state,
                    replace(
                        node,
                        here=True,
                        reason=reason,
                        came_s=at,
                        heard_s=at,
                        facts=facts,
                        address=address,
                    ),
                )
        case Heard(id=who, at_s=at, facts=facts):
            node = state.nodes.get(who)
            if node is not None and node.here:
                known = {**node.facts, **facts}
                state = _with(state, replace(node, heard_s=at, facts=known))
        case Went(id=who, reason=reason):
            state = _gone(state, who, reason)
        case Struck(id=who):
            if who in state.nodes:
                actions.append(HangUp(who, "was removed from this cluster"))
                rest = {k: n for k, n in state.nodes.items() if k != who}
                state = replace(state, nodes=rest)
        case Asked(nodes=wanted):
            state = replace(state, asked=wanted)
        case Ready(epoch=epoch):
            if epoch == state.epoch and state.members:
                state = replace(state, running=True)
        case Over(epoch=epoch):
            if epoch == state.epoch:
                state = replace(state, members=(), running=False)
        case Tick(at_s=at):
            for node in state.nodes.values():
                if node.here and at - node.heard_s > SILENCE_S:
                    said = f"has not been heard for {SILENCE_S:g} s"
                    actions.append(HangUp(node.id, said))
                    state = _gone(state, node.id, said)
    if (members := _formable(state)) is not None:
        state = replace(state, epoch=state.epoch + 1, members=members, asked=None, running=False)
        actions.append(Form(state.epoch, members))
    return state, tuple(actions)


def missing(state: State) -> list[Node]:
    """Who would have to come for the group that is wanted, as far as that is known."""
    return [n for n in state.nodes.values() if not n.fit]


def _formable(state: State) -> tuple[str, ...] | None:
    """The members of the group that can be begun now, or None."""
    if state.asked is None or state.members:
        return None
    fit = [n.id for n in state.nodes.values() if n.fit]
    wanted = state.asked or max(2, len(state.nodes))
    # The head's machine, which is the first, has rank 0: its tokens take the shortest way.
    if len(fit) < wanted or not next(iter(state.nodes.values())).fit:
        return None
    return tuple(fit[:wanted])


def _mismatch(versions: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    wrong = [
        f"{name} {facts.get(name)}, expected {versions[name]}"
        for name in VERSIONS
        if facts.get(name) != versions[name]
    ]
    if not wrong:
        return ""
    install = f"pip install cenacle=={versions['cenacle']}"
    return f"has {' and '.join(wrong)} as on the head: `{install}` on it, and start it again"


def _gone(state: State, who: str, reason: str) -> State:
    node = state.nodes.get(who)
    if node is None or not node.here:
        return state
    return _with(state, replace(node, here=False, reason=reason))


def _with(state: State, node: Node) -> State:
    return replace(state, nodes={**state.nodes, node.id: node})


def _unique(state: State, name: str) -> str:
    names = {n.name for n in state.nodes.values()}
    found, count = name, 1
    while found in names:
        count += 1
        found = f"{name}-{count}"
    return found
