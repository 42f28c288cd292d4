"""Messages over TLS between agents and the head, for asyncio: framed as `engine/channel.py` does.

Owns: framing, limits and deadlines, and passing bytes on between two connections.
Does not know: what messages mean, certificates.
Invariant: every wait has a deadline; nobody who has not proved who he is can make this side keep
more than `GREETING` bytes.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from .. import net
from ..ranks.channel import ChannelClosed, ChannelTimeout

GREETING = 16 * 1024  # bytes of a message by someone who is not known yet
MESSAGE = 16 * 1024 * 1024  # bytes of a message by someone who is
PIECE = 256 * 1024  # bytes that are passed on at once


async def receive(
    reader: asyncio.StreamReader, deadline_s: float, most: int = MESSAGE
) -> dict[str, Any]:
    """The next message.

    Raises:
        ChannelTimeout: it did not come, whole, within the deadline.
        ChannelClosed: the other side is gone, or what it sends is not a message.
    """
    try:
        async with asyncio.timeout(deadline_s):
            (length,) = net.FRAME_HEADER.unpack(await reader.readexactly(net.FRAME_HEADER.size))
            if length > most:
                raise ChannelClosed(f"sent a message of {length} bytes, expected at most {most}")
            message = net.decode_frame(await reader.readexactly(length))
    except TimeoutError:
        raise ChannelTimeout(f"was silent for {deadline_s:g} s") from None
    except (OSError, asyncio.IncompleteReadError) as error:
        raise ChannelClosed(_why(error)) from None
    except ValueError as error:
        raise ChannelClosed(f"sent what is not a message ({type(error).__name__})") from None
    if not isinstance(message.get("type"), str):
        raise ChannelClosed("sent what is not a message: expected a JSON object with a type")
    return message


async def send(writer: asyncio.StreamWriter, message: dict[str, Any], deadline_s: float) -> None:
    """Send a message.

    Raises:
        ChannelTimeout: the other side did not take it within the deadline.
        ChannelClosed: it is gone.
    """
    # One write: several tasks may send.
    await send_bytes(writer, net.encode_frame(message), deadline_s)


async def send_bytes(writer: asyncio.StreamWriter, data: bytes, deadline_s: float) -> None:
    """Send bytes that a message has announced; raises as `send`."""
    try:
        writer.write(data)
        async with asyncio.timeout(deadline_s):
            await writer.drain()
    except TimeoutError:
        raise ChannelTimeout(f"did not take {len(data)} bytes within {deadline_s:g} s") from None
    except OSError as error:
        raise ChannelClosed(_why(error)) from None


def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close at once, whatever has not been sent."""
    with suppress(OSError, RuntimeError):
        writer.transport.abort()


async def pass_on(
    a: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    b: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Pass bytes on in both directions until one side ends; then both are closed."""
    ways = [asyncio.create_task(_one_way(a[0], b[1])), asyncio.create_task(_one_way(b[0], a[1]))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for _, writer in (a, b):
            # What has been written still goes out: a rank's last words among it.
            with suppress(OSError, RuntimeError):
                writer.close()


async def _one_way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(PIECE):
            writer.write(data)
            await writer.drain()


def _why(error: OSError | asyncio.IncompleteReadError) -> str:
    if isinstance(error, asyncio.IncompleteReadError):
        return "closed the connection"
    return net.describe_loss(error)
