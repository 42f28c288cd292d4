"""The form of a model's calls, as its chat template writes earlier ones.

Owns: the form, found by rendering a probe; reading calls in it.
Does not know: tokenizers, APIs.
Invariant: a form is given only if calls in it begin with a marker.
Next: `tokenizer.py` uses it for models whose format mlx-lm does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..core.chat import Message
from .messages import RenderText

_NAME, _TEXT, _ARGUMENTS = "probe_function", "PROBE_TEXT", {"probe_key": "probe_value"}
_TAG = re.compile(r"<[^<>\n]+>|\[/?[A-Z_]+\]")
_JSON_PROBE = re.compile(r'\{\s*"probe_key"\s*:\s*"probe_value"\s*\}')


@dataclass(frozen=True)
class CallForm:
    """How a call is written: `start`, the name, `separator`, the arguments, `end`.

    Args:
        start: from its first marker to the name.
        separator: between name and arguments.
        end: after the arguments.
    """

    start: str
    separator: str
    end: str

    @property
    def marker(self) -> str:
        """What the first call begins with."""
        match = _TAG.match(self.start)
        return match[0] if match else ""

    @property
    def is_json(self) -> bool:
        """Whether name and arguments are members of a JSON object."""
        return self.start.rstrip().endswith('"') and '"' in self.separator

    @property
    def example(self) -> str:
        """A call, for the model."""
        return f'{self.start}NAME{self.separator}{{"ARGUMENT": "VALUE"}}{self.end}'

    def split(self, text: str) -> Iterator[tuple[str, str] | str]:
        """The calls in an output after its first marker: names and arguments; and other text."""
        if not self.separator.strip():
            yield text
            return
        pattern = re.compile(r"([\w.-]+)\s*" + re.escape(self.separator.strip()) + r"\s*(?=\{)")
        decoder = json.JSONDecoder()
        end_of_last = 0
        for match in pattern.finditer(text):
            if match.start() < end_of_last:
                continue
            try:
                _, end = decoder.raw_decode(text, match.end())
            except (ValueError, RecursionError):
                continue
            yield self._without_marks(text[end_of_last : match.start()])
            yield match[1], text[match.end() : end]
            end_of_last = end
        rest = text[end_of_last:]
        yield self._without_marks(rest) if end_of_last else text

    def _without_marks(self, text: str) -> str:
        marks = {*_TAG.findall(self.start + self.separator + self.end)}
        words = {*_TAG.split(self.start), *_TAG.split(self.end)}
        rest = text
        for mark in sorted(marks, key=len, reverse=True):
            rest = rest.replace(mark, "\0")
        pieces = [
            piece for piece in rest.split("\0") if piece.strip() not in {w.strip() for w in words}
        ]
        return text if "".join(pieces).strip() else ""


def find_call_form(
    render: RenderText, *, arguments_as_text: bool, stop: tuple[str, ...]
) -> CallForm | None:
    """The form that a template writes calls in; None: it does not, or without a marker.

    Args:
        render: a conversation, without the beginning of an answer.
        arguments_as_text: the template takes arguments as JSON text.
        stop: the tokens that end an output.
    """
    arguments: Any = json.dumps(_ARGUMENTS) if arguments_as_text else _ARGUMENTS
    function = {"name": _NAME, "arguments": arguments}
    call = {"id": "call00001", "type": "function", "function": function}
    answer: Message = {"role": "assistant", "content": _TEXT, "tool_calls": [call]}
    try:
        text = render([{"role": "user", "content": "ASK"}, answer])
    except Exception:  # templates are programs and raise anything
        return None
    after = text.rpartition(_TEXT)[2] if _TEXT in text else ""
    match = _JSON_PROBE.search(after)
    name = after.rfind(_NAME, 0, match.start() if match else 0)
    if match is None or name < 0:
        return None
    end = after[match.end() :]
    for token in stop:
        end = end.partition(token)[0]
    form = CallForm(after[:name].lstrip(), after[name + len(_NAME) : match.start()], end.rstrip())
    return form if form.marker and form.separator.strip() else None
