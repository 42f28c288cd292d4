"""The server's own OpenAPI 3.1 description, given as /openapi.json.

Owns: paths, and the shapes of answers as far as clients may rely on them.
Does not know: parameters (each API's module has its table), HTTP.
Invariant: what a body may have is exactly what its API's module takes: that cannot read a member
that is not in its table.
Source: https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

from typing import Any

from . import anthropic, openai, openai_responses

_STRING = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_OPENAI_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": _STRING,
                "type": _STRING,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": _STRING, "message": _STRING},
            "required": ["type", "message"],
        },
    },
    "required": ["type", "error"],
}
_MODEL = {
    "type": "object",
    "properties": {"id": _STRING, "object": {"const": "model"}, "created": {"type": "integer"}},
    "required": ["id", "object", "created", "owned_by"],
}


def _answer(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


_CHAT = _answer(
    ["id", "object", "created", "model", "choices", "usage"],
    object={"const": "chat.completion"},
    choices={
        "type": "array",
        "items": _answer(
            ["index", "message", "logprobs", "finish_reason"],
            index=_COUNT,
            message=_answer(["role", "content"], role={"const": "assistant"}),
            finish_reason={"enum": ["stop", "length", "tool_calls"]},
        ),
    },
)
_TEXT = _answer(
    ["id", "object", "created", "model", "choices", "usage"],
    object={"const": "text_completion"},
    choices={
        "type": "array",
        "items": _answer(
            ["index", "text", "logprobs", "finish_reason"],
            index=_COUNT,
            text=_STRING,
            finish_reason={"enum": ["stop", "length"]},
        ),
    },
)
_RESPONSE = _answer(
    ["id", "object", "created_at", "status", "model", "output", "usage", "error"],
    object={"const": "response"},
    status={"enum": ["completed", "incomplete"]},
    output={"type": "array", "items": _answer(["id", "type", "status"])},
)
_MESSAGE = _answer(
    ["id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"],
    type={"const": "message"},
    role={"const": "assistant"},
    content={"type": "array", "items": _answer(["type"])},
    stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
)
_REFUSALS = {
    "400": "the body is refused; the message names the member",
    "401": "a key is needed",
    "403": "this host, page or key may not ask",
    "404": "another model is served",
    "408": "the body did not come in time",
    "413": "the body is too large",
    "429": "too much at once",
    "500": "the server made a mistake",
    "503": "the group of nodes has failed, or the server ends",
}


def _content(schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {kind: {"schema": schema}}


def _refusals(error: dict[str, Any], *statuses: str) -> dict[str, Any]:
    chosen = statuses or tuple(_REFUSALS)
    return {s: {"description": _REFUSALS[s], "content": _content(error)} for s in chosen}


def _post(
    summary: str,
    parameters: dict[str, Any],
    required: list[str],
    answer: dict[str, Any],
    error: dict[str, Any] = _OPENAI_ERROR,
) -> dict[str, Any]:
    body = {
        "type": "object",
        "properties": parameters,
        "required": required,
        "additionalProperties": False,
    }
    content = _content(answer)
    if "stream" in parameters:
        content |= _content(_STRING, "text/event-stream")
    return {
        "post": {
            "operationId": "_".join(summary.split()),
            "summary": summary,
            "requestBody": {"required": True, "content": _content(body)},
            "responses": {
                "200": {"description": "the answer", "content": content},
                **_refusals(error),
            },
        }
    }


def _get(summary: str, answer: dict[str, Any], *statuses: str) -> dict[str, Any]:
    return {
        "get": {
            "operationId": "_".join(summary.split()),
            "summary": summary,
            "responses": {
                "200": {"description": "the answer", "content": _content(answer)},
                **_refusals(_OPENAI_ERROR, "401", "403", *statuses),
            },
        }
    }


def openapi(version: str) -> dict[str, Any]:
    """The description of a server of some version."""
    one_model = _get("one model", _MODEL, "404")
    one_model["get"]["parameters"] = [
        {"name": "name", "in": "path", "required": True, "schema": _STRING}
    ]
    health = _get("health", _answer(["status"], status={"enum": ["ok"]}))
    health["get"]["responses"]["503"] = {
        "description": _REFUSALS["503"],
        "content": _content(_answer(["status"], status={"enum": ["failed"]})),
    }
    numbers = _get("metrics", _STRING)
    numbers["get"]["responses"]["200"]["content"] = _content(_STRING, "text/plain")
    view = _get("cluster view", {"type": "object"})
    view["get"]["parameters"] = [
        {"name": name, "in": "query", "schema": _STRING} for name in ("placement", "steps")
    ]
    counted = _answer(["input_tokens"], input_tokens=_COUNT)
    count_of = ["model", "messages"]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Cenacle", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": {
            "/cluster": view,
            "/health": health,
            "/metrics": numbers,
            "/openapi.json": _get("description", {"type": "object"}),
            "/v1/models": _get("models", _answer(["object", "data"])),
            "/v1/models/{name}": one_model,
            "/v1/chat/completions": _post(
                "chat completion", openai.CHAT_PARAMETERS, ["messages"], _CHAT
            ),
            "/v1/completions": _post("completion", openai.TEXT_PARAMETERS, ["prompt"], _TEXT),
            "/v1/responses": _post("response", openai_responses.PARAMETERS, ["input"], _RESPONSE),
            "/v1/messages": _post(
                "message",
                anthropic.PARAMETERS,
                ["model", "messages", "max_tokens"],
                _MESSAGE,
                _ANTHROPIC_ERROR,
            ),
            "/v1/messages/count_tokens": _post(
                "token count", anthropic.COUNT_PARAMETERS, count_of, counted, _ANTHROPIC_ERROR
            ),
        },
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }
