"""Sockets that are to forgive a cable that was out for a moment."""

import socket
import sys

import pytest

from cenacle.collective import socket_options


@pytest.fixture
def pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname(), timeout=5)
        theirs, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


def test_messages_leave_at_once(pair):
    for sock in pair:
        socket_options.configure_socket(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such option")
def test_linux_asks_again_at_least_once_a_second(pair):
    ours, theirs = pair
    socket_options.configure_socket(ours)
    option = socket.IPPROTO_TCP, socket_options.THIN_LINEAR_TIMEOUTS
    assert (ours.getsockopt(*option), theirs.getsockopt(*option)) == (1, 0)
    try:
        longest = theirs.getsockopt(socket.IPPROTO_TCP, socket_options.RTO_MAX_MS)
    except OSError:
        return  # a kernel before 6.15
    assert longest > socket_options.LONGEST_MS
    assert (
        ours.getsockopt(socket.IPPROTO_TCP, socket_options.RTO_MAX_MS) == socket_options.LONGEST_MS
    )


def test_what_is_not_tcp_is_left_alone():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket_options.configure_socket(ours)  # raises nothing
