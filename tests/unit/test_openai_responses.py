"""OpenAI's Responses API as plain data. The bodies are what the official clients were seen to send;
what is answered is read by the official client's own types."""

import json
from typing import Any, get_args

import pytest
from openai.types import responses as types

from cenacle.core.chat import FinishReason, OutputPart, TokenLogprob, Usage
from cenacle.errors import ClusterError, InputError
from cenacle.server.api import openai, openai_responses
from cenacle.server.api.protocol import ChoiceState, GenerationRequest, ResponseMeta, ServedModel

SERVED = ServedModel("house", 100, 50)
API = openai_responses.ResponsesAdapter()
META = ResponseMeta("1", 7, "house", "fp_1")
STOP, LENGTH = FinishReason("stop"), FinishReason("length")
# The client's own types of events, by name.
EVENTS = {
    get_args(event.model_fields["type"].annotation)[0]: event
    for event in get_args(get_args(types.ResponseStreamEvent)[0])
}

# As openai.OpenAI().responses.create(input=..., tools=[openai.pydantic_function_tool(...)]) sends
# it in the second round of a loop, the first answer's output given back.
LOOP: dict[str, Any] = {
    "model": "house",
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": "Weather in Oslo?"},
        {
            "id": "rs_0_0",
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Ask."}],
            "encrypted_content": None,
            "status": "completed",
        },
        {
            "arguments": '{"place":"Oslo"}',
            "call_id": "call_0_1",
            "name": "weather",
            "type": "function_call",
            "id": "fc_0_1",
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "call_0_1", "output": "rain"},
    ],
    "tools": [
        {
            "type": "function",
            "name": "weather",
            "description": "Look outside",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
            "strict": False,
        }
    ],
    "store": False,
    "stream": True,
}

CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}


def parse(**fields: Any) -> GenerationRequest:
    return API.parse(json.dumps({"input": "hello", **fields}).encode(), SERVED)


def refused(**fields: Any) -> tuple[str | None, str | None]:
    with pytest.raises(InputError) as caught:
        parse(**fields)
    error = openai.render_error(caught.value)[1]["error"]
    return error["param"], error["code"]


def test_a_plain_question() -> None:
    request = parse(max_output_tokens=5, temperature=0, seed=3, metadata={"a": "b"}, user="me")
    assert request.prompts == (({"role": "user", "content": "hello"},),)
    assert (request.max_tokens, request.sampling.temperature, request.sampling.seed) == (5, 0, 3)
    assert request.echoed_parameters["metadata"] == {"a": "b"}
    assert request.is_chat


def test_a_round_of_tools_becomes_messages() -> None:
    request = parse(**LOOP)
    function = {"name": "weather", "arguments": {"place": "Oslo"}}
    assert request.prompts[0] == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Oslo?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Ask.",
            "tool_calls": [{"id": "call_0_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_0_1", "content": "rain"},
    )
    assert [tool.name for tool in request.tools] == ["weather"]
    assert request.stream


def test_items_of_one_turn_of_the_assistant_make_one_message() -> None:
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
    message = {"role": "assistant", "content": "a"}
    first, second = parse(input=[thought, message, thought, CALL, CALL, message]).prompts[0]
    assert first == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "Hm.Hm.",
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}},
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}},
        ],
    }
    assert second == message


def test_messages_of_parts_and_a_conversation() -> None:
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "user", "content": "b"},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "c", "annotations": [], "logprobs": []},
            ],
        },
    ]
    assert parse(input=items).prompts[0] == (
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    )


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"previous_response_id": "r"}, "previous_response_id", "previous_response_not_found"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id", "item_not_found"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"conversation": "c"}, "conversation", "unsupported_parameter"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"stop": "x"}, "stop", "unsupported_parameter"),
        ({"input": [IMAGE]}, "input[0].content[0].image_url", "invalid_value"),
        ({"input": []}, "input", "missing"),
        ({"input": 3}, "input", "invalid_type"),
        ({"input": [{"role": "tool", "content": ""}]}, "input[0].role", "invalid_value"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "missing"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"input": [{**CALL, "arguments": 3}]}, "input[0].arguments", "invalid_type"),
    ],
)
def test_refused_parameters_are_named(fields: dict[str, Any], param: str, code: str) -> None:
    field, message = refused(**fields)
    assert field == param
    assert message is not None
    assert message.startswith(code)


def test_formats_and_forced_calls_become_grammars() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    request = parse(text={"format": form})
    assert request.grammar is not None
    assert request.echoed_parameters["text"] == {"format": form}
    forced = parse(tools=LOOP["tools"], tool_choice={"type": "function", "name": "weather"})
    assert (forced.forced_call, forced.grammar is not None) == ("weather", True)
    among = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "weather"}],
    }
    some = parse(tools=LOOP["tools"], tool_choice=among)
    assert ([tool.name for tool in some.tools], some.forced_call) == (["weather"], "required")
    assert some.echoed_parameters["tool_choice"] == among


PARTS = [
    OutputPart("reasoning", "Hm"),
    OutputPart("reasoning", "."),
    OutputPart(
        "text", "It ", logprobs=(TokenLogprob(b"It ", -0.5, (TokenLogprob(b"It ", -0.5),)),)
    ),
    OutputPart(
        "text", "rains", logprobs=(TokenLogprob(b"rains", -0.1, (TokenLogprob(b"snows", -3.0),)),)
    ),
    OutputPart("call", '{"place": "Oslo"}', "weather"),
    OutputPart("call", "{}", "umbrella", "own-1"),
]


def stream(parts: list[OutputPart], finish: FinishReason, usage: Usage, **fields: Any) -> list[Any]:
    builder = API.respond(parse(stream=True, **fields), META)
    events = [*builder.first_events(0, Usage(3, 0))]
    for part in parts:
        events += builder.delta(0, part)
    events += [*builder.finish_choice(0, finish), *builder.finish_stream(usage)]
    for name, data in events:
        assert isinstance(data, dict)
        assert name == data["type"]
    return [data for _, data in events]


@pytest.mark.parametrize("finish", [STOP, LENGTH])
def test_a_stream_ends_with_the_whole_response(finish: FinishReason) -> None:
    fields = {"include": [openai_responses.LOGPROBS], "top_logprobs": 1}
    events = stream(PARTS, finish, Usage(3, 9, 2, 4), **fields)
    whole = API.respond(parse(**fields), META).full_response(
        [ChoiceState(0, PARTS, finish)], Usage(3, 9, 2, 4)
    )
    assert events[-1]["response"] == whole
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    for event in events:
        EVENTS[event["type"]].model_validate(event)
    read_back = types.Response.model_validate(whole)
    assert read_back.output_text == "It rains"
    assert [item.type for item in read_back.output] == [
        *("reasoning", "message", "function_call", "function_call")
    ]
    assert [str(item.id).split("_")[0] for item in read_back.output] == ["rs", "msg", "fc", "fc"]
    assert {e["item_id"] for e in events if "item_id" in e} == {o.id for o in read_back.output}
    assert read_back.status == ("completed" if finish is STOP else "incomplete")
    assert read_back.usage is not None
    assert read_back.usage.input_tokens_details.cached_tokens == 2
    assert read_back.usage.output_tokens_details.reasoning_tokens == 4


def test_the_events_of_each_item() -> None:
    kinds = [e["type"].removeprefix("response.") for e in stream(PARTS[2:5], STOP, Usage(3, 9))]
    assert kinds == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]


def test_an_answer_without_a_word() -> None:
    assert (
        API.respond(parse(), META).full_response([ChoiceState(0, [], STOP)], Usage(1, 1))["output"]
        == []
    )
    assert len(stream([], STOP, Usage(1, 1))) == 3


def test_a_failure_in_the_middle() -> None:
    builder = API.respond(parse(stream=True), META)
    events = [data for _, data in builder.error(ClusterError("gone"))]
    assert [e["type"] for e in events if isinstance(e, dict)] == ["error", "response.failed"]
    for event in events:
        EVENTS[event["type"]].model_validate(event)


def test_what_clients_send_beside_the_question_is_accepted() -> None:
    request = parse(
        store=False,
        truncation="auto",
        max_tool_calls=3,
        include=["reasoning.encrypted_content", "file_search_call.results"],
        text={"verbosity": "low"},
        reasoning={"summary": "auto", "generate_summary": "concise", "effort": "max"},
        client_metadata={"a": "b"},
        service_tier="flex",
        stream_options={"include_obfuscation": True},
        prompt_cache_key="x",
        top_logprobs=2,
        chat_template_kwargs={"a": 1},
    )
    ignored = ("truncation", "max_tool_calls", "client_metadata", "service_tier", "stream_options")
    assert request.warnings == tuple(f"{name}: ignored" for name in ignored)
    assert request.reasoning_effort == "max"
    assert request.logprobs is None


def test_tools_that_only_openais_servers_run_are_left_out() -> None:
    hosted = [
        {"type": "web_search", "external_web_access": False},
        {"type": "local_shell"},
        {"type": "namespace", "name": "mcp", "tools": [{"type": "function", "name": "x"}]},
        {"type": "image_generation"},
    ]
    request = parse(tools=[*hosted, *LOOP["tools"]])
    assert [tool.name for tool in request.tools] == ["weather"]
    assert parse(tools=hosted, tool_choice={"type": "web_search"}).forced_call is None
    history = [
        {"role": "user", "content": "a"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}},
        {"type": "compaction", "encrypted_content": "x"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "phase": "final"},
    ]
    assert parse(input=history).prompts[0] == (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "no", "reasoning_content": "Hm."},
    )


PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edit files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'},
}


def test_custom_tools_come_back_as_plain_text() -> None:
    request = parse(tools=[PATCH], store=False)
    assert 'start: "x"' in request.tools[0].description
    call = OutputPart("call", '{"input": "*** Begin\\n"}', "apply_patch", "call_9")
    builder = API.respond(request, META)
    body = builder.full_response([ChoiceState(0, [call], STOP)], Usage(3, 2))
    (item,) = types.Response.model_validate(body).output
    assert (item.type, item.name, item.input) == ("custom_tool_call", "apply_patch", "*** Begin\n")
    builder = API.respond(request, META)
    events = [*builder.first_events(0, Usage(3, 0)), *builder.delta(0, call)]
    events += [*builder.finish_choice(0, STOP), *builder.finish_stream(Usage(3, 2))]
    for name, event in events:
        EVENTS[str(name)].model_validate(event)
    assert "response.custom_tool_call_input.done" in [name for name, _ in events]
    output = {"type": "custom_tool_call_output", "call_id": "call_9", "output": "done"}
    _, call_message, result = parse(
        input=[{"role": "user", "content": "a"}, body["output"][0], output]
    ).prompts[0]
    assert call_message["tool_calls"][0]["function"] == {  # type: ignore[index]
        "name": "apply_patch",
        "arguments": {"input": "*** Begin\n"},
    }
    assert result["content"] == "done"  # type: ignore[index]


def answer(adapter: Any, key: str, parts: list[OutputPart], **fields: Any) -> dict[str, Any]:
    """The body of a response that is complete, and kept."""
    body = json.dumps({"input": "hello", **fields}).encode()
    request = adapter.parse(body, SERVED, key)
    meta = ResponseMeta(str(len(adapter.store._responses)), 7, "house", "fp")
    return adapter.respond(request, meta).full_response([ChoiceState(0, parts, STOP)], Usage(3, 2))


def test_stored_responses_are_continued_by_their_key_alone() -> None:
    adapter = openai_responses.ResponsesAdapter()
    parts = [OutputPart("reasoning", "Hm."), OutputPart("call", '{"a": 1}', "f", "call_1")]
    first = answer(adapter, "alice", parts, instructions="Be brief.")
    result = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}

    def ask(key: str, **fields: Any) -> Any:
        return adapter.parse(json.dumps(fields).encode(), SERVED, key).prompts[0]

    continued = ask("alice", previous_response_id=first["id"], input=[result], instructions="New.")
    assert [message["role"] for message in continued] == ["system", "user", "assistant", "tool"]
    assert continued[0]["content"] == "New."
    assert continued[2]["reasoning_content"] == "Hm."
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    same = ask("alice", input=[{"role": "user", "content": "hello"}, *references, result])
    assert same == continued[1:]
    for fields in ({"previous_response_id": first["id"]}, {"input": references}):
        with pytest.raises(InputError, match="is kept"):
            ask("bob", **fields)
    second = answer(
        adapter,
        "alice",
        [OutputPart("text", "It rains.")],
        previous_response_id=first["id"],
        input=[result],
    )
    third = ask("alice", previous_response_id=second["id"], input="And now?")
    assert [message["role"] for message in third] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    answer(adapter, "alice", parts, store=False)
    assert len(adapter.store._responses) == 2
    assert adapter.store.delete("alice", first["id"])
    assert adapter.store.get("alice", first["id"]) is None


def test_memory_for_stored_responses_is_bounded_per_key() -> None:
    store = openai_responses.ResponseStore()
    kept = openai_responses.StoredResponse

    def response(at: int, size: int = 0) -> Any:
        return kept({"id": f"resp_{at}", "output": [], "text": "x" * size}, ())

    store.put("bob", response(0))
    for at in range(300):
        store.put("alice", response(at))
    assert store.get("alice", "resp_43") is None
    assert store.get("alice", "resp_44") is not None
    assert store.get("bob", "resp_0") is not None
    store.put("alice", response(1000, 40 << 20))
    assert store.get("alice", "resp_1000") is None
    for at in range(2000, 2010):
        store.put("alice", response(at, 10 << 20))
    assert [at for at in range(2000, 2010) if store.get("alice", f"resp_{at}")] == [
        2007,
        2008,
        2009,
    ]
