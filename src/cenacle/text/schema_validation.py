"""Whether the arguments of a call match its tool's schema, in bounded time.

Owns: the validator, and the limits of its work.
Does not know: calls, tools.
Invariant: neither a schema nor a value can hold the process, and nothing is fetched.
Next: `tool_calls.py` imports this for strict tools only, as jsonschema takes long to import.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import regex
from jsonschema import Draft202012Validator, ValidationError, validators
from referencing import Registry

PATTERN_TIMEOUT_S = 0.05  # per pattern of a strict tool; other requests wait meanwhile
MAX_VALIDATION_STEPS = 20_000  # keywords of a schema applied to values; about 0.3 s

_steps_left: ContextVar[list[int]] = ContextVar("steps_left")


def validate(schema: dict[str, Any], arguments: Any) -> None:
    """Raise an exception if they do not match, or if that is not known in bounded time."""
    if '"patternProperties":' in json.dumps(schema):
        return  # jsonschema cannot bound the time of these patterns
    _steps_left.set([MAX_VALIDATION_STEPS])
    # With an empty registry nothing is fetched from where a schema points to.
    _BoundedValidator(schema, registry=Registry()).validate(arguments)


def _count_steps(check: Callable[..., Any]) -> Callable[..., Any]:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        left = _steps_left.get()
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("the schema takes too long to check")
        yield from check(validator, value, instance, schema) or ()

    return counted


def _check_pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[ValidationError]:
    """JSON Schema's "pattern" with a timeout, since clients choose both pattern and text."""
    if isinstance(value, str) and not regex.search(pattern, value, timeout=PATTERN_TIMEOUT_S):
        yield ValidationError("pattern does not match")


def _skip(*_: Any) -> Iterator[ValidationError]:
    return iter(())


_BoundedValidator = validators.extend(
    Draft202012Validator,
    {
        **{name: _count_steps(check) for name, check in Draft202012Validator.VALIDATORS.items()},
        "pattern": _check_pattern,
        # jsonschema looks through all branches for these, without a bound.
        "unevaluatedItems": _skip,
        "unevaluatedProperties": _skip,
    },
)
