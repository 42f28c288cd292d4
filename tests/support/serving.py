"""Runs `cenacle serve` as users do."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import cenacle
from cenacle import net
from support.http import HTTP

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
DEADLINE_S = 120.0  # for anything to happen on a busy machine
QUESTION: Any = [{"role": "user", "content": "What is 12 + 30?"}]


@dataclass
class RunningServer:
    """A server, its process and its log."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return HTTP.post(f"{self.url}{path}", json=body, headers=headers)

    def ask(self, **parameters: Any) -> httpx.Response:
        """A short chat completion: the demo model answers 42."""
        body = {"messages": QUESTION, "temperature": 0, "max_tokens": 8, **parameters}
        return self.post("/v1/chat/completions", body)

    def health(self) -> dict[str, Any]:
        return HTTP.get(f"{self.url}/health").json()


def wait_for_health(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    ends = time.monotonic() + DEADLINE_S
    while True:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            if HTTP.get(f"{url}/health").status_code == 200:
                return
        assert time.monotonic() < ends, log.read_text()
        time.sleep(0.05)


@contextlib.contextmanager
def running_server(
    folder: Path, *options: str, model: Path | None = DEMO, nodes: int = 1
) -> Iterator[RunningServer]:
    """`cenacle serve` on a free port of loopback until it answers; `folder` gets the log. Without
    `model` the options name models."""
    port, log = net.free_ports(1)[0], folder / "server.log"
    command = [sys.executable, "-m", "cenacle", "serve", "-n", str(nodes)]
    command += ["-m", str(model)] if model is not None else []
    command += ["--port", str(port), *options]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=errors, stderr=errors, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for_health(url, process, log)
            yield RunningServer(url, process, log)
        finally:
            process.terminate()
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
