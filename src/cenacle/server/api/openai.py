"""OpenAI's chat completions and completions as plain data: a body's bytes to what is asked, parts
of an answer to response objects.

Owns: names, types and ranges of the parameters; the shapes of responses, chunks and errors.
Does not know: HTTP, tokenizers, MLX, time.
Invariant: a parameter is obeyed or refused by name, never ignored in silence (those in `NAMES` tell
an operator who asks, and have no effect); null counts as absent; what is accepted is described in
`CHAT_PARAMETERS` and `TEXT_PARAMETERS`.
Source: https://platform.openai.com/docs/api-reference/chat
Next: `exchange.py` has the nouns, `responses.py` is OpenAI's newer API, `app.py` has the sockets.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from ...core.chat import FinishReason, Message, OutputPart, TokenLogprob, Tool, Usage, join_text
from ...core.request import MAX_LOGPROBS, Sampling
from ...errors import Busy, CenacleError, ClusterError, InputError
from . import structured_output
from .protocol import (
    ApiAdapter,
    ChoiceState,
    Event,
    GenerationRequest,
    Prompt,
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
    not_among,
    not_supported,
    number,
    object_of,
    one_of,
    shown,
    string,
    strings,
    wrong_type,
)

MAX_N = 8
MAX_CHOICES = 32  # prompts times n of one HTTP request
MAX_STOPS = 4
MAX_TOOLS = 128
MAX_TEXT_LOGPROBS = 5  # OpenAI's limit for completions
TEXT_MAX_TOKENS = 16  # OpenAI's default for completions; a chat may fill the context
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")

# For whoever runs a server: they change no answer.
NAMES = ("user", "safety_identifier", "prompt_cache_key")

_STRING = {"type": "string"}
_BOOLEAN = {"type": "boolean"}
_OBJECT = {"type": "object"}
_PENALTY = {"type": "number", "minimum": -2, "maximum": 2}
SAMPLING_PARAMETERS: dict[str, dict[str, Any]] = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 1},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1},
    "top_k": {"type": "integer", "minimum": 0, "default": 0},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1, "default": 0},
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": {
        "type": "object",
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
}
_COMMON_PARAMETERS: dict[str, dict[str, Any]] = {
    "model": _STRING,
    **SAMPLING_PARAMETERS,
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_N, "default": 1},
    "stop": {
        "oneOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
        ]
    },
    "stream": _BOOLEAN,
    "stream_options": {
        "type": "object",
        "properties": {
            "include_usage": _BOOLEAN,
            "include_obfuscation": {"const": False},
        },
        "additionalProperties": False,
    },
    "max_tokens": {"type": "integer", "minimum": 1},
    **dict.fromkeys(NAMES, _STRING),
}
RESPONSE_FORMAT: dict[str, Any] = {
    "oneOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": _STRING,
                        "description": _STRING,
                        "schema": _OBJECT,
                        "strict": _BOOLEAN,
                    },
                    "required": ["name", "schema"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "json_schema"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {"type": {"const": "regex"}, "pattern": _STRING},
            "required": ["type", "pattern"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {"type": {"const": "grammar"}, "grammar": _STRING},
            "required": ["type", "grammar"],
            "additionalProperties": False,
        },
    ]
}
_TOOL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
                "description": _STRING,
                "parameters": _OBJECT,
                "strict": _BOOLEAN,
            },
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}
CHAT_PARAMETERS: dict[str, dict[str, Any]] = {
    "messages": {"type": "array", "items": _OBJECT, "minItems": 1},
    **_COMMON_PARAMETERS,
    "max_completion_tokens": {"type": "integer", "minimum": 1},
    "logprobs": _BOOLEAN,
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS},
    "response_format": RESPONSE_FORMAT,
    "tools": {"type": "array", "items": _TOOL, "maxItems": MAX_TOOLS},
    "tool_choice": {
        "oneOf": [
            {"enum": ["none", "auto", "required"]},
            {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "properties": {"name": _STRING},
                        "required": ["name"],
                        "additionalProperties": False,
                    },
                },
                "required": ["type", "function"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {
                    "type": {"const": "allowed_tools"},
                    "allowed_tools": {
                        "type": "object",
                        "properties": {
                            "mode": {"enum": ["auto", "required"]},
                            "tools": {"type": "array", "items": _OBJECT, "minItems": 1},
                        },
                        "required": ["mode", "tools"],
                        "additionalProperties": False,
                    },
                },
                "required": ["type", "allowed_tools"],
                "additionalProperties": False,
            },
        ]
    },
    "parallel_tool_calls": _BOOLEAN,
    "reasoning_effort": {"enum": list(EFFORTS)},
    "chat_template_kwargs": _OBJECT,
}
TEXT_PARAMETERS: dict[str, dict[str, Any]] = {
    "prompt": {
        "oneOf": [
            _STRING,
            {
                "type": "array",
                "minItems": 1,
                "items": {
                    "oneOf": [
                        _STRING,
                        {"type": "integer"},
                        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                    ]
                },
            },
        ]
    },
    **_COMMON_PARAMETERS,
    "logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TEXT_LOGPROBS},
    "echo": _BOOLEAN,
    "response_format": RESPONSE_FORMAT,
}

# Parameters of OpenAI's API that are not supported, with the values that ask for nothing.
_CHAT_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": (),
    "web_search_options": (),
}
_TEXT_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"best_of": (1,), "suffix": ()}
_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}
_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "reasoning": (),
    "refusal": (),
    "reasoning_content": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
}


def read_chat(body: bytes, served: ServedModel) -> GenerationRequest:
    """What a body of chat completions asks.

    Raises:
        InputError: names the field (a `Refused` where a code or a status goes with it).
    """
    fields = Fields(object_of(body), known=CHAT_PARAMETERS)
    check_model(fields.take("model", string, served.model), served)
    prompts: tuple[Prompt, ...] = (fields.need("messages", _messages),)
    stream = fields.take("stream", boolean, False)
    tools = fields.take("tools", _tools, ())
    choice = fields.take("tool_choice", _tool_choice, "auto")
    parallel = fields.take("parallel_tool_calls", boolean, True)
    tools, calls, grammar = choose_tools(tools, choice, parallel)
    if (wanted := fields.take("response_format", response_format, None)) is not None:
        if tools:
            raise not_supported("response_format", "together with tools; tool_choice none frees it")
        grammar = wanted
    template: dict[str, Any] = dict(fields.take("chat_template_kwargs", dict_of, {}))
    think = thinking(fields.take("reasoning_effort", one_of(*EFFORTS), ""), template)
    asked = GenerationRequest(
        prompts,
        True,
        "messages",
        _max_tokens(fields),
        sampling(fields, served.vocabulary),
        fields.take("stop", strings(MAX_STOPS), ()),
        fields.take("n", integer_from(1, MAX_N), 1),
        stream,
        _usage_chunk(fields, stream),
        _chat_logprobs(fields),
        tools=tools,
        calls=calls,
        parallel=parallel,
        grammar=grammar,
        grammar_field="tools" if calls is not None else "response_format",
        template=template,
        think=think,
    )
    take_names(fields)
    fields.refuse_rest(_CHAT_UNSUPPORTED)
    return asked


def read_text(body: bytes, served: ServedModel) -> GenerationRequest:
    """What a body of completions asks.

    Raises:
        InputError: as `read_chat`.
    """
    fields = Fields(object_of(body), known=TEXT_PARAMETERS)
    check_model(fields.take("model", string, served.model), served)
    prompts = fields.need("prompt", _prompts)
    n = fields.take("n", integer_from(1, MAX_N), 1)
    if len(prompts) * n > MAX_CHOICES:
        raise RequestError(
            f"prompt: expected at most {MAX_CHOICES} answers in one request, got "
            f"{len(prompts)} prompts times n={n}",
            "prompt",
        )
    stream = fields.take("stream", boolean, False)
    none: int | None = None
    logprobs = fields.take("logprobs", integer_from(0, MAX_TEXT_LOGPROBS), none)
    echo = fields.take("echo", boolean, False)
    if echo and logprobs is not None:
        raise not_supported("echo", "with logprobs; remove one of the two")
    asked = GenerationRequest(
        prompts,
        False,
        "prompt",
        fields.take("max_tokens", integer_from(1, None), TEXT_MAX_TOKENS),
        sampling(fields, served.vocabulary),
        fields.take("stop", strings(MAX_STOPS), ()),
        n,
        stream,
        _usage_chunk(fields, stream),
        logprobs,
        echo,
        grammar=fields.take("response_format", response_format, None),
    )
    take_names(fields)
    fields.refuse_rest(_TEXT_UNSUPPORTED)
    return asked


def take_names(fields: Fields) -> None:
    """Take what tells an operator who asks."""
    for name in NAMES:
        fields.take(name, string, "")


def sampling(fields: Fields, vocabulary: int) -> Sampling:
    """The members of `SAMPLING_PARAMETERS`."""
    none: int | None = None

    def biases(value: Any, name: str) -> dict[int, float]:
        return _biases(value, name, vocabulary)

    return Sampling(
        temperature=fields.take("temperature", number, 1.0),
        top_p=fields.take("top_p", number, 1.0),
        top_k=fields.take("top_k", integer, 0),
        min_p=fields.take("min_p", number, 0.0),
        seed=fields.take("seed", integer, none),
        repetition_penalty=fields.take("repetition_penalty", number, 1.0),
        presence_penalty=fields.take("presence_penalty", number, 0.0),
        frequency_penalty=fields.take("frequency_penalty", number, 0.0),
        logit_bias=fields.take("logit_bias", biases, {}),
    )


@dataclass(frozen=True)
class Allowed:
    """A choice among some of the tools: "auto", or "required" to call one of them."""

    mode: str
    names: tuple[str, ...]


def choose_tools(
    tools: tuple[Tool, ...], choice: str | Tool | Allowed, parallel: bool, field: str = "tools"
) -> tuple[tuple[Tool, ...], str | None, str | None]:
    """What is offered, which calls are forced (see `Asked.calls`), and the grammar of those.

    Args:
        tools: all that were given.
        choice: "auto", "none", "required", the one to be called, of which only the name counts, or
            those that may be: the others are not offered.
        parallel: several calls are allowed.
        field: the parameter of the tools.

    Raises:
        Refused: a tool is chosen that is not there, or strict where nothing enforces it.
    """
    if isinstance(choice, Allowed):
        for name in choice.names:
            if name not in (known := [tool.name for tool in tools]):
                raise not_among("tool_choice", known, name)
        tools = tuple(tool for tool in tools if tool.name in choice.names)
        choice = choice.mode
    if choice == "none" or (choice == "auto" and not tools):
        return (), None, None
    names = [tool.name for tool in tools]
    for at, tool in enumerate(tools):
        if tool.strict:
            structured_output.json_schema_grammar(tool.parameters, f"{field}[{at}]")
            if '"patternProperties":' in json.dumps(tool.parameters):
                raise not_supported(f"{field}[{at}]", "patternProperties in a strict tool")
    if choice == "auto":
        return tools, None, None
    if not tools:
        raise RequestError("tool_choice: expected tools with it, got none", "tool_choice")
    only = choice.name if isinstance(choice, Tool) else None
    if only is not None and only not in names:
        raise not_among("tool_choice", names, only)
    return (
        tools,
        only or "required",
        structured_output.tool_call_grammar(tools, only, parallel, field),
    )


def thinking(effort: str, template: dict[str, Any]) -> bool | None:
    """Whether a model shall think, None: as its template says; that is told what is no mere no."""
    if effort == "none":
        return False
    if effort:
        template["reasoning_effort"] = effort
    return None


def response_format(value: Any, name: str) -> str | None:
    """The grammar of a response_format."""
    fields = Fields(dict_of(value, name), f"{name}.")
    kind = fields.need("type", one_of("text", "json_object", "json_schema", "regex", "grammar"))
    grammar: str | None = None
    if kind == "json_object":
        grammar = structured_output.json_schema_grammar({"type": "object"}, name)
    elif kind == "json_schema":
        grammar = fields.need("json_schema", schema_format)
    elif kind == "regex":
        grammar = fields.need("pattern", _grammar_of(structured_output.regex_grammar))
    elif kind == "grammar":
        grammar = fields.need("grammar", _grammar_of(structured_output.lark_grammar))
    fields.refuse_rest({})
    return grammar


def schema_format(value: Any, name: str) -> str:
    """The grammar of {"name", "schema", "strict"}; what is not strict is held to it too."""
    fields = Fields(dict_of(value, name), f"{name}.")
    fields.need("name", string)
    fields.take("description", string, "")
    fields.take("strict", boolean, False)
    schema = fields.need("schema", dict_of)
    fields.refuse_rest({})
    return structured_output.json_schema_grammar(schema, f"{name}.schema")


def _grammar_of(make: Callable[[str, str], str]) -> Callable[[Any, str], str]:
    return lambda value, name: make(string(value, name), name)


def function(value: Any, name: str) -> Tool:
    """A function as OpenAI's APIs describe it."""
    fields = Fields(dict_of(value, name), f"{name}.")
    tool = Tool(
        fields.need("name", tool_name),
        fields.take("description", string, ""),
        fields.take("parameters", dict_of, {}),
        fields.take("strict", boolean, False),
    )
    fields.refuse_rest({})
    return tool


def tool_name(value: Any, name: str) -> str:
    """A function's name: up to 64 letters, digits, _ and -."""
    text = string(value, name)
    plain = text.replace("_", "a").replace("-", "a")
    if not (plain.isascii() and plain.isalnum() and len(text) <= 64):
        raise RequestError(
            f"{name}: expected 1 to 64 letters, digits, _ or -, got {shown(text)}", name
        )
    return text


def unique(tools: list[Tool], name: str) -> tuple[Tool, ...]:
    """Tools whose names differ, not too many."""
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"{name}: expected at most {MAX_TOOLS} tools, got {len(tools)}", name)
    names = [tool.name for tool in tools]
    for at, one in enumerate(names):
        if one in names[:at]:
            full = f"{name}[{at}]"
            raise RequestError(f"{full}: expected another name, {one!r} is taken", full)
    return tuple(tools)


def _tools(value: Any, name: str) -> tuple[Tool, ...]:
    return unique([_tool(t, f"{name}[{at}]") for at, t in enumerate(list_of(value, name))], name)


def _tool(value: Any, name: str) -> Tool:
    fields = Fields(dict_of(value, name), f"{name}.")
    if (kind := fields.need("type", string)) != "function":
        raise not_supported(f"{name}.type", f"only functions, not {shown(kind)}")
    tool = fields.need("function", function)
    fields.refuse_rest({})
    return tool


def _tool_choice(value: Any, name: str) -> str | Tool | Allowed:
    if isinstance(value, str):
        return one_of("none", "auto", "required")(value, name)
    fields = Fields(dict_of(value, name), f"{name}.")
    if fields.need("type", one_of("function", "allowed_tools")) == "function":
        tool = _function_named(fields, name)
        fields.refuse_rest({})
        return tool
    inner = Fields(fields.need("allowed_tools", dict_of), f"{name}.allowed_tools.")
    fields.refuse_rest({})
    return allowed(inner, f"{name}.allowed_tools", _function_named)


def allowed(fields: Fields, name: str, named: Callable[[Fields, str], Tool]) -> Allowed:
    """The members of a choice among some tools.

    Args:
        named: reads which function one of them is.
    """
    mode = fields.need("mode", one_of("auto", "required"))
    names = []
    for at, item in enumerate(fields.need("tools", list_of)):
        full = f"{name}.tools[{at}]"
        one = Fields(dict_of(item, full), f"{full}.")
        one.need("type", one_of("function"))
        names.append(named(one, full).name)
        one.refuse_rest({})
    fields.refuse_rest({})
    if not names:
        raise RequestError(f"{name}.tools: expected at least one tool, got none", f"{name}.tools")
    return Allowed(mode, tuple(names))


def _function_named(fields: Fields, name: str) -> Tool:
    inner = Fields(fields.need("function", dict_of), f"{name}.function.")
    tool = Tool(inner.need("name", string))
    inner.refuse_rest({})
    return tool


def _max_tokens(fields: Fields) -> int | None:
    positive = integer_from(1, None)
    if fields.has("max_tokens") and fields.has("max_completion_tokens"):
        raise RequestError(
            "max_tokens: give it or max_completion_tokens, not both",
            "max_tokens",
            "invalid_parameter_combination",
        )
    none: int | None = None
    either = fields.take("max_tokens", positive, none)
    return fields.take("max_completion_tokens", positive, either)


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.take("logprobs", boolean, False)
    if fields.has("top_logprobs") and not wanted:
        raise RequestError("top_logprobs: only allowed with logprobs=true", "top_logprobs")
    top = fields.take("top_logprobs", integer_from(0, MAX_LOGPROBS), 0)
    return top if wanted else None


def _usage_chunk(fields: Fields, stream: bool) -> bool:
    if not fields.has("stream_options"):
        return False
    options = Fields(fields.need("stream_options", dict_of), "stream_options.")
    if not stream:
        raise RequestError("stream_options: only allowed with stream=true", "stream_options")
    counted = options.take("include_usage", boolean, False)
    options.refuse_rest(_STREAM_OPTIONS)
    return counted


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    items = list_of(value, name)
    if not items:
        raise RequestError("messages: expected at least one message, got none", name)
    return tuple(_message(item, f"{name}[{at}]") for at, item in enumerate(items))


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _message(value: Any, name: str) -> Message:
    fields = Fields(dict_of(value, name), f"{name}.")
    role = fields.need("role", string)
    content = fields.take("content", _content, None)
    message: Message = {}
    if role == "tool":
        message = {"role": "tool", "tool_call_id": fields.need("tool_call_id", string)}
        if called := fields.take("name", string, ""):  # some templates say whose result it is
            message["name"] = called
    elif role in ROLES:
        message = {"role": ROLES[role]}
    else:
        known = (*ROLES, "tool")
        raise not_among(f"{name}.role", known, role)
    if role == "assistant":
        if thought := fields.take("reasoning_content", string, ""):
            message["reasoning_content"] = thought
        if calls := fields.take("tool_calls", _calls, None):
            message["tool_calls"] = calls
    fields.refuse_rest(_MESSAGE)
    if content is None and "tool_calls" not in message:
        raise missing(f"{name}.content")
    return {**message, "content": content or ""}


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    return [_past_call(item, f"{name}[{at}]") for at, item in enumerate(list_of(value, name))]


def _past_call(value: Any, name: str) -> dict[str, Any]:
    fields = Fields(dict_of(value, name), f"{name}.")
    if (kind := fields.take("type", string, "function")) != "function":
        raise not_supported(f"{name}.type", f"only functions, not {shown(kind)}")
    call_id = fields.need("id", string)
    fields.take("index", integer, 0)  # clients that put a stream together leave it in
    inner = Fields(fields.need("function", dict_of), f"{name}.function.")
    made = past_call(call_id, inner.need("name", string), inner.need("arguments", arguments))
    inner.refuse_rest({})
    fields.refuse_rest({})
    return made


def past_call(call_id: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """A call in an earlier message, as chat templates read it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}


def arguments(value: Any, name: str) -> dict[str, Any]:
    """The arguments of an earlier call, an object as JSON text."""
    try:
        data = json.loads(string(value, name) or "{}")
    except (ValueError, RecursionError):
        raise RequestError(
            f"{name}: expected a JSON object as text, got {shown(value)}", name
        ) from None
    return dict_of(data, name)


def _content(value: Any, name: str) -> str:
    if isinstance(value, str):
        return string(value, name)
    return text_parts(value, name, ("text",))


def text_parts(value: Any, name: str, kinds: Sequence[str]) -> str:
    """The text of a list of parts, all of the given types."""
    if not isinstance(value, list):
        raise wrong_type(name, "a string or a list of text parts", value)
    return "".join(_part(part, f"{name}[{at}]", kinds) for at, part in enumerate(value))


def _part(value: Any, name: str, kinds: Sequence[str]) -> str:
    fields = Fields(dict_of(value, name), f"{name}.")
    kind = fields.need("type", string)
    if kind not in kinds:
        raise RequestError(
            f"{name}.type: this server reads only parts of type {' or '.join(map(repr, kinds))}, "
            f"got {shown(kind)}",
            f"{name}.type",
            UNSUPPORTED,
        )
    text = fields.need("text", string)
    fields.refuse_rest({"annotations": ([],), "logprobs": ([],)})
    return text


def _prompts(value: Any, name: str) -> tuple[Prompt, ...]:
    """A string, a list of ids, or a list of any of these."""
    if isinstance(value, str):
        return (string(value, name),)
    if not isinstance(value, list):
        raise wrong_type(name, "a string, a list of token ids or a list of these", value)
    if not value:
        raise RequestError(f"{name}: expected a prompt, got an empty list", name)
    if isinstance(value[0], str | list):
        return tuple(_one_prompt(item, f"{name}[{at}]") for at, item in enumerate(value))
    return (_ids(value, name),)


def _one_prompt(value: Any, name: str) -> Prompt:
    return string(value, name) if isinstance(value, str) else _ids(list_of(value, name), name)


def _ids(value: list[Any], name: str) -> tuple[int, ...]:
    for at, item in enumerate(value):
        if type(item) is not int:  # to Python True is an int
            raise wrong_type(f"{name}[{at}]", "a token id", item)
    if not value:
        raise RequestError(f"{name}: expected at least one token id, got none", name)
    return tuple(value)


def _biases(value: Any, name: str, vocabulary: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in dict_of(value, name).items():
        full = f"{name}.{key[:80]}"
        digits = key.isascii() and key.isdigit() and len(key) < 20
        if not digits or int(key) >= vocabulary:
            raise RequestError(
                f"{full}: expected a token id from 0 to {vocabulary - 1} as the name", full
            )
        if not -100 <= number(bias, full) <= 100:
            raise RequestError(f"{full}: expected from -100 to 100, got {bias}", full)
        biases[int(key)] = float(bias)
    return biases


class _Reply(ABC):
    """What both APIs have in common; all objects of an answer carry the same head."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, asked: GenerationRequest, head: ResponseMeta) -> None:
        self._asked, self._head = asked, head

    def full_response(self, choices: Sequence[ChoiceState], usage: Usage) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        body = [
            {"index": c.index, **self._whole(c)} for c in sorted(choices, key=lambda c: c.index)
        ]
        return {**self._headed(self.kind), "choices": body, "usage": usage_object(usage)}

    def finish_stream(self, usage: Usage) -> Iterator[Event]:
        """The chunk that counts, if it was asked for, and the end of the stream."""
        if self._asked.usage_chunk:
            counted = {"choices": [], "usage": usage_object(usage)}
            yield None, {**self._headed(self.chunk_kind), **counted}
        yield None, "[DONE]"

    def keep_alive(self) -> tuple[Event, ...]:
        """Nothing: a comment will do."""
        return ()

    def error(self, error: CenacleError) -> Iterator[Event]:
        """Too late for a status: the client is told in the stream."""
        yield None, render_error(error)[1]

    @abstractmethod
    def _whole(self, choice: ChoiceState) -> dict[str, Any]: ...

    def _chunk(
        self, index: int, what: dict[str, Any], logged: object, finish: str | None
    ) -> Iterator[Event]:
        choice = {"index": index, **what, "logprobs": logged, "finish_reason": finish}
        chunk = {**self._headed(self.chunk_kind), "choices": [choice]}
        yield None, {**chunk, "usage": None} if self._asked.usage_chunk else chunk

    def _headed(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.prefix + self._head.id,
            "object": kind,
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.fingerprint,
        }


class ChatResponseBuilder(_Reply):
    """Answers of chat completions."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, asked: GenerationRequest, head: ResponseMeta) -> None:
        super().__init__(asked, head)
        self._called: dict[int, int] = {}  # choice -> number of its calls so far

    def first_events(self, index: int, usage: Usage) -> Iterator[Event]:  # noqa: ARG002
        """The chunk before a choice's text, which says whose words follow."""
        yield from self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def delta(self, index: int, part: OutputPart) -> Iterator[Event]:
        """A chunk with some text, or a call."""
        if part.kind == "call":
            at = self._count(index)
            call = {"index": at, **self._call(part, index, at)}
            delta: dict[str, Any] = {"tool_calls": [call]}
        elif part.kind == "reasoning":
            delta = {"reasoning_content": part.text}
        else:
            delta = {"content": part.text}
        yield from self._chunk(index, {"delta": delta}, self._logs(part.logprobs), None)

    def finish_choice(self, index: int, finish: FinishReason) -> Iterator[Event]:
        """A choice's last chunk."""
        reason = self._reason(finish, bool(self._called.get(index)))
        yield from self._chunk(index, {"delta": {}}, None, reason)

    def _whole(self, choice: ChoiceState) -> dict[str, Any]:
        parts = join_text(choice.parts)
        text, thought = ("".join(p.text for p in parts if p.kind == k) for k in _TEXTS)
        calls = [
            self._call(p, choice.index, self._count(choice.index))
            for p in parts
            if p.kind == "call"
        ]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message = {**message, "content": text or None, "tool_calls": calls}
        logged = [one for part in parts for one in part.logprobs]
        return {
            "message": message,
            "logprobs": self._logs(logged),
            "finish_reason": self._reason(choice.finish, bool(calls)),
        }

    def _count(self, index: int) -> int:
        at = self._called.get(index, 0)
        self._called[index] = at + 1
        return at

    def _call(self, part: OutputPart, index: int, at: int) -> dict[str, Any]:
        call_id = part.id or f"call_{self._head.id}_{index}_{at}"
        called = {"name": part.name, "arguments": part.text}
        return {"id": call_id, "type": "function", "function": called}

    def _logs(self, logged: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        return {"content": [log_object(one) for one in logged], "refusal": None}

    @staticmethod
    def _reason(finish: FinishReason, called: bool) -> str:
        if finish.reason == "length":
            return "length"
        return "tool_calls" if called else "stop"


_TEXTS: tuple[Literal["text", "reasoning"], ...] = ("text", "reasoning")


class CompletionResponseBuilder(_Reply):
    """Answers of completions."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, asked: GenerationRequest, head: ResponseMeta) -> None:
        super().__init__(asked, head)
        self._written: dict[int, int] = {}  # choice -> characters of its tokens so far

    def first_events(self, index: int, usage: Usage) -> Iterator[Event]:  # noqa: ARG002
        """Nothing."""
        yield from ()

    def delta(self, index: int, part: OutputPart) -> Iterator[Event]:
        """A chunk with some text."""
        yield from self._chunk(index, {"text": part.text}, self._logs(index, part.logprobs), None)

    def finish_choice(self, index: int, finish: FinishReason) -> Iterator[Event]:
        """A choice's last chunk."""
        yield from self._chunk(index, {"text": ""}, None, self._reason(finish))

    def _whole(self, choice: ChoiceState) -> dict[str, Any]:
        return {
            "text": "".join(part.text for part in choice.parts),
            "logprobs": self._logs(choice.index, [o for p in choice.parts for o in p.logprobs]),
            "finish_reason": self._reason(choice.finish),
        }

    def _logs(self, index: int, logged: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        offsets, at = [], self._written.get(index, 0)
        for one in logged:
            offsets.append(at)
            at += len(one.text)
        self._written[index] = at
        return {
            "tokens": [_named(one) for one in logged],
            "token_logprobs": [one.logprob for one in logged],
            "top_logprobs": [{_named(t): t.logprob for t in one.top} for one in logged]
            if self._asked.logprobs
            else None,
            "text_offset": offsets,
        }

    @staticmethod
    def _reason(finish: FinishReason) -> str:
        return "length" if finish.reason == "length" else "stop"


def _named(one: TokenLogprob) -> str:
    """A token as completions name it: half a character by its bytes."""
    try:
        return one.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.data)


def log_object(one: TokenLogprob) -> dict[str, Any]:
    """A token's log-probability and those of its alternatives."""

    def plain(each: TokenLogprob) -> dict[str, Any]:
        return {"token": each.text, "logprob": each.logprob, "bytes": list(each.data)}

    return {**plain(one), "top_logprobs": [plain(each) for each in one.top]}


def usage_object(usage: Usage) -> dict[str, Any]:
    """How many tokens were read and generated (a token that ended an answer is counted)."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def model_list(served: ServedModel, created: int) -> dict[str, Any]:
    """What GET /v1/models gives: OpenAI's members and Anthropic's, whose path is the same."""
    model = model_object(served, created)
    ends = {"first_id": model["id"], "last_id": model["id"], "has_more": False}
    return {"object": "list", "data": [model], **ends}


def model_object(served: ServedModel, created: int) -> dict[str, Any]:
    """The served model, as GET /v1/models lists it."""
    return {
        "id": served.model,
        "object": "model",
        "created": created,
        "owned_by": "cenacle",
        "type": "model",
        "display_name": served.model,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat(),
    }


def render_error(error: CenacleError) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the body for an error."""
    if isinstance(error, RequestError):
        return error.status, error_object(str(error), error.field, error.code)
    if isinstance(error, InputError):
        return 400, error_object(str(error), error.field, "invalid_value")
    if isinstance(error, Busy):
        return 429, error_object(str(error), None, "server_busy", "rate_limit_error")
    if isinstance(error, ClusterError):
        return 503, error_object(str(error), None, "group_failed", "server_error")
    return 500, error_object(str(error), None, "internal_error", "server_error")


def error_object(
    message: str,
    param: str | None = None,
    code: str | None = None,
    kind: str = "invalid_request_error",
) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


CHAT = ApiAdapter(read_chat, ChatResponseBuilder, render_error)
TEXT = ApiAdapter(read_text, CompletionResponseBuilder, render_error)
