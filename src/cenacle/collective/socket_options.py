"""TCP options for connections that must survive a short network outage.

Linux retransmits after 0.2 s and doubles the interval each time. After an outage of 3 s, as when a
switch renegotiates a link, the next attempt may come 3 s after the link is back, when the peer is
already given up. `configure_socket` makes the first intervals equal and caps later ones at one
second (tcp(7); Linux net/ipv4/tcp_timer.c). Other systems have no such option.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

# From linux/tcp.h; not in Python's `socket`. TCP_RTO_MAX_MS needs Linux 6.15.
TCP_THIN_LINEAR_TIMEOUTS, TCP_RTO_MAX_MS = 16, 44
MAX_RETRANSMIT_MS = 1000  # the smallest value that Linux accepts


def configure_socket(sock: socket.socket) -> None:
    """Send without delay and retransmit soon; does nothing to sockets that are not TCP."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sys.platform == "linux":
        for option, value in ((TCP_THIN_LINEAR_TIMEOUTS, 1), (TCP_RTO_MAX_MS, MAX_RETRANSMIT_MS)):
            with suppress(OSError):  # older kernel
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
