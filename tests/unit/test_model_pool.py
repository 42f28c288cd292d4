"""Which models are loaded when, with models that are nothing but numbers of bytes."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from cenacle.errors import CenacleError, CheckpointError, ClusterError, NodesMissing
from cenacle.planning.memory import MemoryEstimate, MemoryShare
from cenacle.server.model_pool import (
    LoadTask,
    ModelPool,
    ModelUnavailable,
    PoolOptions,
)
from cenacle.server.model_state import ModelState

MEMORY = 100
DEADLINE_S = 120.0


@dataclass
class FakeModel:
    name: str
    machine: "Machine"
    size: int
    failure: CenacleError | None = None
    stopped: bool = False
    app: Any = None

    @property
    def promised_bytes(self) -> int:
        return self.size

    @property
    def resident_bytes(self) -> int:
        return self.size

    def stop(self, reason: ClusterError) -> None:
        self.stopped = True

    def close(self) -> None:
        assert not self.machine.running[self.name], "unloaded while a request runs"
        self.failure = ClusterError("the group was closed")
        if (gate := self.machine.gates.get(f"-{self.name}")) is not None:
            assert gate.wait(DEADLINE_S)
        self.machine.held.pop(self.name)
        self.machine.log.append(f"-{self.name}")


@dataclass
class Machine:
    """Memory for `MEMORY` bytes of models; `gates` hold loads back until they are set."""

    sizes: dict[str, int]
    held: dict[str, int] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    errors: dict[str, CenacleError] = field(default_factory=dict)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    begun: dict[str, threading.Event] = field(default_factory=dict)
    loaders: set[threading.Thread] = field(default_factory=set)
    heeds_cancel: bool = True

    def __post_init__(self) -> None:
        self.running = dict.fromkeys(self.sizes, 0)
        self.begun = {name: threading.Event() for name in self.sizes}

    def load(self, task: LoadTask) -> FakeModel:
        self.loaders.add(threading.current_thread())
        size = self.sizes[task.name]
        share = task.make_room(MemoryEstimate(0, size, 0, -(256 << 20)))
        assert isinstance(share, MemoryShare)
        self.begun[task.name].set()
        if (gate := self.gates.get(task.name)) is not None:
            while not gate.wait(0.01):
                if task.cancel.is_set() and self.heeds_cancel:
                    raise ClusterError("cancelled")
        if (error := self.errors.get(task.name)) is not None:
            raise error
        self.held[task.name] = size
        assert sum(self.held.values()) <= MEMORY, "more than there is"
        self.log.append(f"+{task.name}")
        return FakeModel(task.name, self, size)

    def available(self) -> int:
        return MEMORY - sum(self.held.values())


def run(
    test: Callable[[ModelPool, Machine], Awaitable[None]],
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> Machine:
    machine = Machine(sizes or {"a": 40, "b": 40, "c": 40, "huge": 101})

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S):
            pool.start()
            await test(pool, machine)
        if options.get("stop", True):
            pool.stop(ClusterError("the server is shutting down"))

    options = {**options}
    options.pop("stop", None)
    pool = ModelPool(tuple(machine.sizes), machine.load, PoolOptions(**options), machine.available)
    asyncio.run(main())
    pool.close()
    assert machine.held == {}
    return machine


async def use(pool: ModelPool, name: str) -> None:
    await pool.acquire(name)
    pool.release(name)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_the_least_recently_used_model_makes_room_and_no_other():
    async def test(pool: ModelPool, machine: Machine) -> None:
        await use(pool, "a")
        await use(pool, "b")
        await use(pool, "a")
        assert machine.log == ["+a", "+b"]
        await use(pool, "c")
        assert machine.log == ["+a", "+b", "-b", "+c"]
        assert pool.status("b").state is ModelState.UNLOADED
        assert pool.last_used == "c"

    run(test)


def test_a_model_with_a_request_waits_for_its_end_and_the_next_ones_take_turns():
    async def test(pool: ModelPool, machine: Machine) -> None:
        await pool.acquire("a")
        await pool.acquire("b")
        machine.running |= {"a": 1, "b": 1}
        wanted = asyncio.create_task(use(pool, "c"))
        await until(lambda: pool.status("c").waiting and not pool._is_usable(pool._entries["a"]))
        later = asyncio.create_task(use(pool, "a"))  # waits: c was before it
        await until(lambda: pool.status("a").waiting)
        await pool.acquire("b")  # not the one that makes room
        pool.release("b")
        machine.running["a"] = 0
        pool.release("a")
        await wanted
        machine.running["b"] = 0
        pool.release("b")
        await later
        assert machine.log[:4] == ["+a", "+b", "-a", "+c"]
        assert machine.log[-1] == "+a"

    run(test)


def test_one_that_does_not_fit_is_refused_and_nothing_is_unloaded_for_it():
    async def test(pool: ModelPool, machine: Machine) -> None:
        await use(pool, "a")
        with pytest.raises(ModelUnavailable, match=r"huge is not loaded: it needs .* of memory"):
            await pool.acquire("huge")
        assert machine.log == ["+a"]
        assert pool.status("huge").state is ModelState.FAILED

    run(test)


def test_a_pinned_model_is_loaded_at_the_start_and_stays():
    async def test(pool: ModelPool, machine: Machine) -> None:
        await until(lambda: pool.loaded("a"))
        await use(pool, "b")
        await use(pool, "c")
        assert machine.log == ["+a", "+b", "-b", "+c"]
        await use(pool, "a")

    run(test, pinned=frozenset({"a"}), idle_s=60)


def test_what_may_not_go_is_named_in_the_refusal():
    async def test(pool: ModelPool, machine: Machine) -> None:
        with pytest.raises(ModelUnavailable, match="a is pinned, and 1 may be loaded at once"):
            await pool.acquire("b")
        with pytest.raises(ModelUnavailable, match="a is pinned"):  # within the back-off
            await pool.acquire("b")
        assert pool.status("b").load_failures == 1

    run(test, pinned=frozenset({"a"}), max_loaded=1)


def test_a_failed_load_is_tried_again_later_and_is_that_models_alone():
    async def test(pool: ModelPool, machine: Machine) -> None:
        machine.errors["b"] = CheckpointError("weights: a file is missing")
        waiting = [asyncio.create_task(pool.acquire("b")) for _ in range(3)]
        for task in waiting:
            with pytest.raises(ModelUnavailable, match="a file is missing") as caught:
                await task
            assert 1 <= caught.value.retry_after_s <= 60
        assert pool.status("b").load_failures == 1
        await use(pool, "a")
        del machine.errors["b"]
        pool._entries["b"].retry_at_s = 0.0
        await use(pool, "b")
        assert (pool.status("b").reason, pool.status("b").state) == ("", ModelState.LOADED)

    run(test)


def test_nodes_that_are_missing_are_said_once_and_a_pinned_model_waits_for_them(
    monkeypatch, caplog
):
    monkeypatch.setattr("cenacle.server.model_pool.FIRST_RETRY_S", 0.01)

    async def test(pool: ModelPool, machine: Machine) -> None:
        for name in "ab":
            machine.errors[name] = NodesMissing(f"no node for {name}")
        await until(lambda: pool.status("a").load_failures > 2)
        with pytest.raises(ModelUnavailable, match="b is not loaded: no node for b"):
            await pool.acquire("b")
        machine.errors.clear()
        await until(lambda: pool.loaded("a"))
        assert pool.status("b").load_failures == 1

    run(test, pinned=frozenset({"a"}))
    lines = [r.getMessage() for r in caplog.records if "cannot" in r.getMessage()]
    assert lines == [f"{name} cannot be loaded: no node for {name}" for name in "ab"]


def test_a_client_that_goes_ends_its_wait_and_not_the_load():
    async def test(pool: ModelPool, machine: Machine) -> None:
        machine.gates["a"] = threading.Event()
        task = asyncio.create_task(pool.acquire("a"))
        await until(machine.begun["a"].is_set)
        task.cancel()
        await asyncio.wait((task,))
        assert pool.status("a").waiting == 0
        machine.gates["a"].set()
        await until(lambda: pool.loaded("a"))
        assert pool.status("a").running == 0

    run(test)


def test_when_nobody_waits_any_more_nothing_is_unloaded_and_nobody_kept_waiting():
    async def test(pool: ModelPool, machine: Machine) -> None:
        await pool.acquire("a")
        await pool.acquire("b")
        task = asyncio.create_task(pool.acquire("c"))
        await until(lambda: not pool._is_usable(pool._entries["a"]))
        kept = asyncio.create_task(use(pool, "a"))
        await until(lambda: pool.status("a").waiting)
        task.cancel()
        await kept
        assert machine.log == ["+a", "+b"]
        await until(lambda: pool.status("c").state is ModelState.UNLOADED)
        pool.release("a")
        pool.release("b")

    run(test)


def test_an_idle_model_is_unloaded():
    async def test(pool: ModelPool, machine: Machine) -> None:
        await pool.acquire("a")
        await asyncio.sleep(0.05)
        assert machine.log == ["+a"]
        gate = machine.gates["-a"] = threading.Event()
        pool.release("a")
        loaded = pool.loaded("a")
        assert loaded is not None
        await until(lambda: loaded.failure)
        assert (pool.status("a").state, pool.status("a").reason) == (ModelState.UNLOADING, "")
        next_one = asyncio.create_task(pool.acquire("a"))
        await until(lambda: pool.status("a").waiting)
        gate.set()
        await next_one
        assert machine.log == ["+a", "-a", "+a"]
        pool.release("a")
        await until(lambda: pool.status("a").state is ModelState.UNLOADED)

    run(test, idle_s=0.01)


def test_a_model_whose_ranks_have_failed_for_good_is_unloaded_and_loaded_anew():
    async def test(pool: ModelPool, machine: Machine) -> None:
        await use(pool, "a")
        loaded = pool.loaded("a")
        assert isinstance(loaded, FakeModel)
        loaded.failure = ClusterError("four failures in a row")
        assert pool.status("a").state is ModelState.FAILED
        with pytest.raises(ModelUnavailable, match="four failures in a row"):
            await pool.acquire("a")
        pool._entries["a"].retry_at_s = 0.0
        await use(pool, "a")
        assert machine.log == ["+a", "-a", "+a"]

    run(test)


def test_all_loads_are_in_one_thread():
    """MLX keeps a thread and a megabyte for every thread that ever used it."""

    async def test(pool: ModelPool, machine: Machine) -> None:
        for name in "abcabc":
            await use(pool, name)

    machine = run(test, max_loaded=1)
    assert machine.log.count("+a") == 2
    (loader,) = machine.loaders
    loader.join(DEADLINE_S)
    assert not loader.is_alive()


def test_the_end_of_the_server_ends_a_load_and_every_wait():
    waiting: list[asyncio.Task[Any]] = []

    async def test(pool: ModelPool, machine: Machine) -> None:
        await use(pool, "b")
        machine.gates["a"] = threading.Event()  # never set
        waiting.append(asyncio.create_task(pool.acquire("a")))
        await until(machine.begun["a"].is_set)
        pool.stop(ClusterError("the server is shutting down"))
        with pytest.raises(ClusterError, match="shutting down"):
            await waiting[0]
        await until(lambda: not pool._unfinished)
        with pytest.raises(ClusterError, match="shutting down"):
            await pool.acquire("b")

    machine = run(test, stop=False)
    assert machine.log == ["+b", "-b"]


def test_a_load_that_ends_after_the_server_leaves_nothing():
    async def test(pool: ModelPool, machine: Machine) -> None:
        machine.heeds_cancel = False
        gate = machine.gates["a"] = threading.Event()
        task = asyncio.create_task(pool.acquire("a"))
        await until(machine.begun["a"].is_set)
        threading.Timer(0.2, gate.set).start()
        task.cancel()

    assert run(test, stop=False).log == ["+a", "-a"]


@pytest.mark.parametrize("seed", range(3))
def test_many_requests_for_more_models_than_fit_are_all_answered(seed):
    """The machine's own assertions say that no model went while it ran, and that all fitted."""
    names, chance = ("a", "b", "c", "d", "e"), random.Random(seed)

    async def client(pool: ModelPool, machine: Machine) -> int:
        answers = 0
        for _ in range(12):
            name = chance.choice(names)
            try:
                async with asyncio.timeout(0.001 if chance.random() < 0.2 else DEADLINE_S):
                    await pool.acquire(name)
            except TimeoutError:
                continue
            machine.running[name] += 1
            await asyncio.sleep(chance.random() / 500)
            machine.running[name] -= 1
            pool.release(name)
            answers += 1
        return answers

    async def test(pool: ModelPool, machine: Machine) -> None:
        answers = await asyncio.gather(*(client(pool, machine) for _ in range(8)))
        assert sum(answers) > 50
        assert all(pool.status(name).running == 0 for name in names)

    run(test, dict(zip(names, (30, 40, 50, 60, 70), strict=True)))
