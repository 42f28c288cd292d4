"""Half a character is refused in every string of every API, also inside arguments and schemas."""

import json

import pytest

from cenacle.errors import InputError
from cenacle.server.api.anthropic import MessagesRequest
from cenacle.server.api.openai import ChatCompletionRequest
from cenacle.server.api.openai_responses import ResponsesRequest
from cenacle.server.api.protocol import ServedModel
from cenacle.server.api.validation import parse_request

SERVED = ServedModel("m", 100, 10)
SCHEMA = {"type": "object", "properties": {"X": {"type": "string", "description": "X"}}}
CHAT = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "X"},
        {"role": "user", "content": [{"type": "text", "text": "X"}]},
        {
            "role": "assistant",
            "reasoning_content": "X",
            "tool_calls": [
                {
                    "id": "X",
                    "type": "function",
                    "function": {"name": "f", "arguments": json.dumps({"a": ["X"]})},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "X", "content": "X"},
        {"role": "user", "content": "X"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "f", "description": "X", "parameters": SCHEMA},
        }
    ],
    "chat_template_kwargs": {"a": {"b": ["X"]}},
    "stop": ["X"],
    "user": "X",
}
MESSAGES = {
    "model": "m",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "X"}],
    "messages": [
        {"role": "user", "content": "X"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "X", "name": "f", "input": {"a": ["X"]}}],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "X", "content": "X"}],
        },
    ],
    "tools": [{"name": "f", "description": "X", "input_schema": SCHEMA}],
    "stop_sequences": ["X"],
    "metadata": {"user_id": "X"},
}
RESPONSES = {
    "model": "m",
    "instructions": "X",
    "input": [
        {"role": "user", "content": "X"},
        {
            "type": "function_call",
            "call_id": "X",
            "name": "f",
            "arguments": json.dumps({"a": ["X"]}),
        },
        {"type": "function_call_output", "call_id": "X", "output": "X"},
    ],
    "tools": [{"type": "function", "name": "f", "description": "X", "parameters": SCHEMA}],
}
BODIES = [
    (ChatCompletionRequest, CHAT),
    (MessagesRequest, MESSAGES),
    (ResponsesRequest, RESPONSES),
]


@pytest.mark.parametrize(("model", "body"), BODIES)
def test_half_a_character_is_refused_wherever_it_is(model, body):
    text = json.dumps(body)
    places = [at for at, letter in enumerate(text) if letter == "X"]
    for at in places:
        inside = text.rfind("\\", 0, at) > text.rfind("[", 0, at) > 0 and text[at - 1] == '"'
        escape = "\\\\ud800" if inside and text[at - 2] == "\\" else "\\ud800"
        with pytest.raises(InputError):
            parse_request(model, (text[:at] + escape + text[at + 1 :]).encode())


@pytest.mark.parametrize(("model", "body"), BODIES)
@pytest.mark.parametrize("letter", ["\0", "\ufffe", "\U0001f600"])
def test_other_letters_are_accepted(model, body, letter):
    text = json.dumps(body).replace("X", json.dumps(letter)[1:-1])
    # Inside arguments, which are JSON as text, the escape is escaped once more.
    text = text.replace(
        '\\"' + json.dumps(letter)[1:-1], '\\"' + json.dumps(letter)[1:-1].replace("\\", "\\\\")
    )
    request = parse_request(model, text.encode()).to_generation_request(SERVED)
    assert letter in str(request.prompts[0]) or repr(letter)[1:-1] in repr(request.prompts[0])
