"""Chooses the requests that run, and what the next step does.

Owns: waiting and running requests, their order, how much of which prompt a step processes, the
bytes that caches may take, the numbering of steps.
Does not know: MLX, sockets, clocks. It is told how long steps took.
Invariant: a request is in exactly one place: waiting, running, or gone; `0 <= running <=
max_batch_size`; the caches of running requests fit the budget even at full length; a step processes
at most `prefill_chunk_size` prompt tokens, and fewer while requests are decoding
(`prompt_budget.py`); every prompt gets its turn; steps are numbered without gaps.
Fairness: the waiting request whose key was served least comes first (virtual token counters: Sheng
et al., Fairness in Serving Large Language Models, OSDI 2024). Prompts in progress take turns: first
the keys, then the requests of a key.
Next: `ranks/rank_group.py` sends the steps to every rank and reports their tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import inf

from ..core.request import Request, TokenEvent
from ..core.step import PageLoad, PageReport, PrefixReuse, PromptChunk, Step
from ..errors import Busy, InputError
from .disk_index import PAGE_TOKENS, DiskIndex, Listing, tokens_to_write
from .prefix_index import CacheEntry, CacheFootprint, PrefixIndex, pack_tokens
from .prompt_budget import PromptBudget

JOIN_TOKENS = 128  # largest final chunk of a prompt: short prompts join the batch together
MIN_CHUNK_TOKENS = 16  # a second prompt's chunk in a step has at least so many
FAIRNESS_RESERVE_AFTER = 4  # batch size from which one place is reserved for keys that have none
SHARE_WAIT_TOKENS = 64  # prompt tokens for which waiting until another computed them pays
MAX_CHECKPOINTS, MIN_CHECKPOINT_TOKENS = 8, 512  # of a prompt, and the distance between two
CACHEABLE_FINISH = ("stop", "length")
OUTPUT_WEIGHT, PROMPT_WEIGHT = 2, 1  # what a token of each kind counts for a key
STEPS_TO_TIME = 8  # more than are in flight


@dataclass
class _RunningRequest:
    """A request that the ranks have.

    Args:
        prefilled: prompt tokens processed by the steps so far.
        cached_tokens: how many of them came from a cache.
        disk_tokens: how many of those were read from disk for this request.
        cache: what others may reuse.
        started: whether it has joined the batch.
        output: tokens so far.
    """

    request: Request
    prefilled: int = 0
    cached_tokens: int = 0
    disk_tokens: int = 0
    cache: CacheEntry | None = None
    started: bool = False
    output: list[int] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return len(self.request.tokens)

    @property
    def max_length(self) -> int:
        return _max_length(self.request)


def _max_length(request: Request) -> int:
    return len(request.tokens) + request.max_tokens


class Scheduler:
    """Turns waiting requests and cancellations into steps.

    Args:
        max_batch_size: maximum running requests.
        measure_every: one step in this many is measured; 0: none. May be changed at any time.
        prefill_chunk_size: maximum prompt tokens per step.
        max_queue: maximum waiting requests; None: unlimited.
        kv_cache_bytes: on each rank for the caches of running requests; None: unlimited.
        footprint: what caches take.
        prefix_cache_bytes: on each rank for the caches of ended requests; 0: none.
        disk_bytes: on each rank's disk for prefixes of prompts; 0: none.
        share_prefixes: requests of one API key may use caches of another's.

    `bypass_cache` may be set at any time: requests then reuse nothing and leave nothing for others.
    """

    def __init__(
        self,
        max_batch_size: int = 32,
        measure_every: int = 8,
        *,
        prefill_chunk_size: int = 512,
        max_queue: int | None = None,
        kv_cache_bytes: int | None = None,
        footprint: CacheFootprint | None = None,
        prefix_cache_bytes: int = 0,
        disk_bytes: int = 0,
        share_prefixes: bool = False,
    ) -> None:
        self._share_prefixes = share_prefixes
        self._max_batch_size, self.measure_every = max_batch_size, measure_every
        self._prefill_chunk_size, self._max_queue = prefill_chunk_size, max_queue
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running: dict[str, _RunningRequest] = {}
        self._turns: OrderedDict[str, list[str]] = OrderedDict()  # key -> prompts in progress
        self._served: dict[str, float] = {}  # key -> weighted tokens
        self._cancelled: list[str] = []
        self.resize(kv_cache_bytes, footprint or CacheFootprint(0), prefix_cache_bytes)
        self._prefix_index = PrefixIndex()
        self._disk_bytes = disk_bytes
        self.bypass_cache = False
        self._disk_index = DiskIndex()
        self._page_loads: list[PageLoad] = []
        self._retained: list[str] = []
        self._evicted: list[str] = []
        self._step_number = 0
        self._prompt_budget = PromptBudget()
        self._answers: dict[int, int] = {}  # by step in flight: requests that get a token in it

    def resize(
        self, kv_cache_bytes: int | None, footprint: CacheFootprint, prefix_cache_bytes: int
    ) -> None:
        """Set the budgets of new ranks, after `on_ranks_lost`; see the constructor."""
        self.kv_cache_bytes, self.footprint = kv_cache_bytes, footprint
        self._prefix_cache_bytes = prefix_cache_bytes if footprint.reusable else 0

    @property
    def waiting(self) -> int:
        """Number of requests that are not admitted yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that the ranks have."""
        return len(self._running)

    @property
    def reserved_bytes(self) -> int:
        """Bytes on each rank for the caches of running requests at full length."""
        return self.footprint.total_bytes([r.max_length for r in self._running.values()])

    @property
    def cache_bytes(self) -> int:
        """Bytes on each rank for the caches of running requests at full length, and of those that
        have ended and are kept."""
        kept = self._prefix_index.least_recently_used()
        return self.reserved_bytes + sum(entry.size_bytes for entry in kept)

    def check(self, request: Request, retry_after_s: int = 1) -> None:
        """Check whether a request may be submitted now.

        Args:
            retry_after_s: passed on if the queue is full.

        Raises:
            InputError: its cache would never fit.
            Busy: the queue is full.
        """
        needed, limit = self.footprint.total_bytes([_max_length(request)]), self.kv_cache_bytes
        if limit is not None and needed > limit:
            raise InputError(
                f"max_tokens: the KV cache of {len(request.tokens)} prompt tokens and "
                f"{request.max_tokens} output tokens takes {needed:,} bytes, and all requests "
                f"together have {limit:,}; ask for fewer tokens, or raise --kv-cache-gb",
                "max_tokens",
            )
        admissible = len(self._running) < self._max_batch_size and self._fits(request)
        must_wait = bool(self._waiting) or not admissible
        if self._max_queue is not None and must_wait and len(self._waiting) >= self._max_queue:
            raise Busy(
                f"{len(self._waiting)} requests are waiting, expected at most {self._max_queue}: "
                f"try again in {retry_after_s} s",
                retry_after_s,
            )

    def submit(self, request: Request) -> None:
        """Queue a request, even if the queue is full."""
        key = request.key
        active = self._active_keys()
        if key not in active:
            # No credit for the time that a key was idle.
            floor = min((self._served[k] for k in active), default=0.0)
            self._served[key] = max(self._served.get(key, 0.0), floor)
        self._waiting[request.id] = request

    def cancel(self, request_id: str) -> None:
        """End a request wherever it is; unknown ids are ignored (it may just have ended)."""
        self._waiting.pop(request_id, None)
        if request_id not in self._running:
            return
        self._cancelled.append(request_id)
        running = self._remove_running(request_id)
        entry = running.cache
        if entry is None:
            return
        # The ranks may have more output than is known here.
        entry.tokens = entry.tokens[: 4 * entry.length]
        if entry.checkpoints is None and self._retain(entry):
            self._retained.append(request_id)
            self._write_to_disk(running, entry)
        else:
            self._prefix_index.entries.pop(request_id)

    def next_step(self) -> Step | None:
        """The next step, or None if there is nothing to do."""
        reused: list[PrefixReuse] = []
        admitted = list(self._admit(reused))
        writes, checks, removals = self._disk_index.take_orders()
        disk_orders = writes or checks or removals or self._page_loads
        if not (self._running or self._cancelled or disk_orders):
            return None
        self._answers.pop(self._step_number - STEPS_TO_TIME, None)
        self._answers[self._step_number] = answers = sum(r.started for r in self._running.values())
        prefill, final_chunks = self._split_prefill_budget(answers)
        every = self.measure_every
        step = Step(
            self._step_number,
            tuple(admitted),
            tuple(self._cancelled),
            # The last of each round, as step 0 compiles and allocates.
            measured=bool(every) and self._step_number % every == every - 1,
            prefill=tuple(prefill),
            final_chunks=tuple(final_chunks),
            reused=tuple(reused),
            retained=tuple(self._retained),
            evicted=tuple(self._evicted),
            page_removals=removals,
            page_writes=writes,
            page_checks=checks,
            page_loads=tuple(self._page_loads),
        )
        self._clear_orders()
        self._step_number += 1
        return step

    def on_step_time(self, step: Step, seconds: float) -> None:
        """Learn how many prompt tokens fit beside answers."""
        answers = self._answers.pop(step.number, None)
        if answers is None:
            return
        tokens = sum(c.end - c.begin for c in (*step.prefill, *step.final_chunks))
        # Else the time is not only the model's.
        is_plain = not (step.page_writes or step.page_loads or step.measured)
        self._prompt_budget.on_step(answers, tokens, seconds if is_plain else None)

    def on_tokens(self, events: Iterable[TokenEvent]) -> list[TokenEvent]:
        """Handle a step's tokens.

        Returns:
            Those of requests that still run (a cancelled one may have been in flight).
        """
        delivered: list[TokenEvent] = []
        for event in events:
            running = self._running.get(event.request_id)
            if running is None:
                continue
            if not running.output and running.cached_tokens:
                event = replace(
                    event, cached_tokens=running.cached_tokens, disk_tokens=running.disk_tokens
                )
            delivered.append(event)
            running.output.append(event.token)
            self._served[running.request.key] += OUTPUT_WEIGHT
            if event.finish is not None:
                self._remove_running(event.request_id)
                self._on_finished(running, event.finish)
        return delivered

    def on_ranks_lost(self) -> list[str]:
        """Forget everything, as the ranks have; new ranks begin at step 0.

        Returns:
            The ids of all requests that were waiting or running.
        """
        ids = [*self._running, *self._waiting]
        self._waiting.clear()
        self._running.clear()
        self._turns.clear()
        self._prefix_index, self._disk_index = PrefixIndex(), DiskIndex()
        self._clear_orders()
        self._step_number = 0
        self._answers.clear()
        return ids

    def _clear_orders(self) -> None:
        self._cancelled, self._retained, self._evicted = [], [], []
        self._page_loads = []

    # Prefixes on disk

    def register_pages(self, listings: Sequence[Listing | None]) -> str:
        """Take the pages of new ranks.

        Args:
            listings: of each rank; None: it cannot write.

        Returns:
            One line about pages that cannot be used; empty if all can.
        """
        available = [rank for rank in listings if rank is not None]
        usable = self._prefix_cache_bytes and available and len(available) == len(listings)
        self._disk_index = DiskIndex(self._disk_bytes, available) if usable else DiskIndex()
        return self._disk_index.notice

    def on_pages(self, rank: int, report: PageReport) -> None:
        """Handle a rank's report on its files, see `DiskIndex.on_report`."""
        for load, tokens, owner in self._disk_index.on_report(rank, report):
            self._on_readable(load, tokens, owner)

    @property
    def checking_pages(self) -> bool:
        """Whether requests wait for ranks that verify pages."""
        return self._disk_index.checking

    def disable_disk(self) -> None:
        """End the wait for pages; read and write nothing on disk from now on."""
        self._disk_index.disable()

    def _write_to_disk(self, running: _RunningRequest, entry: CacheEntry) -> None:
        limit = min(tokens_to_write(running.prompt_length - 1, running.cached_tokens), entry.length)
        if running.request.images:  # pages end anywhere, also inside of an image
            limit = min(limit, running.request.images[0].begin)
        ends: list[int] = []
        if entry.checkpoints is None:
            positions: Iterable[int] = range(PAGE_TOKENS, limit + 1, PAGE_TOKENS)
        else:
            positions = sorted(entry.checkpoints)
        for position in positions:
            if (ends[-1] if ends else 0) + PAGE_TOKENS <= position <= limit:
                ends.append(position)
        self._disk_index.request(entry.name, entry.tokens, ends, entry.owner)

    def _read_from_disk(self, request: Request) -> bool:
        """Have a prefix read, if disk has much more of it than memory; the request then waits."""
        if not self._disk_index.has_pages or request.prompt_logprobs is not None:
            return False
        text = request.tokens[: request.images[0].begin] if request.images else request.tokens
        tokens, owner = pack_tokens(text), self._owner(request)
        pages = () if self.bypass_cache else self._disk_index.find(tokens, owner)
        if not pages:
            return False
        if pages[-1].end < self._prefix_index.find(tokens, owner)[1] + SHARE_WAIT_TOKENS:
            return False
        if self._entry_bytes(pages[-1].end, len(pages)) > self._prefix_cache_bytes:
            return False
        self._disk_index.request_read(pages, tokens[: 4 * pages[-1].end], request.id, owner)
        return True

    def _owner(self, request: Request) -> str:
        """Whose caches a request may use: what is cached tells what a prompt was."""
        return "" if self._share_prefixes else request.key

    def _on_readable(self, load: PageLoad, tokens: bytes, owner: str) -> None:
        checkpoints = {p.end for p in load.pages} if self.footprint.needs_checkpoints else None
        entry = CacheEntry(load.name, tokens, load.pages[-1].end, checkpoints, from_disk=True)
        entry.owner = owner
        self._prefix_index.entries[load.name] = entry
        self._page_loads.append(load)
        if not self._retain(entry):
            self._evict(entry)

    # Admission

    def _active_keys(self) -> set[str]:
        running = {r.request.key for r in self._running.values()}
        return running | {r.key for r in self._waiting.values()}

    def _remove_running(self, request_id: str) -> _RunningRequest:
        running = self._running.pop(request_id)
        self._end_turn(running)
        if not (self._running or self._waiting):
            self._served.clear()
        return running

    def _admit(self, reused: list[PrefixReuse]) -> Iterator[Request]:
        while self._waiting and len(self._running) < self._max_batch_size:
            candidates = [r for r in self._waiting.values() if not self._waits_for_prefix(r)]
            last_place = len(self._running) == self._max_batch_size - 1
            if self._max_batch_size >= FAIRNESS_RESERVE_AFTER and last_place:
                served = {r.request.key for r in self._running.values()} - {""}
                candidates = [r for r in candidates if r.key not in served]
            request = min(candidates, key=lambda r: self._served[r.key], default=None)
            if request is None or not self._fits(request):
                return  # smaller requests must not overtake it: it could wait for ever
            if self._read_from_disk(request):
                continue  # others may go first
            del self._waiting[request.id]
            self._running[request.id] = running = _RunningRequest(request)
            self._find_prefix(running, reused)
            self._turns.setdefault(request.key, []).append(request.id)
            yield request

    def _fits(self, request: Request) -> bool:
        if self.kv_cache_bytes is None or not self._running:
            return True
        lengths = [r.max_length for r in self._running.values()]
        return self.footprint.total_bytes([*lengths, _max_length(request)]) <= self.kv_cache_bytes

    # Prefix cache

    @property
    def _uses_checkpoints(self) -> bool:
        return bool(self._prefix_cache_bytes) and self.footprint.needs_checkpoints

    def _waits_for_prefix(self, request: Request) -> bool:
        """Whether much of its prompt is being read from disk or computed for another request."""
        if self._disk_index.is_waiting(request.id):
            return True
        if not self._turns or not self._prefix_cache_bytes or self.bypass_cache:
            return False
        if request.prompt_logprobs is not None:
            return False
        tokens, owner = pack_tokens(request.cache_tokens), self._owner(request)
        index = self._prefix_index
        found = index.find(tokens, owner)[1]
        return index.being_computed(tokens, owner) >= found + SHARE_WAIT_TOKENS

    def _find_prefix(self, running: _RunningRequest, reused: list[PrefixReuse]) -> None:
        if not self._prefix_cache_bytes or self.bypass_cache:
            return
        request, tokens = running.request, pack_tokens(running.request.cache_tokens)
        checkpoints: set[int] | None = set() if self.footprint.needs_checkpoints else None
        owner = self._owner(request)
        source, length = self._prefix_index.find(tokens, owner)
        # A cache has no log-probabilities of its tokens.
        if source is not None and request.prompt_logprobs is None:
            self._prefix_index.touch(source)
            reused.append(PrefixReuse(request.id, source.name, length))
            running.prefilled = running.cached_tokens = length
            running.disk_tokens = length if source.from_disk else 0
            source.from_disk = False
            if checkpoints is not None:
                checkpoints = {c for c in source.checkpoints or () if c < length} | {length}
        running.cache = CacheEntry(request.id, tokens, running.prefilled, checkpoints, growing=True)
        running.cache.owner = owner
        self._prefix_index.entries[request.id] = running.cache

    def _on_finished(self, running: _RunningRequest, finish: str) -> None:
        entry = running.cache
        if entry is None:
            return
        entry.tokens = pack_tokens((*running.request.cache_tokens, *running.output))
        entry.length = len(entry.tokens) // 4
        if entry.checkpoints is not None:
            entry.checkpoints.add(entry.length)
        else:
            entry.length -= 1  # the last token may not have gone through the model
        if finish in CACHEABLE_FINISH and self._retain(entry):
            self._write_to_disk(running, entry)
        else:
            self._evict(entry)

    def _retain(self, entry: CacheEntry) -> bool:
        """Keep the cache of an ended request and evict others for it; False: not worth it."""
        entry.growing = False
        entry.size_bytes = self._entry_bytes(entry.length, len(entry.checkpoints or ()))
        if entry.length < self._prefix_index.min_tokens:
            return False
        if entry.size_bytes > self._prefix_cache_bytes:
            return False
        self._prefix_index.touch(entry)
        for other in self._prefix_index.least_recently_used():
            covered = entry.tokens.startswith(other.tokens) and other is not entry
            covered = covered and entry.owner == other.owner
            if covered and (
                entry.checkpoints is None or entry.checkpoints.issuperset(other.checkpoints or ())
            ):
                self._evict(other)
        remaining = self._prefix_index.least_recently_used()
        total = sum(e.size_bytes for e in remaining)
        for other in remaining:
            if total > self._prefix_cache_bytes:
                total -= other.size_bytes
                self._evict(other)
        return True

    def _entry_bytes(self, tokens: int, checkpoints: int) -> int:
        per_checkpoint = self.footprint.checkpoint_bytes if self.footprint.needs_checkpoints else 0
        return self.footprint.total_bytes([tokens]) + checkpoints * per_checkpoint

    def _evict(self, entry: CacheEntry) -> None:
        del self._prefix_index.entries[entry.name]
        self._evicted.append(entry.name)
        self._disk_index.release(entry.name)

    # Prefill

    def _split_prefill_budget(self, answers: int) -> tuple[list[PromptChunk], list[PromptChunk]]:
        """This step's prompt chunks: those processed alone, and final ones, processed together."""
        if not self._turns:
            return [], []
        budget = self._prompt_budget.take(answers, self._prefill_chunk_size)
        chunks: list[PromptChunk] = []
        final_chunks: list[PromptChunk] = []
        # The first prompt of each key, then the second of each, and so on.
        rounds = zip_longest(*self._turns.values())
        for name in [name for names in rounds for name in names if name is not None]:
            running = self._running[name]
            begin, length = running.prefilled, running.prompt_length
            if not budget:
                break
            if _join_cost(final_chunks, length - begin) > budget and begin < length - 1:
                if budget < MIN_CHUNK_TOKENS and (chunks or final_chunks):
                    continue
                chunk = self._next_chunk(running, budget)
                chunks.append(chunk)
                budget -= chunk.end - chunk.begin
            cost = _join_cost(final_chunks, length - running.prefilled)
            if cost <= budget:
                budget -= int(cost)
                final_chunks.append(PromptChunk(name, running.prefilled, length))
                running.prefilled, running.started = length, True
            if running.cache is not None:
                running.cache.length = min(running.prefilled, length - 1)
                running.cache.growing = not running.started
            if running.prefilled > begin:
                served = PROMPT_WEIGHT * (running.prefilled - begin)
                self._served[running.request.key] += served
                self._end_turn(running)
        return chunks, final_chunks

    def _next_chunk(self, running: _RunningRequest, budget: int) -> PromptChunk:
        begin = running.prefilled
        end = min(begin + budget, running.prompt_length - 1)
        checkpoint = False
        if self._uses_checkpoints:
            positions = self._checkpoint_positions(running)
            end = min([end, *(p for p in positions if p > begin)])
            checkpoint = end in positions
        running.prefilled = end
        if checkpoint and running.cache is not None and running.cache.checkpoints is not None:
            running.cache.checkpoints.add(end)
        return PromptChunk(running.request.id, begin, end, checkpoint)

    def _checkpoint_positions(self, running: _RunningRequest) -> list[int]:
        """At the end of the prompt, and a few between."""
        length = running.prompt_length
        rounds = max(1, -(-length // (MAX_CHECKPOINTS * MIN_CHECKPOINT_TOKENS)))
        distance = rounds * MIN_CHECKPOINT_TOKENS
        return [*range(distance, length - 1, distance), length - 1]

    def _end_turn(self, running: _RunningRequest) -> None:
        """Others come first in the next step; a processed prompt has no further turn."""
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


def _join_cost(final_chunks: list[PromptChunk], tokens: int) -> float:
    """Prompt tokens that one more final chunk adds to a step: all are padded to the longest."""
    if tokens > JOIN_TOKENS:
        return inf
    longest = max((c.end - c.begin for c in final_chunks), default=0)
    return (len(final_chunks) + 1) * max(longest, tokens) - len(final_chunks) * longest
