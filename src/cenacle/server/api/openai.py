"""OpenAI's chat completions and completions.

Owns: the request models, where each parameter is declared; the shapes of responses and errors.
Does not know: HTTP, tokenizers, MLX, time.
Invariant: a parameter that would change the answer and is not supported is refused by name; others
that are not declared are ignored, and a header of the response names them.
Source: https://platform.openai.com/docs/api-reference/chat
Next: `openai_responses.py` is OpenAI's newer API, `protocol.py` has what all APIs share.
"""

from __future__ import annotations

import codecs
import json
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from ...core.chat import FinishReason, Message, OutputPart, TokenLogprob, Tool, Usage, join_text
from ...core.request import MAX_LOGPROBS
from ...errors import CenacleError, InputError, NodesMissing
from .parameters import ReasoningParameters, SharedParameters
from .protocol import (
    MAX_STOPS,
    MAX_TOOLS,
    ApiAdapter,
    ChoiceState,
    Event,
    GenerationRequest,
    ImageUrl,
    Prompt,
    ResponseBuilder,
    ResponseMeta,
    ServedModel,
    StopString,
    http_status,
    image_text,
    match_calls,
    tool_call,
)
from .response_formats import PlainFormat, ResponseFormat
from .structured_output import (
    ToolChoice,
    restrict_output,
)
from .tool_definitions import (
    CustomDefinition,
    FunctionDefinition,
    HostedTool,
    HostedToolChoice,
    ToolChoiceObject,
    allowed_choice,
    nest,
    to_choice,
)
from .validation import (
    INVALID_VALUE,
    MAX_INTEGER,
    UNSUPPORTED,
    Arguments,
    Items,
    JsonObject,
    OneOf,
    RequestError,
    RequestModel,
    Supported,
    Text,
    refuse,
)

MAX_N = 8
MAX_CHOICES = 32  # prompts times n of one HTTP request
MAX_COMPLETION_LOGPROBS = 5  # OpenAI's limit for completions
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat may fill the context


class OpenAIParameters(SharedParameters):
    """What chat completions, completions and responses have in common."""

    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy decoding.")
    user: Text = Field("", description="Has no effect.")
    safety_identifier: Text = Field("", description="Has no effect.")
    prompt_cache_key: Text = Field("", description="Has no effect.")


class _StreamOptions(RequestModel):
    include_usage: bool = Field(False, description="End with a chunk that counts tokens.")
    continuous_usage_stats: bool = Field(
        False, description="With include_usage: every chunk counts tokens."
    )


class _UsageOptions(RequestModel):
    include: bool = False


def _check_limit(value: Any) -> Any:
    return None if value == -1 and not isinstance(value, bool) else value


TokenLimit = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_check_limit)]


class _CompletionParameters(OpenAIParameters):
    """What chat completions and completions have in common."""

    max_tokens: TokenLimit = Field(
        None, description="Most tokens of the response; -1: as many as fit."
    )
    n_predict: TokenLimit = Field(None, description="Same as max_tokens.")
    n: int = Field(1, ge=1, le=MAX_N, description="Choices per prompt.")
    stop: Annotated[
        tuple[str, ...],
        OneOf(
            StopString,
            Annotated[Items[StopString], Field(max_length=MAX_STOPS)],
            into=lambda stop: (stop,) if isinstance(stop, str) else tuple(stop),
        ),
    ] = Field(
        default_factory=tuple,
        description="Strings that end the response, which does not include them.",
    )
    min_tokens: int = Field(
        0, ge=0, description="So many tokens come before the model or a stop string may end."
    )
    ignore_eos: bool = Field(False, description="The model cannot end the response.")
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Report this about the tokens of the prompt."
    )
    stream_options: _StreamOptions | None = None
    response_format: ResponseFormat | None = Field(
        None, description="What the response must match."
    )

    def shared_fields(self, served: ServedModel, max_tokens: int | None) -> JsonObject:
        """Fields of the `GenerationRequest` that come from these parameters."""
        if max_tokens is not None and self.min_tokens > max_tokens:
            reason = f"expected at most max_tokens={max_tokens}, got {self.min_tokens}"
            raise RequestError("min_tokens", reason)
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs", "not supported with stream=true", UNSUPPORTED)
        options = self.stream_options
        include_usage = options is not None and options.include_usage
        wanted = self.response_format
        is_plain = isinstance(wanted, PlainFormat) and wanted.type == "text"
        grammar_field, grammar = self.grammar_of("response_format", None if is_plain else wanted)
        return {
            "sampling": self.sampling_for(served),
            "max_tokens": max_tokens,
            "stop": self.stop,
            "n": self.n,
            "stream": self.stream,
            "include_usage": include_usage,
            "continuous_usage": bool(include_usage and options and options.continuous_usage_stats),
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "prompt_logprobs": self.prompt_logprobs,
            "grammar": grammar,
            "grammar_field": grammar_field,
        }


class TextPart(RequestModel):
    """A part of a message's content."""

    text: Text


class _ChatTextPart(TextPart):
    type: Literal["text", "input_text", "output_text"] = "text"


class RefusalPart(RequestModel):
    """What a model said in place of an answer."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        """Its text, as of any part."""
        return self.refusal


class _ImageAddress(RequestModel):
    url: ImageUrl = Field(
        description="A data: URI, or an http(s) URL if the owner allows its host."
    )
    detail: Text = Field("auto", description="Has no effect.")


def _read_address(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class _ImagePart(RequestModel):
    type: Literal["image_url"]
    image_url: Annotated[_ImageAddress, BeforeValidator(_read_address)]

    @property
    def text(self) -> str:
        """What stands for it."""
        return image_text(self.image_url.url)


def content_text(content: str | Sequence[Any]) -> str:
    """The text of a message's content."""
    if isinstance(content, str):
        return content
    parts: Sequence[Any] = content
    return "".join(part.text for part in parts)


_Content = Annotated[
    str,
    OneOf(
        Text,
        Items[Supported[_ChatTextPart | RefusalPart]],
        into=content_text,
    ),
]


_SeenContent = Annotated[
    str,
    OneOf(
        Text,
        Items[Supported[_ChatTextPart | RefusalPart | _ImagePart]],
        into=content_text,
    ),
]


class _CalledFunction(RequestModel):
    name: Text
    arguments: Arguments = Field(default_factory=dict)


class _CustomCall(RequestModel):
    name: Text
    input: Text


class _ToolCall(RequestModel):
    id: Text = ""
    type: Literal["function"] = "function"
    function: _CalledFunction

    def to_template(self) -> JsonObject:
        return tool_call(self.id, self.function.name, self.function.arguments)


class _CustomToolCall(RequestModel):
    id: Text = ""
    type: Literal["custom"]
    custom: _CustomCall

    def to_template(self) -> JsonObject:
        return tool_call(self.id, self.custom.name, {"input": self.custom.input})


class _ChatMessage(RequestModel):
    unsupported = refuse("audio", function_call=(), images=([],), tool_calls=([],), tools=([],))
    continues: ClassVar[bool] = False


class _PromptMessage(_ChatMessage):
    role: Literal["system", "developer", "user"]
    content: _SeenContent

    def to_template(self) -> Message:
        return {"role": template_role(self.role), "content": self.content}


_THINKING_PARTS = ("thinking", "reasoning")


def _thinking_text(part: JsonObject) -> Any:
    thinking = part.get("thinking", part.get("text"))
    if not isinstance(thinking, list):
        return thinking
    texts = [piece.get("text") for piece in thinking if isinstance(piece, dict)]
    plain = [text for text in texts if isinstance(text, str)]
    return "".join(plain) if len(plain) == len(thinking) else None


class _AssistantMessage(_ChatMessage):
    role: Literal["assistant"]
    content: _Content | None = None
    refusal: Text = Field("", description="The content, where there is none.")
    reasoning_content: Text = ""
    reasoning: Text = Field("", description="Same as reasoning_content.")
    thinking: Text = Field("", description="Same as reasoning_content.")
    prefix: bool = Field(False, description="In the last message: the response continues it.")
    partial: bool = Field(False, description="Same as prefix.")
    function_call: _CalledFunction | None = Field(None, description="The older form of a call.")
    tool_calls: Items[
        Annotated[
            JsonObject,
            OneOf(
                _ToolCall,
                _CustomToolCall,
                unsupported=True,
                into=lambda call: call.to_template(),
            ),
        ]
    ] = Field([])

    @model_validator(mode="before")
    @classmethod
    def _read_thinking(cls, value: Any) -> Any:
        """Reasoning may be among the parts of the content, as of Mistral's and SGLang's clients."""
        content = value.get("content") if isinstance(value, dict) else None
        if not isinstance(content, list):
            return value
        parts, texts = [], []
        for part in content:
            if isinstance(part, dict) and part.get("type") in _THINKING_PARTS:
                texts.append(_thinking_text(part))
            else:
                parts.append(part)
        if not texts or not all(isinstance(text, str) for text in texts):
            return value
        own = value.get("reasoning_content") or "".join(texts)
        return {**value, "content": parts or None, "reasoning_content": own}

    @property
    def continues(self) -> bool:  # type: ignore[override]
        return self.prefix or self.partial

    def to_template(self) -> Message:
        reasoning = self.reasoning_content or self.reasoning or self.thinking
        calls = [*self.tool_calls]
        if (older := self.function_call) is not None:
            calls.append(tool_call("", older.name, older.arguments))
        optional = {"reasoning_content": reasoning, "tool_calls": calls}
        present = {name: value for name, value in optional.items() if value}
        return {"role": "assistant", "content": self.content or self.refusal, **present}


class _ToolMessage(_ChatMessage):
    role: Literal["tool", "function"]
    content: _SeenContent = ""
    tool_call_id: Text = Field("", description="Without it, the first call without a result.")
    name: Text = Field("", description="The function; some templates need it.")

    def to_template(self) -> Message:
        name = {"name": self.name} if self.name else {}
        content = {"role": "tool", "content": self.content}
        return {**content, "tool_call_id": self.tool_call_id, **name}


_ChatMessageForm = Annotated[
    _PromptMessage | _AssistantMessage | _ToolMessage,
    OneOf(_PromptMessage, _AssistantMessage, _ToolMessage, tag="role"),
]


class _FunctionTool(RequestModel):
    type: Literal["function"] = "function"
    function: FunctionDefinition

    def to_tool(self) -> Tool:
        return self.function.to_tool()


class _CustomTool(RequestModel):
    type: Literal["custom"]
    custom: CustomDefinition

    def to_tool(self) -> Tool:
        return self.custom.to_tool()


class _FunctionName(RequestModel):
    name: Text


class _FunctionChoice(ToolChoiceObject):
    type: Literal["function"]
    function: _FunctionName

    def to_choice(self) -> ToolChoice:
        return ToolChoice("required", self.function.name)


class _CustomChoice(ToolChoiceObject):
    type: Literal["custom"]
    custom: _FunctionName

    def to_choice(self) -> ToolChoice:
        return ToolChoice("required", self.custom.name)


class _AllowedTools(RequestModel):
    mode: Literal["auto", "required"]
    tools: Items[
        Annotated[
            _FunctionChoice | _CustomChoice | HostedToolChoice,
            OneOf(_FunctionChoice, _CustomChoice, other=HostedToolChoice),
            BeforeValidator(nest),
        ]
    ] = Field(min_length=1)


class _AllowedToolsChoice(ToolChoiceObject):
    type: Literal["allowed_tools"]
    allowed_tools: _AllowedTools

    def to_choice(self) -> ToolChoice:
        return allowed_choice(self.allowed_tools.mode, self.allowed_tools.tools)


def _to_tool(tool: _FunctionTool | _CustomTool | HostedTool) -> Tool | None:
    return tool.to_tool()


class ChatCompletionRequest(_CompletionParameters, ReasoningParameters):
    """The body of POST /v1/chat/completions."""

    messages: Items[_ChatMessageForm] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: TokenLimit = Field(None, description="Comes before max_tokens.")
    logprobs: bool = Field(False, description="Report the log-probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="So many alternatives to each token."
    )
    tools: Items[
        Annotated[
            Tool | None,
            OneOf(_FunctionTool, _CustomTool, other=HostedTool, into=_to_tool),
            BeforeValidator(nest),
        ]
    ] = Field([], max_length=MAX_TOOLS, description="Functions that the model may call.")
    tool_choice: Annotated[
        ToolChoice,
        OneOf(
            Literal["none", "auto", "required", "any"],
            _FunctionChoice,
            _CustomChoice,
            _AllowedToolsChoice,
            other=HostedToolChoice,
            into=to_choice,
        ),
        BeforeValidator(nest),
    ] = Field(default_factory=ToolChoice, description="Default: auto.")
    parallel_tool_calls: bool = Field(True, description="Allow several calls in one response.")
    continue_final_message: bool = Field(
        False, description="The last message is the beginning of the response."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Only the opposite of continue_final_message."
    )
    usage: _UsageOptions = Field(_UsageOptions(), description="OpenRouter's include_usage.")

    def to_generation_request(self, served: ServedModel) -> GenerationRequest:
        """See `ApiRequest`."""
        last = self.messages[-1]
        if self.continue_final_message and last.role != "assistant":
            role = last.role
            reason = f"expected a last message of the assistant, got one of {role!r}"
            raise RequestError("continue_final_message", reason)
        continued = self.continue_final_message or last.continues
        if self.add_generation_prompt is continued:
            reason = f"expected {json.dumps(not continued)}, as the last message is "
            reason += "continued" if continued else "not continued"
            raise RequestError("add_generation_prompt", reason)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs", "only allowed with logprobs=true")
        request = GenerationRequest(
            (match_calls([message.to_template() for message in self.messages]),),
            is_chat=True,
            prompt_field="messages",
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            parallel_tool_calls=self.parallel_tool_calls,
            continue_final_message=continued,
            **self.reasoning_fields(),
            **self.shared_fields(
                served, self.max_completion_tokens or self.max_tokens or self.n_predict
            ),
        )
        request = replace(request, include_usage=request.include_usage or self.usage.include)
        return restrict_output(request, self.tools, self.tool_choice)


_TokenIds = Annotated[Items[Annotated[int, Field(le=MAX_INTEGER)]], Field(min_length=1)]


class _PromptList:
    """Annotates a list that is one prompt if its first item is a token id, else several."""

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        prompt = Annotated[str | list[int], OneOf(Text, _TokenIds)]
        prompts = Annotated[Items[prompt], Field(max_length=MAX_CHOICES)]
        choices = {"<ids>": _TokenIds, "<prompts>": prompts}
        return core_schema.tagged_union_schema(
            {name: handler.generate_schema(form) for name, form in choices.items()},
            lambda items: "<prompts>" if items and isinstance(items[0], str | list) else "<ids>",
        )


def _to_prompts(prompt: Any) -> tuple[Prompt, ...]:
    items = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    return tuple(item if isinstance(item, str) else tuple(item) for item in items)


class CompletionRequest(_CompletionParameters):
    """The body of POST /v1/completions."""

    best_of: int | None = Field(None, description="Only the same as n.")
    max_tokens: Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_check_limit)] = (
        Field(None, description="Most tokens of the response; -1: as many as fit.")
    )
    prompt: Annotated[
        tuple[Any, ...], OneOf(Text, Annotated[list[Any], _PromptList()], into=_to_prompts)
    ] = Field(description="A string, a list of token ids, or a list of these.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_COMPLETION_LOGPROBS, description="So many alternatives to each token."
    )
    add_special_tokens: bool = Field(
        True, description="Begin with the tokenizer's first token, if it has one."
    )
    echo: bool = Field(False, description="Begin each choice with its prompt.")

    def to_generation_request(self, served: ServedModel) -> GenerationRequest:
        """See `ApiRequest`."""
        if self.best_of not in (None, self.n):
            reason = f"expected the same as n={self.n}, got {self.best_of}"
            raise RequestError("best_of", f"not supported by this server; {reason}", UNSUPPORTED)
        if len(self.prompt) * self.n > MAX_CHOICES:
            choices = f"{len(self.prompt)} prompts times n={self.n}"
            raise RequestError("prompt", f"expected at most {MAX_CHOICES} choices, got {choices}")
        return GenerationRequest(
            self.prompt,
            is_chat=False,
            prompt_field="prompt",
            logprobs=self.logprobs,
            echo=self.echo,
            add_special_tokens=self.add_special_tokens,
            **self.shared_fields(served, self._max_tokens()),
        )

    def _max_tokens(self) -> int | None:
        limit = self.n_predict if self.max_tokens is None else self.max_tokens
        unlimited = {"max_tokens", "n_predict"} & self.model_fields_set  # with -1
        return limit if limit is not None or unlimited else DEFAULT_COMPLETION_TOKENS


def template_role(role: str) -> str:
    """A message's role as chat templates know it."""
    return "system" if role == "developer" else role


class _CompletionBuilder(ResponseBuilder):
    """What chat completions and completions have in common."""

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_name: ClassVar[str]

    def full_response(self, choices: Sequence[ChoiceState], usage: Usage) -> JsonObject:
        ordered = sorted(choices, key=lambda choice: choice.index)
        body = [{"index": choice.index, **self._full_choice(choice)} for choice in ordered]
        return {**self._header(self.object_name), "choices": body, "usage": usage_object(usage)}

    def finish_stream(self, usage: Usage) -> Iterator[Event]:
        if self._request.include_usage:
            counts = {"choices": [], "usage": usage_object(usage)}
            yield None, {**self._header(self.chunk_name), **counts}
        yield None, "[DONE]"

    def error(self, error: CenacleError) -> Iterator[Event]:
        yield None, render_error(error)[1]

    @abstractmethod
    def _full_choice(self, choice: ChoiceState) -> JsonObject: ...

    def _prompt_logprobs(self, choice: ChoiceState) -> JsonObject:
        """In vLLM's form: by token id, the token itself and the most probable ones."""
        count = self._request.prompt_logprobs
        if count is None:
            return {}
        tokens = choice.prompt_logprobs
        return {
            "prompt_logprobs": [
                None
                if token.logprob is None
                else {str(one.token): _ranked(one) for one in (*token.top[:count], token)}
                for token in tokens
            ]
        }

    def _chunk(
        self, index: int, content: JsonObject, logprobs: object, finish_reason: str | None
    ) -> Iterator[Event]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._header(self.chunk_name), "choices": [choice]}
        if self._request.include_usage:
            chunk["usage"] = usage_object(self.usage) if self._request.continuous_usage else None
        yield None, chunk

    def _header(self, object_name: str) -> JsonObject:
        return {
            "id": self.id_prefix + self._meta.id,
            "object": object_name,
            "created": self._meta.created,
            "model": self._meta.model,
            "system_fingerprint": self._meta.fingerprint,
        }


class _ChatBuilder(_CompletionBuilder):
    id_prefix, object_name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: GenerationRequest, meta: ResponseMeta) -> None:
        super().__init__(request, meta)
        self._calls: Counter[int] = Counter()  # by choice

    def full_response(self, choices: Sequence[ChoiceState], usage: Usage) -> JsonObject:
        return {**super().full_response(choices, usage), **self._prompt_logprobs(choices[0])}

    def first_events(self, index: int, usage: Usage) -> Iterator[Event]:  # noqa: ARG002
        yield from self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def delta(self, index: int, part: OutputPart) -> Iterator[Event]:
        if part.kind == "call":
            number = self._calls[index]
            delta: JsonObject = {"tool_calls": [{"index": number, **self._call(part, index)}]}
        elif part.kind == "reasoning":
            delta = {"reasoning_content": part.text}
        else:
            delta = {"content": part.text}
        yield from self._chunk(index, {"delta": delta}, self._logprobs(part.logprobs), None)

    def finish_choice(self, index: int, finish: FinishReason) -> Iterator[Event]:
        yield from self._chunk(index, {"delta": {}}, None, self._finish_reason(index, finish))

    def _full_choice(self, choice: ChoiceState) -> JsonObject:
        parts = join_text(choice.parts)
        text = "".join(part.text for part in parts if part.kind == "text")
        reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
        calls = [self._call(part, choice.index) for part in parts if part.kind == "call"]
        message: JsonObject = {"role": "assistant", "content": text, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message = {**message, "content": text or None, "tool_calls": calls}
        return {
            "message": message,
            "logprobs": self._logprobs([token for part in parts for token in part.logprobs]),
            "finish_reason": self._finish_reason(choice.index, choice.finish),
        }

    def _call(self, part: OutputPart, index: int) -> JsonObject:
        call_id = part.id or f"call_{self._meta.id}_{index}_{self._calls[index]}"
        self._calls[index] += 1
        if (text := self._request.freeform_input(part)) is not None:
            return {"id": call_id, "type": "custom", "custom": {"name": part.name, "input": text}}
        function = {"name": part.name, "arguments": part.text}
        return {"id": call_id, "type": "function", "function": function}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> JsonObject | None:
        if self._request.logprobs is None:
            return None
        return {"content": [logprob_object(token) for token in tokens], "refusal": None}

    def _finish_reason(self, index: int, finish: FinishReason) -> str:
        if finish.reason == "length":
            return "length"
        return "tool_calls" if self._calls[index] else "stop"


class _TextBuilder(_CompletionBuilder):
    id_prefix, object_name, chunk_name = "cmpl-", "text_completion", "text_completion"

    def __init__(self, request: GenerationRequest, meta: ResponseMeta) -> None:
        super().__init__(request, meta)
        self._text_bytes: defaultdict[int, bytes] = defaultdict(bytes)  # a last, partial character
        self._characters: Counter[int] = Counter()  # complete, of the tokens so far, by choice

    def first_events(self, index: int, usage: Usage) -> tuple[Event, ...]:  # noqa: ARG002
        return ()

    def delta(self, index: int, part: OutputPart) -> Iterator[Event]:
        logprobs = self._logprobs(index, part.logprobs)
        yield from self._chunk(index, {"text": part.text}, logprobs, None)

    def finish_choice(self, index: int, finish: FinishReason) -> Iterator[Event]:
        yield from self._chunk(index, {"text": ""}, None, self._finish_reason(finish))

    def _full_choice(self, choice: ChoiceState) -> JsonObject:
        tokens = [token for part in choice.parts for token in part.logprobs]
        return {
            "text": "".join(part.text for part in choice.parts),
            "logprobs": self._logprobs(choice.index, tokens),
            "finish_reason": self._finish_reason(choice.finish),
            **self._prompt_logprobs(choice),
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> JsonObject | None:
        if self._request.logprobs is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._characters[index])
            self._count_characters(index, token.data)
        top = [self._top(token) for token in tokens]
        return {
            "tokens": [_token_name(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top(self, token: TokenLogprob) -> JsonObject | None:
        if token.logprob is None:
            return None
        best: JsonObject = {}
        # As in OpenAI's API, the token itself is there, too.
        for one in (*token.top[: self._request.logprobs], token):
            best.setdefault(_token_name(one), one.logprob)
        return best

    def _count_characters(self, index: int, data: bytes) -> None:
        """A character that is spread over tokens counts with the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(self._text_bytes[index] + data)
        self._text_bytes[index] = decoder.getstate()[0]
        self._characters[index] += len(text)

    @staticmethod
    def _finish_reason(finish: FinishReason) -> str:
        return "length" if finish.reason == "length" else "stop"


def _token_name(token: TokenLogprob) -> str:
    """A token as completions name it: part of a character by its bytes."""
    try:
        return token.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def _ranked(token: TokenLogprob) -> JsonObject:
    return {"logprob": token.logprob, "rank": token.rank, "decoded_token": token.text}


def logprob_object(token: TokenLogprob) -> JsonObject:
    """A token's log-probability and those of its alternatives."""

    def plain(one: TokenLogprob) -> JsonObject:
        return {"token": one.text, "logprob": one.logprob, "bytes": list(one.data)}

    return {**plain(token), "top_logprobs": [plain(one) for one in token.top]}


def usage_object(usage: Usage) -> JsonObject:
    """How many tokens were read and generated. A token that ends a response is counted."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def model_list(served: ServedModel, created: int) -> JsonObject:
    """The body of GET /v1/models: OpenAI's members and Anthropic's, whose path is the same."""
    return list_of([model_object(served, name, created) for name in served.names])


def list_of(models: Sequence[JsonObject]) -> JsonObject:
    """A list of models, of OpenAI's API and of Anthropic's."""
    ids = [model["id"] for model in models] or [None]
    page = {"first_id": ids[0], "last_id": ids[-1], "has_more": False}
    return {"object": "list", "data": list(models), **page}


_CONTEXT_NAMES = (
    "max_model_len",  # vLLM
    "context_length",  # OpenRouter
    "context_window",  # Groq
    "max_context_length",  # LM Studio, Mistral
    "max_input_tokens",  # Anthropic
)


def model_object(served: ServedModel, name: str, created: int) -> JsonObject:
    """The served model under one of its names, as GET /v1/models lists it; with the length of its
    context, for which OpenAI has no member, as other servers' clients read it."""
    length = served.context_length
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "cenacle",
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat(),
        **({} if length is None else dict.fromkeys(_CONTEXT_NAMES, length)),
        # As OpenRouter tells it; the page asks it, too.
        "architecture": {
            "input_modalities": ["text"] if served.image_obstacle else ["text", "image"],
            "output_modalities": ["text"],
        },
        # llama.cpp
        "meta": {"n_vocab": served.vocab_size or None, "n_ctx": length, "n_ctx_train": length},
    }


def render_error(error: CenacleError) -> tuple[int, JsonObject]:
    """The HTTP status and the body for an error."""
    status = http_status(error)
    if isinstance(error, InputError):
        code = error.code if isinstance(error, RequestError) else INVALID_VALUE
        return status, error_object(str(error), error.field, code)
    code, kind = {
        429: ("server_busy", "rate_limit_error"),
        503: ("group_failed", "server_error"),
    }.get(status, ("internal_error", "server_error"))
    if isinstance(error, NodesMissing):  # they may still come: nothing has failed
        code = "nodes_missing"
    return status, error_object(str(error), None, code, kind)


def error_object(
    message: str,
    param: str | None = None,
    code: str | None = None,
    kind: str = "invalid_request_error",
) -> JsonObject:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class OpenAIAdapter(ApiAdapter):
    """What OpenAI's APIs have in common."""

    def render_error(self, error: CenacleError) -> tuple[int, JsonObject]:
        """See `ApiAdapter`."""
        return render_error(error)


class ChatCompletionsAdapter(OpenAIAdapter):
    """POST /v1/chat/completions."""

    request_model, response_builder = ChatCompletionRequest, _ChatBuilder


class CompletionsAdapter(OpenAIAdapter):
    """POST /v1/completions."""

    request_model, response_builder = CompletionRequest, _TextBuilder
