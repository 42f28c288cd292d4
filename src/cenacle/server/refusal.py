"""Answers requests while there is no model yet that could.

Owns: the thread in which a server refuses every request with 503 and the present reason.
Does not know: what is waited for, HTTP (`refusing_app.py`).
Invariant: when `refuse` has returned the socket listens, and who connects waits for the next
server. Importing this takes no time: most waits are over before anybody could ask.
Next: `http_server.py` follows once a model is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import CenacleError
from .access_policy import AccessPolicy

log = logging.getLogger(__name__)

DELAY_S = 1.0
STOP_TIMEOUT_S = 10.0


@contextmanager
def refuse(
    sock: socket.socket,
    describe: Callable[[], str],
    policy: AccessPolicy | None = None,
    tls: ssl.SSLContext | None = None,
    delay_s: float = DELAY_S,
) -> Iterator[None]:
    """Refuse requests until the block ends.

    Args:
        sock: listening; it stays open.
        describe: the present reason, as a sentence; called in another thread.
        policy, tls: see `http_server.serve`.
        delay_s: before the first is answered.
    """
    ending = threading.Event()

    def run() -> None:
        if ending.wait(delay_s):
            return
        from .refusing_app import serve_refusals

        try:
            asyncio.run(serve_refusals(sock, describe, policy, tls, ending))
        except (CenacleError, OSError) as error:  # requests wait, as they do while a model loads
            log.warning("requests are not answered before a model is loaded: %s", error)

    thread = threading.Thread(target=run, name="refusal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(STOP_TIMEOUT_S)
