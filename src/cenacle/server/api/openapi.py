"""The server's own OpenAPI 3.1 description, given as /openapi.json.

Owns: paths, and the shapes of responses as far as clients may rely on them.
Does not know: parameters (the request models are where they are declared), HTTP.
Invariant: the schema of a body is made from the model that validates it.
Source: https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from . import anthropic, openai, openai_responses, tokenization
from .validation import JsonObject, RequestModel

_STRING = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_ERRORS = {
    "400": "the body is refused; the message names the parameter",
    "401": "a key is needed",
    "403": "this host, page or key is not allowed",
    "404": "another model is served",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "429": "too many requests at once",
    "500": "internal error",
    "503": "the group of nodes has failed, or the server is shutting down",
}


def _object(required: Sequence[str] = (), **properties: Any) -> JsonObject:
    """A schema of an object that has at least the given properties."""
    return {"type": "object", "properties": properties, "required": [*required, *properties]}


def _list(items: JsonObject) -> JsonObject:
    return {"type": "array", "items": items}


_OPENAI_ERROR = _object(
    error=_object(
        message=_STRING,
        type=_STRING,
        param={"type": ["string", "null"]},
        code={"type": ["string", "null"]},
    )
)
_ANTHROPIC_ERROR = _object(type={"const": "error"}, error=_object(type=_STRING, message=_STRING))
_MODEL = _object(["owned_by"], id=_STRING, object={"const": "model"}, created={"type": "integer"})
_CHAT_COMPLETION = _object(
    ["id", "created", "model", "usage"],
    object={"const": "chat.completion"},
    choices=_list(
        _object(
            ["logprobs"],
            index=_COUNT,
            message=_object(["content"], role={"const": "assistant"}),
            finish_reason={"enum": ["stop", "length", "tool_calls"]},
        )
    ),
)
_COMPLETION = _object(
    ["id", "created", "model", "usage"],
    object={"const": "text_completion"},
    choices=_list(
        _object(
            ["logprobs"], index=_COUNT, text=_STRING, finish_reason={"enum": ["stop", "length"]}
        )
    ),
)
_RESPONSE = _object(
    ["id", "created_at", "model", "usage", "error"],
    object={"const": "response"},
    status={"enum": ["completed", "incomplete"]},
    output=_list(_object(["id", "type", "status"])),
)
_MESSAGE = _object(
    ["id", "model", "stop_sequence", "usage"],
    type={"const": "message"},
    role={"const": "assistant"},
    content=_list(_object(["type"])),
    stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
)
_TOKENS = _object(["max_model_len"], count=_COUNT, tokens={"type": "array"})
_TEXT = _object(prompt=_STRING, content=_STRING)
# Path: model of the body, what it does, the response, errors.
_POSTS: dict[str, tuple[type[RequestModel], str, JsonObject, JsonObject]] = {
    "/v1/chat/completions": (
        openai.ChatCompletionRequest,
        "chat completion",
        _CHAT_COMPLETION,
        _OPENAI_ERROR,
    ),
    "/v1/completions": (openai.CompletionRequest, "completion", _COMPLETION, _OPENAI_ERROR),
    "/v1/responses": (
        openai_responses.ResponsesAdapter.request_model,
        "response",
        _RESPONSE,
        _OPENAI_ERROR,
    ),
    "/v1/messages": (anthropic.MessagesRequest, "message", _MESSAGE, _ANTHROPIC_ERROR),
    "/v1/messages/count_tokens": (
        anthropic.CountTokensRequest,
        "token count",
        _object(input_tokens=_COUNT),
        _ANTHROPIC_ERROR,
    ),
    "/tokenize": (tokenization.TokenizeRequest, "tokens of a text", _TOKENS, _OPENAI_ERROR),
    "/v1/tokenize": (tokenization.TokenizeRequest, "tokens of a text v1", _TOKENS, _OPENAI_ERROR),
    "/detokenize": (tokenization.DetokenizeRequest, "text of tokens", _TEXT, _OPENAI_ERROR),
    "/v1/detokenize": (tokenization.DetokenizeRequest, "text of tokens v1", _TEXT, _OPENAI_ERROR),
}


class _SchemaGenerator(GenerateJsonSchema):
    """Without titles that repeat the names of parameters."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False

    def normalize_name(self, name: str) -> str:
        return super().normalize_name(name).lstrip("_")


def _content(schema: JsonObject, media_type: str = "application/json") -> JsonObject:
    return {media_type: {"schema": schema}}


def _operation(
    summary: str, response: JsonObject, error: JsonObject, statuses: Sequence[str]
) -> JsonObject:
    errors = {s: {"description": _ERRORS[s], "content": _content(error)} for s in statuses}
    return {
        "operationId": "_".join(summary.split()),
        "summary": summary,
        "responses": {"200": {"description": "the response", "content": response}, **errors},
    }


def _get(summary: str, response: JsonObject, *statuses: str) -> JsonObject:
    content = _content(response)
    return {"get": _operation(summary, content, _OPENAI_ERROR, ["401", "403", *statuses])}


def _posts() -> tuple[JsonObject, JsonObject]:
    """The operations that have a body, by path, and the schemas that they refer to."""
    models = [model for model, *_ in _POSTS.values()]
    references, definitions = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
        schema_generator=_SchemaGenerator,
    )
    operations = {}
    for path, (model, summary, response, error) in _POSTS.items():
        content = _content(response)
        if "stream" in model.model_fields:
            content |= _content(_STRING, "text/event-stream")
        body = references[(model, "validation")]
        operation = _operation(summary, content, error, list(_ERRORS))
        operation["requestBody"] = {"required": True, "content": _content(body)}
        operations[path] = {"post": operation}
    return operations, definitions["$defs"]


def openapi(version: str) -> JsonObject:
    """The description of a server of some version."""
    posts, schemas = _posts()
    one_model = _get("one model", _MODEL, "404")
    one_model["get"]["parameters"] = [
        {"name": "name", "in": "path", "required": True, "schema": _STRING}
    ]
    health = _get("health", _object(status={"enum": ["ok"]}))
    health["get"]["responses"]["503"] = {
        "description": _ERRORS["503"],
        "content": _content(_object(status={"enum": ["failed"]})),
    }
    metrics = _get("metrics", _STRING)
    metrics["get"]["responses"]["200"]["content"] = _content(_STRING, "text/plain")
    cluster = _get("cluster view", {"type": "object"})
    cluster["get"]["parameters"] = [
        {"name": name, "in": "query", "schema": _STRING} for name in ("placement", "steps")
    ]
    by_id = [{"name": "id", "in": "path", "required": True, "schema": _STRING}]
    stored = _get("stored response", _RESPONSE, "404")
    items = _get("input items of a stored response", _object(["object", "data"]), "404")
    deletion = _content(_object(["id"], deleted={"const": True}))
    statuses = ["401", "403", "404"]
    deleted = {"delete": _operation("forget a response", deletion, _OPENAI_ERROR, statuses)}
    for operation in (stored["get"], items["get"], deleted["delete"]):
        operation["parameters"] = by_id
    return {
        "openapi": "3.1.0",
        "info": {"title": "Cenacle", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": {
            "/cluster": cluster,
            "/health": health,
            "/metrics": metrics,
            "/openapi.json": _get("description", {"type": "object"}),
            "/v1/models": _get("models", _object(["object", "data"])),
            "/v1/models/{name}": one_model,
            "/v1/responses/{id}": {**stored, **deleted},
            "/v1/responses/{id}/input_items": items,
            **posts,
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }
