"""Identities in a cluster: its certificate authority, and keys and certificates of its nodes.

Owns: keys and certificates in this user's folder, and the TLS contexts of both sides.
Does not know: how a node gets its certificate (`pairing.py`), or what is sent over a connection.
Invariant: private keys can be read by their owner only, and never leave their machine. A node
proves itself by a certificate of its cluster's authority, the head by one that only a head gets.
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

HEAD = "head"  # id of the head's own node; others have random ids
SERVER_NAME = "head.cenacle.invalid"  # in the head's certificate, because its address may change
CLOCK_TOLERANCE = timedelta(days=30)
VALIDITY = timedelta(days=3650)


@dataclass(frozen=True)
class Identity:
    """Key, certificate and settings of a node or head, as files.

    Args:
        folder: with the files.
        kind: "head" or "node", the stem of the file names.
    """

    folder: Path
    kind: str

    @property
    def key(self) -> Path:
        """File of the private key."""
        return self.folder / f"{self.kind}.key"

    @property
    def certificate(self) -> Path:
        """File of the certificate, followed by that of the authority."""
        return self.folder / f"{self.kind}.crt"

    @property
    def settings(self) -> Path:
        """File of the settings: address of the head, names, folder of models."""
        return self.folder / f"{self.kind}.json"

    @property
    def exists(self) -> bool:
        """Whether all files are there."""
        return all(p.exists() for p in (self.key, self.certificate, self.settings))

    def load_settings(self) -> dict[str, Any]:
        """The settings.

        Raises:
            InputError: they cannot be read.
        """
        try:
            settings = json.loads(read_private(self.settings))
        except ValueError as error:
            raise InputError(f"{self.settings} is damaged ({error}); join again") from error
        if not isinstance(settings, dict):
            raise InputError(f"{self.settings} is damaged; join again")
        return settings

    def save_settings(self, **changes: Any) -> None:
        """Replace some of the settings."""
        settings = self.load_settings() if self.settings.exists() else {}
        write_private(self.settings, json.dumps({**settings, **changes}, indent=1).encode())

    def client_tls_context(self) -> ssl.SSLContext:
        """For connections to the head, which must be a head of this authority.

        Raises:
            InputError: the files are damaged or readable by others.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return self._load(context)

    def server_tls_context(self) -> ssl.SSLContext:
        """For the head's port. A certificate is optional, because new nodes have none, but if one
        is shown it must be of this authority.

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

    def has_issuer_of(self, certificate: bytes) -> bool:
        """Whether a certificate (DER) is of the same authority, that is, of the same cluster.

        True if this identity is damaged, so that it can be replaced.
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

    def delete(self) -> None:
        """Delete the files."""
        for path in (self.key, self.certificate, self.settings):
            path.unlink(missing_ok=True)


class Authority:
    """A cluster's certificate authority and the identity of its head, created on first use.

    Args:
        folder: of the head, for `ca.key` and `ca.crt`.

    Raises:
        InputError: the folder cannot be written or read, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._key_file, self._file = folder / "ca.key", folder / "ca.crt"
        self.identity = Identity(folder, HEAD)
        if not self._key_file.exists():
            self._create()
        try:
            self._key = serialization.load_pem_private_key(read_private(self._key_file), None)
            self._certificate = x509.load_pem_x509_certificate(self._file.read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{folder}: the cluster's authority is damaged ({error}); remove the folder to "
                f"start a new cluster, which every node has to join"
            ) from error
        if not self.identity.exists:
            key = new_key()
            write_private(self.identity.key, _key_pem(key))
            write_private(self.identity.certificate, self.sign(certificate_request(key), HEAD))
            self.identity.save_settings(name="")

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return _pem(self._certificate)

    def sign(self, request: bytes, node_id: str) -> bytes:
        """A certificate for the key of a request, followed by that of the authority; PEM.

        Args:
            request: a certificate signing request, PEM. Only its key is used.
            node_id: that the certificate proves; `HEAD` may be a server.

        Raises:
            ClusterError: the request is malformed, or not signed with its own key.
        """
        try:
            parsed = x509.load_pem_x509_csr(request)
            valid = parsed.is_signature_valid
            key = parsed.public_key()
        except Exception as error:  # unknown peers may send anything
            raise ClusterError(f"certificate_request: malformed ({type(error).__name__})") from None
        if not valid or not isinstance(key, ec.EllipticCurvePublicKey):
            raise ClusterError("certificate_request: not signed with its own key")
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if node_id == HEAD:
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        builder = (
            _builder(node_id, self._certificate.subject, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(_authority_id(self._key), critical=False)
        )
        if node_id == HEAD:
            names = x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)])
            builder = builder.add_extension(names, critical=False)
        assert isinstance(self._key, ec.EllipticCurvePrivateKey)
        return _pem(builder.sign(self._key, hashes.SHA256())) + self.pem

    def _create(self) -> None:
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
        certificate = (
            _builder(None, name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        # The key last, because its presence means that everything is there.
        write_private(self._file, _pem(certificate))
        write_private(self._key_file, _key_pem(key))


def new_key() -> ec.EllipticCurvePrivateKey:
    """A new private key."""
    return ec.generate_private_key(ec.SECP256R1())


def certificate_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate signing request, PEM; the head chooses the id."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name("node"))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def store_node_identity(
    folder: Path, key: ec.EllipticCurvePrivateKey, certificate: bytes, **settings: Any
) -> Identity:
    """Store the identity that this node got by pairing."""
    identity = Identity(folder, "node")
    identity.delete()
    write_private(identity.key, _key_pem(key))
    write_private(identity.certificate, certificate)
    identity.save_settings(**settings)
    return identity


def node_id_of_certificate(certificate: bytes) -> str:
    """The node that a certificate (DER, verified by TLS) proves."""
    name = x509.load_der_x509_certificate(certificate).subject
    return str(name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def leaf_certificate_der(path: Path) -> bytes:
    """The first certificate of a PEM file, as DER."""
    pem = path.read_text()
    end = "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(pem[: pem.index(end) + len(end)] + "\n")


def _builder(
    node_id: str | None, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(issuer if node_id is None else _name(node_id))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + VALIDITY)
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
