"""An asyncio event loop in a thread of its own, for use from other threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from ..errors import ClusterError

JOIN_TIMEOUT_S = 10.0
T = TypeVar("T")


class LoopThread:
    """A running event loop.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 10.0) -> T:
        """Run a coroutine in the loop and wait for its result; for other threads.

        Raises:
            ClusterError: it did not finish in time.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except FutureTimeout:
            future.cancel()
            raise ClusterError(f"the head did not answer within {timeout_s:g} s") from None

    def call(self, work: Callable[[], T]) -> T:
        """As `run`, for a function."""

        async def coroutine() -> T:
            return work()

        return self.run(coroutine())

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task; only in the loop."""
        task = self._loop.create_task(work)
        self.track(task)
        return task

    def track(self, task: asyncio.Task[Any]) -> None:
        """Let `cancel_tasks` end a task too; only in the loop."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def cancel_tasks(self, timeout_s: float) -> None:
        """Cancel all tasks but this one, and wait for them; only in the loop."""
        others = [t for t in self._tasks if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), timeout_s)

    def stop(self) -> None:
        """End the loop and the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(JOIN_TIMEOUT_S)
