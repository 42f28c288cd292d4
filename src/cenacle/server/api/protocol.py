"""What every API is reduced to: the request that is generated for, and who shapes its response.

Owns: `GenerationRequest`; the parameters that mean the same in every API; `ResponseBuilder` and
`ApiAdapter`, which each API implements.
Does not know: parameters of one API alone, HTTP, tokenizers, MLX, time.
Invariant: a `GenerationRequest` that exists can be carried out, as far as can be told without the
model.
Next: `openai.py`, `openai_responses.py` and `anthropic.py` are the APIs; `app.py` carries out.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, Field

from ...core.chat import FinishReason, Message, OutputPart, TokenLogprob, Tool, Usage
from ...core.request import Sampling
from ...errors import Busy, CenacleError, ClusterError, InputError
from ...images.decode_process import DecodedImage
from ...images.sources import check_source, mark, take_sources
from .validation import (
    UNSUPPORTED,
    JsonObject,
    RequestError,
    RequestModel,
    Text,
    check_unicode,
    describe,
    fail,
    parse_request,
)

Prompt = str | tuple[int, ...] | tuple[Message, ...]
"""Plain text, token ids, or the messages of a chat."""

Event = tuple[str | None, JsonObject | str]
"""An event of a stream: its name, where the API names events, and its data."""


MAX_TOOLS = 512
ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_.:/-]{1,128}$")]

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000  # an output is held back while it may be the beginning of one
StopString = Annotated[
    str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS), AfterValidator(check_unicode)
]


@dataclass(frozen=True)
class ServedModel:
    """What requests are checked against.

    Args:
        name: the id that clients use.
        context_length: most tokens of prompt and response together; None: not known.
        vocab_size: number of token ids.
        aliases: further ids.
        any_name: whether every other id is this model, too.
        image_obstacle: why it cannot be shown images, as the end of a sentence; empty: it can.
        sampling_defaults: arguments of `Sampling` for what a request leaves out.
    """

    name: str
    context_length: int | None
    vocab_size: int
    aliases: tuple[str, ...] = ()
    any_name: bool = False
    image_obstacle: str = "one that cannot be shown images"
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The ids that clients are told."""
        return (self.name, *self.aliases)

    def check_name(self, name: str | None) -> str:
        """The id that a response to a request for `name` has; None: the request names no model.

        Raises:
            RequestError: no such model is served.
        """
        if not name or name in self.names or self.any_name:
            return name or self.name
        served = " or ".join(map(repr, self.names))
        reason = f"{describe(name)} does not exist; this server has {served}"
        raise RequestError("model", reason, "model_not_found", 404)

    def free_context(self, prompt_tokens: int, prompt_field: str) -> int | None:
        """How many tokens may follow a prompt; None: not known.

        Raises:
            RequestError: none may.
        """
        if self.context_length is None:
            return None
        if prompt_tokens >= self.context_length:
            reason = (
                f"this model's maximum context length is {self.context_length} tokens, of which "
                f"the response needs at least one; got {prompt_tokens} tokens, shorten it by at "
                f"least {prompt_tokens - self.context_length + 1}"
            )
            raise RequestError(prompt_field, reason, "context_length_exceeded")
        return self.context_length - prompt_tokens


@dataclass(frozen=True)
class GenerationRequest:
    """What one HTTP request asks the model for.

    Args:
        prompts: at least one; a chat has exactly one.
        is_chat: the prompt is messages, and the response may have reasoning and tool calls.
        prompt_field: the parameter that the prompts came in.
        max_tokens: of each choice, 0 for none; None: as many as fit.
        stop: strings that end a choice, which does not include them.
        n: choices per prompt.
        include_usage: OpenAI's stream ends with a chunk that counts tokens.
        continuous_usage: every chunk of OpenAI's stream counts tokens.
        min_tokens: how many tokens of a choice come before a stop string or the model may end it.
        ignore_eos: the model cannot end a choice.
        logprobs: how many alternatives to report with each token; None: nothing about tokens.
        echo: choices begin with their prompts, with `logprobs` also of these.
        add_special_tokens: a text begins with the tokenizer's first token.
        prompt_logprobs: like `logprobs`, for the prompts, apart from the choices (vLLM).
        forced_call: "required" or a function's name: the response is tool calls and nothing else;
            None: the model decides.
        grammar: what the response must match, see `structured_output.py`, unless it is calls of
            `tools`; None: anything.
        grammar_field: the parameter that the grammar came in.
        template_kwargs: variables of the chat template.
        reasoning_effort: one of `text.reasoning.EFFORTS`, or another word, of which the nearest is
            taken; it gives way to the next two and to `template_kwargs`; None: no effect.
        enable_thinking: whether a model that can reason does; None: as its template has it.
        thinking_budget: most tokens of reasoning; None: no limit.
        hide_reasoning: the response is without it.
        continue_final_message: the last message is the beginning of the response.
        echoed_parameters: what the response repeats of the request, in the API's own form.
        warnings: what was accepted and has no effect; sent as a header.
        model: the id that the response has.
        on_response: called with the complete response.
        image_sources: URIs of the prompt's images, which has numbered marks in their places.
        images: those images, once they were decoded.
    """

    prompts: tuple[Prompt, ...]
    is_chat: bool
    prompt_field: str
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True
    prompt_logprobs: int | None = None
    tools: tuple[Tool, ...] = ()
    forced_call: str | None = None
    parallel_tool_calls: bool = True
    grammar: str | None = None
    grammar_field: str = "response_format"
    template_kwargs: JsonObject = field(default_factory=dict)
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    hide_reasoning: bool = False
    continue_final_message: bool = False
    echoed_parameters: JsonObject = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    model: str = ""
    on_response: Callable[[JsonObject], None] | None = field(default=None, compare=False)
    image_sources: tuple[str, ...] = ()
    images: tuple[DecodedImage, ...] = ()

    def take_images(self, served: ServedModel) -> GenerationRequest:
        """The request with its images apart from its prompt.

        Raises:
            InputError: the model cannot be shown them, or there are too many.
        """
        if not self.is_chat:
            return self
        messages, sources = take_sources(self.prompts[0])
        if not sources:
            return self
        if served.image_obstacle:
            reason = (
                f"the model is {served.image_obstacle}; remove the images, or ask a model that "
                "sees, of one of the families that `cenacle families` marks"
            )
            raise RequestError(self.prompt_field, reason, UNSUPPORTED)
        if self.prompt_logprobs is not None:
            reason = "not supported with images; remove one of the two"
            raise RequestError("prompt_logprobs", reason, UNSUPPORTED)
        return replace(self, prompts=(messages,), image_sources=sources)

    @property
    def may_call(self) -> bool:
        """Whether the model decides between calls and an answer."""
        return bool(self.tools) and self.forced_call is None

    def freeform_input(self, call: OutputPart) -> str | None:
        """The plain text of a call of a freeform tool; None: it is a function's."""
        if not any(tool.freeform and tool.name == call.name for tool in self.tools):
            return None
        text = json.loads(call.text or "{}").get("input", "")
        return text if isinstance(text, str) else json.dumps(text)

    def sampling_of(self, choice: int) -> Sampling:
        """The sampling of one of the `n` choices. A seed is counted up so that they differ; the
        first is what n=1 would give."""
        seed = self.sampling.seed
        if seed is None or choice == 0:
            return self.sampling
        return replace(self.sampling, seed=(seed + choice + 2**63) % 2**64 - 2**63)


def _check_image_url(value: str) -> str:
    try:
        return check_source(value)
    except ValueError as error:
        fail(str(error))


ImageUrl = Annotated[str, AfterValidator(check_unicode), AfterValidator(_check_image_url)]
"""A data: URI of an image, or an http(s) URL."""


def image_text(url: str) -> str:
    """What stands for an image in a text of a request, until `take_images`."""
    return mark(url)


class ApiRequest(RequestModel):
    """The body of a request to an API. Members that are not declared are ignored and reported."""

    model_config = ConfigDict(extra="allow")

    def ignored_members(self) -> Iterator[str]:
        """What has no effect, for the header that says so."""
        yield from (f"{name[:80]}: ignored" for name in self.model_extra or ())

    model: Text | None = Field(None, description="The served model, which is also the default.")

    @abstractmethod
    def to_generation_request(self, served: ServedModel) -> GenerationRequest:
        """What it asks for.

        Raises:
            InputError: parameters do not go together, or not with the model.
        """


@dataclass(frozen=True)
class ChoiceState:
    """One finished choice: its place among the choices, its parts, why it ended, and its prompt's
    log-probabilities, if they are wanted."""

    index: int
    parts: list[OutputPart]
    finish: FinishReason
    prompt_logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True)
class ResponseMeta:
    """What every object of one response has.

    Args:
        id: unique, without a prefix.
        created: seconds since 1970.
        model: the served model's id.
        fingerprint: changes when the same seed may give other text.
    """

    id: str
    created: int
    model: str
    fingerprint: str


class ResponseBuilder(ABC):
    """Shapes the response to one request, as events or whole; used once.

    `usage` is what a stream has used so far, for APIs that tell it in between.
    """

    def __init__(self, request: GenerationRequest, meta: ResponseMeta) -> None:
        self._request, self._meta = request, meta
        self.usage = Usage(0, 0)

    counts_prompt_first: ClassVar[bool] = False
    """Whether the first events tell how much of the prompt was cached: they come late, then."""

    @abstractmethod
    def first_events(self, index: int, usage: Usage) -> Iterable[Event]:
        """What comes before a choice's parts. `usage` has the prompt only."""

    @abstractmethod
    def delta(self, index: int, part: OutputPart) -> Iterable[Event]:
        """A part of a choice."""

    @abstractmethod
    def finish_choice(self, index: int, finish: FinishReason) -> Iterable[Event]:
        """The end of a choice."""

    @abstractmethod
    def finish_stream(self, usage: Usage) -> Iterable[Event]:
        """The end of the stream, when all choices have ended."""

    def keep_alive(self) -> Iterable[Event]:
        """A sign of life in a stream that waits. None: a comment is sent, which clients skip."""
        return ()

    @abstractmethod
    def error(self, error: CenacleError) -> Iterable[Event]:
        """The end of a stream that cannot go on."""

    @abstractmethod
    def full_response(self, choices: Sequence[ChoiceState], usage: Usage) -> JsonObject:
        """The response to a request without `stream`."""


class ApiAdapter(ABC):
    """An API: from a body to a request, and from what is generated to a response."""

    request_model: ClassVar[type[ApiRequest]]
    response_builder: ClassVar[type[ResponseBuilder]]

    def parse(self, body: bytes, served: ServedModel, key: str = "") -> GenerationRequest:
        """What a body asks for.

        Args:
            body: as the client sent it.
            served: the model.
            key: name of the API key, which owns what is stored; "": none.

        Raises:
            InputError: it is refused; the message names the parameter.
        """
        parsed = parse_request(self.request_model, body)
        name = served.check_name(parsed.model)
        request = self._to_generation_request(parsed, served, key).take_images(served)
        return replace(request, model=name, warnings=(*request.warnings, *parsed.ignored_members()))

    def _to_generation_request(
        self,
        parsed: ApiRequest,
        served: ServedModel,
        key: str,  # noqa: ARG002
    ) -> GenerationRequest:
        return parsed.to_generation_request(served)

    def respond(self, request: GenerationRequest, meta: ResponseMeta) -> ResponseBuilder:
        """The builder of the response to a request."""
        return self.response_builder(request, meta)

    @abstractmethod
    def render_error(self, error: CenacleError) -> tuple[int, JsonObject]:
        """The HTTP status and the body for an error."""


def tool_call(call_id: str, name: str, arguments: JsonObject | str) -> JsonObject:
    """A call in an earlier message, as chat templates read it."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def match_calls(messages: list[Message]) -> tuple[Message, ...]:
    """The messages, with an id for each call that has none; results without one are for the first
    call that has no result."""
    open_ids: OrderedDict[str, None] = OrderedDict()
    for at, message in enumerate(messages):
        for index, call in enumerate(message.get("tool_calls", ())):
            call["id"] = call["id"] or f"call_{at}_{index}"
            open_ids[call["id"]] = None
        if message["role"] == "tool":
            call_id = message["tool_call_id"] or next(iter(open_ids), "")
            message["tool_call_id"] = call_id
            open_ids.pop(call_id, None)
    return tuple(messages)


def left_out_warning(field: str, types: Iterable[str]) -> tuple[str, ...]:
    """The warning of parts of a conversation that the model does not see; none: no warning."""
    names = ", ".join(sorted({name[:80] for name in types}))
    return (
        (f"{field}: left out, only the API's own servers can read them: {names}",) if names else ()
    )


def merge_messages(messages: Sequence[Message], separator: str) -> Message:
    """One turn of several messages of a role: chat templates expect turns."""
    merged: Message = {"role": messages[0]["role"]}
    for name in ("content", "reasoning_content"):
        text = separator.join(message[name] for message in messages if message.get(name))
        if text or name == "content":
            merged[name] = text
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    return {**merged, "tool_calls": calls} if calls else merged


def http_status(error: CenacleError) -> int:
    """The HTTP status for an error."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, InputError):
        return 400
    if isinstance(error, Busy):
        return 429
    return 503 if isinstance(error, ClusterError) else 500
