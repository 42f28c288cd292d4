"""Counting, against a group that is played by the test."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cenacle.core.model_spec import ModelSpec, MoELayer
from cenacle.core.plan import Plan
from cenacle.core.request import Request, TokenEvent
from cenacle.core.step import Step
from cenacle.engine.speculative.ngram import DraftStats
from cenacle.errors import ClusterError, InputError
from cenacle.ranks.step_timings import StepReport
from cenacle.scheduler.recovery import RecoveryState
from cenacle.server import metrics as metrics_module
from cenacle.server.auth import KeyStore
from cenacle.server.metrics import InstrumentedGroup, Metrics, rank_activations
from cenacle.server.plan_info import PlanTracker

SPEC = ModelSpec("mixtral", 1, (MoELayer(0, 4, 100, units=4),), 2, 1000, 64, 10, "float32")


class FakeGroup:
    """Keeps the sinks; error requests with the error that the test sets."""

    state = RecoveryState()
    draft_stats = DraftStats(12, 9, 8, 7)

    def __init__(self) -> None:
        self.load = {"running": 0, "waiting": 0}
        self.observers, self.sinks, self.error = [], {}, None

    def submit(self, request, sink):
        if self.error is not None:
            raise self.error
        self.sinks[request.id] = sink

    def cancel(self, request_id):
        self.sinks.pop(request_id, None)


@pytest.fixture
def server(tmp_path):
    group, keys = FakeGroup(), KeyStore(tmp_path / "keys.db")
    plan = Plan.whole(SPEC, 2)
    model = SimpleNamespace(group=group, plan=plan, config={}, name="m", spec=SPEC, plan_reason="")
    metrics = Metrics.of_server(model, keys, PlanTracker(model))
    yield SimpleNamespace(
        group=group,
        keys=keys,
        metrics=metrics,
        instrumented=InstrumentedGroup(group, metrics),
        value=lambda name, **labels: metrics.registry.get_sample_value(f"cenacle_{name}", labels),
    )
    keys.close()


def test_a_request_has_one_outcome_and_is_charged_once(server):
    events = []
    server.instrumented.submit(request := Request("a", (1, 2, 3), 9, key="alice"), events.append)
    assert server.keys.used_today("alice") == 0
    server.metrics.on_step_sent(Step(0, (request,)))
    assert server.keys.used_today("alice") == 3
    sink = server.group.sinks["a"]
    sink(TokenEvent("a", 5, cached_tokens=2, disk_tokens=1))
    server.metrics.on_step_sent(Step(0, (request,)))  # again, after ranks were lost
    sink(TokenEvent("a", 6, "stop"))
    server.instrumented.cancel("a")
    sink(TokenEvent("a", 7))
    assert len(events) == 3
    assert server.keys.used_today("alice") == 5
    assert server.value("request_outcome_total", finished_reason="stop") == 1
    assert server.value("request_outcome_total", finished_reason="abort") is None
    assert server.value("generation_tokens_total", key="alice") == 2
    assert server.value("prompt_tokens_total", key="alice") == 3
    assert server.value("prefix_cache_hits_total") == 2
    assert server.value("prefix_cache_disk_hits_total") == 1
    assert server.value("time_per_output_token_seconds_count") == 1


def test_errors_stops_and_refusals_are_outcomes(server):
    server.instrumented.submit(Request("a", (1,), 9), print)
    server.group.sinks["a"](ClusterError("lost"))
    server.instrumented.submit(Request("b", (1,), 9), print)
    server.instrumented.cancel("b", "stop")
    server.group.error = InputError("too long")
    with pytest.raises(InputError):
        server.instrumented.submit(Request("c", (1,), 9), print)
    for reason in ("error", "stop", "refused"):
        assert server.value("request_outcome_total", finished_reason=reason) == 1
    assert server.metrics._timers == {}


def report(sent_bytes, experts, all_reduce):
    return StepReport(
        total_s=1.0,
        laps_s={"trunk": 0.1, "experts": experts},
        all_reduces_s=(all_reduce,),
        routed={0: {0: 3, 2: 1}},
        decoding=True,
        sent_bytes=sent_bytes,
    )


def test_measured_steps(server):
    server.metrics.on_step_measured([report(100, 0.2, 0.4), report(100, 0.5, 0.1)])
    assert server.value("step_seconds_total", component="all_reduce") == pytest.approx(0.1)
    assert server.value("step_seconds_total", component="waiting") == pytest.approx(0.15)
    assert server.value("rank_step_seconds_total", rank="0", component="waiting") == pytest.approx(
        0.3
    )
    assert server.value("all_reduce_sent_bytes_total", rank="1") == 100
    server.metrics.on_step_measured([report(150, 0.2, 0.4), report(30, 0.5, 0.1)])
    assert server.value("all_reduce_sent_bytes_total", rank="0") == 150
    assert server.value("all_reduce_sent_bytes_total", rank="1") == 130  # restarted: from zero
    layer = server.metrics._model.plan.layers[0]
    zero = sum({0: 3, 2: 1}[e] for e in (0, 2) if 0 in [p.rank for p in layer.experts[e]])
    assert server.value("expert_activations_total", layer="0", rank="0") == 2 * zero
    assert server.value("expert_load_imbalance_ratio_count") == 2
    assert server.value("expert_load_imbalance_ratio_sum") == pytest.approx(
        2 * max(zero, 4 - zero) / 2
    )
    server.metrics.on_step_measured([replace(report(150, 0, 0), decoding=False)] * 2)
    assert server.value("measured_steps_total") == 2
    assert server.value("predicted_step_seconds", component="trunk") is None


def test_the_counters_of_a_step_are_rendered_together(server, monkeypatch):
    halfway, goes_on = threading.Event(), threading.Event()
    plain = metrics_module.rank_activations

    def wait_halfway(*arguments):
        halfway.set()
        assert goes_on.wait(60)
        return plain(*arguments)

    monkeypatch.setattr(metrics_module, "rank_activations", wait_halfway)
    reports = [report(100, 0.2, 0.4), report(100, 0.5, 0.1)]
    counting = threading.Thread(target=server.metrics.on_step_measured, args=(reports,))
    texts = []
    rendering = threading.Thread(target=lambda: texts.append(server.metrics.render("")[0].decode()))
    counting.start()
    assert halfway.wait(60)
    rendering.start()
    rendering.join(0.5)
    assert texts == []  # it waits for the rest of the step
    goes_on.set()
    for thread in (counting, rendering):
        thread.join(60)
    assert "cenacle_measured_steps_total 1.0" in texts[0]
    assert 'cenacle_expert_activations_total{layer="0",rank="0"}' in texts[0]


def test_work_follows_slices_and_replicas():
    counts = {0: 3, 2: 1}
    sliced = Plan.sliced(SPEC, 2, node_weights=[3, 1])
    times, work = rank_activations(sliced.layers[0], counts, sliced)
    assert times == [4, 4]
    assert work == pytest.approx([3, 1])
    both = Plan.replicated(SPEC, 2, node_memory_bytes=[9999, 9999])  # each expert on both
    times, work = rank_activations(both.layers[0], counts, both)
    assert (times, work) == ([2, 2], [2, 2])


def test_drafts_are_counted_by_source(server):
    drafted, accepted = (f"spec_decode_num_{what}_tokens_total" for what in ("draft", "accepted"))
    assert [server.value(drafted, source=s) for s in ("text", "model")] == [4, 8]
    assert [server.value(accepted, source=s) for s in ("text", "model")] == [2, 7]
