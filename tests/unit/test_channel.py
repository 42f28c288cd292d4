"""Messages come whole, in order, or as an error within the deadline."""

import json
import socket
import struct
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.errors import ClusterError
from cenacle.message import MessageError
from cenacle.ranks.channel import MAX_MESSAGE_BYTES, Channel, ChannelClosed, ChannelTimeout


@pytest.fixture
def raw():
    """A channel and the bare socket at its other end."""
    near, far = socket.socketpair()
    channel = Channel(near, deadline_s=0.2)
    yield channel, far
    channel.close()
    far.close()


@pytest.fixture
def pair():
    near, far = socket.socketpair()
    ends = Channel(near, 2), Channel(far, 2)
    yield ends
    for end in ends:
        end.close()


def frame(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(max_size=4), values, max_size=3), max_size=5))
def test_messages_come_as_they_were_sent(messages):
    near, far = socket.socketpair()
    with near, far:
        a, b = Channel(near, 2), Channel(far, 2)
        for message in messages:
            a.send(message)
        assert [b.receive() for _ in messages] == messages


def test_framing(raw):
    channel, far = raw
    channel.send({"a": [1, "é"]})
    data = json.dumps({"a": [1, "é"]}, separators=(",", ":")).encode()
    assert far.recv(100) == frame(data)


def test_pieces_are_put_together(raw):
    channel, far = raw
    data = frame(b'{"type":"alive"}') + frame(b"{}")

    def trickle():
        for i in range(0, len(data), 3):
            far.sendall(data[i : i + 3])
            time.sleep(0.002)

    thread = threading.Thread(target=trickle)
    thread.start()
    assert [channel.receive(), channel.receive()] == [{"type": "alive"}, {}]
    thread.join()


def test_large_messages_and_many_senders(pair):
    a, b = pair
    threads = [
        threading.Thread(
            target=lambda i=i: [a.send({"from": i, "x": [i] * 300_000}) for _ in range(3)]
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for _ in range(12):
        message = b.receive()
        assert message["x"] == [message["from"]] * 300_000
    for thread in threads:
        thread.join()


def test_silence_is_an_error_within_the_deadline(raw):
    channel, _ = raw
    began = time.monotonic()
    with pytest.raises(ChannelTimeout, match=r"sent nothing for 0\.2 s"):
        channel.receive()
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("part", [b"\0\0", struct.pack(">I", 10), frame(b"{}")[:-1]])
def test_message_that_stops_in_the_middle(raw, part):
    channel, far = raw
    far.sendall(part)
    with pytest.raises(ChannelTimeout):
        channel.receive()


@pytest.mark.parametrize("part", [b"", b"\0", struct.pack(">I", 10) + b"abc"])
def test_closed(raw, part):
    channel, far = raw
    far.sendall(part)
    far.close()
    with pytest.raises(ChannelClosed, match="closed the connection"):
        channel.receive()


def test_send_to_nobody(raw):
    channel, far = raw
    far.close()
    with pytest.raises(ChannelClosed, match="lost its connection"):
        channel.send({})


def test_send_that_is_not_taken_closes_the_channel(raw):
    """A message of which a part has been sent cannot be followed by another."""
    channel, far = raw
    began = time.monotonic()
    with pytest.raises(ChannelTimeout, match=r"took no message for 0\.2 s"):
        channel.send({"x": "y" * 10_000_000})
    assert time.monotonic() - began < 60
    with pytest.raises(ChannelClosed):
        channel.send({})
    while far.recv(1 << 20):
        pass  # ends: the connection was closed, after the part


@pytest.mark.parametrize("length", [MAX_MESSAGE_BYTES + 1, 2**32 - 1])
def test_oversized(raw, length):
    channel, far = raw
    far.sendall(struct.pack(">I", length))
    with pytest.raises(MessageError, match=f"{length} bytes, expected at most {MAX_MESSAGE_BYTES}"):
        channel.receive()


@pytest.mark.parametrize("data", [b"", b"{", b"nonsense", b"\xff\xfe\xfd", b'{"a":', b"[1]", b"3"])
def test_garbage(raw, data):
    channel, far = raw
    far.sendall(frame(data))
    with pytest.raises(MessageError, match="not a message"):
        channel.receive()


def test_close_ends_a_receive_in_another_thread():
    near, far = socket.socketpair()
    channel, got = Channel(near, 30), []

    def receive():
        try:
            channel.receive()
        except ClusterError as error:
            got.append(error)

    with far:
        thread = threading.Thread(target=receive)
        thread.start()
        time.sleep(0.05)
        channel.close()
        channel.close()
        thread.join(120)
    assert [type(e) for e in got] == [ChannelClosed]


def test_a_message_that_trickles_ends_at_the_deadline():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours, deadline_s=0.3)
        done = threading.Event()

        def trickle():
            theirs.sendall(struct.pack(">I", 1000))
            while not done.wait(0.05):
                with suppress(OSError):
                    theirs.sendall(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            with pytest.raises(ChannelTimeout):
                channel.receive()
        finally:
            done.set()
            thread.join()
