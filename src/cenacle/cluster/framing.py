"""Typed messages over asyncio streams, framed as in `net.py`.

Owns: limits and deadlines of messages between agents and the head.
Does not know: what messages mean, certificates.
Invariant: every wait has a deadline. A peer that has not proved who it is can make this side keep
at most `FIRST_MESSAGE_BYTES`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, TypeVar

from .. import net
from ..message import Message, MessageError, decode_json, parse
from ..ranks.channel import ChannelClosed, ChannelTimeout

FIRST_MESSAGE_BYTES = 16 * 1024  # limit for a peer that is not known yet
MESSAGE_BYTES = 16 * 1024 * 1024
CHUNK_BYTES = 256 * 1024  # buffered per stream
M = TypeVar("M", bound=Message)


async def receive(
    reader: asyncio.StreamReader,
    timeout_s: float,
    *kinds: type[M],
    limit: int = MESSAGE_BYTES,
) -> M:
    """The next message, which must be of one of these kinds.

    Raises:
        ChannelTimeout, ChannelClosed: see `receive_object`.
        MessageError: it is another message, or a field is wrong.
    """
    return parse(await receive_object(reader, timeout_s, limit), *kinds)


async def receive_object(
    reader: asyncio.StreamReader, timeout_s: float, limit: int = MESSAGE_BYTES
) -> dict[str, Any]:
    """The next message, as a JSON object.

    Raises:
        ChannelTimeout: it did not arrive in time.
        ChannelClosed: the connection ended.
        MessageError: what was sent is no JSON object, or too long.
    """
    try:
        async with asyncio.timeout(timeout_s):
            header = await reader.readexactly(net.FRAME_HEADER.size)
            (length,) = net.FRAME_HEADER.unpack(header)
            if length > limit:
                raise MessageError(f"{length} bytes, expected at most {limit}")
            return decode_json(await reader.readexactly(length))
    except TimeoutError:
        raise ChannelTimeout(f"sent nothing for {timeout_s:g} s") from None
    except asyncio.IncompleteReadError:
        raise ChannelClosed("closed the connection") from None
    except OSError as error:
        raise ChannelClosed(net.describe_loss(error)) from None


async def send(writer: asyncio.StreamWriter, message: Message, timeout_s: float) -> None:
    """Send a message.

    Raises:
        ChannelTimeout: the other side did not take it in time.
        ChannelClosed: the connection ended.
    """
    # One write, because several tasks may send.
    await send_bytes(writer, net.encode_frame(message.to_json()), timeout_s)


async def send_bytes(writer: asyncio.StreamWriter, data: bytes, timeout_s: float) -> None:
    """Send bytes that a message has announced; raises as `send`."""
    try:
        writer.write(data)
        async with asyncio.timeout(timeout_s):
            await writer.drain()
    except TimeoutError:
        raise ChannelTimeout(f"did not take {len(data)} bytes within {timeout_s:g} s") from None
    except OSError as error:
        raise ChannelClosed(net.describe_loss(error)) from None


async def close_gracefully(writer: asyncio.StreamWriter, timeout_s: float) -> None:
    """Close once everything written has been sent, or the time is up."""
    writer.close()
    with suppress(OSError):  # TimeoutError is one
        await asyncio.wait_for(writer.wait_closed(), timeout_s)


def abort(writer: asyncio.StreamWriter) -> None:
    """Close at once and discard what has not been sent."""
    with suppress(OSError, RuntimeError):
        writer.transport.abort()
