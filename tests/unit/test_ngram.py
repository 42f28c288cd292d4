"""N-gram proposals against the slow reference; draft lengths with a fake clock."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.engine.speculative.ngram import (
    DraftLengthController,
    DraftStats,
    GroupLengthController,
    NgramProposer,
    reference_proposal,
)

texts = st.lists(st.integers(0, 3), max_size=60)


@given(texts, texts, st.integers(1, 20))
def test_a_proposal_continues_the_last_occurrence(first, second, limit):
    proposer = NgramProposer(first)
    proposer.extend(second)
    expected = reference_proposal([*first, *second], limit)
    assert proposer.propose(limit) == expected
    assert proposer.has_proposal == bool(expected)
    assert proposer.length == len(first) + len(second)


def test_a_repetition_is_proposed_up_to_the_limit():
    assert NgramProposer([1, 2, 3, 1, 2, 3]).propose(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert NgramProposer([1, 2, 3]).propose(8) == []


def run(control, acceptance, cost, steps=400, seed=1) -> tuple[float, list[int]]:
    """Speed relative to no drafts, with a given acceptance rate; and the limits over time."""
    dice = random.Random(seed)
    tokens, seconds, limits = 0, 0.0, []
    for _ in range(3):
        control.on_step_time(0, 1.0)
    for _ in range(steps):
        k = control.limit
        limits.append(k)
        if not k:
            control.on_undrafted()
            control.on_step_time(0, 1.0)
            tokens, seconds = tokens + 1, seconds + 1
            continue
        accepted = next((i for i in range(k) if dice.random() >= acceptance), k)
        control.on_verified(k, accepted, control.propose())
        control.on_step_time(k, cost(k), accepted + 1)
        tokens, seconds = tokens + accepted + 1, seconds + cost(k)
    return tokens / seconds, limits


@pytest.mark.parametrize(
    ("acceptance", "cost_per_token", "min_gain"),
    [(0.98, 0.05, 6), (0.98, 0.4, 1.8), (0.8, 0.1, 2.2), (0.5, 0.1, 1.4), (0.1, 0.5, 0.93)],
)
def test_the_speed_is_near_the_best_and_never_far_below_plain_decoding(
    acceptance, cost_per_token, min_gain
):
    gain, _ = run(DraftLengthController(), acceptance, lambda k: 1 + cost_per_token * k)
    assert gain > min_gain


def test_drafting_pauses_when_it_does_not_pay_and_is_tried_again():
    control = DraftLengthController()
    gain, limits = run(control, 0.05, lambda k: 1 + k, steps=2000)
    assert gain > 0.97
    tries = [i for i in range(1, len(limits)) if limits[i] and not limits[i - 1]]
    pauses = [b - a for a, b in pairwise(tries)]
    assert len(tries) >= 3
    assert pauses == sorted(pauses), "each pause is longer"
    control.reset()
    assert run(control, 1.0, lambda k: 1 + 0.05 * k)[0] > 5, "another text starts afresh"


@pytest.mark.parametrize("cost_per_token", [0.15, 0.5, 2.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("length", [60, 200, 2000])
def test_a_source_that_is_often_wrong_costs_at_most_a_twentieth(cost_per_token, acceptance, length):
    """Over a few requests in a row, whatever their length; k tokens drafted cost something, too."""
    control = DraftLengthController()
    gains = []
    for i in range(6000 // length // 3):
        control.reset(is_same_source=True)
        gains.append(run(control, acceptance, lambda k: 1.2 + cost_per_token * k, length, i)[0])
    assert len(gains) / sum(1 / gain for gain in gains) > 0.95


def test_a_fixed_length_is_always_drafted():
    control = DraftLengthController(3)
    _, limits = run(control, 0.0, lambda k: 1 + 9 * k, steps=20)
    assert set(limits) == {3}
    assert control.stats == DraftStats(60, 0)


def test_without_a_clock_nothing_changes():
    """As on ranks whose proposals are not used."""
    control = DraftLengthController()
    assert control.propose() == control.limit == DraftLengthController.INITIAL_TOKENS


def run_group(control, acceptances, cost, steps, begin_cost=1.1) -> float:
    """Speed relative to no drafts of requests with given acceptances, by a simulated clock.

    Each time that drafting begins, `begin_cost` steps are lost, and one makes no drafts.
    """
    dice, requests = random.Random(2), len(acceptances)
    control.select(requests)
    tokens, seconds, is_drafting, passes = 0.0, 0.0, False, 0
    for _ in range(steps):
        if is_drafting and (not control.limit or passes == 128):
            is_drafting = False
        elif not is_drafting and control.limit and control.is_timed and passes != 128:
            is_drafting, passes = True, 0
            control.begin(requests)
            control.on_first_pass(1 + begin_cost, 1)
            tokens, seconds = tokens + 1, seconds + 1 + begin_cost
            continue
        if not is_drafting:
            passes = 0
            control.on_undrafted()
            control.on_step_time(0, 1.0)
            tokens, seconds = tokens + 1, seconds + 1
            continue
        k = control.limit
        results = [(k, next((i for i in range(k) if dice.random() >= p), k)) for p in acceptances]
        control.on_group_verified(results, control.propose())
        mean = 1 + sum(accepted for _, accepted in results) / requests
        control.on_step_time(k, cost(k), mean)
        tokens, seconds, passes = tokens + mean, seconds + cost(k), passes + 1
    return tokens / seconds


@pytest.mark.parametrize(
    ("acceptances", "cost_per_token", "min_gain"),
    [
        ((0.9, 0.9, 0.9, 0.9), 0.1, 2.5),
        ((0.9, 0.9, 0.1, 0.1), 0.1, 1.6),
        ((0.8, 0.8, 0.8, 0.8), 0.3, 1.2),
        ((0.0, 0.0, 0.0, 0.0), 0.2, 0.95),
        ((0.1, 0.3), 0.5, 0.95),
        ((0.3,) * 8, 1.0, 0.95),
    ],
)
@pytest.mark.parametrize("steps", [300, 3000])
def test_drafts_of_several_requests_are_as_long_as_pays(
    acceptances, cost_per_token, min_gain, steps
):
    control = GroupLengthController()
    gain = run_group(control, acceptances, lambda k: 1.2 + cost_per_token * k, steps)
    assert gain > (min_gain if steps == 3000 or min_gain < 1 else 0.75 * min_gain)


@pytest.mark.parametrize(("acceptance", "min_gain"), [(0.0, 0.95), (0.3, 0.95), (0.9, 2.0)])
def test_what_it_costs_to_begin_is_paid_for(acceptance, min_gain):
    """As with small models, whose caches take long to move beside a step."""
    control = GroupLengthController()
    gain = run_group(control, (acceptance,) * 4, lambda k: 1.2 + 0.2 * k, 2000, begin_cost=5)
    assert gain > min_gain


def test_times_are_those_of_as_many_requests():
    control = GroupLengthController()
    control.select(2)
    for drafted, seconds in ((0, 1.0), (4, 1.1)):
        control.on_step_time(drafted, seconds, 1)
    control.select(3)
    assert not control.is_timed
    control.on_step_time(0, 1.0)
    control.on_step_time(4, 9.0, 5)
    assert control.propose() != GroupLengthController.MAX_TOKENS
    control.select(2)
    assert control.is_timed


def test_an_account_with_credit_never_turns_no_draft_into_the_longest():
    """What past plain steps earned allows another try soon, not a draft of any length now."""
    control = GroupLengthController()
    control.select(4)
    for _ in range(400):
        control.on_step_time(0, 1.0)
    control.begin(4)
    control.on_first_pass(1.2, 1)
    for _ in range(8):
        control.on_group_verified([(2, 0)] * 4, control.propose())
        assert control.limit <= GroupLengthController.INITIAL_TOKENS
        if not control.limit:
            return
        control.on_step_time(2, 2.0, 1)
    pytest.fail("drafts that are never right go on")
