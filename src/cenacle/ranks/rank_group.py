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
from ..engine.speculative.ngram import Drafts
from ..errors import CenacleError, ClusterError, RankLost
from ..scheduler import recovery
from ..scheduler.recovery import Answered, Doing, GiveUp, Lost, Moves, Refused, Serve, Start
from ..scheduler.scheduler import Scheduler
from . import exit_reason
from .channel import Channel
from .ranks import Epoch, Ranks, StartRanks
from .step_timings import Terms

log = logging.getLogger(__name__)

# The next step is sent before the last one's tokens have come back, so that ranks never wait for
# the front. More would only make cancelling slower.
DEPTH = 2
LAST_WORDS_S = 1.0  # longest time until what a rank said before it ended has been read
# A request during which the group was lost may be the cause: a prompt for which there is no memory.
# After SUSPECT losses without a token of its own between it has to wait until no other suspect is
# under way, so that the cause is found; after LOSSES it is ended, and the others go on without it.
SUSPECT, LOSSES = 2, 3
SEEK_S = 10.0  # longest time that requests wait for what ranks have on disk

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
class _Running:
    """A step that has been sent: what rank 0 said, and who has answered."""

    step: Step
    sent: float
    tokens: list[Any] | None = None
    answered: set[int] = field(default_factory=set)
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    others: dict[int, list[Any]] = field(default_factory=dict)


@dataclass
class _Asked:
    """A request that somebody waits for, and what was given of its answer.

    `losses`: how often the group was lost while it ran, since its last token.
    """

    request: Request
    sink: Sink
    given: list[int] = field(default_factory=list)
    losses: int = 0


_Heard = tuple[int, int, dict[str, Any] | ClusterError]
"""Epoch, rank, and its message or why there will be none."""


class Group:
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
        start: StartRanks | None = None,
    ) -> None:
        self._ranks, self._scheduler, self._start = ranks, scheduler, start
        self._step_deadline_s = step_deadline_s
        self._lock = threading.Lock()
        self._inbox: queue.Queue[_Heard | None] = queue.Queue()
        self._asked: dict[str, _Asked] = {}
        self._admitted: set[str] = set()  # by the ranks of this epoch
        self._suspects: deque[_Asked] = deque()  # to be tried one after the other
        self._on_trial: _Asked | None = None
        self._under_way: deque[_Running] = deque()
        self._state = recovery.State(since=time.monotonic())
        self._failure: CenacleError | None = None
        self._moving = ""  # why ranks that work are to be ended behind the steps under way
        self._ending = threading.Event()
        self._last_s = 0.0  # when rank 0 finished its last step
        self._sought_s = 0.0  # when ranks were last told to look for pages
        self._place_s, self._placed_s = 1.0, time.monotonic()  # every how often a request ends
        self.terms = Terms()
        self.drafts = Drafts()  # of all requests since the beginning
        # Since the group began.
        self.counts = {"requests": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self.heard: list[float] = []  # when each rank last gave a sign of life, time.monotonic()'s
        self.observers: list[Observer] = []
        self._list_pages(ranks)
        self._listen()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def failure(self) -> CenacleError | None:
        """Why the group will not work again, or None."""
        return self._failure

    @property
    def state(self) -> recovery.State:
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

    def measure(self, every: int) -> None:
        """From now on measure one step in `every` (0: none), and forget the terms so far."""
        with self._lock:
            self._scheduler.measure_every = every
            self.terms = Terms()

    def compute_all(self, on: bool) -> None:
        """Whether requests that are submitted from now on use nothing that was computed before."""
        with self._lock:
            self._scheduler.fresh = on

    def forget(self, every: int) -> None:
        """As `measure`, and forget all that was counted: nobody had asked yet."""
        self.measure(every)
        with self._lock:
            self.drafts = Drafts()
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
            if not request.answered:  # what goes on had its place
                self._scheduler.check(request, min(60, math.ceil(self._place_s)))
            self._asked[request.id] = _Asked(request, sink)
            self._scheduler.submit(request)
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += len(request.tokens)
        self._inbox.put(None)

    def cancel(self, request_id: str) -> None:
        """End a request; its sink is not called again. Unknown ids are ignored."""
        with self._lock:
            self._asked.pop(request_id, None)
            self._scheduler.cancel(request_id)
            self._try_suspect()
        self._inbox.put(None)

    def move(self, reason: str) -> None:
        """Have the ranks ended between two steps and others started: there are better machines for
        them. Every answer goes on. Nothing happens if they are being started in any case.

        Args:
            reason: why, as a sentence.
        """
        with self._lock:
            if self._state.phase == "ok" and self._start is not None:
                self._moving = reason
        self._inbox.put(None)

    def close(self) -> None:
        """End the ranks. Requests that still run are told."""
        self._ending.set()
        self._fail(ClusterError("the group was closed"), now=False)
        self._inbox.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=30)

    def _run(self) -> None:
        """Do what the supervisor says until the group has failed."""
        try:
            while self._failure is None:
                match recovery.next_action(self._state):
                    case Serve():
                        self._serve()
                    case Start(epoch, not_before):
                        if not self._ending.wait(max(0.0, not_before - time.monotonic())):
                            self._start_ranks(epoch)
                    case GiveUp(reason):
                        self._fail(_again(self._state, reason))
        except Exception as error:
            self._fail(ClusterError(f"the front failed: {exit_reason.of_error(error)}"))
            raise

    def _waits(self, what: str) -> None:
        log.warning("%s", what)
        self._note(Doing(time.monotonic(), what))

    def _note(self, event: recovery.Event) -> None:
        with self._lock:
            self._state = recovery.after(self._state, event)

    # While the ranks work

    def _listen(self) -> None:
        self.heard = [time.monotonic()] * len(self._ranks.channels)
        for rank, channel in enumerate(self._ranks.channels):
            arguments = (self._state.epoch, rank, channel)
            threading.Thread(target=self._hear, args=arguments, daemon=True).start()

    def _hear(self, epoch: int, rank: int, channel: Channel) -> None:
        heard = self.heard
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
                if not self._moving:
                    self._send_steps()
                elif not self._under_way:
                    self._move()
                    return
                self._handle(self._next_heard())
        except queue.Empty:
            late = self._under_way[0]
            behind = sorted(set(range(len(self._ranks.channels))) - late.answered)
            why = (
                f"step {late.step.number} took longer than {self._step_deadline_s:g} s; "
                f"ranks {behind} have not finished it"
            )
            self._lose(RankLost(behind[0], why))
        except CenacleError as error:
            self._lose(error)

    def _next_heard(self) -> _Heard | None:
        """What comes next; a disk is waited for only so long."""
        if not self._scheduler.seeking:
            return self._inbox.get(timeout=self._patience())
        left = self._sought_s + SEEK_S - time.monotonic()
        try:
            if left > 0:
                return self._inbox.get(timeout=left)
        except queue.Empty:
            pass
        log.warning("a disk did not answer for %g s: prompts on disk are not used now", SEEK_S)
        with self._lock:
            self._scheduler.give_up_disk()
        return None

    def _list_pages(self, ranks: Ranks) -> None:
        """Take note of what new ranks have on disk."""
        for rank, ready in enumerate(ranks.ready):
            for notice in ready.get("notices", ()):
                log.warning("rank %d: %s", rank, notice)
        if notice := self._scheduler.list_pages([ready.get("pages") for ready in ranks.ready]):
            log.warning("%s", notice)

    def _patience(self) -> float | None:
        return self._step_deadline_s if self._under_way else None

    def _send_steps(self) -> None:
        while len(self._under_way) < DEPTH:
            with self._lock:
                step = self._scheduler.next_step()
                if step is not None:
                    self._admitted.update(request.id for request in step.admitted)
            if step is None:
                return
            if step.sought:
                self._sought_s = time.monotonic()
            for observer in self.observers:
                observer.sent(step)
            self._under_way.append(_Running(step, time.monotonic()))
            message = {"type": "step", "epoch": self._state.epoch, "step": step.to_json()}
            for rank, channel in enumerate(self._ranks.channels):
                try:
                    channel.send(message)
                except ClusterError as error:
                    self._hear_last_words()
                    raise self._ranks.blame(rank, str(error)) from error

    def _hear_last_words(self) -> None:
        """A rank that cannot be reached may have said why: raise that, it tells more."""
        ends = time.monotonic() + LAST_WORDS_S
        while True:
            try:
                item = self._inbox.get(timeout=max(0.0, ends - time.monotonic()))
            except queue.Empty:
                return
            self._handle(item)

    def _handle(self, item: _Heard | None) -> None:
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
                self._scheduler.heard(rank, message)
            return
        running = next(r for r in self._under_way if r.step.number == message["number"])
        running.answered.add(rank)
        if message["report"] is not None:
            running.reports[rank] = message["report"]
        if rank == 0:
            now = time.monotonic()
            self._scheduler.took(running.step, now - max(running.sent, self._last_s))
            self._last_s = now
            running.tokens = message["tokens"]
            self.drafts += Drafts(**message.get("drafts", {}))
            self._deliver([TokenEvent.from_json(t) for t in message["tokens"]])
        else:
            running.others[rank] = message["tokens"]
        self._compare(running)
        while self._under_way and len(self._under_way[0].answered) == len(self._ranks.channels):
            done = self._under_way.popleft()
            if done.reports:
                reports = [report for _, report in sorted(done.reports.items())]
                self.terms.add(reports)
                for observer in self.observers:
                    observer.measured(reports)

    def _compare(self, running: _Running) -> None:
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
            for event in self._scheduler.seen(events):
                asked = self._asked.get(event.request)
                if asked is None:
                    continue
                if asked.given and event.cached:
                    event = replace(event, cached=0, read=0)  # its own prompt was counted before
                asked.given.append(event.token)
                self.counts["generated_tokens"] += 1
                asked.losses = 0
                if event.finish is not None:
                    del self._asked[event.request]
                    now = time.monotonic()
                    self._place_s += 0.2 * (now - self._placed_s - self._place_s)
                    self._placed_s = now
                told.append((asked.sink, event))
            self._try_suspect()
            if told and self._state.in_a_row:
                self._state = recovery.after(self._state, Answered(time.monotonic()))
        for sink, event in told:
            sink(event.outcome())

    # When they fail, or are to be others

    def _lose(self, error: CenacleError) -> None:
        """End this epoch's ranks, and queue again what they were working on."""
        if self._failure is not None:
            return  # they have been told to end
        if self._start is None:
            self._fail(error)
            return
        log.warning("epoch %d ended: %s", self._state.epoch, error)
        rank = error.rank if isinstance(error, RankLost) else None
        self._note(Lost(time.monotonic(), str(error), rank))
        self._ranks.close(now=True)
        self._queue_again(error)

    def _move(self) -> None:
        """As `_lose`, but nothing has failed: no request is to blame."""
        log.warning("epoch %d ends: %s", self._state.epoch, self._moving)
        self._note(Moves(time.monotonic(), self._moving))
        self._ranks.close(now=False)
        self._queue_again(None)

    def _queue_again(self, error: CenacleError | None) -> None:
        """What ranks that are gone were working on, and all who wait, are for the next ranks.

        Args:
            error: why they were lost; None: they were not.
        """
        self._under_way.clear()
        hopeless: list[_Asked] = []
        with self._lock:
            self._moving = ""
            if self._failure is not None:
                return
            self._scheduler.lost()
            admitted, self._admitted = self._admitted, set()
            for asked in [self._asked[name] for name in admitted if name in self._asked]:
                asked.losses += error is not None
                if asked.losses == LOSSES:
                    hopeless.append(self._asked.pop(asked.request.id))
            # Those who were being answered come first.
            again = sorted(self._asked.values(), key=lambda a: a.request.id not in admitted)
            for asked in again:
                if asked.losses < SUSPECT:
                    self._scheduler.submit(asked.request.after(asked.given))
            self._suspects = deque(asked for asked in again if asked.losses >= SUSPECT)
            self._on_trial = None
            self._try_suspect()
        for asked in hopeless:
            why = f"this request was ended: the group was lost {LOSSES} times while it ran: {error}"
            asked.sink(ClusterError(why))

    def _try_suspect(self) -> None:
        """Let the next suspect run if the last one has had a token, or is gone."""
        tried = self._on_trial
        if tried is not None and tried.losses and tried.request.id in self._asked:
            return
        self._on_trial = None
        while self._suspects and self._on_trial is None:
            asked = self._suspects.popleft()
            if asked.request.id in self._asked:
                self._on_trial = asked
                self._scheduler.submit(asked.request.after(asked.given))

    def _start_ranks(self, number: int) -> None:
        assert self._start is not None, "without it the first failure is the last"
        began = time.monotonic()
        try:
            ranks = self._start(Epoch(number, self._ending, self._waits, self._state.reason))
        except (CenacleError, OSError) as error:
            if not self._ending.is_set():
                log.warning("epoch %d could not be started: %s", number, error)
            rank = error.rank if isinstance(error, RankLost) else None
            self._note(Refused(time.monotonic(), str(error), rank))
            return
        with self._lock:
            if self._failure is None:
                if len(ranks.channels) != len(self._ranks.channels):
                    self.terms = Terms()  # means over ranks: of others now
                self._ranks = ranks
                self._list_pages(ranks)
                self._state = recovery.after(self._state, recovery.Started(time.monotonic()))
                again = len(self._asked)
        if self._failure is not None:
            ranks.close(now=True)
            return
        self._listen()
        took = time.monotonic() - began
        log.warning("epoch %d works, started in %.1f s; %d requests go on", number, took, again)

    def _fail(self, error: CenacleError, *, now: bool = True) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            rank = error.rank if isinstance(error, RankLost) else None
            self._state = replace(
                self._state, phase="failed", since=time.monotonic(), reason=str(error), rank=rank
            )
            self._scheduler.lost()
            self._suspects.clear()
            told, self._asked = list(self._asked.values()), {}
        # First the clients are told, then the ranks are ended: that may take a moment.
        for asked in told:
            asked.sink(error)
        self._ranks.close(now=now)


def _again(state: recovery.State, reason: str) -> CenacleError:
    return ClusterError(reason) if state.rank is None else RankLost(state.rank, reason)
