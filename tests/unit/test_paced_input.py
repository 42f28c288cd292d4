"""Input that is costly to parse: a client's work in one round of the event loop, no byte lost."""

import asyncio
from collections.abc import Callable

import pytest

from cenacle.server import paced_input
from cenacle.server.paced_input import PacedInput, Turns


class PlayedTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.is_paused = self.closed = False

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def is_closing(self) -> bool:
        return self.closed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [0.0]
    monkeypatch.setattr(paced_input.time, "perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def test_costly_input_is_parsed_in_turns(clock: Callable[[float], None]) -> None:
    async def run() -> None:
        turns, rounds, order = Turns(), 0, []
        parsed = {name: bytearray() for name in "ab"}
        transports = {name: PlayedTransport() for name in "ab"}

        def parser(name: str) -> Callable[[bytes], None]:
            def parse(data: bytes) -> None:
                clock(0.01)
                parsed[name] += data
                order.append(name)

            return parse

        inputs = {n: PacedInput(transports[n], parser(n), turns) for n in "ab"}
        sent = {name: bytes(range(256)) * 80 + name.encode() for name in "ab"}
        for name in "ab":
            inputs[name].add(sent[name])
        assert order == ["a", "b"]  # a first piece at once
        while any(transports[name].is_paused for name in "ab"):
            before = len(order)
            await asyncio.sleep(0)
            assert len(order) - before <= 1
            rounds += 1
        assert parsed == sent
        assert 18 <= rounds <= 30
        assert order[:8] == ["a", "b"] * 4

    asyncio.run(run())


def test_cheap_input_is_parsed_at_once() -> None:
    async def run() -> None:
        parsed, transport = bytearray(), PlayedTransport()
        cheap = PacedInput(transport, parsed.extend, Turns())
        paced_input_bytes = bytes(100_000)
        cheap.add(paced_input_bytes)
        for _ in range(100):
            await asyncio.sleep(0)
        assert parsed == paced_input_bytes
        assert not transport.is_paused

    asyncio.run(run())


def test_a_pause_keeps_what_waits(clock: Callable[[float], None]) -> None:
    """uvicorn pauses in the middle: while a body has not been taken, or a request is answered."""

    async def run() -> None:
        parsed, transport = bytearray(), PlayedTransport()

        def parse(data: bytes) -> None:
            clock(0.001)
            parsed.extend(data)
            if len(parsed) == 2 * paced_input.PIECE_BYTES:
                paced.pause_reading()

        paced = PacedInput(transport, parse, Turns())
        paced.add(bytes(10_000))
        paced.add(b"in flight")
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(parsed) == 2 * paced_input.PIECE_BYTES
        assert transport.is_paused
        paced.resume_reading()
        for _ in range(10):
            await asyncio.sleep(0)
        assert parsed == bytes(10_000) + b"in flight"
        assert not transport.is_paused

    asyncio.run(run())


def test_a_closed_connection_is_forgotten(clock: Callable[[float], None]) -> None:
    async def run() -> None:
        parsed, transport = bytearray(), PlayedTransport()

        def parse(data: bytes) -> None:
            clock(1)
            parsed.extend(data)

        PacedInput(transport, parse, turns := Turns()).add(bytes(100_000))
        transport.closed = True
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(parsed) == paced_input.PIECE_BYTES
        assert not turns._waiting

    asyncio.run(run())
