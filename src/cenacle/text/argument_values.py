"""The values of arguments that a model wrote as text.

Owns: the types that a JSON schema allows, and the value of a text as one of them.
Does not know: the formats of calls.
Invariant: every value is JSON; a text that fits none of the types stays a string.
Next: `call_formats.py` reads the calls.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from typing import Any, NoReturn


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
    if value is _NO_JSON:
        value = _parse_python(text.strip())
    if any(_TYPE_CHECKS[name](value) for name in types - {"string"} if name in _TYPE_CHECKS):
        is_whole = isinstance(value, float) and "number" not in types
        return int(value) if is_whole else value
    return None if value is None and "string" not in types else text


def fit_value(value: Any, text: str, schema: Any, root: Any = None, depth: int = 8) -> Any:
    """The value of an argument that was written as a literal: `value`, unless the schema allows
    only other types; then as `convert_value` has it."""
    types = _types_of(schema, root, depth)
    if not types or any(_TYPE_CHECKS[name](value) for name in types if name in _TYPE_CHECKS):
        return value
    return value if isinstance(value, str) else convert_value(text, schema, root, depth)


_NO_JSON = object()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPE_CHECKS: dict[str, Callable[[Any], bool]] = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: _is_number(v) and float(v).is_integer(),
    "number": _is_number,
    "string": lambda v: isinstance(v, str),
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
}


def _parse_json(text: str) -> Any:
    try:
        value = json.loads(text, strict=False, parse_constant=refuse_constant)
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


def refuse_constant(name: str) -> NoReturn:
    """For JSON decoders: NaN and the infinities are not JSON."""
    raise ValueError(f"{name} is not JSON")
