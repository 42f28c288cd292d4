"""Numbers of the server for Prometheus: GET /metrics.

Owns: the registry, what each number is made of, and charging tokens to keys.
Does not know: HTTP, text, how requests are answered.
Invariant: every name is defined by formula in `docs/metrics.md`; counting waits for nothing and
no text is in it; a request that was submitted has exactly one outcome.
Next: `engine/lockstep.py` says what happens; `answering.py` submits through `Metered`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from ..core.request import Request, TokenEvent
from ..core.step import Step
from ..errors import CenacleError
from ..ranks.rank_group import Group, Sink
from ..ranks.step_timings import Terms
from .auth import KeyStore
from .expected_speed import SpeedPrediction, predict_speed

if TYPE_CHECKING:
    from ..api import Model

disable_created_metrics()  # a second series for each, of when it began: nobody asks for it

NO_KEY_LABEL = "-"  # the label of requests without a key; no key has this name

_FIRST: tuple[float, ...] = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
)
_FIRST += (20, 40, 80, 160, 640)
_TOKEN: tuple[float, ...] = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
)
_TOKEN += (2.5, 5, 10)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


@dataclass
class RequestTimer:
    """A request that has no outcome yet; times by `time.perf_counter`."""

    key: str
    prompt_tokens: int
    submitted: float
    admitted: bool = False
    last: float | None = None


class Metrics:
    """All numbers of one server.

    Args:
        model: loaded; its group tells what happens from now on.
        keys: to which tokens are charged.
    """

    def __init__(self, model: Model, keys: KeyStore) -> None:
        self._model, self._keys = model, keys
        self._lock = threading.Lock()
        self._live: dict[str, RequestTimer] = {}
        self._sent_bytes: dict[int, int] = {}
        said = predict_speed(model.plan, model.config, model.name)
        self._predicted = said if isinstance(said, SpeedPrediction) else None
        self.registry = CollectorRegistry(auto_describe=True)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cenacle_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"cenacle_{name}", text, buckets=buckets, registry=self.registry)

        self._first = histogram(
            "time_to_first_token_seconds", "From submitting to the first token.", _FIRST
        )
        self._token = histogram(
            "time_per_output_token_seconds", "Between one token and the next.", _TOKEN
        )
        self._whole = histogram(
            "e2e_request_latency_seconds", "From submitting to the last token.", _WHOLE
        )
        self._queue = histogram(
            "request_queue_time_seconds", "From submitting to the step that admits.", _FIRST
        )
        self._outcome = counter("request_outcome", "Requests that ended.", "finished_reason")
        self._prompt = counter("prompt_tokens", "Prompt tokens of admitted requests.", "key")
        self._generated = counter("generation_tokens", "Generated tokens.", "key")
        self._queried = counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens that were in the cache.")
        self._disk_hits = counter(
            "prefix_cache_disk_hits", "Those of them that were read from disk first."
        )
        self._steps = counter("measured_steps", "Decode steps in which ranks took their clocks.")
        self._seconds = counter("step_seconds", "Of measured steps, mean over ranks.", "term")
        self._rank_seconds = counter("rank_step_seconds", "Of one rank.", "rank", "term")
        self._activations = counter(
            "expert_activations", "Experts that a rank computed for tokens.", "layer", "rank"
        )
        self._busiest = Summary(
            "cenacle_busiest_rank_ratio",
            "Work of the busiest rank over the mean, per measured step and layer.",
            registry=self.registry,
        )
        self._sent = counter("exchange_sent_bytes", "Bytes that a rank put into sums.", "rank")
        ProcessCollector(registry=self.registry)
        self.registry.register(StateCollector(model, self._predicted))
        model.group.observers.append(self)

    def page(self, accept: str) -> tuple[bytes, str]:
        """All numbers as text, and its media type, given what a client accepts."""
        encode, kind = choose_encoder(accept)
        return encode(self.registry), kind

    # What `Metered` tells

    def began(self, request: Request) -> None:
        """A request is about to be submitted."""
        live = RequestTimer(request.key, len(request.tokens), time.perf_counter())
        with self._lock:
            self._live[request.id] = live

    def token(self, event: TokenEvent) -> None:
        """A token came. Called by the group's thread."""
        now = time.perf_counter()
        with self._lock:
            live = self._live.get(event.request)
        if live is None:
            return
        if live.last is None:
            self._first.observe(now - live.submitted)
            self._queried.inc(live.prompt_tokens)
            self._hits.inc(event.cached)
            self._disk_hits.inc(event.read)
        else:
            self._token.observe(now - live.last)
        live.last = now
        self._generated.labels(live.key or NO_KEY_LABEL).inc()
        if live.key:
            self._keys.charge(live.key, 1)
        if event.finish is not None:
            self.ended(event.request, event.finish)

    def ended(self, request_id: str, reason: str) -> None:
        """A request has an outcome; those that come after it are nothing."""
        with self._lock:
            live = self._live.pop(request_id, None)
        if live is None:
            return
        self._outcome.labels(reason).inc()
        if reason in ("stop", "length"):
            self._whole.observe(time.perf_counter() - live.submitted)

    # What the group tells

    def sent(self, step: Step) -> None:
        """A step goes to the ranks; see `lockstep.Observer`."""
        for request in step.admitted:
            with self._lock:
                live = self._live.get(request.id)
            if live is None or live.admitted:  # admitted again after ranks were lost
                continue
            live.admitted = True
            self._queue.observe(time.perf_counter() - live.submitted)
            self._prompt.labels(live.key or NO_KEY_LABEL).inc(live.prompt_tokens)
            if live.key:
                self._keys.charge(live.key, live.prompt_tokens)

    def measured(self, reports: Sequence[dict[str, Any]]) -> None:
        """A measured step's reports, in rank order; see `lockstep.Observer`."""
        for rank, report in enumerate(reports):
            sent, before = report["sent_bytes"], self._sent_bytes.get(rank, 0)
            # Ranks that were started again count from nought.
            self._sent.labels(rank).inc(sent - before if sent >= before else sent)
            self._sent_bytes[rank] = sent
        step = Terms()
        step.add(reports)
        if not step.steps:
            return
        self._steps.inc()
        for term, ms in step.per_token_ms().items():
            if term != "total":  # clocks of several threads may make a rest of less than nothing
                self._seconds.labels(term).inc(max(0.0, ms) / 1000)
        for rank, own in enumerate(step.per_rank_ms()):
            for term, ms in own.items():
                if term != "total":
                    self._rank_seconds.labels(rank, term).inc(max(0.0, ms) / 1000)
        plan = self._model.plan
        for layer in plan.layers:
            counts = step.routed.get(layer.layer)
            if not counts:
                continue
            times, work = rank_activations(layer, counts, plan)
            for rank, many in enumerate(times):
                self._activations.labels(layer.layer, rank).inc(many)
            self._busiest.observe(max(work) * len(work) / sum(work))


def rank_activations(
    layer: LayerPlan, counts: dict[int, int], plan: Plan
) -> tuple[list[float], list[float]]:
    """What each rank does in a layer.

    Args:
        counts: expert -> times chosen.

    Returns:
        By rank: how many experts it computed for tokens, a slice counting as one; and the work,
        in whole experts. Each of r replicas is counted with 1/r: which one computes is decided on
        the ranks.
    """
    times, work = [0.0] * plan.nodes, [0.0] * plan.nodes
    for expert, chosen in counts.items():
        parts = layer.experts[expert]
        for part in parts:
            alike = sum((p.start, p.stop) == (part.start, part.stop) for p in parts)
            times[part.rank] += chosen / alike
            work[part.rank] += chosen / alike * (part.stop - part.start) / plan.width
    return times, work


class InstrumentedGroup:
    """The group as requests see it, with everything counted that happens to them.

    Args:
        group: generates.
        metrics: counts.
    """

    def __init__(self, group: Group, metrics: Metrics) -> None:
        self._group, self._metrics = group, metrics

    def submit(self, request: Request, sink: Sink) -> None:
        """As `Group.submit`."""

        def counting(event: TokenEvent | CenacleError) -> None:
            if isinstance(event, TokenEvent):
                self._metrics.token(event)
            else:
                self._metrics.ended(request.id, "error")
            sink(event)

        self._metrics.began(request)
        try:
            self._group.submit(request, counting)
        except CenacleError:
            self._metrics.ended(request.id, "refused")
            raise

    def cancel(self, request_id: str, reason: str = "abort") -> None:
        """As `Group.cancel`, for a reason: "stop", or "abort": nobody wants it any more."""
        self._group.cancel(request_id)
        self._metrics.ended(request_id, reason)


class StateCollector:
    """What is read when it is asked for."""

    def __init__(self, model: Model, foretold: SpeedPrediction | None) -> None:
        self._model, self._predicted = model, foretold

    def collect(self) -> Iterator[Metric]:
        """The gauges; called by the registry."""
        model, load = self._model, self._model.group.load

        def gauge(name: str, text: str, value: float) -> Metric:
            return GaugeMetricFamily(f"cenacle_{name}", text, value)

        yield gauge("num_requests_running", "Requests that ranks work on.", load["running"])
        yield gauge("num_requests_waiting", "Requests not yet admitted.", load["waiting"])
        state = model.group.state
        yield gauge("up", "1 while the group works.", state.phase == "ok")
        yield CounterMetricFamily(
            "cenacle_recoveries", "How often ranks were started again.", state.recoveries
        )
        drafts = model.group.drafts
        drafted = CounterMetricFamily(
            "cenacle_spec_decode_num_draft_tokens", "Tokens that were drafted.", labels=["source"]
        )
        accepted = CounterMetricFamily(
            "cenacle_spec_decode_num_accepted_tokens",
            "Drafted tokens that the model agreed with.",
            labels=["source"],
        )
        drafted.add_metric(["text"], drafts.drafted - drafts.by_model)
        drafted.add_metric(["model"], drafts.by_model)
        accepted.add_metric(["text"], drafts.accepted - drafts.by_model_accepted)
        accepted.add_metric(["model"], drafts.by_model_accepted)
        yield drafted
        yield accepted
        facts = {"version": __version__, "model": model.name, "nodes": str(model.plan.nodes)}
        facts |= {"placement": model.plan.placement, "trunk": model.plan.trunk}
        yield InfoMetricFamily("cenacle", "What is served.", facts)
        if self._predicted is not None:
            terms = GaugeMetricFamily(
                "cenacle_predicted_step_seconds",
                "The performance model's terms of a token.",
                labels=["term"],
            )
            for term, ms in self._predicted.terms_ms.items():
                if term != "total":
                    terms.add_metric([term], ms / 1000)
            yield terms
