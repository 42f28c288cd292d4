"""Pairing: how a node with a token joins a cluster, without sending the token.

Owns: tokens, and the proofs that both sides know one.
Does not know: connections (`head_server.py`, `client.py`), certificates.
Invariant: a token is valid for a limited time, and is worth nothing to a man in the middle.

The joining node cannot know the head's certificate yet, so TLS alone proves nothing. Both sides
know the token; its 80 random bits cannot be guessed, so plain HMAC is enough:

    node -> head   PairRequest    16 random bytes
    head -> node   PairChallenge  16 random bytes
    node -> head   PairProof      certificate signing request, wanted name; proof
    head -> node   PairResult     certificates of the node and the authority; proof

A proof is HMAC-SHA256 with the token over the sender's role, both random values, the digest of the
certificate that the head shows in this TLS connection, and the digest of the payload. A man in the
middle has to show a certificate of his own, to which neither proof is bound.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import secrets
import ssl
from collections.abc import Callable

from ...errors import ClusterError, InputError

TOKEN_LIFE_S = 3600.0
TOKEN_LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32: none look alike
TOKEN_LENGTH = 16  # letters of five bits
NONCE_BYTES = 16


class Tokens:
    """The tokens that the head has issued.

    Args:
        clock: monotonic seconds.
        life_s: how long a token is valid.
    """

    def __init__(self, clock: Callable[[], float], life_s: float = TOKEN_LIFE_S) -> None:
        self._clock, self._life_s = clock, life_s
        self._issued: dict[str, float] = {}
        self._joined: dict[str, list[str]] = {}  # ids of nodes by token

    def issue(self) -> str:
        """A new token, such as 7K2M-9QXD-41TB-W3HF."""
        token = new_token()
        self._issued[token] = self._clock() + self._life_s
        return token

    def note_join(self, token: str, node_id: str) -> None:
        """Note that a node has joined with a token."""
        self._joined.setdefault(token, []).append(node_id)

    def revoke(self, token: str = "") -> tuple[int, list[str]]:
        """Make a token worthless, or all of them.

        Returns:
            How many were still valid, and the ids of the nodes that joined with them.

        Raises:
            InputError: the token was not issued by this head, or was revoked before.
        """
        token = token and read_token(token)
        if token and token not in self._issued:
            raise InputError(
                "token: this head did not issue it since it started, or has revoked it", "token"
            )
        revoked = [token] if token else list(self._issued)
        now_s = self._clock()
        valid = sum(now_s < self._issued.pop(t) for t in revoked)
        return valid, [node_id for t in revoked for node_id in self._joined.pop(t, [])]

    def find(self, proof: bytes, *transcript: bytes) -> str:
        """The token that a joining node has proved to know.

        Args:
            transcript: further arguments of `channel_bound_proof`.

        Raises:
            ClusterError: no token matches, or it has expired.
        """
        for token, expires_s in self._issued.items():
            if hmac.compare_digest(channel_bound_proof(token, "joiner", *transcript), proof):
                if self._clock() < expires_s:
                    return token
                raise ClusterError(
                    "the token has expired; create a new one with `cenacle nodes --invite` on the "
                    "head"
                )
        raise ClusterError(
            "the token is wrong; create a new one with `cenacle nodes --invite` on the head"
        )


def new_token() -> str:
    """A token in groups of four letters."""
    letters = "".join(secrets.choice(TOKEN_LETTERS) for _ in range(TOKEN_LENGTH))
    return "-".join(letters[i : i + 4] for i in range(0, TOKEN_LENGTH, 4))


def read_token(text: str) -> str:
    """A token as typed by a person, in the form of `new_token`.

    Raises:
        InputError: it cannot be a token.
    """
    letters = text.upper().translate(str.maketrans("OIL", "011", "- "))
    if len(letters) != TOKEN_LENGTH or not set(letters) <= set(TOKEN_LETTERS):
        raise InputError(
            f"--token: expected {TOKEN_LENGTH} letters and digits such as 7K2M-9QXD-41TB-W3HF, as "
            f"printed by `cenacle up`, got {len(letters)}",
            "token",
        )
    return "-".join(letters[i : i + 4] for i in range(0, TOKEN_LENGTH, 4))


def channel_bound_proof(
    token: str, role: str, joiner: bytes, head: bytes, certificate: bytes, payload: bytes
) -> bytes:
    """The proof that one side knows the token, bound to this TLS connection.

    Args:
        role: "joiner" or "head".
        joiner, head: the random values of both.
        certificate: of the head in this TLS connection, DER.
        payload: sent with the proof.
    """
    # All parts have a fixed length, so they cannot run into one another.
    parts = (joiner, head, hashlib.sha256(certificate).digest(), hashlib.sha256(payload).digest())
    return hmac.digest(token.encode(), role.encode() + b"\0" + b"".join(parts), "sha256")


def unverified_tls_context() -> ssl.SSLContext:
    """For a node that is about to pair and cannot verify the head's certificate yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def encode(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode()


def decode(text: object) -> bytes:
    """The bytes of base64; empty if it is malformed."""
    with contextlib.suppress(ValueError):
        return base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    return b""
