"""What the link between two machines gives: latency and bandwidth, measured when a group forms.

Owns: one short measurement over a TCP connection of its own, both sides.
Does not know: who asks, what is decided by it.
Invariant: the listening side takes one connection, that knows the secret, and is gone within
`DEADLINE_S`.
"""

from __future__ import annotations

import hmac
import socket
import statistics
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from .. import net
from ..collective import socket_options
from ..errors import ClusterError

PING_BYTES = 64
PINGS = 50
BULK_BYTES = 4 * 2**20
DEADLINE_S = 8.0


@dataclass(frozen=True)
class Link:
    """A link from one machine to another.

    Args:
        latency_s: half a round trip of a small message, the median.
        bytes_s: of a few megabytes at once.
    """

    latency_s: float
    bytes_s: float


def answer(address: str, secret: bytes) -> int:
    """Answer one measurement at this address, from a thread; the port where."""
    listener = net.listen(address, 0)
    port: int = listener.getsockname()[1]
    threading.Thread(target=_answer, args=(listener, secret), daemon=True).start()
    return port


def measure(address: str, port: int, secret: bytes) -> Link:
    """Measure the link to where `answer` waits.

    Raises:
        ClusterError: it cannot be reached, or does not answer.
    """
    try:
        with socket.create_connection((address, port), timeout=DEADLINE_S) as sock:
            _quick(sock)
            sock.sendall(secret)
            trips = []
            for _ in range(PINGS):
                began = time.perf_counter()
                sock.sendall(bytes(PING_BYTES))
                net.receive_exactly(sock, PING_BYTES)
                trips.append(time.perf_counter() - began)
            trip = statistics.median(trips)
            began = time.perf_counter()
            sock.sendall(bytes(BULK_BYTES))
            net.receive_exactly(sock, 1)
            took = max(1e-6, time.perf_counter() - began - trip)
    except OSError as error:
        raise ClusterError(
            f"{address} cannot be reached ({error}); machines of a cluster have to reach one "
            f"another, on any port from 1024: look at the firewall"
        ) from error
    return Link(trip / 2, BULK_BYTES / took)


def _answer(listener: socket.socket, secret: bytes) -> None:
    ends = time.monotonic() + DEADLINE_S
    with listener, suppress(OSError):
        while (left := ends - time.monotonic()) > 0:
            listener.settimeout(left)
            sock, _ = listener.accept()
            with sock, suppress(OSError):
                _quick(sock)
                if not hmac.compare_digest(net.receive_exactly(sock, len(secret)), secret):
                    continue
                for _ in range(PINGS):
                    sock.sendall(net.receive_exactly(sock, PING_BYTES))
                net.receive_exactly(sock, BULK_BYTES)
                sock.sendall(b"!")
                return


def _quick(sock: socket.socket) -> None:
    sock.settimeout(DEADLINE_S / 4)
    socket_options.configure_socket(sock)
