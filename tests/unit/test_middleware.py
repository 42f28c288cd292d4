"""Access control around a small application."""

import asyncio
import json
import socket

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from cenacle.errors import InputError
from cenacle.server.access_policy import AccessPolicy
from cenacle.server.auth import KeyStore
from cenacle.server.middleware import SECURITY_HEADERS, AccessMiddleware

ALL = ("/v1/models", "/v1/chat/completions", "/metrics", "/cluster", "/openapi.json", "/nowhere")


class InnerApplication:
    """Responds with the name of the key; a POST waits for `go`."""

    def __init__(self) -> None:
        self.waiting = 0
        self.go = asyncio.Event()

    def app(self) -> Starlette:
        async def key_name(http):
            return JSONResponse({"key": http.scope["state"].get("key", "nobody")})

        async def wait(http):
            self.waiting += 1
            await http.body()
            await self.go.wait()
            return await key_name(http)

        return Starlette(
            routes=[
                *(Route(p, key_name) for p in (*ALL[:-1], "/", "/health", "/static/{path:path}")),
                *(Route(p, wait, methods=["POST"]) for p in ("/v1/completions", "/v1/messages")),
            ]
        )


@pytest.fixture
def keys(tmp_path):
    made = KeyStore(tmp_path / "keys.db")
    yield made
    made.close()


def ask(keys, policy, *requests, base="http://localhost:8080"):
    """Responses to requests (method, path, headers), one after the other."""

    async def run():
        inside = InnerApplication()
        inside.go.set()
        transport = httpx.ASGITransport(AccessMiddleware(inside.app(), policy, keys).with_cors())
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return [await client.request(m, p, headers=h) for m, p, h in requests]

    return asyncio.run(run())


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def test_required_keys_protect_every_path_but_the_public_ones(keys):
    secret = keys.add("alice")
    gone = keys.add("gone")
    keys.remove("gone")
    policy = AccessPolicy(require_key=True, hosts=None)
    wrong = (
        *({}, bearer(""), bearer("x"), bearer(gone), {"Authorization": f"Basic {secret}"}),
        *({"x-api-key": "x"}, {"x-api-key": ""}, bearer(f"{secret}x"), {"key": secret}),
    )
    requests = [("GET", path, headers) for path in ALL for headers in wrong]
    requests += [("POST", path, {}) for path in ("/", "/health", "/static/x", "/v1/completions")]
    requests += [("GET", path, {}) for path in ("/healthz", "/health/", "/static")]
    for answer in ask(keys, policy, *requests):
        assert answer.status_code == 401, answer.request.url
        error = answer.json()["error"]
        assert error["code"] == "invalid_api_key"
        assert "alice" not in answer.text
        assert answer.headers["www-authenticate"] == "Bearer"
    right = [("GET", p, h) for p in ALL[:-1] for h in (bearer(secret), {"x-api-key": secret})]
    for answer in ask(keys, policy, *right):
        assert (answer.status_code, answer.json()) == (200, {"key": "alice"})
    for answer in ask(keys, policy, *(("GET", p, {}) for p in ("/", "/health", "/static/a.js"))):
        assert (answer.status_code, answer.json()) == (200, {"key": "nobody"})


def test_anthropic_paths_get_anthropic_errors(keys):
    (answer,) = ask(keys, AccessPolicy(require_key=True), ("POST", "/v1/messages", {}))
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "authentication_error"


def test_an_optional_key_is_recognized(keys):
    secret = keys.add("alice")
    requests = [("GET", "/v1/models", h) for h in ({}, bearer("-"), bearer(secret))]
    answers = ask(keys, AccessPolicy(), *requests)
    assert [a.json()["key"] for a in answers] == ["", "", "alice"]


def test_other_hosts_are_refused_on_loopback(keys):
    policy = AccessPolicy(hosts=frozenset({"chat.example"}))
    hosts = {
        **dict.fromkeys(("localhost", "LOCALHOST:80", "127.0.0.1:1", "127.8.8.8", "[::1]:9"), 200),
        **dict.fromkeys(("chat.example", "chat.example:443"), 200),
        **dict.fromkeys(("evil.example", "localhost.evil.example", "127.0.0.1.evil.example"), 403),
        **dict.fromkeys(("192.0.2.1", "", "[::2]", "0.0.0.0", "[", "x" * 5000), 403),
        **dict.fromkeys(("[::1]evil", "[::1]evil.example:80", "[::1].evil.example"), 403),
        **dict.fromkeys(("localhost:80@evil.example", "127.0.0.1:x", "localhost:80:80"), 403),
    }
    answers = ask(keys, policy, *(("GET", "/health", {"Host": h}) for h in hosts))
    assert [a.status_code for a in answers] == list(hosts.values())
    (open_to_all,) = ask(
        keys, AccessPolicy(hosts=None), ("GET", "/health", {"Host": "any.example"})
    )
    assert open_to_all.status_code == 200


def test_other_origins_are_refused(keys):
    origins = {
        "http://localhost:8080": 200,
        "https://localhost:8080": 200,
        **dict.fromkeys(("http://localhost:3000", "http://evil.example", "null", "http://["), 403),
    }
    # What a form or a script sends without a preflight.
    plain = {"Content-Type": "text/plain"}
    requests = [("POST", "/v1/completions", {"Origin": o, **plain}) for o in origins]
    assert [a.status_code for a in ask(keys, AccessPolicy(), *requests)] == list(origins.values())
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    (answer,) = ask(keys, AccessPolicy(), ("OPTIONS", "/v1/completions", preflight))
    assert "access-control-allow-origin" not in answer.headers


def test_an_allowed_origin_passes(keys):
    page = "https://chat.example"
    policy = AccessPolicy(require_key=True, cors_origins=(page,))
    secret = keys.add("alice")
    preflight = {
        "Origin": page,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
        "Access-Control-Request-Private-Network": "true",
    }
    preflighted, allowed, refused = ask(
        keys,
        policy,
        ("OPTIONS", "/v1/completions", preflight),
        ("POST", "/v1/completions", {"Origin": page, **bearer(secret)}),
        ("POST", "/v1/completions", {"Origin": "https://evil.example", **bearer(secret)}),
    )
    assert (preflighted.status_code, allowed.status_code, refused.status_code) == (200, 200, 403)
    assert preflighted.headers["access-control-allow-private-network"] == "true"
    assert allowed.headers["access-control-allow-origin"] == page
    assert "access-control-allow-origin" not in refused.headers
    assert "access-control-allow-credentials" not in allowed.headers


def test_every_response_has_the_security_headers(keys):
    paths = ("/", "/v1/models", "/nowhere")
    for answer in ask(keys, AccessPolicy(), *(("GET", p, {}) for p in paths)):
        assert {n: answer.headers[n] for n in SECURITY_HEADERS} == SECURITY_HEADERS
    (refused,) = ask(keys, AccessPolicy(require_key=True), ("GET", "/v1/models", {}))
    assert {n: refused.headers[n] for n in SECURITY_HEADERS} == SECURITY_HEADERS


def test_an_exhausted_budget_is_refused_until_tomorrow(keys):
    secret = keys.add("alice", tokens_per_day=100)
    requests = ("POST", "/v1/completions", bearer(secret))
    keys.charge("alice", 99)
    assert ask(keys, AccessPolicy(), requests)[0].status_code == 200
    keys.charge("alice", 1)
    (answer,) = ask(keys, AccessPolicy(), requests)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
    assert 0 < int(answer.headers["retry-after"]) <= 86400
    assert ask(keys, AccessPolicy(), ("GET", "/v1/models", bearer(secret)))[0].status_code == 200
    other = KeyStore(keys.path)
    assert other.used_today("alice") == 100  # written when a request ends
    other.close()


def test_an_unusable_key_store_refuses_everybody(keys, caplog):
    secret = keys.add("alice")
    keys._db.execute("DROP TABLE keys")
    (answer,) = ask(keys, AccessPolicy(require_key=True), ("GET", "/v1/models", bearer(secret)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "keys_unavailable")
    assert "no such table" in caplog.text
    assert "no such table" not in answer.text


def test_concurrent_requests_are_limited_per_key_and_in_total(keys):
    alice, bob = keys.add("alice", max_concurrent=2), keys.add("bob")

    async def run():
        inside = InnerApplication()
        app = AccessMiddleware(
            inside.app(), AccessPolicy(max_concurrent=4, max_concurrent_per_key=3), keys
        ).with_cors()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            def post(secret):
                answer = client.post("/v1/completions", headers=bearer(secret))
                return asyncio.wait_for(answer, 10)

            tasks = [asyncio.create_task(post(s)) for s in (alice, alice, bob)]
            async with asyncio.timeout(5):
                while inside.waiting < 3:
                    await asyncio.sleep(0)
            third = await post(alice)
            tasks.append(asyncio.create_task(post(bob)))
            async with asyncio.timeout(5):
                while inside.waiting < 4:
                    await asyncio.sleep(0)
            fifth = await post(bob)
            inside.go.set()
            done = await asyncio.gather(*tasks)
            return [third, fifth], done, await post(alice)

    refused, done, after = asyncio.run(run())
    for answer in refused:
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["type"] == "rate_limit_error"
    assert "2 answers for this key" in refused[0].text
    assert "4 answers already" in refused[1].text
    assert [a.json()["key"] for a in done] == ["alice", "alice", "bob", "bob"]
    assert after.status_code == 200


def test_the_access_log_has_no_text(keys, capsys):
    secret = keys.add("alice")
    policy = AccessPolicy(require_key=True, access_log=True)
    ask(
        keys,
        policy,
        ("POST", "/v1/completions?q=xyzzy", bearer(secret)),
        ("GET", "/v1/models", bearer(secret)),
        ("GET", "/xyzzy%0a2026 forged", bearer(secret)),
        ("GET", "/xyzzy", bearer("xyzzy")),
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "key=alice POST /v1/completions 200" in lines[0]
    assert "key=alice GET - 404" in lines[2]
    assert "key=- GET - 401" in lines[3]
    assert "xyzzy" not in "".join(lines)
    assert secret not in "".join(lines)


def test_text_is_logged_only_on_request(keys, capsys):
    async def run(policy):
        inside = InnerApplication()
        inside.go.set()
        transport = httpx.ASGITransport(AccessMiddleware(inside.app(), policy, keys))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = json.dumps({"prompt": "plugh"}).encode() + b"\n\x1b[31mforged"
            await client.post("/v1/completions", content=body)

    asyncio.run(run(AccessPolicy()))
    assert capsys.readouterr().err == ""
    asyncio.run(run(AccessPolicy(log_text=True)))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "plugh" in lines[0]
    assert '"key"' in lines[1]
    assert "\x1b" not in "".join(lines)


def test_listening_beyond_loopback_requires_a_key(keys):
    with (
        socket.create_server(("0.0.0.0", 0)) as outside,
        socket.create_server(("127.0.0.1", 0)) as own,
    ):
        with pytest.raises(InputError, match="cenacle keys add NAME"):
            AccessPolicy.for_socket(outside, keys)
        with pytest.raises(InputError, match="cenacle keys add NAME"):
            AccessPolicy.for_socket(own, keys, require_key=True)
        assert AccessPolicy.for_socket(own, keys) == AccessPolicy()
        keys.add("alice")
        assert AccessPolicy.for_socket(outside, keys) == AccessPolicy(require_key=True, hosts=None)
        named = AccessPolicy.for_socket(own, keys, require_key=True, hosts=["Chat.example"])
        assert named == AccessPolicy(require_key=True, hosts=frozenset({"chat.example"}))
