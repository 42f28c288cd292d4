"""TCP options that let a connection survive a short outage."""

import socket
import sys

import pytest

from cenacle.collective import socket_options
from cenacle.collective.socket_options import TCP_RTO_MAX_MS, TCP_THIN_LINEAR_TIMEOUTS


@pytest.fixture
def pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=120)
        server, _ = listener.accept()
    with client, server:
        yield client, server


def tcp_option(sock: socket.socket, option: int) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, option)


def test_messages_are_sent_without_delay(pair):
    for sock in pair:
        socket_options.configure_socket(sock)
        assert tcp_option(sock, socket.TCP_NODELAY) != 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such option")
def test_linux_retransmits_at_equal_intervals(pair):
    configured, default = pair
    socket_options.configure_socket(configured)
    assert tcp_option(configured, TCP_THIN_LINEAR_TIMEOUTS) == 1
    assert tcp_option(default, TCP_THIN_LINEAR_TIMEOUTS) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such option")
def test_linux_retransmits_at_least_once_a_second(pair):
    configured, default = pair
    socket_options.configure_socket(configured)
    try:
        default_ms = tcp_option(default, TCP_RTO_MAX_MS)
    except OSError:
        pytest.skip("TCP_RTO_MAX_MS needs Linux 6.15")
    assert default_ms > socket_options.MAX_RETRANSMIT_MS
    assert tcp_option(configured, TCP_RTO_MAX_MS) == socket_options.MAX_RETRANSMIT_MS


def test_unix_sockets_are_left_alone():
    pair = socket.socketpair()
    with pair[0], pair[1]:
        socket_options.configure_socket(pair[0])
        assert pair[0].send(b"x") == 1
        assert pair[1].recv(1) == b"x"
