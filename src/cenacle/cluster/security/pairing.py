"""."""

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


TOKEN_LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32: nothing looks alike


TOKEN_LENGTH = 16  # letters of five bits


NONCE = 16  # bytes


class Tokens:
    """The tokens that the head has given out; each admits machines until it is too old.

    Args:
        clock: seconds, monotonic.
        life_s: how long a token admits.
    """

    def __init__(self, clock: Callable[[], float], life_s: float = TOKEN_LIFE_S) -> None:
        self._clock, self._life_s = clock, life_s
        self._issued: dict[str, float] = {}

    def issue(self) -> str:
        """A new token, such as 7K2M-9QXD-41TB-W3HF."""
        token = new_token()
        self._issued[token] = self._clock() + self._life_s
        return token

    def find(self, proof: bytes, *transcript: bytes) -> str:
        """The token by which a joiner's proof was made.

        Raises:
            ClusterError: none, or one that is too old.
        """
        for token, ends in self._issued.items():
            if hmac.compare_digest(proof_of(token, "joiner", *transcript), proof):
                if self._clock() < ends:
                    return token
                raise ClusterError(
                    "the token is too old; `cenacle nodes --invite` on the head gives a new one"
                )
        raise ClusterError(
            "the token is wrong; `cenacle nodes --invite` on the head gives a new one"
        )


def new_token() -> str:
    """A token in groups of four letters."""
    letters = "".join(secrets.choice(TOKEN_LETTERS) for _ in range(TOKEN_LENGTH))
    return "-".join(letters[i : i + 4] for i in range(0, TOKEN_LENGTH, 4))


def read_token(text: str) -> str:
    """A token as `new_token` writes it, of what a person typed.

    Raises:
        InputError: it cannot be one.
    """
    letters = text.upper().translate(str.maketrans("OIL", "011", "- "))
    if len(letters) != TOKEN_LENGTH or not set(letters) <= set(TOKEN_LETTERS):
        raise InputError(
            f"token: expected {TOKEN_LENGTH} letters and digits such as 7K2M-9QXD-41TB-W3HF, as "
            f"`cenacle up` prints it, got {len(letters)}",
            "token",
        )
    return "-".join(letters[i : i + 4] for i in range(0, TOKEN_LENGTH, 4))


def proof_of(
    token: str, role: str, joiner: bytes, head: bytes, certificate: bytes, said: bytes
) -> bytes:
    """The proof that `role` knows the token.

    Args:
        role: "joiner" or "head".
        joiner, head: the random bytes of both.
        certificate: the head's in this TLS connection, DER.
        said: what is sent along.
    """
    parts = (joiner, head, hashlib.sha256(certificate).digest(), hashlib.sha256(said).digest())
    # The lengths are fixed, so parts cannot run into one another.
    return hmac.digest(token.encode(), role.encode() + b"\0" + b"".join(parts), "sha256")


def stranger() -> ssl.SSLContext:
    """For a machine that is about to pair: it cannot check the head's certificate yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def encode(data: bytes) -> str:
    """Bytes for JSON."""
    return base64.b64encode(data).decode()


def decode(text: object) -> bytes:
    """Bytes of JSON; empty if they are none."""
    with contextlib.suppress(ValueError):
        return base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    return b""
