"""Drafts against the slow reference, and a pace that pays by a clock that is played."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.engine.speculative.ngram import (
    DraftLengthController,
    DraftStats,
    NgramProposer,
    reference_proposal,
)

texts = st.lists(st.integers(0, 3), max_size=60)


@given(texts, texts, st.integers(1, 20))
def test_lookup_is_the_last_place_where_the_same_was_said(first, then, most):
    lookup = NgramProposer(first)
    lookup.add(then)
    want = reference_proposal([*first, *then], most)
    assert lookup.draft(most) == want
    assert lookup.hopeful == bool(want)
    assert lookup.length == len(first) + len(then)


def test_a_loop_is_drafted_as_far_as_is_asked():
    assert NgramProposer([1, 2, 3, 1, 2, 3]).draft(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert NgramProposer([1, 2, 3]).draft(8) == []


def run(pace, kept, cost, steps=400, seed=1) -> tuple[float, list[int]]:
    """Tokens a second, relative to no drafts, of a text whose drafts are kept with a chance."""
    draw = random.Random(seed)
    tokens, seconds, limits = 0, 0.0, []
    for _ in range(3):
        pace.took(0, 1.0)
    for _ in range(steps):
        k = pace.limit
        limits.append(k)
        if not k:
            pace.passed()
            pace.took(0, 1.0)
            tokens, seconds = tokens + 1, seconds + 1
            continue
        accepted = next((i for i in range(k) if draw.random() >= kept), k)
        pace.verified(k, accepted, pace.propose())
        pace.took(k, cost(k))
        tokens, seconds = tokens + accepted + 1, seconds + cost(k)
    return tokens / seconds, limits


@pytest.mark.parametrize(
    ("kept", "each", "least"),
    [(0.98, 0.05, 6), (0.98, 0.4, 1.8), (0.8, 0.1, 2.2), (0.5, 0.1, 1.4), (0.1, 0.5, 0.93)],
)
def test_the_pace_is_near_the_best_and_never_far_below_none(kept, each, least):
    gain, _ = run(DraftLengthController(), kept, lambda k: 1 + each * k)
    assert gain > least


def test_it_rests_when_drafts_do_not_pay_and_tries_again():
    pace = DraftLengthController()
    gain, limits = run(pace, 0.05, lambda k: 1 + k, steps=2000)
    assert gain > 0.97
    tries = [i for i in range(1, len(limits)) if limits[i] and not limits[i - 1]]
    rests = [b - a for a, b in pairwise(tries)]
    assert len(tries) >= 3
    assert rests == sorted(rests), "each rest is longer"
    pace.begin()
    assert run(pace, 1.0, lambda k: 1 + 0.05 * k)[0] > 5, "another text is another matter"


def test_a_fixed_pace_drafts_always():
    pace = DraftLengthController(3)
    _, limits = run(pace, 0.0, lambda k: 1 + 9 * k, steps=20)
    assert set(limits) == {3}
    assert pace.drafts == DraftStats(60, 0)


def test_without_a_clock_nothing_changes():
    """On ranks whose proposals nobody hears."""
    pace = DraftLengthController()
    assert pace.propose() == pace.limit == DraftLengthController.FIRST
