"""OpenAI's API as plain data: a body's bytes to what is asked, text to response objects.

Owns: names, types and ranges of the parameters of chat completions and completions; the shapes of
responses, chunks and errors.
Does not know: HTTP, tokenizers, MLX, time.
Invariant: a parameter is obeyed or refused by name, never ignored in silence (`user` alone has no
effect and is accepted); null counts as absent; an `Asked` that exists can be carried out.
Next: `app.py` puts this on sockets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ..errors import CenacleError, ClusterError, InputError
from ..request import Sampling

Kind = Literal["chat", "text"]
Prompt = str | tuple[int, ...] | tuple[dict[str, str], ...]
"""Plain text, ids, or the messages of a chat."""

MAX_N = 8
MAX_CHOICES = 32  # prompts times n of one HTTP request
MAX_STOPS = 4
TEXT_MAX_TOKENS = 16  # OpenAI's default for completions; a chat may fill the context

T = TypeVar("T")


class Refused(InputError):
    """A request that is refused: HTTP `status`, and OpenAI's `param` and `code`."""

    def __init__(
        self,
        message: str,
        field: str | None = None,
        code: str | None = "invalid_value",
        status: int = 400,
    ) -> None:
        super().__init__(message, field)
        self.code, self.status = code, status


@dataclass(frozen=True)
class Served:
    """What requests are checked against.

    Args:
        model: the id that clients name.
        context: most tokens of prompt and answer together; None: not known.
        vocabulary: number of token ids.
    """

    model: str
    context: int | None
    vocabulary: int


@dataclass(frozen=True)
class Asked:
    """What one HTTP request asks.

    Args:
        kind: "chat" or "text".
        prompts: at least one; a chat has exactly one.
        max_tokens: None: as many as fit.
        stop: strings before which an answer ends.
        n: answers per prompt.
        stream: answer in chunks.
        usage_chunk: a stream ends with a chunk that counts tokens.
    """

    kind: Kind
    prompts: tuple[Prompt, ...]
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    usage_chunk: bool = False

    @property
    def prompt_field(self) -> str:
        """The parameter that the prompts came in."""
        return "messages" if self.kind == "chat" else "prompt"

    def sampling_of(self, choice: int) -> Sampling:
        """The sampling of one of the `n` answers: a given seed is counted up, so that they differ;
        the first is what n=1 would give."""
        seed = self.sampling.seed
        if seed is None or choice == 0:
            return self.sampling
        return replace(self.sampling, seed=(seed + choice + 2**63) % 2**64 - 2**63)


def read(kind: Kind, body: bytes, served: Served) -> Asked:
    """What a body asks.

    Raises:
        InputError: names the field (a `Refused` where a code or a status goes with it).
    """
    fields = _Fields(_object(body))
    model = fields.take("model", _string, served.model)
    if model != served.model:
        raise no_model(model, served)
    if kind == "chat":
        prompts: tuple[Prompt, ...] = (fields.need("messages", _messages),)
    else:
        prompts = fields.need("prompt", _prompts)
    n = fields.take("n", _integer_from(1, MAX_N), 1)
    if len(prompts) * n > MAX_CHOICES:
        raise Refused(
            f"prompt: expected at most {MAX_CHOICES} answers in one request, got "
            f"{len(prompts)} prompts times n={n}",
            "prompt",
        )
    stream = fields.take("stream", _boolean, False)
    asked = Asked(
        kind,
        prompts,
        _max_tokens(kind, fields),
        _sampling(fields, served.vocabulary),
        fields.take("stop", _stops, ()),
        n,
        stream,
        _usage_chunk(fields, stream),
    )
    fields.take("user", _string, "")
    fields.refuse_rest(_UNSUPPORTED[kind])
    return asked


def no_model(name: str, served: Served) -> Refused:
    """The refusal of a model that is not served."""
    message = f"The model {_shown(name)} does not exist: this server has {served.model!r}"
    return Refused(message, "model", "model_not_found", 404)


def room(tokens: int, served: Served, field: str) -> int | None:
    """How many tokens an answer to a prompt of so many may have; None: not known.

    Raises:
        Refused: the prompt leaves no room.
    """
    if served.context is None:
        return None
    if tokens >= served.context:
        raise Refused(
            f"This model's maximum context length is {served.context} tokens, and the answer needs "
            f"at least one of them. Your {field} has {tokens} tokens: shorten it by at least "
            f"{tokens - served.context + 1}",
            field,
            "context_length_exceeded",
        )
    return served.context - tokens


# Parameters of OpenAI's API that are not supported, with the values that ask for nothing.
_UNSUPPORTED: dict[Kind, dict[str, tuple[Any, ...]]] = {
    "chat": {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logprobs": (False,),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (),
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (),
        "verbosity": (),
        "web_search_options": (),
    },
    "text": {
        "best_of": (1,),
        "echo": (False,),
        "logprobs": (),
        "suffix": (),
    },
}
_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}
_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}


class _Fields:
    """The members of a JSON object, taken one by one; what is left at the end is refused."""

    def __init__(self, data: dict[str, Any], where: str = "") -> None:
        self._left = {k: v for k, v in data.items() if v is not None}
        self._where = where

    def has(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, convert: Callable[[Any, str], T], default: T) -> T:
        if name not in self._left:
            return default
        return convert(self._left.pop(name), self._where + name)

    def need(self, name: str, convert: Callable[[Any, str], T]) -> T:
        if name not in self._left:
            full = self._where + name
            raise Refused(f"{full}: required, but missing", full, "missing_required_parameter")
        return convert(self._left.pop(name), self._where + name)

    def refuse_rest(self, unsupported: dict[str, tuple[Any, ...]]) -> None:
        for name, value in self._left.items():
            full = self._where + name[:80]
            if name not in unsupported:
                raise Refused(f"{full}: unknown parameter; remove it", full, "unknown_parameter")
            # Compared as JSON: to Python False is 0.
            if json.dumps(value) not in [json.dumps(v) for v in unsupported[name]]:
                raise Refused(
                    f"{full}: not supported by this server; remove it",
                    full,
                    "unsupported_parameter",
                )


def _object(body: bytes) -> dict[str, Any]:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Refused(
            f"The body is not UTF-8: byte {error.start} of {len(body)}", None, "invalid_body"
        ) from None
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise Refused(
            f"The body is not JSON: {error.msg} at line {error.lineno} column {error.colno}",
            None,
            "invalid_body",
        ) from None
    except (ValueError, RecursionError):
        raise Refused(
            "The body is not JSON that can be read: NaN, Infinity, a number of thousands of digits "
            "or nesting too deep",
            None,
            "invalid_body",
        ) from None
    if not isinstance(data, dict):
        raise Refused(f"The body: expected a JSON object, got {_kind(data)}", None, "invalid_body")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _max_tokens(kind: Kind, fields: _Fields) -> int | None:
    positive = _integer_from(1, None)
    if kind == "text":
        return fields.take("max_tokens", positive, TEXT_MAX_TOKENS)
    if fields.has("max_tokens") and fields.has("max_completion_tokens"):
        raise Refused(
            "max_tokens: give it or max_completion_tokens, not both",
            "max_tokens",
            "invalid_parameter_combination",
        )
    none: int | None = None
    either = fields.take("max_tokens", positive, none)
    return fields.take("max_completion_tokens", positive, either)


def _sampling(fields: _Fields, vocabulary: int) -> Sampling:
    none: int | None = None

    def biases(value: Any, name: str) -> dict[int, float]:
        return _biases(value, name, vocabulary)

    return Sampling(
        temperature=fields.take("temperature", _number, 1.0),
        top_p=fields.take("top_p", _number, 1.0),
        top_k=fields.take("top_k", _integer, 0),
        min_p=fields.take("min_p", _number, 0.0),
        seed=fields.take("seed", _integer, none),
        repetition_penalty=fields.take("repetition_penalty", _number, 1.0),
        presence_penalty=fields.take("presence_penalty", _number, 0.0),
        frequency_penalty=fields.take("frequency_penalty", _number, 0.0),
        logit_bias=fields.take("logit_bias", biases, {}),
    )


def _usage_chunk(fields: _Fields, stream: bool) -> bool:
    if not fields.has("stream_options"):
        return False
    options = _Fields(fields.need("stream_options", _dict), "stream_options.")
    if not stream:
        raise Refused("stream_options: only allowed with stream=true", "stream_options")
    usage = options.take("include_usage", _boolean, False)
    options.refuse_rest(_STREAM_OPTIONS)
    return usage


def _messages(value: Any, name: str) -> tuple[dict[str, str], ...]:
    items = _list(value, name)
    if not items:
        raise Refused("messages: expected at least one message, got none", name)
    return tuple(_message(item, f"{name}[{at}]") for at, item in enumerate(items))


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _message(value: Any, name: str) -> dict[str, str]:
    fields = _Fields(_dict(value, name), f"{name}.")
    role = fields.need("role", _string)
    if role not in _ROLES:
        known = ", ".join(_ROLES)
        raise Refused(f"{name}.role: expected one of {known}; got {_shown(role)}", f"{name}.role")
    content = fields.take("content", _anything, None)
    # Before the content, which a message with tool calls lacks: that is not what is wrong with it.
    fields.refuse_rest(_MESSAGE)
    full = f"{name}.content"
    if content is None:
        raise Refused(f"{full}: required, but missing", full, "missing_required_parameter")
    return {"role": _ROLES[role], "content": _content(content, full)}


def _content(value: Any, name: str) -> str:
    if isinstance(value, str):
        return _string(value, name)
    if not isinstance(value, list):
        raise _wrong_type(name, "a string or a list of text parts", value)
    return "".join(_part(part, f"{name}[{at}]") for at, part in enumerate(value))


def _part(value: Any, name: str) -> str:
    part = _dict(value, name)
    fields = _Fields(part, f"{name}.")
    kind = fields.need("type", _string)
    if kind != "text":
        raise Refused(
            f"{name}.type: this server reads only parts of type 'text', got {_shown(kind)}",
            f"{name}.type",
            "unsupported_parameter",
        )
    text = fields.need("text", _string)
    fields.refuse_rest({})
    return text


def _prompts(value: Any, name: str) -> tuple[Prompt, ...]:
    """A string, a list of ids, or a list of any of these."""
    if isinstance(value, str):
        return (_string(value, name),)
    if not isinstance(value, list):
        raise _wrong_type(name, "a string, a list of token ids or a list of these", value)
    if not value:
        raise Refused(f"{name}: expected a prompt, got an empty list", name)
    if isinstance(value[0], str | list):
        return tuple(_one_prompt(item, f"{name}[{at}]") for at, item in enumerate(value))
    return (_ids(value, name),)


def _one_prompt(value: Any, name: str) -> Prompt:
    return _string(value, name) if isinstance(value, str) else _ids(_list(value, name), name)


def _ids(value: list[Any], name: str) -> tuple[int, ...]:
    for at, item in enumerate(value):
        if type(item) is not int:  # to Python True is an int
            raise _wrong_type(f"{name}[{at}]", "a token id", item)
    if not value:
        raise Refused(f"{name}: expected at least one token id, got none", name)
    return tuple(value)


def _stops(value: Any, name: str) -> tuple[str, ...]:
    if isinstance(value, str):
        items = [(name, value)]
    elif isinstance(value, list):
        items = [(f"{name}[{at}]", item) for at, item in enumerate(value)]
    else:
        raise _wrong_type(name, f"a string or up to {MAX_STOPS} of them", value)
    if len(items) > MAX_STOPS:
        raise Refused(f"{name}: expected at most {MAX_STOPS} strings, got {len(items)}", name)
    for full, item in items:
        if not _string(item, full):
            raise Refused(f"{full}: expected a string that is not empty", full)
    return tuple(item for _, item in items)


def _biases(value: Any, name: str, vocabulary: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in _dict(value, name).items():
        full = f"{name}.{key[:80]}"
        digits = key.isascii() and key.isdigit() and len(key) < 20
        if not digits or int(key) >= vocabulary:
            raise Refused(
                f"{full}: expected a token id from 0 to {vocabulary - 1} as the name", full
            )
        if not -100 <= _number(bias, full) <= 100:
            raise Refused(f"{full}: expected from -100 to 100, got {bias}", full)
        biases[int(key)] = float(bias)
    return biases


def _anything(value: Any, name: str) -> Any:  # noqa: ARG001
    return value


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"{name}: not valid Unicode: half of a surrogate pair at character {error.start}", name
        ) from None
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(name, "a number", value)
    return value


def _integer(value: Any, name: str) -> int:
    if type(value) is not int:
        raise _wrong_type(name, "an integer", value)
    return value


def _integer_from(low: int, high: int | None) -> Callable[[Any, str], int]:
    def convert(value: Any, name: str) -> int:
        number = _integer(value, name)
        if number < low or (high is not None and number > high):
            wanted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise Refused(f"{name}: expected {wanted}, got {_shown(value)}", name)
        return number

    return convert


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, "true or false", value)
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong_type(name, "a list", value)
    return value


def _dict(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong_type(name, "an object", value)
    return value


def _wrong_type(name: str, wanted: str, value: Any) -> Refused:
    return Refused(f"{name}: expected {wanted}, got {_kind(value)}", name, "invalid_type")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number"
    return {"str": "a string", "list": "a list", "dict": "an object"}[type(value).__name__]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Choice:
    """One finished answer: where it stands among the choices, its text, why it ended."""

    index: int
    text: str
    finish: str


@dataclass(frozen=True)
class Reply:
    """The objects that answer one request; all carry the same head.

    Args:
        asked: what is answered.
        id: unique, without the prefix.
        created: seconds since 1970.
        model: the served model's id.
        fingerprint: changes when the same seed may give other text.
    """

    asked: Asked
    id: str
    created: int
    model: str
    fingerprint: str

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        ordered = sorted(choices, key=lambda c: c.index)
        kind = "chat.completion" if self.asked.kind == "chat" else "text_completion"
        body = [
            {
                "index": c.index,
                **self._whole_text(c.text),
                "logprobs": None,
                "finish_reason": c.finish,
            }
            for c in ordered
        ]
        return {**self._head(kind), "choices": body, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before a choice's text; a chat's says whose words follow, others have none."""
        if self.asked.kind == "text":
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """A chunk with some text."""
        chat = self.asked.kind == "chat"
        return self._chunk(index, {"delta": {"content": text}} if chat else {"text": text}, None)

    def closing(self, index: int, finish: str) -> dict[str, Any]:
        """A choice's last chunk."""
        chat = self.asked.kind == "chat"
        return self._chunk(index, {"delta": {}} if chat else {"text": ""}, finish)

    def counted(self, usage: dict[str, int]) -> dict[str, Any] | None:
        """The chunk after all choices, if it was asked for."""
        if not self.asked.usage_chunk:
            return None
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage}

    def _whole_text(self, text: str) -> dict[str, Any]:
        if self.asked.kind == "text":
            return {"text": text}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.asked.kind == "chat" else "text_completion"

    def _chunk(self, index: int, text: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **text, "logprobs": None, "finish_reason": finish}
        chunk = {**self._head(self._chunk_kind), "choices": [choice]}
        return {**chunk, "usage": None} if self.asked.usage_chunk else chunk

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl-" if self.asked.kind == "chat" else "cmpl-"
        return {
            "id": prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """How many tokens were read and generated (a token that ended an answer is counted)."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def model_object(served: Served, created: int) -> dict[str, Any]:
    """The served model, as GET /v1/models lists it."""
    return {"id": served.model, "object": "model", "created": created, "owned_by": "cenacle"}


def failure(error: CenacleError) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the body for an error."""
    if isinstance(error, Refused):
        return error.status, error_object(str(error), error.field, error.code)
    if isinstance(error, InputError):
        return 400, error_object(str(error), error.field, "invalid_value")
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
