"""A server for others: keys, TLS, what it gives without them. Started as an owner would."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import cenacle

DEMO = Path(cenacle.__file__).parent / "demo_model"
SUM: Any = [{"role": "user", "content": "What is 12 + 30?"}]
PRIVATE = ("demo_model", "alice", "tokens", "rank", "pid")


@dataclass
class Safe:
    """A running server, its certificate and the key of alice."""

    port: int
    home: Path
    key: str
    log: Path
    process: "subprocess.Popen[Any]"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def http(self, **headers: str) -> httpx.Client:
        trust = ssl.create_default_context(cafile=str(self.home / "tls-cert.pem"))
        return httpx.Client(base_url=self.url, verify=trust, headers=headers, timeout=60)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, http_client=self.http()
        )


def cenacle_program(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cenacle.cli", *arguments],
        env={**os.environ, "CENACLE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@contextlib.contextmanager
def serving(home: Path, nodes: int, *options: str) -> Iterator[Safe]:
    """`cenacle serve` on every address of this machine, until the block ends."""
    key = cenacle_program(home, "keys", "add", "alice").stdout.strip()
    port, log = free_port(), home / "log"
    command = [sys.executable, "-m", "cenacle.cli", "serve", "-m", str(DEMO), "-n", str(nodes)]
    command += ["--host", "0.0.0.0", "--port", str(port), "--tls", "self", *options]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, "CENACLE_HOME": str(home)}, stderr=errors
        )
        try:
            ends = time.monotonic() + 90
            while "serving demo_model at https" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < ends, log.read_text()
                time.sleep(0.05)
            yield Safe(port, home, key, log, process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            finally:
                process.kill()


@pytest.fixture(scope="module", params=[1, 2])
def safe(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Safe]:
    with serving(tmp_path_factory.mktemp("home"), request.param, "--access-log") as running:
        yield running


def test_without_a_key_there_is_nothing_of_the_model(safe: Safe) -> None:
    body = json.dumps({"messages": SUM})
    with safe.http() as nobody, safe.http(authorization="Bearer cen-wrong") as stranger:
        for client in (nobody, stranger):
            for path in ("/v1/models", "/v1/models/demo_model", "/metrics", "/cluster", "/docs"):
                answer = client.get(path)
                assert answer.status_code == 401, path
                assert not any(word in answer.text for word in PRIVATE)
            for path in ("chat/completions", "completions", "messages", "responses"):
                answer = client.post(f"/v1/{path}", content=body)
                assert answer.status_code == 401, path
                assert not any(word in answer.text for word in PRIVATE)
            health = client.get("/health")
            assert (health.status_code, health.json()) == (200, {"status": "ok"})
            assert not any(word in client.get("/").text for word in ("demo_model", "alice"))


def test_with_one_everything_is_there(safe: Safe) -> None:
    with safe.client() as client:
        assert [m.id for m in client.models.list()] == ["demo_model"]
        answer = client.chat.completions.create(model="demo_model", messages=SUM, temperature=0)
    assert answer.choices[0].message.content == "42"
    with safe.http(**{"x-api-key": safe.key}) as client:
        health = client.get("/health").json()
        assert health["model"] == "demo_model"
        assert [r["rank"] for r in health["ranks"]] == list(range(health["nodes"]))


def test_keys_come_and_go_while_it_runs(safe: Safe) -> None:
    made = cenacle_program(safe.home, "keys", "add", "bob", "--json")
    secret = json.loads(made.stdout)["key"]
    with safe.http(authorization=f"Bearer {secret}") as client:
        assert client.get("/v1/models").status_code == 200
        assert cenacle_program(safe.home, "keys", "remove", "bob").returncode == 0
        assert client.get("/v1/models").status_code == 401


def test_what_is_printed_and_logged(safe: Safe) -> None:
    text = safe.log.read_text()
    (fingerprint,) = re.findall(r"SHA-256 fingerprint ((?:[0-9A-F]{2}:){31}[0-9A-F]{2})", text)
    seen = ssl.get_server_certificate(("127.0.0.1", safe.port))
    der = ssl.PEM_cert_to_DER_cert(seen)
    assert hashlib.sha256(der).hexdigest().upper() == fingerprint.replace(":", "")
    with safe.client() as client:
        client.models.list()
    assert "key=alice GET /v1/models 200" in safe.log.read_text()
    assert safe.key not in safe.log.read_text()
    assert "What is" not in safe.log.read_text()
    assert "Traceback" not in safe.log.read_text()


@pytest.mark.parametrize("safe", [1], indirect=True)
def test_connections_that_never_agree_on_tls_are_ended(safe: Safe) -> None:
    with contextlib.ExitStack() as opened:

        def connect() -> socket.socket:
            made = socket.create_connection(("127.0.0.1", safe.port), timeout=20)
            return opened.enter_context(made)

        silent, half, plain = connect(), connect(), connect()
        half.sendall(b"\x16\x03\x01\x02\x00\x01\x00")  # a handshake's beginning
        plain.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        began = time.monotonic()
        for sock in (plain, silent, half):
            with contextlib.suppress(ConnectionResetError):
                while data := sock.recv(1000):
                    assert b"demo_model" not in data
        assert time.monotonic() - began < 15
        with safe.http() as client:
            assert client.get("/health").status_code == 200


def test_serve_says_what_is_missing_before_it_loads(tmp_path: Path) -> None:
    serve = ("serve", "-m", str(DEMO), "--port", str(free_port()))
    for options, said in (
        (("--host", "0.0.0.0"), "cenacle keys add NAME"),
        (("--require-key",), "cenacle keys add NAME"),
        (("--tls", "yes"), "--tls: expected self"),
        (("--tls-cert", "absent.pem"), "expected both"),
        (("--tls-cert", "absent.pem", "--tls-key", "absent.pem"), "absent.pem"),
    ):
        done = cenacle_program(tmp_path, *serve, *options)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_keys_are_listed_without_their_secret(tmp_path: Path) -> None:
    made = cenacle_program(tmp_path, "keys", "add", "carol", "--tokens-per-day", "9")
    assert (made.returncode, len(made.stdout.splitlines())) == (0, 1)
    listed = cenacle_program(tmp_path, "keys", "list", "--json")
    (row,) = json.loads(listed.stdout)
    assert (row["name"], row["tokens_per_day"], row["used_today"]) == ("carol", 9, 0)
    assert made.stdout.strip() not in listed.stdout
    assert "carol" in cenacle_program(tmp_path, "keys", "list").stdout
    for wrong in (("add", "carol"), ("add", "a b"), ("remove", "nobody")):
        done = cenacle_program(tmp_path, "keys", *wrong)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
