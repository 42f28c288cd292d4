"""Keeping the ranks in step, seen from the front.

Owns: `Group`: the thread that sends every step to every rank, hands the tokens to those who asked,
compares what the ranks say, and ends the group when one of them fails.
Does not know: text, HTTP, how ranks were started (it is given `Ranks`).
Invariant: every rank gets the same steps in the same order; at most `DEPTH` steps are under way;
when the group has failed every request that was in it has been told, once.
Next: `worker.py` is the other side; `scheduler.py` decides what a step is.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..errors import CenacleError, ClusterError, RankLost
from ..request import Request, Step, TokenEvent
from .channel import Channel
from .scheduler import Scheduler
from .terms import Terms

# The next step is sent before the last one's tokens have come back, so that ranks never wait for
# the front. More would only make cancelling slower.
DEPTH = 2
LAST_WORDS_S = 1.0  # longest time until what a rank said before it ended has been read

Sink = Callable[[TokenEvent | CenacleError], None]


class Ranks(Protocol):
    """Running ranks, as `cluster.launcher` starts them."""

    channels: list[Channel]

    def blame(self, rank: int, reason: str) -> RankLost:
        """The rank that really failed (a dead one before those that noticed), and why."""
        ...

    def close(self, *, now: bool) -> None:
        """End every rank; `now`: without asking first."""
        ...


@dataclass
class _Running:
    """A step that has been sent: what rank 0 said, and who has answered."""

    step: Step
    tokens: list[Any] | None = None
    answered: set[int] = field(default_factory=set)
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    others: dict[int, list[Any]] = field(default_factory=dict)


class Group:
    """A running group of ranks that answers requests.

    Args:
        ranks: started and loaded.
        scheduler: decides the steps.
        step_deadline_s: longest that one step may take before the group is given up.
    """

    def __init__(self, ranks: Ranks, scheduler: Scheduler, step_deadline_s: float = 600) -> None:
        self._ranks, self._scheduler = ranks, scheduler
        self._step_deadline_s = step_deadline_s
        self._lock = threading.Lock()
        self._inbox: queue.Queue[tuple[int, dict[str, Any] | ClusterError] | None] = queue.Queue()
        self._sinks: dict[str, Sink] = {}
        self._under_way: deque[_Running] = deque()
        self._failure: CenacleError | None = None
        self._closing = False
        self.terms = Terms()
        self._threads = [
            threading.Thread(target=self._listen, args=(rank, channel), daemon=True)
            for rank, channel in enumerate(ranks.channels)
        ]
        self._threads.append(threading.Thread(target=self._run, daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def failure(self) -> CenacleError | None:
        """Why the group is no longer working, or None."""
        return self._failure

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

    def submit(self, request: Request, sink: Sink) -> None:
        """Begin a request.

        Args:
            request: its id must be unique; without a seed it is given a random one.
            sink: called from another thread with every token, or once with the error that ended
                the group.

        Raises:
            CenacleError: the group has failed.
        """
        if request.sampling.seed is None:
            seed = random.getrandbits(48)
            request = replace(request, sampling=replace(request.sampling, seed=seed))
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._sinks[request.id] = sink
            self._scheduler.submit(request)
        self._inbox.put(None)

    def cancel(self, request_id: str) -> None:
        """End a request; its sink is not called again. Unknown ids are ignored."""
        with self._lock:
            self._sinks.pop(request_id, None)
            self._scheduler.cancel(request_id)
        self._inbox.put(None)

    def close(self) -> None:
        """End the ranks. Requests that still run are told."""
        self._closing = True
        self._fail(ClusterError("the group was closed"), now=False)
        self._inbox.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)

    def _listen(self, rank: int, channel: Channel) -> None:
        while self._failure is None:
            try:
                message = channel.receive()
            except ClusterError as error:
                self._inbox.put((rank, error))
                return
            if message["type"] != "alive":
                self._inbox.put((rank, message))

    def _run(self) -> None:
        try:
            while self._failure is None:
                self._send_steps()
                self._handle(self._inbox.get(timeout=self._patience()))
        except queue.Empty:
            late = self._under_way[0]
            behind = sorted(set(range(len(self._ranks.channels))) - late.answered)
            self._fail(
                RankLost(
                    behind[0],
                    f"step {late.step.number} took longer than {self._step_deadline_s:g} s; "
                    f"ranks {behind} have not finished it",
                )
            )
        except CenacleError as error:
            self._fail(error)
        except Exception as error:
            self._fail(ClusterError(f"the front failed: {error!r}"))
            raise

    def _patience(self) -> float | None:
        return self._step_deadline_s if self._under_way else None

    def _send_steps(self) -> None:
        while len(self._under_way) < DEPTH:
            with self._lock:
                step = self._scheduler.next_step()
            if step is None:
                return
            self._under_way.append(_Running(step))
            message = {"type": "step", "step": step.to_json()}
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

    def _handle(self, item: tuple[int, dict[str, Any] | ClusterError] | None) -> None:
        if item is None:
            return
        rank, message = item
        if isinstance(message, ClusterError):
            raise self._ranks.blame(rank, str(message))
        if message["type"] == "error":
            raise self._ranks.blame(rank, f"failed: {message['message']}")
        running = next(r for r in self._under_way if r.step.number == message["number"])
        running.answered.add(rank)
        if message["report"] is not None:
            running.reports[rank] = message["report"]
        if rank == 0:
            running.tokens = message["tokens"]
            self._deliver([TokenEvent(*t) for t in message["tokens"]])
        else:
            running.others[rank] = message["tokens"]
        self._compare(running)
        while self._under_way and len(self._under_way[0].answered) == len(self._ranks.channels):
            done = self._under_way.popleft()
            if done.reports:
                self.terms.add([report for _, report in sorted(done.reports.items())])

    def _compare(self, running: _Running) -> None:
        """Ranks that chose other tokens than rank 0 have lost step: nothing they say is right."""
        if running.tokens is None:
            return
        for rank, tokens in running.others.items():
            if tokens != running.tokens:
                raise RankLost(
                    rank,
                    f"rank {rank} disagrees at step {running.step.number}: expected tokens "
                    f"{running.tokens}, got {tokens}; the group was ended",
                )
        running.others.clear()

    def _deliver(self, events: list[TokenEvent]) -> None:
        with self._lock:
            kept = self._scheduler.seen(events)
            sinks = [(self._sinks.get(e.request), e) for e in kept]
            for event in kept:
                if event.finish is not None:
                    self._sinks.pop(event.request, None)
        for sink, event in sinks:
            if sink is not None:
                sink(event)

    def _fail(self, error: CenacleError, *, now: bool = True) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            self._scheduler.lost()
            sinks, self._sinks = list(self._sinks.values()), {}
        # First the clients are told, then the ranks are ended: that may take a moment.
        for sink in sinks:
            sink(error)
        self._ranks.close(now=now)
