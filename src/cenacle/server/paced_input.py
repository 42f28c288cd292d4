"""What clients send reaches the HTTP parser in small pieces, and clients take turns.

Owns: how much is parsed at once, what waits to be parsed, and when reading pauses.
Does not know: HTTP, requests.
Invariant: in a round of the event loop, a client whose bytes wait gets at most `TURN_S`, and only
one of these clients gets it. Nothing more is read from a client while its bytes wait.
Why: a body in chunks of one byte costs a hundred times the work of its length.
Next: `http_server.py` has the connections.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl

PIECE_BYTES = 2048  # chunks of one byte: about 5 ms
TURN_S = 0.005


class Turns:
    """Work that continues in later rounds of the event loop, one piece in each."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], bool]] = deque()

    def add(self, work: Callable[[], bool]) -> None:
        """Have work done from the next round on, until it returns False."""
        self._waiting.append(work)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        work = self._waiting[0]
        has_more = work()
        self._waiting.popleft()
        if has_more:
            self._waiting.append(work)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._run)


class PacedInput(FlowControl):
    """The input of one connection; uvicorn pauses and resumes it.

    Args:
        transport: of the connection.
        parse: takes the next bytes.
        turns: shared by all connections.
    """

    def __init__(
        self, transport: asyncio.Transport, parse: Callable[[bytes], None], turns: Turns
    ) -> None:
        super().__init__(transport)
        self._parse, self._turns = parse, turns
        self._unread = bytearray()
        self._has_turn = False  # or waits for one

    def add(self, data: bytes) -> None:
        """Parse what was received, now or in turns."""
        self._unread += data
        if not self._has_turn and self._parse_some():
            self._wait_for_turn()

    def pause_reading(self) -> None:
        """See `FlowControl`."""
        self.read_paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """See `FlowControl`; what waits comes first."""
        self.read_paused = False
        if not self._unread:
            self._transport.resume_reading()
        elif not self._has_turn:
            self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        self._has_turn = True
        self._transport.pause_reading()
        self._turns.add(self._take_turn)

    def _take_turn(self) -> bool:
        self._has_turn = self._parse_some()
        if not (self._unread or self.read_paused):
            self._transport.resume_reading()
        return self._has_turn

    def _parse_some(self) -> bool:
        """Parse for a while; whether to go on."""
        self._has_turn = True  # parsing may resume reading
        ends_s = time.perf_counter() + TURN_S
        while self._unread and not self.read_paused:
            if self._transport.is_closing():
                self._unread.clear()
                break
            piece = bytes(self._unread[:PIECE_BYTES])
            del self._unread[:PIECE_BYTES]
            self._parse(piece)
            if time.perf_counter() > ends_s:
                break
        self._has_turn = False
        return bool(self._unread) and not self.read_paused
