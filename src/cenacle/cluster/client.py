"""What verbs do on a machine of a cluster: pair with a head, ask it something, become a service.

Owns: one short connection to the head at a time, and the text of a service.
Does not know: what the head does with it (`control.py`), the agent.
Invariant: every wait has a deadline; a token is sent to nobody, only a proof of it.
"""

from __future__ import annotations

import json
import secrets
import socket
import ssl
from pathlib import Path
from typing import Any

from .. import net
from ..errors import ClusterError, InputError, error_from_json
from ..ranks.channel import Channel
from .head import PORT
from .security import identity as identities
from .security import pairing

DEADLINE_S = 10.0


class OtherHead(ClusterError):
    """What answers is the head of another cluster, or none."""


def read_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT", "[v6]:PORT" or "HOST".

    Raises:
        InputError: it is none of these.
    """
    try:
        return net.parse_address(text, PORT)
    except ValueError:
        raise InputError(
            f"head: expected HOST:PORT as `cenacle up` prints it, got {text!r}"
        ) from None


def pair(folder: Path, host: str, port: int, token: str, name: str) -> identities.Identity:
    """Join a cluster: prove the token, have the head prove it too, and keep what it gives.

    Args:
        folder: where this machine's identity is to be.
        token: as a person typed it.
        name: this machine's, for people.

    Raises:
        InputError: a token that cannot be one; this machine is part of another cluster.
        ClusterError: the head cannot be reached, does not take the token, or does not know it.
    """
    token = pairing.read_token(token)
    key = identities.new_key()
    where = f"{host}:{port}"
    sock = call(host, port, pairing.stranger(), None)
    seen = sock.getpeercert(binary_form=True)
    assert seen is not None, "a TLS server without a certificate"
    before = identities.Identity(folder, "node")
    if before.exists and not before.is_of(seen):
        sock.close()
        known = before.remembered()
        raise InputError(
            f"this machine is part of the cluster of {known['host']}:{known['port']}, and {where} "
            f"is another's head: to change over, `cenacle leave` first"
        )
    channel = Channel(sock, DEADLINE_S)
    try:
        mine = secrets.token_bytes(pairing.NONCE)
        channel.send({"type": "pair", "nonce": pairing.encode(mine)})
        theirs = pairing.decode(_said(channel, "nonce", where).get("nonce"))
        request = identities.request_for(key).decode()
        said = json.dumps({"request": request, "name": name}).encode()
        proof = pairing.proof_of(token, "joiner", mine, theirs, seen, said)
        channel.send(
            {"type": "proof", "said": pairing.encode(said), "proof": pairing.encode(proof)}
        )
        answer = _said(channel, "paired", where)
        given = pairing.decode(answer.get("said"))
        expected = pairing.proof_of(token, "head", mine, theirs, seen, given)
        if not secrets.compare_digest(pairing.decode(answer.get("proof")), expected):
            raise ClusterError(
                f"what answers at {where} does not know the token: it is not the head that gave "
                f"it out; nothing was changed"
            )
        got = json.loads(given)
    except OSError as error:
        raise ClusterError(f"the head at {where} broke off ({error})") from error
    finally:
        channel.close()
    return identities.keep_node(
        folder,
        key,
        got["certificate"].encode(),
        id=got["id"],
        name=got["name"],
        host=host,
        port=port,
    )


def ask(
    identity: identities.Identity,
    host: str,
    port: int,
    what: str,
    deadline_s: float = DEADLINE_S,
    **more: Any,
) -> dict[str, Any]:
    """Ask the head something.

    Args:
        deadline_s: of the answer.

    Raises:
        CenacleError: it cannot be reached, or what it said, in its own class.
    """
    where = f"{host}:{port}"
    channel = Channel(call(host, port, identity.client(), identities.SERVER_NAME), deadline_s)
    try:
        channel.send({"type": "ask", "what": what, **more})
        return _said(channel, "answer", where)
    finally:
        channel.close()


def check(identity: identities.Identity, host: str, port: int) -> None:
    """Whether the head of this machine's cluster may be there: nobody answers, or it does.

    Raises:
        OtherHead: somebody else does.
    """
    try:
        ask(identity, host, port, "status")
    except OtherHead:
        raise
    except ClusterError:
        return  # the agent waits for it


def call(host: str, port: int, context: ssl.SSLContext, name: str | None) -> ssl.SSLSocket:
    """A connection to the head; see `ask` for what it raises."""
    where = f"{host}:{port}"
    try:
        plain = socket.create_connection((host, port), timeout=DEADLINE_S)
    except OSError as error:
        raise ClusterError(
            f"no head answers at {where} ({error}); does `cenacle up` run there, and does the "
            f"firewall let port {port} through?"
        ) from error
    try:
        return context.wrap_socket(plain, server_hostname=name)
    except ssl.SSLCertVerificationError as error:
        plain.close()
        raise OtherHead(
            f"what answers at {where} is not the head of this machine's cluster "
            f"({error.verify_message}); join again with a token of the head that you mean"
        ) from error
    except OSError as error:
        plain.close()
        raise ClusterError(f"what answers at {where} is not a head ({error})") from error


def _said(channel: Channel, kind: str, where: str) -> dict[str, Any]:
    try:
        message = channel.receive()
    except ClusterError as error:
        why = str(error)
        if "alert" in why:
            why = "it does not accept this machine's certificate; join again with a token"
        raise ClusterError(f"the head at {where}: {why}") from error
    if message.get("type") == "refused":
        raise error_from_json(message.get("error"), f"the head at {where}: ")
    if message.get("type") != kind:
        raise ClusterError(f"what answers at {where} is not a head")
    return message
