"""Requests that are made to end the server, or to hold it: each costs its sender a 400, nobody else
anything."""

from collections.abc import Iterator
from typing import Any

import pytest

from support.serving import RunningServer, running_server

DEPTH = 5000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("hostile"), nodes=2) as running:
        yield running


def chain(link: str) -> dict[str, Any]:
    """A flat schema that is DEPTH references deep, through `link`."""

    def to(name: str) -> dict[str, Any]:
        reference = {"$ref": f"#/$defs/{name}"}
        wrapped = {
            "ref": reference,
            "anyOf": {"anyOf": [reference, {"type": "null"}]},
            "allOf": {"allOf": [reference]},
            "items": {"type": "array", "items": reference},
            "properties": {"type": "object", "properties": {"a": reference}, "required": ["a"]},
        }
        return wrapped[link]

    steps = {f"a{i}": to(f"a{i + 1}") for i in range(DEPTH)}
    return {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/a0"}},
        "required": ["a"],
        "$defs": {**steps, f"a{DEPTH}": {"type": "string"}},
    }


def doubling(levels: int) -> dict[str, Any]:
    """A small schema whose alternatives double at each level."""
    steps = {
        f"a{i}": {
            "allOf": [
                {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"minLength": i}]},
                {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"maxLength": 90 + i}]},
            ]
        }
        for i in range(levels)
    }
    return {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/a0"}},
        "required": ["a"],
        "$defs": {**steps, f"a{levels}": {"type": "string"}},
    }


SCHEMAS = {
    **{link: chain(link) for link in ("ref", "anyOf", "allOf", "items", "properties")},
    "doubling": doubling(12),
}


def tool(schema: dict[str, Any], strict: bool) -> dict[str, Any]:
    function = {"name": "f", "parameters": schema, "strict": strict}
    return {"type": "function", "function": function}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_that_overflow_a_stack_cost_one_request(server, name):
    schema = SCHEMAS[name]
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for extra in (
        {"response_format": form},
        {"tools": [tool(schema, False)], "tool_choice": "required"},
        {"tools": [tool(schema, True)]},
    ):
        answer = server.ask(**extra)
        assert answer.status_code == 400, answer.text[:300]
        assert "cannot be enforced" in answer.json()["error"]["message"]
    assert server.ask().json()["choices"][0]["message"]["content"] == "42"


def test_anthropics_schemas_too(server):
    body = {
        "model": "demo_model",
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "What is 12 + 30?"}],
        "tools": [{"name": "f", "input_schema": SCHEMAS["ref"]}],
        "tool_choice": {"type": "any"},
    }
    answer = server.post("/v1/messages", body)
    assert answer.status_code == 400
    assert "cannot be enforced" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "lark",
    [
        "\n".join([*(f"r{i}: r{i + 1}" for i in range(DEPTH)), f'r{DEPTH}: "a"', "start: r0"]),
        "\n".join([*(f'R{i}: R{i + 1} "b"' for i in range(DEPTH)), f'R{DEPTH}: "a"', "start: R0"]),
        "start: " + "(" * DEPTH + '"a"' + ")" * DEPTH,
    ],
)
def test_grammars_that_overflow_a_stack_cost_one_request(server, lark):
    answer = server.ask(response_format={"type": "grammar", "grammar": lark})
    assert answer.status_code == 400
    assert server.ask().status_code == 200


def test_the_server_is_the_one_that_started(server):
    assert server.process.poll() is None
    assert server.health()["status"] == "ok"


def test_what_a_schema_asks_and_is_not_enforced_is_said(server):
    schema = {
        "type": "object",
        "properties": {
            "id": {"type": "string", "format": "isbn", "maxLength": 3},
            "name": {"type": "string", "pattern": "^(?!x)[a-z]{1,3}$", "maxLength": 3},
            "tags": {
                "type": "array",
                "items": {"type": "boolean"},
                "maxItems": 1,
                "uniqueItems": True,
            },
        },
        "required": ["id", "name", "tags"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for extra in (
        {"response_format": form},
        {"tools": [tool(schema, True)], "tool_choice": "required"},
    ):
        answer = server.ask(max_tokens=100, **extra)
        assert answer.status_code == 200, answer.text
        warning = answer.headers["x-cenacle-warning"]
        for part in ("uniqueItems", "isbn", "pattern ^(?!x)[a-z]{1,3}$"):
            assert part in warning
    assert "x-cenacle-warning" not in server.ask().headers


def test_a_prompt_that_cannot_fit_is_refused_without_tokenizing_it(server):
    """9 MB took half a minute, and one key's work made the others wait."""
    long = "12 + 30 is what? " * 550_000
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/v1/completions", {"prompt": long}),
        ("/v1/responses", {"input": long}),
    ):
        answer = server.post(path, body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "characters are" in answer.json()["error"]["message"]
