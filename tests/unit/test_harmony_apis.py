"""gpt-oss's channels through every API, streamed and not: a group plays its tokens."""

from collections.abc import Iterator
from typing import Any

import pytest

from support.harmony_model import MARKS, TEMPLATE
from support.scripted_app import ScriptedServer, ask_chat, ask_messages, ask_responses, write_model

PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
NAMES = ("weather", "time")
FORM = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"]}
CHAT_TOOLS = [{"type": "function", "function": {"name": n, "parameters": PLACE}} for n in NAMES]
APIS: dict[str, Any] = {
    "chat": {
        "ask": ask_chat,
        "tools": CHAT_TOOLS,
        "required": "required",
        "named": {"type": "function", "function": {"name": "time"}},
        "format": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "forecast", "schema": FORM},
            }
        },
        "reasons": ("stop", "tool_calls"),
    },
    "responses": {
        "ask": ask_responses,
        "tools": [{"type": "function", "name": n, "parameters": PLACE} for n in NAMES],
        "required": "required",
        "named": {"type": "function", "name": "time"},
        "format": {"text": {"format": {"type": "json_schema", "name": "f", "schema": FORM}}},
        "reasons": ("completed", "completed"),
    },
    "messages": {
        "ask": ask_messages,
        "tools": [{"name": n, "input_schema": PLACE} for n in NAMES],
        "required": {"type": "any"},
        "named": {"type": "tool", "name": "time"},
        "format": {"output_config": {"format": {"type": "json_schema", "schema": FORM}}},
        "reasons": ("end_turn", "tool_use"),
    },
}
THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|>"
NEXT = "<|start|>assistant"
CALL = (
    '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"place": "Oslo"}'
    "<|call|>"
)
ANSWER = "<|channel|>final<|message|>Rain.<|return|>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    folder = tmp_path_factory.mktemp("harmony")
    server = ScriptedServer(write_model(folder / "oss", TEMPLATE, special=MARKS), folder)
    yield server
    server.close()


@pytest.fixture(params=[(api, stream) for api in APIS for stream in (False, True)], ids=str)
def api(request: pytest.FixtureRequest, server: ScriptedServer) -> Any:
    name, stream = request.param
    fields = dict(APIS[name])

    def ask(script: Any, **more: Any) -> Any:
        played = script if callable(script) else lambda *_: script
        return APIS[name]["ask"](server, stream, played, **more)

    return {**fields, "ask": ask, "name": name}


def prompts(server: ScriptedServer) -> list[str]:
    return [server.group.tokenizer.decode(r.tokens) for r in server.group.requests]


def test_reasoning_text_and_calls_are_apart(api):
    stop, called = api["reasons"]
    assert api["ask"](f"{THOUGHT}{NEXT}{ANSWER}") == ("Hm.", "Rain.", [], stop)
    calls = [("weather", {"place": "Oslo"})]
    preamble = f"<|channel|>commentary<|message|>I look.<|end|>{NEXT}"
    answer = api["ask"](f"{THOUGHT}{NEXT}{preamble}{CALL}", tools=api["tools"])
    assert answer == ("Hm.", "I look.", calls, called)


@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_forced_call_is_in_the_models_own_format(api, server, choice):
    def script(prompt: str, has_grammar: bool) -> str:
        if not has_grammar:
            return "Hm.<|end|>"
        return 'time <|constrain|>json<|message|>{"place": "Rome"}<|call|>'

    answer = api["ask"](script, tools=api["tools"], tool_choice=api[choice])
    assert answer == ("Hm.", "", [("time", {"place": "Rome"})], api["reasons"][1])
    reasoning, forced = prompts(server)
    assert reasoning.endswith(f"{NEXT}<|channel|>analysis<|message|>")
    assert forced.endswith(f"Hm.<|end|>{NEXT}<|channel|>commentary to=functions.")


def test_a_forced_call_without_reasoning(server):
    def script(prompt: str, has_grammar: bool) -> str:
        assert has_grammar
        return 'weather <|constrain|>json<|message|>{"place": "Rome"}<|call|>'

    fields = {"tools": CHAT_TOOLS, "tool_choice": "required", "reasoning_effort": "none"}
    answer = ask_chat(server, True, script, **fields)
    assert answer == ("", "", [("weather", {"place": "Rome"})], "tool_calls")


def test_a_format_is_for_the_final_channel(api, server):
    def script(prompt: str, has_grammar: bool) -> str:
        if has_grammar:
            return '{"rain": true}'
        return "Hm.<|end|>" if prompt.endswith("<|message|>") else f"{THOUGHT}{NEXT}{ANSWER}"

    for more in ({}, {"tools": api["tools"]}):
        answer = api["ask"](script, **api["format"], **more)
        assert answer == ("Hm.", '{"rain": true}', [], api["reasons"][0])
        ending = f"analysis<|message|>Hm.<|end|>{NEXT}<|channel|>final<|message|>"
        assert prompts(server)[-1].endswith(ending)
    called = api["ask"](f"{THOUGHT}{NEXT}{CALL}", tools=api["tools"], **api["format"])
    assert called == ("Hm.", "", [("weather", {"place": "Oslo"})], api["reasons"][1])


def test_a_conversation_goes_on_from_its_calls(server):
    def script(*_: Any) -> str:
        return ANSWER

    call = {"name": "weather", "arguments": '{"place": "Oslo"}'}
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c1", "type": "function", "function": call}],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]
    ask_chat(server, False, script, messages=messages, tools=CHAT_TOOLS)
    expected = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.weather"
        '<|channel|>commentary json<|message|>{"place": "Oslo"}<|call|>'
        '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"rain"<|end|>'
        "<|start|>assistant"
    )
    (chat,) = prompts(server)
    assert chat.endswith(expected)
    thought = {"type": "reasoning_text", "text": "Hm."}
    items = [
        {"role": "user", "content": "Weather?"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [thought],
        },
        {"type": "function_call", "call_id": "c1", **call},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    ask_responses(server, False, script, input=items, tools=APIS["responses"]["tools"])
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "rain"}
    blocks = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {
                    "type": "tool_use",
                    "id": "c1",
                    "name": "weather",
                    "input": {"place": "Oslo"},
                },
            ],
        },
        {
            "role": "user",
            "content": [result],
        },
    ]
    (response,) = prompts(server)
    ask_messages(server, False, script, messages=blocks, tools=APIS["messages"]["tools"])
    (message,) = prompts(server)
    assert response.endswith(expected)
    assert message.endswith(expected)
