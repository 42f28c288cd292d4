"""What to do when a group of ranks fails: a pure function of what has happened.

Owns: the rules: when ranks are started again, after how long, when the group is given up.
Does not know: processes, sockets, clocks, requests. Times are handed in, in seconds.
Invariant: the same events give the same state and the same next action, so what a group did can be
replayed; a new epoch's number is larger than all before it; what has failed stays so.
Next: `engine/lockstep.Group` reports what happens and does what `next_action` says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

IN_A_ROW = 3  # failures after each of which ranks are started again; one more ends the group
STEADY_S = 60.0  # a group that has worked for so long begins a new row, also if nobody asked it
BACKOFF_S = (0.0, 1.0, 4.0)  # how long after the first, second, third failure in a row

Phase = Literal["ok", "recovering", "failed"]


@dataclass(frozen=True)
class Lost:
    """The ranks that worked are ended: one died, fell silent, or disagreed (`rank`, if known)."""

    at: float
    reason: str
    rank: int | None = None


@dataclass(frozen=True)
class Moves:
    """The ranks that work are ended, though nothing failed: there are better machines for them."""

    at: float
    reason: str


@dataclass(frozen=True)
class Refused:
    """Ranks could not be started."""

    at: float
    reason: str
    rank: int | None = None


@dataclass(frozen=True)
class Started:
    """The ranks of the new epoch are loaded."""

    at: float


@dataclass(frozen=True)
class Answered:
    """A token was given: the group really works."""

    at: float


@dataclass(frozen=True)
class Doing:
    """What the ranks that are being started wait for, such as a machine that is not there."""

    at: float
    what: str


Event = Lost | Moves | Refused | Started | Answered | Doing


@dataclass(frozen=True)
class State:
    """What is known of a group.

    Args:
        phase: "ok" while its ranks work, "recovering" until new ones do, "failed" for ever.
        epoch: number of the ranks that work, or that worked last.
        since: when the phase began.
        reason: why it is not "ok", or was not the last time.
        rank: which one failed, if it was one.
        in_a_row: times of the failures without a token, or `STEADY_S` of work, between them.
        recoveries: how often the group was formed again.
        doing: what new ranks wait for, see `Doing`.
    """

    phase: Phase = "ok"
    epoch: int = 0
    since: float = 0.0
    reason: str = ""
    rank: int | None = None
    in_a_row: tuple[float, ...] = ()
    recoveries: int = 0
    doing: str = ""


@dataclass(frozen=True)
class Serve:
    """Go on: the ranks work."""


@dataclass(frozen=True)
class Start:
    """Start the ranks of this epoch, not before this time."""

    epoch: int
    not_before: float


@dataclass(frozen=True)
class GiveUp:
    """Tell everyone the reason; the group stays failed."""

    reason: str


Action = Serve | Start | GiveUp


def after(state: State, event: Event) -> State:
    """The state when this has happened. What comes too late, or to a group that has failed, changes
    nothing."""
    match state.phase, event:
        case "ok", Answered():
            return replace(state, in_a_row=())
        case "recovering", Doing():
            return replace(state, doing=event.what)
        case "recovering", Started():
            return replace(
                state,
                phase="ok",
                epoch=state.epoch + 1,
                since=event.at,
                recoveries=state.recoveries + 1,
                doing="",
            )
        case "ok", Lost():
            return _failed(state, event)
        case "ok", Moves(at=at, reason=reason):
            return replace(state, phase="recovering", since=at, reason=reason, rank=None)
        case "recovering", Refused():
            return _failed(state, event)
    return state


def _failed(state: State, event: Lost | Refused) -> State:
    steady = state.phase == "ok" and event.at - state.since >= STEADY_S
    failures = (*(() if steady else state.in_a_row), event.at)
    failed = len(failures) > IN_A_ROW
    return replace(
        state,
        phase="failed" if failed else "recovering",
        # The epoch of ranks that could not be started is used up too.
        epoch=state.epoch + isinstance(event, Refused),
        since=state.since if state.phase == "recovering" and not failed else event.at,
        reason=event.reason,
        rank=event.rank,
        in_a_row=failures,
        doing="",
    )


def next_action(state: State) -> Action:
    """What is to be done in a state."""
    if state.phase == "ok":
        return Serve()
    if state.phase == "failed":
        many = len(state.in_a_row)
        return GiveUp(f"{state.reason} (given up after {many} failures without a token)")
    if not state.in_a_row:  # nothing has failed
        return Start(state.epoch + 1, state.since)
    return Start(state.epoch + 1, state.in_a_row[-1] + BACKOFF_S[len(state.in_a_row) - 1])
