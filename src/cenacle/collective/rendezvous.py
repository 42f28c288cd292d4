"""Connects the ranks of a mesh to each other and refuses everybody else.

Owns: the handshake and the sockets until all ranks are connected.
Does not know: what is sent afterwards.
Invariant: nobody is connected, or believed, without the secret; no proof can be used twice; a
connection that sends anything else, or nothing in time, is closed without delaying the others.
Next: `mesh.py`, which hands the sockets to the native all-reduce.

Rank r listens at its own address and connects to all lower ranks. A message is two bytes of length,
big-endian, then that many bytes, at most `MAX_MESSAGE`:

    connector -> listener   MAGIC, version, ranks, its rank, the listener's rank, 16 random bytes
    listener -> connector   16 random bytes, proof
    connector -> listener   proof
    listener -> connector   "in"

A proof is HMAC-SHA256 with the group's secret over the sender's role, the whole first message and
the listener's random bytes.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .. import net
from ..errors import ClusterError
from .socket_options import configure_socket

MAGIC, VERSION = b"cenacle-mesh", 2
LENGTH = struct.Struct(">H")
MAX_MESSAGE = 256  # bytes
MAX_PENDING = 64  # connections in the handshake at one time
NONCE_BYTES = 16
HELLO = struct.Struct(f">{len(MAGIC)}sHHHH{NONCE_BYTES}s")
RETRY_S = 0.02


class _HandshakeError(Exception):
    """The other side is not a rank of this group, or not yet; the text says why."""


class _AuthenticationFailed(_HandshakeError):
    """What answers at a rank's address is not that rank; retrying would not help."""


class Rendezvous:
    """Connects one rank to all others. Deadlines are values of `time.monotonic`.

    Args:
        rank: this process's rank.
        addresses: where each rank listens, in rank order: "unix:/path" or "host:port".
        secret: shared by the ranks of this group only.
        handshake_s: limit for one connection's handshake.
    """

    def __init__(
        self, rank: int, addresses: Sequence[str], secret: bytes, handshake_s: float
    ) -> None:
        self._rank, self._addresses, self._secret = rank, addresses, secret
        self._handshake_s = handshake_s
        self._changed = threading.Condition()
        self._connected: dict[int, socket.socket] = {}
        self._pending: dict[socket.socket, None] = {}  # an ordered set
        self._rejections = 0
        self._last_rejection = ""
        self._closed = False

    def connect_all(self, join_s: float) -> dict[int, socket.socket]:
        """Connect to every other rank; returns a socket for each.

        Raises:
            ClusterError: names the ranks that did not connect within `join_s`, or one that does not
                have the same secret.
        """
        deadline = time.monotonic() + join_s
        listener = None
        if self._rank < len(self._addresses) - 1:
            listener = _listen(self._addresses[self._rank])
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        try:
            for peer in range(self._rank):
                sock = self._connect_to(peer, deadline)
                with self._changed:
                    self._connected[peer] = sock
            self._wait_for_all(deadline)
            return dict(self._connected)
        except BaseException:
            for sock in self._connected.values():
                sock.close()
            raise
        finally:
            with self._changed:
                self._closed = True
                pending = list(self._pending)
            for sock in pending:  # strangers: all ranks are connected
                _close(sock)
            if listener is not None:
                _close(listener)
                if self._addresses[self._rank].startswith("unix:"):
                    Path(self._addresses[self._rank].removeprefix("unix:")).unlink(missing_ok=True)

    def _wait_for_all(self, deadline: float) -> None:
        with self._changed:
            others = set(range(len(self._addresses))) - {self._rank}
            if self._changed.wait_for(
                lambda: others <= set(self._connected),
                timeout=max(0.0, deadline - time.monotonic()),
            ):
                return
            missing = sorted(others - set(self._connected))
            rejected = (
                f"; it rejected {self._rejections} connections, the last because it "
                f"{self._last_rejection}"
                if self._rejections
                else ""
            )
            raise ClusterError(
                f"the mesh could not be formed: rank {self._rank} did not hear from ranks "
                f"{missing}{rejected}"
            )

    # Listening for higher ranks

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # closed: the group is complete or given up
            with self._changed:
                closed = self._closed
                # A rank answers within a millisecond: the oldest pending connection is a stranger.
                full = len(self._pending) >= MAX_PENDING
                oldest = next(iter(self._pending)) if full else None
                if not closed:
                    self._pending[sock] = None
                    if oldest is not None:
                        del self._pending[oldest]
            if closed:
                _close(sock)
                continue
            if oldest is not None:
                _close(oldest)
            threading.Thread(target=self._admit, args=(sock,), daemon=True).start()

    def _admit(self, sock: socket.socket) -> None:
        deadline = time.monotonic() + self._handshake_s
        try:
            hello = _receive(sock, deadline)
            peer = self._read_rank(hello)
            nonce = secrets.token_bytes(NONCE_BYTES)
            _send(sock, nonce + self._proof(b"listener", hello, nonce), deadline)
            if not hmac.compare_digest(
                _receive(sock, deadline), self._proof(b"connector", hello, nonce)
            ):
                raise _HandshakeError("does not have this group's secret")
            configure_socket(sock)
            with self._changed:
                if peer in self._connected:
                    raise _HandshakeError(f"claims to be rank {peer}, which is connected already")
                if self._closed:
                    raise _HandshakeError("came too late")
                _send(sock, b"in", deadline)
                self._connected[peer] = sock
                self._pending.pop(sock, None)
                self._changed.notify_all()
        except (_HandshakeError, OSError) as error:
            with self._changed:
                self._rejections += 1
                self._last_rejection = str(error)
                self._pending.pop(sock, None)
            _close(sock)

    def _read_rank(self, hello: bytes) -> int:
        if len(hello) != HELLO.size or not hello.startswith(MAGIC):
            raise _HandshakeError("does not speak the mesh protocol")
        _, version, size, peer, listener, _ = HELLO.unpack(hello)
        expected = (VERSION, len(self._addresses), self._rank)
        if (version, size, listener) != expected:
            raise _HandshakeError(
                f"is of another group (version, ranks, my rank): expected {expected}, "
                f"got {(version, size, listener)}"
            )
        if not self._rank < peer < size:
            raise _HandshakeError(f"claims to be rank {peer}")
        return int(peer)

    # Connecting to lower ranks

    def _connect_to(self, peer: int, deadline: float) -> socket.socket:
        """Retries: the peer may not listen yet, or be busy with strangers."""
        address = self._addresses[peer]
        while True:
            try:
                return self._send_rank(peer, address, deadline)
            except (_HandshakeError, OSError) as error:
                if isinstance(error, _AuthenticationFailed) or time.monotonic() > deadline:
                    raise ClusterError(
                        f"the mesh could not be formed: rank {peer} at {address}: {error}"
                    ) from error
                time.sleep(RETRY_S)

    def _send_rank(self, peer: int, address: str, deadline: float) -> socket.socket:
        sock = _connect(address, deadline)
        try:
            nonce = secrets.token_bytes(NONCE_BYTES)
            hello = HELLO.pack(MAGIC, VERSION, len(self._addresses), self._rank, peer, nonce)
            _send(sock, hello, deadline)
            reply = _receive(sock, deadline)
            peer_nonce, proof = reply[:NONCE_BYTES], reply[NONCE_BYTES:]
            if not hmac.compare_digest(proof, self._proof(b"listener", hello, peer_nonce)):
                raise _AuthenticationFailed("does not have this group's secret")
            _send(sock, self._proof(b"connector", hello, peer_nonce), deadline)
            if _receive(sock, deadline) != b"in":
                raise _AuthenticationFailed("did not let this rank in")
            configure_socket(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def _proof(self, role: bytes, hello: bytes, nonce: bytes) -> bytes:
        return hmac.digest(self._secret, role + b"\0" + hello + nonce, "sha256")


def _listen(address: str) -> socket.socket:
    try:
        if address.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(address.removeprefix("unix:"))
            sock.listen(MAX_PENDING)
            return sock
        return net.listen(*_parse_address(address), MAX_PENDING)
    except OSError as error:
        raise ClusterError(f"the mesh cannot listen at {address}: {error}") from error


def _connect(address: str, deadline: float) -> socket.socket:
    timeout = max(0.05, deadline - time.monotonic())
    if not address.startswith("unix:"):
        return socket.create_connection(_parse_address(address), timeout=timeout)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    try:
        sock.connect(address.removeprefix("unix:"))
    except OSError:
        sock.close()
        raise
    return sock


def _parse_address(address: str) -> tuple[str, int]:
    try:
        return net.parse_address(address)
    except ValueError:
        raise ClusterError(
            f"mesh address: expected unix:/path or host:port, got {address!r}"
        ) from None


def _send(sock: socket.socket, message: bytes, deadline: float) -> None:
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    sock.sendall(LENGTH.pack(len(message)) + message)


def _receive(sock: socket.socket, deadline: float) -> bytes:
    (length,) = LENGTH.unpack(_receive_exactly(sock, LENGTH.size, deadline))
    if length > MAX_MESSAGE:
        raise _HandshakeError(f"sent a message of {length} bytes, expected at most {MAX_MESSAGE}")
    return _receive_exactly(sock, length, deadline)


def _receive_exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    try:
        return net.receive_exactly(sock, count, deadline)
    except TimeoutError:
        raise _HandshakeError("sent nothing in the handshake") from None
    except OSError as error:
        raise _HandshakeError(f"{net.describe_loss(error)} in the handshake") from None


def _close(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # ends an accept or a receive in another thread
    sock.close()
