"""A proxy between a client and a server that keeps what the client sends."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

HOP_HEADERS = {"connection", "content-length", "host", "transfer-encoding", "keep-alive"}


class RecordingProxy(ThreadingHTTPServer):
    """Passes requests on to `target`; `requests` has path, body, status and answer of each."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.requests: list[dict[str, Any]] = []
        self.client = httpx.Client(timeout=600, trust_env=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: RecordingProxy
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_HEADERS}
        headers["accept-encoding"] = "identity"
        record = {"method": self.command, "path": self.path, "body": _read_json(body)}
        self.server.requests.append(record)
        url, client = f"{self.server.target}{self.path}", self.server.client
        with client.stream(self.command, url, content=body, headers=headers) as answer:
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name not in HOP_HEADERS:
                    self.send_header(name, value)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            kept = b""
            with contextlib.suppress(ConnectionError):
                for chunk in answer.iter_raw():
                    kept += chunk
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
            record |= {"status": answer.status_code, "answer": kept.decode(errors="replace")}
            record["warning"] = answer.headers.get("x-cenacle-warning")

    do_GET = do_POST = do_DELETE = do_HEAD = do_OPTIONS = _pass_on

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _read_json(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return repr(body[:200])


@contextlib.contextmanager
def recording_proxy(target: str) -> Iterator[RecordingProxy]:
    proxy = RecordingProxy(target)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        proxy.client.close()
