"""Anthropic's Messages API as plain data. The bodies are what the official client was seen to send;
what is answered is read by the official client's own types."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from anthropic import types
from pydantic import TypeAdapter

from cenacle.core.chat import FinishReason, OutputPart, Usage
from cenacle.errors import CenacleError, ClusterError, InputError
from cenacle.server.api import anthropic
from cenacle.server.api.protocol import ChoiceState, GenerationRequest, ResponseMeta, ServedModel
from cenacle.server.api.validation import RequestError

SERVED = ServedModel("house", 100, 50)
API = anthropic.MessagesAdapter()
META = ResponseMeta("1", 7, "house", "fp_1")
STOP, LENGTH = FinishReason("stop"), FinishReason("length")
EVENT: TypeAdapter[Any] = TypeAdapter(types.RawMessageStreamEvent)
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}}
TOOL = {"name": "weather", "description": "Look outside", "input_schema": SCHEMA}

# As anthropic.Anthropic().messages.create sends it in the second round of a loop.
LOOP: dict[str, Any] = {
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "Weather in Oslo?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Ask.", "signature": ""},
                {"type": "text", "text": "Let me look.", "citations": None},
                {
                    "id": "toolu_1_0",
                    "caller": None,
                    "input": {"place": "Oslo"},
                    "name": "weather",
                    "type": "tool_use",
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1_0", "content": "rain"},
                {"type": "text", "text": "And tomorrow?"},
            ],
        },
    ],
    "tools": [TOOL],
}


TOOL_USE = {"type": "tool_use", "id": "t", "name": "weather", "input": {"place": "Oslo"}}


def parse(**fields: Any) -> GenerationRequest:
    body = {"model": "house", "max_tokens": 9, "messages": HELLO, **fields}
    return API.parse(json.dumps(body).encode(), SERVED)


def test_a_plain_question() -> None:
    request = parse(temperature=0.5, top_k=3, top_p=0.5, stop_sequences=["a"], stream=True)
    assert request.prompts == (tuple(HELLO),)
    assert (request.max_tokens, request.stop, request.stream) == (9, ("a",), True)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.5)
    assert parse(metadata={"user_id": "me", "x": 1}) == parse()


def test_a_round_of_tools_becomes_messages() -> None:
    function = {"name": "weather", "arguments": {"place": "Oslo"}}
    assert parse(**LOOP).prompts[0] == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Oslo?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "Ask.",
            "tool_calls": [{"id": "toolu_1_0", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "toolu_1_0", "content": "rain"},
        {"role": "user", "content": "And tomorrow?"},
    )


def test_messages_of_one_role_make_one_turn_and_a_last_one_of_the_assistant_is_continued() -> None:
    one, two = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
    begun = {"role": "assistant", "content": "It is"}
    request = parse(messages=[one, two, begun])
    assert request.prompts[0] == ({"role": "user", "content": "a\nb"}, begun)
    assert request.continue_final_message
    assert not parse().continue_final_message
    rule = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert parse(messages=[one, rule]).prompts[0][1]["content"] == "Be brief."  # type: ignore


def test_tool_errors_are_marked() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "is_error": True, "content": [TEXT]}
    messages = [{"role": "user", "content": [result]}]
    (message,) = parse(messages=messages).prompts[0]
    assert message == {"role": "tool", "tool_call_id": "t", "content": "Error: no"}


TEXT = {"type": "text", "text": "no"}


def test_the_choice_of_tools() -> None:
    free = parse(tools=[TOOL])
    assert (len(free.tools), free.forced_call, free.grammar) == (1, None, None)
    every = parse(tools=[TOOL], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert (every.forced_call, every.parallel_tool_calls, every.grammar is not None) == (
        "required",
        False,
        True,
    )
    named = parse(tools=[{**TOOL, "strict": True}], tool_choice={"type": "tool", "name": "weather"})
    assert (named.forced_call, named.grammar is not None) == ("weather", True)
    assert parse(tools=[TOOL], tool_choice={"type": "none"}).tools == ()


def test_thinking() -> None:
    enabled = parse(max_tokens=5000, thinking={"type": "enabled", "budget_tokens": 1024})
    assert (enabled.enable_thinking, enabled.thinking_budget) == (True, 1024)
    assert parse(thinking={"type": "disabled"}).enable_thinking is False
    assert parse(thinking={"type": "adaptive"}).enable_thinking is None


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"model": None}, "model: required"),
        ({"max_tokens": None}, "max_tokens: required"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"temperature": 1.5}, "temperature: expected at most 1, got 1.5"),
        ({"stop_sequences": "a"}, "stop_sequences: expected a list"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens: required"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "less than max_tokens=9"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: expected tools"),
        ({"messages": []}, "messages: expected at least 1 item, got 0"),
        ({"messages": LOOP["messages"][:2]}, "messages: expected a tool_result"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content[0].source"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: required"),
    ],
)
def test_refused_parameters_are_named(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(**fields)
    status, body = anthropic.render_error(caught.value)
    assert (status, body["type"]) == (400, "error")
    assert body["error"]["type"] == "invalid_request_error"
    assert word in body["error"]["message"]


def test_what_clients_send_beside_the_question_is_ignored_and_named() -> None:
    extra: dict[str, Any] = {
        "container": "c",
        "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
        "mcp_servers": [{"type": "url", "url": "https://example.org", "name": "x"}],
        "service_tier": "auto",
        "betas": ["x"],
    }
    request = parse(**extra)
    assert request.warnings == tuple(f"{name}: ignored" for name in extra)
    assert replace(request, warnings=()) == parse()


def test_tools_of_anthropics_servers_are_left_out() -> None:
    hosted = [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"},
    ]
    tool = {
        **TOOL,
        "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"},
        "defer_loading": True,
        "eager_input_streaming": True,
        "input_examples": [{}],
    }
    request = parse(tools=[hosted[0], tool, hosted[1]])
    assert [offered.name for offered in request.tools] == [TOOL["name"]]
    forced = parse(tools=[*hosted, tool], tool_choice={"type": "tool", "name": "web_search"})
    assert forced.forced_call is None


def test_blocks_as_clients_keep_them() -> None:
    document = {"type": "document", "title": "T", "source": {"type": "text", "data": "body"}}
    messages = [
        {"role": "user", "content": [document, {"type": "text", "text": "q", "citations": None}]},
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "x"},
                {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
                {"type": "text", "text": "a", "citations": [{"type": "char_location"}]},
                {**TOOL_USE, "caller": {"type": "direct"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t", "content": [document]}],
        },
    ]
    system = [{"type": "text", "text": "s", "cache_control": {"type": "x", "ttl": "9h"}}]
    first, asked, answered, result = parse(system=system, messages=messages).prompts[0]
    assert first == {"role": "system", "content": "s"}
    assert asked["content"] == "T\n\nbodyq"  # type: ignore[index]
    assert answered["content"] == "a"  # type: ignore[index]
    assert len(answered["tool_calls"]) == 1  # type: ignore[index]
    assert result["content"] == "T\n\nbody"  # type: ignore[index]


def test_effort_and_both_places_of_a_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    assert parse(output_config={"effort": "max"}).reasoning_effort == "max"
    assert parse(output_format=form).grammar == parse(output_config={"format": form}).grammar


def test_errors_have_anthropics_types() -> None:
    def kind(error: CenacleError) -> tuple[int, str]:
        status, body = anthropic.render_error(error)
        return status, body["error"]["type"]

    with pytest.raises(InputError) as other_model:
        parse(model="claude")
    assert kind(other_model.value) == (404, "not_found_error")
    assert kind(ClusterError("gone")) == (503, "overloaded_error")
    assert kind(CenacleError("oh")) == (500, "api_error")
    assert kind(RequestError(None, "big", status=413)) == (413, "request_too_large")


PARTS = [
    OutputPart("reasoning", "Hm"),
    OutputPart("text", "It "),
    OutputPart("text", "rains"),
    OutputPart("call", '{"place": "Oslo"}', "weather"),
]


def assemble(parts: list[OutputPart], finish: FinishReason, usage: Usage) -> Any:
    """The message that the official client makes of a stream."""
    from anthropic.lib.streaming._messages import accumulate_event

    builder = API.respond(parse(stream=True), META)
    events = [*builder.first_events(0, Usage(usage.prompt_tokens, 0))]
    for part in parts:
        events += builder.delta(0, part)
    events += [*builder.finish_choice(0, finish), *builder.finish_stream(usage)]
    message: Any = None
    pieces: dict[int, bytes] = {}  # of the JSON of calls
    for name, data in events:
        assert isinstance(data, dict)
        assert name == data["type"]
        event = EVENT.validate_python(data)
        message = accumulate_event(event=event, current_snapshot=message, json_bufs=pieces)
    return message


@pytest.mark.parametrize(
    ("parts", "finish", "why"),
    [
        (PARTS, STOP, "tool_use"),
        (PARTS[:3], STOP, "end_turn"),
        (PARTS[:2], LENGTH, "max_tokens"),
        (PARTS[:2], FinishReason("string", "ra"), "stop_sequence"),
        ([], STOP, "end_turn"),
    ],
)
def test_a_stream_makes_the_whole_message(
    parts: list[OutputPart], finish: FinishReason, why: str
) -> None:
    usage = Usage(7, 3, 5)
    whole = API.respond(parse(), META).full_response([ChoiceState(0, parts, finish)], usage)
    message = types.Message.model_validate(whole)
    assert (message.stop_reason, message.stop_sequence) == (why, finish.string)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (2, 5)
    streamed = assemble(parts, finish, usage)
    assert streamed.model_dump(exclude={"usage"}) == message.model_dump(exclude={"usage"})
    assert streamed.usage.output_tokens == 3


def test_the_blocks_of_a_message() -> None:
    whole = API.respond(parse(), META).full_response([ChoiceState(0, PARTS, STOP)], Usage(7, 3))
    assert whole["content"] == [
        {"type": "thinking", "thinking": "Hm", "signature": ""},
        {"type": "text", "text": "It rains"},
        {"type": "tool_use", "id": "toolu_1_0", "name": "weather", "input": {"place": "Oslo"}},
    ]


def test_a_failure_in_the_middle() -> None:
    ((name, data),) = API.respond(parse(), META).error(ClusterError("gone"))
    assert isinstance(data, dict)
    assert (name, data["error"]["message"]) == ("error", "gone")


def test_counting_needs_no_limit() -> None:
    body = {"model": "house", "messages": HELLO, "system": "x", "tools": [TOOL]}
    request = anthropic.CountTokensAdapter().parse(json.dumps(body).encode(), SERVED)
    assert request.prompts[0][0] == {"role": "system", "content": "x"}
    assert anthropic.CountTokensAdapter().parse(
        json.dumps({**body, "max_tokens": 1}).encode(), SERVED
    ).warnings == ("max_tokens: ignored",)


def test_going_on_with_a_thread_is_refused_in_words_that_clients_know() -> None:
    """anthropic's tool runner then sends the whole conversation."""
    with pytest.raises(RequestError) as caught:
        parse(thread={"type": "continue", "previous_message_id": "msg_1"})
    status, body = API.render_error(caught.value)
    assert status == 400
    assert body["error"]["details"]["error_code"] == "thread_not_found"
    parse(thread={"type": "create"})


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_nothing_looks_at_each_character_of_a_long_message(role):
    message = {"role": role, "content": "ab " * 3_000_000}
    body = json.dumps({"model": "house", "max_tokens": 1, "messages": [*HELLO, message]}).encode()
    began = time.thread_time()
    API.parse(body, SERVED)
    assert time.thread_time() - began < 1.0
