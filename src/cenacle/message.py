"""Typed messages between processes: frozen dataclasses that travel as JSON objects.

Owns: `Message`, whose subclasses declare fields, decoding JSON, and checking it against them.
Does not know: sockets, or which messages there are.
Invariant: what `from_json` returns has the declared types and ranges: numbers are finite and fit
64 bits, strings can be encoded, values of any type are nested `MAX_DEPTH` deep at most. Everything
else raises a `MessageError` that names the field. `from_json(to_json(m)) == m`.
Next: `cluster/messages.py` declares those of a cluster.

Field types: bool, int, float, str, None, Any, Literal, unions of these, `list[T]`, `tuple[T, ...]`,
`tuple[T, U]`, `Mapping[K, T]` with keys of type str or int, dataclasses, and
`Annotated[T, Range(...)]` for numbers, `Label` for short printable strings. A dataclass with
`to_json` and `from_json` of its own uses them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from .errors import ClusterError

A = TypeVar("A", bound="Message")
B = TypeVar("B", bound="Message")
C = TypeVar("C", bound="Message")
D = TypeVar("D", bound="Message")
T = TypeVar("T")


class MessageError(ClusterError):
    """A received message is malformed; names the field."""


@dataclass(frozen=True)
class Range:
    """Smallest and largest value of a number."""

    minimum: float = -math.inf
    maximum: float = math.inf

    def check(self, value: Any, path: str) -> None:
        """Raise a `MessageError` for a number outside."""
        if value is not None and not self.minimum <= value <= self.maximum:
            raise MessageError(f"{path}: expected {_describe_range(self)}, got {value}")


@dataclass(frozen=True)
class Printable:
    """A string that terminals and logs can show as it is.

    Args:
        max_length: in characters.
    """

    max_length: int

    def check(self, value: Any, path: str) -> None:
        """Raise a `MessageError` for another string."""
        if isinstance(value, str) and not (len(value) <= self.max_length and value.isprintable()):
            raise MessageError(
                f"{path}: expected at most {self.max_length} printable characters, got "
                f"{_describe(value)}"
            )


MAX_DEPTH = 32
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1
Count = Annotated[int, Range(0)]
Label = Annotated[str, Printable(500)]
Port = Annotated[int, Range(1, 65535)]
Seconds = Annotated[float, Range(0)]


class Message:
    """Base of all messages. A subclass is a frozen dataclass:

        @dataclass(frozen=True)
        class Ports(Message, type="ports"):
            ports: tuple[Port, ...]

    `type` tells messages of one connection apart; parts of messages have none.
    """

    type: ClassVar[str] = ""

    def __init_subclass__(cls, type: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.type = type

    def to_json(self) -> dict[str, Any]:
        """The message as a JSON object."""
        tag = {"type": self.type} if self.type else {}
        return tag | _encode_fields(self)

    @classmethod
    def from_json(cls, data: object, path: str = "") -> Self:
        """The message of a JSON object.

        Args:
            path: names the message in errors; by default its type.

        Raises:
            MessageError: a field is missing, unknown, or of the wrong type or range.
        """
        tag = ("type",) if cls.type else ()
        return _decode_fields(cls, data, path or cls.type or cls.__name__, tag)


@overload
def parse(data: object, a: type[A], /) -> A: ...
@overload
def parse(data: object, a: type[A], b: type[B], /) -> A | B: ...
@overload
def parse(data: object, a: type[A], b: type[B], c: type[C], /) -> A | B | C: ...
@overload
def parse(data: object, a: type[A], b: type[B], c: type[C], d: type[D], /) -> A | B | C | D: ...
@overload
def parse(data: object, *kinds: type[A]) -> A: ...
def parse(data: object, *kinds: type[Any]) -> Any:
    """The message of a JSON object that is one of these kinds, told apart by `type`.

    Raises:
        MessageError: it is none of them, or malformed.
    """
    received = data.get("type") if isinstance(data, Mapping) else data
    for kind in kinds:
        if kind.type == received:
            return kind.from_json(data)
    expected = ", ".join(kind.type for kind in kinds)
    raise MessageError(f"type: expected {expected}, got {_describe(received)}")


def decode_json(data: bytes) -> dict[str, Any]:
    """The JSON object in received bytes, whose values are not checked yet.

    Raises:
        MessageError: it is something else.
    """
    try:
        message = json.loads(data)
    except RecursionError:
        raise MessageError("not a message: nested too deeply") from None
    except ValueError as error:  # also of numbers with thousands of digits
        raise MessageError(f"not a message: {error}") from None
    if not isinstance(message, dict):
        raise MessageError(f"not a message: expected a JSON object, got {_describe(message)}")
    return message


def _encode_fields(value: Any) -> dict[str, Any]:
    return {name: _encode(getattr(value, name)) for name in _field_types(type(value))}


def _decode_fields(cls: type[T], data: object, path: str, ignored: tuple[str, ...] = ()) -> T:
    if not isinstance(data, Mapping):
        raise MessageError(f"{path}: expected a JSON object, got {_describe(data)}")
    types = _field_types(cls)
    for key in data:
        if key not in types and key not in ignored:
            raise MessageError(f"{path}.{key}: unknown field")
    values = {}
    for field, annotation in types.items():
        if field in data:
            values[field] = _decode(annotation, data[field], f"{path}.{field}")
        elif not _is_optional(cls, field):
            raise MessageError(f"{path}.{field}: missing")
    return _construct(lambda: cls(**values), path)


def _construct(make: Callable[[], T], path: str) -> T:
    """What a class makes of received values; it may raise whatever it likes."""
    try:
        return make()
    except MessageError:
        raise
    except Exception as error:
        raise MessageError(f"{path}: {error!r}") from error


def _field_types(cls: type) -> dict[str, Any]:
    if cls not in _FIELD_TYPES:
        hints = get_type_hints(cls, include_extras=True)
        _FIELD_TYPES[cls] = {f.name: hints[f.name] for f in _dataclass_fields(cls)}
    return _FIELD_TYPES[cls]


def _is_optional(cls: type, name: str) -> bool:
    field = next(f for f in _dataclass_fields(cls) if f.name == name)
    return field.default is not MISSING or field.default_factory is not MISSING


def _dataclass_fields(cls: Any) -> tuple[Field[Any], ...]:
    return fields(cls)


def _encode(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if is_dataclass(value):
        return _encode_fields(value)
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value


def _decode(annotation: Any, value: Any, path: str) -> Any:
    if annotation is Any:
        _check_any(value, path, MAX_DEPTH)
        return value
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        decoded = _decode(arguments[0], value, path)
        for limits in arguments[1:]:
            limits.check(decoded, path)
        return decoded
    if origin in (Union, UnionType):
        return _decode_union(arguments, value, path)
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise MessageError(f"{path}: expected {choices}, got {_describe(value)}")
        return value
    if origin in (list, tuple):
        return _decode_sequence(origin, arguments, value, path)
    if origin is Mapping:
        return _decode_mapping(arguments, value, path)
    if issubclass(annotation, Message):
        return annotation.from_json(value, path)
    if hasattr(annotation, "from_json"):
        _check_any(value, path, MAX_DEPTH)
        return _construct(lambda: annotation.from_json(value), path)
    if hasattr(annotation, "__dataclass_fields__"):
        return _decode_fields(annotation, value, path)
    return _decode_scalar(annotation, value, path)


def _decode_sequence(
    kind: type[list[Any]] | type[tuple[Any, ...]], types: tuple[Any, ...], value: Any, path: str
) -> Any:
    if not isinstance(value, list | tuple):
        raise MessageError(f"{path}: expected a list, got {_describe(value)}")
    if kind is list or types[-1] is Ellipsis:
        types = (types[0],) * len(value)
    if len(types) != len(value):
        raise MessageError(f"{path}: expected {len(types)} items, got {len(value)}")
    items = enumerate(zip(types, value, strict=True))
    return kind(_decode(item_type, item, f"{path}[{i}]") for i, (item_type, item) in items)


def _decode_mapping(types: tuple[Any, ...], value: Any, path: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise MessageError(f"{path}: expected an object, got {_describe(value)}")
    key_type, item_type = types
    if key_type is not int:
        return {
            _decode(key_type, k, f"{path} (a key)"): _decode(item_type, v, f"{path}.{k}")
            for k, v in value.items()
        }
    try:
        keys = [int(key) for key in value]  # JSON has integers as keys in quotes
    except ValueError as error:
        raise MessageError(f"{path}: expected integers as keys ({error})") from None
    pairs = zip(keys, value.values(), strict=True)
    return {_decode(int, k, path): _decode(item_type, v, f"{path}.{k}") for k, v in pairs}


def _decode_scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and type(value) in (int, float):
        with suppress(OverflowError):  # an integer too large for a float
            if math.isfinite(value):
                return float(value)
    elif kind is int and type(value) is int:
        if not MIN_INTEGER <= value <= MAX_INTEGER:
            bits = value.bit_length()
            raise MessageError(f"{path}: expected an integer of 64 bits, got one of {bits}")
        return value
    elif kind is str and type(value) is str:
        if not _is_encodable(value):
            raise MessageError(f"{path}: expected text, got half a character in {_describe(value)}")
        return value
    elif type(value) is kind:
        return value
    raise MessageError(f"{path}: expected {_NAMES[kind]}, got {_describe(value)}")


def _is_encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_any(value: Any, path: str, depth: int) -> None:
    """Check a value of any type for what would fail later: when it is computed with, or sent on."""
    if depth == 0:
        raise MessageError(f"{path:.100}: nested too deeply")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_any(key, path, depth - 1)
            _check_any(item, f"{path}.{key}", depth - 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_any(item, path, depth - 1)
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        _decode_scalar(type(value), value, path)


def _decode_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is not NoneType:
            try:
                return _decode(kind, value, path)
            except MessageError as error:
                errors.append(error)
    raise errors[0]


def _describe_range(limits: Range) -> str:
    if limits.maximum == math.inf:
        return f"at least {limits.minimum:g}"
    return f"{limits.minimum:g} to {limits.maximum:g}"


def _describe(value: object) -> str:
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:40]}...")
    return "a list" if isinstance(value, list | tuple) else "an object"


_FIELD_TYPES: dict[type, dict[str, Any]] = {}  # get_type_hints is slow
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
