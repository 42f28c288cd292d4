"""Anthropic's Messages API as plain data: a body's bytes to what is asked, parts of an answer to
messages and stream events.

Owns: names, types and ranges of the parameters; content blocks; the shapes of answers and errors.
Does not know: HTTP, tokenizers, MLX, time.
Invariant: a parameter is obeyed or refused by name, never ignored in silence (`metadata.user_id`
tells an operator who asks, and `cache_control` asks for what happens anyway); null counts as
absent.
Source: https://docs.anthropic.com/en/api/messages
Next: `exchange.py` has the nouns, `app.py` puts it on sockets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ...core.chat import FinishReason, Message, OutputPart, Tool, Usage, join_text
from ...core.request import Sampling
from ...errors import Busy, CenacleError, ClusterError, InputError
from . import openai, structured_output
from .protocol import (
    ApiAdapter,
    ChoiceState,
    Event,
    GenerationRequest,
    ResponseMeta,
    ServedModel,
    check_model,
)
from .validation import (
    UNSUPPORTED,
    Fields,
    RequestError,
    boolean,
    dict_of,
    integer,
    integer_from,
    list_of,
    missing,
    not_supported,
    number,
    object_of,
    one_of,
    shown,
    string,
    strings,
    wrong_type,
)

MAX_STOPS = 16
MIN_THINK_TOKENS = 1024  # Anthropic's least budget

_STRING = {"type": "string"}
_OBJECT = {"type": "object"}
PARAMETERS: dict[str, dict[str, Any]] = {
    "model": _STRING,
    "messages": {"type": "array", "items": _OBJECT, "minItems": 1},
    "max_tokens": {"type": "integer", "minimum": 1},
    "system": {"oneOf": [_STRING, {"type": "array", "items": _OBJECT}]},
    "temperature": {"type": "number", "minimum": 0, "maximum": 1, "default": 1},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": 0},
    "stop_sequences": {
        "type": "array",
        "items": {"type": "string", "minLength": 1},
        "maxItems": MAX_STOPS,
    },
    "stream": {"type": "boolean"},
    "tools": {"type": "array", "items": _OBJECT, "maxItems": openai.MAX_TOOLS},
    "tool_choice": {
        "type": "object",
        "properties": {
            "type": {"enum": ["auto", "any", "tool", "none"]},
            "name": _STRING,
            "disable_parallel_tool_use": {"type": "boolean"},
        },
        "required": ["type"],
        "additionalProperties": False,
    },
    "thinking": {
        "type": "object",
        "properties": {
            "type": {"enum": ["enabled", "disabled", "adaptive"]},
            "budget_tokens": {"type": "integer", "minimum": MIN_THINK_TOKENS},
        },
        "required": ["type"],
        "additionalProperties": False,
    },
    "output_config": {
        "type": "object",
        "properties": {
            "format": {
                "type": "object",
                "properties": {"type": {"const": "json_schema"}, "schema": _OBJECT},
                "required": ["type", "schema"],
                "additionalProperties": False,
            }
        },
        "additionalProperties": False,
    },
    "metadata": {
        "type": "object",
        "properties": {"user_id": _STRING},
        "additionalProperties": False,
    },
}
COUNT_PARAMETERS = {
    name: PARAMETERS[name]
    for name in (
        *("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config"),
    )
}
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "cache_control": ({"type": "ephemeral"},),
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "user_profile_id": (),
    "workspace_id": (),
}
_TOOL: dict[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "eager_input_streaming": (False,),
    "input_examples": ([],),
}
_BLOCK: dict[str, tuple[Any, ...]] = {"citations": ([],)}
_BLOCKS = {
    "system": "'text'",
    "user": "'text' or 'tool_result'",
    "assistant": "'text', 'thinking' or 'tool_use'",
}


def read(body: bytes, served: ServedModel) -> GenerationRequest:
    """What a body of messages asks.

    Raises:
        InputError: names the field (a `Refused` where a code or a status goes with it).
    """
    fields = Fields(object_of(body), known=PARAMETERS)
    max_tokens = fields.need("max_tokens", integer_from(1, None))
    none: int | None = None
    sampling = Sampling(
        temperature=fields.take("temperature", _temperature, 1.0),
        top_p=fields.take("top_p", number, 1.0),
        top_k=fields.take("top_k", integer, none) or 0,
    )
    stop = fields.take("stop_sequences", _stops, ())
    stream = fields.take("stream", boolean, False)
    fields.take("metadata", _metadata, "")
    return _read(fields, served, max_tokens, sampling, stop, stream)


def read_count(body: bytes, served: ServedModel) -> GenerationRequest:
    """What a body of count_tokens asks; only its prompt is of interest."""
    fields = Fields(object_of(body), known=COUNT_PARAMETERS)
    return _read(fields, served, None, Sampling(), (), False)


def _read(
    fields: Fields,
    served: ServedModel,
    max_tokens: int | None,
    sampling: Sampling,
    stop: tuple[str, ...],
    stream: bool,
) -> GenerationRequest:
    check_model(fields.need("model", string), served)
    system = fields.take("system", _system, "")
    messages = fields.need("messages", _messages)
    last = messages[-1]
    if last["role"] == "assistant" and ("tool_calls" in last or not last["content"]):
        raise RequestError(
            "messages: expected a tool_result or text to end them, got neither", "messages"
        )
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    tools = fields.take("tools", _tools, ())
    choice, parallel = fields.take("tool_choice", _tool_choice, ("auto", True))
    tools, calls, grammar = openai.choose_tools(tools, choice, parallel)
    if (wanted := fields.take("output_config", _output_config, None)) is not None:
        if tools:
            raise not_supported(
                "output_config.format", "together with tools; tool_choice none frees it"
            )
        grammar = wanted
    think, budget = fields.take("thinking", _thinking, (None, None))
    if budget is not None and max_tokens is not None and budget >= max_tokens:
        raise RequestError(
            f"thinking.budget_tokens: expected less than max_tokens={max_tokens}, got {budget}",
            "thinking.budget_tokens",
        )
    fields.refuse_rest(_UNSUPPORTED)
    return GenerationRequest(
        (tuple(messages),),
        True,
        "messages",
        max_tokens,
        sampling,
        stop,
        stream=stream,
        tools=tools,
        calls=calls,
        parallel=parallel,
        grammar=grammar,
        grammar_field="tools" if calls is not None else "output_config.format",
        think=think,
        think_tokens=budget,
        continued=last["role"] == "assistant",
    )


def _temperature(value: Any, name: str) -> float:
    if not 0 <= number(value, name) <= 1:
        raise RequestError(f"{name}: expected from 0 to 1, got {shown(value)}", name)
    return float(value)


def _stops(value: Any, name: str) -> tuple[str, ...]:
    return strings(MAX_STOPS)(list_of(value, name), name)


def _metadata(value: Any, name: str) -> str:
    fields = Fields(dict_of(value, name), f"{name}.")
    user = fields.take("user_id", string, "")
    fields.refuse_rest({})
    return user


def _thinking(value: Any, name: str) -> tuple[bool | None, int | None]:
    fields = Fields(dict_of(value, name), f"{name}.")
    kind = fields.need("type", one_of("enabled", "disabled", "adaptive"))
    budget: int | None = None
    if kind == "enabled":
        budget = fields.need("budget_tokens", integer_from(MIN_THINK_TOKENS, None))
    fields.refuse_rest({"display": ("summarized",)})
    return {"enabled": True, "disabled": False}.get(kind), budget  # adaptive: as the model likes


def _output_config(value: Any, name: str) -> str | None:
    fields = Fields(dict_of(value, name), f"{name}.")
    none: str | None = None
    grammar = fields.take("format", _format, none)
    fields.refuse_rest({"effort": ()})
    return grammar


def _format(value: Any, name: str) -> str:
    fields = Fields(dict_of(value, name), f"{name}.")
    fields.need("type", one_of("json_schema"))
    schema = fields.need("schema", dict_of)
    fields.refuse_rest({})
    return structured_output.json_schema_grammar(schema, f"{name}.schema")


def _tools(value: Any, name: str) -> tuple[Tool, ...]:
    items = [_tool(t, f"{name}[{at}]") for at, t in enumerate(list_of(value, name))]
    return openai.unique(items, name)


def _tool(value: Any, name: str) -> Tool:
    fields = Fields(dict_of(value, name), f"{name}.")
    if (kind := fields.take("type", string, "custom")) != "custom":
        raise not_supported(f"{name}.type", f"only your own tools, not {shown(kind)}")
    tool = Tool(
        fields.need("name", openai.tool_name),
        fields.take("description", string, ""),
        fields.need("input_schema", dict_of),
        fields.take("strict", boolean, False),
    )
    _take_cache_control(fields)
    fields.refuse_rest(_TOOL)
    return tool


def _tool_choice(value: Any, name: str) -> tuple[str | Tool, bool]:
    fields = Fields(dict_of(value, name), f"{name}.")
    kind = fields.need("type", one_of("auto", "any", "tool", "none"))
    choice: str | Tool = {"any": "required"}.get(kind, kind)
    if kind == "tool":
        choice = Tool(fields.need("name", string))
    parallel = not fields.take("disable_parallel_tool_use", boolean, False)
    fields.refuse_rest({})
    return choice, parallel


def _take_cache_control(fields: Fields) -> None:
    """What was computed is kept anyway."""
    control = Fields(fields.take("cache_control", dict_of, {}), "cache_control.")
    control.take("type", one_of("ephemeral"), "")
    control.take("ttl", one_of("5m", "1h"), "")
    control.refuse_rest({})


def _system(value: Any, name: str) -> str:
    if isinstance(value, str):
        return string(value, name)
    return "\n\n".join(_text_block(b, f"{name}[{at}]") for at, b in enumerate(list_of(value, name)))


def _text_block(value: Any, name: str) -> str:
    fields = Fields(dict_of(value, name), f"{name}.")
    kind = fields.need("type", string)
    if kind != "text":
        raise _block_refused(name, kind, "'text'")
    return _text(fields)


def _text(fields: Fields) -> str:
    text = fields.need("text", string)
    _take_cache_control(fields)
    fields.refuse_rest(_BLOCK)
    return text


def _block_refused(name: str, kind: str, known: str) -> RequestError:
    return RequestError(
        f"{name}.type: this server reads only blocks of type {known} here, got {shown(kind)}",
        f"{name}.type",
        UNSUPPORTED,
    )


def _messages(value: Any, name: str) -> list[Message]:
    items = list_of(value, name)
    if not items:
        raise RequestError("messages: expected at least one message, got none", name)
    messages = [m for at, item in enumerate(items) for m in _message(item, f"{name}[{at}]")]
    whole: list[Message] = []
    for message in messages:
        # Templates want turns; this API lets several messages make one.
        if whole and message["role"] == whole[-1]["role"] in ("user", "assistant"):
            whole[-1] = _merged(whole[-1], message)
        else:
            whole.append(message)
    return whole


def _merged(first: Message, second: Message) -> Message:
    texts = [m["content"] for m in (first, second) if m["content"]]
    merged = {**first, **second, "content": "\n".join(texts)}
    calls = [*first.get("tool_calls", []), *second.get("tool_calls", [])]
    return {**merged, "tool_calls": calls} if calls else merged


def _message(value: Any, name: str) -> Iterator[Message]:
    """One message's content as chat templates read it: results of tools are messages of their own,
    before the rest."""
    fields = Fields(dict_of(value, name), f"{name}.")
    role = fields.need("role", one_of("user", "assistant", "system"))
    if not fields.has("content"):
        raise missing(f"{name}.content")
    content = fields.take("content", lambda given, _: given, None)
    fields.refuse_rest({})
    full = f"{name}.content"
    if isinstance(content, str):
        yield {"role": role, "content": string(content, full)}
        return
    if not isinstance(content, list):
        raise wrong_type(full, "a string or a list of blocks", content)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results = 0
    for at, item in enumerate(content):
        where = f"{full}[{at}]"
        block = Fields(dict_of(item, where), f"{where}.")
        kind = block.need("type", string)
        if kind == "text":
            texts.append(_text(block))
        elif kind == "tool_result" and role == "user":
            results += 1
            yield _result(block)
        elif kind == "tool_use" and role == "assistant":
            calls.append(_use(block))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(block.need("thinking", string))
            block.take("signature", string, "")
            block.refuse_rest({})
        else:
            raise _block_refused(where, kind, _BLOCKS[role])
    message: Message = {"role": role, "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    if texts or calls or not results:
        yield message


def _use(block: Fields) -> dict[str, Any]:
    made = openai.past_call(
        block.need("id", string), block.need("name", string), block.need("input", dict_of)
    )
    _take_cache_control(block)
    block.refuse_rest({"caller": ({"type": "direct"},)})
    return made


def _result(block: Fields) -> Message:
    call_id = block.need("tool_use_id", string)
    text = block.take("content", _result_text, "")
    if block.take("is_error", boolean, False):
        text = f"Error: {text}"
    _take_cache_control(block)
    block.refuse_rest({})
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def _result_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return string(value, name)
    return "".join(_text_block(b, f"{name}[{at}]") for at, b in enumerate(list_of(value, name)))


class MessageBuilder:
    """The message that answers one request."""

    def __init__(self, asked: GenerationRequest, head: ResponseMeta) -> None:  # noqa: ARG002
        self._head = head
        self._block: str | None = None  # the kind of the open block
        self._at = -1  # its index
        self._finish = FinishReason("stop")
        self._called = 0

    def first_events(self, index: int, usage: Usage) -> Iterator[Event]:  # noqa: ARG002
        """The message without its content."""
        yield _event("message_start", message=self._message([], None, None, usage))

    def delta(self, index: int, part: OutputPart) -> Iterator[Event]:  # noqa: ARG002
        """A block's beginning where the kind changes, and what is added to it."""
        if not part.text and part.kind != "call":
            return
        if part.kind == "call" or part.kind != self._block:
            yield from self._close()
            self._at, self._block = self._at + 1, part.kind
            block = self._content(
                OutputPart(part.kind, "{}" if part.kind == "call" else "", part.name, part.id)
            )
            yield _event("content_block_start", index=self._at, content_block=block)
        delta = {
            "text": {"type": "text_delta", "text": part.text},
            "reasoning": {"type": "thinking_delta", "thinking": part.text},
            "call": {"type": "input_json_delta", "partial_json": part.text},
        }[part.kind]
        yield _event("content_block_delta", index=self._at, delta=delta)

    def finish_choice(self, index: int, finish: FinishReason) -> Iterator[Event]:  # noqa: ARG002
        """The last block's end."""
        self._finish = finish
        yield from self._close()

    def finish_stream(self, usage: Usage) -> Iterator[Event]:
        """Why it ended, what was counted, and the end."""
        delta = self._stopped(self._finish, bool(self._called))
        yield _event("message_delta", delta=delta, usage=usage_object(usage))
        yield _event("message_stop")

    def keep_alive(self) -> tuple[Event, ...]:
        """A sign of life, as Anthropic has it."""
        return (_event("ping"),)

    def error(self, error: CenacleError) -> Iterator[Event]:
        """Too late for a status: the client is told in the stream."""
        yield "error", render_error(error)[1]

    def full_response(self, choices: Sequence[ChoiceState], usage: Usage) -> dict[str, Any]:
        """The message."""
        parts = [p for p in join_text(choices[0].parts) if p.text]
        content = [self._content(part) for part in parts]
        stopped = self._stopped(choices[0].finish, bool(self._called))
        return self._message(content, stopped["stop_reason"], stopped["stop_sequence"], usage)

    def _close(self) -> Iterator[Event]:
        if self._block == "reasoning":
            # Signatures prove to Anthropic's own servers that a thought is theirs.
            signature = {"type": "signature_delta", "signature": ""}
            yield _event("content_block_delta", index=self._at, delta=signature)
        if self._block is not None:
            yield _event("content_block_stop", index=self._at)
        self._block = None

    def _content(self, part: OutputPart) -> dict[str, Any]:
        if part.kind == "text":
            return {"type": "text", "text": part.text, "citations": None}
        if part.kind == "reasoning":
            return {"type": "thinking", "thinking": part.text, "signature": ""}
        self._called += 1
        call_id = part.id or f"toolu_{self._head.id}_{self._called - 1}"
        given = json.loads(part.text)
        return {"type": "tool_use", "id": call_id, "name": part.name, "input": given}

    @staticmethod
    def _stopped(finish: FinishReason, called: bool) -> dict[str, Any]:
        reason = {"length": "max_tokens", "string": "stop_sequence", "stop": "end_turn"}
        why = reason[finish.reason]
        if called and finish.reason == "stop":
            why = "tool_use"
        return {"stop_reason": why, "stop_sequence": finish.string}

    def _message(
        self, content: list[dict[str, Any]], why: str | None, stop: str | None, usage: Usage
    ) -> dict[str, Any]:
        return {
            "id": f"msg_{self._head.id}",
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
            "stop_reason": why,
            "stop_sequence": stop,
            "usage": usage_object(usage),
        }


def _event(kind: str, **data: Any) -> Event:
    return kind, {"type": kind, **data}


def usage_object(usage: Usage) -> dict[str, Any]:
    """How many tokens were read and generated; `input_tokens` are those that were computed."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def render_error(error: CenacleError) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the body for an error."""
    status = 500
    if isinstance(error, InputError):
        status = error.status if isinstance(error, RequestError) else 400
    elif isinstance(error, Busy):
        status = 429
    elif isinstance(error, ClusterError):
        status = 503
    return status, error_object(status, str(error))


def error_object(status: int, message: str) -> dict[str, Any]:
    """Anthropic's form of an error."""
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


FRONT = ApiAdapter(read, MessageBuilder, render_error)
