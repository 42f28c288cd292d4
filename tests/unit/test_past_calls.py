"""Calls of earlier turns as agents send them back, whatever the model wrote."""

import json
from typing import Any

import pytest

from cenacle.server.api.anthropic import MessagesAdapter
from cenacle.server.api.openai import ChatCompletionsAdapter
from cenacle.server.api.openai_responses import ResponsesAdapter
from cenacle.server.api.protocol import ServedModel

SERVED = ServedModel("house", 1000, 400)
UNREADABLE = [
    '{"path": "a',
    '{"a": 1}{"b": 2}',
    '{"a": NaN}',
    "{'a': 1}",
    "[1, 2]",
    '"text"',
    "42",
    "ls -l",
    "[" * 5000,
    '{"a": %s}' % ("9" * 5000),
]


def say(role: str, content: Any, **rest: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **rest}


def arguments_in(adapter: Any, body: dict[str, Any]) -> Any:
    request = adapter.parse(
        json.dumps({"model": "house", "max_tokens": 5, **body}).encode(), SERVED
    )
    (call,) = request.prompts[0][1]["tool_calls"]
    return call["function"]["arguments"]


def replay(text: Any) -> list[Any]:
    """What each API's messages have as arguments."""
    ask: dict[str, Any] = {"role": "user", "content": "x"}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}}
    chat = [ask, say("assistant", None, tool_calls=[call]), say("tool", "bad", tool_call_id="c")]
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": text}
    result = {"type": "function_call_output", "call_id": "c", "output": "bad"}
    use = {"type": "tool_use", "id": "c", "name": "f", "input": text}
    blocks = [{"type": "tool_result", "tool_use_id": "c", "content": "bad"}]
    return [
        arguments_in(ChatCompletionsAdapter(), {"messages": chat}),
        arguments_in(ResponsesAdapter(), {"input": [ask, item, result]}),
        arguments_in(
            MessagesAdapter(), {"messages": [ask, say("assistant", [use]), say("user", blocks)]}
        ),
    ]


@pytest.mark.parametrize("text", UNREADABLE)
def test_arguments_that_are_no_object_stay_as_the_model_wrote_them(text: str) -> None:
    assert replay(text) == [text] * 3


@pytest.mark.parametrize(
    ("text", "arguments"),
    [("", {}), (" \n", {}), ("null", {}), (None, {}), ('{"a": "b\nc"}', {"a": "b\nc"})],
)
def test_arguments_that_can_be_read_are_objects(text: Any, arguments: dict[str, Any]) -> None:
    assert replay(text) == [arguments] * 3
