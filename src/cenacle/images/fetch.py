"""Fetches images from addresses that the owner of the server allows.

Owns: which addresses may be asked, and one request to one of them.
Does not know: formats of images, who asks.
Invariant: a connection goes only to an address that was checked, and only to a public one; the name
is resolved once. No redirect is followed, no proxy asked, no cookie or name of a user sent. It ends
within `TIMEOUT_S`, whatever the other side does.
Next: `decode_process.py` looks at what came.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

from ..errors import InputError
from .sources import MAX_FILE_BYTES

TIMEOUT_S = 10.0
RESOLVE_TIMEOUT_S = 5.0
MAX_THREADS = 4
_PORTS = {"http": 80, "https": 443}

# Not for everybody's machines, by the registries of IANA for special purposes. Of IPv6 only what is
# given out (2000::/3) is public: that leaves out loopback, link-local and unique local addresses,
# multicast, IPv4 in IPv6 (::ffff:0:0/96, ::/96) and NAT64 (64:ff9b::/96, 64:ff9b:1::/48).
_NOT_PUBLIC_V4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24"),
            *("192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24"),
            *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        ),
    )
)
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
# Teredo and others, documentation, 6to4, documentation, SRv6.
_NOT_PUBLIC_V6 = tuple(
    map(
        ipaddress.IPv6Network,
        ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
    )
)

Resolve = Callable[[str, int], Sequence[str]]
"""Host and port to addresses."""


def is_public(address: str) -> bool:
    """Whether an address, as a resolver writes it, is of the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a scope (fe80::1%eth0), say
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _NOT_PUBLIC_V4)
    return ip in _PUBLIC_V6 and not any(ip in network for network in _NOT_PUBLIC_V6)


@dataclass(frozen=True)
class AllowedHosts:
    """Whose images may be fetched.

    Args:
        names: of hosts, lower case; "*.example.com": all below it; "*": every public one. A port
            other than the scheme's own is part of the name.
    """

    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, names: Sequence[str]) -> AllowedHosts:
        """From what an owner writes.

        Raises:
            InputError: it is no name of a host.
        """
        clean = []
        for name in names:
            low = name.strip().lower()
            host = low.removeprefix("*.")
            is_name = host and not set(host) & set("/@?#*\\ ") and not host.startswith(".")
            if low != "*" and not is_name:
                raise InputError(
                    f"image_urls: expected names of hosts such as images.example.com, "
                    f"*.example.com or *, got {name!r}",
                    "image_urls",
                )
            clean.append(low)
        return cls(tuple(clean))

    def allows(self, host: str, port: int, scheme: str) -> bool:
        """Whether a host, lower case and without a dot at its end, may be asked."""
        if "*" in self.names and port == _PORTS[scheme]:
            return True
        port_suffix = "" if port == _PORTS[scheme] else f":{port}"
        for name in self.names:
            suffix = name[1:] if name.startswith("*.") else None
            if f"{host}{port_suffix}" == name or (
                suffix and f"{host}{port_suffix}".endswith(suffix)
            ):
                return True
        return False


@dataclass(frozen=True)
class ImageFetcher:
    """Fetches images.

    Args:
        hosts: that may be asked.
        resolve: replaced in tests.
        connects_to: which addresses may be connected to; replaced in tests.
        timeout_s: of one image.
    """

    hosts: AllowedHosts
    resolve: Resolve | None = None
    connects_to: Callable[[str], bool] = is_public
    timeout_s: float = TIMEOUT_S

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        # A resolver cannot be interrupted: the thread that waits for it is left behind.
        return ThreadPoolExecutor(MAX_THREADS, "resolver")

    def fetch(self, url: str) -> bytes:
        """What is at a URL, at most `MAX_FILE_BYTES`.

        Raises:
            InputError: it may not be asked, or gave nothing; a sentence without its name.
        """
        scheme, host, port, target = self._check(url)
        addresses = self._addresses(host, port)
        # None of what is behind a name is asked if a part of it is not public.
        if not addresses or not all(map(self.connects_to, addresses)):
            raise InputError("its host has no public address; send the image itself", "images")
        ends_s = time.monotonic() + self.timeout_s
        last: Exception | None = None
        for address in addresses[:2]:
            connection = _Connection(scheme, host, port, address, ends_s - time.monotonic())
            try:
                return connection.get(target)
            except (OSError, http.client.HTTPException, ValueError) as error:
                last = error
            finally:
                connection.close()
            if time.monotonic() > ends_s:
                break
        reason = f"its host gave no answer ({type(last).__name__})"
        if time.monotonic() > ends_s or isinstance(last, TimeoutError):
            reason = f"it did not come within {self.timeout_s:g} s"
        raise InputError(f"{reason}; send the image itself", "images")

    def _check(self, url: str) -> tuple[str, str, int, str]:
        """Scheme, host, port and target of a URL that may be asked."""
        try:
            parts = urlsplit(url)
            scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
            port = parts.port or _PORTS[scheme]
            host = host if ":" in host else host.encode("idna").decode().lower()
        except (ValueError, KeyError, UnicodeError):
            raise InputError("expected an http(s) URL with a host", "images") from None
        if not host or parts.username is not None or parts.password is not None or "%" in host:
            raise InputError("expected an http(s) URL with a host and without a user", "images")
        if not self.hosts.names:
            raise InputError(
                "this server fetches no images; send it as a data: URI, or have the owner allow "
                "hosts with --image-urls",
                "images",
            )
        if not self.hosts.allows(host, port, scheme):
            raise InputError(
                "its host is not one that the owner of this server allows (--image-urls); send "
                "the image itself",
                "images",
            )
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        quoted = "".join(
            c if "!" <= c <= "~" else "".join(map("%{:02X}".format, c.encode())) for c in target
        )
        return scheme, host, port, quoted

    def _addresses(self, host: str, port: int) -> list[str]:
        try:
            work = self._threads.submit(self.resolve or _resolve, host, port)
            return list(dict.fromkeys(work.result(RESOLVE_TIMEOUT_S)))
        except TimeoutError:
            raise InputError(
                f"its host was not found within {RESOLVE_TIMEOUT_S:g} s; send the image itself",
                "images",
            ) from None
        except (OSError, UnicodeError):
            raise InputError("its host is not known; send the image itself", "images") from None


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class _Connection:
    """A connection to one address, under the name of its host, that ends in time.

    Sockets have a timeout for each piece; here all pieces together have one.
    """

    def __init__(self, scheme: str, host: str, port: int, address: str, timeout_s: float) -> None:
        self._address, self._port = address, port
        timeout_s = max(timeout_s, 0.001)
        if scheme == "https":
            context = ssl.create_default_context()
            self.http: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=timeout_s, context=context
            )
        else:
            self.http = http.client.HTTPConnection(host, port, timeout=timeout_s)
        self.http._create_connection = self._connect  # type: ignore[attr-defined]
        self._lock = threading.Lock()
        self._is_over = False
        self._second: socket.socket | None = None  # the same connection
        self._timer = threading.Timer(timeout_s, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _connect(self, _: object, timeout_s: float, __: object) -> socket.socket:
        connected = socket.create_connection((self._address, self._port), timeout_s)
        with self._lock:
            if self._is_over:
                connected.close()
                raise TimeoutError("no connection in time")
            self._second = connected.dup()  # TLS takes the first for itself
        return connected

    def _end(self) -> None:
        with self._lock:
            self._is_over = True
            if self._second is not None:
                with suppress(OSError):
                    self._second.shutdown(socket.SHUT_RDWR)

    def get(self, target: str) -> bytes:
        """See `_get`.

        Raises:
            TimeoutError: what came may be a part.
        """
        data = _get(self.http, target)
        if self._is_over:
            raise TimeoutError("not all in time")
        return data

    def close(self) -> None:
        """Close it."""
        self._timer.cancel()
        self._end()
        self.http.close()
        if self._second is not None:
            self._second.close()


def _get(connection: http.client.HTTPConnection, target: str) -> bytes:
    headers = {"User-Agent": "cenacle", "Accept": "image/*", "Accept-Encoding": "identity"}
    connection.request("GET", target, headers=headers)
    response = connection.getresponse()
    if 300 <= response.status < 400:
        raise InputError(
            f"its host redirects (status {response.status}), and redirects are not followed; give "
            f"the final URL",
            "images",
        )
    if response.status != 200:
        raise InputError(f"its host answered with status {response.status}", "images")
    if response.getheader("content-encoding", "identity").lower() != "identity":
        raise InputError("its host sends it compressed, which was not requested", "images")
    data = response.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"expected at most {MAX_FILE_BYTES:,} bytes, got more", "images")
    if not data:
        raise InputError("expected an image, got nothing", "images")
    return data
