"""Tools together with a format: the answer is calls, or it matches the form; in every API."""

from collections.abc import Iterator
from typing import Any

import pytest

from support.scripted_app import ScriptedServer, ask_chat, ask_messages, ask_responses, write_model

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}"
    '<tool_call>{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}}
SCHEMA = {
    "type": "object",
    "properties": {"rain": {"type": "boolean"}},
    "required": ["rain"],
    "additionalProperties": False,
}
APIS = {
    "chat": (
        ask_chat,
        {
            "tools": [
                {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
            ],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "forecast", "schema": SCHEMA},
            },
        },
        {"stop": "stop", "length": "length", "calls": "tool_calls"},
    ),
    "responses": (
        ask_responses,
        {
            "tools": [{"type": "function", "name": "weather", "parameters": PARAMETERS}],
            "text": {"format": {"type": "json_schema", "name": "forecast", "schema": SCHEMA}},
        },
        {"stop": "completed", "length": "incomplete", "calls": "completed"},
    ),
    "messages": (
        ask_messages,
        {
            "tools": [{"name": "weather", "input_schema": PARAMETERS}],
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        },
        {"stop": "end_turn", "length": "max_tokens", "calls": "tool_use"},
    ),
}
FORM = '{"rain": true}'
CALL = '<tool_call>{"name": "weather", "arguments": {"place": "Oslo"}}</tool_call>'
CALLED = ("weather", {"place": "Oslo"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    folder = tmp_path_factory.mktemp("scripted")
    model = write_model(folder / "house", TEMPLATE, ("<think>", "</think>"))
    server = ScriptedServer(model, folder)
    yield server
    server.close()


@pytest.fixture(params=[(api, stream) for api in APIS for stream in (False, True)], ids=str)
def ask(request: pytest.FixtureRequest, server: ScriptedServer) -> Any:
    """Asks for what is written without a grammar; with one it is FORM, or "forced"."""
    api, stream = request.param
    function, fields, reasons = APIS[api]

    def ask(written: str, forced: str = FORM, **more: Any) -> Any:
        def script(_: str, has_grammar: bool) -> str:
            return forced if has_grammar else written

        return function(server, stream, script, **{**fields, **more})

    ask.reasons = reasons
    ask.limit = "max_output_tokens" if api == "responses" else "max_tokens"
    ask.required = {"type": "any"} if api == "messages" else "required"
    return ask


@pytest.mark.parametrize(
    ("written", "reasoning", "called"),
    [
        (CALL, "", [CALLED]),
        (f"{CALL}\n{CALL}", "", [CALLED, CALLED]),
        (f"<think>Hm.</think>\n\n{CALL}", "Hm.", [CALLED]),
        (f"I look.\n{CALL}", "", [CALLED]),
        (f"{CALL}\nI have looked.", "", [CALLED]),
        (FORM, "", []),
        ("It rains.", "", []),
        ("<think>Hm.</think>\n\nIt rains.", "Hm.", []),
        ("<think>Hm.", "Hm.", []),
        ("```json\n{}\n```", "", []),
        ("<tool_call>{broken}</tool_call>", "", []),
        ("", "", []),
        ("a" * 300, "", []),
    ],
)
def test_an_answer_is_calls_or_matches_the_form(ask, written, reasoning, called):
    text, reason = ("", "calls") if called else (FORM, "stop")
    assert ask(written) == (reasoning, text, called, ask.reasons[reason])


def test_the_limit_of_tokens_is_for_what_is_sent(ask, server):
    form_tokens = len(server.group.tokenizer.encode(FORM)) + 1
    preface = "a" * form_tokens
    answer = ask(preface, **{ask.limit: form_tokens})
    assert answer == ("", FORM, [], ask.reasons["stop"])
    answer = ask(preface, **{ask.limit: form_tokens - 4})
    assert (FORM.startswith(answer[1]), *answer[2:]) == (True, [], ask.reasons["length"])
    reasoning, text, calls, reason = ask(CALL, **{ask.limit: 20})
    assert (reasoning, CALL.startswith(text), calls, reason) == (
        "",
        True,
        [],
        ask.reasons["length"],
    )


def test_forced_calls_come_before_a_format(ask):
    forced = '[{"name": "weather", "arguments": {"place": "Oslo"}}]'
    answer = ask("", forced, tool_choice=ask.required)
    assert answer == ("", "", [CALLED], ask.reasons["calls"])


def test_tokens_and_choices_are_those_that_are_sent(server):
    def script(_: str, has_grammar: bool) -> str:
        return FORM if has_grammar else "Let me see."

    fields = {**APIS["chat"][1], "n": 2, "logprobs": True}
    body = {"messages": [{"role": "user", "content": "Weather?"}], **fields}
    answer = server.ask("/v1/chat/completions", body, script).json()
    sent = len(server.group.tokenizer.encode(FORM)) + 1
    assert answer["usage"]["completion_tokens"] == 2 * sent
    for choice in answer["choices"]:
        assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == FORM
    prompts = [server.group.tokenizer.decode(r.tokens) for r in server.group.requests]
    assert len(prompts) == 4
    assert len(set(prompts)) == 1
