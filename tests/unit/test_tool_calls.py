"""What can be read for certain is a call with the right types; the rest is text."""

import json

import pytest

from cenacle.core.chat import OutputPart, Tool
from cenacle.text.tool_calls import CallReader, convert_value

PARAMETERS = {
    "type": "object",
    "properties": {
        "word": {"type": "string"},
        "maybe": {"type": ["string", "null"]},
        "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "ref": {"$ref": "#/$defs/word"},
    },
    "$defs": {"word": {"enum": ["1", "2"]}},
}
TOOL = Tool("f", "", PARAMETERS)


def no_parser(*_):
    raise ValueError


def read(text, kind="json_tools", tool=TOOL, cut=False):
    return CallReader(kind, no_parser, [tool]).read(text, cut=cut)


def call(**arguments):
    return OutputPart("call", json.dumps(arguments, ensure_ascii=False), "f")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"name": "f", "parameters": {"count": 1}}', [call(count=1)]),
        ('{"name": "f", "arguments": "{\\"count\\": 1}"}', [call(count=1)]),
        ('{"function": {"name": "f", "arguments": {"count": 1}}}', [call(count=1)]),
        ('[{"name": "f", "arguments": {}}, {"name": "f"}]', [call(), call()]),
        ('{"name": "f", "arguments": {"ratio": NaN}}', None),
        ('{"name": "f", "arguments": {"ratio": -Infinity}}', None),
        ('{"name": "f", "arguments": {"word": "\\ud800"}}', None),
        ('{"name": "f", "arguments": {}, "parameters": {"count": 1}}', None),
        ('{"name": "f", "keyword": 1}', None),
        ('{"name": "f", "arguments": [1]}', None),
        ("{" * 5000, None),
        (
            '{"name": "f"}\n{"name": "f", "arg',
            [call(), OutputPart("text", '\n{"name": "f", "arg')],
        ),
    ],
)
def test_json(text, parts):
    assert read(text) == (parts or [OutputPart("text", text)])


def qwen(**values):
    lines = (f"<parameter={name}>\n{value}\n</parameter>" for name, value in values.items())
    return "<function=f>\n" + "\n".join(lines) + "\n</function>"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("word", "42", "42"),
        ("word", "null", "null"),
        ("maybe", "42", "42"),
        ("maybe", "null", None),
        ("either", "42", "42"),
        ("count", "42", 42),
        ("count", "42.0", 42),
        ("count", "many", "many"),
        ("count", "null", None),
        ("ratio", "1.5", 1.5),
        ("ratio", "NaN", "NaN"),
        ("ratio", "1e999", "1e999"),
        ("flag", "true", True),
        ("flag", "True", True),
        ("flag", "perhaps", "perhaps"),
        ("items", "[1, 2]", [1, 2]),
        ("items", "['a']", ["a"]),
        ("items", "a, b", "a, b"),
        ("ref", "1", "1"),
        ("unknown", '{"a": 1}', {"a": 1}),
        ("unknown", "42", "42"),
    ],
)
def test_values_have_the_types_of_the_schema(name, text, value):
    (part,) = read(qwen(**{name: text}), "qwen3_coder")
    assert json.loads(part.text) == {name: value}
    converted = convert_value(text, PARAMETERS["properties"].get(name), PARAMETERS)
    assert type(converted) is type(value)


def test_elements_that_are_not_closed():
    unclosed = "<function=f><parameter=word>a</function>"
    assert read(unclosed, "qwen3_coder") == [call(word="a")]
    two = "<function=f><parameter=word>a<parameter=count>2</parameter></function>"
    assert read(two, "qwen3_coder") == [call(word="a", count=2)]
    open_call = "<function=f>\n<parameter=word>\na"
    assert read(open_call, "qwen3_coder") == [call(word="a")]
    assert read(open_call, "qwen3_coder", cut=True) == [OutputPart("text", open_call)]
    before = qwen(word="a")
    assert read(before + open_call, "qwen3_coder", cut=True) == [
        call(word="a"),
        OutputPart("text", open_call),
    ]


def test_text_between_parameters_is_not_dropped():
    text = "<function=f>say <parameter=word>a</parameter></function>"
    assert read(text, "qwen3_coder") == [OutputPart("text", text)]


def test_other_elements():
    glm = "f\n<arg_key>maybe</arg_key>\n<arg_value>42</arg_value>\n"
    assert read(glm, "glm47") == [call(maybe="42")]
    assert read("f", "glm47") == [call()]
    assert read("hello", "glm47") == [OutputPart("text", "hello")]
    minimax = '<invoke name="f"><parameter name="count">7</parameter></invoke>'
    assert read(minimax + minimax, "minimax_m2") == [call(count=7), call(count=7)]


def test_a_strict_tool_takes_only_what_fits():
    strict = Tool("f", "", PARAMETERS, strict=True)
    text = qwen(count="many")
    assert read(text, "qwen3_coder", strict) == [OutputPart("text", text)]
    assert read(qwen(count="3"), "qwen3_coder", strict) == [call(count=3)]
