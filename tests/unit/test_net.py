"""Addresses, free ports, and reads that end at their deadline."""

import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle import net


@pytest.mark.parametrize(
    ("text", "default_port", "expected"),
    [
        ("10.0.0.1:80", None, ("10.0.0.1", 80)),
        ("10.0.0.1", 4747, ("10.0.0.1", 4747)),
        ("[fd00::1]:99", None, ("fd00::1", 99)),
        ("[fd00::1]", 4747, ("fd00::1", 4747)),
        ("a.local:65535", None, ("a.local", 65535)),
    ],
)
def test_parse_address(text, default_port, expected):
    assert net.parse_address(text, default_port) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "x:y",
        "x:0",
        "x:65536",
        ":5",
        "x:-1",
        "x:\u0663",
        "x:9" + "9" * 5000,
        "a" * 64 + ".x:1",
        "a..x:1",
        "a\x00:1",
        "\ud800:1",
        "é" * 60 + ":1",
        "a." * 200 + "x:1",
    ],
)
def test_parse_address_refuses(text):
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        net.parse_address(text)


@given(st.sampled_from(["10.0.0.1", "fd00::1", "name"]), st.integers(1, 65535))
def test_format_address_is_the_inverse(host, port):
    assert net.parse_address(net.format_address(host, port)) == (host, port)


def test_free_ports_are_different_and_free():
    ports = net.free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        net.listen("127.0.0.1", port).close()


@pytest.mark.parametrize("shared", [True, False])
def test_receive_exactly_ends_at_the_deadline_while_bytes_trickle(shared):
    reader, writer = socket.socketpair()
    done = threading.Event()

    def trickle():
        while not done.wait(0.02):
            writer.sendall(b"x")

    thread = threading.Thread(target=trickle)
    with reader, writer:
        reader.settimeout(60)
        thread.start()
        began = time.monotonic()
        try:
            with pytest.raises(TimeoutError):
                net.receive_exactly(reader, 1_000_000, began + 0.3, shared=shared)
        finally:
            done.set()
            thread.join()
        assert 0.3 <= time.monotonic() - began < 60
        assert (reader.gettimeout() == 60) == shared


def test_receive_exactly_reads_no_more_than_asked_and_notices_the_end():
    reader, writer = socket.socketpair()
    with reader:
        writer.sendall(b"abcdef")
        writer.close()
        assert net.receive_exactly(reader, 4) == b"abcd"
        with pytest.raises(ConnectionError, match="closed the connection"):
            net.receive_exactly(reader, 3)
