"""Which requests run, and what the next step is.

Owns: waiting and running requests, who is next, how much of which prompt a step processes, the
bytes that caches may take, and the numbering of steps.
Does not know: MLX, sockets, clocks: it is told how long steps took.
Invariant: a request is in exactly one place: waiting, running, or gone; `0 <= running <= batch`;
the caches of those that run fit the budget when each has all its tokens; a step processes at most
`chunk` prompt tokens, and fewer while somebody is being answered; every prompt gets its turn;
steps are numbered without gaps.
Fairness: of waiting requests that of the key comes first whose requests were given least (virtual
token counters: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024); prompts that
are being processed take turns, keys first, then the requests of a key.
Next: `lockstep.py` sends the steps to every rank and brings the events back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import inf
from typing import Any

from ..core.request import Request, TokenEvent
from ..core.step import PageLoad, PrefixReuse, PromptChunk, Step
from ..errors import Busy, InputError
from .disk_index import PAGE, DiskIndex, Listing, worth
from .prefix_index import CacheEntry, CacheFootprint, PrefixIndex, packed

JOIN_TOKENS = (
    128  # prompt tokens with which a request may join the batch: short prompts go together
)
LEAST_CHUNK = 16  # prompt tokens; fewer cost as much
FAIRNESS_RESERVE_AFTER = 4  # places from which on the last one is kept for who has none
STALL_S = 0.25  # for which a chunk of prompt may delay the tokens of those being answered
SHARE_WAIT_TOKENS = (
    64  # prompt tokens for which it is worth waiting until another has computed them
)
MAX_CHECKPOINTS, MIN_CHECKPOINT_TOKENS = (
    8,
    512,
)  # most marks between a prompt's ends, least tokens between two
CACHEABLE_FINISH = ("stop", "length")
OUTPUT_WEIGHT, PROMPT_WEIGHT = 2, 1  # what a token of an answer and one of a prompt count for a key


@dataclass
class _Running:
    """A request that the ranks have.

    Args:
        done: prompt tokens that have been processed, by the steps given out so far.
        cached: how many of them were not computed.
        read: how many of those were read from disk for it.
        cache: what others may use of it.
        started: whether it has joined the batch.
        answer: the tokens that came back.
    """

    request: Request
    done: int = 0
    cached: int = 0
    read: int = 0
    cache: CacheEntry | None = None
    started: bool = False
    answer: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Most tokens that its cache will hold."""
        return _length(self.request)


def _length(request: Request) -> int:
    return len(request.tokens) + request.max_tokens


class Scheduler:
    """Turns waiting requests and cancellations into steps.

    Args:
        batch: most requests that run at once.
        measure_every: one step in this many is measured; 0: none. May be changed at any time.
        chunk: most prompt tokens in a step.
        queue: most requests that wait; None: any number.
        kv_bytes: of memory for caches of running requests, on each rank; None: no limit.
        footprint: what caches take.
        cache_bytes: of memory for caches of requests that have ended, on each rank; 0: none.
        disk_bytes: of disk for the beginnings of prompts, on each rank; 0: none.
    """

    def __init__(
        self,
        batch: int = 32,
        measure_every: int = 8,
        *,
        chunk: int = 512,
        queue: int | None = None,
        kv_bytes: int | None = None,
        footprint: CacheFootprint | None = None,
        cache_bytes: int = 0,
        disk_bytes: int = 0,
    ) -> None:
        self._batch, self.measure_every = batch, measure_every
        self._chunk, self._queue = chunk, queue
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running: dict[str, _Running] = {}
        self._turns: OrderedDict[str, list[str]] = OrderedDict()  # key -> prompts under way
        self._served: dict[str, float] = {}  # key -> what it was given
        self._cancelled: list[str] = []
        self.resize(kv_bytes, footprint or CacheFootprint(0), cache_bytes)
        self._prefixes = PrefixIndex()
        self._disk_bytes = disk_bytes
        self.fresh = False  # whether all is computed, and nothing of it kept for others
        self._pages = DiskIndex()
        self._loaded: list[PageLoad] = []
        self._kept: list[str] = []
        self._dropped: list[str] = []
        self._number = 0
        self._pace = 64.0  # prompt tokens that can be processed within STALL_S: a guess at first
        self._answer_s = 0.0  # what a step without prompts takes

    def resize(self, kv_bytes: int | None, footprint: CacheFootprint, cache_bytes: int) -> None:
        """What the ranks that come next have room for, once `lost` was called; see the
        constructor."""
        self.kv_bytes, self.footprint = kv_bytes, footprint
        self._cache_bytes = cache_bytes if footprint.keeps else 0

    @property
    def waiting(self) -> int:
        """Number of requests that have not been admitted."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that ranks are working on."""
        return len(self._running)

    @property
    def reserved(self) -> int:
        """Bytes that the caches of running requests may come to, on each rank."""
        return self.footprint.bytes([r.length for r in self._running.values()])

    def check(self, request: Request, retry_after_s: int = 1) -> None:
        """Whether a request may be submitted now.

        Args:
            retry_after_s: what to tell if the queue is full.

        Raises:
            InputError: its cache would never fit.
            Busy: the queue is full.
        """
        need, limit = self.footprint.bytes([_length(request)]), self.kv_bytes
        if limit is not None and need > limit:
            raise InputError(
                f"max_tokens: the cache of {len(request.tokens)} prompt tokens and "
                f"{request.max_tokens} of answer takes up to {need:,} bytes, more than the "
                f"{limit:,} that there are for all requests; ask for less, or see --kv-cache-gb",
                "max_tokens",
            )
        place = len(self._running) < self._batch and self._fits(request)
        waits = bool(self._waiting) or not place
        if self._queue is not None and waits and len(self._waiting) >= self._queue:
            raise Busy(
                f"{len(self._waiting)} requests are waiting already, expected at most "
                f"{self._queue}: try again in {retry_after_s} s",
                retry_after_s,
            )

    def submit(self, request: Request) -> None:
        """Queue a request, however long the queue is."""
        key = request.key
        active = self._active()
        if key not in active:
            # Who was away gets no credit for it.
            floor = min((self._served[k] for k in active), default=0.0)
            self._served[key] = max(self._served.get(key, 0.0), floor)
        self._waiting[request.id] = request

    def cancel(self, request_id: str) -> None:
        """End a request wherever it is; unknown ids are ignored (it may just have ended)."""
        self._waiting.pop(request_id, None)
        if request_id in self._running:
            self._cancelled.append(request_id)
            running = self._end(request_id)
            entry = running.cache
            if entry is not None:
                # Of the answer the ranks may be further than is known here.
                entry.tokens = entry.tokens[: 4 * entry.done]
                if entry.cuts is None and self._keep(entry):
                    self._kept.append(request_id)
                    self._write(running, entry)
                else:
                    self._prefixes.entries.pop(request_id)

    def next_step(self) -> Step | None:
        """The step to take now, or None if there is nothing to do."""
        reused: list[PrefixReuse] = []
        admitted = list(self._admit(reused))
        stored, sought, removed = self._pages.take()
        about_pages = stored or sought or removed or self._loaded
        if not (self._running or self._cancelled or about_pages):
            return None
        prefill, started = self._share_out()
        every = self.measure_every
        step = Step(
            self._number,
            tuple(admitted),
            tuple(self._cancelled),
            # Not the first of each round: step 0 compiles and allocates.
            measured=bool(every) and self._number % every == every - 1,
            prefill=tuple(prefill),
            final_chunks=tuple(started),
            reused=tuple(reused),
            retained=tuple(self._kept),
            evicted=tuple(self._dropped),
            page_removals=removed,
            page_writes=stored,
            page_checks=sought,
            page_loads=tuple(self._loaded),
        )
        self._cancelled, self._kept, self._dropped = [], [], []
        self._loaded = []
        self._number += 1
        return step

    def took(self, step: Step, seconds: float) -> None:
        """Take note of how long a step took, for the pace of prompts beside answers."""
        if step.page_writes or step.page_loads:
            return  # not only the model took its time
        tokens = sum(p.end - p.begin for p in (*step.prefill, *step.final_chunks))
        if not tokens:
            self._answer_s += 0.3 * (seconds - self._answer_s)
        elif tokens >= LEAST_CHUNK:
            seconds = max(seconds - self._answer_s, seconds / 4, 1e-6)
            self._pace += 0.3 * (STALL_S * tokens / seconds - self._pace)

    def seen(self, events: Iterable[TokenEvent]) -> list[TokenEvent]:
        """Take note of a step's tokens.

        Returns:
            Those of requests that still run (a cancelled one may have been in flight).
        """
        kept: list[TokenEvent] = []
        for event in events:
            running = self._running.get(event.request_id)
            if running is None:
                continue
            if not running.answer and running.cached:
                event = replace(event, cached_tokens=running.cached, disk_tokens=running.read)
            kept.append(event)
            running.answer.append(event.token)
            self._served[running.request.key] += OUTPUT_WEIGHT
            if event.finish is not None:
                self._end(event.request_id)
                self._ended(running, event.finish)
        return kept

    def lost(self) -> list[str]:
        """Forget everything, as the ranks have: those that come next begin at step 0.

        Returns:
            The ids of all requests that were waiting or running.
        """
        ids = [*self._running, *self._waiting]
        self._waiting.clear()
        self._running.clear()
        self._turns.clear()
        self._prefixes = PrefixIndex()
        self._pages, self._loaded = DiskIndex(), []
        self._cancelled, self._kept, self._dropped = [], [], []
        self._number = 0
        return ids

    # What ranks have on disk

    def list_pages(self, listed: Sequence[Listing | None]) -> str:
        """Take note of what those ranks have that come next.

        Args:
            listed: of each rank; None: it can write nothing.

        Returns:
            In one line what is of no use; empty if all is.
        """
        there = [rank for rank in listed if rank is not None]
        able = self._cache_bytes and there and len(there) == len(listed)
        self._pages = DiskIndex(self._disk_bytes, there) if able else DiskIndex()
        return self._pages.notice

    def heard(self, rank: int, said: Mapping[str, Any]) -> None:
        """Take note of what a rank says of its files, see `Pages.heard`."""
        for load, tokens in self._pages.heard(rank, said):
            self._was_read(load, tokens)

    @property
    def seeking(self) -> bool:
        """Whether requests wait for ranks that look for their beginnings on disk."""
        return self._pages.seeking

    def give_up_disk(self) -> None:
        """Those requests wait no longer; nothing is read from disk or written any more."""
        self._pages.give_up()

    # Who runs

    def _active(self) -> set[str]:
        running = {r.request.key for r in self._running.values()}
        return running | {r.key for r in self._waiting.values()}

    def _end(self, request_id: str) -> _Running:
        running = self._running.pop(request_id)
        self._turn_taken(running)
        if not (self._running or self._waiting):
            self._served.clear()
        return running

    def _admit(self, reused: list[PrefixReuse]) -> Iterator[Request]:
        while self._waiting and len(self._running) < self._batch:
            able = [r for r in self._waiting.values() if not self._waits(r)]
            if self._batch >= FAIRNESS_RESERVE_AFTER and len(self._running) == self._batch - 1:
                held = {r.request.key for r in self._running.values()} - {""}
                able = [r for r in able if r.key not in held]
            request = min(able, key=lambda r: self._served[r.key], default=None)
            if request is None or not self._fits(request):
                return  # nor may a smaller one go first: this one would wait for ever
            if self._seek(request):
                continue  # it waits for the disk: others may go first
            del self._waiting[request.id]
            self._running[request.id] = running = _Running(request)
            self._look_up(running, reused)
            self._turns.setdefault(request.key, []).append(request.id)
            yield request

    def _fits(self, request: Request) -> bool:
        if self.kv_bytes is None or not self._running:
            return True
        lengths = [r.length for r in self._running.values()]
        return self.footprint.bytes([*lengths, _length(request)]) <= self.kv_bytes

    # What need not be computed

    def _waits(self, request: Request) -> bool:
        """Whether much of its prompt is being read from disk, or processed for somebody else."""
        if self._pages.waits(request.id):
            return True
        if not self._turns or not self._cache_bytes or self.fresh:
            return False
        tokens = packed(request.tokens)
        return self._prefixes.coming(tokens) >= self._prefixes.find(tokens)[1] + SHARE_WAIT_TOKENS

    def _look_up(self, running: _Running, reused: list[PrefixReuse]) -> None:
        if not self._cache_bytes or self.fresh:
            return
        request, tokens = running.request, packed(running.request.tokens)
        cuts: set[int] | None = set() if self.footprint.exact else None
        source, count = self._prefixes.find(tokens)
        if source is not None:
            self._prefixes.touch(source)
            reused.append(PrefixReuse(request.id, source.name, count))
            running.done = running.cached = count
            running.read = count if source.read else 0
            source.read = False
            if cuts is not None:
                cuts = {c for c in source.cuts or () if c < count} | {count}
        running.cache = CacheEntry(request.id, tokens, running.done, cuts, growing=True)
        self._prefixes.entries[request.id] = running.cache

    def _ended(self, running: _Running, finish: str) -> None:
        """Its cache, answer and all, can be used again."""
        entry = running.cache
        if entry is None:
            return
        entry.tokens = packed((*running.request.tokens, *running.answer))
        entry.done = len(entry.tokens) // 4
        if entry.cuts is not None:
            entry.cuts.add(entry.done)
        else:
            entry.done -= 1  # the last token, which was drawn, may not have gone through the model
        if finish in CACHEABLE_FINISH and self._keep(entry):
            self._write(running, entry)
        else:
            self._drop(entry)

    def _keep(self, entry: CacheEntry) -> bool:
        """Count a cache as kept, and let others go for it; False: it is not worth it."""
        entry.growing = False
        entry.size = self._size(entry.done, len(entry.cuts or ()))
        if entry.done < self._prefixes.least or entry.size > self._cache_bytes:
            return False
        self._prefixes.touch(entry)
        there = self._prefixes.oldest()
        for other in there:
            covered = entry.tokens.startswith(other.tokens) and other is not entry
            if covered and (entry.cuts is None or entry.cuts.issuperset(other.cuts or ())):
                self._drop(other)
        there = self._prefixes.oldest()
        total = sum(e.size for e in there)
        for other in there:
            if total > self._cache_bytes:
                total -= other.size
                self._drop(other)
        return True

    def _size(self, tokens: int, marks: int) -> int:
        """Bytes of a kept cache."""
        exact = marks * self.footprint.state if self.footprint.exact else 0
        return self.footprint.bytes([tokens]) + exact

    def _drop(self, entry: CacheEntry) -> None:
        del self._prefixes.entries[entry.name]
        self._dropped.append(entry.name)
        self._pages.unwant(entry.name)

    # What outlives the ranks

    def _write(self, running: _Running, entry: CacheEntry) -> None:
        """Have of a cache that is kept now what is worth it written to disk."""
        most = min(worth(len(running.request.tokens) - 1, running.cached), entry.done)
        ends: list[int] = []
        cuts = range(PAGE, most + 1, PAGE) if entry.cuts is None else sorted(entry.cuts)
        for cut in cuts:
            if (ends[-1] if ends else 0) + PAGE <= cut <= most:
                ends.append(cut)
        self._pages.want(entry.name, entry.tokens, ends)

    def _seek(self, request: Request) -> bool:
        """Have its beginning read from disk, if there is much more of it than in memory."""
        if not self._pages.any:
            return False
        tokens = packed(request.tokens)
        pages = () if self.fresh else self._pages.chain(tokens)
        if not pages or pages[-1].end < self._prefixes.find(tokens)[1] + SHARE_WAIT_TOKENS:
            return False
        if self._size(pages[-1].end, len(pages)) > self._cache_bytes:
            return False
        self._pages.seek(pages, tokens[: 4 * pages[-1].end], request.id)
        return True

    def _was_read(self, load: PageLoad, tokens: bytes) -> None:
        """All ranks can read this: from now on it is a cache like others."""
        cuts = {page.end for page in load.pages} if self.footprint.exact else None
        entry = CacheEntry(load.name, tokens, load.pages[-1].end, cuts, read=True)
        self._prefixes.entries[load.name] = entry
        self._loaded.append(load)
        if not self._keep(entry):
            self._drop(entry)

    # Whose prompt goes on

    def _share_out(self) -> tuple[list[PromptChunk], list[PromptChunk]]:
        """The prompts' parts of this step: chunks, each alone, and last parts, together."""
        left = self._chunk
        if any(r.started for r in self._running.values()):
            left = min(left, max(LEAST_CHUNK, int(self._pace)))
        chunks: list[PromptChunk] = []
        tails: list[PromptChunk] = []
        # The first of each key, then the second of each, and so on.
        by_key = zip_longest(*self._turns.values())
        for name in [name for names in by_key for name in names if name is not None]:
            running = self._running[name]
            began, prompt = running.done, len(running.request.tokens)
            if _more(tails, prompt - began) > left and began < prompt - 1:
                if left < LEAST_CHUNK and (chunks or tails):
                    continue
                running.done += int(min(left, prompt - 1 - began, self._to_mark(running)))
                mark = bool(self._cache_bytes) and self.footprint.exact
                mark = mark and running.done in self._marks(running)
                chunks.append(PromptChunk(name, began, running.done, mark))
                if mark and running.cache is not None and running.cache.cuts is not None:
                    running.cache.cuts.add(running.done)
                left -= running.done - began
            more = _more(tails, prompt - running.done)
            if more <= left:
                left -= int(more)
                tails.append(PromptChunk(name, running.done, prompt))
                running.done, running.started = prompt, True
            if running.cache is not None:
                running.cache.done = min(running.done, prompt - 1)
                running.cache.growing = not running.started
            if running.done > began:
                self._served[running.request.key] += PROMPT_WEIGHT * (running.done - began)
                self._turn_taken(running)
        return chunks, tails

    def _marks(self, running: _Running) -> list[int]:
        """Where a prompt's caches that cannot be cut are kept: at its end, and a few between."""
        length = len(running.request.tokens)
        apart = (
            max(1, -(-length // (MAX_CHECKPOINTS * MIN_CHECKPOINT_TOKENS))) * MIN_CHECKPOINT_TOKENS
        )
        return [*range(apart, length - 1, apart), length - 1]

    def _to_mark(self, running: _Running) -> float:
        if not (self.footprint.exact and self._cache_bytes):
            return inf
        return (
            min((m for m in self._marks(running) if m > running.done), default=inf) - running.done
        )

    def _turn_taken(self, running: _Running) -> None:
        """Others come first in the next step; a prompt that is done has no turns any more."""
        key, name = running.request.key, running.request.id
        if name not in self._turns.get(key, ()):
            return
        self._turns[key].remove(name)
        if name in self._running and not running.started:
            self._turns[key].append(name)
        if self._turns[key]:
            self._turns.move_to_end(key)
        else:
            del self._turns[key]


def _more(tails: list[PromptChunk], rest: int) -> float:
    """Prompt tokens by which a step grows when this one joins: all are padded to the longest."""
    if rest > JOIN_TOKENS:
        return inf
    longest = max((p.end - p.begin for p in tails), default=0)
    return (len(tails) + 1) * max(longest, rest) - len(tails) * longest
