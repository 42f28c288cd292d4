"""What commands do on a node: pair with a head, or send it a query.

Owns: one short connection to the head at a time.
Does not know: what the head does with a query (`head.py`), the agent.
Invariant: every wait has a deadline; a token is never sent, only a proof of it.
"""

from __future__ import annotations

import json
import secrets
import socket
import ssl
from pathlib import Path
from typing import Any, TypeVar

from .. import net
from ..errors import ClusterError, InputError, error_from_json
from ..message import Message, MessageError, decode_json, parse
from ..ranks.channel import Channel
from . import messages
from .head import PORT
from .security import identity as identities
from .security import pairing

TIMEOUT_S = 10.0
M = TypeVar("M", bound=Message)


class WrongHead(ClusterError):
    """The head at an address belongs to another cluster, or is no head."""


def read_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT", "[IPv6]:PORT" or "HOST".

    Raises:
        InputError: none of these.
    """
    try:
        return net.parse_address(text, PORT)
    except ValueError:
        raise InputError(
            f"head: expected HOST:PORT as printed by `cenacle up`, got {text!r}", "head"
        ) from None


def pair_with_head(
    folder: Path, host: str, port: int, token: str, name: str
) -> identities.Identity:
    """Join a cluster: both sides prove that they know the token, and the head signs a certificate.

    Args:
        folder: for this node's identity.
        token: as typed by a person.
        name: wanted name of this node.

    Raises:
        InputError: the token is malformed, or this machine belongs to another cluster.
        ClusterError: the head cannot be reached, refuses the token, or does not know it.
    """
    token = pairing.read_token(token)
    key = identities.new_key()
    address = net.format_address(host, port)
    sock = connect_to_head(host, port, pairing.unverified_tls_context(), None)
    certificate = sock.getpeercert(binary_form=True)
    assert certificate is not None, "a TLS server without a certificate"
    try:
        _check_same_cluster(folder, certificate, address)
    except BaseException:
        sock.close()
        raise
    channel = Channel(sock, TIMEOUT_S)
    try:
        nonce = secrets.token_bytes(pairing.NONCE_BYTES)
        channel.send(messages.PairRequest(pairing.encode(nonce)).to_json())
        challenge = _receive(channel, address, messages.PairChallenge)
        transcript = (nonce, pairing.decode(challenge.nonce), certificate)
        request = messages.JoinRequest(identities.certificate_request(key).decode(), name)
        payload = json.dumps(request.to_json()).encode()
        proof = pairing.channel_bound_proof(token, "joiner", *transcript, payload)
        channel.send(messages.PairProof(pairing.encode(payload), pairing.encode(proof)).to_json())
        result = _receive(channel, address, messages.PairResult)
    except OSError as error:
        raise ClusterError(f"the head at {address} closed the connection ({error})") from error
    finally:
        channel.close()
    payload = pairing.decode(result.payload)
    expected = pairing.channel_bound_proof(token, "head", *transcript, payload)
    if not secrets.compare_digest(pairing.decode(result.proof), expected):
        raise ClusterError(
            f"the head at {address} does not recognize this token; check the address, or create a "
            f"new token with `cenacle nodes --invite` on the head. Nothing was changed."
        )
    grant = messages.JoinGrant.from_json(decode_json(payload))
    return identities.store_node_identity(
        folder,
        key,
        grant.certificate.encode(),
        id=grant.id,
        name=grant.name,
        host=host,
        port=port,
    )


def _check_same_cluster(folder: Path, certificate: bytes, address: str) -> None:
    known = identities.Identity(folder, "node")
    if known.exists and not known.has_issuer_of(certificate):
        settings = known.load_settings()
        own_head = net.format_address(settings["host"], settings["port"])
        raise InputError(
            f"this machine belongs to the cluster of {own_head}, and {address} is the head of "
            f"another: run `cenacle leave` first to change clusters"
        )


def query_head(
    identity: identities.Identity,
    host: str,
    port: int,
    query: messages.Query,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """Send a query to the head.

    Returns:
        Its answer, a JSON object.

    Raises:
        ClusterError: it cannot be reached or does not answer.
        CenacleError: its own error, in its own class.
    """
    context = identity.client_tls_context()
    sock = connect_to_head(host, port, context, identities.SERVER_NAME)
    channel = Channel(sock, timeout_s)
    try:
        channel.send(query.to_json())
        answer = _receive(channel, net.format_address(host, port), messages.QueryResult)
        return dict(answer.result)
    finally:
        channel.close()


def verify_head(identity: identities.Identity, host: str, port: int) -> None:
    """Check that the head at an address, if one answers, is that of this node's cluster.

    Raises:
        WrongHead: it is another one.
    """
    try:
        query_head(identity, host, port, messages.Query("status"))
    except WrongHead:
        raise
    except ClusterError:
        return  # nobody answers yet: the agent waits


def connect_to_head(
    host: str, port: int, context: ssl.SSLContext, server_name: str | None
) -> ssl.SSLSocket:
    """A TLS connection to the head.

    Raises:
        WrongHead: the certificate is not of this cluster.
        ClusterError: there is no head at this address.
    """
    address = net.format_address(host, port)
    try:
        sock = socket.create_connection((host, port), timeout=TIMEOUT_S)
    except OSError as error:
        raise ClusterError(
            f"no head answers at {address} ({error}); is `cenacle up` running there, and does the "
            f"firewall allow port {port}?"
        ) from error
    try:
        return context.wrap_socket(sock, server_hostname=server_name)
    except ssl.SSLCertVerificationError as error:
        sock.close()
        raise WrongHead(
            f"{address} is not the head of this machine's cluster ({error.verify_message}); to "
            f"join another cluster, use a token of its head"
        ) from error
    except OSError as error:
        sock.close()
        raise ClusterError(f"{address} is not a head ({error}); check the address") from error


def _receive(channel: Channel, address: str, kind: type[M]) -> M:
    try:
        message: Message = parse(channel.receive(), kind, messages.Rejection)
    except MessageError as error:
        raise ClusterError(f"{address} is not a head ({error}); check the address") from error
    except ClusterError as error:
        reason = str(error)
        if "alert" in reason:
            reason = "it refuses this machine's certificate; join again with a token"
        raise ClusterError(f"the head at {address}: {reason}") from error
    if isinstance(message, messages.Rejection):
        raise error_from_json(message.error, f"the head at {address}: ")
    assert isinstance(message, kind)
    return message
