"""What can be read for certain is a call with the right types; the rest is text."""

import json
import pkgutil
from dataclasses import replace

import mlx_lm.tool_parsers
import pytest

from cenacle.core.chat import OutputPart, Tool
from cenacle.text.argument_values import convert_value
from cenacle.text.call_form import CallForm
from cenacle.text.call_formats import HEADED_FORMATS, XML_FORMATS
from cenacle.text.tool_calls import CallReader

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


def read(text, kind="json_tools", tool=TOOL, cut=False):
    return CallReader(kind, [tool]).read(text, cut=cut)


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


HEADED = {
    "kimi_k2": (
        "<|tool_call_begin|>functions.f:{}<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    ),
    "mistral": ("f[ARGS]", "[TOOL_CALLS]"),
}


@pytest.mark.parametrize("kind", HEADED)
def test_a_name_and_an_object(kind):
    head, end = HEADED[kind]
    ids = ["functions.f:0", "functions.f:1"] if kind == "kimi_k2" else ["", ""]
    first = replace(call(count=1, word='say "[ARGS]{}"'), id=ids[0])
    second = replace(call(), id=ids[1])
    one, two = head.format(0) + first.text + end, head.format(1) + "{}" + end
    assert read(f"{one}\n{two}", kind) == [first, second]
    cut_off = head.format(1) + '{"count": 1'
    assert read(one + cut_off, kind, cut=True) == [first, OutputPart("text", end + cut_off)]
    assert read(one + "Then.", kind) == [first, OutputPart("text", end + "Then.")]
    for fault in ('{"ratio": NaN}', '{"word": "\\ud800"}', "[1]", "f", '{"count": 1e999}'):
        text = head.format(0) + fault + end
        assert read(text, kind) == [OutputPart("text", text)]


def test_mistrals_other_forms():
    assert read("f[CALL_ID]abc123def[ARGS]{}", "mistral") == [replace(call(), id="abc123def")]
    assert read('[{"name": "f", "arguments": {"count": 1}}]', "mistral") == [call(count=1)]
    with_id = '[{"name": "f", "arguments": "{}", "id": "abc123def"}]'
    assert read(with_id, "mistral") == [replace(call(), id="abc123def")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[f(count=1, word="a, (b) \\"c\\"")]', [call(count=1, word='a, (b) "c"')]),
        ("[f(), f(flag=true, maybe=None)]", [call(), call(flag=True, maybe=None)]),
        ("f(items=[1, {'a': null}])", [call(items=[1, {"a": None}])]),
        ("[f(word=Oslo)]", [call(word="Oslo")]),
        ("[f(count=many)]", [call(count="many")]),
        ("[f(word=42, maybe=1, unknown=1)]", [call(word="42", maybe="1", unknown=1)]),
        ("[f(count=-3, ratio=1.5)]", [call(count=-3, ratio=1.5)]),
        ("[f(items=(1, 2))]", [call(items=[1, 2])]),
        ("[f(ratio=1e999)]", [call(ratio="1e999")]),
        ("[f(word=open('x').read())]", [call(word="open('x').read()")]),
        ("[f(1)]", None),
        ("[f(**{})]", None),
        ("[f(word=)]", None),
        ("f(" * 30_000, None),
        ("[f(count=1), f(word=", [call(count=1), OutputPart("text", ", f(word=")]),
        ("[f()] and so on", [call(), OutputPart("text", "] and so on")]),
    ],
)
def test_pythonic(text, parts):
    assert read(text, "pythonic", cut=True) == (parts or [OutputPart("text", text)])


@pytest.mark.parametrize("quote", ['<|"|>', "<escape>"])
def test_gemmas(quote):
    def q(text):
        return quote + text + quote

    kind = "gemma4" if "|" in quote else "function_gemma"
    text = f"call:f{{word:{q('a, {b}: 42')},count:1,flag:true,maybe:null}}"
    assert read(text, kind) == [call(word="a, {b}: 42", count=1, flag=True, maybe=None)]
    assert read(f"call:f{{items:[1,{q('x')}]}}", kind) == [call(items=[1, "x"])]
    assert read(f"call:f{{items:[{{a:{q('}')}}}]}}", kind) == [call(items=[{"a": "}"}])]
    assert read("call:f{word:42,unknown:42}", kind) == [call(word="42", unknown=42)]
    two_words = "call:f{word:Oslo, Norway}"
    assert read(two_words, kind) == [OutputPart("text", two_words)]
    assert read("call:f{word:Oslo}call:f{}", kind) == [call(word="Oslo"), call()]
    assert read("call:f{ratio:NaN}", kind) == [call(ratio="NaN")]
    unclosed = f"call:f{{word:{quote}a"
    assert read("call:f{}" + unclosed, kind) == [call(), OutputPart("text", unclosed)]
    assert read("call:f{" * 20_000, kind) == [OutputPart("text", "call:f{" * 20_000)]


def test_more_elements():
    muse = '<atem:invoke name="f"><atem:parameter name="{}">{}</atem:parameter></atem:invoke>'
    assert read(muse.format("maybe", "42"), "muse_spark") == [call(maybe="42")]
    mini = '<function name="f"><param name="word"><![CDATA[a < b\n]]></param></function>'
    assert read(mini, "minicpm5") == [call(word="a < b\n")]
    dsml = (
        '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="word" string="true">42'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="count" string="false">42'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>"
    )
    assert read(dsml, "dsml") == [call(word="42", count=42)]
    k3 = (
        '<|open|>call tool="f" index="1"<|sep|>\n'
        '<|open|>argument key="word" type="string"<|sep|>42<|close|>argument<|sep|>\n'
        '<|open|>argument key="count" type="integer"<|sep|>42<|close|>argument<|sep|>'
        "<|close|>call<|sep|>"
    )
    assert read(k3, "kimi_k3") == [call(word="42", count=42)]
    broken = k3.replace('"string"<|sep|>', '"string"<|s ep|>')
    assert read(broken, "kimi_k3") == [OutputPart("text", broken)]
    block = '<|open|>json type="object"<|sep|>{"count": 1}<|close|>json<|sep|>'
    as_json = f'<|open|>call tool="f"<|sep|>{block}<|close|>call<|sep|>'
    assert read(as_json, "kimi_k3") == [call(count=1)]


def test_every_format_of_mlx_lm_is_read_here():
    names = {module.name for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)}
    assert names == {
        *XML_FORMATS.keys() - {"dsml"},
        *HEADED_FORMATS,
        *("json_tools", "pythonic", "gemma4", "function_gemma"),
    }


FITTING = Tool("f", "", {**PARAMETERS, "required": ["count"]})


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"count": 1}}',
        ' [{"name": "f", "parameters": {"count": 1}}]\n',
        '{"type": "function", "name": "f", "parameters": {"count": 1}}',
        '{"type": "function", "function": {"name": "f", "arguments": "{\\"count\\": 1}"}}',
        '{"function": {"name": "f", "arguments": {"count": 1}}}',
        '<|python_tag|>{"name": "f", "parameters": {"count": 1}}',
        '```json\n{"name": "f", "arguments": {"count": 1}}\n```',
        "[f(count=1)]",
        "<|python_start|>[f(count=1)]<|python_end|>",
    ],
)
def test_an_answer_that_is_a_call_without_marks(text):
    reader = CallReader(None, [FITTING])
    states = [reader.bare_call_state(text[:at]) for at in range(len(text) + 1)]
    assert "no" not in states
    assert states[-1] == "begun"
    assert reader.read_bare(text) == [call(count=1)]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "g", "arguments": {"count": 1}}',
        '{"name": "f", "arguments": {"count": "many"}}',
        '{"name": "f"}',
        '{"name": "f", "arguments": {"count": 1}, "note": ""}',
        '{"name": "f", "arguments": {"count": 1}} is a call.',
        '{"name": "f", "arguments": {"count": 1}',
        '{"temperature": 1}',
        '{"name": "fire", "arguments": {"count": 1}}',
        'Call {"name": "f", "arguments": {"count": 1}}',
        "[g(count=1)]",
        "f(count=1)",
        "[1, 2]",
    ],
)
def test_an_answer_that_is_no_call(text):
    reader = CallReader(None, [FITTING])
    assert reader.bare_call_state(text) == "no" or reader.read_bare(text) == []


def test_schemas_are_checked_in_bounded_time():
    levels = {f"l{n}": {"allOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 2} for n in range(40)}
    schema = {"$defs": {**levels, "l40": {}}, "$ref": "#/$defs/l0"}
    slow = Tool("f", "", schema, strict=True)
    text = '{"name": "f", "arguments": {}}'
    assert read(text, tool=slow) == [OutputPart("text", text)]
    unevaluated = {**schema, "unevaluatedProperties": False}
    assert read(text, tool=replace(slow, parameters=unevaluated))[0].text


def test_tags_of_a_form_that_only_the_template_states_are_no_text():
    form = CallForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
    reader = CallReader(None, [TOOL], form)
    block = '\n{"name": "f", "arguments": {"count": 1}}\n</tool_call>'
    assert reader.read(block) == [call(count=1)]
    assert reader.read(f"{block}\n<tool_call>{block} and words") == [
        call(count=1),
        call(count=1),
        OutputPart("text", "\n and words"),
    ]
