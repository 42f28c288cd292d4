"""What `cenacle serve` says on a terminal, and the form of its log."""

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cenacle.cli import greeting
from cenacle.logs import JsonFormatter
from cenacle.server.expected_speed import SpeedPrediction

URL = "http://127.0.0.1:8080"
MODEL = SimpleNamespace(
    name="demo", plan=None, config={}, spec=SimpleNamespace(context_length=32768)
)


@pytest.mark.parametrize("needs_key", [False, True])
@pytest.mark.parametrize("columns", [40, 100])
def test_the_greeting_tells_what_is_needed_next(needs_key, columns, monkeypatch):
    predicted = SpeedPrediction({"total": 26.0}, 38.46, "M3 Ultra; link Thunderbolt 5")
    monkeypatch.setattr(greeting, "predict_speed", lambda *_: predicted)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = greeting.compose_greeting(MODEL, URL, needs_key, None)
    text = " ".join(" ".join(lines).split())
    assert f"page {URL}/" in text
    assert f"OPENAI_BASE_URL={URL}/v1 OPENAI_API_KEY={'KEY' if needs_key else 'none'}" in text
    assert f"ANTHROPIC_BASE_URL={URL} ANTHROPIC_API_KEY=" in text
    assert ("`cenacle keys add NAME`" in text) == needs_key
    assert "about 38.5 tokens/s for one request (M3 Ultra; link Thunderbolt 5)" in text
    assert "32,768 tokens" in text
    assert all(len(line) <= columns or URL in line for line in lines), lines


def test_without_a_prediction_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(greeting, "predict_speed", lambda *_: "run `cenacle calibrate`")
    lines = greeting.compose_greeting(MODEL, URL, False, None)
    assert any("not predicted: run `cenacle calibrate`" in line for line in lines)


def test_a_line_of_json_has_its_fields_and_stays_one_line():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "a\n%s", ("\x1b",), None)
    record.fields = {"status": 200}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    body = json.loads(line)
    assert body.pop("time").endswith("Z")
    assert body == {"level": "warning", "source": "x", "message": "a\n\x1b", "status": 200}


def test_errors_and_reports_are_json_too():
    program = """
from cenacle.cli.inference import use_log_format
from cenacle.cli.console import print_error, report
import logging
use_log_format("json")
report("serving"); print_error("no"); logging.getLogger("cenacle.x").warning("rank %d", 1)
logging.getLogger("cenacle.x").info("not for owners")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["level"], line["message"]) for line in lines] == [
        ("info", "serving"),
        ("error", "no"),
        ("warning", "rank 1"),
    ]
