import datetime
import socket
import ssl
import stat
import threading

import pytest
from cryptography import x509

from cenacle.errors import InputError
from cenacle.server import tls


def names_of(cert) -> set[str]:
    read = x509.load_pem_x509_certificate(cert.read_bytes())
    found = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(n.value) for n in found}


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str:
    """The TLS version of a handshake."""
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    theirs.settimeout(60)

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as agreed:
            return agreed.version() or ""
    finally:
        ours.close()
        thread.join(120)


def test_a_client_that_trusts_the_certificate_is_served(tmp_path):
    cert, key = tls.self_signed(tmp_path, "127.0.0.1")
    assert {stat.S_IMODE(p.stat().st_mode) for p in (cert, key)} == {0o600}
    assert names_of(cert) >= {"127.0.0.1", "::1", "localhost", socket.gethostname().lower()}
    server = tls.server_context(cert, key)
    client = ssl.create_default_context(cafile=str(cert))
    for name in ("localhost", "127.0.0.1"):
        assert shake_hands(server, client, name) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client, "elsewhere.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, ssl.create_default_context(), "localhost")


def test_old_versions_of_tls_are_refused_and_1_2_has_modern_ciphers(tmp_path):
    server = tls.server_context(*tls.self_signed(tmp_path, "localhost"))
    client = ssl.create_default_context(cafile=str(tmp_path / "tls-cert.pem"))
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert shake_hands(server, client, "localhost") == "TLSv1.2"
    assert any("GCM" in c["name"] for c in server.get_ciphers())
    assert server.minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_certificate_is_kept_while_it_is_usable(tmp_path, monkeypatch):
    cert, key = tls.self_signed(tmp_path, "127.0.0.1")
    first = tls.fingerprint(cert)
    assert len(first.split(":")) == 32
    tls.self_signed(tmp_path, "0.0.0.0")
    assert tls.fingerprint(cert) == first
    tls.self_signed(tmp_path, "cenacle.example")
    second = tls.fingerprint(cert)
    assert second != first
    assert "cenacle.example" in names_of(cert)
    monkeypatch.setattr(tls, "RENEW_BEFORE", tls.VALIDITY + datetime.timedelta(days=1))
    tls.self_signed(tmp_path, "cenacle.example")
    assert tls.fingerprint(cert) != second
    monkeypatch.undo()
    key.write_text("damaged")
    tls.self_signed(tmp_path, "localhost")
    tls.server_context(cert, key)


def test_unusable_files_are_named(tmp_path):
    cert, key = tls.self_signed(tmp_path, "localhost")
    (tmp_path / "other").mkdir()
    _, other = tls.self_signed(tmp_path / "other", "localhost")
    text = tmp_path / "text"
    text.write_text("hello")
    for wrong in ((cert, other), (text, key), (cert, tmp_path / "absent")):
        with pytest.raises(InputError, match="belong together"):
            tls.server_context(*wrong)
    with pytest.raises(InputError, match="text is not a certificate"):
        tls.fingerprint(text)
