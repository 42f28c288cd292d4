"""Traces of requests: spans and attributes, a client's own trace, a real collector's address."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cenacle.cli.early_checks import check_otlp_endpoint
from cenacle.core.request import Request, TokenEvent
from cenacle.errors import InputError

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cenacle.server.tracing import RequestTraces, export_to

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REQUEST = Request("r", (1, 2, 3), 8, key="alice")


def token(finish=None, request="r"):
    return TokenEvent(request, 5, finish=finish, cached_tokens=2)


def play(traces, traceparent=""):
    traces.on_submit(REQUEST, traceparent)
    traces.on_step_measured({"all_reduce": 100.0, "total": 200.0})  # of other requests
    traces.on_admitted("r")
    traces.on_token(token())
    for all_reduce_ms in (1.0, 3.0):
        traces.on_step_measured({"all_reduce": all_reduce_ms, "total": 10.0})
        traces.on_token(token())
    traces.on_finish("r", "stop")
    traces.on_finish("r", "abort")  # only the first outcome counts


def test_a_request_is_four_spans_without_text():
    exporter = InMemorySpanExporter()
    traces = RequestTraces("demo", SimpleSpanProcessor(exporter))
    play(traces, PARENT)
    traces.close()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert sorted(spans) == ["decode", "prefill", "queue", "request"]
    root = spans["request"]
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert dict(root.attributes) == {
        "gen_ai.request.model": "demo",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "cenacle.key": "alice",
    }
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent.span_id == root.context.span_id
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert spans["prefill"].attributes["cenacle.cached_tokens"] == 2
    assert dict(spans["decode"].attributes) == {
        "gen_ai.usage.output_tokens": 3,
        "cenacle.measured_steps": 2,
        "cenacle.all_reduce_ms_per_token": 2.0,
        "cenacle.total_ms_per_token": 10.0,
    }


@pytest.mark.parametrize("traceparent", ["", "nonsense", PARENT * 9, "00-0-0-01"])
def test_without_a_clients_trace_a_request_begins_its_own(traceparent):
    exporter = InMemorySpanExporter()
    traces = RequestTraces("demo", SimpleSpanProcessor(exporter))
    traces.on_submit(REQUEST, traceparent)
    traces.on_finish("r", "refused")
    traces.on_token(token())  # was on its way
    traces.on_admitted("r")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert sorted(spans) == ["queue", "request"]
    assert spans["request"].parent is None
    assert not spans["request"].status.is_ok


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_collector_gets_the_spans():
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        server.bodies = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        traces = RequestTraces("demo", export_to(f"http://127.0.0.1:{server.server_port}"))
        play(traces)
        traces.close()
        server.shutdown()
    ((path, body),) = server.bodies
    assert path == "/v1/traces"
    for text in (b"all_reduce_ms_per_token", b"gen_ai.usage.output_tokens", b"prefill", b"queue"):
        assert text in body


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "ftp://x", "http://", "grpc://x:1"])
def test_what_is_no_collectors_address_is_refused(url):
    with pytest.raises(InputError, match="--otlp-endpoint: expected http://HOST:PORT"):
        check_otlp_endpoint(url)
