"""The OpenAPI description says what is true: of bodies that are read, and of answers."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import cenacle
from cenacle.core.chat import FinishReason, OutputPart, Usage
from cenacle.errors import CenacleError, ClusterError
from cenacle.server.api import anthropic, openai, openai_responses, openapi
from cenacle.server.api.protocol import ApiAdapter, ChoiceState, ResponseMeta, ServedModel
from cenacle.server.api.validation import RequestError
from cenacle.server.app import ADAPTERS

SERVED = ServedModel("house", 100, 50)
OPENAPI = openapi.openapi("1")
PATHS = OPENAPI["paths"]
HELLO = [{"role": "user", "content": "hello"}]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
BODIES: dict[str, tuple[ApiAdapter, list[dict[str, Any]]]] = {
    "/v1/chat/completions": (
        openai.ChatCompletionsAdapter(),
        [
            {"messages": HELLO},
            {
                "messages": HELLO,
                "tools": [{"type": "function", "function": FUNCTION}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "stop": "x",
                "stream": True,
                "stream_options": {"include_usage": True},
                "logit_bias": {"3": 1},
            },
            {
                "messages": HELLO,
                "response_format": {"type": "regex", "pattern": "a"},
                "stop": ["b"],
            },
            {
                "messages": HELLO,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True},
                },
            },
        ],
    ),
    "/v1/completions": (
        openai.CompletionsAdapter(),
        [{"prompt": p, "echo": True} for p in ("a", [1, 2], ["a", "b"], [[1], [2]])],
    ),
    "/v1/responses": (
        openai_responses.ResponsesAdapter(),
        [
            {"input": "hello", "include": [openai_responses.LOGPROBS], "top_logprobs": 3},
            {
                "input": HELLO,
                "text": {"format": {"type": "json_object"}},
                "reasoning": {"effort": "none"},
            },
            {
                "input": HELLO,
                "tools": [{"type": "function", **FUNCTION}],
                "tool_choice": {"type": "function", "name": "f"},
            },
        ],
    ),
    "/v1/messages": (
        anthropic.MessagesAdapter(),
        [
            {
                "model": "house",
                "max_tokens": 2000,
                "messages": HELLO,
                "thinking": {"type": "enabled", "budget_tokens": 1024},
            },
            {
                "model": "house",
                "max_tokens": 9,
                "system": "x",
                "messages": HELLO,
                "tools": [{"name": "f", "input_schema": {}}],
                "tool_choice": {"type": "tool", "name": "f"},
                "metadata": {"user_id": "me"},
            },
            {
                "model": "house",
                "max_tokens": 9,
                "messages": HELLO,
                "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
            },
        ],
    ),
}
PARTS = [OutputPart("reasoning", "Hm"), OutputPart("text", "a"), OutputPart("call", "{}", "f")]


def check(path: str, status: str, body: dict[str, Any]) -> None:
    content = PATHS[path]["post"]["responses"][status]["content"]
    jsonschema.validate(body, content["application/json"]["schema"])


@pytest.mark.parametrize("path", BODIES)
def test_bodies_and_answers_are_as_described(path: str) -> None:
    adapter, bodies = BODIES[path]
    schema = PATHS[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = {**schema, "components": OPENAPI["components"]}  # it refers to these
    jsonschema.Draft202012Validator.check_schema(schema)
    for body in bodies:
        jsonschema.validate(body, schema)
        request = adapter.parse(json.dumps(body).encode(), SERVED)
        for finish in (FinishReason("stop"), FinishReason("length"), FinishReason("string", "x")):
            builder = adapter.respond(request, ResponseMeta("1", 7, "house", "fp"))
            check(path, "200", builder.full_response([ChoiceState(0, PARTS, finish)], Usage(3, 2)))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**bodies[0], "stream": 1}, schema)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "error",
    [
        RequestError(None, "x"),
        RequestError(None, "x", status=404),
        ClusterError("x"),
        CenacleError("x"),
    ],
)
def test_errors_are_as_described(path: str, error: CenacleError) -> None:
    status, body = BODIES[path][0].render_error(error)
    check(path, str(status), body)


def test_operations_have_names_of_their_own() -> None:
    names = [operation["operationId"] for path in PATHS.values() for operation in path.values()]
    assert len(set(names)) == len(names)
    json.dumps(PATHS)


def test_every_endpoint_is_described() -> None:
    server = Path(cenacle.__file__).parent / "server"
    text = (server / "app.py").read_text() + (server / "stored_responses.py").read_text()
    routes = set(re.findall(r'Route\("([^"]+)"', text)) | set(ADAPTERS)
    assert {route.replace(":path", "").rstrip("/") for route in routes} == set(PATHS)
