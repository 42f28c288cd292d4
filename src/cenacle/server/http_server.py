"""The listening socket and the process of the HTTP server: uvicorn with deadlines.

Owns: binding the socket, running the application on it until a signal, deadlines of connections.
Does not know: endpoints, APIs, the model.
Invariant: every wait for a client has a deadline. On SIGTERM or SIGINT running requests get an
error, and `serve` returns.
Next: `app.py` is the application, `middleware.py` what surrounds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
import threading
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ClusterError
from ..logs import RepeatedLineFilter
from ..net import format_address
from ..open_files import raise_limit
from .access_policy import AccessPolicy
from .app import Application
from .auth import KeyStore
from .limits import Limits
from .loaded_model import ModelLoader
from .metrics import Metrics, ModelsMetrics
from .middleware import AccessMiddleware
from .model_catalog import ModelEntry
from .model_pool import ModelPool, PoolOptions
from .models_app import ModelsApplication
from .paced_input import PacedInput, Turns
from .plan_info import PlanTracker
from .supervisor import Restarts

if TYPE_CHECKING:
    from ..api import Model
    from ..cluster.formation import Cluster

connection_log = logging.getLogger(f"{__name__}.connections")
_REPEATED_LINES = RepeatedLineFilter()


@dataclass(frozen=True)
class ServerOptions:
    """How a server treats its clients, whatever models it has.

    Args:
        limits: what a client may use.
        policy: who may use the server; None: with keys only, unless the socket is on loopback.
        tls: see `tls.server_context`; None: plain HTTP.
        restarts: of this server before, for /health.
        otlp_endpoint: collector that gets traces of the requests; None: none.
    """

    limits: Limits = field(default_factory=Limits)
    policy: AccessPolicy | None = None
    tls: ssl.SSLContext | None = None
    restarts: Restarts | None = None
    otlp_endpoint: str | None = None


def serve(
    model: Model,
    sock: socket.socket,
    on_started: Callable[[str], None] | None = None,
    options: ServerOptions | None = None,
    names: Sequence[str] = (),
) -> None:
    """Answer requests until SIGTERM or SIGINT. Closes the socket, not the model.

    Requests wait while the ranks are restarted. After a final failure the server keeps running and
    answers every request with the reason.

    Args:
        model: loaded, with a tokenizer.
        sock: see `net.bind`.
        on_started: called with the server's URL once it answers requests.
        options: None: the defaults.
        names: of the model, for clients; "*": any. Empty: its own.

    Raises:
        CheckpointError: the model has no tokenizer.
        InputError: keys are required and there is none.
    """
    options, plan_tracker = options or ServerOptions(), PlanTracker(model)
    with (
        contextlib.closing(sock),
        contextlib.closing(KeyStore()) as keys,
        contextlib.ExitStack() as stack,
    ):
        metrics = Metrics.of_server(model, keys, plan_tracker)
        _send_traces(options.otlp_endpoint, {model.name: metrics}, stack)
        application = Application(
            model, options.limits, metrics, plan_tracker, names, options.restarts
        )
        _run(application, sock, keys, on_started, options)


def serve_models(
    catalog: Mapping[str, ModelEntry],
    sock: socket.socket,
    pool_options: PoolOptions,
    on_started: Callable[[str], None] | None = None,
    options: ServerOptions | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    cluster: Cluster | None = None,
    report: Callable[[str], None] = lambda _: None,
    on_loaded: Callable[[Model], None] = lambda _: None,
    max_waiting: int = 64,
) -> None:
    """Like `serve` for several models, which are loaded when requests name them.

    Args:
        catalog: see `model_catalog.read_catalog`; the first is the default.
        pool_options: when models are loaded and unloaded.
        names: of each model for clients; None: its own. "*" in one: any other name is the default.
        cluster: models run on its nodes; None: on this machine.
        report: called with sentences on how a model runs.
        on_loaded: called with each model that was loaded, in another thread.
        max_waiting: requests that may wait for one model to be loaded.

    Raises:
        InputError: keys are required and there is none.
    """
    options = options or ServerOptions()
    limits = options.limits
    with (
        contextlib.closing(sock),
        contextlib.closing(KeyStore()) as keys,
        contextlib.ExitStack() as stack,
    ):
        metrics = ModelsMetrics(tuple(catalog), keys, lambda name: pool.status(name))
        _send_traces(
            options.otlp_endpoint, {name: metrics.of_model(name) for name in catalog}, stack
        )
        loader = ModelLoader(catalog, limits, metrics.of_model, cluster, report, on_loaded)
        pool = ModelPool(
            tuple(catalog), loader.load, pool_options, lambda: psutil.virtual_memory().available
        )
        application = ModelsApplication(
            pool,
            catalog,
            names or {name: (name,) for name in catalog},
            limits,
            max_waiting,
            metrics,
            loader.responses.store,
            options.restarts,
        )

        def start(url: str) -> None:
            application.start()
            if on_started is not None:
                on_started(url)

        _run(application, sock, keys, start, options)


def _send_traces(
    endpoint: str | None, metrics: Mapping[str, Metrics], stack: contextlib.ExitStack
) -> None:
    """Send traces of the requests of models, by name, until `stack` ends."""
    if endpoint is None:
        return
    from .tracing import RequestTraces, export_to

    for name, counted in metrics.items():
        counted.traces = RequestTraces(name, export_to(endpoint))
        stack.callback(counted.traces.close)


def _run(
    application: Application | ModelsApplication,
    sock: socket.socket,
    keys: KeyStore,
    on_started: Callable[[str], None] | None,
    options: ServerOptions,
) -> None:
    with contextlib.closing(application):
        policy = options.policy or AccessPolicy.for_socket(sock, keys)
        app = AccessMiddleware(application.app, policy, keys).with_cors()
        server = HttpServer(application.stop, app, on_started, options.limits, options.tls)
        # What is loaded stays: a collection that visits it holds the loop for 0.1 s.
        gc.collect()
        gc.freeze()
        asyncio.run(server.serve(sockets=[sock]))


PEER_CHECK_S = 0.1
RESERVED_FILES = 256  # of the limit of open files: ranks, logs, connections not yet accepted
MIN_CONNECTIONS = 16


class _HalfClosedTransport:
    """The transport to a client that sends no more.

    Such a client may be waiting for its response or be gone: the network only tells once it is sent
    something. So the first bytes of the response, which are always the same, are sent one by one
    until the others are there.
    """

    PREFIX = b"HTTP/1.1 "
    FACTOR = 3  # each byte comes so many times later than the one before

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._sent = 0  # of the prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def probe(self, waited_s: float) -> None:
        """Send the next byte of the prefix, if it is time."""
        due_s = PEER_CHECK_S * self.FACTOR**self._sent
        if self._sent < len(self.PREFIX) and waited_s >= due_s:
            self._transport.write(self.PREFIX[self._sent : self._sent + 1])
            self._sent += 1

    def is_gone(self) -> bool:
        """Whether the client has rejected what it was sent."""
        try:
            self._transport.get_extra_info("socket").getpeername()
        except OSError:
            return True
        return False

    def write(self, data: bytes) -> None:
        """Send the rest of the response's head, or what follows it."""
        self._transport.write(data[self._sent :])
        self._sent = 0


class _Connections:
    """The open connections, within the limits in all and for each address. One that is too many
    closes the oldest idle one, or is itself closed where none is idle."""

    def __init__(self, limits: Limits) -> None:
        files = max(MIN_CONNECTIONS, raise_limit() - RESERVED_FILES)
        self._max_all = min(limits.max_connections, files)
        self._max_per_address = min(limits.max_connections_per_address, self._max_all)
        self._open: dict[_TimedConnection | _Handshake, None] = {}  # the longest idle one first
        self._by_address: dict[str, dict[_TimedConnection | _Handshake, None]] = {}

    def add(self, connection: _TimedConnection | _Handshake) -> None:
        same = self._by_address.setdefault(connection.address, {})
        self._open[connection] = same[connection] = None
        for connections, limit in ((same, self._max_per_address), (self._open, self._max_all)):
            if len(connections) > limit:
                idle = (other for other in connections if other.is_idle and other is not connection)
                excess = next(idle, connection)
                self.discard(excess)
                excess.transport.abort()

    def touch(self, connection: _TimedConnection | _Handshake) -> None:
        """It has just been used."""
        for connections in (self._open, self._by_address.get(connection.address, {})):
            if connection in connections:
                connections[connection] = connections.pop(connection)

    def discard(self, connection: _TimedConnection | _Handshake) -> None:
        self._open.pop(connection, None)
        same = self._by_address.get(connection.address, {})
        same.pop(connection, None)
        if not same:
            self._by_address.pop(connection.address, None)


class _Handshake(SSLProtocol):
    """A TLS connection that counts among the idle ones until its handshake is done."""

    is_idle = True
    max_size = 1 << 14  # of its buffer, one TLS record; asyncio takes 256 kB for each connection

    def __init__(
        self, connections: _Connections, connection: _TimedConnection, **options: Any
    ) -> None:
        super().__init__(app_protocol=connection, **options)
        self._connections, self.address = connections, ""
        connection.on_connected = partial(connections.discard, self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        peer = transport.get_extra_info("peername")
        self.address = peer[0] if peer else ""
        self._connections.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.discard(self)
        super().connection_lost(exc)


class _TimedConnection(H11Protocol):
    """uvicorn's connection with two deadlines that it lacks: for a request's head, and for a client
    that does not read its response. A client that has closed its own side gets its response."""

    def __init__(
        self, limits: Limits, connections: _Connections, turns: Turns, **options: Any
    ) -> None:
        super().__init__(**options)
        self._limits, self._connections, self.address = limits, connections, ""
        self._turns = turns
        self.on_connected: Callable[[], None] | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._half_closed: _HalfClosedTransport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = self._input = PacedInput(transport, self._parse, self._turns)
        self.address = self.client[0] if self.client else ""
        self._start_timer("head", self._limits.head_timeout_s)
        if self.on_connected is not None:
            self.on_connected()
        self._connections.add(self)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        self._connections.touch(self)
        self._input.add(data)

    def _parse(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer("head")
        else:
            self._start_timer("head", self._limits.head_timeout_s)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more; True: it still gets its response."""
        cycle = self.cycle
        is_waiting = cycle is not None and not cycle.response_complete and not cycle.more_body
        if not is_waiting or self.scheme == "https":  # asyncio cannot close TLS by halves
            return False
        if self._half_closed is None:
            self._half_closed = _HalfClosedTransport(self.transport)
            cycle.transport = self._half_closed  # type: ignore[assignment]
            self._watch_half_closed(0.0)
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed is not None and self.cycle.response_complete:
            self.transport.close()

    def _watch_half_closed(self, waited_s: float) -> None:
        assert self._half_closed is not None
        if self._half_closed.is_gone():
            self.transport.abort()
            return
        if not self.cycle.response_started:
            self._half_closed.probe(waited_s)
        self._timers["half closed"] = self.loop.call_later(
            PEER_CHECK_S, self._watch_half_closed, waited_s + PEER_CHECK_S
        )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer("write", self._limits.write_timeout_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer("write")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connections.discard(self)
        for name in list(self._timers):
            self._stop_timer(name)

    def _start_timer(self, name: str, seconds: float) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _stop_timer(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


def _log_loop_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    connection_log.error("%s (%s)", context.get("message"), type(context.get("exception")).__name__)


class HttpServer(uvicorn.Server):
    """uvicorn that aborts running requests when it is told to stop, and returns.

    Args:
        on_stop: aborts them, for the reason given.
        asgi: the application.
        on_started: see `serve`.
        limits: of connections.
        tls: see `serve`.
    """

    def __init__(
        self,
        on_stop: Callable[[ClusterError], None],
        asgi: Any,
        on_started: Callable[[str], None] | None,
        limits: Limits,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._connections = _Connections(limits)
        super().__init__(
            uvicorn.Config(
                asgi,
                http=partial(_TimedConnection, limits, self._connections, Turns()),  # type: ignore[arg-type]
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=limits.keep_alive_s,
                timeout_graceful_shutdown=limits.shutdown_timeout_s,
                ssl_context_factory=(lambda *_: tls) if tls is not None else None,
            )
        )
        self._on_stop, self._on_started, self._tls = on_stop, on_started, tls
        self._handshake_timeout_s = limits.tls_handshake_timeout_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and report the address."""
        asyncio.get_running_loop().set_exception_handler(_log_loop_error)
        for logger in (connection_log, logging.getLogger("uvicorn.error")):
            logger.addFilter(_REPEATED_LINES)
        if self._tls is not None:
            loop: Any = asyncio.get_running_loop()
            loop.create_server = partial(self._create_tls_server, loop.create_server)
        await super().startup(sockets)
        scheme = "https" if self._tls is not None else "http"
        for sock in sockets or []:
            if self._on_started is not None:
                self._on_started(f"{scheme}://{format_address(*sock.getsockname()[:2])}")

    async def _create_tls_server(
        self, create_server: Any, make_connection: Callable[[], Any], **options: Any
    ) -> asyncio.Server:
        """Like asyncio's, but counts connections in their handshake."""
        handshake = {
            "loop": asyncio.get_running_loop(),
            "sslcontext": options.pop("ssl"),
            "waiter": None,
            "server_side": True,
            "ssl_handshake_timeout": self._handshake_timeout_s,
        }
        server: asyncio.Server = await create_server(
            lambda: _Handshake(self._connections, make_connection(), **handshake), **options
        )
        return server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Abort what runs, and close the connections."""
        self._on_stop(ClusterError("the server is shutting down"))
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but does not raise an obeyed signal again: the caller still has to close
        the model."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
