"""Faults of the ranks of a `cenacle serve` on one machine, and what its clients see.

Owns: the faults, the server and its clients, and observing a fault until the group answers again.
Three clients stream meanwhile (greedy, sampled with a seed, sampled with penalties), and a fourth
starts after the ranks are gone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import cenacle
from fault_record import FaultRecord

# `httpx.get` reads the certificates of the system at each call: 58 ms of a processor.
HTTP = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))
DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
ENDS = json.loads((DEMO / "generation_config.json").read_text())["eos_token_id"]
GROUPS = Path("/sys/fs/cgroup/memory")
TOKENS = 200
FAULT_AFTER_TOKENS = 15  # of the first client


def body(question: str, **how: Any) -> dict[str, Any]:
    """A streamed request whose answer has exactly `TOKENS` tokens."""
    endless = {str(end): -100 for end in ENDS}
    messages = [{"role": "user", "content": question}]
    request = {"messages": messages, "max_tokens": TOKENS, "logit_bias": endless, "temperature": 0}
    return {**request, **how, "stream": True}


REQUESTS = (
    body("What is 12 + 30?"),
    body("Who are you?", temperature=0.8, seed=5),
    body("What is 7 + 8?", temperature=0.8, seed=6, presence_penalty=0.5),
)


class Client(threading.Thread):
    """Streams one answer: `text`, `times` of its pieces, and `error` if it failed."""

    def __init__(self, url: str, request: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.text, self.error = "", ""
        self.times: list[float] = []
        self._url, self._request = url, request
        self.start()

    def run(self) -> None:
        """Read until the answer ends or fails."""
        try:
            with HTTP.stream("POST", self._url, json=self._request, timeout=60) as answer:
                if answer.status_code != 200:
                    self.error = f"status {answer.status_code}: {answer.read().decode()}"
                    return
                done = False
                for line in answer.iter_lines():
                    done = done or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
                if not done:
                    self.error = self.error or "the stream was cut"
        except httpx.HTTPError as error:
            self.error = repr(error)

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = chunk["error"]["message"]
        for choice in chunk.get("choices", ()):
            self.text += choice["delta"].get("content") or ""
            self.times.append(time.monotonic())


class Server:
    """A `cenacle serve` of the demo model, and the ids of all its ranks so far."""

    def __init__(self, nodes: int, folder: Path) -> None:
        self.temporary_dir, log = folder / "tmp", folder / "log"
        self.temporary_dir.mkdir(exist_ok=True)
        command = ["serve", "-m", str(DEMO), "-n", str(nodes), "--port", "0"]
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("cenacle"), *command],
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "TMPDIR": str(self.temporary_dir)},
        )
        self.all_pids: set[int] = set()
        self.url = self._where(log)
        self.pids()

    def _where(self, log: Path) -> str:
        ends = time.monotonic() + 60
        while time.monotonic() < ends and self.process.poll() is None:
            if record := re.search(r"http://\S+", log.read_text()):
                return record.group()
            time.sleep(0.05)
        raise SystemExit(f"the server did not start: {log.read_text()}")

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /health; (0, {}) if there is no answer."""
        try:
            answer = HTTP.get(f"{self.url}/health", timeout=5)
            return answer.status_code, answer.json()
        except httpx.HTTPError:
            return 0, {}

    def pids(self) -> list[int]:
        """Process ids of the current ranks."""
        pids = [rank["pid"] for rank in self.health()[1].get("ranks", ())]
        self.all_pids.update(pids)
        return pids

    def left(self, pids: Iterable[int]) -> int:
        """Number of these processes that are still alive, and of temporary files, after a short
        wait."""

        def gone() -> bool:
            return not any(map(alive, pids)) and not any(self.temporary_dir.iterdir())

        if wait_for(gone, 10) is not None:
            return 0
        return sum(map(alive, pids)) + len(list(self.temporary_dir.iterdir()))

    def ask(self, request: dict[str, Any]) -> Client:
        """Start to stream an answer."""
        return Client(f"{self.url}/v1/chat/completions", request)

    def undisturbed(self) -> list[str]:
        """The answers to `REQUESTS` without a fault."""
        clients = [self.ask(request) for request in REQUESTS]
        for client in clients:
            client.join()
        return [client.text for client in clients]

    def close(self) -> None:
        """End the server, by SIGTERM if it still reacts."""
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def alive(pid: int) -> bool:
    """Whether a process runs or is stopped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_for(condition: Callable[[], bool], seconds: float) -> float | None:
    """Seconds until the condition was true; None: it was not in time."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            return None
        time.sleep(0.01)
    return time.monotonic() - began


@contextlib.contextmanager
def starved(pid: int) -> Iterator[None]:
    """A control group in which the kernel gives a process no more memory and ends it (as root)."""
    group = GROUPS / f"cenacle-faults-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text("4096")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        if alive(pid):
            (GROUPS / "cgroup.procs").write_text(str(pid))
        wait_for(lambda: not (group / "cgroup.procs").read_text().split(), 20)
        group.rmdir()


# The faults.


def kill(*ranks: int) -> Callable[[Server], None]:
    """SIGKILL to these ranks; negative numbers count from the last."""

    def do(server: Server) -> None:
        pids = server.pids()
        for rank in ranks:
            os.kill(pids[rank], signal.SIGKILL)

    return do


def stop(server: Server) -> None:
    """SIGSTOP: the process exists and is silent."""
    os.kill(server.pids()[-1], signal.SIGSTOP)


def pause(server: Server) -> None:
    """SIGSTOP for two seconds, less than the timeout."""
    pid = server.pids()[-1]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2)
    os.kill(pid, signal.SIGCONT)


def kill_twice(server: Server) -> None:
    """SIGKILL to a rank, and to one of those that are started in its place."""
    ranks, serving = server.pids(), server.health()[1]["pid"]

    def children() -> set[int]:
        tasks = Path(f"/proc/{serving}/task").iterdir()
        return {int(p) for task in tasks for p in (task / "children").read_text().split()}

    old = children()  # besides ranks, the process that tokenizes
    os.kill(min(ranks), signal.SIGKILL)

    def young() -> list[int]:
        return sorted(pid for pid in children() - old if alive(pid))

    wait_for(lambda: bool(young()), 10)
    time.sleep(0.5)
    for pid in young()[:1]:
        server.all_pids.add(pid)
        os.kill(pid, signal.SIGKILL)


def starve(server: Server) -> None:
    """Give no more memory to a rank while it processes long prompts."""
    pid = server.pids()[-1]
    with starved(pid):
        for repeats in (60, 80, 100, 120):  # until the memory that the process has is used up
            client = server.ask(body("12 + 30? " * repeats, max_tokens=2, n=8))
            client.join(60)
            if client.error or not alive(pid):
                break


def kill_server(server: Server) -> None:
    """SIGKILL to the server itself."""
    server.pids()
    server.process.kill()
    server.process.wait()


def end_while_recovering(server: Server) -> None:
    """SIGTERM to the server while ranks are started."""
    os.kill(server.pids()[0], signal.SIGKILL)
    wait_for(lambda: server.health()[0] == 503, 10)
    server.process.terminate()
    server.process.wait(20)


@dataclass(frozen=True)
class Row:
    """A fault.

    Args:
        inject: injects it.
        recovers: the group is ended and re-formed.
        idle: no request runs.
        ends: the server is ended; only what it leaves behind counts.
        reason: part of the reason in /health.
    """

    inject: Callable[[Server], None]
    recovers: bool = True
    idle: bool = False
    ends: bool = False
    reason: str = ""


ROWS = {
    "local-kill-first": Row(kill(0)),
    "local-kill-last": Row(kill(-1)),
    "local-kill-two": Row(kill(0, -1)),
    "local-kill-twice": Row(kill_twice),
    "local-kill-idle": Row(kill(-1), idle=True),
    "local-stop": Row(stop),
    "local-stop-idle": Row(stop, idle=True),
    "local-stop-2s": Row(pause, recovers=False),
    "local-no-memory": Row(starve, reason="ran out of memory"),
    "local-end-recovering": Row(end_while_recovering, ends=True),
    "local-kill-server": Row(kill_server, ends=True),
}


def unavailable_reason(name: str) -> str | None:
    """Why a row cannot run here; None: it can."""
    if ROWS[name].inject is starve and not os.access(GROUPS, os.W_OK):
        return "this process cannot make control groups of memory"
    return None


def run(server: Server, row: Row, undisturbed: list[str], record: FaultRecord) -> None:
    """Inject a fault into a working server, and record what follows."""
    old, recoveries = server.pids(), server.health()[1]["recoveries"]
    clients = [] if row.idle else [server.ask(request) for request in REQUESTS]
    if clients and wait_for(lambda: len(clients[0].times) >= FAULT_AFTER_TOKENS, 30) is None:
        record.wrong.append(f"no answer to disturb: {clients[0].error}")
    began = time.monotonic()
    doing = threading.Thread(target=row.inject, args=(server,))
    doing.start()
    if row.ends:
        doing.join()
        record.left += server.left(server.all_pids)
        record.recovered_s.append(time.monotonic() - began)
        return
    if row.recovers:
        if wait_for(lambda: server.health()[0] != 200, 12) is None:
            record.wrong.append("the fault was not noticed")
        else:
            record.detected_s.append(time.monotonic() - began)
            if row.reason not in (reason := server.health()[1].get("reason", "")):
                record.wrong.append(f"expected {row.reason!r} as the reason, got {reason!r}")
    clients.append(server.ask(REQUESTS[0]))
    doing.join()
    if wait_for(lambda: server.health()[0] == 200, 40) is None:
        record.wrong.append(f"no recovery: {server.health()[1]}")
    elif row.recovers:
        record.recovered_s.append(time.monotonic() - began)
    due = [*([] if row.idle else undisturbed), undisturbed[0]]
    for client, expected in zip(clients, due, strict=True):
        client.join(60)
        record.answers += 1
        record.lost += bool(client.error) or client.is_alive()
        record.other += not client.error and client.text != expected
        if client.error:
            record.wrong.append(client.error)
        gaps = [b - a for a, b in itertools.pairwise(client.times)]
        record.pause_s.append(max(gaps, default=0.0))
    if row.recovers:
        record.left += server.left(old)
    elif server.health()[1]["recoveries"] != recoveries:
        record.wrong.append("the group was ended unnecessarily")
    server.pids()
