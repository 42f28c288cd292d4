"""One HTTP request's life, from the requests that it became to its last byte.

Owns: `GenerationRun`, an ASGI response; errors as responses.
Does not know: any API's shapes (a `ResponseBuilder` makes them), sockets, ranks.
Invariant: whatever ends an HTTP request, its places in the group are freed; every wait has a
deadline; no text of prompts or answers is logged.
Next: `exchange.py` says what a `ResponseBuilder` is; `engine/lockstep.py` calls the sinks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import traceback
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..core.chat import FinishReason, OutputPart, TokenLogprob, Usage
from ..core.request import Request, TokenEvent
from ..errors import Busy, CenacleError, ClusterError
from ..ranks.rank_group import Sink
from ..text.output_parser import OutputParser, attach_logprobs
from ..text.tokenizer import ChatTokenizer
from .api.protocol import ApiAdapter, ChoiceState, Event, GenerationRequest, ResponseMeta
from .metrics import InstrumentedGroup

log = logging.getLogger(__name__)

COMMENT = b": waiting\n\n"  # an event stream's comment: no event


@dataclass
class InFlightChoice:
    """One choice while it is being written.

    Args:
        index: among the choices of one HTTP request.
        request: what the group is asked.
        prompt_tokens: to be counted: 0 if another choice has the same prompt.
        answer: from tokens to parts.
        text: says what was reported about tokens.
        echo: what the answer begins with.
        think_tokens: reasoning ends after so many; None: when the model ends it.
        then: what follows reasoning, and the request that has its grammar; None: this goes on.
    """

    index: int
    request: Request
    prompt_tokens: int
    answer: OutputParser
    text: ChatTokenizer
    echo: str = ""
    think_tokens: int | None = None
    then: tuple[OutputParser, Request] | None = None
    tokens: int = 0
    reasoning: int = 0
    cached: int = 0
    finish: FinishReason | None = None
    parts: list[OutputPart] = field(default_factory=list)
    _logged: list[TokenLogprob] = field(default_factory=list)
    _given: list[int] = field(default_factory=list)  # since the request began

    def take(self, event: TokenEvent) -> list[OutputPart]:
        """The parts that a token makes certain."""
        self.tokens += 1
        self._given.append(event.token)
        if self.tokens == 1:  # a continuation finds more, none of which was the client's prompt
            self.cached = event.cached_tokens
        if event.logprob is not None and event.finish != "stop":
            self._logged.append(self.text.logged(event))
        self.reasoning += self.answer.thinking
        parts = self.answer.add(event.token)
        if event.finish is not None:
            self.finish = FinishReason("length" if event.finish == "length" else "stop")
            parts += self.answer.end()
        if self.answer.stopped is not None:
            self.finish = FinishReason("string", self.answer.stopped)
        elif self.answer.ended:
            self.finish = FinishReason("stop")
        if self._logged and (parts or self.finish):
            parts = attach_logprobs(parts or [OutputPart("text", "")], self._logged)
            self._logged.clear()
        return parts

    def think_first(self, reasoning: OutputParser) -> None:
        """Let reasoning come before what must match the request's grammar; it cannot end the
        answer."""
        self.then = self.answer, self.request
        sampling = self.request.sampling
        bias = {**sampling.logit_bias, **dict.fromkeys(self.request.stop_tokens, -100.0)}
        self.answer = reasoning
        self.request = replace(
            self.request, grammar=None, sampling=replace(sampling, logit_bias=bias)
        )

    def turn(self, parts: list[OutputPart]) -> list[OutputPart] | None:
        """Where reasoning has had its tokens, close it as the model would; where what follows it
        must match a grammar, let that begin. `request` is then what is left of the answer.

        Args:
            parts: what the last token made certain.

        Returns:
            What of it, and of the closing, is to be told; None: neither is due.
        """
        if self.finish is not None:
            return None
        spent = self.think_tokens is not None and self.reasoning >= self.think_tokens
        close = self.text.think_end if spent and self.answer.thinking else ()
        rest = (*self._given, *close)
        left = self.request.max_tokens - len(rest)
        if left < 1 or not (close or (self.then is not None and not self.answer.thinking)):
            return None
        parts = parts + [part for token in close for part in self.answer.add(token)]
        if self.then is None:
            self.request = self.request.resumed_with(rest)
        else:
            # To the grammar all of this is a prompt; what came with reasoning's last token is none.
            tokens = (*self.request.tokens, *rest)
            parts = [part for part in parts if part.kind == "reasoning"]
            (self.answer, request), self.then = self.then, None
            self.request = replace(request, tokens=tokens, max_tokens=left)
        self.request, self._given = replace(self.request, id=uuid.uuid4().hex), []
        return parts


class GenerationRun(Response):
    """One HTTP request's choices while the group generates them; an ASGI response.

    From `__call__` on it holds places in the group, and gives them back whatever happens: the
    answer is complete, the client has left, the group has failed, the server ends.

    Args:
        front: the API.
        asked, head: make its `ResponseBuilder`.
        drafts: the choices, not yet submitted.
        group: generates.
        register: where it is found while it runs, for `abort`.
        deadline_s: longest wait for a token.
        quiet_s: in a stream, how long nothing may be said: then comes a sign of life.
    """

    def __init__(
        self,
        front: ApiAdapter,
        asked: GenerationRequest,
        head: ResponseMeta,
        drafts: list[InFlightChoice],
        group: InstrumentedGroup,
        register: set[GenerationRun],
        deadline_s: float,
        quiet_s: float,
    ) -> None:
        self._front, self._asked, self._reply = front, asked, front.respond(asked, head)
        self._drafts, self._group = drafts, group
        self._register, self._deadline_s, self._quiet_s = register, deadline_s, quiet_s
        self._live: Callable[[], Awaitable[None]] | None = None  # gives a sign of life
        self._said_s = 0.0  # when something was said last, in the loop's time
        self._events: asyncio.Queue[tuple[InFlightChoice, TokenEvent | CenacleError]] = (
            asyncio.Queue()
        )

    def abort(self, error: CenacleError) -> None:
        """End the answer with an error. Call it from the event loop's thread."""
        self._events.put_nowait((self._drafts[0], error))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until done or until the client has left."""
        self._register.add(self)
        try:
            for draft in self._drafts:
                self._group.submit(draft.request, self._sink(draft))
        except CenacleError as error:  # while there is still a status to send
            self._give_back()
            await error_response(error, self._front)(scope, receive, send)
            return
        stream = self._asked.stream
        work = asyncio.create_task(
            self._stream(send) if stream else self._whole(scope, receive, send)
        )
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._give_back()
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    def _give_back(self) -> None:
        self._register.discard(self)
        for draft in self._drafts:
            self._group.cancel(draft.request.id)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._generate()) as generated:
                async for draft, parts in generated:
                    draft.parts += parts
            choices = [
                ChoiceState(d.index, d.parts, d.finish or FinishReason("length"))
                for d in self._drafts
            ]
            response = json_response(200, self._reply.full_response(choices, self._usage()))
        except Exception as error:
            response = error_response(error, self._front)
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        async def write(body: bytes) -> None:
            self._said_s = asyncio.get_running_loop().time()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        async def say(events: Iterable[Event]) -> None:
            for event in events:
                await write(_server_sent(event))

        async def live() -> None:
            await write(b"".join(map(_server_sent, self._reply.keep_alive())) or COMMENT)

        self._live, self._said_s = live, asyncio.get_running_loop().time()
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            for draft in self._drafts:
                await say(self._reply.first_events(draft.index, self._usage()))
            async with aclosing(self._generate()) as generated:
                async for draft, parts in generated:
                    for part in parts:
                        await say(self._reply.delta(draft.index, part))
                    if draft.finish is not None:
                        await say(self._reply.finish_choice(draft.index, draft.finish))
            await say(self._reply.finish_stream(self._usage()))
        except Exception as error:  # too late for a status: the client is told in the stream
            await say(self._reply.error(to_client_error(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _generate(self) -> AsyncGenerator[tuple[InFlightChoice, list[OutputPart]], None]:
        """Every token's parts, until all choices are finished."""
        for draft in self._drafts:
            if draft.echo:
                yield draft, [OutputPart("text", draft.echo)]
        left = len(self._drafts)
        while left:
            draft, event = await self._next()
            if isinstance(event, CenacleError):
                raise event
            if draft.finish is not None or event.request_id != draft.request.id:
                continue  # was under way when the choice ended, or its reasoning
            parts, began = draft.take(event), draft.request.id
            if (turned := draft.turn(parts)) is not None:
                parts = turned
                self._group.cancel(began, "continued")
                self._group.submit(draft.request, self._sink(draft))
            if draft.finish is not None:
                # A stop string: the ranks know nothing of it.
                self._group.cancel(draft.request.id, "stop")
                left -= 1
            yield draft, parts

    async def _next(self) -> tuple[InFlightChoice, TokenEvent | CenacleError]:
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._deadline_s
        while True:
            due = ends
            if self._live is not None:
                # Clients and proxies hang up on who says nothing, and recovery may take long.
                if loop.time() >= self._said_s + self._quiet_s:
                    await self._live()
                due = min(ends, self._said_s + self._quiet_s)
            try:
                async with asyncio.timeout_at(due):
                    return await self._events.get()
            except TimeoutError:
                if loop.time() >= ends:
                    raise ClusterError(f"no token came for {self._deadline_s:g} s") from None

    def _sink(self, draft: InFlightChoice) -> Sink:
        """Called by the group's thread."""
        loop, put = asyncio.get_running_loop(), self._events.put_nowait

        def sink(event: TokenEvent | CenacleError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(put, (draft, event))

        return sink

    def _usage(self) -> Usage:
        drafts = self._drafts
        return Usage(
            sum(d.prompt_tokens for d in drafts),
            sum(d.tokens for d in drafts),
            sum(d.cached for d in drafts if d.prompt_tokens),
            sum(d.reasoning for d in drafts),
        )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _server_sent(event: Event) -> bytes:
    name, data = event
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def to_client_error(error: Exception) -> CenacleError:
    """An error that a client may see."""
    if isinstance(error, CenacleError):
        return error
    # Neither its message nor the lines of code: they may hold a client's text.
    where = traceback.extract_tb(error.__traceback__)[-1:]
    at = "".join(f" at {frame.filename}:{frame.lineno}" for frame in where)
    log.error("internal error: %s%s", type(error).__name__, at)
    return CenacleError("The server made a mistake; its log says where")


def error_response(
    error: Exception, front: ApiAdapter, headers: dict[str, str] | None = None
) -> Response:
    """An error as a response of an API."""
    status, body = front.render_error(to_client_error(error))
    if isinstance(error, Busy):
        headers = {**(headers or {}), "retry-after": str(error.retry_after_s)}
    return json_response(status, body, headers)


def json_response(
    status: int, body: dict[str, object], headers: dict[str, str] | None = None
) -> Response:
    """A JSON object as a response. ASCII: a name that a client sent may hold half of a surrogate
    pair."""
    return Response(json.dumps(body), status, headers, "application/json")
