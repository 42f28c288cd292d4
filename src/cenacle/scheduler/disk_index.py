"""Which prefixes every rank has on disk, and what to write, read and remove.

Owns: `DiskIndex`, the only index of the pages that all ranks have; the rule of what is written: the
first `ALWAYS_WRITTEN_TOKENS` of every completed prompt, and later tokens once they are reused, in
pages of `PAGE_TOKENS` tokens, so that a prefix of many prompts is stored once.
Does not know: files, MLX, which requests run.
Invariant: a page is offered only if every rank has reported it, and all pages before it; a page is
evicted only after all pages that extend it.
Next: `scheduler.py` asks; `engine/cache/disk_store.py` holds the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..core.step import Page, PageLoad, PageReport, PageWrite

PAGE_TOKENS = 128  # what is left of a prompt is then one chunk, see `scheduler.JOIN_TOKENS`
ALWAYS_WRITTEN_TOKENS = 4096
MAX_CONCURRENT_WRITES = 4  # pages; each is in memory until it is written
KEY_DIGITS = 24  # hexadecimal digits of a page's key

Listing = Sequence[tuple[str, str, int, int, int]]
"""A rank's pages, longest unused first: the fields of `Page`, and bytes."""


def page_keys(tokens: bytes, ends: Iterable[int], owner: str = "") -> dict[int, str]:
    """The keys of the pages that end at these positions.

    Args:
        tokens: packed, see `prefix_index.pack_tokens`.
        ends: ascending, none beyond the tokens.
        owner: whose pages; others have other keys.
    """
    digest, position, result = hashlib.sha256(owner.encode()), 0, {}
    for end in ends:
        digest.update(tokens[4 * position : 4 * end])
        position, result[end] = end, digest.hexdigest()[:KEY_DIGITS]
    return result


def tokens_to_write(prompt_tokens: int, cached_tokens: int) -> int:
    """How many of a prompt's tokens to write, given how many of them were found in a cache."""
    return max(min(ALWAYS_WRITTEN_TOKENS, prompt_tokens), cached_tokens)


@dataclass
class _StoredPage:
    """A page that every rank has.

    Args:
        size_bytes: on the rank where it is largest.
        last_use: number of the last use.
    """

    page: Page
    size_bytes: int
    last_use: int = 0


@dataclass
class _PendingWrite:
    """A page that the ranks are writing; `ranks` have reported it."""

    page: Page
    size_bytes: int = 0
    ranks: set[int] = field(default_factory=set)


@dataclass
class _PendingCheck:
    """Pages that the ranks verify for `requests`; `ranks` can read them all."""

    load: PageLoad
    tokens: bytes
    owner: str
    requests: set[str] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)


class DiskIndex:
    """The index.

    Args:
        budget_bytes: on each rank; 0: nothing is written or read.
        listings: the pages of each rank.
    """

    def __init__(self, budget_bytes: int = 0, listings: Sequence[Listing] = ()) -> None:
        self._budget_bytes, self._rank_count = budget_bytes, len(listings)
        self._pages: dict[str, _StoredPage] = {}
        self._write_queue: dict[str, PageWrite] = {}
        self._writing: dict[str, _PendingWrite] = {}
        self._checking: dict[str, _PendingCheck] = {}  # by the last page's key
        self._new_checks: list[PageLoad] = []
        self._removals: list[str] = []
        self._writes_enabled = budget_bytes > 0
        self._uses = self._load_count = 0
        self.notice = self._add_listings(listings)  # one line about unusable pages, or empty
        self._evict()

    def _add_listings(self, listings: Sequence[Listing]) -> str:
        ranks = [{Page(*row[:4]): row[4] for row in rows} for rows in listings]
        on_all = set(ranks[0]).intersection(*ranks[1:]) if ranks else set()
        for page in ranks[0] if ranks else ():
            if page in on_all:
                self._add(page, max(sizes[page] for sizes in ranks))
        keys = {page.key for sizes in ranks for page in sizes}
        self._removals += sorted(keys - self._pages.keys())
        if not self._removals:
            return ""
        return f"prefix cache: {len(self._removals)} pages are not on every rank and are not used"

    # Writing

    def request(self, source: str, tokens: bytes, ends: Iterable[int], owner: str = "") -> None:
        """Have pages of a cache written, unless they exist.

        Args:
            source: name of the cache.
            tokens: its own, packed.
            ends: of the pages, ascending.
            owner: whose requests may use them.
        """
        if not self._writes_enabled:
            return
        parent, begin = "", 0
        for end, key in page_keys(tokens, ends, owner).items():
            if key in self._pages:
                self._touch(key)
            elif key not in self._writing and key not in self._write_queue:
                self._write_queue[key] = PageWrite(source, Page(key, parent, begin, end))
            parent, begin = key, end

    def release(self, source: str) -> None:
        """A cache is gone: drop its queued writes."""
        self._write_queue = {k: w for k, w in self._write_queue.items() if w.source != source}

    # Reading

    def find(self, tokens: bytes, owner: str = "") -> tuple[Page, ...]:
        """The owner's pages of the longest stored prefix of packed tokens; never of all of them."""
        limit = len(tokens) // 4 - 1
        ends = sorted({stored.page.end for stored in self._pages.values()})
        for key in reversed(page_keys(tokens, [e for e in ends if e <= limit], owner).values()):
            chain: list[Page] = []
            while key in self._pages:
                chain.append(self._pages[key].page)
                key = chain[-1].parent
            if chain and not chain[-1].begin:
                return tuple(reversed(chain))
        return ()

    def request_read(
        self, pages: tuple[Page, ...], tokens: bytes, request_id: str, owner: str = ""
    ) -> None:
        """Have the ranks verify pages for a request, which waits for the result.

        Args:
            tokens: of the pages, packed.
        """
        key = pages[-1].key
        if key not in self._checking:
            self._load_count += 1
            load = PageLoad(f"disk-{self._load_count}", pages)
            self._checking[key] = _PendingCheck(load, tokens, owner)
            self._new_checks.append(load)
        self._checking[key].requests.add(request_id)

    def is_waiting(self, request_id: str) -> bool:
        """Whether a request waits for pages."""
        return any(request_id in check.requests for check in self._checking.values())

    @property
    def has_pages(self) -> bool:
        """Whether there are pages at all."""
        return bool(self._pages)

    @property
    def checking(self) -> bool:
        """Whether ranks are verifying pages."""
        return bool(self._checking)

    def disable(self) -> None:
        """Read and write nothing from now on."""
        self._pages.clear()
        self._checking.clear()
        self._new_checks.clear()
        self._disable_writes()

    # Orders to the ranks, and their reports

    def take_orders(self) -> tuple[tuple[PageWrite, ...], tuple[PageLoad, ...], tuple[str, ...]]:
        """Writes (one page a step), checks and removals (which precede the writes)."""
        writes: tuple[PageWrite, ...] = ()
        while self._write_queue and not writes and len(self._writing) < MAX_CONCURRENT_WRITES:
            key = next(iter(self._write_queue))
            write = self._write_queue.pop(key)
            parent = write.page.parent
            if not parent or parent in self._pages or parent in self._writing:
                self._writing[key] = _PendingWrite(write.page)
                writes = (write,)
        checks, self._new_checks = tuple(self._new_checks), []
        removals, self._removals = tuple(self._removals), []
        return writes, checks, removals

    def on_report(self, rank: int, report: PageReport) -> list[tuple[PageLoad, bytes, str]]:
        """Handle a rank's report on its files.

        Returns:
            What every rank can read now, with its packed tokens and its owner.
        """
        if report.written is not None:
            self._on_written(rank, *report.written)
        if (key := report.failed) is not None:
            # The next page would hardly fit on the disk either.
            self._writing.pop(key, None)
            self._removals.append(key)
            self._disable_writes()
        return self._on_checked(rank, *report.checked) if report.checked is not None else []

    def _on_written(self, rank: int, key: str, size_bytes: int) -> None:
        write = self._writing.get(key)
        if write is None:
            return
        write.ranks.add(rank)
        write.size_bytes = max(write.size_bytes, size_bytes)
        if len(write.ranks) == self._rank_count:
            del self._writing[key]
            self._add(write.page, write.size_bytes)
            self._evict()

    def _on_checked(
        self, rank: int, name: str, unreadable: list[str]
    ) -> list[tuple[PageLoad, bytes, str]]:
        checks = [(k, c) for k, c in self._checking.items() if c.load.name == name]
        for last_key, check in checks:
            check.ranks.add(rank)
            if not unreadable and len(check.ranks) < self._rank_count:
                continue
            for key in unreadable:
                self._remove(key)
            del self._checking[last_key]
            if not unreadable:
                for page in check.load.pages:
                    self._touch(page.key)
                return [(check.load, check.tokens, check.owner)]
        return []

    # Eviction

    def _add(self, page: Page, size_bytes: int) -> None:
        self._pages[page.key] = _StoredPage(page, size_bytes)
        self._touch(page.key)

    def _touch(self, key: str) -> None:
        if key in self._pages:
            self._uses += 1
            self._pages[key].last_use = self._uses

    def _remove(self, key: str) -> None:
        if self._pages.pop(key, None) is not None:
            self._removals.append(key)

    def _disable_writes(self) -> None:
        self._writes_enabled = False
        self._write_queue.clear()

    def _evict(self) -> None:
        """Remove the longest unused pages that no other page extends, until the rest fit."""
        total = sum(stored.size_bytes for stored in self._pages.values())
        while total > self._budget_bytes:
            in_use = {page.key for c in self._checking.values() for page in c.load.pages}
            in_use |= {stored.page.parent for stored in self._pages.values()}
            in_use |= {write.page.parent for write in self._writing.values()}
            candidates = [stored for key, stored in self._pages.items() if key not in in_use]
            oldest = min(candidates, key=lambda stored: stored.last_use, default=None)
            if oldest is None:
                return
            total -= oldest.size_bytes
            self._remove(oldest.page.key)
