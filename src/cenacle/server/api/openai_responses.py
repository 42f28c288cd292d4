"""OpenAI's Responses API.

Owns: the request models, where each parameter is declared; the shapes of responses and events.
Does not know: HTTP, tokenizers, MLX, time.
Invariant: a parameter that would change the answer and is not supported is refused by name; others
that are not declared are ignored, and a header names them. A stream ends with the response that
would have come without `stream`.
Source: https://platform.openai.com/docs/api-reference/responses
Next: `response_store.py` keeps responses; `openai.py` has the older API, and what both share.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, TypeAdapter, WithJsonSchema, model_validator

from ...core.chat import FinishReason, Message, OutputPart, Tool, Usage, join_text
from ...core.request import MAX_LOGPROBS
from ...errors import CenacleError
from . import openai
from .openai import TokenLimit
from .parameters import ReasoningParameters
from .protocol import (
    MAX_TOOLS,
    ApiRequest,
    ChoiceState,
    Event,
    GenerationRequest,
    ImageUrl,
    ResponseBuilder,
    ResponseMeta,
    ServedModel,
    image_text,
    left_out_warning,
    match_calls,
    merge_messages,
    tool_call,
)
from .response_formats import NamedSchema, PlainFormat
from .response_store import ResponseStore, StoredResponse
from .structured_output import Mode, ToolChoice, restrict_output
from .tool_definitions import (
    CustomDefinition,
    FunctionDefinition,
    HostedTool,
    HostedToolChoice,
    ToolChoiceObject,
    allowed_choice,
    flatten,
    to_choice,
)
from .validation import (
    MISSING,
    UNSUPPORTED,
    Arguments,
    Items,
    JsonObject,
    Mapped,
    OneOf,
    RequestError,
    RequestModel,
    Supported,
    Tagged,
    Text,
    describe,
    fail,
    refuse,
)

LOGPROBS = "message.output_text.logprobs"  # in `include`


class _ItemTextPart(openai.TextPart):
    type: Literal["input_text", "output_text", "text"]


class _ItemImagePart(RequestModel):
    unsupported = refuse("file_id")
    type: Literal["input_image"]
    image_url: ImageUrl = Field(
        description="A data: URI, or an http(s) URL if the owner allows its host."
    )
    detail: Text = Field("auto", description="Has no effect.")

    @property
    def text(self) -> str:
        """What stands for it."""
        return image_text(self.image_url)


class _ReasoningTextPart(openai.TextPart):
    type: Literal["reasoning_text", "text"]


class _SummaryTextPart(openai.TextPart):
    type: Literal["summary_text"]


_SeenItemText = Annotated[
    str,
    OneOf(
        Text,
        Items[Supported[_ItemTextPart | openai.RefusalPart | _ItemImagePart]],
        into=openai.content_text,
    ),
]


class _Item(RequestModel):
    id: Text = ""

    @abstractmethod
    def to_template(self) -> Message | None:
        """As chat templates read it; None: the model does not see it."""


class _MessageItem(_Item):
    unsupported = refuse("audio", function_call=(), tool_calls=([],))
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _SeenItemText

    def to_template(self) -> Message:
        return {"role": openai.template_role(self.role), "content": self.content}


class _FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: Text = ""
    name: Text
    arguments: Arguments = Field(default_factory=dict)

    def to_template(self) -> Message:
        call = tool_call(self.call_id, self.name, self.arguments)
        return {"role": "assistant", "content": "", "tool_calls": [call]}


class _CustomCallItem(_Item):
    type: Literal["custom_tool_call"]
    call_id: Text = ""
    name: Text
    input: Text

    def to_template(self) -> Message:
        call = tool_call(self.call_id, self.name, {"input": self.input})
        return {"role": "assistant", "content": "", "tool_calls": [call]}


class _CallOutputItem(_Item):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Text = ""
    output: _SeenItemText = ""

    def to_template(self) -> Message:
        return {"role": "tool", "tool_call_id": self.call_id, "content": self.output}


class _ReasoningItem(_Item):
    type: Literal["reasoning"]
    summary: Items[Supported[_SummaryTextPart]] = Field([])
    content: Items[Supported[_ReasoningTextPart]] = Field([])

    def to_template(self) -> Message | None:
        text = openai.content_text(self.content or self.summary)
        if not text:  # it is encrypted, by another server
            return None
        return {"role": "assistant", "content": "", "reasoning_content": text}


class _ItemReference(_Item):
    type: Literal["item_reference"]
    id: Text

    def to_template(self) -> None:
        """None: `ResponsesAdapter` puts the item in its place."""


class _EncryptedPart(RequestModel):
    """Of an agent's message: only OpenAI's servers can read it."""

    type: Literal["encrypted_content"]
    text: ClassVar[str] = ""


class _AgentMessageItem(_Item):
    """What another of the client's agents says to this one."""

    type: Literal["agent_message"]
    author: Text = ""
    content: Annotated[
        str,
        OneOf(
            Text,
            Items[Supported[_ItemTextPart | openai.RefusalPart | _EncryptedPart]],
            into=openai.content_text,
        ),
    ] = ""

    def to_template(self) -> Message | None:
        if not self.content:
            return None
        author = f"Message from {self.author}:\n" if self.author else ""
        return {"role": "user", "content": author + self.content}


class _OtherItem(_Item):
    """What a tool that is not offered left in a conversation."""

    type: Annotated[
        str,
        WithJsonSchema(
            {
                "type": "string",
                "not": {
                    "enum": [
                        "message",
                        "function_call",
                        "custom_tool_call",
                        "function_call_output",
                        "custom_tool_call_output",
                        "reasoning",
                        "item_reference",
                        "additional_tools",
                        "agent_message",
                    ]
                },
            }
        ),
    ]

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if self.type == "compaction_trigger":
            fail("not supported by this server; remove it", "type", UNSUPPORTED)
        return self

    def to_template(self) -> None:
        """None: the model does not see it."""


def _join_items(items: Iterable[_Item]) -> list[Message]:
    """Messages of items. A turn of the assistant may be several: reasoning, calls, a message."""
    content = [message for item in items if (message := item.to_template()) is not None]
    turns: list[list[Message]] = []
    has_text = False  # the last turn
    for item in content:
        continues = turns and item["role"] == turns[-1][0]["role"] == "assistant"
        if continues and not (has_text and item["content"]):
            turns[-1].append(item)
            has_text = has_text or bool(item["content"])
        else:
            turns.append([item])
            has_text = bool(item["content"])
    return [turn[0] if len(turn) == 1 else merge_messages(turn, "") for turn in turns]


class _FunctionTool(FunctionDefinition):
    type: Literal["function"]


class _CustomTool(CustomDefinition):
    type: Literal["custom"]


_OfferedTool = Annotated[
    _FunctionTool | _CustomTool | HostedTool,
    OneOf(_FunctionTool, _CustomTool, other=HostedTool),
    BeforeValidator(flatten),
]


class _AdditionalToolsItem(_Item):
    """Tools in the conversation, as Codex sends all of its tools for some models."""

    type: Literal["additional_tools"]
    tools: Items[_OfferedTool] = Field([], max_length=MAX_TOOLS)

    def to_template(self) -> None:
        """None: they are offered like those of `tools`."""


class _NamedChoice(ToolChoiceObject):
    type: Literal["function", "custom"]
    name: Text

    def to_choice(self) -> ToolChoice:
        return ToolChoice("required", self.name)


class _AllowedToolsChoice(ToolChoiceObject):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[
        Annotated[
            _NamedChoice | HostedToolChoice,
            OneOf(_NamedChoice, other=HostedToolChoice),
            BeforeValidator(flatten),
        ]
    ] = Field(min_length=1)

    def to_choice(self) -> ToolChoice:
        return allowed_choice(self.mode, self.tools)


class _SchemaFormat(NamedSchema):
    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class _TextOptions(RequestModel):
    format: Tagged[PlainFormat | _SchemaFormat] = Field(
        default=PlainFormat(type="text"), description="What the response must match."
    )


def _read_reference(value: Any) -> Any:
    """A reference may have nothing but its id."""
    if isinstance(value, dict) and "id" in value and not {"type", "role"} & value.keys():
        return {**value, "type": "item_reference"}
    return value


_InputItem = Annotated[
    _Item,
    OneOf(
        _MessageItem,
        _FunctionCallItem,
        _CustomCallItem,
        _CallOutputItem,
        _ReasoningItem,
        _ItemReference,
        _AdditionalToolsItem,
        _AgentMessageItem,
        other=_OtherItem,
    ),
    BeforeValidator(_read_reference),
]
ITEM: TypeAdapter[_Item] = TypeAdapter(_InputItem)


def _additional_tools(items: Iterable[_Item], taken: set[str]) -> list[Tool | None]:
    """Those in the conversation; one of a name that is taken already says the same again."""
    added: list[Tool | None] = []
    for item in items:
        for offered in item.tools if isinstance(item, _AdditionalToolsItem) else ():
            tool = offered.to_tool()
            if tool is None or tool.name not in taken:
                added.append(tool)
            taken |= {tool.name} if tool is not None else set()
    return added


def _to_items(content: str | list[_Item]) -> list[_Item]:
    return [_MessageItem(role="user", content=content)] if isinstance(content, str) else content


class ResponsesRequest(openai.OpenAIParameters, ReasoningParameters):
    """The body of POST /v1/responses."""

    input: Annotated[
        list[_Item],
        OneOf(
            Text,
            Items[_InputItem],
            into=_to_items,
        ),
    ] = Field(default_factory=list, description="A question, or the conversation so far.")
    previous_response_id: Text | None = Field(
        None, description="A stored response: its conversation comes before the input."
    )
    store: bool = Field(True, description="Keep the response in memory for a while.")
    instructions: Annotated[str | list[_Item], OneOf(Text, Items[_InputItem])] = Field(
        "", description="A system message, or items, before the conversation."
    )
    max_output_tokens: TokenLimit = Field(
        None, description="Most tokens of the response; -1: as many as fit."
    )
    max_completion_tokens: TokenLimit = Field(None, description="Same as max_output_tokens.")
    max_tokens: TokenLimit = Field(None, description="Same as max_output_tokens.")
    n_predict: TokenLimit = Field(None, description="Same as max_output_tokens.")
    tools: Items[_OfferedTool] = Field(
        [], max_length=MAX_TOOLS, description="Functions that the model may call."
    )
    tool_choice: Annotated[
        Mode | _NamedChoice | _AllowedToolsChoice | HostedToolChoice,
        OneOf(Mode, _NamedChoice, _AllowedToolsChoice, other=HostedToolChoice),
        BeforeValidator(flatten),
    ] = Field("auto", description="Whether and which tools are called.")
    parallel_tool_calls: bool = Field(True, description="Allow several calls in one response.")
    text: _TextOptions = Field(_TextOptions(), description="Options of the response's text.")
    include: Items[Text] = Field(
        [], description=f"With {LOGPROBS}: the log-probability of each token."
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="So many alternatives to each token."
    )
    metadata: Mapped[Text] = Field({}, description="Repeated in the response.")

    @property
    def instruction_messages(self) -> list[Message]:
        """What comes before the conversation and is not kept with it."""
        if isinstance(self.instructions, str):
            text = self.instructions
            return [{"role": "system", "content": text}] if text else []
        return _join_items(self.instructions)

    def to_generation_request(self, served: ServedModel) -> GenerationRequest:
        """See `ApiRequest`; references to stored responses are not followed."""
        return self.continue_conversation(served, (), self.input)

    def continue_conversation(
        self,
        served: ServedModel,
        earlier: Sequence[Message],
        items: Sequence[_Item],
        earlier_tools: Sequence[Tool] = (),
    ) -> GenerationRequest:
        """What it asks for.

        Args:
            served: the model.
            earlier: messages before the input.
            items: the input, without references.
            earlier_tools: that items of earlier turns added.

        Raises:
            RequestError: parameters do not go together, or there is no conversation.
        """
        if not (messages := [*earlier, *_join_items(items)]):
            raise RequestError("input", "required, but missing", MISSING)
        form = self.text.format
        is_plain = isinstance(form, PlainFormat) and form.type == "text"
        grammar_field, grammar = self.grammar_of("text.format", None if is_plain else form)
        limits = (self.max_output_tokens, self.max_completion_tokens, self.max_tokens)
        left_out = [item.type for item in items if isinstance(item, _OtherItem)]
        request = GenerationRequest(
            (match_calls([*self.instruction_messages, *messages]),),
            is_chat=True,
            prompt_field="input",
            max_tokens=next((n for n in limits if n is not None), self.n_predict),
            sampling=self.sampling_for(served),
            stream=self.stream,
            logprobs=(self.top_logprobs or 0) if LOGPROBS in self.include else None,
            parallel_tool_calls=self.parallel_tool_calls,
            grammar=grammar,
            grammar_field=grammar_field,
            echoed_parameters=self._echo(),
            warnings=left_out_warning("input", left_out),
            **self.reasoning_fields(),
        )
        tools = [tool.to_tool() for tool in self.tools]
        taken = {tool.name for tool in tools if tool is not None}
        tools += [tool for tool in earlier_tools if tool.name not in taken]
        tools += _additional_tools(items, taken | {tool.name for tool in earlier_tools})
        if len(tools) > MAX_TOOLS:
            reason = f"expected at most {MAX_TOOLS} items, with additional_tools, got {len(tools)}"
            raise RequestError("tools", reason)
        return restrict_output(request, tools, to_choice(self.tool_choice))

    def _echo(self) -> JsonObject:
        names = {"max_output_tokens", "metadata", "parallel_tool_calls", "tool_choice", "tools"}
        return {
            **self.model_dump(include=names),
            "instructions": self._plain_instructions() or None,
            "reasoning": {"effort": self.reasoning_fields()["reasoning_effort"], "summary": None},
            "text": {"format": self.text.format.model_dump(by_alias=True, exclude_unset=True)},
            "top_logprobs": self.top_logprobs or 0,
            "previous_response_id": self.previous_response_id or None,
            "store": self.store,
        }

    def _plain_instructions(self) -> str | list[JsonObject]:
        if isinstance(self.instructions, str):
            return self.instructions
        return [item.model_dump(exclude_none=True) for item in self.instructions]


class _ResponsesBuilder(ResponseBuilder):
    def __init__(self, request: GenerationRequest, meta: ResponseMeta) -> None:
        super().__init__(request, meta)
        self._events = 0
        self._open: OutputPart | None = None  # the item that is being written
        self._items: list[JsonObject] = []  # those that are complete
        self._status = "completed"

    def first_events(self, index: int, usage: Usage) -> Iterator[Event]:  # noqa: ARG002
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", None))

    def delta(self, index: int, part: OutputPart) -> Iterator[Event]:  # noqa: ARG002
        if part.kind == "call" or self._open is None or part.kind != self._open.kind:
            if part.kind != "call" and not (part.text or part.logprobs):
                return
            yield from self._close_item()
            yield from self._open_item(part)
        assert self._open is not None
        if part.kind == "call":
            self._open = part
            text = self._request.freeform_input(part)
            kind = "function_call_arguments" if text is None else "custom_tool_call_input"
            yield self._item_event(
                f"response.{kind}.delta", delta=part.text if text is None else text
            )
            return
        (self._open,) = join_text([self._open, part])
        details: JsonObject = {"content_index": 0, "delta": part.text}
        if part.kind == "text":
            details["logprobs"] = [openai.logprob_object(token) for token in part.logprobs]
        yield self._item_event(f"response.{_CONTENT_TYPES[part.kind]}.delta", **details)

    def finish_choice(self, index: int, finish: FinishReason) -> Iterator[Event]:  # noqa: ARG002
        self._status = "incomplete" if finish.reason == "length" else "completed"
        yield from self._close_item()

    def finish_stream(self, usage: Usage) -> Iterator[Event]:
        response = self._complete(usage)
        yield self._event(f"response.{self._status}", response=response)

    def error(self, error: CenacleError) -> Iterator[Event]:
        details = openai.render_error(error)[1]["error"]
        message, code = details["message"], details["code"] or "server_error"
        yield self._event("error", code=code, message=message, param=details["param"])
        response = self._response("failed", None)
        response["error"] = {"code": "server_error", "message": message}
        yield self._event("response.failed", response=response)

    def full_response(self, choices: Sequence[ChoiceState], usage: Usage) -> JsonObject:
        (choice,) = choices
        for part in choice.parts:
            list(self.delta(0, part))
        list(self.finish_choice(0, choice.finish))
        return self._complete(usage)

    def _complete(self, usage: Usage) -> JsonObject:
        response = self._response(self._status, usage)
        if self._request.on_response is not None:
            self._request.on_response(response)
        return response

    def _open_item(self, part: OutputPart) -> Iterator[Event]:
        self._open = OutputPart(part.kind, "", part.name, part.id)
        item = self._item(self._open, "in_progress")
        if part.kind == "call":
            yield self._item_event("response.output_item.added", item=item)
            return
        (content,) = item["content"]
        yield self._item_event("response.output_item.added", item={**item, "content": []})
        yield self._item_event("response.content_part.added", content_index=0, part=content)

    def _close_item(self) -> Iterator[Event]:
        if (part := self._open) is None:
            return
        item = self._item(part, self._status)
        if part.kind == "call":
            if (text := self._request.freeform_input(part)) is not None:
                yield self._item_event("response.custom_tool_call_input.done", input=text)
            else:
                done = {"arguments": part.text, "name": part.name}
                yield self._item_event("response.function_call_arguments.done", **done)
        else:
            (content,) = item["content"]
            done = {name: content[name] for name in ("text", "logprobs") if name in content}
            kind = f"response.{_CONTENT_TYPES[part.kind]}.done"
            yield self._item_event(kind, content_index=0, **done)
            yield self._item_event("response.content_part.done", content_index=0, part=content)
        yield self._item_event("response.output_item.done", item=item)
        self._items.append(item)
        self._open = None

    def _event(self, kind: str, **details: Any) -> Event:
        self._events += 1
        return kind, {"type": kind, "sequence_number": self._events - 1, **details}

    def _item_event(self, kind: str, **details: Any) -> Event:
        """An event of the item that is being written."""
        assert self._open is not None
        item = {} if "item" in details else {"item_id": self._item_id(self._open)}
        return self._event(kind, **item, output_index=len(self._items), **details)

    def _item_id(self, part: OutputPart) -> str:
        return f"{_ID_PREFIXES[part.kind]}_{self._meta.id}_{len(self._items)}"

    def _item(self, part: OutputPart, status: str) -> JsonObject:
        """The item that is being written."""
        item = {"id": self._item_id(part), "status": status}
        if part.kind == "call":
            call_id = part.id or f"call_{self._meta.id}_{len(self._items)}"
            call = {"call_id": call_id, "name": part.name}
            if (text := self._request.freeform_input(part)) is not None:
                return {**item, "type": "custom_tool_call", **call, "input": text}
            return {**item, "type": "function_call", **call, "arguments": part.text}
        content: JsonObject = {"type": _CONTENT_TYPES[part.kind], "text": part.text}
        if part.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": [content]}
        logprobs = [openai.logprob_object(token) for token in part.logprobs]
        content = {**content, "annotations": [], "logprobs": logprobs}
        return {**item, "type": "message", "role": "assistant", "content": [content]}

    def _response(self, status: str, usage: Usage | None) -> JsonObject:
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": f"resp_{self._meta.id}",
            "object": "response",
            "created_at": self._meta.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": reason,
            "model": self._meta.model,
            "output": [*self._items],
            "service_tier": "default",
            "temperature": self._request.sampling.temperature,
            "top_p": self._request.sampling.top_p,
            "truncation": "disabled",
            "usage": usage_object(usage) if usage is not None else None,
            **self._request.echoed_parameters,
        }


_CONTENT_TYPES = {"text": "output_text", "reasoning": "reasoning_text"}
_ID_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}  # OpenAI's; clients look at them


def item_list(stored: StoredResponse) -> JsonObject:
    """The body of GET /v1/responses/ID/input_items."""
    ids = [item.get("id") or None for item in stored.input_items]
    page = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return {"object": "list", "data": [*stored.input_items], **page, "has_more": False}


def usage_object(usage: Usage) -> JsonObject:
    """How many tokens were read and generated."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def error_event(error: JsonObject) -> JsonObject:
    """An error, as `openai.error_object` has it, as the only event of a stream."""
    code = error["code"] or "server_error"
    details = {"code": code, "message": error["message"], "param": error["param"]}
    return {"type": "error", "sequence_number": 0, **details}


class ResponsesAdapter(openai.OpenAIAdapter):
    """POST /v1/responses, and the responses that it keeps."""

    request_model, response_builder = ResponsesRequest, _ResponsesBuilder

    def __init__(self) -> None:
        self.store = ResponseStore()

    def _to_generation_request(
        self, parsed: ApiRequest, served: ServedModel, key: str
    ) -> GenerationRequest:
        assert isinstance(parsed, ResponsesRequest)
        earlier: tuple[Message, ...] = ()
        earlier_tools: tuple[Tool, ...] = ()
        if parsed.previous_response_id:
            if (previous := self.store.get(key, parsed.previous_response_id)) is None:
                raise _not_stored("previous_response_id", "response", parsed.previous_response_id)
            earlier, earlier_tools = previous.conversation, previous.additional_tools
        items = [self._resolve(at, item, key) for at, item in enumerate(parsed.input)]
        request = parsed.continue_conversation(served, earlier, items, earlier_tools)
        if not parsed.store:
            return request
        prompt = request.prompts[0][len(parsed.instruction_messages) :]
        taken = {tool.name for tool in earlier_tools}
        added = [tool for tool in _additional_tools(items, taken) if tool is not None]
        additional = (*earlier_tools, *added)

        def keep(response: JsonObject) -> None:
            output = [ITEM.validate_python(item) for item in response["output"]]
            answer = _join_items(output)
            conversation: Any = (*prompt, *answer)
            sent = tuple(item.model_dump(exclude_none=True) for item in parsed.input)
            self.store.put(key, StoredResponse(response, conversation, sent, additional))

        return replace(request, on_response=keep)

    def _resolve(self, at: int, item: _Item, key: str) -> _Item:
        if not isinstance(item, _ItemReference):
            return item
        if (found := self.store.find_item(key, item.id)) is None:
            raise _not_stored(f"input[{at}].id", "item", item.id)
        return ITEM.validate_python(found)


def _not_stored(field: str, kind: str, name: str) -> RequestError:
    reason = (
        f"no {kind} {describe(name)} is kept: it was not stored, is too old, belongs to another "
        "API key, or the server was restarted; send the conversation itself as input"
    )
    return RequestError(
        field, reason, f"{kind if kind == 'item' else 'previous_response'}_not_found", 400
    )
