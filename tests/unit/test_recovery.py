"""What follows from what has happened: replayed, without a clock or a process."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.scheduler import recovery
from cenacle.scheduler.recovery import (
    Answered,
    Doing,
    GiveUp,
    Lost,
    Moves,
    Refused,
    Serve,
    Start,
    Started,
    State,
    after,
    next_action,
)


def replay(*events: recovery.Event) -> State:
    state = State()
    for event in events:
        state = after(state, event)
    return state


def test_a_lost_rank_is_started_again_at_once():
    state = replay(Lost(10, "rank 1 was killed", 1))
    assert (state.phase, state.since, state.reason, state.rank) == (
        *("recovering", 10, "rank 1 was killed", 1),
    )
    assert next_action(state) == Start(1, 10)
    state = after(state, Started(12))
    assert (state.phase, state.epoch, state.since, state.recoveries) == ("ok", 1, 12, 1)
    assert next_action(state) == Serve()


def test_failures_in_a_row_are_waited_for_longer_and_then_given_up():
    events = [Lost(10, "a", 1)]
    assert next_action(replay(*events)) == Start(1, 10)
    events.append(Refused(11, "b"))
    assert next_action(replay(*events)) == Start(2, 12)
    assert replay(*events).since == 10, "it has not worked since then"
    events += [Started(13), Lost(14, "c", 0)]
    assert next_action(replay(*events)) == Start(3, 18)
    events += [Started(19), Lost(20, "d", 2)]
    state = replay(*events)
    assert (state.phase, state.since, state.rank) == ("failed", 20, 2)
    assert next_action(state) == GiveUp("d (given up after 4 failures without a token)")
    assert replay(*events, Started(30), Answered(31), Doing(32, "x")) == state, "it stays so"


@pytest.mark.parametrize(
    ("between", "expected"),
    [((Started(1), Answered(2)), 1), ((Started(1),), 2), ((Started(-70),), 1)],
)
def test_a_token_or_a_minute_of_work_ends_a_row(between, expected):
    state = replay(Lost(-80, "a"), *between, Lost(3, "b"))
    assert len(state.in_a_row) == expected


def test_what_a_start_waits_for_is_known_until_it_ends():
    waits = (Lost(5, "rank 2 is gone", 2), Doing(6, "waiting for carol"))
    assert replay(*waits).doing == "waiting for carol"
    assert next_action(replay(*waits)) == Start(1, 5)
    assert replay(*waits, Started(7)).doing == replay(*waits, Refused(7, "no")).doing == ""
    assert replay(Doing(1, "nothing")).doing == ""


def test_moving_is_no_failure():
    state = replay(Moves(10, "carol is back"))
    assert (state.phase, state.since, state.reason) == ("recovering", 10, "carol is back")
    assert next_action(state) == Start(1, 10)
    assert replay(Moves(10, "x"), Started(12)) == State("ok", 1, 12, "x", recoveries=1)
    assert replay(Lost(1, "a"), Started(2), Moves(3, "x")).in_a_row == (1,), "no token yet"
    assert replay(Lost(1, "a", 1), Moves(3, "x")).reason == "a", "it is being started already"
    assert replay(*[Moves(1, "x"), Refused(2, "no")]).in_a_row == (2,)


times = st.floats(0, 1e4)
events = st.one_of(
    st.builds(Lost, times, st.just("x"), st.none() | st.integers(0, 3)),
    st.builds(Moves, times, st.just("z")),
    st.builds(Refused, times, st.just("y")),
    st.builds(Started, times),
    st.builds(Answered, times),
    st.builds(Doing, times, st.just("waits")),
)


@given(st.lists(events, max_size=30))
def test_whatever_happens_epochs_grow_and_rows_are_bounded(happened):
    state, asked = State(), 0
    for event in happened:
        new = after(state, event)
        assert new.epoch >= state.epoch
        assert len(new.in_a_row) <= recovery.IN_A_ROW + 1
        match next_action(new):
            case Start(epoch, _):
                assert epoch == new.epoch + 1
                asked = epoch
            case Serve():
                assert new.phase == "ok"
            case GiveUp():
                assert new.phase == "failed"
        state = new
    assert asked <= state.epoch + 1
