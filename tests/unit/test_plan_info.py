"""The placement map, and values that follow the plan in use: a recovery can choose another one."""

import asyncio
import json
from collections.abc import Sequence
from types import SimpleNamespace

import httpx
import pytest
from test_expected_speed import CONFIG, SPEC, calibrated

from cenacle.core.chat import OutputPart
from cenacle.core.model_spec import ModelSpec, MoELayer
from cenacle.core.plan import Plan
from cenacle.core.request import Request, TokenEvent
from cenacle.engine.speculative.ngram import DraftStats
from cenacle.ranks.step_timings import StepTimings
from cenacle.scheduler.recovery import RecoveryState
from cenacle.server.access_policy import AccessPolicy
from cenacle.server.app import Application
from cenacle.server.auth import KeyStore
from cenacle.server.limits import Limits
from cenacle.server.metrics import Metrics
from cenacle.server.middleware import AccessMiddleware
from cenacle.server.plan_info import PlanTracker, placement_map


class FakeGroup:
    """Answers every request with one token; its ranks can be replaced by those of another plan."""

    def __init__(self):
        self.failure, self.state = None, RecoveryState(reason="rank 1 was lost")
        self.load = {"running": 0, "waiting": 0}
        self.counts = {"requests": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self.step_timings, self.draft_stats = StepTimings(), DraftStats()
        self.observers, self.last_message_s, self.heartbeats = [], [], []
        self.cache_bytes = 0

    def submit(self, request, sink):
        sink(TokenEvent(request.id, 7, "stop"))

    def cancel(self, request_id):
        pass


class OneWordParser:
    in_reasoning, stop_string, finished = False, None, False

    def add(self, token):
        return [OutputPart("text", "word")]

    def finish(self, *, cut=False):
        return []


@pytest.fixture
def model():
    return SimpleNamespace(
        name="demo",
        config=CONFIG,
        spec=SPEC,
        plan=Plan.whole(SPEC, 1),
        plan_reason="fastest",
        group=FakeGroup(),
        ranks=SimpleNamespace(backend="mesh", pids=[], ready=[], links={}),
        ranks_json=list,
        text=SimpleNamespace(
            text_parser=lambda stop: OneWordParser(), isolate=lambda: None, close=lambda: None
        ),
        tokens_of=tuple,
        image_settings=None,
        image_obstacle="blind",
        sampling_defaults={},
        request=lambda tokens, limit, sampling, **_: Request("a", tokens, 9, (), sampling),
    )


@pytest.fixture
def client(model, tmp_path, monkeypatch):
    """Calls one path of the server: (method, path, body) -> response."""
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path))
    (tmp_path / "catalog").mkdir()
    calibrated(tmp_path / "catalog", 10.0)
    keys = KeyStore(tmp_path / "keys.db")
    tracker = PlanTracker(model)
    application = Application(model, Limits(), Metrics.of_server(model, keys, tracker), tracker)
    transport = httpx.ASGITransport(AccessMiddleware(application.app, AccessPolicy(), keys))

    def call(method, path, body=None):
        async def send():
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                return await http.request(method, path, json=body)

        return asyncio.run(send())

    yield call
    application.close()
    keys.close()


def ask(client):
    return client("POST", "/v1/completions", {"prompt": [1, 2], "max_tokens": 1}).json()


def predicted_all_reduce(client):
    lines = client("GET", "/metrics").text.splitlines()
    value = next(
        v for v in lines if v.startswith('cenacle_predicted_step_seconds{component="all_reduce"')
    )
    return float(value.rpartition(" ")[2])


def test_the_cluster_view_follows_the_plan(client, model):
    before = client("GET", "/cluster").json()
    assert before["prediction"]["step_timings_ms"]["all_reduce"] == 0
    total = before["prediction"]["step_timings_ms"]["total"]
    assert before["prediction"]["band_ms"] == pytest.approx([0.85 * total, 1.15 * total], abs=1e-3)
    assert before["usage"] == []
    model.plan = Plan.whole(SPEC, 2)
    after = client("GET", f"/cluster?placement={before['placement']['id']}").json()
    assert after["nodes"] == 2
    assert after["placement"]["id"] != before["placement"]["id"]
    assert after["prediction"]["step_timings_ms"]["all_reduce"] > 0
    reasons = (before["plan"]["reason"], after["plan"]["reason"])
    assert reasons == ("fastest", "re-formed: rank 1 was lost")


def test_the_predicted_metrics_follow_the_plan(client, model):
    assert predicted_all_reduce(client) == 0
    model.plan = Plan.whole(SPEC, 2)
    assert predicted_all_reduce(client) > 0


def test_the_fingerprint_follows_the_plan(client, model):
    before = ask(client)["system_fingerprint"]
    assert ask(client)["system_fingerprint"] == before
    model.plan = Plan.whole(SPEC, 2)
    whole = ask(client)["system_fingerprint"]
    model.plan = Plan.sliced(SPEC, 2)
    sliced = ask(client)["system_fingerprint"]
    assert len({before, whole, sliced}) == 3


def spec_of(layers: int, experts: int) -> ModelSpec:
    moe = tuple(MoELayer(3 + n, experts, 1000, units=8) for n in range(layers))
    return ModelSpec("some", layers + 3, moe, 8, 1000, None, 100, "float32")


def ranks_by_expert(body: dict) -> list[list[Sequence[int]]]:
    """For each layer and expert its ranks, as the page computes them."""
    return [
        [
            body["rank_sets"][rank_set]
            for rank_set, count in body["patterns"][pattern]
            for _ in range(count)
        ]
        for _, pattern in body["layers"]
    ]


@pytest.mark.parametrize("plan", [
    Plan.whole(spec_of(3, 10), 3), Plan.whole(spec_of(2, 9), 2, (2, 1)),
    Plan.sliced(spec_of(2, 4), 4), Plan.replicated(spec_of(2, 8), 4), Plan.whole(spec_of(1, 4), 1),
])  # fmt: skip
def test_a_placement_is_read_back_as_it_was(plan):
    body = json.loads(json.dumps(placement_map(plan)))
    assert [layer for layer, _ in body["layers"]] == [p.layer for p in plan.layers]
    expected = [[sorted(q.rank for q in parts) for parts in p.experts] for p in plan.layers]
    assert ranks_by_expert(body) == expected
    other = placement_map(Plan.whole(spec_of(3, 11), 3))
    assert body["id"] != other["id"]
