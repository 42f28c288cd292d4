"""What is read from disk is whole, the same on every rank, and a beginning of the prompt.

The ranks are played here; their files: `test_disk.py`, `tests/ranks/test_prefixes_disk.py`.
"""

from collections import deque
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.core.request import Request, TokenEvent
from cenacle.core.step import Page, PageLoad, PageWrite, Step
from cenacle.scheduler.disk_index import FIRST, PAGE, DiskIndex, page_keys
from cenacle.scheduler.prefix_index import CacheFootprint, packed
from cenacle.scheduler.scheduler import Scheduler

SIZE = 10  # bytes of a page here


class Rank:
    """Does what it is told later, in order, as `disk.Disk` does."""

    def __init__(self, number):
        self.number, self.files, self.jobs = number, {}, deque()

    def told(self, stored, sought, removed):
        self.jobs += [*removed, *(store.page for store in stored), *sought]

    def act(self, pages):
        match self.jobs.popleft():
            case Page() as page:
                self.files[page.key] = page
                return pages.heard(self.number, {"written": [page.key, SIZE]})
            case PageLoad() as load:
                wrong = [page.key for page in load.pages if page.key not in self.files]
                return pages.heard(self.number, {"sought": [load.name, wrong]})
            case key:
                self.files.pop(key, None)
                return []


def known(pages):
    return {row.page.key for row in pages._known.values()}


acts = st.tuples(
    st.sampled_from(["want", "want", "seek", "act", "act", "act", "lose"]),
    st.lists(st.integers(0, 1), max_size=13),
    st.integers(0, 1),
)


@given(st.lists(acts, max_size=60), st.integers(0, 6))
def test_every_rank_has_what_is_offered_and_no_more_than_there_is_room_for(acts, room):
    pages, ranks, lost = DiskIndex(room * SIZE, [[], []]), [Rank(0), Rank(1)], set()

    def act(rank):
        for load, tokens in rank.act(pages):
            ends = [page.end for page in load.pages]
            assert [page.key for page in load.pages] == list(page_keys(tokens, ends).values())
            assert [page.begin for page in load.pages] == [0, *ends[:-1]]
            assert len(tokens) == 4 * ends[-1]
            for other in ranks:
                assert all(p.key in other.files or p.key in lost for p in load.pages)

    def tell():
        told = pages.take()
        for rank in ranks:
            rank.told(*told)
        return any(told)

    for what, tokens, who in acts:
        if what == "want":
            pages.want("somebody", packed(tokens), range(2, len(tokens) + 1, 2))
        elif what == "seek" and (chain := pages.chain(packed(tokens))):
            assert chain[-1].end < len(tokens), "one token is left to compute"
            pages.seek(chain, packed(tokens)[: 4 * chain[-1].end], "r")
        elif what == "lose" and ranks[who].files:
            key = next(iter(ranks[who].files))
            lost.add(key)
            del ranks[who].files[key]
        elif what == "act" and ranks[who].jobs:
            act(ranks[who])
        tell()
    while tell() or any(rank.jobs for rank in ranks):
        for rank in ranks:
            if rank.jobs:
                act(rank)
    assert not pages.seeking
    assert not pages.waits("r")
    for rank in ranks:
        assert len(rank.files) <= room
        assert known(pages) - rank.files.keys() <= lost
        assert rank.files.keys() <= known(pages), "a file that nobody will ever remove"


def test_the_longest_unused_end_goes_first_and_never_a_beginning_before_what_follows_it():
    pages, rank = DiskIndex(4 * SIZE, [[]]), Rank(0)

    def write(*tokens):
        pages.want("a", packed(tokens), range(1, len(tokens) + 1))
        while any(told := pages.take()) or rank.jobs:
            rank.told(*told)
            while rank.jobs:
                rank.act(pages)

    def there(*tokens):
        return len(pages.chain(packed((*tokens, 0))))

    write(1, 2, 3)
    write(1, 4)
    assert (there(1, 2, 3), there(1, 4)) == (3, 2)
    write(5)
    assert (there(1, 2, 3), there(1, 4), there(5)) == (2, 2, 1)
    write(1, 2)  # that is a use
    write(6)
    assert (there(1, 2), there(1, 4), there(5), there(6)) == (2, 1, 1, 1)


def test_what_only_some_ranks_have_is_not_used_but_removed():
    one, two, other = (Page(c * 24, "", 0, PAGE) for c in "abc")
    listed = [[(*astuple(page), 5) for page in rank] for rank in ((one, two), (two, other))]
    pages = DiskIndex(100, listed)
    assert known(pages) == {two.key}
    assert pages.take()[2] == (one.key, other.key)
    assert pages.notice.endswith("not used: 2")
    assert not DiskIndex(100, [listed[0], listed[0]]).notice
    assert len(known(DiskIndex(5, [listed[0]]))) == 1, "there is less room than before"


def test_a_page_counts_when_every_rank_has_it():
    pages = DiskIndex(100, [[], []])
    pages.want("a", packed([1, 2]), [1])
    ((store,), _, _) = pages.take()
    pages.heard(0, {"written": [store.page.key, 5]})
    assert not pages.any
    pages.heard(1, {"written": [store.page.key, 5]})
    assert pages.chain(packed([1, 2])) == (store.page,)


class Group:
    """A scheduler, and ranks that do at once what a step says; each answer has one token."""

    def __init__(self, files=(), ranks=2, cache_bytes=10**6, **footprint):
        rank = CacheFootprint(1, keeps=True, **footprint)
        self.scheduler = Scheduler(4, 0, footprint=rank, cache_bytes=cache_bytes, disk_bytes=10**6)
        self.files = {page.key: page for page in files}
        self.ranks = ranks
        rows = [(*astuple(page), SIZE) for page in self.files.values()]
        assert self.scheduler.list_pages([rows] * ranks) == ""
        self.kept: set[str] = set()
        self.full = False

    def step(self) -> Step | None:
        step = self.scheduler.next_step()
        if step is None:
            return None
        for load in step.page_loads:
            assert all(page.key in self.files for page in load.pages)
            self.kept.add(load.name)
        self.kept |= {request.id for request in step.admitted}
        assert {reuse.source for reuse in step.reused} <= self.kept
        for key in step.page_removals:
            self.files.pop(key, None)
        for store in step.page_writes:
            assert store.source in self.kept
            for rank in range(self.ranks):
                if self.full and rank:
                    said = {"failed": store.page.key}
                else:
                    self.files[store.page.key] = store.page
                    said = {"written": [store.page.key, SIZE]}
                self.scheduler.heard(rank, said)
        for load in step.page_checks:
            wrong = [page.key for page in load.pages if page.key not in self.files]
            for rank in range(self.ranks):
                self.scheduler.heard(rank, {"sought": [load.name, wrong if rank else []]})
        self.kept -= set(step.evicted)
        return step

    def ask(self, name, prompt):
        """One request to its end, and whatever is to be done after it; its only event."""
        self.scheduler.submit(Request(name, tuple(prompt), 1))
        event = None
        for _ in range(200):
            step = self.step()
            if step is None:
                return event
            if [part.request_id for part in step.final_chunks] == [name]:
                (event,) = self.scheduler.seen([TokenEvent(name, 7, "length")])
        raise AssertionError("it does not end")

    def ends(self):
        return sorted(page.end for page in self.files.values())


def test_a_prompt_outlives_its_ranks():
    prompt = range(1000, 1000 + 2 * PAGE + 50)
    first = Group()
    assert first.ask("a", prompt).cached_tokens == 0
    assert first.ends() == [PAGE, 2 * PAGE]
    event = first.ask("b", [*prompt, 5])
    assert (event.cached_tokens, event.disk_tokens) == (2 * PAGE + 50, 0), "memory has more"
    second = Group(first.files.values())
    event = second.ask("c", [*prompt[: 2 * PAGE], 1, 2])
    assert (event.cached_tokens, event.disk_tokens) == (2 * PAGE, 2 * PAGE)
    event = second.ask("d", [*prompt[: 2 * PAGE], 3, 4])
    assert (event.cached_tokens, event.disk_tokens) == (2 * PAGE, 0)
    assert second.ask("e", [*prompt[: PAGE + 9], 3, 4]).cached_tokens == PAGE + 9


def test_beyond_the_first_tokens_only_what_is_used_again_is_written():
    group, prompt = Group(), range(FIRST + 2 * PAGE + 1)
    group.ask("a", prompt)
    assert group.ends()[-1] == FIRST
    group.ask("b", [*prompt, 1])
    assert group.ends() == list(range(PAGE, FIRST + 2 * PAGE + 1, PAGE))


def test_what_cannot_be_cut_is_written_where_it_was_marked():
    group = Group(exact=True, windows=((8, 1),))
    prompt = range(1300)
    group.ask("a", prompt)
    assert group.ends() == [512, 1024, 1299]
    again = Group(group.files.values(), exact=True, windows=((8, 1),))
    assert again.ask("b", [*prompt[:1100], 1]).disk_tokens == 1024
    assert again.ask("c", [*prompt[:600], 1]).cached_tokens == 512


def test_those_who_ask_for_the_same_wait_together_and_it_is_read_once():
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


def test_a_file_that_cannot_be_read_is_forgotten_and_computed_again():
    group = Group()
    group.ask("a", range(600))
    again = Group(group.files.values())
    del again.files[next(key for key, page in again.files.items() if page.begin)]
    assert again.ask("b", [*range(600), 1]).disk_tokens == PAGE, "what comes before it is used"
    assert again.ends() == list(range(PAGE, 600, PAGE))


def test_a_disk_that_is_full_is_left_alone():
    group = Group()
    group.full = True
    assert group.ask("a", range(600)).finish == "length"
    assert not group.files, "what one rank could not write the other removes"
    group.full = False
    group.ask("b", range(1, 601))
    assert not group.files


def test_who_waits_for_a_disk_that_is_silent_goes_on_without():
    group = Group()
    group.ask("a", range(600))
    again = Group(group.files.values())
    again.scheduler.submit(Request("b", (*range(600), 1), 1))
    step = again.scheduler.next_step()
    assert step.page_checks
    assert again.scheduler.next_step() is None
    assert again.scheduler.seeking
    again.scheduler.give_up_disk()
    assert [request.id for request in again.scheduler.next_step().admitted] == ["b"]
    again.scheduler.heard(0, {"sought": [step.page_checks[0].name, []]})
    again.scheduler.heard(1, {"sought": [step.page_checks[0].name, []]})
    assert again.scheduler.next_step().page_loads == ()


@pytest.mark.parametrize("listed", [[], [None, []], [None, None]])
def test_without_a_disk_on_every_rank_there_is_none(listed):
    group = Group()
    assert group.scheduler.list_pages(listed) == ""
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
