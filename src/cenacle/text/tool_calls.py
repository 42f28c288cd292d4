"""Reads the calls in a model's output.

Owns: what is a call and what is text; calls without the marks of their format.
Does not know: tokens, chat templates, APIs.
Invariant: what can be read for certain is a call whose arguments are valid JSON; everything else is
text, and nothing is dropped. A value that does not fit its type stays a string.
Next: `output_parser.py` finds the text between the markers; `call_formats.py` has the formats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import regex

from ..core.chat import OutputPart, Tool
from .argument_values import convert_value, fit_value, refuse_constant
from .call_form import CallForm
from .call_formats import (
    HEADED_FORMATS,
    XML_FORMATS,
    Piece,
    WrittenCall,
    split_gemma,
    split_pythonic,
)
from .harmony import split_call

_ARGUMENT_NAMES = ("arguments", "parameters", "args", "params", "input")
_OTHER_NAMES = frozenset(("name", "id", "type", "index", "function", "tool"))
_BETWEEN_CALLS = " \t\r\n,;[]"  # it says nothing


class CallReader:
    """Reads the calls of one format.

    Args:
        kind: mlx-lm's name of the format, "harmony", "dsml" or None.
        tools: that may be called.
        form: of a format that only the template states.
    """

    def __init__(
        self, kind: str | None, tools: Sequence[Tool], form: CallForm | None = None
    ) -> None:
        self._kind, self._form = kind, form
        self._tools = {tool.name: tool for tool in tools}
        names = "|".join(regex.escape(tool.name) for tool in tools)
        # A call's first key: its name, or one that can come before it.
        member = rf'"(?:name|function|tool)"\s*:\s*(?:\{{\s*"name"\s*:\s*)?"(?:{names})"'
        other = r'"(?:type|id|arguments|parameters)"'
        self._bare_start = regex.compile(
            rf"\s*(?:<\|python_(?:tag|start)\|>)?\s*(?:```(?:json)?\s)?\s*"
            rf"(?:\[?\s*\{{\s*(?:{member}|{other})|\[\s*(?:{names})\()(?s:.*)"
        )

    def read(self, text: str, *, cut: bool = False) -> list[OutputPart]:
        """The calls in the text of one block, and its other text, in order.

        Args:
            text: between the markers.
            cut: the output was cut inside the block, whose last call may be incomplete.
        """
        if not self._tools:
            return [OutputPart("text", text)]
        for pieces in (self._split(text, cut), self._split_json(text)):
            parts = [self._to_part(p) if isinstance(p, WrittenCall) else p for p in pieces]
            if any(isinstance(part, OutputPart) for part in parts):
                if self._form is not None:
                    without_marks = self._form.format.without_marks
                    parts = [without_marks(p) if isinstance(p, str) else p for p in parts]
                return [
                    part if isinstance(part, OutputPart) else OutputPart("text", part)
                    for part in parts
                    if isinstance(part, OutputPart) or part.strip(_BETWEEN_CALLS)
                ]
        return [OutputPart("text", text)]

    def bare_call_state(self, text: str) -> Literal["no", "perhaps", "begun"]:
        """Whether an answer, so far, is the beginning of calls without marks."""
        if not self._tools:
            return "no"
        match = self._bare_start.fullmatch(text, partial=True)
        return "no" if match is None else "perhaps" if match.partial else "begun"

    def read_bare(self, text: str) -> list[OutputPart]:
        """The calls of an answer that has no marks and is nothing but calls of tools that there
        are, with arguments that fit; none: it is text."""
        text = re.sub(r"<\|python_(?:tag|start|end)\|>", "", text).strip()
        if fenced := re.fullmatch(r"```(?:json)?\s(.*)```", text, re.DOTALL):
            text = fenced[1].strip()
        is_json = re.match(r"\[?\s*\{", text)
        pieces = self._split_json(text) if is_json else split_pythonic(text, self._convert)
        parts = []
        for piece in pieces:
            if isinstance(piece, str):
                if piece.strip(_BETWEEN_CALLS):
                    return []
                continue
            part = self._to_part(piece, must_fit=True)
            if isinstance(part, str):
                return []
            parts.append(part)
        return parts

    def _split(self, text: str, cut: bool) -> Iterator[Piece]:
        kind = self._kind
        if kind == "harmony":
            name, arguments = split_call(text)
            return iter((WrittenCall(name, arguments, text),)) if name else iter(())
        if (form := self._form) is not None and form.is_json:
            pieces = self._split_json(text)
            return (form.without_marks(p) if isinstance(p, str) else p for p in pieces)
        if form is not None:
            return form.format.split(text)
        if (xml := XML_FORMATS.get(kind or "")) is not None:
            return self._without_words(xml.split(text, self._convert, cut=cut), text)
        if (headed := HEADED_FORMATS.get(kind or "")) is not None:
            return headed.split(text)
        if kind == "pythonic":
            return split_pythonic(text, self._convert)
        if kind in ("gemma4", "function_gemma"):
            return split_gemma(text, self._convert)
        return iter(())

    def _without_words(self, pieces: Iterator[Piece], text: str) -> Iterator[Piece]:
        """A text that is one word is a call only if that is the name of a tool."""
        for piece in pieces:
            is_word = isinstance(piece, WrittenCall) and text.strip() == piece.name
            if is_word and text.strip() not in self._tools:
                yield text
            else:
                yield piece

    def _split_json(self, text: str) -> Iterator[Piece]:
        """The JSON objects that are calls, also in lists."""
        decoder = json.JSONDecoder(parse_constant=refuse_constant)
        at = end_of_last = 0
        while (at := text.find("{", at)) >= 0:
            try:
                value, end = decoder.raw_decode(text, at)
                call = _find_call(value, text[at:end])
            except (ValueError, RecursionError):
                call = None
            if call is None:
                # After a faulty object nothing is certain but the next line that begins one.
                found = re.compile(r"\n\s*(?=\{)").search(text, at + 1)
                if found is None:
                    break
                at = found.end()
                continue
            yield text[end_of_last:at]
            yield call
            at = end_of_last = end
        yield text[end_of_last:]

    def _convert(self, function: str, parameter: str, text: str, *literal: Any) -> Any:
        schema = self._tools[function].parameters if function in self._tools else {}
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        if literal:
            return fit_value(literal[0], text, properties.get(parameter), schema)
        return convert_value(text, properties.get(parameter), schema)

    def _to_part(self, call: WrittenCall, *, must_fit: bool = False) -> OutputPart | str:
        """A call; or its text, if it is none for certain."""
        arguments, tool = call.arguments, self._tools.get(call.name)
        try:
            if isinstance(arguments, str):
                arguments = json.loads(arguments or "{}", parse_constant=refuse_constant)
            if arguments is None:
                arguments = {}
            if not isinstance(arguments, dict) or not call.name or (must_fit and tool is None):
                return call.source
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            text.encode()  # half a surrogate pair is no text
            if tool is not None and (tool.strict or must_fit):
                from . import schema_validation

                schema_validation.validate(tool.parameters, arguments)
        except Exception:  # schemas and their patterns come from clients
            return call.source
        return OutputPart("call", text, call.name, call.id)


def _find_call(value: Any, source: str) -> WrittenCall | None:
    """The call that a JSON value is."""
    if not isinstance(value, dict):
        return None
    call = value
    for wrapper in ("function", "tool"):
        if isinstance(value.get(wrapper), dict):
            call = {**value[wrapper], "id": value.get("id")}
    name = call.get("name", call.get("function", call.get("tool")))
    present = [key for key in _ARGUMENT_NAMES if key in call]
    unknown = call.keys() - _OTHER_NAMES - set(present)
    if not isinstance(name, str) or not name or len(present) > 1 or unknown:
        return None
    call_id = call.get("id")
    arguments = call[present[0]] if present else {}
    return WrittenCall(name, arguments, source, call_id if isinstance(call_id, str) else "")
