"""One exchange with a client, whichever API it uses: what is asked, and who shapes the answer.

Owns: `Asked`, to which every API's body is reduced; `Reply`, which every API's answers implement;
`Front`, an API as `app.py` sees it.
Does not know: any API's names, HTTP, tokenizers, MLX, time.
Invariant: an `Asked` that exists can be carried out, as far as can be told without the model.
Next: `openai.py`, `responses.py` and `anthropic.py` are the APIs, `app.py` carries out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ...core.chat import FinishReason, Message, OutputPart, Tool, Usage
from ...core.request import Sampling
from ...errors import CenacleError
from .validation import RequestError, shown

Prompt = str | tuple[int, ...] | tuple[Message, ...]
"""Plain text, ids, or the messages of a chat."""

Event = tuple[str | None, dict[str, Any] | str]
"""An event of a stream: its name, where the API names events, and its data."""


@dataclass(frozen=True)
class ServedModel:
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
class GenerationRequest:
    """What one HTTP request asks.

    Args:
        prompts: at least one; a chat has exactly one.
        chat: the prompt is messages, and the answer may have reasoning and calls.
        prompt_field: the parameter that the prompts came in.
        max_tokens: None: as many as fit.
        stop: strings before which an answer ends.
        n: answers per prompt.
        stream: answer in pieces.
        usage_chunk: OpenAI's stream ends with a chunk that counts tokens.
        logprobs: how many alternatives to report with each token; None: nothing about tokens.
        echo: answers begin with their prompts.
        tools: the model may call these.
        calls: None: as the model likes; "required", or a function's name: calls and nothing else.
        parallel: several calls in one answer are allowed.
        grammar: what the answer must match, see `grammars.py`; None: anything.
        grammar_field: the parameter that it came in.
        template: options of the chat template.
        think: whether a model that can think shall; None: as its template has it.
        think_tokens: reasoning ends after so many; None: when the model ends it.
        continued: the last message is the answer's beginning.
        given: what the answer repeats of the request, in the API's own form.
    """

    prompts: tuple[Prompt, ...]
    chat: bool
    prompt_field: str
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    usage_chunk: bool = False
    logprobs: int | None = None
    echo: bool = False
    tools: tuple[Tool, ...] = ()
    calls: str | None = None
    parallel: bool = True
    grammar: str | None = None
    grammar_field: str = "response_format"
    template: dict[str, Any] = field(default_factory=dict)
    think: bool | None = None
    think_tokens: int | None = None
    continued: bool = False
    given: dict[str, Any] = field(default_factory=dict)

    def sampling_of(self, choice: int) -> Sampling:
        """The sampling of one of the `n` answers: a given seed is counted up, so that they differ;
        the first is what n=1 would give."""
        seed = self.sampling.seed
        if seed is None or choice == 0:
            return self.sampling
        return replace(self.sampling, seed=(seed + choice + 2**63) % 2**64 - 2**63)


@dataclass(frozen=True)
class ChoiceState:
    """One finished answer: where it stands among the choices, its parts, why it ended."""

    index: int
    parts: list[OutputPart]
    finish: FinishReason


@dataclass(frozen=True)
class ResponseMeta:
    """What every object of one answer carries.

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


class ResponseBuilder(Protocol):
    """Shapes the answer to one request, in a stream or whole; used once."""

    def first_events(self, index: int, usage: Usage) -> Iterable[Event]:
        """What goes before a choice's parts. `usage` knows the prompt only."""
        ...

    def delta(self, index: int, part: OutputPart) -> Iterable[Event]:
        """A part of a choice."""
        ...

    def finish_choice(self, index: int, finish: FinishReason) -> Iterable[Event]:
        """The end of a choice."""
        ...

    def finish_stream(self, usage: Usage) -> Iterable[Event]:
        """The end of the stream, when all choices have ended."""
        ...

    def keep_alive(self) -> Iterable[Event]:
        """A sign of life in a stream that waits; nothing: a comment will do, which clients skip."""
        ...

    def error(self, error: CenacleError) -> Iterable[Event]:
        """The end of a stream that cannot go on."""
        ...

    def full_response(self, choices: Sequence[ChoiceState], usage: Usage) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        ...


@dataclass(frozen=True)
class ApiAdapter:
    """An API.

    Args:
        parse: what a body asks; raises InputError.
        respond: what shapes the answer.
        render_error: the HTTP status and the body for an error.
    """

    parse: Callable[[bytes, ServedModel], GenerationRequest]
    respond: Callable[[GenerationRequest, ResponseMeta], ResponseBuilder]
    render_error: Callable[[CenacleError], tuple[int, dict[str, Any]]]


def check_model(name: str, served: ServedModel) -> None:
    """Refuse a model that is not served."""
    if name != served.model:
        message = f"The model {shown(name)} does not exist: this server has {served.model!r}"
        raise RequestError(message, "model", "model_not_found", 404)


def room(tokens: int, served: ServedModel, field: str) -> int | None:
    """How many tokens an answer to a prompt of so many may have; None: not known.

    Raises:
        Refused: the prompt leaves no room.
    """
    if served.context is None:
        return None
    if tokens >= served.context:
        raise RequestError(
            f"This model's maximum context length is {served.context} tokens, and the answer needs "
            f"at least one of them. Your {field} has {tokens} tokens: shorten it by at least "
            f"{tokens - served.context + 1}",
            field,
            "context_length_exceeded",
        )
    return served.context - tokens
