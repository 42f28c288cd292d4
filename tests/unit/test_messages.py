"""Messages are changed for a template only where it cannot render them."""

import json

import jinja2
import pytest

from cenacle.text.messages import TemplateTraits, adapt_messages, probe_template

SYSTEM_FIRST = """{% for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ fail() }}{% endif %}{{ m.role }}: {{ m.content }}
{% endfor %}"""
NO_SYSTEM = """{% for m in messages %}{% if m.role == 'system' %}{{ fail() }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ fail() }}{% endif %}{{ m.content }}
{% endfor %}"""
ONLY_FIRST = "{{ messages[0].content }}{% for m in messages[1:] %}{% if m.role != 'system' %}\
{{ m.content }}{% endif %}{% endfor %}"
ANY = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEXT_ARGUMENTS = ANY.replace(
    "\n{%",
    "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}\n{%",
)


def renderer(template: str):
    def fail():
        raise jinja2.TemplateError("refused")

    compiled = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).from_string(template)
    return lambda messages: compiled.render(messages=list(messages), fail=fail)


def adapted(template: str, *messages):
    return adapt_messages(messages, probe_template(template, renderer(template)))


def say(role, content, **rest):
    return {"role": role, "content": content, **rest}


LATE = (say("system", "A"), say("system", "B"), say("user", "x"), say("system", "C"))


@pytest.mark.parametrize("template", [SYSTEM_FIRST, ONLY_FIRST])
def test_systems_join_the_first(template):
    messages = adapted(template, *LATE, say("user", "y"))
    assert messages[0] == say("system", "A\n\nB\n\nC")
    assert [m["content"] for m in messages[1:]] == ["x", "y"]
    assert adapted(template, say("user", "x"), say("system", "A")) == [
        say("system", "A"),
        say("user", "x"),
    ]


def test_without_a_system_role_its_text_joins_the_user():
    messages = adapted(NO_SYSTEM, *LATE, say("user", "y"), say("assistant", "z"))
    assert messages == [say("user", "A\n\nB\n\nC\n\nx\n\ny"), say("assistant", "z")]


def test_what_a_template_renders_stays():
    assert adapted(ANY, *LATE) == list(LATE)


def test_arguments_are_text_where_a_template_joins_them():
    call = {"id": "1", "function": {"name": "f", "arguments": {"a": "é"}}}
    messages = [say("user", "x"), say("assistant", "", tool_calls=[call])]
    (_, changed) = adapted(TEXT_ARGUMENTS, *messages)
    assert json.loads(changed["tool_calls"][0]["function"]["arguments"]) == {"a": "é"}
    assert call["function"]["arguments"] == {"a": "é"}


@pytest.mark.parametrize("rest", ["\n\nYou help.", "\nYou help."])
def test_a_billing_line_does_not_reach_the_prompt(rest):
    line = "x-anthropic-billing-header: cc_version=2.0; cch=0a1b2;"
    messages = adapt_messages([say("system", line + rest), say("user", line)], TemplateTraits())
    assert messages == [say("system", "You help."), say("user", line)]
    assert adapt_messages([say("system", line), say("user", "x")], TemplateTraits()) == [
        say("user", "x")
    ]


OBJECT_ARGUMENTS = ANY.replace(
    "\n{%",
    """{% for c in m.tool_calls %}{{ c.function.name }}
{%- for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}{% endfor %}\n{%""",
)
EITHER_ARGUMENTS = OBJECT_ARGUMENTS.replace(
    "{%- for",
    """{% if c.function.arguments is string %}{{ c.function.arguments }}{% continue %}{% endif %}
{%- for""",
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (OBJECT_ARGUMENTS, {"arguments": '{"a'}),
        (EITHER_ARGUMENTS, '{"a'),
        (TEXT_ARGUMENTS, '{"a'),
    ],
)
def test_arguments_that_are_no_object_reach_any_template(template, expected):
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a'}}
    (_, message) = adapted(template, say("user", "x"), say("assistant", "", tool_calls=[call]))
    assert message["tool_calls"][0]["function"]["arguments"] == expected
