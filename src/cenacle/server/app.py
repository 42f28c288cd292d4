"""The HTTP server: OpenAI's endpoints and the truth about the group, on one socket.

Owns: the listening socket, the endpoints, deadlines and sizes of what clients send, and each
request's way from its body to its last byte.
Does not know: the API's parameters and shapes (`openai.py`), ranks, MLX.
Invariant: whatever ends an HTTP request, its places in the group are freed; every wait has a
deadline; no text of prompts or answers is logged; /health is 200 only while the group works.
Read `Answering` first: it is one request's life. Next: `engine/lockstep.py`, which calls the sinks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import signal
import socket
import ssl
import threading
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .. import __version__
from ..engine.lockstep import Group, Sink
from ..engine.text import TextStream
from ..errors import CenacleError, ClusterError, InputError, RankLost
from ..request import Request, TokenEvent
from . import openai
from .auth import Keys
from .guard import Guard, Policy

if TYPE_CHECKING:
    from ..api import Model  # loads MLX, and `bind` is to answer at once

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a client may cost.

    Args:
        body_bytes: largest body.
        body_s: seconds in which a body must have come.
        head_s: seconds in which a request's head must have come.
        write_s: seconds for which a client may leave a full send buffer unread.
        handshake_s: seconds in which a connection's TLS must be agreed on.
        idle_s: seconds that a connection is kept between requests.
        answer_s: seconds without a token after which an answer is given up; the group has a
            shorter deadline of its own.
        close_s: seconds that running requests get to end when the server is told to.
        drained_bytes: how much of a body that is too large is read and thrown away, so that a
            client which sends before it listens gets to see the refusal.
    """

    body_bytes: int = 10_000_000
    body_s: float = 30.0
    head_s: float = 30.0
    write_s: float = 60.0
    handshake_s: float = 10.0
    idle_s: int = 75
    answer_s: float = 900.0
    close_s: int = 5
    drained_bytes: int = 100_000_000


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
        raise _no_socket(host, port, error) from error
    return sock


def _no_socket(host: str, port: int, error: Exception) -> InputError:
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
    policy: Policy | None = None,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Answer requests until SIGTERM or SIGINT; the socket is closed then, the model is not.

    When the group fails the server stays, and says so to everyone who asks.

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
    limits = limits or Limits()
    with (
        contextlib.closing(sock),
        contextlib.closing(Keys()) as keys,
        contextlib.closing(Api(model, limits)) as api,
    ):
        guard = Guard(api.app, policy or Policy.of(sock, keys), keys)
        server = _Server(api, guard, on_started or (lambda _: None), limits, tls)
        asyncio.run(server.serve(sockets=[sock]))


class Api:
    """The endpoints over one model; `app` is the ASGI application.

    Args:
        model: loaded.
        limits: what a client may cost.

    Raises:
        CheckpointError: the model has no tokenizer.
    """

    def __init__(self, model: Model, limits: Limits) -> None:
        self._model, self._limits = model, limits
        self._text = model.text
        spec = model.spec
        self._served = openai.Served(model.name, spec.context, spec.vocabulary)
        self._created = int(time.time())
        parts = (__version__, model.name, spec.to_json(), model.plan.nodes)
        self._fingerprint = "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]
        self._answering: set[Answering] = set()
        self._ending: ClusterError | None = None
        # In a thread: a long prompt takes a while, and others' streams must go on. One thread:
        # tokenizers are not made for several at once.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._one_model),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completions, methods=["POST"]),
            ],
            exception_handlers={HTTPException: _http_error},
        )
        self.app.router.redirect_slashes = False

    def end(self, error: ClusterError) -> None:
        """Tell all who are being answered, and who ask from now on, that the server ends."""
        self._ending = error
        for answering in self._answering:
            answering.tell(error)

    def close(self) -> None:
        """End the tokenizing thread."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def _health(self, http: HttpRequest) -> Response:
        if "key" not in http.scope["state"]:  # for load balancers: nothing but the truth
            failed = self._model.group.failure is not None
            return _json(503 if failed else 200, {"status": "failed" if failed else "ok"})
        group, ranks = self._model.group, self._model.ranks
        if (failure := group.failure) is not None:
            body: dict[str, Any] = {"status": "failed", "reason": str(failure)}
            if isinstance(failure, RankLost):
                body["rank"] = failure.rank
            return _json(503, {**body, "model": self._served.model})
        who = [
            {"rank": rank, "pid": pid, "device": ready.get("device")}
            for rank, (pid, ready) in enumerate(zip(ranks.pids, ranks.ready, strict=True))
        ]
        body = {"status": "ok", "model": self._served.model, "nodes": self._model.plan.nodes}
        return _json(200, {**body, "ranks": who, **group.load})

    async def _models(self, _: HttpRequest) -> Response:
        data = [openai.model_object(self._served, self._created)]
        return _json(200, {"object": "list", "data": data})

    async def _one_model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        if name == self._served.model:
            return _json(200, openai.model_object(self._served, self._created))
        return _refusal(openai.no_model(name, self._served))

    async def _chat(self, http: HttpRequest) -> Response:
        return await self._answer("chat", http)

    async def _completions(self, http: HttpRequest) -> Response:
        return await self._answer("text", http)

    async def _answer(self, kind: openai.Kind, http: HttpRequest) -> Response:
        try:
            body = await self._body(http)
            prepare = partial(self._prepare, kind, body, http.scope["state"]["key"])
            loop = asyncio.get_running_loop()
            asked, drafts = await loop.run_in_executor(self._tokenizing, prepare)
        except ClientDisconnect:
            return Response()  # nobody is there to read it
        except Exception as error:
            return _refusal(error)
        if (failure := self._ending or self._model.group.failure) is not None:
            return _refusal(failure)  # not raised: it would gather a traceback for every request
        model, now = self._served.model, int(time.time())
        reply = openai.Reply(asked, uuid.uuid4().hex, now, model, self._fingerprint)
        return Answering(reply, drafts, self._model.group, self._answering, self._limits.answer_s)

    async def _body(self, http: HttpRequest) -> bytes:
        limit, declared = self._limits.body_bytes, http.headers.get("content-length", "0")
        too_large = int(declared) > limit if declared.isdigit() else False
        if too_large and "expect" in http.headers:
            raise _TooLarge(limit)  # the client has not begun to send
        body, thrown_away = bytearray(), 0
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for piece in http.stream():
                    if too_large or len(body) + len(piece) > limit:
                        too_large = True
                        thrown_away += len(body) + len(piece)
                        body.clear()
                        if thrown_away > self._limits.drained_bytes:
                            break
                    else:
                        body += piece
        except TimeoutError:
            if too_large:
                raise _TooLarge(limit) from None
            raise _TooSlow(self._limits.body_s) from None
        if too_large:
            raise _TooLarge(limit)
        return bytes(body)

    def _prepare(
        self, kind: openai.Kind, body: bytes, key: str
    ) -> tuple[openai.Asked, list[_Draft]]:
        """The checked requests of a body. Slow: tokenizes."""
        asked = openai.read(kind, body, self._served)
        drafts: list[_Draft] = []
        for prompt in asked.prompts:
            # A plain prompt is not rendered as a chat, as `Model.request` would.
            ids = self._text.encode(prompt) if isinstance(prompt, str) else prompt
            tokens = self._model.tokens_of(ids)
            room = openai.room(len(tokens), self._served, asked.prompt_field)
            limits = [n for n in (asked.max_tokens, room) if n is not None]
            for choice in range(asked.n):
                sampling = asked.sampling_of(choice)
                request = self._model.request(tokens, min(limits, default=None), sampling)
                request = replace(request, key=key)
                counted = len(tokens) if choice == 0 else 0
                drafts.append(_Draft(len(drafts), request, counted, self._text.stream(asked.stop)))
        return asked, drafts


@dataclass
class _Draft:
    """One choice while it is being written.

    Args:
        index: among the choices of one HTTP request.
        request: what the group is asked.
        prompt_tokens: to be counted: 0 if another choice has the same prompt.
        text: from tokens to text.
    """

    index: int
    request: Request
    prompt_tokens: int
    text: TextStream
    tokens: int = 0
    finish: str | None = None
    pieces: list[str] = field(default_factory=list)


class Answering(Response):
    """One HTTP request's choices while the group generates them; an ASGI response.

    From `__call__` on it holds places in the group, and gives them back whatever happens: the
    answer is complete, the client has left, the group has failed, the server ends.

    Args:
        reply: makes the objects that are sent.
        drafts: the choices, not yet submitted.
        group: generates.
        register: where it is found while it runs, for `tell`.
        deadline_s: longest wait for a token.
    """

    def __init__(
        self,
        reply: openai.Reply,
        drafts: list[_Draft],
        group: Group,
        register: set[Answering],
        deadline_s: float,
    ) -> None:
        self._reply, self._drafts, self._group = reply, drafts, group
        self._register, self._deadline_s = register, deadline_s
        self._events: asyncio.Queue[tuple[_Draft, TokenEvent | CenacleError]] = asyncio.Queue()

    def tell(self, error: CenacleError) -> None:
        """End the answer with an error. Call it from the event loop's thread."""
        self._events.put_nowait((self._drafts[0], error))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until done or until the client has left."""
        stream = self._reply.asked.stream
        work = asyncio.create_task(
            self._stream(send) if stream else self._whole(scope, receive, send)
        )
        gone = asyncio.create_task(_disconnected(receive))
        self._register.add(self)
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._register.discard(self)
            for draft in self._drafts:
                self._group.cancel(draft.request.id)
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._generate()) as generated:
                async for draft, piece in generated:
                    draft.pieces.append(piece)
            choices = [
                openai.Choice(d.index, "".join(d.pieces), d.finish or "length")
                for d in self._drafts
            ]
            response = _json(200, self._reply.whole(choices, self._usage()))
        except Exception as error:
            response = _refusal(error)
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        async def say(data: dict[str, Any] | str | None) -> None:
            if data is not None:
                text = data if isinstance(data, str) else json.dumps(data)
                body = f"data: {text}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})

        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            for draft in self._drafts:
                await say(self._reply.opening(draft.index))
            async with aclosing(self._generate()) as generated:
                async for draft, piece in generated:
                    if piece:
                        await say(self._reply.piece(draft.index, piece))
                    if draft.finish is not None:
                        await say(self._reply.closing(draft.index, draft.finish))
            await say(self._reply.counted(self._usage()))
            await say("[DONE]")
        except Exception as error:  # too late for a status: the client is told in the stream
            await say(_error(error)[1])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _generate(self) -> AsyncGenerator[tuple[_Draft, str], None]:
        """Every token's text, until all choices are finished."""
        for draft in self._drafts:
            self._group.submit(draft.request, self._sink(draft))
        left = len(self._drafts)
        while left:
            draft, event = await self._next()
            if draft.finish is not None and isinstance(event, TokenEvent):
                continue  # was under way when a stop string ended the choice
            if isinstance(event, CenacleError):
                raise event
            draft.tokens += 1
            piece, draft.finish = draft.text.add(event.token), event.finish
            if event.finish is not None:
                piece += draft.text.end()
            if draft.text.stopped:
                draft.finish = "stop"
                self._group.cancel(draft.request.id)
            left -= draft.finish is not None
            yield draft, piece

    async def _next(self) -> tuple[_Draft, TokenEvent | CenacleError]:
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._events.get()
        except TimeoutError:
            raise ClusterError(f"no token came for {self._deadline_s:g} s") from None

    def _sink(self, draft: _Draft) -> Sink:
        """Called by the group's thread."""
        loop, put = asyncio.get_running_loop(), self._events.put_nowait

        def sink(event: TokenEvent | CenacleError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(put, (draft, event))

        return sink

    def _usage(self) -> dict[str, int]:
        prompts = sum(d.prompt_tokens for d in self._drafts)
        return openai.usage(prompts, sum(d.tokens for d in self._drafts))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _TooLarge(openai.Refused):
    def __init__(self, limit: int) -> None:
        message = f"The body: expected at most {limit} bytes, got more"
        super().__init__(message, None, "body_too_large", 413)


class _TooSlow(openai.Refused):
    def __init__(self, seconds: float) -> None:
        message = f"The body: expected all of it within {seconds:g} s, got a part"
        super().__init__(message, None, "body_too_slow", 408)


def _error(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and body for any error."""
    if not isinstance(error, CenacleError):
        # Neither its message nor the lines of code: they may hold a client's text.
        where = traceback.extract_tb(error.__traceback__)[-1:]
        at = "".join(f" at {frame.filename}:{frame.lineno}" for frame in where)
        log.error("internal error: %s%s", type(error).__name__, at)
        error = CenacleError("The server made a mistake; its log says where")
    return openai.failure(error)


def _refusal(error: Exception) -> Response:
    # What is left of a body that was not read would be taken for the next request.
    unread = isinstance(error, _TooLarge | _TooSlow)
    return _json(*_error(error), {"connection": "close"} if unread else None)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return _refusal(error)
    what, headers = f"{http.method} {http.url.path[:200]}", Headers(error.headers)
    if error.status_code == 404:
        body = openai.error_object(f"{what}: no such path", None, "unknown_url")
    elif error.status_code == 405:
        message = f"{what}: not allowed here; use {headers.get('allow')}"
        body = openai.error_object(message, None, "method_not_allowed")
    else:
        body = openai.error_object(error.detail)
    return _json(error.status_code, body, dict(headers))


def _json(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    # ASCII: a name that a client sent may hold half of a surrogate pair.
    return Response(json.dumps(body), status, headers, "application/json")


class _Connection(H11Protocol):
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


class _Server(uvicorn.Server):
    """uvicorn, which ends what it is doing when it is told to end, and returns."""

    def __init__(
        self,
        api: Api,
        guard: Guard,
        on_started: Callable[[str], None],
        limits: Limits,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                guard.with_cors(),
                http=partial(_Connection, limits),  # type: ignore[arg-type]
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
