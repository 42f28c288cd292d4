"""The head's decisions, replayed from events."""

import random

import pytest

from cenacle.cluster.state import (
    SILENCE_S,
    Asked,
    Came,
    Form,
    HangUp,
    Heard,
    Known,
    Over,
    Ready,
    Refuse,
    State,
    Struck,
    Tick,
    Went,
    decide,
    missing,
)

VERSIONS = {"cenacle": "1", "mlx": "2", "mlx_lm": "3"}


def replay(*events, state=None):
    state = state or State(VERSIONS)
    done = []
    for event in events:
        state, actions = decide(state, event)
        done += actions
    return state, done


def came(who, at=0.0, **facts):
    return Came(who, at, {**VERSIONS, **facts}, f"10.0.0.{ord(who[0])}")


TWO = (Known("head", "a"), Known("n", "b"))


def test_a_group_forms_when_enough_have_come():
    state, done = replay(*TWO, Asked(2), came("n"))
    assert (state.phase, done) == ("waiting", [])
    assert [n.reason for n in missing(state)] == ["has not come yet"]
    state, done = replay(came("head"), state=state)
    assert done == [Form(1, ("head", "n"))], "the head's machine has rank 0"
    assert state.phase == "forming"
    state, done = replay(Ready(1), came("x"), state=state)
    assert state.phase == "running"


def test_all_that_are_known_are_waited_for_unless_a_number_is_given():
    known = (*TWO, Known("m", "c"), came("head"), came("n"))
    assert replay(*known, Asked(0))[1] == []
    assert replay(*known, Asked(0), came("m"))[1] == [Form(1, ("head", "n", "m"))]
    assert replay(*known, Asked(2))[1] == [Form(1, ("head", "n"))]
    assert replay(Known("head", "a"), came("head"), Asked(0))[1] == [], "one is no cluster"
    assert replay(Known("head", "a"), came("head"), Asked(1))[1] == [Form(1, ("head",))]


def test_without_the_heads_own_machine_there_is_no_group():
    assert replay(*TWO, Known("m", "c"), came("n"), came("m"), Asked(2))[1] == []


def test_who_is_silent_is_lost_and_named():
    state, done = replay(*TWO, came("head"), came("n"), Heard("head", SILENCE_S))
    state, done = replay(Tick(SILENCE_S + 0.1), state=state)
    assert done == [HangUp("n", f"has not been heard for {SILENCE_S:g} s")]
    assert [n.name for n in missing(state)] == ["b"]
    assert replay(Tick(SILENCE_S + 0.2), state=state)[1] == [], "once"
    assert replay(Heard("n", SILENCE_S + 0.3), state=state)[0] == state, "it has to come again"
    assert not missing(replay(came("n", 9.0), Heard("head", 9.0), state=state)[0])


def test_other_versions_are_refused_and_told_what_to_do():
    state, done = replay(*TWO, Asked(2), came("head"), came("n", mlx="2.1"))
    (refuse,) = done
    assert isinstance(refuse, Refuse)
    assert "mlx 2.1, expected 2" in refuse.reason
    assert "pip install cenacle==1" in refuse.reason
    assert replay(Went("n", "left"), came("n"), state=state)[1] == [Form(1, ("head", "n"))]


def test_who_was_removed_does_not_come_back():
    state, done = replay(*TWO, came("head"), came("n"), Struck("n"), Went("n", "x"), Asked(2))
    assert done == [HangUp("n", "was removed from this cluster")]
    state, done = replay(came("n"), state=state)
    assert isinstance(done[0], HangUp)
    assert list(state.nodes) == ["head"]


def test_one_group_at_a_time_and_each_has_a_higher_number():
    state, done = replay(*TWO, came("head"), came("n"), Asked(2), Ready(1), Asked(2))
    assert [a.epoch for a in done] == [1], "not while the first one is there"
    state, done = replay(Over(1), state=state)
    assert done == [Form(2, ("head", "n"))]
    assert replay(Ready(1), Over(1), state=state)[0] == state, "too late: of another group"
    _, done = replay(*TWO, came("head"), came("n"), Asked(2), state=State(VERSIONS, epoch=7))
    assert done == [Form(8, ("head", "n"))], "also after the head was started again"


def test_names_are_unique():
    state, _ = replay(Known("head", "mac"), Known("x", "mac"), Known("y", "mac"))
    assert [n.name for n in state.nodes.values()] == ["mac", "mac-2", "mac-3"]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_the_rules_hold(seed):
    dice = random.Random(seed)
    state, now, epochs, formed = State(VERSIONS), 0.0, [], None
    log = []
    for _ in range(400):
        now += dice.random()
        who = dice.choice(["head", "a", "b", "c"])
        event = dice.choice(
            [
                Known(who, dice.choice("xy")),
                came(who, now, mlx=dice.choice("2229")),
                came("head", now),
                Heard(who, now),
                Went(who, "gone"),
                Struck(dice.choice("abc")),
                Asked(dice.choice([0, 1, 2, 3])),
                Ready(dice.choice([formed or 0, 1])),
                Over(dice.choice([formed or 0, 1])),
                Tick(now),
            ]
        )
        log.append(event)
        before = state
        state, actions = decide(state, event)
        for action in actions:
            if isinstance(action, Form):
                assert not before.members or isinstance(event, Over), "two groups"
                assert all(state.nodes[m].fit for m in action.members)
                assert action.members[0] == next(iter(state.nodes))
                epochs.append(action.epoch)
                formed = action.epoch
    assert epochs == sorted(set(epochs))
    assert epochs, "this tests something"
    assert replay(*log)[0] == state
