"""OpenAI's API as plain data: what is read, what is refused and how, what is answered."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.errors import CenacleError, ClusterError, InputError, RankLost
from cenacle.request import Sampling
from cenacle.server import openai
from cenacle.server.openai import Asked, Choice, Refused, Reply, Served

SERVED = Served("house", 100, 50)
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Asked:
    return openai.read("chat", json.dumps({"messages": HELLO, **fields}).encode(), SERVED)


def text(**fields: Any) -> Asked:
    return openai.read("text", json.dumps({"prompt": "hello", **fields}).encode(), SERVED)


def refused(read: Any, body: dict[str, Any]) -> tuple[int, str | None, str | None, str]:
    """Status, param, code and message of the error that a body meets."""
    with pytest.raises(InputError) as caught:
        read(**body)
    status, data = openai.failure(caught.value)
    error = data["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return status, error["param"], error["code"], error["message"]


def test_the_defaults_are_those_of_openai() -> None:
    assert chat() == Asked("chat", (tuple(HELLO),), None, Sampling(temperature=1.0))
    assert text() == Asked("text", ("hello",), 16, Sampling(temperature=1.0))


def test_every_supported_parameter_is_read() -> None:
    asked = chat(
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
    assert asked == Asked("chat", (tuple(HELLO),), 7, sampling, ("a", "bc"), 2, True, True)
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


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logprobs": False},
        {"store": False},
        {"modalities": ["text"]},
        {"service_tier": "auto"},
    ],
)
def test_what_asks_for_nothing_is_accepted(extra: dict[str, Any]) -> None:
    assert chat(**extra) == chat()


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"metadata": {"a": "b"}}, "metadata"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"messages": [{**HELLO[0], "name": "x"}]}, "messages[0].name"),
        (
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages[1].tool_calls",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(extra: dict[str, Any], param: str) -> None:
    status, field, code, message = refused(chat, extra)
    assert (status, field, code) == (400, param, "unsupported_parameter")
    assert param in message


@pytest.mark.parametrize(
    ("read", "extra", "param"),
    [
        (chat, {"temprature": 1}, "temprature"),
        (chat, {"prompt": "x"}, "prompt"),
        (text, {"max_completion_tokens": 4}, "max_completion_tokens"),
        (text, {"messages": HELLO}, "messages"),
        (chat, {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        (chat, {"messages": [{**HELLO[0], "kontent": "x"}]}, "messages[0].kontent"),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}]},
            "messages[0].content[0].x",
        ),
    ],
)
def test_what_is_unknown_is_refused_by_name(read: Any, extra: dict[str, Any], param: str) -> None:
    assert refused(read, extra)[:3] == (400, param, "unknown_parameter")


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
    ("read", "extra", "param"),
    [
        (chat, {"max_tokens": 0}, "max_tokens"),
        (chat, {"max_completion_tokens": -1}, "max_completion_tokens"),
        (chat, {"temperature": 2.1}, "temperature"),
        (chat, {"temperature": -0.1}, "temperature"),
        (chat, {"top_p": 0}, "top_p"),
        (chat, {"top_k": -1}, "top_k"),
        (chat, {"min_p": 2}, "min_p"),
        (chat, {"seed": 2**63}, "seed"),
        (chat, {"repetition_penalty": 0}, "repetition_penalty"),
        (chat, {"presence_penalty": 3}, "presence_penalty"),
        (chat, {"frequency_penalty": -3}, "frequency_penalty"),
        (chat, {"n": 0}, "n"),
        (chat, {"n": 9}, "n"),
        (chat, {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        (chat, {"stop": ""}, "stop"),
        (chat, {"logit_bias": {"50": 1}}, "logit_bias.50"),
        (chat, {"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        (chat, {"logit_bias": {"x": 1}}, "logit_bias.x"),
        (chat, {"logit_bias": {"1": 101}}, "logit_bias.1"),
        (chat, {"stream_options": {"include_usage": True}}, "stream_options"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (chat, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (text, {"prompt": []}, "prompt"),
        (text, {"prompt": [[]]}, "prompt[0]"),
        (text, {"prompt": ["a"] * 33}, "prompt"),
        (text, {"prompt": ["a"] * 5, "n": 8}, "prompt"),
    ],
)
def test_wrong_values_name_the_field(read: Any, extra: dict[str, Any], param: str) -> None:
    assert refused(read, extra)[:3] == (400, param, "invalid_value")


@pytest.mark.parametrize("prompt", [3, {"a": 1}, [True], [1, "a"], ["a", 1], [[1], [True]], [None]])
def test_prompts_of_other_types_are_refused(prompt: Any) -> None:
    status, field, code, _ = refused(text, {"prompt": prompt})
    assert (status, code) == (400, "invalid_type")
    assert field
    assert field.startswith("prompt")


def test_both_limits_at_once_are_refused() -> None:
    both = {"max_tokens": 1, "max_completion_tokens": 1}
    assert refused(chat, both)[:3] == (400, "max_tokens", "invalid_parameter_combination")


@pytest.mark.parametrize(
    ("read", "extra", "param"),
    [
        (chat, {"messages": None}, "messages"),
        (text, {"prompt": None}, "prompt"),
        (chat, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (chat, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ],
)
def test_what_is_missing_is_named(read: Any, extra: dict[str, Any], param: str) -> None:
    assert refused(read, extra)[:3] == (400, param, "missing_required_parameter")


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
    with pytest.raises(Refused) as caught:
        openai.read("chat", body, SERVED)
    assert (caught.value.status, caught.value.code) == (400, "invalid_body")


def test_a_refusal_does_not_repeat_what_is_long() -> None:
    for extra in ({"model": "x" * 9999}, {"y" * 9999: 1}, {"temperature": "z" * 9999}):
        assert len(refused(chat, extra)[3]) < 300


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_NAMES = [
    "logit_bias",
    "max_tokens",
    "messages",
    "model",
    "n",
    "presence_penalty",
    "prompt",
    "response_format",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "tools",
    "top_k",
    "unknown",
    "user",
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["chat", "text"]), st.dictionaries(st.sampled_from(_NAMES), _JSON))
def test_whatever_comes_is_read_or_refused(kind: Any, fields: dict[str, Any]) -> None:
    body = {"messages" if kind == "chat" else "prompt": HELLO if kind == "chat" else "x", **fields}
    try:
        asked = openai.read(kind, json.dumps(body).encode(), SERVED)
    except InputError as error:
        json.dumps(openai.failure(error))
    else:
        assert len(asked.prompts) * asked.n >= 1


def test_a_prompt_must_leave_room_for_an_answer() -> None:
    assert openai.room(99, SERVED, "prompt") == 1
    assert openai.room(99, replace(SERVED, context=None), "prompt") is None
    with pytest.raises(Refused, match="100 tokens") as caught:
        openai.room(100, SERVED, "messages")
    assert (caught.value.field, caught.value.code) == ("messages", "context_length_exceeded")


def test_choices_have_seeds_of_their_own_and_the_first_has_the_one_given() -> None:
    asked = chat(seed=2**63 - 1, n=3)
    assert [asked.sampling_of(i).seed for i in range(3)] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert chat(n=2).sampling_of(1).seed is None


def reply(**fields: Any) -> Reply:
    return Reply(chat(**fields), "1", 7, "house", "fp_1")


def test_a_whole_chat_answer() -> None:
    usage = openai.usage(3, 2)
    choices = [Choice(1, "b", "length"), Choice(0, "a", "stop")]
    head = {"id": "chatcmpl-1", "created": 7, "model": "house", "system_fingerprint": "fp_1"}
    assert reply().whole(choices, usage) == {
        **head,
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": None,
                "finish_reason": finish,
            }
            for index, content, finish in [(0, "a", "stop"), (1, "b", "length")]
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_the_chunks_of_a_chat() -> None:
    plain = reply(stream=True)
    chunks = [plain.opening(0), plain.piece(0, "a"), plain.closing(0, "stop")]
    deltas = [c["choices"][0]["delta"] for c in chunks if c]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {}]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c] == [None, None, "stop"]
    assert {c["object"] for c in chunks if c} == {"chat.completion.chunk"}
    assert all("usage" not in c for c in chunks if c)
    assert plain.counted(openai.usage(1, 1)) is None
    counting = reply(stream=True, stream_options={"include_usage": True})
    assert counting.piece(0, "a")["usage"] is None
    last = counting.counted(openai.usage(1, 2))
    assert last is not None
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 3)


def test_completions_have_their_own_shapes() -> None:
    plain = Reply(text(), "1", 7, "house", "fp_1")
    whole = plain.whole([Choice(0, "a", "stop")], openai.usage(1, 1))
    assert (whole["id"], whole["object"]) == ("cmpl-1", "text_completion")
    assert whole["choices"][0] == {
        "index": 0,
        "text": "a",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert plain.opening(0) is None
    assert plain.piece(2, "x")["choices"][0]["text"] == "x"
    assert plain.closing(2, "length")["object"] == "text_completion"


def test_errors_of_the_group_are_not_the_clients() -> None:
    for error in (ClusterError("gone"), RankLost(1, "rank 1 was killed")):
        status, data = openai.failure(error)
        assert (status, data["error"]["type"]) == (503, "server_error")
        assert data["error"]["message"] == str(error)
    assert openai.failure(CenacleError("x"))[0] == 500
    assert openai.failure(InputError("x", "prompt"))[1]["error"]["param"] == "prompt"


def test_it_needs_neither_mlx_nor_starlette() -> None:
    code = (
        "import sys, cenacle.server.openai;"
        "print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'starlette')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
