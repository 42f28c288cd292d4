"""What is done to the ranks of a `cenacle serve` on one machine, and what its clients see.

Owns: the faults, the server and the clients, and looking at one fault from its beginning until the
group answers again. Three clients stream meanwhile (greedy, drawn with a seed, drawn with
penalties), and a fourth asks when the ranks are gone already.
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

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
ENDS = json.loads((DEMO / "generation_config.json").read_text())["eos_token_id"]
GROUPS = Path("/sys/fs/cgroup/memory")
TOKENS = 200
HIT_AFTER = 15  # tokens that the first client has when the fault comes


def body(question: str, **how: Any) -> dict[str, Any]:
    """A request whose answer goes on for `TOKENS` tokens."""
    endless = {str(end): -100 for end in ENDS}
    messages = [{"role": "user", "content": question}]
    asked = {"messages": messages, "max_tokens": TOKENS, "logit_bias": endless, "temperature": 0}
    return {**asked, **how, "stream": True}


ASKED = (
    body("What is 12 + 30?"),
    body("Who are you?", temperature=0.8, seed=5),
    body("What is 7 + 8?", temperature=0.8, seed=6, presence_penalty=0.5),
)


class Client(threading.Thread):
    """Streams one answer; `text`, `times` of its pieces, and `error` if it did not end well."""

    def __init__(self, url: str, asked: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.text, self.error = "", ""
        self.times: list[float] = []
        self._url, self._asked = url, asked
        self.start()

    def run(self) -> None:
        """Read until the end, whatever it is."""
        try:
            with httpx.stream("POST", self._url, json=self._asked, timeout=60) as answer:
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
    """A `cenacle serve` of the demo model, and every process that it has had."""

    def __init__(self, nodes: int, folder: Path) -> None:
        self.temporary, log = folder / "tmp", folder / "log"
        self.temporary.mkdir(exist_ok=True)
        command = ["serve", "-m", str(DEMO), "-n", str(nodes), "--port", "0"]
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("cenacle"), *command],
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )
        self.seen: set[int] = set()
        self.url = self._where(log)
        self.pids()

    def _where(self, log: Path) -> str:
        ends = time.monotonic() + 60
        while time.monotonic() < ends and self.process.poll() is None:
            if found := re.search(r"http://\S+", log.read_text()):
                return found.group()
            time.sleep(0.05)
        raise SystemExit(f"the server did not start: {log.read_text()}")

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /health; (0, {}) if there is no answer."""
        try:
            answer = httpx.get(f"{self.url}/health", timeout=5)
            return answer.status_code, answer.json()
        except httpx.HTTPError:
            return 0, {}

    def pids(self) -> list[int]:
        """Of the present ranks."""
        pids = [rank["pid"] for rank in self.health()[1].get("ranks", ())]
        self.seen.update(pids)
        return pids

    def left(self, pids: Iterable[int]) -> int:
        """How many of these processes live, and temporary files with them; of a server that has
        just ended all will go in a moment."""

        def gone() -> bool:
            return not any(map(alive, pids)) and not any(self.temporary.iterdir())

        if wait_for(gone, 10) is not None:
            return 0
        return sum(map(alive, pids)) + len(list(self.temporary.iterdir()))

    def ask(self, asked: dict[str, Any]) -> Client:
        """Begin to stream an answer."""
        return Client(f"{self.url}/v1/chat/completions", asked)

    def undisturbed(self) -> list[str]:
        """What `ASKED` is answered when nothing happens."""
        clients = [self.ask(asked) for asked in ASKED]
        for client in clients:
            client.join()
        return [client.text for client in clients]

    def close(self) -> None:
        """End it, gently if it can still hear."""
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def alive(pid: int) -> bool:
    """Whether a process runs, or is stopped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_for(condition: Callable[[], bool], seconds: float) -> float | None:
    """Seconds until it was so; None: it was not."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            return None
        time.sleep(0.01)
    return time.monotonic() - began


@contextlib.contextmanager
def starved(pid: int) -> Iterator[None]:
    """A control group in which the process gets no more memory: the kernel ends it (as root)."""
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


# The faults: each is given the server, does its worst, and may wait and do more.


def kill(*ranks: int) -> Callable[[Server], None]:
    """SIGKILL these ranks; negative ones count from the last."""

    def do(server: Server) -> None:
        pids = server.pids()
        for rank in ranks:
            os.kill(pids[rank], signal.SIGKILL)

    return do


def stop(server: Server) -> None:
    """SIGSTOP: the process is there and says nothing."""
    os.kill(server.pids()[-1], signal.SIGSTOP)


def pause(server: Server) -> None:
    """SIGSTOP for two seconds: shorter than the deadline."""
    pid = server.pids()[-1]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2)
    os.kill(pid, signal.SIGCONT)


def kill_twice(server: Server) -> None:
    """SIGKILL a rank, and one of those that are being started in its place."""
    old = set(server.pids())
    os.kill(min(old), signal.SIGKILL)

    def young() -> list[int]:
        text = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
        found = {int(pid) for pid in text.split()} - old
        for task in Path(f"/proc/{server.process.pid}/task").iterdir():
            found |= {int(pid) for pid in (task / "children").read_text().split()} - old
        return sorted(pid for pid in found if alive(pid))

    wait_for(lambda: bool(young()), 10)
    time.sleep(0.5)
    for pid in young()[:1]:
        server.seen.add(pid)
        os.kill(pid, signal.SIGKILL)


def starve(server: Server) -> None:
    """No more memory for a rank that is given long prompts."""
    pid = server.pids()[-1]
    with starved(pid):
        for repeats in (60, 80, 100, 120):  # what is free in the process is used up at some time
            client = server.ask(body("12 + 30? " * repeats, max_tokens=2, n=8))
            client.join(60)
            if client.error or not alive(pid):
                break


def kill_front(server: Server) -> None:
    """SIGKILL the server itself: nobody is left to tell anybody."""
    server.pids()
    server.process.kill()
    server.process.wait()


def end_while_recovering(server: Server) -> None:
    """SIGTERM while ranks are being started."""
    os.kill(server.pids()[0], signal.SIGKILL)
    wait_for(lambda: server.health()[0] == 503, 10)
    server.process.terminate()
    server.process.wait(20)


@dataclass(frozen=True)
class Row:
    """One fault. `recovers`: the group ends and is formed again; `idle`: nobody is being answered;
    `ends`: the server is ended, only what it leaves behind counts; `says`: a part of the reason."""

    do: Callable[[Server], None]
    recovers: bool = True
    idle: bool = False
    ends: bool = False
    says: str = ""


ROWS = {
    "local-kill-first": Row(kill(0)),
    "local-kill-last": Row(kill(-1)),
    "local-kill-two": Row(kill(0, -1)),
    "local-kill-twice": Row(kill_twice),
    "local-kill-idle": Row(kill(-1), idle=True),
    "local-stop": Row(stop),
    "local-stop-idle": Row(stop, idle=True),
    "local-stop-2s": Row(pause, recovers=False),
    "local-no-memory": Row(starve, says="ran out of memory"),
    "local-end-recovering": Row(end_while_recovering, ends=True),
    "local-kill-server": Row(kill_front, ends=True),
}


def why_not(name: str) -> str | None:
    """Why a row cannot be run here; None: it can."""
    if ROWS[name].do is starve and not os.access(GROUPS, os.W_OK):
        return "this process cannot make control groups of memory"
    return None


def once(server: Server, row: Row, undisturbed: list[str], found: FaultRecord) -> None:
    """Do a row's fault to a working server, and note what follows."""
    old, recoveries = server.pids(), server.health()[1]["recoveries"]
    clients = [] if row.idle else [server.ask(asked) for asked in ASKED]
    if clients and wait_for(lambda: len(clients[0].times) >= HIT_AFTER, 30) is None:
        found.wrong.append(f"no answer to disturb: {clients[0].error}")
    began = time.monotonic()
    doing = threading.Thread(target=row.do, args=(server,))
    doing.start()
    if row.ends:
        doing.join()
        found.left += server.left(server.seen)
        found.recovered_s.append(time.monotonic() - began)
        return
    if row.recovers:
        if wait_for(lambda: server.health()[0] != 200, 12) is None:
            found.wrong.append("the fault was not noticed")
        else:
            found.detected_s.append(time.monotonic() - began)
            if row.says not in (reason := server.health()[1].get("reason", "")):
                found.wrong.append(f"expected {row.says!r} as the reason, got {reason!r}")
    clients.append(server.ask(ASKED[0]))
    doing.join()
    if wait_for(lambda: server.health()[0] == 200, 40) is None:
        found.wrong.append(f"no recovery: {server.health()[1]}")
    elif row.recovers:
        found.recovered_s.append(time.monotonic() - began)
    due = [*([] if row.idle else undisturbed), undisturbed[0]]
    for client, expected in zip(clients, due, strict=True):
        client.join(60)
        found.answers += 1
        found.lost += bool(client.error) or client.is_alive()
        found.other += not client.error and client.text != expected
        if client.error:
            found.wrong.append(client.error)
        gaps = [b - a for a, b in itertools.pairwise(client.times)]
        found.pause_s.append(max(gaps, default=0.0))
    if row.recovers:
        found.left += server.left(old)
    elif server.health()[1]["recoveries"] != recoveries:
        found.wrong.append("the group was ended without need")
    server.pids()
