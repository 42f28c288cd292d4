"""A server beyond loopback: keys, TLS, and what it reveals without them."""

import contextlib
import hashlib
import json
import os
import re
import resource
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
from prometheus_client.parser import text_string_to_metric_families

import cenacle
from cenacle import net
from cenacle.server.limits import Limits
from support.program import run_here

ROOT = Path(__file__).parents[2]
DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
SUM: Any = [{"role": "user", "content": "What is 12 + 30?"}]
DEADLINE_S = 120.0  # for anything to happen on a busy machine
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
        return httpx.Client(base_url=self.url, verify=trust, headers=headers, timeout=300)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, http_client=self.http()
        )


def cenacle_program(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cenacle", *arguments],
        env={**os.environ, "CENACLE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def keys(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`cenacle keys`, in this process; the server is another."""
    return run_here("keys", *arguments, home=home)


@contextlib.contextmanager
def serving(home: Path, nodes: int, *options: str) -> Iterator[Safe]:
    """Runs `cenacle serve` on every address of this machine."""
    key = keys(home, "add", "alice").stdout.strip()
    port, log = net.free_ports(1)[0], home / "log"
    command = [sys.executable, "-m", "cenacle", "serve", "-m", str(DEMO), "-n", str(nodes)]
    command += ["--host", "0.0.0.0", "--port", str(port), "--tls", "self", *options]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, "CENACLE_HOME": str(home)}, stderr=errors
        )
        try:
            ends = time.monotonic() + DEADLINE_S
            while "serving demo_model at https" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < ends, log.read_text()
                time.sleep(0.05)
            yield Safe(port, home, key, log, process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(DEADLINE_S)
            finally:
                process.kill()


@pytest.fixture(scope="module", params=[1, 2])
def safe(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Safe]:
    with serving(tmp_path_factory.mktemp("home"), request.param, "--access-log") as running:
        yield running


def test_without_a_key_nothing_about_the_model_is_visible(safe: Safe) -> None:
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


def test_with_a_key_everything_works(safe: Safe) -> None:
    with safe.client() as client:
        assert [m.id for m in client.models.list()] == ["demo_model"]
        answer = client.chat.completions.create(model="demo_model", messages=SUM, temperature=0)
    assert answer.choices[0].message.content == "42"
    with safe.http(**{"x-api-key": safe.key}) as client:
        health = client.get("/health").json()
        assert health["model"] == "demo_model"
        assert [r["rank"] for r in health["ranks"]] == list(range(health["nodes"]))


def numbers(safe: Safe) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of /metrics: (name, sorted labels) -> value."""
    with safe.http(authorization=f"Bearer {safe.key}") as client:
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    samples = [s for family in families for s in family.samples]
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples}


def used(safe: Safe, name: str) -> int:
    rows = json.loads(keys(safe.home, "list", "--json").stdout)
    return next(row["used_today"] for row in rows if row["name"] == name)


def end_of_demo() -> int:
    return json.loads((DEMO / "config.json").read_text())["eos_token_id"]


def test_metrics_and_charged_tokens(safe: Safe) -> None:
    before, used_before = numbers(safe), used(safe, "alice")
    with safe.client() as client:
        answers = [
            client.chat.completions.create(
                model="demo_model",
                messages=SUM,
                temperature=0,
                max_tokens=tokens,
                logit_bias={str(end_of_demo()): -100},
            )
            for tokens in (24, 8)
        ]
        stopped = client.chat.completions.create(
            model="demo_model", messages=SUM, temperature=0, stop=["2"]
        )
        with client.chat.completions.create(
            model="demo_model",
            messages=SUM,
            stream=True,
            logit_bias={str(end_of_demo()): -100},
        ) as stream:
            for _ in range(5):
                next(stream)
    ends = time.monotonic() + DEADLINE_S
    while (after := numbers(safe))["cenacle_num_requests_running", ()]:
        assert time.monotonic() < ends
    gained = {k: v - before.get(k, 0) for k, v in after.items()}
    alice = (("key", "alice"),)
    whole = [a.usage for a in (*answers, stopped) if a.usage is not None]
    prompt = whole[0].prompt_tokens
    generated = sum(u.completion_tokens for u in whole)
    assert gained["cenacle_prompt_tokens_total", alice] == 4 * prompt
    # And those of the stream, of which as many came as the client read, or a few more.
    of_stream = gained["cenacle_generation_tokens_total", alice] - generated
    assert 4 <= of_stream < 1000
    outcomes = {
        dict(labels)["finished_reason"]: value
        for (name, labels), value in gained.items()
        if name == "cenacle_request_outcome_total" and value
    }
    assert outcomes == {"length": 2, "stop": 1, "abort": 1}
    assert gained["cenacle_time_to_first_token_seconds_count", ()] == 4
    assert gained["cenacle_request_queue_time_seconds_count", ()] == 4
    assert gained["cenacle_e2e_request_latency_seconds_count", ()] == 3
    gaps = gained["cenacle_time_per_output_token_seconds_count", ()]
    assert gaps == generated + of_stream - 4
    assert gained["cenacle_measured_steps_total", ()] >= 3
    timings = {
        dict(k)["component"]: v for (n, k), v in gained.items() if n == "cenacle_step_seconds_total"
    }
    assert set(timings) == {"trunk", "experts", "all_reduce", "waiting", "rest"}
    assert timings["experts"] > 0
    steps = gained["cenacle_measured_steps_total", ()]
    nodes = int(dict(next(k for n, k in after if n == "cenacle_info"))["nodes"])
    config = json.loads((DEMO / "config.json").read_text())
    chosen = steps * config["ffn_config"]["moe_top_k"]
    by_rank = [
        gained["cenacle_expert_activations_total", (("layer", "0"), ("rank", str(rank)))]
        for rank in range(nodes)
    ]
    # The demo's plan: a slice of every expert on each. More than one token a step with drafts.
    assert by_rank == [by_rank[0]] * nodes
    assert by_rank[0] >= chosen
    assert by_rank[0] % config["ffn_config"]["moe_top_k"] == 0
    assert after["cenacle_expert_load_imbalance_ratio_sum", ()] == pytest.approx(
        after["cenacle_expert_load_imbalance_ratio_count", ()]
    )
    # Charged, on disk: what was answered, and what was not waited for.
    charged = used(safe, "alice") - used_before
    assert charged == 4 * prompt + generated + of_stream


def test_every_series_of_the_dashboard_exists(safe: Safe) -> None:
    with safe.client() as client:  # so that there is one of each
        client.chat.completions.create(
            model="demo_model",
            messages=SUM,
            max_tokens=20,
            logit_bias={str(end_of_demo()): -100},
        )
    names = {name for name, _ in numbers(safe)}
    # Made only where a machine was calibrated.
    names.add("cenacle_predicted_step_seconds")
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    shown_names = {n for e in expressions for n in re.findall(r"\b(?:cenacle|process)_\w+", e)}
    assert len(shown_names) > 15
    assert shown_names <= names
    text = (ROOT / "docs" / "metrics.md").read_text()
    for name in names:
        plain = re.sub(r"_(bucket|sum|count)$", "", name)
        if name.startswith("cenacle_") and "num_requests" not in name and "_cache_" not in name:
            assert f"`{plain}`" in text, name


def test_a_token_budget_is_enforced(safe: Safe) -> None:
    made = keys(safe.home, "add", "dave", "--tokens-per-day", "40")
    endless = {"messages": SUM, "temperature": 0, "ignore_eos": True}
    with safe.http(authorization=f"Bearer {made.stdout.strip()}") as client:
        first = client.post("/v1/chat/completions", json=endless)
        assert first.status_code == 200
        # Not one token more, whatever the request asks for.
        assert first.json()["usage"]["total_tokens"] == used(safe, "dave") == 40
        answer = client.post("/v1/chat/completions", json=endless)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
        assert int(answer.headers["retry-after"]) > 0
        messages = client.post("/v1/messages", json={**endless, "max_tokens": 5})
        assert messages.json()["error"]["type"] == "rate_limit_error"
    keys(safe.home, "remove", "dave")


def test_answers_at_once_are_counted_not_requests(safe: Safe) -> None:
    made = keys(safe.home, "add", "erin", "--max-concurrent", "2")
    body: dict[str, Any] = {"messages": SUM, "max_tokens": 2}
    with safe.http(authorization=f"Bearer {made.stdout.strip()}") as client:
        assert client.post("/v1/chat/completions", json={**body, "n": 2}).status_code == 200
        refused = client.post("/v1/chat/completions", json={**body, "n": 3})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        batch = {"prompt": ["a", "b", "c"], "max_tokens": 1}
        assert client.post("/v1/completions", json=batch).status_code == 400
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    keys(safe.home, "remove", "erin")


def test_a_key_cannot_guess_anothers_prompt(safe: Safe) -> None:
    """The attack: a prompt that begins like another's is cached for longer the more is guessed."""
    start = "The four digits are "
    made = keys(safe.home, "add", "mallory").stdout.strip()

    def cached(key: str, text: str) -> int:
        with safe.http(authorization=f"Bearer {key}") as client:
            body = {"prompt": start * 8 + text, "max_tokens": 1, "temperature": 0}
            answer = client.post("/v1/completions", json=body).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    cached(safe.key, "7351 and that is all")
    assert cached(safe.key, "7351 and that is all") > 50
    first = cached(made, "0000 and that is all")
    later = [cached(made, f"{guess} and that is all") for guess in ("7000", "7300", "7351")]
    assert first == 0
    mine = [cached(made, f"{guess} and that is all") for guess in ("1000", "1300", "1351")]
    assert later == mine  # what is his own is cached, no token of alice's
    keys(safe.home, "remove", "mallory")


def test_keys_are_added_and_removed_while_it_runs(safe: Safe) -> None:
    made = keys(safe.home, "add", "bob", "--json")
    secret = json.loads(made.stdout)["key"]
    with safe.http(authorization=f"Bearer {secret}") as client:
        assert client.get("/v1/models").status_code == 200
        assert keys(safe.home, "remove", "bob").returncode == 0
        assert client.get("/v1/models").status_code == 401


def test_fingerprint_and_access_log(safe: Safe) -> None:
    text = safe.log.read_text()
    (fingerprint,) = re.findall(r"SHA-256 fingerprint ((?:[0-9A-F]{2}:){31}[0-9A-F]{2})", text)
    certificate = ssl.get_server_certificate(("127.0.0.1", safe.port))
    der = ssl.PEM_cert_to_DER_cert(certificate)
    assert hashlib.sha256(der).hexdigest().upper() == fingerprint.replace(":", "")
    with safe.client() as client:
        client.models.list()
    with safe.http(authorization=f"Bearer {safe.key}") as http:
        assert http.post("/v1/responses/xyzzy%0a2026 forged").status_code == 405
    # A client may have its answer before the server has written the line.
    ends = time.monotonic() + DEADLINE_S
    while "key=alice POST - 405" not in (text := safe.log.read_text()):
        assert time.monotonic() < ends, text
        time.sleep(0.05)
    assert "key=alice GET /v1/models 200" in text
    assert "forged" not in text
    assert safe.key not in safe.log.read_text()
    assert "What is" not in safe.log.read_text()
    assert "Traceback" not in safe.log.read_text()


@pytest.mark.parametrize("safe", [1], indirect=True)
def test_incomplete_tls_handshakes_time_out(safe: Safe) -> None:
    with contextlib.ExitStack() as opened:

        def connect() -> socket.socket:
            made = socket.create_connection(("127.0.0.1", safe.port), timeout=120)
            return opened.enter_context(made)

        silent, half, plain = connect(), connect(), connect()
        half.sendall(b"\x16\x03\x01\x02\x00\x01\x00")  # a handshake's beginning
        plain.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        began = time.monotonic()
        for sock in (plain, silent, half):
            with contextlib.suppress(ConnectionResetError):
                while data := sock.recv(1000):
                    assert b"demo_model" not in data
        assert time.monotonic() - began < DEADLINE_S
        with safe.http() as client:
            assert client.get("/health").status_code == 200


@pytest.mark.parametrize("safe", [1], indirect=True)
def test_connections_without_a_handshake_make_room_for_others(safe: Safe) -> None:
    limit = Limits().max_connections_per_address
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * limit), hard))
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with safe.http(authorization=f"Bearer {safe.key}") as client:
            pid = client.get("/health").json()["pid"]
            answered = 0
            for at in range(limit + 300):
                sock = socket.create_connection(("127.0.0.1", safe.port), timeout=DEADLINE_S)
                opened.enter_context(sock)
                if at % 100 == 0:  # an older connection that is used stays
                    answered += client.get("/health").status_code == 200
            assert answered == -(-(limit + 300) // 100)
            open_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            assert open_files < limit + 200
        with safe.client() as newcomer:
            answer = newcomer.chat.completions.create(model="demo_model", messages=SUM)
            assert answer.choices[0].finish_reason


@pytest.mark.parametrize("safe", [2], indirect=True)
def test_a_hanging_idle_rank_is_detected(safe: Safe) -> None:
    with safe.http() as nobody, safe.http(authorization=f"Bearer {safe.key}") as client:
        pids = [r["pid"] for r in client.get("/health").json()["ranks"]]
        began = time.monotonic()
        os.kill(pids[1], signal.SIGSTOP)
        while (health := nobody.get("/health")).status_code == 200:
            assert time.monotonic() - began < DEADLINE_S
            time.sleep(0.1)
        assert health.json() == {"status": "recovering"}
        assert numbers(safe)["cenacle_up", ()] == 0
        answer = client.post("/v1/chat/completions", json={"messages": SUM, "temperature": 0})
        assert answer.json()["choices"][0]["message"]["content"] == "42"
        assert numbers(safe)["cenacle_recoveries_total", ()] == 1


def raw(safe: Safe, request: str) -> bytes:
    """The response to these bytes, until the server closes the connection or is silent."""
    trust = ssl.create_default_context(cafile=str(safe.home / "tls-cert.pem"))
    data = b""
    with socket.create_connection(("127.0.0.1", safe.port), timeout=120) as sock:
        with trust.wrap_socket(sock, server_hostname="localhost") as made:
            made.settimeout(1)
            # A server need not read to its end what it refuses.
            with contextlib.suppress(TimeoutError, ConnectionError, ssl.SSLEOFError):
                made.sendall(request.encode("latin-1"))
                while piece := made.recv(65536):
                    data += piece
    return data


@pytest.mark.parametrize("safe", [1], indirect=True)
def test_paths_do_not_leave_the_web_folder(safe: Safe) -> None:
    up = ("../", "..%2f", "%2e%2e/", "..%5c", "....//", "%2e%2e%2f", "..%c0%af")
    names = ("etc/passwd", "server/app.py", "pyproject.toml")
    paths = [f"/static/{u * 8}{n}" for u in up for n in names]
    paths += [f"/{u * 8}{n}" for u in up for n in names]
    paths += ["/static//etc/passwd", "/static/file:///etc/passwd", "//etc/passwd", "/static/."]
    paths += ["/v1/models/..%2f..%2fetc%2fpasswd", "/static/index.html%00.js", "/static/"]
    with socket.create_connection(("127.0.0.1", safe.port), timeout=120) as sock:
        trust = ssl.create_default_context(cafile=str(safe.home / "tls-cert.pem"))
        with trust.wrap_socket(sock, server_hostname="localhost") as made:
            with made.makefile("rwb") as stream:
                for path in paths:  # as they are: a client would tidy them up
                    head = (
                        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {safe.key}\r\n\r\n"
                    )
                    stream.write(head.encode())
                    stream.flush()
                    status = int(stream.readline().split()[1])
                    headers = {}
                    while line := stream.readline().strip():
                        name, _, value = line.decode().partition(":")
                        headers[name.lower()] = value.strip()
                    body = stream.read(int(headers["content-length"]))
                    assert status in (400, 404), path
                    assert b"root:" not in body
                    assert b"import" not in body


@pytest.mark.parametrize("safe", [1], indirect=True)
def test_request_smuggling_is_refused(safe: Safe) -> None:
    key, host = f"x-api-key: {safe.key}\r\n", "Host: localhost\r\n"
    injected = raw(safe, f"GET /v1/models/%0d%0aX-Injected:%201%0d%0a HTTP/1.1\r\n{host}{key}\r\n")
    head, _, _ = injected.lower().partition(b"\r\n\r\n")
    assert head.startswith(b"http/1.1 404 ")
    assert b"\nx-injected" not in head
    second = f"GET /v1/models HTTP/1.1\r\n{host}{key}\r\n"
    post = f"POST /v1/completions HTTP/1.1\r\n{host}{key}"
    for smuggled in (
        f"{post}Content-Length: 4\r\nContent-Length: 9\r\n\r\n{{}}  {second}",
        f"{post}Content-Length : 4\r\n\r\n{{}}  {second}",
        f"{post}Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n{second}",
        f"{post}Content-Length: -1\r\n\r\n{second}",
        f"GET /v1/models HTTP/1.1\r\n{host}Host: evil.example\r\n{key}\r\n",
        f"GET /v1/models HTTP/1.1\r\n{host}x: a\rb\r\n{key}\r\n",
        f"GET /v1/models HTTP/1.1\r\n{host}{key}x: {'a' * 2_000_000}\r\n\r\n",
        f"GET /v1/models\x00 HTTP/1.1\r\n{host}{key}\r\n",
    ):
        answer = raw(safe, smuggled)
        assert b"demo_model" not in answer, smuggled[:200]
        assert b" 200 " not in answer, smuggled[:200]
    # Both lengths: the chunks count, and nothing after them is taken for part of the body.
    both = raw(
        safe,
        f"{post}Content-Length: 100\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n",
    )
    assert both.startswith(b"HTTP/1.1 400 ")
    assert b"Traceback" not in safe.log.read_bytes()


def test_serve_reports_missing_options_before_loading(tmp_path: Path) -> None:
    serve = ("serve", "-m", str(DEMO), "--port", str(net.free_ports(1)[0]))
    for options, message in (
        (("--host", "0.0.0.0"), "cenacle keys add NAME"),
        (("--require-key",), "cenacle keys add NAME"),
        (("--tls", "yes"), "--tls: expected self"),
        (("--tls-cert", "absent.pem"), "expected both"),
        (("--tls-cert", "absent.pem", "--tls-key", "absent.pem"), "absent.pem"),
    ):
        done = cenacle_program(tmp_path, *serve, *options)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_keys_are_listed_without_their_secret(tmp_path: Path) -> None:
    made = cenacle_program(tmp_path, "keys", "add", "carol", "--tokens-per-day", "9")
    assert (made.returncode, len(made.stdout.splitlines())) == (0, 1)
    listed = keys(tmp_path, "list", "--json")
    (row,) = json.loads(listed.stdout)
    assert (row["name"], row["tokens_per_day"], row["used_today"]) == ("carol", 9, 0)
    assert made.stdout.strip() not in listed.stdout
    assert "carol" in keys(tmp_path, "list").stdout
    for wrong in (("add", "carol"), ("add", "a b"), ("remove", "nobody")):
        done = keys(tmp_path, *wrong)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
