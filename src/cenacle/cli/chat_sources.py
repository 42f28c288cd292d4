"""What answers in `cenacle chat`: a model in this process, or a server.

Owns: `ChatSource` and its two implementations; errors of a server in plain words.
Does not know: the conversation, the terminal, how a model is loaded.
Invariant: ending the iteration over an answer ends the answer.
Next: `chat.py` is the conversation.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from ..core.chat import Message, OutputPart
from ..errors import ClusterError, InputError

if TYPE_CHECKING:
    from ..api import Model

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 900.0


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

    def answer(self, messages: list[Message], settings: ChatSettings) -> Iterator[OutputPart]:
        """The parts of an answer, about one per token."""
        ...


class LocalChat:
    """A model that is loaded in this process."""

    def __init__(self, model: Model) -> None:
        self.name, self._model = model.name, model

    def answer(self, messages: list[Message], settings: ChatSettings) -> Iterator[OutputPart]:
        """See `ChatSource`."""
        tokens, images = self._model.prompt_of(messages)
        parser = self._model.text.chat_parser((), (), tokens)
        sampling = settings.sampling()
        for chunk in self._model.stream(tokens, settings.max_tokens, images=images, **sampling):
            yield from parser.add(chunk.token)
        yield from parser.finish()


class RemoteChat:
    """A server with OpenAI's API, Cenacle's or any other.

    Args:
        url: with or without /v1.
        key: sent as `Authorization: Bearer`.
        model: its name on the server; None: the first that the server lists.
        certificate: file with the server's certificate, if it is self-signed.

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
        self._base_url = url.rstrip("/").removesuffix("/v1")
        if not self._base_url.startswith(("http://", "https://")):
            raise InputError(f"url: expected http://HOST:PORT or https://, got {url!r}", "url")
        try:
            self._client = httpx.Client(
                base_url=self._base_url,
                headers={"authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
                verify=ssl.create_default_context(cafile=certificate),
            )
        except (OSError, ValueError, httpx.InvalidURL) as error:
            raise InputError(f"url: {url!r} cannot be used: {error}", "url") from error
        try:
            with self._translate_errors():
                response = self._client.get("/v1/models", timeout=CONNECT_TIMEOUT_S)
                self._raise_for_status(response)
                names = [entry["id"] for entry in response.json()["data"]]
                self.name = model or names[0]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def answer(self, messages: list[Message], settings: ChatSettings) -> Iterator[OutputPart]:
        """See `ChatSource`."""
        body = {
            "model": self.name,
            "messages": messages,
            "stream": True,
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
        for choice in chunk["choices"][:1]:
            delta = choice["delta"]
            if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
                yield OutputPart("reasoning", reasoning)
            if text := delta.get("content"):
                yield OutputPart("text", text)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn errors of the connection, and of malformed responses, into Cenacle's."""
        try:
            yield
        except httpx.HTTPError as error:
            raise ClusterError(
                f"{self._base_url} does not answer ({error or type(error).__name__}); start a "
                f"server there with `cenacle serve`, or check the address"
            ) from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ClusterError(
                f"{self._base_url} does not serve OpenAI's API: {error!r}"
            ) from error

    def _raise_for_status(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        try:
            message = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"status {response.status_code}"
        message = f"{self._base_url}: {message}"
        if response.status_code == 401:
            raise InputError(f"{message}; pass the key with --key or CENACLE_API_KEY", "key")
        if response.status_code in (400, 404, 413, 422):
            raise InputError(message)
        raise ClusterError(message)
