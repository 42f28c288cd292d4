"""Relays: the bytes of a rank's own connection, passed on by its agent and by the head.

Owns: copying bytes both ways, and the head's ends of relays that are expected or open.
Does not know: what the bytes mean.
Invariant: when one side ends, what it sent last still reaches the other, and then both are closed.
Next: `remote_ranks.py` uses the ends; `agent.py` opens the other side.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from contextlib import suppress

from ..errors import ClusterError
from . import framing, messages

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
WELCOME_TIMEOUT_S = 4.0


class Relays:
    """The relays that agents have yet to open. Only for the head's event loop."""

    def __init__(self) -> None:
        self._expected: dict[str, socket.socket] = {}  # by name: the end that the agent gets

    def expect(self, names: Iterable[str]) -> list[socket.socket]:
        """Sockets that are connected to ranks once agents open relays of these secret names."""
        ends = []
        for name in names:
            near, far = socket.socketpair()
            self._expected[name] = far
            ends.append(near)
        return ends

    def cancel(self, names: Iterable[str]) -> None:
        """Stop expecting relays of these names."""
        for name in names:
            if (far := self._expected.pop(name, None)) is not None:
                far.close()

    def close(self) -> None:
        """Stop expecting any."""
        self.cancel(list(self._expected))

    async def serve(self, name: str, stream: Stream) -> None:
        """Connect an agent's relay to the socket that waits for it, until either side ends.

        Raises:
            ClusterError: no relay of that name is expected.
        """
        far = self._expected.pop(name, None)
        if far is None:
            raise ClusterError("a relay that is not expected")
        local = await asyncio.open_unix_connection(sock=far, limit=framing.CHUNK_BYTES)
        try:
            await framing.send(stream[1], messages.Welcome(), WELCOME_TIMEOUT_S)
            await relay(stream, local)
        finally:
            local[1].close()


async def relay(a: Stream, b: Stream) -> None:
    """Pass bytes on in both directions until one side ends; then close both."""
    copies = [asyncio.create_task(_copy(a[0], b[1])), asyncio.create_task(_copy(b[0], a[1]))]
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in copies:
            task.cancel()
        await asyncio.gather(*copies, return_exceptions=True)
        for _, writer in (a, b):
            # Not aborted: a rank's last message may still be on its way.
            with suppress(OSError, RuntimeError):
                writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(framing.CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
