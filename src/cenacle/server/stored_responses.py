"""GET and DELETE /v1/responses/ID: what the Responses API keeps.

Owns: the routes.
Does not know: how responses are made (`generation.py`), what is forgotten
(`api/response_store.py`).
Invariant: a key reads and deletes only what it asked for itself.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .api import openai, openai_responses
from .api.response_store import ResponseStore, StoredResponse
from .api.validation import RequestError
from .generation import error_response, json_response

_ADAPTER = openai.ChatCompletionsAdapter()  # for errors


class StoredResponseRoutes:
    """The routes over one store."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/v1/responses/{id}", self._get),
            Route("/v1/responses/{id}", self._delete, methods=["DELETE"]),
            Route("/v1/responses/{id}/input_items", self._list_input_items),
        ]

    def _find(self, http: Request) -> StoredResponse | None:
        return self._store.get(http.scope["state"]["key"], http.path_params["id"])

    async def _get(self, http: Request) -> Response:
        stored = self._find(http)
        return json_response(200, stored.body) if stored else _no_response(http)

    async def _list_input_items(self, http: Request) -> Response:
        stored = self._find(http)
        if stored is None:
            return _no_response(http)
        return json_response(200, openai_responses.item_list(stored))

    async def _delete(self, http: Request) -> Response:
        name = http.path_params["id"]
        if not self._store.delete(http.scope["state"]["key"], name):
            return _no_response(http)
        return json_response(200, {"id": name, "object": "response", "deleted": True})


def _no_response(http: Request) -> Response:
    reason = f"no response {http.path_params['id'][:80]!r} is kept"
    return error_response(RequestError(None, reason, "not_found", 404), _ADAPTER)
