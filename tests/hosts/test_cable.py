"""What TCP does when a cable was out, between two network namespaces."""

import socket
import tempfile
import time
from pathlib import Path

import pytest

from cenacle.collective import socket_options
from namespaces import Network, run_in_namespace, unavailable_reason

UNAVAILABLE = unavailable_reason()
OUT_S = 3.6  # a little after Linux would have asked again anyway


def knows_longest() -> bool:
    with socket.socket() as sock:
        try:
            sock.setsockopt(
                socket.IPPROTO_TCP, socket_options.TCP_RTO_MAX_MS, socket_options.MAX_RETRANSMIT_MS
            )
        except OSError:
            return False
    return True


@pytest.mark.skipif(UNAVAILABLE is not None, reason=f"CABLES ARE NOT TESTED: {UNAVAILABLE}")
@pytest.mark.skipif(not knows_longest(), reason="this kernel is older than 6.15")
def test_data_arrives_soon_after_a_cable_is_plugged_in_again():
    with tempfile.TemporaryDirectory(prefix="cable-") as folder:
        network = Network("ab", Path(folder))
        try:
            a, b = network.hosts
            listener = run_in_namespace(a.name, lambda: socket.create_server((a.address, 0)))
            ours = b.connect(a.address, listener.getsockname()[1])
            theirs, _ = listener.accept()
            with listener, ours, theirs:
                for sock in (ours, theirs):
                    socket_options.configure_socket(sock)
                theirs.sendall(b"before")
                assert ours.recv(6) == b"before"
                network.link(b, "down")
                theirs.sendall(b"meanwhile")  # as the head: its own link stays up
                time.sleep(OUT_S)
                network.link(b, "up")
                began = time.monotonic()
                ours.settimeout(10)
                assert ours.recv(9) == b"meanwhile"
                # Unless told otherwise Linux asks again 0.2, 0.6, 1.4, 3.0 and 6.2 s after.
                assert time.monotonic() - began < 2.4
        finally:
            network.close()
