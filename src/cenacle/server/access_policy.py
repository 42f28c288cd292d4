"""Who may use a server, and how much at once.

Owns: the policy, and which one fits the address of a socket.
Does not know: requests.
Invariant: beyond this machine keys are required. This module imports next to nothing: the
supervisor checks the policy before it starts the process that serves.
Next: `middleware.py` checks each request against it.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .auth import KeyStore


@dataclass(frozen=True)
class AccessPolicy:
    """Who may use the server, and how much at once.

    Args:
        require_key: every request needs an API key.
        hosts: names that the Host header may have besides those of loopback; None: any. A web page
            elsewhere can make a browser send requests to this machine under the page's own name
            (DNS rebinding). Without keys, only the Host header reveals that.
        cors_origins: pages of these origins may use the server from browsers; "*": all.
        max_concurrent: answers at once, in total; a request with several counts as so many.
        max_concurrent_per_key: the same for each key without a limit of its own.
        access_log: log a line for each request: key, path, status, time; no text.
        log_text: log prompts and answers.
    """

    require_key: bool = False
    hosts: frozenset[str] | None = frozenset()
    cors_origins: tuple[str, ...] = ()
    max_concurrent: int = 256
    max_concurrent_per_key: int = 64
    access_log: bool = False
    log_text: bool = False

    @classmethod
    def for_socket(cls, sock: socket.socket, keys: KeyStore, **options: Any) -> AccessPolicy:
        """The policy for the address of a socket: beyond loopback keys are required.

        Args:
            sock: bound.
            keys: the existing keys.
            options: fields; `hosts` are names besides those of loopback.

        Raises:
            InputError: keys are required, and there is none.
        """
        address = sock.getsockname()[0].partition("%")[0]
        is_public = not ipaddress.ip_address(address).is_loopback
        require_key = options.pop("require_key", False) or is_public
        if require_key and not keys.list_keys():
            why = f"listening on {address}, beyond this machine," if is_public else "--require-key"
            raise InputError(
                f"{why} requires an API key, but none exists; create one with `cenacle keys add "
                f"NAME`",
                "require-key",
            )
        hosts = frozenset(host.lower() for host in options.pop("hosts", ()))
        return cls(require_key, None if is_public else hosts, **options)
