"""Prometheus metrics: GET /metrics.

Owns: the registry, how each value is computed, and charging tokens to API keys.
Does not know: HTTP, text, how requests are answered.
Invariant: `docs/metrics.md` defines every name by a formula. Counting never blocks and sees no
text. A request that was submitted gets exactly one outcome.
Next: `ranks/rank_group.py` calls the observer; `generation.py` submits through `InstrumentedGroup`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    Summary,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from .. import __version__
from ..core.plan import LayerPlan, Plan
from ..core.request import GroupEvent, Request, TokenEvent
from ..core.step import Step
from ..errors import CenacleError
from ..ranks.rank_group import RankGroup, Sink, StepObserver
from ..ranks.step_timings import StepReport, StepTimings
from .auth import KeyStore
from .expected_speed import SpeedPrediction
from .model_state import ModelStatus
from .plan_info import PlanTracker

if TYPE_CHECKING:
    from ..api import Model
    from .tracing import RequestTraces  # needs an extra

disable_created_metrics()  # otherwise each counter gets a second series with its start time

NO_KEY_LABEL = "-"  # the label of requests without a key; no key has this name

# Buckets in seconds, as vLLM has them.
_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640,
)  # fmt: skip
_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    10,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
)  # fmt: skip


@dataclass
class RequestTimer:
    """A request without an outcome yet; times are `time.perf_counter`'s."""

    key: str
    prompt_tokens: int
    submitted_at: float
    admitted: bool = False
    last_token_at: float | None = None

    @property
    def key_label(self) -> str:
        """The key's name as a label."""
        return self.key or NO_KEY_LABEL


class KeyUsage(NamedTuple):
    """What an API key uses."""

    requests: int  # without an outcome yet
    prompt_tokens: int
    generated_tokens: int


class Metrics(StepObserver):
    """All metrics of one model, also while it is not loaded.

    Args:
        keys: tokens are charged to these.
    """

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys
        self._model: Model | None = None
        self._state: StateCollector | None = None
        self.traces: RequestTraces | None = None  # that are told the same
        self._lock = threading.Lock()
        self._step_lock = threading.Lock()  # the counters of a step are rendered together
        self._timers: dict[str, RequestTimer] = {}
        self._last_sent_bytes: dict[int, int] = {}
        self.registry = CollectorRegistry(auto_describe=True)
        self._create_request_metrics()
        self._create_step_metrics()

    @classmethod
    def of_server(cls, model: Model, keys: KeyStore, plan_tracker: PlanTracker) -> Metrics:
        """Those of a server with one model, and of its process."""
        metrics = cls(keys)
        ProcessCollector(registry=metrics.registry)
        metrics.attach(model, plan_tracker)
        return metrics

    def attach(self, model: Model, plan_tracker: PlanTracker) -> None:
        """The model is loaded.

        Args:
            model: whose steps are counted from now on.
            plan_tracker: describes the plan in use.
        """
        self._model, self._state = model, StateCollector(model, plan_tracker)
        self.registry.register(self._state)
        model.group.observers.append(self)

    def detach(self) -> None:
        """The model is unloaded: what was counted stays."""
        if self._state is not None:
            self.registry.unregister(self._state)
        self._model = self._state = None

    def collect(self) -> list[Metric]:
        """The present values."""
        with self._step_lock:
            return list(self.registry.collect())

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"cenacle_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"cenacle_{name}", text, buckets=buckets, registry=self.registry)

    def _create_request_metrics(self) -> None:
        counter, histogram = self._counter, self._histogram
        self._first_token_s = histogram(
            "time_to_first_token_seconds",
            "From submission to the first token.",
            _FIRST_TOKEN_BUCKETS,
        )
        self._token_s = histogram(
            "time_per_output_token_seconds", "Between one token and the next.", _TOKEN_BUCKETS
        )
        self._request_s = histogram(
            "e2e_request_latency_seconds", "From submission to the last token.", _REQUEST_BUCKETS
        )
        self._queue_s = histogram(
            "request_queue_time_seconds",
            "From submission to the step that admits it.",
            _FIRST_TOKEN_BUCKETS,
        )
        self._outcomes = counter("request_outcome", "Finished requests.", "finished_reason")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of admitted requests.", "key")
        self._generated_tokens = counter("generation_tokens", "Generated tokens.", "key")
        self._cache_queries = counter(
            "prefix_cache_queries", "Prompt tokens looked up in the cache."
        )
        self._cache_hits = counter("prefix_cache_hits", "Prompt tokens found in the cache.")
        self._disk_hits = counter(
            "prefix_cache_disk_hits", "Prompt tokens found in the cache and read from disk."
        )

    def _create_step_metrics(self) -> None:
        counter = self._counter
        self._steps = counter("measured_steps", "Decode steps that the ranks measured.")
        self._step_s = counter(
            "step_seconds", "Time of measured steps, mean over ranks.", "component"
        )
        self._rank_step_s = counter(
            "rank_step_seconds", "Time of measured steps of one rank.", "rank", "component"
        )
        self._activations = counter(
            "expert_activations", "Experts that a rank computed for tokens.", "layer", "rank"
        )
        self._load_imbalance = Summary(
            "cenacle_expert_load_imbalance_ratio",
            "Work of the busiest rank over the mean, per measured step and layer.",
            registry=self.registry,
        )
        self._sent_bytes = counter(
            "all_reduce_sent_bytes", "Bytes that a rank put into all-reduces.", "rank"
        )

    def render(self, accept: str) -> tuple[bytes, str]:
        """The metrics as text, and its media type, by a client's Accept header."""
        encode, media_type = choose_encoder(accept)
        with self._step_lock:
            return encode(self.registry), media_type

    def charge(self, key: str, tokens: int) -> None:
        """Charge tokens that no request to the group has; `key` is "" without a key."""
        if key:
            self._keys.charge(key, tokens)

    def usage_by_key(self) -> dict[str, KeyUsage]:
        """By the name of an API key ("" without one): what it has used since the start."""
        with self._lock:
            running = Tally(timer.key for timer in self._timers.values())
        tokens: dict[str, Tally[str]] = {key: Tally() for key in running}
        for counter, kind in (
            (self._prompt_tokens, "prompt"),
            (self._generated_tokens, "generated"),
        ):
            for sample in next(iter(counter.collect())).samples:
                if sample.name.endswith("_total"):
                    label = sample.labels["key"]
                    key = "" if label == NO_KEY_LABEL else label
                    tokens.setdefault(key, Tally())[kind] += int(sample.value)
        return {
            key: KeyUsage(running[key], counts["prompt"], counts["generated"])
            for key, counts in tokens.items()
        }

    # Called by `InstrumentedGroup`

    def on_submit(self, request: Request, traceparent: str = "") -> None:
        """Count a request that is about to be submitted."""
        timer = RequestTimer(request.key, len(request.tokens), time.perf_counter())
        with self._lock:
            self._timers[request.id] = timer
        if self.traces is not None:
            self.traces.on_submit(request, traceparent)

    def on_token(self, event: TokenEvent) -> None:
        """Count a token; called by the group's thread."""
        now = time.perf_counter()
        with self._lock:
            timer = self._timers.get(event.request_id)
        if timer is None:
            return
        if timer.last_token_at is None:
            self._first_token_s.observe(now - timer.submitted_at)
            self._cache_queries.inc(timer.prompt_tokens)
            self._cache_hits.inc(event.cached_tokens)
            self._disk_hits.inc(event.disk_tokens)
        else:
            self._token_s.observe(now - timer.last_token_at)
        timer.last_token_at = now
        if self.traces is not None:
            self.traces.on_token(event)
        self._generated_tokens.labels(timer.key_label).inc()
        if timer.key:
            self._keys.charge(timer.key, 1)
        if event.finish is not None:
            self.on_finish(event.request_id, event.finish)

    def on_finish(self, request_id: str, reason: str) -> None:
        """Count a request's outcome; only its first one counts."""
        with self._lock:
            timer = self._timers.pop(request_id, None)
        if timer is None:
            return
        self._outcomes.labels(reason).inc()
        if self.traces is not None:
            self.traces.on_finish(request_id, reason)
        if reason in ("stop", "length"):
            self._request_s.observe(time.perf_counter() - timer.submitted_at)

    def on_step_sent(self, step: Step) -> None:
        """Count the requests that a step admits."""
        for request in step.admitted:
            with self._lock:
                timer = self._timers.get(request.id)
            if timer is None or timer.admitted:  # admitted again after ranks were lost
                continue
            timer.admitted = True
            if self.traces is not None:
                self.traces.on_admitted(request.id)
            self._queue_s.observe(time.perf_counter() - timer.submitted_at)
            self._prompt_tokens.labels(timer.key_label).inc(timer.prompt_tokens)
            if timer.key:
                self._keys.charge(timer.key, timer.prompt_tokens)

    def on_step_measured(self, reports: Sequence[StepReport]) -> None:
        """Count a measured step, given the ranks' reports in rank order."""
        with self._step_lock:
            self._count_step(reports)

    def _count_step(self, reports: Sequence[StepReport]) -> None:
        for rank, report in enumerate(reports):
            sent, last = report.sent_bytes, self._last_sent_bytes.get(rank, 0)
            # Ranks that were restarted count from zero again.
            self._sent_bytes.labels(rank).inc(sent - last if sent >= last else sent)
            self._last_sent_bytes[rank] = sent
        timings = StepTimings()
        timings.add(reports)
        if not timings.steps:
            return
        self._steps.inc()
        if self.traces is not None:
            self.traces.on_step_measured(timings.per_token_ms())
        for component, ms in timings.per_token_ms().items():
            if component != "total":  # clocks of several threads can make "rest" negative
                self._step_s.labels(component).inc(max(0.0, ms) / 1000)
        for rank, rank_ms in enumerate(timings.per_rank_ms()):
            for component, ms in rank_ms.items():
                if component != "total":
                    self._rank_step_s.labels(rank, component).inc(max(0.0, ms) / 1000)
        if (model := self._model) is None:
            return
        plan = model.plan
        for layer in plan.layers:
            counts = timings.routed.get(layer.layer)
            if not counts:
                continue
            computed, work = rank_activations(layer, counts, plan)
            for rank, count in enumerate(computed):
                self._activations.labels(layer.layer, rank).inc(count)
            self._load_imbalance.observe(max(work) * len(work) / sum(work))


class ModelsMetrics:
    """Metrics of a server with several models: every series has a label `model`.

    Args:
        names: of the models.
        keys: tokens are charged to these.
        status: the present state of a model.
    """

    def __init__(
        self, names: Sequence[str], keys: KeyStore, status: Callable[[str], ModelStatus]
    ) -> None:
        self._models = {name: Metrics(keys) for name in names}
        self._status = status
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def of_model(self, name: str) -> Metrics:
        """Those of one model."""
        return self._models[name]

    def render(self, accept: str) -> tuple[bytes, str]:
        """See `Metrics.render`."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type

    def describe(self) -> list[Metric]:
        """Nothing: no name is taken twice."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The present values; called by the registry."""
        families: dict[str, Metric] = {}
        for model, metrics in self._models.items():
            for family in metrics.collect():
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                merged.samples += [
                    sample._replace(labels={**sample.labels, "model": model})
                    for sample in family.samples
                ]
        yield from families.values()
        rows = [(name, self._status(name)) for name in self._models]
        loaded = GaugeMetricFamily(
            "cenacle_model_loaded", "1 while the model is loaded.", labels=["model"]
        )
        loads = _model_counter("model_loads", "Number of times the model was loaded.")
        unloads = _model_counter("model_unloads", "Number of times the model was unloaded.")
        failures = _model_counter("model_load_failures", "Loads that failed, and groups that did.")
        for name, status in rows:
            loaded.add_metric([name], status.state == "loaded")
            loads.add_metric([name], status.loads)
            unloads.add_metric([name], status.unloads)
            failures.add_metric([name], status.load_failures)
        yield from (loaded, loads, unloads, failures)


def _model_counter(name: str, text: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"cenacle_{name}", text, labels=["model"])


def rank_activations(
    layer: LayerPlan, counts: dict[int, int], plan: Plan
) -> tuple[list[float], list[float]]:
    """What each rank computes in a layer.

    Args:
        counts: expert -> number of times it was chosen.

    Returns:
        By rank: how many experts it computed for tokens, where a slice counts as one; and its work
        in whole experts. Each of r replicas counts 1/r, as the ranks decide which one computes.
    """
    computed, work = [0.0] * plan.nodes, [0.0] * plan.nodes
    for expert, chosen in counts.items():
        parts = layer.experts[expert]
        for part in parts:
            replicas = sum((p.start, p.stop) == (part.start, part.stop) for p in parts)
            computed[part.rank] += chosen / replicas
            work[part.rank] += chosen / replicas * (part.stop - part.start) / plan.width
    return computed, work


class InstrumentedGroup:
    """A group for requests, with everything counted that happens to them.

    Args:
        group: generates.
        metrics: counts.
    """

    def __init__(self, group: RankGroup, metrics: Metrics) -> None:
        self._group, self._metrics = group, metrics

    def submit(self, request: Request, sink: Sink, traceparent: str = "") -> None:
        """As `RankGroup.submit`; `traceparent` is the header of that name of W3C Trace Context."""

        def counting_sink(event: GroupEvent) -> None:
            if isinstance(event, TokenEvent):
                self._metrics.on_token(event)
            elif isinstance(event, CenacleError):
                self._metrics.on_finish(request.id, "error")
            sink(event)

        self._metrics.on_submit(request, traceparent)
        try:
            self._group.submit(request, counting_sink)
        except CenacleError:
            self._metrics.on_finish(request.id, "refused")
            raise

    def cancel(self, request_id: str, reason: str = "abort") -> None:
        """As `RankGroup.cancel`, with the outcome to count: "abort", "stop" or "continued"."""
        self._group.cancel(request_id)
        self._metrics.on_finish(request_id, reason)


class StateCollector:
    """Metrics that are read when Prometheus asks for them."""

    def __init__(self, model: Model, plan_tracker: PlanTracker) -> None:
        self._model, self._plan_tracker = model, plan_tracker

    def collect(self) -> Iterator[Metric]:
        """The present values; called by the registry."""
        group = self._model.group
        load, state = group.load, group.state
        yield _gauge("num_requests_running", "Requests in the ranks' batch.", load["running"])
        yield _gauge("num_requests_waiting", "Requests not yet admitted.", load["waiting"])
        yield _gauge("up", "1 while the group works.", state.phase == "ok")
        yield CounterMetricFamily(
            "cenacle_recoveries", "Number of times the ranks were restarted.", state.recoveries
        )
        yield from self._draft_counters()
        info = self._plan_tracker.current
        labels = {"version": __version__, "model": self._model.name, "nodes": str(info.plan.nodes)}
        labels |= {"placement": info.plan.placement, "trunk": info.plan.trunk}
        yield InfoMetricFamily("cenacle", "The model that is served.", labels)
        if isinstance(info.prediction, SpeedPrediction):
            predicted = GaugeMetricFamily(
                "cenacle_predicted_step_seconds",
                "Time of a token by the performance model.",
                labels=["component"],
            )
            for component, ms in info.prediction.step_timings_ms.items():
                if component != "total":
                    predicted.add_metric([component], ms / 1000)
            yield predicted

    def _draft_counters(self) -> Iterator[Metric]:
        drafts = self._model.group.draft_stats
        yield _counter_by_source(
            "spec_decode_num_draft_tokens", "Drafted tokens.", drafts.drafted, drafts.by_model
        )
        yield _counter_by_source(
            "spec_decode_num_accepted_tokens",
            "Drafted tokens that the model confirmed.",
            drafts.accepted,
            drafts.by_model_accepted,
        )


def _counter_by_source(name: str, text: str, total: int, by_model: int) -> Metric:
    family = CounterMetricFamily(f"cenacle_{name}", text, labels=["source"])
    family.add_metric(["text"], total - by_model)
    family.add_metric(["model"], by_model)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"cenacle_{name}", text, value)
