"""Latency and bandwidth of the link between two nodes, measured when a group is formed.

Owns: both sides of one short measurement over a TCP connection of its own.
Does not know: who asks for it, or what is decided by it.
Invariant: the serving side accepts one connection that knows the secret, and is gone within
`PROBE_TIMEOUT_S`.
"""

from __future__ import annotations

import hmac
import socket
import statistics
import threading
import time
from contextlib import suppress

from .. import net
from ..collective import socket_options
from ..core.link import Link
from ..errors import ClusterError

PING_BYTES = 64
PINGS = 50
BULK_BYTES = 4 * 2**20
PROBE_TIMEOUT_S = 8.0
MIN_TRANSFER_S = 1e-6


def serve_probe(address: str, secret: bytes) -> int:
    """Answer one probe at this address, in a thread; returns the port."""
    listener = net.listen(address, 0)
    port: int = listener.getsockname()[1]
    threading.Thread(target=_serve, args=(listener, secret), daemon=True).start()
    return port


def probe_link(address: str, port: int, secret: bytes) -> Link:
    """Measure the link to the node where `serve_probe` waits.

    Raises:
        ClusterError: it cannot be reached, or does not answer.
    """
    try:
        with socket.create_connection((address, port), timeout=PROBE_TIMEOUT_S) as sock:
            _configure(sock)
            sock.sendall(secret)
            round_trips = []
            for _ in range(PINGS):
                started_s = time.perf_counter()
                sock.sendall(bytes(PING_BYTES))
                net.receive_exactly(sock, PING_BYTES)
                round_trips.append(time.perf_counter() - started_s)
            round_trip_s = statistics.median(round_trips)
            started_s = time.perf_counter()
            sock.sendall(bytes(BULK_BYTES))
            net.receive_exactly(sock, 1)
            transfer_s = max(MIN_TRANSFER_S, time.perf_counter() - started_s - round_trip_s)
    except OSError as error:
        raise ClusterError(
            f"{address} cannot be reached ({error}); every node has to reach every other on any "
            f"port from 1024: check the firewalls"
        ) from error
    return Link(round_trip_s / 2, BULK_BYTES / transfer_s)


def _serve(listener: socket.socket, secret: bytes) -> None:
    ends_s = time.monotonic() + PROBE_TIMEOUT_S
    with listener, suppress(OSError):
        while (left_s := ends_s - time.monotonic()) > 0:
            listener.settimeout(left_s)
            sock, _ = listener.accept()
            with sock, suppress(OSError):
                _configure(sock)
                if not hmac.compare_digest(net.receive_exactly(sock, len(secret)), secret):
                    continue
                for _ in range(PINGS):
                    sock.sendall(net.receive_exactly(sock, PING_BYTES))
                net.receive_exactly(sock, BULK_BYTES)
                sock.sendall(b"!")
                return


def _configure(sock: socket.socket) -> None:
    sock.settimeout(PROBE_TIMEOUT_S / 4)
    socket_options.configure_socket(sock)
