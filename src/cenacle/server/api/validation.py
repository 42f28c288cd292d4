"""Reading JSON that a client sent, whatever it holds.

Owns: the body's bytes to an object; members taken one by one, each with its type and range; the
refusal of what is left.
Does not know: which parameters there are, HTTP.
Invariant: a member is taken or refused by its full name; null counts as absent.
Next: `openai.py`, `responses.py` and `anthropic.py` say which members their bodies have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ...errors import InputError

T = TypeVar("T")
D = TypeVar("D")


class RequestError(InputError):
    """A request that is refused: HTTP `status`, and OpenAI's `param` and `code`."""

    def __init__(
        self,
        message: str,
        field: str | None = None,
        code: str | None = "invalid_value",
        status: int = 400,
    ) -> None:
        super().__init__(message, field)
        self.code, self.status = code, status


class Fields:
    """The members of a JSON object, taken one by one; what is left at the end is refused.

    Args:
        data: the object.
        where: put before each name in refusals.
        known: the names that may be taken at all; None: any.
    """

    def __init__(
        self, data: dict[str, Any], where: str = "", known: Iterable[str] | None = None
    ) -> None:
        self._left = {k: v for k, v in data.items() if v is not None}
        self._where = where
        self._known = None if known is None else frozenset(known)

    def has(self, name: str) -> bool:
        """Whether a member is there and has not been taken."""
        assert self._known is None or name in self._known, f"{name} is not described"
        return name in self._left

    def take(self, name: str, convert: Callable[[Any, str], T], default: D) -> T | D:
        """A member's value, or the default where it is absent."""
        return self.need(name, convert) if self.has(name) else default

    def need(self, name: str, convert: Callable[[Any, str], T]) -> T:
        """The value of a member that must be there."""
        if not self.has(name):
            raise missing(self._where + name)
        return convert(self._left.pop(name), self._where + name)

    def refuse_rest(self, unsupported: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse what was not taken.

        Args:
            unsupported: members of the API that this server does not have, with those values that
                ask for nothing.
        """
        for name, value in self._left.items():
            full = self._where + name[:80]
            if name not in unsupported:
                raise RequestError(
                    f"{full}: unknown parameter; remove it", full, "unknown_parameter"
                )
            # Compared as JSON: to Python False is 0.
            if json.dumps(value) not in [json.dumps(v) for v in unsupported[name]]:
                raise not_supported(full)


def missing(name: str) -> RequestError:
    """The refusal of a body that lacks a member."""
    return RequestError(f"{name}: required, but missing", name, "missing_required_parameter")


def not_supported(name: str, instead: str = "remove it") -> RequestError:
    """The refusal of what this server does not have."""
    return RequestError(f"{name}: not supported by this server; {instead}", name, UNSUPPORTED)


UNSUPPORTED = "unsupported_parameter"


def object_of(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
        Refused: it is none.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"The body is not UTF-8: byte {error.start} of {len(body)}", None, "invalid_body"
        ) from None
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"The body is not JSON: {error.msg} at line {error.lineno} column {error.colno}",
            None,
            "invalid_body",
        ) from None
    except (ValueError, RecursionError):
        raise RequestError(
            "The body is not JSON that can be read: NaN, Infinity, a number of thousands of digits "
            "or nesting too deep",
            None,
            "invalid_body",
        ) from None
    if not isinstance(data, dict):
        raise RequestError(
            f"The body: expected a JSON object, got {kind_of(data)}", None, "invalid_body"
        )
    return data


def _no_constant(name: str) -> None:
    raise ValueError(name)


def string(value: Any, name: str) -> str:
    """A string of whole characters."""
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name}: not valid Unicode: half of a surrogate pair at character {error.start}", name
        ) from None
    return value


def one_of(*values: str) -> Callable[[Any, str], str]:
    """One of a few strings."""

    def convert(value: Any, name: str) -> str:
        if string(value, name) not in values:
            raise not_among(name, values, value)
        return str(value)

    return convert


def not_among(name: str, values: Iterable[str], got: Any) -> RequestError:
    """The refusal of a string that is none of those expected."""
    return RequestError(f"{name}: expected one of {', '.join(values)}; got {shown(got)}", name)


def number(value: Any, name: str) -> float:
    """A number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(name, "a number", value)
    return value


def integer(value: Any, name: str) -> int:
    """A number that was written without a fraction."""
    if type(value) is not int:
        raise wrong_type(name, "an integer", value)
    return value


def integer_from(low: int, high: int | None) -> Callable[[Any, str], int]:
    """An integer in a range; `high` None: without an end."""

    def convert(value: Any, name: str) -> int:
        number = integer(value, name)
        if number < low or (high is not None and number > high):
            wanted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise RequestError(f"{name}: expected {wanted}, got {shown(value)}", name)
        return number

    return convert


def boolean(value: Any, name: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise wrong_type(name, "true or false", value)
    return value


def list_of(value: Any, name: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise wrong_type(name, "a list", value)
    return value


def dict_of(value: Any, name: str) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    return value


def strings(most: int) -> Callable[[Any, str], tuple[str, ...]]:
    """A string that is not empty, or up to so many of them."""

    def convert(value: Any, name: str) -> tuple[str, ...]:
        if isinstance(value, str):
            items = [(name, value)]
        elif isinstance(value, list):
            items = [(f"{name}[{at}]", item) for at, item in enumerate(value)]
        else:
            raise wrong_type(name, f"a string or up to {most} of them", value)
        if len(items) > most:
            raise RequestError(f"{name}: expected at most {most} strings, got {len(items)}", name)
        for full, item in items:
            if not string(item, full):
                raise RequestError(f"{full}: expected a string that is not empty", full)
        return tuple(item for _, item in items)

    return convert


def wrong_type(name: str, wanted: str, value: Any) -> RequestError:
    """The refusal of a value of another type."""
    return RequestError(f"{name}: expected {wanted}, got {kind_of(value)}", name, "invalid_type")


def kind_of(value: Any) -> str:
    """A JSON value's type in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number"
    return {"str": "a string", "list": "a list", "dict": "an object"}[type(value).__name__]


def shown(value: object) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
