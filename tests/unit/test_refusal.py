"""Requests before a model is loaded: a real server that refuses them."""

import socket

import httpx

from cenacle.net import bind
from cenacle.server.access_policy import AccessPolicy
from cenacle.server.refusal import refuse

REASON = "1 of 2 nodes are available (one): two has not connected yet"
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def test_requests_are_refused_with_the_present_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path))
    with bind(port=0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        reasons = [REASON]
        with (
            refuse(sock, lambda: reasons[-1], delay_s=0),
            httpx.Client(base_url=url, timeout=120) as client,
        ):
            answer = client.post("/v1/chat/completions", json=CHAT)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            error = answer.json()["error"]
            assert error["message"] == f"no model is loaded yet: {REASON}"
            assert error["code"] == "nodes_missing"
            reasons.append("later")
            answer = client.post("/v1/messages", json=CHAT)
            assert answer.status_code in (503, 529)
            error = answer.json()
            assert (error["type"], error["error"]["message"][-7:]) == ("error", ": later")
            health = client.get("/health")
            assert (health.status_code, health.json()) == (
                503,
                {"status": "waiting", "reason": "later"},
            )
            assert client.get("/").headers["content-type"].startswith("text/html")
        # The next server gets who connects now.
        with socket.create_connection(sock.getsockname(), 120):
            sock.settimeout(120)
            sock.accept()[0].close()


def test_who_may_not_use_the_server_learns_no_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path))
    with bind(port=0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        with refuse(sock, lambda: REASON, AccessPolicy(require_key=True), delay_s=0):
            answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=120)
            assert (answer.status_code, REASON in answer.text) == (401, False)
            health = httpx.get(f"{url}/health", timeout=120)
            assert (health.status_code, health.json()) == (503, {"status": "waiting"})
