"""What clients send in a form of another API or version, or by another server's name, means the
same; what would change the answer and is not supported is refused by name."""

import json
from typing import Any

import pytest

from cenacle.core.chat import OutputPart
from cenacle.errors import InputError
from cenacle.server.api.anthropic import CountTokensAdapter, MessagesAdapter, render_error
from cenacle.server.api.openai import ChatCompletionsAdapter, CompletionsAdapter
from cenacle.server.api.openai_responses import ResponsesAdapter
from cenacle.server.api.protocol import (
    MAX_TOOLS,
    ApiAdapter,
    GenerationRequest,
    ResponseMeta,
    ServedModel,
)
from cenacle.text.reasoning import EFFORTS, nearest_effort

SERVED = ServedModel("house", 100_000, 1000, any_name=True)
HELLO = {"role": "user", "content": "Hi"}
BODIES: dict[str, tuple[type[ApiAdapter], dict[str, Any]]] = {
    "chat": (ChatCompletionsAdapter, {"messages": [HELLO]}),
    "completions": (CompletionsAdapter, {"prompt": "Hi"}),
    "responses": (ResponsesAdapter, {"input": "Hi"}),
    "messages": (MessagesAdapter, {"model": "house", "max_tokens": 9, "messages": [HELLO]}),
    "count": (CountTokensAdapter, {"model": "house", "messages": [HELLO]}),
}
ALL = ["chat", "completions", "responses", "messages"]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FLAT = {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA}
NESTED = {"type": "function", "function": {k: v for k, v in FLAT.items() if k != "type"}}
NO_EFFECT = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}


def parse(api: str, **extra: Any) -> GenerationRequest:
    adapter, body = BODIES[api]
    return adapter().parse(json.dumps({**body, **extra}).encode(), SERVED)


def refusal(api: str, **extra: Any) -> str:
    with pytest.raises(InputError) as caught:
        parse(api, **extra)
    return caught.value.field or ""


def conversation(api: str, **extra: Any) -> list[Any]:
    return list(parse(api, **extra).prompts[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("tool", [FLAT, NESTED])
@pytest.mark.parametrize("api", ["chat", "responses", "messages", "count"])
def test_a_function_in_any_form_is_offered(api: str, tool: dict[str, Any]) -> None:
    (offered,) = parse(api, tools=[tool]).tools
    assert (offered.name, offered.description, offered.parameters) == ("f", "d", SCHEMA)


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "f"},
        {"type": "function", "function": {"name": "f"}},
        {"function": {"name": "f"}},
        {"type": "tool", "name": "f"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "name": "f"}]},
        },
        {"type": "any"},
        "required",
    ],
)
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_a_choice_in_any_form_forces_a_call(api: str, choice: Any) -> None:
    request = parse(api, tools=[FLAT], tool_choice=choice)
    assert request.forced_call in ("f", "required")
    assert request.warnings == ()


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_no_call_in_anthropic_form(api: str) -> None:
    assert parse(api, tools=[FLAT], tool_choice={"type": "none"}).tools == ()


def test_a_schema_under_another_name_is_not_lost() -> None:
    tool = {"type": "function", "function": {"name": "f", "input_schema": SCHEMA}}
    assert refusal("chat", tools=[tool]) == "tools[0].function.input_schema"


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_what_is_not_offered_is_said(api: str) -> None:
    request = parse(api, tools=[FLAT, {"type": "web_search"}], tool_choice={"type": "web_search"})
    assert [warning.partition(":")[0] for warning in request.warnings] == [
        "tools[1]",
        "tool_choice",
    ]


@pytest.mark.parametrize("word", ["ultra", "Ultra", "ultrahigh", "maximum", "x-high", "extra_high"])
def test_newer_words_for_much_are_more_than_high(word: str) -> None:
    effort = nearest_effort(word)
    assert effort is not None
    assert EFFORTS.index(effort) > EFFORTS.index("high")


@pytest.mark.parametrize(
    ("word", "effort"),
    [*((word, word) for word in EFFORTS), ("off", "none"), ("very low", "low"), ("turbo", None)],
)
def test_the_nearest_effort(word: str, effort: str | None) -> None:
    assert nearest_effort(word) == effort


@pytest.mark.parametrize(
    ("api", "extra"),
    [
        ("chat", {"reasoning_effort": "ultra"}),
        ("chat", {"reasoning_effort": {"effort": "ultra", "summary": "auto"}}),
        ("chat", {"reasoning": {"effort": "ultra"}}),
        ("chat", {"think": "ultra"}),
        ("responses", {"reasoning": {"effort": "ultra", "mode": "pro"}}),
        ("responses", {"reasoning_effort": "ultra"}),
        ("messages", {"output_config": {"effort": "ultra"}}),
        ("messages", {"reasoning_effort": "ultra"}),
        (
            "messages",
            {"messages": [{"role": "system", "output_config": {"effort": "ultra"}}, HELLO]},
        ),
    ],
)
def test_any_effort_is_accepted_in_any_form(api: str, extra: dict[str, Any]) -> None:
    assert parse(api, **extra).reasoning_effort == "ultra"


@pytest.mark.parametrize(("number", "word"), [(0, "none"), (0.5, "medium"), (0.99, "max")])
def test_an_effort_may_be_a_number(number: float, word: str) -> None:
    assert parse("chat", reasoning_effort=number).reasoning_effort == word
    assert refusal("chat", reasoning_effort=1.5) == "reasoning_effort"


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_other_names_of_reasoning(api: str) -> None:
    assert parse(api, reasoning_effort="").reasoning_effort is None
    assert parse(api, thinking_token_budget=7).thinking_budget == 7
    assert parse(api, thinking={"type": "enabled", "budget_tokens": 7}).thinking_budget == 7
    assert parse(api, think=False).enable_thinking is False
    for hidden in (
        {"include_reasoning": False},
        {"reasoning": {"exclude": True}},
        {"reasoning_format": "hidden"},
    ):
        assert parse(api, **hidden).hide_reasoning
    assert refusal(api, reasoning_format="raw") == "reasoning_format"


@pytest.mark.parametrize("api", ALL)
def test_biases_as_a_list(api: str) -> None:
    assert parse(api, logit_bias=[]).sampling.logit_bias == {}
    assert parse(api, logit_bias=[[5, 1.5], [6, False]]).sampling.logit_bias == {5: 1.5, 6: -100}
    assert refusal(api, logit_bias=[["word", 1]]) == "logit_bias"


@pytest.mark.parametrize("api", ALL)
def test_sampling_means_the_same_in_every_api(api: str) -> None:
    sampling = parse(api, random_seed=3, min_p=0.1, presence_penalty=1, repeat_penalty=1.1).sampling
    assert (sampling.seed, sampling.min_p) == (3, 0.1)
    assert (sampling.presence_penalty, sampling.repetition_penalty) == (1, 1.1)


def test_how_far_penalties_look_back() -> None:
    def sizes(**extra: Any) -> tuple[int, int, int]:
        penalties = {"presence_penalty": 1, "frequency_penalty": 1}
        s = parse("chat", repetition_penalty=1.1, **penalties, **extra).sampling
        return s.repetition_context_size, s.presence_context_size, s.frequency_context_size

    assert sizes() == (20, 20, 20)
    assert sizes(repetition_context_size=64) == (64, 20, 20)
    assert sizes(repeat_last_n=-1) == (-1, -1, -1)
    assert refusal("chat", repeat_last_n=-2) == "repeat_last_n"


def test_all_wrong_biases_are_named() -> None:
    with pytest.raises(InputError, match="also wrong: y, 9999"):
        parse("chat", logit_bias={"x": 1, "5": 1, "y": 1, "9999": 1})


@pytest.mark.parametrize("api", ALL)
def test_a_constraint_is_enforced_in_every_api(api: str) -> None:
    for extra in ({"guided_regex": "a+"}, {"structured_outputs": {"choice": ["a"]}}):
        request = parse(api, **extra)
        assert request.grammar is not None
    assert parse(api, structured_outputs=True).grammar is None  # OpenRouter's
    assert parse(api, json_schema=json.dumps(SCHEMA)).grammar is not None


# A parameter of one API in another, and further servers' parameters that change the answer; what
# of each changes nothing.
FOREIGN: list[tuple[str, str, Any, Any]] = [
    ("responses", "n", 2, 1),
    ("responses", "stop", ["x"], []),
    ("responses", "response_format", {"type": "json_object"}, {"type": "text"}),
    ("responses", "functions", [{"name": "f"}], []),
    ("responses", "messages", [HELLO], []),
    ("responses", "logprobs", True, False),
    ("responses", "min_tokens", 4, 0),
    ("responses", "continue_final_message", True, False),
    ("messages", "n", 2, 1),
    ("messages", "stop", ["x"], []),
    ("messages", "response_format", {"type": "json_object"}, {"type": "text"}),
    ("messages", "logprobs", True, False),
    ("messages", "instructions", "x", ""),
    ("chat", "system", "x", ""),
    ("chat", "instructions", "x", ""),
    ("chat", "stop_sequences", ["x"], []),
    ("chat", "max_output_tokens", 4, -1),
    ("chat", "previous_response_id", "x", ""),
    ("chat", "prompt", "x", ""),
    ("chat", "modalities", ["text", "audio"], ["text"]),
    ("chat", "echo", True, False),
    ("chat", "text", {"format": {"type": "json_object"}}, {"format": {"type": "text"}}),
    ("completions", "tools", [NESTED], []),
    ("completions", "suffix", "x", ""),
    *(
        (api, name, value, nothing)
        for api in ("chat", "completions", "responses", "messages")
        for name, value, nothing in [
            ("do_sample", False, True),
            ("repetition_detection", {"max_pattern_size": 4}, {}),
            ("vllm_xargs", {"a": 1}, {}),
            ("safe_prompt", True, False),
            ("no_repeat_ngram_size", 3, 0),
            ("guidance_scale", 1.5, 1),
            ("negative_prompt", "x", ""),
            ("smoothing_factor", 0.2, 0),
            ("banned_strings", ["x"], []),
            ("structural_tag", {"x": 1}, {}),
            ("lora", [{"id": 0, "scale": 1}], []),
            ("t_max_predict_ms", 100, 0),
            ("preset", "email", ""),
            ("prompt_embeds", ["x"], []),
            ("input_ids", [1], None),
            ("parse_tool_calls", False, True),
            ("deferred", True, False),
            ("stop_token_ids", [1], []),
            ("watermarking", True, False),
            ("logprob_token_ids", [1], None),
            ("task", "title", None),
            ("n_cmpl", 2, 1),
            ("return_prompt_token_ids", True, False),
            ("chat_template", "x", None),
        ]
    ),
]


@pytest.mark.parametrize(("api", "name", "value", "nothing"), FOREIGN)
def test_what_changes_the_answer_is_refused_and_what_does_not_is_accepted(
    api: str, name: str, value: Any, nothing: Any
) -> None:
    assert refusal(api, **{name: value}) == name
    assert parse(api, **{name: nothing}) == parse(api)


# Of hosted services, proxies and desktop programs: how a request is routed, paid and shown.
HARMLESS: dict[str, Any] = {
    "provider": {"order": ["x"], "allow_fallbacks": False},
    "transforms": ["middle-out"],
    "models": ["a", "b"],
    "route": "fallback",
    "plugins": [{"id": "web"}],
    "session_id": "x",
    "drop_params": True,
    "num_retries": 2,
    "timeout": 30,
    "tags": ["x"],
    "guardrails": ["x"],
    "litellm_metadata": {},
    "caching": False,
    "ttl": 300,
    "keep_alive": "5m",
    "draft_model": "x",
    "options": {"num_ctx": 4096},
    "cache_prompt": True,
    "id_slot": -1,
    "timings_per_token": True,
    "return_progress": True,
    "verbose": True,
    "n_cache_reuse": 0,
    "priority": 1,
    "request_id": "x",
    "rid": "x",
    "cache_salt": "x",
    "kv_transfer_params": {"x": 1},
    "mm_processor_kwargs": {},
    "data_parallel_rank": 0,
    "perf_metrics_in_response": True,
    "search_parameters": {"mode": "auto"},
    "tool_stream": True,
    "enable_search": False,
    "client_metadata": {},
    "betas": ["x"],
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("api", ALL)
def test_what_does_not_change_the_answer_is_accepted_and_said(api: str, name: str) -> None:
    assert parse(api, **{name: HARMLESS[name]}).warnings == (f"{name}: ignored",)


# Chat completions


def test_functions_of_the_older_api_in_a_history() -> None:
    messages = conversation(
        "chat",
        messages=[
            HELLO,
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "x"},
        ],
    )
    (call,) = messages[1]["tool_calls"]
    assert (call["function"]["name"], messages[2]["role"]) == ("f", "tool")
    assert messages[2]["tool_call_id"] == call["id"] != ""
    assert (messages[2]["name"], messages[2]["content"]) == ("f", "x")


def test_calls_without_ids_get_some() -> None:
    call = {"function": {"name": "f", "arguments": None}}
    result = {"role": "tool", "content": "x"}
    turn = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    messages = conversation("chat", messages=[HELLO, turn, result, result, turn, result])
    ids = [c["id"] for m in messages for c in m.get("tool_calls", ())]
    assert len(set(ids)) == 4
    assert [m["tool_call_id"] for m in messages if m["role"] == "tool"] == ids[:3]


@pytest.mark.parametrize("turn", [{}, {"content": None}, {"content": "", "tool_calls": []}])
def test_an_assistant_without_content(turn: dict[str, Any]) -> None:
    messages = conversation("chat", messages=[HELLO, {"role": "assistant", **turn}, HELLO])
    assert messages[1] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("message", "body", "continued"),
    [
        ({}, {}, False),
        ({"prefix": True}, {}, True),
        ({"partial": True}, {}, True),
        ({}, {"continue_final_message": True, "add_generation_prompt": False}, True),
        ({}, {"continue_final_message": False, "add_generation_prompt": True}, False),
    ],
)
def test_a_last_message_that_is_continued(
    message: dict[str, Any], body: dict[str, Any], continued: bool
) -> None:
    messages = [HELLO, {"role": "assistant", "content": "I", **message}]
    assert parse("chat", messages=messages, **body).continue_final_message is continued


@pytest.mark.parametrize("body", [{}, {"continue_final_message": True}])
def test_a_prompt_either_begins_an_answer_or_continues_one(body: dict[str, Any]) -> None:
    messages = [HELLO, {"role": "assistant", "content": "I"}]
    begins = bool(body)
    assert refusal("chat", messages=messages, add_generation_prompt=begins, **body) == (
        "add_generation_prompt"
    )


@pytest.mark.parametrize("form", [{"schema": SCHEMA}, {"json_schema": {"schema": SCHEMA}}])
def test_a_format_with_its_schema_in_either_place(form: dict[str, Any]) -> None:
    form = {"type": "json_schema", **form}
    assert parse("chat", response_format=form).grammar == parse("chat", guided_json=SCHEMA).grammar


def test_openrouter_asks_for_usage_in_its_own_way() -> None:
    assert parse("chat", stream=True, usage={"include": True}).include_usage


@pytest.mark.parametrize("thinking", ["Hm", [{"type": "text", "text": "Hm"}]])
def test_reasoning_among_the_parts_of_a_content(thinking: Any) -> None:
    parts = [{"type": "thinking", "thinking": thinking}, {"type": "text", "text": "Hi"}]
    turn = conversation("chat", messages=[{"role": "assistant", "content": parts}, HELLO])[0]
    assert turn == {"role": "assistant", "content": "Hi", "reasoning_content": "Hm"}
    wrong = [{"type": "thinking", "thinking": 3}]
    assert refusal("chat", messages=[{"role": "assistant", "content": wrong}]) == (
        "messages[0].content[0].type"
    )


def test_tools_of_a_message_are_refused() -> None:
    message = {"role": "system", "content": "x", "tools": [NESTED]}
    assert refusal("chat", messages=[message, HELLO]) == "messages[0].tools"


@pytest.mark.parametrize(
    ("api", "field", "role"),
    [
        ("chat", "messages", "user"),
        ("responses", "input", "assistant"),
        ("messages", "messages", "assistant"),
    ],
)
def test_calls_where_none_are_read_are_not_lost(api: str, field: str, role: str) -> None:
    turn = {"role": role, "content": "x"}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = {field: [HELLO, {**turn, "tool_calls": [call]}, HELLO]}
    assert refusal(api, **body) == f"{field}[1].tool_calls"
    parse(api, **{field: [HELLO, {**turn, "tool_calls": []}, HELLO]})


def test_a_text_may_begin_without_the_first_token() -> None:
    assert not parse("completions", add_special_tokens=False).add_special_tokens
    assert parse("completions").add_special_tokens


# Responses


def test_no_previous_response() -> None:
    assert parse("responses", previous_response_id="").prompts == parse("responses").prompts


def test_instructions_as_items() -> None:
    items = [{"role": "developer", "content": [{"type": "input_text", "text": "Brief."}]}]
    messages = conversation("responses", instructions=items)
    assert messages == [{"role": "system", "content": "Brief."}, HELLO]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_a_limit_by_another_name(name: str) -> None:
    assert parse("responses", **{name: 5}).max_tokens == 5
    assert parse("responses", **{name: 5}, max_output_tokens=6).max_tokens == 6
    assert parse("responses", **{name: -1}).max_tokens is None


def test_additional_tools_stay_with_the_conversation() -> None:
    adapter = ResponsesAdapter()

    def ask(**body: Any) -> GenerationRequest:
        return adapter.parse(json.dumps(body).encode(), SERVED, "key")

    def keep(request: GenerationRequest, name: str) -> str:
        builder = adapter.respond(request, ResponseMeta(name, 1, "house", "fp"))
        list(builder.delta(0, OutputPart("text", "x")))
        assert request.on_response is not None
        request.on_response({"id": name, "output": []})
        return name

    item = {"type": "additional_tools", "role": "developer", "tools": [FLAT]}
    more = {"type": "additional_tools", "role": "developer", "tools": [{**FLAT, "name": "g"}]}
    first = keep(ask(input=[item, HELLO]), "r1")
    second = keep(ask(input=[HELLO], previous_response_id=first), "r2")
    request = ask(input=[more, HELLO], previous_response_id=second, instructions="x")
    assert [tool.name for tool in request.tools] == ["f", "g"]
    third = keep(request, "r3")
    assert [t.name for t in ask(input=[HELLO], previous_response_id=third).tools] == ["f", "g"]
    own = ask(input=[HELLO], previous_response_id=third, tools=[{**FLAT, "name": "own"}])
    assert [tool.name for tool in own.tools] == ["own", "f", "g"]


def test_items_that_are_left_out_are_said() -> None:
    items = [{"type": "web_search_call", "id": "w"}, {"type": "compaction"}, HELLO]
    (warning,) = parse("responses", input=items).warnings
    assert warning.endswith("compaction, web_search_call")


# Messages


@pytest.mark.parametrize("kind", ["container_upload", "web_search_tool_result", "mcp_tool_result"])
def test_blocks_of_server_tools_in_a_turn_of_the_user(kind: str) -> None:
    content = [{"type": kind, "file_id": "x"}, {"type": "text", "text": "Hi"}]
    request = parse("messages", messages=[{"role": "user", "content": content}])
    assert request.prompts == ((HELLO,),)
    assert kind in request.warnings[0]


@pytest.mark.parametrize("kind", ["video", "tool_use", "text_v2", "audio"])
def test_content_that_the_model_cannot_see_is_refused(kind: str) -> None:
    turn = {"role": "user", "content": [{"type": kind}]}
    assert refusal("messages", messages=[turn]) == "messages[0].content[0].type"


def test_a_last_turn_of_a_server_tool_alone() -> None:
    turn = {"role": "assistant", "content": [NO_EFFECT]}
    request = parse("messages", messages=[HELLO, turn])
    assert request.prompts == ((HELLO,),)
    assert not request.continue_final_message
    assert len(request.warnings) == 2


def test_a_compaction_takes_the_place_of_all_before_it() -> None:
    blocks = [{"type": "compaction", "content": "Sum."}, {"type": "text", "text": "Go on."}]
    turns = [HELLO, {"role": "assistant", "content": blocks}, HELLO]
    assert conversation("messages", messages=turns) == [
        {"role": "user", "content": "Sum."},
        {"role": "assistant", "content": "Go on."},
        HELLO,
    ]
    failed = [{"type": "compaction", "content": None}, {"type": "text", "text": "Go on."}]
    turns[1] = {"role": "assistant", "content": failed}
    assert len(conversation("messages", messages=turns)) == 3
    assert conversation("messages", messages=turns)[0] == HELLO


def test_long_conversations_are_read_in_time() -> None:
    """Work that grows with the square of their length is felt, and recursion ends."""
    many = 5_000
    summaries = [{"type": "compaction", "content": "x"}] * many
    parse("messages", messages=[{"role": "user", "content": summaries}])
    tool = {"name": "a", "input_schema": {}}
    inline = {"type": "tool_definition", "definition": tool}
    changes = [{"type": "tool_addition", "tool": inline}] * many
    parse("messages", messages=[HELLO, {"role": "system", "content": changes}])
    calls = [{"id": str(at), "function": {"name": "f"}} for at in range(many)]
    results = [{"role": "tool", "tool_call_id": str(many - at)} for at in range(many)]
    parse("chat", messages=[{"role": "assistant", "tool_calls": calls}, *results])
    parse("chat", messages=[{"role": "assistant", "tool_calls": calls}, *[{"role": "tool"}] * many])
    thoughts = [{"type": "thinking", "thinking": "x"}] * many
    parse("chat", messages=[{"role": "assistant", "content": thoughts}])


def test_too_many_tools_in_messages_are_refused() -> None:
    definitions = [{"name": f"f{at}", "input_schema": {}} for at in range(MAX_TOOLS + 1)]
    changes = [
        {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": one}}
        for one in definitions
    ]
    assert refusal("messages", messages=[HELLO, {"role": "system", "content": changes}]) == "tools"


def test_tools_that_a_conversation_changes() -> None:
    tool = {"name": "a", "input_schema": SCHEMA}
    inline = {"type": "tool_definition", "definition": {"name": "c", "input_schema": SCHEMA}}
    removed = {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "a"}}
    added = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "a"}}
    body = {"tools": [tool, {**tool, "name": "b"}]}

    def names(*changes: dict[str, Any]) -> list[str]:
        system = [{"role": "system", "content": [change]} for change in changes]
        return [t.name for t in parse("messages", messages=[HELLO, *system], **body).tools]

    assert names() == ["a", "b"]
    assert names(removed) == ["b"]
    assert names(removed, added) == ["a", "b"]
    assert names({"type": "tool_addition", "tool": inline}) == ["a", "b", "c"]


def test_a_system_message_for_one_turn() -> None:
    once = {"role": "system", "content": "Once.", "clear_at": "next_user_message"}
    texts = [m["content"] for m in conversation("messages", messages=[HELLO, once])]
    assert texts == ["Hi", "Once."]
    answer = {"role": "assistant", "content": "Ok."}
    later = conversation("messages", messages=[HELLO, once, answer, HELLO])
    assert [m["content"] for m in later] == ["Hi", "Ok.", "Hi"]


def test_reasoning_between_calls() -> None:
    thinking = {"type": "enabled", "budget_tokens": 2000}
    assert refusal("messages", thinking=thinking) == "thinking.budget_tokens"
    tool = {"name": "a", "input_schema": SCHEMA}
    assert parse("messages", thinking=thinking, tools=[tool]).thinking_budget == 2000
    between = {"type": "between_tools"}
    assert parse("messages", thinking=between).enable_thinking is False
    calls = [
        {"role": "assistant", "content": [{"type": "tool_use", "name": "a", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "content": "x"}]},
    ]
    assert parse("messages", thinking=between, messages=[HELLO, *calls]).enable_thinking is True


def test_a_thread_cannot_be_continued_and_the_error_says_what_to_do() -> None:
    with pytest.raises(InputError) as caught:
        parse("messages", thread={"type": "continue", "previous_message_id": "x"})
    error = render_error(caught.value)[1]["error"]
    assert error["details"] == {"error_code": "thread_not_found"}
    assert "send all messages" in error["message"]
    assert "remove it" not in error["message"]
    parse("messages", thread={"type": "create"})


def test_a_compaction_is_refused_and_counted() -> None:
    assert refusal("messages", compaction={"type": "summarize"}) == "compaction"
    assert parse("count", compaction={"type": "summarize"}).prompts == ((HELLO,),)
