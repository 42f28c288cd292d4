"""What is offered for reuse exists, is a prefix, and is never the whole prompt."""

from dataclasses import asdict

from hypothesis import given
from hypothesis import strategies as st

from cenacle.core.request import Request, TokenEvent
from cenacle.scheduler.prefix_index import (
    CacheEntry,
    CacheFootprint,
    PrefixIndex,
    common_prefix_length,
    pack_tokens,
)
from cenacle.scheduler.scheduler import Scheduler

tokens = st.lists(st.integers(0, 2), max_size=40)


@given(tokens, tokens)
def test_common_prefix_length_against_a_loop(a, b):
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    assert common_prefix_length(pack_tokens(a), pack_tokens(b)) == count


@given(st.lists(st.tuples(tokens, st.sets(st.integers(0, 40))), max_size=6), tokens, st.booleans())
def test_find_returns_the_longest_usable_prefix(cached, prompt, with_checkpoints):
    index = PrefixIndex(min_tokens=2)
    for i, (known, checkpoints) in enumerate(cached):
        size = len(known)
        index.entries[f"e{i}"] = CacheEntry(
            f"e{i}", pack_tokens(known), size, checkpoints if with_checkpoints else None
        )
    entry, count = index.find(pack_tokens(prompt))
    usable = []
    for known, checkpoints in cached:
        limit = min(common_prefix_length(pack_tokens(known), pack_tokens(prompt)), len(prompt) - 1)
        ends = [c for c in checkpoints if c <= limit] if with_checkpoints else [limit]
        usable += ends
    assert count == max((u for u in usable if u >= 2), default=0)
    if entry is not None:
        assert pack_tokens(prompt[:count]) == entry.tokens[: 4 * count]


def test_footprint_pads_to_the_longest_and_survives_json():
    footprint = CacheFootprint(10, 100, ((8, 3),))
    assert footprint.total_bytes([]) == 0
    assert footprint.total_bytes([1, 300]) == 2 * (100 + 8 * 3 + 512 * 10)
    assert CacheFootprint.from_json(asdict(footprint)) == footprint
    assert (
        CacheFootprint.maximum([footprint, CacheFootprint(12, reusable=True)]).bytes_per_token == 12
    )


def run(scheduler, name, prompt, answer, key=""):
    """Run one request to its end; what was reused, evicted, and reported as cached."""
    scheduler.submit(Request(name, tuple(prompt), len(answer), key=key))
    reused, evicted, cached = [], [], 0
    for _ in range(20):
        step = scheduler.next_step()
        reused += step.reused
        evicted += step.evicted
        if step.final_chunks:
            break
    for i, token in enumerate(answer):
        finish = "length" if i == len(answer) - 1 else None
        cached += scheduler.on_tokens([TokenEvent(name, token, finish)])[0].cached_tokens
    return reused, evicted, cached


def caching(entries=2, **arguments):
    """A scheduler with room for so many entries of up to 256 tokens."""
    footprint = CacheFootprint(10, reusable=True, **arguments)
    return Scheduler(4, 0, footprint=footprint, prefix_cache_bytes=entries * 256 * 10)


def test_a_second_turn_reuses_prompt_and_answer():
    scheduler = caching()
    assert run(scheduler, "a", range(50), [7, 8]) == ([], [], 0)
    reused, _, cached = run(scheduler, "b", [*range(50), 7, 8, 1, 2], [9])
    assert [(r.source, r.tokens) for r in reused] == [("a", 51)]
    assert cached == 51
    # The second entry covers the first.
    assert run(scheduler, "c", [5] * 20, [1])[1] == ["a"]


def test_caches_are_used_by_requests_of_their_key_alone():
    for share, expected in ((False, 0), (True, 49)):
        scheduler = Scheduler(
            4,
            0,
            footprint=CacheFootprint(10, reusable=True),
            prefix_cache_bytes=9 * 256 * 10,
            share_prefixes=share,
        )
        run(scheduler, "a", range(50), [7], key="alice")
        assert run(scheduler, "b", range(50), [7], key="bob")[2] == expected
        assert run(scheduler, "a2", range(50), [7], key="alice")[2] == 49
        names = {entry.name for entry in scheduler._prefix_index.entries.values()}
        assert share or names == {"b", "a2"}  # bob's covers none of alice's


def test_a_prompt_in_progress_is_not_waited_for_by_another_key():
    scheduler = caching(99)
    scheduler.submit(Request("a", tuple(range(5000)), 1, key="alice"))
    scheduler.next_step()
    scheduler.submit(Request("b", tuple(range(5000)), 1, key="bob"))
    scheduler.submit(Request("a2", tuple(range(5000)), 1, key="alice"))
    scheduler.next_step()
    assert set(scheduler._waiting) == {"a2"}


def test_the_least_recently_used_is_evicted_first():
    scheduler = caching()
    for name, token in (("a", 1), ("b", 2)):
        run(scheduler, name, [token] * 20, [3])
    run(scheduler, "a2", [1] * 19 + [4], [5])  # a was used: b is the oldest now
    run(scheduler, "c", [6] * 20, [3])
    assert set(scheduler._prefix_index.entries) == {"a2", "c"}


def test_caches_that_cannot_be_truncated_are_offered_at_checkpoints_only():
    scheduler = caching(9, windows=((8, 1),), needs_checkpoints=True)
    run(scheduler, "a", range(1000, 1300), [7])
    reused, _, _ = run(scheduler, "b", [*range(1000, 1250), 1], [7])
    assert not reused
    reused, _, _ = run(scheduler, "c", [*range(1000, 1300), 1], [7])
    assert [(r.source, r.tokens) for r in reused] == [("a", 299)]
