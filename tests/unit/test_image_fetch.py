"""No request leaves for an address that the owner did not allow."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cenacle.errors import InputError
from cenacle.images import fetch
from cenacle.images.fetch import AllowedHosts, ImageFetcher, is_public


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254"),
        *("169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1"),
        *("192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1"),
        *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8"),
        *("64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "fc00::1", "fd12::1"),
        *("fe80::1", "fe80::1%lo", "fec0::1", "ff02::1", "2001::1", "2001:db8::1"),
        *("2002:7f00:1::", "2002:808:808::", "3fff::1", "5f00::1", "2001:10::1"),
        *("", "localhost", "2130706433", "0177.0.0.1", "0x7f.1", "127.1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "100.63.255.255", "172.32.0.1", "2606:4700::1", "2a00:1::1"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


HOSTS = AllowedHosts.parse(["images.example.com", "*.cdn.example", "dev.example:8443"])


@pytest.mark.parametrize(
    ("host", "port", "scheme", "allowed"),
    [
        ("images.example.com", 443, "https", True),
        ("images.example.com", 80, "http", True),
        ("images.example.com", 8080, "http", False),
        ("images.example.com", 443, "http", False),
        ("example.com", 443, "https", False),
        ("evil-images.example.com", 443, "https", False),
        ("a.images.example.com", 443, "https", False),
        ("a.cdn.example", 443, "https", True),
        ("a.b.cdn.example", 443, "https", True),
        ("cdn.example", 443, "https", False),
        ("evilcdn.example", 443, "https", False),
        ("dev.example", 8443, "https", True),
        ("dev.example", 443, "https", False),
    ],
)
def test_allowed_hosts(host: str, port: int, scheme: str, allowed: bool) -> None:
    assert HOSTS.allows(host, port, scheme) is allowed
    assert not AllowedHosts().allows(host, port, scheme)
    standard = {"http": 80, "https": 443}[scheme]
    assert AllowedHosts.parse(["*"]).allows(host, port, scheme) is (port == standard)


@pytest.mark.parametrize("name", ["", "https://a.example", "a.example/b", "a@b", "*.", "a b", "**"])
def test_what_is_no_name_of_a_host(name: str) -> None:
    with pytest.raises(InputError, match="expected names of hosts"):
        AllowedHosts.parse([name])


class Handler(BaseHTTPRequestHandler):
    """Answers by the path; remembers who asked."""

    requests: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.requests.append((self.path, dict(self.headers)))
        name = self.path.strip("/").partition("?")[0]
        if name == "redirect":
            self.send_response(302)
            self.send_header("location", "/picture")
            self.end_headers()
            return
        if name == "slow":
            self.send_response(200)
            self.end_headers()
            while not self.over.wait(0.05):  # type: ignore[attr-defined]
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
            return
        self.send_response(404 if name == "missing" else 200)
        if name == "compressed":
            self.send_header("content-encoding", "gzip")
        body = {"large": b"x" * 30_000, "empty": b""}.get(name, b"picture")
        if name == "endless":
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for _ in range(40):
                try:
                    self.wfile.write(b"400\r\n" + b"x" * 0x400 + b"\r\n")
                except OSError:
                    return
            return
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[Any]]]:
    monkeypatch.setattr(fetch, "MAX_FILE_BYTES", 20_000)
    requests: list[Any] = []
    over = threading.Event()
    kind = type("Own", (Handler,), {"requests": requests, "over": over})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield listening.server_address[1], requests
        over.set()
        listening.shutdown()
        thread.join()


def fetcher(port: int, **options: Any) -> ImageFetcher:
    """Of the server on loopback, which is taken for a public one."""
    hosts = AllowedHosts.parse([f"pictures.example:{port}"])
    options = {"resolve": lambda *_: ["127.0.0.1"], "connects_to": lambda a: True, **options}
    return ImageFetcher(hosts, **options)


def test_a_picture_is_fetched(server: tuple[int, list[Any]]) -> None:
    port, requests = server
    url = f"http://Pictures.Example.:{port}/a b/ü.png?x=1#part"
    assert fetcher(port).fetch(url) == b"picture"
    ((path, headers),) = requests
    assert path == "/a%20b/%C3%BC.png?x=1"
    assert headers["Host"] == f"pictures.example:{port}"
    names = {name.lower() for name in headers}
    assert names == {"host", "user-agent", "accept", "accept-encoding"}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("redirect", "redirects are not followed"),
        ("missing", "status 404"),
        ("compressed", "compressed"),
        ("large", "at most 20,000 bytes"),
        ("endless", "at most 20,000 bytes"),
        ("empty", "got nothing"),
    ],
)
def test_what_is_no_picture(server: tuple[int, list[Any]], path: str, reason: str) -> None:
    port, requests = server
    with pytest.raises(InputError, match=reason):
        fetcher(port).fetch(f"http://pictures.example:{port}/{path}")
    assert len(requests) == 1


def test_one_that_comes_too_slowly(server: tuple[int, list[Any]]) -> None:
    port, _ = server
    began = time.monotonic()
    with pytest.raises(InputError, match=r"did not come within 0\.5 s"):
        fetcher(port, timeout_s=0.5).fetch(f"http://pictures.example:{port}/slow")
    assert time.monotonic() - began < 60


def test_the_environments_proxy_is_not_asked(
    server: tuple[int, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, requests = server
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetcher(port).fetch(f"http://pictures.example:{port}/a") == b"picture"
    assert len(requests) == 1


def test_nothing_is_asked_that_is_not_allowed(
    server: tuple[int, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, requests = server
    tried: list[Any] = []
    monkeypatch.setattr(
        socket, "create_connection", lambda *a, **k: tried.append(a) or pytest.fail("connected")
    )
    everywhere = ImageFetcher(AllowedHosts.parse(["*"]))
    for url in (
        *(f"http://{host}/" for host in ("127.0.0.1", "127.1", "2130706433", "0x7f000001")),
        *(f"http://{host}/" for host in ("0177.0.0.1", "017700000001", "0", "localhost")),
        *(f"http://[{host}]/" for host in ("::1", "::", "::ffff:127.0.0.1", "::ffff:7f00:1")),
        *(
            f"http://[{host}]/"
            for host in ("64:ff9b::7f00:1", "fe80::1", "fe80::1%25lo", "::7f00:1")
        ),
        *("http://169.254.169.254/latest/meta-data", "http://10.0.0.1/", "http://224.0.0.1/"),
        *("http://user:word@127.0.0.1/", f"http://127.0.0.1:{port}/", "http://[::1/", "http:///a"),
        *("https://127.0.0.1/", "http://①②⑦.0.0.1/", "http://127。0。0。1/", "http://a..b/"),
        *("http://localhost:80@127.0.0.1/", "http://127.0.0.1\\@example.com/", "http://%31/"),
    ):
        with pytest.raises(InputError):
            everywhere.fetch(url)
    # A name that is public in part, or at the second time: it is resolved once.
    answers = iter([["8.8.8.8", "127.0.0.1"], ["::ffff:8.8.8.8"], []])
    rebinding = ImageFetcher(AllowedHosts.parse(["*"]), resolve=lambda *_: next(answers))
    for _ in range(3):
        with pytest.raises(InputError, match="no public address"):
            rebinding.fetch("http://rebinding.example/")
    nobody = ImageFetcher(AllowedHosts(), resolve=lambda *_: pytest.fail("resolved"))
    with pytest.raises(InputError, match="this server fetches no images"):
        nobody.fetch("https://example.com/a.png")
    some = ImageFetcher(HOSTS, resolve=lambda *_: pytest.fail("resolved"))
    with pytest.raises(InputError, match="not one that the owner"):
        some.fetch("https://example.com/a.png")
    assert not tried
    assert not requests


def test_the_checked_address_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def connect(address: Any, *_: Any) -> socket.socket:
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    answers = iter([["8.8.8.8", "2606:4700::1", "1.1.1.1"], ["127.0.0.1"]])
    public = ImageFetcher(AllowedHosts.parse(["*"]), resolve=lambda *_: next(answers))
    with pytest.raises(InputError, match="gave no answer"):
        public.fetch("https://example.com/a.png")
    assert tried == [("8.8.8.8", 443), ("2606:4700::1", 443)]


def test_a_resolver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "RESOLVE_TIMEOUT_S", 0.05)
    over = threading.Event()
    hanging = ImageFetcher(AllowedHosts.parse(["*"]), resolve=lambda *_: over.wait(120) and [])
    with pytest.raises(InputError, match="was not found within"):
        hanging.fetch("http://example.com/")
    over.set()
