"""OpenAI's Responses API as plain data: a body's bytes to what is asked, parts of an answer to
responses and stream events.

Owns: names, types and ranges of the parameters; input and output items; the shapes of answers.
Does not know: HTTP, tokenizers, MLX, time.
Invariant: a parameter is obeyed or refused by name, never ignored in silence; null counts as
absent; nothing is stored, so what asks for a stored response is refused; the response at a stream's
end is the one that would have come without `stream`.
Source: https://platform.openai.com/docs/api-reference/responses
Next: `openai.py` has the older API, and what both share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...core.chat import FinishReason, Message, OutputPart, Tool, Usage, join_text
from ...core.request import MAX_LOGPROBS
from ...errors import CenacleError
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
    Fields,
    RequestError,
    boolean,
    dict_of,
    integer_from,
    list_of,
    not_supported,
    object_of,
    one_of,
    shown,
    string,
    wrong_type,
)

LOGPROBS = "message.output_text.logprobs"  # in `include`

_STRING = {"type": "string"}
_OBJECT = {"type": "object"}
_BOOLEAN = {"type": "boolean"}
PARAMETERS: dict[str, dict[str, Any]] = {
    "model": _STRING,
    "input": {"oneOf": [_STRING, {"type": "array", "items": _OBJECT, "minItems": 1}]},
    "instructions": _STRING,
    "max_output_tokens": {"type": "integer", "minimum": 1},
    **openai.SAMPLING_PARAMETERS,
    "stream": _BOOLEAN,
    "tools": {"type": "array", "items": _OBJECT, "maxItems": openai.MAX_TOOLS},
    "tool_choice": {
        "oneOf": [
            {"enum": ["none", "auto", "required"]},
            {
                "type": "object",
                "properties": {"type": {"const": "function"}, "name": _STRING},
                "required": ["type", "name"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {
                    "type": {"const": "allowed_tools"},
                    "mode": {"enum": ["auto", "required"]},
                    "tools": {"type": "array", "items": _OBJECT, "minItems": 1},
                },
                "required": ["type", "mode", "tools"],
                "additionalProperties": False,
            },
        ]
    },
    "parallel_tool_calls": _BOOLEAN,
    "text": {
        "type": "object",
        "properties": {"format": _OBJECT},
        "additionalProperties": False,
    },
    "reasoning": {
        "type": "object",
        "properties": {"effort": {"enum": list(openai.EFFORTS)}},
        "additionalProperties": False,
    },
    "include": {"type": "array", "items": {"const": LOGPROBS}},
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS},
    "metadata": {"type": "object", "additionalProperties": _STRING},
    **dict.fromkeys(openai.NAMES, _STRING),
}
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "context_management": (),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "truncation": ("disabled",),
}
_ITEM: dict[str, tuple[Any, ...]] = {"status": ("completed", "incomplete"), "phase": ()}


def read(body: bytes, served: ServedModel) -> GenerationRequest:
    """What a body asks.

    Raises:
        InputError: names the field (a `Refused` where a code or a status goes with it).
    """
    fields = Fields(object_of(body), known=PARAMETERS)
    check_model(fields.take("model", string, served.model), served)
    messages = fields.need("input", _input)
    instructions = fields.take("instructions", string, "")
    if instructions:
        messages = [{"role": "system", "content": instructions}, *messages]
    given_tools = fields.take("tools", _tools, ())
    choice, shown_choice = fields.take("tool_choice", _tool_choice, ("auto", "auto"))
    parallel = fields.take("parallel_tool_calls", boolean, True)
    tools, calls, grammar = openai.choose_tools(given_tools, choice, parallel)
    form, wanted = fields.take("text", _text, ({"type": "text"}, None))
    if wanted is not None:
        if tools:
            raise not_supported("text.format", "together with tools; tool_choice none frees it")
        grammar = wanted
    template: dict[str, Any] = {}
    effort = fields.take("reasoning", _effort, "")
    none: int | None = None
    max_tokens = fields.take("max_output_tokens", integer_from(1, None), none)
    top = fields.take("top_logprobs", integer_from(0, MAX_LOGPROBS), none)
    include = fields.take("include", _include, False)
    if top is not None and not include:
        raise RequestError(f"top_logprobs: only allowed with {LOGPROBS} in include", "top_logprobs")
    asked = GenerationRequest(
        (tuple(messages),),
        True,
        "input",
        max_tokens,
        openai.sampling(fields, served.vocabulary),
        stream=fields.take("stream", boolean, False),
        logprobs=(top or 0) if include else None,
        tools=tools,
        calls=calls,
        parallel=parallel,
        grammar=grammar,
        grammar_field="tools" if calls is not None else "text.format",
        think=openai.thinking(effort, template),
        template=template,
        given={
            "instructions": instructions or None,
            "max_output_tokens": max_tokens,
            "parallel_tool_calls": parallel,
            "reasoning": {"effort": effort or None, "summary": None},
            "text": {"format": form},
            "tool_choice": shown_choice,
            "tools": [_tool_object(tool) for tool in given_tools],
            "top_logprobs": top or 0,
            "metadata": fields.take("metadata", _metadata, {}),
        },
    )
    openai.take_names(fields)
    fields.refuse_rest(_UNSUPPORTED)
    return asked


def _effort(value: Any, name: str) -> str:
    fields = Fields(dict_of(value, name), f"{name}.")
    effort = fields.take("effort", one_of(*openai.EFFORTS), "")
    fields.refuse_rest({"summary": (), "generate_summary": ()})
    return effort


def _include(value: Any, name: str) -> bool:
    wanted = list_of(value, name)
    for at, item in enumerate(wanted):
        if string(item, f"{name}[{at}]") != LOGPROBS:
            raise not_supported(f"{name}[{at}]", f"only {LOGPROBS}, not {shown(item)}")
    return bool(wanted)


def _metadata(value: Any, name: str) -> dict[str, str]:
    return {k: string(v, f"{name}.{k[:80]}") for k, v in dict_of(value, name).items()}


def _text(value: Any, name: str) -> tuple[dict[str, Any], str | None]:
    """The format as it was given, and its grammar."""
    fields = Fields(dict_of(value, name), f"{name}.")
    form = fields.take("format", dict_of, {"type": "text"})
    fields.refuse_rest({"verbosity": ()})
    inner = Fields(form, f"{name}.format.")
    kind = inner.need("type", one_of("text", "json_object", "json_schema"))
    grammar: str | None = None
    if kind == "json_object":
        grammar = structured_output.json_schema_grammar({"type": "object"}, f"{name}.format")
        inner.refuse_rest({})
    elif kind == "json_schema":
        flat = {k: v for k, v in form.items() if k != "type"}
        grammar = openai.schema_format(flat, f"{name}.format")
    else:
        inner.refuse_rest({})
    return form, grammar


def _tools(value: Any, name: str) -> tuple[Tool, ...]:
    items = [_tool(t, f"{name}[{at}]") for at, t in enumerate(list_of(value, name))]
    return openai.unique(items, name)


def _tool(value: Any, name: str) -> Tool:
    flat = dict(dict_of(value, name))
    if (kind := flat.pop("type", None)) != "function":
        raise not_supported(f"{name}.type", f"only functions, not {shown(kind)}")
    return openai.function(flat, name)


def _tool_object(tool: Tool) -> dict[str, Any]:
    return {**tool.to_json()["function"], "type": "function", "strict": tool.strict}


def _tool_choice(value: Any, name: str) -> tuple[str | Tool | openai.Allowed, Any]:
    """The choice, and how it was given."""
    if isinstance(value, str):
        return one_of("none", "auto", "required")(value, name), value
    fields = Fields(dict_of(value, name), f"{name}.")
    if fields.need("type", one_of("function", "allowed_tools")) == "function":
        tool = _named(fields, name)
        fields.refuse_rest({})
        return tool, value
    return openai.allowed(fields, name, _named), value


def _named(fields: Fields, name: str) -> Tool:  # noqa: ARG001
    return Tool(fields.need("name", string))


def _input(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": string(value, name)}]
    if not isinstance(value, list):
        raise wrong_type(name, "a string or a list of items", value)
    if not value:
        raise RequestError(f"{name}: expected at least one item, got none", name)
    messages: list[Message] = []
    for at, item in enumerate(value):
        _add(messages, _item(item, f"{name}[{at}]"))
    return messages


def _add(messages: list[Message], new: Message) -> None:
    """A turn of the assistant comes as several items: reasoning, calls, a message."""
    last: Message = messages[-1] if messages else {"role": ""}
    if new["role"] == last["role"] == "assistant" and not (new["content"] and last["content"]):
        for name, value in new.items():
            if name == "tool_calls":
                last[name] = [*last.get(name, []), *value]
            elif name != "role" and value:
                last[name] = last.get(name, "") + value
    else:
        messages.append(new)


def _item(value: Any, name: str) -> Message:
    fields = Fields(dict_of(value, name), f"{name}.")
    kind = fields.take("type", string, "message")
    fields.take("id", string, "")
    if kind == "message":
        return _message(fields)
    if kind == "function_call":
        made = openai.past_call(
            fields.need("call_id", string),
            fields.need("name", string),
            fields.need("arguments", openai.arguments),
        )
        fields.refuse_rest(_ITEM)
        return {"role": "assistant", "content": "", "tool_calls": [made]}
    if kind == "function_call_output":
        call_id, output = fields.need("call_id", string), fields.need("output", _content)
        fields.refuse_rest(_ITEM)
        return {"role": "tool", "tool_call_id": call_id, "content": output}
    if kind == "reasoning":
        thought = fields.take("content", _thought, "")
        fields.refuse_rest({**_ITEM, "summary": ([],), "encrypted_content": ()})
        return {"role": "assistant", "content": "", "reasoning_content": thought}
    raise not_supported(f"{name}.type", f"no items of type {shown(kind)}")


def _message(fields: Fields) -> Message:
    role = fields.need("role", one_of(*openai.ROLES))
    content = fields.need("content", _content)
    fields.refuse_rest(_ITEM)
    return {"role": openai.ROLES[role], "content": content}


def _content(value: Any, name: str) -> str:
    if isinstance(value, str):
        return string(value, name)
    return openai.text_parts(value, name, ("input_text", "output_text"))


def _thought(value: Any, name: str) -> str:
    return openai.text_parts(value, name, ("reasoning_text",))


class ResponsesBuilder:
    """The response that answers one request."""

    def __init__(self, asked: GenerationRequest, head: ResponseMeta) -> None:
        self._asked, self._head = asked, head
        self._number = 0  # of the next event
        self._parts: list[OutputPart] = []
        self._open: OutputPart | None = None  # the item that is being written
        self._items: list[dict[str, Any]] = []  # those that are complete
        self._finish = FinishReason("stop")

    def first_events(self, index: int, usage: Usage) -> Iterator[Event]:  # noqa: ARG002
        """The response without its output."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", [], None))

    def delta(self, index: int, part: OutputPart) -> Iterator[Event]:  # noqa: ARG002
        """An item's beginning where the kind changes, and what is added to it."""
        if part.kind == "call" or self._open is None or part.kind != self._open.kind:
            if part.kind != "call" and not (part.text or part.logprobs):
                return
            yield from self._close()
            empty = OutputPart(part.kind, "", part.name, part.id)
            item = self._item(empty, len(self._items), "in_progress")
            if part.kind != "call":
                item["content"] = []
            yield self._event("response.output_item.added", output_index=self._at, item=item)
            if part.kind != "call":
                content = self._content(empty)
                yield self._in_item("response.content_part.added", content_index=0, part=content)
            self._open = empty
        self._open = join_text([self._open, part])[0] if part.kind != "call" else part
        if part.kind == "call":
            yield self._in_item("response.function_call_arguments.delta", delta=part.text)
        elif part.kind == "reasoning":
            yield self._in_item("response.reasoning_text.delta", content_index=0, delta=part.text)
        else:
            logs = [openai.log_object(one) for one in part.logprobs]
            yield self._in_item(
                "response.output_text.delta", content_index=0, delta=part.text, logprobs=logs
            )

    def finish_choice(self, index: int, finish: FinishReason) -> Iterator[Event]:  # noqa: ARG002
        """The last item's end."""
        self._finish = finish
        yield from self._close()

    def finish_stream(self, usage: Usage) -> Iterator[Event]:
        """The whole response."""
        status = self._status(self._finish)
        response = self._response(status, self._items, usage)
        yield self._event(f"response.{status}", response=response)

    def keep_alive(self) -> tuple[Event, ...]:
        """Nothing: a comment will do."""
        return ()

    def error(self, error: CenacleError) -> Iterator[Event]:
        """Too late for a status: the client is told in the stream."""
        told = openai.render_error(error)[1]["error"]
        code = told["code"] or "server_error"
        response = self._response("failed", self._items, None)
        response["error"] = {"code": "server_error", "message": told["message"]}
        yield self._event("error", code=code, message=told["message"], param=told["param"])
        yield self._event("response.failed", response=response)

    def full_response(self, choices: Sequence[ChoiceState], usage: Usage) -> dict[str, Any]:
        """The response."""
        self._finish = choices[0].finish
        parts = [p for p in join_text(choices[0].parts) if p.text or p.logprobs]
        status = self._status(self._finish)
        items = [
            self._item(part, at, status if at == len(parts) - 1 else "completed")
            for at, part in enumerate(parts)
        ]
        return self._response(status, items, usage)

    def _close(self) -> Iterator[Event]:
        """The end of the item that is being written."""
        if (part := self._open) is None:
            return
        if part.kind == "call":
            done = {"arguments": part.text, "name": part.name}
            yield self._in_item("response.function_call_arguments.done", **done)
        else:
            content = self._content(part)
            done = {"text": part.text}
            if part.kind == "text":
                done["logprobs"] = content["logprobs"]
            kind = "output_text" if part.kind == "text" else "reasoning_text"
            yield self._in_item(f"response.{kind}.done", content_index=0, **done)
            yield self._in_item("response.content_part.done", content_index=0, part=content)
        item = self._item(part, self._at, self._status(self._finish))
        yield self._event("response.output_item.done", output_index=self._at, item=item)
        self._items.append(item)
        self._open = None

    @property
    def _at(self) -> int:
        return len(self._items)

    def _event(self, kind: str, **data: Any) -> Event:
        self._number += 1
        return kind, {"type": kind, "sequence_number": self._number - 1, **data}

    def _in_item(self, kind: str, **data: Any) -> Event:
        return self._event(kind, item_id=self._item_id(self._at), output_index=self._at, **data)

    def _item_id(self, at: int) -> str:
        return f"item_{self._head.id}_{at}"

    def _item(self, part: OutputPart, at: int, status: str) -> dict[str, Any]:
        head = {"id": self._item_id(at), "status": status}
        if part.kind == "call":
            call_id = part.id or f"call_{self._head.id}_{at}"
            called = {"call_id": call_id, "name": part.name, "arguments": part.text}
            return {**head, "type": "function_call", **called}
        content = [self._content(part)]
        if part.kind == "reasoning":
            return {**head, "type": "reasoning", "summary": [], "content": content}
        return {**head, "type": "message", "role": "assistant", "content": content}

    @staticmethod
    def _content(part: OutputPart) -> dict[str, Any]:
        if part.kind == "reasoning":
            return {"type": "reasoning_text", "text": part.text}
        logs = [openai.log_object(one) for one in part.logprobs]
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": logs}

    @staticmethod
    def _status(finish: FinishReason) -> str:
        return "incomplete" if finish.reason == "length" else "completed"

    def _response(
        self, status: str, output: list[dict[str, Any]], usage: Usage | None
    ) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": f"resp_{self._head.id}",
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": cut,
            "model": self._head.model,
            "output": output,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "temperature": self._asked.sampling.temperature,
            "top_p": self._asked.sampling.top_p,
            "truncation": "disabled",
            "usage": usage_object(usage) if usage is not None else None,
            **self._asked.given,
        }


def usage_object(usage: Usage) -> dict[str, Any]:
    """How many tokens were read and generated."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


FRONT = ApiAdapter(read, ResponsesBuilder, openai.render_error)
