"""What answers in `cenacle chat`: a model in this process, or a server.

Owns: `ChatSource` and its two implementations.
Does not know: the conversation, the terminal, how a model is loaded.
Invariant: ending the iteration over an answer ends the answer.
Next: `chat.py` is the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..core.chat import Message, OutputPart
from ..errors import ClusterError
from .remote import RemoteServer

if TYPE_CHECKING:
    from ..api import Model


@dataclass(frozen=True)
class ChatSettings:
    """How answers are generated."""

    max_tokens: int = 1024
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int | None = None
    top_k: int | None = None

    def sampling(self) -> dict[str, Any]:
        """The settings of sampling that are set, by the names of the HTTP API."""
        names = ("temperature", "top_p", "top_k", "seed")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


class ChatSource(Protocol):
    """Generates answers."""

    name: str
    context_used: int  # tokens of the last prompt and answer; 0: unknown

    @property
    def context_length(self) -> int | None:
        """Tokens that fit; None: unknown."""
        ...

    def list_models(self) -> list[str]:
        """The models that can be chosen by `name`."""
        ...

    def routing_counts(self) -> list[list[int]]:
        """By MoE layer and expert, how often measured steps chose it; empty: unknown."""
        ...

    def answer(self, messages: list[Message], settings: ChatSettings) -> Iterator[OutputPart]:
        """The parts of an answer, about one per token."""
        ...


class LocalChat:
    """A model that is loaded in this process."""

    def __init__(self, model: Model) -> None:
        self.name, self._model, self.context_used = model.name, model, 0

    @property
    def context_length(self) -> int | None:
        """See `ChatSource`."""
        return self._model.spec.context_length

    def list_models(self) -> list[str]:
        """See `ChatSource`."""
        return [self.name]

    def routing_counts(self) -> list[list[int]]:
        """See `ChatSource`."""
        from ..server.cluster_view import routing_counts

        return routing_counts(self._model.plan, self._model.group.step_timings.routed)

    def answer(self, messages: list[Message], settings: ChatSettings) -> Iterator[OutputPart]:
        """See `ChatSource`."""
        tokens, images = self._model.prompt_of(messages)
        parser = self._model.text.chat_parser((), (), tokens)
        sampling = settings.sampling()
        self.context_used = len(tokens)
        for chunk in self._model.stream(tokens, settings.max_tokens, images=images, **sampling):
            self.context_used += 1
            yield from parser.add(chunk.token)
        yield from parser.finish()


class RemoteChat(RemoteServer):
    """A server with OpenAI's API, Cenacle's or any other.

    Args:
        url, key, certificate: see `RemoteServer`.
        model: its name on the server; None: the first that the server lists.

    Raises:
        InputError: the URL is malformed, or the server requires another key.
        ClusterError: the server does not answer.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        model: str | None = None,
        certificate: Path | None = None,
    ) -> None:
        super().__init__(url, key, certificate)
        try:
            with self._translate_errors():
                listed = self.get("/v1/models")["data"]
                self._context_lengths = {m["id"]: m.get("context_length") for m in listed}
                self.name, self.context_used = model or listed[0]["id"], 0
        except BaseException:
            self.close()
            raise

    @property
    def context_length(self) -> int | None:
        """See `ChatSource`."""
        length = self._context_lengths.get(self.name)
        return length if isinstance(length, int) else None

    def list_models(self) -> list[str]:
        """See `ChatSource`."""
        return list(self._context_lengths)

    def routing_counts(self) -> list[list[int]]:
        """See `ChatSource`. A server that is not Cenacle's has none."""
        with self._translate_errors():
            view = self.get("/cluster", {"model": self.name} if self.name else None)
        return [[int(n) for n in row] for row in view.get("routing", {}).get("counts", [])]

    def answer(self, messages: list[Message], settings: ChatSettings) -> Iterator[OutputPart]:
        """See `ChatSource`."""
        body = {
            "model": self.name,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": settings.max_tokens,
            **settings.sampling(),
        }
        with (
            self._translate_errors(),
            self._client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.is_error:
                response.read()
            self._raise_for_status(response)
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    return
                if data:
                    yield from self._parse_chunk(json.loads(data))
        raise ClusterError(
            f"{self._base_url}: the connection closed before the answer was complete"
        )

    def _parse_chunk(self, chunk: dict[str, Any]) -> Iterator[OutputPart]:
        if "error" in chunk:
            raise ClusterError(f"{self._base_url}: {chunk['error']['message']}")
        if usage := chunk.get("usage"):
            self.context_used = int(usage["prompt_tokens"]) + int(usage["completion_tokens"])
        for choice in chunk["choices"][:1]:
            delta = choice["delta"]
            if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
                yield OutputPart("reasoning", reasoning)
            if text := delta.get("content"):
                yield OutputPart("text", text)
