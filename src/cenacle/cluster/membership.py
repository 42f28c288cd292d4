"""What a head knows of its nodes, and what it does next: a pure function of what was reported.

Owns: events, the state that they make, and the actions that follow: when a group is begun, who is
lost, and who is taken into a group that works already.
Does not know: time (events carry it), sockets, models.
Invariant: the same events give the same state and actions; at most one group exists at a time, and
each has a number (its epoch) higher than any before it.
Next: `control.py`, which makes events of what happens and carries the actions out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SILENCE_S = 4.0  # agents say four times a second that they live; who does not for this long is lost
STAY_S = 5.0  # how long a machine must have been here before a group that works is formed anew
REST_S = 10.0  # for which a machine is left out that failed when it was taken in; doubles each time
LONGEST_REST_S = 600.0
LONGEST_TRY_S = (
    60.0  # for which one is left out that was tried beside the group, which costs nobody
)
SETTLED_S = 60.0  # who has worked for so long is here for good

BROKE = "the group failed when it had been taken in"

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
        rest_s: for how long it is, or was last, left out because it failed; 0: it did not.
        rests_until_s: when that ends; 0: it has.
        failed: how, as a sentence's end.
    """

    id: str
    name: str
    here: bool = False
    reason: str = "has not come yet"
    came_s: float = 0.0
    heard_s: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    address: str = ""
    rest_s: float = 0.0
    rests_until_s: float = 0.0
    failed: str = ""

    @property
    def fit(self) -> bool:
        """Whether it can be a member of a group."""
        return self.here and not self.reason

    @property
    def rest(self) -> str:
        """Why it is left out, if it is here and must rest."""
        return f"is left out for {self.rest_s:g} s: {self.failed}" if self.rests_until_s else ""


@dataclass(frozen=True)
class State:
    """All that decisions depend on.

    Args:
        versions: the head's own, which nodes must have too.
        nodes: by id, in the order in which they became known; the head's machine is the first.
        epoch: of the last group that was begun.
        members: of the present group, in rank order; empty: there is none.
        asked: a group is wanted, of so many nodes at least (0: of all that are known); None: not.
        wish: how many machines shall take part whenever they are here; 0: all that are known.
        running: whether the present group answers.
        ready_s: since when.
        last: members of the last group that answered.
        new: members of the present one who were not in that; until they have settled.
        taking: who is being taken in.
        chosen: who the next group is made of if all of them are still here, and nobody else: the
            last one ended so that they may be together; who came meanwhile has not been tried.
    """

    versions: Mapping[str, str]
    nodes: Mapping[str, Node] = field(default_factory=dict)
    epoch: int = 0
    members: tuple[str, ...] = ()
    asked: int | None = None
    wish: int = 0
    running: bool = False
    ready_s: float = 0.0
    last: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    taking: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()

    @property
    def phase(self) -> str:
        """In one word."""
        if self.running:
            return "running"
        if self.members:
            return "forming"
        return "waiting" if self.asked is not None else "idle"

    @property
    def wanted(self) -> int:
        """How many machines shall take part."""
        return self.wish or max(2, len(self.nodes))


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
    """A group is wanted, of `nodes` machines; 0: of all that are known, but two at least.

    `for_now`: more are wished for, and will be taken in when they come.
    """

    nodes: int
    for_now: bool = False


@dataclass(frozen=True)
class Ready:
    """All ranks of a group have loaded."""

    epoch: int
    at_s: float = 0.0


@dataclass(frozen=True)
class Over:
    """A group has ended: in peace (`blamed` is None), or because a machine failed ("": unknown)."""

    epoch: int
    at_s: float = 0.0
    blamed: str | None = None


@dataclass(frozen=True)
class Unfit:
    """Machines that were to be taken in cannot be."""

    ids: tuple[str, ...]
    at_s: float
    reason: str


@dataclass(frozen=True)
class Tick:
    """Time passes."""

    at_s: float


Event = Known | Came | Heard | Went | Struck | Asked | Ready | Over | Unfit | Tick


@dataclass(frozen=True)
class Form:
    """Begin a group of these, in rank order."""

    epoch: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class TakeIn:
    """The group works without these: form it anew with them."""

    epoch: int
    ids: tuple[str, ...]


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


Action = Form | TakeIn | HangUp | Refuse


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
                wrong = _mismatch(state.versions, facts)
                if node.failed != BROKE:  # somebody may have seen to it
                    node = replace(node, rest_s=0.0, rests_until_s=0.0)
                if wrong:
                    actions.append(Refuse(who, wrong))
                came = replace(
                    node,
                    here=True,
                    reason=wrong or node.rest,
                    came_s=at,
                    heard_s=at,
                    facts=facts,
                    address=address,
                )
                state = _with(state, came)
                if not state.members:
                    # This head's own memory may be older than what its machines have seen.
                    state = replace(state, epoch=max(state.epoch, facts.get("formation", 0)))
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
        case Asked(nodes=wanted, for_now=for_now):
            state = replace(state, asked=wanted, wish=state.wish if for_now else wanted)
        case Ready(epoch=epoch, at_s=at):
            if epoch == state.epoch and state.members:
                state = replace(state, running=True, ready_s=at, last=state.members)
        case Over(epoch=epoch, at_s=at, blamed=blamed):
            if epoch == state.epoch:
                failed = [w for w in state.new if blamed in ("", w)]
                state = _rests(state, failed, at, BROKE, LONGEST_REST_S)
                peace = blamed is None and state.taking
                chosen = (*state.members, *state.taking) if peace else ()
                state = replace(state, members=(), running=False, new=(), taking=(), chosen=chosen)
        case Unfit(ids=ids, at_s=at, reason=reason):
            tried = [w for w in ids if w in state.taking]
            state = _rests(state, tried, at, reason, LONGEST_TRY_S)
            state = replace(state, taking=())
        case Tick(at_s=at):
            state = _at(state, at, actions)
    if (members := _formable(state)) is not None:
        state = replace(
            state,
            epoch=state.epoch + 1,
            members=members,
            asked=None,
            chosen=(),
            running=False,
            new=tuple(m for m in members if state.last and m not in state.last),
        )
        actions.append(Form(state.epoch, members))
    return state, tuple(actions)


def missing(state: State) -> list[Node]:
    """Who would have to come for the group that is wanted, as far as that is known."""
    return [n for n in state.nodes.values() if not n.fit]


def outside(state: State, node: Node) -> str:
    """Why a machine that could has no part in the group that works; empty: it has, or there is no
    such group."""
    if not state.running or not node.fit or node.id in state.members:
        return ""
    if node.id in state.taking:
        return "is being taken in"
    if len(state.members) >= state.wanted:
        return f"is not needed: {state.wanted} machines were asked for"
    return f"will be taken in when it has been here for {STAY_S:g} s"


def _at(state: State, at: float, actions: list[Action]) -> State:
    """What follows from the time alone."""
    for node in state.nodes.values():
        if node.here and at - node.heard_s > SILENCE_S:
            said = f"has not been heard for {SILENCE_S:g} s"
            actions.append(HangUp(node.id, said))
            state = _gone(state, node.id, said)
    for node in state.nodes.values():
        if node.rests_until_s and at >= node.rests_until_s:
            reason = "" if node.reason == node.rest else node.reason
            state = _with(state, replace(node, rests_until_s=0.0, reason=reason))
    if state.running and state.new and at - state.ready_s >= SETTLED_S:
        for who in state.new:
            if (settled := state.nodes.get(who)) is not None:
                state = _with(state, replace(settled, rest_s=0.0))
        state = replace(state, new=())
    if found := _to_be_taken_in(state, at):
        state = replace(state, taking=found)
        actions.append(TakeIn(state.epoch, found))
    return state


def _to_be_taken_in(state: State, at: float) -> tuple[str, ...]:
    """For whom the group that works is to be formed anew, now."""
    whole = all(m in state.nodes and state.nodes[m].fit for m in state.members)
    if not state.running or state.taking or not whole or at - state.ready_s < STAY_S:
        return ()
    room = max(0, state.wanted - len(state.members))
    others = [n for n in state.nodes.values() if n.fit and n.id not in state.members][:room]
    ripe = [n for n in others if at - n.came_s >= STAY_S]
    # Who comes together is taken in together, unless one of them comes and goes.
    if len(ripe) < len(others) and all(at - n.came_s < 3 * STAY_S for n in ripe):
        return ()
    return tuple(n.id for n in ripe)


def _formable(state: State) -> tuple[str, ...] | None:
    """The members of the group that can be begun now, or None."""
    if state.asked is None or state.members:
        return None
    fit = [n.id for n in state.nodes.values() if n.fit]
    if state.chosen and set(state.chosen) <= set(fit):
        return tuple(n for n in fit if n in state.chosen)
    wanted = state.asked or max(2, len(state.nodes))
    # The head's machine, which is the first, has rank 0: its tokens take the shortest way.
    if len(fit) < wanted or not next(iter(state.nodes.values())).fit:
        return None
    return tuple(fit[:wanted])


def _rests(state: State, who: Iterable[str], at: float, why: str, longest: float) -> State:
    """These have failed when they were taken in, or tried: each is left out, twice as long as the
    last time."""
    for name in who:
        node = state.nodes.get(name)
        if node is None:
            continue
        rest = min(longest, 2 * node.rest_s or REST_S)
        node = replace(node, rest_s=rest, rests_until_s=at + rest, failed=why)
        state = _with(state, replace(node, reason=node.rest) if node.fit else node)
    return state


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
