"""A server that refuses every request, for `refusal.py`.

Owns: the responses.
Does not know: which nodes are waited for.
Invariant: the reason is told to those who may use the server; others learn that there is one.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import closing

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..errors import CenacleError, NodesMissing
from . import static
from .access_policy import AccessPolicy
from .api.validation import JsonObject
from .app import path_error
from .auth import KeyStore
from .generation import json_response
from .http_server import HttpServer
from .limits import Limits
from .middleware import AccessMiddleware
from .request_body import read_body

RETRY_AFTER_S = 5


async def serve_refusals(
    sock: socket.socket,
    describe: Callable[[], str],
    policy: AccessPolicy | None,
    tls: ssl.SSLContext | None,
    ending: threading.Event,
) -> None:
    """Refuse requests until `ending` is set; the arguments are those of `refusal.refuse`."""
    limits = Limits(shutdown_timeout_s=1)  # the group does not wait for slow clients
    application = Starlette(
        routes=[*static.routes(), Route("/{path:path}", _Refusal(describe, limits))]
    )
    with closing(KeyStore()) as keys:
        policy = policy or AccessPolicy.for_socket(sock, keys)
        middleware = AccessMiddleware(application, policy, keys)
        server = HttpServer(lambda _: None, middleware.with_cors(), None, limits, tls)
        serving = asyncio.create_task(server.serve(sockets=[sock.dup()]))  # which it closes
        while not serving.done() and not (ending.is_set() and server.started):
            await asyncio.sleep(0.05)
        server.should_exit = True
        await serving


class _Refusal:
    """An ASGI application that refuses everything."""

    def __init__(self, describe: Callable[[], str], limits: Limits) -> None:
        self._describe, self._limits = describe, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = Request(scope, receive)
        response = await self._respond(http)
        await response(scope, receive, send)

    async def _respond(self, http: Request) -> Response:
        try:
            await read_body(http, self._limits)  # else it would be taken for the next request
        except ClientDisconnect:
            return Response()  # nobody reads it
        except CenacleError as error:
            return path_error(error, http)
        reason = self._describe() if "key" in http.scope["state"] else ""
        headers = {"retry-after": str(RETRY_AFTER_S), "cache-control": "no-store"}
        if http.url.path == "/health":
            body: JsonObject = {"status": "waiting", **({"reason": reason} if reason else {})}
            return json_response(503, body, headers)
        refusal = NodesMissing(f"no model is loaded yet{': ' * bool(reason)}{reason}")
        return path_error(refusal, http, headers)
