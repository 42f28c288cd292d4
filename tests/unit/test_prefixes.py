"""What is offered for reuse is there, is a beginning, and never the whole prompt."""

from dataclasses import asdict

from hypothesis import given
from hypothesis import strategies as st

from cenacle.core.request import Request, TokenEvent
from cenacle.scheduler.prefix_index import CacheEntry, CacheFootprint, PrefixIndex, common, packed
from cenacle.scheduler.scheduler import Scheduler

tokens = st.lists(st.integers(0, 2), max_size=40)


@given(tokens, tokens)
def test_common_is_what_a_loop_finds(a, b):
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    assert common(packed(a), packed(b)) == count


@given(st.lists(st.tuples(tokens, st.sets(st.integers(0, 40))), max_size=6), tokens, st.booleans())
def test_what_is_found_is_a_beginning_that_may_be_cut(kept, prompt, exact):
    index = PrefixIndex(least=2)
    for i, (known, cuts) in enumerate(kept):
        size = len(known)
        index.entries[f"e{i}"] = CacheEntry(f"e{i}", packed(known), size, cuts if exact else None)
    entry, count = index.find(packed(prompt))
    usable = []
    for known, cuts in kept:
        most = min(common(packed(known), packed(prompt)), len(prompt) - 1)
        ends = [c for c in cuts if c <= most] if exact else [most]
        usable += ends
    assert count == max((u for u in usable if u >= 2), default=0)
    if entry is not None:
        assert packed(prompt[:count]) == entry.tokens[: 4 * count]


def test_footprint_pads_to_the_longest_and_survives_json():
    footprint = CacheFootprint(10, 100, ((8, 3),))
    assert footprint.bytes([]) == 0
    assert footprint.bytes([1, 300]) == 2 * (100 + 8 * 3 + 512 * 10)
    assert CacheFootprint.of(asdict(footprint)) == footprint
    assert CacheFootprint.largest([footprint, CacheFootprint(12, keeps=True)]).per_token == 12


def run(scheduler, name, prompt, answer):
    """One request from its beginning to its end; what was reused, dropped, and reported."""
    scheduler.submit(Request(name, tuple(prompt), len(answer)))
    reused, dropped, cached = [], [], 0
    for _ in range(20):
        step = scheduler.next_step()
        reused += step.reused
        dropped += step.evicted
        if step.final_chunks:
            break
    for i, token in enumerate(answer):
        finish = "length" if i == len(answer) - 1 else None
        cached += scheduler.seen([TokenEvent(name, token, finish)])[0].cached_tokens
    return reused, dropped, cached


def caching(entries=2, **footprint):
    """With room for so many entries of up to 256 tokens."""
    rank = CacheFootprint(10, keeps=True, **footprint)
    return Scheduler(4, 0, footprint=rank, cache_bytes=entries * 256 * 10)


def test_a_second_turn_reuses_prompt_and_answer():
    scheduler = caching()
    assert run(scheduler, "a", range(50), [7, 8]) == ([], [], 0)
    reused, _, cached = run(scheduler, "b", [*range(50), 7, 8, 1, 2], [9])
    assert [(r.source, r.tokens) for r in reused] == [("a", 51)]
    assert cached == 51
    # What the first had the second has too.
    assert run(scheduler, "c", [5] * 20, [1])[1] == ["a"]


def test_the_longest_unused_goes_first():
    scheduler = caching()
    for name, token in (("a", 1), ("b", 2)):
        run(scheduler, name, [token] * 20, [3])
    run(scheduler, "a2", [1] * 19 + [4], [5])  # a was used: now b is the oldest, and goes
    run(scheduler, "c", [6] * 20, [3])
    assert set(scheduler._prefixes.entries) == {"a2", "c"}


def test_what_cannot_be_cut_is_offered_at_marks_only():
    scheduler = caching(9, windows=((8, 1),), exact=True)
    run(scheduler, "a", range(1000, 1300), [7])
    reused, _, _ = run(scheduler, "b", [*range(1000, 1250), 1], [7])
    assert not reused
    reused, _, _ = run(scheduler, "c", [*range(1000, 1300), 1], [7])
    assert [(r.source, r.tokens) for r in reused] == [("a", 299)]
