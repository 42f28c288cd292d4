"""Access control around the application: API keys, hosts, origins, limits, logs.

Owns: checking keys and the Host and Origin headers; limits per key and in total; the security
headers of every response; the access log and the text log. ASGI middleware.
Does not know: what a request asks for, models, how tokens are generated.
Invariant: where keys are required, a request without a valid one gets only the page's own files
and the status word of /health. Nothing that a client sent is logged unless that was asked for.
Next: `app.py` is the application inside; `auth.py` knows the keys.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import sys
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import Busy, CenacleError
from ..logs import LogFormat
from .access_policy import AccessPolicy
from .admission import Admissions
from .api import anthropic, openai
from .auth import ApiKey, KeyStore
from .generation import json_response

access_log = logging.getLogger("cenacle.access")
text_log = logging.getLogger("cenacle.text")
log = logging.getLogger(__name__)

MAX_LOGGED_TEXT_BYTES = 100_000  # of a body, and of an answer
STATIC_PREFIX = "/static/"  # the page's files; they hold no data

SECURITY_HEADERS = {
    # Pictures of a conversation are data: URIs.
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass
class _RequestLog:
    """What the logs will contain about a request."""

    start: float = field(default_factory=time.monotonic)
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
    """Checks each request against a policy.

    A request that passes has `scope["state"]["key"]`: the name of its key, or "" where none is
    required; and "api_key", an `ApiKey`, if it has one. The page's files and /health pass without a
    key, and then have no such entries.

    Args:
        app: the application inside.
        policy: who may use the server.
        keys: the existing keys.
    """

    def __init__(self, app: ASGIApp, policy: AccessPolicy, keys: KeyStore) -> None:
        self._app: ASGIApp = app
        self._policy, self._keys = policy, keys
        self._admissions = Admissions(keys, policy.max_concurrent, policy.max_concurrent_per_key)
        if policy.access_log:
            _log_to_stderr(access_log)
        if policy.log_text:
            _log_to_stderr(text_log)

    def with_cors(self) -> ASGIApp:
        """This middleware inside one that answers CORS preflight requests, which carry no key."""
        if not self._policy.cors_origins:
            return self
        return CORSMiddleware(
            self,
            allow_origins=self._policy.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            allow_private_network=True,  # browsers ask this of pages that are not on this network
            expose_headers=["retry-after"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record, policy = _RequestLog(), self._policy
        state = scope.setdefault("state", {})

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            elif policy.log_text:
                _append_limited(record.answer, message)
            await send(message)

        async def receive_and_log() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                _append_limited(record.body, message)
            return message

        try:
            await self._handle(
                scope, receive_and_log if policy.log_text else receive, send_with_headers
            )
        except _AccessDenied as denied:
            await _denial_response(scope["path"], denied)(scope, receive, send_with_headers)
        finally:
            self._save_counts()
            if policy.access_log:
                _log_access(scope, record, state.get("key"))
            if policy.log_text:
                text_log.info("request %s", _escape_text(record.body))
                text_log.info("response %s", _escape_text(record.answer))
        return None

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._check_host(headers)
        self._check_origin(headers)
        try:
            key = self._authenticate(scope, headers)
            if scope["method"] == "POST":
                self._check_budget(key)
        except CenacleError as error:
            log.error("%s", error)
            message = "API keys cannot be checked at present; the server's log has the reason"
            raise _AccessDenied(503, "keys_unavailable", message) from error
        if scope["method"] != "POST":
            return await self._app(scope, receive, send)
        try:
            admission = self._admissions.open(scope["state"]["key"], key)
        except Busy as error:
            retry = {"retry-after": str(error.retry_after_s)}
            raise _AccessDenied(429, "too_many_requests", str(error), retry) from error
        scope["state"]["admission"] = admission

        async def send_last_closed(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                admission.close()  # before the client can send its next request
            await send(message)

        try:
            return await self._app(scope, receive, send_last_closed)
        finally:
            admission.close()

    def _check_host(self, headers: Headers) -> None:
        hosts = self._policy.hosts
        if hosts is None:
            return
        host = headers.get("host", "")
        name = _host_name(host)
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
            f"The Host header: expected localhost or a loopback address, got {host[:80]!r}; to "
            f"allow this name, start the server with --allowed-host",
        )

    def _check_origin(self, headers: Headers) -> None:
        """Browsers name the page that sends a request; simple requests need no preflight."""
        origin, allowed = headers.get("origin"), self._policy.cors_origins
        if origin is None or origin in allowed or "*" in allowed:
            return
        try:
            if urlsplit(origin).netloc == headers.get("host"):
                return
        except ValueError:
            pass
        raise _AccessDenied(
            403,
            "origin_not_allowed",
            f"The Origin header: pages of {origin[:80]!r} may not use this server; to allow them, "
            f"start it with --cors-origin",
        )

    def _authenticate(self, scope: Scope, headers: Headers) -> ApiKey | None:
        secret = _read_api_key(headers)
        key = self._keys.find(secret) if secret else None
        if key is not None:
            scope["state"] |= {"key": key.name, "api_key": key}
        elif not self._policy.require_key:
            scope["state"]["key"] = ""
        elif not _is_public(scope):
            problem = "is not valid" if secret else "is missing"
            raise _AccessDenied(
                401,
                "invalid_api_key",
                f"The API key {problem}; send one as Authorization: Bearer KEY or x-api-key: KEY",
                {"www-authenticate": "Bearer"},
            )
        return key

    def _check_budget(self, key: ApiKey | None) -> None:
        if key is None or key.tokens_per_day is None:
            return
        if self._keys.used_today(key.name) >= key.tokens_per_day:
            raise _AccessDenied(
                429,
                "insufficient_quota",
                f"The API key has used its {key.tokens_per_day} tokens of this day (UTC)",
                {"retry-after": str(self._keys.seconds_until_reset())},
            )

    def _save_counts(self) -> None:
        try:
            self._keys.save()
        except CenacleError as error:
            log.error("%s", error)


def _is_public(scope: Scope) -> bool:
    path = scope["path"]
    public = path in ("/", "/favicon.ico", "/health") or path.startswith(STATIC_PREFIX)
    return public and scope["method"] in ("GET", "HEAD")


def _read_api_key(headers: Headers) -> str | None:
    """The key of a request, as OpenAI's or as Anthropic's clients send it."""
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and secret.strip():
        return secret.strip()
    return headers.get("x-api-key")


_HOST = re.compile(r"(?:\[([^][]*)\]|([^][:]*))(?::[0-9]*)?")


def _host_name(host: str) -> str:
    """A Host header without its port and brackets; what is none stays as it is."""
    match = _HOST.fullmatch(host)
    return (match[1] or match[2] or "").lower() if match else host


def _denial_response(path: str, denied: _AccessDenied) -> Response:
    """The error in the form of the API that the path belongs to."""
    status, message = denied.status, str(denied)
    if path.startswith("/v1/messages"):
        body = anthropic.error_object(status, message)
    else:
        error_types = {429: "rate_limit_error", 503: "server_error"}
        error_type = error_types.get(status, "invalid_request_error")
        body = openai.error_object(message, None, denied.code, error_type)
    return json_response(status, body, denied.headers)


def _log_access(scope: Scope, record: _RequestLog, key: str | None) -> None:
    # A path that does not exist, or not for this method, can be anything that a client made up.
    path = scope["path"] if "endpoint" in scope and record.status not in (404, 405) else "-"
    fields = {
        "client": (scope.get("client") or ("-",))[0],
        "key": key or "-",
        "method": scope["method"][:10],
        "path": path,
        "status": record.status,
        "duration_ms": round(1000 * (time.monotonic() - record.start)),
    }
    line = "%s key=%s %s %s %d %d ms"
    access_log.info(line, *fields.values(), extra={"fields": fields})


def _append_limited(text: bytearray, message: Message) -> None:
    text += message.get("body", b"")[: max(0, MAX_LOGGED_TEXT_BYTES - len(text))]


def _escape_text(text: bytearray) -> str:
    # On one line: what a client sent must not look like other lines of the log.
    return ascii(text.decode("utf-8", "replace"))


def _log_to_stderr(logger: logging.Logger) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormat.formatter("%(asctime)s %(name)s %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
