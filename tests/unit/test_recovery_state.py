"""What follows from what has happened: replayed, without a clock or a process."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.scheduler import recovery
from cenacle.scheduler.recovery import (
    FailGroup,
    GroupFailed,
    Progress,
    RanksLost,
    Rebalance,
    RecoveryState,
    ServeRequests,
    Started,
    StartFailed,
    StartRanks,
    TokensDelivered,
    apply,
    next_action,
)


def replay(*events: recovery.Event) -> RecoveryState:
    state = RecoveryState()
    for event in events:
        state = apply(state, event)
    return state


def test_a_lost_rank_is_started_again_at_once():
    state = replay(RanksLost(10, "rank 1 was killed", 1))
    assert (state.phase, state.since_s, state.reason, state.rank) == (
        *("recovering", 10, "rank 1 was killed", 1),
    )
    assert next_action(state) == StartRanks(1, 10)
    state = apply(state, Started(12))
    assert (state.phase, state.epoch, state.since_s, state.recoveries) == ("ok", 1, 12, 1)
    assert next_action(state) == ServeRequests()


def test_failures_recent_failures_are_waited_for_longer_and_then_given_up():
    events = [RanksLost(10, "a", 1)]
    assert next_action(replay(*events)) == StartRanks(1, 10)
    events.append(StartFailed(11, "b"))
    assert next_action(replay(*events)) == StartRanks(2, 12)
    assert replay(*events).since_s == 10, "it has not worked since then"
    events += [Started(13), RanksLost(14, "c", 0)]
    assert next_action(replay(*events)) == StartRanks(3, 18)
    events += [Started(19), RanksLost(20, "d", 2)]
    state = replay(*events)
    assert (state.phase, state.since_s, state.rank) == ("failed", 20, 2)
    assert state.reason == "d (given up after 4 failures without a token)"
    assert next_action(state) == FailGroup(state.reason, 2)
    assert replay(*events, Started(30), TokensDelivered(31), Progress(32, "x")) == state, (
        "it stays so"
    )


@pytest.mark.parametrize(
    ("between", "expected"),
    [((Started(1), TokensDelivered(2)), 1), ((Started(1),), 2), ((Started(-70),), 1)],
)
def test_a_token_or_a_minute_of_work_ends_a_row(between, expected):
    state = replay(RanksLost(-80, "a"), *between, RanksLost(3, "b"))
    assert len(state.recent_failures) == expected


def test_what_a_start_waits_for_is_known_until_it_ends():
    waits = (RanksLost(5, "rank 2 is gone", 2), Progress(6, "waiting for carol"))
    assert replay(*waits).detail == "waiting for carol"
    assert next_action(replay(*waits)) == StartRanks(1, 5)
    assert replay(*waits, Started(7)).detail == replay(*waits, StartFailed(7, "no")).detail == ""
    assert replay(Progress(1, "nothing")).detail == ""


def test_moving_is_no_failure():
    state = replay(Rebalance(10, "carol is back"))
    assert (state.phase, state.since_s, state.reason) == ("recovering", 10, "carol is back")
    assert next_action(state) == StartRanks(1, 10)
    assert replay(Rebalance(10, "x"), Started(12)) == RecoveryState("ok", 1, 12, "x", recoveries=1)
    assert replay(RanksLost(1, "a"), Started(2), Rebalance(3, "x")).recent_failures == (1,), (
        "no token yet"
    )
    assert replay(RanksLost(1, "a", 1), Rebalance(3, "x")).reason == "a", (
        "it is being started already"
    )
    assert replay(*[Rebalance(1, "x"), StartFailed(2, "no")]).recent_failures == (2,)


@pytest.mark.parametrize("before", [(), (RanksLost(1, "a", 1),)])
def test_a_group_that_is_closed_stays_failed(before):
    state = replay(*before, GroupFailed(5, "the group was closed"))
    assert (state.phase, state.since_s, state.rank) == ("failed", 5, None)
    assert next_action(state) == FailGroup("the group was closed")
    assert replay(*before, GroupFailed(5, "closed"), GroupFailed(6, "x", 0)).reason == "closed"


times = st.floats(0, 1e4)
events = st.one_of(
    st.builds(RanksLost, times, st.just("x"), st.none() | st.integers(0, 3)),
    st.builds(Rebalance, times, st.just("z")),
    st.builds(StartFailed, times, st.just("y")),
    st.builds(Started, times),
    st.builds(TokensDelivered, times),
    st.builds(Progress, times, st.just("waits")),
    st.builds(GroupFailed, times, st.just("closed")),
)


@given(st.lists(events, max_size=30))
def test_whatever_happens_epochs_grow_and_rows_are_bounded(happened):
    state, last_epoch = RecoveryState(), 0
    for event in happened:
        new = apply(state, event)
        assert new.epoch >= state.epoch
        assert len(new.recent_failures) <= recovery.MAX_RESTARTS_IN_A_ROW + 1
        match next_action(new):
            case StartRanks(epoch, _):
                assert epoch == new.epoch + 1
                last_epoch = epoch
            case ServeRequests():
                assert new.phase == "ok"
            case FailGroup():
                assert new.phase == "failed"
        state = new
    assert last_epoch <= state.epoch + 1
