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

MAX_RESTARTS_IN_A_ROW = (
    3  # failures after each of which ranks are started again; one more ends the group
)
STABLE_AFTER_S = (
    60.0  # a group that has worked for so long begins a new row, also if nobody asked it
)
BACKOFF_S = (0.0, 1.0, 4.0)  # how long after the first, second, third failure in a row

Phase = Literal["ok", "recovering", "failed"]


@dataclass(frozen=True)
class RanksLost:
    """The ranks that worked are ended: one died, fell silent, or disagreed (`rank`, if known)."""

    at_s: float
    reason: str
    rank: int | None = None


@dataclass(frozen=True)
class Rebalance:
    """The ranks that work are ended, though nothing failed: there are better machines for them."""

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
    """The ranks of the new epoch are loaded."""

    at_s: float


@dataclass(frozen=True)
class TokensDelivered:
    """A token was given: the group really works."""

    at_s: float


@dataclass(frozen=True)
class Progress:
    """What the ranks that are being started wait for, such as a machine that is not there."""

    at_s: float
    detail: str


Event = RanksLost | Rebalance | StartFailed | Started | TokensDelivered | Progress


@dataclass(frozen=True)
class RecoveryState:
    """What is known of a group.

    Args:
        phase: "ok" while its ranks work, "recovering" until new ones do, "failed" for ever.
        epoch: number of the ranks that work, or that worked last.
        since_s: when the phase began.
        reason: why it is not "ok", or was not the last time.
        rank: which one failed, if it was one.
        recent_failures: times of the failures without a token, or `STEADY_S` of work, between them.
        recoveries: how often the group was formed again.
        detail: what new ranks wait for, see `Doing`.
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
    """Go on: the ranks work."""


@dataclass(frozen=True)
class StartRanks:
    """Start the ranks of this epoch, not before this time."""

    epoch: int
    not_before_s: float


@dataclass(frozen=True)
class FailGroup:
    """Tell everyone the reason; the group stays failed."""

    reason: str


Action = ServeRequests | StartRanks | FailGroup


def apply(state: RecoveryState, event: Event) -> RecoveryState:
    """The state when this has happened. What comes too late, or to a group that has failed, changes
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
        case "ok", RanksLost():
            return _count_failure(state, event)
        case "ok", Rebalance(at_s=at_s, reason=reason):
            return replace(state, phase="recovering", since_s=at_s, reason=reason, rank=None)
        case "recovering", StartFailed():
            return _count_failure(state, event)
    return state


def _count_failure(state: RecoveryState, event: RanksLost | StartFailed) -> RecoveryState:
    steady = state.phase == "ok" and event.at_s - state.since_s >= STABLE_AFTER_S
    failures = (*(() if steady else state.recent_failures), event.at_s)
    failed = len(failures) > MAX_RESTARTS_IN_A_ROW
    return replace(
        state,
        phase="failed" if failed else "recovering",
        # The epoch of ranks that could not be started is used up too.
        epoch=state.epoch + isinstance(event, StartFailed),
        since_s=state.since_s if state.phase == "recovering" and not failed else event.at_s,
        reason=event.reason,
        rank=event.rank,
        recent_failures=failures,
        detail="",
    )


def next_action(state: RecoveryState) -> Action:
    """What is to be done in a state."""
    if state.phase == "ok":
        return ServeRequests()
    if state.phase == "failed":
        many = len(state.recent_failures)
        return FailGroup(f"{state.reason} (given up after {many} failures without a token)")
    if not state.recent_failures:  # nothing has failed
        return StartRanks(state.epoch + 1, state.since_s)
    return StartRanks(
        state.epoch + 1, state.recent_failures[-1] + BACKOFF_S[len(state.recent_failures) - 1]
    )
