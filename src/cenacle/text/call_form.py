"""The form of a model's calls, as its chat template writes earlier ones.

Owns: the form, found by rendering a probe.
Does not know: tokenizers, APIs.
Invariant: a form is given only if calls in it begin with a marker, or are JSON with a name.
Next: `tokenizer.py` uses it for models whose format mlx-lm does not know.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..core.chat import Message
from .call_formats import BARE_MARKS, BareMarks, HeadedFormat
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
        kind: "dsml" for DeepSeek's elements; None: the arguments are JSON.
    """

    start: str
    separator: str
    end: str
    kind: str | None = None

    @property
    def marker(self) -> str:
        """What the first call begins with."""
        match = _TAG.match(self.start)
        return match[0] if match else ""

    @property
    def end_marker(self) -> str:
        """What the last call ends with; "": only the end of the output."""
        if self.kind == "dsml":
            return self.marker.replace("<", "</")
        tags = _TAG.findall(self.end)
        return tags[-1] if tags else ""

    @property
    def is_json(self) -> bool:
        """Whether name and arguments are members of a JSON object."""
        return self.start.rstrip().endswith('"') and '"' in self.separator

    @property
    def example(self) -> str:
        """A call, for the model."""
        return f'{self.start}NAME{self.separator}{{"ARGUMENT": "VALUE"}}{self.end}'

    @property
    def bare(self) -> BareMarks | None:
        """How a call without the wrapper begins; None: there is no wrapper."""
        if self.kind is not None:
            return BARE_MARKS[self.kind]
        tags = _TAG.findall(self.start)
        return BareMarks(tags[1], "") if len(tags) > 1 and "call" in tags[1] else None

    def without_marks(self, text: str) -> str:
        """A text between calls without the tags of their form."""
        for tag in _TAG.findall(self.start + self.end):
            text = text.replace(tag, "")
        return text

    @cached_property
    def format(self) -> HeadedFormat:
        """How calls are found in an output after its first marker."""
        marks = [*_TAG.findall(self.start + self.separator + self.end)]
        words = [*_TAG.split(self.start), *_TAG.split(self.end)]
        marks += [word.strip() for word in words if word.strip()]
        head = r"(?P<name>[\w.-]+)\s*" + re.escape(self.separator.strip())
        return HeadedFormat(head, tuple(sorted(marks, key=len, reverse=True)))


def find_call_form(
    render: RenderText, *, arguments_as_text: bool, stop: tuple[str, ...]
) -> CallForm | None:
    """The form that a template writes calls in; None: it does not, or no reader could tell.

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
    if (dsml := after.find("<｜DSML｜")) >= 0:
        return CallForm(after[dsml : after.find(_NAME)], "", "", "dsml")
    match = _JSON_PROBE.search(after)
    name = after.rfind(_NAME, 0, match.start() if match else 0)
    if match is None or name < 0:
        return None
    end = after[match.end() :]
    for token in stop:
        end = end.partition(token)[0]
    form = CallForm(after[:name].lstrip(), after[name + len(_NAME) : match.start()], end.rstrip())
    return form if (form.marker or form.is_json) and form.separator.strip() else None
