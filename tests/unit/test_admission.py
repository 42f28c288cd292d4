"""Answers at once, tokens of a day, and whose turn it is to be tokenized."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cenacle.errors import Busy
from cenacle.server.admission import Admissions, QuotaUsed
from cenacle.server.api.validation import RequestError
from cenacle.server.auth import ApiKey, KeyStore
from cenacle.server.preparation_queue import PreparationQueue


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyStore]:
    store = KeyStore(tmp_path / "keys.db")
    yield store
    store.close()


def a_key(keys: KeyStore, name: str, **limits: int) -> ApiKey:
    key = keys.find(keys.add(name, **limits))
    assert key is not None
    return key


def test_answers_are_counted_per_key_and_in_all(keys: KeyStore) -> None:
    alice, bob = a_key(keys, "alice", max_concurrent=3), a_key(keys, "bob")
    admissions = Admissions(keys, max_answers=6, max_answers_per_key=4)
    first = admissions.open("alice", alice)
    first.add_answers(1)
    second = admissions.open("alice", alice)
    with pytest.raises(Busy, match="3 answers for this key"):
        admissions.open("alice", alice)
    with pytest.raises(RequestError, match="at most 3 answers at once, got 4") as refused:
        second.add_answers(3)
    assert refused.value.field == "n"
    other = admissions.open("bob", bob)
    other.add_answers(2)
    with pytest.raises(Busy, match="the server gives 6 answers already"):
        admissions.open("", None)
    first.close()
    first.close()
    assert admissions.open("alice", alice)
    second.close()
    other.close()


def test_tokens_of_a_day_are_reserved_and_given_back(keys: KeyStore) -> None:
    key = a_key(keys, "alice", tokens_per_day=100)
    admissions = Admissions(keys, 99, 99)
    first, second = admissions.open("alice", key), admissions.open("alice", key)
    assert first.reserve_tokens(10, 50, 1) == 50
    assert second.reserve_tokens(10, 50, 2) == 15  # 40 are left
    third = admissions.open("alice", key)
    with pytest.raises(QuotaUsed, match="has 0 of its 100 tokens") as refused:
        third.reserve_tokens(1, 1, 1)
    assert refused.value.retry_after_s >= 1
    keys.charge("alice", 60)
    first.close()
    second.close()
    assert third.reserve_tokens(10, 50, 1) == 30
    assert admissions.open("", None).reserve_tokens(10, 50, 1) == 50


def test_keys_take_turns_and_abandoned_work_is_dropped() -> None:
    done: list[str] = []
    release = threading.Event()

    def work(name: str) -> str:
        if name == "first":
            release.wait(300)
        done.append(name)
        return name

    async def main() -> None:
        queue = PreparationQueue()
        names = ("first", "a1", "a2", "a3", "b1", "c1", "b2")
        tasks = {}
        for name in names:
            key = {"f": "alice", "a": "alice", "b": "bob", "c": "carol"}[name[0]]
            tasks[name] = asyncio.create_task(queue.run(key, work, name))
            await asyncio.sleep(0)
        tasks["a2"].cancel()  # its client has gone
        tasks["first"].cancel()  # begun: the others wait for the thread
        await asyncio.sleep(0.1)
        assert not done
        release.set()
        results = await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert [r for r in results if isinstance(r, str)] == ["a1", "a3", "b1", "c1", "b2"]
        queue.close()

    asyncio.run(main())
    assert done == ["first", "a1", "b1", "c1", "a3", "b2"]


def test_an_error_of_the_work_is_the_waiters_and_the_queue_goes_on() -> None:
    def fail() -> None:
        raise ValueError("x")

    async def main() -> None:
        queue = PreparationQueue()
        with pytest.raises(ValueError, match="x"):
            await queue.run("", fail)
        assert await queue.run("", lambda: 3) == 3
        turn = asyncio.create_task(queue.run("", lambda: 4))
        await asyncio.sleep(0)
        turn.cancel()  # between its turn and its work
        assert await asyncio.wait_for(queue.run("", lambda: 5), 60) == 5
        queue.close()

    asyncio.run(main())
