"""Sockets: listening, addresses, free ports, and messages framed by their length.

Owns: the frame that every connection between Cenacle processes uses (a 4-byte big-endian length,
then a JSON object in UTF-8), reading exactly as many bytes as were announced, and addresses.
Does not know: what messages mean, TLS, asyncio.
Invariant: nothing here waits without the caller's deadline or the socket's own timeout.
Next: `ranks/channel.py` for threads, `cluster/framing.py` for asyncio.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import struct
import time
from typing import Any

import psutil

from .errors import InputError

FRAME_HEADER = struct.Struct(">I")
READ_BYTES = 1 << 20  # most that one system call is asked for


def encode_frame(message: dict[str, Any]) -> bytes:
    """A message with its length in front."""
    data = json.dumps(message, separators=(",", ":")).encode()
    return FRAME_HEADER.pack(len(data)) + data


def receive_exactly(
    sock: socket.socket, count: int, ends_s: float | None = None, *, shared: bool = False
) -> bytes:
    """Read `count` bytes from a blocking socket.

    Args:
        ends_s: deadline on `time.monotonic`; None: the socket's timeout limits each read.
        shared: other threads send on this socket, so its timeout must stay; the deadline is then
            checked between reads.

    Raises:
        TimeoutError: the bytes did not arrive in time.
        ConnectionError: the other side closed the connection.
        OSError: the connection failed.
    """
    data = bytearray()
    while len(data) < count:
        if ends_s is not None and (data or not shared):
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("timed out")
            if not shared:
                sock.settimeout(left_s)
        piece = sock.recv(min(READ_BYTES, count - len(data)))
        if not piece:
            raise ConnectionError("closed the connection")
        data += piece
    return bytes(data)


def describe_loss(error: OSError) -> str:
    """How a connection ended, to follow the name of the other side."""
    if isinstance(error, ConnectionError) and error.errno is None:
        return str(error)
    return f"lost its connection ({error})"


def parse_address(text: str, default_port: int | None = None) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[IPv6]:PORT"; of "HOST" alone with a default port.

    Raises:
        ValueError: not an address, or a port outside 1 to 65535.
    """
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(default_port or "")
    host = host.removeprefix("[").removesuffix("]")
    is_port = port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536
    if not is_port or not is_host(host):
        raise ValueError(f"expected HOST:PORT, got {text!r}")
    return host, int(port)


def is_host(text: str) -> bool:
    """Whether a text can be an address or a name: for others sockets raise what is no OSError."""
    try:
        return len(text) < 256 and text.isprintable() and bool(text.encode("idna"))
    except UnicodeError:
        return False


def format_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_family(host: str) -> socket.AddressFamily:
    """IPv6 for an IPv6 address, else IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listen(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """A listening TCP socket; port 0 takes any free port.

    Raises:
        OSError: the address cannot be bound.
    """
    return socket.create_server((host, port), family=address_family(host), backlog=backlog)


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports of an address that are free now; another process may still take them first."""
    sockets = [socket.socket(address_family(host)) for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind((host, 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def address_towards(host: str, port: int) -> str:
    """This machine's own address on the route to a host; empty if there is no route."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(target)  # sends nothing
            return str(sock.getsockname()[0])
    except OSError:
        return ""


def local_addresses() -> list[str]:
    """This machine's addresses that others may reach; the one of the default route first."""
    addresses = []
    interfaces = psutil.net_if_stats()
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6) or not interfaces[name].isup:
                continue
            address = ipaddress.ip_address(entry.address.partition("%")[0])
            if not (address.is_loopback or address.is_link_local):
                addresses.append(str(address))
    default = address_towards("192.0.2.1", 9)  # any address beyond the router (RFC 5737)
    return sorted(addresses, key=lambda a: (a != default, ":" in a))


def bind(host: str = "127.0.0.1", port: int = 8080) -> socket.socket:
    """A listening socket, to be taken before anything expensive starts; port 0: any free port.

    Clients that connect before `serve` runs wait.

    Raises:
        InputError: the port is in use or not allowed, or the host is not an address of this
            machine.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port: expected 0 to 65535, got {port}", "port")
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = info[0]
        # It listens at once: otherwise another process could still take the port.
        return socket.create_server(
            address, family=family, backlog=1024, dualstack_ipv6=family == socket.AF_INET6
        )
    except (OSError, ValueError) as error:
        raise _bind_error(host, port, error) from error


def _bind_error(host: str, port: int, error: Exception) -> InputError:
    match error:
        case OSError(errno=errno.EADDRINUSE):
            message = f"port {port} of {host} is in use; choose another with --port"
            return InputError(message, "port")
        case PermissionError():
            message = f"port {port} of {host} needs privileges; choose one from 1024 with --port"
            return InputError(message, "port")
    return InputError(f"{host} is not an address of this machine ({error}); see --host", "host")
