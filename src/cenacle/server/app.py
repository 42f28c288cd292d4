"""The HTTP server: OpenAI's and Anthropic's endpoints and the truth about the group, on one socket.

Owns: the listening socket, the endpoints, deadlines and sizes of what clients send, and each
request's way from its body to the group's requests.
Does not know: the APIs' parameters and shapes (`openai.py`, `responses.py`, `anthropic.py`), ranks,
MLX.
Invariant: every wait has a deadline; no text of prompts or answers is logged; /health is 200 only
while the group works.
Next: `answering.py`, which is one request's life from there on.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from .. import __version__
from ..core.chat import Message
from ..core.request import Request
from ..errors import ClusterError, InputError
from ..text.output_parser import OutputParser
from . import static
from .api import anthropic, openai, openai_responses, openapi, structured_output
from .api.protocol import (
    ApiAdapter,
    GenerationRequest,
    Prompt,
    ResponseMeta,
    ServedModel,
)
from .api.validation import UNSUPPORTED, RequestError
from .cluster_view import ClusterView, group_state
from .generation import GenerationRun, InFlightChoice, error_response, json_response
from .limits import Limits
from .metrics import InstrumentedGroup, Metrics
from .plan_info import PlanTracker

if TYPE_CHECKING:
    from ..api import Model  # loads MLX, and `bind` is to answer at once

T = TypeVar("T")


class Application:
    """The endpoints over one model; `app` is the ASGI application.

    Args:
        model: loaded.
        limits: what a client may cost.
        metrics: count what happens.
        plan_tracker: describes the plan in use.

    Raises:
        CheckpointError: the model has no tokenizer.
    """

    def __init__(
        self, model: Model, limits: Limits, metrics: Metrics, plan_tracker: PlanTracker
    ) -> None:
        self._model, self._limits, self._metrics = model, limits, metrics
        self._group = InstrumentedGroup(model.group, metrics)
        self._text = model.text
        spec = model.spec
        self._served = ServedModel(model.name, spec.context_length, spec.vocab_size)
        self._created = int(time.time())
        self._plan_tracker = plan_tracker
        self._answering: set[GenerationRun] = set()
        self._ending: ClusterError | None = None
        # In a thread: a long prompt takes a while, and others' streams must go on. One thread:
        # tokenizers are not made for several at once.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")
        self._view = ClusterView(model, plan_tracker)
        self.app = Starlette(
            routes=[
                *static.routes(),
                Route("/cluster", self._cluster),
                Route("/health", self._health),
                Route("/metrics", self._numbers),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._one_model),
                self._post("/v1/chat/completions", openai.ChatCompletionsAdapter()),
                self._post("/v1/completions", openai.CompletionsAdapter()),
                self._post("/v1/responses", openai_responses.ResponsesAdapter()),
                self._post("/v1/messages", anthropic.MessagesAdapter()),
                Route("/v1/messages/count_tokens", self._count_tokens, methods=["POST"]),
                Route("/openapi.json", self._openapi),
            ],
            exception_handlers={HTTPException: _on_http_error},
        )
        self.app.router.redirect_slashes = False

    def stop(self, error: ClusterError) -> None:
        """Tell all who are being answered, and who ask from now on, that the server ends."""
        self._ending = error
        for generation in self._answering:
            generation.abort(error)

    def close(self) -> None:
        """End its threads."""
        self._view.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def _health(self, http: HttpRequest) -> Response:
        if "key" not in http.scope["state"]:  # for load balancers: nothing but the truth
            phase = self._model.group.state.phase
            return json_response(200 if phase == "ok" else 503, {"status": phase})
        model = self._model
        body = {**group_state(model), "model": self._served.name, **model.group.load}
        if body["status"] != "ok":
            return json_response(503, body)
        body["nodes"] = model.plan.nodes
        body["ranks"] = [
            {"rank": rank, "pid": pid, "device": ready.get("device")}
            for rank, (pid, ready) in enumerate(
                zip(model.ranks.pids, model.ranks.ready, strict=True)
            )
        ]
        return json_response(200, body)

    async def _cluster(self, http: HttpRequest) -> Response:
        query = http.query_params
        view = self._view.to_json(query.get("placement", ""), query.get("steps", ""))
        return json_response(200, view, {"cache-control": "no-store"})

    async def _numbers(self, http: HttpRequest) -> Response:
        page, media_type = self._metrics.render(http.headers.get("accept", ""))
        return Response(page, media_type=media_type)

    async def _models(self, _: HttpRequest) -> Response:
        return json_response(200, openai.model_list(self._served, self._created))

    async def _one_model(self, http: HttpRequest) -> Response:
        try:
            self._served.check_name(http.path_params["name"])
        except RequestError as error:
            return _error_response(error)
        return json_response(200, openai.model_object(self._served, self._created))

    async def _openapi(self, _: HttpRequest) -> Response:
        return json_response(200, openapi.openapi(__version__))

    def _post(self, path: str, adapter: ApiAdapter) -> Route:
        async def respond(http: HttpRequest) -> Response:
            return await self._answer(adapter, http)

        return Route(path, respond, methods=["POST"])

    async def _count_tokens(self, http: HttpRequest) -> Response:
        def count(body: bytes) -> int:
            asked = anthropic.CountTokensAdapter().parse(body, self._served)
            return len(self._prompt(asked, asked.prompts[0]))

        try:
            tokens = await self._in_thread(count, await self._body(http))
        except ClientDisconnect:
            return Response()
        except Exception as error:
            return _error_response(error, anthropic.CountTokensAdapter())
        return json_response(200, {"input_tokens": tokens})

    async def _answer(self, front: ApiAdapter, http: HttpRequest) -> Response:
        try:
            body, key = await self._body(http), http.scope["state"]["key"]
            asked, drafts = await self._in_thread(self._prepare, front, body, key)
        except ClientDisconnect:
            return Response()  # nobody is there to read it
        except Exception as error:
            return _error_response(error, front)
        if (failure := self._ending or self._model.group.failure) is not None:
            return _error_response(
                failure, front
            )  # not raised: each time it would gather a traceback
        head = ResponseMeta(
            uuid.uuid4().hex,
            int(time.time()),
            self._served.name,
            self._plan_tracker.current.fingerprint,
        )
        group, waits = self._group, (self._limits.token_timeout_s, self._limits.stream_keep_alive_s)
        return GenerationRun(front, asked, head, drafts, group, self._answering, *waits)

    async def _in_thread(self, work: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work, *given)

    async def _body(self, http: HttpRequest) -> bytes:
        limit, declared = self._limits.max_body_bytes, http.headers.get("content-length", "0")
        too_large = int(declared) > limit if declared.isdigit() else False
        if too_large and "expect" in http.headers:
            raise _BodyTooLarge(limit)  # the client has not begun to send
        body, thrown_away = bytearray(), 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                async for piece in http.stream():
                    if too_large or len(body) + len(piece) > limit:
                        too_large = True
                        thrown_away += len(body) + len(piece)
                        body.clear()
                        if thrown_away > self._limits.max_drained_bytes:
                            break
                    else:
                        body += piece
        except TimeoutError:
            if too_large:
                raise _BodyTooLarge(limit) from None
            raise _BodyTooSlow(self._limits.body_timeout_s) from None
        if too_large:
            raise _BodyTooLarge(limit)
        return bytes(body)

    def _prepare(
        self, front: ApiAdapter, body: bytes, key: str
    ) -> tuple[GenerationRequest, list[InFlightChoice]]:
        """The checked requests of a body. Slow: tokenizes."""
        asked = front.parse(body, self._served)
        drafts: list[InFlightChoice] = []
        for prompt in asked.prompts:
            tokens = self._prompt(asked, prompt)
            room = self._served.free_context(len(tokens), asked.prompt_field)
            limits = [n for n in (asked.max_tokens, room) if n is not None]
            echo = self._text.decode(tokens) if asked.echo else ""
            for choice in range(asked.n):
                request = self._request(asked, tokens, min(limits, default=None), choice)
                draft = InFlightChoice(
                    len(drafts),
                    replace(request, key=key),
                    len(tokens) if choice == 0 else 0,
                    self._stream(asked, tokens),
                    self._text,
                    echo,
                    asked.thinking_budget,
                )
                if asked.grammar is not None and asked.is_chat and self._text.in_reasoning(tokens):
                    draft.reason_first(self._text.chat((), (), tokens))
                drafts.append(draft)
        return asked, drafts

    def _request(
        self, asked: GenerationRequest, tokens: tuple[int, ...], most: int | None, choice: int
    ) -> Request:
        sampling, logs = asked.sampling_of(choice), asked.logprobs
        try:
            return self._model.request(tokens, most, sampling, logprobs=logs, grammar=asked.grammar)
        except InputError as error:
            if error.field != "grammar":
                raise
            field = asked.grammar_field  # what the client calls it
            raise RequestError(field, f"cannot be enforced: {error}") from error

    def _prompt(self, asked: GenerationRequest, prompt: Prompt) -> tuple[int, ...]:
        """A prompt's ids."""
        if isinstance(prompt, str):
            # Not rendered as a chat, as `Model.request` would.
            return self._text.encode(prompt)
        if not asked.is_chat:
            return self._model.tokens_of(prompt)
        if len(prompt) > (most := self._limits.max_messages):
            field = asked.prompt_field
            raise RequestError(field, f"expected at most {most} messages, got {len(prompt)}")
        text = self._text
        if asked.enable_thinking and not text.thinks:
            reason = f"not supported by the model {self._served.name}, which does not reason"
            raise RequestError("thinking", reason, UNSUPPORTED)
        if (
            asked.tools
            and asked.forced_call is None
            and not (text.calls_tools and text.renders_tools)
        ):
            reason = (
                "not supported where the model decides, since it is not known how this model "
                "calls; force a call with tool_choice"
            )
            raise RequestError("tools", reason, UNSUPPORTED)
        messages: list[Message] = [m for m in prompt if isinstance(m, dict)]
        tools = asked.tools
        if not text.renders_tools:
            messages, tools = structured_output.describe_tools_in_chat(messages, tools), ()
        think = False if asked.continue_final_message else asked.enable_thinking
        ids = text.render(
            messages,
            tools,
            asked.template_kwargs,
            think=think,
            continued=asked.continue_final_message,
        )
        return ids if asked.grammar is None else text.thought(ids, think)

    def _stream(self, asked: GenerationRequest, prompt: tuple[int, ...]) -> OutputParser:
        if asked.forced_call is not None:
            return self._text.called(structured_output.parse_tool_calls)
        if asked.is_chat and asked.grammar is None:
            return self._text.chat(
                asked.stop, asked.tools, prompt, parallel=asked.parallel_tool_calls
            )
        return self._text.plain(asked.stop)


class _BodyTooLarge(RequestError):
    def __init__(self, limit: int) -> None:
        message = f"The body: expected at most {limit} bytes, got more"
        super().__init__(None, message, "body_too_large", 413)


class _BodyTooSlow(RequestError):
    def __init__(self, seconds: float) -> None:
        message = f"The body: expected all of it within {seconds:g} s, got a part"
        super().__init__(None, message, "body_too_slow", 408)


def _error_response(error: Exception, front: ApiAdapter | None = None) -> Response:
    # What is left of a body that was not read would be taken for the next request.
    unread = isinstance(error, _BodyTooLarge | _BodyTooSlow)
    adapter = front or openai.ChatCompletionsAdapter()
    return error_response(error, adapter, {"connection": "close"} if unread else {})


async def _on_http_error(http: HttpRequest, error: Exception) -> Response:
    front = _adapter_for_path(http.url.path)
    if not isinstance(error, HTTPException):
        return _error_response(error, front)
    what, headers = f"{http.method} {http.url.path[:200]}", Headers(error.headers)
    message, code = error.detail, None
    if error.status_code == 404:
        message, code = f"{what}: no such path", "unknown_url"
    elif error.status_code == 405:
        message = f"{what}: not allowed here; use {headers.get('allow')}"
        code = "method_not_allowed"
    return error_response(
        RequestError(None, message, code, error.status_code), front, dict(headers)
    )


def _adapter_for_path(path: str) -> ApiAdapter:
    """The API whose form of errors a path has."""
    is_anthropic = path.startswith("/v1/messages")
    return anthropic.MessagesAdapter() if is_anthropic else openai.ChatCompletionsAdapter()
