"""Tokens, certificates and identity files of a cluster, without any connection."""

import json
import ssl
import stat

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from cenacle import paths
from cenacle.cluster.security import identity as identities
from cenacle.cluster.security import pairing
from cenacle.cluster.security.identity import Authority, Identity
from cenacle.cluster.security.pairing import Tokens, channel_bound_proof
from cenacle.errors import ClusterError, InputError

TRANSCRIPT = (b"j" * 16, b"h" * 16, b"certificate", b"what is sent")


def modes(folder):
    return {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}


def test_tokens_are_long_enough_and_read_as_people_type_them():
    token = pairing.new_token()
    assert len(token.replace("-", "")) * 5 == 80, "bits"
    assert pairing.read_token(token.lower().replace("-", " ").replace("0", "o")) == token
    for wrong in ("", "ABCD", token + "A", token[:-1] + "U", token[:-1] + "!"):
        with pytest.raises(InputError, match="printed by `cenacle up`"):
            pairing.read_token(wrong)


def test_a_token_is_valid_until_it_expires():
    now = [100.0]
    tokens = Tokens(lambda: now[0], life_s=60)
    token, other = tokens.issue(), tokens.issue()
    proof = channel_bound_proof(token, "joiner", *TRANSCRIPT)
    assert tokens.find(proof, *TRANSCRIPT) == token != other
    now[0] += 59
    assert tokens.find(proof, *TRANSCRIPT) == token, "several machines may use one"
    now[0] += 2
    with pytest.raises(ClusterError, match="has expired"):
        tokens.find(proof, *TRANSCRIPT)


@pytest.mark.parametrize("changed", range(4))
def test_a_proof_is_bound_to_its_connection(changed):
    tokens = Tokens(lambda: 0.0)
    proof = channel_bound_proof(tokens.issue(), "joiner", *TRANSCRIPT)
    other = [*TRANSCRIPT]
    other[changed] = other[changed][:-1] + b"x"
    with pytest.raises(ClusterError, match="wrong"):
        tokens.find(proof, *other)


def test_a_proof_is_bound_to_one_side():
    tokens = Tokens(lambda: 0.0)
    with pytest.raises(ClusterError, match="wrong"):
        tokens.find(channel_bound_proof(tokens.issue(), "head", *TRANSCRIPT), *TRANSCRIPT)


def test_only_the_owner_can_read_the_files(tmp_path):
    folder = tmp_path / "home" / "cluster"
    authority = Authority(folder)
    key = identities.new_key()
    identities.store_node_identity(
        folder, key, authority.sign(identities.certificate_request(key), "ab"), host="x"
    )
    found = modes(folder)
    assert set(found) == {
        *("ca.key", "ca.crt", "head.key", "head.crt", "head.json"),
        *("node.key", "node.crt", "node.json"),
    }
    assert set(found.values()) == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "head.key").chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        authority.identity.server_tls_context()


def test_an_authority_is_created_once(tmp_path):
    assert Authority(tmp_path).pem == Authority(tmp_path).pem
    (tmp_path / "ca.crt").write_text("nonsense")
    with pytest.raises(InputError, match="damaged"):
        Authority(tmp_path)


def test_malformed_requests_are_not_signed(tmp_path):
    authority = Authority(tmp_path)
    request = identities.certificate_request(identities.new_key())
    torn = bytearray(request)
    torn[70] ^= 1
    for wrong in (b"", b"nonsense", bytes(torn), authority.pem):
        with pytest.raises(ClusterError, match="request"):
            authority.sign(wrong, "x")


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str | None) -> str | None:
    """TLS between two memory buffers; whom the server then knows."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    a = client.wrap_bio(down, up, server_hostname=name)
    b = server.wrap_bio(up, down, server_side=True)
    done = set()
    for _ in range(10):
        for side in (a, b):
            if side not in done:
                try:
                    side.do_handshake()
                    done.add(side)
                except ssl.SSLWantReadError:
                    pass
    assert len(done) == 2
    der = b.getpeercert(binary_form=True)
    return None if der is None else identities.node_id_of_certificate(der)


def node(folder, authority, node_id="ab12"):
    key = identities.new_key()
    return identities.store_node_identity(
        folder, key, authority.sign(identities.certificate_request(key), node_id)
    )


def test_both_sides_are_known_by_their_certificates(tmp_path):
    authority, other = Authority(tmp_path / "a"), Authority(tmp_path / "b")
    ours, theirs = node(tmp_path / "n", authority), node(tmp_path / "m", other)
    server = authority.identity.server_tls_context()
    assert handshake(ours.client_tls_context(), server, identities.SERVER_NAME) == "ab12"
    assert (
        handshake(authority.identity.client_tls_context(), server, identities.SERVER_NAME)
        == identities.HEAD
    )
    assert handshake(pairing.unverified_tls_context(), server, None) is None, (
        "it may only ask to pair"
    )
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(
            theirs.client_tls_context(), server, identities.SERVER_NAME
        )  # another cluster's node
    foreign = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    foreign.check_hostname, foreign.verify_mode = False, ssl.CERT_NONE
    foreign.load_cert_chain(theirs.certificate, theirs.key)
    with pytest.raises(ssl.SSLError):
        handshake(foreign, server, None)  # who does not check whom he calls


def test_a_node_cannot_pass_for_the_head(tmp_path):
    authority = Authority(tmp_path / "a")
    ours, bad = node(tmp_path / "n", authority), node(tmp_path / "m", authority, "bad")
    (own, _) = x509.load_pem_x509_certificates(bad.certificate.read_bytes())
    uses = own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(
            ours.client_tls_context(),
            Identity(bad.folder, "node").server_tls_context(),
            identities.SERVER_NAME,
        )


def test_settings_are_saved_and_loaded(tmp_path):
    identity = Identity(tmp_path, "node")
    identity.save_settings(host="a", port=1)
    identity.save_settings(port=2)
    assert identity.load_settings() == {"host": "a", "port": 2}
    paths.write_private(identity.settings, json.dumps([]).encode())
    with pytest.raises(InputError, match="damaged"):
        identity.load_settings()
