"""Every field, message, block, item and tool that the installed openai and anthropic packages can
send is obeyed, ignored for a stated reason, or refused by name."""

import json
import types
import typing
from collections.abc import Iterator
from typing import (
    Any,
    Literal,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import anthropic.types as anthropic_types
import anthropic.types.beta as beta_types
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params
from openai.types import chat as chat_types
from openai.types import completion_create_params as completion_params
from openai.types import responses as response_types
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from typing_extensions import is_typeddict

from cenacle.errors import InputError
from cenacle.server.api.anthropic import CountTokensAdapter, MessagesAdapter
from cenacle.server.api.openai import ChatCompletionsAdapter, CompletionsAdapter
from cenacle.server.api.openai_responses import ResponsesAdapter
from cenacle.server.api.protocol import ApiAdapter, GenerationRequest, ServedModel

SERVED = ServedModel("house", 100_000, 1000, any_name=True)
HELLO = [{"role": "user", "content": "Hi"}]

# What a server may do as it likes: the answer has the same meaning.
BILLING = "who pays, who asks, how soon"
CACHE = "prompts are always cached"
HOSTED = "what only the API's own servers run is left out"
WORDS = "advice on style, which no checkpoint can take"
SAFETY = "there is no filter"
DIAGNOSTICS = "reports beside the answer"
IGNORED = {
    "betas": "names of features; each is obeyed or refused by its own parameters",
    "billing_policy": BILLING,
    "compaction": "of count_tokens: the API ignores it, too",
    "cache_control": CACHE,
    "container": HOSTED,
    "context_management": "a context that is too long is refused, not shortened",
    "diagnostics": DIAGNOSTICS,
    "fallback_credit_token": BILLING,
    "fallbacks": "one model is served",
    "inference_geo": BILLING,
    "max_tool_calls": HOSTED,
    "mcp_servers": HOSTED,
    "metadata": BILLING,
    "moderation": SAFETY,
    "prediction": "makes an answer faster, not another one",
    "prompt_cache_options": CACHE,
    "prompt_cache_retention": CACHE,
    "service_tier": BILLING,
    "speed": BILLING,
    "store": "chat completions are kept for a dashboard only",
    "truncation": "a context that is too long is refused, not shortened",
    "user_profile_id": BILLING,
    "verbosity": WORDS,
    "web_search_options": HOSTED,
    "workspace_id": BILLING,
    "stream_options": "of responses: how events are padded",
}
APIS: dict[str, tuple[type[ApiAdapter], dict[str, Any], list[Any]]] = {
    "chat": (
        ChatCompletionsAdapter,
        {"model": "house", "messages": HELLO},
        [chat_params.CompletionCreateParamsNonStreaming],
    ),
    "completions": (
        CompletionsAdapter,
        {"model": "house", "prompt": "Hi"},
        [completion_params.CompletionCreateParamsNonStreaming],
    ),
    "responses": (
        ResponsesAdapter,
        {"model": "house", "input": "Hi"},
        [response_params.ResponseCreateParamsNonStreaming],
    ),
    "messages": (
        MessagesAdapter,
        {"model": "house", "messages": HELLO, "max_tokens": 2048},
        [
            message_create_params.MessageCreateParamsNonStreaming,
            beta_create_params.MessageCreateParamsNonStreaming,
        ],
    ),
    "count_tokens": (
        CountTokensAdapter,
        {"model": "house", "messages": HELLO},
        [
            message_count_tokens_params.MessageCountTokensParams,
            beta_count_tokens_params.MessageCountTokensParams,
        ],
    ),
}


def hints_of(typed: Any) -> dict[str, Any]:
    return get_type_hints(typed, include_extras=True)


def typical(annotation: Any, name: str = "") -> Any:
    """A value of a type: of a union the first, of an object what is required."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_typeddict(annotation):
        hints = hints_of(annotation)
        required = [n for n, hint in hints.items() if get_origin(hint) is Required]
        return {n: typical(hints[n], n) for n in required}
    if origin in (Required, typing.NotRequired, typing.Annotated):
        return typical(arguments[0], name)
    if origin is Literal:
        return arguments[0]
    if origin in (Union, types.UnionType):
        return typical(next(a for a in arguments if a is not type(None)), name)
    if annotation in (str, bool, int, float):
        return {str: "x", bool: True, int: 1024, float: 0.5}[annotation]
    if origin is dict or annotation is object:
        return {}
    if origin is not None:  # some kind of list
        return [typical(arguments[0], name)]
    return {}


def members(union: Any) -> Iterator[Any]:
    """The typed dicts of a union."""
    if is_typeddict(union):
        yield union
    else:
        for argument in get_args(union):
            yield from members(argument)


def tag_of(typed: Any) -> str:
    value = typical(typed)
    return str(value.get("type") or value.get("role"))


def parse(api: str, extra: dict[str, Any]) -> GenerationRequest:
    adapter, body, _ = APIS[api]
    return adapter().parse(json.dumps({**body, **extra}).encode(), SERVED)


# Values that are typical but make no sense alone.
SPECIAL: dict[str, Any] = {
    "best_of": 1,
    "context_management": {},
    "function_call": "auto",
    "logit_bias": {"5": 1},
    "mcp_servers": [{"type": "url", "name": "x", "url": "http://x"}],
    "messages": HELLO,
    "modalities": ["audio"],
    "n": 2,
    "prompt": "Hi",
    "response_format": {"type": "json_object"},
    "temperature": 0.5,
    "thread": {"type": "create"},
    "tool_choice": "auto",
    "top_logprobs": 0,
    "top_p": 0.5,
}
FIELDS = [
    (api, name)
    for api, (_, _, typed) in APIS.items()
    for name in sorted({name for one in typed for name in hints_of(one)})
]


def value_of(api: str, name: str) -> Any:
    _, body, typed = APIS[api]
    if name in body:
        return body[name]
    if name == "tool_choice" and api in ("messages", "count_tokens"):
        return {"type": "auto"}
    if name == "prompt" and api == "responses":
        return {"id": "pmpt_1"}
    if name == "context_management" and api == "responses":
        return [{"type": "compaction"}]
    if name == "previous_response_id":
        return ""
    if name == "logprobs" and api == "completions":
        return 1
    if SPECIAL.get(name) is not None:
        return SPECIAL[name]
    return next(typical(hints_of(one)[name], name) for one in typed if name in hints_of(one))


@pytest.mark.parametrize(("api", "name"), FIELDS)
def test_every_field_is_obeyed_ignored_for_a_reason_or_refused_by_name(api: str, name: str) -> None:
    model = APIS[api][0].request_model
    value = value_of(api, name)
    if name in model.model_fields:
        assert f"{name}: ignored" not in parse(api, {name: value}).warnings
    elif name in model.unsupported:
        with pytest.raises(InputError) as caught:
            parse(api, {name: value if name != "function_call" else {"name": "f"}})
        assert (caught.value.field or "").startswith(name)
    else:
        assert name in IGNORED, "obey it, refuse it, or state why it may be ignored"
        assert f"{name}: ignored" in parse(api, {name: value}).warnings


# Content that the model would have to see, and cannot; a request to do something else.
REFUSED = {
    "chat": {"image_url", "input_audio", "file"},
    "input": {"input_image", "input_file", "compaction_trigger", "item_reference"},
    "block": {"image", "browser_state"},
}
CHAT_PARTS = [*members(chat_types.ChatCompletionContentPartParam)]
CHAT_MESSAGES = [*members(chat_types.ChatCompletionMessageParam)]
ITEMS = [*members(response_types.ResponseInputItemParam)]
RESPONSE_TOOLS = [*members(response_types.ToolParam)]
BLOCKS = [*members(beta_types.BetaContentBlockParam)]
CLAUDE_TOOLS = [*members(beta_types.BetaToolUnionParam)]


def check(api: str, extra: dict[str, Any], refused: bool, field: str) -> None:
    if not refused:
        assert parse(api, extra).prompts[0]
        return
    with pytest.raises(InputError) as caught:
        parse(api, extra)
    assert (caught.value.field or "").startswith(field)


@pytest.mark.parametrize("part", CHAT_PARTS, ids=tag_of)
def test_every_part_of_a_chat(part: Any) -> None:
    content = [typical(part)]
    refused = tag_of(part) in REFUSED["chat"]
    check("chat", {"messages": [{"role": "user", "content": content}]}, refused, "messages[0]")


@pytest.mark.parametrize("message", CHAT_MESSAGES, ids=tag_of)
def test_every_message_of_a_chat(message: Any) -> None:
    check("chat", {"messages": [typical(message), *HELLO]}, False, "")


@pytest.mark.parametrize("item", ITEMS, ids=tag_of)
def test_every_item_of_an_input(item: Any) -> None:
    value = typical(item)
    if "arguments" in value and isinstance(value["arguments"], str):
        value["arguments"] = "{}"
    if value.get("type") == "message" or ("role" in value and "content" in value):
        value["content"] = [{"type": "output_text", "text": "x", "annotations": []}]
    refused = value.get("type", "item_reference") in REFUSED["input"] and "role" not in value
    check("responses", {"input": [value, *HELLO]}, refused, "input[0]")


@pytest.mark.parametrize("tool", RESPONSE_TOOLS, ids=tag_of)
def test_every_tool_of_responses(tool: Any) -> None:
    request = parse("responses", {"tools": [typical(tool)]})
    offered = tag_of(tool) in ("function", "custom")
    assert len(request.tools) == offered
    assert any(warning.startswith("tools[0]") for warning in request.warnings) is not offered


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("block", BLOCKS, ids=tag_of)
def test_every_block_of_a_turn(block: Any, role: str) -> None:
    value = typical(block)
    tag = value["type"]
    if tag in ("document", "image"):
        value["source"] = {"type": "text", "data": "x", "media_type": "text/plain"}
    foreign = {"user": ("thinking", "tool_use", "tool_addition", "tool_removal")}
    foreign["assistant"] = ("tool_result",)
    refused = tag in (*REFUSED["block"], *foreign[role])
    turns = [*HELLO, {"role": role, "content": [value]}, *HELLO]
    check("messages", {"messages": turns}, refused, "messages[1]")


@pytest.mark.parametrize("tool", CLAUDE_TOOLS, ids=tag_of)
def test_every_tool_of_messages(tool: Any) -> None:
    value = typical(tool)
    request = parse("messages", {"tools": [value]})
    offered = "input_schema" in value
    assert len(request.tools) == offered
    assert any(warning.startswith("tools[0]") for warning in request.warnings) is not offered


def test_types_are_read_from_the_packages() -> None:
    assert len(FIELDS) > 80
    assert min(map(len, (CHAT_PARTS, CHAT_MESSAGES, ITEMS, RESPONSE_TOOLS, BLOCKS))) > 3
    assert anthropic_types.__name__
