"""Anthropic's Messages API.

Owns: the request models, where each parameter is declared; the shapes of messages, events, errors.
Does not know: HTTP, tokenizers, MLX, time.
Invariant: a parameter that would change the answer and is not supported is refused by name; others
that are not declared are ignored, and a header of the response names them.
Source: https://docs.anthropic.com/en/api/messages
Next: `protocol.py` has what all APIs share, `app.py` has the endpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from operator import itemgetter
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from ...core.chat import FinishReason, Message, OutputPart, Tool, Usage, join_text
from ...core.request import Sampling
from ...errors import CenacleError
from ...images.sources import check_source
from .parameters import Effort, ReasoningParameters, SharedParameters
from .protocol import (
    MAX_TOOLS,
    ApiAdapter,
    ApiRequest,
    ChoiceState,
    Event,
    GenerationRequest,
    ImageUrl,
    ResponseBuilder,
    ResponseMeta,
    ServedModel,
    StopString,
    ToolName,
    http_status,
    image_text,
    left_out_warning,
    match_calls,
    merge_messages,
    tool_call,
)
from .structured_output import ToolChoice, json_schema_grammar, restrict_output
from .tool_definitions import HostedTool, flatten
from .validation import (
    UNSUPPORTED,
    Items,
    JsonObject,
    OneOf,
    RequestError,
    RequestModel,
    Supported,
    Tagged,
    Text,
    fail,
    parse_arguments,
)

MAX_STOPS = 16
MIN_THINKING_TOKENS = 1024  # Anthropic's smallest budget


class _TextBlock(RequestModel):
    type: Literal["text"]
    text: Text


class _TextSource(RequestModel):
    type: Literal["text"]
    data: Text

    @property
    def text(self) -> str:
        return self.data


class _BlockSource(RequestModel):
    type: Literal["content"]
    content: Annotated[str | list[_TextBlock], OneOf(Text, Items[Supported[_TextBlock]])]

    @property
    def text(self) -> str:
        return _content_text(self.content)


class _DocumentBlock(RequestModel):
    """A document whose text is in the request; its title and context come before it."""

    type: Literal["document"]
    source: Supported[_TextSource | _BlockSource]
    title: Text = ""
    context: Text = ""

    @property
    def text(self) -> str:
        return "\n\n".join(part for part in (self.title, self.context, self.source.text) if part)


class _SearchResultBlock(RequestModel):
    type: Literal["search_result"]
    source: Text
    title: Text
    content: Items[Supported[_TextBlock]]

    @property
    def text(self) -> str:
        return f"{self.title} ({self.source})\n\n{_content_text(self.content)}"


def _check_data(value: str) -> str:
    try:
        check_source(f"data:image/any;base64,{value}")
    except ValueError as error:
        fail(str(error).replace(" behind the comma", ""))
    return value


class _Base64Source(RequestModel):
    type: Literal["base64"]
    media_type: Annotated[str, Field(pattern="^image/[a-zA-Z0-9.+-]{1,60}$")]
    data: Annotated[Text, AfterValidator(_check_data)]

    @property
    def url(self) -> str:
        return f"data:{self.media_type};base64,{self.data}"


class _UrlSource(RequestModel):
    type: Literal["url"]
    url: ImageUrl = Field(description="An http(s) URL, if the owner allows its host.")


class _ImageBlock(RequestModel):
    type: Literal["image"]
    source: Supported[_Base64Source | _UrlSource]

    @property
    def text(self) -> str:
        return image_text(self.source.url)


_TextBlocks = Items[Supported[_TextBlock | _DocumentBlock | _SearchResultBlock]]


class _ToolReferenceBlock(RequestModel):
    """A tool that a client's search found: `tools` has it, and it is offered from the start."""

    type: Literal["tool_reference"]
    tool_name: Text

    @property
    def text(self) -> str:
        return f"Tool found: {self.tool_name}\n"


_MEDIA = ("audio", "file", "image", "image_url", "input_audio", "input_image", "video")
_LEFT_OUT_OF_USER = re.compile(
    r".+_tool_use|.+_result|container_upload|fallback|mcp_tool_listing|redacted_thinking"
)


class _OtherBlock(RequestModel):
    """What a tool of Anthropic's own servers left in a conversation: the model does not see it."""

    type: Annotated[
        str,
        WithJsonSchema({"type": "string", "not": {"enum": ["text", "thinking", "tool_use"]}}),
    ]

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if self._is_content():
            fail("not supported by this server; remove the block", "type", UNSUPPORTED)
        return self

    def _is_content(self) -> bool:
        """Whether the model would have to see it."""
        return self.type in (*_MEDIA, "tool_result")


class _OtherUserBlock(_OtherBlock):
    """The same in a turn of the user, where an unknown block is content."""

    def _is_content(self) -> bool:
        return not _LEFT_OUT_OF_USER.fullmatch(self.type) or self.type == "tool_result"


def _content_text(content: str | Sequence[Any], separator: str = "") -> str:
    """The text of a content; blocks of other types have none."""
    if isinstance(content, str):
        return content
    return separator.join(block.text for block in content if hasattr(block, "text"))


class _ToolResultBlock(RequestModel):
    type: Literal["tool_result"]
    tool_use_id: Text = ""
    content: Annotated[
        str,
        OneOf(
            Text,
            Items[
                Supported[
                    _TextBlock
                    | _DocumentBlock
                    | _SearchResultBlock
                    | _ToolReferenceBlock
                    | _ImageBlock
                ]
            ],
            into=_content_text,
        ),
    ] = ""
    is_error: bool = False

    def to_template(self) -> Message:
        content = f"Error: {self.content}" if self.is_error else self.content
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": content}


class _ToolUseBlock(RequestModel):
    type: Literal["tool_use"]
    id: Text = ""
    name: Text
    input: Annotated[JsonObject | str, BeforeValidator(parse_arguments)] = Field({})

    def to_template(self) -> JsonObject:
        return tool_call(self.id, self.name, self.input)


class _ThinkingBlock(RequestModel):
    type: Literal["thinking"]
    thinking: Text
    signature: Text = ""


class _Tool(RequestModel):
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {"parameters": ({},)}
    type: Literal["custom"] = "custom"
    name: ToolName
    description: Text = ""
    input_schema: JsonObject = Field(description="A JSON schema of the arguments.")
    strict: bool = Field(False, description="Calls that break the schema are text.")

    def to_tool(self) -> Tool:
        return Tool(self.name, self.description, self.input_schema, self.strict)


def _read_function(value: Any) -> Any:
    """A tool, if it comes in a form of OpenAI's APIs."""
    value = flatten(value)
    if not isinstance(value, dict) or value.get("type") != "function":
        return value
    schema = value.get("parameters") or {"type": "object"}
    rest = {name: v for name, v in value.items() if name not in ("type", "parameters")}
    return {"input_schema": schema, **rest}


_OfferedTool = Annotated[
    _Tool | HostedTool, OneOf(_Tool, other=HostedTool), BeforeValidator(_read_function)
]


class _NamedReference(RequestModel):
    type: Literal["tool_reference"]
    name: Text


class _InlineDefinition(RequestModel):
    type: Literal["tool_definition"]
    definition: _OfferedTool


class _ToolChangeBlock(RequestModel):
    """From here on a tool is offered, or not."""

    type: Literal["tool_addition", "tool_removal"]
    tool: Annotated[
        _NamedReference | _InlineDefinition | HostedTool,
        OneOf(_NamedReference, _InlineDefinition, other=HostedTool),
    ]
    text: ClassVar[str] = ""


class _CompactionBlock(RequestModel):
    """A summary in place of all that comes before it; without content, nothing."""

    type: Literal["compaction"]
    content: Text = ""
    tool_changes: Items[_ToolChangeBlock] = Field([])


class _SystemOutputConfig(RequestModel):
    effort: Effort = None


class _SystemMessage(RequestModel):
    role: Literal["system"]
    content: Annotated[
        str | list[Any],
        OneOf(
            Text,
            Items[Supported[_TextBlock | _DocumentBlock | _SearchResultBlock | _ToolChangeBlock]],
        ),
    ] = ""
    clear_at: Literal["next_user_message", "never"] = "never"
    output_config: _SystemOutputConfig = Field(_SystemOutputConfig())

    def to_template(self) -> list[Message]:
        text = _content_text(self.content)
        return [{"role": "system", "content": text}] if text else []


class _UserMessage(RequestModel):
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {"tool_calls": ([],)}
    role: Literal["user"]
    content: Annotated[
        str | list[Any],
        OneOf(
            Text,
            Items[
                Annotated[
                    Any,
                    OneOf(
                        _TextBlock,
                        _DocumentBlock,
                        _SearchResultBlock,
                        _ImageBlock,
                        _ToolResultBlock,
                        _CompactionBlock,
                        other=_OtherUserBlock,
                    ),
                ]
            ],
        ),
    ]

    def to_template(self) -> list[Message]:
        """Results of tools are messages of their own, before the text."""
        if isinstance(self.content, str):  # which may be long: no look at its characters
            return [{"role": "user", "content": self.content}]
        results = [b.to_template() for b in self.content if isinstance(b, _ToolResultBlock)]
        others = [b for b in self.content if not isinstance(b, _ToolResultBlock | _OtherBlock)]
        if results and not others:
            return results
        return [*results, {"role": "user", "content": _content_text(self.content)}]


class _AssistantMessage(RequestModel):
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {"tool_calls": ([],)}
    role: Literal["assistant"]
    content: Annotated[
        str | list[Any],
        OneOf(
            Text,
            Items[
                Annotated[
                    Any,
                    OneOf(
                        _TextBlock,
                        _DocumentBlock,
                        _SearchResultBlock,
                        _ThinkingBlock,
                        _ToolUseBlock,
                        _CompactionBlock,
                        other=_OtherBlock,
                    ),
                ]
            ],
        ),
    ]

    def to_template(self) -> list[Message]:
        message: Message = {"role": "assistant", "content": _content_text(self.content)}
        if isinstance(self.content, str):
            return [message]
        thinking = [b.thinking for b in self.content if isinstance(b, _ThinkingBlock)]
        if thinking:
            message["reasoning_content"] = "".join(thinking)
        calls = [b.to_template() for b in self.content if isinstance(b, _ToolUseBlock)]
        if calls:
            message["tool_calls"] = calls
        return [message]


class _ToolMode(RequestModel):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool = False

    def to_choice(self) -> ToolChoice:
        return ToolChoice("required" if self.type == "any" else self.type)


class _NamedTool(RequestModel):
    type: Literal["tool"]
    name: Text
    disable_parallel_tool_use: bool = False

    def to_choice(self) -> ToolChoice:
        return ToolChoice("required", self.name)


class _ThinkingEnabled(RequestModel):
    type: Literal["enabled"]
    budget_tokens: int = Field(ge=MIN_THINKING_TOKENS, description="Most tokens of reasoning.")

    def to_thinking(self) -> tuple[bool | None, int | None]:
        return True, self.budget_tokens


class _ThinkingMode(RequestModel):
    type: Literal["disabled", "adaptive", "between_tools"]

    def to_thinking(self) -> tuple[bool | None, int | None]:
        return False if self.type == "disabled" else None, None


class _OutputFormat(RequestModel):
    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")

    def to_grammar(self, field: str) -> str:
        return json_schema_grammar(self.schema_, f"{field}.schema")


class _OutputConfig(RequestModel):
    format: _OutputFormat | None = None
    effort: Effort = Field(default=None, description="How much the model may reason.")


def _check_thread(value: Any) -> Any:
    """A client may ask that a conversation be kept, not go on with one and send only its end."""
    if isinstance(value, dict) and value.get("type") == "continue":
        reason = "this server keeps no threads; send all messages of the conversation, without it"
        fail(reason, code=UNSUPPORTED)
    return value


@dataclass
class _Conversation:
    """What messages come to: what the model sees, and what changes on the way.

    Args:
        groups: messages as chat templates read them, by message of the request.
        changes: of the tools.
        effort: of the last message that has one.
        left_out: types of blocks that the model does not see.
    """

    groups: list[list[Message]] = field(default_factory=list)
    changes: list[_ToolChangeBlock] = field(default_factory=list)
    effort: str | None = None
    left_out: set[str] = field(default_factory=set)

    def add(self, message: _SystemMessage | _UserMessage | _AssistantMessage) -> None:
        """Go on with a message."""
        blocks = message.content if isinstance(message.content, list) else []
        summaries = [
            at for at, b in enumerate(blocks) if isinstance(b, _CompactionBlock) and b.content
        ]
        if summaries:
            last = summaries[-1]
            self.groups = [[{"role": "user", "content": blocks[last].content}]]
            self.changes = [*blocks[last].tool_changes]
            blocks = blocks[last + 1 :]
            if not blocks:
                return
            message = message.model_copy(update={"content": blocks})
        for block in blocks:
            if isinstance(block, _ToolChangeBlock):
                self.changes.append(block)
            elif isinstance(block, _OtherBlock):
                self.left_out.add(block.type)
        if isinstance(message, _SystemMessage):
            self.effort = message.output_config.effort or self.effort
        self.groups.append(message.to_template())

    def change_tools(self, tools: Sequence[Tool | None]) -> list[Tool | None]:
        """The tools that are offered at the end, of those of the request."""
        added: dict[str, Tool] = {}
        removed: set[str] = set()
        for change in self.changes:
            if isinstance(change.tool, _InlineDefinition):
                tool = change.tool.definition.to_tool()
                if tool is not None:
                    added[tool.name] = tool
                    removed.discard(tool.name)
            elif isinstance(change.tool, _NamedReference) and change.type == "tool_removal":
                removed.add(change.tool.name)
            elif isinstance(change.tool, _NamedReference):
                removed.discard(change.tool.name)
        known = [tool for tool in tools if tool is None or tool.name not in added]
        offered = [t for t in (*known, *added.values()) if t is None or t.name not in removed]
        if len(offered) > MAX_TOOLS:
            reason = f"expected at most {MAX_TOOLS}, with those that messages add"
            raise RequestError("tools", f"{reason}, got {len(offered)}")
        return offered


class CountTokensRequest(ReasoningParameters):
    """The body of POST /v1/messages/count_tokens: what the prompt is made of."""

    model: Text = Field(description="The served model.")
    messages: Items[
        Annotated[
            _UserMessage | _AssistantMessage | _SystemMessage,
            OneOf(_UserMessage, _AssistantMessage, _SystemMessage, tag="role"),
        ]
    ] = Field(min_length=1, description="The conversation so far.")
    system: Annotated[
        str, OneOf(Text, _TextBlocks, into=lambda blocks: _content_text(blocks, "\n\n"))
    ] = Field("", description="A system message before the conversation.")
    tools: Items[_OfferedTool] = Field(
        [], max_length=MAX_TOOLS, description="Tools that the model may call."
    )
    tool_choice: Tagged[_ToolMode | _NamedTool] = Field(
        _ToolMode(type="auto"), description="Whether and which tools are called."
    )
    thinking: Tagged[_ThinkingEnabled | _ThinkingMode] | None = Field(  # type: ignore[assignment]
        None, description="Whether the model reasons first. None: as its template has it."
    )
    output_config: _OutputConfig = Field(
        _OutputConfig(), description="What the response must match, and how much the model reasons."
    )
    output_format: _OutputFormat | None = Field(
        None, description="Same as the format of output_config."
    )
    thread: Annotated[JsonObject | None, BeforeValidator(_check_thread)] = Field(
        None, description="Has no effect; continue is refused."
    )

    def to_generation_request(self, served: ServedModel) -> GenerationRequest:  # noqa: ARG002
        """See `ApiRequest`."""
        conversation = self._read_conversation()
        messages = _merge_turns(conversation.groups)
        warnings = left_out_warning("messages", conversation.left_out)
        if messages and _is_empty_turn(messages[-1]):
            messages.pop()  # it had only what is left out
            warnings += ("messages: the last turn, without text, is left out",)
        if not messages:
            raise RequestError("messages", "expected text, got none")
        last = messages[-1]
        if "tool_calls" in last:
            raise RequestError("messages", "expected a tool_result at the end, got a tool_use")
        system = [{"role": "system", "content": self.system}] if self.system else []
        reasoning = self.reasoning_fields()
        if isinstance(self.thinking, _ThinkingMode) and self.thinking.type == "between_tools":
            reasoning["enable_thinking"] = last["role"] == "tool"
        effort = conversation.effort or self.output_config.effort
        request = GenerationRequest(
            (match_calls([*system, *messages]),),
            is_chat=True,
            prompt_field="messages",
            max_tokens=None,
            sampling=Sampling(),
            parallel_tool_calls=not self.tool_choice.disable_parallel_tool_use,
            continue_final_message=last["role"] == "assistant",
            warnings=warnings,
            **{**reasoning, "reasoning_effort": effort or reasoning["reasoning_effort"]},
        )
        request = self._with_format(request)
        tools = conversation.change_tools([tool.to_tool() for tool in self.tools])
        return restrict_output(request, tools, self.tool_choice.to_choice())

    def _read_conversation(self) -> _Conversation:
        conversation = _Conversation()
        users = [at for at, message in enumerate(self.messages) if message.role == "user"]
        last_user = max(users, default=-1)
        for at, message in enumerate(self.messages):
            if isinstance(message, _SystemMessage) and message.clear_at == "next_user_message":
                update = {"content": ""} if at < last_user else {}
                conversation.add(message.model_copy(update=update))
            else:
                conversation.add(message)
        return conversation

    def _with_format(self, request: GenerationRequest) -> GenerationRequest:
        """The request with the grammar of its response, if there is one."""
        field = "output_config.format" if self.output_config.format else "output_format"
        wanted = self.output_config.format or self.output_format
        grammar = wanted.to_grammar(field) if wanted else None
        return replace(request, grammar=grammar, grammar_field=field)


class MessagesRequest(CountTokensRequest, SharedParameters):
    """The body of POST /v1/messages."""

    max_tokens: int = Field(ge=1, description="Most tokens of the response.")
    temperature: float = Field(1.0, ge=0, le=1, description="0 is greedy decoding.")
    stop_sequences: Items[StopString] = Field(
        [],
        max_length=MAX_STOPS,
        description="Strings that end the response, which does not include them.",
    )
    metadata: JsonObject = Field({}, description="Has no effect.")

    def _with_format(self, request: GenerationRequest) -> GenerationRequest:
        wanted = self.output_config.format or self.output_format
        own = "output_config.format" if self.output_config.format else "output_format"
        field, grammar = self.grammar_of(own, wanted)
        return replace(request, grammar=grammar, grammar_field=field)

    def to_generation_request(self, served: ServedModel) -> GenerationRequest:
        """See `ApiRequest`."""
        request = super().to_generation_request(served)
        budget = request.thinking_budget
        # With tools, reasoning between calls has the budget together.
        if budget is not None and budget >= self.max_tokens and not self.tools:
            reason = f"expected less than max_tokens={self.max_tokens}, got {budget}"
            raise RequestError("thinking.budget_tokens", reason)
        return replace(
            request,
            max_tokens=self.max_tokens,
            sampling=self.sampling_for(served),
            stop=tuple(self.stop_sequences),
            stream=self.stream,
        )


def _is_empty_turn(message: Message) -> bool:
    is_answer = message["role"] == "assistant" and "tool_calls" not in message
    return is_answer and not message["content"]


def _merge_turns(groups: Sequence[Sequence[Message]]) -> list[Message]:
    """All messages, neighbors of one role in one turn."""
    messages = chain.from_iterable(groups)
    turns: list[Message] = []
    for role, neighbors in groupby(messages, itemgetter("role")):
        group = list(neighbors)
        turns += [merge_messages(group, "\n")] if role in ("user", "assistant") else group
    return turns


class _MessageBuilder(ResponseBuilder):
    counts_prompt_first = True

    def __init__(self, request: GenerationRequest, meta: ResponseMeta) -> None:
        super().__init__(request, meta)
        self._kind: str | None = None  # of the open block
        self._index = -1  # of the last block
        self._finish = FinishReason("stop")
        self._calls = 0

    def first_events(self, index: int, usage: Usage) -> Iterator[Event]:  # noqa: ARG002
        yield _event("message_start", message=self._message([], usage))

    def delta(self, index: int, part: OutputPart) -> Iterator[Event]:  # noqa: ARG002
        if not part.text and part.kind != "call":
            return
        if part.kind == "call" or part.kind != self._kind:
            yield from self._close_block()
            self._index, self._kind = self._index + 1, part.kind
            empty = replace(part, text="{}" if part.kind == "call" else "")
            block = self._block(empty)
            yield _event("content_block_start", index=self._index, content_block=block)
        delta = {
            "text": {"type": "text_delta", "text": part.text},
            "reasoning": {"type": "thinking_delta", "thinking": part.text},
            "call": {"type": "input_json_delta", "partial_json": part.text},
        }[part.kind]
        yield _event("content_block_delta", index=self._index, delta=delta)

    def finish_choice(self, index: int, finish: FinishReason) -> Iterator[Event]:  # noqa: ARG002
        self._finish = finish
        yield from self._close_block()

    def finish_stream(self, usage: Usage) -> Iterator[Event]:
        yield _event("message_delta", delta=self._stop_reason(), usage=usage_object(usage))
        yield _event("message_stop")

    def keep_alive(self) -> tuple[Event, ...]:
        return (_event("ping"),)

    def error(self, error: CenacleError) -> Iterator[Event]:
        yield "error", render_error(error)[1]

    def full_response(self, choices: Sequence[ChoiceState], usage: Usage) -> JsonObject:
        (choice,) = choices
        self._finish = choice.finish
        content = [self._block(part) for part in join_text(choice.parts) if part.text]
        return {**self._message(content, usage), **self._stop_reason()}

    def _close_block(self) -> Iterator[Event]:
        if self._kind == "reasoning":
            # Signatures prove to Anthropic's own servers that reasoning is theirs.
            signature = {"type": "signature_delta", "signature": ""}
            yield _event("content_block_delta", index=self._index, delta=signature)
        if self._kind is not None:
            yield _event("content_block_stop", index=self._index)
        self._kind = None

    def _block(self, part: OutputPart) -> JsonObject:
        if part.kind == "text":
            return {"type": "text", "text": part.text}
        if part.kind == "reasoning":
            return {"type": "thinking", "thinking": part.text, "signature": ""}
        call_id = part.id or f"toolu_{self._meta.id}_{self._calls}"
        self._calls += 1
        return {
            "type": "tool_use",
            "id": call_id,
            "name": part.name,
            "input": json.loads(part.text),
        }

    def _stop_reason(self) -> JsonObject:
        reasons = {"length": "max_tokens", "string": "stop_sequence", "stop": "end_turn"}
        called = self._calls and self._finish.reason == "stop"
        reason = "tool_use" if called else reasons[self._finish.reason]
        return {"stop_reason": reason, "stop_sequence": self._finish.string}

    def _message(self, content: list[JsonObject], usage: Usage) -> JsonObject:
        return {
            "id": f"msg_{self._meta.id}",
            "type": "message",
            "role": "assistant",
            "model": self._meta.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_object(usage),
        }


def _event(kind: str, **details: Any) -> Event:
    return kind, {"type": kind, **details}


def usage_object(usage: Usage) -> JsonObject:
    """How many tokens were read and generated; `input_tokens` are those that were computed."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def render_error(error: CenacleError) -> tuple[int, JsonObject]:
    """The HTTP status and the body for an error."""
    status = http_status(error)
    body = error_object(status, str(error))
    if getattr(error, "field", None) == "thread":
        # Clients that see this send the whole conversation.
        body["error"]["details"] = {"error_code": "thread_not_found"}
    return status, body


def error_object(status: int, message: str) -> JsonObject:
    """Anthropic's form of an error."""
    kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


class MessagesAdapter(ApiAdapter):
    """POST /v1/messages."""

    request_model: ClassVar[type[ApiRequest]] = MessagesRequest
    response_builder = _MessageBuilder

    def render_error(self, error: CenacleError) -> tuple[int, JsonObject]:
        """See `ApiAdapter`."""
        return render_error(error)


class CountTokensAdapter(MessagesAdapter):
    """POST /v1/messages/count_tokens."""

    request_model = CountTokensRequest
