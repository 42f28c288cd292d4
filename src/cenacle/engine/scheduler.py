"""Which requests run, and what the next step is.

Owns: waiting and running requests and the numbering of steps.
Does not know: MLX, sockets, time.
Invariant: a request is in exactly one place: waiting, running, or gone;
`0 <= running <= batch`; steps are numbered without gaps.
Next: `lockstep.py` sends the steps to every rank and brings the events back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..request import Request, Step, TokenEvent


class Scheduler:
    """Turns waiting requests and cancellations into steps, first come, first served.

    Args:
        batch: most requests that run at once.
        measure_every: one step in this many is measured; 0: none. May be changed at any time.
    """

    def __init__(self, batch: int = 32, measure_every: int = 8) -> None:
        self._batch, self.measure_every = batch, measure_every
        self._waiting: deque[Request] = deque()
        self._running: dict[str, Request] = {}
        self._cancelled: list[str] = []
        self._number = 0

    @property
    def waiting(self) -> int:
        """Number of requests that have not been admitted."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that ranks are working on."""
        return len(self._running)

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """End a request wherever it is; unknown ids are ignored (it may just have ended)."""
        self._waiting = deque(r for r in self._waiting if r.id != request_id)
        if self._running.pop(request_id, None) is not None:
            self._cancelled.append(request_id)

    def next_step(self) -> Step | None:
        """The step to take now, or None if there is nothing to do."""
        admitted: list[Request] = []
        while self._waiting and len(self._running) < self._batch:
            request = self._waiting.popleft()
            self._running[request.id] = request
            admitted.append(request)
        if not (self._running or self._cancelled):
            return None
        every = self.measure_every
        step = Step(
            self._number,
            tuple(admitted),
            tuple(self._cancelled),
            # Not the first of each round: step 0 compiles and allocates.
            measured=bool(every) and self._number % every == every - 1,
        )
        self._cancelled = []
        self._number += 1
        return step

    def seen(self, events: Iterable[TokenEvent]) -> list[TokenEvent]:
        """Take note of a step's tokens.

        Returns:
            Those of requests that still run (a cancelled one may have been in flight).
        """
        kept = [e for e in events if e.request in self._running]
        for event in kept:
            if event.finish is not None:
                del self._running[event.request]
        return kept

    def lost(self) -> list[str]:
        """Forget everything, as the ranks have: those that come next begin at step 0.

        Returns:
            The ids of all requests that were waiting or running.
        """
        ids = [*self._running, *(r.id for r in self._waiting)]
        self._waiting.clear()
        self._running.clear()
        self._cancelled = []
        self._number = 0
        return ids
