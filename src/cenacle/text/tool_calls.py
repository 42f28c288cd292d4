"""Reads the calls in a model's output.

Owns: the formats of calls, the types of their arguments, calls that are text.
Does not know: tokens, chat templates, APIs.
Invariant: what can be read for certain is a call whose arguments are valid JSON; everything else is
text, and nothing is dropped. A value that does not fit its type stays a string.
Next: `output_parser.py` finds the text between the markers; mlx-lm's `tool_parsers` read other
formats.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import regex
from jsonschema import Draft202012Validator, ValidationError, validators
from referencing import Registry

from ..core.chat import OutputPart, Tool
from .call_form import CallForm
from .harmony import split_call

PATTERN_TIMEOUT_S = 0.05  # per pattern of a strict tool; other requests wait meanwhile
_ARGUMENT_NAMES = ("arguments", "parameters", "args", "params", "input")
_OTHER_NAMES = frozenset(("name", "id", "type", "index", "function", "tool"))

MlxParser = Callable[[str, Any], Any]


@dataclass(frozen=True)
class _XmlFormat:
    """Calls that are written as elements, one for each argument."""

    call: str
    call_end: str
    parameter: str
    parameter_end: str


_XML_FORMATS = {
    "qwen3_coder": _XmlFormat(
        r"<function=\s*[\"']?(?P<name>[^\s<>\"']+)[\"']?\s*>?",
        "</function>",
        r"<parameter=\s*[\"']?(?P<key>[^\s<>\"']+)[\"']?\s*>?",
        "</parameter>",
    ),
    "minimax_m2": _XmlFormat(
        r"<invoke\s+name=[\"']?(?P<name>[^\"'>]+)[\"']?\s*>",
        "</invoke>",
        r"<parameter\s+name=[\"']?(?P<key>[^\"'>]+)[\"']?\s*>",
        "</parameter>",
    ),
    "glm47": _XmlFormat(
        r"^\s*(?P<name>[^\s<>{}]+)\s*(?=<arg_key>|$)",
        "",
        r"<arg_key>\s*(?P<key>.*?)\s*</arg_key>\s*<arg_value>",
        "</arg_value>",
    ),
    "longcat": _XmlFormat(
        r"^\s*(?P<name>[^\s<>{}]+)\s*(?=<longcat_arg_key>|$)",
        "",
        r"<longcat_arg_key>\s*(?P<key>.*?)\s*</longcat_arg_key>\s*<longcat_arg_value>",
        "</longcat_arg_value>",
    ),
}
_XML_FORMATS["laguna"] = _XML_FORMATS["glm47"]


class CallReader:
    """Reads the calls of one format.

    Args:
        kind: mlx-lm's name of the format.
        mlx_parser: mlx-lm's parser of it.
        tools: that may be called.
        form: of a format that only the template states.
    """

    def __init__(
        self,
        kind: str | None,
        mlx_parser: MlxParser,
        tools: Sequence[Tool],
        form: CallForm | None = None,
    ) -> None:
        self._kind, self._mlx_parser, self._form = kind, mlx_parser, form
        self._tools = {tool.name: tool for tool in tools}
        self._tools_json = [tool.to_json() for tool in tools]

    def read(self, text: str, *, cut: bool = False) -> list[OutputPart]:
        """The calls in the text of one block, and its other text, in order.

        Args:
            text: between the markers.
            cut: the output was cut inside the block, whose last call may be incomplete.
        """
        if not self._tools:
            return [OutputPart("text", text)]
        try:
            if self._kind == "harmony":
                return [self._to_part(*split_call(text))]
            if self._form is not None and self._kind != "json_tools":
                found = [
                    p if isinstance(p, str) else self._to_part(*p) for p in self._form.split(text)
                ]
                return _to_parts(found)
            if (xml := _XML_FORMATS.get(self._kind or "")) is not None:
                found = list(self._read_xml(text, xml, cut))
                if any(isinstance(piece, OutputPart) for piece in found):
                    return _to_parts(found)
            if "{" in text and (xml is not None or self._kind == "json_tools"):
                found = list(self._read_json(text))
                if any(isinstance(piece, OutputPart) for piece in found):
                    return _to_parts(found)
            if xml is None and self._kind != "json_tools" and not cut:
                parsed = self._mlx_parser(text, self._tools_json)
                calls = parsed if isinstance(parsed, list) else [parsed]
                return [self._to_part(c["name"], c["arguments"], c.get("id")) for c in calls]
        except Exception:  # mlx-lm's parsers raise anything on malformed calls
            pass
        return [OutputPart("text", text)]

    def _read_xml(self, text: str, form: _XmlFormat, cut: bool) -> Iterator[OutputPart | str]:
        starts = list(re.finditer(form.call, text))
        end_of_last = 0
        for at, match in enumerate(starts):
            limit = starts[at + 1].start() if at + 1 < len(starts) else len(text)
            end = text.find(form.call_end, match.end(), limit) if form.call_end else limit
            closed = end >= 0 and not (cut and not form.call_end)
            body = text[match.end() : end if end >= 0 else limit]
            stop = end + len(form.call_end) if end >= 0 else limit
            yield text[end_of_last : match.start()]
            end_of_last = stop
            if cut and not closed and limit == len(text):
                yield text[match.start() : stop]
                continue
            try:
                arguments = self._read_parameters(match["name"], body, form)
                if not form.call_end and not arguments and match["name"] not in self._tools:
                    raise ValueError("not a call")
                yield self._to_part(match["name"], arguments)
            except (ValueError, ValidationError):
                yield text[match.start() : stop]
        yield text[end_of_last:]

    def _read_parameters(self, name: str, body: str, form: _XmlFormat) -> dict[str, Any]:
        tool = self._tools.get(name)
        schema = tool.parameters if tool is not None else {}
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        arguments: dict[str, Any] = {}
        matches = list(re.finditer(form.parameter, body, re.DOTALL))
        if body[: matches[0].start() if matches else None].strip():
            raise ValueError("text before the parameters")
        for at, match in enumerate(matches):
            limit = matches[at + 1].start() if at + 1 < len(matches) else len(body)
            # The last end before the next parameter: a value may contain the mark.
            end = body.rfind(form.parameter_end, match.end(), limit)
            value = body[match.end() : end if end >= 0 else limit]
            if end >= 0 and body[end + len(form.parameter_end) : limit].strip():
                raise ValueError("text between the parameters")
            value = value.removeprefix("\n").removesuffix("\n")
            arguments[match["key"]] = convert_value(value, properties.get(match["key"]), schema)
        return arguments

    def _read_json(self, text: str) -> Iterator[OutputPart | str]:
        """The JSON objects that are calls, also in lists."""
        decoder = json.JSONDecoder(parse_constant=_refuse_constant)
        at = end_of_last = 0
        while (at := text.find("{", at)) >= 0:
            try:
                value, end = decoder.raw_decode(text, at)
                part = self._to_call(value)
            except (ValueError, RecursionError, ValidationError):
                part = None
            if part is None:
                # After a faulty object nothing is certain but the next line that begins one.
                found = re.compile(r"\n\s*(?=\{)").search(text, at + 1)
                if found is None:
                    break
                at = found.end()
                continue
            yield text[end_of_last:at]
            yield part
            at = end_of_last = end
        yield text[end_of_last:]

    def _to_call(self, value: Any) -> OutputPart | None:
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
        return self._to_part(name, call[present[0]] if present else {}, call.get("id"))

    def _to_part(self, name: str, arguments: Any, call_id: Any = None) -> OutputPart:
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}", parse_constant=_refuse_constant)
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict) or not isinstance(name, str):
            raise ValueError("not a call")
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()  # half a surrogate pair is no text
        tool = self._tools.get(name)
        if tool is not None and tool.strict:
            # With an empty registry nothing is fetched from where a schema points to.
            _BoundedValidator(tool.parameters, registry=Registry()).validate(arguments)
        return OutputPart("call", text, name, call_id if isinstance(call_id, str) else "")


def _to_parts(pieces: Sequence[OutputPart | str]) -> list[OutputPart]:
    """Text between calls that is only space, commas or brackets of a list says nothing."""
    parts: list[OutputPart] = []
    for piece in pieces:
        if isinstance(piece, OutputPart):
            parts.append(piece)
        elif piece.strip(" \t\r\n,;[]"):
            parts.append(OutputPart("text", piece))
    return parts


def convert_value(text: str, schema: Any, root: Any = None, depth: int = 8) -> Any:
    """The value of an argument that was written as text.

    Args:
        text: as written.
        schema: of the argument; None: not known.
        root: that references in the schema point into.

    Returns:
        A JSON value of a type that the schema allows; the text if there is none.
    """
    types = _types_of(schema, root, depth)
    value = _parse_json(text.strip())
    if not types:  # anything: only what cannot be meant as text is read
        return value if isinstance(value, dict | list) else text
    if "string" in types and types <= {"string", "null"}:
        return None if "null" in types and text.strip() == "null" else text
    checks: dict[str, Callable[[Any], bool]] = {
        "null": lambda v: v is None,
        "boolean": lambda v: isinstance(v, bool),
        "integer": lambda v: _is_number(v) and float(v).is_integer(),
        "number": _is_number,
        "object": lambda v: isinstance(v, dict),
        "array": lambda v: isinstance(v, list),
    }
    if value is _NO_JSON:
        value = _parse_python(text.strip())
    if any(check(value) for name, check in checks.items() if name in types):
        is_whole = isinstance(value, float) and "number" not in types
        return int(value) if is_whole else value
    return None if value is None and "string" not in types else text


_NO_JSON = object()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_json(text: str) -> Any:
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _NO_JSON
    return _NO_JSON if isinstance(value, float) and not math.isfinite(value) else value


def _parse_python(text: str) -> Any:
    """Python's spelling: True, None, and objects with single quotes."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    if text[:1] in ("{", "[") and len(text) < 10_000:
        try:
            value = ast.literal_eval(text)
            return json.loads(json.dumps(value, allow_nan=False))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            pass
    return text


def _types_of(schema: Any, root: Any, depth: int) -> set[str]:
    """The types that a schema allows; empty: all."""
    if not isinstance(schema, dict) or depth == 0:
        return set()
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#/"):
        target: Any = root
        for name in reference[2:].split("/"):
            target = target.get(name) if isinstance(target, dict) else None
        return _types_of(target, root, depth - 1)
    named = schema.get("type")
    if isinstance(named, str):
        return {named}
    if isinstance(named, list):
        return {name for name in named if isinstance(name, str)}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return {_TYPE_NAMES.get(type(value), "string") for value in values}
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(key), list):
            sets = [_types_of(option, root, depth - 1) for option in options[:50]]
            if key == "allOf":
                return next((types for types in sets if types), set())
            return set().union(*sets) if all(sets) else set()
    return set()


_TYPE_NAMES = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[ValidationError]:
    """JSON Schema's "pattern" with a timeout, since clients choose both pattern and text."""
    if isinstance(value, str) and not regex.search(pattern, value, timeout=PATTERN_TIMEOUT_S):
        yield ValidationError("pattern does not match")


_BoundedValidator = validators.extend(Draft202012Validator, {"pattern": _check_pattern})
