"""Messages between the front and a rank, over one socket.

Owns: deadlines, and sending from several threads.
Does not know: what messages mean (`messages.py`), their framing (`net.py`).
Invariant: a call returns or raises within the deadline; a message is sent completely, or the
channel is closed.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from .. import net
from ..errors import ClusterError
from ..message import MessageError, decode_json

MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # bytes; a prompt of a million tokens takes about 8 MB


class ChannelTimeout(ClusterError):
    """Nothing was received within the deadline, or the other side did not take a message."""


class ChannelClosed(ClusterError):
    """The other side is gone."""


class Channel:
    """One end of a control connection. Sending is safe from several threads.

    Args:
        sock: connected.
        deadline_s: seconds after which a silent other side is an error.
    """

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self._socket, self._deadline_s = sock, deadline_s
        self.silent = False  # whether the last receive timed out
        self._has_received = False
        self._sending = threading.Lock()
        sock.settimeout(deadline_s)

    def fileno(self) -> int:
        """The socket's descriptor, for selectors."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message.

        Raises:
            ChannelTimeout: the other side did not take it within the deadline.
            ChannelClosed: the other side is gone.
        """
        frame = net.encode_frame(message)
        try:
            with self._sending:
                self._socket.sendall(frame)
        except TimeoutError as error:
            self.close()  # part of the message may be on its way: nothing can follow it
            raise ChannelTimeout(f"took no message for {self._deadline_s:g} s") from error
        except OSError as error:
            raise ChannelClosed(net.describe_loss(error)) from error

    def receive(self) -> dict[str, Any]:
        """Wait for one message.

        Raises:
            ChannelTimeout: no complete message was received within the deadline.
            ChannelClosed: the other side is gone.
            MessageError: what it sent is no message, or too long.
        """
        header = self.receive_bytes(net.FRAME_HEADER.size)
        self._has_received = True
        (length,) = net.FRAME_HEADER.unpack(header)
        if length > MAX_MESSAGE_BYTES:
            raise MessageError(f"{length} bytes, expected at most {MAX_MESSAGE_BYTES}")
        return decode_json(self.receive_bytes(length))

    def wait_for_message(self) -> None:
        """Wait, without a deadline, until the first message is here or has been received by another
        thread, or the other side is gone; receives nothing."""
        poll = select.poll()  # unlike select(), for any number of open files
        poll.register(self._socket, select.POLLIN)
        while not self._has_received and not poll.poll(250):
            pass

    def receive_bytes(self, count: int) -> bytes:
        """Exactly `count` bytes; raises as `receive`."""
        ends_s = time.monotonic() + self._deadline_s
        self.silent = False
        try:
            return net.receive_exactly(self._socket, count, ends_s, shared=True)
        except TimeoutError as error:
            self.silent = True
            raise ChannelTimeout(f"sent nothing for {self._deadline_s:g} s") from error
        except OSError as error:
            raise ChannelClosed(net.describe_loss(error)) from error

    def close(self) -> None:
        """Close; a `receive` that waits in another thread ends."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
