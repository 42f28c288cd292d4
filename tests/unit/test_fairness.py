"""Long prompts do not stop others, places and bytes are bounds, and keys share.

The ranks are played here: a request that was started gives a token in every step after.
"""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.core.request import Request, TokenEvent
from cenacle.errors import Busy, InputError
from cenacle.scheduler import scheduler as module
from cenacle.scheduler.prefix_index import CacheFootprint
from cenacle.scheduler.scheduler import JOIN_TOKENS, LEAST_CHUNK, Scheduler

KEYS = 4


class Ranks:
    """Obeys steps, and checks what every step must keep."""

    def __init__(self, scheduler, chunk):
        self.scheduler, self.chunk = scheduler, chunk
        self.prompts: dict[str, Request] = {}
        self.done: Counter = Counter()
        self.answers: dict[str, list[int]] = {}
        self.left: dict[str, int] = {}
        self.keys: Counter = Counter()  # answer tokens of each
        self.waited: Counter = Counter()  # steps since a prompt's last part
        self.first: dict[str, int] = {}  # step of each first token
        self.steps = 0

    def step(self):
        step = self.scheduler.next_step()
        if step is None:
            return None
        self.steps += 1
        for name in step.cancelled:
            self.prompts.pop(name, None)
            self.left.pop(name, None)
            self.waited.pop(name, None)
        answering = bool(self.left)
        for request in step.admitted:
            self.prompts[request.id] = request
        tokens = sum(p.end - p.begin for p in step.prefill)
        if step.final_chunks:
            longest = max(p.end - p.begin for p in step.final_chunks)
            assert longest <= JOIN_TOKENS
            tokens += longest * len(step.final_chunks)
        assert tokens <= self.chunk
        if answering:
            assert tokens <= max(LEAST_CHUNK, self.scheduler._pace)
        events = []
        for name in list(self.left):
            self.left[name] -= 1
            end = "length" if not self.left[name] else None
            events.append(TokenEvent(name, 7, end))
            self.keys[self.prompts[name].key] += 1
            self.first.setdefault(name, self.steps)
            if end:
                del self.left[name], self.prompts[name]
        for part in (*step.prefill, *step.final_chunks):
            assert part.begin == self.done[part.request_id] < part.end
            self.done[part.request_id] = part.end
            self.waited.pop(part.request_id, None)
        for part in step.prefill:
            assert part.end < len(self.prompts[part.request_id].tokens), "the last token starts it"
        for part in step.final_chunks:
            request = self.prompts[part.request_id]
            assert part.end == len(request.tokens)
            self.left[part.request_id] = request.max_tokens
        under_way = [n for n in self.prompts if n not in self.left]
        for name in under_way:
            self.waited[name] += 1
            # Keys take turns, and so do a key's prompts: at most so many are before it.
            assert self.waited[name] <= KEYS * self.scheduler._batch + 1, f"{name} starves"
        assert self.scheduler.kv_bytes is None or self.scheduler.reserved <= self.scheduler.kv_bytes
        self.scheduler.seen(events)
        return step


requests = st.lists(
    st.tuples(
        st.sampled_from(["", "a", "b", "c"][:KEYS]),
        st.one_of(st.integers(1, 40), st.integers(1, 1500)),
        st.integers(1, 12),
        st.integers(0, 20),  # the step before which it comes
        st.booleans(),  # whether it is cancelled in the middle
    ),
    max_size=14,
)


@given(requests, st.integers(1, 6), st.sampled_from([1, 16, 100, 512]), st.booleans(), st.data())
def test_every_request_ends_and_every_bound_holds(asked, batch, chunk, limited, data):
    footprint = CacheFootprint(10, 1000, ((128, 5),))
    kv_bytes = footprint.bytes([1512, 1512]) if limited else None
    scheduler = Scheduler(batch, 0, chunk=chunk, kv_bytes=kv_bytes, footprint=footprint)
    ranks = Ranks(scheduler, chunk)
    names = set()
    for now in range(21):
        for i, (key, length, answer, when, cancelled) in enumerate(asked):
            if when == now:
                request = Request(f"r{i}", (5,) * length, answer, key=key)
                scheduler.check(request)
                scheduler.submit(request)
                if cancelled:
                    scheduler.cancel(f"r{data.draw(st.integers(0, i))}")
        ranks.step()
        names |= set(ranks.prompts)
    tokens = sum(length + answer for _, length, answer, _, _ in asked)
    for _ in range(4 * tokens + 100):
        if ranks.step() is None:
            break
    assert (scheduler.running, scheduler.waiting, scheduler.reserved) == (0, 0, 0)
    assert not ranks.prompts, "a place was freed that is not free"


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler = Scheduler(8, 0, chunk=512)
    ranks = Ranks(scheduler, 512)
    scheduler.submit(Request("long", (1,) * 30_000, 5))
    ranks.step()
    scheduler.submit(Request("short", (1,) * 20, 5))
    while "short" not in ranks.first:
        ranks.step()
    assert ranks.steps <= 5
    while ranks.step() is not None:
        pass
    # And the long one gets as much as a running answer allows meanwhile, then all there is.
    assert ranks.first["long"] <= 5 + 30_000 / 512 + 5


def test_running_answers_go_on_beside_a_long_prompt_in_bounded_time():
    """A machine of 100 prompt tokens a second: a chunk beside answers takes a quarter second."""
    scheduler = Scheduler(8, 0, chunk=512)
    ranks = Ranks(scheduler, 512)
    scheduler.submit(Request("talks", (1,) * 5, 2000))
    for _ in range(4):
        scheduler.took(ranks.step(), 0.05)
    scheduler.submit(Request("long", (1,) * 3000, 5))
    took = []
    while "long" not in ranks.first:
        step = ranks.step()
        took.append(0.05 + sum(p.end - p.begin for p in (*step.prefill, *step.final_chunks)) / 100)
        scheduler.took(step, took[-1])
    assert max(took[20:]) < 0.05 + module.STALL_S * 1.3
    assert ranks.keys[""] >= len(took), "a token in every step"


def test_keys_share_places_by_what_they_were_given():
    """One key has sixty requests before another's ten come: their shares are alike at once."""
    scheduler = Scheduler(4, 0)
    ranks = Ranks(scheduler, 512)
    for i in range(60):
        scheduler.submit(Request(f"greedy{i}", (1,) * 10, 20, key="greedy"))
    for _ in range(50):
        ranks.step()
    before = Counter(ranks.keys)
    for i in range(10):
        scheduler.submit(Request(f"other{i}", (1,) * 10, 20, key="other"))
    while scheduler._waiting and any(r.key == "other" for r in scheduler._waiting.values()):
        ranks.step()
    shares = ranks.keys - before
    assert min(shares["greedy"], shares["other"]) >= max(shares.values()) / 2


def test_the_last_place_is_kept_for_a_key_that_has_none():
    scheduler = Scheduler(4, 0)
    ranks = Ranks(scheduler, 512)
    for i in range(6):
        scheduler.submit(Request(f"greedy{i}", (1,), 10_000, key="greedy"))
    ranks.step()
    assert scheduler.running == 3
    scheduler.submit(Request("other", (1,), 5, key="other"))
    assert [r.id for r in ranks.step().admitted] == ["other"]


def test_what_can_never_fit_is_refused_with_the_numbers():
    scheduler = Scheduler(footprint=CacheFootprint(1000), kv_bytes=1_000_000)
    with pytest.raises(
        InputError, match=r"900 prompt tokens and 200 of answer.*1,280,000.*1,000,0"
    ):
        scheduler.check(Request("a", (1,) * 900, 200))
    scheduler.check(Request("a", (1,) * 700, 60))


def test_nobody_overtakes_a_request_that_waits_for_memory():
    scheduler = Scheduler(8, 0, footprint=CacheFootprint(1000), kv_bytes=1_000_000)
    ranks = Ranks(scheduler, 512)
    scheduler.submit(Request("small", (1,) * 10, 200))
    ranks.step()
    scheduler.submit(Request("big", (1,) * 700, 60))
    scheduler.submit(Request("small too", (1,) * 10, 20))
    assert not ranks.step().admitted
    scheduler.cancel("small")
    assert [r.id for r in ranks.step().admitted] == ["big"]


def test_a_full_queue_says_so():
    scheduler = Scheduler(1, queue=2)
    for i in range(3):
        scheduler.check(Request(f"r{i}", (1,), 5), 9)
        scheduler.submit(Request(f"r{i}", (1,), 5))
        scheduler.next_step()
    with pytest.raises(Busy, match=r"2 requests are waiting already.*in 9 s") as refused:
        scheduler.check(Request("r3", (1,), 5), 9)
    assert refused.value.retry_after_s == 9
    scheduler.cancel("r1")
    scheduler.check(Request("r3", (1,), 5), 9)


def test_without_a_queue_who_need_not_wait_is_taken():
    scheduler = Scheduler(1, queue=0)
    scheduler.check(Request("a", (1,), 5))
    scheduler.submit(Request("a", (1,), 5))
    scheduler.next_step()
    with pytest.raises(Busy, match="0 requests are waiting already, expected at most 0"):
        scheduler.check(Request("b", (1,), 5))


def test_a_cancelled_request_has_its_place_given_away_in_the_very_next_step():
    scheduler = Scheduler(1, 0)
    ranks = Ranks(scheduler, 512)
    scheduler.submit(Request("long", (1,) * 30_000, 5))
    scheduler.submit(Request("next", (1,) * 3, 5))
    ranks.step()
    scheduler.cancel("long")
    step = ranks.step()
    assert (step.cancelled, [r.id for r in step.admitted]) == (("long",), ["next"])
    assert [p.request_id for p in step.final_chunks] == ["next"]
