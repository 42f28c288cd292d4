"""Responses that clients refer to later.

Owns: responses of the Responses API in memory, by the API key that asked; what is forgotten.
Does not know: HTTP, how a response is made.
Invariant: a key reads only what it asked for itself. Memory is bounded per key and in all; the
longest unused goes first. Nothing is written to a disk.
Next: `openai_responses.py`, which fills it and follows references.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.chat import Message, Tool
from .validation import JsonObject

MAX_RESPONSES_PER_KEY = 256
MAX_BYTES_PER_KEY = 32 << 20
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class StoredResponse:
    """A complete response and what led to it.

    Args:
        body: as the client got it.
        conversation: messages up to and with the response, without instructions.
        input_items: of the request.
        additional_tools: that items of the conversation added, without those of requests.
    """

    body: JsonObject
    conversation: tuple[Message, ...]
    input_items: tuple[JsonObject, ...] = ()
    additional_tools: tuple[Tool, ...] = ()

    @property
    def size_bytes(self) -> int:
        """About what it takes."""
        tools = [tool.to_json() for tool in self.additional_tools]
        parts = (self.body, self.conversation, self.input_items, tools)
        return sum(len(json.dumps(part)) for part in parts)


class ResponseStore:
    """Keeps responses for a while. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By key and id, the longest unused first.
        self._responses: OrderedDict[tuple[str, str], tuple[StoredResponse, int]] = OrderedDict()

    def put(self, key: str, response: StoredResponse) -> None:
        """Keep a response, and forget others if there are too many. One that is too large by itself
        is not kept."""
        size = response.size_bytes
        if size > MAX_BYTES_PER_KEY:
            return
        with self._lock:
            self._responses[key, response.body["id"]] = (response, size)
            own = [name for name in self._responses if name[0] == key]
            own_bytes = sum(self._responses[name][1] for name in own)
            while len(own) > MAX_RESPONSES_PER_KEY or own_bytes > MAX_BYTES_PER_KEY:
                own_bytes -= self._responses.pop(own.pop(0))[1]
            total = sum(size for _, size in self._responses.values())
            while total > MAX_BYTES:
                total -= self._responses.popitem(last=False)[1][1]

    def get(self, key: str, response_id: str) -> StoredResponse | None:
        """A response of this key; None: it is not kept."""
        with self._lock:
            if (key, response_id) not in self._responses:
                return None
            self._responses.move_to_end((key, response_id))
            return self._responses[key, response_id][0]

    def delete(self, key: str, response_id: str) -> bool:
        """Forget a response of this key; False: it is not kept."""
        with self._lock:
            return self._responses.pop((key, response_id), None) is not None

    def find_item(self, key: str, item_id: str) -> JsonObject | None:
        """The last output or input item with an id, among this key's responses."""
        with self._lock:
            own = [r for (owner, _), (r, _) in self._responses.items() if owner == key]
        for response in reversed(own):
            items: Sequence[JsonObject] = (*response.body["output"], *response.input_items)
            for item in items:
                if item.get("id") == item_id:
                    return item
        return None
