"""A server elsewhere, as `chat --url` and `top` use it.

Owns: the connection; errors of a server in plain words.
Does not know: what is asked.
Next: `chat_sources.py`, `top.py`.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ClusterError, InputError

if TYPE_CHECKING:
    import httpx  # below where it is used: the help of all commands needs a tenth of its time

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 900.0


class RemoteServer:
    """A server with Cenacle's or another's HTTP API.

    Args:
        url: with or without /v1.
        key: sent as `Authorization: Bearer`.
        certificate: file with the server's certificate, if it is self-signed.

    Raises:
        InputError: the URL is malformed, or the certificate cannot be used.
    """

    def __init__(self, url: str, key: str | None = None, certificate: Path | None = None) -> None:
        self._base_url = url.rstrip("/").removesuffix("/v1")
        if not self._base_url.startswith(("http://", "https://")):
            raise InputError(f"url: expected http://HOST:PORT or https://, got {url!r}", "url")
        import httpx

        try:
            self._client = httpx.Client(
                base_url=self._base_url,
                headers={"authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
                verify=ssl.create_default_context(cafile=certificate),
            )
        except (OSError, ValueError, httpx.InvalidURL) as error:
            raise InputError(f"url: {url!r} cannot be used: {error}", "url") from error

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def get(self, path: str, parameters: Mapping[str, str] | None = None) -> Any:
        """The JSON of a path.

        Raises:
            InputError: the server requires another key, or has no such path.
            ClusterError: the server does not answer.
        """
        with self._translate_errors():
            response = self._client.get(path, params=parameters, timeout=CONNECT_TIMEOUT_S)
            self._raise_for_status(response)
            return response.json()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn errors of the connection, and of malformed responses, into Cenacle's."""
        import httpx

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
            message = (
                f"expected a server with OpenAI's API, got status {response.status_code} without "
                "its error; check the address, or start a server there with `cenacle serve`"
            )
        message = f"{self._base_url}: {message}"
        if response.status_code == 401:
            raise InputError(f"{message}; pass the key with --key or CENACLE_API_KEY", "key")
        if response.status_code in (400, 404, 413, 422):
            raise InputError(message)
        raise ClusterError(message)
