"""OpenAI's API as plain data: what is read, what is refused and how, what is answered."""

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cenacle.core.chat import FinishReason, OutputPart, TokenLogprob, Tool, Usage
from cenacle.core.request import Sampling
from cenacle.errors import CenacleError, ClusterError, InputError, RankLost
from cenacle.server.api import anthropic, openai, openai_responses
from cenacle.server.api.openai import ChatCompletionsAdapter, CompletionsAdapter
from cenacle.server.api.protocol import (
    ApiAdapter,
    ChoiceState,
    GenerationRequest,
    ResponseBuilder,
    ResponseMeta,
    ServedModel,
)
from cenacle.server.api.structured_output import find_unenforced
from cenacle.server.api.validation import RequestError, parse_request

SERVED = ServedModel("house", 100, 50)
CHAT, COMPLETIONS = ChatCompletionsAdapter(), CompletionsAdapter()
HELLO = [{"role": "user", "content": "hello"}]
TEXT_PART = {"type": "text", "text": ""}
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}
NO_SCHEMA = {"function": {"name": "f", "parameters": {"type": "texture"}, "strict": True}}
STRICT = {"function": {"name": "weather", "parameters": PLACE, "strict": True}}


def chat(**fields: Any) -> GenerationRequest:
    return CHAT.parse(json.dumps({"messages": HELLO, **fields}).encode(), SERVED)


def text(**fields: Any) -> GenerationRequest:
    return COMPLETIONS.parse(json.dumps({"prompt": "hello", **fields}).encode(), SERVED)


def refused(parse: Any, body: dict[str, Any]) -> tuple[int, str | None, str | None, str]:
    """Status, param, code and message of the error that a body meets."""
    with pytest.raises(InputError) as caught:
        parse(**body)
    status, data = openai.render_error(caught.value)
    error = data["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return status, error["param"], error["code"], error["message"]


def test_a_model_may_have_several_names() -> None:
    served = replace(SERVED, aliases=("gpt-4o", "b/c"))

    def name_for(model: str | None, served: ServedModel = served) -> str:
        return CHAT.parse(json.dumps({"messages": HELLO, "model": model}).encode(), served).model

    assert [name_for(n) for n in (None, "house", "b/c")] == ["house", "house", "b/c"]
    with pytest.raises(RequestError, match=r"'x' does not exist; .* 'house' or 'gpt-4o' or 'b/c'"):
        name_for("x")
    open_to_all = replace(served, any_name=True)
    assert [name_for(n, open_to_all) for n in (None, "x", "")] == ["house", "x", "house"]
    listed = openai.model_list(open_to_all, 0)
    assert [model["id"] for model in listed["data"]] == ["house", "gpt-4o", "b/c"]
    assert (listed["first_id"], listed["last_id"]) == ("house", "b/c")


def test_models_tell_the_length_of_their_context() -> None:
    model = openai.model_object(SERVED, "house", 0)
    names = ("max_model_len", "context_length", "max_context_length", "max_input_tokens")
    assert [model[name] for name in names] == [100] * 4
    assert model["meta"] == {"n_vocab": 50, "n_ctx": 100, "n_ctx_train": 100}
    assert model["architecture"]["input_modalities"] == ["text"]
    sees = openai.model_object(replace(SERVED, image_obstacle=""), "house", 0)
    assert sees["architecture"]["input_modalities"] == ["text", "image"]
    unknown = openai.model_object(replace(SERVED, context_length=None), "house", 0)
    assert not unknown.keys() & set(names)


def test_the_defaults_are_those_of_openai() -> None:
    greedy_not = Sampling(temperature=1.0)
    house = GenerationRequest((), True, "", None, greedy_not, model="house")
    assert chat() == replace(house, prompts=(tuple(HELLO),), prompt_field="messages")
    prompt = {"prompts": ("hello",), "prompt_field": "prompt"}
    assert text() == replace(house, is_chat=False, max_tokens=16, **prompt)


def test_every_supported_parameter_is_read() -> None:
    request = chat(
        model="house",
        max_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        seed=-5,
        stop=["a", "bc"],
        stream=True,
        stream_options={"include_usage": True},
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.1,
        logit_bias={"3": -100, "4": 0.5},
        n=2,
        user="someone",
    )
    sampling = Sampling(0, 0.5, 3, 0.1, -5, 1.1, 1, -1.5, {3: -100.0, 4: 0.5})
    prompts = (tuple(HELLO),)
    assert request == GenerationRequest(
        prompts, True, "messages", 7, sampling, ("a", "bc"), 2, True, True, model="house"
    )
    assert chat(max_completion_tokens=9).max_tokens == 9
    assert chat(stop="x").stop == ("x",)


def test_messages_are_reduced_to_role_and_text() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "audio": None},
        {"role": "system", "content": ""},
    ]
    assert chat(messages=messages).prompts == (
        (
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "c"},
            {"role": "system", "content": ""},
        ),
    )


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        ([1, 2], ((1, 2),)),
        (["a"], ("a",)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a", [4]], ("a", (4,))),
    ],
)
def test_prompts_may_be_text_or_ids_or_several(prompt: Any, prompts: Any) -> None:
    assert text(prompt=prompt).prompts == prompts


def test_null_counts_as_absent() -> None:
    names = ["model", "max_tokens", "temperature", "stop", "stream", "tools", "seed", "n", "xyz"]
    assert chat(**dict.fromkeys(names)) == chat()


def test_tools_and_a_format_are_accepted_together() -> None:
    request = chat(tools=[WEATHER], response_format={"type": "json_object"})
    assert (request.may_call, request.grammar is not None) == (True, True)


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logprobs": False},
        {"top_logprobs": 0},
        {"modalities": ["text"]},
        {"top_k": -1},
        {"max_tokens": -1},
        {"length_penalty": 1.0},
        {"use_beam_search": False},
        {"stop_token_ids": []},
        {"include_stop_str_in_output": False},
        {"skip_special_tokens": True},
        {"spaces_between_special_tokens": True},
        {"add_generation_prompt": True},
        {"documents": []},
        {"guided_choice": []},
        {"min_tokens": 0, "ignore_eos": False},
        {"no_stop_trim": False, "separate_reasoning": True, "return_hidden_states": False},
        {"mirostat": 0, "typical_p": 1, "dry_multiplier": 0, "xtc_probability": 0.0},
        {"repeat_last_n": 64, "repetition_context_size": 20},
        {"functions": [], "function_call": "none"},
        {"thinking": {"type": "auto"}, "reasoning": {}},
        {"stream_options": {"include_usage": False}},
    ],
)
def test_parameters_that_request_nothing_are_accepted(extra: dict[str, Any]) -> None:
    assert chat(**extra) == chat()


@pytest.mark.parametrize(
    "extra",
    [
        {"store": True, "metadata": {"a": "b"}, "service_tier": "flex"},
        {"verbosity": "low", "prediction": {"type": "content", "content": "x"}},
        {"web_search_options": {}, "moderation": {"model": "x"}},
        {"prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "auto"}},
        {"priority": 1, "request_id": "x", "rid": "x", "cache_salt": "x", "kv_transfer_params": {}},
        {"cache_prompt": True, "id_slot": -1, "timings_per_token": True, "return_progress": True},
        {"temprature": 1},
    ],
)
def test_parameters_that_do_not_change_the_answer_are_ignored_and_named(
    extra: dict[str, Any],
) -> None:
    request = chat(**extra)
    assert replace(request, warnings=()) == chat()
    assert request.warnings == tuple(f"{name}: ignored" for name in extra)


@pytest.mark.parametrize(
    "extra",
    [
        {"messages": [{**HELLO[0], "name": "x", "thread": "y", "cache_control": {}}]},
        {"messages": [{**HELLO[0], "tool_call_id": "1", "kontent": "x"}]},
        {
            "messages": [
                {**HELLO[0], "content": [{**TEXT_PART, "text": HELLO[0]["content"], "x": 1}]}
            ]
        },
        {"stream_options": {"include_obfuscation": True, "usage": True}},
    ],
)
def test_members_deeper_in_a_body_may_be_any(extra: dict[str, Any]) -> None:
    assert chat(**extra) == chat()


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 1.1}, "length_penalty"),
        ({"stop_token_ids": [3]}, "stop_token_ids"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"chat_template": "x"}, "chat_template"),
        ({"stop_regex": "x"}, "stop_regex"),
        ({"lora_path": "x"}, "lora_path"),
        ({"mirostat": 2}, "mirostat"),
        ({"mirostat": False}, "mirostat"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"grammar": "x"}, "grammar"),
        ({"truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        (
            {"messages": [{"role": "assistant", "content": "", "audio": {"id": "x"}}]},
            "messages[0].audio",
        ),
    ],
)
def test_parameters_that_would_change_the_answer_are_refused_by_name(
    extra: dict[str, Any], param: str
) -> None:
    status, field, code, message = refused(chat, extra)
    assert (status, field, code) == (400, param, "unsupported_parameter")
    assert param in message


def test_other_names_of_parameters() -> None:
    assert chat(max_tokens=3, max_completion_tokens=4).max_tokens == 4
    assert chat(n_predict=5).max_tokens == 5
    assert text(max_tokens=-1).max_tokens is None
    assert chat(repeat_penalty=1.5).sampling == chat(repetition_penalty=1.5).sampling
    greedy = chat(top_p=0).sampling
    assert (greedy.top_p, greedy.top_k) == (1, 1)
    assert chat(reasoning={"effort": "low"}).reasoning_effort == "low"
    assert chat(enable_thinking=False).enable_thinking is False
    assert chat(thinking={"type": "disabled"}).enable_thinking is False
    switched = chat(thinking={"type": "enabled", "budget_tokens": 99})
    assert (switched.enable_thinking, switched.thinking_budget) == (True, 99)
    assert chat(reasoning={"max_tokens": 7, "enabled": True}).thinking_budget == 7
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    for same in (
        {"guided_json": schema},
        {"json_schema": json.dumps(schema)},
        {"structured_outputs": {"json": schema}},
    ):
        assert chat(**same).grammar == chat(response_format=form).grammar
    pattern = {"type": "regex", "pattern": "a+"}
    for same in ({"guided_regex": "a+"}, {"regex": "a+"}, {"structured_outputs": {"regex": "a+"}}):
        assert chat(**same).grammar == chat(response_format=pattern).grammar
    assert "start" in str(chat(guided_choice=["yes", 'n"o']).grammar)


def test_a_last_message_is_continued() -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well"}]
    assert chat(messages=begun, continue_final_message=True).continue_final_message
    assert refused(chat, {"continue_final_message": True})[1] == "continue_final_message"


def test_tools_of_other_types_are_left_out() -> None:
    hosted = [{"type": "web_search", "user_location": {}}, {"type": "code_interpreter"}]
    request = chat(tools=[hosted[0], WEATHER, hosted[1]])
    assert [tool.name for tool in request.tools] == [WEATHER["function"]["name"]]
    for choice in ("auto", "required", {"type": "web_search"}):
        request = chat(tools=hosted, tool_choice=choice)
        assert request.tools == ()
        assert request.forced_call is None
    broken = {"type": "function", "function": {"name": "bad name"}}
    assert refused(chat, {"tools": [hosted[0], broken]})[1] == "tools[1].function.name"
    assert chat(tools=[WEATHER], tool_choice="any").forced_call == "required"


def test_custom_tools_are_functions_with_one_string() -> None:
    grammar = {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "x"'}}
    custom = {"type": "custom", "custom": {"name": "patch", "description": "d", "format": grammar}}
    request = chat(tools=[custom], tool_choice={"type": "custom", "custom": {"name": "patch"}})
    (tool,) = request.tools
    assert (tool.name, tool.freeform, request.forced_call) == ("patch", True, "patch")
    assert tool.parameters["required"] == ["input"]
    assert 'start: "x"' in tool.description
    call = OutputPart("call", '{"input": "a\\nb"}', "patch", "call_1")
    builder = CHAT.respond(request, META)
    body = builder.full_response([ChoiceState(0, [call], FinishReason("stop"))], Usage(3, 2))
    (made,) = body["choices"][0]["message"]["tool_calls"]
    assert made == {"id": "call_1", "type": "custom", "custom": {"name": "patch", "input": "a\nb"}}
    history = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [made]}]
    (sent,) = chat(messages=history).prompts[0][1]["tool_calls"]  # type: ignore[index]
    assert sent["function"] == {"name": "patch", "arguments": {"input": "a\nb"}}


def test_histories_as_clients_keep_them() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": {"a": 1}}, "index": 0}
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "never"}]},
        {"role": "assistant", "content": None, "reasoning": "Hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": None},
    ]
    _, first, second, third, result = chat(messages=history).prompts[0]
    assert (first["content"], second["content"]) == ("no", "never")  # type: ignore[index]
    assert third["reasoning_content"] == "Hm"  # type: ignore[index]
    assert third["tool_calls"][0]["function"]["arguments"] == {"a": 1}  # type: ignore[index]
    assert result["content"] == ""  # type: ignore[index]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"model": 3}, "model"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": 2.0}, "top_k"),
        ({"seed": 1.0}, "seed"),
        ({"seed": False}, "seed"),
        ({"logprobs": 0}, "logprobs"),
        ({"tools": {}}, "tools"),
        ({"n": True}, "n"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream": True, "stream_options": True}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"3": True}}, "logit_bias.3"),
        ({"user": 3}, "user"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ],
)
def test_wrong_types_name_the_field(extra: dict[str, Any], param: str) -> None:
    status, field, code, message = refused(chat, extra)
    assert (status, field, code) == (400, param, "invalid_type")
    assert message.startswith(f"{param}: expected ")


@pytest.mark.parametrize(
    ("parse", "extra", "param"),
    [
        (chat, {"max_tokens": 0}, "max_tokens"),
        (chat, {"max_completion_tokens": -2}, "max_completion_tokens"),
        (chat, {"temperature": 2.1}, "temperature"),
        (chat, {"temperature": -0.1}, "temperature"),
        (chat, {"top_p": -0.1}, "top_p"),
        (chat, {"top_k": -2}, "top_k"),
        (chat, {"min_p": 2}, "min_p"),
        (chat, {"seed": 2**63}, "seed"),
        (chat, {"repetition_penalty": 0}, "repetition_penalty"),
        (chat, {"presence_penalty": 3}, "presence_penalty"),
        (chat, {"frequency_penalty": -3}, "frequency_penalty"),
        (chat, {"n": 0}, "n"),
        (chat, {"n": 9}, "n"),
        (chat, {"stop": list("abcdefghijklmnopq")}, "stop"),
        (chat, {"stop": ""}, "stop"),
        (chat, {"logit_bias": {"50": 1}}, "logit_bias.50"),
        (chat, {"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        (chat, {"logit_bias": {"x": 1}}, "logit_bias.x"),
        (chat, {"logit_bias": {"1": 101}}, "logit_bias.1"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": [{"role": "cook", "content": "x"}]}, "messages[0].role"),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (chat, {"tool_choice": "required"}, "tool_choice"),
        (chat, {"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        (chat, {"tools": [WEATHER, WEATHER]}, "tools[1]"),
        (chat, {"tools": [WEATHER | NO_SCHEMA]}, "tools[0]"),
        (chat, {"response_format": {"type": "yaml"}}, "response_format.type"),
        (chat, {"response_format": {"type": "regex", "pattern": "("}}, "response_format.pattern"),
        (chat, {"reasoning_effort": "\ud800"}, "reasoning_effort"),
        (text, {"logprobs": 6}, "logprobs"),
        (chat, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (text, {"prompt": []}, "prompt"),
        (text, {"prompt": [[]]}, "prompt[0]"),
        (text, {"prompt": ["a"] * 33}, "prompt"),
        (text, {"prompt": ["a"] * 5, "n": 8}, "prompt"),
    ],
)
def test_wrong_values_name_the_field(parse: Any, extra: dict[str, Any], param: str) -> None:
    assert refused(parse, extra)[:3] == (400, param, "invalid_value")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"messages": [*HELLO, *HELLO, {"role": "user", "content": [TEXT_PART | {"text": 3}]}]},
            "messages[2].content[0].text: expected a string, got 3",
        ),
        ({"temperature": 3}, "temperature: expected at most 2, got 3"),
        ({"temperature": "3"}, "temperature: expected a number, got '3'"),
        ({"top_p": -1}, "top_p: expected at least 0, got -1"),
        ({"n": True}, "n: expected an integer, got true"),
        ({"n": 1.0}, "n: expected an integer, got 1.0"),
        ({"messages": [None]}, "messages[0]: expected an object, got null"),
        ({"messages": {}}, "messages: expected a list, got an object"),
        (
            {"messages": [{"role": "user", "content": False}]},
            "messages[0].content: expected a string or a list, got false",
        ),
        (
            {"messages": [{"role": "cook", "content": ""}]},
            "messages[0].role: expected 'system' or 'developer' or 'user' or 'assistant' or "
            "'tool' or 'function', got 'cook'",
        ),
        ({"reasoning_effort": 3}, "reasoning_effort: expected a string, got 3"),
        ({"stop": list("abcdefghijklmnopq")}, "stop: expected at most 16 items, got 17"),
        (
            {"user": "a\ud800"},
            "user: expected Unicode, got half of a surrogate pair at character 1",
        ),
        (
            {"\ud800": 1},
            "\\ud800: expected Unicode, got half of a surrogate pair in the name",
        ),
        (
            {"logit_bias": {"\ud800": "x"}},
            "logit_bias.\\ud800: expected Unicode, got half of a surrogate pair in the name",
        ),
    ],
)
def test_errors_have_the_full_path_what_was_expected_and_what_was_got(
    extra: dict[str, Any], message: str
) -> None:
    assert refused(chat, extra)[3] == message


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (r'"\ud83d\ude00 \\ud83d \\\ud83d\udE00"', None),
        (r'{"a": [[], {"\uD83D\uDE00": ["\ud83d\ude00", "\\ud83d"]}, 3]}', None),
        (r'"\\ud83d\ude00"', "unknown"),
        (r'"\ud83d\ud83d\ude00"', "unknown"),
        (r'"\ud83d\\ude00"', "unknown"),
        (r'{"a": [[1], {}], "b": [{"c": {"d": []}}, [["\ude00"]]], "e": 3}', "unknown.b[1][0][0]"),
        (r'{"a": [[1], {}], "b": {"c\ud8000": 1}}', r"unknown.b.c\ud8000"),
    ],
)
def test_half_a_character_is_found_wherever_it_is(value: str, path: str | None) -> None:
    body = f'{{"messages": [{{"role": "user", "content": ""}}], "unknown": {value}}}'.encode()
    if path is None:
        assert parse_request(openai.ChatCompletionRequest, body)
    else:
        with pytest.raises(RequestError, match="half of a surrogate") as caught:
            parse_request(openai.ChatCompletionRequest, body)
        assert caught.value.field == path


@pytest.mark.parametrize(
    "extra",
    [
        {"messages": [3] * 1000},
        {"messages": [{"role": "user", "content": [3] * 1000}]},
        {"stop": [3] * 1000},
        {"tools": [3] * 1000},
        {"logit_bias": dict.fromkeys(map(str, range(1000)), "x")},
    ],
)
def test_validation_stops_at_the_first_error(extra: dict[str, Any]) -> None:
    """A body of megabytes that is wrong everywhere costs no more than one that is right."""
    with pytest.raises(ValidationError) as caught:
        openai.ChatCompletionRequest.model_validate({"messages": HELLO, **extra})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("prompt", [3, {"a": 1}, [True], [1, "a"], ["a", 1], [[1], [True]], [None]])
def test_prompts_of_other_types_are_refused(prompt: Any) -> None:
    status, field, code, _ = refused(text, {"prompt": prompt})
    assert (status, code) == (400, "invalid_type")
    assert field
    assert field.startswith("prompt")


@pytest.mark.parametrize(
    ("parse", "extra", "param"),
    [
        (chat, {"messages": None}, "messages"),
        (text, {"prompt": None}, "prompt"),
        (chat, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (chat, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ],
)
def test_missing_parameters_are_named(parse: Any, extra: dict[str, Any], param: str) -> None:
    assert refused(parse, extra)[:3] == (400, param, "missing_required_parameter")


def test_another_model_is_not_found_and_the_message_says_the_right_one() -> None:
    status, field, code, message = refused(chat, {"model": "gpt-4o"})
    assert (status, field, code) == (404, "model", "model_not_found")
    assert "'house'" in message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        CHAT.parse(body, SERVED)
    assert (caught.value.status, caught.value.code) == (400, "invalid_body")


def test_a_refusal_does_not_repeat_what_is_long() -> None:
    for extra in ({"model": "x" * 9999}, {"temperature": "z" * 9999}):
        assert len(refused(chat, extra)[3]) < 300


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
# Each API with a body that has only what is required.
_ADAPTERS: list[tuple[ApiAdapter, dict[str, Any]]] = [
    (CHAT, {"messages": HELLO}),
    (COMPLETIONS, {"prompt": "x"}),
    (openai_responses.ResponsesAdapter(), {"input": "x"}),
    (anthropic.MessagesAdapter(), {"model": "house", "max_tokens": 1, "messages": HELLO}),
    (anthropic.CountTokensAdapter(), {"model": "house", "messages": HELLO}),
]
# Words that lead deeper than chance would.
_WORDS = st.sampled_from(
    [
        *(
            "type",
            "text",
            "content",
            "role",
            "user",
            "assistant",
            "tool",
            "name",
            "input",
            "output",
        ),
        *("function", "function_call", "function_call_output", "message", "reasoning", "arguments"),
        *(
            "tool_use",
            "tool_result",
            "thinking",
            "tool_use_id",
            "call_id",
            "id",
            "schema",
            "format",
        ),
        *(
            "json_schema",
            "json_object",
            "regex",
            "pattern",
            "grammar",
            "parameters",
            "strict",
            "{}",
        ),
        *("input_schema", "properties", "required", "anyOf", "$ref", "object", "integer", "x"),
    ]
)
_DEEP = st.recursive(
    _JSON | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=250)
@given(st.sampled_from(range(5)), st.data())
def test_any_body_is_parsed_or_refused(which: int, data: Any) -> None:
    adapter, required = _ADAPTERS[which]
    names = st.sampled_from([*adapter.request_model.model_fields, "unknown", "store", "metadata"])
    fields = data.draw(st.dictionaries(names, _DEEP, max_size=4))
    try:
        request = adapter.parse(json.dumps({**required, **fields}).encode(), SERVED)
    except InputError as error:
        json.dumps(openai.render_error(error))
        json.dumps(anthropic.render_error(error))
    else:
        assert len(request.prompts) * request.n >= 1


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/nowhere"},
        {"$ref": "http://127.0.0.1:9/x"},
        {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"enum": []},
        {"type": "string", "pattern": "(" * 999},
        {"type": "string", "minLength": 10**12},
        {"type": "array", "minItems": 10**9},
        {"type": "integer", "minimum": 10**400},
        {"type": "string", "x-guidance": {"lenient": 3, "whitespace_pattern": "("}},
        {"properties": {str(n): {"type": "string"} for n in range(3000)}},
    ],
)
def test_no_schema_breaks_parsing(schema: dict[str, Any]) -> None:
    """Refused or read, in the time that a person would wait."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    began = time.monotonic()
    with contextlib.suppress(InputError):
        chat(response_format=form)
    assert time.monotonic() - began < 60


def test_a_prompt_must_leave_room_for_an_answer() -> None:
    assert SERVED.free_context(99, "prompt") == 1
    assert replace(SERVED, context_length=None).free_context(99, "prompt") is None
    with pytest.raises(RequestError, match="100 tokens") as caught:
        SERVED.free_context(100, "messages")
    assert (caught.value.field, caught.value.code) == ("messages", "context_length_exceeded")


def test_choices_have_seeds_of_their_own_and_the_first_has_the_one_given() -> None:
    request = chat(seed=2**63 - 1, n=3)
    assert [request.sampling_of(i).seed for i in range(3)] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert chat(n=2).sampling_of(1).seed is None


META = ResponseMeta("1", 7, "house", "fp_1")
STOP, LENGTH = FinishReason("stop"), FinishReason("length")


def respond(**fields: Any) -> ResponseBuilder:
    return CHAT.respond(chat(**fields), META)


def data_of(events: Any) -> list[Any]:
    """The data of a stream's events, none of which has a name."""
    listed = list(events)
    assert all(name is None for name, _ in listed)
    return [data for _, data in listed]


def choices_of(events: Any) -> list[Any]:
    return [chunk["choices"][0] for chunk in data_of(events)]


def test_a_whole_chat_answer() -> None:
    parts = [OutputPart("text", "a"), OutputPart("text", "b")]
    choices = [ChoiceState(1, parts, LENGTH), ChoiceState(0, parts[:1], STOP)]
    head = {"id": "chatcmpl-1", "created": 7, "model": "house", "system_fingerprint": "fp_1"}
    assert respond().full_response(choices, Usage(3, 2, 1)) == {
        **head,
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": None,
                "finish_reason": finish,
            }
            for index, content, finish in [(0, "a", "stop"), (1, "ab", "length")]
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_the_chunks_of_a_chat() -> None:
    plain = respond(stream=True)
    parts = (plain.first_events(0, Usage(1, 0)), plain.delta(0, OutputPart("text", "a")))
    chunks = [c for events in (*parts, plain.finish_choice(0, STOP)) for c in data_of(events)]
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {}]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "stop"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in c for c in chunks)
    assert data_of(plain.finish_stream(Usage(1, 1))) == ["[DONE]"]
    counting = respond(stream=True, stream_options={"include_usage": True})
    assert data_of(counting.delta(0, OutputPart("text", "a")))[0]["usage"] is None
    last, done = data_of(counting.finish_stream(Usage(1, 2)))
    assert (last["choices"], last["usage"]["total_tokens"], done) == ([], 3, "[DONE]")


CALL = OutputPart("call", '{"place": "Oslo"}', "weather")
THOUGHT = [
    OutputPart("reasoning", "Hm"),
    OutputPart("reasoning", "."),
    CALL,
    OutputPart("call", "{}", "b", "own-1"),
]


def test_reasoning_and_calls_are_apart_from_the_text() -> None:
    whole = respond(tools=[WEATHER]).full_response(
        [ChoiceState(0, THOUGHT, STOP)], Usage(1, 2, 0, 1)
    )
    called = {"type": "function", "id": "call_1_0_0", "function": CALL_JSON}
    own = {"type": "function", "id": "own-1", "function": {"name": "b", "arguments": "{}"}}
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "Hm.",
        "tool_calls": [called, own],
    }
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}
    stream = respond(tools=[WEATHER], stream=True)
    deltas = [c["delta"] for part in THOUGHT for c in choices_of(stream.delta(0, part))]
    assert deltas == [
        {"reasoning_content": "Hm"},
        {"reasoning_content": "."},
        {"tool_calls": [{"index": 0, **called}]},
        {"tool_calls": [{"index": 1, **own}]},
    ]
    assert choices_of(stream.finish_choice(0, STOP))[0]["finish_reason"] == "tool_calls"
    assert choices_of(stream.finish_choice(1, STOP))[0]["finish_reason"] == "stop"
    assert choices_of(stream.finish_choice(0, LENGTH))[0]["finish_reason"] == "length"


CALL_JSON = {"name": "weather", "arguments": '{"place": "Oslo"}'}


def test_a_conversation_with_calls_is_read_as_templates_have_it() -> None:
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c1", "type": "function", "function": CALL_JSON}],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"},
    ]
    function = {"name": "weather", "arguments": {"place": "Oslo"}}
    assert chat(messages=messages).prompts[0][1:] == (
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
            "content": "",
        },
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"},
    )
    messages[1]["tool_calls"][0]["function"] = {"name": "weather", "arguments": 3}  # type: ignore
    status, field, _, _ = refused(chat, {"messages": messages})
    assert (status, field) == (400, "messages[1].tool_calls[0].function.arguments")


def test_the_choice_of_tools() -> None:
    tool = Tool("weather", parameters=PLACE)
    free = chat(tools=[WEATHER])
    assert (free.tools, free.forced_call, free.grammar) == ((tool,), None, None)
    single = chat(tools=[WEATHER | STRICT], parallel_tool_calls=False)
    assert (single.parallel_tool_calls, single.tools[0].strict, single.grammar) == (
        False,
        True,
        None,
    )
    none = chat(tools=[WEATHER], tool_choice="none")
    assert (none.tools, none.forced_call, none.grammar) == ((), None, None)
    forced = chat(tools=[WEATHER], tool_choice="required")
    assert (forced.tools, forced.forced_call) == ((tool,), "required")
    assert forced.grammar is not None
    named = {"type": "function", "function": {"name": "weather"}}
    one = chat(tools=[WEATHER | STRICT], tool_choice=named)
    assert (one.forced_call, one.tools[0].strict) == ("weather", True)
    other = {"type": "function", "function": {"name": "whether"}}
    assert refused(chat, {"tools": [WEATHER], "tool_choice": other})[1] == "tool_choice"
    rain = {"type": "function", "function": {"name": "rain"}}
    for mode, calls in (("auto", None), ("required", "required")):
        among: Any = {"mode": mode, "tools": [named]}
        some = chat(
            tools=[rain, WEATHER],
            tool_choice={"type": "allowed_tools", "allowed_tools": among},
        )
        assert (some.tools, some.forced_call) == ((tool,), calls)
    for wrong, field in (
        ({"mode": "auto", "tools": [other]}, "tool_choice"),
        ({"mode": "auto", "tools": []}, "tool_choice.allowed_tools.tools"),
        ({"mode": "none", "tools": [named]}, "tool_choice.allowed_tools.mode"),
        (
            {"mode": "auto", "tools": [{"type": "custom"}]},
            "tool_choice.allowed_tools.tools[0].custom",
        ),
    ):
        request = {"type": "allowed_tools", "allowed_tools": wrong}
        assert refused(chat, {"tools": [WEATHER], "tool_choice": request})[1] == field


def test_formats_become_grammars() -> None:
    wanted: list[dict[str, Any]] = [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "p", "schema": PLACE, "strict": True}},
        {"type": "regex", "pattern": r"\d+/\d+"},
        {"type": "grammar", "grammar": 'start: "a" | "b"'},
    ]
    made = [chat(response_format=form).grammar for form in wanted]
    assert len(set(made)) == 4
    assert [text(response_format=form).grammar for form in wanted] == made
    for grammar in made:
        assert grammar is not None
        json.loads(grammar)
    bad = {"type": "json_schema", "json_schema": {"name": "p", "schema": {"type": "texture"}}}
    status, field, _, message = refused(chat, {"response_format": bad})
    assert (status, field) == (400, "response_format.json_schema.schema")
    assert "texture" in message
    unenforceable = {"name": "p", "schema": {"not": {"type": "string"}}}
    lenient = chat(response_format={"type": "json_schema", "json_schema": unenforceable})
    assert find_unenforced(lenient.grammar) == ['Unimplemented keys: ["not"]']


def test_a_json_object_may_have_a_schema() -> None:
    """The form of llama.cpp and of hosted services; to ignore it would change the answer."""
    named = {"type": "json_schema", "json_schema": {"name": "p", "schema": PLACE}}
    plain = {"type": "json_object", "schema": PLACE}
    assert chat(response_format=plain).grammar == chat(response_format=named).grammar
    for schema in ({"type": "texture"}, 123, {"type": 123}):
        bad = {"type": "json_object", "schema": schema}
        status, field, *_ = refused(chat, {"response_format": bad})
        assert (status, field) == (400, "response_format.schema")
    misplaced = {"type": "text", "schema": PLACE}
    assert refused(chat, {"response_format": misplaced})[:2] == (400, "response_format.schema")


EURO = "€".encode()
LOGGED = [
    TokenLogprob(b"a", -0.5, (TokenLogprob(b"a", -0.5), TokenLogprob(EURO[:1], -1.5))),
    TokenLogprob(EURO[:1], -2.0, (TokenLogprob(b" b", -0.1),)),
]


def test_log_probabilities_of_a_chat() -> None:
    request = {"logprobs": True, "top_logprobs": 2}
    part = OutputPart("text", "a€", logprobs=tuple(LOGGED))
    logs = {
        "content": [
            {
                "token": "a",
                "logprob": -0.5,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "a", "logprob": -0.5, "bytes": [97]},
                    {"token": "\ufffd", "logprob": -1.5, "bytes": [0xE2]},
                ],
            },
            {
                "token": "\ufffd",
                "logprob": -2.0,
                "bytes": [0xE2],
                "top_logprobs": [{"token": " b", "logprob": -0.1, "bytes": [32, 98]}],
            },
        ],
        "refusal": None,
    }
    whole = respond(**request).full_response([ChoiceState(0, [part], STOP)], Usage(1, 1))
    assert whole["choices"][0]["logprobs"] == logs
    assert choices_of(respond(**request).delta(0, part))[0]["logprobs"] == logs
    assert chat(logprobs=True).logprobs == 0
    assert chat().logprobs is None


def test_log_probabilities_of_a_completion() -> None:
    parts = [OutputPart("text", "a", logprobs=(one,)) for one in LOGGED]
    builder = COMPLETIONS.respond(text(logprobs=2), META)
    logs = [choices_of(builder.delta(0, part))[0]["logprobs"] for part in parts]
    assert [log["text_offset"] for log in logs] == [[0], [1]]
    whole = COMPLETIONS.respond(text(logprobs=2), META).full_response(
        [ChoiceState(0, parts, STOP)], Usage(1, 1)
    )
    assert whole["choices"][0]["logprobs"] == {
        "tokens": ["a", "bytes:\\xe2"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"a": -0.5, "bytes:\\xe2": -1.5}, {" b": -0.1, "bytes:\\xe2": -2.0}],
        "text_offset": [0, 1],
    }


def test_prompt_logprobs_are_in_vllms_form() -> None:
    alternatives = (TokenLogprob(b"b", -0.5, (), 7, 1), TokenLogprob(b"a", -1.0, (), 5, 2))
    scores = [TokenLogprob(b"x", None, (), 3), TokenLogprob(b"c", -4.0, alternatives, 9, 12)]
    expected = {
        "7": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
        "9": {"logprob": -4.0, "rank": 12, "decoded_token": "c"},
    }
    state = ChoiceState(0, [OutputPart("text", "a")], STOP, scores)
    completion = COMPLETIONS.respond(text(prompt_logprobs=1), META).full_response(
        [state], Usage(1, 1)
    )
    assert completion["choices"][0]["prompt_logprobs"] == [None, expected]
    whole = CHAT.respond(chat(prompt_logprobs=1), META).full_response([state], Usage(1, 1))
    assert whole["prompt_logprobs"] == [None, expected]
    plain = CHAT.respond(chat(), META).full_response([state], Usage(1, 1))
    assert "prompt_logprobs" not in plain
    for parse in (text, chat):
        body = {"prompt_logprobs": 1, "stream": True}
        assert refused(parse, body)[:3] == (400, "prompt_logprobs", UNSUPPORTED)


def test_a_completion_may_be_only_its_prompt() -> None:
    assert text(echo=True, logprobs=0, max_tokens=0).max_tokens == 0
    assert text(max_tokens=None).max_tokens == 16
    assert refused(chat, {"max_tokens": 0})[1] == "max_tokens"


UNSUPPORTED = "unsupported_parameter"


def test_completions_have_their_own_shapes() -> None:
    plain = COMPLETIONS.respond(text(), META)
    whole = plain.full_response([ChoiceState(0, [OutputPart("text", "a")], STOP)], Usage(1, 1))
    assert (whole["id"], whole["object"]) == ("cmpl-1", "text_completion")
    assert whole["choices"][0] == {
        "index": 0,
        "text": "a",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert data_of(plain.first_events(0, Usage(1, 0))) == []
    assert choices_of(plain.delta(2, OutputPart("text", "x")))[0]["text"] == "x"
    assert data_of(plain.finish_choice(2, LENGTH))[0]["object"] == "text_completion"


def test_declared_parameters_are_never_unknown() -> None:
    for adapter, required in _ADAPTERS:
        adapter.parse(json.dumps(required).encode(), SERVED)
        for name in adapter.request_model.model_fields:
            with pytest.raises(InputError) as caught:  # no member may be a list of lists
                adapter.parse(json.dumps({**required, name: [[{}]]}).encode(), SERVED)
            assert (caught.value.field or "").split("[")[0] == name
            assert not isinstance(caught.value, RequestError) or caught.value.code not in UNKNOWN


UNKNOWN = ("unknown_parameter", UNSUPPORTED)


def test_errors_of_the_group_are_not_the_clients() -> None:
    for error in (ClusterError("gone"), RankLost(1, "rank 1 was killed")):
        status, data = openai.render_error(error)
        assert (status, data["error"]["type"]) == (503, "server_error")
        assert data["error"]["message"] == str(error)
    assert openai.render_error(CenacleError("x"))[0] == 500
    assert openai.render_error(InputError("x", "prompt"))[1]["error"]["param"] == "prompt"


def test_it_needs_neither_mlx_nor_starlette() -> None:
    code = (
        "import sys, cenacle.server.api.openai;"
        "print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'starlette')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "[]"
