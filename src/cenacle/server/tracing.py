"""OpenTelemetry traces of requests.

Owns: the spans of a request and their attributes; sending them to a collector.
Does not know: HTTP requests, text, how tokens are generated. A span has no text of a request.
Invariant: told by the threads of the group and of the server, it never waits: spans are sent by a
thread of the SDK, and dropped if the collector does not take them.
Next: `metrics.py` tells it what happens. Names of attributes are those of OpenTelemetry's semantic
conventions for generative AI, or begin with "cenacle.".

    request   from submission to the last token
    ├── queue     until the step that admits it
    ├── prefill   until its first token
    └── decode    until its last token; the time of its all-reduces is an attribute

A request that changes its grammar midway, or is resumed after a failure, has a span for each
submission to the group, or goes on as before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import context, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .. import __version__
from ..core.request import Request, TokenEvent
from ..logs import RepeatedLineFilter

EXPORT_TIMEOUT_S = 5.0  # of one batch
CLOSE_TIMEOUT_MS = 2000  # for what has not been sent when the server ends
MAX_TRACEPARENT_CHARACTERS = 100


@dataclass
class _OpenTrace:
    """A request without an outcome yet."""

    span: trace.Span
    parent: context.Context
    phase: trace.Span
    tokens: int = 0
    steps: int = 0  # that were measured while it decoded
    step_ms: dict[str, float] = field(default_factory=dict)  # their sums


class RequestTraces:
    """Makes the spans of one server's requests. Close it to send the last ones.

    Args:
        model: its name.
        processor: gets the spans.
    """

    def __init__(self, model: str, processor: SpanProcessor) -> None:
        resource = Resource.create({"service.name": "cenacle", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("cenacle", __version__)
        self._model, self._lock = model, threading.Lock()
        self._open: dict[str, _OpenTrace] = {}

    def close(self) -> None:
        """Send what has not been sent, within two seconds."""
        sender = threading.Thread(target=self._provider.shutdown, daemon=True)
        sender.start()
        sender.join(CLOSE_TIMEOUT_MS / 1000)

    def on_submit(self, request: Request, traceparent: str = "") -> None:
        """Begin the trace of a request.

        Args:
            traceparent: header of W3C Trace Context, for a trace that a client has begun.
        """
        caller = context.Context()
        if len(traceparent) <= MAX_TRACEPARENT_CHARACTERS:
            carrier = {"traceparent": traceparent}
            caller = TraceContextTextMapPropagator().extract(carrier, caller)
        attributes: dict[str, Any] = {
            "gen_ai.request.model": self._model,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.usage.input_tokens": len(request.tokens),
        }
        if request.key:
            attributes["cenacle.key"] = request.key
        span = self._tracer.start_span(
            "request", caller, kind=trace.SpanKind.SERVER, attributes=attributes
        )
        parent = trace.set_span_in_context(span, context.Context())
        queue = self._tracer.start_span("queue", parent)
        with self._lock:
            self._open[request.id] = _OpenTrace(span, parent, queue)

    def on_admitted(self, request_id: str) -> None:
        """The request is in the ranks' batch."""
        if (opened := self._get(request_id)) is not None:
            self._begin(opened, "prefill")

    def on_token(self, event: TokenEvent) -> None:
        """A token has come."""
        if (opened := self._get(event.request_id)) is None:
            return
        if opened.tokens == 0:
            opened.phase.set_attribute("cenacle.cached_tokens", event.cached_tokens)
            self._begin(opened, "decode")
        opened.tokens += 1

    def on_step_measured(self, per_token_ms: Mapping[str, float]) -> None:
        """A decode step was measured: its time counts for every request that decodes.

        Args:
            per_token_ms: see `StepTimings.per_token_ms`.
        """
        with self._lock:
            decoding = [opened for opened in self._open.values() if opened.tokens]
        for opened in decoding:
            opened.steps += 1
            for name, ms in per_token_ms.items():
                opened.step_ms[name] = opened.step_ms.get(name, 0.0) + ms

    def on_finish(self, request_id: str, reason: str) -> None:
        """The request has an outcome; see `Metrics.on_finish`."""
        with self._lock:
            opened = self._open.pop(request_id, None)
        if opened is None:
            return
        if opened.tokens:
            opened.phase.set_attribute("gen_ai.usage.output_tokens", opened.tokens)
            opened.phase.set_attribute("cenacle.measured_steps", opened.steps)
            for name, ms in opened.step_ms.items():
                key = f"cenacle.{name}_ms_per_token"
                opened.phase.set_attribute(key, round(ms / opened.steps, 4))
        opened.phase.end()
        opened.span.set_attribute("gen_ai.usage.output_tokens", opened.tokens)
        opened.span.set_attribute("gen_ai.response.finish_reasons", [reason])
        if reason in ("error", "refused"):
            opened.span.set_status(trace.StatusCode.ERROR, reason)
        opened.span.end()

    def _get(self, request_id: str) -> _OpenTrace | None:
        with self._lock:
            return self._open.get(request_id)

    def _begin(self, opened: _OpenTrace, phase: str) -> None:
        """End the phase of a request, and begin the next one at the same time."""
        now_ns = time.time_ns()
        opened.phase.end(now_ns)
        opened.phase = self._tracer.start_span(phase, opened.parent, start_time=now_ns)


def export_to(endpoint: str) -> SpanProcessor:
    """What sends spans to a collector, as OTLP over HTTP.

    Args:
        endpoint: http://HOST:PORT, where /v1/traces is added, or a URL with a path.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    # It warns of every attempt.
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)
    logging.getLogger(OTLPSpanExporter.__module__).addFilter(RepeatedLineFilter())
    path = urlsplit(endpoint).path.strip("/")
    url = endpoint if path else f"{endpoint.rstrip('/')}/v1/traces"
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=EXPORT_TIMEOUT_S))
