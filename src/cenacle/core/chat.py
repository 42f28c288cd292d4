"""Conversations, independent of the API that they arrive by.

Owns: messages, tools, the parts of an output, why it ended, token counts.
Does not know: JSON shapes of any API, tokenizers, HTTP.
Invariant: the texts of an output's parts, in order, are what the model generated; a part of kind
"call" is one complete tool call.
Next: `text/output_parser.py` turns tokens into parts; `server/api/protocol.py` turns them into
responses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]
"""A chat message in the form chat templates expect: {"role": ..., "content": ...}, optionally with
"reasoning_content", "tool_calls" ([{"id", "type", "function": {"name", "arguments": {...}}}]) or,
for role "tool", "tool_call_id"."""

PartKind = Literal["text", "reasoning", "call"]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Args:
        name: of the function.
        description: for the model.
        parameters: JSON schema of the arguments.
        strict: treat a call whose arguments do not match the schema as text.
        freeform: the client sees its one argument, the string `input`, as plain text.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool = False
    freeform: bool = False

    def to_json(self) -> dict[str, Any]:
        """OpenAI's form, which chat templates expect."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


@dataclass(frozen=True)
class TokenLogprob:
    """A token, or an alternative to it, with its log-probability.

    Args:
        data: bytes of the token; may end inside a character.
        logprob: natural logarithm, before temperature and filters; None: of a prompt's first token.
        top: the most probable tokens at this position, best first; their own `top` is empty.
        token: its id.
        rank: of a prompt's token, among all by probability.
    """

    data: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()
    token: int = -1
    rank: int = 0

    @property
    def text(self) -> str:
        """The bytes as text; incomplete characters are replaced."""
        return self.data.decode(errors="replace")


@dataclass(frozen=True)
class OutputPart:
    """A piece of an output.

    Args:
        kind: "text", "reasoning" or "call".
        text: for a call: its arguments, a JSON object.
        name: for a call: the function.
        id: for a call: the id that the model gave it, often empty.
        logprobs: the tokens since the last part, if requested.
    """

    kind: PartKind
    text: str
    name: str = ""
    id: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class FinishReason:
    """Why an output ended.

    Args:
        reason: "stop" (the model ended it), "length", or "string" (a stop string).
        string: the stop string.
    """

    reason: Literal["stop", "length", "string"]
    string: str | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts of a response.

    Args:
        prompt_tokens: of all prompts.
        completion_tokens: generated, including reasoning and a token that ended the output.
        cached_tokens: prompt tokens that came from the prefix cache.
        reasoning_tokens: completion tokens inside reasoning.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


def join_text(parts: list[OutputPart]) -> list[OutputPart]:
    """Merge neighboring parts of one kind; calls stay separate."""
    merged: list[OutputPart] = []
    for part in parts:
        if merged and part.kind == merged[-1].kind != "call":
            last = merged.pop()
            logprobs = last.logprobs + part.logprobs
            part = OutputPart(part.kind, last.text + part.text, logprobs=logprobs)
        merged.append(part)
    return merged
