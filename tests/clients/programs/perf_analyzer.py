"""Stands in for genai-perf's perf_analyzer, whose binaries need glibc 2.38.

Sends the bodies that genai-perf wrote, one after another, and writes what genai-perf reads.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import httpx


def send(http: httpx.Client, path: str, body: Any) -> dict[str, Any]:
    """One request in the form of perf_analyzer's export; times in nanoseconds."""
    begin = time.time_ns()
    timestamps, outputs = [], []
    with http.stream("POST", path, json=body) as answer:
        assert answer.is_success, answer.read()
        for line in answer.iter_lines():
            if line:
                timestamps.append(time.time_ns())
                outputs.append({"response": line})
    return {
        "timestamp": begin,
        "request_inputs": {"payload": json.dumps(body)},
        "response_timestamps": timestamps,
        "response_outputs": outputs,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ("-u", "--endpoint", "--input-data", "--profile-export-file"):
        parser.add_argument(option, required=True)
    options, _ = parser.parse_known_args()
    entries = json.loads(Path(options.input_data).read_text())["data"]
    with httpx.Client(base_url=options.u, timeout=300, trust_env=False) as http:
        requests = [send(http, f"/{options.endpoint}", entry["payload"][0]) for entry in entries]
    experiment = {
        "experiment": {"mode": "concurrency", "value": 1},
        "requests": requests,
        "window_boundaries": [requests[0]["timestamp"], time.time_ns()],
    }
    report = {
        "version": "0",
        "service_kind": "openai",
        "endpoint": options.endpoint,
        "experiments": [experiment],
    }
    Path(options.profile_export_file).write_text(json.dumps(report))


main()
