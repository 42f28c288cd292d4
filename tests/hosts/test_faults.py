"""Faults of `make faults` that no other test has, each once, on a cluster of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from namespaces import unavailable_reason

FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults.py"
ROWS = ("stop-rank", "stop-agent", "link-3s")
UNAVAILABLE = unavailable_reason()


@pytest.mark.skipif(
    UNAVAILABLE is not None, reason=f"FAULTS OF HOSTS ARE NOT TESTED: {UNAVAILABLE}"
)
def test_faults_cost_no_answer():
    command = [sys.executable, str(FAULTS), "--times", "1", "--longest", "8"]
    done = subprocess.run(
        [*command, "--rows", ",".join(ROWS)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert set(found) == set(ROWS)
    assert all(row["answers"] and not row["lost"] for row in found.values())
