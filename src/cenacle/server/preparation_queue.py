"""Whose request is tokenized next.

Owns: one thread that prepares requests, and a queue for each API key.
Does not know: what the work is, HTTP.
Invariant: keys take turns, so one that sends much waits for itself; work that nobody waits for any
more is not begun.
Next: `app.py` hands it the work of `preparation.py`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class PreparationQueue:
    """Runs functions in a thread, one at a time; of an event loop.

    In a thread, so that a long prompt does not stall the streams of others; in one, because the
    tokenizer's process does one thing at a time.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        # By key, the one whose turn is next first; a key without work is not in it.
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._is_busy = False

    async def run(self, key: str, function: Callable[..., T], *arguments: Any) -> T:
        """The function's result, once it is the key's turn. Cancelling it before drops the work."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        self._start_next()
        try:
            await turn  # cancelled before its turn, it is skipped
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._is_busy = False
                self._start_next()
            raise
        work = asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        work.add_done_callback(self._on_done)
        return await asyncio.shield(work)  # the next one waits for the thread in any case

    def close(self) -> None:
        """End the thread; what waits is cancelled."""
        for turns in self._waiting.values():
            for turn in turns:
                turn.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _on_done(self, work: asyncio.Future[Any]) -> None:
        if not work.cancelled():
            work.exception()  # seen: whoever waited may have gone
        self._is_busy = False
        self._start_next()

    def _start_next(self) -> None:
        while not self._is_busy and self._waiting:
            key, turns = self._waiting.popitem(last=False)
            while turns and turns[0].done():  # cancelled
                turns.popleft()
            if turns:
                turns.popleft().set_result(None)
                self._is_busy = True
            if turns:
                self._waiting[key] = turns  # behind the others
