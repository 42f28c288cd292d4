"""A server of the demo model for `load.py` and `fuzz.py`, started as `cenacle serve` starts it.

Owns: the server's process, a key store of its own, and the resource usage of its processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import cenacle
from cenacle.server.auth import KeyStore

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
START_S = 90.0


@dataclass(frozen=True)
class ResourceUsage:
    """Resident bytes of the server and of all its ranks together, and open files of all."""

    server_bytes: int
    ranks_bytes: int
    files: int


@dataclass
class RunningServer:
    """A server's address, its processes and its keys by name."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    pid: int = 0  # of the process that answers; `process` supervises it
    ranks: list[int] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    def resource_usage(self) -> ResourceUsage:
        """What its processes use now (Linux)."""
        pids = [self.pid, *self.ranks]
        server, *ranks = (_resident_bytes(pid) for pid in pids)
        files = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
        return ResourceUsage(server, sum(ranks), files)


@contextlib.contextmanager
def run_server(nodes: int, names: tuple[str, ...] = (), *options: str) -> Iterator[RunningServer]:
    """Start a server with a key for each name; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="cenacle-load-") as home:
        with contextlib.closing(KeyStore(Path(home) / "keys.db")) as key_store:
            keys = {name: key_store.add(name) for name in names}
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        command = [sys.executable, "-m", "cenacle", "serve", "-m", str(DEMO)]
        command += ["-n", str(nodes), "--port", str(port), *options]
        log = Path(home) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, env={**os.environ, "CENACLE_HOME": home}, stderr=errors
            )
        running = RunningServer(f"http://127.0.0.1:{port}", process, log, keys=keys)
        try:
            health = _wait_until_ready(running)
            running.pid = health["pid"]
            running.ranks = [r["pid"] for r in health["ranks"]]
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            finally:
                process.kill()


def _wait_until_ready(running: RunningServer) -> dict[str, Any]:
    headers = {"x-api-key": next(iter(running.keys.values()), "-")}
    ends = time.monotonic() + START_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            # The socket listens before the model is loaded, and then waits.
            return dict(httpx.get(f"{running.url}/health", headers=headers, timeout=START_S).json())
        if running.process.poll() is not None or time.monotonic() > ends:
            raise SystemExit(f"the server did not start: {running.log.read_text()}")
        time.sleep(0.1)


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
