"""A server with several models as clients see it; the models answer with their names."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from cenacle.errors import CheckpointError, ClusterError
from cenacle.load_options import LoadOptions
from cenacle.server.access_policy import AccessPolicy
from cenacle.server.api.protocol import ServedModel
from cenacle.server.api.response_store import ResponseStore
from cenacle.server.auth import KeyStore
from cenacle.server.limits import Limits
from cenacle.server.metrics import ModelsMetrics
from cenacle.server.middleware import AccessMiddleware
from cenacle.server.model_catalog import ModelEntry
from cenacle.server.model_pool import LoadTask, ModelPool, PoolOptions
from cenacle.server.models_app import ModelsApplication

NAMES = ("a", "b", "broken")
DEADLINE_S = 120.0


@dataclass
class NamedModel:
    """Answers with its name: as a stream, if that is asked for."""

    name: str
    failure: None = None
    promised_bytes: int = 1
    resident_bytes: int = 1

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        status = body.get("status", 200)
        kind = b"text/event-stream" if body.get("stream") and status == 200 else b"application/json"
        data = {"error": {"message": "no", "code": None, "param": None}} if status != 200 else {}
        text = json.dumps({"by": self.name, **data}).encode()
        text = b"data: " + text + b"\n\n" if kind == b"text/event-stream" else text
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text, "more_body": False})

    def stop(self, reason: ClusterError) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Fixture:
    keys: KeyStore
    gate: threading.Event = field(default_factory=threading.Event)
    names: dict[str, tuple[str, ...]] = field(default_factory=lambda: {n: (n,) for n in NAMES})

    def load(self, task: LoadTask) -> NamedModel:
        task.make_room(None)
        assert self.gate.wait(DEADLINE_S)
        if task.name == "broken":
            raise CheckpointError("weights: a file is missing")
        return NamedModel(task.name)

    @asynccontextmanager
    async def client(self, key: str = "") -> AsyncIterator[httpx.AsyncClient]:
        pool = ModelPool(NAMES, self.load, PoolOptions(), lambda: 100)
        catalog = {
            name: ModelEntry(LoadOptions(name), ServedModel(name, 4096, 100)) for name in NAMES
        }
        application = ModelsApplication(
            pool,
            catalog,
            self.names,
            Limits(stream_keep_alive_s=0.01),
            8,
            ModelsMetrics(NAMES, self.keys, pool.status),
            ResponseStore(),
        )
        asgi = AccessMiddleware(application.app, AccessPolicy(), self.keys)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(asgi)
        application.start()
        async with (
            asyncio.timeout(DEADLINE_S),
            httpx.AsyncClient(
                transport=transport, base_url="http://localhost", headers=headers
            ) as client,
        ):
            yield client
        application.stop(ClusterError("the end"))
        pool.close()


@pytest.fixture
def fixture(tmp_path: Path) -> Iterator[Fixture]:
    keys = KeyStore(tmp_path / "keys.db")
    yield Fixture(keys)
    keys.close()


def ask(client: httpx.AsyncClient, path: str = "/v1/chat/completions", **body: Any) -> Any:
    return client.post(path, json=body)


def test_a_request_goes_to_the_model_that_it_names_or_the_first(fixture):
    fixture.gate.set()

    async def main():
        async with fixture.client() as client:
            assert (await ask(client, model="b")).json() == {"by": "b"}
            assert (await ask(client)).json() == {"by": "a"}
            assert (await ask(client, "/v1/messages", model="a")).json() == {"by": "a"}
            unknown = await ask(client, model="gpt-4")
            assert unknown.status_code == 404
            assert "'gpt-4' does not exist; this server has 'a' or 'b'" in unknown.text
            wrong = await client.post("/v1/completions", content=b"{")
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_body")
            typed = await ask(client, model=7)
            assert typed.json()["error"]["param"] == "model"

    asyncio.run(main())


def test_with_a_star_any_other_name_is_the_first_model(fixture):
    fixture.gate.set()
    fixture.names = {"a": ("*",), "b": (), "broken": ()}

    async def main():
        async with fixture.client() as client:
            assert (await ask(client, model="gpt-4")).json() == {"by": "a"}
            assert (await ask(client, model="b")).json() == {"by": "b"}

    asyncio.run(main())


def test_the_list_tells_the_state_of_each_and_a_slash_at_the_end_is_the_same(fixture):
    fixture.gate.set()

    async def main():
        async with fixture.client() as client:
            health = (await client.get("/health")).json()
            assert (health["status"], health["model"]) == ("ok", None)
            assert {row["state"] for row in health["models"]} == {"unloaded"}
            await ask(client, model="b")
            await ask(client, model="broken")
            for path in ("/v1/models", "/v1/models/"):
                rows = (await client.get(path)).json()["data"]
                assert [(row["id"], row["state"]) for row in rows] == [
                    ("a", "unloaded"),
                    ("b", "loaded"),
                    ("broken", "failed"),
                ]
            assert rows[2]["reason"] == "weights: a file is missing"
            assert rows[0]["context_length"] == 4096
            assert (await client.get("/v1/models/b")).json()["status"] == {"value": "loaded"}
            assert (await client.get("/v1/models/c")).status_code == 404
            assert (await client.get("/cluster?model=a")).json()["status"] == "idle"
            metrics = (await client.get("/metrics")).text
            assert 'cenacle_model_loaded{model="b"} 1.0' in metrics
            assert 'cenacle_model_load_failures_total{model="broken"} 1.0' in metrics

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_is_503_with_the_reason_while_others_answer(fixture):
    fixture.gate.set()

    async def main():
        async with fixture.client() as client:
            response = await ask(client, model="broken")
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            message = response.json()["error"]["message"]
            assert message == "broken is not loaded: weights: a file is missing"
            other = await ask(client, "/v1/messages", model="broken")
            assert (other.status_code, other.json()["type"]) == (503, "error")
            assert (await ask(client, model="a")).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/v1/chat/completions", {"model": "b"}, 'data: {"by": "b"}'),
        ("/v1/chat/completions", {"model": "b", "status": 400}, 'data: {"by": "b", "error": {'),
        ("/v1/chat/completions", {"model": "broken"}, 'data: {"error": {"message": "broken is'),
        ("/v1/messages", {"model": "broken"}, 'event: error\ndata: {"type": "error", "error": {'),
        ("/v1/responses", {"model": "broken"}, 'event: error\ndata: {"type": "error", "sequence'),
    ],
)
def test_a_stream_shows_signs_of_life_while_its_model_is_loaded(fixture, path, body, last):
    async def main():
        async with fixture.client() as client:
            loop = asyncio.get_running_loop()
            loop.call_later(0.1, fixture.gate.set)
            response = await ask(client, path, stream=True, **body)
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            *waiting, event = response.text.strip().split("\n\n")
            assert set(waiting) == {": waiting"}
            assert event.startswith(last)

    asyncio.run(main())


def test_a_key_may_be_limited_to_models(fixture):
    fixture.gate.set()
    secret = fixture.keys.add("bob", models=["b"])
    nothing = fixture.keys.add("eve", models=["c"])

    async def main():
        async with fixture.client(secret) as client:
            refused = await ask(client, model="a")
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "model_not_allowed"
            assert (await ask(client)).json() == {"by": "b"}  # the first that it may use
            rows = (await client.get("/v1/models")).json()["data"]
            assert [row["id"] for row in rows] == ["b"]
            assert (await client.get("/v1/models/a")).status_code == 403
        async with fixture.client(nothing) as client:
            assert (await ask(client)).status_code == 403
            assert (await client.get("/v1/models")).json()["data"] == []

    asyncio.run(main())


def test_more_requests_than_may_wait_are_told_to_come_again(fixture):
    async def main():
        async with fixture.client() as client:
            waiting = [asyncio.create_task(ask(client, model="a")) for _ in range(8)]
            while (await client.get("/v1/models/a")).json()["waiting"] < 8:
                await asyncio.sleep(0.005)
            refused = await ask(client, model="a")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
            fixture.gate.set()
            answers = await asyncio.gather(*waiting)
            assert {a.status_code for a in answers} == {200}

    asyncio.run(main())
