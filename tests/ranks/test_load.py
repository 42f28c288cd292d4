"""`make load` and `make fuzz`, short."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *options: str) -> dict:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *options], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_many_clients_at_once():
    # Speed, memory and fairness are for `make load`: other tests may have the cores.
    result = run("load.py", "--seconds", "2", "--alone", "1", "--nodes", "2", "--report-only")
    assert result["requests"] > 5
    assert result["errors"] == {}
    assert result["checks"]["nothing_logged"]


def test_faulty_requests_and_what_the_description_allows():
    result = run("fuzz.py", "--bodies", "120", "--nodes", "2", "--schema", "1", "--seed", "3")
    assert sum(result["statuses"].values()) == 120
    assert result["statuses"]["200"] > 5  # faults that change nothing: the model was reached
    assert result["statuses"]["400"] > 60
