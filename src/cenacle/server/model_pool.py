"""Which models of a server are loaded: on demand, while there is room, until they are idle.

Owns: the state of every model, who waits for which, whose turn it is to load and which one makes
room; the threads in which models are loaded and unloaded.
Does not know: HTTP, how a model is loaded (`LoadModel`), what it does.
Invariant: one model is loaded at a time. None is unloaded while a request of it runs, nor a pinned
one. One that does not fit is refused before anything is unloaded for it. A failure to load is that
model's alone, and is tried again at a later request. Every wait has a deadline; when `close` has
returned no model is loaded.
Next: `models_app.py` asks for models by name; `loaded_model.py` loads one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from starlette.types import ASGIApp

from ..core.units import format_bytes
from ..errors import Busy, CenacleError, ClusterError, NodesMissing, PlanError
from ..planning.memory import MemoryEstimate, MemoryShare
from .generation import to_client_error
from .model_state import ModelState, ModelStatus

log = logging.getLogger(__name__)

ROOM_TIMEOUT_S = 900.0  # that a model waits for the answers of others to end
CLOSE_TIMEOUT_S = 60.0  # for a load to notice that it is to end
FIRST_RETRY_S = 1.0  # after a failure; doubles with each in a row
MAX_RETRY_S = 60.0
MAX_PARTS = 4  # into so many the memory for caches is divided at most
T = TypeVar("T")


class LoadedModel(Protocol):
    """A model that answers."""

    @property
    def app(self) -> ASGIApp:
        """Its endpoints."""
        ...

    @property
    def failure(self) -> CenacleError | None:
        """Why its ranks will not work again; None: they do."""
        ...

    @property
    def promised_bytes(self) -> int:
        """Bytes of this machine that it may take; 0: it runs elsewhere."""
        ...

    @property
    def resident_bytes(self) -> int:
        """Bytes of this machine that it takes now."""
        ...

    def stop(self, reason: ClusterError) -> None:
        """Abort its running requests. Called in the event loop."""

    def close(self) -> None:
        """End its processes. Called in a thread."""


@dataclass(frozen=True)
class LoadTask:
    """A model that is to be loaded.

    Args:
        name: of it.
        make_room: see `runtime.MakeRoom`; raises `CenacleError` if there will be none.
        cancel: set when the server ends.
    """

    name: str
    make_room: Callable[[MemoryEstimate | None], MemoryShare]
    cancel: threading.Event


LoadModel = Callable[[LoadTask], LoadedModel]


@dataclass(frozen=True)
class PoolOptions:
    """When models are loaded and unloaded.

    Args:
        idle_s: without a request after which a model is unloaded; None: never.
        max_loaded: most models at once; None: as many as fit.
        memory_bytes: of this machine for all models; None: what is available.
        wait_s: longest that a request waits for its model.
        pinned: names of models that are loaded at the start and stay.
    """

    idle_s: float | None = None
    max_loaded: int | None = None
    memory_bytes: int | None = None
    wait_s: float = 3600.0
    pinned: frozenset[str] = frozenset()


class ModelUnavailable(ClusterError):
    """A model is not loaded, and this request gets no answer.

    Args:
        name: of the model.
        reason: why.
        retry_after_s: whole seconds after which another request has it tried again.
    """

    def __init__(self, name: str, reason: str, retry_after_s: int) -> None:
        super().__init__(f"{name} is not loaded: {reason}")
        self.retry_after_s = retry_after_s


class _NobodyWaits(CenacleError):
    """All requests for a model have gone before anything was started for it."""


@dataclass
class _Entry:
    name: str
    pinned: bool
    state: ModelState = ModelState.UNLOADED
    reason: str = ""  # of the last failure
    since_s: float = field(default_factory=time.monotonic)
    loaded: LoadedModel | None = None
    running: int = 0
    last_used_s: float = 0.0
    failures: int = 0  # in a row
    retry_at_s: float = 0.0
    is_draining: bool = False  # others wait for its room: new requests wait
    loads: int = 0
    unloads: int = 0
    load_failures: int = 0
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    idle_timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Number of requests that wait for it."""
        return sum(not waiter.done() for waiter in self.waiters)

    @property
    def unused_bytes(self) -> int:
        """What it was promised and does not take."""
        if self.loaded is None:
            return 0
        return max(0, self.loaded.promised_bytes - self.loaded.resident_bytes)


class ModelPool:
    """The models of one server; all methods but `close` are for the event loop.

    Args:
        names: of the models; the first is the default.
        load: loads one; called in a thread.
        options: when.
        available: bytes of this machine that nothing uses.
    """

    def __init__(
        self,
        names: Sequence[str],
        load: LoadModel,
        options: PoolOptions,
        available: Callable[[], int],
    ) -> None:
        self._entries = {name: _Entry(name, name in options.pinned) for name in names}
        self._load_model, self._options, self._available = load, options, available
        self._queue: deque[_Entry] = deque()
        self._changed = asyncio.Event()
        self._stop_reason: ClusterError | None = None
        self._cancel = threading.Event()
        self._lock = threading.Lock()
        self._loader = _Worker()
        self._unfinished: set[threading.Event] = set()  # of functions in threads
        self._discards: dict[asyncio.Future[Any], Callable[[], None]] = {}  # of unseen results
        self._tasks: set[asyncio.Task[None]] = set()
        self.parts = min(len(names), options.max_loaded or MAX_PARTS, MAX_PARTS)

    # ---- For requests -------------------------------------------------------------------------

    async def acquire(self, name: str) -> LoadedModel:
        """The model, loaded; it stays so until `release`.

        Raises:
            ModelUnavailable: it cannot be loaded now.
            ClusterError: the server ends.
        """
        entry, ends_s = self._entries[name], time.monotonic() + self._options.wait_s
        if self._stop_reason is not None:
            raise self._stop_reason
        if self._is_usable(entry):
            self._grant(entry)
        else:
            if entry.state is ModelState.FAILED and time.monotonic() < entry.retry_at_s:
                raise _unavailable(entry)
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry.waiters.append(waiter)
            self._request_load(entry)
            try:
                async with asyncio.timeout(ends_s - time.monotonic()):
                    await waiter
            except TimeoutError:
                wait_s = self._options.wait_s
                raise ModelUnavailable(name, f"it takes longer than {wait_s:g} s", 10) from None
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                    self.release(name)
                raise
            finally:
                if waiter in entry.waiters:
                    entry.waiters.remove(waiter)
                self._changed.set()
        assert entry.loaded is not None
        return entry.loaded

    def release(self, name: str) -> None:
        """The request that acquired the model has ended."""
        entry = self._entries[name]
        entry.running -= 1
        entry.last_used_s = time.monotonic()
        self._watch_idle(entry)
        self._changed.set()

    def start(self) -> None:
        """Begin to load what is wanted, the pinned models first."""
        self._spawn(self._run())
        for entry in self._entries.values():
            if entry.pinned:
                self._request_load(entry)

    def stop(self, reason: ClusterError) -> None:
        """Refuse requests, abort those that run, and give up what is being loaded."""
        self._stop_reason = reason
        self._cancel.set()
        for entry in self._entries.values():
            if entry.idle_timer is not None:
                entry.idle_timer.cancel()
            _fail(entry.waiters, reason)
            if entry.loaded is not None:
                entry.loaded.stop(reason)
        self._changed.set()

    def close(self) -> None:
        """Unload everything; for the thread of the event loop, which has ended."""
        self._cancel.set()
        ends_s = time.monotonic() + CLOSE_TIMEOUT_S
        with self._lock:
            unfinished = list(self._unfinished)
        for is_finished in unfinished:
            is_finished.wait(max(0.0, ends_s - time.monotonic()))
        self._loader.stop()
        for discard in list(self._discards.values()):
            discard()
        for entry in self._entries.values():
            if (loaded := entry.loaded) is not None:
                entry.loaded = None
                loaded.close()

    # ---- For those who ask --------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models; the first is the default."""
        return tuple(self._entries)

    def status(self, name: str) -> ModelStatus:
        """The present state of a model."""
        entry = self._entries[name]
        state, reason = entry.state, entry.reason
        # One that is being unloaded has failed as well, by being closed.
        loaded = entry.loaded if state is ModelState.LOADED else None
        if loaded is not None and (failure := loaded.failure) is not None:
            state, reason = ModelState.FAILED, str(failure)
        return ModelStatus(
            name,
            state,
            reason,
            time.monotonic() - entry.since_s,
            entry.pinned,
            entry.running,
            entry.waiting,
            entry.loads,
            entry.unloads,
            entry.load_failures,
        )

    def loaded(self, name: str) -> LoadedModel | None:
        """A model if it is loaded; it may be unloaded at any time."""
        entry = self._entries[name]
        return entry.loaded if entry.state is ModelState.LOADED else None

    @property
    def last_used(self) -> str | None:
        """The loaded model that was used last; None: none is loaded."""
        loaded = [e for e in self._entries.values() if e.state is ModelState.LOADED]
        return max(loaded, key=lambda e: (e.running > 0, e.last_used_s)).name if loaded else None

    # ---- One model after the other ------------------------------------------------------------

    async def _run(self) -> None:
        while self._stop_reason is None:
            if not self._queue:
                await self._wait_for_change()
                continue
            entry = self._queue.popleft()
            try:
                await self._serve(entry)
            except Exception as error:  # this task lives as long as the server
                log.exception("an unexpected error")
                self._set_failed(entry, to_client_error(error))

    async def _serve(self, entry: _Entry) -> None:
        while entry.state is ModelState.UNLOADING:
            await self._wait_for_change()
        if entry.state is ModelState.LOADED:
            if entry.loaded is not None and (failure := entry.loaded.failure) is not None:
                await self._unload(entry, failure)
            else:
                self._grant_all(entry)
            return
        if not entry.waiting and not (entry.pinned and entry.loads == 0):
            return
        await self._load(entry)

    async def _load(self, entry: _Entry) -> None:
        loop = asyncio.get_running_loop()

        def make_room(estimate: MemoryEstimate | None) -> MemoryShare:
            needed = None if estimate is None else estimate.total
            room = asyncio.run_coroutine_threadsafe(self._make_room(entry, needed), loop)
            return room.result(ROOM_TIMEOUT_S + CLOSE_TIMEOUT_S)

        before = entry.state
        self._set_state(entry, ModelState.LOADING)
        task = LoadTask(entry.name, make_room, self._cancel)
        started_s = time.monotonic()
        try:
            loaded = await self._in_thread(
                self._loader.start, lambda: self._load_model(task), _close
            )
        except _NobodyWaits:
            self._set_state(entry, before)
            if entry.waiting:  # came meanwhile
                self._request_load(entry)
        except Busy as error:
            self._set_state(entry, before)
            _fail(entry.waiters, ModelUnavailable(entry.name, str(error), error.retry_after_s))
        except CenacleError as error:
            self._set_failed(entry, error)
        except Exception as error:
            self._set_failed(entry, to_client_error(error))
        else:
            entry.loaded, entry.reason, entry.failures = loaded, "", 0
            entry.loads += 1
            entry.last_used_s = time.monotonic()
            self._set_state(entry, ModelState.LOADED)
            log.warning("%s is loaded (%.1f s)", entry.name, entry.last_used_s - started_s)
            self._grant_all(entry)
            self._watch_idle(entry)

    def _set_failed(self, entry: _Entry, error: CenacleError) -> None:
        # Nodes may come at any moment, and looking for them costs nothing.
        is_waiting = isinstance(error, NodesMissing)
        is_known = is_waiting and entry.reason == str(error)
        entry.failures = 1 if is_waiting else entry.failures + 1
        entry.load_failures += 1
        entry.reason = str(error)
        delay_s = min(MAX_RETRY_S, FIRST_RETRY_S * 2 ** min(entry.failures - 1, 10))
        entry.retry_at_s = time.monotonic() + delay_s
        self._set_state(entry, ModelState.FAILED)
        if self._stop_reason is None:
            if not is_known:
                log.warning("%s cannot be loaded: %s", entry.name, error)
            if is_waiting and entry.pinned and entry.loads == 0:
                asyncio.get_running_loop().call_later(delay_s, self._request_load, entry)
        _fail(entry.waiters, self._stop_reason or _unavailable(entry))

    async def _make_room(self, entry: _Entry, needed: int | None) -> MemoryShare:
        """Unload others until a model fits, the least recently used first.

        Args:
            needed: bytes of this machine; None: it runs on a cluster.

        Raises:
            PlanError: it would not fit if all others that may go were gone.
            Busy: requests of others did not end in time.
        """
        limit, ends_s = self._options.max_loaded, time.monotonic() + ROOM_TIMEOUT_S
        try:
            while True:
                while any(e.state is ModelState.UNLOADING for e in self._entries.values()):
                    await self._wait_for_change()
                others = [e for e in self._entries.values() if e.state is ModelState.LOADED]
                room = self._room()
                if (limit is None or len(others) < limit) and (needed is None or needed <= room):
                    return self._share(others, room)
                movable = [e for e in others if not e.pinned]
                self._check_possible(needed, room, others, movable)
                if not entry.waiting and not entry.pinned:
                    raise _NobodyWaits("nobody waits for it any more")
                by_use = sorted(movable, key=lambda e: e.last_used_s)
                idle = [e for e in by_use if not e.running]
                if idle:
                    await self._unload(idle[0])
                    continue
                if time.monotonic() > ends_s:
                    raise Busy(f"others did not finish their answers in {ROOM_TIMEOUT_S:g} s", 10)
                by_use[0].is_draining = True
                await self._wait_for_change(max(0.0, ends_s - time.monotonic()) + 0.1)
        finally:
            for other in self._entries.values():
                if other.is_draining:
                    other.is_draining = False
                    self._grant_all(other)

    def _room(self) -> int:
        """Bytes of this machine for one more model."""
        entries = self._entries.values()
        free = self._available() - sum(e.unused_bytes for e in entries)
        if (limit := self._options.memory_bytes) is not None:
            taken = sum(e.loaded.promised_bytes for e in entries if e.loaded is not None)
            free = min(free, limit - taken)
        return free

    def _share(self, others: Iterable[_Entry], room: int) -> MemoryShare:
        limit = self._options.memory_bytes
        unused = sum(e.unused_bytes for e in others)
        return MemoryShare(self.parts, unused, None if limit is None else room)

    def _check_possible(
        self, needed: int | None, room: int, others: list[_Entry], movable: list[_Entry]
    ) -> None:
        pinned = " and ".join(e.name for e in others if e.pinned)
        limit = self._options.max_loaded
        if limit is not None and len(others) - len(movable) >= limit:
            raise PlanError(f"{pinned} is pinned, and {limit} may be loaded at once (--max-loaded)")
        if needed is None:
            return
        room += sum(e.loaded.promised_bytes for e in movable if e.loaded is not None)
        if needed > room:
            beside = f" beside {pinned}, which is pinned" if pinned else ""
            raise PlanError(
                f"it needs {format_bytes(needed)} of memory, and "
                f"{format_bytes(max(0, room))} are available for models{beside}: stop other "
                f"programs, use more machines or a lower quantization"
            )

    # ---- Steps --------------------------------------------------------------------------------

    def _is_usable(self, entry: _Entry) -> bool:
        loaded = entry.loaded
        if entry.state is not ModelState.LOADED or entry.is_draining or loaded is None:
            return False
        return loaded.failure is None

    def _grant(self, entry: _Entry) -> None:
        entry.running += 1
        if entry.idle_timer is not None:
            entry.idle_timer.cancel()
            entry.idle_timer = None

    def _grant_all(self, entry: _Entry) -> None:
        if not self._is_usable(entry):
            return
        for waiter in entry.waiters:
            if not waiter.done():
                self._grant(entry)  # before it runs: others may look for an idle model
                waiter.set_result(None)

    def _request_load(self, entry: _Entry) -> None:
        if entry not in self._queue and entry.state is not ModelState.LOADING:
            self._queue.append(entry)
        self._changed.set()

    def _watch_idle(self, entry: _Entry) -> None:
        idle_s = self._options.idle_s
        if idle_s is None or entry.pinned or entry.running or self._stop_reason is not None:
            return
        if entry.idle_timer is not None:
            entry.idle_timer.cancel()
        loop = asyncio.get_running_loop()
        entry.idle_timer = loop.call_later(idle_s, self._unload_idle, entry)

    def _unload_idle(self, entry: _Entry) -> None:
        entry.idle_timer = None
        if entry.state is ModelState.LOADED and not entry.running:
            self._spawn(self._unload(entry))

    async def _unload(self, entry: _Entry, failure: CenacleError | None = None) -> None:
        """Unload a model; with `failure`, because its ranks have failed for good."""
        loaded = entry.loaded
        assert loaded is not None
        if entry.idle_timer is not None:
            entry.idle_timer.cancel()
        self._set_state(entry, ModelState.UNLOADING)
        try:
            await self._in_thread(_start_thread, loaded.close, lambda _: None)
        except Exception:
            log.exception("an unexpected error")
        entry.loaded = None
        entry.unloads += 1
        log.warning("%s is unloaded", entry.name)
        if failure is not None:
            self._set_failed(entry, failure)
            return
        self._set_state(entry, ModelState.UNLOADED)
        if entry.waiting:
            self._request_load(entry)

    def _set_state(self, entry: _Entry, state: ModelState) -> None:
        entry.state, entry.since_s = state, time.monotonic()
        self._changed.set()

    async def _wait_for_change(self, timeout_s: float = ROOM_TIMEOUT_S) -> None:
        if self._stop_reason is not None:
            raise self._stop_reason
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        if self._stop_reason is not None:
            raise self._stop_reason

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            with suppress(ClusterError):  # the server ends
                await work

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_thread(
        self,
        start: Callable[[Callable[[], None]], None],
        function: Callable[[], T],
        discard: Callable[[T], None],
    ) -> T:
        """The result of a function that `start` runs in another thread, which the end of the
        program does not wait for; `discard` gets it if nobody does."""
        loop = asyncio.get_running_loop()
        is_finished = threading.Event()
        future: asyncio.Future[T] = loop.create_future()

        def deliver(set_outcome: Callable[[], None]) -> None:
            if not future.done():
                set_outcome()
                self._discards.pop(future, None)

        def run() -> None:
            try:
                try:
                    result = function()
                except Exception as error:
                    deliver_outcome = partial(deliver, partial(future.set_exception, error))
                else:
                    self._discards[future] = partial(discard, result)
                    deliver_outcome = partial(deliver, partial(future.set_result, result))
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(deliver_outcome)
            finally:
                is_finished.set()
                with self._lock:
                    self._unfinished.remove(is_finished)

        with self._lock:
            self._unfinished.add(is_finished)
        start(run)
        return await future


class _Worker:
    """Runs functions one after the other, all in one thread.

    MLX keeps a thread and about a megabyte for each thread that ever used it, so models are not
    loaded in new ones.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._is_running = False

    def start(self, function: Callable[[], None]) -> None:
        """Run a function, which does not fail, when those before it have ended."""
        self._work.put(function)
        if not self._is_running:
            self._is_running = True
            threading.Thread(target=self._run, name="models", daemon=True).start()

    def stop(self) -> None:
        """End the thread when it has done what it has."""
        self._work.put(None)

    def _run(self) -> None:
        while (function := self._work.get()) is not None:
            function()


def _start_thread(function: Callable[[], None]) -> None:
    threading.Thread(target=function, name="unloading", daemon=True).start()


def _close(loaded: LoadedModel) -> None:
    loaded.close()


def _fail(waiters: Iterable[asyncio.Future[None]], error: CenacleError) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_exception(error)


def _unavailable(entry: _Entry) -> ModelUnavailable:
    left_s = max(1, math.ceil(entry.retry_at_s - time.monotonic()))
    return ModelUnavailable(entry.name, entry.reason, left_s)


__all__ = [
    "LoadModel",
    "LoadTask",
    "LoadedModel",
    "ModelPool",
    "ModelUnavailable",
    "PoolOptions",
]
