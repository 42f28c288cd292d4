"""One HTTP request while it is generated for, from its submission to the last byte.

Owns: `GenerationRun`, an ASGI response; errors as responses.
Does not know: any API's shapes (a `ResponseBuilder` has them), sockets, ranks.
Invariant: whatever ends an HTTP request, its requests to the group are cancelled; every wait has a
deadline; no text of prompts or responses is logged.
Next: `api/protocol.py` has `ResponseBuilder`; `ranks/rank_group.py` calls the sinks.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import logging
import traceback
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..core.chat import FinishReason, OutputPart, TokenLogprob, Usage
from ..core.request import GroupEvent, PromptLogprobs, Request, TokenEvent
from ..errors import CenacleError, ClusterError
from ..ranks.rank_group import Sink
from ..text.output_parser import OutputParser, attach_logprobs
from ..text.tokenizer import ChatTokenizer
from .api.protocol import ApiAdapter, ChoiceState, Event, GenerationRequest, ResponseMeta
from .metrics import InstrumentedGroup

log = logging.getLogger(__name__)

MAX_WARNING_CHARACTERS = 1000  # of the header
KEEP_ALIVE = b": waiting\n\n"  # a comment of an event stream
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
)
_JSON_STARTS = '{["`-0123456789tfn'  # of a value, or of a block that quotes one
MAX_PREFACE_TOKENS = 128  # of text before a call, where an output must be calls or match a form


@dataclass
class InFlightChoice:
    """One choice while it is generated.

    Args:
        index: among the choices of the HTTP request.
        request: what the group is to generate now.
        prompt_tokens: to be counted: 0 if another choice has the same prompt.
        parser: from tokens to parts.
        tokenizer: of the model.
        echo: what the choice begins with.
        prompt: tokens whose log-probabilities are wanted; empty: none.
        echo_prompt: the choice begins with them.
        is_empty: the choice ends before the token that the group generates.
        thinking_budget: most tokens of reasoning; None: no limit.
        grammar_phase: parser and request of the output that must match a grammar, while something
            comes before it; None: the present ones go on.
        may_call: calls may come in place of that output.
        is_forced_call: that output is calls.
    """

    index: int
    request: Request
    prompt_tokens: int
    parser: OutputParser
    tokenizer: ChatTokenizer
    echo: str = ""
    thinking_budget: int | None = None
    grammar_phase: tuple[OutputParser, Request] | None = None
    may_call: bool = False
    is_forced_call: bool = False
    prompt: tuple[int, ...] = ()
    echo_prompt: bool = False
    is_empty: bool = False
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    generated_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    finish: FinishReason | None = None
    parts: list[OutputPart] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _request_tokens: list[int] = field(default_factory=list)  # generated for `request`
    _certain_tokens: int = 0  # of them: reasoning and its end
    _was_in_reasoning: bool = False
    _has_called: bool = False
    _prompt_decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    _preface: str = ""  # text that is not sent: a call may follow

    def add_token(self, event: TokenEvent) -> list[OutputPart]:
        """The parts that are certain with this token."""
        prompt = self._add_first_prompt_token()
        if self.is_empty:
            self.cached_tokens, self.finish = event.cached_tokens, FinishReason("length")
            return prompt
        return prompt + self._add_token(event)

    def _add_token(self, event: TokenEvent) -> list[OutputPart]:
        self.generated_tokens += 1
        self._request_tokens.append(event.token)
        if self.generated_tokens == 1:  # later requests find tokens that were not in the prompt
            self.cached_tokens = event.cached_tokens
        # Clients count tokens from the end of an echo: also one that ended the output.
        if event.logprob is not None and (event.finish != "stop" or self.echo_prompt):
            self._logprobs.append(self.tokenizer.token_logprob(event))
        self.reasoning_tokens += self.parser.in_reasoning
        parts = self.parser.add(event.token)
        if event.finish is not None:
            self.finish = FinishReason("length" if event.finish == "length" else "stop")
            parts += self.parser.finish(cut=event.finish == "length")
        if self.parser.stop_string is not None:
            self.finish = FinishReason("string", self.parser.stop_string)
            self._drop_logprobs(len(self.parser.cut_text.encode()))
        elif self.parser.finished:
            self.finish = FinishReason("stop")
        if self._logprobs and (parts or self.finish):
            parts = attach_logprobs(parts or [OutputPart("text", "")], self._logprobs)
            self._logprobs.clear()
        return parts

    def add_prompt_logprobs(self, event: PromptLogprobs) -> list[OutputPart]:
        """The parts that are certain with more of the prompt's log-probabilities."""
        parts = self._add_first_prompt_token()
        repeated = len(self.prompt_logprobs) - event.begin  # after a restart of the group
        if repeated < 0:
            return parts
        tokens = self.tokenizer.prompt_logprobs(self.prompt, event)[repeated:]
        return parts + self._add_prompt_tokens(tokens)

    def _add_first_prompt_token(self) -> list[OutputPart]:
        if not self.prompt or self.prompt_logprobs:
            return []
        data = self.tokenizer.token_bytes(self.prompt[0])
        if data.startswith(b" ") and not self.tokenizer.decode(self.prompt[:1]).startswith(" "):
            data = data[1:]  # some tokenizers put a space before every text
        return self._add_prompt_tokens([TokenLogprob(data, None, (), self.prompt[0])])

    def _add_prompt_tokens(self, tokens: list[TokenLogprob]) -> list[OutputPart]:
        self.prompt_logprobs += tokens
        if not self.echo_prompt or not tokens:
            return []
        text = self._prompt_decoder.decode(b"".join(token.data for token in tokens))
        return [OutputPart("text", text, logprobs=tuple(tokens))]

    def _drop_logprobs(self, size_bytes: int) -> None:
        """Drop those of tokens that lie wholly in the last bytes."""
        while self._logprobs and len(self._logprobs[-1].data) <= size_bytes:
            size_bytes -= len(self._logprobs.pop().data)

    def precede_grammar(self, parser: OutputParser, *, may_call: bool) -> None:
        """Generate what comes before an output that must match the grammar.

        Args:
            parser: of that.
            may_call: it is reasoning and calls, and text shows that there are none; otherwise it is
                reasoning alone, which cannot end the choice.
        """
        self.grammar_phase, self.may_call = (self.parser, self.request), may_call
        self.parser = parser
        self.request = replace(self.request, grammar=None)
        if not may_call:
            sampling = self.request.sampling
            bias = {**sampling.logit_bias, **dict.fromkeys(self.request.stop_tokens, -100.0)}
            sampling = replace(sampling, logit_bias=bias)
            self.request = replace(self.request, sampling=sampling)

    def change_phase(self, parts: list[OutputPart]) -> list[OutputPart]:
        """End reasoning that has used its budget, as the model would; begin what must match a
        grammar when it is due. `request`, with another id, is then for the rest of the choice.

        Args:
            parts: that are certain with the last token.

        Returns:
            The parts that are sent.
        """
        used_up = self.thinking_budget is not None and self.reasoning_tokens >= self.thinking_budget
        used_up = used_up and self.parser.in_reasoning and bool(self.tokenizer.reasoning_end)
        if self.grammar_phase is not None:
            if self.may_call:
                is_due = self._has_become_text(parts)
            else:
                is_due = self.finish is None and (used_up or not self.parser.in_reasoning)
                self._certain_tokens = len(self._request_tokens)
            if is_due and (reasoning := self._start_grammar(parts)) is not None:
                return reasoning
            if self.may_call and not is_due:
                parts = [part for part in parts if part.kind != "text"]
        if self.finish is None and used_up and (self.grammar_phase is None or self.may_call):
            end = self.tokenizer.reasoning_end
            generated = (*self._request_tokens, *end)
            if self.request.max_tokens > len(generated):
                parts = parts + [part for token in end for part in self.parser.add(token)]
                self._replace_request(self.request.resumed_with(generated))
        return parts

    def _has_become_text(self, parts: list[OutputPart]) -> bool:
        """Whether an output that might have been calls is text, which must match the grammar."""
        if self.parser.in_reasoning or any(part.kind == "reasoning" for part in parts):
            self._certain_tokens = len(self._request_tokens)
        elif self._was_in_reasoning and not self.parser.in_call:
            self._certain_tokens = len(self._request_tokens)  # the token ended reasoning
        self._was_in_reasoning = self.parser.in_reasoning
        for part in parts:
            self._has_called |= part.kind == "call"
            self._preface = self._preface + part.text if part.kind == "text" else ""
        text = self._preface.strip()
        if self._has_called:
            if text and self.finish is None:
                self.finish = FinishReason("stop")  # nothing but calls can follow a call
            return False
        if self.finish is not None:
            return self.finish.reason == "stop" or not self.parser.in_call
        length = len(self._request_tokens) - self._certain_tokens
        return bool(text) and (text[0] in _JSON_STARTS or length > MAX_PREFACE_TOKENS)

    def _start_grammar(self, parts: list[OutputPart]) -> list[OutputPart] | None:
        """Begin what must match the grammar, after the certain tokens. What came after them is
        dropped: text that could have ended in a call, or that stood beside the end of reasoning.

        Args:
            parts: that are certain with the last token.

        Returns:
            The reasoning among them; None: the grammar cannot begin, no tokens are left.
        """
        assert self.grammar_phase is not None
        before = self._request_tokens[: self._certain_tokens]
        while before and before[-1] in self.request.stop_tokens:
            before.pop()
        tokens = (*self.request.tokens, *before)
        start = self.tokenizer.answer_start(tokens, is_call=self.is_forced_call)
        remaining = self.request.max_tokens - len(before) - len(start)
        if remaining < 1:
            return None
        reasoning = [p for p in parts + self.parser.finish(cut=True) if p.kind == "reasoning"]
        self.generated_tokens -= len(self._request_tokens) - len(before)
        self.finish = None
        self._logprobs.clear()
        (self.parser, request), self.grammar_phase = self.grammar_phase, None
        min_tokens = max(0, request.min_tokens - self.generated_tokens)
        self.parser.min_tokens = min_tokens
        # To the grammar all that came before is a prompt.
        tokens = (*tokens, *start)
        self._replace_request(
            replace(request, tokens=tokens, max_tokens=remaining, min_tokens=min_tokens)
        )
        return reasoning

    def _replace_request(self, request: Request) -> None:
        request = replace(request, id=uuid.uuid4().hex, prompt_logprobs=None)
        self.request, self._request_tokens = request, []
        self._certain_tokens = 0


class GenerationRun(Response):
    """The choices of one HTTP request while the group generates them; an ASGI response.

    Its requests to the group are cancelled whatever happens: the response is complete, the client
    has disconnected, the group has failed, the server shuts down.

    Args:
        adapter: the API.
        request, meta: what its `ResponseBuilder` is made of.
        choices: not yet submitted.
        group: generates.
        active_runs: has this run while it runs, for `abort`.
        token_timeout_s: longest wait for a token.
        keep_alive_s: longest silence in a stream.
    """

    def __init__(
        self,
        adapter: ApiAdapter,
        request: GenerationRequest,
        meta: ResponseMeta,
        choices: list[InFlightChoice],
        group: InstrumentedGroup,
        active_runs: set[GenerationRun],
        token_timeout_s: float,
        keep_alive_s: float,
    ) -> None:
        self._adapter, self._stream = adapter, request.stream
        self._warning_headers = _warning_headers(request.warnings)
        self._hidden_kinds = ("reasoning",) if request.hide_reasoning else ()
        self._builder = adapter.respond(request, meta)
        self._choices, self._group, self._active_runs = choices, group, active_runs
        self._token_timeout_s, self._keep_alive_s = token_timeout_s, keep_alive_s
        self._keep_alive: Callable[[], Awaitable[None]] | None = None  # of a stream
        self._traceparent = ""
        self._last_write_s = 0.0  # in the loop's time
        self._events: asyncio.Queue[tuple[InFlightChoice, GroupEvent]] = asyncio.Queue()

    def abort(self, error: CenacleError) -> None:
        """End the response with an error. Call it in the event loop's thread."""
        self._events.put_nowait((self._choices[0], error))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond, until all is sent or the client has disconnected."""
        self._active_runs.add(self)
        self._traceparent = Headers(scope=scope).get("traceparent", "")
        try:
            for choice in self._choices:
                self._group.submit(choice.request, self._sink(choice), self._traceparent)
        except CenacleError as error:  # while there is still a status to send
            self._release()
            await error_response(error, self._adapter)(scope, receive, send)
            return
        respond = (
            self._send_stream(send) if self._stream else self._send_whole(scope, receive, send)
        )
        work = asyncio.create_task(respond)
        disconnect = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await asyncio.wait((work, disconnect), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._release()
            work.cancel()
            disconnect.cancel()
            await asyncio.gather(work, disconnect, return_exceptions=True)

    def _release(self) -> None:
        self._active_runs.discard(self)
        for choice in self._choices:
            self._group.cancel(choice.request.id)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._generate()) as generated:
                async for choice, parts in generated:
                    choice.parts += parts
            choices = [
                ChoiceState(c.index, c.parts, c.finish or FinishReason("length"), c.prompt_logprobs)
                for c in self._choices
            ]
            response = await asyncio.to_thread(self._render, choices)
        except Exception as error:
            response = error_response(error, self._adapter)
        await response(scope, receive, send)

    def _render(self, choices: list[ChoiceState]) -> Response:
        """The whole answer; in a thread, as log-probabilities can be many megabytes."""
        body = self._builder.full_response(choices, self._usage())
        data = "".join(json_pieces(body))
        return Response(data, 200, self._warning_headers, "application/json")

    async def _send_stream(self, send: Send) -> None:
        builder = self._builder

        async def write(body: bytes) -> None:
            self._last_write_s = asyncio.get_running_loop().time()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        async def write_events(events: Iterable[Event]) -> None:
            for event in events:
                await write(server_sent_event(event))

        async def begin() -> None:
            builder.usage = self._usage()
            for choice in self._choices:
                await write_events(builder.first_events(choice.index, builder.usage))

        async def keep_alive() -> None:
            events = self._builder.keep_alive()
            await write(b"".join(map(server_sent_event, events)) or KEEP_ALIVE)

        self._keep_alive, self._last_write_s = keep_alive, asyncio.get_running_loop().time()
        headers = [
            *STREAM_HEADERS,
            *((name.encode(), value.encode()) for name, value in self._warning_headers.items()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            started = False
            if not builder.counts_prompt_first:
                await begin()
                started = True
            async with aclosing(self._generate()) as generated:
                async for choice, parts in generated:
                    if not started:
                        await begin()
                        started = True
                    builder.usage = self._usage()
                    for part in parts:
                        await write_events(builder.delta(choice.index, part))
                    if choice.finish is not None:
                        await write_events(builder.finish_choice(choice.index, choice.finish))
            await write_events(builder.finish_stream(self._usage()))
        except Exception as error:  # too late for a status
            await write_events(builder.error(to_client_error(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _generate(self) -> AsyncGenerator[tuple[InFlightChoice, list[OutputPart]], None]:
        """The parts of every token, until all choices are finished."""
        for choice in self._choices:
            if choice.echo:
                yield choice, [OutputPart("text", choice.echo)]
        unfinished = len(self._choices)
        while unfinished:
            choice, event = await self._next_event()
            if isinstance(event, CenacleError):
                raise event
            if choice.finish is not None or event.request_id != choice.request.id:
                continue  # was on its way when the choice, or its reasoning, ended
            if isinstance(event, PromptLogprobs):
                yield choice, choice.add_prompt_logprobs(event)
                continue
            parts = choice.change_phase(choice.add_token(event))
            if choice.request.id != event.request_id:
                self._group.cancel(event.request_id, "continued")
                self._group.submit(choice.request, self._sink(choice), self._traceparent)
            if choice.finish is not None:
                self._group.cancel(choice.request.id, "stop")  # ranks do not know stop strings
                unfinished -= 1
            yield choice, [part for part in parts if part.kind not in self._hidden_kinds]

    async def _next_event(self) -> tuple[InFlightChoice, GroupEvent]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._token_timeout_s
        while True:
            wake_up = deadline
            if self._keep_alive is not None:
                # Clients and proxies close silent connections, and recovery may take long.
                if loop.time() >= self._last_write_s + self._keep_alive_s:
                    await self._keep_alive()
                wake_up = min(deadline, self._last_write_s + self._keep_alive_s)
            try:
                async with asyncio.timeout_at(wake_up):
                    return await self._events.get()
            except TimeoutError:
                if loop.time() >= deadline:
                    message = f"no token came for {self._token_timeout_s:g} s"
                    raise ClusterError(message) from None

    def _sink(self, choice: InFlightChoice) -> Sink:
        """Called in the group's thread."""
        loop, put = asyncio.get_running_loop(), self._events.put_nowait

        def sink(event: GroupEvent) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(put, (choice, event))

        return sink

    def _usage(self) -> Usage:
        return Usage(
            sum(choice.prompt_tokens for choice in self._choices),
            sum(choice.generated_tokens for choice in self._choices),
            sum(choice.cached_tokens for choice in self._choices if choice.prompt_tokens),
            sum(choice.reasoning_tokens for choice in self._choices),
        )


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client has gone; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """What was accepted and has no effect, as a header: it may hold a client's text."""
    text = "; ".join(warnings).encode("ascii", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())[:MAX_WARNING_CHARACTERS].strip()  # no space at an end of a header
    return {"x-cenacle-warning": text} if text else {}


def server_sent_event(event: Event) -> bytes:
    """An event of a stream as bytes."""
    name, data = event
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def to_client_error(error: Exception) -> CenacleError:
    """What a client may know of an error. Others than ours are logged, and their text may be a
    client's: neither it nor lines of code are shown."""
    if isinstance(error, CenacleError):
        return error
    where = traceback.extract_tb(error.__traceback__)[-1:]
    at = "".join(f" at {frame.filename}:{frame.lineno}" for frame in where)
    log.error("internal error: %s%s", type(error).__name__, at)
    return CenacleError("internal error; see the server's log")


def error_response(
    error: Exception, adapter: ApiAdapter, headers: dict[str, str] | None = None
) -> Response:
    """An error in an API's form."""
    status, body = adapter.render_error(to_client_error(error))
    if (retry_after_s := getattr(error, "retry_after_s", None)) is not None:
        headers = {**(headers or {}), "retry-after": str(retry_after_s)}
    return json_response(status, body, headers)


def json_response(
    status: int, body: dict[str, object], headers: dict[str, str] | None = None
) -> Response:
    """A JSON object as a response. It is ASCII: names that a client sent may not be Unicode."""
    return Response(json.dumps(body), status, headers, "application/json")


def json_pieces(value: object, elements: int = 64) -> Iterator[str]:
    """What `json.dumps(value)` gives, in pieces of at most `elements` of a long list.

    `json.dumps` lets no other thread run until it has finished, seconds for 26 MB;
    `JSONEncoder.iterencode` would, and takes three times as long.
    """
    if isinstance(value, dict) and value:
        for index, (key, member) in enumerate(value.items()):
            yield f"{', ' if index else '{'}{json.dumps(key)}: "
            yield from json_pieces(member, elements)
        yield "}"
    elif isinstance(value, list) and len(value) > elements:
        for begin in range(0, len(value), elements):
            part = json.dumps(value[begin : begin + elements])
            yield (", " if begin else "[") + part[1:-1]
        yield "]"
    elif isinstance(value, list) and value:
        for index, member in enumerate(value):
            yield ", " if index else "["
            yield from json_pieces(member, elements)
        yield "]"
    else:
        yield json.dumps(value)
