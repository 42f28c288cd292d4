"""TLS for the server: the owner's certificate, or a self-signed one.

Owns: creating, keeping and renewing the self-signed certificate, and the TLS settings.
Does not know: HTTP, API keys.
Invariant: only the owner can read a private key that is created here, from its first byte on.
Next: `http_server.py` uses the context for its connections.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..errors import InputError
from ..net import local_addresses
from ..paths import write_private

VALIDITY = timedelta(days=820)  # Apple's clients accept at most 825
RENEW_BEFORE = timedelta(days=30)


def server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """A server's context: TLS 1.2 or later with the ciphers that Python recommends.

    Raises:
        InputError: the files are missing, are not PEM, or do not belong together.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without this, OpenSSL would ask for a key's password on the terminal.
        context.load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{cert} and {key} cannot be used for TLS ({error}); expected a certificate and its "
            f"private key that belong together, as PEM files without a password",
            "tls-cert",
        ) from error
    return context


def self_signed(folder: Path, host: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key, kept in `folder`.

    An existing one is used while it is valid and covers `host`, so that clients which trust it
    continue to do so.

    Args:
        folder: the user's configuration folder.
        host: address on which the server listens.

    Raises:
        InputError: the files cannot be written.
    """
    cert, key = folder / "tls-cert.pem", folder / "tls-key.pem"
    if not _is_usable(cert, key, _required_names(host)):
        _create_certificate(cert, key, _host_names(host))
    return cert, key


def fingerprint(cert: Path) -> str:
    """SHA-256 of the first certificate of a PEM file, as browsers and openssl show it.

    Raises:
        InputError: it is not a certificate.
    """
    try:
        certificate = x509.load_pem_x509_certificates(cert.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise InputError(f"{cert} is not a certificate in PEM form: {error}", "tls-cert") from error
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def _is_usable(cert: Path, key: Path, required: set[str]) -> bool:
    """Whether the files belong together, cover the names, and stay valid for a while."""
    try:
        server_context(cert, key)
        certificate = x509.load_pem_x509_certificate(cert.read_bytes())
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (InputError, OSError, ValueError, x509.ExtensionNotFound):
        return False
    names = {str(name.value).lower() for name in extension.value}
    return required <= names and certificate.not_valid_after_utc - datetime.now(UTC) > RENEW_BEFORE


def _required_names(host: str) -> set[str]:
    """The names that a certificate must cover: the host, unless it means every address."""
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        return {"localhost"} if address.is_unspecified else {str(address)}
    return {host.lower()}


def _host_names(host: str) -> list[str]:
    """Names and addresses of this machine, those of `host` first."""
    machine = socket.gethostname().lower()
    names = [*_required_names(host), machine, f"{machine}.local", "localhost", "127.0.0.1", "::1"]
    with suppress(OSError, UnicodeError):
        names.append(socket.getfqdn().lower())
    return list(dict.fromkeys([*filter(None, names), *local_addresses()]))


def _create_certificate(cert: Path, key: Path, names: list[str]) -> None:
    private_key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cenacle")])
    now = datetime.now(UTC)
    alternatives = x509.SubjectAlternativeName([_general_name(n) for n in names if n.isascii()])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    # Not an authority: a client that trusts it trusts this server and nothing that it could sign.
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + VALIDITY)
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .sign(private_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = private_key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_private(key, secret)
    write_private(cert, certificate.public_bytes(pem))


def _general_name(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)
