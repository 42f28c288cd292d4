"""A cluster that serves the demo model on the hosts of `namespaces.py`, and its clients.

Tests use it, and the benchmarks that inject faults (`host_faults.py`).
"""

import contextlib
import http.client
import json
import re
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cenacle
from cenacle.cluster import client
from cenacle.cluster.messages import Query
from cenacle.cluster.security import identity as identities
from cenacle.errors import CenacleError
from namespaces import Host, Network, enter_namespace, run_in_namespace, wait_until

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
END = json.loads((DEMO / "config.json").read_text())["eos_token_id"]
SUM = "What is 12 + 30?"
CONTROL, API = 4747, 8080
UP, JOIN, WORKER = "cenacle up", "cenacle join", "cenacle.ranks.worker"
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 60}
JSON = {"Content-Type": "application/json"}


def chat_body(question: str = SUM, tokens: int | None = None, **more: Any) -> dict[str, Any]:
    """A greedy request; with `tokens` the answer has exactly that many."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, **more}
    return body if tokens is None else body | {"max_tokens": tokens, "logit_bias": {str(END): -100}}


class Cluster:
    """Host `a` is the head, `b` and `c` join it, others are strangers. Each of the three has the
    model in a different folder."""

    def __init__(self, folder: Path, letters: str = "abc") -> None:
        self.network = Network(letters, folder)
        self.a, self.b, self.c, *self.others = self.network.hosts
        self.members = (self.a, self.b, self.c)
        self.token = ""
        for host, place in zip(self.members, ("here", "models", "other/place"), strict=True):
            shutil.copytree(DEMO, host.folder / place / "answers")

    def up(self, *more: str) -> str:
        """Start the head; the line that it prints for the others."""
        return start_head(
            self.a, "here/answers", "-n", "3", "--port", str(API), "--name", "a", *more
        )

    def join(self, host: Host, *more: str) -> None:
        """Start the agent of a host."""
        host.start("join", *more, "--name", host.letter)

    def start(self) -> None:
        """Start the head and both agents, and wait until the group answers."""
        line = self.up().split()
        self.token = line[3]
        for host, place in ((self.b, "models"), (self.c, "other/place")):
            self.join(host, *line[1:], "--models", place)
            wait_until(
                lambda h=host: f"{h.letter} is in the cluster" in h.log.read_text(), host.letter
            )
        self.wait_until_healthy()

    def close(self) -> None:
        """End all programs, and remove the hosts."""
        self.network.close()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """One request to the API, from the head's host; status 0: nobody listens."""
        return run_in_namespace(self.a.name, lambda: call(path, body))

    def answer(self, question: str = SUM, **more: Any) -> str:
        status, answer = self.ask("/v1/chat/completions", chat_body(question, **more))
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"]

    def wait_until_healthy(self) -> dict[str, Any]:
        """Wait until /health is ok; returns it."""

        def ok() -> dict[str, Any] | None:
            status, health = self.ask("/health")
            return health if status == 200 and health.get("status") == "ok" else None

        return wait_until(ok, f"a group that works; {self.logs()}", 120)

    def status(self, host: Host) -> dict[str, Any]:
        """Output of `cenacle status --json` on a host."""
        done = host.run("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes by name, according to the head; empty if there is no head."""
        identity = identities.Identity(self.a.folder / ".config/cenacle/cluster", identities.HEAD)
        try:
            status = run_in_namespace(
                self.a.name,
                lambda: client.query_head(identity, "127.0.0.1", CONTROL, Query("status")),
            )
        except CenacleError:
            return {}
        return {n["name"]: n for n in status["nodes"]}

    def standing(self) -> Counter[tuple[str, ...]]:
        """Programs, listening ports and temporary files of the members, counted."""
        found: Counter[tuple[str, ...]] = Counter()
        for host in self.members:
            for kind in (UP, JOIN, WORKER):
                found[host.letter, "process", kind] += len(host.pids(kind))
            for address, port in host.listening():
                found[host.letter, "port", f"{address}:{port}"] += 1
            for path in host.temporary_dir.iterdir():
                found[host.letter, "file", path.name] += 1
        return +found

    def logs(self) -> str:
        return "".join(
            f"\n== {h.letter}\n{h.log.read_text()}" for h in self.network.hosts if h.log.exists()
        )


def start_head(host: Host, *words: str) -> str:
    """Start a head on a host; returns the line that it prints for the others."""
    before = len(host.log.read_text()) if host.log.exists() else 0
    host.start("up", *words)
    found = wait_until(
        lambda: re.search(r"cenacle (join .*)\n", host.log.read_text()[before:]),
        "the line for other machines",
    )
    return found.group(1)


def call(
    path: str, body: dict[str, Any] | None = None, timeout: float = 60
) -> tuple[int, dict[str, Any]]:
    """One request to the API from the namespace that this thread is in; status 0: nobody listens,
    or it broke off."""
    connection = http.client.HTTPConnection("127.0.0.1", API, timeout=timeout)
    try:
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, content, JSON)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        return 0, {"error": repr(error)}
    finally:
        connection.close()


class Streaming:
    """A long streamed answer with the times of its pieces; `last` is the last event.

    Args:
        cluster: of which it is asked.
        tokens: at most so many.
        path: OpenAI's chat, or Anthropic's messages: that answer is a list of numbers.
        temperature: above 0 the text does not repeat itself, so drafts do not end it early.
    """

    def __init__(
        self, cluster: Cluster, tokens: int = 200, path: str = CHAT, temperature: float = 0.0
    ) -> None:
        self.text, self.times = "", []
        self.error, self.truncated = "", False  # what the server said; whether it broke off
        self._host = cluster.a.name
        self.last: dict[str, Any] = {}
        self._path = path
        self._body = chat_body(tokens=tokens, stream=True, temperature=temperature)
        if path == MESSAGES:
            del self._body["logit_bias"]
            form = {"format": {"type": "json_schema", "schema": NUMBERS}}
            self._body |= {"model": "answers", "output_config": form}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        enter_namespace(self._host)
        connection = http.client.HTTPConnection("127.0.0.1", API, timeout=90)
        done = False
        try:
            connection.request("POST", self._path, json.dumps(self._body), JSON)
            answer = connection.getresponse()
            if answer.status != 200:
                self.error = f"status {answer.status}: {answer.read().decode()}"
            for line in answer:
                done = done or line.startswith((b"data: [DONE]", b"event: message_stop"))
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]))
        except (OSError, http.client.HTTPException):
            done = False
        finally:
            connection.close()
        self.truncated = not done and not self.error

    def _take(self, event: dict[str, Any]) -> None:
        self.last = event
        if "error" in event:
            self.error = event["error"]["message"]
        for choice in event.get("choices", [event] if "delta" in event else ()):
            self.text += choice["delta"].get("content") or choice["delta"].get("text") or ""
            self.times.append(time.monotonic())

    def wait_for_start(self) -> "Streaming":
        wait_until(lambda: len(self.times) > 20 or self.over, "the first pieces")
        return self

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, seconds: float = 90) -> bool:
        """Whether it has ended, with or without success, within this time."""
        self._thread.join(seconds)
        return self.over

    def end(self, seconds: float = 90) -> str:
        assert self.wait(seconds), "the stream did not end"
        assert not self.error, self.error
        assert not self.truncated, "the stream broke off"
        return self.text

    @property
    def longest_pause_s(self) -> float:
        gaps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return max(gaps, default=0.0)


class Health:
    """Polls /health, and records what changes and when."""

    def __init__(self, cluster: Cluster, every_s: float = 0.05) -> None:
        self.changes: list[tuple[float, int, dict[str, Any]]] = []
        self._host, self._every_s = cluster.a.name, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        enter_namespace(self._host)
        last: tuple[Any, ...] | None = None
        while not self._ended.wait(self._every_s):
            status, body = call("/health", timeout=5)
            latest = (status, *(body.get(k) for k in ("status", "nodes", "recoveries")))
            if latest != last:
                last = latest
                self.changes.append((time.monotonic(), status, body))

    @property
    def latest(self) -> tuple[int, dict[str, Any]]:
        """The last status and body."""
        return self.changes[-1][1:] if self.changes else (0, {})

    @property
    def complete(self) -> bool:
        """Whether all three nodes take part."""
        status, body = self.latest
        return status == 200 and body.get("nodes") == 3

    def since(self, began: float) -> list[tuple[float, int, dict[str, Any]]]:
        """Changes after a time of `time.monotonic`."""
        return [change for change in list(self.changes) if change[0] > began]

    def close(self) -> None:
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            self._thread.join(10)
