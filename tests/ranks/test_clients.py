"""The clients that people use, against a server of one node and one of two, with the same
expectations: OpenAI's and Anthropic's Python clients, and the command-line tool `llm`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pydantic
import pytest
from test_server import DEMO, END, Server, server

from support.http import HTTP

QUESTION = "What is 12 + 30?"
SUM: Any = [{"role": "user", "content": QUESTION}]
MODEL = "house"
# The demo's words, and tools and reasoning in the way that many models have them.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    '<tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}"
    '<tool_call>{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if reasoning_effort %}<think>{% endif %}{% endif %}"
)
PLACE = {
    "type": "object",
    "properties": {
        "place": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["place", "days"],
    "additionalProperties": False,
}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}
RESPONSES_TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": PLACE,
    "strict": True,
}
ANTHROPIC_TOOL: Any = {"name": "weather", "input_schema": PLACE}


class Forecast(pydantic.BaseModel):
    """What an answer is made to be."""

    rain: bool
    degrees: int = pydantic.Field(ge=-50, le=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, with a template for tools, and two of its spare tokens as marks of reasoning."""
    house = tmp_path_factory.mktemp("model") / MODEL
    shutil.copytree(DEMO, house)
    (house / "chat_template.jinja").write_text(TEMPLATE)
    words = (house / "tokenizer.json").read_text()
    for spare, mark in (("<|reserved_0|>", "<think>"), ("<|reserved_1|>", "</think>")):
        words = words.replace(json.dumps(spare), json.dumps(mark))
    (house / "tokenizer.json").write_text(words)
    settings = json.loads((house / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (house / "tokenizer_config.json").write_text(json.dumps(settings))
    return house


@pytest.fixture(scope="module", params=[1, 2], ids=["one-node", "two-nodes"])
def served(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("log") / "log", request.param, model=folder) as running:
        yield running
        log = running.log.read_text()
        assert "internal error" not in log
        assert "Traceback" not in log


@pytest.fixture(scope="module")
def client(served: Server) -> Iterator[openai.OpenAI]:
    with served.client() as made:
        yield made


@pytest.fixture(scope="module")
def claude(served: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="-", max_retries=0, timeout=300) as made:
        yield made


def check_arguments(text: str) -> None:
    made = json.loads(text)
    assert made["place"] in ("Oslo", "Rome")
    assert 1 <= made["days"] <= 9


# OpenAI's client: chat completions


def test_chat_and_stream_say_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=SUM, temperature=0)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("42", "stop")
    with client.chat.completions.stream(model=MODEL, messages=SUM, temperature=0) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "42"


def test_forced_calls(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        options: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Weather?"}],
            "tools": [CHAT_TOOL],
            "tool_choice": choice,
            "parallel_tool_calls": False,
        }
        whole = client.chat.completions.create(**options, temperature=0)
        assert whole.choices[0].finish_reason == "tool_calls"
        (call,) = whole.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert (call.function.name, whole.choices[0].message.content) == ("weather", None)
        check_arguments(call.function.arguments)
        with client.chat.completions.stream(**options, temperature=0) as stream:
            (same,) = stream.get_final_completion().choices[0].message.tool_calls or []
        assert same.function.arguments == call.function.arguments
    # The result goes back with the call.
    messages = [
        *options["messages"],
        whole.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        *SUM,
    ]
    after = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[CHAT_TOOL], max_tokens=4
    )
    assert after.choices[0].message.tool_calls is None


def test_answers_of_a_form(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=SUM, response_format=Forecast, temperature=1, seed=4
    )
    assert isinstance(parsed.choices[0].message.parsed, Forecast)
    formatted = client.chat.completions.create(
        model=MODEL,
        messages=SUM,
        temperature=2,
        seed=5,
        response_format={"type": "regex", "pattern": "[a-c]{3}-[0-9]{2}"},  # type: ignore
    )
    head, _, tail = (formatted.choices[0].message.content or "").partition("-")
    assert set(head) <= set("abc")
    assert (len(head), len(tail), tail.isdigit()) == (3, 2, True)
    one = client.completions.create(
        model=MODEL,
        prompt="x",
        extra_body={"response_format": {"type": "grammar", "grammar": 'start: "yes" | "no"'}},
    )
    assert one.choices[0].text in ("yes", "no")
    endless: Any = {"name": "x", "schema": {"$ref": "#"}}
    with pytest.raises(openai.BadRequestError, match="no text matches") as nothing:
        client.chat.completions.create(
            model=MODEL,
            messages=SUM,
            response_format={"type": "json_schema", "json_schema": endless},
        )
    assert nothing.value.param == "response_format.json_schema.schema"
    with pytest.raises(openai.BadRequestError, match="patternless") as refused:
        client.chat.completions.create(
            model=MODEL,
            messages=SUM,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "patternless"}},
            },
        )
    assert refused.value.param == "response_format.json_schema.schema"


def test_log_probabilities(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=SUM, temperature=0, logprobs=True, top_logprobs=3
    )
    logs = whole.choices[0].logprobs
    assert logs is not None
    assert [one.token for one in logs.content or []] == ["4", "2"]
    for one in logs.content or []:
        assert bytes(one.bytes or []).decode() == one.token
        assert one.top_logprobs[0].token == one.token
        assert one.logprob == one.top_logprobs[0].logprob <= 0
        assert len(one.top_logprobs) == 3
    with client.chat.completions.create(
        model=MODEL, messages=SUM, temperature=0, logprobs=True, top_logprobs=3, stream=True
    ) as stream:
        chunks = [c.choices[0].logprobs for c in stream]
    streamed = [one for c in chunks if c is not None for one in c.content or []]
    assert [one.token for one in streamed] == ["4", "2"]
    assert [one.logprob for one in streamed] == pytest.approx(
        [one.logprob for one in logs.content or []], abs=1e-3
    )
    text = client.completions.create(
        model=MODEL, prompt=rendered(QUESTION), temperature=0, logprobs=2, max_tokens=2
    )
    shown = text.choices[0].logprobs
    assert shown is not None
    assert (shown.tokens, shown.text_offset) == (["4", "2"], [0, 1])
    assert [len(top) for top in shown.top_logprobs or []] == [2, 2]


def rendered(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_seed_n_stop_and_echo(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": SUM, "temperature": 2, "max_tokens": 8}
    options["logit_bias"] = {str(END): -100}
    several = client.chat.completions.create(**options, seed=7, n=3)
    texts = [c.message.content for c in several.choices]
    assert len(set(texts)) == 3
    assert client.chat.completions.create(**options, seed=7).choices[0].message.content == texts[0]
    stopped = client.chat.completions.create(model=MODEL, messages=SUM, temperature=0, stop="2")
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("4", "stop")
    echo = client.completions.create(
        model=MODEL, prompt=rendered(QUESTION), temperature=0, echo=True, max_tokens=2
    )
    assert echo.choices[0].text == rendered(QUESTION) + "42"


def test_choices_in_one_stream_are_those_of_the_whole_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": SUM,
        "n": 2,
        "seed": 3,
        "temperature": 1.5,
        "top_p": 0.95,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "max_completion_tokens": 6,
        "logit_bias": {str(END): -100},
        "extra_body": {"min_p": 0.001, "top_k": 50, "repetition_penalty": 1.1},
    }
    whole = client.chat.completions.create(**options)
    with client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, counted = stream
    assert counted.choices == []
    assert counted.usage is not None
    assert whole.usage is not None
    assert counted.usage.completion_tokens == whole.usage.completion_tokens == 12
    assert {c.usage for c in chunks} == {None}
    for index in range(2):
        own = [c.choices[0] for c in chunks if c.choices[0].index == index]
        text = "".join(one.delta.content or "" for one in own)
        assert text == whole.choices[index].message.content
        assert own[0].delta.role == "assistant"
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + ["length"]


def test_only_allowed_tools_are_called(client: openai.OpenAI) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": PLACE}}
    allowed: Any = {
        "mode": "required",
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    }
    whole = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Weather?"}],
        tools=[other, CHAT_TOOL],  # type: ignore
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        parallel_tool_calls=False,
        temperature=2,
        seed=1,
    )
    (call,) = whole.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    check_arguments(call.function.arguments)


def test_reasoning_is_apart(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL,
        messages=SUM,
        reasoning_effort="low",
        max_tokens=5,
        logit_bias={str(END): -100, "363": -100, "364": -100},
    )
    message = whole.choices[0].message
    assert message.content == ""
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"]
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens == 5
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens is not None


def test_reasoning_can_be_left_out_and_an_unknown_effort_is_said(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=SUM,
        reasoning_effort="ultra",  # type: ignore[arg-type]
        max_tokens=5,
        logit_bias={str(END): -100, "363": -100, "364": -100},
        extra_body={"reasoning": {"exclude": True}},
    )
    assert "'ultra': taken as max" in raw.headers["x-cenacle-warning"]
    whole = raw.parse()
    message = whole.choices[0].message
    assert (message.content, message.model_extra) == ("", {})
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens == 5


def test_reasoning_comes_before_an_answer_of_a_form(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL,
        messages=SUM,
        reasoning_effort="low",
        response_format=Forecast,
        logit_bias={"364": 100},  # ends reasoning at once
    )
    assert isinstance(parsed.choices[0].message.parsed, Forecast)
    assert parsed.usage is not None
    assert parsed.usage.completion_tokens_details is not None
    assert parsed.usage.completion_tokens_details.reasoning_tokens == 1


# OpenAI's client: responses


def test_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input=QUESTION, temperature=0)
    assert (whole.output_text, whole.status) == ("42", "completed")
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == "42"
    short = client.responses.create(
        model=MODEL, instructions="Be brief.", input=SUM, max_output_tokens=1, temperature=0
    )
    assert short.incomplete_details is not None
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    parsed = client.responses.parse(model=MODEL, input=QUESTION, text_format=Forecast)
    assert isinstance(parsed.output_parsed, Forecast)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=MODEL, input=QUESTION, previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"


def test_responses_that_are_calls(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "tools": [RESPONSES_TOOL],
        "tool_choice": {"type": "function", "name": "weather"},
        "temperature": 0,
    }
    whole = client.responses.create(**options, input="Weather?")
    (call,) = whole.output
    assert call.type == "function_call"
    assert call.name == "weather"
    check_arguments(call.arguments)
    with client.responses.stream(**options, input="Weather?") as stream:
        kinds = [e.type for e in stream]
        (same,) = stream.get_final_response().output
    assert "response.function_call_arguments.done" in kinds
    assert same.type == "function_call"
    assert same.arguments == call.arguments
    history: Any = [
        {"role": "user", "content": "Weather?"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    after = client.responses.create(model=MODEL, input=history, max_output_tokens=3)
    assert after.usage is not None
    assert after.usage.output_tokens == 3 or after.status == "completed"


def test_events_come_in_order(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with client.responses.create(model=MODEL, input=QUESTION, temperature=0, stream=True) as stream:
        events = list(stream)
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type.removeprefix("response.") for e in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    ends = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds[-4:] == ends
    with claude.messages.create(
        model=MODEL, max_tokens=20, messages=SUM, extra_body=GREEDY, stream=True
    ) as blocks_stream:
        blocks = [e.type for e in blocks_stream]
    assert blocks[:2] == ["message_start", "content_block_start"]
    assert set(blocks[2:-3]) == {"content_block_delta"}
    assert blocks[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_stream_begins_with_the_cached_tokens_that_it_ends_with(
    claude: anthropic.Anthropic,
) -> None:
    system = "Answer in one number. " * 20
    for attempt in range(2):
        with claude.messages.create(
            model=MODEL,
            max_tokens=4,
            system=system,
            messages=SUM,
            extra_body=GREEDY,
            stream=True,
        ) as stream:
            events = list(stream)
        start, end = (e for e in events if e.type in ("message_start", "message_delta"))
        counts = start.message.usage.input_tokens, start.message.usage.cache_read_input_tokens
        assert counts == (end.usage.input_tokens, end.usage.cache_read_input_tokens)
        assert counts[1] or not attempt, "the second one finds the first one's prompt"


# Anthropic's client, whose newest version has no word for temperature

GREEDY = {"temperature": 0}


def test_messages(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(model=MODEL, max_tokens=20, messages=SUM, extra_body=GREEDY)
    (block,) = whole.content
    assert block.type == "text"
    assert (block.text, whole.stop_reason, whole.role) == ("42", "end_turn", "assistant")
    with claude.messages.stream(
        model=MODEL, max_tokens=20, messages=SUM, extra_body=GREEDY
    ) as stream:
        assert "".join(stream.text_stream) == "42"
        final = stream.get_final_message()
    assert final.usage.output_tokens == whole.usage.output_tokens == 3
    assert whole.usage.cache_read_input_tokens is not None
    counted = claude.messages.count_tokens(model=MODEL, messages=SUM)
    assert counted.input_tokens == (whole.usage.input_tokens + whole.usage.cache_read_input_tokens)


def test_a_changing_billing_line_does_not_defeat_the_prefix_cache(
    claude: anthropic.Anthropic, client: openai.OpenAI
) -> None:
    rest = "You are an agent. " + "Read, write and run. " * 10

    def line(number: int) -> str:
        return f"x-anthropic-billing-header: cc_version=2.1.{number}; cch={number:05x};"

    def cached(number: int) -> tuple[int, int]:
        system: Any = [{"type": "text", "text": text} for text in (line(number), rest)]
        answer = claude.messages.create(model=MODEL, max_tokens=2, system=system, messages=SUM)
        hit = answer.usage.cache_read_input_tokens or 0
        return hit, hit + answer.usage.input_tokens

    first, second = cached(1), cached(23456)
    assert first[0] < second[0] == second[1] - 1
    assert second[1] == first[1]
    system: Any = {"role": "system", "content": f"{line(789)}\n\n{rest}"}
    chat = client.chat.completions.create(model=MODEL, max_tokens=2, messages=[system, *SUM])
    assert chat.usage
    assert chat.usage.prompt_tokens_details
    assert chat.usage.prompt_tokens_details.cached_tokens == chat.usage.prompt_tokens - 1


def test_stop_reasons(claude: anthropic.Anthropic) -> None:
    cut = claude.messages.create(model=MODEL, max_tokens=1, messages=SUM, extra_body=GREEDY)
    assert cut.stop_reason == "max_tokens"
    stopped = claude.messages.create(
        model=MODEL, max_tokens=9, messages=SUM, stop_sequences=["2"], extra_body=GREEDY
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "2")
    begun: Any = [*SUM, {"role": "assistant", "content": "4"}]
    rest = claude.messages.create(model=MODEL, max_tokens=9, messages=begun, extra_body=GREEDY)
    assert [b.text for b in rest.content if b.type == "text"] == ["2"]


def test_tools_in_messages(claude: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 100,
        "tools": [ANTHROPIC_TOOL],
        "extra_body": GREEDY,
        "system": "Be brief.",
    }
    ask: Any = [{"role": "user", "content": "Weather?"}]
    for choice in (
        {"type": "any", "disable_parallel_tool_use": True},
        {"type": "tool", "name": "weather"},
    ):
        whole = claude.messages.create(**options, messages=ask, tool_choice=choice)
        (call,) = whole.content
        assert call.type == "tool_use"
        assert (call.name, whole.stop_reason) == ("weather", "tool_use")
        check_arguments(json.dumps(call.input))
        with claude.messages.stream(**options, messages=ask, tool_choice=choice) as stream:
            (same,) = stream.get_final_message().content
        assert same.type == "tool_use"
        assert same.input == call.input
    history = [
        *ask,
        {"role": "assistant", "content": [call]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}],
        },
    ]
    after = claude.messages.create(**{**options, "max_tokens": 2}, messages=history)
    assert after.usage.output_tokens <= 2


def test_thinking_in_messages(claude: anthropic.Anthropic) -> None:
    history: Any = [
        *SUM,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Add.", "signature": ""},
                {"type": "text", "text": "42"},
            ],
        },
        *SUM,
    ]
    thinking: Any = {"type": "adaptive"}
    whole = claude.messages.create(model=MODEL, max_tokens=3, messages=history, thinking=thinking)
    assert whole.type == "message"


def test_errors_of_messages(claude: anthropic.Anthropic, served: Server) -> None:
    with pytest.raises(anthropic.NotFoundError, match="house"):
        claude.messages.create(model="claude-house", max_tokens=1, messages=SUM)
    with pytest.raises(anthropic.BadRequestError, match="top_k") as refused:
        claude.messages.create(model=MODEL, max_tokens=1, messages=SUM, extra_body={"top_k": -2})
    assert refused.value.body == {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "top_k: expected at least -1, got -2",
        },
    }
    wrong = HTTP.get(f"{served.url}/v1/messages")
    assert (wrong.status_code, wrong.json()["type"]) == (405, "error")
    assert [m.id for m in claude.models.list()] == [MODEL]


# The command-line tool


def test_llm(served: Server, tmp_path: Path) -> None:
    assert llm(served, tmp_path, "-o", "temperature", "0", QUESTION) == "42"
    made = json.loads(
        llm(served, tmp_path, "--responses", "--schema", json.dumps(PLACE), "Weather?")
    )
    check_arguments(json.dumps(made))


def llm(served: Server, home: Path, *arguments: str) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "llm", "openai", "endpoint", f"{served.url}/v1"),
            *("-m", MODEL, "--key", "-", *arguments),
        ],
        env={**os.environ, "LLM_USER_PATH": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Tokens of texts and chats


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_texts_to_tokens_and_back(served: Server, prefix: str) -> None:
    def post(path: str, **body: Any) -> Any:
        answer = HTTP.post(f"{served.url}{prefix}/{path}", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    text = "What is 12 + 30?\n \x00 € \N{GRINNING FACE}"
    counted = post("tokenize", model=MODEL, prompt=text, return_token_strs=True)
    tokens = counted["tokens"]
    assert (counted["count"], counted["max_model_len"]) == (len(tokens), 1024)
    assert len(counted["token_strs"]) == len(tokens) > 10
    assert post("detokenize", model=MODEL, tokens=tokens)["prompt"] == text
    # llama.cpp's form
    assert post("tokenize", content=text, add_special=True)["tokens"] == tokens
    pieces = post("tokenize", content=text, with_pieces=True)["tokens"]
    assert [piece["id"] for piece in pieces] == tokens
    data = [p["piece"] for p in pieces]
    joined = b"".join(d.encode() if isinstance(d, str) else bytes(d) for d in data)
    assert joined.decode() == text
    assert post("detokenize", tokens=tokens)["content"] == text
    assert post("tokenize", content="")["tokens"] == []
    assert post("detokenize", tokens=[])["content"] == ""


def test_the_tokens_of_a_chat_are_those_of_its_completion(
    served: Server, client: openai.OpenAI
) -> None:
    def tokens(**body: Any) -> list[int]:
        answer = HTTP.post(f"{served.url}/tokenize", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["tokens"]
        return ids

    chats: list[dict[str, Any]] = [
        {"messages": SUM},
        {"messages": SUM, "tools": [CHAT_TOOL], "reasoning_effort": "high"},
    ]
    for chat in chats:
        answer = client.chat.completions.create(model=MODEL, max_tokens=1, **chat)
        assert answer.usage is not None
        assert len(tokens(**chat)) == answer.usage.prompt_tokens
    assert tokens(messages=SUM, add_special_tokens=True) == tokens(messages=SUM)  # it has none
    plain = tokens(messages=SUM, add_generation_prompt=False)
    assert plain == tokens(messages=SUM)[: len(plain)]
    assert len(plain) < len(tokens(messages=SUM))
    begun = [*SUM, {"role": "assistant", "content": "The"}]
    continued = tokens(messages=begun, add_generation_prompt=False, continue_final_message=True)
    assert continued[: len(tokens(messages=SUM))] == tokens(messages=SUM)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": 3}, "prompt"),
        ("tokenize", {"prompt": "a", "content": "a"}, "content"),
        ("tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("tokenize", {"messages": []}, "messages"),
        ("tokenize", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ("tokenize", {"content": "a", "parse_special": False}, "parse_special"),
        (
            "tokenize",
            {"messages": SUM, "continue_final_message": True},
            "add_generation_prompt",
        ),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": "a"}, "tokens"),
        ("detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("detokenize", {"tokens": [2**70]}, "tokens[0]"),
        ("detokenize", {"tokens": [1, "a"]}, "tokens[1]"),
        ("tokenize", {"prompt": "a" * 1_000_001}, "prompt"),
        ("tokenize", {"content": "a" * 1_000_001}, "content"),
        ("detokenize", {"tokens": [1] * 500_001}, "tokens"),
    ],
)
def test_wrong_bodies_for_the_tokenizer(
    served: Server, path: str, body: dict[str, Any], field: str
) -> None:
    answer = HTTP.post(f"{served.url}/{path}", json=body, timeout=300)
    assert answer.status_code == (404 if field == "model" else 400), answer.text
    assert answer.json()["error"]["param"] == field


# The description


def test_every_path_that_is_described_is_there(served: Server) -> None:
    paths = HTTP.get(f"{served.url}/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for method in methods:
            url = served.url + path.replace("{name}", MODEL)
            answer = HTTP.request(method, url, content=b"" if method == "post" else None)
            expected = 404 if "{id}" in path else 400 if method == "post" else 200
            assert answer.status_code == expected, path
            described = methods[method]["responses"]
            assert str(answer.status_code) in described, path
