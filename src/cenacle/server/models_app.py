"""The endpoints over several models: each request goes to the one that it names.

Owns: the routes of a server whose models are loaded on demand; which model a request means; signs
of life while it is loaded.
Does not know: when models are loaded and unloaded (`model_pool.py`), what the endpoints do
(`app.py`, one for each loaded model).
Invariant: a model stays loaded until the last byte of a response. Every wait has a deadline; a
client that goes ends its own wait and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from .. import __version__
from ..errors import Busy, CenacleError, ClusterError
from . import static
from .api import openai, openai_responses, openapi
from .api.protocol import ServedModel
from .api.response_store import ResponseStore
from .api.validation import JsonObject, RequestError, RequestModel, Text, describe, parse_request
from .app import ADAPTERS, check_access, may_use, on_http_error, path_error
from .cluster_view import group_state
from .generation import (
    KEEP_ALIVE,
    STREAM_HEADERS,
    json_response,
    server_sent_event,
    to_client_error,
    wait_for_disconnect,
)
from .limits import Limits
from .loaded_model import LoadedApplication
from .metrics import ModelsMetrics
from .model_catalog import ModelEntry
from .model_pool import LoadedModel, ModelPool
from .request_body import read_body
from .stored_responses import StoredResponseRoutes
from .supervisor import Restarts

_POST_PATHS = (
    *ADAPTERS,
    "/v1/messages/count_tokens",
    "/tokenize",
    "/v1/tokenize",
    "/detokenize",
    "/v1/detokenize",
)


class _Addressed(RequestModel):
    """What of any request decides where it goes."""

    model: Text | None = None
    stream: Any = False


class ModelsApplication:
    """The endpoints over a pool of models; `app` is the ASGI application.

    Args:
        pool: of models.
        catalog: the same models, by name.
        names: of each for clients; "*" in that of the default: any other name is the default.
        limits: what a client may use.
        max_waiting: most requests that wait for one model to be loaded.
        metrics: of all models.
        responses: kept by the Responses API of all models.
        restarts: of the server's process before.
    """

    def __init__(
        self,
        pool: ModelPool,
        catalog: Mapping[str, ModelEntry],
        names: Mapping[str, Sequence[str]],
        limits: Limits,
        max_waiting: int,
        metrics: ModelsMetrics,
        responses: ResponseStore,
        restarts: Restarts | None = None,
    ) -> None:
        self._pool, self._catalog, self._metrics = pool, catalog, metrics
        self._max_waiting, self._restarts = max_waiting, restarts or Restarts()
        self._limits = replace(
            limits, max_body_bytes=max(limits.max_body_bytes, limits.max_image_body_bytes)
        )
        self._ids = {
            name: tuple(id for id in names[name] if id != "*") or (name,) for name in pool.names
        }
        self._models = {id: name for name, ids in self._ids.items() for id in ids}
        self._any_name = any("*" in ids for ids in names.values())
        self._served = {name: entry.served for name, entry in catalog.items()}
        self._created = int(time.time())
        self._openapi = json.dumps(openapi.openapi(__version__)).encode()
        self.app = Starlette(
            routes=[
                *static.routes(),
                Route("/cluster", self._get_cluster),
                Route("/health", self._get_health),
                Route("/metrics", self._get_metrics),
                Route("/openapi.json", self._get_openapi),
                Route("/v1/models", self._list_models),
                Route("/v1/models/", self._list_models),
                Route("/v1/models/{name:path}", self._get_model),
                *StoredResponseRoutes(responses).routes(),
                *(Route(path, self._answer, methods=["POST"]) for path in _POST_PATHS),
            ],
            exception_handlers={HTTPException: on_http_error},
        )
        self.app.router.redirect_slashes = False

    def start(self) -> None:
        """Begin to load models; in the event loop."""
        self._pool.start()

    def stop(self, reason: ClusterError) -> None:
        """Abort running requests and loads, and refuse new ones, because the server shuts down."""
        self._pool.stop(reason)

    def close(self) -> None:
        """Unload all models; when the event loop has ended."""
        self._pool.close()

    # ---- Which model --------------------------------------------------------------------------

    def _find(self, id: str | None, http: Request) -> str:
        """The model that a client means.

        Raises:
            RequestError: there is none of this name, or its key may not use it.
        """
        allowed = [name for name in self._pool.names if self._may_use(name, http)]
        if id in self._models:
            name = self._models[id]
            check_access(http, *dict.fromkeys((*self._ids[name], name)))
            return name
        if not allowed:
            reason = "this API key may use none of this server's models"
            raise RequestError("model", reason, "model_not_allowed", 403)
        if not id or self._any_name:
            return allowed[0]
        served = " or ".join(repr(id) for name in allowed for id in self._ids[name])
        reason = f"{describe(id)} does not exist; this server has {served}"
        raise RequestError("model", reason, "model_not_found", 404)

    def _may_use(self, name: str, http: Request) -> bool:
        return may_use(http, name, *self._ids[name])

    def _facts(self, name: str) -> ServedModel:
        """What is known of a model: more once it has been loaded."""
        loaded = self._pool.loaded(name)
        if isinstance(loaded, LoadedApplication):
            self._served[name] = loaded.application.served
        return self._served[name]

    def _describe(self, name: str, id: str) -> JsonObject:
        status = self._pool.status(name)
        body = openai.model_object(self._facts(name), id, self._created)
        body |= {"state": status.state, "pinned": status.pinned}
        body |= {"running": status.running, "waiting": status.waiting}
        if status.reason:
            body["reason"] = status.reason
        if (weights_bytes := self._catalog[name].weights_bytes) is not None:
            body["size_bytes"] = weights_bytes
        return body | {"status": {"value": status.state}}  # llama.cpp

    # ---- State --------------------------------------------------------------------------------

    async def _list_models(self, http: Request) -> Response:
        names = [name for name in self._pool.names if self._may_use(name, http)]
        rows = [self._describe(name, id) for name in names for id in self._ids[name]]
        return json_response(200, openai.list_of(rows))

    async def _get_model(self, http: Request) -> Response:
        id = http.path_params["name"]
        try:
            name = self._find(id, http)
        except RequestError as error:
            return path_error(error, http)
        return json_response(200, self._describe(name, id))

    async def _get_health(self, http: Request) -> Response:
        if "key" not in http.scope["state"]:  # for load balancers
            return json_response(200, {"status": "ok"})
        rows = [self._health_of(name) for name in self._pool.names]
        last = self._pool.last_used
        body: JsonObject = {
            "status": "ok",
            "model": self._ids[last][0] if last is not None else None,
            "running": sum(row["running"] for row in rows),
            "waiting": sum(row["waiting"] for row in rows),
            "pid": os.getpid(),
            "restarts": self._restarts.count,
            "models": rows,
        }
        if self._restarts.reason:
            body["restart_reason"] = self._restarts.reason
        return json_response(200, body)

    def _health_of(self, name: str) -> JsonObject:
        status = self._pool.status(name)
        row: JsonObject = {
            "model": self._ids[name][0],
            "state": status.state,
            "since_s": round(status.since_s, 1),
            "pinned": status.pinned,
            "running": status.running,
            "waiting": status.waiting,
            "loads": status.loads,
            "unloads": status.unloads,
        }
        if status.reason:
            row["reason"] = status.reason
        loaded = self._pool.loaded(name)
        if isinstance(loaded, LoadedApplication):
            model = loaded.model
            row |= {"group": group_state(model), "pids": list(model.ranks.pids)}
            row["promised_bytes"] = loaded.promised_bytes
        return row

    async def _get_cluster(self, http: Request) -> Response:
        id = http.query_params.get("model")
        try:
            name = self._find(id, http) if id else self._pool.last_used
        except RequestError as error:
            return path_error(error, http)
        loaded = self._pool.loaded(name) if name is not None else None
        if loaded is not None:
            return _Forwarded(loaded)
        names = [n for n in self._pool.names if name in (None, n)]
        states = {self._ids[n][0]: self._pool.status(n).state for n in names}
        body: JsonObject = {
            "status": "idle",
            "model": self._ids[name][0] if name else None,
            "models": states,
        }
        return json_response(200, body, {"cache-control": "no-store"})

    async def _get_metrics(self, http: Request) -> Response:
        text, media_type = self._metrics.render(http.headers.get("accept", ""))
        return Response(text, media_type=media_type)

    async def _get_openapi(self, _: Request) -> Response:
        return Response(self._openapi, media_type="application/json")

    # ---- Requests for a model -----------------------------------------------------------------

    async def _answer(self, http: Request) -> Response:
        try:
            body = await read_body(http, self._limits)
            # In a thread, as it may be long.
            addressed = await asyncio.to_thread(partial(parse_request, _Addressed), body)
            name = self._find(addressed.model, http)
            if self._pool.status(name).waiting >= self._max_waiting:
                raise Busy(f"{self._max_waiting} requests wait for {name} to be loaded", 10)
        except ClientDisconnect:
            return Response()  # nobody reads it
        except Exception as error:
            return path_error(error, http)
        streams = addressed.stream is True and http.url.path in ADAPTERS
        keep_alive_s = self._limits.stream_keep_alive_s if streams else None
        return _ModelCall(self._pool, name, body, http, keep_alive_s)


class _Forwarded(Response):
    """The response of a loaded model's own endpoints."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._loaded.app(dict(scope), receive, send)


class _ModelCall(Response):
    """Waits until a model is loaded, and then is the response of its endpoints.

    Args:
        pool: has the model.
        name: of it.
        body: of the request, which was read.
        http: the request.
        keep_alive_s: longest silence in a stream; None: the response is none.
    """

    def __init__(
        self, pool: ModelPool, name: str, body: bytes, http: Request, keep_alive_s: float | None
    ) -> None:
        self._pool, self._name, self._body, self._http = pool, name, body, http
        self._keep_alive_s = keep_alive_s
        self._is_begun = False  # the head of the response was sent, with signs of life
        self._status = 200
        self._error = bytearray()  # body of an error that comes after that

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond, until all is sent or the client has disconnected."""
        try:
            loaded = await self._wait(receive, send)
        except CenacleError as error:
            if self._is_begun:
                await self._send_error(path_error(error, self._http).body, send)
            else:
                await path_error(error, self._http)(scope, receive, send)
            return
        if loaded is None:
            return
        has_body = True

        async def receive_again() -> Message:
            nonlocal has_body
            if not has_body:
                return await receive()
            has_body = False
            return {"type": "http.request", "body": self._body, "more_body": False}

        try:
            await loaded.app(dict(scope), receive_again, partial(self._send, send))
        except Exception as error:
            if not self._is_begun:
                raise
            response = path_error(to_client_error(error), self._http)
            await self._send_error(response.body, send)
        finally:
            self._pool.release(self._name)

    async def _wait(self, receive: Receive, send: Send) -> LoadedModel | None:
        """The model, which is to be released; None: the client has gone."""
        acquired = asyncio.ensure_future(self._pool.acquire(self._name))
        disconnected = asyncio.ensure_future(wait_for_disconnect(receive))
        is_taken = False
        try:
            while not acquired.done():
                await asyncio.wait(
                    (acquired, disconnected),
                    timeout=self._keep_alive_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if acquired.done():
                    break
                if disconnected.done():
                    return None
                await self._keep_alive(send)
            is_taken = True
            return acquired.result()
        finally:
            disconnected.cancel()
            if not is_taken:
                acquired.cancel()
                acquired.add_done_callback(self._release_model)

    def _release_model(self, acquired: asyncio.Future[LoadedModel]) -> None:
        if not acquired.cancelled() and acquired.exception() is None:
            self._pool.release(self._name)

    async def _keep_alive(self, send: Send) -> None:
        if not self._is_begun:
            self._is_begun = True
            headers = list(STREAM_HEADERS)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})

    async def _send(self, send: Send, message: Message) -> None:
        """Send what the model's endpoints send; after signs of life an error is an event."""
        if not self._is_begun:
            await send(message)
        elif message["type"] == "http.response.start":
            self._status = message["status"]
        elif self._status == 200:
            await send(message)
        else:
            self._error += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_error(bytes(self._error), send)

    async def _send_error(self, body: bytes | memoryview, send: Send) -> None:
        data: JsonObject = json.loads(bytes(body))
        event = _error_event(self._http.url.path, data)
        await send({"type": "http.response.body", "body": event, "more_body": False})


def _error_event(path: str, body: JsonObject) -> bytes:
    """An error as the only event of a stream, in the form of the API that the path belongs to."""
    if path.startswith("/v1/messages"):
        return server_sent_event(("error", body))
    if path.startswith("/v1/responses"):
        error = body["error"]
        return server_sent_event(("error", openai_responses.error_event(error)))
    return server_sent_event((None, body))
