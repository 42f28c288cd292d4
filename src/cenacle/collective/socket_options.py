"""TCP where every message is waited for, and a cable may be out for a moment.

Linux asks again for what is not acknowledged after 0.2 s, and then after twice as long each time:
with a cable that was out for three seconds, as when a switch agrees on a speed anew, the next
attempt may come three seconds after it is back, by when the other side is taken for lost. So it is
told to ask again at equal distances at first, and at least once a second later (tcp(7); Linux's
net/ipv4/tcp_timer.c). Other systems have no such choice.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

# Not in Python's `socket`: linux/tcp.h. The second came with Linux 6.15.
THIN_LINEAR_TIMEOUTS, RTO_MAX_MS = 16, 44
LONGEST_MS = 1000  # the least that Linux takes


def configure_socket(sock: socket.socket) -> None:
    """Send at once, and soon again; does nothing to a socket of this machine's own."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sys.platform == "linux":
        for option, value in ((THIN_LINEAR_TIMEOUTS, 1), (RTO_MAX_MS, LONGEST_MS)):
            with suppress(OSError):  # an older kernel
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
