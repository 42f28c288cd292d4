"""Reads the body of a request within a size and a time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from .api.validation import RequestError
from .limits import Limits


class BodyTooLarge(RequestError):
    """The body has more bytes than allowed."""

    def __init__(self, limit: int) -> None:
        message = f"body: expected at most {limit} bytes, got more"
        super().__init__(None, message, "body_too_large", 413)


class BodyTooSlow(RequestError):
    """The body did not arrive in time."""

    def __init__(self, seconds: float) -> None:
        message = f"body: expected all of it within {seconds:g} s, got a part"
        super().__init__(None, message, "body_too_slow", 408)


async def read_body(http: Request, limits: Limits) -> bytes:
    """The body of a request.

    Of a body that is too large, up to `max_drained_bytes` are read and discarded: a client that
    sends everything before it reads then sees the refusal.

    Raises:
        BodyTooLarge, BodyTooSlow: see those.
        ClientDisconnect: the client has disconnected.
    """
    limit, declared = limits.max_body_bytes, http.headers.get("content-length", "0")
    too_large = declared.isdigit() and int(declared) > limit
    if too_large and "expect" in http.headers:
        raise BodyTooLarge(limit)  # the client has not started to send
    body, drained_bytes = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in http.stream():
                too_large = too_large or len(body) + len(chunk) > limit
                if not too_large:
                    body += chunk
                    continue
                drained_bytes += len(body) + len(chunk)
                body.clear()
                if drained_bytes > limits.max_drained_bytes:
                    break
    except TimeoutError:
        if not too_large:
            raise BodyTooSlow(limits.body_timeout_s) from None
    if too_large:
        raise BodyTooLarge(limit)
    return bytes(body)
