"""Which beginnings of prompts every rank has on disk, and what is to be written, read and removed.

Owns: `Pages`, the front's one index of files that all ranks have alike; the rule of what is worth
writing: of a prompt that was answered the first `FIRST` tokens, and what lies behind them once it
is used again, in pages of `PAGE` tokens, so that what many prompts begin with is there once.
Does not know: files, MLX, which request runs.
Invariant: a page is offered when every rank has said that it has it whole, and with all before it;
one that others lead to is not removed before them.
Next: `scheduler.py` asks; `disk.py` has the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.step import Page, PageLoad, PageWrite

PAGE = 128  # tokens: what is left to compute of a prompt is one part, see `scheduler.TAIL`
FIRST = 4096  # tokens
AT_ONCE = 4  # pages that are being written: each is in memory meanwhile
KEY = 24  # letters of a page's key

Listing = Sequence[tuple[str, str, int, int, int]]
"""A rank's pages, longest unused first: the fields of `Page`, and bytes."""


def page_keys(tokens: bytes, ends: Iterable[int]) -> dict[int, str]:
    """What pages are called that end at these positions.

    Args:
        tokens: packed, see `prefixes.packed`.
        ends: ascending, none beyond the tokens.
    """
    seen, at, found = hashlib.sha256(), 0, {}
    for end in ends:
        seen.update(tokens[4 * at : 4 * end])
        at, found[end] = end, seen.hexdigest()[:KEY]
    return found


def worth(tokens: int, used_again: int) -> int:
    """How many of a prompt's tokens are written, given how many were found in a cache."""
    return max(min(FIRST, tokens), used_again)


@dataclass
class _Known:
    """A page that every rank has; `size`: bytes where it is largest; `used`: number of the last
    use."""

    page: Page
    size: int
    used: int = 0


@dataclass
class _Writing:
    """A page that ranks were told to write; `ranks`: those that have."""

    page: Page
    size: int = 0
    ranks: set[int] = field(default_factory=set)


@dataclass
class _Seeking:
    """Pages that ranks look for; `requests` wait for them, `ranks` have found them."""

    load: PageLoad
    tokens: bytes
    requests: set[str] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)


class DiskIndex:
    """The index.

    Args:
        budget: bytes on each rank; 0: nothing is written or read.
        listed: of each rank, what it has.
    """

    def __init__(self, budget: int = 0, listed: Sequence[Listing] = ()) -> None:
        self._budget, self._ranks = budget, len(listed)
        self._known: dict[str, _Known] = {}
        self._queue: dict[str, PageWrite] = {}
        self._writing: dict[str, _Writing] = {}
        self._seeking: dict[str, _Seeking] = {}  # by the last page's key
        self._to_seek: list[PageLoad] = []
        self._removed: list[str] = []
        self._writes = budget > 0
        self._uses = self._loads = 0
        each = [{Page(*row[:4]): row[4] for row in rank} for rank in listed]
        common = set(each[0]).intersection(*each[1:]) if each else set()
        for page in each[0] if each else ():
            if page in common:
                self._add(page, max(sizes[page] for sizes in each))
        found = {page.key for sizes in each for page in sizes}
        self._removed += sorted(found - self._known.keys())
        self.notice = ""  # in one line, what was found and is of no use
        if self._removed:
            count = len(self._removed)
            self.notice = f"cached pages that are not on every rank, and not used: {count}"
        self._make_room()

    # Writing

    def want(self, source: str, tokens: bytes, ends: Iterable[int]) -> None:
        """Have what a kept cache has written, as far as nobody has done so.

        Args:
            source: the cache's name.
            tokens: packed; its own.
            ends: of the pages, ascending.
        """
        if not self._writes:
            return
        parent, begin = "", 0
        for end, key in page_keys(tokens, ends).items():
            if key in self._known:
                self._touch(key)
            elif key not in self._writing and key not in self._queue:
                self._queue[key] = PageWrite(source, Page(key, parent, begin, end))
            parent, begin = key, end

    def unwant(self, source: str) -> None:
        """A cache is not kept any more: what was not written of it is not."""
        self._queue = {k: s for k, s in self._queue.items() if s.source != source}

    # Reading

    def chain(self, tokens: bytes) -> tuple[Page, ...]:
        """The pages, from the first token on, that a prompt begins with; never its last token.

        Args:
            tokens: packed.
        """
        most = len(tokens) // 4 - 1
        ends = sorted({known.page.end for known in self._known.values()})
        for key in reversed(page_keys(tokens, [e for e in ends if e <= most]).values()):
            found: list[Page] = []
            while key in self._known:
                found.append(self._known[key].page)
                key = found[-1].parent
            if found and not found[-1].begin:
                return tuple(reversed(found))
        return ()

    def seek(self, pages: tuple[Page, ...], tokens: bytes, request_id: str) -> None:
        """Have ranks look whether they can read these; a request waits for it.

        Args:
            tokens: packed; what the pages are of.
        """
        key = pages[-1].key
        if key not in self._seeking:
            self._loads += 1
            load = PageLoad(f"disk-{self._loads}", pages)
            self._seeking[key] = _Seeking(load, tokens)
            self._to_seek.append(load)
        self._seeking[key].requests.add(request_id)

    def waits(self, request_id: str) -> bool:
        """Whether a request waits for pages."""
        return any(request_id in seeking.requests for seeking in self._seeking.values())

    @property
    def any(self) -> bool:
        """Whether there are pages at all."""
        return bool(self._known)

    @property
    def seeking(self) -> bool:
        """Whether any rank is still looking."""
        return bool(self._seeking)

    def give_up(self) -> None:
        """The disks take too long: nothing is read or written any more."""
        self._known.clear()
        self._seeking.clear()
        self._to_seek.clear()
        self._stop_writing()

    # What goes to the ranks, and what comes back

    def take(self) -> tuple[tuple[PageWrite, ...], tuple[PageLoad, ...], tuple[str, ...]]:
        """What ranks shall write (one page a step), look for, and remove (before they write)."""
        stored: tuple[PageWrite, ...] = ()
        while self._queue and not stored and len(self._writing) < AT_ONCE:
            key = next(iter(self._queue))
            store = self._queue.pop(key)
            parent = store.page.parent
            if not parent or parent in self._known or parent in self._writing:
                self._writing[key] = _Writing(store.page)
                stored = (store,)
        sought, self._to_seek = tuple(self._to_seek), []
        removed, self._removed = tuple(self._removed), []
        return stored, sought, removed

    def heard(self, rank: int, said: Mapping[str, Any]) -> list[tuple[PageLoad, bytes]]:
        """Take note of what a rank says of its files.

        Args:
            said: any of "written": [key, bytes], "failed": a key, "sought": [name, keys that it
                cannot read].

        Returns:
            What every rank can read now, and the packed tokens that it is of.
        """
        if "written" in said:
            self._was_written(rank, *said["written"])
        if (key := said.get("failed")) is not None:
            # What a disk has no room for now it will hardly have for the next page.
            self._writing.pop(key, None)
            self._removed.append(key)
            self._stop_writing()
        return self._was_sought(rank, *said["sought"]) if "sought" in said else []

    def _was_written(self, rank: int, key: str, size: int) -> None:
        writing = self._writing.get(key)
        if writing is None:
            return
        writing.ranks.add(rank)
        writing.size = max(writing.size, size)
        if len(writing.ranks) == self._ranks:
            del self._writing[key]
            self._add(writing.page, writing.size)
            self._make_room()

    def _was_sought(self, rank: int, name: str, wrong: list[str]) -> list[tuple[PageLoad, bytes]]:
        found = [(k, s) for k, s in self._seeking.items() if s.load.name == name]
        for key, seeking in found:
            seeking.ranks.add(rank)
            if wrong:
                for bad in wrong:
                    self._remove(bad)
            elif len(seeking.ranks) < self._ranks:
                continue
            del self._seeking[key]
            if not wrong:
                for page in seeking.load.pages:
                    self._touch(page.key)
                return [(seeking.load, seeking.tokens)]
        return []

    # Who stays

    def _add(self, page: Page, size: int) -> None:
        self._known[page.key] = _Known(page, size)
        self._touch(page.key)

    def _touch(self, key: str) -> None:
        if key in self._known:
            self._uses += 1
            self._known[key].used = self._uses

    def _remove(self, key: str) -> None:
        if self._known.pop(key, None) is not None:
            self._removed.append(key)

    def _stop_writing(self) -> None:
        self._writes = False
        self._queue.clear()

    def _make_room(self) -> None:
        """Let the longest unused go, of those that lead to no others."""
        total = sum(known.size for known in self._known.values())
        while total > self._budget:
            held = {page.key for s in self._seeking.values() for page in s.load.pages}
            held |= {known.page.parent for known in self._known.values()}
            held |= {writing.page.parent for writing in self._writing.values()}
            able = [known for key, known in self._known.items() if key not in held]
            oldest = min(able, key=lambda known: known.used, default=None)
            if oldest is None:
                return
            total -= oldest.size
            self._remove(oldest.page.key)
