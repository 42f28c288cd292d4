"""Every rank to every rank in one hop: a native exchange that stays in the lazy graph.

Owns: forming the group (addresses, the handshake, refusing strangers) and choosing how to wait.
Does not know: models, who started the ranks. The exchange itself is `native/mesh/links.cpp`.
Invariant: vectors are added in rank order, so every rank has the same bits; every wait has a
deadline, and the error names the rank. A digest of the routing rides along in each message's
header: ranks that sent a token to different experts are named, and the step fails everywhere.
Next: `native/mesh/mesh.cpp`, the primitive; `cluster/launcher.py`, which hands out addresses.

The handshake. Rank r listens at its own address and connects to all ranks below it. A message is
two bytes of length, big-endian, then that many bytes, at most `MAX_MESSAGE`:

    connector -> listener   MAGIC, version, ranks, its rank, the listener's rank, 16 random bytes
    listener -> connector   16 random bytes, proof
    connector -> listener   proof
    listener -> connector   "in"

A proof is HMAC-SHA256 with the group's secret over the sender's role, the whole first message and
the listener's random bytes: nobody gets in, or is believed, without the secret, and no proof can
be used twice. Whoever sends anything else, or nothing in time, is closed; the others do not wait.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import struct
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from .. import net
from ..errors import ClusterError
from . import socket_options
from .base import Collective, RoutingDecision

ADDRESSES = "CENACLE_MESH"
SECRET = "CENACLE_MESH_SECRET"

MAGIC, VERSION = b"cenacle-mesh", 2
LENGTH = struct.Struct(">H")
MAX_MESSAGE = 256  # bytes
MAX_GUESTS = 64  # connections that are being asked who they are, at one time
NONCE = 16  # bytes
HELLO = struct.Struct(f">{len(MAGIC)}sHHHH{NONCE}s")

COMM_DTYPES = ("f32", "bf16")
SCATTER_BYTES = 64 * 1024  # from here on two hops were faster: benchmarks/exchange.py --ways


class _Refused(Exception):
    """The other side is not one of us, or not yet; says why."""


class _AuthenticationFailed(_Refused):
    """What answers at a rank's address is not that rank: asking again would not help."""


def unavailable_reason() -> str | None:
    """Why the mesh cannot be used in this process, as a sentence; None: it can."""
    try:
        _native()
    except ClusterError as error:
        return str(error)
    return None


def _native() -> ModuleType:
    # By name: type checkers do not see native modules. MLX first, whose library it is bound to.
    here = import_module("mlx.core").__version__
    try:
        native = import_module("cenacle._mesh")
    except ImportError as error:
        raise ClusterError(f"the native exchange is not in this installation ({error})") from error
    if here != native.MLX_VERSION:
        raise ClusterError(
            f"the native exchange was built for MLX {native.MLX_VERSION} and this is MLX {here}; "
            "install cenacle again"
        )
    return native


class Mesh(Collective):
    """One rank's connections to all others.

    Args:
        rank: this process's.
        addresses: where each rank listens, in rank order: "unix:/path" or "host:port".
        secret: known to the ranks of this group only.
        silence_s: longest time without a sign of life from a rank that is waited for. Every rank
            gives one twenty times in that, also while it computes.
        deadline_s: longest wait for a rank that lives: it may compute for minutes (a long prompt
            on a slow machine).
        handshake_s: longest time that one connection may take to say who it is.
        join_s: longest time until all ranks are there.
        scatter_bytes: with three ranks and more, larger vectors are sent by reduce-scatter and
            all-gather, which takes two hops and fewer bytes.
        wire: how float32 vectors travel: "f32", or "bf16", half the bytes, with each rank's part
            rounded to bfloat16 (and, where it is scattered, the sum too). Sums are in float32 and
            the same on every rank either way.
        spin_us: how long a wait asks again before it sleeps. On two shared cores every microsecond
            of it was lost (`docs/devlog.md`); it may pay where each rank has idle cores of its own.

    Raises:
        ClusterError: the extension is not there, or the group did not form; says who is missing.
    """

    def __init__(
        self,
        rank: int,
        addresses: Sequence[str],
        secret: bytes,
        *,
        silence_s: float = 5.0,
        deadline_s: float = 600.0,
        handshake_s: float = 5.0,
        join_s: float = 30.0,
        scatter_bytes: int = SCATTER_BYTES,
        wire: str = "f32",
        spin_us: float = 0.0,
    ) -> None:
        super().__init__()
        if wire not in COMM_DTYPES:
            raise ClusterError(f"wire: expected one of {', '.join(COMM_DTYPES)}, got {wire!r}")
        native = _native()
        self.rank, self.size = rank, len(addresses)
        sockets = _Rendezvous(rank, addresses, secret, handshake_s).gather(join_s)
        fds = [-1] * self.size
        for peer, sock in sockets.items():
            sock.setblocking(False)
            fds[peer] = sock.detach()  # the native side closes it
        self._native: Any = native.Mesh(
            rank,
            fds,
            silence_s=silence_s,
            deadline_s=deadline_s,
            scatter_bytes=scatter_bytes,
            spin_us=spin_us,
            bf16_wire=wire == "bf16",
        )
        # Also at the interpreter's end: MLX waits there for exchanges that are under way.
        self._finish = weakref.finalize(self, self._native.close)

    @classmethod
    def from_environment(cls, rank: int, size: int, wire: str = "f32") -> Mesh:
        """The group that the launcher has described in `ADDRESSES` and `SECRET`.

        Raises:
            ClusterError: they are not there, or are for another number of ranks; or as the class.
        """
        try:
            addresses = json.loads(os.environ[ADDRESSES])
            secret = os.environ.pop(SECRET).encode()
        except (KeyError, ValueError) as error:
            raise ClusterError(f"the mesh was not described to this process ({error!r})") from error
        if len(addresses) != size:
            raise ClusterError(f"{ADDRESSES} has {len(addresses)} addresses, expected {size}")
        return cls(rank, addresses, secret, wire=wire)

    def _all_sum(self, x: mx.array, chosen: RoutingDecision | None) -> mx.array:
        if self.size == 1 or x.size == 0:
            return x
        if chosen is None:
            return self._native.all_sum(x)
        return self._native.all_sum(x, chosen.ids, chosen.layer)

    def check(self) -> None:
        """See `Collective`."""
        if (why := self._native.failure()) is not None:
            raise ClusterError(why)

    def close(self) -> None:
        """Leave the group; an exchange that waits ends with an error."""
        self._finish()


class _Rendezvous:
    """How the sockets to all other ranks come about."""

    def __init__(
        self, rank: int, addresses: Sequence[str], secret: bytes, handshake_s: float
    ) -> None:
        self._rank, self._addresses, self._secret = rank, addresses, secret
        self._handshake_s = handshake_s
        self._changed = threading.Condition()
        self._in: dict[int, socket.socket] = {}
        self._guests: dict[socket.socket, None] = {}  # as a set that keeps the order
        self._refused = 0
        self._last_refusal = ""
        self._over = False

    def gather(self, join_s: float) -> dict[int, socket.socket]:
        """A socket to every other rank.

        Raises:
            ClusterError: names the ranks that did not come within `join_s`, or one that does not
                have the same secret.
        """
        ends = time.monotonic() + join_s
        listener = None
        if self._rank < len(self._addresses) - 1:
            listener = _listen(self._addresses[self._rank])
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        try:
            for peer in range(self._rank):
                sock = self._call(peer, ends)
                with self._changed:
                    self._in[peer] = sock
            self._wait(ends)
            return dict(self._in)
        except BaseException:
            for sock in self._in.values():
                sock.close()
            raise
        finally:
            with self._changed:
                self._over = True
                guests = list(self._guests)
            for guest in guests:  # strangers: everybody else is in
                _hang_up(guest)
            if listener is not None:
                _hang_up(listener)
                if self._addresses[self._rank].startswith("unix:"):
                    Path(self._addresses[self._rank].removeprefix("unix:")).unlink(missing_ok=True)

    def _wait(self, ends: float) -> None:
        with self._changed:
            everybody = set(range(len(self._addresses))) - {self._rank}
            if self._changed.wait_for(
                lambda: everybody <= set(self._in), timeout=max(0.0, ends - time.monotonic())
            ):
                return
            missing = sorted(everybody - set(self._in))
            refused = f"; {self._refused} others were refused, the last because it "
            raise ClusterError(
                f"the mesh could not be formed: rank {self._rank} did not hear from ranks "
                f"{missing}{refused + self._last_refusal if self._refused else ''}"
            )

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # the group is complete, or given up
            with self._changed:
                over = self._over
                # A rank answers within a millisecond: whoever is here longest is not one.
                full = len(self._guests) >= MAX_GUESTS
                oldest = next(iter(self._guests)) if full else None
                if not over:
                    self._guests[sock] = None
                    if oldest is not None:
                        del self._guests[oldest]
            if over:
                _hang_up(sock)
                continue
            if oldest is not None:
                _hang_up(oldest)
            threading.Thread(target=self._ask, args=(sock,), daemon=True).start()

    def _ask(self, sock: socket.socket) -> None:
        """Let a guest in, or refuse it."""
        ends = time.monotonic() + self._handshake_s
        try:
            hello = _receive(sock, ends)
            peer = self._who(hello)
            nonce = secrets.token_bytes(NONCE)
            _send(sock, nonce + self._proof(b"listener", hello, nonce), ends)
            if not hmac.compare_digest(
                _receive(sock, ends), self._proof(b"connector", hello, nonce)
            ):
                raise _Refused("does not have this group's secret")
            socket_options.configure_socket(sock)
            with self._changed:
                if peer in self._in:
                    raise _Refused(f"says that it is rank {peer}, which is already here")
                if self._over:
                    raise _Refused("came too late")
                _send(sock, b"in", ends)
                self._in[peer] = sock
                self._guests.pop(sock, None)
                self._changed.notify_all()
        except (_Refused, OSError) as error:
            with self._changed:
                self._refused += 1
                self._last_refusal = str(error)
                self._guests.pop(sock, None)
            _hang_up(sock)

    def _who(self, hello: bytes) -> int:
        if len(hello) != HELLO.size or not hello.startswith(MAGIC):
            raise _Refused("does not speak the mesh's language")
        _, version, size, peer, me, _ = HELLO.unpack(hello)
        mine = (VERSION, len(self._addresses), self._rank)
        if (version, size, me) != mine:
            raise _Refused(
                f"is of another group (version, ranks, my rank): expected {mine}, "
                f"got {(version, size, me)}"
            )
        if not self._rank < peer < size:
            raise _Refused(f"says that it is rank {peer}")
        return int(peer)

    def _call(self, peer: int, ends: float) -> socket.socket:
        """Connect to a rank below this one.

        It may not listen yet, or be too busy with strangers to answer: then ask again.
        """
        address = self._addresses[peer]
        while True:
            try:
                return self._introduce(peer, address, ends)
            except (_Refused, OSError) as error:
                if isinstance(error, _AuthenticationFailed) or time.monotonic() > ends:
                    raise ClusterError(
                        f"the mesh could not be formed: rank {peer} at {address}: {error}"
                    ) from error
                time.sleep(0.02)

    def _introduce(self, peer: int, address: str, ends: float) -> socket.socket:
        sock = _connect(address, ends)
        try:
            nonce = secrets.token_bytes(NONCE)
            hello = HELLO.pack(MAGIC, VERSION, len(self._addresses), self._rank, peer, nonce)
            _send(sock, hello, ends)
            answer = _receive(sock, ends)
            theirs, proof = answer[:NONCE], answer[NONCE:]
            if not hmac.compare_digest(proof, self._proof(b"listener", hello, theirs)):
                raise _AuthenticationFailed("does not have this group's secret")
            _send(sock, self._proof(b"connector", hello, theirs), ends)
            if _receive(sock, ends) != b"in":
                raise _AuthenticationFailed("did not let this rank in")
            socket_options.configure_socket(sock)
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
            sock.listen(MAX_GUESTS)
            return sock
        return net.listen(*_host_port(address), MAX_GUESTS)
    except OSError as error:
        raise ClusterError(f"the mesh cannot listen at {address}: {error}") from error


def _connect(address: str, ends: float) -> socket.socket:
    left = max(0.05, ends - time.monotonic())
    if not address.startswith("unix:"):
        return socket.create_connection(_host_port(address), timeout=left)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(left)
    try:
        sock.connect(address.removeprefix("unix:"))
    except OSError:
        sock.close()
        raise
    return sock


def _host_port(address: str) -> tuple[str, int]:
    try:
        return net.parse_address(address)
    except ValueError:
        raise ClusterError(
            f"mesh address: expected unix:/path or host:port, got {address!r}"
        ) from None


def _send(sock: socket.socket, message: bytes, ends: float) -> None:
    sock.settimeout(max(0.001, ends - time.monotonic()))
    sock.sendall(LENGTH.pack(len(message)) + message)


def _receive(sock: socket.socket, ends: float) -> bytes:
    (length,) = LENGTH.unpack(_exactly(sock, LENGTH.size, ends))
    if length > MAX_MESSAGE:
        raise _Refused(f"sent a message of {length} bytes, expected at most {MAX_MESSAGE}")
    return _exactly(sock, length, ends)


def _exactly(sock: socket.socket, count: int, ends: float) -> bytes:
    try:
        return net.receive_exactly(sock, count, ends)
    except TimeoutError:
        raise _Refused("was silent in the handshake") from None
    except OSError as error:
        raise _Refused(f"{net.describe_loss(error)} in the handshake") from None


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # ends an accept or a receive in another thread
    sock.close()
