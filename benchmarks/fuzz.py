"""HTTP requests with one to three faults, to every path that takes a body: `make fuzz`.

They are made from the server's own description (`fuzz_requests.py`) and sent over several
connections at once to `cenacle serve`. None may give 5xx, a traceback in the log, an answer that is
no JSON, or end a process; a second process asks /health all the time. Good requests are
sent at the end, and must be answered. `--schema` also lets schemathesis make requests. The last
line of stdout is JSON; exit status 1 if something is not so. How fast /health was is reported and
sets no exit status: a busy machine makes it slow.

    python benchmarks/fuzz.py --bodies 100000 --nodes 2
    python benchmarks/fuzz.py --first 4711 --bodies 1        # one of them again
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from fuzz_requests import FuzzRequest, RequestMaker
from serving import RunningServer, run_server

CONNECTIONS = 8
COVERAGE_EXAMPLES = 10
ANSWER_S = 120.0  # the machine may be busy
HEALTH_INTERVAL_S = 0.02
MAX_EXAMPLES = 20
MAX_RESPONSE_BYTES = 1 << 26
MAX_MEMORY_BYTES = 4 << 30


@dataclass
class Answer:
    """What came; `status` 0: the connection was closed."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Outcome:
    """What came of all requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    wrong_count: int = 0
    slowest: list[tuple[float, str]] = field(default_factory=list)

    def add_wrong(self, text: str) -> None:
        """Count what must not be, and keep the first."""
        self.wrong_count += 1
        if len(self.wrong) < MAX_EXAMPLES:
            self.wrong.append(text)


class Connection:
    """A connection that says exactly what it is told, as no HTTP client does."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, data: bytes, *, is_head: bool, leave: bool) -> Answer:
        """Send, and read the answer; `leave`: close our side after sending."""
        is_new = self._stream is None
        if self._stream is None:
            self._stream = await asyncio.open_connection(*self._address, limit=MAX_RESPONSE_BYTES)
        reader, writer = self._stream
        answer = Answer(0)
        try:
            with suppress(OSError):  # it may answer, and close, before it has read all
                writer.write(data)
                await writer.drain()
                if leave:
                    writer.write_eof()
            answer = await self._read(reader, is_head)
        except (ConnectionError, asyncio.IncompleteReadError):
            if not is_new:  # the server may have closed it before this request
                self.close()
                return await self.ask(data, is_head=is_head, leave=leave)
        if leave or not answer.status or answer.headers.get("connection") == "close":
            self.close()
        return answer

    async def _read(self, reader: asyncio.StreamReader, is_head: bool) -> Answer:
        while True:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(lines[0].split()[1])
            if status != 100:
                break
        headers = {}
        for line in filter(None, lines[1:]):
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip().lower()
        if is_head or status in (204, 304):
            return Answer(status, headers)
        if headers.get("transfer-encoding") != "chunked":
            size = headers.get("content-length")
            body = await (reader.readexactly(int(size)) if size is not None else reader.read())
            return Answer(status, headers, body)
        pieces = []
        while size_ := int(await reader.readline(), 16):
            pieces.append(await reader.readexactly(size_))
            await reader.readexactly(2)
        await reader.readexactly(2)
        return Answer(status, headers, b"".join(pieces))

    def close(self) -> None:
        """Close it; the next request opens another."""
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None


def judge(request: FuzzRequest, answer: Answer) -> str:
    """What is wrong about an answer; "": nothing."""
    if answer.status == 0:
        return "" if request.breaks_http else "the connection was closed"
    if answer.status >= 500 or answer.status < 200:
        return f"status {answer.status}"
    if request.breaks_http and (answer.status == 400 or request.method in ("HEAD", "GET")):
        return ""  # a page of its own for what is no HTTP; GET has other answers than JSON
    if answer.status in (204, 304) or (answer.status == 200 and request.method == "OPTIONS"):
        return ""
    try:
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            return judge_events(answer.body)
        body = json.loads(answer.body, parse_constant=_refuse)
    except ValueError as error:
        return f"status {answer.status}, and no JSON: {error}"
    if answer.status >= 400 and "error" not in body:
        return f"status {answer.status} without an error"
    return ""


def judge_events(body: bytes) -> str:
    """The same for a stream, which may end with an error of the server."""
    for line in body.decode().split("\n"):
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        event = json.loads(data, parse_constant=_refuse)
        error = event.get("error") or (event.get("response") or {}).get("error")
        if error is not None and error.get("type") != "invalid_request_error":
            return f"an error in a stream: {error}"
    return ""


def _refuse(name: str) -> Any:
    raise ValueError(name)


async def fuzz(
    server: RunningServer, maker: RequestMaker, numbers: range, outcome: Outcome
) -> None:
    """Send them, over some connections at once."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    rest = iter(numbers)
    done, began = 0, time.monotonic()

    async def send_some() -> None:
        nonlocal done
        connection = Connection(host, int(port))
        for number in rest:
            request = maker.make(number)
            started = time.monotonic()
            try:
                data = request.encode()
                asked = connection.ask(data, is_head=request.method == "HEAD", leave=request.leave)
                answer = await asyncio.wait_for(asked, ANSWER_S)
                problem = judge(request, answer)
            except TimeoutError:
                answer, problem = Answer(0), f"no answer in {ANSWER_S:g} s"
                connection.close()
            except (OSError, ValueError, IndexError) as error:
                answer, problem = Answer(0), f"{type(error).__name__}: {error}"
                connection.close()
            took = time.monotonic() - started, describe(number, request)
            outcome.slowest = sorted([*outcome.slowest, took], reverse=True)[:MAX_EXAMPLES]
            outcome.statuses[str(answer.status or "closed")] += 1
            outcome.faults.update(fault.partition(" at ")[0] for fault in request.faults)
            if problem:
                outcome.add_wrong(f"{describe(number, request)}: {problem}: {answer.body[:300]!r}")
            done += 1
            if done % 2000 == 0:
                rate = done / (time.monotonic() - began)
                print(f"{done} requests, {rate:.0f}/s, {dict(outcome.statuses)}", flush=True)
        connection.close()

    await asyncio.gather(*(send_some() for _ in range(CONNECTIONS)))


def describe(number: int, request: FuzzRequest) -> str:
    """A request, for a line of output."""
    return f"request {number} {request.method[:20]} {request.path} {request.faults}"


async def send_good(server: RunningServer, maker: RequestMaker, outcome: Outcome) -> None:
    """Requests without faults: each path must take one of the first that are made for it."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection, missing = Connection(host, int(port)), set(maker.paths)
    for number in range(-400, 0):
        request = maker.make(number, faults=0)
        if request.path in missing:
            answer = await asyncio.wait_for(
                connection.ask(request.encode(), is_head=False, leave=False), ANSWER_S
            )
            if problem := judge(request, answer):
                outcome.add_wrong(f"{describe(number, request)}: {problem}: {answer.body[:300]!r}")
            if answer.status == 200:
                missing.discard(request.path)
    for path in sorted(missing):
        outcome.add_wrong(f"{path}: no good request was answered")
    connection.close()


# ---- The second process: /health --------------------------------------------------------------


def watch_health(url: str) -> None:
    """Ask until stdin ends; print what was seen as JSON.

    Each pause shows the machine, too: how much longer than asked for a sleep takes.
    """
    address = url.removeprefix("http://")
    took_ms, late_ms, failures = [], [], 0
    connection = http.client.HTTPConnection(address, timeout=60)
    is_over = False
    while not is_over:  # once at least
        is_over = bool(select.select([sys.stdin], [], [], 0)[0])
        began = time.perf_counter()
        time.sleep(HEALTH_INTERVAL_S)
        late_ms.append(1000 * (time.perf_counter() - began - HEALTH_INTERVAL_S))
        began = time.perf_counter()
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            response.read()
            failures += response.status != 200
        except (OSError, http.client.HTTPException):
            connection.close()
            failures += 1
        took_ms.append(1000 * (time.perf_counter() - began))
    print(
        json.dumps(
            {"failures": failures, "ms": summary(took_ms), "sleep_late_ms": summary(late_ms)}
        )
    )


def summary(values: list[float]) -> dict[str, float]:
    """Quantiles."""
    values = sorted(values)
    quantiles = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    found = {
        n: round(values[min(len(values) - 1, int(q * len(values)))], 1)
        for n, q in quantiles.items()
    }
    return {"count": len(values), **found, "over_100": sum(value > 100 for value in values)}


def schema(url: str, examples: int, seed: int) -> tuple[bool, str]:
    """Let schemathesis ask what /openapi.json describes: whether nothing was 5xx; what it said."""
    program = str(Path(sys.executable).with_name("schemathesis"))
    command = [program, "run", f"{url}/openapi.json", "--checks", "not_a_server_error"]
    # "coverage" makes thousands of requests, whatever the number of examples.
    phases = "examples,coverage,fuzzing" if examples >= COVERAGE_EXAMPLES else "examples,fuzzing"
    command += ["--max-examples", str(examples), "--seed", str(seed), "--phases", phases]
    command += ["--no-color", "--request-timeout", "60"]
    # One worker: in Python 3.11 threads that parse code at once fail with a SystemError.
    command += ["--continue-on-failure", "--suppress-health-check", "all", "--workers", "1"]
    with tempfile.TemporaryDirectory() as folder:  # it leaves its notes where it runs
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def run(args: argparse.Namespace) -> int:
    """Start a server, send everything, print what came of it."""
    outcome, numbers = Outcome(), range(args.first, args.first + args.bodies)
    load = [os.getloadavg()[0]]
    with run_server(args.nodes) as server:
        before = httpx.get(f"{server.url}/health", timeout=60).json()
        description = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
        maker = RequestMaker(description, args.seed, server.url.removeprefix("http://"))
        # The bodies are made here: a mistake in that shall not take the machine's memory.
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        command = [sys.executable, __file__, "--watch", server.url]
        watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        began = time.monotonic()
        try:
            asyncio.run(fuzz(server, maker, numbers, outcome))
            took_s = time.monotonic() - began
            health = json.loads(watcher.communicate(timeout=120)[0])
        finally:
            watcher.kill()
        asyncio.run(send_good(server, maker, outcome))
        schema_fine, schema_text = True, ""
        if args.schema:
            schema_fine, schema_text = schema(server.url, args.schema, args.seed)
        after = httpx.get(f"{server.url}/health", timeout=60).json()
        log = server.log.read_text()
    load.append(os.getloadavg()[0])
    checks = {
        "answers": not outcome.wrong_count,
        "schema_no_5xx": schema_fine,
        "health": not health["failures"] and after["status"] == "ok",
        "processes": all(before[n] == after[n] for n in ("pid", "ranks", "restarts", "recoveries")),
        "nothing_logged": "Traceback" not in log and "error" not in log,
    }
    for seconds, text in outcome.slowest:
        print(f"{seconds:.1f} s: {text}")
    print("\n".join(outcome.wrong))
    print("" if schema_fine else schema_text)
    print("" if checks["nothing_logged"] else f"{log[:6000]}\n...\n{log[-3000:]}")
    result = {
        "bodies": len(numbers),
        "first": args.first,
        "seed": args.seed,
        "nodes": args.nodes,
        "seconds": round(took_s),
        "statuses": dict(sorted(outcome.statuses.items())),
        "faults": dict(outcome.faults.most_common()),
        "wrong": outcome.wrong_count,
        "slowest_s": round(outcome.slowest[0][0], 1) if outcome.slowest else None,
        "health": health,
        "load_average": [round(x, 1) for x in load],
        "restarts": after["restarts"] - before["restarts"],
        "recoveries": after["recoveries"] - before["recoveries"],
        "tracebacks": log.count("Traceback"),
        "checks": checks,
    }
    print(json.dumps(result))
    return 0 if all(checks.values()) else 1


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--schema", type=int, default=0, help="examples per operation; 0: none")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watch:
        watch_health(args.watch)
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
