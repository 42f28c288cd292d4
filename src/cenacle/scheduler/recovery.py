"""What a group does next when its ranks fail: a pure function of what has happened.

Owns: when ranks are started again, after how long, and when the group is given up.
Does not know: processes, sockets, clocks, requests. Times are passed in, in seconds.
Invariant: the same events give the same state and the same next action, so what a group did can be
replayed; a new epoch's number is larger than all before it; a failed group stays failed.
Next: `ranks/rank_group.py` reports the events and does what `next_action` says. Which nodes may be
used is another question: `cluster/membership.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

MAX_RESTARTS_IN_A_ROW = 3  # one more failure ends the group
STABLE_AFTER_S = 60.0  # ranks that have worked for this long end the row, also without requests
BACKOFF_S = (0.0, 1.0, 4.0)  # after the first, second and third failure in a row

Phase = Literal["ok", "recovering", "failed"]


@dataclass(frozen=True)
class RanksLost:
    """The working ranks were ended: one (`rank`, if known) died, fell silent or disagreed."""

    at_s: float
    reason: str
    rank: int | None = None


@dataclass(frozen=True)
class Rebalance:
    """The working ranks were ended, though nothing failed: there are better nodes for them."""

    at_s: float
    reason: str


@dataclass(frozen=True)
class StartFailed:
    """Ranks could not be started."""

    at_s: float
    reason: str
    rank: int | None = None


@dataclass(frozen=True)
class Started:
    """The ranks of the new epoch have loaded."""

    at_s: float


@dataclass(frozen=True)
class TokensDelivered:
    """A client got a token: the group really works."""

    at_s: float


@dataclass(frozen=True)
class Progress:
    """What the start of new ranks waits for, such as a node that is absent."""

    at_s: float
    detail: str


@dataclass(frozen=True)
class GroupFailed:
    """The group ended for good: it was closed, or must not start other ranks."""

    at_s: float
    reason: str
    rank: int | None = None


Event = RanksLost | Rebalance | StartFailed | Started | TokensDelivered | Progress | GroupFailed


@dataclass(frozen=True)
class RecoveryState:
    """What is known of a group.

    Args:
        phase: "ok" while its ranks work, "recovering" until new ones do, "failed" for good.
        epoch: number of the ranks that work, or that worked last.
        since_s: when the phase began.
        reason: why it is not "ok", or was not the last time.
        rank: which rank failed, if it was one.
        recent_failures: times of the failures without a token, or `STABLE_AFTER_S` of work, between
            them.
        recoveries: how often ranks were started again.
        detail: see `Progress`.
    """

    phase: Phase = "ok"
    epoch: int = 0
    since_s: float = 0.0
    reason: str = ""
    rank: int | None = None
    recent_failures: tuple[float, ...] = ()
    recoveries: int = 0
    detail: str = ""


@dataclass(frozen=True)
class ServeRequests:
    """The ranks work: go on."""


@dataclass(frozen=True)
class StartRanks:
    """Start the ranks of this epoch, not before this time."""

    epoch: int
    not_before_s: float


@dataclass(frozen=True)
class FailGroup:
    """End every request with this reason; the group stays failed."""

    reason: str
    rank: int | None = None


Action = ServeRequests | StartRanks | FailGroup


def apply(state: RecoveryState, event: Event) -> RecoveryState:
    """The state after an event. An event that comes too late, or to a failed group, changes
    nothing."""
    match state.phase, event:
        case "ok", TokensDelivered():
            return replace(state, recent_failures=())
        case "recovering", Progress():
            return replace(state, detail=event.detail)
        case "recovering", Started():
            return replace(
                state,
                phase="ok",
                epoch=state.epoch + 1,
                since_s=event.at_s,
                recoveries=state.recoveries + 1,
                detail="",
            )
        case "ok", Rebalance():
            return replace(
                state, phase="recovering", since_s=event.at_s, reason=event.reason, rank=None
            )
        case ("ok", RanksLost()) | ("recovering", StartFailed()):
            assert isinstance(event, RanksLost | StartFailed)
            return _count_failure(state, event)
        case (("ok" | "recovering"), GroupFailed()):
            return replace(
                state, phase="failed", since_s=event.at_s, reason=event.reason, rank=event.rank
            )
    return state


def _count_failure(state: RecoveryState, event: RanksLost | StartFailed) -> RecoveryState:
    is_stable = state.phase == "ok" and event.at_s - state.since_s >= STABLE_AFTER_S
    failures = (*(() if is_stable else state.recent_failures), event.at_s)
    is_failed = len(failures) > MAX_RESTARTS_IN_A_ROW
    given_up = f" (given up after {len(failures)} failures without a token)" if is_failed else ""
    return replace(
        state,
        phase="failed" if is_failed else "recovering",
        # The epoch of ranks that could not be started is used up too.
        epoch=state.epoch + isinstance(event, StartFailed),
        since_s=state.since_s if state.phase == "recovering" and not is_failed else event.at_s,
        reason=event.reason + given_up,
        rank=event.rank,
        recent_failures=failures,
        detail="",
    )


def next_action(state: RecoveryState) -> Action:
    """What to do in a state."""
    if state.phase == "ok":
        return ServeRequests()
    if state.phase == "failed":
        return FailGroup(state.reason, state.rank)
    if not state.recent_failures:
        return StartRanks(state.epoch + 1, state.since_s)
    backoff_s = BACKOFF_S[len(state.recent_failures) - 1]
    return StartRanks(state.epoch + 1, state.recent_failures[-1] + backoff_s)
