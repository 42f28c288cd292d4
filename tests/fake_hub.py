"""A server that behaves like the Hugging Face Hub, counts requests, and fails as a test wants."""

import hashlib
import json
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import numpy as np

REPO, COMMIT = "circle/tiny", "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves until it is closed.

    Attributes:
        sent: bytes of files.
        requests: (file, start, stop) of every request that was answered; served: with the client's
            address first.
    """

    def __init__(self, folder, address="127.0.0.1"):
        self.folder, self.sent, self.requests, self.served = folder, 0, [], []
        self.break_after, self.ranges, self.refuse, self.damage = None, True, 0, None
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                server.answer(self)

        self._http = ThreadingHTTPServer((address, 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://{address}:{self._http.server_port}"

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def answer(self, http):
        path = unquote(urlparse(http.path).path)
        if path.startswith(f"/api/models/{REPO}"):
            siblings = []
            for f in sorted(self.folder.iterdir()):
                row = {"rfilename": f.name, "size": f.stat().st_size}
                if f.suffix == ".safetensors":
                    row["lfs"] = {"sha256": _sha(f), "size": f.stat().st_size, "pointerSize": 130}
                siblings.append(row)
            return self.send(
                http, 200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
            )
        if not path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            return self.send(http, 404, b"", {"X-Error-Code": "RepoNotFound"})
        if self.refuse:
            self.refuse -= 1
            return self.send(http, 503, b"")
        name = path.rsplit("/", 1)[-1]
        data = bytearray((self.folder / name).read_bytes())
        start, stop = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", http.headers["Range"]).groups())
        stop = min(stop + 1, len(data))
        if not self.ranges:
            return self.send(http, 200, bytes(data))
        if self.damage is not None and start <= self.damage < stop:
            data[self.damage] ^= 1
        part = bytes(data[start:stop])
        with self._lock:
            self.requests.append((name, start, stop))
            self.served.append((http.client_address[0], name, start, stop))
            self.sent += len(part)
        if self.break_after is not None:
            whole, part = len(part), part[: self.break_after]
            self.break_after = None
            return self.send(http, 206, part, {"Content-Length": str(whole)})
        return self.send(http, 206, part)

    @staticmethod
    def send(http, status, data, headers=None):
        http.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            http.send_header(name, value)
        http.end_headers()
        http.wfile.write(data)


@cache
def _sha(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def use_fake_hub(monkeypatch, url):
    """Make this process use a server as the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )


def times_sent(server, file):
    """How often each byte of a file was requested."""
    times = np.zeros((server.folder / file).stat().st_size, int)
    for _, name, start, stop in server.served:
        if name == file:
            times[start:stop] += 1
    return times
