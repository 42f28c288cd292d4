"""."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ClusterError, InputError
from .app import Application, Limits
from .auth import KeyStore
from .metrics import Metrics
from .middleware import AccessMiddleware, AccessPolicy
from .plan_info import PlanTracker

if TYPE_CHECKING:
    from ..api import Model


def bind(host: str = "127.0.0.1", port: int = 8080) -> socket.socket:
    """A listening socket, taken before anything expensive is begun; port 0: any that is free.

    Clients that connect before `serve` runs wait.

    Raises:
        InputError: the port is in use or not allowed, or the host is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port: expected 0 to 65535, got {port}", "port")
    sock: socket.socket | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)  # without it another process could still take the port
    except (OSError, UnicodeError) as error:
        if sock is not None:
            sock.close()
        raise _bind_error(host, port, error) from error
    return sock


def _bind_error(host: str, port: int, error: Exception) -> InputError:
    match error:
        case OSError(errno=errno.EADDRINUSE):
            return InputError(
                f"port {port} of {host} is in use; choose another with --port", "port"
            )
        case PermissionError():
            return InputError(
                f"port {port} of {host} needs privileges; choose one from 1024 with --port", "port"
            )
    return InputError(f"{host} is not an address of this machine ({error}); see --host", "host")


def serve(
    model: Model,
    sock: socket.socket,
    on_started: Callable[[str], None] | None = None,
    limits: Limits | None = None,
    policy: AccessPolicy | None = None,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Answer requests until SIGTERM or SIGINT; the socket is closed then, the model is not.

    While the group is being formed again requests wait; when it has failed for good the server
    stays, and says so to everyone who asks.

    Args:
        model: loaded, with a tokenizer.
        sock: see `bind`.
        on_started: called with the server's address once requests are answered.
        limits: what a client may cost.
        policy: who may ask; None: with keys only, unless the socket is on loopback.
        tls: see `tls.context`; None: plain HTTP.

    Raises:
        CheckpointError: the model has no tokenizer.
        InputError: keys are required and there is none.
    """
    limits, plan_tracker = limits or Limits(), PlanTracker(model)
    with contextlib.closing(sock), contextlib.closing(KeyStore()) as keys:
        metrics = Metrics(model, keys, plan_tracker)
        with contextlib.closing(Application(model, limits, metrics, plan_tracker)) as application:
            policy = policy or AccessPolicy.for_socket(sock, keys)
            middleware = AccessMiddleware(application.app, policy, keys)
            server = _UvicornServer(
                application, middleware, on_started or (lambda _: None), limits, tls
            )
            asyncio.run(server.serve(sockets=[sock]))


class _TimedConnection(H11Protocol):
    """uvicorn's connection, with deadlines where it has none: for a request's head, and for a
    client that does not read what it asked for."""

    def __init__(self, limits: Limits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for("head", self._limits.head_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._came("head")
        else:
            self._wait_for("head", self._limits.head_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for("reading", self._limits.write_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._came("reading")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for what in list(self._timers):
            self._came(what)

    def _wait_for(self, what: str, seconds: float) -> None:
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def _came(self, what: str) -> None:
        if (timer := self._timers.pop(what, None)) is not None:
            timer.cancel()


class _UvicornServer(uvicorn.Server):
    """uvicorn, which ends what it is doing when it is told to end, and returns."""

    def __init__(
        self,
        api: Application,
        guard: AccessMiddleware,
        on_started: Callable[[str], None],
        limits: Limits,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                guard.with_cors(),
                http=partial(_TimedConnection, limits),  # type: ignore[arg-type]
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=limits.idle_s,
                timeout_graceful_shutdown=limits.close_s,
                ssl_context_factory=(lambda *_: tls) if tls is not None else None,
            )
        )
        self._api, self._on_started, self._tls = api, on_started, tls
        self._handshake_s = limits.handshake_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._tls is not None:
            # uvicorn has no setting for this; asyncio's own is a minute.
            loop: Any = asyncio.get_running_loop()
            loop.create_server = partial(
                loop.create_server, ssl_handshake_timeout=self._handshake_s
            )
        await super().startup(sockets)
        scheme = "https" if self._tls is not None else "http"
        for sock in sockets or []:
            host, port = sock.getsockname()[:2]
            self._on_started(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._api.end(ClusterError("the server was told to end"))
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that was obeyed is not raised again: the caller has a model
        to close."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
