"""TLS for the server: an owner's certificate, or one that it makes for itself.

Owns: making, keeping and renewing the self-made certificate, and the settings of TLS.
Does not know: HTTP, keys of the API.
Invariant: a private key that is made here is readable by its owner only, from its first byte on.
Next: `app.py` gives the context to its connections.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
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

VALIDITY = timedelta(days=820)  # Apple's clients take no more than 825
RENEW_BEFORE = timedelta(days=30)


def server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """A server's context: TLS 1.2 or later with the ciphers that Python recommends.

    Raises:
        InputError: the files are missing, are not in PEM form, or do not belong together.
    """
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # A key with a password would ask for it on the terminal.
        made.load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot use the certificate {cert} with the key {key}: {error}; expected two PEM "
            f"files that belong together, the key without a password",
            "tls-cert",
        ) from error
    return made


def self_signed(folder: Path, host: str) -> tuple[Path, Path]:
    """A certificate that this server signs itself, and its key, kept in `folder`.

    The one that is there is taken while it is valid and covers `host`, so that clients which
    trust it go on doing so.

    Args:
        folder: see `paths.make_config_dir`.
        host: where the server listens.

    Raises:
        InputError: the files cannot be written.
    """
    cert, key = folder / "tls-cert.pem", folder / "tls-key.pem"
    names = _host_names(host)
    if not _is_usable(cert, key, _required_names(host)):
        try:
            _create_certificate(cert, key, names)
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error}", "tls") from error
    return cert, key


def fingerprint(cert: Path) -> str:
    """SHA-256 of the first certificate of a PEM file, as browsers and openssl show it.

    Raises:
        InputError: it is not a certificate.
    """
    try:
        first = x509.load_pem_x509_certificates(cert.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise InputError(f"{cert} is not a certificate in PEM form: {error}", "tls-cert") from error
    digest = hashlib.sha256(first.public_bytes(serialization.Encoding.DER)).digest()
    return digest.hex(":").upper()


def _is_usable(cert: Path, key: Path, wanted: set[str]) -> bool:
    """Whether the files are there, belong together, cover the names, and will for a while."""
    try:
        server_context(cert, key)
        known = x509.load_pem_x509_certificate(cert.read_bytes())
        covered = known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (InputError, OSError, ValueError, x509.ExtensionNotFound):
        return False
    names = {str(name.value).lower() for name in covered}
    return wanted <= names and known.not_valid_after_utc - datetime.now(UTC) > RENEW_BEFORE


def _required_names(host: str) -> set[str]:
    """What a certificate must cover: the address that was asked for, unless that is "all"."""
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        return {"localhost"} if address.is_unspecified else {str(address)}
    return {host.lower()}


def _host_names(host: str) -> list[str]:
    """Names and addresses by which this machine may be called, the given one first."""
    machine = socket.gethostname().lower()
    names = [*_required_names(host), machine, f"{machine}.local", "localhost", "127.0.0.1", "::1"]
    with suppress(OSError, UnicodeError):
        names.append(socket.getfqdn().lower())
        names += [str(found[4][0]) for found in socket.getaddrinfo(machine, None)]
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # The address that this machine would send from; nothing is sent.
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asked:
            asked.connect((anywhere, 9))
            names.append(str(asked.getsockname()[0]))
    return list(dict.fromkeys(n.partition("%")[0] for n in names if n))


def _create_certificate(cert: Path, key: Path, names: list[str]) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cenacle")])
    now = datetime.now(UTC)
    alternatives = x509.SubjectAlternativeName([_general_name(n) for n in names if n.isascii()])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    # Not an authority: whoever trusts it trusts this server and nothing that it might sign.
    made = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + VALIDITY)
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .sign(private, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = private.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(key, secret)
    _write(cert, made.public_bytes(pem))


def _general_name(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def _write(path: Path, data: bytes) -> None:
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    part.replace(path)
