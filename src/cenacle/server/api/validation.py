"""From the bytes of a request's body to a validated pydantic model.

Owns: parsing JSON; the base of all request models; errors that name a parameter by its full path.
Does not know: which parameters there are, HTTP.
Invariant: a JSON value is never converted to another type; null counts as absent; what would
change the answer and is not supported is refused by name, what a model does not know is ignored;
validation stops at the first wrong item of a list or an object.
Next: `protocol.py` has what all APIs share; each API's module has its request models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    GetCoreSchemaHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ...errors import InputError

T = TypeVar("T")
M = TypeVar("M", bound="RequestModel")

# OpenAI's codes of errors.
INVALID_TYPE = "invalid_type"
INVALID_VALUE = "invalid_value"
MISSING = "missing_required_parameter"
UNSUPPORTED = "unsupported_parameter"

MAX_MEMBERS = 200_000  # of all objects of a body: what checks them takes 10 us for each
MAX_INTEGER = 2**63 - 1  # JSON has no limit, and what follows has


class RequestError(InputError):
    """A request that is refused.

    Args:
        field: the full path of the parameter; None: the error is not about one.
        reason: what was expected, what was got, what to do.
        code: OpenAI's error code.
        status: of the HTTP response.
    """

    def __init__(
        self,
        field: str | None,
        reason: str,
        code: str | None = INVALID_VALUE,
        status: int = 400,
    ) -> None:
        super().__init__(f"{field}: {reason}" if field else reason, field)
        self.code, self.status = code, status


def fail(reason: str, member: str = "", code: str = INVALID_VALUE) -> NoReturn:
    """Refuse the value, or a member of the object, that a pydantic validator has."""
    member = member.encode(errors="backslashreplace").decode()  # it may be half a character
    raise PydanticCustomError(code, "{reason}", {"reason": reason, "member": member})


def refuse(*names: str, **accepted: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
    """Members that would change the answer and that this server has not.

    For `RequestModel.unsupported`.

    Args:
        names: refused whatever their value.
        accepted: refused but for these values, which request nothing.
    """
    return {**dict.fromkeys(names, ()), **accepted}


class RequestModel(BaseModel):
    """A JSON object in a request.

    Members in `unsupported` are refused unless they request nothing. Other members that are not
    declared are ignored: clients send more than they need.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {}  # with those of its bases; what a
    # model declares, it supports

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        inherited = (base.__dict__.get("unsupported", {}) for base in reversed(cls.__mro__))
        members = chain.from_iterable(members.items() for members in inherited)
        declared = cls.model_fields
        cls.unsupported = {name: values for name, values in members if name not in declared}

    @model_validator(mode="before")
    @classmethod
    def _check_members(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        present = {name: value for name, value in data.items() if value is not None}
        for name in present.keys() & cls.model_fields.keys():
            value = present[name]
            if type(value) is int and abs(value) > MAX_INTEGER + 1:
                fail(f"expected a number of at most 64 bits, got {describe(value)}", name)
        for name in [name for name in cls.unsupported if name in present]:
            value = present.pop(name)
            # To Python False is 0.
            is_bool = isinstance(value, bool)
            if not any(
                isinstance(v, bool) is is_bool and v == value for v in cls.unsupported[name]
            ):
                fail("not supported by this server; remove it", name, UNSUPPORTED)
        return present


class OneOf:
    """Annotates a value that a request gives in one of several forms, told apart by their JSON type
    and, if they are objects, by one member, the tag. Paths of errors do not name the form.

    Args:
        forms: strings, lists and models; none: the annotated type, which may be a union.
        tag: the name of the tag; a model may have a default for it.
        unsupported: other values of the tag are refused as not supported, since the API has them.
        other: the form of objects with any other tag; None: they are refused.
        into: converts what was validated to the annotated type.
    """

    def __init__(
        self,
        *forms: Any,
        tag: str = "type",
        unsupported: bool = False,
        other: type[RequestModel] | None = None,
        into: Callable[[Any], Any] | None = None,
    ) -> None:
        self._forms, self._tag, self._unsupported, self._into = forms, tag, unsupported, into
        self._other = other

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """A tagged union, behind a check that raises errors of our own."""
        is_union = get_origin(source) in (Union, UnionType)
        choices: dict[str, CoreSchema] = {}
        types: list[str] = []
        tags: list[str] = []
        default: str | None = None
        for form in self._forms or (get_args(source) if is_union else (source,)):
            types.append(_json_type(form))
            names = [f"<{types[-1]}>"]
            if types[-1] == "an object":
                field = form.model_fields[self._tag]
                default = default if field.is_required() else field.default
                tags += get_args(field.annotation)
                names = [f"<{tag}>" for tag in get_args(field.annotation)]
            choices |= dict.fromkeys(names, handler.generate_schema(form))
        if self._other is not None:
            choices["<>"] = handler.generate_schema(self._other)

        def name_of(value: Any) -> str:
            if isinstance(value, str | list):
                return f"<{_json_type(type(value))}>"
            is_model = isinstance(value, BaseModel)  # a default that is described
            tag = getattr(value, self._tag) if is_model else value.get(self._tag)
            name = f"<{default if tag is None else tag}>"
            is_other = name not in choices and isinstance(tag, str) and "<>" in choices
            return "<>" if is_other else name

        def check(value: Any) -> Any:
            if isinstance(value, str | list | dict) and name_of(value) in choices:
                return value
            if not isinstance(value, dict) or not tags:
                fail(
                    f"expected {' or '.join(dict.fromkeys(types))}, got {describe(value)}",
                    code=INVALID_TYPE,
                )
            tag = value.get(self._tag)
            if tag is None:
                fail("required, but missing", self._tag, MISSING)
            if not isinstance(tag, str):
                fail(f"expected a string, got {describe(tag)}", self._tag, INVALID_TYPE)
            reason = f"expected {' or '.join(map(repr, tags))}, got {describe(tag)}"
            if self._unsupported:
                fail(f"not supported by this server; {reason}", self._tag, UNSUPPORTED)
            fail(reason, self._tag)

        union = core_schema.tagged_union_schema(choices, name_of)
        schema = core_schema.no_info_before_validator_function(check, union)
        if self._into is None:
            return schema
        return core_schema.no_info_after_validator_function(self._into, schema)


def _json_type(annotation: Any) -> str:
    origin = get_origin(annotation) or annotation
    if origin is Annotated:
        return _json_type(get_args(annotation)[0])
    if origin in (str, Literal):
        return "a string"
    return "a list" if origin is list else "an object"


def check_unicode(value: str) -> str:
    """Refuse half a character, on which a template or a tokenizer would fail."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        fail(f"expected Unicode, got half of a surrogate pair at character {error.start}")
    return value


def parse_arguments(value: Any) -> Any:
    """The arguments of an earlier call: an object, or else the text that the model wrote.

    A conversation goes on after a call that was cut short or is no JSON: its result says so.
    """
    if isinstance(value, dict):  # as some clients keep them
        return value
    if not isinstance(value, str):
        fail(f"expected a string, got {describe(value)}", code=INVALID_TYPE)
    text = check_unicode(value).strip() or "{}"
    try:
        arguments = json.loads(text, parse_constant=_refuse_constant, strict=False)
        json.dumps(arguments, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # of escapes
        fail(f"expected Unicode, got half of a surrogate pair in {describe(value)}")
    except (ValueError, RecursionError):
        return value
    if arguments is None:
        return {}
    return arguments if isinstance(arguments, dict) else value


Text = Annotated[str, AfterValidator(check_unicode)]
Items = Annotated[list[T], FailFast()]
Mapped = Annotated[dict[str, T], FailFast()]
Tagged = Annotated[T, OneOf()]
Supported = Annotated[T, OneOf(unsupported=True)]
JsonObject = dict[str, Any]
Arguments = Annotated[
    JsonObject | str, BeforeValidator(parse_arguments), WithJsonSchema({"type": "string"})
]
"""The arguments of an earlier call, an object as JSON text."""


def _load_body(text: str) -> Any:
    members = 0

    def count(value: JsonObject) -> JsonObject:
        nonlocal members
        members += 1 + len(value)
        if members > MAX_MEMBERS:
            reason = f"body: expected at most {MAX_MEMBERS:,} objects and members, got more"
            raise RequestError(None, reason, "invalid_body")
        return value

    return json.loads(text, parse_constant=_refuse_constant, object_hook=count)


# Pairs of surrogates; other escapes, so that what follows a backslash is read as JSON reads it.
_WHOLE_ESCAPES = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\[^u]")


def parse_request(model: type[M], body: bytes) -> M:
    """The request that a body is.

    Raises:
        RequestError: it is not JSON, or not what `model` declares.
    """
    try:
        data = _load_body(body.decode())
    except UnicodeDecodeError as error:
        reason = f"body: not UTF-8: byte {error.start} of {len(body)}"
        raise RequestError(None, reason, "invalid_body") from None
    except json.JSONDecodeError as error:
        reason = f"body: not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        raise RequestError(None, reason, "invalid_body") from None
    except (ValueError, RecursionError):
        reason = "body: expected no NaN, Infinity, number of thousands of digits or deep nesting"
        raise RequestError(None, reason, "invalid_body") from None
    if not isinstance(data, dict):
        reason = f"body: expected a JSON object, got {describe(data)}"
        raise RequestError(None, reason, "invalid_body")
    if b"\\ud" in (rest := _WHOLE_ESCAPES.sub(b" ", body)) or b"\\uD" in rest:
        _check_escapes(data)
    return validate(model, data)


def validate(model: type[M], data: JsonObject) -> M:
    """The request that a JSON object is.

    Raises:
        RequestError: it is not what `model` declares.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _to_request_error(error) from None


def _check_escapes(data: JsonObject) -> None:
    """Refuse half a character in any string, also where no model declares it."""
    path: list[str | int] = []
    # An iterator a level: a list of all items would be visited by the garbage collector.
    levels: list[Iterator[tuple[str | int, Any]]] = [iter(data.items())]
    while levels:
        if (entry := next(levels[-1], None)) is None:
            levels.pop()
            del path[len(levels) - 1 :]
            continue
        name, value = entry
        if isinstance(name, str):
            shown = name.encode(errors="backslashreplace").decode()
            if shown != name:
                reason = "expected Unicode, got half of a surrogate pair in the name"
                raise RequestError(_format_path([*path, shown]), reason)
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                reason = (
                    f"expected Unicode, got half of a surrogate pair at character {error.start}"
                )
                raise RequestError(_format_path([*path, name]), reason) from None
        elif isinstance(value, list | dict):
            path.append(name)
            levels.append(iter(value.items() if isinstance(value, dict) else enumerate(value)))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


# By pydantic's types of errors: https://docs.pydantic.dev/latest/errors/validation_errors/
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "an integer",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "an object",
    "string_pattern_mismatch": "a string that matches {pattern}",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "a string that is not empty",
    "string_type": "a string",
    "string_unicode": "Unicode",
    "too_long": "at most {max_length} items",
    "too_short": "at least {min_length} item",
}


def _to_request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    kind, context, value = first["type"], first.get("ctx", {}), first["input"]
    names = [name for name in first["loc"] if not str(name).startswith("<")]
    if "reason" in context:  # from `fail`
        return RequestError(_format_path([*names, context["member"]]), context["reason"], kind)
    field = _format_path(names)
    if kind == "missing":
        return RequestError(field, "required, but missing", MISSING)
    numbers = {name: f"{n:.15g}" for name, n in context.items() if isinstance(n, float)}
    expected = _EXPECTED[kind].format(**{**context, **numbers})
    got = describe(context.get("actual_length", value))
    if kind == "string_too_long":
        got = f"{len(value)}"
    wrong_type = kind.endswith("_type") or (kind == "literal_error" and not isinstance(value, str))
    code = INVALID_TYPE if wrong_type else INVALID_VALUE
    return RequestError(field, f"expected {expected}, got {got}", code)


def _format_path(names: Sequence[str | int]) -> str:
    """Such as messages[2].content."""
    parts = (f"[{n}]" if isinstance(n, int) else f".{n[:80]}" for n in names if n != "")
    return "".join(parts).removeprefix(".")


def describe(value: Any) -> str:
    """A JSON value for an error, shortened."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = repr(value[:81] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
