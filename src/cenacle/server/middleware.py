"""The door of the server: who may ask, how much at once, and what every answer carries.

Owns: the check of keys, hosts and origins; limits per key and in all; the headers of every
response; the access log. ASGI middleware around the application.
Does not know: what is asked, models, how tokens are made.
Invariant: where keys are demanded nothing but the page's own files and the one word of /health is
given without a valid one; nothing that a client sent is logged unless that was asked for.
Next: `app.py`, which it surrounds; `auth.py`, which knows the keys.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import CenacleError, InputError
from .api.openai import error_object
from .auth import ApiKey, KeyStore

access_log = logging.getLogger("cenacle.access")
text_log = logging.getLogger("cenacle.text")
log = logging.getLogger(__name__)

MAX_LOGGED_TEXT_BYTES = 100_000  # bytes of a body and of an answer that --log-text keeps
STATIC_PREFIX = "/static/"  # where the page's files are; they hold no data

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class AccessPolicy:
    """Who may ask, and how much at once.

    Args:
        require_key: every request needs a key.
        hosts: names that a request's Host header may have besides loopback's; None: any. A page
            elsewhere can make a browser ask this machine under that page's own name (DNS
            rebinding); where no key protects the server only the name gives it away.
        cors_origins: pages of these origins may ask from browsers; "*": all.
        streams: requests that are answered at once, in all.
        streams_per_key: the same for each key that has no limit of its own.
        access_log: log a line for each request: key, path, status, time; no text.
        log_text: log prompts and answers.
    """

    require_key: bool = False
    hosts: frozenset[str] | None = frozenset()
    cors_origins: tuple[str, ...] = ()
    streams: int = 256
    streams_per_key: int = 64
    access_log: bool = False
    log_text: bool = False

    @classmethod
    def for_socket(cls, sock: socket.socket, keys: KeyStore, **given: Any) -> AccessPolicy:
        """What is right for where a socket listens: beyond loopback keys are required.

        Args:
            sock: bound.
            keys: those that there are.
            given: fields; `hosts` are added to the address that the socket has.

        Raises:
            InputError: keys are required, and there is none.
        """
        address = sock.getsockname()[0].partition("%")[0]
        open_to_others = not ipaddress.ip_address(address).is_loopback
        required = given.pop("require_key", False) or open_to_others
        if required and not keys.all():
            where = f"on {address}, beyond this machine," if open_to_others else "with keys only"
            raise InputError(
                f"to listen {where} the server needs an API key, and there is none; make one with "
                f"`cenacle keys add NAME`",
                "require-key",
            )
        named = frozenset(h.lower() for h in given.pop("hosts", ()))
        return cls(required, None if open_to_others else named, **given)


@dataclass
class _RequestLog:
    """A request on its way: what the log will say of it."""

    began: float = field(default_factory=time.monotonic)
    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    answer: bytearray = field(default_factory=bytearray)


class _AccessDenied(Exception):
    def __init__(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class AccessMiddleware:
    """The middleware.

    A request that may pass has `scope["state"]["key"]`: its key's name, or "" where none is
    needed. The page's files and /health pass without one, and then have no such entry.

    Args:
        app: what it surrounds.
        policy: who may pass.
        keys: those that there are.
    """

    def __init__(self, app: ASGIApp, policy: AccessPolicy, keys: KeyStore) -> None:
        self._app: ASGIApp = app
        self._policy, self._keys = policy, keys
        self._streams: Counter[str] = Counter()
        if policy.access_log:
            _log_to_stderr(access_log)
        if policy.log_text:
            _log_to_stderr(text_log)

    def with_cors(self) -> ASGIApp:
        """Itself, inside what answers browsers' questions before a request from another origin;
        those carry no key."""
        if not self._policy.cors_origins:
            return self
        return CORSMiddleware(
            self,
            allow_origins=self._policy.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["retry-after"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        passing, policy = _RequestLog(), self._policy

        async def said(message: Message) -> None:
            if message["type"] == "http.response.start":
                passing.status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            elif policy.log_text:
                _append_limited(passing.answer, message)
            await send(message)

        async def heard() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                _append_limited(passing.body, message)
            return message

        state = scope.setdefault("state", {})
        try:
            await self._pass(scope, heard if policy.log_text else receive, said)
        except _AccessDenied as denied:
            await _denial_response(scope["path"], denied)(scope, receive, said)
        finally:
            self._save()
            if policy.access_log:
                _log_access(scope, passing, state.get("key"))
            if policy.log_text:
                text_log.info("asked %s", _escape_text(passing.body))
                text_log.info("answered %s", _escape_text(passing.answer))
        return None

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._check_host(headers)
        self._check_origin(headers)
        try:
            key = self._key(scope, headers)
            if scope["method"] == "POST":
                self._check_budget(key)
        except CenacleError as error:
            log.error("%s", error)
            message = "API keys cannot be checked now; the server's log says why"
            raise _AccessDenied(503, "keys_unavailable", message) from error
        if scope["method"] != "POST":
            return await self._app(scope, receive, send)
        name = scope["state"]["key"]
        most = key.streams if key is not None and key.streams else self._policy.streams_per_key
        if self._streams.total() >= self._policy.streams:
            raise _too_many_requests(f"the server answers {self._policy.streams} requests already")
        # Without keys all are one user's, who may take all there is.
        if name and self._streams[name] >= most:
            raise _too_many_requests(f"{most} requests with this key are being answered already")
        self._streams[name] += 1
        try:
            return await self._app(scope, receive, send)
        finally:
            self._streams[name] -= 1
            if not self._streams[name]:
                del self._streams[name]

    def _check_host(self, headers: Headers) -> None:
        hosts = self._policy.hosts
        if hosts is None:
            return
        given = headers.get("host", "")
        name = _host_name(given)
        if name in hosts or name == "localhost":
            return
        try:
            if ipaddress.ip_address(name).is_loopback:
                return
        except ValueError:
            pass
        raise _AccessDenied(
            403,
            "host_not_allowed",
            f"The Host header: expected localhost or an address of loopback, got {given[:80]!r}; "
            f"if the server is known by that name start it with --allowed-host",
        )

    def _check_origin(self, headers: Headers) -> None:
        """Browsers say which page asks, and send simple requests without asking first."""
        origin, origins = headers.get("origin"), self._policy.cors_origins
        if origin is None or origin in origins or "*" in origins:
            return
        try:
            if urlsplit(origin).netloc == headers.get("host"):
                return
        except ValueError:
            pass
        raise _AccessDenied(
            403,
            "origin_not_allowed",
            f"The Origin header: pages of {origin[:80]!r} may not ask this server; "
            f"if they shall, start it with --cors-origin",
        )

    def _key(self, scope: Scope, headers: Headers) -> ApiKey | None:
        secret = _read_api_key(headers)
        key = self._keys.find(secret) if secret else None
        if key is not None:
            scope["state"]["key"] = key.name
        elif not self._policy.require_key:
            scope["state"]["key"] = ""
        elif not _is_public(scope):
            what = "is not valid" if secret else "is missing"
            raise _AccessDenied(
                401,
                "invalid_api_key",
                f"The API key {what}; send one as Authorization: Bearer KEY or x-api-key: KEY",
                {"www-authenticate": "Bearer"},
            )
        return key

    def _check_budget(self, key: ApiKey | None) -> None:
        if key is None or key.tokens_per_day is None:
            return
        used = self._keys.used(key.name)
        if used >= key.tokens_per_day:
            raise _AccessDenied(
                429,
                "insufficient_quota",
                f"The key's {key.tokens_per_day} tokens of this day (UTC) are used up",
                {"retry-after": str(self._keys.until_tomorrow_s())},
            )

    def _save(self) -> None:
        try:
            self._keys.save()
        except CenacleError as error:
            log.error("%s", error)


def _too_many_requests(why: str) -> _AccessDenied:
    return _AccessDenied(429, "too_many_requests", f"Too many at once: {why}", {"retry-after": "1"})


def _is_public(scope: Scope) -> bool:
    path = scope["path"]
    page = path in ("/", "/favicon.ico", "/health") or path.startswith(STATIC_PREFIX)
    return page and scope["method"] in ("GET", "HEAD")


def _read_api_key(headers: Headers) -> str | None:
    """The key that came along: OpenAI's clients and Anthropic's send it differently."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and given.strip():
        return given.strip()
    return headers.get("x-api-key")


def _host_name(host: str) -> str:
    """A Host header without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


_ANTHROPIC_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "api_error",
}


def _denial_response(path: str, denied: _AccessDenied) -> Response:
    """In the form of the API that was asked."""
    body: dict[str, Any]
    if path.startswith("/v1/messages"):
        error = {"type": _ANTHROPIC_ERROR_TYPES[denied.status], "message": str(denied)}
        body = {"type": "error", "error": error}
    else:
        kind = {429: "rate_limit_error", 503: "server_error"}.get(
            denied.status, "invalid_request_error"
        )
        body = error_object(str(denied), None, denied.code, kind)
    return Response(json.dumps(body), denied.status, denied.headers, "application/json")


def _log_access(scope: Scope, passing: _RequestLog, key: str | None) -> None:
    # A path that nothing here has may be anything a client made up.
    path = scope["path"] if "endpoint" in scope and passing.status != 404 else "-"
    took = 1000 * (time.monotonic() - passing.began)
    client = (scope.get("client") or ("-",))[0]
    access_log.info(
        *("%s key=%s %s %s %d %.0f ms", client, key or "-", scope["method"][:10], path),
        *(passing.status, took),
    )


def _append_limited(text: bytearray, message: Message) -> None:
    text += message.get("body", b"")[: max(0, MAX_LOGGED_TEXT_BYTES - len(text))]


def _escape_text(text: bytearray) -> str:
    # In one line: what a client sent must not look like other lines of a log.
    return ascii(text.decode("utf-8", "replace"))


def _log_to_stderr(logger: logging.Logger) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
