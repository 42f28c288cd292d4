"""OpenAI's Responses API.

Owns: the request models, where each parameter is declared; the shapes of responses and events.
Does not know: HTTP, tokenizers, MLX, time.
Invariant: a parameter is obeyed or refused by name, never ignored. Nothing is stored, so what needs
a stored response is refused. A stream ends with the response that would have come without `stream`.
Source: https://platform.openai.com/docs/api-reference/responses
Next: `openai.py` has the older API, and what both share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ...core.chat import FinishReason, Message, OutputPart, Usage, join_text
from ...core.request import MAX_LOGPROBS
from ...errors import CenacleError
from . import openai
from .protocol import (
    MAX_TOOLS,
    ChoiceState,
    Event,
    GenerationRequest,
    ResponseBuilder,
    ResponseMeta,
    ServedModel,
    merge_messages,
    tool_call,
)
from .structured_output import Mode, ToolChoice, restrict_output
from .validation import (
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
    type: Literal["input_text", "output_text"]


class _ReasoningTextPart(openai.TextPart):
    type: Literal["reasoning_text"]


_ItemText = Annotated[
    str,
    OneOf(
        Text,
        Items[Supported[_ItemTextPart]],
        into=openai.content_text,
    ),
]


class _Item(RequestModel):
    unsupported = refuse("phase", status=("completed", "incomplete"))
    id: Text = ""


class _MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _ItemText

    def to_template(self) -> Message:
        return {"role": openai.template_role(self.role), "content": self.content}


class _FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Arguments

    def to_template(self) -> Message:
        call = tool_call(self.call_id, self.name, self.arguments)
        return {"role": "assistant", "content": "", "tool_calls": [call]}


class _FunctionOutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: Text
    output: _ItemText

    def to_template(self) -> Message:
        return {"role": "tool", "tool_call_id": self.call_id, "content": self.output}


class _ReasoningItem(_Item):
    unsupported = refuse("encrypted_content", summary=([],), **_Item.unsupported)
    type: Literal["reasoning"]
    content: Items[Supported[_ReasoningTextPart]] = Field([])

    def to_template(self) -> Message:
        text = openai.content_text(self.content)
        return {"role": "assistant", "content": "", "reasoning_content": text}


def _join_items(content: str | Sequence[Message]) -> list[Message]:
    """Messages of items. A turn of the assistant may be several: reasoning, calls, a message."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
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


class _FunctionTool(openai.FunctionDefinition):
    type: Literal["function"]


class _FunctionChoice(openai.ToolChoiceObject):
    type: Literal["function"]
    name: Text

    def to_choice(self) -> ToolChoice:
        return ToolChoice("required", self.name)


class _AllowedToolsChoice(openai.ToolChoiceObject):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[Tagged[_FunctionChoice]] = Field(min_length=1)

    def to_choice(self) -> ToolChoice:
        return ToolChoice(self.mode, allowed=tuple(choice.name for choice in self.tools))


class _SchemaFormat(openai.NamedSchema):
    type: Literal["json_schema"]


class _TextOptions(RequestModel):
    unsupported = refuse("verbosity")
    format: Tagged[openai.PlainFormat | _SchemaFormat] = Field(
        default=openai.PlainFormat(type="text"), description="What the response must match."
    )


class _Reasoning(RequestModel):
    unsupported = refuse("summary", "generate_summary")
    effort: openai.Effort | None = Field(default=None, description="How much the model may reason.")


def _check_include(value: Any) -> Any:
    if isinstance(value, str) and value != LOGPROBS:
        reason = f"expected {LOGPROBS!r}, got {describe(value)}"
        fail(f"not supported by this server; {reason}", code=UNSUPPORTED)
    return value


class ResponsesRequest(openai.OpenAIParameters):
    """The body of POST /v1/responses."""

    unsupported = refuse(
        "conversation",
        "context_management",
        "max_tool_calls",
        "moderation",
        "previous_response_id",
        "prompt",
        "prompt_cache_options",
        "prompt_cache_retention",
        background=(False,),
        service_tier=("auto", "default"),
        store=(False,),
        stream_options=({}, {"include_obfuscation": False}),
        truncation=("disabled",),
    )
    input: Annotated[
        list[Message],
        OneOf(
            Text,
            Annotated[
                Items[
                    Annotated[
                        Message,
                        OneOf(
                            _MessageItem,
                            _FunctionCallItem,
                            _FunctionOutputItem,
                            _ReasoningItem,
                            unsupported=True,
                            into=lambda item: item.to_template(),
                        ),
                    ]
                ],
                Field(min_length=1),
            ],
            into=_join_items,
        ),
    ] = Field(description="A question, or the conversation so far.")
    instructions: Text = Field("", description="A system message before the conversation.")
    max_output_tokens: int | None = Field(None, ge=1, description="Most tokens of the response.")
    tools: Items[Supported[_FunctionTool]] = Field(
        [], max_length=MAX_TOOLS, description="Functions that the model may call."
    )
    tool_choice: Tagged[Mode | _FunctionChoice | _AllowedToolsChoice] = Field(
        "auto", description="Whether and which tools are called."
    )
    parallel_tool_calls: bool = Field(True, description="Allow several calls in one response.")
    text: _TextOptions = Field(_TextOptions(), description="Options of the response's text.")
    reasoning: _Reasoning = Field(_Reasoning(), description="Options of reasoning.")
    include: Items[
        Annotated[Literal["message.output_text.logprobs"], BeforeValidator(_check_include)]
    ] = Field([], description="Report the log-probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="So many alternatives to each token."
    )
    metadata: Mapped[Text] = Field({}, description="Repeated in the response.")

    def to_generation_request(self, served: ServedModel) -> GenerationRequest:
        """See `ApiRequest`."""
        if self.top_logprobs is not None and not self.include:
            raise RequestError("top_logprobs", f"only allowed with {LOGPROBS} in include")
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        request = GenerationRequest(
            ((*system, *self.input),),
            is_chat=True,
            prompt_field="input",
            max_tokens=self.max_output_tokens,
            sampling=self.sampling_for(served),
            stream=self.stream,
            logprobs=(self.top_logprobs or 0) if self.include else None,
            parallel_tool_calls=self.parallel_tool_calls,
            grammar=self.text.format.to_grammar("text.format"),
            grammar_field="text.format",
            reasoning_effort=self.reasoning.effort,
            echoed_parameters=self._echo(),
        )
        tools = [tool.to_tool() for tool in self.tools]
        return restrict_output(request, tools, openai.to_choice(self.tool_choice))

    def _echo(self) -> JsonObject:
        names = {"max_output_tokens", "metadata", "parallel_tool_calls", "tool_choice", "tools"}
        return {
            **self.model_dump(include=names),
            "instructions": self.instructions or None,
            "reasoning": {"effort": self.reasoning.effort, "summary": None},
            "text": {"format": self.text.format.model_dump(by_alias=True, exclude_unset=True)},
            "top_logprobs": self.top_logprobs or 0,
        }


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
            yield self._item_event("response.function_call_arguments.delta", delta=part.text)
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
        response = self._response(self._status, usage)
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
        return self._response(self._status, usage)

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
            call = {"call_id": call_id, "name": part.name, "arguments": part.text}
            return {**item, "type": "function_call", **call}
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
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "temperature": self._request.sampling.temperature,
            "top_p": self._request.sampling.top_p,
            "truncation": "disabled",
            "usage": usage_object(usage) if usage is not None else None,
            **self._request.echoed_parameters,
        }


_CONTENT_TYPES = {"text": "output_text", "reasoning": "reasoning_text"}
_ID_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}  # OpenAI's; clients look at them


def usage_object(usage: Usage) -> JsonObject:
    """How many tokens were read and generated."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class ResponsesAdapter(openai.OpenAIAdapter):
    """POST /v1/responses."""

    request_model, response_builder = ResponsesRequest, _ResponsesBuilder
