"""The head's decisions, replayed from events."""

import random

import pytest

from cenacle.cluster.membership import (
    LONGEST_REST_S,
    LONGEST_TRY_S,
    REST_S,
    SETTLED_S,
    SILENCE_S,
    STAY_S,
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
    TakeIn,
    Tick,
    Unfit,
    Went,
    decide,
    missing,
    outside,
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


THREE = (*TWO, Known("m", "c"))


def lives(at, *who):
    """All of these are heard, and the time comes."""
    return (*(Heard(w, at) for w in who or ("head", "n", "m")), Tick(at))


def two_of_three():
    """A group works without m, which was lost and is back since 20."""
    state, _ = replay(*THREE, *(came(w) for w in ("head", "n", "m")), Asked(0), Ready(1, 1.0))
    lost = (Went("m", "is gone"), Over(1, 2.0, "m"), Asked(0), Asked(2, for_now=True))
    state, done = replay(*lost, Ready(2, 8.0), came("m", 20.0), state=state)
    assert done == [Form(2, ("head", "n"))]
    return state


def test_who_comes_back_is_taken_in_when_it_has_stayed():
    state, done = replay(*lives(20.0 + STAY_S - 0.1), state=two_of_three())
    assert done == []
    assert "when it has been here for 5 s" in outside(state, state.nodes["m"])
    state, done = replay(*lives(20.0 + STAY_S), state=state)
    assert done == [TakeIn(2, ("m",))]
    assert outside(state, state.nodes["m"]) == "is being taken in"
    state, done = replay(*lives(30.0), state=state)
    assert done == [], "once"
    state, done = replay(Over(2, 31.0), Asked(0), Ready(3, 33.0), *lives(50.0), state=state)
    assert done == [Form(3, ("head", "n", "m"))], "an end in peace is nobody's failure"
    assert not missing(state)


def test_who_comes_and_goes_is_not_taken_in():
    state, done = two_of_three(), []
    for n in range(20):
        at = 20.0 + 4 * n
        events = (Went("m", "is gone"), came("m", at), *lives(at + STAY_S - 0.5))
        state, more = replay(*events, state=state)
        done += more
    assert done == []


def test_no_more_are_taken_in_than_were_asked_for():
    state, _ = replay(*THREE, came("head"), came("n"), Asked(2), Ready(1, 1.0))
    state, done = replay(came("m", 2.0), *lives(60.0), state=state)
    assert done == []
    assert outside(state, state.nodes["m"]) == "is not needed: 2 machines were asked for"
    new = (Known("x", "d"), came("x", 2.0))  # all that are known: a new one, too
    state, done = replay(*new, *lives(60.0, "head", "n", "m", "x"), state=two_of_three())
    assert done == [TakeIn(2, ("m", "x"))]


def test_those_who_come_one_after_the_other_are_taken_in_together():
    state, _ = replay(Known("x", "d"), came("x", 22.0), state=two_of_three())
    all_four = ("head", "n", "m", "x")
    state, done = replay(*lives(25.5, *all_four), state=state)
    assert done == [], "x has not stayed long enough"
    assert replay(*lives(27.5, *all_four), state=state)[1] == [TakeIn(2, ("m", "x"))]
    # One that comes and goes does not keep the other out.
    events = (Went("x", "is gone"), came("x", 34.0), *lives(35.5, *all_four))
    assert replay(*events, state=state)[1] == [TakeIn(2, ("m",))]


def test_who_fails_when_it_was_taken_in_rests_longer_each_time():
    state, now, rests = two_of_three(), 25.0, []
    for number in range(3, 21, 2):
        state, done = replay(*lives(now), state=state)
        assert done == [TakeIn(number - 1, ("m",))]
        now += 1
        events = (Over(number - 1, now), Asked(0), Ready(number, now), *lives(now + 2))
        state, done = replay(*events, Over(number, now + 3, "m"), Asked(0), state=state)
        assert done == [Form(number, ("head", "n", "m"))], "not at once with m again"
        (node,) = missing(state)
        assert node.here
        assert "the group failed when it had been taken in" in node.reason
        rests.append(node.rests_until_s - now - 3)
        now += 9
        less = (Asked(2, for_now=True), Ready(number + 1, now))
        state, done = replay(*less, state=state)
        assert done == [Form(number + 1, ("head", "n"))]
        now = max(now + STAY_S, node.rests_until_s)
    assert rests == [min(LONGEST_REST_S, REST_S * 2**n) for n in range(9)]
    # A minute of work, and it is as good as any other.
    events = (*lives(now), Over(20, now), Asked(0), Ready(21, now), *lives(now + SETTLED_S))
    state, _ = replay(*events, Over(21, now + 99, "m"), state=state)
    assert not missing(state)


def test_who_is_to_blame_for_a_group_that_failed_with_a_machine_taken_in():
    state, _ = replay(*lives(25.0), Over(2, 26.0), Asked(0), state=two_of_three())
    assert state.members == ("head", "n", "m")
    for blamed, resting in (("m", ["c"]), ("", ["c"]), ("n", []), (None, [])):
        after, _ = replay(Over(3, 27.0, blamed), state=state)
        assert [n.name for n in missing(after)] == resting, blamed
    after, _ = replay(Over(3, 27.0, "m"), Went("m", "is gone"), came("m", 29.0), state=state)
    assert "is left out for 10 s" in after.nodes["m"].reason, "also when it comes again"
    assert not missing(replay(*lives(37.0), state=after)[0])


def test_who_turns_out_to_be_unfit_leaves_the_group_alone():
    state, _ = replay(*lives(25.0), state=two_of_three())
    state, done = replay(Unfit(("m",), 26.0, "it has another model"), *lives(35.0), state=state)
    assert done == []
    assert state.running
    assert state.nodes["m"].reason == "is left out for 10 s: it has another model"
    assert replay(*lives(36.0), state=state)[1] == [TakeIn(2, ("m",))]


def test_who_is_tried_in_vain_is_tried_again_within_a_minute():
    """Trying costs nobody: unlike one that broke a group it does not rest for ever longer."""
    state, now, rests = two_of_three(), 25.0, []
    for _ in range(5):
        state, done = replay(*lives(now), state=state)
        assert done == [TakeIn(2, ("m",))]
        state, _ = replay(Unfit(("m",), now, "its disk is full"), state=state)
        rests.append(state.nodes["m"].rests_until_s - now)
        now = state.nodes["m"].rests_until_s
    assert rests == [REST_S, 2 * REST_S, 4 * REST_S, LONGEST_TRY_S, LONGEST_TRY_S]
    state, _ = replay(*lives(now), Unfit(("m",), now, "its disk is full"), state=state)
    again = (Went("m", "is gone"), came("m", now + 1), *lives(now + 1 + STAY_S))
    state, done = replay(*again, state=state)
    assert done == [TakeIn(2, ("m",))], "whoever started it again may have seen to it"


def test_who_comes_while_another_is_taken_in_waits_for_its_own_turn():
    state, _ = replay(*lives(25.0), Known("x", "d"), came("x", 25.5), state=two_of_three())
    state, done = replay(Over(2, 26.0), Asked(0), state=state)
    assert done == [Form(3, ("head", "n", "m"))], "x has not been tried"
    state, done = replay(Ready(3, 28.0), *lives(34.0, "head", "n", "m", "x"), state=state)
    assert done == [TakeIn(3, ("x",))]
    # If who was chosen is gone, whoever is here will do.
    events = (*lives(25.0), Known("x", "d"), came("x", 25.5), Went("m", "is gone"), Over(2, 26.0))
    state, done = replay(*events, Asked(3), state=two_of_three())
    assert done == [TakeIn(2, ("m",)), Form(3, ("head", "n", "x"))]


def test_a_head_that_knows_less_than_its_machines_does_not_use_a_number_twice():
    events = (*TWO, came("head"), came("n", formation=41), Asked(2))
    assert replay(*events)[1] == [Form(42, ("head", "n"))]


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
                Over(dice.choice([formed or 0, 1]), now, dice.choice(["", "a", None])),
                Unfit(("a", "b"), now, "it is"),
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
            if isinstance(action, TakeIn):
                assert before.running
                assert action.epoch == formed
                assert not set(action.ids) & set(state.members)
                assert all(state.nodes[m].fit for m in action.ids)
    assert epochs == sorted(set(epochs))
    assert epochs, "this tests something"
    assert replay(*log)[0] == state
