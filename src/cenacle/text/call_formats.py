"""The formats in which models write calls.

Owns: finding calls in text, for each format that mlx-lm or a chat template names.
Does not know: tokens, tools, what becomes of a call.
Invariant: the pieces of a text are its calls and the text between them, in order; of the marks of a
format only those beside a call are left out.
Next: `tool_calls.py` decides what is a call for certain.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from .argument_values import refuse_constant


class Convert(Protocol):
    """Gives values the types of their parameters."""

    def __call__(self, function: str, parameter: str, text: str, *literal: Any) -> Any:
        """The value for a text, or for a literal that was written as this text."""


@dataclass(frozen=True)
class WrittenCall:
    """A call as the model wrote it.

    Args:
        name: of the function.
        arguments: an object, or JSON text of one.
        source: the text of the call.
        id: that the model gave it.
    """

    name: str
    arguments: Any
    source: str
    id: str = ""


Piece = str | WrittenCall

MAX_ATTEMPTS = 100  # to read a call where one could begin, each of which may read the whole text


@dataclass(frozen=True)
class BareMarks:
    """How a call without the wrapper around calls begins and ends; they are part of its text."""

    start: str
    end: str


@dataclass(frozen=True)
class XmlFormat:
    """Calls that are written as elements, one for each argument.

    Args:
        call, call_end: of a call; `call` is a pattern with the group `name`. Without an end, a
            text is one call.
        parameter, parameter_end: the same for an argument, with the group `key` and perhaps `type`:
            "string" or "true" if it says that the value is a string, else JSON.
        json_block: a pattern of an object that has all arguments.
    """

    call: str
    call_end: str
    parameter: str
    parameter_end: str
    json_block: str = ""

    def split(self, text: str, convert: Convert, *, cut: bool) -> Iterator[Piece]:
        """The pieces of a text; `cut`: its last call may be incomplete."""
        starts = list(re.finditer(self.call, text))
        end_of_last = 0
        for at, match in enumerate(starts):
            limit = starts[at + 1].start() if at + 1 < len(starts) else len(text)
            end = text.find(self.call_end, match.end(), limit) if self.call_end else limit
            closed = end >= 0 and not (cut and not self.call_end)
            body = text[match.end() : end if end >= 0 else limit]
            stop = end + len(self.call_end) if end >= 0 else limit
            source = text[match.start() : stop]
            yield text[end_of_last : match.start()]
            end_of_last = stop
            if cut and not closed and limit == len(text):
                yield source
                continue
            try:
                arguments = self._read_arguments(match["name"], body, convert)
            except ValueError:
                yield source
            else:
                yield WrittenCall(match["name"], arguments, source)
        yield text[end_of_last:]

    def _read_arguments(self, name: str, body: str, convert: Convert) -> Any:
        if self.json_block and (block := re.fullmatch(self.json_block, body.strip(), re.DOTALL)):
            return block["value"]
        arguments: dict[str, Any] = {}
        matches = list(re.finditer(self.parameter, body, re.DOTALL))
        if body[: matches[0].start() if matches else None].strip():
            raise ValueError("text before the parameters")
        for at, match in enumerate(matches):
            limit = matches[at + 1].start() if at + 1 < len(matches) else len(body)
            # The last end before the next parameter: a value may contain the mark.
            end = body.rfind(self.parameter_end, match.end(), limit)
            value = body[match.end() : end if end >= 0 else limit]
            if end >= 0 and body[end + len(self.parameter_end) : limit].strip():
                raise ValueError("text between the parameters")
            value = value.removeprefix("\n").removesuffix("\n")
            if quoted := re.fullmatch(r"\s*<!\[CDATA\[(.*)\]\]>\s*", value, re.DOTALL):
                arguments[match["key"]] = quoted[1]
            elif match.groupdict().get("type") in ("string", "true"):
                arguments[match["key"]] = value
            else:
                arguments[match["key"]] = convert(name, match["key"], value)
        return arguments


# What stands before a mark is bounded, so that a search takes linear time.
_ARGUMENT = r"<{0}arg_key>\s*(?P<key>.{{1,300}}?)\s*</{0}arg_key>\s*<{0}arg_value>"
_NAME_ONLY = r"^\s*(?P<name>[^\s<>{{}}]{{1,300}})\s*(?=<{0}arg_key>|$)"
_ATTRIBUTE = r"[\"']?(?P<{0}>[^\"'>]{{1,300}})[\"']?"
_K3_REST, _K3_CLOSE = r"(?:(?!<\|).){0,300}?", "<|close|>{}<|sep|>"

XML_FORMATS = {
    "qwen3_coder": XmlFormat(
        r"<function=\s*[\"']?(?P<name>[^\s<>\"']{1,300})[\"']?\s*>?",
        "</function>",
        r"<parameter=\s*[\"']?(?P<key>[^\s<>\"']{1,300})[\"']?\s*>?",
        "</parameter>",
    ),
    "minimax_m2": XmlFormat(
        rf"<invoke\s+name={_ATTRIBUTE.format('name')}\s*>",
        "</invoke>",
        rf"<parameter\s+name={_ATTRIBUTE.format('key')}\s*>",
        "</parameter>",
    ),
    "minicpm5": XmlFormat(
        rf"<function\s+name\s*=\s*{_ATTRIBUTE.format('name')}\s*>",
        "</function>",
        rf"<param\s+name\s*=\s*{_ATTRIBUTE.format('key')}\s*>",
        "</param>",
    ),
    "muse_spark": XmlFormat(
        r"<atem:invoke\s[^>]{0,300}?\bname=\"(?P<name>[^\"]{1,300})\"[^>]{0,300}>",
        "</atem:invoke>",
        r"<atem:parameter\s[^>]{0,300}?\bname=\"(?P<key>[^\"]{1,300})\"[^>]{0,300}>",
        "</atem:parameter>",
    ),
    "dsml": XmlFormat(
        r"<｜DSML｜invoke\s+name=\"(?P<name>[^\"]{1,300})\"\s*>",
        "</｜DSML｜invoke>",
        r"<｜DSML｜parameter\s+name=\"(?P<key>[^\"]{1,300})\"(?:\s+string=\"(?P<type>\w+)\")?\s*>",
        "</｜DSML｜parameter>",
    ),
    "kimi_k3": XmlFormat(
        rf"<\|open\|>call{_K3_REST}\btool=\"(?P<name>[^\"]{{1,300}})\"{_K3_REST}<\|sep\|>",
        _K3_CLOSE.format("call"),
        r"<\|open\|>argument\s+key=\"(?P<key>[^\"]{1,300})\"(?:\s+type=\"(?P<type>\w+)\")?"
        rf"{_K3_REST}<\|sep\|>",
        _K3_CLOSE.format("argument"),
        rf"<\|open\|>json{_K3_REST}<\|sep\|>(?P<value>.*)<\|close\|>json<\|sep\|>",
    ),
    **{
        kind: XmlFormat(
            _NAME_ONLY.format(prefix), "", _ARGUMENT.format(prefix), f"</{prefix}arg_value>"
        )
        for kind, prefix in (("glm47", ""), ("laguna", ""), ("longcat", "longcat_"))
    },
}

BARE_MARKS = {
    "minicpm5": BareMarks("<function name=", "</function>"),  # this format has no wrapper
    "qwen3_coder": BareMarks("<function=", "</function>"),
    "minimax_m2": BareMarks("<invoke name=", "</invoke>"),
    "muse_spark": BareMarks("<atem:invoke ", "</atem:invoke>"),
    "kimi_k2": BareMarks("<|tool_call_begin|>", "<|tool_call_end|>"),
    "kimi_k3": BareMarks("<|open|>call ", _K3_CLOSE.format("call")),
    "dsml": BareMarks("<｜DSML｜invoke ", "</｜DSML｜invoke>"),
}


@dataclass(frozen=True)
class HeadedFormat:
    """Calls that are written as a name and a JSON object.

    Args:
        head: a pattern before the object, with the group `name` and perhaps `id`.
        marks: that are written around calls.
    """

    head: str
    marks: tuple[str, ...]

    def split(self, text: str) -> Iterator[Piece]:
        """The pieces of a text."""
        decoder = json.JSONDecoder(parse_constant=refuse_constant)
        end_of_last = failures = 0
        for match in re.finditer(self.head + r"\s*(?=\{)", text):
            if match.start() < end_of_last or failures > MAX_ATTEMPTS:
                continue  # inside the arguments of a call
            try:
                _, end = decoder.raw_decode(text, match.end())
            except (ValueError, RecursionError):
                failures += 1
                continue
            yield self.without_marks(text[end_of_last : match.start()])
            source, call_id = text[match.start() : end], match.groupdict().get("id") or ""
            yield WrittenCall(match["name"], text[match.end() : end], source, call_id)
            end_of_last = end
        yield self.without_marks(text[end_of_last:]) if end_of_last else text

    def without_marks(self, text: str) -> str:
        """Text between calls; "" if it is marks and space only."""
        rest = text
        for mark in self.marks:
            rest = rest.replace(mark, "")
        return text if rest.strip() else ""


HEADED_FORMATS = {
    "kimi_k2": HeadedFormat(
        r"(?P<id>(?:functions\.)?(?P<name>[\w.-]+?):\d+)\s*<\|tool_call_argument_begin\|>",
        ("<|tool_call_begin|>", "<|tool_call_end|>"),
    ),
    "mistral": HeadedFormat(
        r"(?P<name>[\w-]+)\s*(?:\[CALL_ID\]\s*(?P<id>[\w-]+)\s*)?\[ARGS\]", ("[TOOL_CALLS]",)
    ),
}


def split_pythonic(text: str, convert: Convert) -> Iterator[Piece]:
    """The pieces of a text whose calls are Python's: `[name(key=value), ...]`."""
    end_of_last = failures = 0
    for match in re.finditer(r"(?P<name>[A-Za-z_][\w.-]*)\(", text):
        if match.start() < end_of_last or failures > MAX_ATTEMPTS:
            continue
        try:
            end = _find_closing(text, match.end())
            source = text[match.start() : end]
            call = WrittenCall(match["name"], _read_keywords(match, source, convert), source)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            failures += 1
            continue
        yield text[end_of_last : match.start()]
        yield call
        end_of_last = end
    yield text[end_of_last:]


def _find_closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one before `start`."""
    depth, quote, at = 1, "", start
    while at < len(text):
        letter = text[at]
        if quote:
            if letter == "\\":
                at += 1
            elif letter == quote:
                quote = ""
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    raise ValueError("a bracket is not closed")


_JSON_NAMES = {"true": True, "false": False, "null": None}


class _JsonNames(ast.NodeTransformer):
    """Templates write nested values as JSON: true, false and null are no names."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in _JSON_NAMES:
            return ast.Constant(_JSON_NAMES[node.id])
        return node


def _read_keywords(match: re.Match[str], source: str, convert: Convert) -> dict[str, Any]:
    expression = f"f({source[len(match[0]) :]}"  # names of functions may have "-"
    call = ast.parse(expression, mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
        raise ValueError("expected named arguments")
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        name = str(keyword.arg)
        written = ast.get_source_segment(expression, keyword.value) or ""
        try:
            value = ast.literal_eval(_JsonNames().visit(keyword.value))
            literal = [json.loads(json.dumps(value, allow_nan=False))]
        except (ValueError, TypeError):  # a word without quotes, or more than JSON has
            literal = []
        arguments[name] = convert(match["name"], name, written, *literal)
    return arguments


def split_gemma(text: str, convert: Convert) -> Iterator[Piece]:
    """The pieces of a text whose calls are Gemma's: `call:name{key:<|"|>text<|"|>,other:1}`."""
    end_of_last = failures = 0
    for match in re.finditer(r"call:\s*(?P<name>[\w.-]+)\s*\{", text):
        if match.start() < end_of_last or failures > MAX_ATTEMPTS:
            continue
        reader = _GemmaReader(text, match.end(), match["name"], convert)
        try:
            arguments = reader.read_object()
        except (ValueError, RecursionError):
            failures += 1
            continue
        yield text[end_of_last : match.start()]
        yield WrittenCall(match["name"], arguments, text[match.start() : reader.at])
        end_of_last = reader.at
    yield text[end_of_last:]


class _GemmaReader:
    """Reads one object: keys have no quotes, strings stand between marks."""

    _QUOTES = ('<|"|>', "<escape>")

    def __init__(self, text: str, at: int, function: str, convert: Convert) -> None:
        self.text, self.at = text, at
        self._function, self._convert = function, convert

    def read_object(self, depth: int = 0) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while not self._take("}"):
            key = self._read_quoted()
            if key is None:
                match = re.compile(r"\s*([^\s:{}\[\],]+)").match(self.text, self.at)
                if match is None:
                    raise ValueError("expected a key")
                key, self.at = match[1].strip("\"'"), match.end()
            if not self._take(":"):
                raise ValueError("expected a colon")
            members[key] = self._read_value(key, depth)
            if not self._take(",") and not self._sees("}"):
                raise ValueError("expected a comma")
        return members

    def _read_list(self, depth: int) -> list[Any]:
        items = []
        while not self._take("]"):
            items.append(self._read_value("", depth))
            if not self._take(",") and not self._sees("]"):
                raise ValueError("expected a comma")
        return items

    def _read_value(self, key: str, depth: int) -> Any:
        """A value; `key` is its parameter's name if `depth` is 0."""
        if self._take("{"):
            return self.read_object(depth + 1)
        if self._take("["):
            return self._read_list(depth + 1)
        if (quoted := self._read_quoted()) is not None:
            return quoted
        match = re.compile(r"\s*([^,{}\[\]]+)").match(self.text, self.at)
        if match is None:
            raise ValueError("expected a value")
        self.at, text = match.end(), match[1].strip()
        try:
            literal = [json.loads(text, parse_constant=refuse_constant)]
        except ValueError:
            literal = []
        if depth > 0:
            return literal[0] if literal else text
        return self._convert(self._function, key, text, *literal)

    def _read_quoted(self) -> str | None:
        for quote in self._QUOTES:
            if self._take(quote):
                end = self.text.find(quote, self.at)
                if end < 0:
                    raise ValueError("a string is not closed")
                start, self.at = self.at, end + len(quote)
                return self.text[start:end]
        return None

    def _sees(self, mark: str) -> bool:
        start = self.at
        seen, self.at = self._take(mark), start
        return seen

    def _take(self, mark: str) -> bool:
        at = self.at
        while at < len(self.text) and self.text[at].isspace():
            at += 1
        if not self.text.startswith(mark, at):
            return False
        self.at = at + len(mark)
        return True
