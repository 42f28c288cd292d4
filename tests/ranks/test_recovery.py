"""A rank fails in the middle of an answer, and the answer goes on where it was.

Real processes, the demo model; what is streamed is compared with what the same group gave
undisturbed. `tests/unit/test_lockstep.py` has what only ranks that are out of their minds do.
"""

import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import mlx.core as mx
import openai
import pytest
from test_server import END, SUM, Server, server

import cenacle
from cenacle.api import Model
from cenacle.core.request import Request, Sampling
from cenacle.load_options import LoadOptions
from cenacle.model.checkpoint import Checkpoint
from cenacle.ranks.local_ranks import WORKER_COMMAND, LocalRanks
from cenacle.ranks.ranks import Epoch
from cenacle.runtime import Deployment
from support.http import HTTP

HERE = Path(__file__).parent
OTHER_ROUTER = HERE / "other_router_rank.py"
FAULTS = HERE.parent.parent / "benchmarks" / "faults.py"
MIXTRAL = HERE.parent / "vectors" / "mixtral"
DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
QUESTIONS = ("What is 12 + 30?", "Who are you? Tell me more.", "What is 7 + 8?")
LENGTH = 60
DICE = {"temperature": 0.8, "seed": 11}


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition, seconds: float, what: str) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - began


@contextmanager
def loaded(nodes: int, **how: Any) -> Iterator[Model]:
    model = cenacle.load(str(DEMO), nodes, latency_s=0.002, **how)
    pids = [*model.ranks.pids]
    try:
        yield model
    finally:
        model.close()
        wait_until(lambda: not any(map(alive, pids + model.ranks.pids)), 60, "the ranks' end")


def never_ending(model: Model, question: str, **sampling: Any) -> Request:
    """A request whose answer has `LENGTH` tokens, whatever they are."""
    return replace(model.request(question, LENGTH, Sampling(**sampling)), stop_tokens=())


def make_requests(model: Model) -> list[Request]:
    return [
        *(never_ending(model, question) for question in QUESTIONS[:2]),
        never_ending(model, QUESTIONS[2], **DICE),
        never_ending(model, QUESTIONS[1], repetition_penalty=1.3, **DICE),
    ]


class Client:
    """Reads one stream in a thread of its own."""

    def __init__(self, model: Model, request: Request) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self.error: Exception | None = None
        self._stream = model._stream(request, ())
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for chunk in self._stream:
                self.tokens.append(chunk.token)
                self.times.append(time.monotonic())
                self.text += chunk.text
        except cenacle.CenacleError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive(), "the stream does not end"
        if self.error is not None:
            raise self.error


@pytest.fixture(scope="module")
def group() -> Iterator[tuple[Model, list[str]]]:
    """A group, which every test leaves working, and what it answers undisturbed."""
    with loaded(3) as model:
        yield model, answers(model)


def answers(model: Model) -> list[str]:
    clients = [Client(model, request) for request in make_requests(model)]
    for client in clients:
        client.join()
    return [client.text for client in clients]


@pytest.mark.parametrize(("fault", "noticed_s"), [("SIGKILL", 1.5), ("SIGSTOP", 5)])
def test_answers_go_on_where_they_were(group, fault, noticed_s):
    model, undisturbed = group
    clients = [Client(model, request) for request in make_requests(model)]
    wait_until(lambda: all(len(c.tokens) >= 5 for c in clients), 60, "some tokens")
    before, pids = model.group.state, model.ranks.pids
    victim = len(pids) - 1
    os.kill(pids[victim], getattr(signal, fault))
    wait_until(lambda: model.group.state.phase == "recovering", noticed_s, "the loss is noticed")
    state = model.group.state
    assert state.rank == victim, state.reason
    assert f"rank {victim}" in state.reason
    late = Client(model, never_ending(model, QUESTIONS[0]))  # it waits, rather than fail
    wait_until(lambda: model.group.state.phase == "ok", 60, "recovery")
    assert (model.group.state.epoch, model.group.state.recoveries) == (
        before.epoch + 1,
        before.recoveries + 1,
    )
    for client in [*clients, late]:
        client.join()
    assert [c.text for c in clients] == undisturbed
    assert late.text == undisturbed[0]
    assert [len(c.tokens) for c in clients] == [LENGTH] * len(clients)
    assert not any(map(alive, pids)), "the old ranks are gone"
    assert model.group.load == {"running": 0, "waiting": 0}


def test_a_rank_that_routes_otherwise_is_replaced_and_nobody_notices():
    plan = cenacle.inspect(str(MIXTRAL), 2)
    options = LoadOptions(str(MIXTRAL), 2, kernels="mlx")
    deployment = Deployment(
        options, "mixtral", Checkpoint.open(MIXTRAL), None, None, plan, "no reason"
    )

    class Source:
        def start(self, epoch: Epoch, report: object = None) -> LocalRanks:
            program = WORKER_COMMAND if epoch.number else (sys.executable, str(OTHER_ROUTER))
            ranks = LocalRanks(2, program=program, epoch=epoch)
            ranks.load(deployment.load_order(), report)
            return ranks

    group = deployment.start(Source())
    ranks = group.ranks
    try:
        recorded = mx.load(str(MIXTRAL / "vectors.safetensors"))
        model = Model(deployment, group)
        prompt, expected = (recorded[f"prompt_7.{what}"].tolist() for what in ("tokens", "greedy"))
        assert model.generate(prompt, len(expected)).tokens == expected
        assert "chose other experts" in group.state.reason
        assert group.state.recoveries == 1
    finally:
        group.close()
        assert not any(map(alive, [*ranks.pids, *model.ranks.pids]))


def test_what_the_clients_of_a_server_see():
    """`benchmarks/faults.py`, each of some faults once; it compares the texts."""
    rows = (
        "local-kill-twice",
        "local-no-memory",
        "local-end-recovering",
        "local-kill-server",
    )
    command = [sys.executable, str(FAULTS), "--times", "1", "--rows", ",".join(rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["rows"]
    if set(found) != set(rows):
        warnings.warn(f"not all rows were run: {done.stdout}", stacklevel=1)
    assert sum(row["answers"] for row in found.values()) >= 5


# What a request may ask, over HTTP: each stream goes on as it would have

NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
LONG = {"type": "array", "items": NUMBER, "minItems": 40, "maxItems": 40}
SHAPE: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": LONG, "strict": True}}
ENDLESS: dict[str, Any] = {"logit_bias": {str(END): -100}, "max_tokens": 100}
REQUEST_OPTIONS: dict[str, dict[str, Any]] = {
    "a grammar": {"response_format": SHAPE, "temperature": 0},
    "a grammar, drawn": {"response_format": SHAPE, "temperature": 0.9, "seed": 3},
    "log-probabilities": {**ENDLESS, "temperature": 0, "logprobs": True, "top_logprobs": 3},
    "two answers, drawn": {**ENDLESS, "n": 2, "temperature": 0.8, "seed": 5, "top_p": 0.9},
    "Anthropic's": {"output_config": {"format": {"type": "json_schema", "schema": LONG}}},
}
HANGS_UP_S = 5.0  # clients and proxies do when nothing comes: sooner than recovery from SIGSTOP


class Streaming(threading.Thread):
    """One stream, read by the API's own client; `output`: all of it but the times."""

    def __init__(self, served: Server, name: str) -> None:
        super().__init__(daemon=True)
        self.times: list[float] = []
        self.output: dict[Any, Any] = {}
        self.logprobs: list[float] = []
        self.error: Exception | None = None
        self._read = self._anthropic if "output_config" in REQUEST_OPTIONS[name] else self._openai
        self._served, self._options = served, REQUEST_OPTIONS[name]
        self.start()

    def run(self) -> None:
        try:
            self._read(self._served)
        except Exception as error:
            self.error = error

    def _openai(self, served: Server) -> None:
        with openai.OpenAI(
            base_url=f"{served.url}/v1", api_key="-", max_retries=0, timeout=HANGS_UP_S
        ) as client:
            for chunk in client.chat.completions.create(
                **{"model": "demo_model", "messages": SUM, "stream": True},
                stream_options={"include_usage": True},
                **self._options,
            ):
                self.times.append(time.monotonic())
                if chunk.usage is not None:
                    self.output["counts"] = chunk.usage.completion_tokens, chunk.usage.prompt_tokens
                for choice in chunk.choices:
                    self._add(choice.index, choice.delta.content or "")
                    if choice.finish_reason:
                        self.output["finish", choice.index] = choice.finish_reason
                    for token in (choice.logprobs and choice.logprobs.content) or ():
                        self._add("tokens", [token.token, *(t.token for t in token.top_logprobs)])
                        self.logprobs += [token.logprob, *(t.logprob for t in token.top_logprobs)]

    def _anthropic(self, served: Server) -> None:
        with anthropic.Anthropic(
            base_url=served.url, api_key="-", max_retries=0, timeout=HANGS_UP_S
        ) as client:
            for event in client.messages.create(
                **{"model": "demo_model", "messages": SUM, "stream": True, "max_tokens": 150},
                extra_body={"temperature": 0, **self._options},
            ):
                self.times.append(time.monotonic())
                if event.type == "content_block_delta" and event.delta.type == "text_delta":
                    self._add(0, event.delta.text)
                if event.type == "message_delta":
                    self.output["end"] = event.delta.stop_reason, event.usage.output_tokens

    def _add(self, what: Any, more: Any) -> None:
        self.output[what] = self.output.get(what, type(more)()) + more

    def result(self) -> dict[Any, Any]:
        self.join(300)
        assert not self.is_alive(), "the stream does not end"
        if self.error is not None:
            raise self.error
        return self.output

    @property
    def pause_s(self) -> float:
        return max(b - a for a, b in itertools.pairwise(self.times))


class Watching(threading.Thread):
    """A stream as it is, to see what clients do not show."""

    def __init__(self, served: Server) -> None:
        super().__init__(daemon=True)
        self.times: list[float] = []
        self.lines: list[str] = []
        self._url = f"{served.url}/v1/chat/completions"
        self.start()

    def run(self) -> None:
        body = {"messages": SUM, "temperature": 0, "stream": True, **ENDLESS}
        with HTTP.stream("POST", self._url, json=body, timeout=HANGS_UP_S) as answer:
            for line in answer.iter_lines():
                self.lines.append(line)
                if line.startswith("data: "):
                    self.times.append(time.monotonic())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("served") / "log"
    with server(log, 2, "recover", "always") as running:
        yield running
        assert "Traceback" not in log.read_text()


def pids_of(served: Server) -> list[int]:
    return [rank["pid"] for rank in served.health()[1]["ranks"]]


def recovers(
    served: Server, streams: Sequence[Streaming | Watching], fault: Callable[[], None]
) -> str:
    """Why the group was formed anew after a fault in the middle of these."""
    wait_until(lambda: all(len(s.times) > 8 for s in streams), 60, "some tokens")
    assert all(s.is_alive() for s in streams), "the answers are too short to be disturbed"
    fault()
    wait_until(lambda: served.health()[0] == 503, 60, "the loss is noticed")
    reason: str = served.health()[1].get("reason", "")
    wait_until(lambda: served.health()[0] == 200, 60, "recovery")
    return reason


def test_whatever_was_asked_goes_on_and_no_client_hangs_up(served: Server) -> None:
    """All at once, beside one another; while nobody answers each stream gives signs of life."""
    undisturbed = {name: Streaming(served, name) for name in REQUEST_OPTIONS}
    for name, stream in undisturbed.items():
        assert stream.result(), name
    disturbed = {name: Streaming(served, name) for name in REQUEST_OPTIONS}
    wait_until(lambda: all(s.times for s in disturbed.values()), 60, "their first tokens")
    watching = Watching(served)
    pid = pids_of(served)[1]
    streams = [*disturbed.values(), watching]
    reason = recovers(served, streams, lambda: os.kill(pid, signal.SIGSTOP))
    assert "rank 1" in reason
    for name, stream in disturbed.items():
        assert stream.result() == undisturbed[name].output, name
        assert stream.logprobs == pytest.approx(undisturbed[name].logprobs, abs=1e-4), name
        assert stream.pause_s > HANGS_UP_S, "a client that waits in silence would have gone"
    assert len(undisturbed["log-probabilities"].logprobs) == 4 * 100
    watching.join(120)
    assert ": waiting" in watching.lines
    assert watching.lines[-2] == "data: [DONE]"


def drafted(served: Server) -> float:
    page = HTTP.get(f"{served.url}/metrics", timeout=120).text
    name = "cenacle_spec_decode_num_draft_tokens_total"
    found = re.search(rf'^{name}{{source="text"}} ([\d.e+]+)$', page, re.MULTILINE)
    assert found, page
    return float(found.group(1))


def test_an_answer_with_drafts_goes_on_and_a_rank_without_memory_is_named(served: Server) -> None:
    name = "log-probabilities"
    undisturbed = Streaming(served, name)
    undisturbed.result()
    before = drafted(served)
    assert before > 0
    stream = Streaming(served, name)  # by itself, so tokens are drafted
    pid = pids_of(served)[1]

    # Prompts beside an answer are read in small chunks: what needs memory is many caches.
    bodies = [
        {"messages": [{"role": "user", "content": f"{i} + 30? " * 80}], "max_tokens": 2, "n": 8}
        for i in range(11, 17)
    ]
    hungry = [threading.Thread(target=served.post, kwargs={"json": body}) for body in bodies]

    def starve() -> None:
        """No more memory for a rank, and prompts that need some."""
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (size, size))
        for thread in hungry:
            thread.start()

    reason = recovers(served, [stream], starve)
    assert "rank 1" in reason
    assert "memory" in reason
    assert stream.result() == undisturbed.output
    assert stream.logprobs == pytest.approx(undisturbed.logprobs, abs=1e-4)
    for thread in hungry:
        thread.join(300)
    assert drafted(served) > before
