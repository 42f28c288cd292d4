"""A group of ranks that answers requests, seen from the front.

Owns: `RankGroup`: the thread that sends every step to every rank, delivers tokens, compares what
the ranks report, and, when one fails, ends them all, starts others and resumes every request.
Does not know: text, HTTP, how ranks are started (`RankSource`).
Invariant: every rank gets the same steps in the same order; at most `MAX_STEPS_IN_FLIGHT` steps are
in flight; there is one epoch of ranks at a time, and messages of older ones are ignored; every
request gets each of its tokens once, or one error.
Next: `worker.py` is the other side; `scheduler/scheduler.py` decides what a step is,
`scheduler/recovery.py` what follows a failure.
"""

from __future__ import annotations

import base64
import logging
import math
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.emulation import EmulationStats
from ..core.request import PromptLogprobs, Request, TokenEvent
from ..core.step import Step
from ..engine.sampling.grammar_process import SerializedTokenizer
from ..engine.speculative.ngram import DraftStats
from ..errors import CenacleError, ClusterError, RankLost
from ..message import MessageError, parse
from ..scheduler import recovery
from ..scheduler.prefix_index import CacheFootprint
from ..scheduler.recovery import FailGroup, RecoveryState, ServeRequests, StartRanks
from ..scheduler.scheduler import Scheduler
from . import exit_reason
from .active_requests import MAX_LOSSES, ActiveRequests, Sink
from .channel import Channel
from .messages import (
    Heartbeat,
    ImageUpload,
    PageUpdate,
    RankFailure,
    StepOrder,
    StepResult,
    VocabularyUpload,
)
from .ranks import Epoch, Ranks, RankSource
from .step_timings import StepReport, StepTimings

log = logging.getLogger(__name__)

# The next step is sent before the last one's tokens have come back, so that ranks never wait for
# the front. More steps in flight would only delay cancelling.
MAX_STEPS_IN_FLIGHT = 2
FINAL_MESSAGES_TIMEOUT_S = 1.0  # for reading what a rank sent before it ended
MAX_VOCABULARY_CHARACTERS = 10_000_000  # escaped, they fit into a message; ranks read longer ones
COUNTED = ("requests", "prompt_tokens", "cached_tokens", "generated_tokens")
DISK_TIMEOUT_S = 10.0  # longest that requests wait for the prefix cache on disk

MeasureCapacity = Callable[[Ranks], tuple[int | None, CacheFootprint, int]]
"""Bytes for KV caches of running requests on these ranks, what a cache takes, and bytes for the
prefix cache: the arguments of `Scheduler.resize`."""


class StepObserver:
    """Is told what the group does, by the group's thread; must return at once and raise nothing."""

    def on_step_sent(self, step: Step) -> None:
        """A step is sent to the ranks."""

    def on_step_measured(self, reports: Sequence[StepReport]) -> None:
        """Every rank has finished a measured step; reports in rank order."""


@dataclass
class _StepInFlight:
    """A step that was sent, and the results so far, by rank."""

    step: Step
    sent_s: float
    results: dict[int, StepResult] = field(default_factory=dict)


_Message = StepResult | PageUpdate | RankFailure
_InboxItem = tuple[int, int, _Message | ClusterError]
"""Epoch, rank, and its message or why there will be none."""


class RankGroup:
    """A group of ranks that answers requests.

    Args:
        ranks: of epoch 0, loaded.
        scheduler: decides the steps.
        source: starts other ranks when these have failed; None: the first failure is final.
        measure_capacity: what ranks that were started again have room for; None: as before.
        step_timeout_s: longest that one step may take.
    """

    def __init__(
        self,
        ranks: Ranks,
        scheduler: Scheduler,
        source: RankSource | None = None,
        measure_capacity: MeasureCapacity | None = None,
        step_timeout_s: float = 600,
    ) -> None:
        self._ranks, self._scheduler, self._source = ranks, scheduler, source
        self._measure_capacity, self._step_timeout_s = measure_capacity, step_timeout_s
        self._lock = threading.Lock()
        self._inbox: queue.Queue[_InboxItem | None] = queue.Queue()  # None: something has changed
        self._active = ActiveRequests()
        self._in_flight: deque[_StepInFlight] = deque()
        self._state = RecoveryState(since_s=time.monotonic())
        self._failure: CenacleError | None = None
        self._reform_reason = ""  # why working ranks are to be ended after the steps in flight
        self._closing = threading.Event()
        self._last_result_s = 0.0  # when rank 0 finished its last step
        self._pages_requested_s = 0.0  # when ranks were last asked to check pages on disk
        self._completion_interval_s, self._last_completion_s = 1.0, time.monotonic()
        self.step_timings = StepTimings()
        self.draft_stats = DraftStats()  # of all requests since the group began
        self.emulation: dict[int, EmulationStats] = {}  # by rank, likewise; empty: real machines
        self.counts = dict.fromkeys(COUNTED, 0)  # likewise
        self.last_message_s: list[float] = []  # `time.monotonic` of each rank's last message
        self.heartbeats: list[Heartbeat] = []  # the last one of each rank
        self.observers: list[StepObserver] = []
        # The model's tokens, for requests with grammars; None: every rank reads them itself, for
        # which it imports a second's worth of libraries.
        self.read_vocabulary: Callable[[], SerializedTokenizer] | None = None
        self._vocabulary_epoch: int | None = None  # whose ranks have it
        self._register_pages(ranks)
        self._start_readers()
        self._thread = threading.Thread(target=self._run, name="group", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> CenacleError | None:
        """Why the group will not work again, or None."""
        return self._failure

    @property
    def state(self) -> RecoveryState:
        """Whether the ranks work, are being started again, or have failed."""
        return self._state

    @property
    def ranks(self) -> Ranks:
        """The ranks of this epoch, or of the last while others are being started."""
        return self._ranks

    @property
    def load(self) -> dict[str, int]:
        """Numbers of running and waiting requests."""
        with self._lock:
            return {"running": self._scheduler.running, "waiting": self._scheduler.waiting}

    @property
    def cache_bytes(self) -> int:
        """See `Scheduler.cache_bytes`."""
        with self._lock:
            return self._scheduler.cache_bytes

    def measure_steps(self, every: int) -> None:
        """Measure one step in `every` from now on (0: none), and reset the timings."""
        with self._lock:
            self._scheduler.measure_every = every
            self.step_timings = StepTimings()

    def bypass_caches(self, on: bool) -> None:
        """Whether requests submitted from now on reuse nothing that was computed before."""
        with self._lock:
            self._scheduler.bypass_cache = on

    def reset_statistics(self, every: int) -> None:
        """Like `measure_steps`, and reset the counters; call before the first request."""
        self.measure_steps(every)
        with self._lock:
            self.draft_stats, self.emulation = DraftStats(), {}
            self.counts = dict.fromkeys(self.counts, 0)

    def submit(self, request: Request, sink: Sink) -> None:
        """Begin a request. While ranks are being started it waits.

        Args:
            request: its id must be unique; without a seed it is given a random one.
            sink: called from another thread with every token, or once with the error that ended
                the group.

        Raises:
            CenacleError: the group has failed.
            InputError: the request's cache would never fit.
            Busy: the queue is full.
        """
        if request.sampling.seed is None:
            sampling = replace(request.sampling, seed=random.getrandbits(48))
            request = replace(request, sampling=sampling)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if not request.resumed_tokens:  # a resumed request had its place in the queue
                retry_after_s = min(60, math.ceil(self._completion_interval_s))
                self._scheduler.check(request, retry_after_s)
            self._active.add(request, sink)
            self._scheduler.submit(request)
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += len(request.tokens)
        self._inbox.put(None)

    def cancel(self, request_id: str) -> None:
        """End a request; its sink is not called again. Unknown ids are ignored."""
        with self._lock:
            self._active.remove(request_id)
            self._scheduler.cancel(request_id)
            self._retry_suspect()
        self._inbox.put(None)

    def reform(self, reason: str) -> None:
        """End the ranks between two steps and start others, since there are better nodes for them.
        Every request is resumed. Does nothing while ranks are being started anyway.

        Args:
            reason: a sentence.
        """
        with self._lock:
            if self._state.phase == "ok" and self._source is not None:
                self._reform_reason = reason
        self._inbox.put(None)

    def close(self) -> None:
        """End the ranks; active requests get an error."""
        self._closing.set()
        self._fail(ClusterError("the group was closed"), now=False)
        self._inbox.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=30)

    def _run(self) -> None:
        """Do what `recovery.next_action` says until the group has failed."""
        try:
            while self._failure is None:
                match recovery.next_action(self._state):
                    case ServeRequests():
                        self._serve()
                    case StartRanks(epoch, not_before_s):
                        if not self._closing.wait(max(0.0, not_before_s - time.monotonic())):
                            self._start_ranks(epoch)
                    case FailGroup(reason, rank):
                        error = ClusterError(reason) if rank is None else RankLost(rank, reason)
                        self._fail(error)
        except Exception as error:
            self._fail(ClusterError(f"the front failed: {exit_reason.describe_error(error)}"))
            raise

    def _report_progress(self, detail: str) -> None:
        log.warning("%s", detail)
        self._apply(recovery.Progress(time.monotonic(), detail))

    def _apply(self, event: recovery.Event) -> None:
        with self._lock:
            self._state = recovery.apply(self._state, event)

    # While the ranks work

    def _start_readers(self) -> None:
        self.last_message_s = [time.monotonic()] * len(self._ranks.channels)
        self.heartbeats = [Heartbeat()] * len(self._ranks.channels)
        for rank, channel in enumerate(self._ranks.channels):
            arguments = (self._state.epoch, rank, channel, self.last_message_s, self.heartbeats)
            threading.Thread(target=self._read_messages, args=arguments, daemon=True).start()

    def _read_messages(
        self,
        epoch: int,
        rank: int,
        channel: Channel,
        last_message_s: list[float],
        heartbeats: list[Heartbeat],
    ) -> None:
        """Put a rank's messages into the inbox until there are no more."""
        while True:
            try:
                message = parse(channel.receive(), Heartbeat, StepResult, PageUpdate, RankFailure)
            except MessageError as error:
                reason = ClusterError(f"sent a malformed message ({error})")
                self._inbox.put((epoch, rank, reason))
                return
            except ClusterError as error:
                self._inbox.put((epoch, rank, error))
                return
            except Exception as error:  # a rank without a reader would never be missed
                log.exception("a message of rank %d could not be read", rank)
                reason = ClusterError(f"sent a malformed message ({error!r})")
                self._inbox.put((epoch, rank, reason))
                return
            last_message_s[rank] = time.monotonic()
            if isinstance(message, Heartbeat):
                heartbeats[rank] = message
            else:
                self._inbox.put((message.epoch, rank, message))

    def _serve(self) -> None:
        """Take steps until the ranks fail or are to be others."""
        try:
            while self._failure is None:
                if not self._reform_reason:
                    self._send_steps()
                elif not self._in_flight:
                    self._reform()
                    return
                self._handle_message(self._next_message())
        except CenacleError as error:
            self._on_rank_lost(error)

    def _next_message(self) -> _InboxItem | None:
        """The next item of the inbox, within the step timeout; a disk is given up earlier.

        Raises:
            RankLost: a step took too long.
        """
        waits_for_disk = self._scheduler.checking_pages
        timeout_s = self._step_timeout_s if self._in_flight else None
        if waits_for_disk:
            timeout_s = max(0.0, self._pages_requested_s + DISK_TIMEOUT_S - time.monotonic())
        try:
            return self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            if not waits_for_disk:
                raise self._step_timeout() from None
        log.warning(
            "prefix cache on disk did not respond within %g s; disabled until restart",
            DISK_TIMEOUT_S,
        )
        with self._lock:
            self._scheduler.disable_disk()
        return None

    def _step_timeout(self) -> RankLost:
        late = self._in_flight[0]
        ranks = sorted(set(range(len(self._ranks.channels))) - set(late.results))
        return RankLost(
            ranks[0],
            f"step {late.step.number} took longer than {self._step_timeout_s:g} s; ranks {ranks} "
            f"have not finished it",
        )

    def _send_steps(self) -> None:
        while len(self._in_flight) < MAX_STEPS_IN_FLIGHT:
            with self._lock:
                step = self._scheduler.next_step()
                if step is not None:
                    self._active.admit(step.admitted)
            if step is None:
                return
            if step.page_checks:
                self._pages_requested_s = time.monotonic()
            for observer in self.observers:
                observer.on_step_sent(step)
            self._in_flight.append(_StepInFlight(step, time.monotonic()))
            for upload in _image_uploads(self._state.epoch, step):
                self._send(0, upload.to_json())
            if any(request.grammar is not None for request in step.admitted):
                self._send_vocabulary()
            message = StepOrder(self._state.epoch, step).to_json()
            for rank in range(len(self._ranks.channels)):
                self._send(rank, message)

    def _send_vocabulary(self) -> None:
        """To all ranks, if they do not have it."""
        epoch = self._state.epoch
        if self.read_vocabulary is None or self._vocabulary_epoch == epoch:
            return
        self._vocabulary_epoch = epoch
        try:
            vocabulary = self.read_vocabulary()
        except CenacleError:
            return  # a rank that reads it says so, to the request
        if len(vocabulary.text) > MAX_VOCABULARY_CHARACTERS:
            return
        message = VocabularyUpload(epoch, vocabulary.text, vocabulary.stop_tokens).to_json()
        for rank in range(len(self._ranks.channels)):
            self._send(rank, message)

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        try:
            self._ranks.channels[rank].send(message)
        except ClusterError as error:
            self._read_final_messages()
            raise self._ranks.blame(rank, str(error)) from error

    def _read_final_messages(self) -> None:
        """Handle what a rank that cannot be reached has sent before: it may say why it ended.

        Raises:
            RankLost: it does.
        """
        ends_s = time.monotonic() + FINAL_MESSAGES_TIMEOUT_S
        while True:
            try:
                item = self._inbox.get(timeout=max(0.0, ends_s - time.monotonic()))
            except queue.Empty:
                return
            self._handle_message(item)

    def _handle_message(self, item: _InboxItem | None) -> None:
        if item is None:
            return
        epoch, rank, message = item
        if epoch != self._state.epoch:
            return  # of ranks that have been ended
        match message:
            case ClusterError():
                raise self._ranks.blame(rank, str(message))
            case RankFailure():
                raise self._ranks.blame(rank, str(message.to_error("failed: ")))
        try:
            self._apply_message(rank, message)
        except CenacleError:
            raise
        except Exception as error:  # well formed, and still nothing that fits what was sent
            log.exception("a message of rank %d could not be used", rank)
            reason = f"sent a message that cannot be used ({exit_reason.describe_error(error)})"
            raise self._ranks.blame(rank, reason) from error

    def _apply_message(self, rank: int, message: StepResult | PageUpdate) -> None:
        match message:
            case PageUpdate(report=report):
                for notice in report.notices:
                    log.warning("rank %d: %s", rank, notice)
                with self._lock:
                    self._scheduler.on_pages(rank, report)
            case StepResult():
                self._on_step_result(rank, message)

    def _on_step_result(self, rank: int, result: StepResult) -> None:
        sent = next((s for s in self._in_flight if s.step.number == result.number), None)
        if sent is None or rank in sent.results:
            raise self._ranks.blame(rank, f"sent a result of step {result.number}, not in flight")
        sent.results[rank] = result
        if result.emulation is not None:
            self.emulation[rank] = self.emulation.get(rank, EmulationStats()) + result.emulation
        if rank == 0:
            now = time.monotonic()
            self._scheduler.on_step_time(sent.step, now - max(sent.sent_s, self._last_result_s))
            self._last_result_s = now
            self.draft_stats += result.drafts
            self._deliver_prompt_logprobs(result.prompt_logprobs)
            self._deliver_tokens(result.tokens)
        self._compare_results(sent, rank)
        while self._in_flight and len(self._in_flight[0].results) == len(self._ranks.channels):
            self._add_timings(self._in_flight.popleft())

    def _compare_results(self, sent: _StepInFlight, rank: int) -> None:
        """Compare a new result with rank 0's; the first of all with those that came before.

        Raises:
            RankLost: a rank chose other tokens than rank 0. Nothing it computes is right.
        """
        if 0 not in sent.results:
            return
        expected = sent.results[0]
        for other in sent.results if rank == 0 else (rank,):
            result = sent.results[other]
            # Only rank 0 sends log-probabilities.
            if _tokens(result) != _tokens(expected):
                raise self._ranks.blame(
                    other,
                    f"disagrees at step {sent.step.number}: expected tokens {_tokens(expected)}, "
                    f"got {_tokens(result)}",
                )
            if _all_reduces(result) != _all_reduces(expected):
                raise self._ranks.blame(
                    other,
                    f"disagrees at step {sent.step.number}: expected {_all_reduces(expected)} "
                    f"measured all-reduces, got {_all_reduces(result)}",
                )

    def _add_timings(self, finished: _StepInFlight) -> None:
        results = [finished.results[rank] for rank in sorted(finished.results)]
        reports = [result.report for result in results if result.report is not None]
        if reports:
            self.step_timings.add(reports)
            for observer in self.observers:
                observer.on_step_measured(reports)

    def _deliver_prompt_logprobs(self, results: Sequence[PromptLogprobs]) -> None:
        with self._lock:
            active = [self._active.get(result.request_id) for result in results]
        for request, result in zip(active, results, strict=True):
            if request is not None and request.request.prompt_logprobs is not None:
                request.sink(result)

    def _deliver_tokens(self, events: Sequence[TokenEvent]) -> None:
        delivered: list[tuple[Sink, TokenEvent]] = []
        with self._lock:
            for event in self._scheduler.on_tokens(events):
                active = self._active.get(event.request_id)
                if active is None:
                    continue
                if active.generated_tokens and event.cached_tokens:
                    # A resumed request's own prompt was counted before.
                    event = replace(event, cached_tokens=0, disk_tokens=0)
                active.generated_tokens.append(event.token)
                active.losses = 0
                self.counts["generated_tokens"] += 1
                self.counts["cached_tokens"] += event.cached_tokens
                if event.finish is not None:
                    self._active.remove(event.request_id)
                    self._count_completion()
                delivered.append((active.sink, event))
            self._retry_suspect()
            if delivered and self._state.recent_failures:
                event_at_s = time.monotonic()
                self._state = recovery.apply(self._state, recovery.TokensDelivered(event_at_s))
        for sink, event in delivered:
            sink(event.outcome())

    def _count_completion(self) -> None:
        now = time.monotonic()
        interval_s = now - self._last_completion_s
        self._completion_interval_s += 0.2 * (interval_s - self._completion_interval_s)
        self._last_completion_s = now

    # When they fail, or are to be others

    def _on_rank_lost(self, error: CenacleError) -> None:
        """End this epoch's ranks and resubmit their requests."""
        if self._failure is not None:
            return  # the group was closed
        if self._source is None:
            self._fail(error)
            return
        log.warning("epoch %d failed: %s", self._state.epoch, error)
        self._apply(recovery.RanksLost(time.monotonic(), str(error), _rank_of(error)))
        self._ranks.close(now=True)
        self._resubmit_all(error)

    def _reform(self) -> None:
        log.warning("epoch %d ends: %s", self._state.epoch, self._reform_reason)
        self._apply(recovery.Rebalance(time.monotonic(), self._reform_reason))
        self._ranks.close(now=False)
        self._resubmit_all(None)

    def _resubmit_all(self, error: CenacleError | None) -> None:
        """Submit the requests of ranks that are gone, and all that wait, for the next ranks.

        Args:
            error: why the ranks failed; None: they did not.
        """
        self._in_flight.clear()
        with self._lock:
            self._reform_reason = ""
            if self._failure is not None:
                return
            self._scheduler.on_ranks_lost()
            resumed, given_up = self._active.on_ranks_lost(failed=error is not None)
            for request in resumed:
                self._scheduler.submit(request)
            self._retry_suspect()
        for active in given_up:
            active.sink(
                ClusterError(
                    f"this request was ended: the group was lost {MAX_LOSSES} times while it ran: "
                    f"{error}"
                )
            )

    def _retry_suspect(self) -> None:
        if (request := self._active.next_suspect()) is not None:
            self._scheduler.submit(request)

    def _start_ranks(self, number: int) -> None:
        assert self._source is not None, "without a source the first failure is final"
        started_s = time.monotonic()
        epoch = Epoch(number, self._closing, self._report_progress, self._state.reason)
        try:
            ranks = self._source.start(epoch)
            try:
                with self._lock:
                    if self._failure is None:
                        self._replace_ranks(ranks)
            except BaseException:
                ranks.close(now=True)
                raise
        except Exception as error:
            if not isinstance(error, CenacleError | OSError):
                log.exception("an unexpected error")
            if not self._closing.is_set():
                log.warning("epoch %d could not be started: %s", number, error)
            self._apply(recovery.StartFailed(time.monotonic(), str(error), _rank_of(error)))
            return
        if self._failure is not None:
            ranks.close(now=True)
            return
        self._start_readers()
        seconds = time.monotonic() - started_s
        log.warning(
            "epoch %d works, started in %.1f s; %d requests resume",
            *(number, seconds, len(self._active)),
        )

    def _replace_ranks(self, ranks: Ranks) -> None:
        if len(ranks.channels) != len(self._ranks.channels):
            self.step_timings = StepTimings()  # its means are over the ranks
        self._ranks = ranks
        if self._measure_capacity is not None:
            self._scheduler.resize(*self._measure_capacity(ranks))
        self._register_pages(ranks)
        self._state = recovery.apply(self._state, recovery.Started(time.monotonic()))

    def _register_pages(self, ranks: Ranks) -> None:
        """Tell the scheduler which pages new ranks have on disk."""
        for rank, ready in enumerate(ranks.ready):
            for notice in ready.notices:
                log.warning("rank %d: %s", rank, notice)
        if notice := self._scheduler.register_pages([ready.pages for ready in ranks.ready]):
            log.warning("%s", notice)

    def _fail(self, error: CenacleError, *, now: bool = True) -> None:
        """The group has failed for good: tell the clients, then end the ranks."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            failed = recovery.GroupFailed(time.monotonic(), str(error), _rank_of(error))
            self._state = recovery.apply(self._state, failed)
            self._scheduler.on_ranks_lost()
            ended = self._active.clear()
        for active in ended:
            active.sink(error)
        self._ranks.close(now=now)


def _tokens(result: StepResult) -> list[tuple[str, int, str | None]]:
    return [(event.request_id, event.token, event.finish) for event in result.tokens]


def _all_reduces(result: StepResult) -> int | None:
    return len(result.report.all_reduces_s) if result.report is not None else None


def _rank_of(error: Exception) -> int | None:
    return error.rank if isinstance(error, RankLost) else None


def _image_uploads(epoch: int, step: Step) -> Iterator[ImageUpload]:
    """The images that a step's new requests need beside what caches have of their prompts."""
    reused = {reuse.request_id: reuse.tokens for reuse in step.reused}
    for request in step.admitted:
        for index, image in enumerate(request.images):
            if image.end > reused.get(request.id, 0):
                pixels = base64.b64encode(image.pixels).decode()
                yield ImageUpload(epoch, request.id, index, pixels)
