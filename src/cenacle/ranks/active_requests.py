"""The requests that a group answers, and which of them may have caused the loss of its ranks.

Owns: what has been generated for each request, and how often the ranks were lost while it ran.
Does not know: ranks, steps, threads. The group holds its lock while it uses this.
Invariant: a request that causes the loss of the ranks again and again ends; the others go on.

A request during which the ranks were lost may be the cause, for instance a prompt for which there
is not enough memory. After `SUSPECT_AFTER_LOSSES` losses without a token between them it is a
suspect: suspects run one at a time, so that the cause is found. After `MAX_LOSSES` it is given up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..core.request import GroupEvent, Request

SUSPECT_AFTER_LOSSES, MAX_LOSSES = 2, 3

Sink = Callable[[GroupEvent], None]


@dataclass
class ActiveRequest:
    """A request that somebody waits for.

    Args:
        losses: how often the ranks were lost while it ran, since its last token.
    """

    request: Request
    sink: Sink
    generated_tokens: list[int] = field(default_factory=list)
    losses: int = 0

    @property
    def remaining(self) -> Request:
        """The request, continued after what was generated."""
        return self.request.resumed_with(self.generated_tokens)


class ActiveRequests:
    """The active requests of a group, by id."""

    def __init__(self) -> None:
        self._requests: dict[str, ActiveRequest] = {}
        self._admitted: set[str] = set()  # by the present ranks
        self._suspects: deque[ActiveRequest] = deque()
        self._on_trial: ActiveRequest | None = None

    def __len__(self) -> int:
        """How many there are."""
        return len(self._requests)

    def add(self, request: Request, sink: Sink) -> None:
        """A request that was submitted."""
        self._requests[request.id] = ActiveRequest(request, sink)

    def get(self, request_id: str) -> ActiveRequest | None:
        """An active request, or None."""
        return self._requests.get(request_id)

    def remove(self, request_id: str) -> None:
        """A request that has ended; unknown ids are ignored."""
        self._requests.pop(request_id, None)

    def admit(self, requests: Iterable[Request]) -> None:
        """Requests that the present ranks were given."""
        self._admitted.update(request.id for request in requests)

    def on_ranks_lost(self, *, failed: bool) -> tuple[list[Request], list[ActiveRequest]]:
        """The ranks are gone.

        Args:
            failed: whether they failed; else they were ended on purpose, and nobody is suspected.

        Returns:
            What the next ranks are to be given, in order, and the requests that are given up.
        """
        admitted, self._admitted = self._admitted, set()
        for active in self._requests.values():
            active.losses += failed and active.request.id in admitted
        given_up = [a for a in self._requests.values() if a.losses >= MAX_LOSSES]
        for active in given_up:
            self.remove(active.request.id)
        # Requests that were being answered come first.
        ordered = sorted(self._requests.values(), key=lambda a: a.request.id not in admitted)
        self._suspects = deque(a for a in ordered if a.losses >= SUSPECT_AFTER_LOSSES)
        self._on_trial = None
        resumed = [a.remaining for a in ordered if a.losses < SUSPECT_AFTER_LOSSES]
        return resumed, given_up

    def next_suspect(self) -> Request | None:
        """The next suspect to run, if the one before has had a token or has ended."""
        tried = self._on_trial
        if tried is not None and tried.losses and tried.request.id in self._requests:
            return None
        self._on_trial = None
        while self._suspects:
            active = self._suspects.popleft()
            if active.request.id in self._requests:
                self._on_trial = active
                return active.remaining
        return None

    def clear(self) -> list[ActiveRequest]:
        """Remove and return all of them."""
        removed, self._requests = list(self._requests.values()), {}
        self._suspects.clear()
        return removed
