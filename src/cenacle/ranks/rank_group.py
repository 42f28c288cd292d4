"""Keeping the ranks in step, seen from the front.

Owns: `Group`: the thread that sends every step to every rank, hands the tokens to those who asked,
compares what the ranks say, and, when one of them fails, ends them all, has others started, and
lets every answer go on where it was.
Does not know: text, HTTP, how ranks are started (it is given `Ranks`, and what starts others).
Invariant: every rank gets the same steps in the same order; at most `DEPTH` steps are under way;
there is one epoch of ranks at a time, and what an older one says is not heard; whoever asked gets
every token of the answer once, or one error.
Next: `worker.py` is the other side; `scheduler.py` decides what a step is, `cluster/supervisor.py`
what is done after a failure.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..core.request import Request, TokenEvent
from ..core.step import Step
from ..engine.speculative.ngram import DraftStats
from ..errors import CenacleError, ClusterError, RankLost
from ..scheduler import recovery
from ..scheduler.recovery import (
    FailGroup,
    Progress,
    RanksLost,
    Rebalance,
    ServeRequests,
    StartFailed,
    StartRanks,
    TokensDelivered,
)
from ..scheduler.scheduler import Scheduler
from . import exit_reason
from .channel import Channel
from .ranks import Epoch, Ranks, RankStarter
from .step_timings import StepTimings

log = logging.getLogger(__name__)

# The next step is sent before the last one's tokens have come back, so that ranks never wait for
# the front. More would only make cancelling slower.
MAX_STEPS_IN_FLIGHT = 2
FINAL_MESSAGES_S = 1.0  # longest time until what a rank said before it ended has been read
# A request during which the group was lost may be the cause: a prompt for which there is no memory.
# After SUSPECT losses without a token of its own between it has to wait until no other suspect is
# under way, so that the cause is found; after LOSSES it is ended, and the others go on without it.
SUSPECT_AFTER_LOSSES, MAX_LOSSES = 2, 3
DISK_TIMEOUT_S = 10.0  # longest time that requests wait for what ranks have on disk

Sink = Callable[[TokenEvent | CenacleError], None]


class Observer(Protocol):
    """Is told what happens, by the group's thread; must return at once and raise nothing."""

    def sent(self, step: Step) -> None:
        """A step goes to the ranks."""
        ...

    def measured(self, reports: list[dict[str, Any]]) -> None:
        """Every rank has finished a measured step: their `Watch.stop()` reports, in rank order."""
        ...


@dataclass
class _StepInFlight:
    """A step that has been sent: what rank 0 said, and who has answered."""

    step: Step
    sent: float
    tokens: list[Any] | None = None
    answered: set[int] = field(default_factory=set)
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    others: dict[int, list[Any]] = field(default_factory=dict)


@dataclass
class _ActiveRequest:
    """A request that somebody waits for, and what was given of its answer.

    `losses`: how often the group was lost while it ran, since its last token.
    """

    request: Request
    sink: Sink
    given: list[int] = field(default_factory=list)
    losses: int = 0


_InboxItem = tuple[int, int, dict[str, Any] | ClusterError]
"""Epoch, rank, and its message or why there will be none."""


class RankGroup:
    """A group of ranks that answers requests.

    Args:
        ranks: of epoch 0, started and loaded.
        scheduler: decides the steps.
        step_deadline_s: longest that one step may take before its ranks are given up.
        start: starts other ranks when these have failed; None: the first failure is the last.
    """

    def __init__(
        self,
        ranks: Ranks,
        scheduler: Scheduler,
        step_deadline_s: float = 600,
        start: RankStarter | None = None,
    ) -> None:
        self._ranks, self._scheduler, self._start_epoch = ranks, scheduler, start
        self._step_deadline_s = step_deadline_s
        self._lock = threading.Lock()
        self._inbox: queue.Queue[_InboxItem | None] = queue.Queue()
        self._active: dict[str, _ActiveRequest] = {}
        self._admitted: set[str] = set()  # by the ranks of this epoch
        self._suspects: deque[_ActiveRequest] = deque()  # to be tried one after the other
        self._on_trial: _ActiveRequest | None = None
        self._in_flight: deque[_StepInFlight] = deque()
        self._state = recovery.RecoveryState(since_s=time.monotonic())
        self._failure: CenacleError | None = None
        self._reform_reason = ""  # why ranks that work are to be ended behind the steps under way
        self._closing = threading.Event()
        self._last_s = 0.0  # when rank 0 finished its last step
        self._disk_read_sent_s = 0.0  # when ranks were last told to look for pages
        self._place_s, self._placed_s = 1.0, time.monotonic()  # every how often a request ends
        self.step_timings = StepTimings()
        self.draft_stats = DraftStats()  # of all requests since the beginning
        # Since the group began.
        self.counts = {"requests": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self.last_message_s: list[
            float
        ] = []  # when each rank last gave a sign of life, time.monotonic()'s
        self.observers: list[Observer] = []
        self._register_pages(ranks)
        self._start_readers()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def failure(self) -> CenacleError | None:
        """Why the group will not work again, or None."""
        return self._failure

    @property
    def state(self) -> recovery.RecoveryState:
        """Whether the ranks work, are being started again, or have failed; times are
        `time.monotonic()`'s."""
        return self._state

    @property
    def ranks(self) -> Ranks:
        """The ranks of this epoch, or of the last if they are being started."""
        return self._ranks

    @property
    def load(self) -> dict[str, int]:
        """Numbers of running and waiting requests."""
        with self._lock:
            return {"running": self._scheduler.running, "waiting": self._scheduler.waiting}

    def measure_steps(self, every: int) -> None:
        """From now on measure one step in `every` (0: none), and forget the terms so far."""
        with self._lock:
            self._scheduler.measure_every = every
            self.step_timings = StepTimings()

    def bypass_caches(self, on: bool) -> None:
        """Whether requests that are submitted from now on use nothing that was computed before."""
        with self._lock:
            self._scheduler.bypass_cache = on

    def reset_statistics(self, every: int) -> None:
        """As `measure`, and forget all that was counted: nobody had asked yet."""
        self.measure_steps(every)
        with self._lock:
            self.draft_stats = DraftStats()
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
            seed = random.getrandbits(48)
            request = replace(request, sampling=replace(request.sampling, seed=seed))
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if not request.resumed_tokens:  # what goes on had its place
                self._scheduler.check(request, min(60, math.ceil(self._place_s)))
            self._active[request.id] = _ActiveRequest(request, sink)
            self._scheduler.submit(request)
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += len(request.tokens)
        self._inbox.put(None)

    def cancel(self, request_id: str) -> None:
        """End a request; its sink is not called again. Unknown ids are ignored."""
        with self._lock:
            self._active.pop(request_id, None)
            self._scheduler.cancel(request_id)
            self._retry_suspect()
        self._inbox.put(None)

    def reform(self, reason: str) -> None:
        """Have the ranks ended between two steps and others started: there are better machines for
        them. Every answer goes on. Nothing happens if they are being started in any case.

        Args:
            reason: why, as a sentence.
        """
        with self._lock:
            if self._state.phase == "ok" and self._start_epoch is not None:
                self._reform_reason = reason
        self._inbox.put(None)

    def close(self) -> None:
        """End the ranks. Requests that still run are told."""
        self._closing.set()
        self._fail(ClusterError("the group was closed"), now=False)
        self._inbox.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=30)

    def _run(self) -> None:
        """Do what the supervisor says until the group has failed."""
        try:
            while self._failure is None:
                match recovery.next_action(self._state):
                    case ServeRequests():
                        self._serve()
                    case StartRanks(epoch, not_before_s):
                        if not self._closing.wait(max(0.0, not_before_s - time.monotonic())):
                            self._start_ranks(epoch)
                    case FailGroup(reason):
                        self._fail(_as_error(self._state, reason))
        except Exception as error:
            self._fail(ClusterError(f"the front failed: {exit_reason.describe_error(error)}"))
            raise

    def _report_progress(self, what: str) -> None:
        log.warning("%s", what)
        self._apply(Progress(time.monotonic(), what))

    def _apply(self, event: recovery.Event) -> None:
        with self._lock:
            self._state = recovery.apply(self._state, event)

    # While the ranks work

    def _start_readers(self) -> None:
        self.last_message_s = [time.monotonic()] * len(self._ranks.channels)
        for rank, channel in enumerate(self._ranks.channels):
            arguments = (self._state.epoch, rank, channel)
            threading.Thread(target=self._read_messages, args=arguments, daemon=True).start()

    def _read_messages(self, epoch: int, rank: int, channel: Channel) -> None:
        heard = self.last_message_s
        while True:
            try:
                message = channel.receive()
            except ClusterError as error:
                self._inbox.put((epoch, rank, error))
                return
            heard[rank] = time.monotonic()
            if message["type"] != "alive":
                self._inbox.put((message["epoch"], rank, message))

    def _serve(self) -> None:
        """Take steps until the ranks fail."""
        try:
            while self._failure is None:
                if not self._reform_reason:
                    self._send_steps()
                elif not self._in_flight:
                    self._reform()
                    return
                self._handle_message(self._next_message())
        except queue.Empty:
            late = self._in_flight[0]
            behind = sorted(set(range(len(self._ranks.channels))) - late.answered)
            why = (
                f"step {late.step.number} took longer than {self._step_deadline_s:g} s; "
                f"ranks {behind} have not finished it"
            )
            self._on_rank_lost(RankLost(behind[0], why))
        except CenacleError as error:
            self._on_rank_lost(error)

    def _next_message(self) -> _InboxItem | None:
        """What comes next; a disk is waited for only so long."""
        if not self._scheduler.checking_pages:
            return self._inbox.get(timeout=self._wait_limit_s())
        left = self._disk_read_sent_s + DISK_TIMEOUT_S - time.monotonic()
        try:
            if left > 0:
                return self._inbox.get(timeout=left)
        except queue.Empty:
            pass
        log.warning(
            "a disk did not answer for %g s: prompts on disk are not used now", DISK_TIMEOUT_S
        )
        with self._lock:
            self._scheduler.disable_disk()
        return None

    def _register_pages(self, ranks: Ranks) -> None:
        """Take note of what new ranks have on disk."""
        for rank, ready in enumerate(ranks.ready):
            for notice in ready.get("notices", ()):
                log.warning("rank %d: %s", rank, notice)
        if notice := self._scheduler.register_pages([ready.get("pages") for ready in ranks.ready]):
            log.warning("%s", notice)

    def _wait_limit_s(self) -> float | None:
        return self._step_deadline_s if self._in_flight else None

    def _send_steps(self) -> None:
        while len(self._in_flight) < MAX_STEPS_IN_FLIGHT:
            with self._lock:
                step = self._scheduler.next_step()
                if step is not None:
                    self._admitted.update(request.id for request in step.admitted)
            if step is None:
                return
            if step.page_checks:
                self._disk_read_sent_s = time.monotonic()
            for observer in self.observers:
                observer.sent(step)
            self._in_flight.append(_StepInFlight(step, time.monotonic()))
            message = {"type": "step", "epoch": self._state.epoch, "step": step.to_json()}
            for rank, channel in enumerate(self._ranks.channels):
                try:
                    channel.send(message)
                except ClusterError as error:
                    self._read_final_messages()
                    raise self._ranks.blame(rank, str(error)) from error

    def _read_final_messages(self) -> None:
        """A rank that cannot be reached may have said why: raise that, it tells more."""
        ends = time.monotonic() + FINAL_MESSAGES_S
        while True:
            try:
                item = self._inbox.get(timeout=max(0.0, ends - time.monotonic()))
            except queue.Empty:
                return
            self._handle_message(item)

    def _handle_message(self, item: _InboxItem | None) -> None:
        if item is None:
            return
        epoch, rank, message = item
        if epoch != self._state.epoch:
            return  # of ranks that have been ended
        if isinstance(message, ClusterError):
            raise self._ranks.blame(rank, str(message))
        if message["type"] == "error":
            raise self._ranks.blame(rank, f"failed: {message['error']['message']}")
        if message["type"] == "pages":
            for notice in message.get("notices", ()):
                log.warning("rank %d: %s", rank, notice)
            with self._lock:
                self._scheduler.on_pages(rank, message)
            return
        running = next(r for r in self._in_flight if r.step.number == message["number"])
        running.answered.add(rank)
        if message["report"] is not None:
            running.reports[rank] = message["report"]
        if rank == 0:
            now = time.monotonic()
            self._scheduler.on_step_time(running.step, now - max(running.sent, self._last_s))
            self._last_s = now
            running.tokens = message["tokens"]
            self.draft_stats += DraftStats(**message.get("drafts", {}))
            self._deliver([TokenEvent.from_json(t) for t in message["tokens"]])
        else:
            running.others[rank] = message["tokens"]
        self._compare_tokens(running)
        while self._in_flight and len(self._in_flight[0].answered) == len(self._ranks.channels):
            done = self._in_flight.popleft()
            if done.reports:
                reports = [report for _, report in sorted(done.reports.items())]
                self.step_timings.add(reports)
                for observer in self.observers:
                    observer.measured(reports)

    def _compare_tokens(self, running: _StepInFlight) -> None:
        """Ranks that chose other tokens than rank 0 have lost step: nothing they say is right."""
        if running.tokens is None:
            return
        for rank, tokens in running.others.items():
            # Not their log-probabilities: only rank 0 says those.
            if [t[:3] for t in tokens] != [t[:3] for t in running.tokens]:
                raise self._ranks.blame(
                    rank,
                    f"disagrees at step {running.step.number}: expected tokens {running.tokens}, "
                    f"got {tokens}",
                )
        running.others.clear()

    def _deliver(self, events: list[TokenEvent]) -> None:
        told: list[tuple[Sink, TokenEvent]] = []
        with self._lock:
            for event in self._scheduler.on_tokens(events):
                asked = self._active.get(event.request_id)
                if asked is None:
                    continue
                if asked.given and event.cached_tokens:
                    event = replace(
                        event, cached_tokens=0, disk_tokens=0
                    )  # its own prompt was counted before
                asked.given.append(event.token)
                self.counts["generated_tokens"] += 1
                asked.losses = 0
                if event.finish is not None:
                    del self._active[event.request_id]
                    now = time.monotonic()
                    self._place_s += 0.2 * (now - self._placed_s - self._place_s)
                    self._placed_s = now
                told.append((asked.sink, event))
            self._retry_suspect()
            if told and self._state.recent_failures:
                self._state = recovery.apply(self._state, TokensDelivered(time.monotonic()))
        for sink, event in told:
            sink(event.outcome())

    # When they fail, or are to be others

    def _on_rank_lost(self, error: CenacleError) -> None:
        """End this epoch's ranks, and queue again what they were working on."""
        if self._failure is not None:
            return  # they have been told to end
        if self._start_epoch is None:
            self._fail(error)
            return
        log.warning("epoch %d ended: %s", self._state.epoch, error)
        rank = error.rank if isinstance(error, RankLost) else None
        self._apply(RanksLost(time.monotonic(), str(error), rank))
        self._ranks.close(now=True)
        self._resubmit_all(error)

    def _reform(self) -> None:
        """As `_on_rank_lost`, but nothing has failed: no request is to blame."""
        log.warning("epoch %d ends: %s", self._state.epoch, self._reform_reason)
        self._apply(Rebalance(time.monotonic(), self._reform_reason))
        self._ranks.close(now=False)
        self._resubmit_all(None)

    def _resubmit_all(self, error: CenacleError | None) -> None:
        """What ranks that are gone were working on, and all who wait, are for the next ranks.

        Args:
            error: why they were lost; None: they were not.
        """
        self._in_flight.clear()
        hopeless: list[_ActiveRequest] = []
        with self._lock:
            self._reform_reason = ""
            if self._failure is not None:
                return
            self._scheduler.on_ranks_lost()
            admitted, self._admitted = self._admitted, set()
            for asked in [self._active[name] for name in admitted if name in self._active]:
                asked.losses += error is not None
                if asked.losses == MAX_LOSSES:
                    hopeless.append(self._active.pop(asked.request.id))
            # Those who were being answered come first.
            again = sorted(self._active.values(), key=lambda a: a.request.id not in admitted)
            for asked in again:
                if asked.losses < SUSPECT_AFTER_LOSSES:
                    self._scheduler.submit(asked.request.resumed_with(asked.given))
            self._suspects = deque(asked for asked in again if asked.losses >= SUSPECT_AFTER_LOSSES)
            self._on_trial = None
            self._retry_suspect()
        for asked in hopeless:
            times = f"the group was lost {MAX_LOSSES} times while it ran"
            asked.sink(ClusterError(f"this request was ended: {times}: {error}"))

    def _retry_suspect(self) -> None:
        """Let the next suspect run if the last one has had a token, or is gone."""
        tried = self._on_trial
        if tried is not None and tried.losses and tried.request.id in self._active:
            return
        self._on_trial = None
        while self._suspects and self._on_trial is None:
            asked = self._suspects.popleft()
            if asked.request.id in self._active:
                self._on_trial = asked
                self._scheduler.submit(asked.request.resumed_with(asked.given))

    def _start_ranks(self, number: int) -> None:
        assert self._start_epoch is not None, "without it the first failure is the last"
        began = time.monotonic()
        try:
            ranks = self._start_epoch(
                Epoch(number, self._closing, self._report_progress, self._state.reason)
            )
        except (CenacleError, OSError) as error:
            if not self._closing.is_set():
                log.warning("epoch %d could not be started: %s", number, error)
            rank = error.rank if isinstance(error, RankLost) else None
            self._apply(StartFailed(time.monotonic(), str(error), rank))
            return
        with self._lock:
            if self._failure is None:
                if len(ranks.channels) != len(self._ranks.channels):
                    self.step_timings = StepTimings()  # means over ranks: of others now
                self._ranks = ranks
                self._register_pages(ranks)
                self._state = recovery.apply(self._state, recovery.Started(time.monotonic()))
                again = len(self._active)
        if self._failure is not None:
            ranks.close(now=True)
            return
        self._start_readers()
        took = time.monotonic() - began
        log.warning("epoch %d works, started in %.1f s; %d requests go on", number, took, again)

    def _fail(self, error: CenacleError, *, now: bool = True) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            rank = error.rank if isinstance(error, RankLost) else None
            self._state = replace(
                self._state, phase="failed", since_s=time.monotonic(), reason=str(error), rank=rank
            )
            self._scheduler.on_ranks_lost()
            self._suspects.clear()
            told, self._active = list(self._active.values()), {}
        # First the clients are told, then the ranks are ended: that may take a moment.
        for asked in told:
            asked.sink(error)
        self._ranks.close(now=now)


def _as_error(state: recovery.RecoveryState, reason: str) -> CenacleError:
    return ClusterError(reason) if state.rank is None else RankLost(state.rank, reason)
