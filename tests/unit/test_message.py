"""A message that was received has the declared types, or its field is named."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.cluster.messages import FindPorts, ProbeLink, ServeProbe, StartDownload
from cenacle.message import (
    Count,
    Label,
    Message,
    MessageError,
    Port,
    Seconds,
    decode_json,
    parse,
)


@dataclass(frozen=True)
class Part(Message):
    a: int
    b: str | None = None


@dataclass(frozen=True)
class Whole(Message, type="whole"):
    ports: tuple[Port, ...]
    parts: Mapping[str, Part]
    wait_s: Seconds | None
    mode: Literal["fast", "slow"] = "fast"
    rows: tuple[tuple[str | None, ...], ...] = ()
    value: int | str = 0
    anything: Any = None
    flag: bool = False


@dataclass(frozen=True)
class Other(Message, type="other"):
    type_of: str = ""


GOOD = {"type": "whole", "ports": [1, 65535], "parts": {"x": {"a": -3}}, "wait_s": 2}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
integers = st.integers(-(2**63), 2**64 - 1)
wholes = st.builds(
    Whole,
    st.lists(st.integers(1, 65535), max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=3), st.builds(Part, integers, st.none() | st.text())),
    st.none() | st.floats(0, 1e9),
    st.sampled_from(["fast", "slow"]),
    st.lists(st.lists(st.none() | st.text(), max_size=2).map(tuple), max_size=2).map(tuple),
    integers | st.text(),
    st.none() | integers,
    st.booleans(),
)


@given(wholes)
def test_a_message_survives_json(message):
    assert parse(json.loads(json.dumps(message.to_json())), Other, Whole) == message


def test_fields_with_a_default_may_be_missing():
    message = Whole.from_json(GOOD)
    assert message == Whole((1, 65535), {"x": Part(-3)}, 2.0)
    assert type(message.wait_s) is float


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"ports": [0]}, r"whole.ports[0]: expected 1 to 65535, got 0"),
        ({"ports": [1, True]}, "whole.ports[1]: expected an integer, got True"),
        ({"ports": 3}, "whole.ports: expected a list, got 3"),
        ({"parts": []}, "whole.parts: expected an object, got a list"),
        ({"parts": {"x": {}}}, "whole.parts.x.a: missing"),
        ({"parts": {"x": 3}}, "whole.parts.x: expected a JSON object, got 3"),
        ({"parts": {"x": {"a": 1.5}}}, "whole.parts.x.a: expected an integer, got 1.5"),
        ({"wait_s": 10**400}, f"whole.wait_s: expected a number, got {10**400}"),
        ({"wait_s": -1}, "whole.wait_s: expected at least 0, got -1.0"),
        ({"wait_s": float("nan")}, "whole.wait_s: expected a number, got nan"),
        ({"wait_s": "x" * 99}, f"whole.wait_s: expected a number, got '{'x' * 40}...'"),
        ({"mode": "medium"}, "whole.mode: expected fast, slow, got 'medium'"),
        ({"mode": []}, "whole.mode: expected fast, slow, got a list"),
        ({"rows": [[None, 3]]}, "whole.rows[0][1]: expected a string, got 3"),
        ({"value": {}}, "whole.value: expected an integer, got an object"),
        ({"flag": 1}, "whole.flag: expected true or false, got 1"),
        ({"more": 1}, "whole.more: unknown field"),
    ],
)
def test_a_wrong_field_is_named(changes, error):
    with pytest.raises(MessageError) as caught:
        parse({**GOOD, **changes}, Whole)
    assert str(caught.value) == error


@pytest.mark.parametrize("data", [None, 3, [], {}, {"type": 3}, {"type": []}, {"type": "nonsense"}])
def test_a_wrong_type_is_named(data):
    with pytest.raises(MessageError, match=r"^type: expected whole, other, got "):
        parse(data, Whole, Other)


@given(json_values)
def test_nothing_else_is_raised(data):
    for received in (data, {"type": "whole", "ports": data, "parts": data, "wait_s": data}):
        with suppress(MessageError):
            assert isinstance(parse(received, Whole), Whole)


def test_numbers_have_their_range():
    @dataclass(frozen=True)
    class Numbers(Message):
        count: Count

    with pytest.raises(MessageError, match=r"Numbers\.count: expected at least 0, got -1"):
        Numbers.from_json({"count": -1})


@dataclass
class Plain:
    sizes: tuple[tuple[int, int], ...] = ()
    counts: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    names: list[str] | None = None


@dataclass(frozen=True)
class Own:
    """Has its own JSON form."""

    text: str

    def to_json(self):
        return [self.text]

    @classmethod
    def from_json(cls, data):
        (text,) = data
        return cls(text.upper())


@dataclass(frozen=True)
class Nested(Message, type="nested"):
    plain: Plain
    own: tuple[Own, ...] = ()


def test_dataclasses_and_those_with_their_own_json_are_fields():
    message = Nested(Plain(((1, 2), (3, 4)), {1: {2: 3}}, ["x"]), (Own("A"), Own("B")))
    data = json.loads(json.dumps(message.to_json()))
    assert data["own"] == [["A"], ["B"]]
    assert parse(data, Nested) == message
    assert parse({"type": "nested", "plain": {}}, Nested) == Nested(Plain())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plain": []}, "nested.plain: expected a JSON object, got a list"),
        ({"plain": {"x": 1}}, "nested.plain.x: unknown field"),
        ({"plain": {"sizes": [[1]]}}, r"nested.plain.sizes\[0\]: expected 2 items, got 1"),
        ({"plain": {"sizes": [[1, "x"]]}}, r"sizes\[0\]\[1\]: expected an integer, got 'x'"),
        ({"plain": {"counts": {"a": {}}}}, "nested.plain.counts: expected integers as keys"),
        ({"plain": {"counts": {"1": {"2": []}}}}, r"counts.1.2: expected an integer, got a list"),
        ({"plain": {"names": "x"}}, "nested.plain.names: expected a list, got 'x'"),
        ({"own": [[]]}, r"nested.own\[0\]: ValueError"),
        ({"own": [[1]]}, r"nested.own\[0\]: AttributeError"),
    ],
)
def test_a_nested_field_that_is_wrong_is_named(change, message):
    with pytest.raises(MessageError, match=message):
        parse({"type": "nested", "plain": {}, **change}, Nested)


@pytest.mark.parametrize(
    "data",
    [b"", b"3", b"[]", b"{", b"\xff", b'{"a":' * 100_000, b"[" * 100_000, b'{"a": ' + b"9" * 5000],
)
def test_what_is_no_json_object_is_one_kind_of_error(data):
    with pytest.raises(MessageError, match="not a message"):
        decode_json(data)


@dataclass(frozen=True)
class Loose(Message, type="loose"):
    anything: Any = None
    count: int = 0
    label: Label = ""
    labels: Mapping[Label, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"anything": {"a": [math.inf]}}, "loose.anything.a: expected a number, got inf"),
        ({"anything": [math.nan]}, "loose.anything: expected a number, got nan"),
        ({"anything": {"a": 2**64}}, "loose.anything.a: expected an integer of 64 bits"),
        ({"anything": "\ud800"}, "loose.anything: expected text, got half a character"),
        ({"anything": {"\udfff": 1}}, "loose.anything: expected text, got half a character"),
        ({"anything": json.loads("[" * 40 + "]" * 40)}, "loose.anything: nested too deeply"),
        ({"count": 10**400}, "loose.count: expected an integer of 64 bits"),
        ({"label": "\x1b[2J"}, "loose.label: expected at most 500 printable characters, got"),
        ({"label": "a" * 501}, "loose.label: expected at most 500 printable characters, got"),
        ({"labels": {"a\nb": 1}}, "loose.labels (a key): expected at most 500 printable"),
    ],
)
def test_values_that_would_fail_later_are_refused(changes, error):
    with pytest.raises(MessageError) as caught:
        parse({"type": "loose", **changes}, Loose)
    assert str(caught.value).startswith(error)


def test_a_class_may_refuse_with_any_exception():
    class Odd:
        @classmethod
        def from_json(cls, data):
            return data[0][1]

    @dataclass(frozen=True)
    class Strict(Message, type="strict"):
        odd: Odd | None = None
        number: int = 1

        def __post_init__(self):
            1 / self.number

    for data in ({"number": 0}, {"odd": [[]]}, {"odd": {}}):
        with pytest.raises(MessageError, match="strict"):
            parse({"type": "strict", **data}, Strict)


@pytest.mark.parametrize("address", ["", "a" * 64 + ".x", "a..b", "a\x00", "é" * 60, "x" * 5000])
def test_an_address_that_no_socket_takes_is_a_message_error(address: str) -> None:
    """Sockets raise a UnicodeError or a ValueError for them, not an OSError."""
    kinds = [
        (FindPorts, {"count": 1}),
        (ServeProbe, {"secret": ""}),
        (ProbeLink, {"port": 1, "secret": ""}),
    ]
    for kind, rest in kinds:
        for good in ("127.0.0.1", "fd00::1", "fe80::1%eth0", "node-2.local", "müller.example"):
            assert kind.from_json({"address": good, **rest})
        with pytest.raises(MessageError, match="address: expected an address"):
            kind.from_json({"address": address, **rest})


def test_a_path_with_a_null_byte_is_a_message_error() -> None:
    with pytest.raises(MessageError, match="folder: expected at most 4096 printable"):
        StartDownload.from_json({"model": "x", "folder": "a\x00b", "order": {}})
