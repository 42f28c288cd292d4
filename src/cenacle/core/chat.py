"""What a conversation is made of, whichever API it came by.

Owns: tools, the parts and the end of an answer, and what was counted.
Does not know: any API's shapes, tokenizers, HTTP.
Invariant: the texts of an answer's parts, in order, are what the model said; a part of kind "call"
is one whole call.
Next: `engine/text.py` makes parts of tokens, `server/exchange.py` says what is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]
"""A chat message as chat templates read it: {"role": ..., "content": ...}, perhaps with
"reasoning_content", "tool_calls" ([{"id", "type", "function": {"name", "arguments": {...}}}]) or,
of role "tool", "tool_call_id"."""

Kind = Literal["text", "reasoning", "call"]


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask to be called.

    Args:
        name: of the function.
        description: for the model.
        parameters: a JSON schema of its arguments.
        strict: a call whose arguments do not match the schema is none.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool = False

    def to_json(self) -> dict[str, Any]:
        """As chat templates read it, which is OpenAI's form."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


@dataclass(frozen=True)
class Logged:
    """A token, or one that might have come instead, with the logarithm of its probability.

    Args:
        data: its bytes, perhaps not whole characters.
        logprob: natural logarithm, before temperature and filters.
        top: the most probable ones in its place, best first; they have none themselves.
    """

    data: bytes
    logprob: float
    top: tuple[Logged, ...] = ()

    @property
    def text(self) -> str:
        """The bytes as text; what is no whole character is replaced."""
        return self.data.decode(errors="replace")


@dataclass(frozen=True)
class Part:
    """A piece of an answer.

    Args:
        kind: "text", "reasoning" (what a model that thinks says to itself) or "call".
        text: of a call: its arguments, a JSON object.
        name: of a call: the function.
        id: of a call: the name that the model gave to it; often none.
        logged: the tokens that have come since the last part, where they were asked for.
    """

    kind: Kind
    text: str
    name: str = ""
    id: str = ""
    logged: tuple[Logged, ...] = ()


@dataclass(frozen=True)
class Finish:
    """Why an answer ended: "stop" (by itself), "length", or "string", one of those given."""

    reason: Literal["stop", "length", "string"]
    string: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens that were read and generated.

    Args:
        prompt: all of the prompts'.
        cached: those of them that were not computed again.
        completion: generated, a token that ended an answer and reasoning included.
        reasoning: those of them inside reasoning.
    """

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0


def joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind made one; calls stay apart."""
    whole: list[Part] = []
    for part in parts:
        if whole and part.kind == whole[-1].kind != "call":
            before = whole.pop()
            part = Part(part.kind, before.text + part.text, logged=before.logged + part.logged)
        whole.append(part)
    return whole
