"""The head's port: accepts connections, checks who connects, and pairs new nodes.

Owns: the TLS listener, the first message of every connection, pairing, rejections, and serving
files of the model.
Does not know: groups, orders; what a connection is for is up to the handlers.
Invariant: a peer without a certificate of this cluster's authority, or that was removed, can only
pair. A peer that says nothing is closed after `HANDSHAKE_TIMEOUT_S`, and there are at most
`MAX_UNKNOWN_PEERS` of them. A peer's malformed message closes its own connection and nothing else.
Next: `head.py` has the handlers; `security/pairing.py` describes pairing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from .. import net
from ..collective import socket_options
from ..errors import CenacleError, ClusterError, InputError, error_to_json
from ..message import Message, MessageError, decode_json, parse
from . import framing, messages
from .loop_thread import LoopThread
from .node_connection import SEND_TIMEOUT_S
from .relay import Stream
from .security import identity, pairing

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0
MAX_UNKNOWN_PEERS = 64
REJECTION_DELAY_S = 0.5  # slows down guessing
CLOSE_TIMEOUT_S = 1.0
FILE_REQUEST_TIMEOUT_S = 60.0
RETRY_DELAY_S = 0.2

Handler = Callable[[str, Any, Stream], Awaitable[None]]
"""Serves a connection: the node's id, its first message, the stream."""


class HeadServer:
    """The server on the head's port. Only for the head's event loop.

    Args:
        listener: see `listen`.
        authority: of the cluster; signs the certificates of new nodes.
        tokens: with which nodes pair.
        is_member: whether a node belongs to the cluster.
        add_member: adds a node by its id and wanted name, and returns its name.
        handlers: by the kind of the first message.
        loop: that runs everything.
    """

    def __init__(
        self,
        listener: socket.socket,
        authority: identity.Authority,
        tokens: pairing.Tokens,
        is_member: Callable[[str], bool],
        add_member: Callable[[str, str], str],
        handlers: Mapping[type[Message], Handler],
        loop: LoopThread,
    ) -> None:
        self._listener, self._authority, self._tokens = listener, authority, tokens
        self._is_member, self._add_member = is_member, add_member
        self._handlers, self._loop = handlers, loop
        self._certificate = identity.leaf_certificate_der(authority.identity.certificate)
        self._unknown_peers: dict[asyncio.StreamWriter, None] = {}  # as a set in order of arrival
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Accept connections from now on.

        Raises:
            InputError: the head's certificate cannot be used.
        """
        self._server = await asyncio.start_server(
            self._on_connection,
            sock=self._listener,
            ssl=self._authority.identity.server_tls_context(),
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            limit=framing.CHUNK_BYTES,
        )

    def close(self) -> None:
        """Accept no more connections, and close those of unknown peers."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._unknown_peers):
            framing.abort(writer)

    async def _on_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._loop.track(task)
        if len(self._unknown_peers) >= MAX_UNKNOWN_PEERS:  # a node would have spoken by now
            framing.abort(next(iter(self._unknown_peers)))
        self._unknown_peers[writer] = None
        socket_options.configure_socket(writer.get_extra_info("socket"))
        try:
            await self._handshake((reader, writer))
        except (CenacleError, OSError) as error:
            log.info("a connection was closed: %s", error)
        except Exception:  # whatever a peer has found to send, it costs its own connection
            log.exception("internal error; a connection was closed")
        except asyncio.CancelledError:
            pass  # closed by this side; asyncio would log it
        finally:
            self._unknown_peers.pop(writer, None)
            framing.abort(writer)

    async def _handshake(self, stream: Stream) -> None:
        reader, writer = stream
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        data = await framing.receive_object(
            reader, HANDSHAKE_TIMEOUT_S, framing.FIRST_MESSAGE_BYTES
        )
        if data.get("type") == messages.PairRequest.type:
            await self._pair(messages.PairRequest.from_json(data), stream)
            return
        if certificate is None:
            error = ClusterError("this machine is not part of this cluster: join it with a token")
            await reject_and_close(writer, error)
            return
        node_id = identity.node_id_of_certificate(certificate)
        if not self._is_member(node_id):
            error = ClusterError("this machine was removed from this cluster: join it again")
            await reject_and_close(writer, error)
            return
        self._unknown_peers.pop(writer, None)
        try:
            hello = parse(data, *self._handlers)
            await self._handlers[type(hello)](node_id, hello, stream)
        except MessageError as error:
            await reject_and_close(writer, error)

    async def _pair(self, hello: messages.PairRequest, stream: Stream) -> None:
        reader, writer = stream
        nonce, own_nonce = pairing.decode(hello.nonce), secrets.token_bytes(pairing.NONCE_BYTES)
        challenge = messages.PairChallenge(pairing.encode(own_nonce))
        await framing.send(writer, challenge, SEND_TIMEOUT_S)
        message = await framing.receive(
            reader, HANDSHAKE_TIMEOUT_S, messages.PairProof, limit=framing.FIRST_MESSAGE_BYTES
        )
        payload = pairing.decode(message.payload)
        transcript = (nonce, own_nonce, self._certificate)
        try:
            if len(nonce) != pairing.NONCE_BYTES:
                raise ClusterError(f"pair.nonce: expected {pairing.NONCE_BYTES} bytes of base64")
            token = self._tokens.find(pairing.decode(message.proof), *transcript, payload)
            request = messages.JoinRequest.from_json(decode_json(payload))
            node_id = secrets.token_hex(8)
            certificate = self._authority.sign(request.certificate_request.encode(), node_id)
        except (ClusterError, ValueError) as error:
            log.warning("a machine was not admitted: %s", error)
            await reject_and_close(writer, ClusterError(str(error)))
            return
        name = self._add_member(node_id, _printable(request.name))
        self._tokens.note_join(token, node_id)
        log.info("%s has joined", name)
        grant = json.dumps(messages.JoinGrant(certificate.decode(), node_id, name).to_json())
        proof = pairing.channel_bound_proof(token, "head", *transcript, grant.encode())
        result = messages.PairResult(pairing.encode(grant.encode()), pairing.encode(proof))
        await framing.send(writer, result, SEND_TIMEOUT_S)
        await framing.close_gracefully(writer, 5 * CLOSE_TIMEOUT_S)


class FileServer(Protocol):
    """What nodes may download; see `download/file_server.py`."""

    def serve(
        self, request: messages.FileRequest
    ) -> tuple[messages.FileList | messages.FileData, bytes] | None:
        """The answer and the bytes that follow it; None: ask again later.

        Raises:
            CenacleError: the request cannot be answered.
        """
        ...


async def serve_files(
    server: Callable[[], FileServer | None],
    is_member: Callable[[], bool],
    request: messages.FileRequest,
    stream: Stream,
) -> None:
    """Answer file requests of a node, one after the other, while it belongs to the cluster."""
    reader, writer = stream
    while is_member():
        try:
            files = server()
            if files is None:
                raise ClusterError("the head serves no model yet")
            answer = await asyncio.to_thread(files.serve, request)
        except CenacleError as error:
            await reject(writer, error)
        else:
            if answer is None:
                await asyncio.sleep(RETRY_DELAY_S)
                await framing.send(writer, messages.RetryLater(), SEND_TIMEOUT_S)
            else:
                message, data = answer
                await framing.send(writer, message, SEND_TIMEOUT_S)
                for start in range(0, len(data), framing.CHUNK_BYTES):
                    chunk = data[start : start + framing.CHUNK_BYTES]
                    await framing.send_bytes(writer, chunk, HANDSHAKE_TIMEOUT_S)
        request = await framing.receive(
            reader,
            FILE_REQUEST_TIMEOUT_S,
            messages.FileRequest,
            limit=framing.FIRST_MESSAGE_BYTES,
        )


async def reject(writer: asyncio.StreamWriter, error: CenacleError, *, retry: bool = False) -> None:
    """Tell a peer why it is refused."""
    with suppress(ClusterError):
        message = messages.Rejection(error_to_json(error), retry)
        await framing.send(writer, message, SEND_TIMEOUT_S)


async def reject_and_close(
    writer: asyncio.StreamWriter, error: CenacleError, *, retry: bool = False
) -> None:
    """The same, after a pause, and close the connection."""
    await asyncio.sleep(REJECTION_DELAY_S)
    await reject(writer, error, retry=retry)
    await framing.close_gracefully(writer, CLOSE_TIMEOUT_S)


def listen(host: str, port: int) -> socket.socket:
    """The head's listening socket; port 0 takes any free port.

    Raises:
        InputError: the address cannot be used.
    """
    try:
        return net.listen(host, port, MAX_UNKNOWN_PEERS)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise InputError(
            f"--listen: cannot listen on {host}:{port} ({reason}); choose another address",
            "listen",
        ) from error


def _printable(name: str) -> str:
    characters = "".join(c for c in name if c.isalnum() or c in "-_.")[:40]
    return characters or "node"
