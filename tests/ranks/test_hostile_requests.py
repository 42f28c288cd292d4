"""Requests that are made to end the server, or to hold it: each costs its sender a 400, nobody else
anything."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.http import HTTP
from support.serving import DEADLINE_S, RunningServer, running_server

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


MEGABYTE = 1_000_000
MESSAGE = {"role": "user", "content": "What is 12 + 30?"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


def schema_with(**keywords: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"a": {"type": "string", **keywords}}}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {}, **fields}}


def bodies_with(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """A body for each field that may be a string, with this text in it."""
    calls = [{"id": text, "type": "function", "function": {"name": "f", "arguments": text}}]
    chat: dict[str, dict[str, Any]] = {
        "content": {"messages": [{"role": "user", "content": text}]},
        "message name": {"messages": [{**MESSAGE, "name": text}]},
        "role": {"messages": [{"role": text, "content": "x"}]},
        "part type": {"messages": [{"role": "user", "content": [{"type": text}]}]},
        "past call": {"messages": [MESSAGE, {"role": "assistant", "tool_calls": calls}, MESSAGE]},
        "stop": {"stop": text},
        "stop list": {"stop": [text] * 4},
        "model": {"model": text},
        "user": {"user": text},
        "metadata": {"metadata": {"a": text}},
        "unknown name": {text: 1},
        "unknown value": {"unknown": text},
        "effort": {"reasoning_effort": text},
        "bias": {"logit_bias": {text: 1}},
        "tool name": {"tools": [function(name=text)]},
        "tool text": {"tools": [function(description=text)], "tool_choice": "required"},
        "tool choice": {
            "tools": [function()],
            "tool_choice": {"type": "function", "function": {"name": text}},
        },
        "template": {"chat_template_kwargs": {"a": text, text: "a"}},
        "regex": {"response_format": {"type": "regex", "pattern": text}},
        "grammar": {"response_format": {"type": "grammar", "grammar": text}},
        "property": {"response_format": schema_with(properties={text: {}})},
        "enum": {"response_format": schema_with(enum=[text])},
        **{
            f"schema {name}": {"response_format": schema_with(**{name: text})}
            for name in ("pattern", "const", "description", "format", "$ref")
        },
    }
    cases = {
        name: (CHAT, {"messages": [MESSAGE], "max_tokens": 2, **body})
        for name, body in chat.items()
    }
    cases["prompt"] = COMPLETIONS, {"prompt": text, "max_tokens": 2}
    for name, field in {
        "instructions": {"instructions": text},
        "metadata": {"metadata": {"a": text}},
        "previous": {"previous_response_id": text},
        "format": {"text": {"format": {"type": "json_schema", "name": text, "schema": {}}}},
    }.items():
        body = {"input": "x", "max_output_tokens": 16, "stream": True, **field}
        cases[f"responses {name}"] = RESPONSES, body
    for name, field in {
        "system": {"system": text},
        "stop": {"stop_sequences": [text]},
        "user": {"metadata": {"user_id": text}},
        "tools": {"tools": [{"name": "f", "description": text, "input_schema": {}}]},
    }.items():
        body = {"model": "demo_model", "messages": [MESSAGE], "max_tokens": 2, **field}
        cases[f"messages {name}"] = MESSAGES, body
    return cases


class HealthWatch(threading.Thread):
    """Asks for /health again and again; `longest_s` is the longest that it took."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url, self._stopped, self.longest_s = url, threading.Event(), 0.0

    def run(self) -> None:
        while True:
            began = time.monotonic()
            assert HTTP.get(f"{self._url}/health").status_code == 200
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            if self._stopped.wait(0.05):
                return

    def stop(self) -> float:
        self._stopped.set()
        self.join()
        return self.longest_s


# On a quiet machine the longest was 0.094 s; work that is quadratic in a megabyte takes minutes.
HEALTH_S = 20.0


@pytest.mark.parametrize("letter", ["a", " ", "\u00e9"])
def test_a_megabyte_in_any_field_leaves_the_others_alone(server, letter):
    text = letter * (MEGABYTE // len(letter.encode()))
    for name, (path, body) in bodies_with(text).items():
        watch = HealthWatch(server.url)
        watch.start()
        answer = server.post(path, body)
        assert answer.status_code in (200, 400, 404), (name, answer.text[:300])
        assert watch.stop() < HEALTH_S, name
        if "stop" in name:
            assert "expected at most 1000 characters" in answer.text
    assert server.health()["restarts"] == 0


@pytest.mark.parametrize("token", [-1, 10**6, 2**32, 2**63 - 1])
@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"echo": True, "logprobs": 1}])
def test_tokens_that_the_model_has_not_are_refused(server, token, fields):
    answer = server.post(COMPLETIONS, {"prompt": [5, token], "max_tokens": 1, **fields})
    assert answer.status_code == 400, answer.text
    assert "expected token ids from 0 to" in answer.text


def test_a_megabyte_in_a_header_or_a_path_is_refused(server):
    for path, headers in (("", {"x-api-key": "a" * MEGABYTE}), ("a" * 60_000, {})):
        # A server need not read to its end what it refuses.
        with contextlib.suppress(httpx.TransportError):
            url = f"{server.url}/v1/models/{path}"
            assert HTTP.get(url, headers=headers, timeout=DEADLINE_S).status_code in (
                400,
                404,
                431,
            )
    assert server.ask().status_code == 200


CHAT_BODY = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 2}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT_BODY,
    "/v1/completions": {"prompt": "12 + 30", "max_tokens": 2},
    "/v1/responses": {"input": "12 + 30?", "max_output_tokens": 2},
    "/v1/messages": {**CHAT_BODY, "model": "demo_model"},
}


def test_extreme_numbers_in_any_field_leave_the_ranks_alone(server):
    before, tried = server.health(), 0
    with httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client:
        description = client.get("/openapi.json").json()
        schemas = description["components"]["schemas"]
        for path, body in BODIES.items():
            content = description["paths"][path]["post"]["requestBody"]["content"]
            name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            for field, schema in schemas[name]["properties"].items():
                types = {str(form.get("type")) for form in (schema, *schema.get("anyOf", ()))}
                if not types & {"integer", "number"}:
                    continue
                for number in (2**31, 2**62, 10**1300):
                    answer = client.post(path, json={**body, field: number})
                    assert answer.status_code in (200, 400), (path, field, answer.text[:300])
                    assert answer.status_code == 200 or len(answer.text) < 500, (path, field)
                    tried += 1
    assert tried > 100
    after = server.health()
    names = ("pid", "ranks", "recoveries", "restarts")
    assert [after[name] for name in names] == [before[name] for name in names]


def test_thinking_with_a_form_on_a_model_that_does_not_reason(server):
    form = {"type": "regex", "pattern": "(yes|no)"}
    answer = server.ask(response_format=form, enable_thinking=True)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] in ("yes", "no")


def test_what_is_no_http_is_logged_once(server):
    host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
    for _ in range(50):
        with socket.create_connection((host, port), timeout=DEADLINE_S) as sock:
            sock.sendall(b"G\xc9T / HTTP/1.1\r\n\r\n")
            assert sock.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert server.log.read_text().count("Invalid HTTP request") == 1


def test_bodies_in_chunks_of_a_byte_leave_the_others_alone(server):
    """On a quiet machine /health took 8 s beside eight of them; it takes 0.03 s."""
    url, answers = httpx.URL(server.url), []
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = b"1\r\na\r\n" * 40_000

    def send() -> None:
        with socket.create_connection((url.host, url.port), DEADLINE_S) as sock:
            sock.sendall(head.encode() + pieces + b"0\r\n\r\n")
            answers.append(sock.recv(12))

    senders = [threading.Thread(target=send) for _ in range(16)]
    for sender in senders:
        sender.start()
    watch = HealthWatch(server.url)
    watch.start()
    for sender in senders:
        sender.join(DEADLINE_S)
    assert watch.stop() < HEALTH_S
    assert answers == [b"HTTP/1.1 400"] * len(senders)


def many_objects() -> dict[str, tuple[str, dict[str, Any]]]:
    """Bodies whose work is in the number of their objects."""
    part = {"type": "text", "text": ""}
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return {
        "parts": (CHAT, {"messages": [{"role": "user", "content": [part] * 250_000}]}),
        "calls": (
            CHAT,
            {"messages": [MESSAGE, {"role": "assistant", "tool_calls": [call] * 80_000}]},
        ),
        "items": (RESPONSES, {"input": [thought] * 100_000}),
        "members": (CHAT, {"messages": [MESSAGE], **{f"k{at}": 0 for at in range(400_000)}}),
        "blocks": (
            MESSAGES,
            {
                "model": "demo_model",
                "max_tokens": 2,
                "messages": [{"role": "user", "content": [part] * 250_000}],
            },
        ),
    }


def test_bodies_of_too_many_objects_are_refused(server):
    """Others waited 5 s for each; one thread prepares all requests."""
    for name, (path, body) in many_objects().items():
        answer = server.post(path, body)
        assert answer.status_code == 400, (name, answer.text[:300])
        assert "objects and members" in answer.text, (name, answer.text[:300])


def test_text_that_is_too_long_to_count_is_refused(server):
    """Others waited 27 s while 9 MB were tokenized, also where they are in no message's text."""
    text = "ab " * 1_000_000
    long = {"role": "user", "content": text}
    tools = [{"name": "f", "description": text, "input_schema": {}}]
    forced = {"messages": [MESSAGE], "tools": tools, "tool_choice": {"type": "any"}}
    count = "/v1/messages/count_tokens"
    chat = {"messages": [MESSAGE], "tools": [function(description=text)]}
    for path, body in (
        (count, {"model": "demo_model", "messages": [long]}),
        (count, {"model": "demo_model", **forced}),
        (MESSAGES, {"model": "demo_model", "max_tokens": 2, **forced}),
        ("/tokenize", {"messages": [long]}),
        (CHAT, {**chat, "tool_choice": "required"}),
    ):
        answer = server.post(path, body)
        assert answer.status_code == 400, (path, answer.text[:300])
        assert "characters" in answer.text, (path, answer.text[:300])
