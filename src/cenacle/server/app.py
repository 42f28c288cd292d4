"""The endpoints: OpenAI's and Anthropic's APIs, the state of the group, the web page.

Owns: the routes, and errors of HTTP in the form of the API that a path belongs to.
Does not know: an API's parameters and shapes (`api/`), sockets, access control, ranks, MLX.
Invariant: every wait has a deadline. No text of prompts or answers is logged. /health is 200 only
while the group works.
Next: `preparation.py` and `generation.py` are the life of a request.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .. import __version__
from ..errors import ClusterError
from ..images.fetch import ImageFetcher
from . import static
from .admission import Admission, QuotaUsed
from .api import anthropic, openai, openai_responses, openapi
from .api.protocol import ApiAdapter, ResponseMeta, ServedModel
from .api.validation import JsonObject, RequestError
from .cluster_view import ClusterView, group_state, usage_json
from .generation import (
    GenerationRun,
    InFlightChoice,
    error_response,
    json_response,
    wait_for_disconnect,
)
from .image_loading import ImageLoader
from .limits import Limits
from .metrics import InstrumentedGroup, Metrics
from .plan_info import PlanTracker
from .preparation import ImagesWantedError, RequestPreparer
from .preparation_queue import PreparationQueue
from .request_body import BodyTooLarge, BodyTooSlow, read_body
from .stored_responses import StoredResponseRoutes
from .supervisor import Restarts

if TYPE_CHECKING:
    from ..api import Model  # loads MLX, and `bind` has to work at once

T = TypeVar("T")

COUNT_TOKENS = anthropic.CountTokensAdapter()
ADAPTERS: dict[str, ApiAdapter] = {
    "/v1/chat/completions": openai.ChatCompletionsAdapter(),
    "/v1/completions": openai.CompletionsAdapter(),
    "/v1/responses": openai_responses.ResponsesAdapter(),
    "/v1/messages": anthropic.MessagesAdapter(),
}


# Of OpenAI's API and others', which clients try: part of the path, and what it is about.
_NOT_SERVED = {
    "/embeddings": "embedding model",
    "/rerank": "reranking model",
    "/audio/": "audio model",
    "/images/": "image model",
    "/moderations": "moderation model",
}


@cache
def _openapi_json() -> bytes:
    return json.dumps(openapi.openapi(__version__)).encode()


class Application:
    """The endpoints over one model; `app` is the ASGI application.

    Args:
        model: loaded.
        limits: what a client may use.
        metrics: counts requests and tokens.
        plan_tracker: describes the plan in use.
        names: of the model, for clients; "*": any. None: its own.
        restarts: of the server's process before; None: nobody counts them.
        responses: keeps responses of other models as well; None: of this one alone.

    Raises:
        CheckpointError: the model has no tokenizer.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits,
        metrics: Metrics,
        plan_tracker: PlanTracker,
        names: Sequence[str] = (),
        restarts: Restarts | None = None,
        responses: openai_responses.ResponsesAdapter | None = None,
    ) -> None:
        self._model, self._limits, self._metrics = model, limits, metrics
        self._plan_tracker, self._restarts = plan_tracker, restarts or Restarts()
        self._group = InstrumentedGroup(model.group, metrics)
        own_names = [name for name in dict.fromkeys(names) if name != "*"] or [model.name]
        self._served = self.served = ServedModel(
            name=own_names[0],
            context_length=model.spec.context_length,
            vocab_size=model.spec.vocab_size,
            aliases=tuple(own_names[1:]),
            any_name="*" in names,
            sampling_defaults=model.sampling_defaults,
            image_obstacle=model.image_obstacle,
        )
        model.text.isolate()
        settings = model.image_settings
        if settings is not None:
            largest = max(limits.max_body_bytes, limits.max_image_body_bytes)
            self._limits = limits = replace(limits, max_body_bytes=largest)
            max_pixels = max(settings.min_pixels, min(settings.max_pixels, limits.max_image_pixels))
            settings = replace(settings, max_pixels=max_pixels)
        fetcher = ImageFetcher(limits.image_hosts)
        self._images = ImageLoader(settings, fetcher) if settings is not None else None
        self._preparer = RequestPreparer(model, self._served, limits.max_messages)
        self._created = int(time.time())
        self._active_runs: set[GenerationRun] = set()
        self._stop_reason: ClusterError | None = None
        self._preparations = PreparationQueue()
        self._view = ClusterView(model, plan_tracker)
        responses = responses or openai_responses.ResponsesAdapter()
        self._adapters = {**ADAPTERS, "/v1/responses": responses}
        count = partial(self._preparer.count_tokens, COUNT_TOKENS)
        count_tokens = partial(self._answer_with_tokens, count)
        tokenize = partial(self._answer_with_tokens, self._preparer.tokenize)
        detokenize = partial(self._answer_with_tokens, self._preparer.detokenize)
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
                Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
                Route("/tokenize", tokenize, methods=["POST"]),
                Route("/v1/tokenize", tokenize, methods=["POST"]),
                Route("/detokenize", detokenize, methods=["POST"]),
                Route("/v1/detokenize", detokenize, methods=["POST"]),
                *StoredResponseRoutes(responses.store).routes(),
                *(
                    Route(path, partial(self._generate, adapter), methods=["POST"])
                    for path, adapter in self._adapters.items()
                ),
            ],
            exception_handlers={HTTPException: on_http_error},
        )
        self.app.router.redirect_slashes = False

    def stop(self, reason: ClusterError) -> None:
        """Abort running requests and refuse new ones, because the server shuts down."""
        self._stop_reason = reason
        for run in self._active_runs:
            run.abort(reason)

    def close(self) -> None:
        """End the threads."""
        self._view.close()
        self._model.text.close()
        self._preparations.close()
        if self._images is not None:
            self._images.close()

    async def _get_health(self, http: Request) -> Response:
        model, body = self._model, group_state(self._model)
        status = 200 if body["status"] == "ok" else 503
        if "key" not in http.scope["state"]:  # for load balancers
            return json_response(status, {"status": body["status"]})
        body |= {"model": self._served.name, **model.group.load}
        body |= {"pid": os.getpid(), "restarts": self._restarts.count}
        if self._restarts.reason:
            body["restart_reason"] = self._restarts.reason
        if status == 200:
            ranks = zip(model.ranks.pids, model.ranks.ready, strict=True)
            body["nodes"] = model.plan.nodes
            body["ranks"] = [
                {"rank": rank, "pid": pid, "device": ready.device}
                for rank, (pid, ready) in enumerate(ranks)
            ]
        return json_response(status, body)

    async def _get_cluster(self, http: Request) -> Response:
        query = http.query_params
        known = (query.get(name, "") for name in ("placement", "steps", "timeline"))
        view = self._view.to_json(*known)
        view["usage"] = usage_json(self._metrics.usage_by_key(), http.scope["state"]["key"])
        return json_response(200, view, {"cache-control": "no-store"})

    async def _get_metrics(self, http: Request) -> Response:
        text, media_type = self._metrics.render(http.headers.get("accept", ""))
        return Response(text, media_type=media_type)

    async def _get_openapi(self, _: Request) -> Response:
        # The first takes long, and no request may hold the event loop.
        body = await asyncio.to_thread(_openapi_json)
        return Response(body, media_type="application/json")

    async def _list_models(self, http: Request) -> Response:
        if not may_use(http, *self._served.names):
            return json_response(200, openai.list_of([]))
        return json_response(200, openai.model_list(self._served, self._created))

    async def _get_model(self, http: Request) -> Response:
        try:
            name = self._served.check_name(http.path_params["name"])
            check_access(http, *self._served.names)
        except RequestError as error:
            return path_error(error, http)
        return json_response(200, openai.model_object(self._served, name, self._created))

    async def _answer_with_tokens(
        self, function: Callable[[bytes], tuple[JsonObject, int]], http: Request
    ) -> Response:
        """What a function of the tokenizer gives for the body; its tokens are charged."""
        try:
            check_access(http, *self._served.names)
            body = await read_body(http, self._limits)
            key = http.scope["state"]["key"]
            response, tokens = await self._prepare(http, key, _respond, function, body)
        except ClientDisconnect:
            return Response()  # nobody reads it
        except Exception as error:
            return path_error(error, http)
        self._metrics.charge(key, tokens)
        return response

    async def _generate(self, adapter: ApiAdapter, http: Request) -> Response:
        try:
            check_access(http, *self._served.names)
            body, key = await read_body(http, self._limits), http.scope["state"]["key"]
            request, choices = await self._prepare(
                http, key, self._preparer.prepare, adapter, body, key
            )
            _admit(choices, http)
        except ClientDisconnect:
            return Response()  # nobody reads it
        except Exception as error:
            return path_error(error, http)
        if (failure := self._stop_reason or self._model.group.failure) is not None:
            # Not raised: the same error would collect a traceback per request.
            return path_error(failure, http)
        fingerprint = self._plan_tracker.current.fingerprint
        return GenerationRun(
            adapter,
            request,
            ResponseMeta(uuid.uuid4().hex, int(time.time()), request.model, fingerprint),
            choices,
            self._group,
            self._active_runs,
            self._limits.token_timeout_s,
            self._limits.stream_keep_alive_s,
        )

    async def _prepare(
        self, http: Request, key: str, function: Callable[..., T], *arguments: Any
    ) -> T:
        """Run a function that tokenizes, when it is the key's turn; again with the images that it
        asks for.

        Raises:
            ClientDisconnect: the client has gone; the work is dropped if it has not begun.
        """
        try:
            return await unless_disconnected(
                http, self._preparations.run(key, function, *arguments)
            )
        except ImagesWantedError as wanted:
            assert self._images is not None, "else they are refused"
            load = self._images.load(wanted.sources, key, wanted.field)
            images = await unless_disconnected(http, load)
        with_images = partial(function, images=images)
        return await unless_disconnected(http, self._preparations.run(key, with_images, *arguments))


async def unless_disconnected(http: Request, coroutine: Coroutine[Any, Any, T]) -> T:
    """The result, unless the client goes before.

    Raises:
        ClientDisconnect: it has; the work is cancelled.
    """
    work = asyncio.ensure_future(coroutine)
    disconnected = asyncio.ensure_future(wait_for_disconnect(http.receive))
    try:
        await asyncio.wait((work, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        disconnected.cancel()


def _respond(
    function: Callable[..., tuple[JsonObject, int]], body: bytes, **images: Any
) -> tuple[Response, int]:
    answer, tokens = function(body, **images)
    return json_response(200, answer), tokens  # not in the event loop, as it may be long


def _admit(choices: Sequence[InFlightChoice], http: Request) -> None:
    """Count the answers of a request, and reserve their tokens."""
    admission: Admission | None = http.scope["state"].get("admission")
    if admission is None or not choices:
        return
    admission.add_answers(len(choices) - 1)
    longest = max(choice.request.max_tokens for choice in choices)
    prompt_tokens = sum(choice.prompt_tokens for choice in choices)
    limit = admission.reserve_tokens(prompt_tokens, longest, len(choices))
    for choice in choices:
        max_tokens = min(choice.request.max_tokens, limit)
        choice.request = replace(choice.request, max_tokens=max_tokens)


def path_error(error: Exception, http: Request, headers: dict[str, str] | None = None) -> Response:
    """An error in the form of the API that the path belongs to."""
    is_anthropic = http.url.path.startswith("/v1/messages")
    adapter = ADAPTERS["/v1/messages" if is_anthropic else "/v1/chat/completions"]
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        # The rest of the body would be taken for the next request.
        headers = {"connection": "close"}
    if isinstance(error, QuotaUsed):
        headers = {"retry-after": str(error.retry_after_s)}
    return error_response(error, adapter, headers)


def may_use(http: Request, *names: str) -> bool:
    """Whether the request's API key may use the model that has these names."""
    key = http.scope["state"].get("api_key")
    return key is None or key.may_use(*names)


def check_access(http: Request, *names: str) -> None:
    """Refuse a request whose API key may not use the model that has these names.

    Raises:
        RequestError: it may not.
    """
    if not may_use(http, *names):
        reason = f"this API key may not use {names[0]!r}; GET /v1/models lists those that it may"
        raise RequestError("model", reason, "model_not_allowed", 403)


async def on_http_error(http: Request, error: Exception) -> Response:
    """A path that does not exist, or not for this method, in the form of its API."""
    if not isinstance(error, HTTPException):
        return path_error(error, http)
    request, headers = f"{http.method} {http.url.path[:200]}", Headers(error.headers)
    message, code = error.detail, None
    if error.status_code == 404:
        kind = next((k for p, k in _NOT_SERVED.items() if p in http.url.path), None)
        reason = f"; this server generates text and has no {kind}" if kind else ""
        message, code = f"{request}: no such path{reason}", "unknown_url"
    elif error.status_code == 405:
        message = f"{request}: method not allowed; use {headers.get('allow')}"
        code = "method_not_allowed"
    return path_error(RequestError(None, message, code, error.status_code), http, dict(headers))
