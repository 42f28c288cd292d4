"""Who belongs to a cluster: its certificate authority, join tokens, and mutual TLS.

Owns: keys and certificates in this user's folder, the proof by which a token admits a machine, and
the TLS contexts of both sides.
Does not know: what is said over a connection once both sides are known.
Invariant: private keys are readable by their owner only and never leave their machine; a node
proves itself by a certificate of this cluster's authority, the head by one that only a head has; a
token admits while it is young, and is worth nothing to whoever stands between the two.
Next: `control.py`, the head's side; `agent.py`, the other.

Pairing. The joining machine cannot know the head's certificate yet, so TLS alone proves nothing.
Both sides know the token (80 random bits, which no one can try out, so that plain HMAC will do):

    joiner -> head     "pair", 16 random bytes
    head   -> joiner   16 random bytes
    joiner -> head     request for a certificate, name, proof
    head   -> joiner   certificate, the authority's certificate, proof

A proof is HMAC-SHA256 with the token over the sender's role, both random strings, the digest of the
certificate that the head shows in this very TLS connection, and the digest of what is sent with it.
Someone between the two has to show a certificate of his own, and neither proof fits it.
"""

from __future__ import annotations

import json
import secrets
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ...errors import ClusterError, InputError
from ...paths import read_private, write_private

HEAD = "head"  # the head's identity; nodes have random ones
SERVER_NAME = "head.cenacle.invalid"  # in the head's certificate: its address may change
SKEW = timedelta(days=30)  # a clock may be wrong by that much
LIFE = timedelta(days=3650)


@dataclass(frozen=True)
class Identity:
    """One side's key and certificate, and the authority's certificate, as files.

    Args:
        folder: where they are.
        kind: "head" or "node": how the files begin.
    """

    folder: Path
    kind: str

    @property
    def key(self) -> Path:
        """The private key's file."""
        return self.folder / f"{self.kind}.key"

    @property
    def certificate(self) -> Path:
        """The certificate's file, the authority's behind its own."""
        return self.folder / f"{self.kind}.crt"

    @property
    def facts(self) -> Path:
        """What is remembered beside them: where the head is, names."""
        return self.folder / f"{self.kind}.json"

    @property
    def exists(self) -> bool:
        """Whether this machine has such an identity."""
        return all(p.exists() for p in (self.key, self.certificate, self.facts))

    def remembered(self) -> dict[str, Any]:
        """The contents of `facts`.

        Raises:
            InputError: they cannot be read.
        """
        try:
            found = json.loads(read_private(self.facts))
        except ValueError as error:
            raise InputError(f"{self.facts} is damaged ({error}); join again") from error
        if not isinstance(found, dict):
            raise InputError(f"{self.facts} is damaged; join again")
        return found

    def remember(self, **facts: Any) -> None:
        """Replace some of `facts`."""
        before = self.remembered() if self.facts.exists() else {}
        write_private(self.facts, json.dumps({**before, **facts}, indent=1).encode())

    def client(self) -> ssl.SSLContext:
        """For calling the head: only a head of this authority will do.

        Raises:
            InputError: the files are damaged or readable by others.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return self._load(context)

    def server(self) -> ssl.SSLContext:
        """For the head's listening socket: those who show a certificate must have one of this
        authority's; those without get as far as pairing.

        Raises:
            InputError: the files are damaged or readable by others.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_OPTIONAL
        return self._load(context)

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        read_private(self.key)
        try:
            context.load_cert_chain(self.certificate, self.key)
            # The last of the chain is the authority's.
            _, *rest = x509.load_pem_x509_certificates(self.certificate.read_bytes())
            context.load_verify_locations(cadata=_pem(rest[-1]).decode())
        except (OSError, ValueError, IndexError) as error:
            raise InputError(
                f"{self.certificate}: this machine's certificate is damaged ({error}); join again"
            ) from error
        return context

    def is_of(self, certificate: bytes) -> bool:
        """Whether a certificate (DER) is of this identity's authority: of the same cluster.

        An identity that is damaged is of none, and has to be replaced: True.
        """
        try:
            *_, authority = x509.load_pem_x509_certificates(self.certificate.read_bytes())
        except (OSError, ValueError):
            return True
        try:
            x509.load_der_x509_certificate(certificate).verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def forget(self) -> None:
        """Remove the files."""
        for path in (self.key, self.certificate, self.facts):
            path.unlink(missing_ok=True)


class Authority:
    """A cluster's certificate authority, and its head's own identity; made when first opened.

    Args:
        folder: the head's, where `ca.key` and `ca.crt` are.

    Raises:
        InputError: the folder cannot be written or read, or what is there is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._key_file, self._file = folder / "ca.key", folder / "ca.crt"
        self.identity = Identity(folder, HEAD)
        if not self._key_file.exists():
            self._make()
        try:
            self._key = serialization.load_pem_private_key(read_private(self._key_file), None)
            self._certificate = x509.load_pem_x509_certificate(self._file.read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{folder}: the cluster's authority is damaged ({error}); remove the folder to "
                f"begin a new cluster, which every machine has to join"
            ) from error
        if not self.identity.exists:
            key = new_key()
            write_private(self.identity.key, _key_pem(key))
            write_private(self.identity.certificate, self.sign(request_for(key), HEAD))
            self.identity.remember(name="")

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return _pem(self._certificate)

    def sign(self, request: bytes, who: str) -> bytes:
        """A certificate for the key of a request, with the authority's behind it.

        Args:
            request: a certificate signing request, PEM. Only its key is taken.
            who: the identity that it will prove; `HEAD` may be a server.

        Raises:
            ClusterError: the request is not one, or not signed with its own key.
        """
        try:
            asked = x509.load_pem_x509_csr(request)
            good = asked.is_signature_valid
            key = asked.public_key()
        except Exception as error:  # whatever a stranger sends
            raise ClusterError(
                f"not a request for a certificate ({type(error).__name__})"
            ) from None
        if not good or not isinstance(key, ec.EllipticCurvePublicKey):
            raise ClusterError("a request for a certificate that its own key did not sign")
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if who == HEAD:
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = (
            _builder(who, self._certificate.subject, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(_authority_id(self._key), critical=False)
        )
        if who == HEAD:
            names = x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)])
            builder = builder.add_extension(names, critical=False)
        assert isinstance(self._key, ec.EllipticCurvePrivateKey)
        return _pem(builder.sign(self._key, hashes.SHA256())) + self.pem

    def _make(self) -> None:
        key = new_key()
        name = _name(f"cenacle {secrets.token_hex(4)}")
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        made = (
            _builder(None, name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        # The key last: it says that everything is there.
        write_private(self._file, _pem(made))
        write_private(self._key_file, _key_pem(key))


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key."""
    return ec.generate_private_key(ec.SECP256R1())


def request_for(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate signing request, PEM; the head gives the name."""
    asked = x509.CertificateSigningRequestBuilder().subject_name(_name("node"))
    return asked.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def keep_node(
    folder: Path, key: ec.EllipticCurvePrivateKey, certificate: bytes, **facts: Any
) -> Identity:
    """Store what pairing gave to this machine."""
    identity = Identity(folder, "node")
    identity.forget()
    write_private(identity.key, _key_pem(key))
    write_private(identity.certificate, certificate)
    identity.remember(**facts)
    return identity


def whose(certificate: bytes) -> str:
    """The identity that a certificate (DER, checked by TLS) proves."""
    name = x509.load_der_x509_certificate(certificate).subject
    return str(name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _builder(
    who: str | None, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(issuer if who is None else _name(who))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + LIFE)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _authority_id(key: Any) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
