"""Messages with one to three faults at every border of a cluster: whoever sends one loses its own
connection, and nobody else anything.

The short form runs with all tests. `make fuzz-cluster` sends 10,000 at each border.
"""

import copy
import gc
import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from cenacle import net
from cenacle.cluster import messages, node_info
from cenacle.cluster.client import pair_with_head, query_head
from cenacle.cluster.head import Head
from cenacle.cluster.security import identity as identities
from cenacle.cluster.security import pairing
from cenacle.message import Message, MessageError, parse
from cenacle.ranks import messages as rank_messages
from cenacle.ranks.channel import Channel

FRAMES = int(os.environ.get("CENACLE_FUZZ_FRAMES", "100"))
HOST = "127.0.0.1"
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**63, 10**400, float("nan"), float("inf"), "", "x", "\x1b[2Jx",
    "\ud800", "a" * 5000, [], [[]], [None], {}, {"type": "agent"}, [[[[]]]] * 3, "../../x",
)  # fmt: skip


def odd(dice: random.Random) -> Any:
    return copy.deepcopy(dice.choice(ODD))


def kinds_of(module: Any) -> list[type[Message]]:
    found = [value for value in vars(module).values() if isinstance(value, type)]
    mine = [k for k in found if issubclass(k, Message) and k.__module__ == module.__name__]
    return [k for k in mine if is_dataclass(k)]


def sample(annotation: Any, dice: random.Random) -> Any:
    """A JSON value of a field's type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return dice.choice(arguments)
    if hasattr(annotation, "__metadata__"):
        limits = annotation.__metadata__[0]
        if not hasattr(limits, "minimum"):
            return "word"
        return max(limits.minimum if limits.minimum > -1e9 else 0, min(limits.maximum, 3))
    if origin in (Union, type(int | None)):
        return sample(dice.choice(arguments), dice)
    if origin in (list, tuple):
        return [sample(arguments[0], dice) for _ in range(dice.randint(0, 2))]
    if origin is not None:  # Mapping
        return {str(n): sample(arguments[1], dice) for n in range(dice.randint(0, 2))}
    plain = {int: 3, float: 0.5, str: "word", bool: True, type(None): None}
    return plain.get(annotation, {})


def sample_message(kind: type[Message], dice: random.Random) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    made = {"type": kind.type} if kind.type else {}
    for field in fields(kind):
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if not (has_default and dice.random() < 0.5):
            made[field.name] = sample(hints[field.name], dice)
    return made


def damage(message: Any, dice: random.Random) -> Any:
    """One to three faults in a copy of a JSON value."""
    message = copy.deepcopy(message)
    for _ in range(dice.randint(1, 3)):
        places = []
        rest = [message]
        while rest:
            value = rest.pop()
            keys = list(value) if isinstance(value, dict) else range(len(value))
            places += [(value, key) for key in keys]
            rest += [value[key] for key in keys if isinstance(value[key], dict | list)]
        if not places:
            return odd(dice)
        parent, key = dice.choice(places)
        kind = dice.random()
        if kind < 0.2 and isinstance(parent, dict):
            del parent[key]
        elif kind < 0.3 and isinstance(parent, dict):
            parent[dice.choice(("", "more", "type", "\x00", "group_id"))] = odd(dice)
        else:
            parent[key] = odd(dice)
    return message


def frame(message: Any, dice: random.Random) -> bytes:
    """The message with its length; one in ten is damaged as bytes."""
    data = json.dumps(message).encode()
    kind = dice.randrange(20)
    if kind == 0:
        data = b"[" * 5000
    elif kind == 1:
        data = data[: dice.randrange(len(data) + 1)]
        return net.FRAME_HEADER.pack(len(data) + 1) + data  # the rest never comes
    elif kind == 2:
        return net.FRAME_HEADER.pack(2**32 - 1) + data
    return net.FRAME_HEADER.pack(len(data)) + data


@pytest.mark.parametrize("module", [messages, rank_messages])
def test_damaged_messages_are_messages_or_errors(module: Any) -> None:
    """Any border: ranks' messages to the front are decoded by the same code."""
    dice, kinds = random.Random(1), kinds_of(module)
    for _ in range(max(FRAMES, 2000)):
        kind = dice.choice(kinds)
        whole = sample_message(kind, dice)
        damaged = damage(whole, dice)
        with suppress(MessageError):
            parse(damaged, kind) if kind.type else kind.from_json(damaged)


@pytest.fixture
def head(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> Iterator[Head]:
    running = threading.active_count()
    with caplog.at_level(logging.ERROR, "asyncio"):
        head = Head(tmp_path / "head", HOST, 0, "one")
        honest = pair_with_head(tmp_path / "first", HOST, head.port, head.invite(), "first")
        yield head
        # Whatever came, members are answered and machines can join.
        assert query_head(honest, HOST, head.port, messages.Query("status", ""), 60)["phase"]
        pair_with_head(tmp_path / "last", HOST, head.port, head.invite(), "last")
        gc.collect()  # tasks whose exceptions nobody saw are reported now
        head.close()
    assert [r.getMessage() for r in caplog.records if r.name == "asyncio"] == []
    ends = time.monotonic() + 60
    while threading.active_count() > running and time.monotonic() < ends:
        time.sleep(0.05)


def send(sock: socket.socket, data: bytes) -> None:
    """Send, and wait a moment for what comes of it."""
    sock.settimeout(0.05)
    with suppress(OSError):
        sock.sendall(data)
        sock.recv(65536)
    with suppress(OSError):
        sock.close()


FIRST = (
    messages.PairRequest, messages.AgentHello, messages.RelayHello, messages.FileRequest,
    messages.Query, messages.PairProof,
)  # fmt: skip


def test_strangers(head: Head) -> None:
    dice, context = random.Random(2), pairing.unverified_tls_context()
    for _ in range(FRAMES):
        sock = context.wrap_socket(socket.create_connection((HOST, head.port), timeout=30))
        message = sample_message(dice.choice(FIRST), dice)
        send(sock, frame(damage(message, dice), dice))


def test_members_first_messages(head: Head, tmp_path: Any) -> None:
    """As an agent, a relay of ranks, a reader of files, a command."""
    dice = random.Random(3)
    identity = pair_with_head(tmp_path / "odd", HOST, head.port, head.invite(), "odd")
    context = identity.client_tls_context()
    for _ in range(FRAMES):
        raw = socket.create_connection((HOST, head.port), timeout=30)
        sock = context.wrap_socket(raw, server_hostname=identities.SERVER_NAME)
        kind = dice.choice(FIRST[1:5])
        message = sample_message(kind, dice)
        if kind is messages.AgentHello:
            hello = messages.AgentHello(node_info.versions(), 0, messages.UNKNOWN_NODE.to_json())
            message = hello.to_json()
        if message.get("name") == "down":
            message["name"] = "status"  # a member may not, but let no fault make it right
        send(sock, frame(damage(message, dice), dice))


def test_members_later_messages(head: Head, tmp_path: Any) -> None:
    dice = random.Random(4)
    later = (messages.Heartbeat, messages.OrderResult, messages.RankExited, messages.Leaving)
    hello = messages.AgentHello(node_info.versions(), 0, messages.UNKNOWN_NODE.to_json())
    identities_of = [
        pair_with_head(tmp_path / str(n), HOST, head.port, head.invite(), f"node{n}")
        for n in range(4)
    ]
    for at in range(FRAMES // 2):
        context = identities_of[at % 4].client_tls_context()
        raw = socket.create_connection((HOST, head.port), timeout=30)
        sock = context.wrap_socket(raw, server_hostname=identities.SERVER_NAME)
        channel = Channel(sock, 30)
        channel.send(hello.to_json())
        channel.receive()
        for _ in range(dice.randint(1, 3)):
            message = sample_message(dice.choice(later), dice)
            if message["type"] == "leaving":
                message["more"] = 1  # a member that leaves would need a new token
            with suppress(OSError):
                sock.sendall(frame(damage(message, dice), dice))
        sock.settimeout(0.02)
        with suppress(OSError):
            sock.recv(65536)
        channel.close()
