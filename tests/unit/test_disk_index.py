"""What is read from disk is complete, the same on every rank, and a prefix of the prompt.

The ranks are fakes; their files: `test_disk_store.py`, `tests/ranks/test_prefix_cache_disk.py`.
"""

from collections import deque
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.core.request import Request, TokenEvent
from cenacle.core.step import Page, PageLoad, PageReport, PageWrite, Step
from cenacle.scheduler.disk_index import ALWAYS_WRITTEN_TOKENS, PAGE_TOKENS, DiskIndex, page_keys
from cenacle.scheduler.prefix_index import CacheFootprint, pack_tokens
from cenacle.scheduler.scheduler import Scheduler

SIZE = 10  # bytes of a page


class FakeRank:
    """Executes orders later, in order, as `PageStore` does."""

    def __init__(self, number):
        self.number, self.files, self.jobs = number, {}, deque()

    def order(self, writes, checks, removals):
        self.jobs += [*removals, *(write.page for write in writes), *checks]

    def execute(self, index):
        match self.jobs.popleft():
            case Page() as page:
                self.files[page.key] = page
                return index.on_report(self.number, PageReport(written=(page.key, SIZE)))
            case PageLoad() as load:
                unreadable = [page.key for page in load.pages if page.key not in self.files]
                return index.on_report(self.number, PageReport(checked=(load.name, unreadable)))
            case key:
                self.files.pop(key, None)
                return []


def stored_keys(index):
    return {row.page.key for row in index._pages.values()}


operations = st.tuples(
    st.sampled_from(["write", "write", "read", "execute", "execute", "execute", "lose"]),
    st.lists(st.integers(0, 1), max_size=13),
    st.integers(0, 1),
)


@given(st.lists(operations, max_size=60), st.integers(0, 6))
def test_every_rank_has_what_is_offered_within_the_budget(operations, room):
    index, ranks, lost = DiskIndex(room * SIZE, [[], []]), [FakeRank(0), FakeRank(1)], set()

    def execute(rank):
        for load, tokens, _ in rank.execute(index):
            ends = [page.end for page in load.pages]
            assert [page.key for page in load.pages] == list(page_keys(tokens, ends).values())
            assert [page.begin for page in load.pages] == [0, *ends[:-1]]
            assert len(tokens) == 4 * ends[-1]
            for other in ranks:
                assert all(p.key in other.files or p.key in lost for p in load.pages)

    def send_orders():
        orders = index.take_orders()
        for rank in ranks:
            rank.order(*orders)
        return any(orders)

    for kind, tokens, rank in operations:
        if kind == "write":
            index.request("somebody", pack_tokens(tokens), range(2, len(tokens) + 1, 2))
        elif kind == "read" and (chain := index.find(pack_tokens(tokens))):
            assert chain[-1].end < len(tokens), "one token is left to compute"
            index.request_read(chain, pack_tokens(tokens)[: 4 * chain[-1].end], "r")
        elif kind == "lose" and ranks[rank].files:
            key = next(iter(ranks[rank].files))
            lost.add(key)
            del ranks[rank].files[key]
        elif kind == "execute" and ranks[rank].jobs:
            execute(ranks[rank])
        send_orders()
    while send_orders() or any(rank.jobs for rank in ranks):
        for rank in ranks:
            if rank.jobs:
                execute(rank)
    assert not index.checking
    assert not index.is_waiting("r")
    for rank in ranks:
        assert len(rank.files) <= room
        assert stored_keys(index) - rank.files.keys() <= lost
        assert rank.files.keys() <= stored_keys(index), "a file that is never removed"


def test_the_least_recently_used_page_without_successors_is_evicted_first():
    index, rank = DiskIndex(4 * SIZE, [[]]), FakeRank(0)

    def write(*tokens):
        index.request("a", pack_tokens(tokens), range(1, len(tokens) + 1))
        while any(orders := index.take_orders()) or rank.jobs:
            rank.order(*orders)
            while rank.jobs:
                rank.execute(index)

    def cached_pages(*tokens):
        return len(index.find(pack_tokens((*tokens, 0))))

    write(1, 2, 3)
    write(1, 4)
    assert (cached_pages(1, 2, 3), cached_pages(1, 4)) == (3, 2)
    write(5)
    assert (cached_pages(1, 2, 3), cached_pages(1, 4), cached_pages(5)) == (2, 2, 1)
    write(1, 2)  # that is a use
    write(6)
    assert (cached_pages(1, 2), cached_pages(1, 4), cached_pages(5), cached_pages(6)) == (
        2,
        1,
        1,
        1,
    )


def test_pages_that_only_some_ranks_have_are_removed():
    one, two, other = (Page(c * 24, "", 0, PAGE_TOKENS) for c in "abc")
    listed = [[(*astuple(page), 5) for page in rank] for rank in ((one, two), (two, other))]
    index = DiskIndex(100, listed)
    assert stored_keys(index) == {two.key}
    assert index.take_orders()[2] == (one.key, other.key)
    assert "2 pages are not on every rank" in index.notice
    assert not DiskIndex(100, [listed[0], listed[0]]).notice
    assert len(stored_keys(DiskIndex(5, [listed[0]]))) == 1, "the budget is smaller than before"


def test_a_page_is_offered_once_every_rank_has_it():
    index = DiskIndex(100, [[], []])
    index.request("a", pack_tokens([1, 2]), [1])
    ((write,), _, _) = index.take_orders()
    index.on_report(0, PageReport(written=(write.page.key, 5)))
    assert not index.has_pages
    index.on_report(1, PageReport(written=(write.page.key, 5)))
    assert index.find(pack_tokens([1, 2])) == (write.page,)


class Group:
    """A scheduler, and ranks that execute each step at once; every output has one token."""

    def __init__(self, files=(), ranks=2, cache_bytes=10**6, **footprint):
        rank = CacheFootprint(1, reusable=True, **footprint)
        self.scheduler = Scheduler(
            4, 0, footprint=rank, prefix_cache_bytes=cache_bytes, disk_bytes=10**6
        )
        self.files = {page.key: page for page in files}
        self.ranks = ranks
        rows = [(*astuple(page), SIZE) for page in self.files.values()]
        assert self.scheduler.register_pages([rows] * ranks) == ""
        self.caches: set[str] = set()
        self.full = False

    def step(self) -> Step | None:
        step = self.scheduler.next_step()
        if step is None:
            return None
        for load in step.page_loads:
            assert all(page.key in self.files for page in load.pages)
            self.caches.add(load.name)
        self.caches |= {request.id for request in step.admitted}
        assert {reuse.source for reuse in step.reused} <= self.caches
        for key in step.page_removals:
            self.files.pop(key, None)
        for write in step.page_writes:
            assert write.source in self.caches
            for rank in range(self.ranks):
                if self.full and rank:
                    report = PageReport(failed=write.page.key)
                else:
                    self.files[write.page.key] = write.page
                    report = PageReport(written=(write.page.key, SIZE))
                self.scheduler.on_pages(rank, report)
        for load in step.page_checks:
            unreadable = [page.key for page in load.pages if page.key not in self.files]
            for rank in range(self.ranks):
                self.scheduler.on_pages(
                    rank, PageReport(checked=(load.name, unreadable if rank else []))
                )
        self.caches -= set(step.evicted)
        return step

    def ask(self, name, prompt):
        """Run one request, and every step after it; its only event."""
        self.scheduler.submit(Request(name, tuple(prompt), 1))
        event = None
        for _ in range(200):
            step = self.step()
            if step is None:
                return event
            if [part.request_id for part in step.final_chunks] == [name]:
                (event,) = self.scheduler.on_tokens([TokenEvent(name, 7, "length")])
        raise AssertionError("the request does not end")

    def page_ends(self):
        return sorted(page.end for page in self.files.values())


def test_a_prefix_survives_a_restart():
    prompt = range(1000, 1000 + 2 * PAGE_TOKENS + 50)
    first = Group()
    assert first.ask("a", prompt).cached_tokens == 0
    assert first.page_ends() == [PAGE_TOKENS, 2 * PAGE_TOKENS]
    event = first.ask("b", [*prompt, 5])
    assert (event.cached_tokens, event.disk_tokens) == (2 * PAGE_TOKENS + 50, 0), "memory has more"
    second = Group(first.files.values())
    event = second.ask("c", [*prompt[: 2 * PAGE_TOKENS], 1, 2])
    assert (event.cached_tokens, event.disk_tokens) == (2 * PAGE_TOKENS, 2 * PAGE_TOKENS)
    event = second.ask("d", [*prompt[: 2 * PAGE_TOKENS], 3, 4])
    assert (event.cached_tokens, event.disk_tokens) == (2 * PAGE_TOKENS, 0)
    assert second.ask("e", [*prompt[: PAGE_TOKENS + 9], 3, 4]).cached_tokens == PAGE_TOKENS + 9


def test_later_tokens_are_written_once_they_are_reused():
    group, prompt = Group(), range(ALWAYS_WRITTEN_TOKENS + 2 * PAGE_TOKENS + 1)
    group.ask("a", prompt)
    assert group.page_ends()[-1] == ALWAYS_WRITTEN_TOKENS
    group.ask("b", [*prompt, 1])
    assert group.page_ends() == list(
        range(PAGE_TOKENS, ALWAYS_WRITTEN_TOKENS + 2 * PAGE_TOKENS + 1, PAGE_TOKENS)
    )


def test_caches_that_cannot_be_truncated_are_written_at_checkpoints():
    group = Group(needs_checkpoints=True, windows=((8, 1),))
    prompt = range(1300)
    group.ask("a", prompt)
    assert group.page_ends() == [512, 1024, 1299]
    again = Group(group.files.values(), needs_checkpoints=True, windows=((8, 1),))
    assert again.ask("b", [*prompt[:1100], 1]).disk_tokens == 1024
    assert again.ask("c", [*prompt[:600], 1]).cached_tokens == 512


def test_requests_with_the_same_prefix_wait_for_one_read():
    group = Group()
    group.ask("a", range(600))
    again = Group(group.files.values())
    for name in ("b", "c"):
        again.scheduler.submit(Request(name, (*range(540), ord(name)), 1))
    step = again.step()
    assert len(step.page_checks) == 1
    assert not step.admitted
    step = again.step()
    assert [request.id for request in step.admitted] == ["b", "c"]
    assert {(reuse.source, reuse.tokens) for reuse in step.reused} == {("disk-1", 512)}


def test_an_unreadable_file_is_forgotten_and_computed_again():
    group = Group()
    group.ask("a", range(600))
    again = Group(group.files.values())
    del again.files[next(key for key, page in again.files.items() if page.begin)]
    assert again.ask("b", [*range(600), 1]).disk_tokens == PAGE_TOKENS, (
        "the pages before it are used"
    )
    assert again.page_ends() == list(range(PAGE_TOKENS, 600, PAGE_TOKENS))


def test_a_full_disk_is_not_written_any_more():
    group = Group()
    group.full = True
    assert group.ask("a", range(600)).finish == "length"
    assert not group.files, "the other rank removes what one could not write"
    group.full = False
    group.ask("b", range(1, 601))
    assert not group.files


def test_requests_continue_without_a_disk_that_does_not_respond():
    group = Group()
    group.ask("a", range(600))
    again = Group(group.files.values())
    again.scheduler.submit(Request("b", (*range(600), 1), 1))
    step = again.scheduler.next_step()
    assert step.page_checks
    assert again.scheduler.next_step() is None
    assert again.scheduler.checking_pages
    again.scheduler.disable_disk()
    assert [request.id for request in again.scheduler.next_step().admitted] == ["b"]
    again.scheduler.on_pages(0, PageReport(checked=(step.page_checks[0].name, [])))
    again.scheduler.on_pages(1, PageReport(checked=(step.page_checks[0].name, [])))
    assert again.scheduler.next_step().page_loads == ()


@pytest.mark.parametrize("listed", [[], [None, []], [None, None]])
def test_the_disk_is_unused_unless_every_rank_has_one(listed):
    group = Group()
    assert group.scheduler.register_pages(listed) == ""
    group.ask("a", range(600))
    assert not group.files


def test_a_step_with_pages_survives_json():
    page = Page("k", "p", 256, 512)
    load = PageLoad("disk-1", (page,))
    step = Step(
        3,
        page_removals=("x",),
        page_writes=(PageWrite("a", page),),
        page_checks=(load,),
        page_loads=(load, load),
    )
    assert Step.from_json(step.to_json()) == step


def test_pages_are_found_by_their_owner_alone():
    tokens = pack_tokens(range(3 * PAGE_TOKENS))
    ends = [PAGE_TOKENS, 2 * PAGE_TOKENS]
    index, rank = DiskIndex(9 * SIZE, [[]]), FakeRank(0)
    index.request("a", tokens, ends, "alice")
    while True:
        rank.order(*index.take_orders())
        if not rank.jobs:
            break
        rank.execute(index)
    assert [page.end for page in index.find(tokens, "alice")] == ends
    assert index.find(tokens, "bob") == index.find(tokens) == ()
    assert set(page_keys(tokens, ends).values()).isdisjoint(page_keys(tokens, ends, "bob").values())
